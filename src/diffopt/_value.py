"""Values: frozen dataclasses that are compared, hashed and printed by their arguments."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any, cast, dataclass_transform

from torch import Tensor


@dataclass_transform(eq_default=False, frozen_default=True)
class Value:
    """Makes every subclass a frozen dataclass, whose fields may hold tensors, trees and functions.

    Two are equal if they have the same class and equal fields: trees are compared by contents, and
    tensors by identity, since their values are never read.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return _key(vars(self)) == _key(vars(other))

    def __hash__(self) -> int:
        return hash((type(self), _key(vars(self))))

    def __repr__(self) -> str:
        fields = (f"{name}={_brief(value)}" for name, value in vars(self).items())
        return f"{type(self).__name__}({', '.join(fields)})"


class _Items(dict[Any, Any]):
    """A dict with a hash that does not depend on the order of its keys."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] (a dict has none)
        return hash(frozenset(self.items()))


def _brief(value: Any) -> str:
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
    return value


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxother, self.maxtuple, self.maxlevel = 1 << 20, 100, 20

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, Tensor):
            return f"<tensor of shape {tuple(x.shape)}>"
        return getattr(x, "__qualname__", None) or super().repr1(x, level)


_SHORT = _Short()
