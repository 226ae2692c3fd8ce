"""Time of one in-place step beside torch.optim's, and beside moving the bytes it must move.

    python benchmarks/steps.py [--device cuda] [--only Adam AdamW] [--repeats 10] [--cold] [--best]
    python benchmarks/steps.py --loop transformer [--only Adam AdamW] [--repeats 300] [--best]

The contenders take turns of a few steps, the first of which is not counted, or with `--cold` of one
step, which then finds the others' data in the caches; the order is reversed from round to round.
They are the class of diffopt.optim, by default and with fused=True, `update_` of the rule under it,
by default and with execution="compiled", and torch's ways of running the same step. "ratio" is the
class's time over the fastest of torch's. "floor" is the time to read and write what a step must, at
the bandwidth of a large tensor scaled in place in the same run: on tensors that exceed the caches
no step runs much faster. Times are medians, or with `--best`, for machines that are busy,
minima, on one thread of a CPU of its processor time.

With `--loop` the classes by default and torch's by default train a small model each, under a
schedule of the learning rate, and only their steps are timed: between two steps the forward and
backward passes take the caches.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import diffopt
from diffopt import optim

RESNET18 = [
    *[(64, 3, 7, 7), *[(64,)] * 10, *[(64, 64, 3, 3)] * 4],
    *[(128, 64, 3, 3), *[(128,)] * 10, *[(128, 128, 3, 3)] * 3, (128, 64, 1, 1)],
    *[(256, 128, 3, 3), *[(256,)] * 10, *[(256, 256, 3, 3)] * 3, (256, 128, 1, 1)],
    *[(512, 256, 3, 3), *[(512,)] * 10, *[(512, 512, 3, 3)] * 3, (512, 256, 1, 1)],
    *[(1000, 512), (1000,)],
]
SHAPES = {
    "resnet18": RESNET18,
    "1000 of 1000": [(1000,)] * 1000,
    "one of 10M": [(10_000_000,)],
    "one of 50M": [(50_000_000,)],
}
MATRICES = {"24 of 512 x 512": [(512, 512)] * 24}
# The pure rule, numbers, and how many tensors of the size of the parameters a step must move.
OPTIMIZERS: dict[str, tuple[Any, dict[str, float], int]] = {
    "SGD": (diffopt.sgd(), {"momentum": 0.9}, 5),
    "Adam": (diffopt.adam(), {}, 7),
    "AdamW": (diffopt.adamw(), {}, 7),
    "Adagrad": (diffopt.adagrad(), {}, 5),
    "Adadelta": (diffopt.adadelta(), {}, 7),
    "Adafactor": (diffopt.adafactor(), {}, 3),
    "Adamax": (diffopt.adamax(), {}, 7),
    "ASGD": (diffopt.asgd(), {}, 5),
    "LBFGS": (None, {"max_iter": 1, "history_size": 5}, 14),
    "Muon": (diffopt.muon(), {}, 5),
    "NAdam": (diffopt.nadam(), {}, 7),
    "RAdam": (diffopt.radam(), {}, 7),
    "RMSprop": (diffopt.rmsprop(momentum=False), {}, 5),
    "Rprop": (diffopt.rprop(), {}, 7),
    "SparseAdam": (None, {}, 7),
}
OURS = ("diffopt", "diffopt fused", "update_", "compiled")
WAYS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}
BOTH = optim, torch.optim
IN_TRAINING = [name for name in OPTIMIZERS if name not in ("LBFGS", "Muon", "SparseAdam")]
SPARSE_ROWS = 0.01  # of a SparseAdam gradient

Step = Callable[[], object]


def by_class(cls: type, tensors: list[Tensor], numbers: dict[str, Any]) -> Step | None:
    params = [t.clone().requires_grad_() for t in tensors]
    for param in params:
        param.grad = gradient(param, cls.__name__)
    try:
        optimizer = cls(params, lr=1e-4, **numbers)
        closure = (lambda: 1.0) if cls.__name__ == "LBFGS" else None
        optimizer.step(closure)
    except (TypeError, RuntimeError, ValueError):  # this class has no such way, or no such shapes
        return None
    return lambda: optimizer.step(closure)


def gradient(param: Tensor, kind: str) -> Tensor:
    grad = torch.randn_like(param)
    if kind != "SparseAdam":
        return grad
    rows = torch.rand(len(param), device=param.device) < SPARSE_ROWS
    return (grad * rows.reshape(-1, *[1] * (param.dim() - 1))).to_sparse(1)


def by_rule(optimizer: Any, tensors: list[Tensor], numbers: dict[str, Any]) -> Step:
    params, grads = [t.clone() for t in tensors], [torch.randn_like(t) for t in tensors]
    state, record = optimizer.init(params), optimizer.hparams(lr=1e-4, **numbers)
    return lambda: optimizer.update_(params, grads, state, record)


def milliseconds(step: Step, device: str, *, own: bool = False) -> float:
    """Of the clock on the wall, or of the processor for this thread alone."""
    clock = time.thread_time if own else time.perf_counter
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = clock()
    step()
    synchronize()
    return 1e3 * (clock() - start)


def typical(
    steps: dict[str, Step], device: str, repeats: int, turn: int = 1, *, best: bool = False
) -> dict[str, float]:
    """Of turns of so many steps, but for the first turn, and the first of several steps."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    own = best and device == "cpu" and torch.get_num_threads() == 1
    for i in range(repeats + 1):
        for name, step in list(steps.items())[:: 1 if i % 2 else -1]:
            elapsed = [milliseconds(step, device, own=own) for _ in range(turn)]
            times[name] += elapsed[turn > 1 :] if i else []
    return {name: (min if best else statistics.median)(of) for name, of in times.items()}


def bandwidths_of(device: str, repeats: int, *, best: bool) -> tuple[float, float]:
    """Bytes per millisecond of reading and writing 400 MB, in place and as a copy."""
    tensor = torch.randn(100_000_000, device=device)
    other = torch.empty_like(tensor)
    runs: dict[str, Step] = {
        "scale": lambda: tensor.mul_(0.999),
        "copy": lambda: other.copy_(tensor),
    }
    times = typical(runs, device, repeats, best=best)
    moved = 2 * tensor.numel() * tensor.element_size()
    return moved / times["scale"], moved / times["copy"]


def transformer() -> torch.nn.Module:
    """27 tensors, 110,000 weights."""
    layer = torch.nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return torch.nn.Sequential(torch.nn.Embedding(65, 64), encoder, torch.nn.Linear(64, 65))


def training(cls: type, total: int, device: str, *, own: bool) -> Callable[[], float]:
    """One step of training a transformer; returns the milliseconds of the optimizer's."""
    torch.manual_seed(0)
    model = transformer().to(device)
    optimizer = cls(model.parameters(), lr=1e-3)
    cycled = "betas" in optimizer.defaults
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=total, cycle_momentum=cycled
    )
    text = torch.randint(65, (8, 17), device=device)

    def train() -> float:
        optimizer.zero_grad()
        output = model(text[:, :-1]).flatten(0, 1)
        torch.nn.functional.cross_entropy(output, text[:, 1:].flatten()).backward()
        elapsed = milliseconds(optimizer.step, device, own=own)
        scheduler.step()
        return elapsed

    return train


def in_training(names: list[str], device: str, repeats: int, *, best: bool) -> Table:
    """The classes and torch's in turns, but for the first steps."""
    table = Table("", "diffopt", "torch", "ratio", title="in the training of a transformer")
    own = best and device == "cpu" and torch.get_num_threads() == 1
    for name in track(names, "transformer", transient=True):
        runs = [training(getattr(o, name), repeats + 12, device, own=own) for o in BOTH]
        times: list[list[float]] = [[], []]
        for i in range(repeats + 10):
            for k in (0, 1) if i % 2 else (1, 0):
                times[k].append(runs[k]())
        ours, theirs = ((min if best else statistics.median)(of[10:]) for of in times)
        table.add_row(name, f"{ours:.3f}", f"{theirs:.3f}", f"{ours / theirs:.2f}")
    return table


def contenders(name: str, tensors: list[Tensor]) -> dict[str, Step]:
    rule, numbers, _ = OPTIMIZERS[name]
    ours = getattr(optim, name)
    found = {"diffopt": by_class(ours, tensors, numbers)}
    found["diffopt fused"] = by_class(ours, tensors, numbers | WAYS["fused"])
    if found["diffopt"] and rule:
        found["update_"] = by_rule(rule, tensors, numbers)
        compiled = dataclasses.replace(rule, execution="compiled")
        found["compiled"] = by_rule(compiled, tensors, numbers) if rule.elementwise else None
    theirs = getattr(torch.optim, name)
    found |= {way: by_class(theirs, tensors, numbers | flag) for way, flag in WAYS.items()}
    if not any(map(found.get, WAYS)):  # a class with one way
        found["loop"] = by_class(theirs, tensors, numbers)
    return {way: step for way, step in found.items() if step is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--cold", action="store_true", help="take turns of one step")
    parser.add_argument("--best", action="store_true", help="minima instead of medians")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    titles = list(SHAPES | MATRICES)
    parser.add_argument("--shapes", nargs="+", default=titles, choices=titles)
    parser.add_argument("--loop", choices=["transformer"], help="time steps inside of training")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console, best = Console(width=140), options.best
    if options.loop:
        names = [name for name in options.only if name in IN_TRAINING]
        console.print(in_training(names, options.device, options.repeats, best=best))
        return
    bandwidth, copy = bandwidths_of(options.device, options.repeats, best=best)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    rates = f"{bandwidth / 1e6:.0f} GB/s in place, {copy / 1e6:.0f} copying"
    console.print(f"torch {torch.__version__}, {where}, {rates}; ms a step")
    for title in options.shapes:
        shapes = (SHAPES | MATRICES)[title]
        columns = (*OURS, *WAYS)
        table = Table("", *columns, "ratio", "floor", title=title)
        for name in track(options.only, title, transient=True):
            if (title in MATRICES) != (name == "Muon"):
                continue
            tensors = [torch.randn(shape, device=options.device) for shape in shapes]
            steps, turn = contenders(name, tensors), 1 if options.cold else 4
            times = typical(steps, options.device, options.repeats, turn, best=best)
            cells = [f"{times[way]:.3f}" if way in times else "" for way in columns]
            ratio = times["diffopt"] / min(times[way] for way in WAYS if way in times)
            share = SPARSE_ROWS if name == "SparseAdam" else 1
            moved = share * OPTIMIZERS[name][2] * sum(t.numel() for t in tensors)
            table.add_row(name, *cells, f"{ratio:.2f}", f"{4 * moved / bandwidth:.3f}")
        console.print(table)


if __name__ == "__main__":
    main()
