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
from diffopt.testing._derivatives import smooth


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
    """`torch.compile(fullgraph=True)` of a step and of its gradient equals eager mode.

    Both are results of one trace. The gradient is that of all results with respect to all inputs,
    those of later steps included.
    """
    point = generic_point(case)
    leaves, spec = _tree.flatten(point)
    chosen = [i for i, _ in smooth(point, "point")]

    def outer(inputs: list[Tensor]) -> tuple[Tensor, Any]:
        values = list(leaves)
        for i, value in zip(chosen, inputs, strict=True):
            values[i] = value
        results = case.optimizer.update(*_tree.unflatten(values, spec))
        return objective([x for x in _tree.leaves(results) if x.is_floating_point()]), results

    function = torch.func.grad(outer, has_aux=True)
    inputs = [leaves[i] for i in chosen]
    torch.compiler.reset()
    traced = torch.compile(function, backend=case.backend, fullgraph=True)
    same(traced(inputs), function(inputs), "the compiled result", rtol=1e-9)
    torch.compiler.reset()


def stack(trees: Sequence[Tree]) -> Tree:
    return _tree.map(lambda *leaves: torch.stack(leaves), *trees)
