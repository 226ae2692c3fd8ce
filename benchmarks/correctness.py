"""Which libraries give the right meta-gradient: a table in Markdown.

    python benchmarks/correctness.py

Each library unrolls 5 steps on a small loss in float64. Its derivatives are compared with central
differences of the same algorithm written down in a few lines of numpy, so that no library is its
own judge. Libraries that are not installed are left out.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import diffopt

CURVATURE = np.array([[2.0, 0.3, 0.0], [0.3, 1.0, 0.0], [0.0, 0.0, 0.0]])
START = np.array([1.0, -2.0, 0.5])
SGD = {"lr": 0.1, "momentum": 0.7, "weight_decay": 0.05}
ADAM = {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3}
STEPS = 5


def loss(w: Tensor, coordinates: int) -> Tensor:
    """Its third coordinate, where there is one, has no influence: a gradient of exactly zero."""
    a = torch.tensor(CURVATURE[:coordinates, :coordinates])
    return 0.5 * w @ a @ w + 0.1 * (w[:2] ** 4).sum()


# The truth


def truth(rule: str, w: np.ndarray, numbers: dict[str, float]) -> np.ndarray:
    m = v = np.zeros_like(w)
    a = CURVATURE[: len(w), : len(w)]
    for t in range(1, STEPS + 1):
        g = a @ w + np.pad(0.4 * w[:2] ** 3, (0, len(w) - 2))
        if rule == "sgd":
            m = numbers["momentum"] * m + g + numbers["weight_decay"] * w
            w = w - numbers["lr"] * m
            continue
        b1, b2 = numbers["beta1"], numbers["beta2"]
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        root = np.sqrt(v / (1 - b2**t))
        w = w - numbers["lr"] * m / (1 - b1**t) / (root + numbers["eps"])
    return w


def true_derivative(rule: str, start: np.ndarray, numbers: dict[str, float], by: str) -> np.ndarray:
    """Of the sum of the first two coordinates after the last step, by central differences."""

    def outer(x: float, i: int) -> float:
        if by != "start":
            return truth(rule, start, {**numbers, by: x})[:2].sum()
        return truth(rule, np.where(np.arange(len(start)) == i, x, start), numbers)[:2].sum()

    at = list(start) if by == "start" else [numbers[by]]
    h = 1e-5
    return np.array([(outer(x + h, i) - outer(x - h, i)) / (2 * h) for i, x in enumerate(at)])


# The libraries: (rule, start, numbers as tensors) -> the last parameters


def ours(rule: str, w: Tensor, numbers: dict[str, Tensor]) -> Tensor:
    optimizer = getattr(diffopt, rule)()
    hparams = optimizer.hparams(**numbers)
    return diffopt.minimize(
        lambda w: loss(w, len(w)), w, optimizer=optimizer, hparams=hparams, steps=STEPS
    ).params


def torch_names(numbers: dict[str, Tensor]) -> dict[str, Any]:
    rest = {k: v for k, v in numbers.items() if not k.startswith("beta")}
    return rest | ({"betas": (numbers["beta1"], numbers["beta2"])} if "beta1" in numbers else {})


def torch_optim(rule: str, w: Tensor, numbers: dict[str, Tensor]) -> Tensor:
    w = w.clone()
    cls = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[rule]
    optimizer = cls([w], differentiable=True, **torch_names(numbers))
    for _ in range(STEPS):
        # A clone, since the step overwrites what the loss has saved.
        (w.grad,) = torch.autograd.grad(loss(w.clone(), len(w)), w, create_graph=True)
        optimizer.step()
    return w


def torchopt_functional(rule: str, w: Tensor, numbers: dict[str, Tensor]) -> Tensor:
    import torchopt

    optimizer = getattr(torchopt, rule)(**torch_names(numbers))
    params = (w,)
    state = optimizer.init(params)
    for _ in range(STEPS):
        grads = torch.autograd.grad(loss(params[0], len(w)), params, create_graph=True)
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return params[0]


def higher_optim(rule: str, w: Tensor, numbers: dict[str, Tensor]) -> Tensor:
    import higher

    cls = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[rule]
    plain = torch.nn.Parameter(w.detach().clone())
    # Numbers choose its code, such as whether there is a momentum; the tensors then replace them.
    optimizer = cls([plain], **torch_names({k: v.item() for k, v in numbers.items()}))
    override = {k: [v] for k, v in torch_names(numbers).items()}
    unrolled = higher.get_diff_optim(optimizer, [plain], override=override)
    params = [w]
    for _ in range(STEPS):
        params = unrolled.step(loss(params[0], len(w)), params=params)
    return params[0]


LIBRARIES = {
    "diffopt": ("diffopt", ours),
    "torch.optim, differentiable=True": ("torch", torch_optim),
    "TorchOpt": ("torchopt", torchopt_functional),
    "higher": ("higher", higher_optim),
}


# Verdicts


def verdict(unroll: Callable[..., Tensor], rule: str, coordinates: int, by: str) -> str:
    numbers = SGD if rule == "sgd" else ADAM
    start = START[:coordinates]
    tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()}
    w = torch.tensor(start, requires_grad=True)
    wanted = w if by == "start" else tensors[by].requires_grad_()
    try:
        (grad,) = torch.autograd.grad(unroll(rule, w, tensors)[:2].sum(), wanted)
    except Exception as error:
        return f"raises {type(error).__name__}"
    true = true_derivative(rule, start, numbers, by)
    if not grad.isfinite().all():
        return "NaN"
    error = np.abs(grad.detach().numpy() - true).max() / np.abs(true).max()
    return "right" if error < 1e-6 else f"off by {100 * error:{'.0f' if error > 0.01 else '.2g'}}%"


def batched(unroll: Callable[..., Tensor]) -> str:
    rates = torch.tensor([0.05, 0.1], dtype=torch.float64)
    others = {k: torch.tensor(v, dtype=torch.float64) for k, v in ADAM.items()}
    w = torch.tensor(START[:2], requires_grad=True)

    def last(lr: Tensor) -> Tensor:
        return unroll("adam", w, {**others, "lr": lr})

    try:
        found = torch.vmap(last)(rates)
    except Exception as error:
        return f"raises {type(error).__name__}"
    true = [truth("adam", START[:2], {**ADAM, "lr": float(lr)}) for lr in rates]
    return "right" if np.allclose(found.detach().numpy(), true) else "wrong"


def main() -> None:
    warnings.simplefilter("ignore")
    names = [n for n, (package, _) in LIBRARIES.items() if importlib.util.find_spec(package)]
    print(f"| derivative of 5 steps | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    rows = [("sgd", 2, "start"), *(("sgd", 2, k) for k in SGD)]
    rows += [("adam", 2, "start"), *(("adam", 2, k) for k in ADAM)]
    rows += [("adam", 3, "start"), ("adam", 3, "lr")]
    for rule, coordinates, by in rows:
        dead = ", one gradient always 0" if coordinates == 3 else ""
        cells = [verdict(LIBRARIES[n][1], rule, coordinates, by) for n in names]
        print(f"| {rule}, d/d {by}{dead} | {' | '.join(cells)} |")
    print(f"| adam, vmap over lr | {' | '.join(batched(LIBRARIES[n][1]) for n in names)} |")


if __name__ == "__main__":
    main()
