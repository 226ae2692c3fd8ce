"""The operations that rules are written with, for a tensor or a TensorList.

A coefficient is a number (computed by torch's fused operation), a tensor (by plain arithmetic,
which is differentiable with respect to it) or a TensorList. Derivatives are finite where they are
in exact arithmetic.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffopt import _modes
from diffopt._rule.recording import Recorded
from diffopt._rule.symbols import Symbol, Unknown
from diffopt._rule.tensorlist import TensorList

Leaf: TypeAlias = Any
"""A tensor, a TensorList, or a `Recorded` that stands for a tensor."""

_TENSORS = (Tensor, TensorList, Recorded, Unknown)


def is_zero(coefficient: Any) -> bool:
    """Whether it is the Python number 0; the values of a tensor are never read."""
    return coefficient == 0 if type(coefficient) is float else _is(coefficient, 0)


def _is(coefficient: Any, number: int) -> bool:
    known = isinstance(coefficient, (int, float, Symbol)) and not isinstance(coefficient, Unknown)
    return known and coefficient == number


def after_first(step: Any) -> Any:
    """0 at step 1, else 1, in the precision of the step."""
    return (step > 1).to(step.dtype) if isinstance(step, Tensor) else float(step > 1)


def coefficient(x: Any) -> Any:
    """`x`; if 0-d, in the best precision available: as a number or in float64."""
    if isinstance(x, Symbol):
        return x.then(coefficient)
    if not isinstance(x, Tensor) or x.dim() > 0:
        return x
    return _modes.number_of(_modes.exact(x))


def copy(x: Leaf) -> Leaf:
    """A new tensor with the same values, and a derivative."""
    return x.clone() if isinstance(x, Tensor) else 1 * x


def kept(grad: Leaf) -> Leaf:
    """The gradient as a part of the state; a caller gets a copy of it."""
    return grad if isinstance(grad, Tensor) else 1 * grad


def add(x: Leaf, y: Leaf, coefficient: Any, *, into: bool = False) -> Leaf:
    """`x + coefficient * y`; `into` says that it may overwrite x."""
    if type(coefficient) is not float:  # most are
        coefficient = _modes.number_of(coefficient)
        if isinstance(coefficient, _TENSORS):
            return x + y * coefficient
    return x.add_(y, alpha=coefficient) if into else torch.add(x, y, alpha=coefficient)


def add_decay(grad: Leaf, param: Leaf, weight_decay: Any) -> Leaf:
    """`grad + weight_decay * param`; `grad` itself if the decay is the number 0."""
    return grad if is_zero(weight_decay) else add(grad, param, weight_decay)


def lerp(x: Leaf, y: Leaf, weight: Any, *, into: bool = False) -> Leaf:
    """`x + weight * (y - x)`; `into` says that it may overwrite x."""
    if type(weight) is not float:
        weight = _modes.number_of(weight)
        if isinstance(weight, _TENSORS):
            return x + weight * (y - x)
    if _is(weight, 1):
        return y if isinstance(y, Recorded) else copy(y)
    return x.lerp_(y, weight) if into else torch.lerp(x, y, weight)


def mul(x: Leaf, y: Any, *, into: bool = False) -> Leaf:
    """`x * y`; `into` says that it may overwrite x."""
    return x.mul_(y) if into else x * y


def rsqrt(x: Leaf, *, into: bool = False) -> Leaf:
    """`1 / sqrt(x)`; `into` says that it may overwrite x."""
    return x.rsqrt_() if into else x.rsqrt()


def addcmul(x: Leaf, a: Leaf, b: Leaf, coefficient: Any) -> Leaf:
    """`x + coefficient * a * b`."""
    if type(coefficient) is not float:
        coefficient = _modes.number_of(coefficient)
        if isinstance(coefficient, _TENSORS):
            return x + a * coefficient * b
    return torch.addcmul(x, a, b, value=coefficient)


def addcdiv(x: Leaf, a: Leaf, b: Leaf, coefficient: Any) -> Leaf:
    """`x + coefficient * a / b`."""
    if type(coefficient) is not float:
        coefficient = _modes.number_of(coefficient)
        if isinstance(coefficient, Tensor) and any(isinstance(v, TensorList) for v in (x, a, b)):
            b, coefficient = b / coefficient, 1  # in place, where b is not needed again
        if isinstance(coefficient, _TENSORS):
            return x + a * coefficient / b
    return torch.addcdiv(x, a, b, value=coefficient)


def where(condition: Any, x: Any, y: Any) -> Any:
    """`x` where the condition holds, else `y`; the condition may be a plain bool."""
    if isinstance(condition, bool):
        return x if condition else y
    return torch.where(condition, x, y)


def clamp(x: Leaf, least: Any, greatest: Any) -> Leaf:
    """`x`, but no less than `least` and no more than `greatest`."""
    if isinstance(least, Tensor) or isinstance(greatest, Tensor):
        least, greatest = map(_modes.tensor_of, (least, greatest))
        return torch.minimum(torch.maximum(x, least), greatest)
    return x.clamp(least, greatest)


def total(x: Any) -> Any:
    """The sum of all elements; a number where that needs no synchronization or derivative."""
    result = x.sum()
    return _modes.number_of(result) if type(result) is Tensor else result  # not for DTensor


def norm(x: Any) -> Any:
    """The square root of the sum of squares, with derivative 0 at 0; a number where `total` is."""
    if isinstance(x, Tensor) and _modes.ordinary(x) and not _modes.differentiated([x]):
        result = torch.linalg.vector_norm(x)  # one kernel instead of three
        return result.item() if x.is_cpu and not _modes.intercepted() else result
    return sqrt(total(x * x))


def at_least(x: Any, least: Any, *, into: bool = False) -> Any:
    """`x`, but no less than `least`; both may be numbers. `into`: it may overwrite x."""
    if isinstance(x, Tensor) and not (isinstance(least, Tensor) or _modes.differentiable()):
        clamp = x.clamp_ if into else x.clamp
        return clamp(min=least)  # by one kernel instead of three
    return where(x < least, least, x)


def maximum(x: Leaf, y: Leaf) -> Leaf:
    """The greater of the two, element by element."""
    return torch.maximum(x, y)


def sqrt(x: Any) -> Any:
    """The square root, with derivative 0 at 0.

    An optimizer computes sqrt(0) where a gradient has always been zero. There the result is
    multiplied by that zero gradient, so the correct derivative is that of the other factor; the
    infinite derivative of torch.sqrt would give NaN.
    """
    if isinstance(x, float):
        return math.sqrt(x)
    if isinstance(x, TensorList) or not _modes.differentiable():
        return x.sqrt()
    by_autograd = not (_modes.transformed() or _modes.forward_differentiated())
    if by_autograd and (not x.requires_grad or _positive(x)):
        return x.sqrt()
    zero = x == 0
    return x.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def _positive(x: Tensor) -> bool:
    """Whether all elements are positive; only looked at where that needs no synchronization.

    Torch's derivative is right there, and takes less time and memory than one with a mask.
    """
    plain = x.is_cpu and _modes.ordinary(x) and not _modes.intercepted()
    return plain and x.numel() > 0 and x.detach().min().item() > 0
