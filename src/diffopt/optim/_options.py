"""What a parameter group says besides its tensors, kept for as long as it says the same."""

from __future__ import annotations

import cmath
import contextlib
import operator
from typing import Any

from torch import Tensor

from diffopt import _tree
from diffopt._rule import hyper
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

    def check(self, where: str) -> None:
        """Raise for a number out of its range with which no step can be computed.

        As in torch, others are taken: schedules may leave the ranges that constructors check.
        """
        record = self.opt.hparams
        numbers = [1.0 if isinstance(value, Tensor) else value for value in self.values]
        with contextlib.suppress(Exception):  # such as division by zero
            hparams = hyper.assemble(record, numbers)
            scalars = [self.opt.scalars(t, hparams) for t in (1.0, 10.0)]  # RAdam: without, with v
            if all(map(_computed, _tree.leaves(scalars))):
                return
        try:
            record(**{f.name: x for f, x in zip(hyper.FIELDS[record], numbers, strict=True)})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def current(self, optimizer: Any, group: Group) -> bool:
        """Whether the group still says the same: it has the same objects, all of them constants."""
        given = _given(group)
        return (
            self.constant
            and [*given] == [*self.given]
            and all(map(operator.is_, given.values(), self.given.values()))
            and self.opt == optimizer.rule(group)
        )


def _computed(scalar: Any) -> bool:
    """False for numbers that are not finite and real: the root of a negative number is complex."""
    number = isinstance(scalar, (int, float, complex))
    return not number or (cmath.isfinite(scalar) and not scalar.imag)


def _given(group: Group) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _TENSORS}


def _constant(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_constant, value))
    return type(value) in _CONSTANT
