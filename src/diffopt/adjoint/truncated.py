"""Reverse mode through the last steps only."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from diffopt import _modes, _tree
from diffopt._arguments import check_integer
from diffopt._tree import Tree
from diffopt.adjoint._base import Adjoint, GradientStep, Step


@dataclass(frozen=True)
class Truncated(Adjoint):
    """The last `k` steps are differentiated exactly; those before build no graph.

    Memory is that of `k` steps. Gradients to hyperparameters, arguments and batches are those of
    the last `k` steps, a biased estimate. The initial parameters, state and buffers receive none if
    there are more than `k` steps. `Truncated(0)` builds no graph at all, as `adjoint=None` does.

    Args:
        k: number of steps, >= 0.

    Raises:
        ValueError: `k` is not an integer >= 0.

    Example:
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
        outputs: list[Any] = []
        last: deque[Any] = deque()
        for x in xs:  # read k ahead: the number of steps may not be known
            last.append(x)
            if len(last) > self.k:
                with torch.no_grad():
                    carry, output = _tree.detach(step(_tree.detach(carry), args, last.popleft()))
                outputs.append(output)
        for x in last:
            carry, output = step(carry, args, x)
            outputs.append(output)
        if isinstance(step, GradientStep) and last:
            _refuse_steps_not_taken(outputs[-1])
        return carry, outputs


def _refuse_steps_not_taken(output: Any) -> None:
    """Raise where an example of a batch was done before the last of its steps."""
    done = None if output[2] is None else _modes.concrete(output[2])
    if done is not None and bool(done.any()):
        raise ValueError(
            "under vmap, tol ends the examples after different numbers of steps, so that the last "
            "steps of the loop, which Truncated differentiates, are not theirs"
        )
