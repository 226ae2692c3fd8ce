"""Stochastic rounding to bfloat16, by random numbers that belong to positions, not to calls."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_DROPPED = 16  # bits of a float32 that bfloat16 lacks
_LARGEST = torch.finfo(torch.bfloat16).max
_WIDTH = 1 << 12


class Noise(NamedTuple):
    """Uniform random numbers below 2^16, any two of them independent: `rows[i] ^ columns[j]`.

    Far fewer are drawn, from torch's generator of the device, than there are positions.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def draw(cls, length: int, device: torch.device) -> Noise:
        """Numbers for so many positions."""
        width = min(length, _WIDTH)
        sizes = -(-length // width), width
        numbers = torch.randint(1 << _DROPPED, (sum(sizes),), dtype=torch.int32, device=device)
        rows, columns = numbers.split(sizes)
        return cls(rows.unsqueeze(1), columns)

    def at(self, start: int, length: int) -> Tensor:
        """Those from a position on."""
        width = self.columns.shape[0]
        first, skipped = divmod(start, width)
        rows = self.rows.narrow(0, first, -(-(skipped + length) // width))
        return (rows ^ self.columns).reshape(-1).narrow(0, skipped, length)


def stochastic(x: Tensor, noise: Tensor) -> Tensor:
    """Round to bfloat16, up or down at random with the mean x; the derivative is the identity.

    A random number is added to the bits that are cut off: the carry has the right probability, also
    into the exponent and among subnormal numbers. What exceeds the largest bfloat16, infinity and
    NaN are rounded to nearest.
    """
    x = x.to(torch.float32)
    value = x.detach()
    cut = _cut(value.view(torch.int32) + noise)
    return through(x, torch.where(value.abs() <= _LARGEST, cut, value)).to(torch.bfloat16)


def write_stochastic_(old: Tensor, new: Tensor, noise: Tensor) -> None:
    """Overwrite a tensor with the rounded values of another one, which may be destroyed."""
    if new.dtype == torch.float32 and new.device.type == "cpu" and _ordinary(new):
        old.copy_(_cut(new.view(torch.int32).add_(noise)))
    else:
        old.copy_(stochastic(new, noise))


def _cut(bits: Tensor) -> Tensor:
    return bits.bitwise_and_(-1 << _DROPPED).view(torch.float32)


def _ordinary(x: Tensor) -> bool:
    """Whether no number is infinite, NaN or beyond bfloat16; faster to know than a `where`."""
    low, high = x.aminmax()
    return low.item() >= -_LARGEST and high.item() <= _LARGEST


def through(x: Tensor, value: Tensor) -> Tensor:
    """These values, with the derivative of x, to which they are close."""
    return value.detach() + torch.where(x.detach().isfinite(), x - x.detach(), 0)


class Rounding:
    """How the new values of tensors become as narrow as the old ones.

    Args:
        old: the old tensors; their numbers have one position each, in this order. bfloat16 is
            rounded stochastically; other half precision, and where there is None, to nearest.
        stochastic: whether any are rounded stochastically.
    """

    def __init__(self, old: Iterable[Any], *, stochastic: bool) -> None:
        self.old = [
            x if stochastic and isinstance(x, Tensor) and x.dtype == torch.bfloat16 else None
            for x in old
        ]
        sizes = [0 if x is None else x.numel() for x in self.old]
        *self.starts, total = itertools.accumulate(sizes, initial=0)
        if total:
            device = next(x.device for x in self.old if x is not None)
            self.noise = Noise.draw(total, device)

    def rounded(self, k: int, new: Any, old: Any) -> Any:
        """The new value of the leaf with index k; a tensor has the dtype of the old one."""
        if self.old[k] is not None and new.numel():
            return stochastic(new, self._noise(k, new))
        return new.to(old.dtype) if isinstance(old, Tensor) else new

    def write_(self, k: int, new: Tensor, old: Tensor, offset: int = 0) -> None:
        """Overwrite it, or a piece from an offset on; the new value may be destroyed."""
        if self.old[k] is not None and new.numel():
            write_stochastic_(old, new, self._noise(k, new, offset))
        else:
            old.copy_(new)

    def _noise(self, k: int, new: Tensor, offset: int = 0) -> Tensor:
        noise = self.noise.at(self.starts[k] + offset, new.numel())
        return noise.to(new.device).view(new.shape)
