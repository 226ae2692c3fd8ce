"""A learned optimizer: a small network that turns gradients into steps, trained on many tasks.

    python examples/learned_optimizer.py [--seed 0] [--unrolled-steps 100] [--smoke] [--json FILE]

For every weight of whatever it trains, the network sees the gradient and three averages of it, each
divided by their usual size, and the time; its two outputs are added to Adam's step and to the
logarithm of its length. A task is a small classifier of digits from a random projection of their
pixels, each with its own scale. The network is trained twice: by gradients through unrolled loops
of 30 steps, and by persistent evolution strategies, which see 5 steps at a time and need no
gradient. Then it trains new tasks, against Adam with the best of 13 learning rates. It is an
`Optimizer`, so `from_pure` makes a torch.optim class of it, which trains a convolutional network.

Metz et al., "Understanding and correcting pathologies in the training of learned optimizers", 2019;
Vicol, Metz and Sohl-Dickstein, "Unbiased gradient estimation in unrolled computation graphs with
persistent evolution strategies", 2021.

Seed 0, torch 2.13.0, mean losses of the first 30 steps on 64 new tasks, and losses after 120 (four
times as far as it was trained): Adam, with a rate of 0.1, 0.745 and 0.0047; learned by unrolling
0.641 and 0.0037, by evolution strategies 0.621 and 0.0054. The convolutional network's loss in the
end: Adam, with that rate, 0.132; learned 0.083 and 0.086.
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
from diffopt.rules import Hyperparameter, Leafwise, hparams, number, zeros_like

BETAS = 0.5, 0.9, 0.99
HORIZON, TRUNCATION, TASKS = 30, 5, 8
Tree = dict[str, Tensor]


class MLPState(NamedTuple):
    step: Any
    fast: Any
    middle: Any
    slow: Any
    square: Any


@hparams
class MLPHParams:
    weights: Hyperparameter = number(0.0, per_parameter=False)


class MLPOptimizer(Leafwise[MLPState, MLPHParams]):
    """Steps that a network with these weights chooses, one weight like another."""

    State = MLPState
    hparams = MLPHParams

    def begin(self, p: Tensor, step: Tensor) -> MLPState:
        return MLPState(step, *(zeros_like(p) for _ in range(4)))

    def rule(self, p: Tensor, g: Tensor, s: MLPState, hp: MLPHParams, c: Any) -> Any:
        averages = [b * m + (1 - b) * g for b, m in zip(BETAS, s[1:4], strict=True)]
        square = 0.99 * s.square + 0.01 * g * g
        size = (square / (1 - 0.99**s.step) + 1e-12).sqrt()
        unbiased = [m / (1 - b**s.step) / size for b, m in zip(BETAS, averages, strict=True)]
        times = [torch.ones_like(p) * s.step / (s.step + k) for k in (3, 30)]
        w = hp.weights
        hidden = torch.tanh(torch.stack([g / size, *unbiased, *times], -1) @ w["in"] + w["bias"])
        turn, length = (hidden @ w["out"]).unbind(-1)
        step = (w["log_rate"] + length).exp() * (unbiased[1] + turn)
        return (p - step).to(p.dtype), MLPState(s.step, *averages, square)


def initial_weights() -> Tree:
    """Those of a network that is nearly Adam."""
    return {
        "in": torch.randn(6, 16) / 6**0.5,
        "bias": torch.zeros(16),
        "out": 0.01 * torch.randn(16, 2),
        "log_rate": torch.tensor(-4.0),
    }


net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 10))
model, adam = diffopt.nn.functionalize(net), diffopt.adam()
learned = diffopt.transforms.flatten(MLPOptimizer())  # all tensors as one vector
pixels, labels = load_digits(return_X_y=True)
IMAGES, LABELS = torch.tensor(pixels).float() / 16, torch.tensor(labels)


class Tasks(NamedTuple):
    """Classifiers of digits, each of its own projection of the pixels: weights, inputs, labels."""

    params: Tree
    x: Tensor
    y: Tensor


def tasks(count: int) -> Tasks:
    pick = torch.randint(len(LABELS), (count, 128))
    scale = 10 ** (1.5 * torch.rand(count, 1, 16) - 1)
    x = IMAGES[pick] @ torch.randn(count, 64, 16) / 4 * scale
    params = {
        name: torch.randn(count, *p.shape) / p.shape[-1] ** 0.5 for name, p in model.params.items()
    }
    return Tasks(params, x, LABELS[pick])


def loss(params: Tree, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(params, {}, x)[0], y)


def losses(opt: Any, hp: Any, tasks: Tasks, steps: int, adjoint: Any = None) -> Tensor:
    """The losses of every step of every task, [tasks, steps]."""

    def one(params: Tree, x: Tensor, y: Tensor) -> Tensor:
        return diffopt.minimize(
            loss, params, x, y, optimizer=opt, hparams=hp, steps=steps, adjoint=adjoint
        ).losses

    return torch.vmap(one)(*tasks)


def by_unrolling(weights: Tree, steps: int) -> None:
    """Train the network by gradients through whole loops."""
    meta = diffopt.optim.Adam(weights.values(), lr=3e-3)
    for _ in track(range(steps), "unrolled"):
        hp = learned.hparams(weights=weights)
        meta.zero_grad()
        losses(learned, hp, tasks(TASKS), HORIZON, diffopt.adjoint.Unrolled()).mean().backward()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        meta.step()


def by_evolution(weights: Tree, steps: int) -> None:
    """Train the network by persistent evolution strategies, truncation by truncation."""

    def truncation(carry: Any, weights: Tree) -> tuple[Any, Tensor]:
        def one(params: Tree, state: Any, x: Tensor, y: Tensor) -> Any:
            hp = learned.hparams(weights=weights)
            solution = diffopt.minimize(
                loss,
                params,
                x,
                y,
                optimizer=learned,
                hparams=hp,
                state=state,
                steps=TRUNCATION,
                adjoint=None,
            )
            return solution.params, solution.state, solution.losses

        (params, state, *data) = carry
        params, state, values = torch.vmap(one)(params, state, *data)
        return (params, state, *data), values.mean()

    pes = diffopt.adjoint.PersistentEvolution(truncation, samples=8, sigma=0.03, chunk_size=8)
    meta = diffopt.optim.Adam(weights.values(), lr=3e-3)
    for t in track(range(steps), "evolution"):
        if t % (HORIZON // TRUNCATION) == 0:
            params, x, y = tasks(TASKS)
            particles = pes.init((params, torch.vmap(learned.init)(params), x, y))
        meta.zero_grad()
        particles, value = pes(particles, weights)
        value.backward()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        meta.step()


def convolutional(opt: Any, **numbers: Any) -> list[float]:
    """The losses of another kind of network, trained as by any class of torch.optim."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(32, 10)
    )
    optimizer = diffopt.optim.from_pure(opt, net, **numbers)
    course = []
    for i in torch.randint(len(LABELS), (100, 256)):
        optimizer.zero_grad()
        value = F.cross_entropy(net(IMAGES[i].reshape(-1, 1, 8, 8)), LABELS[i])
        value.backward()
        optimizer.step()
        course.append(value.item())
    return course


def study(options: Namespace) -> Study:
    unrolled = {name: w.requires_grad_() for name, w in initial_weights().items()}
    evolved = {name: w.detach().clone().requires_grad_() for name, w in unrolled.items()}
    by_unrolling(unrolled, options.unrolled_steps)
    by_evolution(evolved, options.evolution_steps)

    seen, new = tasks(64), tasks(64)
    with torch.no_grad():
        rates = torch.logspace(-3, 0, 13).tolist()
        tuned = min(rates, key=lambda lr: losses(adam, adam.hparams(lr=lr), seen, HORIZON).mean())
        ways: dict[str, tuple[Any, dict[str, Any]]] = {
            f"Adam, rate {tuned:.2g}": (adam, {"lr": tuned}),
            "learned, unrolled": (learned, {"weights": unrolled}),
            "learned, evolution": (learned, {"weights": evolved}),
        }
        courses = {
            name: losses(opt, opt.hparams(**numbers), new, 4 * HORIZON).mean(0)
            for name, (opt, numbers) in ways.items()
        }
    others = {name: convolutional(opt, **numbers) for name, (opt, numbers) in ways.items()}
    rows = [
        {
            "optimizer": name,
            f"mean loss of {HORIZON} steps": courses[name][:HORIZON].mean().item(),
            f"loss at {HORIZON}": courses[name][HORIZON - 1].item(),
            f"loss at {4 * HORIZON}": courses[name][-1].item(),
            "CNN": sum(others[name][-20:]) / 20,
        }
        for name in ways
    ]
    picture = Figure(figsize=(10, 4), layout="constrained")
    left, right = picture.subplots(1, 2)
    for name in ways:
        left.plot(courses[name], label=name)
        right.plot(others[name], lw=0.8, label=name)
    left.axvline(HORIZON, color="k", lw=0.8, ls=":")
    left.set(title="new tasks", xlabel="step", ylabel="loss", yscale="log")
    right.set(title="a convolutional network", xlabel="step", ylabel="loss", yscale="log")
    left.legend()
    return Study(rows, picture)


if __name__ == "__main__":
    main(
        study,
        __doc__,
        unrolled_steps=Size("outer steps through unrolled loops", 100, 2),
        evolution_steps=Size("outer steps by evolution strategies", 200, 2),
    )
