"""Krylov methods: conjugate gradients, CG on the normal equations, GMRES and BiCGStab."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt._arguments import check_function, check_integer
from diffopt._rule.ops import where
from diffopt._tree import Tree
from diffopt.linear._base import LinearSolver, LinearSystem, Run
from diffopt.linear._vectors import (
    all_finite,
    anywhere,
    dot,
    greatest,
    length,
    norm,
    number,
    quotient,
)

# What there is one of for each sample, such as a dot product, is a number where there is only one
# sample, on a CPU: arithmetic with numbers is much faster. Elsewhere it is a 0-d tensor.


class Cycle(NamedTuple):
    """The result of a method between two restarts.

    Attributes:
        x: the new approximation.
        steps: the number of iterations.
        hopeless: whether restarting cannot help.
    """

    x: Tensor
    steps: Any
    hopeless: Any = False


@dataclass(frozen=True, kw_only=True)
class Krylov(LinearSolver):
    """Iterates until the residual, recomputed from x, is within the tolerance.

    A method updates its residual by a recurrence that drifts away from b - A x. When they have
    drifted apart, and when a method breaks down, it is restarted from the x it has reached, unless
    the last cycle did not reduce the residual.

    Args:
        max_steps: iterations at most, >= 0; None is ten times the number of unknowns, at most 1000.
        preconditioner: `v -> M^-1 v` on trees like b, linear, an approximate inverse of A. A solve
            with A^T, as in derivatives, uses its adjoint.
    """

    max_steps: int | None = None
    preconditioner: Callable[[Tree], Tree] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps is not None:
            check_integer(self.max_steps, "max_steps", 0)
        check_function(self.preconditioner, "preconditioner", optional=True)

    def run(self, system: LinearSystem, x0: Tensor, residual: Tensor) -> Run:
        x, limit = x0, self.max_steps
        limit = min(10 * x0.numel(), 1000) if limit is None else limit
        size, tolerance = length(residual), number(system.tolerance)
        steps: Any = 0
        hopeless: Any = False
        active, taken = size > tolerance, 0
        while taken < limit and anywhere(active):
            cycle = self._cycle(system, x, residual, active, tolerance, limit - taken)
            taken += max(1, greatest(cycle.steps))
            finite = active & all_finite(cycle.x)
            x = where(finite, cycle.x, x)
            steps, hopeless = steps + cycle.steps, hopeless | cycle.hopeless
            before, residual = size, system.residual(x)
            size = length(residual)
            active = finite & (cycle.hopeless ^ True) & (size < before) & (size > tolerance)
        obstacle = self._obstacle if anywhere(hopeless) else ""
        steps = torch.as_tensor(steps, dtype=torch.int64, device=x.device)
        return Run(x, steps, obstacle, residual)

    _obstacle = ""

    @abstractmethod
    def _cycle(
        self, system: LinearSystem, x: Tensor, residual: Tensor, active: Any, goal: Any, limit: int
    ) -> Cycle:
        """At most `limit` iterations from x, for samples that are `active`; others keep their x.

        A sample is done when its residual norm is at most its `goal`.
        """


@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(Krylov):
    """Conjugate gradients, for a symmetric positive definite A (plus damping).

    Negative curvature, p^T A p <= 0, ends the iteration unconverged, with the x reached before. The
    preconditioner must be symmetric positive definite too. An iteration takes one product with A.

    Arguments not listed here are those of every `LinearSolver`.

    Args:
        max_steps: iterations at most, >= 0; None is ten times the number of unknowns, at most 1000.
        preconditioner: `v -> M^-1 v` on trees like b, an approximate inverse of A.

    Examples:
        >>> import torch, diffopt
        >>> from diffopt.linear import ConjugateGradient
        >>> A, b = torch.tensor([[4.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, 2.0])
        >>> solution = ConjugateGradient(rtol=1e-6).solve(lambda v: A @ v, b)
        >>> solution.value
        tensor([0.0909, 0.6364])
        >>> int(solution.iterations), bool(solution.converged)
        (2, True)

    Source: Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.
    """

    symmetric = True
    _obstacle = (
        "it met nonpositive curvature: the operator (or the preconditioner) is not positive "
        "definite; damping may help"
    )

    def _cycle(
        self, system: LinearSystem, x: Tensor, residual: Tensor, active: Any, goal: Any, limit: int
    ) -> Cycle:
        r, eps = residual, torch.finfo(x.dtype).eps
        z = p = system.precondition(r)
        rho = dot(r, z)
        steps: Any = 0
        hopeless: Any = False
        for _ in range(limit):
            q = system.matvec(p)
            curvature = dot(p, q)
            positive = (curvature > eps * length(p) * length(q)) & (rho > 0)
            hopeless = hopeless | (active & (positive ^ True))
            active = active & positive
            steps = steps + active
            alpha = quotient(active, rho, curvature)
            x, r = x + alpha * p, r - alpha * q
            active = active & (length(r) > goal)
            if not anywhere(active):
                break
            z = system.precondition(r)
            rho, before = where(active, dot(r, z), rho), rho
            p = where(active, z + quotient(active, rho, before) * p, p)
        return Cycle(x, steps, hopeless)


@dataclass(frozen=True, kw_only=True)
class NormalCG(Krylov):
    """Conjugate gradients on A^T A x = A^T b, for any nonsingular A.

    Robust, but slow if A is ill-conditioned, since the condition number is squared. An iteration
    takes one product with A and one with A^T. As elsewhere, the preconditioner P approximates A^-1;
    P P^T is used for A^T A.

    Arguments not listed here are those of every `LinearSolver`.

    Args:
        rtol: see `LinearSolver`; the residual is that of A x = b.
        damping: see `LinearSolver`; it is added to A, not to A^T A.
        max_steps: iterations at most, >= 0; None is ten times the number of unknowns, at most 1000.
        preconditioner: `v -> P v` on trees like b, an approximate inverse of A.

    Examples:
        >>> import torch, diffopt
        >>> from diffopt.linear import NormalCG
        >>> A, b = torch.tensor([[0.0, 2.0], [-1.0, 1.0]]), torch.tensor([2.0, 4.0])
        >>> NormalCG().solve(lambda v: A @ v, b).value
        tensor([-3.0000,  1.0000])

    Source: Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", 1952,
    section 10.
    """

    def _cycle(
        self, system: LinearSystem, x: Tensor, residual: Tensor, active: Any, goal: Any, limit: int
    ) -> Cycle:
        rmatvec, r = system.transposed(), residual

        def gradient(r: Tensor) -> tuple[Tensor, Any]:
            s = system.adjoint_precondition(rmatvec(r))
            return system.precondition(s), dot(s, s)

        p, rho = gradient(r)
        steps: Any = 0
        for _ in range(limit):
            q = system.matvec(p)
            steps = steps + active
            size = dot(q, q)
            alpha = quotient(active & (rho > 0) & (size > 0), rho, size)
            x, r = x + alpha * p, r - alpha * q
            active = active & (length(r) > goal) & (rho > 0)
            if not anywhere(active):
                break
            (z, new), before = gradient(r), rho
            rho = where(active, new, rho)
            p = where(active, z + quotient(active, rho, before) * p, p)
        return Cycle(x, steps)


@dataclass(frozen=True, kw_only=True)
class GMRES(Krylov):
    """Restarted generalized minimal residuals, for any nonsingular A.

    Keeps `restart` vectors of the size of b. Preconditioned from the right, so the residual is that
    of A x = b. An iteration takes one product with A; vectors are orthogonalized twice by
    Gram-Schmidt.

    Arguments not listed here are those of every `LinearSolver`.

    Args:
        restart: iterations between restarts, >= 1. With few it may make no progress.
        max_steps: iterations at most, >= 0; None is ten times the number of unknowns, at most 1000.
        preconditioner: `v -> M^-1 v` on trees like b, an approximate inverse of A.

    Examples:
        >>> import torch, diffopt
        >>> from diffopt.linear import GMRES
        >>> A, b = torch.tensor([[0.0, 2.0], [-1.0, 1.0]]), torch.tensor([2.0, 4.0])
        >>> GMRES().solve(lambda v: A @ v, b).value
        tensor([-3.0000,  1.0000])

    Source: Saad and Schultz, "GMRES: a generalized minimal residual algorithm for solving
    nonsymmetric linear systems", 1986.
    """

    restart: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self.restart, "restart", 1)

    def _cycle(
        self, system: LinearSystem, x: Tensor, residual: Tensor, active: Any, goal: Any, limit: int
    ) -> Cycle:
        m, eps = min(self.restart, limit, x.numel()), torch.finfo(x.dtype).eps
        beta = norm(residual)
        steps: Any = 0
        basis = [residual * where(active, 1 / beta, 0.0)]
        # The rows of the orthogonal factor of the Hessenberg matrix, one Givens rotation per step.
        rows = list(torch.eye(m + 1, dtype=x.dtype, device=x.device))
        triangle: list[Tensor] = []
        rhs: list[Tensor] = []
        for j in range(m):
            w = system.matvec(system.precondition(basis[j]))
            vectors = torch.stack(basis)
            h = vectors @ w
            w = w - h @ vectors
            again = vectors @ w
            w, h = w - again @ vectors, h + again
            height = norm(w)
            column = torch.cat([h, height[None], h.new_zeros(m - j - 1)])
            column = torch.stack(rows) @ column
            radius = torch.hypot(column[j], column[j + 1])
            steps = steps + active
            active = active & (radius > eps * norm(column))
            cos = torch.where(active, column[j] / radius, 1.0)
            sin = torch.where(active, column[j + 1] / radius, 0.0)
            rows[j], rows[j + 1] = (
                cos * rows[j] + sin * rows[j + 1],
                cos * rows[j + 1] - sin * rows[j],
            )
            unit = torch.arange(m, device=x.device) == j
            column = torch.where(unit, radius, torch.where(unit.cumsum(0) > 0, 0.0, column[:m]))
            triangle.append(torch.where(active, column, unit.to(x.dtype)))
            rhs.append(torch.where(active, beta * rows[j][0], 0.0))
            active = active & (beta * rows[j + 1][0].abs() > goal)
            if not anywhere(active):
                break
            basis.append(w * torch.where(active & (height > 0), 1 / height, 0.0))
        k = len(rhs)
        wide = torch.promote_types(x.dtype, torch.float32)  # no triangular solve in half precision
        upper = torch.stack(triangle, 1)[:k].to(wide)
        y = torch.linalg.solve_triangular(upper, torch.stack(rhs)[:, None].to(wide), upper=True)
        change = system.precondition(y[:, 0].to(x.dtype) @ torch.stack(basis[:k]))
        return Cycle(x + change, steps)


@dataclass(frozen=True, kw_only=True)
class BiCGStab(Krylov):
    """Stabilized biconjugate gradients, for a nonsymmetric A in little memory.

    It keeps seven vectors for any number of iterations, each of which takes two products with A. It
    may break down, especially if A has imaginary eigenvalues; then it restarts from the current x.
    Preconditioned from the right.

    Arguments not listed here are those of every `LinearSolver`.

    Args:
        max_steps: iterations at most, >= 0; None is ten times the number of unknowns, at most 1000.
        preconditioner: `v -> M^-1 v` on trees like b, an approximate inverse of A.

    Examples:
        >>> import torch, diffopt
        >>> from diffopt.linear import BiCGStab
        >>> A, b = torch.tensor([[3.0, 2.0], [-1.0, 1.0]]), torch.tensor([5.0, 0.0])
        >>> BiCGStab(rtol=1e-6).solve(lambda v: A @ v, b).value.round(decimals=4)
        tensor([1., 1.])

    Source: van der Vorst, "Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG for the
    solution of nonsymmetric linear systems", 1992.
    """

    def _cycle(
        self, system: LinearSystem, x: Tensor, residual: Tensor, active: Any, goal: Any, limit: int
    ) -> Cycle:
        shadow = r = p = residual
        rho = dot(shadow, r)
        steps: Any = 0
        for _ in range(limit):
            y = system.precondition(p)
            v = system.matvec(y)
            scale = dot(shadow, v)
            steps = steps + active
            active = active & (scale != 0) & (rho != 0)
            alpha = quotient(active, rho, scale)
            s = r - alpha * v
            z = system.precondition(s)
            t = system.matvec(z)
            size = dot(t, t)
            omega = quotient(active & (size > 0), dot(t, s), size)
            x, r = x + alpha * y + omega * z, s - omega * t
            active = active & (length(r) > goal) & (omega != 0)
            if not anywhere(active):
                break
            rho, before = where(active, dot(shadow, r), rho), rho
            beta = quotient(active, rho, before) * quotient(active, alpha, omega)
            p = where(active, r + beta * (p - omega * v), p)
        return Cycle(x, steps)
