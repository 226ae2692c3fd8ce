"""The base class of all ways to differentiate a loop, and the step of `minimize` that they run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffopt import _tree
from diffopt._diff.gradient import HVP, value_and_grad
from diffopt._tree import Tree
from diffopt.optimizer import Optimizer

Step: TypeAlias = Callable[[Tree, Tree, Any], tuple[Tree, Any]]
"""`(carry, args, x) -> (carry, output)`"""


class Adjoint(ABC):
    """How a loop of steps is run and differentiated.

    To write your own, subclass it with a method `run`. That may call `step` any number of times,
    also with other tensors in the same places: a step is pure. `minimize` passes a `GradientStep`,
    which has the loss and the optimizer as attributes; its carry is a tuple of trees.

    Examples:
        >>> import torch, diffopt
        >>> class LastHalf(diffopt.adjoint.Adjoint):  # the first half of the steps are constants
        ...     def run(self, step, carry, args, xs):
        ...         xs, outputs = list(xs), []
        ...         for t, x in enumerate(xs):
        ...             if 2 * t == len(xs):
        ...                 carry = diffopt.detach(carry)
        ...             carry, output = step(carry, args, x)
        ...             outputs.append(output)
        ...         return carry, outputs
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> opt = diffopt.sgd()
        >>> sol = diffopt.minimize(
        ...     lambda w: 0.5 * w**2, torch.tensor(1.0), optimizer=opt,
        ...     hparams=opt.hparams(lr=lr), steps=4, adjoint=LastHalf(),
        ... )
        >>> torch.autograd.grad(sol.params, lr)  # -2 (1 - lr)^3; exact: twice that
        (tensor(-1.4580),)
    """

    @abstractmethod
    def run(self, step: Step, carry: Tree, args: Tree, xs: Iterable[Any]) -> tuple[Tree, list[Any]]:
        """Run `carry, output = step(carry, args, x)` for every `x` of `xs`.

        Args:
            step: a pure function.
            carry: a pytree of tensors.
            args: what is the same at every step. Every tensor to be differentiated with respect to
                is in the carry, here or in `xs`.
            xs: one tree per step; read once, in order.

        Returns:
            The last carry, and the outputs of all steps.
        """


def check_adjoint(value: object) -> None:
    """Raise unless it is an adjoint."""
    if not isinstance(value, Adjoint):
        raise TypeError(
            f"adjoint is {_tree.shown(value)}, not one of diffopt.adjoint such as Unrolled()"
        )


@dataclass(frozen=True, eq=False)  # torch.compile (< 2.13) hashes it when it has no attributes yet
class GradientStep:
    """A step of `minimize`: the gradient of a loss, and an optimizer's update with it.

    The carry is `(params, state, buffers)`, `args` is `(hparams, further arguments of the loss)`,
    `x` is `(the step's own hparams or None, its batch as a tuple)`, and the output `(value, aux,
    done)`, where `done` is None without `tol`.

    Attributes:
        objective: `objective(params, (buffers, args, batch))` returns `(value, (buffers, aux))`.
        optimizer: the optimizer.
        tol: a step changes nothing if the norm of the gradient is at most this.
        second_order: whether gradients are differentiable. False drops the second derivatives of
            the loss.
        hvp: how the derivative of a gradient is computed, see `Checkpointed`.
        varies: for the first tensors of the buffers, False if one is known to be constant.
    """

    objective: Callable[[Tree, Any], tuple[Tensor, Any]]
    optimizer: Optimizer[Any, Any]
    tol: float | None = None
    second_order: bool = True
    hvp: HVP = "reverse-over-reverse"
    varies: tuple[bool, ...] = ()

    def __call__(self, carry: Tree, args: Tree, x: Any) -> tuple[Tree, Any]:
        (params, state, buffers), (hparams, inputs), (own, batch) = carry, args, x
        value, (buffers, aux), grads = value_and_grad(
            self.objective,
            params,
            (buffers, inputs, batch),
            second_order=self.second_order,
            hvp=self.hvp,
            varies=self.varies,
        )
        hparams = hparams if own is None else own
        params, state = self.optimizer.update(params, grads, state, hparams)
        if self.tol is None:
            return (params, state, buffers), (value, aux, None)
        done = _norm(grads) <= self.tol

        def chosen(old: Any, new: Any) -> Any:
            moved = isinstance(new, Tensor) and new is not old
            return torch.where(done, old, new) if moved else new

        return _tree.map(chosen, carry, (params, state, buffers)), (value, aux, done)


def _norm(tree: Tree) -> Tensor:
    """The 2-norm of all leaves, without None."""
    leaves = [leaf.detach() for leaf in _tree.leaves(tree) if leaf is not None]
    return torch.stack([torch.linalg.vector_norm(leaf).double() for leaf in leaves]).norm()
