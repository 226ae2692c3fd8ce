"""An ensemble: 64 networks with 64 learning rates, trained at once under one `torch.vmap`.

    python examples/ensemble.py [--seed 0] [--members 64] [--smoke] [--out DIR] [--json FILE]

The data are the 1,797 digits that scikit-learn ships. A training run is a function of its initial
parameters and its learning rate, so `torch.vmap` of that function is a grid search; the same runs
one after the other, in a loop, give the same networks and take longer.

Seed 0, torch 2.13.0, one thread: 14.3 s one by one, 2.7 s at once; the best network reads 97.7% of
new digits, with a learning rate of 0.022.
"""

from __future__ import annotations

import time
from argparse import Namespace

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn

import diffopt
from common import Size, Study, main

net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
model, opt = diffopt.nn.functionalize(net), diffopt.adam()


def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(params, {}, x)[0], y)


def initial(members: int) -> dict[str, Tensor]:
    """Parameters of `members` networks, stacked."""
    return {
        name: torch.randn(members, *p.shape) / p.shape[-1] ** 0.5
        for name, p in net.named_parameters()
    }


def trained(params: dict[str, Tensor], lr: Tensor, batches: list[tuple[Tensor, Tensor]]):
    hp = opt.hparams(lr=lr)
    return diffopt.minimize(
        loss, params, optimizer=opt, hparams=hp, batches=batches, adjoint=None
    ).params


def study(options: Namespace) -> Study:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    x, y = (torch.tensor(images).float() / 16)[order], torch.tensor(labels)[order]
    train, test = (x[:1200], y[:1200]), (x[1200:], y[1200:])
    picks = torch.randint(1200, (options.steps, 64))
    batches = [(train[0][i], train[1][i]) for i in picks]
    rates, start = torch.logspace(-4, 0, options.members), initial(options.members)

    def at_once():
        return torch.vmap(lambda params, lr: trained(params, lr, batches))(start, rates)

    def one_by_one():
        runs = [
            trained({name: p[i] for name, p in start.items()}, rates[i], batches)
            for i in track(range(options.members), "one by one")
        ]
        return {name: torch.stack([run[name] for run in runs]) for name in start}

    rows = []
    for name, way in (("a loop", one_by_one), ("one vmap", at_once)):
        begin = time.perf_counter()
        params = way()
        seconds = time.perf_counter() - begin
        logits = torch.vmap(lambda params: model(params, {}, test[0])[0])(params)
        right = (logits.argmax(-1) == test[1]).double().mean(-1)
        best = right.topk(min(8, options.members)).indices
        vote = (logits[best].softmax(-1).mean(0).argmax(-1) == test[1]).double().mean().item()
        row = {"way": name, "seconds": seconds, "best member": right.max().item()}
        rows.append(row | {"its rate": rates[right.argmax()].item(), "8 best together": vote})
    picture = Figure(figsize=(7, 4), layout="constrained")
    axes = picture.subplots()
    axes.plot(rates, right, ".-", label="one network")
    axes.axhline(vote, color="k", lw=0.8, label="the 8 best together")
    axes.set(xscale="log", xlabel="learning rate", ylabel="accuracy on new digits")
    axes.legend()
    return Study(rows, picture)


if __name__ == "__main__":
    main(
        study,
        __doc__,
        members=Size("networks", 64, 3),
        steps=Size("steps of each network", 300, 5),
    )
