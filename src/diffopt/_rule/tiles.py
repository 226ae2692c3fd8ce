"""Running a rule on a CPU: big tensors in pieces that fit its cache, small ones together."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import _torch
from diffopt._rule import hyper, recording
from diffopt._rule.rule import is_ours
from diffopt._rule.running import (
    AS_IS,
    AnyRule,
    Numbers,
    Shared,
    apply,
    in_place_of_lists,
    leaf_,
    numbers_of,
    pick,
    run,
    widest,
    written,
)
from diffopt._rule.symbols import Sheet

TILE = 1 << 18  # elements per thread: with fewer, Python dominates; more do not fit the cache
_LITTLE = 1 << 15  # elements in all, for which no program is worth recording
_USUAL = 6  # the number of tensors in the cache at once that this assumes
_LEAST, _STACKED = 1 << 24, 8  # on a device: bytes that may be taken, by so many stacks at once
_SMALL, _FEW = 1 << 12, 16  # stacking pays for tensors of at most, and of at least so many


class Layout:
    """How columns are cut into pieces and concatenated.

    It is right while the shapes, strides and dtypes of all tensors stay as they are, and the
    addresses of those that are written.

    Args:
        lists: the columns.
        plain: whether all tensors are known to be real, contiguous and not empty.
    """

    def __init__(self, lists: Sequence[list[Tensor]], *, plain: bool = False) -> None:
        self.plain = plain
        self.lengths = list(map(Tensor.numel, lists[0]))
        self.total = sum(self.lengths)
        self.dtypes = {x.dtype for column in lists for x in column}
        self._batches: dict[int, list[_Batch]] = {}

    def batches(self, lists: Sequence[list[Tensor]], length: int) -> list[_Batch]:
        """Tensors of half of this length or more alone, the others in batches of about it."""
        if length not in self._batches:
            small = [i for i, n in enumerate(self.lengths) if n < length // 2]
            alone = [[i] for i, n in enumerate(self.lengths) if n >= length // 2]
            cut = (*alone, *_batches(small, self.lengths, length))
            self._batches[length] = [self.batch(lists, indices) for indices in cut]
        return self._batches[length]

    def batch(self, lists: Sequence[list[Tensor]], indices: list[int]) -> _Batch:
        """Some tensors as one batch."""
        joined = [k != 1 and adjacent(pick(column, indices)) for k, column in enumerate(lists)]
        whole = len(indices) == len(self.lengths)
        lengths, alike = pick(self.lengths, indices), len(self.dtypes) == 1
        return _Batch(None if whole else indices, lengths, joined, alike)


class _Batch(NamedTuple):
    """Tensors that are updated together."""

    indices: list[int] | None  # None for all
    lengths: list[int]
    joined: list[bool]  # for each column, whether its tensors are concatenated in memory
    alike: bool  # whether all tensors have one dtype


def tiled_(
    rule: AnyRule, numbers: Numbers, columns: Sequence[Any], layout: Layout | None = None
) -> Layout:
    """In place, in pieces that fit the cache of a CPU; the layout, for the next step.

    These are slices of big tensors, and small tensors concatenated.
    """
    lists = [c for c in columns if isinstance(c, list)]
    layout = layout or Layout(lists)
    in_pieces_(lists, *_prepared(rule, numbers, columns, layout), layout)
    return layout


def in_pieces_(
    lists: list[list[Tensor]],
    size: int,
    update_: Callable[[Sequence[Tensor]], None],
    layout: Layout,
) -> None:
    """Update big tensors in pieces of at most `size` elements, and small ones concatenated.

    `update_` changes one piece of each column in place, but for the second, of gradients.
    """
    length = min(size, torch.get_num_threads() * TILE // 2)  # more causes page faults
    for batch in layout.batches(lists, length):
        pieces = lists if batch.indices is None else [pick(c, batch.indices) for c in lists]
        if len(batch.lengths) > 1:
            together_(update_, pieces, batch)
            continue
        row = [column[0].view(-1) for column in pieces]
        if row[0].data_ptr() == row[1].data_ptr():  # a gradient that is its own parameter
            row[1] = row[1].clone()
        split = zip(*(x.split(size) for x in row), strict=True) if len(row[0]) > size else [row]
        for piece in split:
            update_(piece)


def together_(
    update_: Callable[[Sequence[Tensor]], None],
    lists: list[list[Tensor]],
    batch: _Batch | None = None,
) -> None:
    """Update tensors as one: concatenated, but for columns that are so in memory."""
    _, lengths, known, alike = batch or Layout(lists).batch(lists, [*range(len(lists[0]))])
    size = sum(lengths)
    # The first may have been put at the same address in a storage of its own.
    joined = [whole and _reaches(x[0], size) for x, whole in zip(lists, known, strict=True)]
    flat = [
        x if whole or {*map(Tensor.dim, x)} == {1} else [*map(Tensor.ravel, x)]
        for x, whole in zip(lists, joined, strict=True)
    ]
    pairs = zip(flat, joined, strict=True)
    tile = [x[0].as_strided((size,), (1,)) if whole else torch.cat(x) for x, whole in pairs]
    update_(tile)
    for whole, old, new in zip(*map(written, (joined, flat, tile)), strict=True):
        if whole:  # the others may not share the version of the first
            torch.autograd.graph.increment_version(old)
        elif alike:
            torch.split_with_sizes_copy(new, lengths, out=old)
        else:
            _torch.foreach_copy_(old, new.split_with_sizes(lengths))


def adjacent(tensors: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors are one vector in memory: one begins where the one before ends."""
    start, size = tensors[0].data_ptr(), tensors[0].element_size()
    *offsets, total = itertools.accumulate(map(Tensor.numel, tensors), initial=0)
    begins = (start + size * n for n in offsets)
    together = all(map(operator.eq, map(Tensor.data_ptr, tensors), begins))
    return together and _reaches(tensors[0], total)


def _reaches(first: Tensor, count: int) -> bool:
    """Whether so many elements, from that of a tensor on, lie in its storage."""
    end = (first.storage_offset() + count) * first.element_size()
    return end <= first.untyped_storage().nbytes()


def stacked_(rule: AnyRule, numbers: Numbers, columns: Sequence[Any]) -> None:
    """In place; small tensors of one shape by one call of the rule, under torch.vmap if need be.

    On a CPU big ones run in pieces, if the rule consists of elementwise operations and sums.
    """
    lists = [c for c in columns if isinstance(c, list)]
    on_cpu = columns[0][0].device.type == "cpu"
    alone: list[int] = []

    def leaf(*tensors: Tensor) -> list[Tensor]:
        row = in_place_of_lists(tensors, columns)
        new = apply(rule, numbers, row, into=rule.batched)
        return [x for x in new if isinstance(x, Tensor)]

    together: Any = leaf if rule.batched else torch.func.vmap(leaf)

    def update_(pieces: list[list[Tensor]]) -> None:
        for old, new in zip(written(pieces), together(*map(torch.stack, pieces)), strict=True):
            if new.numel():
                _torch.foreach_copy_(old, new.unbind())

    for batch in _of_one_shape(columns[0], widest(columns)):
        if len(batch) < (_FEW if on_cpu else 2):
            alone += batch
        else:
            update_([[column[i] for i in batch] for column in lists])
    whole = [
        i
        for i in alone
        if columns[0][i].numel() < TILE
        or not on_cpu
        or not _pieced_(rule, numbers, [pick(column, i) for column in columns])
    ]
    leaf_(rule, numbers, [pick(column, whole) for column in columns])


def _of_one_shape(params: list[Tensor], dtype: torch.dtype) -> Iterator[list[int]]:
    """Indices of tensors in batches of one shape: on a CPU small ones, others alone.

    On a device a batch takes no more memory than the largest.
    """
    if params[0].device.type == "cpu":
        size, most = torch.get_num_threads() * TILE, _SMALL
    else:
        stacks = _STACKED + 2 * (params[0].dtype != dtype)  # those that are converted
        memory = max(_LEAST, *(x.nbytes for x in params))
        size, most = memory // (stacks * dtype.itemsize), math.inf
    lengths = list(map(Tensor.numel, params))
    alike: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        alike.setdefault(p.shape if lengths[i] <= most else i, []).append(i)
    for indices in alike.values():
        yield from _batches(indices, lengths, size)


def _pieced_(rule: AnyRule, numbers: Numbers, row: Sequence[Any]) -> bool:
    """One tensor in place, in pieces that fit the cache; False where that is impossible.

    At each sum of all elements the rule is interrupted, run up to there on every piece without
    changing anything, and recorded again with the sum known. So the tensors are read once more for
    each sum.
    """
    p, size = row[0], torch.get_num_threads() * TILE
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
    tape = recording.Tape(len(lists) + 1, row[0].dtype, row[0], sums)
    try:
        outputs = recorded(rule, numbers, row, lists, tape)
    except recording.Summed as stop:
        return tape.program([*(None for _ in lists), stop.terms]), tape.constants, True
    return tape.program([*(outputs[k] for k in lists), None]), tape.constants, False


def _prepared(
    rule: AnyRule, numbers: Numbers, columns: Sequence[Any], layout: Layout
) -> tuple[int, Callable[[Sequence[Tensor]], None]]:
    """The size of pieces of the columns, and a function that updates one of each column."""
    size, like = torch.get_num_threads() * TILE, columns[0][0]

    def eagerly(piece: Sequence[Tensor]) -> None:
        leaf_(rule, numbers, in_place_of_lists([[tensor] for tensor in piece], columns))

    if layout.total <= _LITTLE or like.dtype not in AS_IS or layout.dtypes != {like.dtype}:
        return size, eagerly
    try:
        program, constants = _kept(rule, numbers, columns) or _program(rule, numbers, columns)
    except recording.Unrecordable:
        return size, eagerly
    size = size * _USUAL // len(program.memory)
    registers = program.registers(min(size, layout.total), like)
    return size, lambda piece: program.run(piece, registers, constants)


def _program(
    rule: AnyRule, numbers: Numbers, columns: Sequence[Any]
) -> tuple[recording.Program, list[Any]]:
    """What updates a piece of each column, and its constants; sets what the tensors share."""
    lists = [k for k, column in enumerate(columns) if isinstance(column, list)]
    tape = recording.Tape(len(lists), columns[0][0].dtype)
    outputs = recorded(rule, numbers, columns, lists, tape)
    program = tape.program([outputs[k] for k in lists])
    for column, value in zip(columns, outputs, strict=True):
        if isinstance(column, Shared):
            column.new = value
    return program, tape.constants


class _Recording(NamedTuple):
    """A program, and where the sheet has its constants and the new values of what is shared."""

    program: recording.Program
    sheet: Sheet
    constants: list[int]
    shared: list[int]


def _kept(
    rule: AnyRule, numbers: Numbers, columns: Sequence[Any]
) -> tuple[recording.Program, list[Any]] | None:
    """What `_program` returns, without another run of the rule where only numbers have changed.

    None where the rule is not ours, or its numbers are tensors.
    """
    values = [numbers.t, *vars(numbers.hparams).values()]
    if not (is_ours(rule) and {*map(type, values)} <= {float, int} and not numbers.initial):
        return None
    shared = [column for column in columns if isinstance(column, Shared)]
    last = _recordings(rule, columns[0][0].dtype, (*map(type, columns),))
    inputs = [*values, *(column.value for column in shared)]
    kept = last[0] if last else None  # another thread may replace it
    cells = kept.sheet.cells(inputs) if kept else None
    if kept is None or cells is None:
        last[:] = [kept := _recording(rule, inputs, columns)]
        cells = kept.sheet.cells(inputs)
    assert cells is not None  # these are the numbers with which it was recorded
    for column, k in zip(shared, kept.shared, strict=True):
        column.new = cells[k]
    return kept.program, [cells[k] for k in kept.constants]


@functools.lru_cache(maxsize=256)
def _recordings(rule: AnyRule, dtype: torch.dtype, kinds: tuple[type, ...]) -> list[_Recording]:
    """The last recording for columns of these kinds, if any, to be replaced by later ones."""
    return []


def _recording(rule: AnyRule, inputs: list[Any], columns: Sequence[Any]) -> _Recording:
    sheet = Sheet(inputs)
    symbols: Iterator[Any] = iter(sheet.inputs)
    t, *values = itertools.islice(symbols, 1 + len(hyper.FIELDS[rule.hparams]))
    seen = [Shared(next(symbols)) if isinstance(c, Shared) else c for c in columns]
    program, constants = _program(rule, numbers_of(rule, t, values), seen)
    places = [sheet.cell(c.new) for c in seen if isinstance(c, Shared)]
    cells = [sheet.cell(x) for x in constants]
    sheet.seal()
    return _Recording(program, sheet, cells, places)


def recorded(
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
