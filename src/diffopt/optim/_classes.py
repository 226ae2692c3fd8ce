"""The classes of torch.optim, each with the rule that steps it and its configuration.

A class that torch.optim does not have inherits its constructor from `OwnClass`, and names the
function that creates its optimizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffopt import rules
from diffopt._rule.leafwise import Leafwise
from diffopt.optim._adapter import RuleOptimizer
from diffopt.optim._options import Group


class SGD(RuleOptimizer, torch.optim.SGD):
    """`torch.optim.SGD`, stepped by `diffopt.sgd`."""

    scalar_state = ()
    sparse_gradients = True
    foreach_unrolls = True

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        return rules.sgd(
            momentum=bool(group["momentum"] != 0),
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )


class Adam(RuleOptimizer, torch.optim.Adam):
    """`torch.optim.Adam`, stepped by `diffopt.adam` (or `adamw` if the decay is decoupled)."""

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        make = rules.adamw if group["decoupled_weight_decay"] else rules.adam
        return make(amsgrad=group["amsgrad"], maximize=group["maximize"])


class AdamW(Adam, torch.optim.AdamW):
    """`torch.optim.AdamW`, stepped by `diffopt.adamw`."""


class Adamax(RuleOptimizer, torch.optim.Adamax):
    """`torch.optim.Adamax`, stepped by `diffopt.adamax`."""

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        return rules.adamax(maximize=group["maximize"])


class NAdam(RuleOptimizer, torch.optim.NAdam):
    """`torch.optim.NAdam`, stepped by `diffopt.nadam`."""

    scalar_state = ("step", "mu_product")

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        return rules.nadam(
            decoupled_weight_decay=group["decoupled_weight_decay"], maximize=group["maximize"]
        )


class RAdam(RuleOptimizer, torch.optim.RAdam):
    """`torch.optim.RAdam`, stepped by `diffopt.radam`."""

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        return rules.radam(
            decoupled_weight_decay=group["decoupled_weight_decay"], maximize=group["maximize"]
        )


class RMSprop(RuleOptimizer, torch.optim.RMSprop):
    """`torch.optim.RMSprop`, stepped by `diffopt.rmsprop`."""

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        return rules.rmsprop(
            centered=group["centered"],
            momentum=bool(group["momentum"] > 0),
            maximize=group["maximize"],
        )


class Adagrad(RuleOptimizer, torch.optim.Adagrad):
    """`torch.optim.Adagrad`, stepped by `diffopt.adagrad`."""

    sparse_gradients = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault(
                "initial_accumulator_value", self.defaults["initial_accumulator_value"]
            )

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        return rules.adagrad(maximize=group["maximize"])


class Adadelta(RuleOptimizer, torch.optim.Adadelta):
    """`torch.optim.Adadelta`, stepped by `diffopt.adadelta`."""

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        return rules.adadelta(maximize=group["maximize"])


class ASGD(RuleOptimizer, torch.optim.ASGD):
    """`torch.optim.ASGD`, stepped by `diffopt.asgd`."""

    scalar_state = ("step", "eta", "mu")
    scalars_follow = True

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        return rules.asgd(maximize=group["maximize"])


class Rprop(RuleOptimizer, torch.optim.Rprop):
    """`torch.optim.Rprop`, stepped by `diffopt.rprop`."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("lr", self.defaults["lr"])

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        return rules.rprop(maximize=group["maximize"])


class Adafactor(RuleOptimizer, torch.optim.Adafactor):
    """`torch.optim.Adafactor`, stepped by `diffopt.adafactor`."""

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        return rules.adafactor(eps1=True, maximize=group["maximize"])

    def buffers(self, opt: Leafwise[Any, Any], param: Tensor) -> list[str]:
        return ["row_var", "col_var"] if param.dim() > 1 else ["variance"]

    def check_param(self, param: Tensor, group: Group, name: str) -> None:
        super().check_param(param, group, name)
        if param.is_complex():
            raise RuntimeError(f"Adafactor does not support complex parameters: {name} is one")


class Muon(RuleOptimizer, torch.optim.Muon):
    """`torch.optim.Muon`, stepped by `diffopt.muon`."""

    scalar_state = ()

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        return rules.muon(
            nesterov=group["nesterov"],
            ns_steps=group["ns_steps"],
            adjust_lr_fn=group["adjust_lr_fn"],
        )

    def check_param(self, param: Tensor, group: Group, name: str) -> None:
        super().check_param(param, group, name)
        if param.is_complex():
            raise RuntimeError(f"Muon does not support complex parameters: {name} is one")


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
