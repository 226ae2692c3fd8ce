"""The classes of torch.optim, each with the rule that steps it and its configuration.

A class that torch.optim does not have inherits its constructor from `OwnClass`, and names the
function that creates its optimizer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack

import torch
from torch import Tensor

from diffopt import rules
from diffopt._rule.leafwise import Leafwise
from diffopt.optim import _state
from diffopt.optim._adapter import Fusible, RuleOptimizer
from diffopt.optim._groups import Group
from diffopt.optim._options import made

Rate: TypeAlias = float | Tensor
Pair: TypeAlias = tuple[Rate, Rate]


class Flags(TypedDict, total=False):
    """What the constructors of `Fusible` classes take by keyword."""

    foreach: bool | None
    maximize: bool
    capturable: bool
    differentiable: bool
    fused: bool | None


# For type checkers `Fusible` classes repeat torch's constructors, which lack `fused`.


class SGD(RuleOptimizer, torch.optim.SGD):
    """`torch.optim.SGD`, stepped by `diffopt.sgd`."""

    scalar_state = ()
    sparse_gradients = True
    foreach_unrolls = True

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        momentum = bool(group["momentum"] != 0)
        flags = {name: group[name] for name in ("nesterov", "maximize")}
        return made(rules.sgd, momentum=momentum, **flags)


class Adam(RuleOptimizer, torch.optim.Adam):
    """`torch.optim.Adam`, stepped by `diffopt.adam` (or `adamw` if the decay is decoupled)."""

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        make = rules.adamw if group["decoupled_weight_decay"] else rules.adam
        return made(make, amsgrad=group["amsgrad"], maximize=group["maximize"])


class AdamW(Adam, torch.optim.AdamW):
    """`torch.optim.AdamW`, stepped by `diffopt.adamw`."""


class Adamax(Fusible, torch.optim.Adamax):
    """`torch.optim.Adamax`, stepped by `diffopt.adamax`."""

    if TYPE_CHECKING:

        def __init__(self, params: Iterable[Any], lr: Rate = 2e-3, betas: Pair = (0.9, 0.999),
            eps: float = 1e-8, weight_decay: float = 0.0,
            **flags: Unpack[Flags]) -> None: ...  # fmt: skip

    make = staticmethod(rules.adamax)


class NAdam(Fusible, torch.optim.NAdam):
    """`torch.optim.NAdam`, stepped by `diffopt.nadam`."""

    if TYPE_CHECKING:

        def __init__(self, params: Iterable[Any], lr: Rate = 2e-3, betas: Pair = (0.9, 0.999),
            eps: float = 1e-8, weight_decay: float = 0.0, momentum_decay: float = 4e-3,
            decoupled_weight_decay: bool = False,
            **flags: Unpack[Flags]) -> None: ...  # fmt: skip

    make = staticmethod(rules.nadam)
    flags = ("decoupled_weight_decay", "maximize")
    scalar_state = ("step", "mu_product")


class RAdam(Fusible, torch.optim.RAdam):
    """`torch.optim.RAdam`, stepped by `diffopt.radam`."""

    if TYPE_CHECKING:

        def __init__(self, params: Iterable[Any], lr: Rate = 1e-3, betas: Pair = (0.9, 0.999),
            eps: float = 1e-8, weight_decay: float = 0.0, decoupled_weight_decay: bool = False,
            **flags: Unpack[Flags]) -> None: ...  # fmt: skip

    make = staticmethod(rules.radam)
    flags = ("decoupled_weight_decay", "maximize")


class RMSprop(Fusible, torch.optim.RMSprop):
    """`torch.optim.RMSprop`, stepped by `diffopt.rmsprop`."""

    if TYPE_CHECKING:

        def __init__(self, params: Iterable[Any], lr: Rate = 1e-2, alpha: float = 0.99,
            eps: float = 1e-8, weight_decay: float = 0.0, momentum: float = 0.0,
            centered: bool = False, **flags: Unpack[Flags]) -> None: ...  # fmt: skip

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        flags = {name: group[name] for name in ("centered", "maximize")}
        return made(rules.rmsprop, momentum=bool(group["momentum"] > 0), **flags)


class Adagrad(RuleOptimizer, torch.optim.Adagrad):
    """`torch.optim.Adagrad`, stepped by `diffopt.adagrad`."""

    make = staticmethod(rules.adagrad)
    sparse_gradients = True
    later = ("initial_accumulator_value",)

    @functools.wraps(torch.optim.Adagrad.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # which makes the state: nobody else has seen it
        _state.pack([*self.state.values()], self.scalar_state)
        _state.mark_unlent(self.state, self.scalar_state)


class Adadelta(Fusible, torch.optim.Adadelta):
    """`torch.optim.Adadelta`, stepped by `diffopt.adadelta`."""

    if TYPE_CHECKING:

        def __init__(self, params: Iterable[Any], lr: Rate = 1.0, rho: float = 0.9,
            eps: float = 1e-6, weight_decay: float = 0.0,
            **flags: Unpack[Flags]) -> None: ...  # fmt: skip

    make = staticmethod(rules.adadelta)


class ASGD(Fusible, torch.optim.ASGD):
    """`torch.optim.ASGD`, stepped by `diffopt.asgd`."""

    if TYPE_CHECKING:

        def __init__(self, params: Iterable[Any], lr: Rate = 1e-2, lambd: float = 1e-4,
            alpha: float = 0.75, t0: float = 1e6, weight_decay: float = 0.0,
            **flags: Unpack[Flags]) -> None: ...  # fmt: skip

    make = staticmethod(rules.asgd)
    scalar_state = ("step", "eta", "mu")
    scalars_follow = True


class Rprop(Fusible, torch.optim.Rprop):
    """`torch.optim.Rprop`, stepped by `diffopt.rprop`."""

    if TYPE_CHECKING:

        def __init__(self, params: Iterable[Any], lr: Rate = 1e-2, etas: Pair = (0.5, 1.2),
            step_sizes: Pair = (1e-6, 50), **flags: Unpack[Flags]) -> None: ...  # fmt: skip

    make = staticmethod(rules.rprop)
    later = ("lr", *Fusible.later)


class Adafactor(RuleOptimizer, torch.optim.Adafactor):
    """`torch.optim.Adafactor`, stepped by `diffopt.adafactor`."""

    make = staticmethod(functools.partial(rules.adafactor, eps1=True))

    def fields(self, opt: Leafwise[Any, Any], param: Tensor) -> dict[str, torch.Size]:
        absent = ["variance"] if param.dim() > 1 else ["row_var", "col_var"]
        return {k: v for k, v in super().fields(opt, param).items() if k not in absent}


class Muon(RuleOptimizer, torch.optim.Muon):
    """`torch.optim.Muon`, stepped by `diffopt.muon`."""

    make = staticmethod(rules.muon)
    flags = ("nesterov", "ns_steps", "adjust_lr_fn")
    scalar_state = ()


class SparseAdam(RuleOptimizer, torch.optim.SparseAdam):
    """`torch.optim.SparseAdam`, stepped by `diffopt.sparse_adam`."""

    sparse_gradients = True
    integer_steps = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)

    def new_scalar(self, value: Any, param: Tensor, group: Group) -> Any:
        return int(value)

    def loaded_scalar(self, key: str, value: Any, param: Tensor, group: Group) -> Any:
        return int(value)

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        return rules.sparse_adam(maximize=group["maximize"]).entries

    def check_param(self, param: Tensor, group: Group, name: str) -> None:
        super().check_param(param, group, name)
        grad: Any = param.grad
        if not grad.is_sparse:
            raise RuntimeError(
                "SparseAdam does not support dense gradients, please consider Adam instead: "
                f"{name} has one"
            )
