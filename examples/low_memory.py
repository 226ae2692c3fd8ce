"""Training with the optimizer's state in bfloat16 and with bfloat16 parameters, beside float32.

    python examples/low_memory.py [--seed 0] [--epochs 60] [--smoke] [--out DIR] [--json FILE]

A perceptron learns the 1,797 digits that scikit-learn ships, by AdamW, with what
`diffopt.transforms.precision` offers. All runs begin at the same parameters, but for rounding, and
see the same batches. Bytes are those of a parameter with its state, without its gradient.

Seed 0, torch 2.13.0, training loss: float32, and all ways with stochastic rounding or with float32
masters, 0.0049. Rounded to nearest, the state departs once the gradients are small, since
`exp_avg_sq` no longer decays, 0.0064; and without masters most steps are lost, 0.0316. Accuracies
on new digits are 97.8%, in the last case 97.2%.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn

import diffopt
from common import Size, Study, main
from diffopt.transforms import precision

BATCH, TRAIN, RATE = 64, 1437, 1e-3
ADAMW = diffopt.adamw()
WAYS: dict[str, tuple[torch.dtype, diffopt.Optimizer[Any, Any]]] = {
    "float32": (torch.float32, ADAMW),
    "bfloat16 state": (torch.float32, precision(ADAMW)),
    "bfloat16 params, float32 masters": (torch.bfloat16, precision(ADAMW, state_dtype=None)),
    "bfloat16 params and state, float32 masters": (torch.bfloat16, precision(ADAMW)),
    "bfloat16 params and state, no masters": (
        torch.bfloat16,
        precision(ADAMW, master_dtype=None),
    ),
    "bfloat16 state, rounded to nearest": (torch.float32, precision(ADAMW, stochastic=False)),
    "bfloat16 params and state, no masters, to nearest": (
        torch.bfloat16,
        precision(ADAMW, master_dtype=None, stochastic=False),
    ),
}
"""The dtype of the parameters, and the optimizer."""


class Run(NamedTuple):
    """Of one way.

    Attributes:
        course: the training loss after every epoch.
        test_accuracy: at the end.
        bytes: of a parameter and its state, without its gradient.
    """

    course: list[float]
    test_accuracy: float
    bytes: float


def load(seed: int) -> tuple[Tensor, Tensor]:
    """Pixels from 0 to 1, and labels, in random order; the first `TRAIN` are for training."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(pixels / 16).float()[order], torch.tensor(labels)[order]


def train(dtype: torch.dtype, rule: diffopt.Optimizer[Any, Any], seed: int, epochs: int) -> Run:
    torch.manual_seed(seed)
    x, y = load(seed)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    net.append(nn.Linear(128, 10)).to(dtype)
    optimizer = diffopt.optim.from_pure(rule, net.parameters(), lr=RATE)
    batches, course = torch.Generator().manual_seed(seed), list[float]()
    for _ in range(epochs):
        for batch in torch.randperm(TRAIN, generator=batches).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(x[batch].to(dtype)).float(), y[batch]).backward()
            optimizer.step()
        course.append(F.cross_entropy(logits(net, x[:TRAIN]), y[:TRAIN]).item())
    right = logits(net, x[TRAIN:]).argmax(1) == y[TRAIN:]
    return Run(course, right.double().mean().item(), memory(net, optimizer))


@torch.no_grad()
def logits(net: nn.Sequential, x: Tensor) -> Tensor:
    return net(x.to(net[0].weight.dtype)).float()


def memory(net: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Bytes of a parameter and its state."""
    params = list(net.parameters())
    state = [x for p in params for x in optimizer.state[p].values() if x.dim() > 0]
    return sum(x.nbytes for x in (*params, *state)) / sum(p.numel() for p in params)


def study(options: Namespace) -> Study:
    picture = Figure(figsize=(8, 5), layout="constrained")
    axes = picture.subplots()
    rows = []
    for name, (dtype, rule) in track(WAYS.items(), "training"):
        run = train(dtype, rule, options.seed, options.epochs)
        axes.plot(range(1, options.epochs + 1), run.course, label=name)
        figures = {"training loss": run.course[-1], "test accuracy": run.test_accuracy}
        rows.append({"": name, "bytes": round(run.bytes)} | figures)
    axes.set(xlabel="epoch", ylabel="training loss", yscale="log")
    axes.legend(fontsize=8)
    return Study(rows, picture)


if __name__ == "__main__":
    main(study, __doc__, epochs=Size("passes over the training data", 60, 2))
