"""Clipping gradients: by their global norm, by each tensor's norm, or element by element."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from diffopt import _modes, _torch
from diffopt._modes import exact, real
from diffopt._rule import ops
from diffopt._rule.hyper import Hyperparameter, hparams, number
from diffopt.transforms._base import Stateless, Tensors, wide
from diffopt.transforms._sharded import beside, mesh_of, whole


@hparams
class MaxNorm:
    """Hyperparameters of `clip_by_global_norm` and `clip_by_norm`."""

    max_norm: Hyperparameter = number(1.0, ge=0)


@hparams
class ClipValue:
    """Hyperparameters of `clip_by_value`."""

    clip_value: Hyperparameter = number(1.0, ge=0)


class ClipByGlobalNorm(Stateless[MaxNorm]):
    """Scale all gradients down together, so that their global norm is at most `max_norm`.

    With n the square root of the sum of |g|^2 over every gradient of every tensor,

        g <- g * min(1, max_norm / (n + 1e-6))

    as in `torch.nn.utils.clip_grad_norm_`. Hyperparameters: `max_norm` >= 0 (1.0), a number, a
    tensor or a prefix tree of the params (then each tensor has its own numerator).

    Missing gradients are ignored, and norms are computed in at least float32; DTensors and plain
    tensors count alike. Where the minimum is 1, as for zero gradients and for a norm equal to the
    bound, derivatives of any order are those of the identity. One NaN makes all gradients NaN, and
    one infinite gradient makes itself NaN and the others zero, as in torch: `skip_nonfinite` skips
    such steps. For norms of several groups of params see `masked`.

    Examples:
        >>> import torch, diffopt
        >>> clip = diffopt.transforms.clip_by_global_norm()
        >>> grads = [torch.tensor([3.0]), torch.tensor([[4.0]]), None]
        >>> clip.apply(grads, grads[:2] + [torch.ones(1)], (), clip.hparams(max_norm=1.0))[0]
        [tensor([0.6000]), tensor([[0.8000]]), None]

    Source: Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks",
    2013, algorithm 1, with torch's 1e-6.
    """

    hparams: ClassVar[type[MaxNorm]] = MaxNorm

    def transform(self, grads: Tensors, params: Tensors, records: list[MaxNorm]) -> Tensors:
        if not grads:
            return []
        norm = _global_norm(grads)
        made: dict[Any, Tensor] = {}
        factors: Tensors = []
        for grad, record in zip(grads, records, strict=True):
            key = id(record), mesh_of(grad)
            if key not in made:
                made[key] = _coefficient(norm, record, grad)
            factors.append(made[key])
        plain = len(made) == 1 and not factors[0].dim() and _modes.all_plain(grads)
        if plain and not _modes.differentiated([*grads, factors[0]]):
            return list(_torch.foreach["mul"][0](grads, factors[0]))
        return [grad * factor for grad, factor in zip(grads, factors, strict=True)]


clip_by_global_norm = ClipByGlobalNorm


class ClipByNorm(Stateless[MaxNorm]):
    """Scale each tensor's gradient down, so that its norm is at most `max_norm`.

    With n the square root of the sum of |g|^2 over the tensor,

        g <- g * min(1, max_norm / (n + 1e-6))

    which is `torch.nn.utils.clip_grad_norm_` applied to one tensor at a time. Hyperparameters:
    `max_norm` >= 0 (1.0), a number, a tensor or a prefix tree of the params.

    Where the minimum is 1, as for a zero gradient, derivatives of any order are those of the
    identity. One NaN in a gradient makes all of it NaN.

    Examples:
        >>> import torch, diffopt
        >>> clip = diffopt.transforms.clip_by_norm()
        >>> grads = [torch.tensor([3.0, 4.0]), torch.tensor([0.5])]
        >>> clip.apply(grads, grads, (), clip.hparams(max_norm=1.0))[0]
        [tensor([0.6000, 0.8000]), tensor([0.5000])]
    """

    hparams: ClassVar[type[MaxNorm]] = MaxNorm

    def transform(self, grads: Tensors, params: Tensors, records: list[MaxNorm]) -> Tensors:
        norms = [whole(ops.sqrt(_square(grad))) for grad in grads]
        return [g * _coefficient(n, r, g) for g, n, r in zip(grads, norms, records, strict=True)]


clip_by_norm = ClipByNorm


class ClipByValue(Stateless[ClipValue]):
    """Clamp every element of a gradient between `-clip_value` and `clip_value`.

        g <- min(max(g, -clip_value), clip_value)

    as in `torch.nn.utils.clip_grad_value_`; for a complex gradient, real and imaginary parts
    separately. Hyperparameters: `clip_value` >= 0 (1.0), a number, a tensor or a prefix tree of the
    params.

    Its derivative with respect to the gradient is 1 inside and on the bounds, and 0 outside. NaN
    stays NaN.

    Examples:
        >>> import torch, diffopt
        >>> clip = diffopt.transforms.clip_by_value()
        >>> grad = torch.tensor([-3.0, 0.2, 0.7])
        >>> clip.apply(grad, grad, (), clip.hparams(clip_value=0.5))[0]
        tensor([-0.5000,  0.2000,  0.5000])
    """

    hparams: ClassVar[type[ClipValue]] = ClipValue

    def transform(self, grads: Tensors, params: Tensors, records: list[ClipValue]) -> Tensors:
        return [_between(g, r.clip_value) for g, r in zip(grads, records, strict=True)]


clip_by_value = ClipByValue


def _global_norm(grads: Tensors) -> Tensor:
    """The norm of all tensors together, a plain 0-d tensor in float64."""
    device = grads[0].device
    if _modes.differentiated(grads):
        return ops.sqrt(sum(whole(_square(grad)).to(device) for grad in grads))
    groups: dict[Any, Tensors] = {}  # a kernel does not accept DTensors of several meshes
    for grad in grads:
        groups.setdefault(mesh_of(grad), []).append(real(wide(grad)))
    norms = [norm for group in groups.values() for norm in _torch.foreach_norm(group)]
    return exact(torch.stack([whole(norm).to(device) for norm in norms])).square().sum().sqrt()


def _square(grad: Tensor) -> Tensor:
    """The squared norm, a 0-d tensor in float64."""
    return exact(real(wide(grad)).square().sum())


def _coefficient(norm: Tensor, record: MaxNorm, grad: Tensor) -> Tensor:
    """`min(1, max_norm / (norm + 1e-6))`, with the derivatives of 1 where that is the minimum.

    NaN stays NaN, so that no gradient remains unclipped if another one is NaN.
    """
    bound = record.max_norm
    ratio = bound / (beside(norm, bound if isinstance(bound, Tensor) else grad) + 1e-6)
    return beside(torch.where(ratio >= 1, 1, ratio), grad)


def _between(grad: Tensor, bound: Any) -> Tensor:
    """The gradient clamped to [-bound, bound], with the identity's derivatives at the bounds."""
    pairs = real(grad)
    if isinstance(bound, Tensor):
        if grad.is_complex() and bound.dim() > 0:
            bound = bound.unsqueeze(-1)
        bound = beside(bound, grad)
        outside = torch.minimum(torch.maximum(pairs, -bound), bound)  # both keep NaN
    else:
        outside = pairs.clamp(-bound, bound)
    # At its bounds clamp has the derivative 1 in torch 2.13, but 0 in 2.15.
    new = torch.where(pairs.abs() <= bound, pairs, outside).to(pairs.dtype)
    return torch.view_as_complex(new) if grad.is_complex() else new
