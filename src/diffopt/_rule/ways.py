"""The ways of running one rule: leaf by leaf, in tiles, by foreach kernels, by a native kernel.

All take columns: the params, their gradients, and one column for each field of the state after the
step. A column is a list of tensors, `()` for a field that is not used, or a `Shared`. Its tensors
share device, dtype, step and hyperparameters, so that per-step scalars are computed once.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffopt import _modes, _torch
from diffopt._rule import hyper, ops, recording
from diffopt._rule.checks import Shape
from diffopt._rule.tensorlist import TensorList

Execution = Literal["auto", "leaf", "foreach", "compiled"]

_AS_IS = (torch.float32, torch.float64)
_TILE = 1 << 18  # elements for each thread: less pays too much Python, more leaves the cache
_USUAL = 6  # tensors in the cache at once, for which that is
_SMALL, _FEW = 1 << 12, 8  # up to so many elements, from so many tensors on, stacks pay
_MOVING = ("weight_decay", "momentum")  # what moves a parameter whose gradient is zero
WORKING_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.complex64,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """The mathematics of one tensor; `diffopt.rules.leafwise` says what the fields are."""

    hparams: type[Any]
    state: type[Any]
    init: Callable[[Tensor, Tensor], Any]
    leaf: Callable[..., tuple[Any, Any]]
    scalars: Callable[[Any, Any], Any] | None
    maximize: bool
    initial: Callable[[Any], dict[str, Any]] | None
    native: Callable[..., bool] | None
    elementwise: bool
    batchable: bool
    shapes: Callable[[Shape], tuple[Shape, ...]] | None
    refuse: Callable[[Tensor], str | None] | None
    stackable: bool

    def at(self, step: Any, values: Sequence[Any], like: Tensor) -> Numbers:
        """What the rule sees beside tensors, for tensors of the device and dtype of `like`."""
        t, *values = placed([step, *values], like)
        numbers = self.numbers(t, values)
        first = 1 - ops.after_first(t)
        if self.initial is None or ops.is_zero(first):
            return numbers
        initial = {name: first * value for name, value in self.initial(numbers.hparams).items()}
        return numbers._replace(initial=initial)

    def numbers(self, t: Any, values: Sequence[Any]) -> Numbers:
        """The same for numbers in their final form, where the state is past its initial values."""
        hparams = hyper.assemble(self.hparams, values)
        return Numbers(t, hparams, self.scalars(t, hparams) if self.scalars else None, {})

    def apply(self, numbers: Numbers, columns: Sequence[Any]) -> list[Any]:
        """New params and buffers, for columns of lists or for one row of them."""
        new = self.run(numbers, list(map(_enter, columns)))
        return list(map(_leave, new, _written(columns)))

    def run(self, numbers: Numbers, columns: Sequence[Any]) -> list[Any]:
        """The same for tensors as the rule sees them."""
        p, g, *buffers = columns
        t, hparams, scalars, initial = numbers
        s = self.state(t, *buffers)
        if initial:
            s = s._replace(**{name: getattr(s, name) + value for name, value in initial.items()})
        new_p, new_s = self.leaf(p, -g if self.maximize else g, s, hparams, scalars)
        return [new_p, *new_s[1:]]


class Numbers(NamedTuple):
    """The numbers of one step: its count, hyperparameters, and what is computed from them once."""

    t: Any
    hparams: Any
    scalars: Any
    initial: dict[str, Any]  # what the first step adds to buffers that start at 0


class Shared:
    """A 0-d field of the state that all tensors of the columns share, and its new value."""

    __slots__ = ("new", "value")

    def __init__(self, value: Tensor) -> None:
        self.value, self.new = value, value


def leaf_(rule: Rule, numbers: Numbers, columns: Sequence[Any]) -> None:
    """In place, tensor by tensor."""
    for row in _rows_of(columns):
        for old, new in zip(_written(row), rule.apply(numbers, row), strict=True):
            if isinstance(old, Tensor) and new is not old:
                old.copy_(new)


def foreach_(rule: Rule, numbers: Numbers, columns: Sequence[Any]) -> None:
    """In place, by horizontally batched kernels."""
    for old, new in zip(_written(columns), rule.apply(numbers, columns), strict=True):
        if isinstance(old, list):
            _torch.foreach_copy_(old, new)


def tiled_(rule: Rule, numbers: Numbers, columns: Sequence[Any]) -> None:
    """In place, by pieces that stay in the cache of a CPU.

    They are slices of big tensors, and small tensors strung together. `tileable` says when.
    """
    lists = [c for c in columns if isinstance(c, list)]
    size, update_ = _prepared(rule, numbers, columns)
    flat = [[x if x.dim() == 1 else x.view(-1) for x in column] for column in lists]
    small, strung = list[int](), torch.get_num_threads() * _TILE // 2  # more costs page faults
    for i, tensor in enumerate(flat[0]):
        if tensor.numel() < strung // 2:
            small.append(i)
            continue
        for piece in zip(*(column[i].split(size) for column in flat), strict=True):
            update_(piece)
    for batch in _batches(small, [tensor.numel() for tensor in flat[0]], strung):
        pieces = [[column[i] for i in batch] for column in flat]
        tile = [torch.cat(column) for column in pieces]
        update_(tile)
        lengths = [piece.numel() for piece in pieces[0]]
        for old, new in zip(_written(pieces), _written(tile), strict=True):
            _torch.foreach_copy_(old, new.split(lengths))


def stacked_(rule: Rule, numbers: Numbers, columns: Sequence[Any]) -> None:
    """In place; small tensors of one shape by one call of the rule, which torch.vmap batches.

    Long ones go by pieces, where the rule is made of elementwise operations and sums.
    """
    lists = [c for c in columns if isinstance(c, list)]
    alone: list[int] = []

    def leaf(*tensors: Tensor) -> list[Tensor]:
        rest = iter(tensors)
        row = [next(rest) if isinstance(c, list) else c for c in columns]
        return [x for x in rule.apply(numbers, row) if isinstance(x, Tensor)]

    for batch in _alike(columns[0]):
        if len(batch) < _FEW:
            alone += batch
            continue
        pieces = [[column[i] for i in batch] for column in lists]
        stacks: Any = torch.func.vmap(leaf)(*map(torch.stack, pieces))
        for old, new in zip(_written(pieces), stacks, strict=True):
            if new.numel():
                _torch.foreach_copy_(old, new.unbind())
    whole = [
        i
        for i in alone
        if columns[0][i].numel() < _TILE
        or not _pieced_(rule, numbers, [pick(column, i) for column in columns])
    ]
    leaf_(rule, numbers, [pick(column, whole) for column in columns])


def _alike(params: list[Tensor]) -> Iterator[list[int]]:
    """Cut a list of tensors so that the small ones of one shape are together."""
    size = torch.get_num_threads() * _TILE
    lengths = list(map(Tensor.numel, params))
    alike: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        alike.setdefault(p.shape if lengths[i] <= _SMALL else i, []).append(i)
    for indices in alike.values():
        yield from _batches(indices, lengths, size)


def _pieced_(rule: Rule, numbers: Numbers, row: Sequence[Any]) -> bool:
    """One tensor in place, by pieces that stay in the cache; False where that is impossible.

    At each sum of all elements the rule is stopped, run up to there on every piece, which changes
    nothing, and recorded once more with the sum known. So it reads the tensors once for each sum.
    """
    p, size = row[0], torch.get_num_threads() * _TILE
    lists = [k for k, x in enumerate(row) if isinstance(x, Tensor) and x.numel()]
    kinds = {(row[k].shape, row[k].dtype, row[k].is_contiguous()) for k in lists}
    shared = any(isinstance(x, Shared) for x in row)
    if shared or p.dtype not in _AS_IS or kinds != {(p.shape, p.dtype, True)}:
        return False
    terms = p.new_empty(min(size, p.numel()))
    pieces = [*zip(*(row[k].view(-1).split(size) for k in lists), strict=True)]
    sums: list[float] = []
    try:
        while True:
            program, unfinished = _up_to_a_sum(rule, numbers, row, lists, sums)
            registers = program.registers(len(terms), p)
            total = 0.0
            for piece in pieces:
                part = terms[: piece[0].numel()]
                program.run((*piece, part), registers)
                if unfinished:
                    total += part.sum().item()
            if not unfinished:
                return True
            sums.append(total)
    except recording.Unrecordable:  # before anything is written
        return False


def _up_to_a_sum(
    rule: Rule, numbers: Numbers, row: Sequence[Any], lists: list[int], sums: list[float]
) -> tuple[recording.Program, bool]:
    """A program that writes the terms of the first sum that is not known yet, and True; else False.

    They go to one tensor more than the row has; without such a sum the row gets its new values.
    """
    tape = recording.Tape(len(lists) + 1, row[0], sums)
    inputs = list(row)
    for k, x in zip(lists, tape.inputs, strict=False):
        inputs[k] = x
    try:
        new_p, *new = rule.run(numbers, inputs)
    except recording.Summed as stop:
        return recording.Program(tape, [*(None for _ in lists), stop.terms]), True
    except TypeError as error:
        raise recording.Unrecordable(*error.args) from error
    outputs = [x for k, x in enumerate([new_p, None, *new]) if k in lists]
    return recording.Program(tape, [*outputs, None]), False


def _prepared(
    rule: Rule, numbers: Numbers, columns: Sequence[Any]
) -> tuple[int, Callable[[Sequence[Tensor]], None]]:
    """The size of pieces, and the rule in place, for one row of the columns that are lists."""
    size = torch.get_num_threads() * _TILE
    lists = [k for k, column in enumerate(columns) if isinstance(column, list)]
    like = columns[0][0]

    def eagerly(piece: Sequence[Tensor]) -> None:
        row = list(columns)
        for k, tensor in zip(lists, piece, strict=True):
            row[k] = tensor
        for old, new in zip(_written(row), rule.apply(numbers, row), strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)

    if any(x.dtype != like.dtype or x.dtype not in _AS_IS for k in lists for x in columns[k]):
        return size, eagerly
    tape = recording.Tape(len(lists))
    row = [c.value if isinstance(c, Shared) else c for c in columns]
    for k, x in zip(lists, tape.inputs, strict=True):
        row[k] = x
    try:
        new_p, *new = rule.run(numbers, row)
        outputs = [value for k, value in enumerate([new_p, None, *new]) if k in lists]
        program = recording.Program(tape, outputs)
    except (recording.Unrecordable, TypeError):
        return size, eagerly
    for column, value in zip(columns[2:], new, strict=True):
        if isinstance(column, Shared):
            column.new = value
    size = size * _USUAL // len(program.boolean)
    registers = program.registers(size, like)
    return size, lambda piece: program.run(piece, registers)


def compiled_(rule: Rule, step: Tensor, values: Sequence[Any], columns: Sequence[Any]) -> None:
    """In place, by one kernel that torch.compile makes of the rule for these shapes.

    torch.compile has been seen to give wrong numbers without a word, so its first result is
    compared with the eager one; where they differ, a warning says so and the rule stays eager.
    """
    # Compiled by torch 2.13, copy_ of a reshaped tensor to a 0-d one does nothing.
    columns = [[x.view(1) if x.dim() == 0 else x for x in c] if c else c for c in columns]
    tensors = [x for column in columns for x in column]
    numbers = [torch.as_tensor(value, dtype=torch.float64) for value in values]
    key = (rule, *((x.shape, x.dtype, x.device, x.stride()) for x in tensors))
    if key in _COMPILED:
        _COMPILED[key](step, numbers, columns)
        return

    def eager(step: Tensor, numbers: Sequence[Any], columns: Sequence[Any]) -> None:
        leaf_(rule, rule.at(step, numbers, columns[0][0]), columns)

    expected = [[x.clone() for x in c] if isinstance(c, list) else c for c in columns]
    eager(step, numbers, expected)
    _COMPILED[key] = torch.compile(eager, fullgraph=True, dynamic=False)
    _COMPILED[key](step, numbers, columns)
    for old, new in zip(_written(columns), _written(expected), strict=True):
        pairs = zip(old, new, strict=True) if isinstance(old, list) else ()
        if not all(torch.allclose(x, y, 1e-3, 1e-5, equal_nan=True) for x, y in pairs):
            warnings.warn(
                "torch.compile computes something else than the rule, which stays eager",
                stacklevel=2,
            )
            _COMPILED[key] = eager
            _torch.foreach_copy_(
                [x for c in _written(columns) if isinstance(c, list) for x in c],
                [x for c in _written(expected) if isinstance(c, list) for x in c],
            )
            return


_COMPILED: dict[Any, Callable[..., None]] = {}


def sparse_(rule: Rule, numbers: Numbers, columns: Sequence[Any]) -> None:
    """In place, for sparse gradients: only their rows, where a zero gradient moves nothing."""
    rowwise = all(ops.is_zero(getattr(numbers.hparams, name, 0)) for name in _MOVING)
    for i, grad in enumerate(columns[1]):
        row = [pick(column, i) for column in columns]
        if not rowwise:
            row[1] = grad.to_dense()
            leaf_(rule, numbers, [[x] if isinstance(x, Tensor) else x for x in row])
            continue
        grad = grad.coalesce()
        if not grad._nnz():
            continue
        where = tuple(grad.indices())
        picked = [_rows(x, where) if isinstance(x, Tensor) else x for x in row[2:]]
        new = rule.apply(numbers, [_rows(row[0], where), grad.values(), *picked])
        for old, pieces in zip(_written(row), new, strict=True):
            if isinstance(old, Tensor) and len(where) == 1:
                old.index_copy_(0, where[0], pieces)
            elif isinstance(old, Tensor):
                old[where] = pieces


def _rows(x: Tensor, where: tuple[Tensor, ...]) -> Tensor:
    """`x[where]`; for rows that takes several times longer than `index_select`."""
    return x.index_select(0, where[0]) if len(where) == 1 else x[where]


def native_(
    rule: Rule,
    steps: list[Tensor],
    first: bool | None,
    values: Sequence[Any],
    columns: Sequence[Any],
    **amp: Tensor,
) -> bool:
    """In place, by the rule's kernel; False, and nothing has changed, where it has none for this.

    `steps` are 0-d tensors, one for each param; `first` says whether this is step 1 (None: that is
    not known without waiting for a device); `amp` may have `grad_scale` and `found_inf`.
    """
    if rule.native is None:
        return False
    params, grads, *buffers = columns
    state, hparams = rule.state(steps, *buffers), hyper.assemble(rule.hparams, values)
    with _torch.below_autograd():  # a tenth of the time for many small tensors
        done = rule.native(params, grads, state, hparams, first, amp)
    if done:  # torch's kernels don't tell autograd that what it may have saved is gone
        torch.autograd.graph.increment_version(params)
    return done


def plain(columns: Sequence[Any]) -> bool:
    """Whether code can walk through the memory of all these tensors at once."""
    tensors = [x for column in columns if isinstance(column, list) for x in column]
    return (
        all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
        and all(tensor.is_contiguous() for tensor in tensors)
        and not (_modes.transformed() or _modes.intercepted())
    )


def kernel_ready(columns: Sequence[Any]) -> bool:
    """Whether torch's fused kernels take these tensors."""
    kinds = {(x.dtype, x.device) for column in columns if isinstance(column, list) for x in column}
    dtype, device = next(iter(kinds))
    return len(kinds) == 1 and dtype in _AS_IS and device.type in ("cpu", "cuda") and plain(columns)


def tileable(rule: Rule, columns: Sequence[Any], values: Sequence[Any]) -> bool:
    """Whether tiles compute this."""
    cpu = columns[0][0].device.type == "cpu"
    return cpu and rule.elementwise and all(map(is_scalar, values)) and plain(columns)


def stackable(rule: Rule, columns: Sequence[Any], values: Sequence[Any]) -> bool:
    """Whether stacks compute this."""
    cpu = columns[0][0].device.type == "cpu"
    return cpu and rule.stackable and all(map(is_scalar, values)) and plain(columns)


def is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dim() == 0)


def unused(field: Any) -> bool:
    """Whether a field of a state is the () of a configuration that does not need it."""
    return isinstance(field, tuple) and not field


def pick(column: Any, batch: int | list[int]) -> Any:
    """One element of a column, or the list of some."""
    if isinstance(column, Shared) or unused(column):
        return column
    return column[batch] if isinstance(batch, int) else [column[i] for i in batch]


def _rows_of(columns: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """One element of each column, tensor by tensor."""
    lists = (c if isinstance(c, list) else itertools.repeat(c) for c in columns)
    return zip(*lists, strict=False)


def _written(columns: Sequence[Any]) -> list[Any]:
    """All but the gradients."""
    return [columns[0], *columns[2:]]


def _batches(indices: list[int], lengths: list[int], size: int) -> Iterator[list[int]]:
    """Cut a list of tensors so that each part has about `size` elements."""
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


# Tensors as a rule sees them: real, at least float32, at least one-dimensional (a 0-d float32
# tensor would be promoted by a 0-d float64 hyperparameter, and then not match its neighbours).


def _enter(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.dtype in _AS_IS and value.dim() > 0:
            return value
        tensor = value.to(WORKING_DTYPE.get(value.dtype, value.dtype))
        tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor
        return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    if isinstance(value, Shared):
        return value.value
    return () if unused(value) else TensorList(map(_enter, value))


def _leave(value: Any, old: Any) -> Any:
    if isinstance(old, Shared):
        old.new = value
        return old
    if not isinstance(old, Tensor):
        return old if unused(old) else list(map(_leave, value, old))
    if value.dtype != old.dtype or old.dim() == 0:
        value = torch.view_as_complex(value) if old.is_complex() else value
        value = value.reshape(()) if value.numel() == 1 and old.dim() == 0 else value
        value = value.to(old.dtype)
    if value.shape != old.shape:
        shapes = tuple(value.shape), tuple(old.shape)
        raise ValueError(f"the rule returned shape {shapes[0]} for a tensor of shape {shapes[1]}")
    return value


def placed(values: Sequence[Any], like: Tensor) -> list[Any]:
    """Hyperparameters as the rule's arithmetic wants them, for tensors like this one."""
    device, dtype = like.device, like.dtype
    result: list[Any] = []
    for value in on_device(values, device):
        if isinstance(value, Tensor):
            if value.dim() == 0:
                value = _modes.exact(value)
            else:
                working = WORKING_DTYPE.get(dtype, dtype)
                # torch.compile does not know `to_real`.
                value = value.to(working.to_real() if working.is_complex else working)
                value = value.unsqueeze(-1) if dtype.is_complex else value
        result.append(value)
    return result


def on_device(values: Sequence[Any], device: torch.device) -> list[Any]:
    """The same, but with 0-d tensors in their own precision, as in torch.optim."""
    return [
        v.to(device) if isinstance(v, Tensor) and v.dim() == 0 and v.device.type != "cpu" else v
        for v in values
    ]
