"""ema(): an exponential moving average of the params, kept along with an optimizer."""

from __future__ import annotations

from dataclasses import KW_ONLY, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from diffopt import _tree
from diffopt._rule import checks, hyper, ops
from diffopt._rule.hyper import Hyperparameter, check_flags, hparams, number
from diffopt._rule.leafwise import Leafwise, updated, write_
from diffopt._rule.rule import zero_for
from diffopt._rule.work import Work
from diffopt._tree import Tree
from diffopt.optimizer import Write
from diffopt.transforms._base import Wrapper, check_apart, gather, wide
from diffopt.transforms._records import check_tuple


class EMAState(NamedTuple):
    """State of `ema`: steps so far, the average of the params, the optimizer's state."""

    step: Any
    average: Tree
    inner: Any


torch.serialization.add_safe_globals([EMAState])


@hparams
class EMAHParams:
    """Hyperparameters of `ema`."""

    decay: Hyperparameter = number(0.999, ge=0, lt=1)


class EMA(Wrapper[EMAState]):
    """Keep an average of the params in `state.average`; the steps themselves are not affected.

    With a_1 = p_1, the params after the first step, and p_t those after step t,

        a_t = d_t * a_{t-1} + (1 - d_t) * p_t,   d_t = decay

    With `bias_correction`, 1 - d_t = (1 - decay) / (1 - decay^t): a_t is the average with weights
    decay^(t-i), divided by their sum, which forgets p_1 sooner.

    Read it as `state.average`: a tree like params (in float32 for half-precision params), already
    bias-corrected with `bias_correction`.

    Hyperparameters: the records of this and of the optimizer, in a tuple. `decay` in [0, 1)
    (0.999), a number, a tensor or a prefix tree of the params.

    The average of a tensor without a gradient does not change.

    Args:
        optimizer: any optimizer.
        bias_correction: weight as an average that started at zero and is corrected for that.

    Raises:
        TypeError: `optimizer` is not an optimizer, or the flag is not a bool.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.transforms.ema(diffopt.sgd())
        >>> p = torch.zeros(1)
        >>> state, hp = opt.init(p), opt.hparams(lr=1.0, decay=0.75)
        >>> for _ in range(2):
        ...     p, state = opt.update(p, -torch.ones(1), state, hp)
        >>> p, state.average  # 0.75 * 1 + 0.25 * 2
        (tensor([2.]), tensor([1.2500]))

    Source: `torch.optim.swa_utils.get_ema_multi_avg_fn`; Polyak and Juditsky, "Acceleration of
    stochastic approximation by averaging", 1992.
    """

    _: KW_ONLY
    bias_correction: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(bias_correction=self.bias_correction)

    own_hparams = EMAHParams

    def init(self, params: Tree) -> EMAState:
        inner = super().init(params)
        step = zero_for(_tree.leaves(params))
        return EMAState(step, _tree.map(lambda p: wide(p.detach()).clone(), params), inner)

    def update(
        self, params: Tree, grads: Tree, state: EMAState, hparams: tuple[EMAHParams, Any]
    ) -> tuple[Tree, EMAState]:
        work = self._gather(params, grads, state, hparams)
        new, inner = self.optimizer.update(params, grads, state.inner, hparams[1])
        pairs = zip(work.grads, _tree.leaves(new), strict=True)
        moved = [None if grad is None else param for grad, param in pairs]
        old = [*map(_widened, work.params, moved)]
        (average,), step = updated(replace(work, params=old, grads=moved), state.step)
        return new, EMAState(step, _tree.unflatten(average, work.spec), inner)

    def prepare_(
        self, params: Tree, grads: Tree, state: EMAState, hparams: tuple[EMAHParams, Any]
    ) -> Write:
        work = self._gather(params, grads, state, hparams)
        written = {"params": _tree.leaves(params), "state.average": work.params}
        checks.writable(written, params, state.step)
        check_apart({"params": params, "state": state}, {"hparams[0]": hparams[0]})
        update_ = self.optimizer.prepare_(params, grads, state.inner, hparams[1])

        def write() -> None:
            update_()
            write_(work, state.step)

        return write

    def _gather(self, params: Tree, grads: Tree, state: Any, hparams: Any) -> Work:
        """A step of the averages, whose gradients are the params that move."""
        leaves = gather(params, grads)
        old = leaves.averages(state, EMAState, "average", params)
        check_tuple(hparams, 2, "hparams", "hparams(...)")
        checks.instance(hparams[0], EMAHParams, "hparams", "hparams(...)")
        numbers = hyper.broadcast(hparams[0], leaves.spec, params)
        checks.numbers(numbers, leaves.params, params)
        pairs = zip(leaves.params, leaves.grads, strict=True)
        moved = [None if grad is None else param for param, grad in pairs]
        rule = _Average(bias_correction=self.bias_correction)
        return Work(rule, leaves.spec, old, moved, [], numbers)


ema = EMA


class _Step(NamedTuple):
    step: Any


class _Average(Leafwise[_Step, EMAHParams]):
    """A step of averages, whose gradients are the new params."""

    bias_correction: bool = False

    State = _Step
    hparams: ClassVar[type[EMAHParams]] = EMAHParams
    elementwise = True

    def scalars(self, t: Any, hp: EMAHParams) -> Any:
        """1 - d_t."""
        if self.bias_correction:
            return (1 - hp.decay) / (1 - hp.decay**t)
        return 1 - hp.decay * ops.after_first(t)

    def rule(self, p: Any, g: Any, s: _Step, hp: EMAHParams, c: Any) -> tuple[Any, _Step]:
        return ops.lerp(p, g, c), s


def _widened(average: Tensor, param: Tensor | None) -> Tensor:
    """An average in a dtype that holds the values of a param that moves, at least float32."""
    if param is None:
        return average
    return average.to(torch.promote_types(average.dtype, wide(param).dtype))
