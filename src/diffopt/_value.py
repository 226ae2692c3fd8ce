"""Values: frozen dataclasses that are equal, hashed and printed by their arguments."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor


class Value:
    """The base of a frozen dataclass whose fields may hold tensors, trees and functions.

    Two are equal where they are of one class and their fields are equal: trees by what they hold,
    and a tensor only to itself, since no tensor is looked into. A subclass is declared with
    `dataclass(frozen=True, eq=False, repr=False)`.
    """

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return _key(vars(self)) == _key(vars(other))

    def __hash__(self) -> int:
        return hash((type(self), _key(vars(self))))

    def __repr__(self) -> str:
        fields = (f"{name}={brief(value)}" for name, value in vars(self).items())
        return f"{type(self).__name__}({', '.join(fields)})"


class _Items(dict[Any, Any]):
    """A dict with a hash, whatever the order of its keys."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] (a dict has none)
        return hash(frozenset(self.items()))


def brief(value: Any) -> str:
    """A repr of one line: of a tensor its shape, of a function its name, of long trees a part."""
    return " ".join(_SHORT.repr(value).split())


def _key(value: Any) -> Any:
    """What is equal where two fields are, and hashable where their leaves are."""
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
