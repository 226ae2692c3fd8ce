"""A truncated Neumann series."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from diffopt._arguments import check_function, check_integer, check_number
from diffopt._tree import Tree
from diffopt.linear._base import LinearSolver, LinearSystem, Run


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """The first k terms of the Neumann series: x = scale * sum_{j < k} (I - scale A)^j b.

    It converges to A^-1 b if every eigenvalue of scale * A is within distance 1 of 1. Truncated
    after k terms, its error is (I - scale A)^k A^-1 b: directions in which A is small are damped,
    so derivatives computed with it are biased towards zero, like those truncated to the last k
    steps of gradient descent with learning rate `scale`. Second derivatives are biased too, and are
    not exactly the derivatives of the biased first ones. With x0 or a preconditioner it is k steps
    of x + scale * M^-1 (b - A x). Each step, and the residual, takes one product with A.

    Arguments not listed here are those of every `LinearSolver`.

    Args:
        k: the number of terms, >= 1.
        scale: a positive number.
        rtol: see `LinearSolver`. The default of 1 only checks that the series does not diverge.
        preconditioner: `v -> M^-1 v` on trees like b, an approximate inverse of A.

    Examples:
        >>> import torch, diffopt
        >>> from diffopt.linear import Neumann
        >>> Neumann(k=3).solve(lambda v: 0.5 * v, torch.tensor(1.0)).value  # 1 + 1/2 + 1/4
        tensor(1.7500)

    Source: Lorraine, Vicol and Duvenaud, "Optimizing millions of hyperparameters by implicit
    differentiation", 2020.
    """

    k: int
    scale: float = 1.0
    _: KW_ONLY
    rtol: float | None = 1.0
    preconditioner: Callable[[Tree], Tree] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self.k, "k", 1)
        check_number(self.scale, "scale", positive=True)
        check_function(self.preconditioner, "preconditioner", optional=True)

    def run(self, system: LinearSystem, x0: Tensor, residual: Tensor) -> Run:
        x = x0
        for step in range(self.k):
            change = self.scale * system.precondition(residual)
            x = x + change
            if step < self.k - 1:
                residual = residual - system.matvec(change)
        return Run(x, torch.full_like(system.tolerance, self.k, dtype=torch.int64))
