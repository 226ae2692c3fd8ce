"""Draw the pictures of the documentation from the tables in this folder's README.

python benchmarks/plots.py [--out docs/assets]
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

README = Path(__file__).parent / "README.md"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=README.parents[1] / "docs/assets")
    out = parser.parse_args().out
    mpl.rcParams["svg.hashsalt"] = "diffopt"  # the same file each time
    memory().savefig(out / "memory.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
