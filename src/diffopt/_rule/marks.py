"""What numbers on devices hold, so that nobody waits for a device to compare two of them.

The tensors are those that are `_modes.versioned`. A value is a pair: None, or an object that stands
for an unknown number, and what is added to it. It is right while nobody but this package writes to
the tensor, which its version tells (not of writes through `.data`), and while no graph is replayed
that was captured before; therefore what a graph counts is unknown, and equals only what it counts
together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from diffopt import _modes, _torch

Value: TypeAlias = tuple[object, float]

_MARKS: Any = WeakTensorKeyDictionary()
"""By tensors that are not views; a view has the mark of its base, whose version it shares."""


class Mark:
    """The values of the numbers in one memory, by offset, and its version when they were these."""

    __slots__ = ("values", "version")

    def __init__(self) -> None:
        self.values, self.version = dict[Any, Value](), 0

    def value_of(self, x: Tensor) -> Value | None:
        """The value of a number; None if it is unknown, or somebody else has written there."""
        return self.values.get(x.storage_offset()) if self.version == _torch.version(x) else None

    def note(self, x: Tensor, value: Value) -> None:
        """This number has this value, and has been written last."""
        self.values[x.storage_offset()], self.version = value, _torch.version(x)


def unknown() -> Value:
    """A value that equals no other one."""
    return object(), 0.0


def of(tensors: Iterable[Tensor]) -> list[Mark]:
    """The marks of tensors."""
    marks: list[Mark] = []
    found: dict[int, Mark] = {}
    for x in tensors:
        base = _torch.base(x)
        base = x if base is None else base
        mark = found.get(id(base)) or _MARKS.get(base)
        if mark is None:
            _MARKS[base] = mark = Mark()
        found[id(base)] = mark
        marks.append(mark)
    return marks


def known(tensors: Sequence[Tensor]) -> list[Value | None]:
    """What is known of these; values out of date are dropped, lest `note` bring them back."""
    pairs = list(zip(of(tensors), tensors, strict=True))
    for mark, x in pairs:
        if mark.version != _torch.version(x):
            mark.values.clear()
    return [mark.value_of(x) for mark, x in pairs]


def note(tensors: Sequence[Tensor], value: Value) -> None:
    """These have this value, and have been written last."""
    for mark, x in zip(of(tensors), tensors, strict=True):
        mark.note(x, value)


def learn(tensors: Sequence[Tensor]) -> list[Any]:
    """The values of these, read where they are not known.

    A graph that is being captured cannot wait for that.
    """
    values = known(tensors)
    lacking = [x for x, value in zip(tensors, values, strict=True) if value is None]
    if not lacking:
        return values
    found = [unknown() for _ in lacking]
    if not _modes.capturing():
        found = [(None, number) for number in read(lacking)]
    for x, value in zip(lacking, found, strict=True):
        note([x], value)
    return known(tensors)


def read(tensors: Sequence[Tensor]) -> list[float]:
    """The numbers in tensors of one element, by waiting for their devices once."""
    device = tensors[0].device
    numbers = torch.stack([x.detach().to(device).double().reshape(()) for x in tensors])
    return numbers.cpu().tolist()
