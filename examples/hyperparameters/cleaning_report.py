"""The picture of a run."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from noisy_digits import Data
from torch import Tensor

GREEN, RED = "#2a9d4a", "#d1343e"
COLUMNS, ROWS = 6, 5  # digits in the picture


def draw(
    rows: list[dict[str, Any]], course: list[dict[str, float]], weights: Tensor, data: Data
) -> Figure:
    """The weights; accuracy by outer step; the digits of lowest weight."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw_weights(left, weights, data.wrong)
    draw_curves(middle, rows, course)
    draw_suspects(right, weights, data)
    return figure


def draw_weights(axes: Axes, weights: Tensor, wrong: Tensor) -> None:
    groups = [weights[~wrong].tolist(), weights[wrong].tolist()]
    axes.hist(groups, bins=25, range=(0, 1), color=[GREEN, RED], label=["correct", "wrong"])
    axes.set_yscale("log")
    axes.set(title="Learned weights", xlabel="weight", ylabel="training examples")
    axes.legend(title="label")


def draw_curves(axes: Axes, rows: list[dict[str, Any]], course: list[dict[str, float]]) -> None:
    for name, style in (("validation", "--"), ("test", "-")):
        percent = [100 * point[name] for point in course]
        axes.plot(percent, style, color="black", label=f"learned weights, {name}")
    others = [row for row in rows if "learned" not in row["trained on"]]
    for row, colour in zip(others, (RED, "C1", "C0", GREEN), strict=True):
        label = f"{row['trained on']}, test"
        axes.axhline(100 * row["test"], color=colour, linestyle=":", label=label)
    axes.set(title="Training to the end at each step", xlabel="outer step", ylabel="accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def draw_suspects(axes: Axes, weights: Tensor, data: Data) -> None:
    for place, index in enumerate(weights.argsort()[: COLUMNS * ROWS].tolist()):
        y, x = divmod(place, COLUMNS)
        axes.imshow(data.images[index].numpy(), cmap="gray", extent=(x, x + 0.65, y + 0.65, y))
        colour = RED if data.wrong[index] else GREEN
        axes.text(x + 0.7, y + 0.33, str(int(data.train.y[index])), color=colour, va="center")
    axes.set(xlim=(0, COLUMNS), ylim=(ROWS, 0), aspect="equal")
    axes.set_title("Lowest weights (red: wrong labels)")
    axes.axis("off")
