"""What an optimizer keeps for each parameter, where users read and write."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt import _modes, _torch
from diffopt._rule import marks, running, tiles

_CHANGES = (
    "__setitem__",
    "__delitem__",
    "__ior__",
    "clear",
    "pop",
    "popitem",
    "setdefault",
    "update",
)
_READS = ("__getitem__", "get", "items", "values", "copy", "__or__", "__ror__", "__reduce__")


class Plans(list[Any]):
    """The plans of a state, and whether anybody else may hold one of its tensors.

    `lent` is set when a user reads a tensor of the state, or puts one in, and stays so: from then
    on its shape, strides, dtype or storage may change at any time, and a plan has to look.
    """

    lent = False


def _hooked(names: Iterable[str], hook: Callable[[Any], None]) -> Callable[[Any], Any]:
    """A decorator of mappings: the hook comes before these methods."""

    def decorate(cls: Any) -> Any:
        def hooked(method: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(method)
            def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                hook(self)
                return method(self, *args, **kwargs)

            return call

        for name in names:
            setattr(cls, name, hooked(getattr(cls, name)))
        return cls

    return decorate


def _drop(mapping: Any) -> None:
    mapping.plans.clear()


def _lend(row: Any) -> None:
    if _unread.get() is not row.plans:
        row.plans.lent = True


@_hooked(_CHANGES, _drop)
@_hooked((*_READS, *_CHANGES), _lend)
class Row(dict[str, Any]):
    """The state of one parameter: a change drops the plans of the state it belongs to."""

    def __init__(self, plans: Plans, values: Mapping[str, Any] | Iterable[Any] = ()) -> None:
        super().__init__(values)
        self.plans = plans

    def __iter__(self) -> Iterator[str]:
        """Defined here because otherwise `dict(row)` would bypass the methods below."""
        return iter(self.keys())

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


@_hooked(_CHANGES, _drop)
class State(defaultdict[Any, Any]):
    """The rows of all parameters, and the plans that hold until one of them is changed.

    Copies, also those made by deepcopy and pickle, are plain: they have no plans.
    """

    def __init__(self, rows: Mapping[Any, Any] | None = None) -> None:
        super().__init__(dict)
        self.plans = Plans()
        for key, row in (rows or {}).items():
            self[key] = Row(self.plans, row) if type(row) in (dict, Row) else row
        self.plans.lent = bool(rows)

    def __missing__(self, key: Any) -> Row:
        row = self[key] = Row(self.plans)
        return row

    def __copy__(self) -> Any:
        return defaultdict(dict, self)

    copy: Any = __copy__

    def __reduce__(self) -> Any:
        return defaultdict, (dict,), None, None, iter(self.items())

    def owns(self, rows: Iterable[Any]) -> bool:
        """Whether a change of any of these rows drops the plans."""
        return all(type(row) is Row and row.plans is self.plans for row in rows)


_unread = contextvars.ContextVar[Any]("_unread", default=None)
"""The plans of the state being read; another thread may read another one at the same time."""


@contextlib.contextmanager
def unread(state: Any) -> Generator[None]:
    """A context in which what this thread reads of a state and puts into it lends no tensor.

    Rows of another one, which users may put into a state, are lent.
    """
    token = _unread.set(getattr(state, "plans", None))
    try:
        yield
    finally:
        _unread.reset(token)


def mark_unlent(state: Any, names: Iterable[str]) -> None:
    """Say that all tensors of a state were made by this package, and nobody else holds one.

    The 0-d tensors of these names are looked at, so that the next step does not wait for them.
    """
    if type(state) is State:
        with unread(state):
            rows = [row for row in state.values() if isinstance(row, dict)]
            scalars = (row.get(name) for row in rows for name in names)
            marks.learn([*filter(_modes.versioned, scalars)])
        state.plans.lent = False


def row_of(state: Any, param: Tensor) -> dict[str, Any]:
    """The row of a parameter, made if there is none; the state may be any mapping."""
    if param not in state:
        state[param] = Row(state.plans) if type(state) is State else {}
    return state[param]


def pack(rows: Sequence[dict[str, Any]], names: Iterable[str]) -> None:
    """Lay 0-d CPU tensors of rows that no user has seen side by side, in one vector per name.

    They can then be read and written at once, and each is still a tensor of its own.
    """
    for name in names:
        values = [row[name] for row in rows if isinstance(row.get(name), Tensor)]
        kinds = {(type(x), x.dtype, x.device, x.dim(), x.requires_grad) for x in values}
        cpu = torch.device("cpu")  # on others, where kernels take lists, each keeps its version
        if len(values) < 2 or kinds != {(Tensor, values[0].dtype, cpu, 0, False)}:
            continue
        if not _modes.observed():
            elements = iter(torch.stack(values).unbind())
            for row in rows:
                if isinstance(row.get(name), Tensor):
                    row[name] = next(elements)


class Counts:
    """A 0-d tensor of each parameter's state, such as its step count; all of them are equal.

    These are the very tensors of the state. Where they lie side by side in one storage, they are
    read and written as one vector; on a device, as a list.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        known = all(map(_modes.versioned, tensors)) and None not in marks.known(tensors)
        self.marks = marks.of(tensors) if known else []
        self.vector = None if self.marks else _vector(tensors)

    def at(self, i: int) -> Tensor:
        """The value of one: on a device it may differ if a user has written through `.data`."""
        count = self.tensors[i]
        return count if count.dim() == 0 else count.reshape(())

    def equal(self) -> bool:
        """Whether they still are; a device is not waited for, their versions tell."""
        if self.marks:
            first, *others = map(marks.Mark.value_of, self.marks, self.tensors)
            return first is not None and all(value == first for value in others)
        if len(self.tensors) == 1 or self.tensors[0].device.type != "cpu":
            return True
        values = self.vector
        if values is None:
            values = torch.stack([x.reshape(()) for x in self.tensors])
        least, greatest = values.aminmax()
        return bool(least == greatest)

    def add_(self, number: Any, i: int | None = None) -> None:
        """Count, for all or for one."""
        if isinstance(number, Tensor):
            number = number.to(self.tensors[0])
        if self.marks:
            token, before = self.marks[i or 0].value_of(self.tensors[i or 0]) or marks.unknown()
            alpha = {"alpha": 1} if isinstance(number, Tensor) else {}  # or it waits for its value
            _torch.foreach["add"][1](self._written(i), number, **alpha)
            if isinstance(number, Tensor) or _modes.capturing():
                self._mark(None, i)
            else:
                self._mark((token, before + number), i)
            return
        for tensor in self._written(i):
            tensor.add_(number)

    def fill_(self, value: Any, i: int | None = None) -> None:
        """Set all, or one."""
        written = self._written(i)
        if self.marks:
            value = running.scalar_on(value, self.tensors[0].dtype, self.tensors[0].device)
            _torch.foreach_copy_(written, [value.expand_as(x) for x in written])
            self._mark(None, i)
            return
        for tensor in written:
            # See running.leaf_.
            torch.ops.aten.copy_.default(tensor, _modes.tensor_of(value))

    def _written(self, i: int | None) -> list[Tensor]:
        if i is not None:
            return [self.tensors[i]]
        return self.tensors if self.vector is None else [self.vector]

    def _mark(self, value: marks.Value | None, i: int | None) -> None:
        """Note what was written; None is one unknown number for all that are written in a row."""
        if not i:
            self._unknown = marks.unknown()
        pairs = list(zip(self.marks, self.tensors, strict=True))
        for mark, x in pairs if i is None else [pairs[i]]:
            mark.note(x, value or self._unknown)


class Integers:
    """The step counts of torch.optim.SparseAdam, which are Python's."""

    tensors = ()

    def __init__(self, rows: list[dict[str, Any]], name: str) -> None:
        self.rows, self.name = rows, name

    def at(self, i: int) -> int:
        return dict.__getitem__(self.rows[i], self.name)  # which lends nothing

    def equal(self) -> bool:
        return len({*map(self.at, range(len(self.rows)))}) == 1

    def add_(self, number: Any, i: int | None = None) -> None:
        """Count, for all or for one."""
        for k in range(len(self.rows)) if i is None else [i]:
            dict.__setitem__(self.rows[k], self.name, self.at(k) + int(number))  # plans stay


def _vector(tensors: list[Tensor]) -> Tensor | None:
    """A view of all of them, where they lie side by side in one storage."""
    first = tensors[0]
    plain = {(type(x), x.dtype) for x in tensors} == {(Tensor, first.dtype)} and not first.is_meta
    if not plain or _modes.observed() or not tiles.adjacent(tensors):
        return None
    return first.detach().as_strided((len(tensors),), (1,))
