"""Replicas of modules, which are called in their place with other tensors."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import operator
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from diffopt import _torch

_Build: TypeAlias = Callable[[Any, list[Any]], Any]


def replica(parts: Sequence[nn.Module], tensors: Mapping[int, Tensor]) -> nn.Module:
    """A copy of the module `parts[0]` with `tensors[id(tensor)]` in place of each of its tensors.

    The parts are the module and all its submodules, which are copied too. Everything else is
    shared, except what refers to a part or a tensor: containers, weak references, bound methods,
    functions, and objects (but not objects nested inside those).
    """
    known: dict[int, Any] = {**tensors, **{id(part): object.__new__(type(part)) for part in parts}}
    copies = _Copies(known, _Copies(known, None))
    for part in parts:
        attributes = vars(known[id(part)])
        attributes.update(vars(part))
        for name, value in vars(part).items():
            kind: type = type(value)
            if kind not in _ATOMS and (kind not in _DICTS or value) and name not in _TABLES:
                attributes[name] = copies.of(value)
        for name in _TABLES:
            attributes[name] = {k: known.get(id(v), v) for k, v in attributes[name].items()}
        for slot, value in _slotted(part).items():
            slot.__set__(known[id(part)], copies.of(value))
    return known[id(parts[0])]


class _Copies:
    """The replacements of objects in a replica; `known` holds them by the object's identity.

    `inner` is used inside an object, where nested objects are not searched.
    """

    def __init__(self, known: Mapping[int, Any], inner: _Copies | None) -> None:
        self.known, self.inner = dict(known), inner

    def of(self, value: Any) -> Any:
        """The replacement of `value`: itself, if nothing in it has to be replaced."""
        if type(value) in _ATOMS:
            return value
        key = id(value)
        if key not in self.known:
            self.known[key] = value  # in case it refers to itself
            self.known[key] = self._followed(value)
        return self.known[key]

    def _followed(self, value: Any) -> Any:
        kind: type = type(value)
        for kinds, parts, build in _FOLLOW:
            if issubclass(kind, kinds):
                return self._rebuilt(value, parts(value), build)
        if self.inner is None or issubclass(kind, _SHARED):
            return value
        return self.inner._rebuilt(value, _attributes(value), _object)

    def _rebuilt(self, value: Any, parts: list[Any], build: _Build) -> Any:
        new = list(map(self.of, parts))
        return value if all(map(operator.is_, new, parts)) else build(value, new)


def _attributes(value: Any) -> list[Any]:
    return [*getattr(value, "__dict__", {}).values(), *_slotted(value).values()]


def _object(value: Any, new: list[Any]) -> Any:
    result, contents = copy.copy(value), iter(new)
    for name in getattr(value, "__dict__", {}):
        vars(result)[name] = next(contents)
    for slot in _slotted(value):
        slot.__set__(result, next(contents))
    return result


def _slotted(value: Any) -> dict[types.MemberDescriptorType, Any]:
    """The attributes of an object that stand in `__slots__`."""
    result: dict[types.MemberDescriptorType, Any] = {}
    for slot in _slots(type(value)):
        with contextlib.suppress(AttributeError):  # it is not set
            result[slot] = slot.__get__(value)
    return result


@functools.lru_cache(maxsize=1024)
def _slots(kind: type) -> list[types.MemberDescriptorType]:
    bases = [vars(base) for base in kind.__mro__ if "__slots__" in vars(base)]
    found = [value for base in bases for value in base.values()]
    return [value for value in found if isinstance(value, types.MemberDescriptorType)]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _captured(function: types.FunctionType) -> list[Any]:
    contents = map(_content, function.__closure__ or ())
    return [*contents, function.__defaults__, function.__kwdefaults__]


def _function(value: types.FunctionType, new: list[Any]) -> types.FunctionType:
    *contents, defaults, kwdefaults = new
    closure = tuple(
        cell if _content(cell) is content else types.CellType(content)
        for cell, content in zip(value.__closure__ or (), contents, strict=True)
    )
    result = types.FunctionType(
        value.__code__, value.__globals__, value.__name__, defaults, closure
    )
    result.__kwdefaults__ = kwdefaults
    vars(result).update(vars(value))
    return result


def _method(value: types.MethodType, new: list[Any]) -> types.MethodType:
    return types.MethodType(value.__func__, *new)


def _items(value: Mapping[Any, Any]) -> list[Any]:
    return list(itertools.chain(*value.items()))


def _dict(value: dict[Any, Any], new: list[Any]) -> dict[Any, Any]:
    result = copy.copy(value)
    result.clear()
    result.update(zip(new[::2], new[1::2], strict=True))
    return result


def _list(value: Any, new: list[Any]) -> Any:
    result = copy.copy(value)
    result.clear()
    result.extend(new)
    return result


_ATOMS = {bool, int, float, complex, str, bytes, type(None)}
_DICTS = {dict, OrderedDict}  # most attributes of a module are empty dicts for hooks
_TABLES = _torch.MODULE_TABLES
_SHARED = (Tensor, nn.Module, type, types.ModuleType)  # those that are not parts of the module
_FOLLOW: tuple[tuple[Any, Callable[[Any], list[Any]], _Build], ...] = (
    (dict, _items, _dict),
    ((list, deque), list, _list),
    (types.MappingProxyType, _items, lambda value, new: type(value)(_dict(dict(value), new))),
    (
        weakref.WeakMethod,
        lambda value: [getattr(value(), "__self__", None)],
        lambda value, new: weakref.WeakMethod(_method(value(), new)),
    ),
    (weakref.ref, lambda value: [value()], lambda value, new: weakref.ref(*new)),
    (tuple, list, lambda value, new: getattr(value, "_make", type(value))(new)),
    ((set, frozenset), list, lambda value, new: type(value)(new)),
    (types.MethodType, lambda value: [value.__self__], _method),
    (
        functools.partial,
        lambda value: [value.func, value.args, value.keywords],
        lambda value, new: functools.partial(new[0], *new[1], **new[2]),
    ),
    (types.FunctionType, _captured, _function),
)
"""The kinds of objects that are followed: their parts, and how one is built of other parts."""
