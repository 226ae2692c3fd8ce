"""TensorList: a list of tensors whose arithmetic runs as torch's foreach operations."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree

_KERNELS = {
    torch.add: _torch.foreach_add,
    torch.lerp: _torch.foreach_lerp,
    torch.addcmul: _torch.foreach_addcmul,
    torch.addcdiv: _torch.foreach_addcdiv,
    torch.maximum: _torch.foreach_maximum,
    Tensor.sqrt: _torch.foreach_sqrt,
}


class TensorList:
    """Takes the place of the tensor in a rule; each operation runs on all its tensors at once.

    Operators take another TensorList of the same length, a Python number or a 0-d tensor. Functions
    and methods without a foreach kernel run tensor by tensor. Foreach kernels cannot be batched by
    vmap nor differentiated with respect to a tensor hyperparameter, so this class is used only
    where no derivative is needed.
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def __add__(self, other: Any) -> TensorList:
        return TensorList(_torch.foreach_add(self.tensors, _operand(other)))

    def __mul__(self, other: Any) -> TensorList:
        return TensorList(_torch.foreach_mul(self.tensors, _operand(other)))

    def __sub__(self, other: Any) -> TensorList:
        other = _operand(other)
        if isinstance(other, Tensor):  # _foreach_sub takes no 0-d tensor
            return self + -other
        return TensorList(_torch.foreach_sub(self.tensors, other))

    def __truediv__(self, other: Any) -> TensorList:
        return TensorList(_torch.foreach_div(self.tensors, _operand(other)))

    def __neg__(self) -> TensorList:
        return TensorList(_torch.foreach_neg(self.tensors))

    def __rsub__(self, other: Any) -> TensorList:
        return -self + other

    __radd__ = __add__
    __rmul__ = __mul__

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> TensorList:
        """By a foreach kernel, or as `function` of each tensor."""
        kernel = _KERNELS.get(function)
        if kernel and isinstance(args[0], cls) and not any(isinstance(a, Tensor) for a in args):
            return TensorList(kernel(*map(_operand, args), **(kwargs or {})))
        given = args, kwargs or {}  # lists among the arguments are those of stack and cat
        length = next(len(a) for a in _tree.leaves(given) if isinstance(a, TensorList))

        def at(i: int) -> Any:
            return _tree.map(lambda a: a.tensors[i] if isinstance(a, cls) else a, given)

        calls = map(at, range(length))
        return TensorList([function(*positional, **named) for positional, named in calls])

    def __getattr__(self, name: str) -> Any:
        method = getattr(Tensor, name)
        if not callable(method):
            raise AttributeError(f"a TensorList has no {name}: it differs between its tensors")
        return functools.partial(_tensor_by_tensor(method), self)


def _tensor_by_tensor(method: Any) -> Any:
    def mapped(*args: Any, **kwargs: Any) -> TensorList:
        return TensorList.__torch_function__(method, (), args, kwargs)

    return mapped


for _name in ("abs", "pow", "rpow", "rtruediv", "lt", "le", "gt", "ge", "eq", "ne", "and", "or"):
    setattr(TensorList, f"__{_name}__", _tensor_by_tensor(getattr(Tensor, f"__{_name}__")))


def _operand(other: Any) -> Any:
    """A number for a 0-d CPU tensor, which a foreach kernel on another device may refuse."""
    return other.tensors if isinstance(other, TensorList) else _modes.number_of(other)
