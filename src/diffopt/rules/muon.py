"""Muon: momentum, orthogonalized (Jordan et al. 2024)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._arguments import check_choice, check_integer
from diffopt._rule import ops
from diffopt._rule.hyper import Hyperparameter, hparams, number
from diffopt._rule.leafwise import Leafwise
from diffopt._tree import Tree

Adjustment: TypeAlias = Literal["original", "match_rms_adamw", "spectral_unclamped"]

_ADJUSTMENTS = get_args(Adjustment)


class MuonState(NamedTuple):
    """State of `muon`."""

    step: Any
    momentum_buffer: Tree


@hparams
class MuonHParams:
    """Hyperparameters of `muon`."""

    lr: Hyperparameter = number(1e-3, ge=0)
    weight_decay: Hyperparameter = number(0.1, ge=0)
    momentum: Hyperparameter = number(0.95, ge=0)
    ns_a: Hyperparameter = number(3.4445, per_weight=False)
    ns_b: Hyperparameter = number(-4.7750, per_weight=False)
    ns_c: Hyperparameter = number(2.0315, per_weight=False)
    eps: Hyperparameter = number(1e-7, ge=0, per_weight=False)


class Muon(Leafwise[MuonState, MuonHParams]):
    """Muon: steps along the momentum of a matrix, whose singular values are brought near 1.

    With B_0 = 0,

        B_t = momentum * B_{t-1} + (1 - momentum) * grad_t
        N_t = B_t           (nesterov: momentum * B_t + (1 - momentum) * grad_t)
        X_0 = N_t / max(|N_t|, eps), with the Frobenius norm
        X_k = ns_a * X_{k-1} + (ns_b * A + ns_c * A^2) X_{k-1}, where A = X_{k-1} X_{k-1}^T
        p  <- p * (1 - lr * weight_decay) - lr * ratio * X_{ns_steps}

    where ratio is sqrt(max(1, rows / columns)), or 0.2 * sqrt(max(rows, columns)) if `adjust_lr_fn`
    is "match_rms_adamw", or sqrt(rows / columns) if it is "spectral_unclamped". Matrices with more
    rows than columns are transposed for the iteration (Newton-Schulz with a polynomial of degree
    5).

    Hyperparameters, each a number, a tensor or a prefix tree of the params: `lr` >= 0 (1e-3),
    `weight_decay` >= 0 (0.1), `momentum` >= 0 (0.95); and, a single one for each matrix, `ns_a`,
    `ns_b`, `ns_c` (3.4445, -4.775, 2.0315; torch's `ns_coefficients`) and `eps` >= 0 (1e-7).

    Its parameters must be matrices; give others to another optimizer. At a zero gradient the
    derivative is that of X_0 = N / eps.

    `maximize` (to ascend) and `execution` are flags of every `diffopt.rules.Leafwise`.

    Args:
        nesterov: use Nesterov's momentum.
        ns_steps: the number of iterations.
        adjust_lr_fn: how the learning rate is adjusted to the shape, see ratio; None means
            "original".
        precision: the dtype of the iteration. bfloat16, torch's choice, changes the step by a few
            percent and derivatives with respect to gradients by 5 to 30 percent; those with respect
            to `ns_a`, `ns_b` and `ns_c` have no correct digit. Where derivatives matter, use
            torch.float32 (1e-5), or None for the dtype of the parameter (float32 for half
            precision).

    Raises:
        TypeError: a flag is not a bool, or `precision` is not a dtype.
        ValueError: `ns_steps`, `adjust_lr_fn` or `precision` has a value that is not allowed; from
            `init` and `update`: a parameter is not a real matrix.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.muon(precision=None)
        >>> hp = opt.hparams(lr=0.1, ns_a=1.5, ns_b=-0.5, ns_c=0.0)  # this iteration converges
        >>> params, grads = [torch.ones(2, 2)], [torch.tensor([[3.0, 0.0], [0.0, -4.0]])]
        >>> params, state = opt.update(params, grads, opt.init(params), hp)
        >>> (params[0] - 0.99).round(decimals=4)
        tensor([[-0.1000,  0.0000],
                [ 0.0000,  0.1000]])

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; Liu et
    al., "Muon is scalable for LLM training", 2025, for "match_rms_adamw"; Bernstein, "Deriving
    Muon", 2025, for "spectral_unclamped"; with torch's momentum: an average instead of a sum.
    """

    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr_fn: Adjustment | None = None
    precision: torch.dtype | None = torch.bfloat16

    State = MuonState
    hparams: ClassVar[type[MuonHParams]] = MuonHParams
    batchable = False
    batched = True
    overwrites = True
    proportional = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self.ns_steps, "ns_steps", 0, 99)
        check_choice(self.adjust_lr_fn, "adjust_lr_fn", None, *_ADJUSTMENTS)
        if self.precision is not None and not isinstance(self.precision, torch.dtype):  # pyright: ignore[reportUnnecessaryIsInstance] (of users)
            raise TypeError(f"precision is {_tree.shown(self.precision)}, not a dtype")
        if self.precision is not None and not self.precision.is_floating_point:
            raise ValueError(f"precision is {self.precision}, but must be a floating-point dtype")

    def rule(
        self, p: Any, g: Any, s: MuonState, hp: MuonHParams, c: Any, *, into: bool = False
    ) -> tuple[Any, MuonState]:
        b = ops.lerp(s.momentum_buffer, g, 1 - hp.momentum, into=into)
        x = self._orthogonalized(ops.lerp(g, b, hp.momentum) if self.nesterov else b, hp)
        p = ops.mul(p, 1 - hp.lr * hp.weight_decay, into=into)
        rate = _modes.number_of(-hp.lr * self._ratio(*p.shape[-2:]))
        if isinstance(rate, Tensor) or torch.promote_types(p.dtype, x.dtype) != p.dtype:
            x = x.to(p.dtype)
        return ops.add(p, x, rate, into=into), MuonState(s.step, b)

    def _orthogonalized(self, x: Tensor, hp: MuonHParams) -> Tensor:
        """A matrix, or each of a batch, with its singular values brought near 1."""
        x = x.to(self.precision or x.dtype)
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        x = x / _norm(x).clamp(min=hp.eps)
        outer, inner = _addmm(x.dim(), hp.ns_a), _addmm(x.dim(), hp.ns_b, hp.ns_c)
        for _ in range(self.ns_steps):
            a = x @ x.mT
            x = outer(x, inner(a, a, a, beta=hp.ns_b, alpha=hp.ns_c), x, beta=hp.ns_a)
        return x.mT if tall else x

    def _ratio(self, rows: int, columns: int) -> float:
        if self.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * max(rows, columns) ** 0.5
        least = 0 if self.adjust_lr_fn == "spectral_unclamped" else 1
        return max(least, rows / max(columns, 1)) ** 0.5

    def refuse(self, p: Tensor) -> str | None:
        if p.dim() != 2:
            return (
                f"has shape {tuple(p.shape)}, but Muon updates only matrices: give it to another "
                "optimizer, with diffopt.transforms.partition"
            )
        return "is complex: Muon does not support complex parameters" if p.is_complex() else None


muon = Muon


def _norm(x: Tensor) -> Tensor:
    """The Frobenius norm, with derivative 0 at 0."""
    norm = functools.partial(torch.linalg.vector_norm, dim=(-2, -1), keepdim=True)
    if not _modes.differentiable():
        return norm(x)
    zero = norm(x) == 0
    return torch.where(zero, 0, norm(torch.where(zero, 1, x)))


def _addmm(dim: int, *coefficients: Any) -> Callable[..., Tensor]:
    """`beta * x + alpha * a @ b`, rounded once where these coefficients are numbers."""
    if any(isinstance(x, Tensor) for x in coefficients):
        return lambda x, a, b, *, beta, alpha=1: beta * x + alpha * (a @ b)
    return torch.addmm if dim == 2 else torch.baddbmm
