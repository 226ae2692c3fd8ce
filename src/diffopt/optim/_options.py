"""Reading a parameter group of torch.optim: flags, numbers, names."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from diffopt._rule import hyper
from diffopt._rule.leafwise import Leafwise
from diffopt.optim._groups import plain_number

Group: TypeAlias = dict[str, Any]

PAIRS = {
    field: (pair, k) for pair, fields in hyper.TORCH_PAIRS.items() for k, field in enumerate(fields)
}
"""Hyperparameters that torch.optim keeps in a tuple."""


def flags_of(group: Group) -> tuple[Any, ...]:
    """The options that, besides the tensors, determine how a group is stepped."""
    flags = map(group.get, ("foreach", "fused", "capturable", "differentiable"))
    return (*flags, torch.is_inference_mode_enabled())


def values_of(opt: Leafwise[Any, Any], group: Group) -> list[Any]:
    """The hyperparameters of a group in the order of the rule's record.

    Raises:
        TypeError: one of them is not a number.
    """
    values: list[Any] = []
    for field in hyper.FIELDS[opt.hparams]:
        key, k = (field.name, None) if field.name in group else PAIRS[field.name]
        value = group[key] if k is None else group[key][k]
        epsilon = field.name == "eps1" and value is None
        values.append(value if epsilon else plain_number(value, f"group[{key!r}]"))
    return values


def name_of(group: Group, i: int, j: int) -> str:
    """The name of a parameter in errors."""
    names = group.get("param_names")
    return names[j] if names else f"param_groups[{i}]['params'][{j}]"
