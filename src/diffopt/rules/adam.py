"""Adam (Kingma and Ba 2015), AdamW (Loshchilov and Hutter 2019) and AMSGrad (Reddi et al. 2018)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar, NamedTuple

from diffopt import _torch
from diffopt._rule import ops
from diffopt._rule.hyper import Hyperparameter, hparams, number
from diffopt._rule.leafwise import Leafwise
from diffopt._rule.rule import zeros_like
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


class Adam(Leafwise[AdamState, AdamHParams]):
    """Adam: running averages of the gradient and of its square.

    With g_t = grad_t + weight_decay * p and m_0 = v_0 = 0,

        m_t = beta1 * m_{t-1} + (1 - beta1) * g_t
        v_t = beta2 * v_{t-1} + (1 - beta2) * g_t^2
        p  <- p - lr * (m_t / (1 - beta1^t)) / (sqrt(v_t / (1 - beta2^t)) + eps)

    Hyperparameters, each a number, a tensor or a prefix tree of the params: `lr` >= 0 (1e-3),
    `beta1` and `beta2` in [0, 1) (0.9, 0.999), `eps` >= 0 (1e-8), `weight_decay` >= 0 (0).

    Where a gradient has always been zero, derivatives are finite: those of the problem without that
    coordinate.

    `maximize` (to ascend) and `execution` are flags of every `diffopt.rules.Leafwise`.

    Args:
        amsgrad: divide by the square root of the largest v so far (AMSGrad).

    Examples:
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

    amsgrad: bool = False

    State = AdamState
    hparams: ClassVar[type[AdamHParams]] = AdamHParams
    elementwise = True
    proportional = True
    decoupled = False

    def begin(self, p: Any, step: Any) -> AdamState:
        return AdamState(step, zeros_like(p), zeros_like(p), zeros_like(p) if self.amsgrad else ())

    def scalars(self, t: Any, hp: AdamHParams) -> tuple[Any, Any, Any]:
        shrinkage = 1 - hp.lr * hp.weight_decay
        return -hp.lr / (1 - hp.beta1**t), (1 - hp.beta2**t) ** 0.5, shrinkage

    def rule(self, p: Any, g: Any, s: AdamState, hp: AdamHParams, c: Any) -> tuple[Any, AdamState]:
        descent, root_correction2, shrinkage = c
        if self.decoupled:
            p = p * shrinkage
        else:
            g = ops.add_decay(g, p, hp.weight_decay)
        m = ops.lerp(s.exp_avg, g, 1 - hp.beta1)
        v = ops.addcmul(hp.beta2 * s.exp_avg_sq, g, g, 1 - hp.beta2)
        v_max: Any = ops.maximum(s.max_exp_avg_sq, v) if self.amsgrad else ()
        denominator = ops.sqrt(v_max if self.amsgrad else v) / root_correction2 + hp.eps
        return ops.addcdiv(p, m, denominator, descent), AdamState(s.step, m, v, v_max)

    def native(
        self, p: Any, g: Any, s: AdamState, hp: AdamHParams, first: bool | None, amp: Any
    ) -> bool:
        kernel = _torch.fused_adamw_ if self.decoupled else _torch.fused_adam_
        buffers = s.exp_avg, s.exp_avg_sq, list(s.max_exp_avg_sq)
        numbers = {field.name: getattr(hp, field.name) for field in fields(hp)}
        kernel(
            p, g, *buffers, s.step, **numbers, amsgrad=self.amsgrad, maximize=self.maximize, **amp
        )
        return True


adam = Adam


class AdamW(Adam):
    """AdamW: `adam` with decoupled weight decay.

    The parameter is first scaled, p <- p * (1 - lr * weight_decay), and then takes the step of
    `adam` with g_t = grad_t. `weight_decay` is 1e-2 by default.

    `maximize` (to ascend) and `execution` are flags of every `diffopt.rules.Leafwise`.

    Args:
        amsgrad: divide by the square root of the largest v so far (AMSGrad).

    Examples:
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

    hparams: ClassVar[type[AdamWHParams]] = AdamWHParams
    decoupled = True


adamw = AdamW
