"""Memory and time of a meta-gradient against the number of inner steps, for each adjoint.

    python benchmarks/memory.py [--steps 10 100 1000 10000] [--models mlp transformer]
        [--only Checkpointed ...] [--gigabytes 8] [--minutes 10] [--plot FILE]

Beside them the same loop with its update written by hand, with torch.autograd or torch.func, and by
TorchOpt and higher where they are installed.

Every figure comes from a process of its own, so that the peak of its resident memory is its own.
"live" is the most bytes that tensors held at any time beyond those that were there before,
"resident" the growth of the process. A case that would need more memory or time than it may, going
by the one with fewer steps, is left out. The inner optimizer is Adam (momentum SGD for Reversible);
derivatives are by the learning rate and by the coefficient of an L2 penalty.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import resource
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import diffopt
from diffopt.adjoint import (
    Adjoint,
    Checkpointed,
    Evolution,
    FirstOrder,
    ForwardMode,
    Implicit,
    OneStep,
    Reversible,
    Truncated,
    Unrolled,
)
from suite.maml import Params
from suite.mlp_unroll import Train, by_hand, by_hand_func, higher_loop, torchopt_loop

ADJOINTS: dict[str, Callable[[int], Adjoint]] = {
    "Unrolled": lambda _: Unrolled(),
    "FirstOrder": lambda _: FirstOrder(),
    "Truncated(10)": lambda _: Truncated(10),
    "Checkpointed": lambda _: Checkpointed(),
    "Checkpointed, step by step": lambda _: Checkpointed(graph="step"),
    "Checkpointed, forward-over-reverse": lambda _: Checkpointed(hvp="forward-over-reverse"),
    "Checkpointed(levels=3)": lambda _: Checkpointed(levels=3),
    "Checkpointed(levels=log2 T)": lambda T: Checkpointed(levels=math.ceil(math.log2(T))),
    "ForwardMode": lambda _: ForwardMode(),
    "Reversible": lambda _: Reversible(),
    "Implicit": lambda _: Implicit(root_tolerance=math.inf),
    "OneStep": lambda _: OneStep(),
    "Evolution": lambda _: Evolution(samples=4),
}


def mlp() -> tuple[list[Tensor], Callable[..., Tensor]]:
    """9,000 weights and 64 examples."""
    sizes = (64, 96, 32, 10)
    params = [torch.randn(m, n) / m**0.5 for m, n in itertools.pairwise(sizes)]
    x, y = torch.randn(64, 64), torch.randint(10, (64,))

    def loss(params: list[Tensor], decay: Tensor) -> Tensor:
        h = x
        for w in params[:-1]:
            h = torch.relu(h @ w)
        return F.cross_entropy(h @ params[-1], y) + decay * sum((w**2).sum() for w in params)

    return params, loss


def transformer() -> tuple[list[Tensor], Callable[..., Tensor]]:
    """One block of width 32 with 4 heads: 13,000 weights and 4 sequences of 16."""
    width, heads, length, batch = 32, 4, 16, 4
    shapes = [
        (width, 3 * width),
        (width, width),
        (width, 4 * width),
        (4 * width, width),
        (width, 8),
    ]
    params = [torch.randn(m, n) / m**0.5 for m, n in shapes]
    x, y = torch.randn(batch, length, width), torch.randint(8, (batch, length))
    mask = torch.ones(length, length).tril().log()

    def loss(params: list[Tensor], decay: Tensor) -> Tensor:
        qkv, out, up, down, head = params
        split = F.layer_norm(x, (width,)) @ qkv
        q, k, v = split.unflatten(-1, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)
        scores = torch.softmax(q @ k.mT / (width // heads) ** 0.5 + mask, -1)
        h = x + (scores @ v).transpose(1, 2).flatten(2) @ out
        h = h + F.gelu(F.layer_norm(h, (width,)) @ up) @ down
        penalty = decay * sum((w**2).sum() for w in params)
        return F.cross_entropy((h @ head).flatten(0, 1), y.flatten()) + penalty

    return params, loss


def quartic() -> tuple[list[Tensor], Callable[..., Tensor]]:
    """20,000 weights and next to no work: for the memory of very long loops."""

    def loss(params: list[Tensor], decay: Tensor) -> Tensor:
        return (params[0] ** 4).mean() + decay * (params[0] ** 2).mean()

    return [torch.randn(20_000)], loss


MODELS = {"mlp": mlp, "transformer": transformer, "quartic": quartic}


OTHERS: dict[str, tuple[str, Train]] = {
    "by hand, torch.autograd": ("torch", by_hand),
    "by hand, torch.func": ("torch", by_hand_func),
    "TorchOpt": ("torchopt", torchopt_loop),
    "higher": ("higher", higher_loop),
}


def other(model: str, name: str, steps: int) -> Callable[[], object]:
    """The meta-gradient of `case` without this library."""
    torch.manual_seed(0)
    values, list_loss = MODELS[model]()
    params = {str(i): p for i, p in enumerate(values)}

    def loss(params: Params, decay: Any) -> Tensor:
        return list_loss(list(params.values()), decay)

    def gradient() -> object:
        lr, decay = (torch.tensor(v, requires_grad=True) for v in (1e-3, 1e-4))
        end = OTHERS[name][1](loss, params, lr, (decay,), steps)
        return torch.autograd.grad(loss(end, 0.0), (lr, decay))

    return gradient


def case(model: str, name: str, steps: int) -> Callable[[], object]:
    """A meta-gradient, to be called."""
    if name in OTHERS:
        return other(model, name, steps)
    torch.manual_seed(0)
    params, loss = MODELS[model]()
    adjoint = ADJOINTS[name](steps)
    opt = diffopt.sgd(momentum=True) if name == "Reversible" else diffopt.adam()
    momentum = {"momentum": 0.9} if name == "Reversible" else {}

    def gradient() -> object:
        lr, decay = (torch.tensor(v, requires_grad=True) for v in (1e-3, 1e-4))
        sol = diffopt.minimize(
            loss, params, decay, optimizer=opt, hparams=opt.hparams(lr=lr, **momentum),
            steps=steps, adjoint=adjoint,
        )  # fmt: skip
        return torch.autograd.grad(loss(sol.params, 0.0), (lr, decay), materialize_grads=True)

    return gradient


class Live(TorchDispatchMode):
    """The most bytes that tensors born under this mode have held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.count(x.untyped_storage(), given)
        return result

    def count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in self.known or key in given:
            return
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        self.known[key] = weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        self.now -= size
        self.known.pop(key, None)


def measure(model: str, name: str, steps: int, live: bool) -> dict[str, float]:
    """In a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    case(model, name, min(steps, 3))()  # what torch itself allocates once
    gradient = case(model, name, steps)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = [timed(gradient)]
    resident = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    while sum(times) < 5 and len(times) < 5:
        times.append(timed(gradient))
    seconds = min(times)
    figures = {"seconds": seconds, "resident": resident}
    if live:
        with Live() as mode:
            gradient()
        figures["live"] = mode.most
    return figures


def timed(function: Callable[[], object]) -> float:
    """In seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def run(model: str, name: str, steps: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", model, name, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", nargs="+", type=int, default=[10, 100, 1000, 10_000], help="of the inner loop")
    add("--models", nargs="+", choices=MODELS, default=["mlp", "transformer"])
    installed = [n for n, (module, _) in OTHERS.items() if importlib.util.find_spec(module)]
    add("--only", nargs="+", choices=[*ADJOINTS, *OTHERS], default=[*ADJOINTS, *installed])
    add("--gigabytes", type=float, default=8, help="memory that a case may take")
    add("--minutes", type=float, default=10, help="time that a case may take")
    add("--plot", metavar="FILE", help="draw the figures there")
    add("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        model, name, steps = options.case
        print(json.dumps(measure(model, name, int(steps), live=True)))
        return
    figures: dict[tuple[str, str, int], dict[str, float]] = {}
    with Progress() as progress:
        task = progress.add_task(
            "", total=len(options.models) * len(options.only) * len(options.steps)
        )
        for model in options.models:
            for name in options.only:
                last: tuple[int, dict[str, float]] | None = None
                for steps in sorted(options.steps):
                    progress.update(task, description=f"{model}, {name}, T = {steps}")
                    if last is None or affordable(last, steps, options):
                        last = steps, run(model, name, steps)
                        figures[model, name, steps] = last[1]
                    progress.advance(task)
    for model in options.models:
        Console().print(table(model, figures, options))
    if options.plot:
        plot(figures, options).savefig(options.plot, dpi=150)


def affordable(last: tuple[int, dict[str, float]], steps: int, options: Any) -> bool:
    """Whether a case with more steps stays within the limits, if all grows with their number."""
    factor = steps / last[0]
    slow = 6 * last[1]["seconds"] * factor > 60 * options.minutes  # counting takes its time
    return not slow and not (
        last[1]["live"] > 50e6 and last[1]["live"] * factor > 1e9 * options.gigabytes
    )


def table(model: str, figures: dict[tuple[str, str, int], dict[str, float]], options: Any) -> Table:
    result = Table(title=f"{model}: live MB / resident MB / ms per step")
    result.add_column("adjoint")
    for steps in sorted(options.steps):
        result.add_column(f"T = {steps}", justify="right")
    for name in options.only:
        cells = []
        for steps in sorted(options.steps):
            f = figures.get((model, name, steps))
            ms = 1e3 * f["seconds"] / steps if f else 0
            cells.append(
                f"{f['live'] / 1e6:.1f} / {f['resident'] / 1e6:.0f} / {ms:.1f}" if f else ""
            )
        result.add_row(name, *cells)
    return result


def plot(figures: dict[tuple[str, str, int], dict[str, float]], options: Any) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(options.models), figsize=(6 * len(options.models), 8), squeeze=False
    )
    for column, model in enumerate(options.models):
        for row, (field, label) in enumerate(
            [("live", "peak of live tensors (MB)"), ("seconds", "time per step (ms)")]
        ):
            axis = axes[row, column]
            for i, name in enumerate(options.only):
                points = [(s, figures.get((model, name, s))) for s in sorted(options.steps)]
                known = [(s, f) for s, f in points if f]
                scale = [1e-6 if field == "live" else 1e3 / s for s, _ in known]
                values = [f[field] * k for (_, f), k in zip(known, scale, strict=True)]
                axis.loglog([s for s, _ in known], values, "os^vD"[i % 5] + "-", label=name)
            axis.set(title=model, xlabel="inner steps T", ylabel=label)
    axes[0, -1].legend(fontsize=7)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    main()
