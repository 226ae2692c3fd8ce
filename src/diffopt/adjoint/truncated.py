"""Reverse mode through the last k steps only."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from diffopt import _modes, _tree
from diffopt._arguments import check_integer
from diffopt._tree import Tree
from diffopt.adjoint._base import Adjoint, GradientStep, Step, all_done, is_compiled
from diffopt.adjoint._steps import Steps, taken


@dataclass(frozen=True)
class Truncated(Adjoint):
    """Biased: only the last `k` steps are differentiated; those before build no graph.

    Memory is that of `k` steps. Gradients with respect to hyperparameters, arguments and batches
    are those of the last `k` steps, a biased estimate. The initial params, state and buffers
    receive none if there are more than `k` steps. `Truncated(0)` builds no graph at all, like
    `adjoint=None`.

    Args:
        k: the number of steps, >= 0.

    Raises:
        ValueError: `k` is not an integer >= 0.

    Examples:
        >>> import torch, diffopt
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> opt = diffopt.sgd()
        >>> sol = diffopt.minimize(
        ...     lambda w: 0.5 * w**2, torch.tensor(1.0), optimizer=opt,
        ...     hparams=opt.hparams(lr=lr), steps=3, adjoint=diffopt.adjoint.Truncated(1),
        ... )
        >>> torch.autograd.grad(sol.params, lr)  # -w_2 = -(1 - lr)^2; exact: three times that
        (tensor(-0.8100),)

    Source: Shaban et al., "Truncated back-propagation for bilevel optimization", 2019.
    """

    k: int

    def __post_init__(self) -> None:
        check_integer(self.k, "k", 0)

    def run(self, step: Step, carry: Tree, args: Tree, xs: Iterable[Any]) -> tuple[Tree, list[Any]]:
        if is_compiled(step) and isinstance(xs, list):
            carry, outputs = self._together(step, carry, args, xs)
        else:
            carry, outputs = self._one_by_one(step, carry, args, xs)
        if isinstance(step, GradientStep) and self.k and outputs:
            _refuse_steps_not_taken(outputs[-1])
        return carry, outputs

    def _together(
        self, step: Step, carry: Tree, args: Tree, xs: list[Any]
    ) -> tuple[Tree, list[Any]]:
        """Compiled steps, which are run together."""
        start, outputs = max(len(xs) - self.k, 0), list[Any]()
        if start:
            with torch.no_grad():
                inputs = _tree.detach(carry), args, xs[:start]
                carry, outputs = _tree.detach(taken(step, *inputs))
        carry, last = taken(step, carry, args, xs[start:])
        return carry, [*outputs, *last]

    def _one_by_one(
        self, step: Step, carry: Tree, args: Tree, xs: Iterable[Any]
    ) -> tuple[Tree, list[Any]]:
        outputs: list[Any] = []
        last: deque[Any] = deque()
        steps: Steps | None = None
        for x in xs:  # read k ahead: the number of steps may be unknown
            last.append(x)
            if len(last) > self.k:
                steps = steps or Steps(step, _tree.detach(carry), args)
                with torch.no_grad():
                    outputs.append(steps.take(last.popleft()))
                if steps.ended:
                    break
        # One by one: the list, whose length varies, would be a new structure each time.
        outputs = [*map(_tree.detach, outputs)]
        carry = _tree.detach(steps.carry()) if steps else carry
        for x in last:
            carry, output = step(carry, args, x)
            outputs.append(output)
        return carry, outputs


def _refuse_steps_not_taken(output: Any) -> None:
    """Raise if an example of a batch was done before the last step of the loop, and others not."""
    if _modes.holds_anywhere(output[2]) and not all_done(output):
        raise ValueError(
            "under vmap, tol ends the examples after different numbers of steps, so the last steps "
            "of the loop, which Truncated differentiates, are not the last steps of each"
        )
