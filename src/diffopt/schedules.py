"""Schedules: pure functions of the step, differentiable with respect to their arguments.

They are made from numbers or tensors (others raise `TypeError`, and numbers out of range
`ValueError`), and are functions `step -> value` for a field of hyperparameters:
`opt.hparams(lr=schedule(state.step))`. Steps are counted from 0, before the first update. A value
is a float if the step and the arguments are Python numbers, and a float64 tensor if one of them is
a tensor of any dtype. Tensors broadcast: a tensor of steps gives the values at them. Their values
are never read, so schedules work inside `torch.vmap` and `torch.compile`. Where a schedule has a
kink, its derivative is that of one side.

Schedules are values: `cosine(0.1, 100)` is `Cosine(init=0.1, steps=100.0, final=0.0)`, equal to
another one with the same arguments; it pickles, and is a constant for torch.compile. A tensor
argument is kept by reference, so the schedule follows in-place changes by a training loop; tensors
are equal only to themselves, so a copy of a learned schedule is a different one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from diffopt import _arguments, _modes, _tree, _value
from diffopt._rule import hyper

Number: TypeAlias = float | Tensor
"""A Python number or a tensor."""

Schedule: TypeAlias = Callable[[Any], Any]
"""A function `step -> value` of numbers."""


class Formula(_value.Value, ABC):
    """What the functions of this module return: a formula of the step and its own fields."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        fields = dataclasses.fields(cls)  # which won't trace
        cls._names = tuple(field.name for field in fields)
        cls._numbers = tuple(field.name for field in fields if field.type == "Number")

    def __post_init__(self) -> None:
        for name in self._numbers:
            bounds = _BOUNDS.get(name, {})
            self._keep(**{name: _number(name, getattr(self, name), **bounds)})

    def __call__(self, step: Number) -> Any:
        exact = object.__new__(type(self))
        exact._keep(**{name: _exact(getattr(self, name)) for name in self._names})
        return exact.at(_exact(step))

    @abstractmethod
    def at(self, step: Number) -> Number:
        """The value; all tensors are in float64 here."""

    def _keep(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)


class Constant(Formula):
    """The same value at every step: `value`.

    For torch's ConstantLR, which changes once, see `piecewise`.

    Args:
        value: any number.

    Examples:
        >>> import diffopt
        >>> diffopt.schedules.constant(0.1)(7)
        0.1
    """

    value: Number

    def at(self, step: Number) -> Number:
        return _same(self.value, step)


constant = Constant


class Linear(Formula):
    """A straight line, then constant.

    With x = min(step / steps, 1), the value is `init * (1 - x) + final * x`.

    This is torch's LinearLR, with values instead of factors of the learning rate.

    Args:
        init: the value at step 0.
        final: the value from step `steps` on.
        steps: the length, > 0.

    Examples:
        >>> import diffopt
        >>> lr = diffopt.schedules.linear(init=1.0, final=0.5, steps=4)
        >>> [lr(step) for step in range(6)]
        [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]
    """

    init: Number
    final: Number
    steps: Number

    def at(self, step: Number) -> Number:
        return _between(self.init, self.final, _progress(step, self.steps))


linear = Linear


def warmup(peak: Number, steps: Number, init: Number = 0.0) -> Linear:
    """A straight line up from `init` to `peak`, then constant: `linear(init, peak, steps)`.

    Args:
        peak: the value from step `steps` on.
        steps: the length, > 0.
        init: the value at step 0.

    Returns:
        The schedule. Use `joined` to continue with another one.

    Examples:
        >>> from diffopt.schedules import cosine, joined, warmup
        >>> lr = joined([warmup(peak=1.0, steps=2), cosine(init=1.0, steps=4)], [2])
        >>> [round(lr(step), 3) for step in range(7)]
        [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0]

    Source: Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", 2017.
    """
    return linear(init, _number("peak", peak), steps)


class Polynomial(Formula):
    """A power of the remaining steps, then constant.

    With r = (1 - min(step / steps, 1))^power, the value is `init * r + final * (1 - r)`.

    This is torch's PolynomialLR, which only has `final=0`.

    Args:
        init: the value at step 0.
        steps: the length, > 0.
        power: the exponent, > 0.
        final: the value from step `steps` on.

    Examples:
        >>> import diffopt
        >>> lr = diffopt.schedules.polynomial(init=1.0, steps=4, power=2.0)
        >>> [lr(step) for step in range(6)]
        [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]
    """

    init: Number
    steps: Number
    power: Number = 1.0
    final: Number = 0.0

    def at(self, step: Number) -> Number:
        left = 1 - _progress(step, self.steps)
        over = left == 0  # where the derivatives are 0
        power = _where(over, 0.0, _where(over, 1.0, left) ** self.power)
        return _between(self.final, self.init, power)


polynomial = Polynomial


class Cosine(Formula):
    """Half a cosine wave, then constant.

    With r = (1 + cos(pi * min(step / steps, 1))) / 2, the value is `init * r + final * (1 - r)`.

    This is torch's CosineAnnealingLR up to its T_max, after which torch's rises again and this one
    stays constant.

    Args:
        init: the value at step 0.
        steps: the length, > 0.
        final: the value from step `steps` on.

    Examples:
        >>> import diffopt
        >>> lr = diffopt.schedules.cosine(init=1.0, steps=4)
        >>> [round(lr(step), 3) for step in range(6)]
        [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]

    Source: Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", 2017,
    equation 5, without restarts.
    """

    init: Number
    steps: Number
    final: Number = 0.0

    def at(self, step: Number) -> Number:
        return _cosine(self.init, self.final, _progress(step, self.steps))


cosine = Cosine


class Exponential(Formula):
    """A constant factor per step: `init * gamma^step`.

    This is torch's ExponentialLR.

    Args:
        init: the value at step 0.
        gamma: the factor, >= 0.

    Examples:
        >>> import torch, diffopt
        >>> gamma = torch.tensor(0.5, requires_grad=True)
        >>> lr = diffopt.schedules.exponential(init=1.0, gamma=gamma)(3)
        >>> torch.autograd.grad(lr, gamma)  # 3 * 0.5^2
        (tensor(0.7500),)
    """

    init: Number
    gamma: Number

    def at(self, step: Number) -> Number:
        return self.init * _decay(self.gamma, step)


exponential = Exponential


class Step(Formula):
    """A constant factor every so many steps: `init * gamma^floor(step / every)`.

    This is torch's StepLR.

    Args:
        init: the value at step 0.
        gamma: the factor, >= 0.
        every: the steps between two changes, > 0; its derivative is 0.

    Examples:
        >>> import diffopt
        >>> lr = diffopt.schedules.step(init=1.0, gamma=0.5, every=2)
        >>> [lr(step) for step in range(6)]
        [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    """

    init: Number
    gamma: Number
    every: Number

    def at(self, step: Number) -> Number:
        times = step / self.every
        times = torch.floor(times) if isinstance(times, Tensor) else math.floor(times)
        return self.init * _decay(self.gamma, times)


step = Step


class OneCycle(Formula):
    """Up to a peak and down to almost nothing.

    From `low = peak / div_factor` at step 0 to `peak` at step pct_start * steps - 1, and on to
    `low / final_div_factor` at step steps - 1. With `three_phase` the way down has two parts: back
    to `low` at step 2 * (pct_start * steps - 1), then to the end.

    This is the learning rate of torch's OneCycleLR, which raises an error after its last step;
    this one stays constant. For its momentum, use a schedule for `momentum` or `beta1`.

    Args:
        peak: the largest value.
        steps: the number of steps, > 0; the last one is step `steps - 1`.
        pct_start: the fraction of steps on the way up, in [0, 1].
        div_factor: peak divided by first value, > 0.
        final_div_factor: first value divided by last, > 0.
        anneal: the interpolation between two values: "cos" as in `cosine`, "linear" as in `linear`.
        three_phase: whether the way down has two parts.

    Raises:
        ValueError: `anneal` is unknown.
        TypeError: `three_phase` is not a bool.

    Examples:
        >>> import diffopt
        >>> lr = diffopt.schedules.one_cycle(
        ...     peak=1.0, steps=5, pct_start=0.6, div_factor=2.0, anneal="linear"
        ... )
        >>> [round(lr(step), 3) for step in range(6)]
        [0.5, 0.75, 1.0, 0.5, 0.0, 0.0]

    Source: Smith and Topin, "Super-convergence: very fast training of neural networks using large
    learning rates", 2018, as in torch.
    """

    peak: Number
    steps: Number
    _: dataclasses.KW_ONLY
    pct_start: Number = 0.3
    div_factor: Number = 25.0
    final_div_factor: Number = 1e4
    anneal: Literal["cos", "linear"] = "cos"
    three_phase: bool = False

    def __post_init__(self) -> None:
        hyper.check_flags(three_phase=self.three_phase)
        _arguments.check_choice(self.anneal, "anneal", "cos", "linear")
        super().__post_init__()

    def at(self, step: Number) -> Number:
        top, end = self.pct_start * self.steps - 1, self.steps - 1
        low = self.peak / self.div_factor
        points = [(0.0, low), (top, self.peak), (end, low / self.final_div_factor)]
        if self.three_phase:
            points.insert(2, (2 * top, low))
        curve = _cosine if self.anneal == "cos" else _between
        step = _where(step < end, step, end)
        value = low
        for (start, before), (stop, after) in pairwise(points):
            x = _progress(step - start, stop - start)
            value = _where(step > start, curve(before, after, x), value)
        return value


one_cycle = OneCycle


class Piecewise(Formula):
    """Constant between boundaries: `values[i]` from step `boundaries[i - 1]` on.

    This is torch's MultiStepLR, with values instead of its factor. ConstantLR is
    `piecewise([factor * lr, lr], [total_iters])`.

    Args:
        values: the values, one more than boundaries: numbers, or a tensor with one per row.
        boundaries: the steps of the changes, increasing, >= 0; their derivative is 0.

    Raises:
        ValueError: lengths do not match, or boundaries do not increase.
        TypeError: an argument is neither a number nor a tensor.

    Examples:
        >>> import diffopt
        >>> lr = diffopt.schedules.piecewise([0.1, 0.01, 0.005], [2, 3])
        >>> [lr(step) for step in range(5)]
        [0.1, 0.1, 0.01, 0.005, 0.005]
    """

    values: Sequence[Number] | Tensor
    boundaries: Sequence[Number]

    def __post_init__(self) -> None:
        values, starts = self.values, _starts("values", self.values, self.boundaries)
        if not isinstance(values, Tensor):
            values = tuple(_number(f"values[{i}]", value) for i, value in enumerate(values))
        self._keep(values=values, boundaries=starts)

    def at(self, step: Number) -> Number:
        constants = [functools.partial(_same, value) for value in self.values]
        return _in_turn(constants, self.boundaries, step)


piecewise = Piecewise


class Joined(Formula):
    """One schedule after another, each counting from its own first step.

    The value is `schedules[i](step - boundaries[i - 1])` from step `boundaries[i - 1]` on.

    This is torch's SequentialLR. Parts that are not active are evaluated at their step 0.

    Args:
        schedules: the parts, one more than boundaries: any functions of the step.
        boundaries: the steps of the changes, increasing, >= 0.

    Raises:
        ValueError: lengths do not match, or boundaries do not increase.
        TypeError: a boundary is neither a number nor a tensor, or a part is not a function.

    Examples:
        >>> from diffopt.schedules import constant, joined, linear
        >>> lr = joined([constant(1.0), linear(init=1.0, final=0.0, steps=2)], [3])
        >>> [lr(step) for step in range(6)]
        [1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    """

    schedules: Sequence[Schedule]
    boundaries: Sequence[Number]

    def __post_init__(self) -> None:
        starts = _starts("schedules", self.schedules, self.boundaries)
        for i, part in enumerate(self.schedules):
            if not callable(part):
                what = _tree.describe(part)
                raise TypeError(f"schedules[{i}] is {what}, not a function of the step")
        self._keep(schedules=tuple(self.schedules), boundaries=starts)

    def at(self, step: Number) -> Number:
        return _in_turn(self.schedules, self.boundaries, step)


joined = Joined


# Arguments


_BOUNDS = {
    "steps": {"gt": 0},
    "every": {"gt": 0},
    "power": {"gt": 0},
    "gamma": {"ge": 0},
    "pct_start": {"ge": 0, "le": 1},
    "div_factor": {"gt": 0},
    "final_div_factor": {"gt": 0},
}
"""The ranges of numbers, by the name of the argument."""


def _number(name: str, value: Number, **bounds: float) -> Number:
    """`value`, checked; Python numbers are converted to float."""
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {value.dtype}, but must be real")
        return value
    if fault := hyper.fault_of(value, bounds):
        raise type(fault)(f"{name} {fault}")
    if math.isnan(value):
        raise ValueError(f"{name} is {value}, but must be a number")
    return float(value)


def _starts(name: str, parts: Any, boundaries: Sequence[Number]) -> tuple[Number, ...]:
    """The boundaries, checked, as those of a sequence of parts."""
    for key, value in ((name, parts), ("boundaries", boundaries)):
        if not isinstance(value, Sequence) and not (isinstance(value, Tensor) and value.dim()):
            raise TypeError(f"{key} is {_tree.describe(value)}, not a list")
    checked = tuple(_number(f"boundaries[{i}]", b, ge=0) for i, b in enumerate(boundaries))
    if len(parts) != len(checked) + 1:
        raise ValueError(
            f"{name} has length {len(parts)}, but must have one more than boundaries, "
            f"which has length {len(checked)}"
        )
    for i, (a, b) in enumerate(pairwise(checked)):
        if not isinstance(a, Tensor) and not isinstance(b, Tensor) and a >= b:
            raise ValueError(f"boundaries must increase, but [{i}] is {a} and [{i + 1}] is {b}")
    return checked


def _exact(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_exact, value))
    return _modes.exact(value) if isinstance(value, Tensor) else value


# Mathematics for floats and tensors. Derivatives are finite, also in branches that `where` drops.


def _where(condition: Any, x: Number, y: Number) -> Number:
    """`x` where the condition holds, else `y`: a tensor if one of the three is."""
    like = next((value for value in (condition, x, y) if isinstance(value, Tensor)), None)
    if like is None:
        return x if condition else y
    dtype = _modes.exact_dtype(like.device)  # for two numbers torch.where returns float32
    condition = _tensor(condition, like, torch.bool)
    return torch.where(condition, _tensor(x, like, dtype), _tensor(y, like, dtype))


def _tensor(value: Any, like: Tensor, dtype: torch.dtype) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full_like(like, value, dtype=dtype)


def _same(value: Number, step: Number) -> Number:
    """The value, in the shape of the steps."""
    return value + 0 * step


def _progress(step: Number, steps: Number) -> Number:
    """`step / steps`, but no less than 0 and no more than 1."""
    step = _where(step > 0, step, 0.0)
    inside = step < steps
    return _where(inside, step / _where(inside, steps, 1.0), 1.0)


def _between(start: Number, end: Number, x: Number) -> Number:
    """The straight line from `start` at x = 0 to `end` at x = 1."""
    return start * (1 - x) + end * x


def _cosine(start: Number, end: Number, x: Number) -> Number:
    """Half a cosine wave from `start` at x = 0 to `end` at x = 1."""
    cos = torch.cos(math.pi * x) if isinstance(x, Tensor) else math.cos(math.pi * x)
    return _between(end, start, (1 + cos) / 2)


def _in_turn(parts: Sequence[Schedule], starts: Sequence[Number], step: Number) -> Number:
    """The value of the last part that has started, which counts from its own first step."""
    ends = [*starts, math.inf]
    first, *others = parts
    value = first(_where(step < ends[0], step, 0.0))
    for part, start, end in zip(others, starts, ends[1:], strict=True):
        # At its own steps no part overflows; elsewhere that would make the derivative NaN.
        local = _where((step >= start) & (step < end), step - start, 0.0)
        value = _where(step >= start, part(local), value)
    return value


def _decay(gamma: Number, times: Number) -> Number:
    """`gamma^times`, which is 1 at times = 0, even for gamma = 0."""
    none = times == 0
    return _where(none, 1.0, gamma ** _where(none, 1.0, times))
