"""How linear solvers and implicit derivatives report failure."""

from __future__ import annotations

import warnings
from typing import Literal, TypeAlias, get_args

from diffopt import _modes
from diffopt._arguments import check_choice

OnFailure: TypeAlias = Literal["warn", "raise"]


class ConvergenceWarning(UserWarning):
    """A solver stopped before it met its tolerance."""


class ConvergenceError(RuntimeError):
    """A solver with `on_failure="raise"` stopped before it met its tolerance."""


def check_on_failure(value: object) -> None:
    """Raise unless the argument `on_failure` is one of `OnFailure`."""
    check_choice(value, "on_failure", *get_args(OnFailure))


def fail(message: str, on_failure: OnFailure) -> None:
    """Warn or raise."""
    if on_failure == "raise":
        raise ConvergenceError(message)
    warnings.warn(message, ConvergenceWarning, stacklevel=2)


def refuse_tracing(what: str) -> None:
    """Raise under torch.compile, which cannot trace loops whose length depends on values."""
    if _modes.compiling():
        raise RuntimeError(
            f"{what} cannot be traced by torch.compile, since its number of steps depends on "
            "values: call it outside the compiled function, and compile what it calls"
        )
