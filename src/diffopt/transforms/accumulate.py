"""accumulate(): one step for the mean of k gradients."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._rule import checks
from diffopt._tree import Tree
from diffopt.optimizer import Optimizer, overwriting, refuse_gradients
from diffopt.transforms._base import (
    Leaves,
    Wrapper,
    averages,
    check_record,
    copy_,
    gather,
    select,
    wide,
)


class AccumulateState(NamedTuple):
    """State of `accumulate`: calls so far, the sum since the last step, the optimizer's state."""

    step: Any
    grad_sum: Tree
    inner: Any


torch.serialization.add_safe_globals([AccumulateState])


def accumulate(optimizer: Optimizer[Any, Any], k: int) -> Optimizer[AccumulateState, Any]:
    """Every k-th call takes one step, with the mean of the last k gradients.

        s <- s + g
        p <- optimizer(p, s / k), s <- 0   at the calls k, 2k, 3k, ...

    For a loss that is a mean over batches of equal size, this is one step on the union of k of
    them. The choice is made by `torch.where`: the optimizer's step is computed at every call,
    except in `update_`. With k = 1 this is the optimizer itself.

    Args:
        optimizer: any optimizer.
        k: the number of gradients, >= 1.

    Returns:
        The optimizer, with the same hyperparameters. Its state has `step`, which counts calls, on
        the CPU; `grad_sum`, in float32 for half-precision params; and `inner`. A tensor without a
        gradient at a k-th call takes no step, and its sum is kept for the next.

    Raises:
        TypeError: `optimizer` is not an optimizer.
        ValueError: `k` is not an integer >= 1.

    Example:
        >>> import torch, diffopt
        >>> opt = diffopt.transforms.accumulate(diffopt.sgd(), k=2)
        >>> p = torch.zeros(1)
        >>> state, hp = opt.init(p), opt.hparams(lr=1.0)
        >>> for g in (1.0, 3.0, 5.0):
        ...     p, state = opt.update(p, torch.tensor([g]), state, hp)
        ...     p.item(), state.grad_sum.item()
        (0.0, 1.0)
        (-2.0, 0.0)
        (-2.0, 5.0)
    """
    if isinstance(k, bool) or not isinstance(k, numbers.Integral) or k < 1:
        raise ValueError(f"k is {k!r}, but must be an integer >= 1")
    return Accumulate(optimizer, int(k))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Accumulate(Wrapper[AccumulateState]):
    """What `accumulate` returns."""

    k: int

    def init(self, params: Tree) -> AccumulateState:
        inner = super().init(params)
        step = torch.zeros((), dtype=torch.float64, device="cpu")
        return AccumulateState(step, _tree.map(lambda p: torch.zeros_like(wide(p)), params), inner)

    def update(
        self, params: Tree, grads: Tree, state: AccumulateState, hparams: Any
    ) -> tuple[Tree, AccumulateState]:
        leaves, sums = self._gather(params, grads, state)
        step, new_sums = state.step + 1, _sums(leaves, sums)
        due = step % self.k == 0
        means = [
            None if mean is None else torch.where(due.to(mean.device), mean, 0)
            for mean in self._means(leaves, new_sums)
        ]
        wide_params, _ = leaves.wide()
        new, inner = self.optimizer.update(wide_params, leaves.tree(means), state.inner, hparams)
        rest = [
            old if new is None else torch.where(due.to(new.device), 0, new)
            for old, new in zip(sums, new_sums, strict=True)
        ]
        kept, inner = select(due, (leaves.narrow(new, wide_params), inner), (params, state.inner))
        return kept, AccumulateState(step, leaves.tree(rest), inner)

    def update_(self, params: Tree, grads: Tree, state: AccumulateState, hparams: Any) -> None:
        refuse_gradients(grads, hparams)
        with torch.no_grad():
            leaves, sums = self._gather(params, grads, state)
            calls = _modes.number_of(state.step)
            if isinstance(calls, Tensor):  # cannot branch on it
                return super().update_(params, grads, state, hparams)
            checks.writable({"params": leaves.params, "state.grad_sum": sums}, params, state.step)
            check_record(hparams, self.hparams)
            new_sums, due = _sums(leaves, sums), (calls + 1) % self.k == 0
            if due:
                means, (wide_params, _) = leaves.tree(self._means(leaves, new_sums)), leaves.wide()
                pairs = overwriting({"params": params}, {"params": wide_params})
                self.optimizer.update_(wide_params, means, state.inner, hparams)
                copy_(pairs)
            for old, new in zip(sums, new_sums, strict=True):
                if new is not None:
                    old.zero_() if due else old.copy_(new)
            state.step.add_(1)

    def _means(self, leaves: Leaves, sums: list[Tensor | None]) -> list[Tensor | None]:
        """The means of k gradients, in the dtypes they are computed in."""
        pairs = zip(sums, leaves.grads, strict=True)
        return [
            None if s is None or g is None else (s / self.k).to(wide(g).dtype) for s, g in pairs
        ]

    def _gather(
        self, params: Tree, grads: Tree, state: AccumulateState
    ) -> tuple[Leaves, list[Tensor]]:
        leaves = gather(params, grads)
        checks.instance(state, AccumulateState, "state", "init()")
        checks.step(state.step, leaves.params, params)
        names = ("state.grad_sum", "params")
        sums = _tree.leaves_like(state.grad_sum, leaves.spec, params, names)
        averages(sums, leaves.params, params, names[0])
        return leaves, sums


def _sums(leaves: Leaves, sums: list[Tensor]) -> list[Tensor | None]:
    """The sums with the new gradients added; None where there is no gradient."""
    pairs = zip(sums, leaves.grads, strict=True)
    return [None if grad is None else wide(s) + wide(grad) for s, grad in pairs]
