"""An L2 penalty for every weight of a logistic regression, by implicit differentiation.

    python examples/hyperparameters/l2_logistic.py [--seed 0] [--steps 20] [--out DIR] [--json FILE]

The data are the 569 tumours and 30 features of breast_cancer, which scikit-learn ships. Newton's
method solves the regression and knows nothing of penalties' derivatives: the gradient of the
validation loss comes from the equation that the solution fulfils, by one linear system a step.

Seed 0, torch 2.13.0, log-loss and accuracy on other tumours: no penalty 0.0901 and 96.8%, one
penalty of 1 for all 0.0732 and 98.2%, 30 tuned penalties 0.0540 and 98.2%.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.progress import track
from sklearn.datasets import load_breast_cancer
from torch import Tensor

import diffopt

sys.path.append(str(Path(__file__).parents[1]))
from common import Size, Study, main

ROWS = {"no penalty": 1e-3, "one penalty, untuned": 1.0}  # the latter is scikit-learn's default


class Split(NamedTuple):
    """Standardised features with a column of ones, [n, 31], and labels, [n]."""

    x: Tensor
    y: Tensor


def load(seed: int, sizes: tuple[int, int] = (50, 300)) -> list[Split]:
    """Training, validation and test data, standardised by the first."""
    features, labels = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(features)[order], torch.tensor(labels).double()[order]
    train = x[: sizes[0]]
    x = torch.cat([(x - train.mean(0)) / train.std(0), torch.ones_like(x[:, :1])], 1)
    parts = [*sizes, len(y) - sum(sizes)]
    return [Split(*pair) for pair in zip(x.split(parts), y.split(parts), strict=True)]


def loss(w: Tensor, data: Split) -> Tensor:
    return F.binary_cross_entropy_with_logits(data.x @ w, data.y)


def objective(w: Tensor, decay: Tensor, data: Split) -> Tensor:
    """The sum of losses, with a penalty on every weight; next to none on the last, the bias."""
    penalty = torch.cat([decay, decay.new_full((1,), 1e-6)])
    return len(data.y) * loss(w, data) + 0.5 * penalty @ w**2


def newton(w: Tensor, *args: Any) -> Tensor:
    gradient, hessian = torch.func.grad(objective), torch.func.hessian(objective)
    for _ in range(12):
        w = w - torch.linalg.solve(hessian(w, *args), gradient(w, *args))
    return w


fit = diffopt.implicit_root(
    torch.func.grad(objective), newton, solver=diffopt.linear.ConjugateGradient()
)


def tune(train: Split, validation: Split, steps: int) -> tuple[Tensor, list[float]]:
    """Penalties with a smaller validation loss, and that loss before every step."""
    start, log_decay = train.x.new_zeros(31), train.x.new_zeros(30).requires_grad_()
    outer = diffopt.optim.Adam([log_decay], lr=0.1)
    course: list[float] = []
    for _ in track(range(steps), "tuning"):
        value = loss(fit(start, log_decay.exp(), train), validation)
        outer.zero_grad()
        value.backward()
        outer.step()
        course.append(value.item())
    return log_decay.detach().exp(), course


def row(name: str, decay: Tensor, train: Split, validation: Split, test: Split) -> dict[str, Any]:
    w = fit(train.x.new_zeros(31), decay, train)
    losses = {"validation loss": loss(w, validation).item(), "test loss": loss(w, test).item()}
    right = ((test.x @ w > 0) == (test.y > 0.5)).double().mean()
    return {"regression": name} | losses | {"test accuracy": right.item()}


def draw(decay: Tensor, course: list[float]) -> Figure:
    picture = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = picture.subplots(1, 2, width_ratios=[1, 2])
    left.plot(course, ".-")
    left.set(xlabel="outer step", ylabel="validation loss")
    names = load_breast_cancer().feature_names
    order = decay.argsort()
    right.bar([names[i] for i in order.tolist()], decay[order].tolist())
    right.axhline(1, color="black", linewidth=0.8)
    right.set(yscale="log", ylabel="penalty (start: 1)")
    right.tick_params(axis="x", rotation=90, labelsize=7)
    return picture


def study(options: Namespace) -> Study:
    splits = load(options.seed)
    decay, course = tune(*splits[:2], options.steps)
    penalties = {name: torch.full_like(decay, value) for name, value in ROWS.items()}
    penalties["30 tuned penalties"] = decay
    return Study([row(name, d, *splits) for name, d in penalties.items()], draw(decay, course))


if __name__ == "__main__":
    main(study, __doc__, steps=Size("outer steps; many overfit the validation data", 20, 2))
