"""The rows of the table side by side, a process each, with progress bars and checkpoints."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_CHECKPOINTS = 0.5
FINISHED = "done"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the path, then rename: a kill at any moment leaves the old file or the new."""
    unfinished = path.with_name(path.name + ".unfinished")
    write(unfinished)
    os.replace(unfinished, path)


class Checkpoint:
    """Values and the state of objects in a file."""

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[str, Any] = torch.load(path, weights_only=True) if path.exists() else {}
        self.objects: dict[str, Any] = {}
        self.saved_at = time.monotonic()

    def restore(self, **objects: Any) -> None:
        """Give these objects their saved state, if any, and save it with the values from now on."""
        self.objects |= objects
        for name in objects.keys() & self.values.keys():
            objects[name].load_state_dict(self.values[name])

    def save(self, **values: Any) -> None:
        self.values |= values
        states = {name: thing.state_dict() for name, thing in self.objects.items()}
        write_whole(self.path, lambda path: torch.save(self.values | states, path))
        self.saved_at = time.monotonic()

    def save_if_due(self, **values: Any) -> None:
        if time.monotonic() - self.saved_at > SECONDS_BETWEEN_CHECKPOINTS:
            self.save(**values)


class Job(NamedTuple):
    """What one process does: `work(*arguments, progress)` calls `progress(units_done, note)`.

    Keep the arguments small: a process starts only once the one before has received its own.
    """

    title: str
    units: int
    work: Callable[..., None]
    arguments: tuple[Any, ...]


def run(jobs: list[Job]) -> None:
    """Run all jobs at once and show their progress. Ends the command where one fails."""
    with progress_bars() as bars:
        running = {start(job): bars.add_task(job.title, total=job.units, note="") for job in jobs}
        try:
            while running:
                for connection in wait(list(running)):
                    units_done, note = connection.recv()
                    bars.update(running[connection], completed=units_done, note=note)
                    if note == FINISHED:
                        del running[connection]
        except EOFError:
            raise SystemExit(f"failed: {bars.tasks[running[connection]].description}") from None
        except KeyboardInterrupt:
            raise SystemExit("stopped: the same command with --resume goes on from here") from None


def start(job: Job) -> Connection:
    """The process's end of this connection is closed by its death, whatever the cause."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    context.Process(target=work, args=(job, sender), daemon=True).start()
    sender.close()
    return receiver


def work(job: Job, sender: Connection) -> None:
    torch.set_num_threads(1)  # so that the figures do not depend on the number of cores
    try:
        job.work(*job.arguments, lambda units_done, note: sender.send((units_done, note)))
        sender.send((job.units, FINISHED))
    except (BrokenPipeError, KeyboardInterrupt):
        sys.exit(1)  # the command itself was killed


def progress_bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
