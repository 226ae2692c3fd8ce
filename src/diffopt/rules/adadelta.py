"""Adadelta (Zeiler 2012)."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from diffopt._rule import ops
from diffopt._rule.hyper import Hyperparameter, hparams, number
from diffopt._rule.leafwise import Leafwise
from diffopt._tree import Tree


class AdadeltaState(NamedTuple):
    """State of `adadelta`."""

    step: Any
    square_avg: Tree
    acc_delta: Tree


@hparams
class AdadeltaHParams:
    """Hyperparameters of `adadelta`."""

    lr: Hyperparameter = number(1.0, ge=0)
    rho: Hyperparameter = number(0.9, ge=0, le=1)
    eps: Hyperparameter = number(1e-6, ge=0)
    weight_decay: Hyperparameter = number(0.0, ge=0)


class Adadelta(Leafwise[AdadeltaState, AdadeltaHParams]):
    """Adadelta: steps in the units of the parameter, from running averages of squares.

    With g_t = grad_t + weight_decay * p and v_0 = u_0 = 0,

        v_t = rho * v_{t-1} + (1 - rho) * g_t^2
        d_t = sqrt(u_{t-1} + eps) / sqrt(v_t + eps) * g_t
        u_t = rho * u_{t-1} + (1 - rho) * d_t^2
        p  <- p - lr * d_t

    Hyperparameters, each a number, a tensor or a prefix tree of the params: `lr` >= 0 (1), `rho` in
    [0, 1] (0.9), `eps` >= 0 (1e-6), `weight_decay` >= 0 (0).

    `maximize` (to ascend) and `execution` are flags of every `diffopt.rules.Leafwise`.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.adadelta()
        >>> params = [torch.tensor([1.0])]
        >>> hp = opt.hparams(rho=0.0, eps=1.0)
        >>> params, state = opt.update(params, [torch.zeros(1)], opt.init(params), hp)
        >>> params, state = opt.update(params, [torch.ones(1)], state, hp)
        >>> params  # 1 - 1 / sqrt(2)
        [tensor([0.2929])]

    Source: Zeiler, "ADADELTA: an adaptive learning rate method", 2012, algorithm 1; the learning
    rate as in torch.
    """

    State = AdadeltaState
    hparams: ClassVar[type[AdadeltaHParams]] = AdadeltaHParams
    elementwise = True
    proportional = True

    def rule(
        self, p: Any, g: Any, s: AdadeltaState, hp: AdadeltaHParams, c: Any
    ) -> tuple[Any, AdadeltaState]:
        g = ops.add_decay(g, p, hp.weight_decay)
        v = ops.addcmul(hp.rho * s.square_avg, g, g, 1 - hp.rho)
        d = ops.sqrt(s.acc_delta + hp.eps) / ops.sqrt(v + hp.eps) * g
        u = ops.addcmul(hp.rho * s.acc_delta, d, d, 1 - hp.rho)
        return ops.add(p, d, -hp.lr), AdadeltaState(s.step, v, u)


adadelta = Adadelta
