"""Learned rates in ordinary training: a learning rate that is 100 times off finds its way back.

    python examples/learned_rates.py [--seed 0] [--epochs 30] [--smoke] [--out DIR] [--json FILE]

The data are the 1,797 digits that scikit-learn ships. A small network is trained with Adam, with
momentum and by gradient descent, from rates that are up to 100 times smaller or larger than a good
one: once as they are, and once inside `diffopt.transforms.hypergradient`, which takes a step on the
rate before each step on the weights. The two lines that differ are the optimizer's.

Baydin et al., "Online Learning Rate Adaptation with Hypergradient Descent", 2018; Chandra et al.,
"Gradient Descent: The Ultimate Optimizer", 2022.

Seed 0, torch 2.13.0, losses in the last epoch, from a rate that is 0.01, 1 and 100 times a good
one: Adam 2.08, 0.0102 and 5.62, and 0.0038, 0.0035 and 0.0027 with a learned rate; momentum 2.21,
0.0366 and 313, and 0.0109, 0.0058 and 0.0046 with a learned rate; gradient descent 2.21, 0.0417 and
920, and 0.0392, 0.0338 and 0.0363 with a learned rate. The accuracies with a learned rate are 95.9
to 98.3%; with the good rate kept they are 97.3%, 97.5% and 95.4%.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn

import diffopt
from common import Size, Study, main
from diffopt.transforms import hypergradient

FACTORS = 0.01, 0.1, 1.0, 10.0, 100.0  # of a good rate
INNER: dict[str, tuple[Any, float, dict[str, float]]] = {
    "Adam": (diffopt.adam(), 3e-3, {}),
    "momentum": (diffopt.sgd(), 0.03, {"momentum": 0.9}),
    "gradient descent": (diffopt.sgd(momentum=False), 0.3, {}),
}
"""Optimizers, good rates, and other hyperparameters."""


class Run:
    """A training run, its losses, and the rate of each step."""

    def __init__(self, net: nn.Module, optimizer: Any, **numbers: Any) -> None:
        self.net = copy.deepcopy(net)
        self.optimizer = diffopt.optim.from_pure(optimizer, self.net, **numbers)
        self.losses: list[float] = []
        self.rates: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.net(x), y)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.rates.append(self.rate())

    def rate(self) -> float:
        opt, _, state, hp = diffopt.optim.to_pure(self.optimizer)
        return float(opt.current(state, hp).lr if isinstance(opt, hypergradient) else hp.lr)

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        with torch.no_grad():
            return (self.net(x).argmax(-1) == y).double().mean().item()


def study(options: Namespace) -> Study:
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    x, y = (torch.tensor(pixels).float() / 16)[order], torch.tensor(labels)[order]
    (x, new_x), (y, new_y) = x.split([1280, len(x) - 1280]), y.split([1280, len(y) - 1280])
    batches = [i for _ in range(options.epochs) for i in torch.randperm(1280).split(64)]
    net = nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    )
    picture, rows = Figure(figsize=(14, 4), layout="constrained"), []
    for axes, (name, (opt, good, numbers)) in zip(
        picture.subplots(1, 3), INNER.items(), strict=True
    ):
        for factor in FACTORS:
            row: dict[str, Any] = {"optimizer": name, "first rate": good * factor}
            for way, used in (("fixed", opt), ("learned", hypergradient(opt))):
                run = Run(net, used, lr=good * factor, **numbers)
                for i in track(batches, f"{name}, {way} rate from {good * factor:.2g}"):
                    run.step(x[i], y[i])
                row[f"{way}: loss"] = sum(run.losses[-20:]) / 20
                row[f"{way}: accuracy"] = run.accuracy(new_x, new_y)
            row["last rate"] = run.rates[-1]
            rows.append(row)
            axes.plot(run.rates, label=f"{factor:g} times {good}")
        axes.set(title=name, xlabel="step", ylabel="learning rate", yscale="log", xscale="log")
        axes.legend()
    return Study(rows, picture)


if __name__ == "__main__":
    main(study, __doc__, epochs=Size("passes over the 1,280 training images", 30, 1))
