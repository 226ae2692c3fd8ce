"""For the API pages: constructors that are made at run time, and names such as `adam = Adam`."""

import dataclasses
import importlib
import inspect
from typing import Any

import griffe
import torch

from diffopt._value import Value


class Constructors(griffe.Extension):
    """Gives classes the arguments of their constructors, and shows them by the name to call."""

    def on_module(self, *, mod: griffe.Module, **_: Any) -> None:
        for name, member in reversed(list(mod.members.items())):
            if isinstance(member, griffe.Class):
                _construct(member)
            named = isinstance(member, griffe.Attribute) and mod.members.get(str(member.value))
            if isinstance(named, griffe.Class):
                mod.del_member(named.name)
                named.name = name
                mod.set_member(name, named)


def _construct(cls: griffe.Class) -> None:
    """Values and records make their constructors, and classes of torch.optim inherit them."""
    kind: Any = getattr(importlib.import_module(cls.module.path), cls.name, None)
    inherits = isinstance(kind, type) and "__init__" not in cls.members
    if inherits and issubclass(kind, Value):
        _set(cls, _parameters(kind.__init__))
    elif inherits and issubclass(kind, torch.optim.Optimizer):
        _set(cls, _parameters(kind), annotated=False)
    elif inherits and dataclasses.is_dataclass(kind):  # its constructor also takes a record
        parameters = [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default)
            for field in dataclasses.fields(kind)
        ]
        _set(cls, parameters)
    elif inherits and issubclass(kind, tuple):
        _set(cls, _parameters(kind), annotated=False)


def _parameters(constructor: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(constructor).parameters.values())


def _set(cls: griffe.Class, parameters: list[inspect.Parameter], annotated: bool = True) -> None:
    init = griffe.Function(
        "__init__",
        parameters=griffe.Parameters(
            *(
                griffe.Parameter(
                    parameter.name,
                    annotation=str(parameter.annotation)
                    if annotated and parameter.annotation is not parameter.empty
                    else None,
                    kind=griffe.ParameterKind(parameter.kind.description),
                    default=None
                    if parameter.default is parameter.empty
                    else repr(parameter.default),
                )
                for parameter in parameters
            )
        ),
    )
    cls.set_member("__init__", init)
