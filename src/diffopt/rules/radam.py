"""RAdam: Adam with a rectified variance (Liu et al. 2020)."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from diffopt._rule import ops
from diffopt._rule.hyper import Hyperparameter, hparams, number
from diffopt._rule.leafwise import Leafwise
from diffopt._tree import Tree


class RAdamState(NamedTuple):
    """State of `radam`."""

    step: Any
    exp_avg: Tree
    exp_avg_sq: Tree


@hparams
class RAdamHParams:
    """Hyperparameters of `radam`."""

    lr: Hyperparameter = number(1e-3, ge=0)
    beta1: Hyperparameter = number(0.9, ge=0, lt=1)
    beta2: Hyperparameter = number(0.999, ge=0, lt=1)
    eps: Hyperparameter = number(1e-8, ge=0)
    weight_decay: Hyperparameter = number(0.0, ge=0)


class RAdam(Leafwise[RAdamState, RAdamHParams]):
    """RAdam: plain momentum while the second moment is too uncertain, then rectified Adam.

    With g_t = grad_t + weight_decay * p, m_0 = v_0 = 0 and r_inf = 2 / (1 - beta2) - 1,

        m_t = beta1 * m_{t-1} + (1 - beta1) * g_t
        v_t = beta2 * v_{t-1} + (1 - beta2) * g_t^2
        r_t = r_inf - 2 t beta2^t / (1 - beta2^t)
        a_t = sqrt((r_t - 4) (r_t - 2) r_inf / ((r_inf - 4) (r_inf - 2) r_t))
              * sqrt(1 - beta2^t) / (sqrt(v_t) + eps)      where r_t > 5, else 1
        p  <- p - lr * m_t / (1 - beta1^t) * a_t

    Hyperparameters, each a number, a tensor or a prefix tree of the params: `lr` >= 0 (1e-3),
    `beta1` and `beta2` in [0, 1) (0.9, 0.999), `eps` >= 0 (1e-8), `weight_decay` >= 0 (0).

    As a function of `beta2` it jumps where r_t crosses 5, and has no derivative there.

    `maximize` (to ascend) and `execution` are flags of every `diffopt.rules.Leafwise`.

    Args:
        decoupled_weight_decay: scale the parameter, p <- p * (1 - lr * weight_decay), instead of
            adding to its gradient.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.radam()
        >>> params = [torch.tensor([1.0])]
        >>> params, state = opt.update(
        ...     params, [torch.tensor([5.0])], opt.init(params), opt.hparams(lr=0.1)
        ... )
        >>> params  # the first steps are those of momentum
        [tensor([0.5000])]

    Source: Liu et al., "On the variance of the adaptive learning rate and beyond", 2020, algorithm
    2; eps and the threshold 5 (in the paper 4) as in torch.
    """

    decoupled_weight_decay: bool = False

    State = RAdamState
    hparams: ClassVar[type[RAdamHParams]] = RAdamHParams
    elementwise = True
    proportional = True

    def scalars(self, t: Any, hp: RAdamHParams) -> tuple[Any, Any, Any, Any, Any]:
        shrinkage = 1 - hp.lr * hp.weight_decay
        correction1, correction2 = 1 - hp.beta1**t, 1 - hp.beta2**t
        r_inf = 2 / (1 - hp.beta2) - 1
        r = r_inf - 2 * t * hp.beta2**t / correction2
        rectified = r > 5
        # Where it does not apply, keep the square root away from negative numbers.
        r, r_inf = ops.where(rectified, r, 6.0), ops.where(rectified, r_inf, 6.0)
        rectification = ((r - 4) * (r - 2) * r_inf / ((r_inf - 4) * (r_inf - 2) * r)) ** 0.5
        adaptive = -hp.lr / correction1 * correction2**0.5 * rectification
        adaptive, plain = ops.where(rectified, adaptive, 0.0), ops.where(rectified, 0.0, hp.lr)
        return correction1, plain, adaptive, ops.where(rectified, hp.eps, 1.0), shrinkage

    def rule(
        self, p: Any, g: Any, s: RAdamState, hp: RAdamHParams, c: Any
    ) -> tuple[Any, RAdamState]:
        correction1, plain, adaptive, eps, shrinkage = c
        if self.decoupled_weight_decay:
            p = p * shrinkage
        else:
            g = ops.add_decay(g, p, hp.weight_decay)
        m = ops.lerp(s.exp_avg, g, 1 - hp.beta1)
        v = ops.addcmul(hp.beta2 * s.exp_avg_sq, g, g, 1 - hp.beta2)
        # One of the two has the factor 0; as a number it is left out.
        if not ops.is_zero(adaptive):
            p = ops.addcdiv(p, m, ops.sqrt(v) + eps, adaptive)
        if ops.is_zero(adaptive) or not ops.is_zero(plain):
            p = p - m / correction1 * plain
        return p, RAdamState(s.step, m, v)


radam = RAdam
