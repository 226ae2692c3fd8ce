"""Adam (Kingma and Ba 2015), AdamW (Loshchilov and Hutter 2019) and AMSGrad (Reddi et al. 2018)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from diffopt import _torch
from diffopt._rule import ops
from diffopt._rule.hyper import Hyperparameter, check_flags, hparams, number
from diffopt._rule.leafwise import Leafwise, leafwise, zeros_like
from diffopt._tree import Tree


class AdamState(NamedTuple):
    """State of `adam` and `adamw`."""

    step: Any
    exp_avg: Tree
    exp_avg_sq: Tree
    max_exp_avg_sq: Tree


@hparams
class AdamHParams:
    """Hyperparameters of `adam`."""

    lr: Hyperparameter = number(1e-3, ge=0)
    beta1: Hyperparameter = number(0.9, ge=0, lt=1)
    beta2: Hyperparameter = number(0.999, ge=0, lt=1)
    eps: Hyperparameter = number(1e-8, ge=0)
    weight_decay: Hyperparameter = number(0.0, ge=0)


@hparams
class AdamWHParams(AdamHParams):
    """Hyperparameters of `adamw`."""

    weight_decay: Hyperparameter = number(1e-2, ge=0)


def adam(*, amsgrad: bool = False, maximize: bool = False) -> Leafwise[AdamState, AdamHParams]:
    """Adam: steps scaled by running averages of the gradient and of its square.

    With g_t = grad_t + weight_decay * p and m_0 = v_0 = 0,

        m_t = beta1 * m_{t-1} + (1 - beta1) * g_t
        v_t = beta2 * v_{t-1} + (1 - beta2) * g_t^2
        p  <- p - lr * (m_t / (1 - beta1^t)) / (sqrt(v_t / (1 - beta2^t)) + eps)

    Hyperparameters, each a number, a tensor or a prefix tree of the params: `lr` >= 0 (1e-3),
    `beta1` and `beta2` in [0, 1) (0.9, 0.999), `eps` >= 0 (1e-8), `weight_decay` >= 0 (0).

    Args:
        amsgrad: divide by the root of the greatest v so far (AMSGrad).
        maximize: ascend instead of descend.

    Returns:
        The optimizer. Where a gradient has been zero throughout, every derivative is finite and
        that of the problem without the coordinate.

    Example:
        >>> import torch, diffopt
        >>> opt = diffopt.adam()
        >>> params = [torch.tensor([1.0, 1.0])]
        >>> params, state = opt.update(
        ...     params, [torch.tensor([5.0, -5.0])], opt.init(params), opt.hparams(lr=0.1)
        ... )
        >>> params
        [tensor([0.9000, 1.1000])]

    Source: Kingma and Ba, "Adam: a method for stochastic optimization", 2015, algorithm 1; Reddi et
    al., "On the convergence of Adam and beyond", 2018, with the bias corrections of torch.
    """
    return _adam(AdamHParams, decoupled=False, amsgrad=amsgrad, maximize=maximize)


def adamw(*, amsgrad: bool = False, maximize: bool = False) -> Leafwise[AdamState, AdamWHParams]:
    """AdamW: `adam` with the weight decay taken out of the gradient.

    The parameter is first scaled, p <- p * (1 - lr * weight_decay), and then takes the step of
    `adam` with g_t = grad_t. `weight_decay` is 1e-2 by default.

    Args:
        amsgrad: divide by the root of the greatest v so far (AMSGrad).
        maximize: ascend instead of descend.

    Returns:
        The optimizer.

    Example:
        >>> import torch, diffopt
        >>> opt = diffopt.adamw()
        >>> params = [torch.tensor([1.0])]
        >>> params, state = opt.update(
        ...     params, [torch.zeros(1)], opt.init(params), opt.hparams(lr=0.1, weight_decay=0.5)
        ... )
        >>> params
        [tensor([0.9500])]

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019, as in torch: the
    decay is multiplied by the learning rate.
    """
    return _adam(AdamWHParams, decoupled=True, amsgrad=amsgrad, maximize=maximize)


def _adam(hparams: Any, *, decoupled: bool, amsgrad: bool, maximize: bool) -> Any:
    check_flags(amsgrad=amsgrad, maximize=maximize)

    def init(p: Any, step: Any) -> AdamState:
        return AdamState(step, zeros_like(p), zeros_like(p), zeros_like(p) if amsgrad else ())

    def scalars(t: Any, hp: AdamHParams) -> tuple[Any, Any, Any]:
        shrinkage = 1 - hp.lr * hp.weight_decay
        return -hp.lr / (1 - hp.beta1**t), (1 - hp.beta2**t) ** 0.5, shrinkage

    def rule(p: Any, g: Any, s: AdamState, hp: AdamHParams, c: Any) -> tuple[Any, AdamState]:
        descent, root_correction2, shrinkage = c
        if decoupled:
            p = p * shrinkage
        else:
            g = ops.add_decay(g, p, hp.weight_decay)
        m = ops.lerp(s.exp_avg, g, 1 - hp.beta1)
        v = ops.addcmul(hp.beta2 * s.exp_avg_sq, g, g, 1 - hp.beta2)
        v_max: Any = ops.maximum(s.max_exp_avg_sq, v) if amsgrad else ()
        denominator = ops.sqrt(v_max if amsgrad else v) / root_correction2 + hp.eps
        return ops.addcdiv(p, m, denominator, descent), AdamState(s.step, m, v, v_max)

    def native(p: Any, g: Any, s: AdamState, hp: AdamHParams, first: bool | None, amp: Any) -> bool:
        kernel = _torch.fused_adamw_ if decoupled else _torch.fused_adam_
        buffers = s.exp_avg, s.exp_avg_sq, list(s.max_exp_avg_sq)
        numbers = {field.name: getattr(hp, field.name) for field in dataclasses.fields(hp)}
        kernel(p, g, *buffers, s.step, **numbers, amsgrad=amsgrad, maximize=maximize, **amp)
        return True

    return leafwise(
        AdamState,
        hparams,
        init,
        rule,
        scalars=scalars,
        maximize=maximize,
        native=native,
        elementwise=True,
    )
