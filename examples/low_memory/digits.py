"""Training with the optimizer's state in bfloat16 and with bfloat16 parameters, beside float32.

    python examples/low_memory/digits.py [--seeds 0 1 2] [--epochs 60] [--out DIR] [--json FILE]

A perceptron learns the 1,797 digits that scikit-learn ships, by AdamW. Runs of one seed begin at
the same parameters, but for rounding, and see the same batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import diffopt
from diffopt.transforms import precision

BATCH, TRAIN = 64, 1437
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
    """Of one seed.

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


def train(
    dtype: torch.dtype, rule: diffopt.Optimizer[Any, Any], seed: int, epochs: int, lr: float
) -> Run:
    torch.manual_seed(seed)
    x, y = load(seed)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    net.append(nn.Linear(128, 10)).to(dtype)
    optimizer = diffopt.optim.from_pure(rule, net.parameters(), lr=lr)
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


def plot(runs: dict[str, list[Run]]) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for name, of_seeds in runs.items():
        courses = [run.course for run in of_seeds]
        means = [statistics.fmean(losses) for losses in zip(*courses, strict=True)]
        axes.plot(range(1, len(means) + 1), means, label=name)
    axes.set(xlabel="epoch", ylabel="training loss", yscale="log")
    axes.legend(fontsize=8)
    figure.tight_layout()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train in less memory, and compare with float32.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data, batches and parameters")
    add("--epochs", type=int, default=60, help="passes over the training data")
    add("--lr", type=float, default=1e-3, help="learning rate")
    add("--out", type=Path, default=Path("runs/low_memory"), help="folder for the picture")
    add("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    runs = {
        name: [train(*way, seed, options.epochs, options.lr) for seed in options.seeds]
        for name, way in track(WAYS.items(), "training")
    }
    table = Table("", "bytes", *(f"seed {seed}" for seed in options.seeds), "test accuracy")
    for name, of_seeds in runs.items():
        losses = [f"{run.course[-1]:.4f}" for run in of_seeds]
        accuracy = statistics.fmean(run.test_accuracy for run in of_seeds)
        table.add_row(name, f"{of_seeds[0].bytes:.0f}", *losses, f"{accuracy:.1%}")
    Console().print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    mpl.use("Agg")
    plot(runs).savefig(options.out / "losses.png", dpi=150)
    if options.json:
        figures = {name: [run._asdict() for run in of_seeds] for name, of_seeds in runs.items()}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
