"""Checks of the arguments of an update; an error names the first leaf at fault.

Functions take lists in the order of the leaves, and the tree of params for the paths in errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt import _memory, _modes, _torch, _tree
from diffopt._rule import hyper
from diffopt._rule.rule import WORKING_DTYPE, Shape
from diffopt._tree import Tree

MANY = 8  # tensors that are worth a guard


def params(
    tensors: list[Any], tree: Tree, refuse: Callable[[Tensor], str | None] | None = None
) -> None:
    """Raise unless all are tensors, each at one path only, and the rule accepts them."""
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(_not_a_tensor(tensor, _tree.paths(tree, "params")[i]))
        if refuse is not None and (reason := refuse(tensor)):
            raise _error(tree, "params", i, reason)
    if _modes.compiling() or len({id(tensor) for tensor in tensors}) == len(tensors):
        return
    first = dict[int, str]()
    for path, tensor in zip(_tree.paths(tree, "params"), tensors, strict=True):
        if first.setdefault(id(tensor), path) != path:
            raise ValueError(
                f"{path} and {first[id(tensor)]} are the same tensor, which would be updated "
                "twice: keep it at one path, as diffopt.nn.functionalize does"
            )


def _not_a_tensor(leaf: Any, path: str) -> str:
    if isinstance(leaf, torch.nn.Module):
        return (
            f"{path} is a module, {type(leaf).__name__}: turn it into a function with model = "
            "diffopt.nn.functionalize(module), and pass model.params; or step it as it is with "
            "diffopt.innerloop"
        )
    if isinstance(leaf, Iterator):  # as of module.parameters() and module.named_parameters()
        return f"{path} is an iterator: pass dict(module.named_parameters()) or a list of tensors"
    return f"{path} is {_tree.describe(leaf)}, not a tensor"


def instance(value: object, kind: type, name: str, maker: str) -> None:
    """Raise unless it is of this class, which `maker` returns, and not of a subclass."""
    if type(value) is not kind:
        found = type(value).__name__
        raise TypeError(
            f"{name} has type {found}, but must have type {kind.__name__}: create it with {maker}"
        )


def grads(grads: list[Any], params: list[Tensor], tree: Tree, *, sparse: bool = False) -> None:
    """Raise unless each is None or matches its parameter in shape, dtype, device (and is dense)."""
    for i, (grad, param) in enumerate(zip(grads, params, strict=True)):
        if grad is None:
            continue
        _alike(grad, param, tree, i, "grads", ("shape", "dtype", "device"))
        if not _modes.has_derivative(param):
            only = "only floating-point and complex params can be updated"
            raise _error(tree, "params", i, f"has dtype {param.dtype}, but {only}")
        if param.layout is not torch.strided:
            raise _error(tree, "params", i, f"has layout {param.layout}, but must be dense")
        if grad.layout is not torch.strided and not sparse:
            fault = (
                f"has layout {grad.layout}, but must be dense: create the embedding it comes from "
                "with sparse=False, or update that parameter with sparse_adam (see "
                "transforms.partition)"
            )
            raise _error(tree, "grads", i, fault)


def buffers(
    buffers: list[Any],
    params: list[Tensor],
    tree: Tree,
    name: str,
    dtype: torch.dtype | None = None,
    shapes: Sequence[Shape] | None = None,
) -> None:
    """Raise unless each has its parameter's device, a fitting dtype, and its shape or these."""
    attributes = ("device",) if shapes else ("shape", "device")
    for i, (buffer, param) in enumerate(zip(buffers, params, strict=True)):
        _alike(buffer, param, tree, i, name, attributes)
        if buffer.layout is not torch.strided:
            raise _error(tree, name, i, f"has layout {buffer.layout}, but must be dense")
        if dtype and buffer.dtype != param.dtype:
            kind = _kind(dtype)
            if _kind(buffer.dtype) not in (kind, _kind(param.dtype)):
                fault = (
                    f"has dtype {buffer.dtype}, but must be {kind}: create the state with init()"
                )
                raise _error(tree, name, i, fault)
        if shapes and buffer.shape != shapes[i]:
            fault = (
                f"has shape {tuple(buffer.shape)}, but must have shape {tuple(shapes[i])}, since "
                f"{_tree.paths(tree, 'params')[i]} has shape {tuple(param.shape)}"
            )
            raise _error(tree, name, i, fault)


def per_hyperparameter(numbers: list[Any], params: list[Tensor], tree: Tree, name: str) -> None:
    """Raise unless each is a dense floating-point tensor that broadcasts to its parameter."""
    if (
        _modes.all_plain(numbers)
        and not any(map(Tensor.dim, numbers))
        and {(x.dtype, x.layout) for x in numbers} == {(torch.float64, torch.strided)}
        and {x.device for x in numbers} == {params[0].device}
    ):
        return
    for i, (number, param) in enumerate(zip(numbers, params, strict=True)):
        if not isinstance(number, Tensor):
            raise TypeError(
                f"{_tree.paths(tree, name)[i]} is {_tree.describe(number)}, not a tensor"
            )
        if not number.is_floating_point():
            raise _error(tree, name, i, f"has dtype {number.dtype}, but must be floating-point")
        if number.layout is not torch.strided:
            raise _error(tree, name, i, f"has layout {number.layout}, but must be dense")
        if number.dim() == 0 and number.is_meta and not param.is_meta:
            raise _error(tree, name, i, f"has device meta, but must have device {param.device}")
        if number.dim() and (fault := _misfit(number, param, True)):
            raise _error(tree, name, i, f"has {fault.format(_tree.paths(tree, 'params')[i])}")


def like(leaves: list[Any]) -> Callable[[list[Any]], bool]:
    """A function that says whether other leaves certainly are what these are, but for values.

    It is one call for thousands; a False says nothing. It is never sure of integers, tensors that
    are not dense, nor where there are transforms, traces and subclasses.
    """
    sure = (
        not _modes.observed()
        and _modes.all_ordinary(leaves)
        and {x.layout for x in leaves} == {torch.strided}
        and all(x.is_floating_point or x.is_complex for x in {x.dtype for x in leaves})
    )
    if not sure:
        return lambda others: False
    if len(leaves) < MANY:
        forms = _forms(leaves)
        return lambda others: _modes.all_ordinary(others) and _forms(others) == forms
    guards = _torch.TensorGuards(leaves)
    return lambda others: _modes.all_ordinary(others) and guards.hold(others)


def _forms(leaves: list[Tensor]) -> list[Any]:
    return [(x.shape, x.dtype, x.layout, x.device) for x in leaves]


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "floating-point" if dtype.is_floating_point else "integer"


def _alike(
    leaf: Any, param: Tensor, tree: Tree, i: int, name: str, attributes: tuple[str, ...]
) -> None:
    if not isinstance(leaf, Tensor):
        path = _tree.paths(tree, name)[i]
        raise TypeError(f"{path} is {_tree.describe(leaf)}, not a tensor")
    if leaf.shape == param.shape and leaf.dtype == param.dtype and leaf.device == param.device:
        return
    for attribute in attributes:
        mine, theirs = getattr(leaf, attribute), getattr(param, attribute)
        if mine != theirs:
            if attribute == "shape":
                mine, theirs = tuple(mine), tuple(theirs)
            other = f"{_tree.paths(tree, 'params')[i]} has {attribute} {theirs}"
            raise _error(tree, name, i, f"has {attribute} {mine}, but {other}")


def _error(tree: Tree, name: str, i: int, fault: str) -> ValueError:
    """The error that leaf `i` of a tree like params, `name`, has this fault."""
    return ValueError(f"{_tree.paths(tree, name)[i]} {fault}")


def scalar(x: Any, name: str, params: list[Tensor], tree: Tree) -> None:
    """Raise unless it is a real, dense 0-d tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {_tree.describe(x)}, not a tensor")
    if x.dim() != 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but must be a 0-d tensor")
    if x.layout is not torch.strided:
        raise ValueError(f"{name} has layout {x.layout}, but must be dense")
    if x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {x.dtype}, but must be real")
    _reachable(x, name, params, tree)


def _reachable(scalar: Tensor, name: str, params: list[Tensor], tree: Tree) -> None:
    """Raise for a meta tensor; a 0-d tensor may be on any other device."""
    if scalar.is_meta and params and not params[0].is_meta:
        path = _tree.paths(tree, "params")[0]
        raise ValueError(f"{name} has device meta, but {path} has device {params[0].device}")


def writable(
    columns: Mapping[str, list[Tensor]],
    tree: Tree,
    step: Tensor | None = None,
    grads: Sequence[Tensor | None] = (),
    numbers: Sequence[hyper.Covered] = (),
    *,
    coarse: bool = False,
) -> None:
    """Raise for tensors that cannot be updated in place: overlapping, inference or too coarse.

    `columns` are the params and the buffers by name, `step` is the step count in the state. `grads`
    and `numbers` are only read: no write may change them, but a gradient may be its own parameter.
    With `coarse`, buffers may be narrower than their params.
    """
    if _modes.transformed():
        return
    written = [(tree, name, column) for name, column in columns.items()]
    if step is not None:
        written.append((step, "state.step", [step]))
        if step.dtype in WORKING_DTYPE:
            raise ValueError(f"state.step has dtype {step.dtype}, which cannot count steps exactly")
    read = [(tree, "grads", grads), *((n.tree, f"hparams.{n.name}", n.values) for n in numbers)]
    tensors = [tensor for *_, column in written for tensor in column]

    def path(k: int) -> str:
        for tree, name, column in (*written, *read):
            if k < len(column):
                return _tree.paths(tree, name)[k]
            k -= len(column)
        raise IndexError(k)

    if any(map(Tensor.is_inference, tensors)):
        for k, tensor in enumerate(tensors):
            if _modes.locked(tensor):
                raise ValueError(f"{path(k)} {_memory.LOCKED}: clone it")
    for name, column in () if coarse else columns.items():
        _precise(column, columns["params"], tree, name)
    reads = [x for *_, column in read for x in column]
    _memory.check_apart(path, tensors, reads, len(grads))


def _precise(buffers: list[Tensor], params: list[Tensor], tree: Tree, name: str) -> None:
    """Raise for half-precision buffers of wider params: a slow average would stop moving."""
    if WORKING_DTYPE.keys().isdisjoint(x.dtype for x in buffers):
        return
    for i, (buffer, param) in enumerate(zip(buffers, params, strict=True)):
        if buffer.dtype in WORKING_DTYPE and param.dtype not in WORKING_DTYPE:
            fault = (
                f"has dtype {buffer.dtype}, too coarse for {_tree.paths(tree, 'params')[i]} of "
                f"dtype {param.dtype}: convert it to {param.dtype}, or use update, which converts "
                "it"
            )
            raise _error(tree, name, i, fault)


def numbers(numbers: list[hyper.Covered], params: list[Tensor], tree: Tree) -> None:
    """Raise unless hyperparameters that are tensors are real and broadcast to their parameters."""
    for number in numbers:
        values = number.values if params and number.per_parameter else ()
        for k, value in enumerate(values):
            if not isinstance(value, Tensor):
                continue
            if value.is_complex() or value.dtype == torch.bool:
                raise ValueError(f"{number.path(k)} has dtype {value.dtype}, but must be real")
            if value.layout is not torch.strided:
                raise ValueError(f"{number.path(k)} has layout {value.layout}, but must be dense")
            if value.dim() == 0:
                if value.is_meta:
                    _reachable(value, number.path(k), params, tree)
                continue
            for i, param in enumerate(params):
                if number.at(i) is value and (fault := _misfit(value, param, number.per_weight)):
                    path = _tree.paths(tree, "params")[i]
                    raise ValueError(f"{number.path(k)} has {fault.format(path)}")


def _misfit(value: Tensor, param: Tensor, per_weight: bool) -> str | None:
    """What does not fit, as a format string for the parameter's path; None where all does."""
    if not per_weight:
        return f"shape {tuple(value.shape)}, but must be a single number for all of {{}}"
    # A 0-d parameter becomes one-dimensional in the rule.
    shape = param.shape or torch.Size([1])
    fits = value.dim() <= len(shape) and all(
        mine in (1, theirs) for mine, theirs in zip(value.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        shapes = tuple(value.shape), tuple(param.shape)
        return f"shape {shapes[0]}, which does not broadcast to {{}} of shape {shapes[1]}"
    if value.device != param.device:
        return f"device {value.device}, but {{}} has device {param.device}"
    return None


def undistributed(tree: Tree, name: str, who: str) -> None:
    """Raise if a leaf is a DTensor."""
    if _modes.compiling():  # which cannot trace a look inside a tensor
        return
    for i, leaf in enumerate(_tree.leaves(tree)):
        if isinstance(leaf, Tensor) and _modes.distributed(leaf):
            raise ValueError(
                f"{_tree.paths(tree, name)[i]} is a DTensor, which is not supported by {who}: "
                "gather it with full_tensor()"
            )
