"""Adagrad (Duchi et al. 2011)."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from diffopt import _torch
from diffopt._rule import ops
from diffopt._rule.hyper import Hyperparameter, hparams, number
from diffopt._rule.leafwise import Leafwise
from diffopt._tree import Tree


class AdagradState(NamedTuple):
    """State of `adagrad`."""

    step: Any
    sum: Tree


@hparams
class AdagradHParams:
    """Hyperparameters of `adagrad`."""

    lr: Hyperparameter = number(1e-2, ge=0)
    lr_decay: Hyperparameter = number(0.0, ge=0)
    weight_decay: Hyperparameter = number(0.0, ge=0)
    initial_accumulator_value: Hyperparameter = number(0.0, ge=0)
    eps: Hyperparameter = number(1e-10, ge=0)


class Adagrad(Leafwise[AdagradState, AdagradHParams]):
    """Adagrad: gradients divided by the square root of the sum of their squares so far.

    With g_t = grad_t + weight_decay * p and G_0 = initial_accumulator_value,

        G_t = G_{t-1} + g_t^2
        p  <- p - lr / (1 + (t - 1) * lr_decay) * g_t / (sqrt(G_t) + eps)

    Hyperparameters, each a number, a tensor or a prefix tree of the params: `lr` >= 0 (1e-2),
    `lr_decay` >= 0 (0), `weight_decay` >= 0 (0), `initial_accumulator_value` >= 0 (0), `eps` >= 0
    (1e-10).

    `init` does not know the hyperparameters, so `state.sum` starts at 0 and the first step adds
    `initial_accumulator_value`, for all tensors, also those whose first gradient comes later; from
    then on it equals torch's. t counts the steps of the whole tree.

    `maximize` (to ascend) and `execution` are flags of every `diffopt.rules.Leafwise`.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.adagrad()
        >>> params = [torch.tensor([1.0])]
        >>> params, state = opt.update(
        ...     params, [torch.tensor([3.0])], opt.init(params), opt.hparams(lr=0.1)
        ... )
        >>> params, state.sum
        ([tensor([0.9000])], [tensor([9.])])

    Source: Duchi, Hazan and Singer, "Adaptive subgradient methods for online learning and
    stochastic optimization", 2011; lr_decay as in torch.
    """

    State = AdagradState
    hparams: ClassVar[type[AdagradHParams]] = AdagradHParams
    elementwise = True
    proportional = True

    def scalars(self, t: Any, hp: AdagradHParams) -> Any:
        return -hp.lr / (1 + (t - 1) * hp.lr_decay)

    def rule(
        self, p: Any, g: Any, s: AdagradState, hp: AdagradHParams, c: Any
    ) -> tuple[Any, AdagradState]:
        g = ops.add_decay(g, p, hp.weight_decay)
        total = ops.addcmul(s.sum, g, g, 1)
        return ops.addcdiv(p, g, ops.sqrt(total) + hp.eps, c), AdagradState(s.step, total)

    def native(
        self, p: Any, g: Any, s: AdagradState, hp: AdagradHParams, first: bool | None, amp: Any
    ) -> bool:
        if hp.initial_accumulator_value != 0 and first is not False:
            return False  # the first step adds it
        _torch.fused_adagrad_(
            p,
            g,
            s.sum,
            s.step,
            lr=hp.lr,
            lr_decay=hp.lr_decay,
            weight_decay=hp.weight_decay,
            eps=hp.eps,
            maximize=self.maximize,
            **amp,
        )
        return True

    def initial(self, hp: AdagradHParams) -> dict[str, Any]:
        return {"sum": hp.initial_accumulator_value}


adagrad = Adagrad
