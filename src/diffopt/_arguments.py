"""Checks of arguments that are not tensors: each raises an error that names the argument."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, ParamSpec, TypeVar, cast

from diffopt import _tree

P = ParamSpec("P")
R = TypeVar("R")


def explains_calls(make: Callable[P, R]) -> Callable[P, R]:
    """`make`, a function or a constructor, which explains arguments that it does not have."""
    parameters = inspect.signature(make).parameters.values()
    names, kinds = [p.name for p in parameters], [p.kind for p in parameters]
    most = kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)
    most = math.inf if inspect.Parameter.VAR_POSITIONAL in kinds else most
    known = {*names}

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > most or not kwargs.keys() <= known:
            raise TypeError(_explanation(make, names, most, args, kwargs))
        return make(*args, **kwargs)

    return made


def explains_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which explains keywords that it does not have: hyperparameters, or misspelt.

    Required keywords that are missing are None: its checks say what to pass.
    """
    parameters = inspect.signature(function).parameters
    names, call = [*parameters], cast(Callable[..., R], function)
    required = [p for p in parameters.values() if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    absent = {p.name: None for p in required}

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in names:
                raise TypeError(_wrong_keywords(function, names, args, kwargs))
        return call(*args, **{**absent, **kwargs})

    return called


def _wrong_keywords(
    function: Callable[..., Any], names: list[str], args: Any, kwargs: dict[str, Any]
) -> str:
    others = {name: kwargs.pop(name) for name in [*kwargs] if name not in names}
    given = inspect.signature(function).bind_partial(*args, **kwargs).arguments
    optimizer, takes = given.get("optimizer"), "hparams" in names
    instead = f": hyperparameters go to hparams=optimizer.hparams({_shown(others)})"
    if "override" in names and others.keys() <= getattr(optimizer, "defaults", {}).keys():
        instead = f": hyperparameters go to override=dict({_shown(others)})"
    elif not hasattr(optimizer, "hparams") or _fault(lambda: optimizer, (), {}, others) is not None:
        missing = [name for name in names if name not in given]
        unknown = instead if takes and optimizer is None else f", only {', '.join(names)}"
        instead = did_you_mean(missing, *others) or unknown
    return f"{function.__name__}() has no argument {', '.join(others)}{instead}"


def _shown(others: dict[str, Any]) -> str:
    """The keywords of a call, with their values if these are numbers."""
    numbers = {name: x if isinstance(x, (int, float)) else "..." for name, x in others.items()}
    return ", ".join(f"{name}={x}" for name, x in numbers.items())


def _explanation(
    make: Callable[..., Any], names: list[str], most: float, args: Any, kwargs: dict[str, Any]
) -> str:
    """What is wrong with a call, and what to do instead."""
    maker: Any = make
    if make.__name__ == "__init__":
        maker, args, names, most = type(args[0]), args[1:], names[1:], most - 1
    call = f"{_public_name(maker)}({'...' if most else ''})"
    if len(args) > most:
        plural, rest = "" if most == 1 else "s", ", ".join(names[int(most) :])
        instead = _instead(maker, call, most) or (f"; pass {rest} by keyword" if rest else "")
        return f"{call} takes {most or 'no'} positional argument{plural}{instead}"
    others = {name: kwargs[name] for name in kwargs if name not in names}
    known = {name: kwargs[name] for name in kwargs if name in names}
    fault = _fault(maker, args, known, others)
    if fault is None:
        return f"{', '.join(others)}: hyperparameters go to {call}.hparams({_shown(others)})"
    only = f", only {', '.join(names)}" if names else ""
    elsewhere = next((f": {_ELSEWHERE[name]}" for name in others if name in _ELSEWHERE), None)
    hint = did_you_mean(names, *others) or elsewhere or fault
    return f"{call} has no argument {', '.join(others)}{only}{hint}"


_ELSEWHERE = {
    "line_search_fn": "steps with a line search are taken by the method `search`",
    "max_iter": "an update is one iteration",
}
"""What stands for arguments of torch.optim."""

_ALSO = {"maxiter": "max_steps", "max_iter": "max_steps", "tol": "rtol", "reg": "damping"}
"""Names that other libraries have for arguments."""


def check_keywords(kind: type, names: list[str], kwargs: Iterable[str]) -> None:
    """Raise for the first keyword that a class does not take."""
    for name in kwargs:
        if name not in names:
            hint = did_you_mean(names, name)
            raise TypeError(
                f"{kind.__name__}() has no argument {name}, only {', '.join(names)}{hint}"
            )


def did_you_mean(names: list[str], *wrong: str) -> str:
    """The name that one of the wrong ones may stand for, as the end of a message; "" if none."""
    close = [_ALSO[name] for name in wrong if _ALSO.get(name) in names]
    close += [near for name in wrong for near in difflib.get_close_matches(name, names, 1)]
    return f": did you mean {close[0]!r}?" if close else ""


def _public_name(maker: Any) -> str:
    """What users call it: the last name that its module has for it, as in `adam = Adam`."""
    module = vars(sys.modules[maker.__module__])
    names = [name for name, value in module.items() if value is maker]
    return names[-1] if names else maker.__name__


def _instead(maker: Any, call: str, most: float) -> str:
    """Where what was passed as a positional argument belongs."""
    made = None if most else maker()
    if not hasattr(made, "hparams"):
        return ""
    numbers = f"hyperparameters go to {call}.hparams(...)"
    if not hasattr(made, "update"):
        return f": {numbers}"
    ours = maker.__module__.startswith("diffopt.")
    inplace = f"{type(made).__name__}(" if ours else f"from_pure({call}, "
    return (
        f": a pure optimizer takes no params here: use diffopt.optim.{inplace}params, ...), "
        f"or {call}.init(params); {numbers}"
    )


def _fault(maker: Any, args: Any, known: Any, others: dict[str, Any]) -> str | None:
    """Why the others are not hyperparameters of what is made; None if they are."""
    if isinstance(maker, type) and not hasattr(maker, "hparams"):
        return ""
    try:
        maker(*args, **known).hparams(**others)
    except TypeError as error:
        return f"; as a hyperparameter: {error}"
    except ValueError:  # out of range
        pass
    return None


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


def check_type(value: Any, kind: Any, name: str, what: str) -> None:
    """Raise unless it is an instance of `kind`, a class or several, which `what` describes."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {_tree.describe(value)}, not {what}")


def check_bool(value: Any, name: str) -> None:
    """Raise unless it is a bool."""
    check_type(value, bool, name, "a bool")


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
