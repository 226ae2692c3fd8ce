"""What a parameter group says besides its tensors, kept for as long as it says the same."""

from __future__ import annotations

import operator
from typing import Any

from diffopt._rule.leafwise import Leafwise
from diffopt.optim._groups import Group, values_of

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
        given = _given(group)
        self.constant = all(map(_constant, given.values()))
        self.given = given if self.constant else {}  # which users may let go

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
