"""Checks of the arguments of an update; an error names the first leaf at fault.

Functions take lists in the order of the leaves, and the tree of params for the paths in errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt import _memory, _modes, _tree
from diffopt._rule import hyper
from diffopt._rule.rule import WORKING_DTYPE, Shape
from diffopt._tree import Tree


def params(
    tensors: list[Any], tree: Tree, refuse: Callable[[Tensor], str | None] | None = None
) -> None:
    """Raise unless all are tensors, each at one path only, and the rule accepts them."""
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(_not_a_tensor(tensor, _tree.paths(tree, "params")[i]))
        if refuse is not None and (reason := refuse(tensor)):
            raise ValueError(f"{_tree.paths(tree, 'params')[i]} {reason}")
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
            "diffopt.nn.functionalize(module), and pass model.params"
        )
    if isinstance(leaf, Iterator):  # as of module.parameters() and module.named_parameters()
        return f"{path} is an iterator: pass dict(module.named_parameters()) or a list of tensors"
    return f"{path} is {_tree.describe(leaf)}, not a tensor"


def instance(value: object, kind: type, name: str, maker: str) -> None:
    """An instance of this class, which the method `maker` of the optimizer returns."""
    if not isinstance(value, kind):
        found = type(value).__name__
        raise TypeError(
            f"{name} has type {found}, but must have type {kind.__name__}: create it with {maker}"
        )


def grads(grads: list[Any], params: list[Tensor], tree: Tree, *, sparse: bool = False) -> None:
    """Raise unless each is None or matches its parameter in shape, dtype, device (and is dense)."""
    for i, (grad, param) in enumerate(zip(grads, params, strict=True)):
        if grad is None:
            continue
        _leaf(grad, param, tree, i, "grads", ("shape", "dtype", "device"))
        if not (param.is_floating_point() or param.is_complex()):
            path = _tree.paths(tree, "params")[i]
            raise ValueError(
                f"{path} has dtype {param.dtype}, but only floating-point and complex params can "
                "be updated"
            )
        if param.layout is not torch.strided:
            path = _tree.paths(tree, "params")[i]
            raise ValueError(f"{path} has layout {param.layout}, but must be dense")
        if grad.layout is not torch.strided and not sparse:
            path = _tree.paths(tree, "grads")[i]
            raise ValueError(
                f"{path} has layout {grad.layout}, but must be dense: create the embedding it "
                "comes from with sparse=False, or update that parameter with sparse_adam (see "
                "transforms.partition)"
            )


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
        _leaf(buffer, param, tree, i, name, attributes)
        if buffer.layout is not torch.strided:
            path = _tree.paths(tree, name)[i]
            raise ValueError(f"{path} has layout {buffer.layout}, but must be dense")
        if dtype and buffer.dtype != param.dtype:
            kinds = _kind(buffer.dtype), _kind(dtype), _kind(param.dtype)
            if kinds[0] not in kinds[1:]:
                path = _tree.paths(tree, name)[i]
                raise ValueError(
                    f"{path} has dtype {buffer.dtype}, but must be {kinds[1]}: create the state "
                    "with init()"
                )
        if shapes and buffer.shape != shapes[i]:
            paths = [_tree.paths(tree, n)[i] for n in (name, "params")]
            raise ValueError(
                f"{paths[0]} has shape {tuple(buffer.shape)}, but must have shape "
                f"{tuple(shapes[i])}, since {paths[1]} has shape {tuple(param.shape)}"
            )


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "floating-point" if dtype.is_floating_point else "integer"


def _leaf(
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
            paths = [_tree.paths(tree, n)[i] for n in (name, "params")]
            raise ValueError(
                f"{paths[0]} has {attribute} {mine}, but {paths[1]} has {attribute} {theirs}"
            )


def step(step: Any, params: list[Tensor], tree: Tree) -> None:
    """Raise unless it is a real, dense 0-d tensor."""
    if not isinstance(step, Tensor):
        raise TypeError(f"state.step is {_tree.describe(step)}, not a tensor")
    if step.dim() != 0:
        raise ValueError(f"state.step has shape {tuple(step.shape)}, but must be a 0-d tensor")
    if step.layout is not torch.strided:
        raise ValueError(f"state.step has layout {step.layout}, but must be dense")
    if step.is_complex() or step.dtype == torch.bool:
        raise ValueError(f"state.step has dtype {step.dtype}, which cannot count")
    if params:
        _reachable(step, params[0], tree, 0, "state.step")


def _reachable(scalar: Tensor, param: Tensor, tree: Tree, i: int, name: str) -> None:
    """Raise for a meta tensor; a 0-d tensor may be on any other device."""
    if scalar.is_meta and not param.is_meta:
        path = _tree.paths(tree, "params")[i]
        raise ValueError(f"{name} has device meta, but {path} has device {param.device}")


def writable(
    columns: Mapping[str, list[Tensor]],
    tree: Tree,
    step: Tensor | None = None,
    grads: Sequence[Tensor | None] = (),
    numbers: Sequence[hyper.Covered] = (),
) -> None:
    """Raise for tensors that cannot be updated in place: overlapping, inference or too coarse.

    `columns` are the params and the buffers by name, `step` is the step count in the state. `grads`
    and `numbers` are only read: no write may change them, but a gradient may be its own parameter.
    """
    if _modes.transformed():
        return
    names: list[tuple[Any, int]] = [
        (n, i) for n, column in columns.items() for i in range(len(column))
    ]
    tensors = [tensor for column in columns.values() for tensor in column]
    if step is not None:
        names, tensors = [*names, ("state.step", -1)], [*tensors, step]
        if step.dtype in WORKING_DTYPE:
            raise ValueError(f"state.step has dtype {step.dtype}, which cannot count steps exactly")

    def path(k: int) -> str:
        name, i = names[k]
        if isinstance(name, hyper.Covered):
            return name.path(i)
        return name if i < 0 else _tree.paths(tree, name)[i]

    for k, tensor in enumerate(tensors):
        if _modes.locked(tensor):
            raise ValueError(
                f"{path(k)} is an inference tensor, which can only be written to inside "
                "torch.inference_mode(): clone it"
            )
    for name, column in columns.items():
        _precise(column, columns["params"], tree, name)
    values = [(number, k) for number in numbers for k in range(len(number.values))]
    names += [*(("grads", i) for i in range(len(grads))), *values]
    read = [*grads, *(number.values[k] for number, k in values)]
    if (pair := _memory.overlap(tensors, read)) is None:
        return
    first, second = map(path, pair)
    if first == second:
        raise ValueError(f"{first} is an expanded tensor, which cannot be written to: clone it")
    raise ValueError(
        f"{second} and {first} share memory, so updating one would overwrite the other: clone one "
        "of them"
    )


def _precise(buffers: list[Tensor], params: list[Tensor], tree: Tree, name: str) -> None:
    """Raise for half-precision buffers of wider params: a slow average would stop moving."""
    for i, (buffer, param) in enumerate(zip(buffers, params, strict=True)):
        if buffer.dtype in WORKING_DTYPE and param.dtype not in WORKING_DTYPE:
            mine, theirs = (_tree.paths(tree, n)[i] for n in (name, "params"))
            raise ValueError(
                f"{mine} has dtype {buffer.dtype}, too coarse for {theirs} of dtype {param.dtype}: "
                f"convert it to {param.dtype}, or use update, which converts it"
            )


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
                    _reachable(value, params[0], tree, 0, number.path(k))
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
    if _modes.compiling():  # which does not trace the look inside a tensor
        return
    for i, leaf in enumerate(_tree.leaves(tree)):
        if isinstance(leaf, Tensor) and _modes.distributed(leaf):
            raise ValueError(
                f"{_tree.paths(tree, name)[i]} is a DTensor, which is not supported by {who}: "
                "gather it with full_tensor()"
            )
