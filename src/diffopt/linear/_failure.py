"""How linear solvers and implicit derivatives report failure."""

from __future__ import annotations

import re
import warnings
from typing import Literal, TypeAlias, get_args

from diffopt import _modes
from diffopt._arguments import check_choice

OnFailure: TypeAlias = Literal["warn", "raise"]


class ConvergenceWarning(UserWarning):
    """A solver stopped before it met its tolerance.

    It names the line of your program that called the solver, or the backward pass that did. By
    Python's default filter it comes once for each line and cause, whatever the numbers in it.

    Examples:
        >>> import warnings, diffopt
        >>> warnings.filterwarnings("ignore", category=diffopt.linear.ConvergenceWarning)  # no more
    """


class ConvergenceError(RuntimeError):
    """A solver with `on_failure="raise"` stopped before it met its tolerance."""


def check_on_failure(value: object) -> None:
    """Raise unless the argument `on_failure` is one of `OnFailure`."""
    check_choice(value, "on_failure", *get_args(OnFailure))


def fail(message: str, on_failure: OnFailure) -> None:
    """Warn, at the line of the user's program and once for each, or raise."""
    if on_failure == "raise":
        raise ConvergenceError(message)
    frame, level = _modes.users_frame()
    place = frame.f_code.co_filename, frame.f_lineno, re.sub(r"\d[\d.e+-]*", "", message)
    if _action(message) in ("default", "module", "once"):
        if place in _WARNED:
            return
        _WARNED.add(place)
    warnings.warn(message, ConvergenceWarning, stacklevel=level)


_WARNED: set[tuple[str, int, str]] = set()  # places, and messages without their numbers


def _action(message: str) -> str:
    """What Python's filters say to do with the warning."""
    for action, pattern, category, *_ in warnings.filters:
        matches = pattern is None or re.compile(pattern).match(message)
        if matches and issubclass(ConvergenceWarning, category):
            return action
    return "default"


def refuse_tracing(what: str) -> None:
    """Raise under torch.compile, which cannot trace loops whose length depends on values."""
    if _modes.compiling():
        raise RuntimeError(
            f"{what} cannot be traced by torch.compile, since its number of steps depends on "
            "values: call it outside the compiled function, and compile what it calls"
        )
