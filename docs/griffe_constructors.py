"""Gives the classes of diffopt.optim the arguments of torch's constructors, which they inherit."""

import inspect
from typing import Any

import griffe

import diffopt


class Constructors(griffe.Extension):
    """Reads the arguments from the classes themselves: torch's sources are not parsed."""

    def on_class_instance(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        made = getattr(diffopt.optim, cls.name, None)
        if made is None or not cls.path.startswith("diffopt.optim.") or "__init__" in cls.members:
            return
        constructor = griffe.Function("__init__", parent=cls)
        constructor.parameters = griffe.Parameters(
            *(
                griffe.Parameter(
                    name,
                    kind=griffe.ParameterKind(parameter.kind.description),
                    default=None
                    if parameter.default is parameter.empty
                    else repr(parameter.default),
                )
                for name, parameter in inspect.signature(made).parameters.items()
            )
        )
        cls.set_member("__init__", constructor)
