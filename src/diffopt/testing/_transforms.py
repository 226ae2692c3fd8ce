"""Checks of torch.vmap and torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt import _tree
from diffopt._tree import Tree
from diffopt.testing._assertions import same
from diffopt.testing._case import Case, Point, generic_point, objective, run_steps


def vmap(case: Case) -> None:
    """Stacked models, each with its own hyperparameters, step and differentiate as in a loop."""
    models = [
        point._replace(hparams=_tree.map(lambda v, i=i: v * (1 - 0.1 * i), point.hparams))
        for i, point in enumerate(generic_point(case, seed) for seed in range(3))
    ]
    stacked = stack(models)

    def gradient(point: Point) -> Any:
        def outer(inputs: Any) -> Tensor:
            params, grads, hparams = inputs
            return objective(run_steps(case, Point(params, grads, point.state, hparams))[0])

        return torch.func.grad(outer)((point.params, point.grads, point.hparams))

    for function in (functools.partial(run_steps, case), gradient):
        batched = torch.vmap(function)(stacked)
        same(batched, stack([function(model) for model in models]), "the result of vmap")


def compiled(case: Case) -> None:
    """`torch.compile(fullgraph=True)` of a step and of a meta-gradient equals eager mode."""
    point = generic_point(case)

    def outer(hparams: Any) -> Tensor:
        return objective(run_steps(case, point._replace(hparams=hparams))[0])

    for function, arguments in (
        (case.optimizer.update, tuple(point)),
        (torch.func.grad(outer), (point.hparams,)),
    ):
        torch.compiler.reset()
        traced = torch.compile(function, backend=case.backend, fullgraph=True)
        same(traced(*arguments), function(*arguments), "the compiled result", rtol=1e-9)
    torch.compiler.reset()


def stack(trees: Sequence[Tree]) -> Tree:
    return _tree.map(lambda *leaves: torch.stack(leaves), *trees)
