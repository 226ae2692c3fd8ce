"""accumulate(): one step for the mean of k gradients."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._rule import checks
from diffopt._rule.rule import zeros_like
from diffopt._tree import Tree
from diffopt.optimizer import Write, copy_, overwriting
from diffopt.transforms._base import (
    Leaves,
    Tensors,
    Wrapper,
    everywhere,
    gather,
    select,
    wide,
)
from diffopt.transforms._records import check_record


class AccumulateState(NamedTuple):
    """State of `accumulate`: calls so far, the sum since the last step, the optimizer's state."""

    step: Any
    grad_sum: Tree
    inner: Any


torch.serialization.add_safe_globals([AccumulateState])


class Accumulate(Wrapper[AccumulateState]):
    """Every k-th call takes one step, with the mean of the last k gradients.

        s <- s + g
        p <- optimizer(p, s / k), s <- 0   at the calls k, 2k, 3k, ...

    For a loss that is a mean over batches of equal size, this is one step on the union of k of
    them. The choice is made by `torch.where`: the optimizer's step is computed at every call,
    except in `update_`. With k = 1 this is the optimizer itself.

    Hyperparameters are those of the optimizer. The state has `step`, which counts calls, on the
    CPU; `grad_sum`, in float32 for half-precision params; and `inner`. A tensor without a gradient
    at a k-th call takes no step, and its sum is kept for the next.

    Args:
        optimizer: any optimizer.
        k: the number of gradients, >= 1.

    Raises:
        TypeError: `optimizer` is not an optimizer.
        ValueError: `k` is not an integer >= 1.

    Examples:
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

    k: int

    def __post_init__(self) -> None:
        super().__post_init__()
        k: Any = self.k
        if isinstance(k, bool) or not isinstance(k, numbers.Integral) or k < 1:
            raise ValueError(f"k is {_tree.shown(k)}, but must be an integer >= 1")
        object.__setattr__(self, "k", int(k))

    def init(self, params: Tree) -> AccumulateState:
        inner = super().init(params)
        step = torch.zeros((), dtype=torch.float64, device="cpu")
        return AccumulateState(step, _tree.map(zeros_like, params), inner)

    def update(
        self, params: Tree, grads: Tree, state: AccumulateState, hparams: Any
    ) -> tuple[Tree, AccumulateState]:
        leaves, old = self._gather(params, grads, state)
        step, sums = state.step + 1, _sums(leaves, old)
        due = step % self.k == 0
        on = everywhere(due)
        means = (torch.where(on(m.device), m, 0) for m in self._means(leaves, sums))
        wide_params, _ = leaves.wide()
        new, inner = self.optimizer.update(wide_params, leaves.filled(means), state.inner, hparams)
        kept, inner = select(due, (leaves.narrow(new, wide_params), inner), (params, state.inner))
        rest = (torch.where(on(s.device), 0, s) for s in sums)
        return kept, AccumulateState(step, leaves.filled(rest, old), inner)

    def prepare_(self, params: Tree, grads: Tree, state: AccumulateState, hparams: Any) -> Write:
        leaves, old = self._gather(params, grads, state)
        calls = _modes.number_of(state.step)
        if isinstance(calls, Tensor):  # cannot branch on it
            return super().prepare_(params, grads, state, hparams)
        checks.writable({"params": leaves.params, "state.grad_sum": old}, params, state.step)
        check_record(hparams, self.hparams)
        sums, kept = _sums(leaves, old), leaves.moved(old)
        if (calls + 1) % self.k:

            def add() -> None:
                copy_(zip(kept, sums, strict=True))
                state.step.add_(1)

            return add
        means, (wide_params, _) = leaves.filled(self._means(leaves, sums)), leaves.wide()
        pairs = overwriting({"params": params}, {"params": wide_params})
        update_ = self.optimizer.prepare_(wide_params, means, state.inner, hparams)

        def move() -> None:
            update_()
            copy_(pairs)
            for tensor in kept:
                tensor.zero_()
            state.step.add_(1)

        return move

    def _means(self, leaves: Leaves, sums: Tensors) -> Tensors:
        """The means of k gradients, in the dtypes they are computed in."""
        pairs = zip(sums, leaves.gradients(), strict=True)
        return [(s / self.k).to(wide(grad).dtype) for s, grad in pairs]

    def _gather(self, params: Tree, grads: Tree, state: Any) -> tuple[Leaves, Tensors]:
        leaves = gather(params, grads)
        return leaves, leaves.averages(state, AccumulateState, "grad_sum", params)


accumulate = Accumulate


def _sums(leaves: Leaves, old: Tensors) -> Tensors:
    """The sums with the new gradients added, of the leaves that have one."""
    pairs = zip(leaves.moved(old), leaves.gradients(), strict=True)
    return [wide(s) + wide(grad) for s, grad in pairs]
