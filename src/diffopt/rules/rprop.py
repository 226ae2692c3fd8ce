"""Rprop: steps by the signs of gradients (Riedmiller and Braun 1993)."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch

from diffopt._rule import ops
from diffopt._rule.hyper import Hyperparameter, hparams, number
from diffopt._rule.leafwise import Leafwise
from diffopt._tree import Tree


class RpropState(NamedTuple):
    """State of `rprop`."""

    step: Any
    prev: Tree
    step_size: Tree


@hparams
class RpropHParams:
    """Hyperparameters of `rprop`."""

    lr: Hyperparameter = number(1e-2, ge=0)
    etaminus: Hyperparameter = number(0.5, gt=0, lt=1)
    etaplus: Hyperparameter = number(1.2, gt=1)
    step_size_min: Hyperparameter = number(1e-6)
    step_size_max: Hyperparameter = number(50.0)


class Rprop(Leafwise[RpropState, RpropHParams]):
    """Rprop: each weight has a step size, which grows while the sign of its gradient is the same.

    With e_0 = lr and g_0 = 0, and s_t = sign(grad_t * g_{t-1}),

        e_t = clamp(e_{t-1} * (etaplus if s_t > 0, etaminus if s_t < 0, else 1),
                    step_size_min, step_size_max)
        g_t = 0 if s_t < 0, else grad_t
        p  <- p - e_t * sign(g_t)

    Hyperparameters, each a number, a tensor or a prefix tree of the params: `lr` >= 0 (1e-2), the
    first step size; `etaminus` in (0, 1) (0.5), `etaplus` > 1 (1.2), `step_size_min` (1e-6),
    `step_size_max` (50).

    The derivative of a step with respect to the gradient is 0, and that with respect to `lr` comes
    from the first step size only. `init` does not know the hyperparameters: `state.step_size`
    starts at 0, and the first step sets it to `lr`, for all tensors. Where the first gradient of
    one comes later, torch.optim.Rprop takes the `lr` of that step.

    `maximize` (to ascend) and `execution` are flags of every `diffopt.rules.Leafwise`.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.rprop()
        >>> params, state = [torch.tensor([1.0])], opt.init([torch.tensor([1.0])])
        >>> for _ in range(2):
        ...     params, state = opt.update(params, [torch.ones(1)], state, opt.hparams(lr=0.1))
        >>> params  # 1 - 0.1 - 0.12
        [tensor([0.7800])]

    Source: Riedmiller and Braun, "A direct adaptive method for faster backpropagation learning: the
    RPROP algorithm", 1993; without its backtracking, as in torch.
    """

    State = RpropState
    hparams: ClassVar[type[RpropHParams]] = RpropHParams
    elementwise = True

    def rule(
        self, p: Any, g: Any, s: RpropState, hp: RpropHParams, c: Any
    ) -> tuple[Any, RpropState]:
        sign = torch.sign(g * s.prev)
        shrunk = torch.where(sign < 0, s.step_size * hp.etaminus, s.step_size)
        size = torch.where(sign > 0, s.step_size * hp.etaplus, shrunk)
        size = ops.clamp(size, hp.step_size_min, hp.step_size_max)
        g = torch.where(sign < 0, 0, g)
        return p - torch.sign(g) * size, RpropState(s.step, g, size)

    def initial(self, hp: RpropHParams) -> dict[str, Any]:
        return {"step_size": hp.lr}


rprop = Rprop
