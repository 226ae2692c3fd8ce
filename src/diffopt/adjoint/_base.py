"""The base class of all ways to differentiate a loop, and the step of `minimize` that they run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._compiler import check_compile
from diffopt._diff.compiled import CompiledStep, Compiler
from diffopt._diff.gradient import HVP, value_and_grad
from diffopt._diff.tasks import Task, for_each, identity
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
        compiler: runs the step compiled.
        used: for each param, False if it is known that the loss does not use it; an empty list is
            filled with that.
    """

    objective: Callable[[Tree, Any], tuple[Tensor, Any]]
    optimizer: Optimizer[Any, Any]
    tol: float | None = None
    second_order: bool = True
    hvp: HVP = "reverse-over-reverse"
    varies: tuple[bool, ...] = ()
    compiler: Compiler | None = None
    used: Sequence[bool] = ()

    def __call__(self, carry: Tree, args: Tree, x: Any) -> tuple[Tree, Any]:
        if self.compiler is not None:
            return self.compiler(self.task(carry, args, x))
        (params, state, buffers), (hparams, inputs), (own, batch) = carry, args, x
        value, (buffers, aux), grads = value_and_grad(
            self.objective,
            params,
            (buffers, inputs, batch),
            second_order=self.second_order,
            hvp=self.hvp,
            varies=self.varies,
        )
        grads = self._without_unused(grads)
        hparams = hparams if own is None else own
        done = None if self.tol is None else within(_tree.leaves(grads), self.tol)
        output = value, aux, done
        known = done is None or not _modes.observed()
        if known and all_done(output):
            return carry, output
        params, state = self.optimizer.update(params, grads, state, hparams)
        if done is None or known:
            return (params, state, buffers), output

        def chosen(old: Any, new: Any) -> Any:
            moved = isinstance(new, Tensor) and new is not old
            return torch.where(done, old, new) if moved else new

        return _tree.map(chosen, carry, (params, state, buffers)), output

    def _without_unused(self, grads: Tree) -> Tree:
        """The gradients, with None for params that are not used, which a trace does not show."""
        if isinstance(self.used, list):
            self.used[:] = [grad is not None for grad in _tree.leaves(grads)]
        if not _modes.compiling() or not self.used:
            return grads
        leaves, spec = _tree.flatten(grads)
        pairs = zip(leaves, self.used, strict=True)
        return _tree.unflatten([grad if use else None for grad, use in pairs], spec)

    def task(self, carry: Tree, args: Tree, x: Any) -> Task:
        """The step, for the compiler."""
        # Not as one that a subclass watches, which runs around what is compiled.
        step = GradientStep(self.objective, self.optimizer, self.tol, self.second_order)
        hparams, inputs = args
        hparams = _exact(hparams, _tree.leaves(carry)[0])
        inputs = carry, (hparams, inputs), *self.elements(carry, [x])
        kind = self.second_order, self.tol is None
        params, _, buffers = map(_tree.count, carry)
        make, params = lambda used: replace(step, used=used), params if self.second_order else 0
        return Task(make, inputs, kind=kind, buffers=buffers, params=params)

    def elements(self, carry: Tree, xs: Iterable[Any]) -> list[Any]:
        """The last of the task's inputs, for each x."""
        like = _tree.leaves(carry)[0]
        return for_each(lambda x: (_exact(x[0], like), x[1]), xs)


def is_compiled(step: Step) -> bool:
    """Whether it runs compiled, as far as is known: then its graph holds little but the carry."""
    compiler = step.compiler if isinstance(step, (GradientStep, CompiledStep)) else None
    return compiler is not None and not compiler.gave_up


def pushforward(
    step: Step,
    inputs: tuple[Tree, Tree, list[Any]],
    size: int,
    tangents: Iterable[Tensor | None],
    direction: Callable[[Any], Tensor | None],
) -> tuple[tuple[Tree, list[Any]], list[Tensor | None]] | None:
    """The compiled results of the steps and their tangents, see `Compiler`; None without that.

    Args:
        step: the step.
        inputs: its first carry, what is the same for all steps, and the x of each.
        size: how many rows a direction has.
        tangents: the directions of the tensors of the carry.
        direction: returns that of a leaf of `args` or `xs`.
    """
    if not isinstance(step, (GradientStep, CompiledStep)) or not (step.compiler and size):
        return None
    (carry, args, xs), given = inputs, iter(tangents)
    rows = [next(given) if isinstance(x, Tensor) else None for x in _tree.leaves(carry)]
    rows += map(direction, _tree.leaves(args))
    of_xs = ([*map(direction, _tree.leaves(x))] for x in xs)
    carry, args, values = _tree.detach(inputs)
    task, elements = step.task(carry, args, values[0]), step.elements(carry, values)
    return step.compiler.pushforward(task, elements, size, rows, of_xs)


def _exact(hparams: Tree, like: Tensor) -> Tree:
    """The hyperparameters as tensors, so that other numbers fit the same compiled step.

    Zero stays a number: rules skip what has no effect, such as a decay of 0. It becomes an integer,
    since a float is a symbol for torch.compile.
    """
    dtype = _modes.exact_dtype(like.device)

    def exact(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            scalar = leaf.dim() == 0 and leaf.is_floating_point()
            return _modes.exact(leaf) if scalar else leaf
        if not isinstance(leaf, (int, float)) or isinstance(leaf, bool):
            return leaf
        return torch.full((), leaf, dtype=dtype, device=like.device) if leaf else 0

    return _tree.map(exact, hparams)


def compiler_of(
    compile: bool | Mapping[str, Any], kind: str, function: Any, optimizer: Any = None
) -> Compiler | None:
    """What runs the steps of a loop compiled, if that is asked for.

    Loops whose functions have the same code and equal optimizers share what is compiled:
    torch.compile tells them apart where they differ otherwise.
    """
    check_compile(compile)
    if compile is False or _modes.compiling():
        return None
    rule = type(optimizer)
    own = rule.__hash__ not in (None, object.__hash__)
    key = identity(function), rule, hash(optimizer) if own else None
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return Compiler(f"{kind} {name}", key, {} if compile is True else compile)


def within(grads: Iterable[Tensor | None], tol: float) -> Tensor:
    """Whether the 2-norm of all gradients is at most this."""
    norms = [torch.linalg.vector_norm(grad.detach()).double() for grad in grads if grad is not None]
    return (norms[0] if len(norms) == 1 else torch.stack(norms).norm()) <= tol


def all_done(output: Any) -> bool:
    """Whether a step of `minimize` is known to have changed nothing, in any sample."""
    done = _modes.concrete(output[2])
    return done is not None and bool(done.all())
