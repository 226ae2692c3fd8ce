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


def mark_unlent(state: Any) -> None:
    """Note that this package has made all tensors of a state, and nobody else holds one."""
    if type(state) is State:
        state.plans.lent = False


def row_of(state: Any, param: Tensor) -> dict[str, Any]:
    """The row of a parameter, made if there is none; the state may be any mapping."""
    if param not in state:
        state[param] = Row(state.plans) if type(state) is State else {}
    return state[param]


def pack(rows: Sequence[dict[str, Any]], names: Iterable[str]) -> None:
    """Lay the 0-d tensors of rows that no user has seen side by side, in one vector per name.

    They can then be read and written at once, and each is still a tensor of its own.
    """
    for name in names:
        values = [row[name] for row in rows if isinstance(row.get(name), Tensor)]
        kinds = {(type(x), x.dtype, x.device, x.dim(), x.requires_grad) for x in values}
        if len(values) < 2 or kinds != {(Tensor, values[0].dtype, values[0].device, 0, False)}:
            continue
        if not _modes.observed():
            elements = iter(torch.stack(values).unbind())
            for row in rows:
                if isinstance(row.get(name), Tensor):
                    row[name] = next(elements)


class Counts:
    """A 0-d tensor of each parameter's state, such as its step count; all of them are equal.

    These are the very tensors of the state. Where they lie side by side in one storage, they are
    read and written as one vector, otherwise one after the other.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.vector = _vector(tensors)
        self.versions = self._versions()

    @property
    def first(self) -> Tensor:
        """The value that all have."""
        return self.tensors[0].detach().reshape(())

    def equal(self) -> bool:
        """Whether all are still equal: by value on a CPU, elsewhere by version, without waiting."""
        if len(self.tensors) == 1:
            return True
        if self.tensors[0].device.type != "cpu":
            return self.versions == self._versions()
        values = self.vector
        if values is None:
            values = torch.stack([x.reshape(()) for x in self.tensors])
        least, greatest = values.aminmax()
        return bool(least == greatest)

    def add_(self, number: Any, i: int | None = None) -> None:
        """Count, for all or for one."""
        if isinstance(number, Tensor):
            number = number.to(self.tensors[0].device)
        for tensor in self._written(i):
            tensor.add_(number)
        self.versions = self._versions()

    def fill_(self, value: Any, i: int | None = None) -> None:
        """Set all, or one."""
        for tensor in self._written(i):
            torch.ops.aten.copy_.default(tensor, torch.as_tensor(value))  # see running.leaf_
        self.versions = self._versions()

    def _written(self, i: int | None) -> list[Tensor]:
        if i is not None:
            return [self.tensors[i]]
        return self.tensors if self.vector is None else [self.vector]

    def _versions(self) -> list[int] | None:
        """A write to a tensor raises its version; on a CPU the values are read instead."""
        if self.tensors[0].device.type == "cpu" or any(x.is_inference() for x in self.tensors):
            return None
        return [_torch.version(x) for x in self.tensors]


class Integers:
    """The step counts of torch.optim.SparseAdam, which are Python's."""

    def __init__(self, rows: list[dict[str, Any]], name: str) -> None:
        self.rows, self.name = rows, name

    @property
    def first(self) -> int:
        return self.rows[0][self.name]

    def add_(self, number: Any, i: int | None = None) -> None:
        """Count, for all or for one."""
        for row in self.rows if i is None else [self.rows[i]]:
            row[self.name] += int(number)


def _vector(tensors: list[Tensor]) -> Tensor | None:
    """A view of all of them, where they lie side by side in one storage."""
    first = tensors[0]
    if any(type(x) is not Tensor or x.dtype != first.dtype for x in tensors) or first.is_meta:
        return None
    if _modes.observed():
        return None
    size, start, n = first.element_size(), first.data_ptr(), len(tensors)
    storage = first.untyped_storage()
    fits = start + n * size <= storage.data_ptr() + storage.nbytes()
    if not fits or list(map(Tensor.data_ptr, tensors)) != [*range(start, start + n * size, size)]:
        return None
    return first.detach().as_strided((n,), (1,))
