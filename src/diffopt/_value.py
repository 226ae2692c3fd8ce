"""Values: frozen dataclasses that are compared, hashed and printed by their arguments."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import reprlib
from collections.abc import Mapping
from typing import Any, cast, dataclass_transform

from torch import Tensor

from diffopt._arguments import explains_calls


@dataclass_transform(eq_default=False, frozen_default=True)
class Value:
    """Makes every subclass a frozen dataclass, whose fields may hold tensors, trees and functions.

    Two are equal if they have the same class and equal fields: trees are compared by contents, and
    tensors by identity, since their values are never read. A constructor that a class defines is
    inherited by those that add no fields, and decorating a class as a dataclass changes nothing.
    Calls with arguments that the constructor does not have are explained.
    """

    _of_flags = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        fields = [x for x in vars(cls).values() if isinstance(x, dataclasses.Field) and x.init]
        own = "__init__" in vars(cls)
        init = bool(inspect.get_annotations(cls)) or cls.__init__ is object.__init__
        flags = cls._of_flags
        dataclasses.dataclass(frozen=True, eq=flags, repr=False, init=init, kw_only=flags)(cls)
        if init and not own:
            cls.__init__ = explains_calls(cls.__init__)
        del cls.__setattr__, cls.__delattr__  # which would not let it be decorated again
        for name in ("__eq__", "__hash__", "__repr__"):
            setattr(cls, name, getattr(cls, name))
        for field in fields:  # for a decorator to see again
            setattr(cls, field.name, field)

    def __setattr__(self, name: str, value: Any) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return _key(_fields(self)) == _key(_fields(other))

    def __hash__(self) -> int:
        return hash((type(self), _key(_fields(self))))

    def __repr__(self) -> str:
        fields = (f"{name}={brief(value)}" for name, value in _fields(self).items())
        return f"{type(self).__name__}({', '.join(fields)})"


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Flags(Value):
    """Values whose fields are flags: keyword-only arguments, each of which has a hash."""

    _of_flags = True


def _fields(value: Value) -> dict[str, Any]:
    """What was given to a value, without what it has computed of that and cached."""
    kind, cached = type(value), functools.cached_property
    return {k: v for k, v in vars(value).items() if not isinstance(getattr(kind, k, None), cached)}


class _Items(dict[Any, Any]):
    """A dict with a hash that does not depend on the order of its keys."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] (a dict has none)
        return hash(frozenset(self.items()))


def brief(value: Any) -> str:
    """A one-line repr: shapes for tensors, names for functions, and long trees abbreviated."""
    return " ".join(_SHORT.repr(value).split())


def _key(value: Any) -> Any:
    """A key that is equal if two fields are, and hashable if their leaves are."""
    if isinstance(value, Tensor):
        return Tensor, id(value)
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return _Items((key, _key(child)) for key, child in items)
    if isinstance(value, (list, tuple)):
        return type(cast(Any, value)), *map(_key, cast(Any, value))
    if isinstance(value, functools.partial):
        return functools.partial, value.func, *map(_key, (value.args, value.keywords))
    return value


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxother, self.maxtuple, self.maxlevel = 1 << 20, 100, 20

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, Tensor):
            return f"<tensor of shape {tuple(x.shape)}>"
        if isinstance(x, functools.partial):
            return self.repr1(x.func, level)
        if type(x).__repr__ is object.__repr__:  # which shows an address
            return f"<{type(x).__qualname__}>"
        return getattr(x, "__qualname__", None) or super().repr1(x, level)


_SHORT = _Short()
