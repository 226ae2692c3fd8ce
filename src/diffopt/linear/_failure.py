"""How linear solvers and implicit derivatives report failure."""

from __future__ import annotations

import warnings

from diffopt import _modes


class ConvergenceWarning(UserWarning):
    """A solver stopped before it met its tolerance."""


class ConvergenceError(RuntimeError):
    """A solver with `on_failure="raise"` stopped before it met its tolerance."""


def fail(message: str, on_failure: str) -> None:
    """Warn or raise, depending on `on_failure`."""
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
