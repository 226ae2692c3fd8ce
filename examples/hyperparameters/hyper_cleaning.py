"""Hyper-cleaning: find the wrong labels of a training set by learning a weight for each example.

Franceschi, Donini, Frasconi and Pontil, "Forward and Reverse Gradient-Based Hyperparameter
Optimization", 2017. An inner loop trains on weighted examples; the outer loop improves the weights
by differentiating the loss on a small clean validation set through all steps of the inner one.

    python examples/hyperparameters/hyper_cleaning.py --help
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cleaning_report as report
import noisy_digits
import torch
import torch.nn.functional as F
from noisy_digits import CLASSES, DIGITS, Data, Digits
from rich.progress import Progress, TextColumn
from sklearn.metrics import precision_score, recall_score, roc_auc_score
from torch import Tensor

import diffopt
from diffopt.adjoint import Adjoint, Checkpointed

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
    """How well the weights tell wrong labels from correct ones; flagged are those below 1/2."""
    flagged = weights < 0.5
    return {
        "auc": float(roc_auc_score(wrong, -weights)),
        "mean weight of correct labels": weights[~wrong].mean().item(),
        "mean weight of wrong labels": weights[wrong].mean().item(),
        "precision of flags": float(precision_score(wrong, flagged, zero_division=0.0)),
        "recall of flags": float(recall_score(wrong, flagged)),
    }


def accuracies(params: Params, data: Data) -> dict[str, float]:
    def accuracy(digits: Digits) -> float:
        return (predict(params, digits.x).argmax(-1) == digits.y).float().mean().item()

    return {"validation": accuracy(data.validation), "test": accuracy(data.test)}


def run(data: Data, inner_steps: int, outer_steps: int) -> tuple[Tensor, dict[str, Any]]:
    """The weights and all figures."""
    curve: list[dict[str, float]] = []
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[note]}")) as progress:
        bar = progress.add_task("learning weights", total=outer_steps, note="")

        def watch(params: Params) -> None:
            curve.append(accuracies(params, data))
            progress.update(bar, advance=1, note=f"validation {curve[-1]['validation']:.1%}")

        weights = learn_weights(data, inner_steps, outer_steps, watch)

    def row(digits: Digits, weights: Tensor | None = None) -> dict[str, float]:
        weights = torch.ones(len(digits.y)) if weights is None else weights
        return accuracies(train(digits, weights, inner_steps, adjoint=None), data)

    rows = {
        "all labels": row(data.train),
        "all labels and the validation set": row(data.train_and_validation),
        "the validation set alone": row(data.validation),
        "all labels, learned weights": row(data.train, weights),
        "the correct labels alone, an oracle": row(data.correct),
    }
    curve.append(rows["all labels, learned weights"])
    return weights, {"rows": rows, "separation": separation(weights, data.wrong), "curve": curve}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Find wrong labels of MNIST digits, through diffopt.minimize.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--train", type=int, default=3000, metavar="N", help="digits to train on, some mislabelled")
    add("--validation", type=int, default=500, metavar="N", help="clean digits to tune the weights")
    add("--corruption", type=float, default=0.4, metavar="SHARE", help="of wrong labels")
    add("--inner-steps", type=int, default=60, metavar="N", help="steps of training")
    add("--outer-steps", type=int, default=25, metavar="N", help="steps on the weights")
    add("--seed", type=int, default=0, help="of the order of digits and of the wrong labels")
    add("--out", type=Path, metavar="DIR", default=Path("runs/hyper_cleaning"), help="for results")
    add("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    for name in ("train", "validation", "inner_steps", "outer_steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    if options.train + options.validation >= DIGITS:
        parser.error(f"--train and --validation leave none of the {DIGITS} digits for the test")
    if not 0 < wrong_labels(options) < options.train:
        parser.error(f"--corruption {options.corruption}: must leave labels of both kinds")
    if options.seed < 0:
        parser.error(f"--seed {options.seed}: must be at least 0")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: not a file in an existing folder")
    return options


def wrong_labels(options: argparse.Namespace) -> int:
    return round(options.corruption * options.train)


def main() -> None:
    began, options = time.monotonic(), parse()
    options.out.mkdir(parents=True, exist_ok=True)
    data = noisy_digits.load(options.train, options.validation, wrong_labels(options), options.seed)
    weights, figures = run(data, options.inner_steps, options.outer_steps)
    report.print_tables(figures, data)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    report.draw(options.out / "hyper_cleaning.png", figures, weights, data)
    print(f"picture: {options.out}/hyper_cleaning.png")
    print(f"{time.monotonic() - began:.0f} seconds")


if __name__ == "__main__":
    main()
