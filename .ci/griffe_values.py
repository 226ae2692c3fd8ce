"""For the API page: constructors that are made at run time, and names such as `adam = Adam`."""

import importlib
import inspect
from typing import Any

import griffe

from diffopt._value import Value


class Values(griffe.Extension):
    """Gives values the parameters of their constructors, and shows them by the name to call."""

    def on_module(self, *, mod: griffe.Module, **_: Any) -> None:
        for name, member in reversed(list(mod.members.items())):
            if isinstance(member, griffe.Class):
                _construct(member)
            named = isinstance(member, griffe.Attribute) and mod.members.get(str(member.value))
            if isinstance(named, griffe.Class):
                other = griffe.Attribute(
                    named.name, docstring=griffe.Docstring(f"Another name of `{name}`.")
                )
                mod.set_member(other.name, other)
                named.name = name
                mod.set_member(name, named)


def _construct(cls: griffe.Class) -> None:
    kind: Any = getattr(importlib.import_module(cls.module.path), cls.name, None)
    if isinstance(kind, type) and issubclass(kind, Value) and "__init__" not in cls.members:
        parameters = map(_parameter, inspect.signature(kind.__init__).parameters.values())
        init = griffe.Function("__init__", parameters=griffe.Parameters(*parameters))
        cls.set_member("__init__", init)


def _parameter(parameter: inspect.Parameter) -> griffe.Parameter:
    empty = parameter.empty
    return griffe.Parameter(
        parameter.name,
        annotation=None if parameter.annotation is empty else str(parameter.annotation),
        kind=griffe.ParameterKind[parameter.kind.name.lower()],
        default=None if parameter.default is empty else repr(parameter.default),
    )
