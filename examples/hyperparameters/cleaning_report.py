"""The end of a run: two tables and a picture."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from noisy_digits import Data
from rich.console import Console
from rich.table import Table
from torch import Tensor

GREEN, RED = "#2a9d4a", "#d1343e"
COLUMNS, ROWS = 6, 5  # digits in the picture


def print_tables(figures: dict[str, Any], data: Data) -> None:
    table = Table(title=f"{int(data.wrong.sum())} of {len(data.wrong)} labels are wrong")
    table.add_column("trained on")
    table.add_column("validation", justify="right")
    table.add_column("test", justify="right")
    for title, row in figures["rows"].items():
        table.add_row(title, f"{row['validation']:.1%}", f"{row['test']:.1%}")
    Console().print(table)
    table = Table("the learned weights", "", title="separation of wrong from correct labels")
    for name, value in figures["separation"].items():
        table.add_row(name, f"{value:.3f}")
    Console().print(table)


def draw(path: Path, figures: dict[str, Any], weights: Tensor, data: Data) -> None:
    """The weights; accuracy by outer step; the digits of lowest weight."""
    figure = Figure(figsize=(15, 5), dpi=110, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw_weights(left, weights, data.wrong)
    draw_curves(middle, figures)
    draw_suspects(right, weights, data)
    figure.savefig(path)


def draw_weights(axes: Axes, weights: Tensor, wrong: Tensor) -> None:
    groups = [weights[~wrong].tolist(), weights[wrong].tolist()]
    axes.hist(groups, bins=25, range=(0, 1), color=[GREEN, RED], label=["correct", "wrong"])
    axes.set_yscale("log")
    axes.set(title="Learned weights", xlabel="weight", ylabel="training examples")
    axes.legend(title="label")


def draw_curves(axes: Axes, figures: dict[str, Any]) -> None:
    for name, style in (("validation", "--"), ("test", "-")):
        percent = [100 * point[name] for point in figures["curve"]]
        axes.plot(percent, style, color="black", label=f"learned weights, {name}")
    others = {title: row for title, row in figures["rows"].items() if "learned" not in title}
    for (title, row), colour in zip(others.items(), (RED, "C1", "C0", GREEN), strict=True):
        axes.axhline(100 * row["test"], color=colour, linestyle=":", label=f"{title}, test")
    axes.set(title="Training to the end at each step", xlabel="outer step", ylabel="accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def draw_suspects(axes: Axes, weights: Tensor, data: Data) -> None:
    for place, index in enumerate(weights.argsort()[: COLUMNS * ROWS].tolist()):
        y, x = divmod(place, COLUMNS)
        axes.imshow(data.images[index], cmap="gray", extent=(x, x + 0.65, y + 0.65, y))
        colour = RED if data.wrong[index] else GREEN
        axes.text(x + 0.7, y + 0.33, str(int(data.train.y[index])), color=colour, va="center")
    axes.set(xlim=(0, COLUMNS), ylim=(ROWS, 0), aspect="equal")
    axes.set_title("Lowest weights, given labels (red: wrong indeed)")
    axes.axis("off")
