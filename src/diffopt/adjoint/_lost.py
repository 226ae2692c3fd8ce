"""Results without the derivatives that their values suggest."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from diffopt import _function, _modes, _tree
from diffopt._tree import Tree


def without_derivative(tree: Tree, sources: Tree, message: str) -> Tree:
    """The same values, where a derivative by the sources is not zero but cannot be had.

    Reverse mode raises `message`. Forward mode, which meets every result, gives tangents of NaN.
    """
    tensors, join = _tree.split(tree)
    chosen = [i for i, x in enumerate(tensors) if _function.has_derivative(x)]
    inputs = [x for x in _tree.split(sources)[0] if _function.has_derivative(x)]
    if _modes.compiling() or not chosen or not inputs:
        return tree
    results = cast(Any, _Lost.apply(message, len(chosen), *(tensors[i] for i in chosen), *inputs))
    for i, result in zip(chosen, results, strict=True):
        tensors[i] = result
    return join(tensors)


class _Lost(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_function.batched_like([x.clone() for x in tensors[:count]], tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.message = inputs[0]
        ctx.save_for_forward(*output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> None:
        raise NotImplementedError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Sequence[Tensor]:
        return tuple(torch.full_like(x, torch.nan) for x in ctx.saved_tensors)
