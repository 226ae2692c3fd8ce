"""Stepping one part of an update: tensors that share device, dtype and hyperparameters."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt import _torch
from diffopt._rule import lists, ops, running, ways
from diffopt._rule.running import AnyRule


def step_(
    rule: AnyRule, t: Any, values: list[Any], columns: list[Any], alike: ways.Alike | None = None
) -> None:
    """Update tensors that share device, dtype and hyperparameters, in place.

    Without gradients it adds the initial values of their state.
    """
    if columns[1][0] is None:
        ways.RUN["leaf"](rule, running.numbers_at(rule, t, values, columns), columns)
        return
    kernel_values = values if alike else _for_kernels(values, columns[0][0])
    way = _way(rule, t, kernel_values, columns, alike)
    if way == "native":
        if _native_(rule, t, kernel_values, columns):
            return
        way = _way(rule, t, kernel_values, columns, alike, kernel=False)
    numbers = running.numbers_at(rule, t, values, columns)
    if way in ways.PIECEWISE and alike:
        alike.layout = ways.PIECEWISE[way](rule, numbers, columns, alike.layout)
    else:
        ways.RUN[way](rule, numbers, columns)


def updated(rule: AnyRule, t: Any, values: list[Any], columns: list[Any]) -> list[Any]:
    """The new columns, out of place, in the fastest way; only where no derivative is needed."""
    return batched(rule, t, values, columns) or leaf_by_leaf(rule, t, values, columns)


def batched(rule: AnyRule, t: Any, values: list[Any], columns: list[Any]) -> list[Any] | None:
    """What `updated` returns; None where tensor by tensor is the fastest way."""
    kernel_values = _for_kernels(values, columns[0][0])
    way = _way(rule, t, kernel_values, columns)
    if way == "native" and rule.execution == "auto":  # "compiled" asks for it in place only
        copies = _copied(columns)
        if _native_(rule, t, kernel_values, copies):
            return running.written(copies)
        way = _way(rule, t, kernel_values, columns, kernel=False)
    if _pays(way, columns):
        copies = _copied(columns)
        numbers = running.numbers_at(rule, t, kernel_values, columns)
        with torch.no_grad():
            ways.RUN[way](rule, numbers, copies)
        return running.written(copies)
    if way == "foreach":
        numbers = running.numbers_at(rule, t, values, columns)
        return lists.foreach(rule, numbers, columns)
    return None


def leaf_by_leaf(rule: AnyRule, t: Any, values: list[Any], columns: list[Any]) -> list[Any]:
    """The new columns, out of place, computed tensor by tensor."""
    numbers = running.numbers_at(rule, t, values, columns)
    return running.leaf_by_leaf(rule, numbers, columns, as_is=running.as_is(columns))


def _way(
    rule: AnyRule,
    t: Any,
    values: list[Any],
    columns: list[Any],
    alike: ways.Alike | None = None,
    *,
    kernel: bool = True,
) -> ways.Way:
    """The way to run the rule; never "native" where that kernel has refused.

    It is the same for all whole numbers of steps: kernels read them in float32, which is exact for
    these only.
    """
    whole = not isinstance(t, Tensor) and float(t).is_integer()
    known = alike if whole and kernel else None
    if known and known.way:
        return known.way
    kernel = kernel and (whole or isinstance(t, Tensor))
    wanted = "unfused" if rule.execution == "auto" and not kernel else rule.execution
    if isinstance(t, Tensor) and t.is_meta:
        wanted = "leaf"  # foreach kernels ask for the value of a scalar
    lr, *rest = values
    numeric = isinstance(lr, Tensor) and _takes_rate(lr, columns[0][0])
    shared = [column.value for column in columns if isinstance(column, running.Shared)]
    kind = alike.kind if alike else ways.survey(columns)
    regular = kernel and kind.layout == "regular"
    if wanted == "compiled" and regular and _many_small(columns[0]):
        wanted = "fused"  # torch's kernel, if there is one, takes tensors as they lie
    way = ways.choose(rule, kind, [0.0 if numeric else lr, *rest, *shared], wanted)
    if known:
        known.way = way
    return way


def _many_small(params: list[Tensor]) -> bool:
    """Whether there are so many small tensors that a compiled step mostly concatenates them."""
    return len(params) >= 100 and sum(map(Tensor.numel, params)) < len(params) << 14


def _native_(rule: AnyRule, t: Any, values: list[Any], columns: list[Any]) -> bool:
    """Run a native kernel; False, with nothing changed, where none applies."""
    # At the first step a kernel ignores the buffers; they may hold values that a user has set.
    first = None if isinstance(t, Tensor) or t == 1 else False
    step = running.scalar_on(t, torch.float32, columns[0][0].device)
    return running.native_(rule, [step] * len(columns[0]), first, values, columns)


_MANY, _BIG = 16, 1 << 18  # tensors, or elements of one, from which copies cost less than they save


def _pays(way: ways.Way, columns: list[Any]) -> bool:
    """Whether a step in place on copies is faster than one tensor by tensor, and gives the same."""
    params, *_ = columns
    if way == "tiles":
        fast = len(params) >= _MANY or any(p.numel() >= _BIG for p in params)
    else:
        fast = way == "stacks" and len(params) >= _MANY
    tensors = itertools.chain(*(c for c in columns if isinstance(c, list)))
    dtypes = {x.dtype for x in tensors} if fast else ()
    # The new value of an integer may be wider.
    return fast and all(dtype.is_floating_point or dtype.is_complex for dtype in dtypes)


def _copied(columns: list[Any]) -> list[Any]:
    """Columns with copies of all but the gradients, in the dtype of params where wider."""
    params, grads, *buffers = columns
    dtype = params[0].dtype

    def copies(column: list[Tensor]) -> list[Tensor]:
        if len({(x.dtype, x.device) for x in column}) > 1 or column[0].device.type == "cpu":
            return [*map(copy, column)]
        new = [torch.empty_like(x, dtype=wider(x)) for x in column]
        _torch.foreach_copy_(new, column)  # by few kernels
        return new

    def wider(x: Tensor) -> torch.dtype:
        same = x.dtype == dtype or x.is_complex() != dtype.is_complex
        return x.dtype if same else torch.promote_types(x.dtype, dtype)

    def copy(x: Tensor) -> Tensor:
        return x.to(wider(x), copy=True)

    return [copies(params), grads, *(copies(c) if isinstance(c, list) else c for c in buffers)]


def _for_kernels(values: list[Any], like: Tensor) -> list[Any]:
    """Hyperparameters as native kernels take them: as numbers, where nobody waits for them.

    The first one, the learning rate, may be a 0-d tensor on the device.
    """
    lr, *rest = values
    if isinstance(lr, Tensor) and _takes_rate(lr, like):
        return [lr.to(torch.float32), *map(ops.coefficient, rest)]
    return [*map(ops.coefficient, values)]


def _takes_rate(lr: Tensor, like: Tensor) -> bool:
    """Whether kernels for a parameter take this rate, which they read in float32."""
    on_device = lr.device == like.device and lr.device.type == "cuda"
    return on_device and lr.dim() == 0 and like.dtype != torch.float64


def scatter(results: Sequence[Any], indices: Sequence[int], columns: Sequence[list[Any]]) -> None:
    """Put the results for the leaves with these indices into columns of all leaves."""
    for column, result in zip(columns, results, strict=True):
        for i, tensor in zip(indices if column else (), result, strict=False):
            column[i] = tensor


def apart(new: list[Any], grads: Sequence[Any]) -> list[Any]:
    """New values, with copies in place of gradients, which belong to the caller."""
    if not any(map(operator.is_, new, grads)):
        return new
    return [x.clone() if x is g else x for x, g in zip(new, grads, strict=True)]
