"""What the examples share: their options, and their results as a table, a picture and JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table


class Study(NamedTuple):
    """What an example found.

    Attributes:
        rows: the figures, one row of the table each.
        picture: what they look like.
    """

    rows: list[dict[str, Any]]
    picture: Figure


class Size(NamedTuple):
    """A number on the command line: what it is, its default, and that of a smoke test."""

    help: str
    default: int
    smoke: int


def main(study: Callable[[argparse.Namespace], Study], doc: str, **sizes: Size) -> None:
    """Parse the command line, seed torch, run the study, and show and write what it found."""
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of everything that is random")
    for name, size in sizes.items():
        add(f"--{name.replace('_', '-')}", type=int, default=size.default, help=size.help)
    add("--smoke", action="store_true", help="few and short steps, to see that it runs")
    add("--out", type=Path, default=Path("runs"), help="folder for the picture")
    add("--json", type=Path, metavar="FILE", help="write the figures there, too")
    if parser.parse_args().smoke:
        parser.set_defaults(**{name: size.smoke for name, size in sizes.items()})
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    rows, picture = study(options)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()))
    Console().print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{Path(parser.prog).stem}.png"
    picture.savefig(file, dpi=150)
    Console().print(f"The picture: {file}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
