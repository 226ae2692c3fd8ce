"""Reverse mode through the whole loop, and the same without second derivatives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from diffopt._tree import Tree
from diffopt.adjoint._base import Adjoint, GradientStep, Step
from diffopt.adjoint._steps import taken


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Exact: autograd keeps the graph of every step. Memory grows with the number of steps.

    There are derivatives of any order with respect to the initial params, state and buffers, every
    tensor hyperparameter, the loss's arguments, the batches, and tensors that the loss closes over.

    Examples:
        >>> import torch, diffopt
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> opt = diffopt.sgd()
        >>> sol = diffopt.minimize(
        ...     lambda w: 0.5 * w**2, torch.tensor(1.0), optimizer=opt,
        ...     hparams=opt.hparams(lr=lr), steps=2, adjoint=diffopt.adjoint.Unrolled(),
        ... )
        >>> torch.autograd.grad(sol.params, lr)  # w = (1 - lr)^2
        (tensor(-1.8000),)
    """

    def run(self, step: Step, carry: Tree, args: Tree, xs: Iterable[Any]) -> tuple[Tree, list[Any]]:
        return taken(step, carry, args, xs)


@dataclass(frozen=True)
class FirstOrder(Unrolled):
    """Biased: the whole loop without the second derivatives of the loss, as in first-order MAML.

    A step's gradient is treated as a constant. There are still gradients with respect to the
    initial params and state and the hyperparameters: for SGD the first is the gradient at the
    adapted params. What acts only through the loss (its arguments, the batches, tensors it closes
    over) gets no gradient, and `losses`, `aux` and `buffers` are constants.

    Examples:
        >>> import torch, diffopt
        >>> w = torch.tensor(1.0, requires_grad=True)
        >>> opt = diffopt.sgd()
        >>> sol = diffopt.minimize(
        ...     lambda w: 0.5 * w**2, w, optimizer=opt,
        ...     hparams=opt.hparams(lr=0.1), steps=2, adjoint=diffopt.adjoint.FirstOrder(),
        ... )
        >>> torch.autograd.grad(sol.params, w)  # exact: (1 - 0.1)^2
        (tensor(1.),)

    Source: Finn, Abbeel and Levine, "Model-agnostic meta-learning for fast adaptation of deep
    networks", 2017, section 5.2.
    """

    def run(self, step: Step, carry: Tree, args: Tree, xs: Iterable[Any]) -> tuple[Tree, list[Any]]:
        if not isinstance(step, GradientStep):
            raise TypeError("FirstOrder requires minimize: other steps have no gradient")
        return super().run(replace(step, second_order=False), carry, args, xs)
