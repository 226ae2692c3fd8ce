"""Results whose derivatives are limited: what would be wrong raises."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree
from diffopt._diff import functions
from diffopt._tree import Tree


def first_order(tree: Tree, message: str) -> Tree:
    """The same values and first derivatives; differentiating these again raises `message`.

    This holds in reverse and forward mode and any mixture of the two, but not for the derivative of
    a vector-Jacobian product with respect to its vector, which is correct. torch.compile does not
    raise.
    """
    if _modes.compiling():
        return tree

    def mark(leaf: Any) -> Any:
        marked = isinstance(leaf, Tensor) and _modes.has_derivative(leaf)
        return cast(Any, _FirstOrder.apply(message, leaf)) if marked else leaf

    return _tree.map(mark, tree)


def without_derivative(tree: Tree, sources: Tree, message: str) -> Tree:
    """The same values, whose derivative with respect to the sources is nonzero but unavailable.

    Reverse mode raises `message`. Forward mode, which computes tangents of all results, gives NaN.
    """
    tensors, join = _tree.split(tree)
    chosen = [i for i, x in enumerate(tensors) if _modes.has_derivative(x)]
    forward = _modes.forward_differentiated()
    inputs = [
        x
        for x in _tree.tensors(sources)
        if _modes.has_derivative(x) and (forward or _modes.needs_gradient(x))
    ]
    if _modes.compiling() or not chosen or not inputs:
        return tree
    results = cast(Any, _Lost.apply(message, len(chosen), *(tensors[i] for i in chosen), *inputs))
    return join(functions.replaced(tensors, chosen, results))


def once(message: str, function: Callable[[Tree], Tree], inputs: Tree) -> Tree:
    """`function(inputs)`, whose derivatives raise `message`."""
    tensors, join = _tree.split(inputs)
    flat = functions.Flat(function, join)
    results: Any = _Once.apply(message, flat, *tensors)
    return flat.join(results)


def constant_in(gradient: Tensor, inputs: Iterable[Tensor], message: str) -> Tensor:
    """A gradient whose derivative with respect to the inputs raises `message`."""
    sources = list(filter(_modes.has_derivative, inputs))
    zero = once(message, lambda sources: torch.zeros((), device=sources[0].device), sources)
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
        x = _torch.unwrap_if_dead(ctx.saved_tensors[0])
        return None, constant_in(cotangents[0], [x], ctx.message)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return constant_in(tangents[1], ctx.saved_tensors, ctx.message)


class _Raising(torch.autograd.Function):
    """A function whose derivatives raise the message that is its first argument."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise NotImplementedError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(ctx.message)


class _Once(_Raising):
    @staticmethod
    def forward(message: str, function: functions.Flat, *inputs: Tensor) -> tuple[Tensor, ...]:
        return function.apart(inputs)


class _Lost(_Raising):
    @staticmethod
    def forward(message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(functions.batched_like([x.clone() for x in tensors[:count]], tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.message, ctx.count = inputs[0], len(inputs)
        ctx.save_for_backward(*output)  # torch's rule for vmap requires the same tensors as below
        ctx.save_for_forward(*output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, ...]:
        """Zero cotangents do not raise: they come from a later loop independent of this one."""
        for values in map(_modes.concrete, cotangents):
            if values is None or bool(values.any()):
                raise NotImplementedError(ctx.message)
        return (None,) * ctx.count

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        return tuple(torch.full_like(x, torch.nan) for x in ctx.saved_tensors)
