"""Stochastic gradient descent: plain, with momentum (Polyak 1964) or Nesterov momentum."""

from __future__ import annotations

from typing import Any, NamedTuple

from diffopt import _torch
from diffopt._rule import ops
from diffopt._rule.hyper import Hyperparameter, hparams, number
from diffopt._rule.leafwise import Leafwise
from diffopt._rule.rule import WORKING_DTYPE, zeros_like
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


class SGD(Leafwise[SGDState, MomentumHParams]):
    """Stochastic gradient descent with momentum.

    With g_t = grad_t + weight_decay * p, b_1 = g_1 and, for t > 1,

        b_t = momentum * b_{t-1} + (1 - dampening) * g_t
        p  <- p - lr * b_t                       (nesterov: p - lr * (g_t + momentum * b_t))

    Hyperparameters, each a number, a tensor or a prefix tree of the params: `lr` >= 0 (1e-3),
    `momentum` >= 0 (0), `dampening` (0), `weight_decay` >= 0 (0). If `momentum` is the number 0,
    dampening has no effect, as in torch; if it is a tensor, the formula holds at 0 too. t counts
    the steps of the whole tree, since the state has one count: a tensor whose first gradient comes
    later starts with b = 0, so that this gradient is dampened, unlike in `torch.optim.SGD` and
    `diffopt.optim.SGD`, which begin with it.

    Its first step is differentiable, unlike that of torch.optim.SGD, whose first buffer is a
    detached gradient.

    `maximize` (to ascend) and `execution` are flags of every `diffopt.rules.Leafwise`.

    Args:
        nesterov: use Nesterov's momentum.
        momentum: False keeps no buffer, and removes the hyperparameters `momentum` and `dampening`.

    Raises:
        ValueError: nesterov without momentum.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.sgd()
        >>> hp = opt.hparams(lr=torch.tensor(0.1, requires_grad=True), momentum=0.9)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> grads = {"w": torch.tensor([1.0, -1.0])}
        >>> params, state = opt.update(params, grads, opt.init(params), hp)
        >>> torch.autograd.grad(params["w"].sum(), hp.lr)  # -(1 - 1)
        (tensor(-0.),)

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning",
    2013, with the buffer as in torch.optim.SGD: without the learning rate.
    """

    nesterov: bool = False
    momentum: bool = True

    State = SGDState
    elementwise = True
    proportional = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=True requires momentum=True")

    @property
    def hparams(self) -> type[MomentumHParams]:  # pyright: ignore[reportIncompatibleVariableOverride] (it depends on a flag)
        fewer: Any = SGDHParams  # without momentum; a call of `cast` would not trace
        return MomentumHParams if self.momentum else fewer

    def begin(self, p: Any, step: Any) -> SGDState:
        return SGDState(step, zeros_like(p) if self.momentum else ())

    def scalars(self, t: Any, hp: MomentumHParams) -> Any:
        if not self.momentum:
            return None
        # The first buffer is the gradient itself, undampened.
        return 1 if ops.is_zero(hp.momentum) else 1 - hp.dampening * ops.after_first(t)

    def rule(
        self, p: Any, g: Any, s: SGDState, hp: MomentumHParams, c: Any
    ) -> tuple[Any, SGDState]:
        g = ops.add_decay(g, p, hp.weight_decay)
        if not self.momentum:
            return ops.add(p, g, -hp.lr), s
        if ops.is_zero(hp.momentum):
            return ops.add(p, g, -hp.lr), SGDState(s.step, ops.kept(g))
        b = ops.add(hp.momentum * s.momentum_buffer, g, c)
        d = ops.add(g, b, hp.momentum) if self.nesterov else b
        return ops.add(p, d, -hp.lr), SGDState(s.step, b)

    def native(self, p: Any, g: Any, s: SGDState, hp: Any, first: bool | None, amp: Any) -> bool:
        kept = self.momentum and ops.is_zero(hp.momentum)  # the gradient is the buffer
        if kept and (self.maximize or not ops.is_zero(hp.weight_decay) or amp or len(p) < 8):
            return False  # few tensors take less time one by one
        if self.momentum and not kept and first is None and hp.dampening != 0:
            return False  # it might dampen the first gradient
        if p[0].dtype in WORKING_DTYPE and p[0].device.type == "cpu":
            return False  # it does not update most elements (pytorch#191763)
        if kept:
            _torch.foreach_copy_(s.momentum_buffer, g)
        _torch.fused_sgd_(
            p,
            g,
            [] if kept else list(s.momentum_buffer),
            lr=hp.lr,
            weight_decay=hp.weight_decay,
            momentum=hp.momentum if self.momentum else 0.0,
            dampening=hp.dampening if self.momentum else 0.0,
            nesterov=self.nesterov,
            maximize=self.maximize,
            is_first_step=bool(first),
            **amp,
        )
        return True


sgd = SGD
