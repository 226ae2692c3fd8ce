"""Running a rule on lists of tensors, by horizontally fused (foreach) kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt._rule import ops
from diffopt._rule.running import (
    AnyRule,
    Numbers,
    Shared,
    enter,
    leaf_,
    leave,
    run,
    seen,
    widest,
    written,
)
from diffopt._rule.tensorlist import Program, TensorList

_ALIGNED = 64  # elements: pieces begin where kernels load several at once
_LEAST = 1 << 24  # bytes: to save less is not worth further launches


def foreach(rule: AnyRule, numbers: Numbers, columns: Sequence[Any]) -> list[Any]:
    """The new params and buffers: what `running.apply` with `widen` returns for each row."""
    program, lists = _noted(rule, numbers, columns)
    new: list[list[Tensor]] = [[] for _ in columns]
    for batch in _batches(program, lists, widest(columns)):
        for column, tensors in zip(new, program.run(batch), strict=True):
            column += tensors
    wide = columns[0][0].dtype
    return [
        [leave(x, y, wide) for x, y in zip(tensors, old, strict=True)] if tensors else old
        for tensors, old in zip(written(new), written(columns), strict=True)
    ]


def foreach_(rule: AnyRule, numbers: Numbers, columns: Sequence[Any]) -> None:
    """In place, in memory of limited size."""
    tensors = [*itertools.chain(*(c for c in written(columns) if isinstance(c, list)))]
    if any(map(Tensor.is_neg, tensors)) or any(map(Tensor.is_conj, tensors)):
        leaf_(rule, numbers, columns)  # foreach kernels do not write to such views
        return
    program, lists = _noted(rule, numbers, columns, into=True)
    for batch in _batches(program, lists, widest(columns)):
        program.run(batch)


def _noted(
    rule: AnyRule, numbers: Numbers, columns: Sequence[Any], *, into: bool = False
) -> tuple[Program, list[Any]]:
    """The rule as a program for lists of tensors, and these lists."""
    dtype = widest(columns)
    lists = [[*map(seen, c)] if isinstance(c, list) else None for c in columns]
    inputs = [None if x is None else _as_list(x, dtype) for x in lists]
    values = [x or enter(column, dtype) for x, column in zip(inputs, columns, strict=True)]
    new_p, *new = _apart(run(rule, numbers, values), inputs)
    for column, value in zip(columns[2:], new, strict=True):
        if isinstance(column, Shared):
            column.new = value
    outputs = [x and y for x, y in zip(inputs, (new_p, None, *new), strict=True)]
    return Program(inputs, outputs, into=into, elementwise=rule.elementwise), lists


def _apart(results: list[Any], inputs: list[Any]) -> list[Any]:
    """The results, with copies of lists that are inputs of another place, or another result."""
    taken = {x for x in inputs if x is not None}
    for k, (x, old) in enumerate(zip(results, written(inputs), strict=True)):
        if isinstance(x, TensorList) and x is not old:
            results[k] = ops.copy(x) if x in taken else x
            taken.add(x)
    return results


def _as_list(tensors: list[Tensor], dtype: torch.dtype) -> TensorList:
    same = all(x.dtype == dtype or not x.is_floating_point() for x in tensors)
    return TensorList(tensors, None if same else dtype)


def _batches(program: Program, lists: list[Any], dtype: torch.dtype) -> Iterator[list[Any]]:
    """Parts of the lists for which the program needs no more memory than all params take.

    One that is lean needs no more than torch's: one or two times that.
    """
    size = max(_LEAST, sum(x.nbytes for x in lists[0])) // (dtype.itemsize * max(program.most, 1))
    if program.lean or sum(map(Tensor.numel, lists[0])) <= size:
        yield lists
        return
    batch, room = list[Any](), size
    for row in zip(*(x for x in lists if x is not None), strict=True):
        for piece in _pieces(row, room, size) if program.pieces else (row,):
            if batch and piece[0].numel() > room:
                yield _columns(batch, lists)
                batch, room = [], size
            batch.append(piece)
            room -= piece[0].numel()
    yield _columns(batch, lists)


def _pieces(row: tuple[Tensor, ...], room: int, size: int) -> Iterable[tuple[Tensor, ...]]:
    """The tensors of one parameter, or pieces of them: one to fill a batch, and whole batches."""
    room, size = (max(0, x // _ALIGNED * _ALIGNED) for x in (room, size))
    n = row[0].numel()
    if n <= room or not size or not all(map(Tensor.is_contiguous, row)):
        return [row]
    rest = n - room
    lengths = [room] * bool(room) + [size] * (rest // size) + [rest % size] * bool(rest % size)
    return zip(*(x.view(-1).split(lengths) for x in row), strict=True)


def _columns(batch: list[Any], lists: list[Any]) -> list[Any]:
    columns = iter(zip(*batch, strict=True))
    return [x if x is None else list(next(columns)) for x in lists]
