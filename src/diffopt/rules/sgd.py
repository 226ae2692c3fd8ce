"""Stochastic gradient descent: plain, with momentum (Polyak 1964), with Nesterov's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from diffopt import _torch
from diffopt._rule import ops
from diffopt._rule.hyper import Hyperparameter, check_flags, hparams, number
from diffopt._rule.leafwise import Leafwise, leafwise, zeros_like
from diffopt._tree import Tree


class SGDState(NamedTuple):
    """State of `sgd`."""

    step: Any
    momentum_buffer: Tree


@hparams
class SGDHParams:
    """Hyperparameters of `sgd(momentum=False)`."""

    lr: Hyperparameter = number(1e-3, ge=0)
    weight_decay: Hyperparameter = number(0.0, ge=0)


@hparams
class MomentumHParams(SGDHParams):
    """Hyperparameters of `sgd`."""

    momentum: Hyperparameter = number(0.0, ge=0)
    dampening: Hyperparameter = number(0.0)


def sgd(
    *, nesterov: bool = False, momentum: bool = True, maximize: bool = False
) -> Leafwise[SGDState, Any]:
    """Stochastic gradient descent with momentum.

    With g_t = grad_t + weight_decay * p, b_1 = g_1 and, for t > 1,

        b_t = momentum * b_{t-1} + (1 - dampening) * g_t
        p  <- p - lr * b_t                       (nesterov: p - lr * (g_t + momentum * b_t))

    Hyperparameters, each a number, a tensor or a prefix tree of the params: `lr` >= 0 (1e-3),
    `momentum` >= 0 (0), `dampening` (0), `weight_decay` >= 0 (0). Where `momentum` is the number 0,
    dampening has no effect, as in torch; where it is a tensor, the formula holds at 0 too.

    Args:
        nesterov: use Nesterov's momentum.
        momentum: False keeps no buffer and has no hyperparameters `momentum` and `dampening`.
        maximize: ascend instead of descend.

    Returns:
        The optimizer. Unlike torch.optim.SGD's, whose first buffer is a detached gradient, its
        first step carries derivatives.

    Raises:
        TypeError: a flag is no bool.
        ValueError: nesterov without momentum.

    Example:
        >>> import torch, diffopt
        >>> opt = diffopt.sgd()
        >>> hp = opt.hparams(lr=torch.tensor(0.1, requires_grad=True), momentum=0.9)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> grads = {"w": torch.tensor([1.0, -1.0])}
        >>> params, state = opt.update(params, grads, opt.init(params), hp)
        >>> torch.autograd.grad(params["w"].sum(), hp.lr)  # -(1 - 1)
        (tensor(-0.),)

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning",
    2013, with the velocity as in torch.optim.SGD: the learning rate outside the buffer.
    """
    check_flags(nesterov=nesterov, momentum=momentum, maximize=maximize)
    if nesterov and not momentum:
        raise ValueError("nesterov=True needs momentum=True")

    def init(p: Any, step: Any) -> SGDState:
        return SGDState(step, zeros_like(p) if momentum else ())

    def scalars(t: Any, hp: MomentumHParams) -> Any:
        # The first buffer is the gradient itself, undampened.
        return 1 if ops.is_zero(hp.momentum) else 1 - hp.dampening * ops.after_first(t)

    def plain(p: Any, g: Any, s: SGDState, hp: SGDHParams, _: None) -> tuple[Any, SGDState]:
        return ops.add(p, ops.add_decay(g, p, hp.weight_decay), -hp.lr), s

    def rule(p: Any, g: Any, s: SGDState, hp: MomentumHParams, c: Any) -> tuple[Any, SGDState]:
        g = ops.add_decay(g, p, hp.weight_decay)
        b = ops.add(hp.momentum * s.momentum_buffer, g, c)
        d = ops.add(g, b, hp.momentum) if nesterov else b
        return ops.add(p, d, -hp.lr), SGDState(s.step, b)

    def native(p: Any, g: Any, s: SGDState, hp: Any, first: bool | None, amp: Any) -> bool:
        if momentum and (ops.is_zero(hp.momentum) or (first is None and hp.dampening != 0)):
            return False  # it would leave the buffer alone, or may dampen the first gradient
        if p[0].dtype in (torch.float16, torch.bfloat16) and p[0].device.type == "cpu":
            return False  # it leaves most elements alone (pytorch#191763)
        _torch.fused_sgd_(
            p,
            g,
            list(s.momentum_buffer),
            lr=hp.lr,
            weight_decay=hp.weight_decay,
            momentum=hp.momentum if momentum else 0.0,
            dampening=hp.dampening if momentum else 0.0,
            nesterov=nesterov,
            maximize=maximize,
            is_first_step=bool(first),
            **amp,
        )
        return True

    flags: dict[str, Any] = {"maximize": maximize, "native": native, "elementwise": True}
    if not momentum:
        return leafwise(SGDState, SGDHParams, init, plain, **flags)
    return leafwise(SGDState, MomentumHParams, init, rule, scalars=scalars, **flags)
