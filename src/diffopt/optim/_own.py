"""Classes that torch.optim does not have: their initial state is that of the rule's `init`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffopt._rule import hyper
from diffopt._rule.leafwise import Leafwise
from diffopt.optim._adapter import RuleOptimizer
from diffopt.optim._groups import options
from diffopt.optim._options import Group, values_of

_WAYS: dict[str, Any] = {"foreach": None, "capturable": False, "differentiable": False}


class OwnInit(RuleOptimizer):
    """A class whose initial state is that of the rule's `init`."""

    def new_states(self, params: Sequence[Tensor], group: Group) -> list[dict[str, Any]]:
        opt = self.rule(group)
        numbers = hyper.assemble(opt.hparams, values_of(opt, group))
        initial = opt.initial(numbers)
        state = opt.init([param.detach() for param in params])
        rows: list[dict[str, Any]] = []
        for i, param in enumerate(params):
            rows.append({"step": self.new_scalar(0.0, param, group)})
            for name in opt.buffers_of(param):
                rows[i][name] = _raised(getattr(state, name)[i], initial.get(name))
        return rows

    def check_param(self, param: Tensor, group: Group, name: str) -> None:
        super().check_param(param, group, name)
        if reason := self.rule(group).refuse(param):
            raise ValueError(f"{name} {reason}")


class LeafwiseOptimizer(OwnInit):
    """What `from_pure` returns for a `Leafwise` optimizer."""

    def __init__(
        self, optimizer: Leafwise[Any, Any], params: Iterable[Any], hparams: dict[str, Any]
    ) -> None:
        self.optimizer = optimizer
        super().__init__(params, hparams)

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        return self.optimizer

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizer": self.optimizer}


class OwnClass(OwnInit):
    """A class that torch.optim does not have; subclasses name the function `make`.

    Args:
        params: as for torch.optim.
        lr: the learning rate; by default that of the record.
        **others: flags of `make`; hyperparameters, with `betas` for beta1 and beta2 if you like;
            and foreach, capturable and differentiable, as in torch. Each is an option of every
            group.

    Raises:
        TypeError: an option is unknown; the message lists the known ones.
        ValueError: a number is out of range.

    Example:
        >>> import torch, diffopt
        >>> from diffopt.optim._own import OwnClass
        >>> class Momentum(OwnClass):
        ...     make = staticmethod(diffopt.adam)
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Momentum([p], 0.1, betas=(0.5, 0.9), maximize=True)
        >>> p.grad = torch.ones(2)
        >>> optimizer.step()
        >>> p.data
        tensor([1.1000, 1.1000])
    """

    make: ClassVar[Callable[..., Leafwise[Any, Any]]]

    def __init__(self, params: Iterable[Any], lr: Any = None, **others: Any) -> None:
        others |= {} if lr is None else {"lr": lr}
        known = _flags(self.make) | _WAYS
        flags = {name: others.pop(name, default) for name, default in known.items()}
        _, numbers = options(self.rule(flags).hparams, others)
        super().__init__(params, {**numbers, **flags})

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        make = type(self).make
        return _made(make, *(group[name] for name in _flags(make)))


@functools.cache
def _flags(make: Callable[..., Any]) -> dict[str, Any]:
    return {name: flag.default for name, flag in inspect.signature(make).parameters.items()}


@functools.cache
def _made(make: Callable[..., Leafwise[Any, Any]], *flags: Any) -> Leafwise[Any, Any]:
    return make(**dict(zip(_flags(make), flags, strict=True)))


def _raised(buffer: Tensor, initial: Any) -> Tensor:
    """A copy of a buffer, which may initially be the parameter, plus its initial value."""
    if initial is None:
        return buffer.clone()
    if buffer.is_complex():  # rules see pairs of reals
        return torch.view_as_complex(torch.view_as_real(buffer) + initial)
    return (buffer + initial).to(buffer.dtype)
