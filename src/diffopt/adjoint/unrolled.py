"""Reverse mode through the whole loop, and the same without second derivatives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from diffopt._tree import Tree
from diffopt.adjoint._base import Adjoint, GradientStep, Step


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Exact: autograd keeps the graph of every step. Memory grows with the number of steps.

    Derivatives of any order reach the initial parameters, state and buffers, every tensor
    hyperparameter, the loss's arguments, the batches, and tensors the loss closes over.

    Example:
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
        outputs: list[Any] = []
        for x in xs:
            carry, output = step(carry, args, x)
            outputs.append(output)
        return carry, outputs


@dataclass(frozen=True)
class FirstOrder(Unrolled):
    """The whole loop with the second derivatives of the loss dropped: first-order MAML.

    A step's gradient is taken as a constant. Gradients to the initial parameters and state and to
    the hyperparameters still arrive: for SGD the former is the gradient at the adapted parameters.
    Nothing arrives at what acts through the loss alone (its arguments, the batches, tensors it
    closes over), and `losses`, `aux` and `buffers` come back as constants.

    Example:
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
            raise TypeError("FirstOrder is for minimize: another step has no gradient to hold")
        return super().run(replace(step, second_order=False), carry, args, xs)
