"""Reading a parameter group of torch.optim: flags, numbers, names."""

from __future__ import annotations

import operator
from typing import Any, TypeAlias

from diffopt._rule import hyper
from diffopt._rule.leafwise import Leafwise
from diffopt.optim._groups import plain_number

Group: TypeAlias = dict[str, Any]

PAIRS = {
    field: (pair, k) for pair, fields in hyper.TORCH_PAIRS.items() for k, field in enumerate(fields)
}
"""Hyperparameters that torch.optim keeps in a tuple."""


_TENSORS = ("params", "param_names")
_CONSTANT = (float, int, bool, str, type(None))
_FLAGS = ("foreach", "fused", "capturable", "differentiable")


class Options:
    """What a group says besides its tensors: the rule, its numbers and its flags.

    Raises:
        TypeError: a hyperparameter is not a number.
    """

    def __init__(self, optimizer: Any, group: Group) -> None:
        self.opt: Leafwise[Any, Any] = optimizer.rule(group)
        self.values = values_of(self.opt, group)
        self.flags = tuple(map(group.get, _FLAGS))
        self.given = _given(group)
        self.constant = all(map(_constant, self.given.values()))

    def current(self, optimizer: Any, group: Group) -> bool:
        """Whether the group still says the same: it has the same objects, all of them constants."""
        given = _given(group)
        return (
            self.constant
            and [*given] == [*self.given]
            and all(map(operator.is_, given.values(), self.given.values()))
            and self.opt == optimizer.rule(group)
        )


def _given(group: Group) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _TENSORS}


def _constant(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_constant, value))
    return type(value) in _CONSTANT


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
