"""What a parameter group says besides its tensors, kept for as long as it says the same."""

from __future__ import annotations

import cmath
import contextlib
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffopt import _modes, _tree
from diffopt._rule import hyper
from diffopt._rule.leafwise import Leafwise
from diffopt.optim._groups import Group, constant, option, values_of

_TENSORS = ("params", "param_names")
_FLAGS = ("foreach", "fused", "capturable", "differentiable")


def made(make: Callable[..., Leafwise[Any, Any]], **flags: Any) -> Leafwise[Any, Any]:
    """The pure optimizer with these flags; a group is asked for it at every step."""
    if _modes.compiling():
        return make(**flags)
    try:
        return _made(make, **flags)
    except TypeError:  # a flag has no hash, or is wrong
        return make(**flags)


@functools.lru_cache(maxsize=256, typed=True)
def _made(make: Callable[..., Leafwise[Any, Any]], **flags: Any) -> Leafwise[Any, Any]:
    return make(**flags)


class Options:
    """What a group says besides its tensors: the rule, its numbers and its flags.

    Raises:
        TypeError: a hyperparameter is not a number.
    """

    def __init__(self, optimizer: Any, group: Group) -> None:
        self.opt: Leafwise[Any, Any] = optimizer.rule(group)
        self.values = values_of(self.opt, group)
        self.flags = tuple(map(group.get, _FLAGS))
        self.strict = optimizer.strict
        given = _given(group)
        own = optimizer.rule.__module__.startswith("diffopt.")  # a user's may look at anything
        self.constant = own and all(map(constant, given.values()))
        self.given = given if self.constant else {}  # which users may let go
        self.in_range = self._in_range()

    def check(self, where: str) -> None:
        """Raise for a number out of its range with which no step can be computed.

        As in torch, others are taken: schedules may leave the ranges that constructors check.
        Classes that torch does not have are strict: they take none.
        """
        if self.in_range:
            return
        record = self.opt.hparams
        defaults = [getattr(record(), field.name) for field in hyper.FIELDS[record]]
        pairs = zip(defaults, self.values, strict=True)
        numbers = [default if isinstance(x, Tensor) else x for default, x in pairs]
        if not self.strict and self._computable(hyper.assemble(record, numbers)):
            return
        try:
            record(**{f.name: x for f, x in zip(hyper.FIELDS[record], numbers, strict=True)})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def _computable(self, hparams: Any) -> bool:
        """Whether steps with these numbers, which are out of their ranges, can be computed."""
        with contextlib.suppress(Exception):  # such as division by zero
            scalars = [self.opt.scalars(t, hparams) for t in (1.0, 10.0)]  # RAdam: without, with v
            return all(map(_computed, _tree.leaves(scalars)))
        return False

    def current(self, group: Group) -> Options | None:
        """What the group says now, if it says the same but for floats in their ranges."""
        given = self.given
        changed = [
            (name, x)
            for name, x in group.items()
            if x is not given.get(name, self) and name not in _TENSORS
        ]
        if len(group) != len(given):  # as where `given` is empty
            return None
        if not changed:
            return self
        alike = all(_alike(x, given.get(name, self)) for name, x in changed)
        return self._renewed(group, given | dict(changed)) if alike and self.in_range else None

    def _renewed(self, group: Group, given: dict[str, Any]) -> Options | None:
        """The same but for floats; None if one is out of its range, which is for `check`."""
        values: list[Any] = []
        for field, old in zip(hyper.FIELDS[self.opt.hparams], self.values, strict=True):
            new = option(group, field.name)
            if new is not old and not (type(new) is float and hyper.within(new, field.bounds)):
                return None
            values.append(new)
        other = object.__new__(Options)
        vars(other).update(vars(self), values=values, given=given)
        return other

    def _in_range(self) -> bool:
        """Whether all numbers are in their ranges."""
        pairs = zip(hyper.FIELDS[self.opt.hparams], self.values, strict=False)
        return all(
            x is None or isinstance(x, Tensor) or hyper.fault_of(x, field.bounds) is None
            for field, x in pairs
        )


def _computed(scalar: Any) -> bool:
    """False for numbers that are not finite and real: the root of a negative number is complex."""
    number = isinstance(scalar, (int, float, complex))
    return not number or (cmath.isfinite(scalar) and not scalar.imag)


def _given(group: Group) -> dict[str, Any]:
    return {name: None if name in _TENSORS else x for name, x in group.items()}


def _alike(new: Any, old: Any) -> bool:
    """Whether they are the same object, two floats of one sign, or tuples of such pairs.

    No rule depends on more than the sign of a number, such as whether there is a momentum.
    """
    if type(new) is tuple and type(old) is tuple:
        return len(new) == len(old) and all(map(_alike, new, old))
    if type(new) is float and type(old) is float:
        return (new > 0) is (old > 0) and (new == 0) is (old == 0)
    return new is old
