"""The derivative of the last step, used in place of that of the solution."""

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
    """Biased, at the cost of one step: the derivative of the last step alone.

    A loop x_{t+1} = F(x_t, theta) that has converged has the derivative of its fixed point,
    (I - d_x F)^-1 d_theta F. OneStep gives d_theta F(x_{K-1}, theta), with x_{K-1} held fixed:
    exact if the steps converge superlinearly, as Newton's do; otherwise the relative error is up to
    rho = |d_x F| < 1, the factor by which a step contracts the error (near 1 for gradient descent
    with a small learning rate). The derivative takes the time and memory of one step.

    There are gradients with respect to hyperparameters, arguments and tensors that the loss closes
    over, and those batches and hyperparameters that the last step uses. The initial params, state
    and buffers receive none, even with a single step or none at all, since a fixed point does not
    depend on them. If `tol` ends an example before others under vmap, the step is one more from its
    solution. Values are those of the whole loop; of `losses` and `aux` only the last entry has a
    derivative.

    It is differentiable once, in reverse or forward mode: the second derivative of one step is far
    from that of the solution even where the first is exact, and raises (except under
    torch.compile). The derivative of a vector-Jacobian product with respect to its vector does not
    raise.

    Raises:
        NotImplementedError: for a second derivative.

    Examples:
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
    "OneStep has no second derivative, since that of the last step is not that of the solution: "
    "use Unrolled() or Checkpointed()"
)


def _never_done(step: GradientStep) -> Step:
    """The step with the same values, but the derivative that it has without `tol`."""

    def run(carry: Tree, args: Tree, x: Any) -> tuple[Tree, Any]:
        ambient = functions.AmbientState((carry, args, x))
        kept, output = step(carry, args, x)
        if not _modes.differentiable():
            return kept, output
        with ambient.restored():
            moved, _ = replace(step, tol=None)(carry, args, x)

        def derivative_of(moved: Any, kept: Any) -> Any:
            if not isinstance(moved, Tensor) or not _modes.has_derivative(moved):
                return kept
            return kept.detach() + (moved - moved.detach())

        return _tree.map(derivative_of, moved, kept), output

    return run
