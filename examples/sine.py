"""Sine regression: MAML and Meta-SGD from 5, 10 and 20 points of a curve.

    python examples/sine.py [--seed 0] [--meta-steps 600] [--smoke] [--out DIR] [--json FILE]

A task is a sine curve with an amplitude from 0.1 to 5 and a phase from 0 to pi, on [-5, 5]. One
gradient step on a few points of a new curve adapts the network; what is learned, over many curves,
is where that step starts from and, for Meta-SGD, its length for every weight. All tasks of a
meta-step are adapted at once, under `torch.vmap`.

Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017;
Li et al., "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017.

Seed 0, torch 2.13.0, mean squared errors on 1,000 new curves from 5, 10 and 20 points: MAML 1.91,
1.64 and 1.38; Meta-SGD 0.70, 0.45 and 0.29.
"""

from __future__ import annotations

import copy
import math
from argparse import Namespace
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn

import diffopt
from common import Size, Study, main

SHOTS = 5, 10, 20
TASKS = 25  # of a meta-step
opt = diffopt.sgd()


def curves(count: int, shots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points to adapt to and to be tested on: x and y, [count, shots, 1], then [count, 100, 1]."""
    amplitude, phase = 0.1 + 4.9 * torch.rand(count, 1, 1), math.pi * torch.rand(count, 1, 1)
    x, new_x = (10 * torch.rand(count, number, 1) - 5 for number in (shots, 100))
    return x, amplitude * torch.sin(x - phase), new_x, amplitude * torch.sin(new_x - phase)


class Learner:
    """A network, and the learning rates of its inner loop: one, or one for every weight."""

    def __init__(self, net: nn.Module, per_weight: bool) -> None:
        self.model = diffopt.nn.functionalize(net)
        start = {name: torch.full_like(p, 0.01) for name, p in self.model.params.items()}
        self.rates = {name: rate.requires_grad_(per_weight) for name, rate in start.items()}

    @property
    def learned(self) -> list[Tensor]:
        return [*self.model.params.values(), *(r for r in self.rates.values() if r.requires_grad)]

    def loss(self, params: Any, x: Tensor, y: Tensor) -> Tensor:
        return (self.model(params, x) - y).square().mean()

    def adapt(self, x: Tensor, y: Tensor, steps: int = 1) -> Any:
        hp = opt.hparams(lr=self.rates)
        return diffopt.minimize(
            self.loss, self.model.params, x, y, optimizer=opt, hparams=hp, steps=steps
        ).params

    def errors(self, tasks: tuple[Tensor, ...], steps: int = 1) -> Tensor:
        """The mean squared error on new points of each task after adaptation."""
        return torch.vmap(
            lambda x, y, new_x, new_y: self.loss(self.adapt(x, y, steps), new_x, new_y)
        )(*tasks)


def train(learner: Learner, shots: int, meta_steps: int, name: str) -> None:
    meta = diffopt.optim.Adam(learner.learned, lr=1e-3)
    for _ in track(range(meta_steps), f"{name}, {shots} points"):
        meta.zero_grad()
        learner.errors(curves(TASKS, shots)).mean().backward()
        meta.step()


def study(options: Namespace) -> Study:
    start = nn.Sequential(
        nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
    )
    picture = Figure(figsize=(12, 3.5), layout="constrained")
    rows = []
    for shots, axes in zip(SHOTS, picture.subplots(1, 3, sharey=True), strict=True):
        tests = curves(options.tests, shots)
        row: dict[str, Any] = {"points": shots}
        x, y, new_x, new_y = (t[0] for t in tests)
        order = new_x[:, 0].argsort()
        axes.plot(new_x[order], new_y[order], "k", lw=1, label="the curve")
        axes.plot(x, y, "k^", label="its points")
        for name in ("MAML", "Meta-SGD"):
            learner = Learner(copy.deepcopy(start), per_weight=name == "Meta-SGD")
            train(learner, shots, options.meta_steps, name)
            row[name] = learner.errors(tests).mean().item()
            fitted = learner.model(learner.adapt(x, y), {}, new_x[order])[0].detach()
            axes.plot(new_x[order], fitted, label=f"{name}, one step")
        axes.set(title=f"{shots} points", xlabel="x")
        rows.append(row)
    axes.legend()
    return Study(rows, picture)


if __name__ == "__main__":
    main(
        study,
        __doc__,
        meta_steps=Size("steps of the outer loop", 600, 3),
        tests=Size("curves that the errors are a mean over", 1000, 10),
    )
