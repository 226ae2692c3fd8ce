"""Time and memory of meta-gradients beside the same loops written by hand, and TorchOpt's.

    python benchmarks/inner_loops.py [--repeats 10] [--threads 1] [--compile] [--only MAML]

The contenders take turns, so that a drift of the machine's speed hits all of them; what counts are
the ratios to the loop written by hand with torch.autograd. All compute the same gradient, which is
checked first. "graph" is what autograd keeps for the backward pass. TorchOpt takes part where it is
installed. --compile adds torch.compile of the whole meta-gradient of the first workload; compiling
takes minutes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import diffopt

Params = dict[str, Tensor]


class Workload(NamedTuple):
    """An inner loop for each task, and what its outer loss is differentiated by."""

    name: str
    loss: Callable[..., Tensor]
    params: Params
    tasks: list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]
    rule: str
    numbers: dict[str, float]
    steps: int
    by_lr: bool


def mlp(params: Params, x: Tensor) -> Tensor:
    depth = len(params) // 2
    for i in range(depth):
        x = x @ params[f"w{i}"] + params[f"b{i}"]
        x = x.relu() if i < depth - 1 else x
    return x


def mlp_params(*sizes: int) -> Params:
    params = {}
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        params |= {f"w{i}": torch.randn(n_in, n_out) / n_in**0.5, f"b{i}": torch.zeros(n_out)}
    return params


def cnn(params: Params, x: Tensor) -> Tensor:
    for i in range(4):
        x = F.conv2d(x, params[f"w{i}"], padding=1)
        x = F.max_pool2d(F.instance_norm(x).relu(), 2)
    return x.flatten(1) @ params["head"]


def cnn_params() -> Params:
    params = {f"w{i}": torch.randn(32, 1 if i == 0 else 32, 3, 3) / 12 for i in range(4)}
    return params | {"head": torch.randn(32, 5) / 6}


def workloads() -> list[Workload]:
    torch.manual_seed(0)

    def sine() -> tuple[Tensor, Tensor]:
        x = 10 * torch.rand(10, 1) - 5
        return x, torch.sin(x)

    def classes(n: int, *shape: int, k: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, *shape), torch.randint(k, (n,))

    def mse(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(mlp(p, x), y)

    def entropy(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(mlp(p, x), y)

    def cnn_entropy(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(cnn(p, x), y)

    adam, momentum = {"lr": 1e-3}, {"lr": 1e-3, "momentum": 0.9}
    unroll = [(classes(64, 784, k=10), classes(64, 784, k=10))]
    big, small = mlp_params(784, 256, 256, 10), mlp_params(1, 40, 40, 1)
    images = [(classes(5, 1, 28, 28, k=5), classes(25, 1, 28, 28, k=5)) for _ in range(4)]
    sines = [(sine(), sine()) for _ in range(25)]
    module = diffopt.nn.functionalize(
        torch.nn.Sequential(torch.nn.Linear(1, 40), torch.nn.ReLU(), torch.nn.Linear(40, 1))
    )

    def readme(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(module(p, x), y)

    tiny = {k: p.detach() for k, p in module.params.items()}
    rules = {"sgd": {"lr": 0.01, "momentum": 0.0}, "momentum": {**momentum, "lr": 0.01}}
    small_loops = [
        Workload(
            f"MAML of the README, 5 {name} steps", readme, tiny, sines[:1],
            "adam" if name == "Adam" else "sgd", numbers, 5, False,
        )
        for name, numbers in [*rules.items(), ("Adam", {"lr": 0.01})]
    ]  # fmt: skip
    return [
        *small_loops,
        Workload("sine MAML, 25 tasks, 10 Adam steps", mse, small, sines, "adam", adam, 10, False),
        Workload("MLP, 50 Adam steps, d/d lr", entropy, big, unroll, "adam", adam, 50, True),
        Workload("MLP, 50 momentum steps, d/d lr", entropy, big, unroll, "sgd", momentum, 50, True),
        Workload(
            "CNN MAML, 4 tasks, 5 SGD steps", cnn_entropy, cnn_params(), images,
            "sgd", {"lr": 0.01, "momentum": 0.0}, 5, False,
        ),
    ]  # fmt: skip


# Inner loops: (workload, params, lr, train) -> adapted params


def by_hand(gradient: Callable[..., Any]) -> Callable[..., Params]:
    """The textbook loop, with `gradient(loss, params, *data)`."""

    def loop(w: Workload, params: Params, lr: Any, train: Any) -> Params:
        m = {k: torch.zeros_like(p) for k, p in params.items()}
        v = dict(m)
        for t in range(1, w.steps + 1):
            g = gradient(w.loss, params, *train)
            if w.rule == "sgd" and w.numbers["momentum"] == 0:
                params = {k: params[k] - lr * g[k] for k in params}
            elif w.rule == "sgd":
                m = {k: w.numbers["momentum"] * m[k] + g[k] for k in params}
                params = {k: params[k] - lr * m[k] for k in params}
            else:
                params, m, v = adam_step(params, g, m, v, lr, t)
        return params

    return loop


def adam_step(
    params: Params, g: Params, m: Params, v: Params, lr: Any, t: int
) -> tuple[Params, Params, Params]:
    m = {k: 0.9 * m[k] + 0.1 * g[k] for k in params}
    v = {k: 0.999 * v[k] + 0.001 * g[k] * g[k] for k in params}
    # 1e-30: without it one coordinate without gradient makes everything NaN.
    root = {k: (v[k] / (1 - 0.999**t) + 1e-30).sqrt() for k in params}
    params = {k: params[k] - lr * (m[k] / (1 - 0.9**t)) / (root[k] + 1e-8) for k in params}
    return params, m, v


def autograd(loss: Callable[..., Tensor], params: Params, *data: Tensor) -> Params:
    grads = torch.autograd.grad(loss(params, *data), list(params.values()), create_graph=True)
    return dict(zip(params, grads, strict=True))


def func(loss: Callable[..., Tensor], params: Params, *data: Tensor) -> Params:
    return torch.func.grad(loss)(params, *data)


def by_segments(w: Workload, params: Params, lr: Any, train: Any) -> Params:
    """The textbook loop of Adam in eight segments, each run again for its derivative."""
    names, zeros = [*params], [torch.zeros_like(p) for p in params.values()]

    def segment(steps: range, carry: list[Tensor], rate: Any, *, graph: bool) -> list[Tensor]:
        n = len(names)
        p, m, v = (dict(zip(names, carry[i * n : i * n + n], strict=True)) for i in range(3))
        for t in steps:
            with torch.enable_grad():
                q = p if graph else {k: x.detach().requires_grad_() for k, x in p.items()}
                g = autograd(w.loss, q, *train)
            g = g if graph else {k: x.detach() for k, x in g.items()}
            p, m, v = adam_step(p, g, m, v, rate, t)
        return [*p.values(), *m.values(), *v.values()]

    class Segment(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, steps: range, rate: Any, *carry: Tensor) -> tuple[Tensor, ...]:
            ctx.steps = steps
            ctx.save_for_backward(rate, *carry)
            return tuple(segment(steps, [*carry], rate, graph=False))

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            with torch.enable_grad():
                rate, *carry = (x.detach().requires_grad_() for x in ctx.saved_tensors)
                new = segment(ctx.steps, carry, rate, graph=True)
                return None, *torch.autograd.grad(new, [rate, *carry], cotangents)

    carry: Any = [*params.values(), *zeros, *zeros]
    size = -(-w.steps // 8)
    for start in range(1, w.steps + 1, size):
        steps = range(start, min(start + size, w.steps + 1))
        carry = Segment.apply(steps, torch.as_tensor(lr), *carry)
    return dict(zip(names, carry, strict=False))


def checkpointed(w: Workload, params: Params, lr: Any, train: Any) -> Params:
    return ours(w, params, lr, train, diffopt.adjoint.Checkpointed())


def ours(
    w: Workload,
    params: Params,
    lr: Any,
    train: Any,
    adjoint: diffopt.adjoint.Adjoint = diffopt.adjoint.Unrolled(),  # noqa: B008 (frozen)
) -> Params:
    plain = w.numbers.get("momentum") == 0
    optimizer = diffopt.sgd(momentum=False) if plain else getattr(diffopt, w.rule)()
    numbers = {"lr": lr} if plain else {**w.numbers, "lr": lr}
    hparams = optimizer.hparams(**numbers)
    return diffopt.minimize(
        w.loss, params, *train, optimizer=optimizer, hparams=hparams, steps=w.steps, adjoint=adjoint
    ).params


def torchopt_loop(w: Workload, params: Params, lr: Any, train: Any) -> Params:
    import torchopt

    if w.rule == "adam":
        optimizer = torchopt.adam(lr=lr, eps_root=1e-30)
    else:
        optimizer = torchopt.sgd(lr=lr, momentum=w.numbers["momentum"])
    state = optimizer.init(params)
    for _ in range(w.steps):
        grads = autograd(w.loss, params, *train)
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return params


# Meta-gradients


def in_turn(loop: Callable[..., Params]) -> Callable[[Workload], list[Tensor]]:
    """Plain autograd, one task after the other."""

    def meta_gradient(w: Workload) -> list[Tensor]:
        params = {k: p.clone().requires_grad_() for k, p in w.params.items()}
        lr: Any = torch.tensor(w.numbers["lr"], requires_grad=True) if w.by_lr else w.numbers["lr"]
        outer = sum(w.loss(loop(w, params, lr, train), *test) for train, test in w.tasks)
        return list(torch.autograd.grad(outer, [lr] if w.by_lr else list(params.values())))

    return meta_gradient


def batched(loop: Callable[..., Params]) -> Callable[[Workload], list[Tensor]]:
    """torch.func.grad of torch.vmap over the tasks."""

    def meta_gradient(w: Workload) -> list[Tensor]:
        train, test = (
            tuple(torch.stack(x) for x in zip(*side, strict=True))
            for side in zip(*w.tasks, strict=True)
        )

        def outer(params: Params, lr: Any) -> Tensor:
            def task(train: Any, test: Any) -> Tensor:
                return w.loss(loop(w, params, lr, train), *test)

            return torch.vmap(task)(train, test).sum()

        lr = torch.tensor(w.numbers["lr"])
        if w.by_lr:
            return [torch.func.grad(outer, argnums=1)(w.params, lr)]
        return list(torch.func.grad(outer)(w.params, w.numbers["lr"]).values())

    return meta_gradient


def contenders(w: Workload, *, compiled: bool) -> dict[str, Callable[[Workload], list[Tensor]]]:
    found = {
        "by hand": in_turn(by_hand(autograd)),
        "diffopt": in_turn(ours),
        "by hand, vmap": batched(by_hand(func)),
        "diffopt, vmap": batched(ours),
    }
    if w.by_lr and w.rule == "adam":
        found["by hand, by segments"] = in_turn(by_segments)
        found["diffopt, Checkpointed"] = in_turn(checkpointed)
    if compiled:
        found["diffopt, vmap, compiled"] = torch.compile(batched(ours))
    try:
        import torchopt  # noqa: F401
    except ImportError:
        return found
    return found | {"TorchOpt": in_turn(torchopt_loop)}


def graph_bytes(function: Callable[[], object]) -> int:
    """What autograd saved for the backward pass, each storage counted once."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(saved.values())


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(w: Workload, repeats: int, *, compiled: bool) -> Table:
    table = Table("", "time / by hand", "median ms", "graph MB", title=w.name)
    runs = contenders(w, compiled=compiled)
    expected = runs["by hand"](w)
    for name, run in runs.items():  # also warms up
        torch.testing.assert_close(
            run(w), expected, rtol=1e-2, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in track(range(repeats), description=w.name, transient=True):
        for name, run in runs.items():
            times[name].append(seconds(lambda run=run: run(w)))
    for name, run in runs.items():
        ratios = [a / b for a, b in zip(times[name], times["by hand"], strict=True)]
        graph = "" if "vmap" in name else f"{graph_bytes(lambda run=run: run(w)) / 1e6:.0f}"
        milliseconds = 1e3 * statistics.median(times[name])
        table.add_row(name, f"{statistics.median(ratios):.2f}", f"{milliseconds:.1f}", graph)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", default="", help="workloads whose names contain this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    console.print(f"torch {torch.__version__}, {options.threads} thread(s)")
    for workload in workloads():
        if options.only.lower() not in workload.name.lower():
            continue
        compiled = options.compile and workload.name.startswith("sine")
        console.print(measure(workload, options.repeats, compiled=compiled))


if __name__ == "__main__":
    main()
