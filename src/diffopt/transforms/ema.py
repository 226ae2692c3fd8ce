"""ema(): an exponential moving average of the params, kept along with an optimizer."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._modes import exact
from diffopt._rule import checks, ops, running, ways
from diffopt._rule.hyper import Hyperparameter, check_flags, hparams, number
from diffopt._rule.leafwise import Leafwise
from diffopt._rule.rule import zero_for
from diffopt._tree import Tree
from diffopt.optimizer import Write
from diffopt.transforms._base import Leaves, Tensors, Wrapper, check_apart, gather, near, wide
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
        leaves, old, records = self._gather(params, grads, state, hparams)
        new, inner = self.optimizer.update(params, grads, state.inner, hparams[1])
        step = exact(state.step) + 1
        moved = leaves.moved(old), leaves.moved(_tree.leaves(new))
        average = leaves.filled(self._averages(*moved, records, step), old)
        return new, EMAState(step.to(state.step.dtype), average, inner)

    def prepare_(
        self, params: Tree, grads: Tree, state: EMAState, hparams: tuple[EMAHParams, Any]
    ) -> Write:
        leaves, old, records = self._gather(params, grads, state, hparams)
        checks.writable({"params": leaves.params, "state.average": old}, params, state.step)
        check_apart({"params": params, "state": state}, {"hparams[0]": hparams[0]})
        update_ = self.optimizer.prepare_(params, grads, state.inner, hparams[1])

        def write() -> None:
            update_()
            step = exact(state.step) + 1
            moved = leaves.moved(old), leaves.moved(leaves.params)
            self._average_(*moved, records, _modes.number_of(step))
            state.step.copy_(step)

        return write

    def _average_(self, old: Tensors, new: Tensors, records: list[EMAHParams], t: Any) -> None:
        """In place, as an optimizer steps: tensors with the same decay together."""
        rule, groups = _Average(bias_correction=self.bias_correction), dict[Any, list[Any]]()
        for x, y, record in zip(old, new, records, strict=True):
            groups.setdefault((id(record), x.dtype, y.dtype), []).append((x, y, record.decay))
        for group in groups.values():
            *columns, (decay, *_) = map(list, zip(*group, strict=True))
            way = ways.choose(rule, ways.survey(columns), [decay])
            numbers = running.numbers_at(rule, t, [decay], columns)
            ways.RUN[way](rule, numbers, columns)

    def _averages(
        self, old: Tensors, new: Tensors, records: list[EMAHParams], step: Tensor
    ) -> Tensors:
        t = _modes.number_of(step)

        def mean(old: Tensor, new: Tensor, decay: Any) -> Tensor:
            dtype = torch.promote_types(old.dtype, wide(new).dtype)
            weight = _weight(decay, near(t, new.device), self.bias_correction)
            return ops.lerp(old.to(dtype), new.to(dtype), weight).to(dtype)

        return [mean(x, y, r.decay) for x, y, r in zip(old, new, records, strict=True)]

    def _gather(
        self, params: Tree, grads: Tree, state: Any, hparams: Any
    ) -> tuple[Leaves, Tensors, list[EMAHParams]]:
        leaves = gather(params, grads)
        old = leaves.averages(state, EMAState, "average", params)
        check_tuple(hparams, 2, "hparams", "hparams(...)")
        return leaves, old, leaves.records(EMAHParams, hparams[0], params)


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
        return _weight(hp.decay, t, self.bias_correction)

    def rule(self, p: Any, g: Any, s: _Step, hp: EMAHParams, c: Any) -> tuple[Any, _Step]:
        return ops.lerp(p, g, c), s


def _weight(decay: Any, t: Any, bias_correction: bool) -> Any:
    """1 - d_t."""
    if bias_correction:
        return (1 - decay) / (1 - decay**t)
    return 1 - decay * ops.after_first(t)
