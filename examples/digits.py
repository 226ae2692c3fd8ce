"""Ordinary training: a small CNN reads digits, with diffopt.optim.AdamW and with torch.optim's.

    python examples/digits.py [--seed 0] [--epochs 15] [--smoke] [--out DIR] [--json FILE]

The data are the 1,797 digits that scikit-learn ships. Both runs start from the same weights and
see the same batches, so their curves lie on top of each other. A third run, which is diffopt's,
stops half way, writes a checkpoint, and goes on from it with the optimizer of torch; its curve is
the same, too.

Seed 0, torch 2.13.0: all three runs end at a loss of 0.0300 and an accuracy of 97.5%.
"""

from __future__ import annotations

import copy
import io
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

SIZE = 64  # of a batch


class Run:
    """A model, its optimizer and scheduler."""

    def __init__(self, library: Any, model: nn.Module, steps: int) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = library.AdamW(self.model.parameters(), lr=3e-3, weight_decay=0.05)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 3e-3, steps)

    def step(self, x: Tensor, y: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.parts().items()}, file)
        return file.getvalue()

    def load(self, checkpoint: bytes) -> None:
        saved = torch.load(io.BytesIO(checkpoint), weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(saved[name])

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        with torch.no_grad():
            return (self.model(x).argmax(-1) == y).double().mean().item()


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels, 1,280 to train with and the rest to test with."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    x = (torch.tensor(pixels).float() / 16)[order].reshape(-1, 1, 8, 8)
    y = torch.tensor(labels)[order]
    return x[:1280], y[:1280], x[1280:], y[1280:]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def study(options: Namespace) -> Study:
    x, y, new_x, new_y = digits()
    batches = [i for _ in range(options.epochs) for i in torch.randperm(1280).split(SIZE)]
    net = network()
    runs = {
        "torch.optim.AdamW": Run(torch.optim, net, len(batches)),
        "diffopt.optim.AdamW": Run(diffopt.optim, net, len(batches)),
        "diffopt, then torch from a checkpoint": Run(diffopt.optim, net, len(batches)),
    }
    courses: dict[str, list[float]] = {name: [] for name in runs}
    for t, batch in enumerate(track(batches, "training")):
        if t == len(batches) // 2:
            name = "diffopt, then torch from a checkpoint"
            resumed = Run(torch.optim, net, len(batches))
            resumed.load(runs[name].save())
            runs[name] = resumed
        for name, run in runs.items():
            courses[name].append(run.step(x[batch], y[batch]))
    rows = [
        {"run": name, "last loss": courses[name][-1], "accuracy": run.accuracy(new_x, new_y)}
        for name, run in runs.items()
    ]
    picture = Figure(figsize=(7, 4), layout="constrained")
    axes = picture.subplots()
    for (name, course), width in zip(courses.items(), (5, 2.5, 1), strict=True):
        axes.plot(course, lw=width, label=name)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    return Study(rows, picture)


if __name__ == "__main__":
    main(study, __doc__, epochs=Size("passes over the 1,280 training images", 15, 1))
