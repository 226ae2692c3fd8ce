"""Fixed-point numbers: 64-bit integers, which are multiplied by fractions in an invertible way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffopt import _modes
from diffopt._modes import exact

_SHIFT = 30
DENOMINATOR = 1 << _SHIFT
_LIMIT = 2.0**62
_WORD = 1 << 63
_OUT_OF_RANGE = (
    "params or state.momentum_buffer are not finite, or too large for this number of fractional "
    "bits: Reversible(bits=...) holds numbers below 2^(62 - bits)"
)


# c and quotients are integers below 2^62; n is an integer from 1 to d = 2^30, the denominator.
# Everything is written so that no product exceeds 64 bits.


def divide(c: Tensor, n: Any) -> Tensor:
    """floor(c n / d)."""
    return (c >> _SHIFT) * n + ((c & (DENOMINATOR - 1)) * n >> _SHIFT)


def _dividends(quotient: Tensor, n: Any) -> tuple[Tensor, Tensor]:
    """The first integer c for which floor(c n / d) is the quotient, and how many there are."""
    whole = torch.div(quotient, n, rounding_mode="floor")
    part = quotient - whole * n

    def least(part: Tensor) -> Tensor:  # ceil(part d / n)
        return torch.div(part * DENOMINATOR + (n - 1), n, rounding_mode="floor")

    first = least(part)
    return whole * DENOMINATOR + first, least(part + 1) - first


@dataclass
class Tape:
    """What divisions lose: a stack of digits, each with its own base, for every weight.

    They are the digits of an integer of any length.

    Attributes:
        top: its lowest 63 bits, to which the next digits go.
        words: the higher bits; the last word follows the top.
        sizes: how many digits had been pushed when each word was full.
        count: how many digits have been pushed.
        bound: a strict upper bound on the entries of the top.
    """

    top: Tensor
    words: list[Tensor] = field(default_factory=list[Tensor])
    sizes: list[int] = field(default_factory=list[int])
    count: int = 0
    bound: int = 1

    def push(self, c: Tensor, quotient: Tensor, n: Any, most: int) -> None:
        """Add the position of c among the integers with this quotient, which are at most `most`."""
        first, base = _dividends(quotient, n)
        if self.bound * most > _WORD:
            values = _modes.concrete(self.top)
            if values is not None and values.numel():
                self.bound = int(values.max()) + 1
        if self.bound * most > _WORD:
            self.words.append(self.top)
            self.sizes.append(self.count)
            self.top, self.bound = torch.zeros_like(self.top), 1
        self.top = self.top * base + (c - first)
        self.bound *= most
        self.count += 1

    def pop(self, quotient: Tensor, n: Any) -> Tensor:
        """The c that was pushed last, which is removed."""
        first, base = _dividends(quotient, n)
        whole = torch.div(self.top, base, rounding_mode="floor")
        digit, self.top = self.top - whole * base, whole
        self.count -= 1
        if self.sizes and self.sizes[-1] == self.count:
            self.sizes.pop()
            self.top = self.words.pop()
        return first + digit


class Faults:
    """What is wrong with values of tensors, collected so that steps need not synchronize a GPU."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, torch.device], Tensor] = {}

    def note(self, message: str, condition: Tensor | None) -> None:
        if condition is not None:
            key = message, condition.device
            self.found[key] = self.found[key] | condition if key in self.found else condition

    def add(self, integers: Tensor, number: Tensor) -> Tensor:
        """The sum of the integers and the rounded number."""
        fits = (exact(integers) + number).abs() < _LIMIT
        self.note(_OUT_OF_RANGE, ~fits.all())
        return integers + torch.where(fits, number, 0).round().to(torch.int64)

    def check(self) -> None:
        for (message, _), condition in self.found.items():
            if _modes.holds_anywhere(condition):
                raise ValueError(message)
