"""Replicas of modules, which are called in their place with other tensors."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diffopt import _torch


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
        kind: type = type(value)
        if kind in _ATOMS:
            return value
        key = id(value)
        if key not in self.known:
            self.known[key] = value  # in case it refers to itself
            follow = next((f for known, f in _FOLLOW if issubclass(kind, known)), None)
            self.known[key] = follow(self, value) if follow else self.of_object(value)
        return self.known[key]

    def of_values(self, values: Mapping[Any, Any]) -> dict[Any, Any]:
        return {name: self.of(value) for name, value in values.items()}

    def changed(self, values: Any) -> bool:
        return any(self.of(value) is not value for value in values)

    def of_dict(self, value: dict[Any, Any]) -> dict[Any, Any]:
        if not self.changed(value) and not self.changed(value.values()):
            return value
        result = copy.copy(value)
        result.clear()
        result.update((self.of(key), self.of(child)) for key, child in value.items())
        return result

    def of_list(self, value: Any) -> Any:
        if not self.changed(value):
            return value
        result = copy.copy(value)
        result.clear()
        result.extend(map(self.of, value))
        return result

    def of_proxy(self, value: types.MappingProxyType[Any, Any]) -> Any:
        content = dict(value)
        result = self.of_dict(content)
        return value if result is content else types.MappingProxyType(result)

    def of_reference(self, value: weakref.ref[Any]) -> Any:
        target = value()
        result = self.of(target)
        return value if result is target else weakref.ref(result)

    def of_weak_method(self, value: weakref.WeakMethod[Any]) -> Any:
        target = value()
        if target is None or (result := self.of_method(target)) is target:
            return value
        return weakref.WeakMethod(result)

    def of_tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self.changed(value):
            return value
        return getattr(value, "_make", type(value))(map(self.of, value))

    def of_set(self, value: set[Any] | frozenset[Any]) -> Any:
        return type(value)(map(self.of, value)) if self.changed(value) else value

    def of_method(self, value: types.MethodType) -> Any:
        owner = self.of(value.__self__)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)

    def of_partial(self, value: functools.partial[Any]) -> Any:
        parts = value.func, value.args, value.keywords
        if not self.changed(parts):
            return value
        function, args, keywords = map(self.of, parts)
        return functools.partial(function, *args, **keywords)

    def of_function(self, value: types.FunctionType) -> Any:
        cells = value.__closure__ or ()
        contents = [_content(cell) for cell in cells]
        if not self.changed([*contents, value.__defaults__, value.__kwdefaults__]):
            return value
        pairs = zip(cells, contents, strict=True)
        closure = tuple(
            cell if self.of(content) is content else types.CellType(self.of(content))
            for cell, content in pairs
        )
        result = types.FunctionType(
            value.__code__, value.__globals__, value.__name__, self.of(value.__defaults__), closure
        )
        result.__kwdefaults__ = self.of(value.__kwdefaults__)
        vars(result).update(vars(value))
        return result

    def of_object(self, value: Any) -> Any:
        attributes: dict[str, Any] = getattr(value, "__dict__", {})
        slots = _slotted(value)
        if self.inner is None or not self.inner.changed([*attributes.values(), *slots.values()]):
            return value
        result = copy.copy(value)
        if attributes:
            vars(result).update(self.inner.of_values(attributes))
        for slot, content in slots.items():
            slot.__set__(result, self.inner.of(content))
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


def _shared(copies: _Copies, value: Any) -> Any:
    return value


_ATOMS = {bool, int, float, complex, str, bytes, type(None)}
_DICTS = {dict, OrderedDict}  # most attributes of a module are empty dicts for hooks
_TABLES = _torch.MODULE_TABLES
_FOLLOW: list[tuple[type, Callable[[_Copies, Any], Any]]] = [
    (dict, _Copies.of_dict),
    (list, _Copies.of_list),
    (deque, _Copies.of_list),
    (types.MappingProxyType, _Copies.of_proxy),
    (weakref.WeakMethod, _Copies.of_weak_method),
    (weakref.ref, _Copies.of_reference),
    (tuple, _Copies.of_tuple),
    (set, _Copies.of_set),
    (frozenset, _Copies.of_set),
    (types.MethodType, _Copies.of_method),
    (functools.partial, _Copies.of_partial),
    (types.FunctionType, _Copies.of_function),
    (Tensor, _shared),
    (nn.Module, _shared),  # one that is not a part of the module
    (type, _shared),
    (types.ModuleType, _shared),
]
