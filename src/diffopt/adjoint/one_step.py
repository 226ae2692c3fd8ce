"""The derivative of the last step in place of that of the solution."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diffopt import _modes, _tree
from diffopt._diff import functions
from diffopt._tree import Tree
from diffopt.adjoint._base import Adjoint, GradientStep, Step
from diffopt.adjoint._limited import first_order
from diffopt.adjoint.truncated import Truncated


@dataclass(frozen=True)
class OneStep(Adjoint):
    """The derivative of the last step alone is taken for that of the solution.

    A loop x_{t+1} = F(x_t, theta) that has converged has the derivative of its fixed point,
    (I - d_x F)^-1 d_theta F. OneStep gives d_theta F(x_{K-1}, theta), with x_{K-1} held fixed:
    exact where steps converge superlinearly, as Newton's do; otherwise, with a contraction rate
    rho = |d_x F| < 1, it lacks a share of at most rho of the derivative. Gradient descent at small
    rates has a rho near 1. Time and memory of the derivative are those of one step.

    Gradients reach hyperparameters, arguments and tensors that the loss closes over, and of what
    differs from step to step that of the last one. The initial parameters, state and buffers
    receive none, also if there is but one step or none at all, since a fixed point does not depend
    on them. Where, under vmap, `tol` ends an example before others, the step is one more from its
    solution. Values are those of the whole loop; of `losses` and `aux` those of the last step alone
    have derivatives.

    It is differentiable once, in reverse or forward mode: the derivative of the derivative of one
    step is far from a second derivative of the solution even where the first is exact, and raises
    (but for torch.compile, which does not notice). The derivative of a vector-Jacobian
    product with respect to its vector does not.

    Raises:
        NotImplementedError: when a second derivative is asked for.

    Example:
        >>> import torch, diffopt
        >>> target = torch.tensor(2.0, requires_grad=True)
        >>> opt = diffopt.sgd()
        >>> sol = diffopt.minimize(
        ...     lambda w, target: 0.5 * (w - target) ** 2, torch.tensor(1.0), target,
        ...     optimizer=opt, hparams=opt.hparams(lr=0.9), steps=20,
        ...     adjoint=diffopt.adjoint.OneStep(),
        ... )
        >>> torch.autograd.grad(sol.params, target)  # lr; exact: 1 - (1 - lr)^20
        (tensor(0.9000),)

    Source: Bolte, Pauwels and Vaiter, "One-step differentiation of iterative algorithms", 2023.
    """

    def run(self, step: Step, carry: Tree, args: Tree, xs: Iterable[Any]) -> tuple[Tree, list[Any]]:
        if isinstance(step, GradientStep) and step.tol is not None:
            step = _never_done(step)
        carry, outputs = Truncated(1).run(step, _tree.detach(carry), args, xs)
        return first_order((carry, outputs), _NO_SECOND_DERIVATIVE)


_NO_SECOND_DERIVATIVE = (
    "OneStep has no second derivative: that of the last step is not that of a solution. Unrolled "
    "and Checkpointed have one"
)


def _never_done(step: GradientStep) -> Step:
    """The same values, with the derivative that the step has without its `tol`."""

    def run(carry: Tree, args: Tree, x: Any) -> tuple[Tree, Any]:
        surroundings = functions.Surroundings((carry, args, x))
        kept, output = step(carry, args, x)
        if not _modes.differentiable():
            return kept, output
        with surroundings.restored():
            moved, _ = replace(step, tol=None)(carry, args, x)

        def derivative_of(moved: Any, kept: Any) -> Any:
            if not isinstance(moved, Tensor) or not functions.has_derivative(moved):
                return kept
            return kept.detach() + (moved - moved.detach())

        return _tree.map(derivative_of, moved, kept), output

    return run
