"""The base class of linear solvers: their call, their tolerances and their derivative."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._arguments import check_function, check_keywords, check_number
from diffopt._diff.isolation import refuse_captured
from diffopt._diff.unmodified import Captured
from diffopt._tree import Tree
from diffopt.linear._derivative import LinearSolution, Method, Operator, solve
from diffopt.linear._failure import OnFailure, check_on_failure, fail, refuse_tracing
from diffopt.linear._vectors import (
    Linear,
    all_finite,
    anywhere,
    chosen,
    greatest,
    magnitude,
    norm,
    number,
    ravel,
    ravel_like,
    template,
)


@dataclass(frozen=True)
class LinearSystem:
    """A x = b for vectors, the argument of `LinearSolver.run`.

    Attributes:
        matvec: v -> (A + damping I) v.
        transposed: returns the function v -> (A + damping I)^T v.
        precondition: v -> M^-1 v, the identity without a preconditioner.
        adjoint_precondition: v -> M^-T v.
        b: the right-hand side, scaled to a magnitude near 1 so that its products stay in range.
        tolerance: the residual norm to reach, a 0-d tensor.
    """

    matvec: Linear
    transposed: Callable[[], Linear]
    precondition: Linear
    adjoint_precondition: Linear
    b: Tensor
    tolerance: Tensor

    def residual(self, x: Tensor) -> Tensor:
        """The vector b - A x."""
        return self.b - self.matvec(x)


class Run(NamedTuple):
    """What `LinearSolver.run` returns.

    Attributes:
        x: the approximate solution, a vector.
        iterations: a 0-d integer tensor.
        obstacle: why it stopped early, for the message; empty if unknown.
        residual: the vector b - A x, computed from x; None if it has to be computed.
    """

    x: Tensor
    iterations: Tensor
    obstacle: str = ""
    residual: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LinearSolver(ABC):
    """Solves (A + damping I) x = b for an operator A given by matrix-vector products.

    To write your own, subclass it as a frozen dataclass with a method `run(system, x0, residual)`.
    That works on vectors and need not be differentiable. To work under torch.func.vmap, where each
    sample is a system, it must not branch on the values of tensors except through `anywhere`.

    Args:
        rtol: it has converged if the residual norm is at most `max(rtol * norm(b), atol)`; >= 0.
            None is the square root of the dtype's machine epsilon: 1.5e-8 in float64, 3.5e-4 in
            float32.
        atol: see rtol; >= 0.
        damping: adds `damping * I` to A; >= 0.
        on_failure: if the tolerance is not met, "warn" emits a `ConvergenceWarning` and "raise"
            raises a `ConvergenceError`.

    Raises:
        ValueError: an argument is out of range, or `on_failure` is not "warn" or "raise".
    """

    rtol: float | None = None
    atol: float = 0.0
    damping: float = 0.0
    on_failure: OnFailure = "warn"

    symmetric: ClassVar[bool] = False
    """Whether the solver assumes that A is symmetric."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # those of __init__
        if not _modes.compiling():
            check_keywords(cls, [field.name for field in fields(cls)], kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.rtol is not None:
            check_number(self.rtol, "rtol")
        check_number(self.atol, "atol")
        check_number(self.damping, "damping")
        check_on_failure(self.on_failure)

    @abstractmethod
    def run(self, system: LinearSystem, x0: Tensor, residual: Tensor) -> Run:
        """Approximate the solution.

        Args:
            system: the linear system, with damping and tolerance.
            x0: the initial guess, a vector like `system.b`.
            residual: the residual at x0.

        Returns:
            The approximation; the caller computes and checks its residual.
        """

    def solve(
        self,
        operator: Callable[..., Tree],
        b: Tree,
        x0: Tree = None,
        *,
        operands: tuple[Any, ...] = (),
        transpose: Callable[..., Tree] | None = None,
    ) -> LinearSolution:
        """Solve A x = b; differentiable with respect to b and the operands, any number of times.

        The derivative is dx = A^-1 (db - dA x): it takes another solve, instead of going through
        the steps of this one. Works under autograd and torch.func transforms; under vmap each
        sample stops by its own residual.

        Args:
            operator: `operator(v, *operands)` is A v, linear in v: a tree like v.
            b: a tree of real floating-point tensors.
            x0: the initial guess, a tree like b; zeros if None. It has no derivative.
            operands: the trees that A depends on and that derivatives are taken with respect to.
            transpose: `transpose(v, *operands)` is A^T v. Derived from `operator` if None.

        Returns:
            A `LinearSolution`. If b is not finite its value is NaN, and it has not converged.

        Raises:
            TypeError: a leaf of b is not a real floating-point tensor; `operator` is not a
                function.
            ValueError: the structures or shapes of trees do not match; `operator` closes over a
                tensor that needs a gradient: make it an operand.
            ConvergenceError: with `on_failure="raise"`.
            RuntimeError: under torch.compile, since the number of iterations depends on values.
        """
        refuse_tracing("a linear solver")
        check_function(operator, "operator")
        check_function(transpose, "transpose", optional=True)
        vector, unravel = ravel(b, "b")
        start = None if x0 is None else ravel_like(x0, b, ("x0", "b"))
        tensors, merge = _tree.split(operands)
        like, captured = template(b), Captured("operator", operator, transpose)

        def product(name: str, function: Callable[..., Tree], *point: Tensor) -> Linear:
            def multiply(v: Tensor) -> Tensor:
                captured.check()
                result = function(unravel(v), *merge(point))
                return ravel_like(result, like, (f"the output of {name}", "b"))

            return multiply

        at = partial(product, "operator", operator)
        transposed_at = partial(product, "transpose", transpose) if transpose else None
        refuse_captured(lambda v, *point: at(*point)(v), captured, vector, *tensors)
        matrix = operator_of(self, at, transposed_at, unravel, vector)
        method = Method(partial(constant_solution, self), unravel)
        solution = solve(method, matrix, vector, start, *tensors)
        return solution._replace(value=unravel(solution.value))


def operator_of(
    solver: LinearSolver,
    at: Callable[..., Linear] | None,
    transposed_at: Callable[..., Linear] | None,
    unravel: Callable[[Tensor], Tree],
    like: Tensor,
    *,
    symmetric: bool = False,
) -> Operator:
    """The damped operator of a solver, given products with the operator or with its adjoint."""
    n, dtype, device = like.numel(), like.dtype, like.device  # not `like`, to free it

    def adjoint(linear: Linear) -> Linear:
        pull = torch.func.vjp(linear, torch.zeros(n, dtype=dtype, device=device))[1]
        return lambda vector: pull(vector)[0]

    def damped(at: Callable[..., Linear]) -> Callable[..., Linear]:
        def sum_at(*point: Tensor) -> Linear:
            linear = at(*point)
            return lambda v: linear(v) + solver.damping * v

        return sum_at if solver.damping else at

    preconditioner = cast("Callable[[Tree], Tree] | None", getattr(solver, "preconditioner", None))

    def precondition(vector: Tensor) -> Tensor:
        if preconditioner is None:
            return vector
        tree = unravel(vector)
        return ravel_like(preconditioner(tree), tree, ("the output of preconditioner", "b"))

    def adjoint_precondition(vector: Tensor) -> Tensor:
        return vector if preconditioner is None else adjoint(precondition)(vector)

    one = at or transposed_at
    assert one is not None
    if symmetric or solver.symmetric:
        one = damped(one)
        return Operator(one, one, precondition, precondition)

    def other(*point: Tensor) -> Linear:
        return adjoint(one(*point))

    at, transposed_at = damped(at or other), damped(transposed_at or other)
    return Operator(at, transposed_at, precondition, adjoint_precondition)


def constant_solution(
    solver: LinearSolver, operator: Operator, b: Tensor, x0: Tensor | None, *point: Tensor
) -> LinearSolution:
    """The solution as a constant; warns or raises on failure."""
    # What there is one of for each sample is a number where there is only one, as in `krylov`.
    finite, scale = all_finite(b), magnitude(b)
    b = chosen(finite, b / scale, 0.0)
    size = norm(b)
    rtol = torch.finfo(b.dtype).eps ** 0.5 if solver.rtol is None else solver.rtol
    system = LinearSystem(
        operator.at(*point),
        lambda: operator.transposed_at(*point),
        operator.precondition,
        operator.adjoint_precondition,
        b,
        torch.maximum(rtol * size, size.new_full((), solver.atol) / scale),
    )
    if x0 is None:
        run = solver.run(system, torch.zeros_like(b), b)
    else:
        start = x0 / scale
        start = torch.where((size > 0) & torch.isfinite(start).all(), start, 0.0)  # 0 if b = 0
        run = solver.run(system, start, system.residual(start))
    x, iterations, obstacle, residual = run
    residual = norm(system.residual(x) if residual is None else residual)
    x = chosen(finite, x * scale, torch.nan)
    residual = chosen(all_finite(x), residual, torch.inf)
    within = number(residual <= system.tolerance)
    missed = finite & (within ^ True)  # `^ True` negates bools and tensors
    if anywhere(finite ^ True):
        fail(
            f"{type(solver).__name__} returns NaN, since b is not finite: in a backward pass, b is "
            "the incoming gradient",
            solver.on_failure,
        )
    if anywhere(missed):
        worst = greatest(chosen(missed, residual / size, 0.0))
        fail(
            f"{type(solver).__name__} stopped after {greatest(iterations)} iterations at a "
            f"residual of {worst:.2g} times the norm of b, above the tolerance of "
            f"rtol={rtol:.2g}, atol={solver.atol:.2g}" + (f": {obstacle}" if obstacle else ""),
            solver.on_failure,
        )
    residual = chosen(finite, residual * scale, torch.nan)
    converged = torch.as_tensor(finite & within, device=x.device)
    return LinearSolution(x, residual, iterations, converged)
