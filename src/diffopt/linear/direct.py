"""Solvers that build the matrix: all of it, or some of its columns."""

from __future__ import annotations

import random
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from diffopt._arguments import check_integer, check_number
from diffopt.linear._base import LinearSolver, LinearSystem, Run


@dataclass(frozen=True, kw_only=True)
class Direct(LinearSolver):
    """Builds the matrix of A and factors it: for small systems, up to a few thousand unknowns.

    Arguments not listed here are those of every `LinearSolver`.

    Args:
        rtol: see `LinearSolver`; a larger residual indicates a singular matrix.

    Examples:
        >>> import torch, diffopt
        >>> from diffopt.linear import Direct
        >>> A, b = torch.tensor([[0.0, 2.0], [-1.0, 1.0]]), torch.tensor([2.0, 4.0])
        >>> Direct().solve(lambda v: A @ v, b).value
        tensor([-3.,  1.])
    """

    def run(self, system: LinearSystem, x0: Tensor, residual: Tensor) -> Run:
        identity = torch.eye(x0.numel(), dtype=x0.dtype, device=x0.device)
        x = _solve(torch.vmap(system.matvec)(identity).T, system.b)
        return Run(x, torch.ones_like(system.tolerance, dtype=torch.int64), "it may be singular")


@dataclass(frozen=True)
class Nystrom(LinearSolver):
    """A low-rank approximation of a symmetric A, inverted together with its damping.

    With the columns C of A at `rank` random indices K, and W = C[K]: A is replaced by C W^-1 C^T,
    and x = b / damping - C (W + C^T C / damping)^-1 C^T b / damping^2. Exact if A has that rank;
    otherwise the approximation of a positive semi-definite A is too small, so x is too large in the
    missing directions, the more so the smaller the damping. It takes `rank` products with A, in one
    batch.

    Arguments not listed here are those of every `LinearSolver`.

    Args:
        rank: the number of columns, >= 1; all of them if there are fewer.
        damping: added to A, > 0: without it the approximation is singular.
        seed: for the random choice of columns.
        rtol: see `LinearSolver`. The default of 1 accepts any x that is no worse than 0.

    Examples:
        >>> import torch, diffopt
        >>> from diffopt.linear import Nystrom
        >>> A, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([4.0, 5.0])
        >>> Nystrom(rank=2, damping=1.0).solve(lambda v: A @ v, b).value  # (A + I) x = b
        tensor([1.0000, 1.0000])

    Source: Hataya and Yamada, "Nyström method for accurate and scalable implicit differentiation",
    2023, equation 6.
    """

    rank: int
    _: KW_ONLY
    damping: float = 0.01
    seed: int = 0
    rtol: float | None = 1.0

    symmetric = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self.rank, "rank", 1)
        check_integer(self.seed, "seed", 0)
        check_number(self.damping, "damping", positive=True)

    def run(self, system: LinearSystem, x0: Tensor, residual: Tensor) -> Run:
        n, b, damping = x0.numel(), system.b, self.damping
        rank = min(self.rank, n)
        # Python's generator, since torch's cannot be used under vmap.
        indices = sorted(random.Random(self.seed).sample(range(n), rank))
        chosen = torch.tensor(indices, device=b.device)
        units = (torch.arange(n, device=b.device) == chosen[:, None]).to(b.dtype)
        columns = torch.vmap(system.matvec)(units) - damping * units  # as rows
        core = columns[:, chosen] + columns @ columns.T / damping
        x = b / damping - _solve(core, columns @ b) @ columns / damping**2
        return Run(x, torch.full_like(system.tolerance, rank, dtype=torch.int64))


def _solve(matrix: Tensor, b: Tensor) -> Tensor:
    """Solve a dense system; a singular one raises no error, but the residual shows it."""
    wide = torch.promote_types(b.dtype, torch.float32)  # solve_ex does not support half precision
    return torch.linalg.solve_ex(matrix.to(wide), b.to(wide))[0].to(b.dtype)
