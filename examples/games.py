"""Two players who learn: naive gradients and LOLA on the iterated prisoner's dilemma.

    python examples/games.py [--seed 0] [--steps 200] [--smoke] [--out DIR] [--json FILE]

Each player has five probabilities of cooperating: in the first round, and after each of the four
outcomes of a round. Their discounted payoffs are known in closed form. Naive learners, each of whom
follows the gradient of its own payoff, end up defecting. A LOLA learner differentiates through the
step that its opponent is about to take: the opponent's pure update stands inside its own loss. Two
of them find tit for tat.

Foerster et al., "Learning with Opponent-Learning Awareness", 2018.

Seed 0, torch 2.13.0, payoff per round of the first and the second player: naive against naive -1.98
and -1.98, LOLA against naive -0.74 and -2.04, LOLA against LOLA -1.05 and -1.04.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor

import diffopt
from common import Size, Study, main

DISCOUNT = 0.96
PAYOFFS = torch.tensor([-1.0, -3.0, 0.0, -2.0])  # of the first: CC, CD, DC, DD
AFTER = [0, 2, 1, 3]  # the outcomes as the second player sees them
opt = diffopt.sgd(maximize=True)


def payoffs(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The mean payoff per round of both players, from logits of cooperating, [5] each."""
    p, q = first.sigmoid(), second.sigmoid()[[0, *(1 + i for i in AFTER)]]
    outcomes = torch.stack([p * q, p * (1 - q), (1 - p) * q, (1 - p) * (1 - q)], -1)
    visits = torch.linalg.solve(torch.eye(4) - DISCOUNT * outcomes[1:].T, outcomes[0])
    share = (1 - DISCOUNT) * visits
    return share @ PAYOFFS, share @ PAYOFFS[AFTER]


def naive(mine: Tensor, other: Tensor, value: int) -> Tensor:
    return payoffs(mine, other)[0] if value == 0 else payoffs(other, mine)[1]


def lola(mine: Tensor, other: Tensor, value: int) -> Tensor:
    """The payoff against the opponent after its next naive step, which depends on `mine`."""
    grad = torch.func.grad(naive)(other, mine, 1 - value)
    learned, _ = opt.update(other, grad, opt.init(other), opt.hparams(lr=10.0))
    return naive(mine, learned, value)


LEARNERS = {
    "naive against naive": (naive, naive),
    "LOLA against naive": (lola, naive),
    "LOLA against LOLA": (lola, lola),
}


def play(objectives, steps: int, name: str) -> tuple[list[Tensor], Tensor]:
    """Both players' logits in the end, and their payoffs before every step, [steps, 2]."""
    players = [0.1 * torch.randn(5) for _ in range(2)]
    states, hp = [opt.init(p) for p in players], opt.hparams(lr=1.0)
    course = []
    for _ in track(range(steps), name):
        course.append(torch.stack(payoffs(*players)))
        grads = [
            torch.func.grad(objective)(players[i], players[1 - i], i)
            for i, objective in enumerate(objectives)
        ]
        moves = [opt.update(*move, hp) for move in zip(players, grads, states, strict=True)]
        players, states = [list(side) for side in zip(*moves, strict=True)]
    return players, torch.stack(course)


def study(options: Namespace) -> Study:
    picture = Figure(figsize=(7, 4), layout="constrained")
    axes = picture.subplots()
    rows = []
    for name, objectives in LEARNERS.items():
        (first, second), course = play(objectives, options.steps, name)
        mine, others = (value.item() for value in payoffs(first, second))
        cooperates = [f"{p:.2f}" for p in first.sigmoid()[1:].tolist()]
        rows.append(
            {
                "players": name,
                "first's payoff": mine,
                "second's payoff": others,
                "first cooperates after CC, CD, DC, DD": " ".join(cooperates),
            }
        )
        axes.plot(course[:, 0], label=name)
    axes.set(xlabel="step", ylabel="first player's payoff per round", ylim=(-3, 0))
    axes.legend()
    return Study(rows, picture)


if __name__ == "__main__":
    main(study, __doc__, steps=Size("steps of both players", 200, 3))
