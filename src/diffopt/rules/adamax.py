"""Adamax: Adam in the infinity norm (Kingma and Ba 2015)."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from diffopt._rule import ops
from diffopt._rule.hyper import Hyperparameter, hparams, number
from diffopt._rule.leafwise import Leafwise
from diffopt._tree import Tree


class AdamaxState(NamedTuple):
    """State of `adamax`."""

    step: Any
    exp_avg: Tree
    exp_inf: Tree


@hparams
class AdamaxHParams:
    """Hyperparameters of `adamax`."""

    lr: Hyperparameter = number(2e-3, ge=0)
    beta1: Hyperparameter = number(0.9, ge=0, lt=1)
    beta2: Hyperparameter = number(0.999, ge=0, lt=1)
    eps: Hyperparameter = number(1e-8, ge=0)
    weight_decay: Hyperparameter = number(0.0, ge=0)


class Adamax(Leafwise[AdamaxState, AdamaxHParams]):
    """Adamax: steps scaled by a decaying maximum of past gradients.

    With g_t = grad_t + weight_decay * p and m_0 = u_0 = 0,

        m_t = beta1 * m_{t-1} + (1 - beta1) * g_t
        u_t = max(beta2 * u_{t-1}, |g_t| + eps)
        p  <- p - lr / (1 - beta1^t) * m_t / u_t

    Hyperparameters, each a number, a tensor or a prefix tree of the params: `lr` >= 0 (2e-3),
    `beta1` and `beta2` in [0, 1) (0.9, 0.999), `eps` >= 0 (1e-8), `weight_decay` >= 0 (0).

    Where the two sides of the maximum are equal, each gets half of the derivative.

    `maximize` (to ascend) and `execution` are flags of every `diffopt.rules.Leafwise`.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.adamax()
        >>> params = [torch.tensor([1.0, 1.0])]
        >>> params, state = opt.update(
        ...     params, [torch.tensor([5.0, -5.0])], opt.init(params), opt.hparams(lr=0.1)
        ... )
        >>> params
        [tensor([0.9000, 1.1000])]

    Source: Kingma and Ba, "Adam: a method for stochastic optimization", 2015, algorithm 2; eps as
    in torch.
    """

    State = AdamaxState
    hparams: ClassVar[type[AdamaxHParams]] = AdamaxHParams
    elementwise = True
    proportional = True

    def scalars(self, t: Any, hp: AdamaxHParams) -> Any:
        return -hp.lr / (1 - hp.beta1**t)

    def rule(
        self, p: Any, g: Any, s: AdamaxState, hp: AdamaxHParams, c: Any
    ) -> tuple[Any, AdamaxState]:
        g = ops.add_decay(g, p, hp.weight_decay)
        m = ops.lerp(s.exp_avg, g, 1 - hp.beta1)
        u = ops.maximum(hp.beta2 * s.exp_inf, abs(g) + hp.eps)
        return ops.addcdiv(p, m, u, c), AdamaxState(s.step, m, u)


adamax = Adamax
