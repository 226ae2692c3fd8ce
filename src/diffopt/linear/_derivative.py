"""The implicit function theorem as a differentiable rule.

If r(x, y) = 0, then dx = -(d_x r)^-1 (d_y r) dy. A linear solve A(y) u = b is the case
r = A(y) u - b, so the solves of a derivative are differentiated by the same rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree
from diffopt._diff import functions
from diffopt._diff.isolation import isolated, outer_derivatives
from diffopt._diff.unmodified import Captured
from diffopt._tree import Tree
from diffopt.linear._vectors import Linear


class LinearSolution(NamedTuple):
    """What a linear solver returns.

    Attributes:
        value: x, a tree like b.
        residual: the norm of b - (A + damping I) x, computed from x.
        iterations: the number of iterations taken.
        converged: whether the residual is within the tolerance.
    """

    value: Tree
    residual: Tensor
    iterations: Tensor
    converged: Tensor


@dataclass(frozen=True)
class Operator:
    """A linear map that depends on `point`, a tuple of tensors.

    Attributes:
        at: `at(*point)` is the linear map.
        transposed_at: `transposed_at(*point)` is its adjoint.
        precondition: applies an approximate inverse, the same at every point.
        adjoint_precondition: applies its adjoint.
    """

    at: Callable[..., Linear]
    transposed_at: Callable[..., Linear]
    precondition: Linear
    adjoint_precondition: Linear

    @property
    def T(self) -> Operator:
        """The adjoint."""
        return Operator(self.transposed_at, self.at, self.adjoint_precondition, self.precondition)


@dataclass(frozen=True)
class Method:
    """How the linear systems of a derivative are solved.

    Attributes:
        constant: `constant(operator, b, x0, *point)` is the solution as a constant.
        unravel: converts a vector like x to the user's tree.
        report: called with every solution.
    """

    constant: Callable[..., LinearSolution]
    unravel: Callable[[Tensor], Tree]
    report: Callable[[LinearSolution], object] | None = None


class Residual:
    """residual(x, *inputs), a vector like x, and its pullback.

    Args:
        function: the residual.
        captured: what it captures, checked before it is run again. Whoever solves a system with
            `kept` checks it, too: autograd does not notice `x.data = y` for what it has saved.

    Attributes:
        kept: its graph at a solution, for the pullbacks of the first backward pass.
    """

    def __init__(self, function: Callable[..., Tensor], captured: Captured | None = None) -> None:
        self.function, self.captured = function, captured
        self.kept: functions.Evaluated | None = None

    def keep(self, needed: Sequence[int], *point: Tensor) -> Tensor:
        """The residual at a solution, by autograd alone, with the graph for these inputs."""
        self.kept = functions.Evaluated(self.function, point, needed)
        return self.kept.output

    def pullback(
        self, point: Sequence[Tensor], which: Sequence[int]
    ) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
        """The residual and its vector-Jacobian product with respect to some of the point."""
        kept = self.kept
        if kept and functions.constant():
            return kept.output.detach(), lambda v: kept.pull(v, which)
        if self.captured:
            self.captured.check()

        def partial(*chosen: Tensor) -> Tensor:
            return self.function(*functions.replaced(point, which, chosen))

        return functions.pullback(partial, *(point[i] for i in which))


@dataclass(frozen=True)
class Equation:
    """residual(x, *inputs) = 0 in a vector x.

    Attributes:
        residual: the residual.
        jacobian: its derivative with respect to x, at the point `(x, *inputs)`.
        method: for the linear systems with that operator.
        start: the initial guess for the solve of a backward pass, given tensors with the batches of
            that solve; None, or a result of None, for zeros.
    """

    residual: Residual
    jacobian: Operator
    method: Method
    start: Callable[[Sequence[Tensor]], Tensor | None] | None = None


def solve(
    method: Method, operator: Operator, b: Tensor, x0: Tensor | None, *point: Tensor
) -> LinearSolution:
    """The solution u of operator(*point) u = b, differentiable with respect to b and point."""
    solution: LinearSolution = isolated(partial(method.constant, operator), b, x0, *point)
    if method.report:
        tree = solution._replace(value=method.unravel(solution.value))
        method.report(_tree.map(_modes.all_samples, tree))

    def residual(u: Tensor, b: Tensor, *point: Tensor) -> Tensor:
        return operator.at(*point)(u) - b

    jacobian = replace(
        operator,
        at=lambda u, b, *point: operator.at(*point),
        transposed_at=lambda u, b, *point: operator.transposed_at(*point),
    )
    value = attach(Equation(Residual(residual), jacobian, method), solution.value, b, *point)
    return solution._replace(value=value)


def attach(equation: Equation, x: Tensor, *inputs: Tensor) -> Tensor:
    """A constant x that solves the equation, made differentiable with respect to the inputs."""
    if functions.constant():
        return x
    return _Attach.apply(equation, x, *inputs)  # pyright: ignore[reportReturnType]


class _Attach(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(equation: Equation, x: Tensor, *inputs: Tensor) -> Tensor:
        return functions.batched_like([x.clone()], inputs)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.equation = inputs[0]
        ctx.save_for_backward(output, *inputs[2:])
        ctx.save_for_forward(output, *inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        equation, (x, *inputs) = ctx.equation, map(_torch.unwrap_if_dead, ctx.saved_tensors)
        needed = _differentiable(inputs, ctx.needs_input_grad[2:])

        def pull(grad: Tensor) -> Sequence[Tensor]:
            x0 = equation.start((grad, x, *inputs)) if equation.start else None
            u = solve(equation.method, equation.jacobian.T, grad, x0, x, *inputs).value
            return _pullback(equation, x, inputs, needed)(-u)

        results: list[Tensor | None] = [None] * len(inputs)
        if needed:
            results = functions.replaced(results, needed, functions.over_batch(pull, grads[0]))
            if functions.constant():
                equation.residual.kept = None
        return (None, None, *results)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        equation, (x, *inputs) = ctx.equation, map(_torch.unwrap_if_dead, ctx.saved_tensors)
        given = _differentiable(inputs, [tangent is not None for tangent in tangents[2:]])
        if not given:
            return torch.zeros_like(x)
        moved = [tangents[2 + i] for i in given]
        with outer_derivatives(x, *inputs, *moved) as tensors:
            x, inputs, moved = tensors[0], tensors[1 : -len(given)], tensors[-len(given) :]
            # The pullback is linear and its adjoint is the pushforward, so no forward derivatives
            # of the user's function are needed.
            try:
                push = torch.func.vjp(_pullback(equation, x, inputs, given), torch.zeros_like(x))[1]
                (change,) = push(tuple(moved))
                return solve(equation.method, equation.jacobian, -change, None, x, *inputs).value
            except RuntimeError as error:
                if "INTERNAL ASSERT" in str(error):
                    error.add_note(_MADE_INSIDE)
                raise


_MADE_INSIDE = (
    "Perhaps a residual, operator or preconditioner closes over a tensor that was created inside a "
    "function that is being differentiated, forward over reverse: pass it as an argument."
)


def _differentiable(inputs: Sequence[Tensor], asked: Sequence[bool]) -> list[int]:
    pairs = enumerate(zip(inputs, asked, strict=True))
    return [i for i, (x, wanted) in pairs if wanted and _modes.has_derivative(x)]


def _pullback(
    equation: Equation, x: Tensor, inputs: Sequence[Tensor], which: Sequence[int]
) -> Callable[[Tensor], Sequence[Tensor]]:
    """The vector-Jacobian product of the residual with respect to some of its inputs."""
    return equation.residual.pullback((x, *inputs), [1 + i for i in which])[1]
