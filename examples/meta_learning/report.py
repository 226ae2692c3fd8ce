"""The end of a run: a table, the figures as JSON, a picture."""

import json
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.table import Table
from torch import Tensor

COLUMNS, QUERY_ROWS, SUPPORT_ROWS = 6, 3, 2  # the picture shows no more
GREEN, RED, GREY = "#2a9d4a", "#d1343e", "#777777"


class Result(NamedTuple):
    """A row of the table; `curve` is the validation accuracy by meta-step."""

    title: str
    adaptation: str
    accuracy: float
    interval: float
    curve: dict[int, float]

    @staticmethod
    def of(
        title: str, adaptation: str, accuracies: Tensor, curve: list[tuple[int, float]]
    ) -> "Result":
        """The mean over tasks, with half the width of its 95% confidence interval."""
        interval = 1.96 * accuracies.std() / len(accuracies) ** 0.5
        return Result(title, adaptation, accuracies.mean().item(), interval.item(), curve)


class Sample(NamedTuple):
    """One task and what a learner says about it; labels are numbers from 0 on."""

    title: str
    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    before: Tensor
    after: Tensor


def task_name(options: Namespace) -> str:
    return f"{options.ways}-way {options.shots}-shot"


def print_table(results: list[Result], options: Namespace, test_name: str) -> None:
    table = Table(
        title=f"{task_name(options)} recognition of unseen characters: {test_name}",
        caption=f"mean over {options.eval_tasks} held-out tasks, with its 95% interval",
    )
    table.add_column("learner")
    table.add_column("learns a task by")
    table.add_column("accuracy", justify="right")
    for result in results:
        accuracy = f"{result.accuracy:.1%} ± {100 * result.interval:.1f}"
        table.add_row(result.title, result.adaptation, accuracy)
    Console().print(table)


def write_json(path: Path, results: dict[str, Result], run: dict[str, object]) -> None:
    rows = {name: result._asdict() for name, result in results.items()}
    path.write_text(json.dumps({"options": run, "rows": rows}, indent=2) + "\n")


def draw(path: Path, results: list[Result], sample: Sample, options: Namespace) -> None:
    """Learning curves on the left; a task, before and after adaptation, on the right."""
    figure = Figure(figsize=(13, 7), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    draw_curves(left, results, options)
    draw_sample(right, sample)
    figure.savefig(path)


def draw_curves(axes: Axes, results: list[Result], options: Namespace) -> None:
    for result in results:
        if result.curve:
            percent = [100 * accuracy for accuracy in result.curve.values()]
            axes.plot(list(result.curve), percent, marker="o", label=result.title)
    axes.set_title(f"Meta-training, {task_name(options)}")
    axes.set(xlabel="meta-step", ylabel="accuracy on validation tasks after adaptation (%)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="best")


def draw_sample(axes: Axes, sample: Sample) -> None:
    axes.set_title(f"A held-out task, by {sample.title}")
    y = draw_images(
        axes, 0.0, "support set and its labels", sample.support_x, sample.support_y, SUPPORT_ROWS
    )
    for when, answers in (("before", sample.before), ("after", sample.after)):
        right = int((answers == sample.query_y).sum())
        caption = f"answers {when} adaptation: {right} of {len(answers)} right"
        y = draw_images(axes, y, caption, sample.query_x, sample.query_y, QUERY_ROWS, answers)
    axes.set(xlim=(0, shown_classes(sample.support_y)), ylim=(y, 0), aspect="equal")
    axes.axis("off")


def draw_images(
    axes: Axes,
    top: float,
    caption: str,
    images: Tensor,
    labels: Tensor,
    most: int,
    answers: Tensor | None = None,
) -> float:
    """At most `most` images of each class in a column, each with its answer. Returns the end."""
    axes.text(0, top + 0.15, caption, va="center")
    top += 0.32
    for column in range(shown_classes(labels)):
        indices = (labels == column).nonzero()[:most, 0].tolist()
        for row, index in enumerate(indices):
            answer = column if answers is None else int(answers[index])
            colour = GREY if answers is None else GREEN if answer == column else RED
            draw_image(axes, column, top + 0.8 * row, images[index, 0], str(answer + 1), colour)
    return top + 0.8 * len(indices) + 0.1


def shown_classes(labels: Tensor) -> int:
    return min(COLUMNS, int(labels.max()) + 1)


def draw_image(axes: Axes, x: float, y: float, image: Tensor, answer: str, colour: str) -> None:
    axes.imshow(image.numpy(), cmap="gray", extent=(x, x + 0.7, y + 0.7, y))
    axes.add_patch(Rectangle((x, y), 0.7, 0.7, fill=False, edgecolor=colour, linewidth=2))
    axes.text(x + 0.75, y + 0.35, answer, color=colour, va="center")
