"""NAdam: Adam with Nesterov's momentum (Dozat 2016)."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from diffopt._rule import ops
from diffopt._rule.hyper import Hyperparameter, hparams, number
from diffopt._rule.leafwise import Leafwise
from diffopt._tree import Tree


class NAdamState(NamedTuple):
    """State of `nadam`."""

    step: Any
    mu_product: Tree
    exp_avg: Tree
    exp_avg_sq: Tree


@hparams
class NAdamHParams:
    """Hyperparameters of `nadam`."""

    lr: Hyperparameter = number(2e-3, ge=0)
    beta1: Hyperparameter = number(0.9, ge=0, lt=1)
    beta2: Hyperparameter = number(0.999, ge=0, lt=1)
    eps: Hyperparameter = number(1e-8, ge=0)
    weight_decay: Hyperparameter = number(0.0, ge=0)
    momentum_decay: Hyperparameter = number(4e-3, ge=0)


class NAdam(Leafwise[NAdamState, NAdamHParams]):
    """NAdam: Adam whose momentum looks one step ahead.

    With g_t = grad_t + weight_decay * p, m_0 = v_0 = 0, M_0 = 1,

        mu_t = beta1 * (1 - 0.96^(t * momentum_decay) / 2)
        M_t = M_{t-1} * mu_t
        m_t = beta1 * m_{t-1} + (1 - beta1) * g_t
        v_t = beta2 * v_{t-1} + (1 - beta2) * g_t^2
        n_t = (1 - mu_t) / (1 - M_t) * g_t + mu_{t+1} / (1 - M_t * mu_{t+1}) * m_t
        p  <- p - lr * n_t / (sqrt(v_t / (1 - beta2^t)) + eps)

    Hyperparameters, each a number, a tensor or a prefix tree of the params: `lr` >= 0 (2e-3),
    `beta1` and `beta2` in [0, 1) (0.9, 0.999), `eps` >= 0 (1e-8), `weight_decay` >= 0 (0),
    `momentum_decay` >= 0 (4e-3).

    `state.mu_product`, M, is one number for each tensor, or has the shape of a `beta1` or
    `momentum_decay` that is larger; it starts at 0, and the first step sets it to 1 for all
    tensors.

    `maximize` (to ascend) and `execution` are flags of every `diffopt.rules.Leafwise`.

    Args:
        decoupled_weight_decay: scale the parameter, p <- p * (1 - lr * weight_decay), instead of
            adding to its gradient.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.nadam()
        >>> params = [torch.tensor([1.0])]
        >>> params, state = opt.update(
        ...     params, [torch.tensor([5.0])], opt.init(params), opt.hparams(lr=0.1, beta1=0.0)
        ... )
        >>> params
        [tensor([0.9000])]

    Source: Dozat, "Incorporating Nesterov momentum into Adam", 2016, as in torch.
    """

    decoupled_weight_decay: bool = False

    State = NAdamState
    hparams: ClassVar[type[NAdamHParams]] = NAdamHParams
    elementwise = True
    proportional = True
    per_hyperparameter = ("mu_product",)

    def scalars(self, t: Any, hp: NAdamHParams) -> tuple[Any, Any, Any, Any]:
        shrinkage = 1 - hp.lr * hp.weight_decay
        mu, mu_next = (
            hp.beta1 * (1 - 0.5 * 0.96 ** (when * hp.momentum_decay)) for when in (t, t + 1)
        )
        return mu, mu_next, 1 - hp.beta2**t, shrinkage

    def rule(
        self, p: Any, g: Any, s: NAdamState, hp: NAdamHParams, c: Any
    ) -> tuple[Any, NAdamState]:
        mu, mu_next, correction2, shrinkage = c
        if self.decoupled_weight_decay:
            p = p * shrinkage
        else:
            g = ops.add_decay(g, p, hp.weight_decay)
        m = ops.lerp(s.exp_avg, g, 1 - hp.beta1)
        v = ops.addcmul(hp.beta2 * s.exp_avg_sq, g, g, 1 - hp.beta2)
        mu_product = s.mu_product * mu
        product = ops.coefficient(mu_product)
        denominator = ops.sqrt(v / correction2) + hp.eps
        p = ops.addcdiv(p, g, denominator, -hp.lr * (1 - mu) / (1 - product))
        p = ops.addcdiv(p, m, denominator, -hp.lr * mu_next / (1 - product * mu_next))
        return p, NAdamState(s.step, mu_product, m, v)

    def initial(self, hp: NAdamHParams) -> dict[str, Any]:
        return {"mu_product": 1.0}


nadam = NAdam
