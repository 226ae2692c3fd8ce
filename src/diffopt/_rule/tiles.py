"""Running a rule on a CPU: big tensors in pieces that fit its cache, small ones together."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt import _torch
from diffopt._rule import recording
from diffopt._rule.running import (
    AS_IS,
    AnyRule,
    Numbers,
    Shared,
    apply,
    in_place_of_lists,
    leaf_,
    pick,
    run,
    widest,
    written,
)

_DTYPE = operator.attrgetter("dtype")  # in C: a step reads thousands
_TILE = 1 << 18  # elements per thread: with fewer, Python dominates; more do not fit the cache
_LITTLE = 1 << 15  # elements in all, for which no program is worth recording
_USUAL = 6  # the number of tensors in the cache at once that this assumes
_LEAST, _STACKED = 1 << 24, 8  # on a device: bytes that may be taken, by so many stacks at once
_SMALL, _FEW = 1 << 12, 8  # stacking pays for tensors of at most, and of at least so many


def tiled_(rule: AnyRule, numbers: Numbers, columns: Sequence[Any]) -> None:
    """In place, in pieces that fit the cache of a CPU.

    These are slices of big tensors, and small tensors concatenated.
    """
    lists = [c for c in columns if isinstance(c, list)]
    total = sum(map(Tensor.numel, lists[0]))
    in_pieces_(lists, *_prepared(rule, numbers, columns, total))


def in_pieces_(
    lists: list[list[Tensor]], size: int, update_: Callable[[Sequence[Tensor]], None]
) -> None:
    """Update big tensors in pieces of at most `size` elements, and small ones concatenated.

    `update_` changes one piece of each column in place, but for the second, of gradients.
    """
    lengths = list(map(Tensor.numel, lists[0]))
    length = min(size, torch.get_num_threads() * _TILE // 2)  # more causes page faults
    small = [i for i, n in enumerate(lengths) if n < length // 2]
    alone = [[i] for i, n in enumerate(lengths) if n >= length // 2]
    for batch in (*alone, *_batches(small, lengths, length)):
        pieces = lists if len(batch) == len(lengths) else [pick(c, batch) for c in lists]
        if len(batch) > 1:
            together_(update_, pieces)
            continue
        row = [column[0].view(-1) for column in pieces]
        if row[0].data_ptr() == row[1].data_ptr():  # a gradient that is its own parameter
            row[1] = row[1].clone()
        for piece in zip(*(x.split(size) for x in row), strict=True):
            update_(piece)


def together_(update_: Callable[[Sequence[Tensor]], None], lists: list[list[Tensor]]) -> None:
    """Update tensors as one: concatenated, but for columns that are so in memory."""
    views = [None if k == 1 else _joined(tensors) for k, tensors in enumerate(lists)]
    pairs = list(zip(views, lists, strict=True))
    flat = [list(map(Tensor.ravel, x)) if view is None else x for view, x in pairs]
    tile = [torch.cat(x) if view is None else view for view, x in zip(views, flat, strict=True)]
    update_(tile)
    lengths = list(map(Tensor.numel, flat[0]))
    for view, old, new in zip(*map(written, (views, flat, tile)), strict=True):
        if view is None:
            _torch.foreach_copy_(old, new.split_with_sizes(lengths))
        else:  # the others may not share the version of the first
            torch.autograd.graph.increment_version(old)


def _joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """A view of contiguous tensors as one vector, where one begins where the one before ends."""
    first, last = tensors[0], tensors[-1]
    start, size = first.data_ptr(), first.element_size()
    offsets = itertools.accumulate(map(Tensor.numel, tensors), initial=0)
    ends = (start + size * n for n in offsets)
    if first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr() and all(
        map(operator.eq, map(Tensor.data_ptr, tensors), ends)
    ):
        return first.as_strided((sum(map(Tensor.numel, tensors)),), (1,))
    return None


def stacked_(rule: AnyRule, numbers: Numbers, columns: Sequence[Any]) -> None:
    """In place; small tensors of one shape by one call of the rule, under torch.vmap if need be.

    On a CPU big ones run in pieces, if the rule consists of elementwise operations and sums.
    """
    lists = [c for c in columns if isinstance(c, list)]
    on_cpu = columns[0][0].device.type == "cpu"
    alone: list[int] = []

    def leaf(*tensors: Tensor) -> list[Tensor]:
        row = in_place_of_lists(tensors, columns)
        return [x for x in apply(rule, numbers, row) if isinstance(x, Tensor)]

    together: Any = leaf if rule.batched else torch.func.vmap(leaf)

    def update_(pieces: list[list[Tensor]]) -> None:
        for old, new in zip(written(pieces), together(*map(torch.stack, pieces)), strict=True):
            if new.numel():
                _torch.foreach_copy_(old, new.unbind())

    for batch in _alike(columns[0]) if on_cpu else _within_memory(columns[0], widest(columns)):
        if len(batch) < (_FEW if on_cpu else 2):
            alone += batch
        else:
            update_([[column[i] for i in batch] for column in lists])
    whole = [
        i
        for i in alone
        if columns[0][i].numel() < _TILE
        or not on_cpu
        or not _pieced_(rule, numbers, [pick(column, i) for column in columns])
    ]
    leaf_(rule, numbers, [pick(column, whole) for column in columns])


def _alike(params: list[Tensor]) -> Iterator[list[int]]:
    """Indices of tensors in batches, with small tensors of the same shape together."""
    size = torch.get_num_threads() * _TILE
    lengths = list(map(Tensor.numel, params))
    alike: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        alike.setdefault(p.shape if lengths[i] <= _SMALL else i, []).append(i)
    for indices in alike.values():
        yield from _batches(indices, lengths, size)


def _within_memory(params: list[Tensor], dtype: torch.dtype) -> Iterator[list[int]]:
    """Indices of tensors in batches of one shape that take no more memory than all params."""
    stacks = _STACKED + 2 * (params[0].dtype != dtype)  # those that are converted
    size = max(_LEAST, sum(x.nbytes for x in params)) // (stacks * dtype.itemsize)
    alike: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        alike.setdefault(p.shape, []).append(i)
    lengths = list(map(Tensor.numel, params))
    for indices in alike.values():
        yield from _batches(indices, lengths, size)


def _pieced_(rule: AnyRule, numbers: Numbers, row: Sequence[Any]) -> bool:
    """One tensor in place, in pieces that fit the cache; False where that is impossible.

    At each sum of all elements the rule is interrupted, run up to there on every piece without
    changing anything, and recorded again with the sum known. So the tensors are read once more for
    each sum.
    """
    p, size = row[0], torch.get_num_threads() * _TILE
    lists = [k for k, x in enumerate(row) if isinstance(x, Tensor) and x.numel()]
    kinds = {(row[k].shape, row[k].dtype, row[k].is_contiguous()) for k in lists}
    shared = any(isinstance(x, Shared) for x in row)
    aliased = row[1].data_ptr() == p.data_ptr()
    if shared or aliased or p.dtype not in AS_IS or kinds != {(p.shape, p.dtype, True)}:
        return False
    terms = p.new_empty(min(size, p.numel()))
    pieces = [*zip(*(row[k].view(-1).split(size) for k in lists), strict=True)]
    sums: list[float] = []
    try:
        while True:
            program, constants, unfinished = _up_to_a_sum(rule, numbers, row, lists, sums)
            registers = program.registers(len(terms), p)
            total = 0.0
            for piece in pieces:
                part = terms[: piece[0].numel()]
                program.run((*piece, part), registers, constants)
                if unfinished:
                    total += part.sum().item()
            if not unfinished:
                return True
            sums.append(total)
    except recording.Unrecordable:  # before anything is written
        return False


def _up_to_a_sum(
    rule: AnyRule, numbers: Numbers, row: Sequence[Any], lists: list[int], sums: list[float]
) -> tuple[recording.Program, list[Any], bool]:
    """A program that computes the terms of the first unknown sum, its constants, and True.

    The terms go to an extra tensor behind the row; without an unknown sum the row is
    updated, and the last result is False.
    """
    tape = recording.Tape(len(lists) + 1, row[0], sums)
    try:
        outputs = _recorded(rule, numbers, row, lists, tape)
    except recording.Summed as stop:
        return tape.program([*(None for _ in lists), stop.terms]), tape.constants, True
    return tape.program([*(outputs[k] for k in lists), None]), tape.constants, False


def _prepared(
    rule: AnyRule, numbers: Numbers, columns: Sequence[Any], total: int
) -> tuple[int, Callable[[Sequence[Tensor]], None]]:
    """The size of pieces of `total` elements, and a function that updates one of each column."""
    size, like = torch.get_num_threads() * _TILE, columns[0][0]
    lists = [k for k, column in enumerate(columns) if isinstance(column, list)]

    def eagerly(piece: Sequence[Tensor]) -> None:
        leaf_(rule, numbers, in_place_of_lists([[tensor] for tensor in piece], columns))

    if (
        total <= _LITTLE
        or like.dtype not in AS_IS
        or any({*map(_DTYPE, columns[k])} != {like.dtype} for k in lists)
    ):
        return size, eagerly
    tape = recording.Tape(len(lists))
    try:
        outputs = _recorded(rule, numbers, columns, lists, tape)
        program = tape.program([outputs[k] for k in lists])
    except recording.Unrecordable:
        return size, eagerly
    for column, value in zip(columns, outputs, strict=True):
        if isinstance(column, Shared):
            column.new = value
    size = size * _USUAL // len(program.memory)
    registers = program.registers(min(size, total), like)
    return size, lambda piece: program.run(piece, registers, tape.constants)


def _recorded(
    rule: AnyRule, numbers: Numbers, row: Sequence[Any], lists: list[int], tape: recording.Tape
) -> list[Any]:
    """The new values of a row, where the inputs of a tape take the places `lists`."""
    values = [x.value if isinstance(x, Shared) else x for x in row]
    for k, x in zip(lists, tape.inputs, strict=False):
        values[k] = x
    try:
        new_p, *new = run(rule, numbers, values)
    except TypeError as error:
        raise recording.Unrecordable(*error.args) from error
    return [new_p, None, *new]


def _batches(indices: list[int], lengths: list[int], size: int) -> Iterator[list[int]]:
    """Indices of tensors in batches of about `size` elements."""
    batch: list[int] = []
    total = 0
    for i in indices:
        if batch and total + lengths[i] > size:
            yield batch
            batch, total = [], 0
        batch.append(i)
        total += lengths[i]
    if batch:
        yield batch
