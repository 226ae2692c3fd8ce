"""Hyperparameters of compositions: one record per part, and keywords routed to their part."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, TypeAlias, cast

from diffopt import _tree
from diffopt._rule import checks, hyper
from diffopt._value import Value

Maker: TypeAlias = Callable[..., Any]
"""What creates the record of a part: its `hparams`."""


class _Records(Value):
    """Creates the records of several parts, from keywords or from one record for each."""

    parts: dict[Hashable, Maker]
    call: ClassVar[str]
    """How records are passed, for error messages."""

    def names(self) -> list[str]:
        """The keywords that any part accepts, each also with the name of its part: "body.lr"."""
        names = [(key, name) for key, maker in self.parts.items() for name in _names(maker)]
        return [name for _, name in names] + [f"{key}.{name}" for key, name in names]

    def made(self, records: Mapping[Hashable, Any], numbers: dict[str, Any]) -> dict[Hashable, Any]:
        """One record for each part."""
        if not records:
            return self._routed(numbers)
        if numbers or records.keys() != self.parts.keys():
            raise TypeError(
                "hparams() takes keywords, or one record for each of the parts "
                f"{list(self.parts)}, but got records for {list(records)} and the keywords "
                f"{list(numbers)}"
            )
        for key, maker in self.parts.items():
            check_record(records[key], maker, f"hparams[{key!r}]")
        return {key: records[key] for key in self.parts}

    def _routed(self, numbers: dict[str, Any]) -> dict[Hashable, Any]:
        """Pass every keyword to the one part whose record has that field, or that it names."""
        fields = {key: _names(maker) for key, maker in self.parts.items()}
        chosen: dict[Hashable, dict[str, Any]] = {key: {} for key in fields}
        for name, value in numbers.items():
            owners = [key for key, known in fields.items() if name in known]
            owners = owners or [key for key in fields if name.startswith(f"{key}.")]
            owners = owners or [key for key, maker in self.parts.items() if _takes_any(maker)]
            if len(owners) != 1:
                raise TypeError(_unclear(name, owners, fields, self.call))
            (key,) = owners
            chosen[key][name if name in fields[key] else name.removeprefix(f"{key}.")] = value
        return {key: maker(**chosen[key]) for key, maker in self.parts.items()}


class InOrder(_Records):
    """Creates a tuple of records: `hparams(lr=0.1)`, or `hparams(record, record)`."""

    call = "hparams(record, ...)"

    def __call__(self, *records: Any, **numbers: Any) -> tuple[Any, ...]:
        return tuple(self.made(dict(enumerate(records)), numbers).values())


class ByLabel(_Records):
    """Creates a dict of records: `hparams(lr=0.1)`, or `hparams({label: record})`."""

    call = "hparams({label: record, ...})"

    def __call__(
        self, records: Mapping[Hashable, Any] | None = None, /, **numbers: Any
    ) -> dict[Hashable, Any]:
        if records is not None and not isinstance(records, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] (of users)
            given = _tree.shown(records)
            raise TypeError(f"hparams() takes keywords or a dict of records, not {given}")
        return self.made(records or {}, numbers)


def check_record(record: object, maker: Maker, name: str = "hparams") -> None:
    """Raise where it can be told that `maker` did not make the record."""
    if hyper.is_record_class(maker):
        checks.instance(record, cast(type, maker), name, "hparams(...)")


def check_tuple(values: Any, length: int, name: str, maker: str) -> None:
    """Raise unless it is a tuple with an entry for each part."""
    if type(values) is not tuple or len(cast(tuple[Any, ...], values)) != length:
        raise TypeError(
            f"{name} must be a tuple of {length}, one for each part: create it with {maker}"
        )


def _names(maker: Maker) -> list[str]:
    """The keywords that a maker of records accepts."""
    if isinstance(maker, _Records):
        return maker.names()
    if hyper.is_record_class(maker):
        return [field.name for field in hyper.FIELDS[cast(type, maker)]]
    try:
        return list(inspect.signature(maker).parameters)
    except ValueError:  # some built-in types, such as dict, have no signature
        return []


def _takes_any(maker: Maker) -> bool:
    """Whether it passes on keywords that it does not name, as a wrapper's `hparams` may do."""
    if isinstance(maker, (_Records, type)):
        return False
    with contextlib.suppress(ValueError):
        kinds = [parameter.kind for parameter in inspect.signature(maker).parameters.values()]
        return inspect.Parameter.VAR_KEYWORD in kinds
    return False


def _unclear(
    name: str, owners: list[Hashable], fields: dict[Hashable, list[str]], call: str
) -> str:
    records = f"pass one record for each part, {call}, each created by the part's own hparams(...)"
    if owners:
        parts = " and ".join(repr(key) for key in owners)
        one = f"name its part, as in hparams(**{{'{owners[0]}.{name}': ...}}), or {records}"
        return f"the hyperparameter {name!r} belongs to the parts {parts}: {one}"
    if name in fields:
        return f"{name!r} is a part, not a hyperparameter: {records}"
    if pair := hyper.instead_of_pair(name, [f for names in fields.values() for f in names]):
        return f"no part has a hyperparameter {name!r}: {pair}"
    plain = {key: [n for n in names if "." not in n] for key, names in fields.items()}
    known = "; ".join(f"of part {key!r}: {', '.join(f)}" for key, f in plain.items() if f)
    return f"no part has a hyperparameter {name!r}. The hyperparameters are, {known}"
