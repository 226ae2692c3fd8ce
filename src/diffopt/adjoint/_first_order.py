"""Results that can be differentiated once, where a second derivative would be a wrong one."""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from diffopt import _function, _modes, _tree
from diffopt._tree import Tree


def first_order(tree: Tree, message: str) -> Tree:
    """The same values and first derivatives, of which a further derivative raises `message`.

    That is so in reverse and forward mode and any mixture of the two, but not for the derivative of
    a vector-Jacobian product by its vector, which is right. Not noticed under torch.compile.
    """
    if _modes.compiling():
        return tree

    def mark(leaf: Any) -> Any:
        marked = isinstance(leaf, Tensor) and _function.has_derivative(leaf)
        return cast(Any, _FirstOrder.apply(message, leaf)) if marked else leaf

    return _tree.map(mark, tree)


def constant_in(gradient: Tensor, inputs: Iterable[Tensor], message: str) -> Tensor:
    """A gradient whose derivative by the inputs raises `message`."""
    zero = cast(Tensor, _Refused.apply(message, *filter(_function.has_derivative, inputs)))
    return gradient + zero.to(gradient.device, gradient.dtype)


class _FirstOrder(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.message, x = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, Tensor]:
        x = torch._C._functorch.unwrap_if_dead(ctx.saved_tensors[0])
        return None, constant_in(cotangents[0], [x], ctx.message)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return constant_in(tangents[1], ctx.saved_tensors, ctx.message)


class _Refused(torch.autograd.Function):
    """Zero, whose derivative raises: a node of its own, so that it does only where it is asked."""

    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, *inputs: Tensor) -> Tensor:
        return torch.zeros((), device=inputs[0].device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> None:
        raise NotImplementedError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(ctx.message)
