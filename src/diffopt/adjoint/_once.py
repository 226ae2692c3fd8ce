"""Derivatives that are not differentiated again."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from diffopt import _function


def once(
    message: str, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """`function(*inputs)`, a derivative of which raises `message`."""
    return cast(Any, _Once.apply(message, function, *inputs))


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        message: str, function: Callable[..., Sequence[Tensor]], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(_function.batched_like(function(*inputs), inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> None:
        raise NotImplementedError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(ctx.message)
