"""Time, memory and compile time of derivatives of inner loops, by all libraries that have them.

    python benchmarks/bench.py [--only sine_maml ...] [--peers diffopt JAX ...] [--threads 1 0]
        [--device cuda] [--rounds 7] [--minutes 10] [--json FILE] [--smoke] [--list]

Every result is compared with that of the loop written by hand in float64 before it is timed, on two
problems: whoever disagrees is named, and its time marked. Every program (peer) runs in a process of
its own, with an empty cache for what it compiles. They take turns, of 0.2 s or one call, in an
order that is reversed from round to round. On one thread of a CPU times are those of the processor,
for a machine that has other work, too; otherwise those of the clock on the wall.

"first" is the first call, which compiles; "warm" that of a second process with the first one's
cache. Peers whose library is not installed are skipped, by name (`pip install ".[bench]"` brings
all). The figures replace those of the same workloads and threads in the JSON file; `render.py`
makes the tables and plots of the documentation from it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import statistics
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from render import report
from suite import WORKLOADS
from suite.process import Setting, environment, serve, truth
from suite.workload import distance

PACKAGES = ["torch", "torchopt", "higher", "jax", "optax", "jaxopt"]
RESULTS = Path(__file__).parent / "results"
SPAWN = multiprocessing.get_context("spawn")

Figures = dict[str, Any]


class Remote:
    """A process, and the connection to it."""

    def __init__(self, folder: str, target: Callable[..., None], setting: Setting, *names: str):
        self.names = names
        os.environ |= environment(setting, folder)  # the process inherits it
        self.connection, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=target, args=(theirs, setting, *names), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self, minutes: float) -> Any:
        """What it sends next, or why nothing came."""
        connection: Connection = self.connection
        if not connection.poll(60 * minutes):
            self.end()
            return {"failed": f"took more than {minutes:g} minutes"}
        try:
            return connection.recv()
        except (EOFError, OSError):
            return {"failed": "the process died"}

    def ask(self, what: str, minutes: float) -> Any:
        with contextlib.suppress(OSError):  # of a process that has died, as `receive` says
            self.connection.send(what)
        return self.receive(minutes)

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def judged(found: Figures, truths: list[Any], tolerance: float) -> Figures:
    """The figures, with the larger relative error of the two results instead of them."""
    errors = [distance(*pair) for pair in zip(found.pop("results"), truths, strict=True)]
    error = max(errors, key=lambda x: (x != x, x))  # NaN first
    return found | {"error": error, "agrees": error <= tolerance}


def measure(setting: Setting, names: list[str], options: Any, progress: Progress) -> Figures:
    """One workload: its peers' figures, and the circumstances."""
    workload = WORKLOADS[setting.workload]
    title = f"{setting.workload}, {setting.threads} threads"
    task = progress.add_task(title, total=len(names) + options.rounds + 1)
    figures, alive = {}, {}
    with tempfile.TemporaryDirectory() as caches:
        reference = Remote(caches, truth, setting)
        known = reference.receive(options.minutes)
        reference.end()
        if "failed" in known:
            raise RuntimeError(f"{setting.workload}: the reference has failed: {known['failed']}")
        truths = known.pop("results")
        for name in names:
            progress.update(task, description=f"{title}: {name}", advance=1)
            folder = f"{caches}/{re.sub('[^a-zA-Z]+', '_', name)}"
            peer = Remote(folder, serve, setting, name)
            found = peer.receive(options.minutes)
            if "results" in found:
                alive[name], found = peer, judged(found, truths, workload.tolerance)
                if workload.peers[name].compiles:
                    found["warm"] = warm(setting, name, folder, options)
            figures[name] = found
            progress.console.print(f"{title}: {name}: {verdict(found)}")
        progress.update(task, description=f"{title}: taking turns")
        times: dict[str, list[float]] = {name: [] for name in alive}
        for i in range(options.rounds + 1):
            last = i == options.rounds
            for name in list(alive)[:: 1 if i % 2 else -1]:
                answer = alive[name].ask("memory" if last else "time", options.minutes)
                if isinstance(answer, dict):
                    figures[name] = answer
                    alive.pop(name).end()
                elif last:
                    figures[name]["peak"] = answer
                else:
                    times[name] += answer
            progress.advance(task)
        for name, peer in alive.items():
            figures[name] |= {
                "median": statistics.median(times[name]),
                "min": min(times[name]),
                "calls": len(times[name]),
            }
            peer.end()
    progress.remove_task(task)
    return {**setting._asdict(), "clock": setting.clock, **known, **machine(), "peers": figures}


def verdict(found: Figures) -> str:
    if "error" not in found:
        return found.get("skipped") or f"failed: {found['failed']}"
    judgement = "right" if found["agrees"] else "DISAGREES with the reference"
    return f"{judgement}, relative error {found['error']:.0e}, first call {found['first']:.1f} s"


def warm(setting: Setting, name: str, folder: str, options: Any) -> float | None:
    """The first call of a second process."""
    second = Remote(folder, serve, setting, name)
    found = second.receive(options.minutes)
    second.end()
    return found.get("first")


def machine() -> Figures:
    """Where and when this is, and how busy."""
    cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[2], 1),  # of 15 minutes
        "date": dt.date.today().isoformat(),
        "versions": versions,
    }


def rounded(value: Any) -> Any:
    """Four digits are enough; JSON has no NaN."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, float):
        return None if value != value else float(f"{value:.4g}")
    return value


def merged(file: Path, block: Figures) -> list[Figures]:
    """The blocks of the file, with this one in the place of its predecessor."""
    old = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    place = "workload", "threads", "device", "smoke"
    return [b for b in old if [b[k] for k in place] != [block[k] for k in place]] + [block]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), metavar="WORKLOAD")
    add("--peers", nargs="+", metavar="NAME", help="those whose names begin so")
    add(
        "--skip",
        nargs="+",
        metavar="TEXT",
        default=[],
        help="peers whose names have it, such as whole",
    )
    add("--threads", nargs="+", type=int, default=[1, 0], help="0: one for each core")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--rounds", type=int, default=7)
    add("--minutes", type=float, default=10, help="that a peer may take for its first results")
    add("--json", type=Path, metavar="FILE", help="default: benchmarks/results/<device>.json")
    add("--smoke", action="store_true", help="tiny problems, to see that all runs")
    add("--list", action="store_true", help="print the workloads and their peers, and stop")
    options = parser.parse_args()
    console = Console(width=140)
    if options.list:
        for name, workload in WORKLOADS.items():
            console.print(f"[bold]{name}[/]: {workload.title}", *workload.peers, sep="\n  ")
        return
    name = f"{options.device}{'_smoke' * options.smoke}.json"
    file = options.json or RESULTS / name
    file.parent.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    with Progress(console=console) as progress:
        for threads in sorted({n or cores for n in options.threads}):
            for only in options.only:
                setting = Setting(only, threads, options.device, options.smoke)
                names = selected(only, options.peers, options.skip)
                block = rounded(measure(setting, names, options, progress))
                progress.console.print(report(block))
                text = json.dumps(merged(file, block), indent=1)
                file.write_text(text + "\n", encoding="utf-8")


def selected(workload: str, wanted: list[str] | None, skipped: list[str]) -> list[str]:
    """The peers whose names begin as one of those wanted; the first always, as the unit."""
    first, *others = WORKLOADS[workload].peers
    chosen = [name for name in others if name.startswith(tuple(wanted or [""]))]
    return [first, *(name for name in chosen if not any(text in name for text in skipped))]


if __name__ == "__main__":
    main()
