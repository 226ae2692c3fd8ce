"""RMSprop (Tieleman and Hinton 2012), plain, centered (Graves 2013) and with momentum."""

from __future__ import annotations

from typing import Any, NamedTuple

from diffopt._rule import ops
from diffopt._rule.hyper import Hyperparameter, hparams, number
from diffopt._rule.leafwise import Leafwise
from diffopt._rule.rule import zeros_like
from diffopt._tree import Tree


class RMSpropState(NamedTuple):
    """State of `rmsprop`."""

    step: Any
    square_avg: Tree
    momentum_buffer: Tree
    grad_avg: Tree


@hparams
class RMSpropHParams:
    """Hyperparameters of `rmsprop(momentum=False)`."""

    lr: Hyperparameter = number(1e-2, ge=0)
    alpha: Hyperparameter = number(0.99, ge=0)
    eps: Hyperparameter = number(1e-8, ge=0)
    weight_decay: Hyperparameter = number(0.0, ge=0)


@hparams
class RMSpropMomentumHParams(RMSpropHParams):
    """Hyperparameters of `rmsprop`."""

    momentum: Hyperparameter = number(0.0, ge=0)


class RMSprop(Leafwise[RMSpropState, RMSpropHParams]):
    """RMSprop: gradients divided by the square root of a running average of their squares.

    With g_t = grad_t + weight_decay * p and v_0 = a_0 = b_0 = 0,

        v_t = alpha * v_{t-1} + (1 - alpha) * g_t^2
        a_t = alpha * a_{t-1} + (1 - alpha) * g_t            (centered only, else a_t = 0)
        b_t = momentum * b_{t-1} + g_t / (sqrt(v_t - a_t^2) + eps)
        p  <- p - lr * b_t

    Hyperparameters, each a number, a tensor or a prefix tree of the params: `lr` >= 0 (1e-2),
    `alpha` >= 0 (0.99), `eps` >= 0 (1e-8), `weight_decay` >= 0 (0), `momentum` >= 0 (0).

    `maximize` (to ascend) and `execution` are flags of every `diffopt.rules.Leafwise`.

    Args:
        centered: subtract the square of the average gradient, an estimate of the variance.
        momentum: False keeps no buffer b and has no hyperparameter `momentum`.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.rmsprop()
        >>> params = [torch.tensor([1.0])]
        >>> params, state = opt.update(
        ...     params, [torch.tensor([3.0])], opt.init(params), opt.hparams(lr=0.1, alpha=0.0)
        ... )
        >>> params
        [tensor([0.9000])]

    Source: Tieleman and Hinton, "Lecture 6.5: RMSProp", 2012; centered: Graves, "Generating
    sequences with recurrent neural networks", 2013, with eps outside the root as in torch.
    """

    centered: bool = False
    momentum: bool = True

    State = RMSpropState
    elementwise = True
    proportional = True

    @property
    def hparams(self) -> type[RMSpropHParams]:  # pyright: ignore[reportIncompatibleVariableOverride] (it depends on a flag)
        return RMSpropMomentumHParams if self.momentum else RMSpropHParams

    def begin(self, p: Any, step: Any) -> RMSpropState:
        return RMSpropState(
            step,
            zeros_like(p),
            zeros_like(p) if self.momentum else (),
            zeros_like(p) if self.centered else (),
        )

    def rule(self, p: Any, g: Any, s: RMSpropState, hp: Any, c: Any) -> tuple[Any, RMSpropState]:
        g = ops.add_decay(g, p, hp.weight_decay)
        v = ops.addcmul(hp.alpha * s.square_avg, g, g, 1 - hp.alpha)
        a: Any = ops.lerp(s.grad_avg, g, 1 - hp.alpha) if self.centered else ()
        denominator = ops.sqrt(ops.addcmul(v, a, a, -1) if self.centered else v) + hp.eps
        if not self.momentum:
            return ops.addcdiv(p, g, denominator, -hp.lr), RMSpropState(s.step, v, (), a)
        b = ops.addcdiv(hp.momentum * s.momentum_buffer, g, denominator, 1)
        return ops.add(p, b, -hp.lr), RMSpropState(s.step, v, b, a)


rmsprop = RMSprop
