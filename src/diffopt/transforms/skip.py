"""skip_nonfinite(): skip steps whose gradients have infinite or NaN entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffopt import _modes
from diffopt._modes import real
from diffopt._tree import Tree
from diffopt.optimizer import Write
from diffopt.transforms._base import Leaves, Wrapper, gather, select
from diffopt.transforms._sharded import mesh_of, own, total


class SkipNonfinite(Wrapper[Any]):
    """Skip steps whose gradients are not all finite: params and state stay unchanged.

        p, s <- optimizer(p, g, s)   if every g of every tensor is finite, else p, s

    The choice is made by `torch.where`, for each model under `torch.vmap`. Skipped steps are not
    counted in the state's `step`. The derivative of one is the identity with respect to params and
    state, and zero with respect to gradients and hyperparameters.

    State and hyperparameters are those of the optimizer. Processes that share DTensors skip
    together, even if only one of them has the nonfinite gradient. Under plain autograd, derivatives
    through a skipped step do not enter the graph of its gradients, which is full of NaN: the result
    is that of a loop without the step. Under torch.func transforms zeros pass through that graph,
    and a loss can turn them into NaN. `update_` synchronizes with the device to decide whether to
    step.

    Args:
        optimizer: any optimizer.

    Raises:
        TypeError: `optimizer` is not an optimizer.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.transforms.skip_nonfinite(diffopt.sgd())
        >>> p = torch.zeros(2)
        >>> state, hp = opt.init(p), opt.hparams(lr=0.1)
        >>> opt.update(p, torch.tensor([1.0, torch.nan]), state, hp)[0]
        tensor([0., 0.])
        >>> opt.update(p, torch.tensor([1.0, 2.0]), state, hp)[0]
        tensor([-0.1000, -0.2000])
    """

    def update(self, params: Tree, grads: Tree, state: Any, hparams: Any) -> tuple[Tree, Any]:
        leaves = gather(params, grads)
        finite = _all_finite(leaves)
        if _modes.number_of(finite) is True:
            return self.optimizer.update(params, grads, state, hparams)
        grads = leaves.filled(finite_only(finite, leaves.gradients()))
        new = self.optimizer.update(params, grads, state, hparams)
        return select(finite, new, (params, state))

    def prepare_(self, params: Tree, grads: Tree, state: Any, hparams: Any) -> Write:
        if _modes.observed():
            return super().prepare_(params, grads, state, hparams)
        if _all_finite(gather(params, grads, writable=True)).item():
            return self.optimizer.prepare_(params, grads, state, hparams)
        return lambda: None


skip_nonfinite = SkipNonfinite


def _all_finite(leaves: Leaves) -> Tensor:
    """Whether the minimum and maximum of every gradient are finite, in one pass over memory.

    Each process checks its own part of a DTensor, which may be empty; then all agree.
    """
    grads = [grad.detach() for grad in leaves.gradients()]
    parts = [real(own(grad)) for grad in grads]
    device = parts[0].device if parts else torch.device("cpu")
    ends = [end.to(device) for part in parts if part.numel() for end in part.aminmax()]
    finite = torch.stack(ends).isfinite().all() if ends else torch.tensor(True, device=device)
    meshes = {mesh_of(grad): grad for grad in grads if mesh_of(grad) is not None}
    for grad in meshes.values():
        wrong = (~finite).to(torch.float32)  # gloo cannot sum bools
        finite = total(wrong, grad) == 0
    return finite


def finite_only(finite: Tensor, grads: list[Tensor]) -> list[Tensor]:
    """The gradients, or zeros if they are not finite."""
    if _modes.observed() or _modes.forward_differentiated():
        return _chosen(finite, grads)
    return list(_Chosen.apply(finite, *grads)) if grads else []


def _chosen(finite: Tensor, grads: list[Tensor]) -> list[Tensor]:
    return [torch.where(finite.to(grad.device), grad, 0) for grad in grads]


class _Chosen(torch.autograd.Function):
    """`_chosen`, whose backward ends at a skipped step: further back, zeros would meet NaN."""

    @staticmethod
    def forward(ctx: Any, finite: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        ctx.finite = finite
        return tuple(_chosen(finite, list(grads)))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(cotangents if ctx.finite.item() else [None] * len(cotangents)))
