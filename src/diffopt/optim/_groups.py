"""The numbers in parameter groups, which anybody may overwrite between steps."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from numbers import Integral
from typing import Any, SupportsFloat

from torch import Tensor

from diffopt import _tree

_PLAIN = (float, int)
_MAY_BE_NONE = ("eps", 0)  # Adafactor's eps1: machine epsilon


def plain_number(value: Any, name: str) -> Any:
    """A Python number, or a 0-d tensor; numbers of other kinds, such as numpy's, become Python's.

    Raises:
        TypeError: the value is not a number.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            return value.squeeze() if value.dim() else value
    elif isinstance(value, SupportsFloat):
        with contextlib.suppress(TypeError, ValueError):  # from an array of several numbers
            return int(value) if isinstance(value, Integral) else float(value)
    raise TypeError(f"{name} is {_tree.describe(value)}, but must be a number")


def check_numbers(groups: Sequence[dict[str, Any]], defaults: dict[str, Any]) -> None:
    """Raise where a group has something else than a number for what is one by default.

    As in torch.optim, ranges are checked in constructors only: a schedule may leave them.
    """
    for i, group in enumerate(groups):
        for key, default in defaults.items():
            value = group.get(key)
            if type(default) is tuple:
                _check_tuple(key, value, len(default), i)
            elif type(value) not in _PLAIN and is_number(default):
                plain_number(value, f"param_groups[{i}][{key!r}]")


def is_number(value: Any) -> bool:
    """Whether a default is a number, and not a flag."""
    return type(value) in _PLAIN or (
        isinstance(value, SupportsFloat) and not isinstance(value, bool)
    )


def _check_tuple(key: str, values: Any, length: int, i: int) -> None:
    name = f"param_groups[{i}][{key!r}]"
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != length:
        raise TypeError(f"{name} is {_tree.describe(values)}, but must be {length} numbers")
    for k, value in enumerate(values):
        if type(value) not in _PLAIN and not (value is None and (key, k) == _MAY_BE_NONE):
            plain_number(value, f"{name}[{k}]")
