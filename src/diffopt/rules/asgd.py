"""Averaged stochastic gradient descent (Polyak and Juditsky 1992)."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from diffopt._rule import ops
from diffopt._rule.hyper import Hyperparameter, hparams, number
from diffopt._rule.leafwise import Leafwise
from diffopt._tree import Tree


class ASGDState(NamedTuple):
    """State of `asgd`."""

    step: Any
    eta: Tree
    mu: Tree
    ax: Tree


@hparams
class ASGDHParams:
    """Hyperparameters of `asgd`."""

    lr: Hyperparameter = number(1e-2, ge=0)
    lambd: Hyperparameter = number(1e-4)
    alpha: Hyperparameter = number(0.75)
    t0: Hyperparameter = number(1e6)
    weight_decay: Hyperparameter = number(0.0, ge=0)


class ASGD(Leafwise[ASGDState, ASGDHParams]):
    """Gradient descent with a decaying learning rate, and the average of its iterates.

    With g_t = grad_t + weight_decay * p, e_1 = lr, m_1 = 1 and a_0 = 0,

        p  <- p * (1 - lambd * e_t) - e_t * g_t
        a_t = a_{t-1} + m_t * (p - a_{t-1})
        e_{t+1} = lr / (1 + lambd * lr * t)^alpha
        m_{t+1} = 1 / max(1, t - t0)

    Hyperparameters, each a number, a tensor or a prefix tree of the params: `lr` >= 0 (1e-2),
    `lambd` (1e-4), `alpha` (0.75), `t0` (1e6), `weight_decay` >= 0 (0).

    The average a is `state.ax`; until step `t0` it is the iterate itself. As in torch, the rate e
    and the weight m of a step, `state.eta` and `state.mu`, are computed from the hyperparameters of
    the step before. Each is one number for each tensor, or has the shape of a hyperparameter that
    is larger, and starts at 0; the first step sets them to `lr` and 1, for all tensors. Where the
    first gradient of one comes later, torch.optim.ASGD takes the `lr` of that step, and counts t
    from there.

    `maximize` (to ascend) and `execution` are flags of every `diffopt.rules.Leafwise`.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.asgd()
        >>> params, state = [torch.tensor([1.0])], opt.init([torch.tensor([1.0])])
        >>> hp = opt.hparams(lr=0.1, lambd=0.0, t0=0.0)
        >>> for _ in range(3):
        ...     params, state = opt.update(params, [torch.ones(1)], state, hp)
        >>> params, state.ax  # the average of 0.8 and 0.7
        ([tensor([0.7000])], [tensor([0.7500])])

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992, with
    the schedules of torch.
    """

    State = ASGDState
    hparams: ClassVar[type[ASGDHParams]] = ASGDHParams
    elementwise = True
    per_hyperparameter = ("eta", "mu")

    def scalars(self, t: Any, hp: ASGDHParams) -> tuple[Any, Any]:
        next_eta = hp.lr / (1 + hp.lambd * hp.lr * t) ** hp.alpha
        averaged = t - hp.t0
        return next_eta, 1 / ops.where(averaged > 1, averaged, 1.0)

    def rule(self, p: Any, g: Any, s: ASGDState, hp: ASGDHParams, c: Any) -> tuple[Any, ASGDState]:
        next_eta, next_mu = c
        eta, mu = ops.coefficient(s.eta), ops.coefficient(s.mu)
        g = ops.add_decay(g, p, hp.weight_decay)
        p = ops.add(p * (1 - hp.lambd * eta), g, -eta)
        ax = ops.lerp(s.ax, p, mu)
        return p, ASGDState(s.step, 0 * s.eta + next_eta, 0 * s.mu + next_mu, ax)

    def initial(self, hp: ASGDHParams) -> dict[str, Any]:
        return {"eta": hp.lr, "mu": 1.0}


asgd = ASGD
