"""Tables and plots of the documentation, from the figures that `bench.py` has written.

    python benchmarks/render.py [--json FILE] [--page docs/performance.md]

The tables replace what is between the marks in the page; the plots go into `assets` beside it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from suite import WORKLOADS

FOLDER = Path(__file__).parent
FIGURES = FOLDER / "results/cpu.json"
PAGE = FOLDER.parent / "docs/performance.md"
COLORS = {
    "by hand": "tab:gray", "diffopt": "tab:blue", "torch.optim": "tab:orange",
    "TorchOpt": "tab:red", "higher": "tab:purple", "JAX": "tab:green",
}  # fmt: skip

Figures = dict[str, Any]


# Tables


def report(block: Figures) -> Table:
    """For the terminal."""
    head, *rows = cells(block)
    title = f"{block['workload']}, {block['threads']} thread(s), {block['device']}"
    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*row)
    return table


def cells(block: Figures) -> list[list[str]]:
    """A row for each peer, after the head."""
    head = ["", "ratio", "ms, min", "median", "peak MB", "first s", "warm s", "graphs", "error"]
    return [head, *([name, *row(f, unit(block))] for name, f in block["peers"].items())]


def unit(block: Figures) -> float:
    """The time of the first peer."""
    return next(iter(block["peers"].values()))["min"]


def row(found: Figures, unit: float) -> list[str]:
    if "min" not in found:
        return [reason(found), *[""] * 7]
    warm = found.get("warm")
    return [
        ratio(found, unit),
        digits(1e3 * found["min"]),
        digits(1e3 * found["median"]),
        digits(found["peak"] / 1e6),
        digits(found["first"]),
        "" if warm is None else digits(warm),
        counts(found),
        "NaN" if found["error"] is None else f"{found['error']:.0e}",
    ]


def ratio(found: Figures, unit: float) -> str:
    """Of the minima; that of a program that disagrees with the reference is marked."""
    if "min" not in found:
        return reason(found).split(":")[0]
    text = f"{found['min'] / unit:.2f}"
    return text if found["agrees"] else f"{text}, wrong"


def reason(found: Figures) -> str:
    """Why there is no time."""
    return found.get("skipped") or found["failed"]


def digits(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2g}"


def counts(found: Figures) -> str:
    """Graphs of torch.compile, those for a second problem, and breaks, where there are any."""
    if not found["graphs"]:
        return ""
    more = [f"{found[name]} {name}" for name in ("later", "breaks") if found[name]]
    return ", ".join([str(found["graphs"]), *more])


def bounds(blocks: list[Figures]) -> Iterable[list[str]]:
    """What the loop by hand computes, and how long that takes at the machine's rates."""
    yield ["", "operations", "GFLOP", "GB", "ms, arithmetic", "ms, memory", "by hand", "best right"]
    for block in blocks:
        right = [f["min"] for f in block["peers"].values() if f.get("agrees")]
        times = block["flops"] / block["flop_rate"], block["bytes"] / block["byte_rate"]
        yield [
            WORKLOADS[block["workload"]].title,
            f"{block['operations']:,}",
            f"{block['flops'] / 1e9:.2g}",
            f"{block['bytes'] / 1e9:.2g}",
            *(digits(1e3 * x) for x in (*times, unit(block), min(right))),
        ]


def rules(blocks: list[Figures]) -> Iterable[list[str]]:
    """The ratios of the README's workload, a row for each rule."""
    names = list(dict.fromkeys(name for block in blocks for name in block["peers"]))
    yield ["", *names]
    for block in blocks:
        found = [block["peers"].get(name) for name in names]
        rule = block["workload"].removeprefix("readme_")
        yield [rule, *("" if f is None else ratio(f, unit(block)) for f in found)]


def markdown(rows: Iterable[list[str]]) -> str:
    head, *rest = rows
    lines = [head, ["---"] * len(head), *rest]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def circumstances(block: Figures) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in block["versions"].items())
    threads = "one thread" if block["threads"] == 1 else f"{block['threads']} threads"
    return (
        f"On {threads} of {block['cpu']} with {block['cores']} cores, {block['clock']} time, "
        f"load {block['load']} ({block['date']}; {versions})."
    )


def tables(blocks: list[Figures]) -> dict[str, str]:
    """The parts of the page, by their names."""
    single = [b for b in blocks if not b["workload"].startswith("readme_")]
    made = {"bounds": markdown(bounds([b for b in single if b["threads"] == 1]))}
    for name in dict.fromkeys(b["workload"] for b in single):
        parts = [b for b in single if b["workload"] == name]
        made[name] = "\n".join(f"{circumstances(b)}\n\n{markdown(cells(b))}" for b in parts)
    readme = [b for b in blocks if b["workload"].startswith("readme_")]
    if readme:
        made["readme"] = f"{circumstances(readme[-1])}\n\n{markdown(rules(readme))}"
    return made


def filled(page: str, parts: dict[str, str]) -> str:
    """The page with the parts between their marks."""
    for name, text in parts.items():
        begin, end = (f"<!-- {name}: {word} -->\n" for word in ("begin", "end"))
        pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
        page = re.sub(pattern, lambda _, t=f"{begin}{text}{end}": t, page, flags=re.DOTALL)
    return page


# Plots


def color(name: str) -> str:
    return COLORS[name.split(",")[0]]


def logarithmic(axis: Any) -> None:
    """With plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def times(blocks: list[Figures]) -> Any:
    """Ratios of one thread's minima, hatched where results are wrong."""
    from matplotlib.figure import Figure

    drawn = [b for b in blocks if b["threads"] == 1 and not b["workload"].startswith("readme_")]
    heights = [sum("min" in f for f in b["peers"].values()) + 2 for b in drawn]
    figure = Figure(figsize=(8, 0.26 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(drawn), height_ratios=heights, squeeze=False)[:, 0]
    for axes, block in zip(panels, drawn, strict=True):
        peers = {n: f for n, f in reversed(block["peers"].items()) if "min" in f}
        axes.barh(
            list(peers),
            [f["min"] / unit(block) for f in peers.values()],
            color=[color(name) for name in peers],
            hatch=["" if f["agrees"] else "////" for f in peers.values()],
            edgecolor="white",
        )
        axes.axvline(1, color="black", linewidth=0.8)
        logarithmic(axes.xaxis)
        axes.set_title(WORKLOADS[block["workload"]].title)
        axes.tick_params(labelsize=8)
    panels[-1].set_xlabel("time relative to the loop by hand; hatched: wrong result")
    return figure


def time_and_memory(block: Figures) -> Any:
    """Each program of one workload, by what it takes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (name, found) in enumerate(block["peers"].items()):
        if "min" in found:
            label = name if found["agrees"] else f"{name} (wrong)"
            at = found["peak"] / 1e6, found["min"] / unit(block)
            axes.plot(*at, "os^vDP*X"[i % 8], color=color(name), label=label, linestyle="")
    logarithmic(axes.xaxis)
    logarithmic(axes.yaxis)
    axes.set(xlabel="peak MB", ylabel="time relative to the loop by hand")
    axes.set_title(WORKLOADS[block["workload"]].title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def main() -> None:
    import matplotlib as mpl

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=FIGURES)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    blocks = json.loads(options.json.read_text(encoding="utf-8"))
    page = options.page.read_text(encoding="utf-8")
    options.page.write_text(filled(page, tables(blocks)), encoding="utf-8")
    mpl.rcParams |= {"svg.hashsalt": "diffopt", "svg.fonttype": "none"}  # the same file each time
    assets = options.page.parent / "assets"
    times(blocks).savefig(assets / "performance.svg", metadata={"Date": None})
    for block in blocks:
        if block["workload"] == "mlp_unroll" and block["threads"] == 1:
            figure = time_and_memory(block)
            figure.savefig(assets / "time_and_memory.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
