"""Implicit differentiation: the derivative of a solution from the equation it solves.

Any solver can be used, since its steps are not differentiated: if residual(x, *args) = 0, then
dx = -(d_x residual)^-1 (d_args residual) dargs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._arguments import (
    check_bool,
    check_function,
    check_integer,
    check_number,
    check_result,
    explains_keywords,
)
from diffopt._diff.isolation import isolated, refuse_captured
from diffopt._diff.unmodified import Captured
from diffopt._rule import checks
from diffopt._rule.ops import where
from diffopt._tree import Tree
from diffopt.linear import ConjugateGradient, LinearSolution, LinearSolver
from diffopt.linear._base import LinearSystem, constant_solution, operator_of
from diffopt.linear._derivative import Equation, Method, Residual, attach
from diffopt.linear._failure import OnFailure, check_on_failure, fail, refuse_tracing
from diffopt.linear._vectors import (
    Linear,
    all_finite,
    anywhere,
    chosen,
    greatest,
    length,
    magnitude,
    norm,
    ravel,
    ravel_like,
    template,
)
from diffopt.linear.direct import Direct
from diffopt.linear.krylov import GMRES, NormalCG

_UNDER_TRANSFORMS = (
    "This happened inside `solve`, under transforms of torch.func. Tensors that were created "
    "inside the transformed function, or are batched, must be among its arguments. Under vmap, a "
    "solver that leaves torch or branches on values can be called for each sample with "
    "sequential=True."
)


@dataclass(frozen=True)
class ImplicitDerivative:
    """How a solution gets its derivative; for the attributes see `implicit_root`."""

    solver: LinearSolver
    root_tolerance: float = math.inf
    on_failure: OnFailure = "warn"
    on_solve: Callable[[LinearSolution], object] | None = None
    warm_start: Callable[[], Tree] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.solver, LinearSolver):  # pyright: ignore[reportUnnecessaryIsInstance] (of users)
            given = _tree.shown(self.solver)
            raise TypeError(f"solver is {given}, not one of diffopt.linear such as GMRES()")
        if not (isinstance(self.root_tolerance, float) and self.root_tolerance == math.inf):
            check_number(self.root_tolerance, "root_tolerance")
        check_on_failure(self.on_failure)
        check_function(self.on_solve, "on_solve", optional=True)
        check_function(self.warm_start, "warm_start", optional=True)

    def attach(
        self,
        residual: Callable[..., Tree],
        x: Tree,
        *args: Any,
        symmetric: bool = False,
        loss: Callable[..., Any] | None = None,
    ) -> Tree:
        """A known solution x of residual(x, *args) = 0, made differentiable with respect to args.

        Any derivative that x already had is dropped. See `implicit_root` for `symmetric`; with
        `loss`, whose gradient a symmetric residual is, `root_tolerance` bounds the distance of x
        from a solution, relative to max(1, |x|), instead of the residual.
        """
        x = isolated(lambda x: x, x)
        if isinstance(self.solver, (Direct, GMRES, NormalCG)):
            who = f"a {type(self.solver).__name__} (ConjugateGradient supports it)"
            checks.undistributed(x, "x", who)
        vector, unravel = ravel(x, "x")
        inputs, merge = _tree.split(args)
        like = template(x)
        captured = Captured("loss", loss) if loss else Captured("residual", residual)

        def of_vectors(v: Tensor, *inputs: Tensor) -> Tensor:
            result = residual(unravel(v), *merge(inputs))
            return ravel_like(result, like, ("the output of residual", "x"))

        flat = Residual(of_vectors, captured)

        def transposed_at(*point: Tensor) -> Linear:
            captured.check()
            pull = flat.pullback(point, [0])[1]
            return lambda u: pull(u)[0]

        def start(system: Sequence[Tensor]) -> Tensor | None:
            tree = self.warm_start() if self.warm_start else None
            names = "the output of warm_start", "x"
            return None if tree is None else ravel_like(tree, like, names, system)

        finite = not anywhere(~torch.isfinite(vector).all())
        if not finite:
            fail("x is not a solution: it is not finite", self.on_failure)
        evaluate = of_vectors
        if not (_modes.transformed() or _modes.forward_differentiated()):
            needed = [0, *(i for i, y in enumerate(inputs, 1) if y.requires_grad)]
            evaluate = functools.partial(flat.keep, needed)
        refuse_captured(evaluate, captured, vector, *inputs)
        if finite and self.root_tolerance < math.inf:
            self._check(_distance if loss else _residual_norm, flat, vector, inputs)
        solver = self.solver
        jacobian = operator_of(solver, None, transposed_at, unravel, vector, symmetric=symmetric)
        method = Method(functools.partial(constant_solution, solver), unravel, self.on_solve)
        equation = Equation(flat, jacobian, method, start)
        return unravel(attach(equation, vector, *inputs))

    def _check(
        self,
        measure: Callable[..., Tensor],
        residual: Residual,
        x: Tensor,
        inputs: list[Tensor],
    ) -> None:
        """Warn or raise if x is not a solution."""
        size: Tensor = isolated(functools.partial(measure, residual), x, *inputs)
        if anywhere(~(size <= self.root_tolerance)):
            fail(
                f"x is not a solution: {_MEASURED[measure]} {greatest(size):.2g}, above "
                f"root_tolerance={self.root_tolerance:.2g}, so its derivative would be wrong: "
                "solve more accurately (take more steps), or raise root_tolerance",
                self.on_failure,
            )


@explains_keywords
def implicit_root(
    residual: Callable[..., Tree],
    solve: Callable[..., Any],
    *,
    solver: LinearSolver = GMRES(),  # noqa: B008 (frozen)
    symmetric: bool = False,
    has_aux: bool = False,
    sequential: bool = False,
    root_tolerance: float = math.inf,
    on_failure: OnFailure = "warn",
    on_solve: Callable[[LinearSolution], object] | None = None,
    warm_start: Callable[[], Tree] | None = None,
) -> Callable[..., Any]:
    """Make any solver of residual(x, *args) = 0 differentiable.

    The derivative comes from the equation: dx = -(d_x residual)^-1 (d_args residual) dargs. Reverse
    mode solves (d_x residual)^T u = v with `solver`, from matrix-vector products, and returns
    -(d_args residual)^T u for the args. It is differentiable to any order, in reverse and forward
    mode, under autograd and torch.func transforms in any nesting. Memory does not grow with the
    number of steps that `solve` takes; outside transforms the graph of one residual is kept until
    the first backward pass.

    Args:
        residual: `residual(x, *args)`, a tree like x that is zero at a solution. It is
            differentiated by torch.func: if it computes a gradient itself, use torch.func.grad.
            Tensors it closes over are constants; under transforms of torch.func that nest forward
            mode, tensors created inside the transformed function must be arguments.
        solve: `solve(init, *args)` returns x, a tree of real floating-point tensors. It is called
            under torch.no_grad: if it needs gradients it must enable them. Except under vmap its
            arguments are plain tensors, even under torch.func.grad, so it may convert them to
            numpy.
        solver: for the linear systems, one of `diffopt.linear`. `ConjugateGradient` and `Nystrom`
            assume that d_x residual is symmetric, as when the residual is a gradient.
        symmetric: whether d_x residual is symmetric, which saves work with any solver.
        has_aux: whether `solve` returns `(x, aux)`; aux has no derivative.
        sequential: under torch.func.vmap, call `solve` once for each sample, with plain tensors.
            Otherwise it is called once, and torch.func.vmap batches it.
        root_tolerance: the largest residual norm at which x counts as a solution: elsewhere the
            derivative is wrong. Infinite by default: then only nonfinite values are reported.
        on_failure: whether to "warn" or "raise" if the residual at x is larger.
        on_solve: called with the `LinearSolution` of each linear system of a derivative; under vmap
            with those of all samples, with batch dimensions in front.
        warm_start: called before the linear system of a backward pass; returns the initial guess, a
            tree like x such as the last `LinearSolution`'s value, or None for zeros. It saves
            iterations if the problem changes little from one derivative to the next. Under vmap it
            has all batch dimensions in front, as for `on_solve`, or none.

    Returns:
        A function `(init, *args) -> x`, or `-> (x, aux)` with `has_aux`. It is differentiable with
        respect to the tensors in the args, which are trees, but not to init: the solution does not
        depend on the initial guess (torch.func returns zeros, autograd None).

    Raises:
        TypeError: solver is not a `LinearSolver`; residual, solve, `on_solve` or `warm_start` is
            not a function; from the returned function, a leaf of x is not a real floating-point
            tensor, or with `sequential` aux cannot be stacked.
        ValueError: `on_failure` or `root_tolerance` is invalid; residual's output is not a tree
            like x; residual closes over a tensor that needs a gradient or is batched by vmap: pass
            it as an argument (not detected if residual disables gradients itself); or it draws
            random numbers that differ between samples.
        ConvergenceError: with `on_failure="raise"`, here or in `solver`.
        RuntimeError: under torch.compile.

    Examples:
        >>> import torch, diffopt
        >>> from diffopt.implicit import implicit_root
        >>> sqrt = implicit_root(lambda x, a: x**2 - a, lambda init, a: torch.sqrt(a))
        >>> a = torch.tensor(1.0, requires_grad=True)
        >>> x = sqrt(None, a)
        >>> (first,) = torch.autograd.grad(x, a, create_graph=True)
        >>> torch.autograd.grad(first, a)  # -1/4 a^(-3/2)
        (tensor(-0.2500),)
        >>> torch.func.grad(sqrt, argnums=1)(None, torch.tensor(4.0))
        tensor(0.2500)

    Source: Blondel et al., "Efficient and modular implicit differentiation", 2022.
    """
    check_function(residual, "residual")
    derivative = ImplicitDerivative(solver, root_tolerance, on_failure, on_solve, warm_start)
    check_function(solve, "solve")
    check_bool(symmetric, "symmetric")
    check_bool(has_aux, "has_aux")
    check_bool(sequential, "sequential")

    def solution(init: Tree, *args: Any) -> Any:
        refuse_tracing("implicit_root")
        init, args = _tree.plain((init, args))
        try:
            result = isolated(solve, init, *args, plain=True, sequential=sequential)
        except RuntimeError as error:
            if _modes.transformed():
                error.add_note(_UNDER_TRANSFORMS)
            raise
        if not has_aux:
            return derivative.attach(residual, result, *args, symmetric=symmetric)
        x, aux = check_result(result, "solve", "x", "aux")
        return derivative.attach(residual, x, *args, symmetric=symmetric), aux

    return solution


@explains_keywords
def implicit_fixed_point(
    step: Callable[..., Tree],
    solve: Callable[..., Any] | None = None,
    *,
    solver: LinearSolver = GMRES(),  # noqa: B008 (frozen)
    symmetric: bool = False,
    has_aux: bool = False,
    sequential: bool = False,
    root_tolerance: float = math.inf,
    on_failure: OnFailure = "warn",
    on_solve: Callable[[LinearSolution], object] | None = None,
    warm_start: Callable[[], Tree] | None = None,
) -> Callable[..., Any]:
    """Make a solver of x = step(x, *args) differentiable, such as a deep equilibrium model's.

    It is `implicit_root` of x - step(x, *args), whose derivative with respect to x is I - d_x step:
    with `solver=Neumann(k)` the derivative is that through the last k of many steps.

    Args:
        step: `step(x, *args)`, a tree like x.
        solve: see `implicit_root`. If None, `step` is repeated until x no longer changes
            (`fixed_point_iteration`).
        solver: see `implicit_root`.
        symmetric: whether d_x step is symmetric.
        has_aux: see `implicit_root`.
        sequential: see `implicit_root`.
        root_tolerance: see `implicit_root`.
        on_failure: see `implicit_root`.
        on_solve: see `implicit_root`.
        warm_start: see `implicit_root`.

    Returns:
        A function `(init, *args) -> x`, or `-> (x, aux)` with `has_aux`, see `implicit_root`.

    Raises:
        ValueError: see `implicit_root`.

    Examples:
        >>> import torch, diffopt
        >>> from diffopt.implicit import implicit_fixed_point
        >>> layer = implicit_fixed_point(lambda x, a: (x + a / x) / 2)  # Heron's square root
        >>> a = torch.tensor(4.0, requires_grad=True)
        >>> x = layer(torch.tensor(1.0), a)
        >>> x.item(), torch.autograd.grad(x, a)
        (2.0, (tensor(0.2500),))

    Source: Bai, Kolter and Koltun, "Deep equilibrium models", 2019.
    """
    check_function(step, "step")

    def residual(x: Tree, *args: Any) -> Tree:
        vector, unravel = ravel(x, "x")
        after = ravel_like(step(x, *args), x, ("the output of step", "x"))
        return unravel(vector - after)

    if solve is None:
        solve = fixed_point_iteration(step, on_failure=on_failure)
    return implicit_root(
        residual, solve, solver=solver, symmetric=symmetric, has_aux=has_aux,
        sequential=sequential, root_tolerance=root_tolerance, on_failure=on_failure,
        on_solve=on_solve, warm_start=warm_start,
    )  # fmt: skip


@explains_keywords
def fixed_point_iteration(
    step: Callable[..., Tree],
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    max_steps: int = 1000,
    on_failure: OnFailure = "warn",
) -> Callable[..., Tree]:
    """A solver of x = step(x, *args) by fixed-point iteration; not differentiable by itself.

    Args:
        step: `step(x, *args)`, a tree like x.
        rtol: it stops when a step changes x by a norm of at most `max(rtol * norm(x), atol)`; >= 0.
            None is the dtype's machine epsilon to the power 3/4: 1.8e-12 in float64.
        atol: see rtol; >= 0.
        max_steps: the maximum number of steps, >= 1.
        on_failure: whether to "warn" or "raise" if that is not enough, or if x is not finite.

    Returns:
        A function `(init, *args) -> x`, for `implicit_fixed_point`. Under torch.func.vmap each
        sample stops by its own change.

    Raises:
        ValueError: a number is out of its range.
        TypeError: step is not a function.

    Examples:
        >>> import torch, diffopt
        >>> from diffopt.implicit import fixed_point_iteration
        >>> fixed_point_iteration(lambda x: 0.5 * x + 1, max_steps=100)(torch.tensor(0.0))
        tensor(2.0000)
    """
    check_function(step, "step")
    if rtol is not None:
        check_number(rtol, "rtol")
    check_number(atol, "atol")
    check_integer(max_steps, "max_steps", 1)
    check_on_failure(on_failure)

    def solve(init: Tree, *args: Any) -> Tree:
        x, unravel = ravel(init, "init")
        relative = torch.finfo(x.dtype).eps ** 0.75 if rtol is None else rtol
        active = torch.ones((), dtype=torch.bool, device=x.device)
        for _ in range(max_steps):
            after = ravel_like(step(unravel(x), *args), init, ("the output of step", "init"))
            unit = magnitude(after)  # scaled by it, norms stay in the range of the dtype
            change, size = norm((after - x) / unit), norm(after / unit)
            moved = change > torch.maximum(relative * size, size.new_full((), atol) / unit)
            x = torch.where(active, after, x)
            active = active & moved & torch.isfinite(x).all()
            if not anywhere(active):
                break
        else:
            fail(
                f"the fixed-point iteration did not converge in max_steps={max_steps} steps: allow "
                "more, or use another solve",
                on_failure,
            )
        if anywhere(~torch.isfinite(x).all()):
            fail("the fixed-point iteration diverged: x is not finite", on_failure)
        return unravel(x)

    return solve


def _residual_norm(residual: Residual, *point: Tensor) -> Tensor:
    return norm(residual.pullback(point, [0])[0])


def _distance(residual: Residual, x: Tensor, *inputs: Tensor) -> Tensor:
    """A lower bound on |H^-1 r| / max(1, |x|), for the residual r and its derivative H.

    The norms of the iterates of conjugate gradients increase (Steihaug 1983, theorem 2.1), starting
    from |r|^3 / |r^T H r|, which is used alone if the curvature is not positive.
    """
    r, pull = residual.pullback((x, *inputs), [0])

    def product(v: Tensor) -> Tensor:
        return pull(v)[0]

    def same(v: Tensor) -> Tensor:
        return v

    size = length(r)  # a number where there is one sample, as in `krylov`
    b = chosen(size > 0, r / size, 0.0)
    system = LinearSystem(product, lambda: product, same, same, b, b.new_full((), 0.1))
    # One cycle alone, without the product that tells how exact it was.
    cycle = ConjugateGradient()._cycle  # pyright: ignore[reportPrivateUsage] (of this package)
    step = cycle(system, torch.zeros_like(b), b, size > 0, 0.1, 10).x
    reached = chosen(all_finite(step), norm(step), 0.0)
    if anywhere(reached == 0):
        reached = torch.where(reached > 0, reached, 1 / (b @ product(b)).abs())
    return where(size > 0, size * reached, size) / norm(x).clamp(min=1)


_MEASURED = {
    _residual_norm: "the norm of its residual is",
    _distance: "its distance from one, in units of max(1, |x|), is estimated to be",
}
