"""Telling whether tensors are still what they were, without keeping any of them alive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from diffopt import _memory, _torch


class Prints:
    """What tensors were: types, dtypes, devices, shapes, strides, and the addresses of some."""

    def __init__(self, placed: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        self.kept = [
            (_torch.TensorGuards([*some, *more]), addresses_of(some))
            for some, more in _chunks(placed, others)
        ]

    def fit(self, placed: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
        return all(
            guards.hold((*some, *more)) and addresses_of(some) == addresses
            for (guards, addresses), (some, more) in zip(
                self.kept, _chunks(placed, others), strict=True
            )
        )


_CHUNK = 100  # tensors that stay in a core's cache while they are read twice


def _chunks(*columns: Sequence[Tensor]) -> Iterator[list[Sequence[Tensor]]]:
    for i in range(0, len(columns[0]), _CHUNK):
        yield [column[i : i + _CHUNK] for column in columns]


def addresses_of(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


class Passed:
    """What the tensors of an update in place were that passed all checks: as they are, they pass.

    The checks look at nothing but types, dtypes, devices, shapes, strides and addresses, and at
    whether all params are different objects.
    """

    def __init__(self, params: list[Tensor], others: list[Tensor], grads: list[Tensor]) -> None:
        self._sizes = len(others), len(grads)
        self._given, self._others = Prints(params, grads), Prints(others, ())
        self._extent = _memory.Extent([*params, *others], grads)

    def by(self, params: list[Tensor], others: list[Tensor], grads: list[Any]) -> bool:
        """Whether these have passed, if their params have the ids of those before."""
        return (
            self._sizes == (len(others), len(grads))
            and self._given.fit(params, grads)
            and self._others.fit(others, ())
            and not self._extent.meets(grads)
        )
