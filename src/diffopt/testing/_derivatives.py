"""Checks of derivatives: against finite differences, and at zero gradients.

Params and buffers after two steps are differentiated with respect to all inputs except the step
count, since a rule may treat the first step as a special case.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt import _tree
from diffopt._rule import hyper
from diffopt._rule.leafwise import Leafwise
from diffopt._tree import Tree
from diffopt.testing._assertions import finite, same
from diffopt.testing._case import (
    Case,
    Point,
    generic_point,
    objective,
    random_tensor,
    run_steps,
    total,
)


def derivatives(case: Case) -> None:
    """First and second derivatives, in forward and reverse mode, from a state after two steps."""
    gradcheck(case, generic_point(case))


def derivatives_from_init(case: Case) -> None:
    """The same from the initial state: zero buffers and the largest bias corrections."""
    point = generic_point(case)
    point = point._replace(state=case.optimizer.init(point.params))
    gradcheck(case, point, wrt=("params", "grads", "hparams"), thorough=False)


def derivatives_per_weight(case: Case) -> None:
    """The same with separate hyperparameters for every weight, where that is allowed."""
    if not (case.elementwise or isinstance(case.optimizer, Leafwise)):
        return
    point = generic_point(case)

    def spread(field: hyper.Field, value: Tensor) -> Tree:
        if not (field.per_parameter and field.per_weight):
            return value
        return _tree.map(lambda p: value * (1 - 0.1 * p.abs()), point.params)

    gradcheck(case, point._replace(hparams=hyper.map_fields(spread, point.hparams)), thorough=False)


def jvp(case: Case) -> None:
    """`torch.func.jvp` of two steps, and of their gradient, equals central differences."""
    steps, inputs, _ = as_function(case, generic_point(case))
    directions = tuple(random_tensor(x.shape, x.dtype, 50 + i) for i, x in enumerate(inputs))

    def gradient(*inputs: Tensor) -> Tensor:
        return ravel(torch.func.grad(lambda x: steps(*x).square().sum())(inputs))

    for function in (steps, gradient):
        derivative = torch.func.jvp(function, inputs, directions)[1]
        difference = central_difference(function, inputs, directions)
        same(derivative, difference, "the jvp", rtol=1e-5)


def zero_gradient(case: Case) -> None:
    """A zero tensor with zero gradients has finite derivatives of first and second order.

    If the optimizer keeps it at zero, all other derivatives are as if it were absent; for an
    elementwise optimizer also for a single weight.
    """
    point = generic_point(case)
    padded = with_zeros(case, point)
    extended = meta_gradients(case, padded)
    finite(extended, "derivative")
    moved, _ = run_steps(case, padded._replace(state=case.optimizer.init(padded.params)))
    if moved["zero"].any():
        return
    for order, without in enumerate(meta_gradients(case, point)[:2]):
        params, grads, hparams = extended[order]
        del params["zero"], grads["zero"]
        kept = _tree.map(beginning, (params, grads, hparams), without)
        same(kept, without, "derivative", rtol=1e-9)


def meta_gradients(case: Case, point: Point) -> list[tuple[Tree, Tree, Any]]:
    """First derivatives of an objective, and second ones with respect to hparams and all inputs."""
    leaves, spec = _tree.flatten((point.params, point.grads, point.hparams))
    inputs = [leaf.clone().requires_grad_() for leaf in leaves]
    params, grads, hparams = _tree.unflatten(inputs, spec)
    state = case.optimizer.init(point.params)

    def derive(value: Any) -> Any:
        found = torch.autograd.grad(value, inputs, create_graph=True, materialize_grads=True)
        return _tree.unflatten(found, spec)

    with torch.autograd.set_detect_anomaly(True):
        end, _ = run_steps(case, Point(params, grads, state, hparams), steps=3)
        first = derive(objective(end))
        return [first, derive(total(first[2])), derive(total(first))]


def with_zeros(case: Case, point: Point) -> Point:
    """The problem with an added zero tensor and, if elementwise, an added zero in each tensor."""

    def longer(x: Tensor) -> Tensor:
        return torch.cat([x.flatten(), x.new_zeros(1)]) if case.elementwise else x

    zero = torch.zeros_like(point.params["rest"][0])
    params = {**_tree.map(longer, point.params), "zero": zero.clone()}
    grads = {**_tree.map(longer, point.grads), "zero": zero.clone()}
    return point._replace(params=params, grads=grads)


def as_function(
    case: Case, point: Point, wrt: Collection[str] = Point._fields
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], list[str]]:
    """Two steps as a function of tensors to a vector; its arguments at `point`, and their names."""
    leaves, spec = _tree.flatten(point)
    roots = tuple(f"point.{name}" for name in wrt)
    names = {i: path for i, path in smooth(point, "point") if path.startswith(roots)}

    def function(*inputs: Tensor) -> Tensor:
        values = list(leaves)
        for i, value in zip(names, inputs, strict=True):
            values[i] = value
        end = run_steps(case, _tree.unflatten(values, spec))
        results = _tree.leaves(end)
        return ravel(results[i] for i, _ in smooth(end, "result"))

    return function, tuple(leaves[i].detach().clone() for i in names), list(names.values())


def smooth(tree: Tree, name: str) -> list[tuple[int, str]]:
    """Index and path of every leaf except step counts, other integers and empty tensors."""
    return [
        (i, path)
        for i, (path, leaf) in enumerate(_tree.named(tree, name))
        if leaf.is_floating_point() and leaf.numel() and not path.endswith(".step")
    ]


def gradcheck(
    case: Case, point: Point, wrt: Collection[str] = Point._fields, thorough: bool = True
) -> None:
    """Raise where a derivative is wrong or, if `thorough`, fails for undefined (co)tangents.

    Whether it does depends on the functions a rule calls, not on the values they are given.
    Derivatives are compared in one random direction of each input: first ones more closely than
    torch does entry by entry.
    """
    function, constants, names = as_function(case, point, wrt)
    inputs = [x.requires_grad_() for x in constants]
    how: Any = {"fast_mode": True, "check_undefined_grad": thorough}
    try:
        torch.autograd.gradcheck(
            function, inputs, check_forward_ad=True, rtol=1e-5, atol=1e-7, **how
        )
        torch.autograd.gradgradcheck(function, inputs, **how)
    except RuntimeError as error:
        raise AssertionError(f"{error}\nThe inputs are {dict(enumerate(names))}") from error


def central_difference(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], directions: Sequence[Tensor]
) -> Tensor:
    width = 1e-6
    ahead = [x + width * d for x, d in zip(inputs, directions, strict=True)]
    behind = [x - width * d for x, d in zip(inputs, directions, strict=True)]
    return (function(*ahead) - function(*behind)) / (2 * width)


def ravel(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def beginning(x: Tensor, like: Tensor) -> Tensor:
    return x.flatten()[: like.numel()].view_as(like)
