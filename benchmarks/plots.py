"""Draw pictures of the documentation: a diagram, curves from this folder's README, a page's plots.

python benchmarks/plots.py [--out docs/assets]
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

README = Path(__file__).parent / "README.md"
DOCS = README.parents[1] / "docs"
DRAWN = {
    "Unrolled": "Unrolled()",
    "FirstOrder": "FirstOrder()",
    "Checkpointed()": "Checkpointed()",
    "Checkpointed(levels=3)": "Checkpointed(levels=3)",
    "Reversible": "Reversible(), momentum SGD",
    "Truncated(10)": "Truncated(10)",
    "ForwardMode": "ForwardMode(), 2 hyperparameters",
    "Implicit": "Implicit()",
}

CHOICES = [
    ("Does only the solution matter,\nand does the loop reach it?", "Implicit()"),
    ("Do the steps have no derivative:\nrounding, an argmax, a simulator?", "Evolution()"),
    ("Does the graph of the whole loop\nfit into memory?", "Unrolled()"),
    ("Are there only a few hyperparameters\nto differentiate with respect to?", "ForwardMode()"),
    ("Is it momentum SGD, and do you need\nno second derivatives?", "Reversible()"),
    ("Must the derivative be exact?", "Checkpointed()"),
]
OTHERWISE = "Truncated(k),\nFirstOrder(), OneStep()"


def table(text: str, title: str) -> tuple[list[int], dict[str, list[float]]]:
    """The numbers of steps in the head of a table, and the megabytes in its rows."""
    block = text[text.index(f"| {title}") :].split("\n\n")[0].splitlines()
    head, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block]
    steps = [int(cell.removeprefix("T = ").replace(",", "")) for cell in head[1:]]
    return steps, {
        name: [float(re.split(r"[ (]", cell)[0]) for cell in cells] for name, *cells in rows[1:]
    }


def memory() -> Figure:
    steps, rows = table(README.read_text(encoding="utf-8"), "MLP of 9,000 weights")
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, label in DRAWN.items():
        axes.plot(steps, rows[name], ".-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="inner steps", ylabel="peak MB held by tensors")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


def choice() -> Figure:
    """Questions from top to bottom; the first "yes" leads to an adjoint."""
    figure = Figure(figsize=(6, 7), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(len(CHOICES) + 0.45, -0.5))
    axes.axis("off")
    question = {"boxstyle": "round,pad=0.5", "facecolor": "#eef2f7", "edgecolor": "#5b7083"}
    answer = {"boxstyle": "round,pad=0.5", "facecolor": "#fdf1dc", "edgecolor": "#b07d2b"}
    arrow = {"arrowprops": {"arrowstyle": "->", "color": "#555555"}}
    for y, (asked, adjoint) in enumerate(CHOICES):
        axes.annotate("", (0.3, y + 0.72), (0.3, y + 0.25), **arrow)
        axes.annotate("", (0.7, y), (0.55, y), **arrow)
        axes.text(0.32, y + 0.5, "no", va="center", fontsize=9)
        axes.text(0.63, y - 0.06, "yes", ha="center", va="bottom", fontsize=9)
        axes.text(0.3, y, asked, ha="center", va="center", fontsize=9.5, bbox=question)
        axes.text(0.85, y, adjoint, ha="center", va="center", family="monospace", bbox=answer)
    last = {"ha": "center", "va": "center", "family": "monospace", "bbox": answer}
    axes.text(0.3, len(CHOICES) + 0.05, OTHERWISE, **last)
    return figure


def debugging() -> dict[str, Any]:
    """What the blocks of the page on debugging leave, with its pictures."""
    page = (DOCS / "debugging.md").read_text(encoding="utf-8")
    left: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.+?)```", page, re.DOTALL):
        exec(block, left)
    return left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DOCS / "assets")
    out = parser.parse_args().out
    mpl.rcParams["svg.hashsalt"] = "diffopt"  # the same file each time
    page = debugging()
    pictures = {"memory": memory(), "choice": choice()}
    pictures |= {"graph": page["graph"].plot(), "trace": page["exploding"].plot()}
    for name, picture in pictures.items():
        picture.savefig(out / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
