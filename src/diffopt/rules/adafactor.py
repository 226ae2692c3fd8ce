"""Adafactor: Adam's second moment, factored into rows and columns (Shazeer and Stern 2018)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt._rule import ops
from diffopt._rule.hyper import Hyperparameter, hparams, number
from diffopt._rule.leafwise import Leafwise
from diffopt._rule.rule import Shape, zeros_like
from diffopt._tree import Tree


class AdafactorState(NamedTuple):
    """State of `adafactor`."""

    step: Any
    row_var: Tree
    col_var: Tree
    variance: Tree


@hparams
class AdafactorHParams:
    """Hyperparameters of `adafactor`."""

    lr: Hyperparameter = number(1e-2, ge=0)
    beta2_decay: Hyperparameter = number(-0.8, le=0, per_weight=False)
    eps2: Hyperparameter = number(1e-3, ge=0)
    d: Hyperparameter = number(1.0, ge=1)
    weight_decay: Hyperparameter = number(0.0, ge=0)


@hparams
class AdafactorEps1HParams(AdafactorHParams):
    """Hyperparameters of `adafactor(eps1=True)`."""

    eps1: Hyperparameter = number(torch.finfo(torch.float32).eps, ge=0)


class Adafactor(Leafwise[AdafactorState, AdafactorHParams]):
    """Adafactor: Adam without momentum, whose averages are kept per row and column of a matrix.

    With beta_t = 1 - t^beta2_decay, rho_t = min(lr, 1 / sqrt(t)), RMS(x) the root mean square of x,
    and R_0 = C_0 = v_0 = 0,

        a_t = rho_t * max(eps2, RMS(p))
        p  <- p * (1 - lr * weight_decay)
        R_t = beta_t * R_{t-1} + (1 - beta_t) * (mean of grad_t^2 over each row)
        C_t = beta_t * C_{t-1} + (1 - beta_t) * (mean of grad_t^2 over each column)
        v_t = R_t C_t / max(mean of R_t, eps1)
        u_t = grad_t / max(sqrt(v_t), eps1)
        p  <- p - a_t * u_t / max(1, RMS(u_t) / d)

    Vectors and 0-d tensors use v_t = beta_t * v_{t-1} + (1 - beta_t) * grad_t^2 instead; a tensor
    of more than two dimensions is a batch of matrices, which share the two RMS.

    Hyperparameters, each a number, a tensor or a prefix tree of the params: `lr` >= 0 (1e-2), the
    largest relative step; `beta2_decay` <= 0 (-0.8), one for each tensor; `eps2` >= 0 (1e-3);
    `d` >= 1 (1), `weight_decay` >= 0 (0); with `eps1=True`, `eps1` >= 0 (the machine epsilon of
    float32).

    Buffers that a parameter does not need are empty tensors: `variance` for a matrix, `row_var` and
    `col_var` otherwise. RMS has derivative 0 at zero. Where the sides of a max or min are equal,
    the derivative is that of one of them; which one depends on rounding at the first step of a
    vector with d = 1, where RMS(u_t) is 1.

    `maximize` (to ascend) and `execution` are flags of every `diffopt.rules.Leafwise`.

    Args:
        eps1: make eps1 a hyperparameter. False takes the machine epsilon of the parameter's dtype
            (float32's for half precision), which is torch's eps=(None, eps2).

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.adafactor()
        >>> params = [torch.ones(2, 2)]
        >>> params, state = opt.update(
        ...     params, [torch.full((2, 2), 5.0)], opt.init(params), opt.hparams(lr=0.1)
        ... )
        >>> params
        [tensor([[0.9000, 0.9000],
                [0.9000, 0.9000]])]

    Source: Shazeer and Stern, "Adafactor: adaptive learning rates with sublinear memory cost",
    2018, algorithms 4 and 5, as in torch: lr bounds the relative step, eps1 the denominators.
    """

    eps1: bool = False

    State = AdafactorState
    batchable = False
    stackable = True
    overwrites = True

    @property
    def hparams(self) -> type[AdafactorHParams]:  # pyright: ignore[reportIncompatibleVariableOverride] (it depends on a flag)
        return AdafactorEps1HParams if self.eps1 else AdafactorHParams

    def begin(self, p: Any, step: Any) -> AdafactorState:
        return AdafactorState(step, *(zeros_like(p.new_empty(s)) for s in self.shapes(p.shape)))

    def scalars(self, t: Any, hp: AdafactorHParams) -> tuple[Any, Any]:
        bound = 1 / t**0.5
        return ops.where(hp.lr > bound, bound, hp.lr), t**hp.beta2_decay

    def rule(
        self, p: Any, g: Any, s: AdafactorState, hp: Any, c: Any, *, into: bool = False
    ) -> tuple[Any, AdafactorState]:
        rho, weight = c
        eps = hp.eps1 if self.eps1 else torch.finfo(p.dtype).eps
        step = ops.at_least(_rms(p), hp.eps2) * -rho
        row_var, col_var, variance = s[1:]
        if p.dim() > 1:
            rows, columns = _means_of_squares(g)
            row_var = ops.lerp(row_var, rows, weight, into=into)
            col_var = ops.lerp(col_var, columns, weight, into=into)
            del rows, columns  # to free them
            v = row_var / _mean(row_var, -2).clamp(min=eps) * col_var
            v = ops.at_least(v, eps * eps, into=into)
        else:
            variance = ops.lerp(variance, g * g, weight, into=into)
            v = ops.at_least(variance, eps * eps)
        u = ops.mul(ops.rsqrt(v, into=into), g, into=into)
        u = ops.mul(u, step / ops.at_least(_rms(u, hp.d), 1), into=into)
        if not ops.is_zero(hp.weight_decay):  # lr may be infinite
            p = ops.mul(p, 1 - hp.lr * hp.weight_decay, into=into)
        return ops.add(p, u, 1.0, into=into), AdafactorState(s.step, row_var, col_var, variance)

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        if len(shape) < 2:
            return (0,), (0,), shape
        *batch, rows, columns = shape
        return (*batch, rows, 1), (*batch, 1, columns), (0,)

    def refuse(self, p: Tensor) -> str | None:
        return (
            "is complex: Adafactor does not support complex parameters" if p.is_complex() else None
        )


adafactor = Adafactor


def _mean(x: Tensor, dim: int) -> Tensor:
    return x.mean(dim, keepdim=True) if x.shape[dim] else x.sum(dim, keepdim=True)


def _means_of_squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """Over rows and over columns."""
    square = x * x
    return _mean(square, -1), _mean(square, -2)


def _rms(x: Tensor, unit: Any = 1.0) -> Any:
    return ops.norm(x) / (max(x.numel(), 1) ** 0.5 * unit)
