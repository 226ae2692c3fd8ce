"""Reverse mode through the last k steps only."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from diffopt import _modes, _tree
from diffopt._arguments import check_integer
from diffopt._diff import functions
from diffopt._diff.unmodified import noted, unwritten
from diffopt._tree import Tree
from diffopt.adjoint._base import Adjoint, GradientStep, Step, all_done
from diffopt.adjoint._steps import taken


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
        if isinstance(xs, list):
            start = max(len(xs) - self.k, 0)
            first, last = xs[:start], deque(noted(xs[start:]))
        else:
            last: Any = deque()  # torch.compile traces no deque[Any]()
            first = _but_last(xs, self.k, last, torch.is_grad_enabled())
        with torch.no_grad():
            end, outputs = taken(step, _tree.detach(carry), args, first)
            known = isinstance(step, GradientStep) and step.compiler is None
            if not (known and functions.constant()):  # else its gradient has detached them
                outputs = [*map(_tree.detach, outputs)]
        carry, more = taken(step, _tree.detach(end) if outputs else carry, args, unwritten(last))
        outputs += more
        if isinstance(step, GradientStep) and self.k and outputs:
            _refuse_steps_not_taken(outputs[-1])
        return carry, outputs


def _but_last(xs: Iterable[Any], k: int, last: deque[Any], enabled: bool) -> Iterator[Any]:
    """All but the last k, which are in `last` in the end: how many there are may be unknown."""
    pairs = noted(xs)
    while True:
        with torch.set_grad_enabled(enabled):  # as an iterator computes hyperparameters
            last.extend(itertools.islice(pairs, k + 1 - len(last)))
        if len(last) <= k:
            return
        yield from unwritten([last.popleft()])


def _refuse_steps_not_taken(output: Any) -> None:
    """Raise if an example of a batch was done before the last step of the loop, and others not."""
    if _modes.holds_anywhere(output[2]) and not all_done(output):
        raise ValueError(
            "under vmap, tol ends the examples after different numbers of steps, so the last steps "
            "of the loop, which Truncated differentiates, are not the last steps of each"
        )
