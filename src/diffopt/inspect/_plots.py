"""Figures of matplotlib, an optional dependency."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def subplots(rows: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A new figure, independent of pyplot, and its axes from top to bottom."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "plot() requires matplotlib: pip install 'torch-diffopt[plots]'"
        raise ImportError(message) from error
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)
    return figure, list(axes[:, 0])
