"""DTensors together with plain tensors, which are the same in every process of the mesh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def mesh_of(tensor: Tensor) -> Any:
    """The device mesh of a DTensor; None for a plain tensor."""
    return getattr(tensor, "device_mesh", None)


def own(tensor: Any) -> Tensor:
    """The part of a DTensor that is in this process; not differentiable."""
    return tensor if mesh_of(tensor) is None else tensor.detach().to_local()


def whole(tensor: Tensor) -> Tensor:
    """The full value of a DTensor, the same plain tensor in every process."""
    return tensor if mesh_of(tensor) is None else _Whole.apply(tensor)


def beside(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor on the device of another one, and as a DTensor if that is one."""
    tensor, mesh = tensor.to(other.device), mesh_of(other)
    if mesh is None or mesh_of(tensor) is not None:
        return tensor
    return _Beside.apply(tensor, type(other), mesh)


def total(tensor: Tensor, other: Any) -> Tensor:
    """The sum of a tensor over all processes of a DTensor's mesh; not differentiable."""
    from torch.distributed.tensor import Partial

    mesh = other.device_mesh
    placements = [Partial()] * mesh.ndim
    return type(other).from_local(tensor, mesh, placements, run_check=False).full_tensor()


# Through torch's own `full_tensor` and `from_local`, second derivatives of a clipped tree are
# silently wrong with two processes (seen in torch 2.13). Each of these is the other's transpose.


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        ctx.kind, ctx.mesh = type(tensor), tensor.device_mesh
        return tensor.full_tensor()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return _Beside.apply(cotangents[0], ctx.kind, ctx.mesh)


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, kind: Any, mesh: Any) -> Tensor:
        from torch.distributed.tensor import Replicate

        return kind.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return _Whole.apply(cotangents[0]), None, None
