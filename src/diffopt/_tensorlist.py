"""TensorList: a list of tensors that does arithmetic through torch._foreach_*."""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class TensorList:
    """Stands where a rule expects one tensor; each operation runs on all of them at once.

    Every operator takes another TensorList of the same length, a Python number or a 0-d tensor.
    The foreach kernels are neither batchable nor differentiable by a tensor hyperparameter: the
    engine uses this class only where no derivative is wanted.
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def __add__(self, other: Any) -> TensorList:
        return TensorList(torch._foreach_add(self.tensors, _operand(other)))

    def __mul__(self, other: Any) -> TensorList:
        return TensorList(torch._foreach_mul(self.tensors, _operand(other)))

    def __sub__(self, other: Any) -> TensorList:
        if isinstance(other, Tensor):  # _foreach_sub takes no 0-d tensor
            return self + -other
        return TensorList(torch._foreach_sub(self.tensors, _operand(other)))

    def __truediv__(self, other: Any) -> TensorList:
        return TensorList(torch._foreach_div(self.tensors, _operand(other)))

    def __neg__(self) -> TensorList:
        return TensorList(torch._foreach_neg(self.tensors))

    def __rsub__(self, other: Any) -> TensorList:
        return -self + other

    __radd__ = __add__
    __rmul__ = __mul__


def _operand(other: Any) -> Any:
    return other.tensors if isinstance(other, TensorList) else other
