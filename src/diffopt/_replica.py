"""Replicas of modules, which are called in their place with other tensors."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import operator
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from diffopt import _torch

_Build: TypeAlias = Callable[[Any, list[Any], Any], Any]


def replica(parts: Sequence[nn.Module], tensors: Mapping[int, Tensor]) -> nn.Module:
    """A copy of the module `parts[0]` with `tensors[id(tensor)]` in place of each of its tensors.

    The parts are the module and all its submodules, which are copied too. Everything else is
    shared, except what refers to a part or a tensor: containers, weak references, bound methods,
    functions, and objects (but not objects nested inside those).

    Raises:
        ValueError: an attribute refers to a part or a tensor in a way that cannot be replaced.
    """
    known: dict[int, Any] = {**tensors, **{id(part): object.__new__(type(part)) for part in parts}}
    copies = _Copies(known, _Copies(known, None))
    for part in parts:
        result = known[id(part)]
        attributes = vars(result)
        attributes.update(vars(part))
        for name, kind in _REGISTRIES.items():
            old = attributes.get(name)  # mostly empty, which takes longer to copy than to make
            attributes[name] = old.copy() if old else kind()
        _replace(part, result, copies)
    return known[id(parts[0])]


def replace_(parts: Iterable[nn.Module], tensors: Mapping[int, Tensor]) -> None:
    """Put `tensors[id(tensor)]` in place of each of these tensors in a replica's parts.

    Raises:
        ValueError: as `replica`.
    """
    copies = _Copies(tensors, _Copies(tensors, None))
    for part in parts:
        _replace(part, part, copies)


def _replace(part: nn.Module, result: nn.Module, copies: _Copies) -> None:
    """Set the attributes of a part in `result`, which has them already, with replacements."""
    own, attributes, known = vars(part), vars(result), copies.known
    followed = [name for name in own if name not in _COMMON and type(own[name]) not in _ATOMS]
    for name in [*followed, *filter(own.get, _REGISTRIES)]:
        new = _replaced(own[name], copies, part, name)
        if new is not own[name]:
            attributes[name] = new
    for name in _TABLES:
        table = attributes[name]
        new = {k: known.get(id(v), v) for k, v in table.items()} if table else {}
        if result is part:
            table.update(new)
        else:
            attributes[name] = new
    for slot, value in _slotted(part).items():
        slot.__set__(result, _replaced(value, copies, part, slot.__name__))


def _replaced(value: Any, copies: _Copies, part: nn.Module, name: str) -> Any:
    try:
        return copies.of(value)
    except _Fixed as fixed:
        raise ValueError(
            f"the attribute {name!r} of the module's {type(part).__name__} holds an object of type "
            f"{fixed.args[0]}, which refers to its tensors or submodules and cannot be made to "
            "refer to others: keep those in attributes, containers, functions or objects that can "
            "be copied"
        ) from None


class _Fixed(Exception):
    """An object refers to what is replaced, and cannot be made to refer to anything else."""


class _Copies:
    """The replacements of objects in a replica; `known` holds them by the object's identity.

    `inner` is used inside an object, where nested objects are not searched.
    """

    def __init__(self, known: Mapping[int, Any], inner: _Copies | None) -> None:
        self.known, self.inner = dict(known), inner
        self.open: dict[int, Any] = {}  # those being followed, and copies that were met inside

    def of(self, value: Any) -> Any:
        """The replacement of `value`: itself, if nothing in it has to be replaced."""
        if type(value) in _ATOMS:
            return value
        key = id(value)
        if key in self.open:  # it refers to itself
            if self.open[key] is None:
                begin = next((b for kinds, b in _BEGUN if isinstance(value, kinds)), None)
                self.open[key] = begin(value) if begin else value
            return self.open[key]
        if key not in self.known:
            self.open[key] = None
            self.known[key] = self._followed(value)
            del self.open[key]
        return self.known[key]

    def _followed(self, value: Any) -> Any:
        kind: type = type(value)
        for kinds, parts, build in _FOLLOW:
            if issubclass(kind, kinds):
                return self._rebuilt(value, parts(value), build)
        if self.inner is None or issubclass(kind, _SHARED):
            return value
        result = self.inner._rebuilt(value, _attributes(value), _object)
        if result is value:
            for x in gc.get_referents(value):
                if self.inner.of(x) is not x:
                    raise _Fixed(kind.__qualname__)
        return result

    def _rebuilt(self, value: Any, parts: list[Any], build: _Build) -> Any:
        new = list(map(self.of, parts))
        if all(map(operator.is_, new, parts)):
            return value
        return build(value, new, self.open.get(id(value)))


def _attributes(value: Any) -> list[Any]:
    return [*getattr(value, "__dict__", {}).values(), *_slotted(value).values()]


def _object(value: Any, new: list[Any], _: Any) -> Any:
    try:
        result, contents = copy.copy(value), iter(new)
    except Exception as error:
        raise _Fixed(type(value).__qualname__) from error
    if result is value:
        raise _Fixed(type(value).__qualname__)
    for name in getattr(value, "__dict__", {}):
        vars(result)[name] = _moved(next(contents), value, result)
    for slot in _slotted(value):
        slot.__set__(result, _moved(next(contents), value, result))
    return result


def _moved(content: Any, old: Any, new: Any) -> Any:
    """What an object holds, with its copy in place of itself and of the owner of its methods."""
    if isinstance(content, types.MethodType) and content.__self__ is old:
        return _method(content, [new])
    return new if content is old else content


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
    return [*contents, function.__defaults__, function.__kwdefaults__, vars(function)]


def _begun(value: types.FunctionType) -> types.FunctionType:
    cells = tuple(types.CellType() for _ in value.__closure__ or ())
    return types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)


def _function(value: types.FunctionType, new: list[Any], result: Any) -> types.FunctionType:
    *contents, defaults, kwdefaults, attributes = new
    if result is None:
        closure = tuple(
            cell if _content(cell) is content else types.CellType(content)
            for cell, content in zip(value.__closure__ or (), contents, strict=True)
        )
        named = value.__code__, value.__globals__, value.__name__
        result = types.FunctionType(*named, None, closure)
    else:
        for cell, content in zip(result.__closure__, contents, strict=True):
            cell.cell_contents = content
    result.__defaults__, result.__kwdefaults__ = defaults, kwdefaults
    vars(result).update(attributes)
    return result


def _method(value: types.MethodType, new: list[Any], _: Any = None) -> types.MethodType:
    return types.MethodType(value.__func__, *new)


def _items(value: Mapping[Any, Any]) -> list[Any]:
    return list(itertools.chain(*value.items()))


def _empty(value: Any) -> Any:
    result = copy.copy(value)
    result.clear()
    return result


def _dict(value: dict[Any, Any], new: list[Any], result: Any = None) -> dict[Any, Any]:
    result = _empty(value) if result is None else result
    result.update(zip(new[::2], new[1::2], strict=True))
    return result


def _list(value: Any, new: list[Any], result: Any) -> Any:
    result = _empty(value) if result is None else result
    result.extend(new)
    return result


_ATOMS = {bool, int, float, complex, str, bytes, type(None)}
_TABLES = _torch.MODULE_TABLES
_REGISTRIES = {
    name: type(value)
    for name, value in vars(nn.Module()).items()
    if isinstance(value, (dict, set)) and name not in _TABLES
}
"""What a module keeps of its hooks, which it may write to when it is called."""
_COMMON = {*_REGISTRIES, *_TABLES, "training"}
_SHARED = (Tensor, nn.Module, type, types.ModuleType)  # those that are not parts of the module
_BUILTIN = (types.BuiltinMethodType, types.MethodWrapperType)
_BEGUN: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    ((dict, list, deque), _empty),
    (types.FunctionType, _begun),
)
"""The kinds of objects that may contain themselves, and how a copy is begun."""

_FOLLOW: tuple[tuple[Any, Callable[[Any], list[Any]], _Build], ...] = (
    (dict, _items, _dict),
    ((list, deque), list, _list),
    (types.MappingProxyType, _items, lambda value, new, _: type(value)(_dict(dict(value), new))),
    (
        weakref.WeakMethod,
        lambda value: [getattr(value(), "__self__", None)],
        lambda value, new, _: weakref.WeakMethod(_method(value(), new)),
    ),
    (weakref.ref, lambda value: [value()], lambda value, new, _: weakref.ref(*new)),
    (tuple, list, lambda value, new, _: getattr(value, "_make", type(value))(new)),
    ((set, frozenset), list, lambda value, new, _: type(value)(new)),
    (types.MethodType, lambda value: [value.__self__], _method),
    (
        _BUILTIN,
        lambda value: [value.__self__],
        lambda value, new, _: getattr(new[0], value.__name__),
    ),
    (
        functools.partial,
        lambda value: [value.func, value.args, value.keywords],
        lambda value, new, _: functools.partial(new[0], *new[1], **new[2]),
    ),
    (
        type(functools.cache(len)),
        lambda value: [value.__wrapped__],
        lambda value, new, _: functools.lru_cache(**value.cache_parameters())(*new),
    ),
    (types.FunctionType, _captured, _function),
)
"""The kinds of objects that are followed: their parts, and how one is built of other parts.

A build is given the copy that was begun where an object contains itself, otherwise None.
"""
