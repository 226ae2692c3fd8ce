"""The MAML family: seven algorithms on the same characters, with the same network.

    python examples/meta_learning/family.py [--seed 0] [--meta-steps 200] [--smoke] [--out DIR]

An algorithm is a way to adapt to a task, which is a function from what is learned and a support set
to parameters, and an outer loss, by default that of the adapted parameters on the query set. The
characters, the network and the outer optimizer are those of `maml.py`. Two processes of one thread
each share the work; times are of the CPU, and memory is the most that tensors hold in a meta-step.

MAML and first-order MAML: Finn, Abbeel and Levine 2017. iMAML: Rajeswaran et al., "Meta-Learning
with Implicit Gradients", 2019. ANIL: Raghu et al., "Rapid Learning or Feature Reuse?", 2020.
Reptile: Nichol, Achiam and Schulman, "On First-Order Meta-Learning Algorithms", 2018. Meta-SGD: Li
et al. 2017. MAML++: Antoniou, Edwards and Storkey, "How to Train Your MAML", 2019.

Seed 0, torch 2.13.0, means over 400 tasks, with 95% intervals of 0.7 to 1.0 points: MAML 93.7% (80
ms and 10.7 MB a meta-step), iMAML 92.9% (246 ms, 6.0 MB), first-order MAML 88.6% (47 ms, 3.7 MB),
ANIL 94.7% (19 ms, 4.6 MB), Reptile 85.4% (58 ms, 7.9 MB), Meta-SGD 92.5% (92 ms, 12.6 MB), MAML++
92.2% (148 ms, 26.3 MB).
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import time
import warnings
import weakref
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import glyphs
import torch
import torch.nn.functional as F
from glyphs import Characters
from maml import (
    META_RATE,
    TASKS_PER_META_STEP,
    TEST_SEED,
    convolutional_network,
    sample_tasks,
    task_batches,
)
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

import diffopt
from diffopt.adjoint import Adjoint, FirstOrder, Implicit, Unrolled
from diffopt.linear import ConjugateGradient

sys.path.append(str(Path(__file__).parents[1]))
from common import Size, Study, main

TASK = Namespace(ways=5, shots=1, queries=5)
STEPS, RATE = 5, 0.1  # of the inner loop
PROXIMITY = 0.5
ROUGHLY = ConjugateGradient(max_steps=5, damping=1.0)  # as in the paper, it need not converge
WORKERS = 2  # processes of one thread each

Params = dict[str, Tensor]
Adapt = Callable[[Params, Any, Tensor, Tensor], Params]

opt = diffopt.sgd()
network = convolutional_network(TASK.ways, glyphs.PIXELS)
model, body = diffopt.nn.functionalize(network), diffopt.nn.functionalize(network[:-1])


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(params, x), y)


def descend(
    start: Params,
    x: Tensor,
    y: Tensor,
    rates: Any = RATE,
    adjoint: Adjoint | None = Unrolled(),  # noqa: B008 (frozen)
    loss: Callable[..., Tensor] = loss,
) -> Params:
    hp = rates if callable(rates) else opt.hparams(lr=rates)
    return diffopt.minimize(
        loss, start, x, y, optimizer=opt, hparams=hp, steps=STEPS, adjoint=adjoint
    ).params


# How to adapt to a support set, from initial parameters, and with rates where they are learned.


def maml(start: Params, rates: None, x: Tensor, y: Tensor) -> Params:
    return descend(start, x, y)


def first_order(start: Params, rates: None, x: Tensor, y: Tensor) -> Params:
    return descend(start, x, y, adjoint=FirstOrder())


def anil(start: Params, rates: None, x: Tensor, y: Tensor) -> Params:
    """Only the head adapts, so that the body sees the support set once."""
    below = {name: start[name] for name in body.params}
    head = {name: p for name, p in start.items() if name not in below}

    def head_loss(head: Params, features: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(features, *head.values()), y)

    return below | descend(head, body(below, x), y, loss=head_loss)


def meta_sgd(start: Params, rates: Params, x: Tensor, y: Tensor) -> Params:
    return descend(start, x, y, rates)


def maml_pp(start: Params, rates: Params, x: Tensor, y: Tensor) -> Params:
    return descend(start, x, y, by_step(rates))


def by_step(rates: Params) -> Callable[[int], Any]:
    return lambda step: opt.hparams(lr={name: rate[step] for name, rate in rates.items()})


def imaml(start: Params, rates: None, x: Tensor, y: Tensor) -> Params:
    """Only the solution counts, not the way to it; a proximal term ties it to the start."""

    def proximal_loss(params: Params, start: Params, x: Tensor, y: Tensor) -> Tensor:
        return loss(params, x, y) + PROXIMITY / 2 * squared_distance(params, start)

    return diffopt.minimize(
        proximal_loss,
        start,
        start,
        x,
        y,
        optimizer=opt,
        hparams=opt.hparams(lr=RATE / 2, momentum=0.8),
        steps=3 * STEPS,
        adjoint=Implicit(ROUGHLY, root_tolerance=math.inf),
    ).params


def squared_distance(a: Params, b: Params) -> Tensor:
    return torch.stack([(a[name] - b[name]).square().sum() for name in a]).sum()


# What the outer loop minimizes: by default `after_adaptation`. `done` is the share of training.


def after_adaptation(
    adapt: Adapt, start: Params, rates: Any, done: float, x: Tensor, y: Tensor, *query: Tensor
) -> Tensor:
    return loss(adapt(start, rates, x, y), *query)


def to_the_adapted(
    adapt: Adapt, start: Params, rates: None, done: float, x: Tensor, y: Tensor, *query: Tensor
) -> Tensor:
    """Reptile: its negative gradient leads to parameters that fit all samples of the task."""
    samples = map(torch.cat, zip((x, y), query, strict=True))
    return squared_distance(start, descend(start, *samples, adjoint=None)) / 2


def after_each_step(
    adapt: Adapt, start: Params, rates: Params, done: float, x: Tensor, y: Tensor, *query: Tensor
) -> Tensor:
    """MAML++: at first the losses after all steps count alike, from half-time on only the last."""

    def with_query(params: Params) -> tuple[Tensor, Tensor]:
        return loss(params, x, y), loss(params, *query)

    sol = diffopt.minimize(
        with_query, start, optimizer=opt, hparams=by_step(rates), steps=STEPS, has_aux=True
    )
    losses = torch.stack([*sol.aux[1:], loss(sol.params, *query)])
    early = max(0.0, 1 - 2 * done) / STEPS
    return early * losses[:-1].sum() + (1 - early * (STEPS - 1)) * losses[-1]


class Algorithm(NamedTuple):
    """How to adapt, what the outer loop minimizes, and the first rates of a tensor, if learned."""

    adapt: Adapt
    outer: Callable[..., Tensor] = after_adaptation
    rates: Callable[[Tensor], Tensor] | None = None


ALGORITHMS = {
    "MAML": Algorithm(maml),
    "iMAML": Algorithm(imaml),
    "first-order MAML": Algorithm(first_order),
    "ANIL": Algorithm(anil),
    "Reptile": Algorithm(maml, outer=to_the_adapted),
    "Meta-SGD": Algorithm(meta_sgd, rates=lambda p: torch.full_like(p, RATE)),
    "MAML++": Algorithm(maml_pp, outer=after_each_step, rates=lambda p: torch.full((STEPS,), RATE)),
}


class Live(TorchDispatchMode):
    """The most bytes that tensors made under it have held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = weakref.WeakKeyDictionary[torch.UntypedStorage, int]()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.sizes[x.untyped_storage()] = x.untyped_storage().nbytes()
        self.most = max(self.most, sum(self.sizes.values()))
        return result


def prepare() -> None:
    """A process: of one thread, so that figures do not depend on the number of cores."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", diffopt.linear.ConvergenceWarning)  # see ROUGHLY


def learn(name: str, options: Namespace, characters: Characters) -> dict[str, Any]:
    """Meta-train and test: a row of the table."""
    adapt, outer, rate = ALGORITHMS[name]
    torch.manual_seed(options.seed)
    start = dict(convolutional_network(TASK.ways, glyphs.PIXELS).named_parameters())
    rates = rate and {name: rate(p).detach().requires_grad_() for name, p in start.items()}
    optimizer = diffopt.optim.Adam([*start.values(), *(rates or {}).values()], lr=META_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.meta_steps)

    def meta_gradient(step: int) -> None:
        tasks = sample_tasks(characters.train, TASKS_PER_META_STEP, TASK, options.seed, step)
        objective = partial(outer, adapt, start, rates, step / options.meta_steps)
        optimizer.zero_grad()
        vmap(objective)(*tasks).mean().backward()

    began = time.process_time()
    for step in range(options.meta_steps):
        meta_gradient(step)
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - began
    with Live() as live:
        meta_gradient(0)
    right = accuracies(partial(adapt, start, rates), characters, options.eval_tasks)
    return {
        "algorithm": name,
        "accuracy, %": 100 * right.mean().item(),
        "± (95%)": 196 * right.std().item() / len(right) ** 0.5,
        "ms a meta-step": 1000 * seconds / options.meta_steps,
        "MB": live.most / 1e6,
    }


@torch.no_grad()
def accuracies(adapt: Callable[..., Params], characters: Characters, count: int) -> Tensor:
    """The share of right answers in each of the held-out tasks, which are those of `maml.py`."""

    def right(x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        return (model(adapt(x, y), query_x).argmax(-1) == query_y).float().mean()

    batches = task_batches(characters.test, count, TASK, TEST_SEED)
    return torch.cat([vmap(right)(*tasks) for tasks in batches])


def study(options: Namespace) -> Study:
    context, characters = multiprocessing.get_context("spawn"), glyphs.load()
    with ProcessPoolExecutor(WORKERS, context, prepare) as pool:
        done = pool.map(learn, ALGORITHMS, repeat(options), repeat(characters))
        rows = list(track(done, "algorithms", total=len(ALGORITHMS)))
    names, accuracy, interval, *costs = zip(*map(dict.values, rows), strict=True)
    picture = Figure(figsize=(11, 3), layout="constrained")
    axes = picture.subplots(1, 3, sharey=True)
    axes[0].errorbar(accuracy, names, xerr=interval, fmt="o")
    axes[0].set_xlabel("accuracy on unseen characters, %")
    for place, cost, label in zip(axes[1:], costs, ["CPU ms", "MB"], strict=True):
        place.barh(names, cost)
        place.set_xlabel(f"{label} a meta-step")
    axes[0].invert_yaxis()
    return Study(rows, picture)


SIZES = {
    "meta_steps": Size("steps of the outer loop", 200, 2),
    "eval_tasks": Size("held-out tasks behind each accuracy", 400, 4),
}

if __name__ == "__main__":
    main(study, __doc__, **SIZES)
