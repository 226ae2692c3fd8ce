"""Classes that torch.optim does not have: their initial state is that of the rule's `init`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt._arguments import did_you_mean
from diffopt._rule import hyper
from diffopt._rule.leafwise import Leafwise
from diffopt.optim._adapter import RuleOptimizer
from diffopt.optim._groups import Group, options

_WAYS: dict[str, Any] = {"foreach": None, "capturable": False, "differentiable": False}


class OwnInit(RuleOptimizer):
    """A class whose initial state is that of the rule's `init`."""

    strict = True

    def new_buffers(
        self, opt: Leafwise[Any, Any], params: Sequence[Tensor], initial: dict[str, Any]
    ) -> list[dict[str, Any]]:
        state = opt.init([param.detach() for param in params])
        names = opt.buffers_of(params[0])
        return [
            {name: _raised(getattr(state, name)[i], initial.get(name)) for name in names}
            for i in range(len(params))
        ]


class LeafwiseOptimizer(OwnInit):
    """What `from_pure` returns for a `Leafwise` optimizer."""

    def __init__(
        self, optimizer: Leafwise[Any, Any], params: Iterable[Any], hparams: dict[str, Any]
    ) -> None:
        self.optimizer = optimizer
        super().__init__(params, hparams)

    @property
    def scalar_state(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)
        return ("step", *self.optimizer.per_hyperparameter)

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
        TypeError: an option is unknown; the message lists all.
        ValueError: a number is out of range.

    Examples:
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

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "make" in vars(cls):
            cls.flags = tuple(inspect.signature(cls.make).parameters)
            cls.scalar_state = ("step", *cls.make().per_hyperparameter)

    def __init__(self, params: Iterable[Any], lr: Any = None, **others: Any) -> None:
        others |= {} if lr is None else {"lr": lr}
        arguments = inspect.signature(type(self).make).parameters
        known = {name: argument.default for name, argument in arguments.items()} | _WAYS
        flags = {name: others.pop(name, default) for name, default in known.items()}
        record = self.rule(flags).hparams
        fields = [field.name for field in hyper.FIELDS[record]]
        pairs = ["betas"] if {*hyper.TORCH_PAIRS["betas"]} <= {*fields} else []
        self._check_names(others, [*fields, *pairs, *known])
        _, numbers = options(record, others)
        super().__init__(params, {**numbers, **flags})

    def _check_names(self, given: Iterable[str], names: list[str]) -> None:
        for name in given:
            if name not in names:
                question = did_you_mean(names, name) or "."
                raise TypeError(
                    f"{type(self).__name__} has no option {name!r}{question} The options are "
                    f"{', '.join(names)}"
                )


def _raised(buffer: Tensor, initial: Any) -> Tensor:
    """A copy of a buffer, which may initially be the parameter, plus its initial value."""
    if initial is None:
        return buffer.clone()
    if buffer.is_complex():  # rules see pairs of reals
        return torch.view_as_complex(torch.view_as_real(buffer) + initial)
    return (buffer + initial).to(buffer.dtype)
