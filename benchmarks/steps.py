"""Time of one in-place step beside torch.optim's, and beside moving the bytes it must move.

    python benchmarks/steps.py [--device cuda] [--repeats 30]

The contenders take turns. "floor" is the time to read and write what a step must, at the bandwidth
of a large tensor scaled in place in the same run: on tensors that exceed the caches no step runs
much faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import diffopt

RESNET18 = [
    *[(64, 3, 7, 7), *[(64,)] * 10, *[(64, 64, 3, 3)] * 4],
    *[(128, 64, 3, 3), *[(128,)] * 10, *[(128, 128, 3, 3)] * 3],
    *[(256, 128, 3, 3), *[(256,)] * 10, *[(256, 256, 3, 3)] * 3],
    *[(512, 256, 3, 3), *[(512,)] * 10, *[(512, 512, 3, 3)] * 3, (1000, 512), (1000,)],
]
SHAPES = {
    "58 tensors of resnet18, 11M": RESNET18,
    "1000 tensors of 1000": [(1000,)] * 1000,
    "one tensor of 50M": [(50_000_000,)],
}
# Tensors a step must read and write, of the size of the parameters.
OPTIMIZERS = {
    "sgd, momentum": (diffopt.sgd(), torch.optim.SGD, {"momentum": 0.9}, 5),
    "adam": (diffopt.adam(), torch.optim.Adam, {}, 7),
    "adamw": (diffopt.adamw(), torch.optim.AdamW, {}, 7),
    "adagrad": (diffopt.adagrad(), torch.optim.Adagrad, {}, 5),
    "rmsprop": (diffopt.rmsprop(momentum=False), torch.optim.RMSprop, {}, 5),
}
WAYS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}

Step = Callable[[], object]


def ours(optimizer: diffopt.Optimizer, tensors: list[Tensor], numbers: dict[str, float]) -> Step:
    params, grads = [t.clone() for t in tensors], [torch.randn_like(t) for t in tensors]
    state, record = optimizer.init(params), optimizer.hparams(lr=1e-4, **numbers)
    return lambda: optimizer.update_(params, grads, state, record)


def theirs(cls: type, tensors: list[Tensor], numbers: dict[str, float], way: str) -> Step | None:
    params = [t.clone().requires_grad_() for t in tensors]
    for param in params:
        param.grad = torch.randn_like(param)
    try:
        optimizer = cls(params, lr=1e-4, **numbers, **WAYS[way])
        optimizer.step()
    except (TypeError, RuntimeError):  # this class has no such path
        return None
    return optimizer.step


def milliseconds(step: Step, device: str) -> float:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def medians(steps: dict[str, Step], device: str, repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(repeats + 3):
        for name, step in steps.items():
            elapsed = milliseconds(step, device)
            if i >= 3:
                times[name].append(elapsed)
    return {name: statistics.median(of) for name, of in times.items()}


def bandwidth_of(device: str, repeats: int) -> float:
    """Bytes per millisecond of reading and writing 400 MB in place."""
    tensor = torch.randn(100_000_000, device=device)
    times = medians({"scale": lambda: tensor.mul_(0.999)}, device, repeats)
    return 2 * tensor.numel() * tensor.element_size() / times["scale"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console, bandwidth = Console(width=110), bandwidth_of(options.device, options.repeats)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    console.print(f"torch {torch.__version__}, {where}, {bandwidth / 1e6:.0f} GB/s; ms a step")
    for name, shapes in SHAPES.items():
        table = Table("", "diffopt", *(f"torch {way}" for way in WAYS), "floor", title=name)
        for rule, (optimizer, cls, numbers, moved) in OPTIMIZERS.items():
            tensors = [torch.randn(shape, device=options.device) for shape in shapes]
            steps = {"diffopt": ours(optimizer, tensors, numbers)}
            found = {way: theirs(cls, tensors, numbers, way) for way in WAYS}
            steps |= {way: step for way, step in found.items() if step is not None}
            times = medians(steps, options.device, options.repeats)
            cells = [f"{times[way]:.3f}" if way in times else "" for way in ("diffopt", *WAYS)]
            floor = 4 * moved * sum(t.numel() for t in tensors) / bandwidth
            table.add_row(rule, *cells, f"{floor:.3f}")
        console.print(table)


if __name__ == "__main__":
    main()
