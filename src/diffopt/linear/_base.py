"""What every linear solver has in common: its call, its tolerances, its report of failure."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._diff.isolation import batched, concrete, refuse_captured
from diffopt._tree import Tree
from diffopt.linear._derivative import Linear, Method, Operator, solve, transpose


class ConvergenceWarning(UserWarning):
    """A solver stopped before it met its tolerance."""


class ConvergenceError(RuntimeError):
    """A solver with `on_failure="raise"` stopped before it met its tolerance."""


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
class LinearSystem:
    """A x = b in vectors, as `LinearSolver.run` gets it.

    Attributes:
        matvec: v -> (A + damping I) v.
        transposed: makes the function v -> (A + damping I)^T v.
        precondition: v -> M^-1 v, the identity where there is no preconditioner.
        adjoint_precondition: v -> M^-T v.
        b: the right-hand side, scaled to a magnitude near 1 so that products of it stay in range.
        tolerance: the residual norm that is small enough, a 0-d tensor.
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
        obstacle: why it stopped early, for the message; empty where nothing is known.
    """

    x: Tensor
    iterations: Tensor
    obstacle: str = ""


@dataclass(frozen=True, kw_only=True)
class LinearSolver(ABC):
    """Solves (A + damping I) x = b for an operator A given by its products with vectors.

    A solver of one's own is a frozen dataclass with a method `run(system, x0, residual)`. That
    works on vectors; it need not be differentiable, but it must not branch on the values of tensors
    except through `anywhere` if it is to work under torch.func.vmap, where each sample is a system.

    Args:
        rtol: converged is a residual norm within `max(rtol * norm(b), atol)`; >= 0. None is the
            square root of the dtype's machine epsilon: 1.5e-8 in float64, 3.5e-4 in float32.
        atol: see rtol; >= 0.
        damping: adds `damping * I` to A; >= 0.
        on_failure: "warn" emits a `ConvergenceWarning` where the tolerance is not met, "raise"
            raises a `ConvergenceError`.

    Raises:
        ValueError: a number is out of its range, `on_failure` neither "warn" nor "raise".
    """

    rtol: float | None = None
    atol: float = 0.0
    damping: float = 0.0
    on_failure: Literal["warn", "raise"] = "warn"

    symmetric: ClassVar[bool] = False
    """Whether the solver takes A for symmetric."""

    def __post_init__(self) -> None:
        for name in ("rtol", "atol", "damping"):
            value = getattr(self, name)
            if not (name == "rtol" and value is None):
                require(value, name, 0.0)
        check_on_failure(self.on_failure)

    @abstractmethod
    def run(self, system: LinearSystem, x0: Tensor, residual: Tensor) -> Run:
        """Approximate the solution.

        Args:
            system: the linear system, with damping and tolerance.
            x0: where to start: a vector like `system.b`.
            residual: that of x0.

        Returns:
            The approximation; the caller computes its residual and judges it.
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
        """Solve A x = b; the value is differentiable in b and the operands, any number of times.

        The derivative is dx = A^-1 (db - dA x): it takes another solve, not the steps of this one.
        Works under autograd and under torch.func transforms; under vmap every sample stops by its
        own residual.

        Args:
            operator: `operator(v, *operands)` is A v, linear in v: a tree like v.
            b: a tree of real floating-point tensors.
            x0: where to start, a tree like b: zeros where it is None. It has no derivative.
            operands: trees of what A depends on and derivatives are wanted to.
            transpose: `transpose(v, *operands)` is A^T v. Derived from `operator` where it is None.

        Returns:
            A `LinearSolution`. Where b isn't finite its value is NaN, and it has not converged.

        Raises:
            TypeError: a leaf of b is no real floating-point tensor; `operator` is no function.
            ValueError: trees that must be alike differ; `operator` computes with a tensor that
                needs a gradient but is none of its operands.
            ConvergenceError: with `on_failure="raise"`.
            RuntimeError: torch.compile is tracing: the number of iterations depends on values.
        """
        refuse_tracing("a linear solver")
        check_function(operator, "operator")
        check_function(transpose, "transpose", optional=True)
        vector, unravel = ravel(b, "b")
        start = None if x0 is None else ravel_like(x0, b, ("x0", "b"))
        tensors, merge = split(operands)
        like = template(b)

        def flat(function: Callable[..., Tree], name: str) -> Callable[..., Linear]:
            def at(*point: Tensor) -> Linear:
                def apply(v: Tensor) -> Tensor:
                    result = function(unravel(v), *merge(point))
                    return ravel_like(result, like, (f"the output of {name}", "b"))

                return apply

            return at

        at = flat(operator, "operator")
        transposed_at = flat(transpose, "transpose") if transpose else None
        refuse_captured(lambda v, *point: at(*point)(v), "operator", vector, *tensors)
        matrix = operator_of(self, at, transposed_at, unravel, vector)
        solution = solve(method(self, unravel), matrix, vector, start, *tensors)
        return solution._replace(value=unravel(solution.value))


def method(
    solver: LinearSolver,
    unravel: Callable[[Tensor], Tree],
    report: Callable[[LinearSolution], object] | None = None,
    start: Callable[[Sequence[Tensor]], Tensor | None] | None = None,
) -> Method:
    """A solver as the derivative wants it."""
    return Method(partial(_numbers, solver), unravel, report, start)


def operator_of(
    solver: LinearSolver,
    at: Callable[..., Linear] | None,
    transposed_at: Callable[..., Linear] | None,
    unravel: Callable[[Tensor], Tree],
    like: Tensor,
    *,
    symmetric: bool = False,
) -> Operator:
    """The solver's operator with its damping, from products with it or with its adjoint."""
    n, dtype, device = like.numel(), like.dtype, like.device

    def adjoint(linear: Linear) -> Linear:
        return transpose(linear, torch.zeros(n, dtype=dtype, device=device))

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
    at = at or (lambda *point: adjoint(one(*point)))
    transposed_at = transposed_at or (lambda *point: adjoint(one(*point)))
    return Operator(damped(at), damped(transposed_at), precondition, adjoint_precondition)


def _numbers(
    solver: LinearSolver, operator: Operator, b: Tensor, x0: Tensor | None, *point: Tensor
) -> LinearSolution:
    """The solution in constants, with its warning or error."""
    finite, scale = torch.isfinite(b).all(), magnitude(b)
    b = torch.where(finite, b / scale, 0.0)
    size = norm(b)
    rtol = torch.finfo(b.dtype).eps ** 0.5 if solver.rtol is None else solver.rtol
    system = LinearSystem(
        operator.at(*point),
        lambda: operator.transposed_at(*point),
        operator.precondition,
        operator.adjoint_precondition,
        b,
        torch.maximum(rtol * size, solver.atol / scale),
    )
    if x0 is None:
        x, iterations, obstacle = solver.run(system, torch.zeros_like(b), b)
    else:
        x0 = x0 / scale
        x0 = torch.where((size > 0) & torch.isfinite(x0).all(), x0, 0.0)  # of b = 0, x is known
        x, iterations, obstacle = solver.run(system, x0, system.residual(x0))
    residual, x = norm(system.residual(x)), torch.where(finite, x * scale, torch.nan)
    residual = torch.where(torch.isfinite(x).all(), residual, torch.inf)
    within = residual <= system.tolerance
    if anywhere(~finite):
        fail(
            f"{type(solver).__name__} gives NaN, since b isn't finite: in a backward pass that is "
            "the gradient which came in",
            solver.on_failure,
        )
    if anywhere(finite & ~within):
        worst = concrete(torch.where(finite & ~within, residual / size, 0.0)).max().item()
        fail(
            f"{type(solver).__name__} stopped after {concrete(iterations).max().item()} iterations "
            f"at a residual of {worst:.2g} times the norm of b, above the tolerance of "
            f"rtol={rtol:.2g}, atol={solver.atol:.2g}" + (f": {obstacle}" if obstacle else ""),
            solver.on_failure,
        )
    residual = torch.where(finite, residual * scale, torch.nan)
    return LinearSolution(x, residual, iterations, finite & within)


def magnitude(vector: Tensor) -> Tensor:
    """A power of two near its largest entry, to divide by without rounding; 1 if not finite."""
    # At most half of the entry, since log2 of the largest number rounds up.
    smallest = vector.new_full((1,), 4 * torch.finfo(vector.dtype).tiny)
    largest = torch.cat([vector.abs(), smallest]).max()
    return torch.where(largest.isfinite(), torch.exp2(torch.floor(torch.log2(largest / 2))), 1.0)


def norm(vector: Tensor) -> Tensor:
    """The 2-norm."""
    return torch.linalg.vector_norm(vector)


def anywhere(mask: Tensor) -> bool:
    """Whether a constant boolean tensor is True for any sample."""
    return bool(concrete(mask).any())


def fail(message: str, on_failure: str) -> None:
    """Warn, or raise."""
    if on_failure == "raise":
        raise ConvergenceError(message)
    warnings.warn(message, ConvergenceWarning, stacklevel=2)


def check_on_failure(value: Any) -> None:
    """Nothing passes in silence."""
    if value not in ("warn", "raise"):
        raise ValueError(f'on_failure is {value!r}, but must be "warn" or "raise"')


def check_function(value: Any, name: str, *, optional: bool = False) -> None:
    """Something to call."""
    if not (callable(value) or (optional and value is None)):
        raise TypeError(f"{name} is {_tree.describe(value)}, not a function")


def require(value: Any, name: str, low: float, *, integer: bool = False) -> None:
    """A number of at least `low`."""
    kinds = int if integer else (int, float)
    if isinstance(value, kinds) and not isinstance(value, bool) and low <= value < math.inf:
        return
    kind = "an integer" if integer else "a number"
    raise ValueError(f"{name} is {value!r}, but must be {kind} >= {low:g}")


def refuse_tracing(what: str) -> None:
    """Loops that stop by values have no graph."""
    if _modes.compiling():
        raise RuntimeError(
            f"{what} cannot be traced by torch.compile, since its number of steps depends on "
            "values: call it outside the compiled function, and compile what it calls"
        )


def split(tree: Tree) -> tuple[list[Tensor], Callable[[Any], Tree]]:
    """The tensors of a tree, and the function that puts others in their places."""
    leaves, spec = _tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def merge(tensors: Any) -> Tree:
        merged = list(rest)
        for place, tensor in zip(places, tensors, strict=True):
            merged[place] = tensor
        return _tree.unflatten(merged, spec)

    return [leaves[i] for i in places], merge


def ravel(tree: Tree, name: str) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """All leaves in one vector, and the function that puts such a vector back into the tree."""
    leaves, spec = _tree.flatten(tree)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            path = _tree.paths(tree, name)[i]
            raise TypeError(f"{path} is {_tree.describe(leaf)}, not a tensor")
        if not leaf.is_floating_point():
            path = _tree.paths(tree, name)[i]
            raise TypeError(f"{path} has dtype {leaf.dtype}, but must be real floating-point")
    if not leaves:
        raise ValueError(f"{name} holds no tensor")
    dtypes = [leaf.dtype for leaf in leaves]
    vector, unflatten = _tree.ravel(leaves)

    def unravel(vector: Tensor) -> Tree:
        pieces = unflatten(vector)
        return _tree.unflatten([p.to(d) for p, d in zip(pieces, dtypes, strict=True)], spec)

    return vector, unravel


def template(tree: Tree) -> Tree:
    """The tree without its numbers, for `ravel_like`."""
    return _tree.map(lambda leaf: torch.empty_like(leaf, device="meta"), tree)


def ravel_like(
    tree: Tree, like: Tree, names: tuple[str, str], others: Sequence[Tensor] = ()
) -> Tensor:
    """The leaves of `tree` in one vector; they must have the shapes of `like`.

    They may have the batches of `others` in front.
    """
    references, spec = _tree.flatten(like)
    leaves = _tree.leaves_like(tree, spec, like, names)
    leaves = [batched(x, ref.dim(), others) for x, ref in zip(leaves, references, strict=True)]
    for i, (leaf, reference) in enumerate(zip(leaves, references, strict=True)):
        path = _tree.paths(like, names[0])[i] if _wrong(leaf, reference) else ""
        if path:
            raise ValueError(
                f"{path} is {_tree.describe(leaf)}, but must be a tensor of shape "
                f"{tuple(reference.shape)}, as in {names[1]}"
            )
    return torch.cat(
        [leaf.to(ref.dtype).reshape(-1) for leaf, ref in zip(leaves, references, strict=True)]
    )


def _wrong(leaf: Any, reference: Tensor) -> bool:
    return not isinstance(leaf, Tensor) or leaf.shape != reference.shape
