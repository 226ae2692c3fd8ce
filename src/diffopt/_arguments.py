"""Checks of arguments that are not tensors: each raises an error that names the argument."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any, ParamSpec, TypeVar, cast

from diffopt import _tree

P = ParamSpec("P")
R = TypeVar("R")


def factory(make: Callable[P, R]) -> Callable[P, R]:
    """`make`, which says where hyperparameters go if it is called with one.

    What it returns has a function `hparams`, which raises for what is not a hyperparameter.
    """
    flags = inspect.signature(make).parameters
    positional = any(flag.kind is not flag.KEYWORD_ONLY for flag in flags.values())
    call = f"{make.__name__}({'...' if positional else ''})"

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        if args and not positional:
            raise TypeError(f"{call} takes no numbers: hyperparameters go to {call}.hparams(...)")
        others = {name: kwargs[name] for name in kwargs if name not in flags}
        if not others:
            return make(*args, **kwargs)
        maker: Any = make
        value = maker(*args, **{name: kwargs[name] for name in kwargs if name in flags})
        try:
            value.hparams(**others)
        except TypeError as error:
            unknown = f"{call} has no argument {', '.join(others)}, only {', '.join(flags)}"
            raise TypeError(f"{unknown}; as a hyperparameter: {error}") from None
        given = ", ".join(
            f"{name}={x if isinstance(x, (int, float)) else '...'}" for name, x in others.items()
        )
        raise TypeError(f"{', '.join(others)}: hyperparameters go to {call}.hparams({given})")

    return made


def check_number(value: Any, name: str, *, positive: bool = False) -> None:
    """Raise unless it is a finite Python number >= 0, or > 0 if it must be positive."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    bounded = number and 0 <= value <= sys.float_info.max
    if not bounded or (positive and value == 0):
        bound = ">" if positive else ">="
        raise ValueError(f"{name} is {_tree.shown(value)}, but must be a number {bound} 0")


def too_large(value: Any) -> bool:
    """Whether it is an integer or a fraction that no float can hold."""
    return isinstance(value, (int, Fraction)) and abs(value) > sys.float_info.max


def check_bool(value: Any, name: str) -> None:
    """Raise unless it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {_tree.describe(value)}, not a bool")


def check_integer(value: Any, name: str, least: int, most: float = math.inf) -> None:
    """Raise unless it is a Python integer >= `least` and <= `most`."""
    if type(value) is not int or not least <= value <= most:
        limits = f">= {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name} is {_tree.shown(value)}, but must be an integer {limits}")


def check_choice(value: Any, name: str, *choices: str | None) -> None:
    """Raise unless it is one of the choices."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        known = " or ".join(map(repr, choices))
        raise ValueError(f"{name} is {_tree.shown(value)}, but must be {known}")


def check_function(value: Any, name: str, *, optional: bool = False) -> None:
    """Raise unless it is callable, or None if it is optional."""
    if not (callable(value) or (optional and value is None)):
        raise TypeError(f"{name} is {_tree.describe(value)}, not a function")


def check_result(value: Any, name: str, *parts: str) -> tuple[Any, ...]:
    """What a function returned; raises unless it is a tuple of these parts."""
    if not isinstance(value, tuple) or len(cast(tuple[Any, ...], value)) != len(parts):
        raise TypeError(f"{name} must return ({', '.join(parts)}), not {_tree.describe(value)}")
    return cast(tuple[Any, ...], value)
