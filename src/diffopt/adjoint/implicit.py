"""The derivative of a minimum, from its optimality condition instead of the loop."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._diff import functions
from diffopt._diff.captured import detach_constants
from diffopt._diff.gradient import value_and_grad
from diffopt._diff.tasks import Task
from diffopt._diff.unmodified import kept, noted, unwritten
from diffopt._rule import checks, hyper
from diffopt._rule.leafwise import Leafwise
from diffopt._rule.rule import is_ours
from diffopt._tree import Tree
from diffopt.adjoint._base import Adjoint, GradientStep, Step, all_done
from diffopt.adjoint._limited import without_derivative
from diffopt.adjoint.truncated import Truncated
from diffopt.implicit import ImplicitDerivative
from diffopt.linear import ConjugateGradient, LinearSolver
from diffopt.optimizer import Optimizer


@dataclass(frozen=True)
class Implicit(ImplicitDerivative, Adjoint):
    """The implicit function theorem at a stationary point of the loss.

    With g(x, args) the gradient of the loss with respect to params, g(x, args) = 0 gives
    dx = -(d_x g)^-1 (d_args g) dargs: a linear system with the Hessian, of which `solver` needs
    only products with vectors. The loop builds no graph, so memory does not depend on the number of
    steps, and it may stop early (`tol=`). The graph of one gradient is kept, from the end of the
    loop to the first backward pass.

    There are derivatives of any order, in reverse and forward mode, with respect to the loss's
    arguments and the batches. The minimum does not depend on the initial params nor on the learning
    rate: those derivatives are zero. Differentiating `sol.losses`, `sol.state`, `sol.aux` or
    `sol.buffers` raises. With `batches` the loss is the mean over the distinct ones. A random loss
    (dropout) has no stationary point. A parameter that the loss does not use keeps its initial
    value and the derivative of that; for `on_solve` and `warm_start` it has no elements, and a
    complex parameter is a pair of reals.

    Args:
        solver: for the linear systems, one of `diffopt.linear`: `ConjugateGradient` where the
            Hessian is positive definite, `GMRES` elsewhere, `Direct` for small problems.
        root_tolerance: how far from a stationary point the loop may end, relative to max(1,
            |params|): elsewhere the derivative is wrong. The distance is |H^-1 g|, with the Hessian
            H and the gradient g of the loss; it is estimated, from below, by at most ten iterations
            of conjugate gradients. Infinity skips the check.
        on_failure: whether to "warn" or "raise" if it is farther away. For linear systems that are
            not solved, see the solver's own `on_failure`.
        on_solve: called with the `LinearSolution` of each linear system: residual, iterations.
        warm_start: called before the linear system of a backward pass; returns its initial guess, a
            tree like params, or None for zeros. The system changes little between outer steps, so
            its last solution, which `on_solve` receives, is a good guess.

    Raises:
        ValueError: `root_tolerance` or `on_failure` is invalid; `run`: the optimizer moves params
            whose gradient is zero (weight decay: put it into the loss instead); the loss closes
            over a tensor that needs a gradient.
        TypeError: the solver is not a `LinearSolver`, or `on_solve` or `warm_start` is not a
            function; `run`: the step is not one of `minimize` (use `diffopt.implicit_fixed_point`).
        ConvergenceError: with `on_failure="raise"`.

    Examples:
        >>> import torch, diffopt
        >>> def loss(w, decay):
        ...     return 0.5 * (w - 3) ** 2 + 0.5 * decay * w**2
        >>> decay = torch.tensor(0.5, requires_grad=True)
        >>> opt = diffopt.sgd()
        >>> sol = diffopt.minimize(
        ...     loss, torch.tensor(0.0), decay, optimizer=opt, hparams=opt.hparams(lr=0.5),
        ...     steps=100, adjoint=diffopt.adjoint.Implicit(),
        ... )
        >>> torch.autograd.grad(sol.params, decay)  # w = 3 / (1 + decay)
        (tensor(-1.3333),)

    Sources: Bengio, "Gradient-based optimization of hyperparameters", 2000; Rajeswaran et al.,
    "Meta-learning with implicit gradients", 2019.
    """

    solver: LinearSolver = ConjugateGradient()  # noqa: RUF009 (frozen)
    root_tolerance: float = 1e-3

    def run(self, step: Step, carry: Tree, args: Tree, xs: Iterable[Any]) -> tuple[Tree, list[Any]]:
        if not isinstance(step, GradientStep):
            raise TypeError("Implicit requires minimize: use implicit_fixed_point for other steps")
        if not isinstance(self.solver, ConjugateGradient):
            who = f"Implicit with a {type(self.solver).__name__} (ConjugateGradient does)"
            checks.undistributed(carry[0], "params", who)
        # With a tolerance no more of an iterator are read than there are steps.
        whole = step.tol is None or isinstance(xs, list)
        pairs, again = itertools.tee(() if whole else noted(xs))
        xs = kept(xs) if whole else (x for x, _ in pairs)
        end, outputs = Truncated(0).run(step, carry, args, xs)
        n = len(outputs) - (len(outputs) > 1 and all_done(outputs[-1]))
        xs = xs[:n] if isinstance(xs, list) else unwritten(itertools.islice(again, n))
        if not _modes.differentiable() or not xs:
            return end, outputs
        (params, state, buffers), (hparams, inputs) = end, args
        own = [own for own, _ in xs if own is not None]
        batches = _distinct(batch for _, batch in xs)
        _refuse_decay(step.optimizer, params, own[-1] if own else hparams)

        def loss(params: Tree, rest: Tree) -> Tensor:
            inputs, batches, buffers = rest
            values = [step.objective(params, (buffers, inputs, batch))[0] for batch in batches]
            return values[0] if len(values) == 1 else torch.stack(values).mean()

        rest = inputs, batches, buffers
        unknowns, merge = _unknowns(loss, params, carry[0], rest)
        gradient = _compiled(step, lambda unknowns, rest: loss(merge(unknowns), rest))
        unknowns = self.attach(gradient, unknowns, rest, symmetric=True, loss=step.objective)
        params = merge(functions.independent(unknowns, (carry, hparams, own)))
        message = "Implicit gives derivatives of sol.params, not of losses, state, aux or buffers"
        values, aux, done = zip(*outputs, strict=True)
        has_aux = any(x is not None for x in aux)
        results = state, buffers, torch.stack(values), [*aux] if has_aux else []
        sources = carry, args, own, batches
        state, buffers, losses, shown = without_derivative(results, sources, message)
        outputs = [*zip(losses.unbind(), shown if has_aux else aux, done, strict=True)]
        return (params, state, detach_constants(buffers, step, carry, args, xs)), outputs


def _compiled(step: GradientStep, loss: Callable[[Tree, Tree], Tensor]) -> Callable[..., Tree]:
    """The gradient of a loss `(params, rest)`, compiled if the step is."""
    compiler = step.compiler
    if compiler is None:

        def eager(params: Tree, rest: Tree) -> Tree:
            grads = value_and_grad(lambda *x: (loss(*x), ()), params, rest)[2]
            return _tree.map(lambda p, g: torch.zeros_like(p) if g is None else g, params, grads)

        return eager

    def gradient(_: Tree, params: Tree, rest: Tree) -> Tree:
        return torch.func.grad(loss)(params, rest)

    return lambda params, rest: compiler(
        Task(lambda used: gradient, ((), params, rest), kind="gradient")
    )


def _distinct(batches: Iterable[Any]) -> list[Any]:
    """The distinct batches."""
    objects = {id(batch): batch for batch in batches}.values()
    return list({tuple(map(id, _tree.leaves(batch))): batch for batch in objects}.values())


def _unknowns(
    loss: Callable[[Tree, Tree], Tensor], params: Tree, start: Tree, rest: Tree
) -> tuple[Tree, Callable[[Tree], Tree]]:
    """The params that the loss uses as a tree of reals, and a function from such a tree to params.

    A parameter that the loss does not use still has its initial value, and has no equation.
    """
    leaves, spec = _tree.flatten(params)
    used = [True]  # had the loss used no parameter, its first step would have raised
    if len(leaves) > 1:
        results = value_and_grad(lambda *x: (loss(*x), ()), params, rest, second_order=False)
        used = [grad is not None for grad in _tree.leaves(results[2])]
    pairs = [leaf.is_complex() for leaf in leaves]
    starts = _tree.leaves_like(start, spec, params, ("params", "params"))

    def reals(leaf: Tensor, use: bool) -> Tensor:
        return _modes.real(leaf) if use else leaf.real.new_empty(0)

    def merge(unknowns: Tree) -> Tree:
        parts = zip(starts, used, pairs, _tree.leaves(unknowns), strict=True)
        return _tree.unflatten(
            [
                p if not use else torch.complex(*x.unbind(-1)) if pair else x
                for p, use, pair, x in parts
            ],
            spec,
        )

    return _tree.unflatten(list(map(reals, leaves, used)), spec), merge


def _refuse_decay(optimizer: Optimizer[Any, Any], params: Tree, hparams: Any) -> None:
    """Raise if params move although the gradient is zero, or would for other tensor hparams."""
    with torch.no_grad():
        if _known_moves(optimizer, params, hparams):
            raise ValueError(
                "the optimizer moves params whose gradient is zero (by weight decay?), so it does "
                "not end at a stationary point of the loss: put the decay into the loss"
            )


def _known_moves(optimizer: Optimizer[Any, Any], params: Tree, hparams: Any) -> bool:
    """`_moves`; with numbers for a rule of this package it depends on little, and is remembered."""
    leaves = _tree.leaves(params)
    ours = isinstance(optimizer, Leafwise) and is_ours(optimizer)
    if ours and _modes.all_plain(leaves) and {*map(type, vars(hparams).values())} <= {int, float}:
        kinds = tuple((x.shape, x.dtype, x.device) for x in leaves)
        return _moves_ones(optimizer, tuple(vars(hparams).values()), kinds)
    return _moves(optimizer, params, hparams)


@functools.lru_cache(maxsize=256)
def _moves_ones(optimizer: Any, numbers: tuple[float, ...], kinds: tuple[Any, ...]) -> bool:
    params = [torch.ones(shape, dtype=dtype, device=device) for shape, dtype, device in kinds]
    return _moves(optimizer, params, hyper.assemble(optimizer.hparams, numbers))


def _moves(optimizer: Optimizer[Any, Any], params: Tree, hparams: Any) -> bool:
    """Whether params move although the gradient is zero, or would for other tensor hparams."""

    def other(leaf: Tensor) -> Tensor:
        return 0.05 + 0.9 * leaf

    def movable(leaf: Tensor) -> Tensor:  # decay has no effect at zero or infinity
        return torch.where(torch.isfinite(leaf) & (leaf != 0), leaf, 1.0)

    params = _tree.map(movable, params)
    zeros = _tree.map(torch.zeros_like, params)
    hparams = _tree.map_tensors(other, _tree.detach(hparams))
    moved, _ = optimizer.update(params, zeros, optimizer.init(params), hparams)
    pairs = zip(_tree.leaves(params), _tree.leaves(moved), strict=True)
    return any(_modes.holds_anywhere(before != after) for before, after in pairs)
