"""The numbers in parameter groups, which users and schedulers may overwrite between steps.

A group has the fields of a record under the names that torch's schedulers use: `lr`, and `betas`
for beta1 and beta2.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, SupportsFloat, cast

import torch
from torch import Tensor

from diffopt import _tree
from diffopt._arguments import too_large
from diffopt._rule import hyper

_BETAS = hyper.TORCH_PAIRS["betas"]
_PLAIN = (float, int)
_FLAGS = (bool, str, type(None))
_MAY_BE_NONE = ("eps", 0)  # Adafactor's eps1: machine epsilon
_MAY_BE_UNSET = ("foreach", "fused")  # checkpoints from before there were these flags


def plain_number(value: Any, name: str) -> Any:
    """A Python number or a 0-d tensor; other numbers, such as numpy's, are converted to Python's.

    Raises:
        TypeError: the value is not a number.
    """
    if _is_plain(value):
        return value
    if isinstance(value, Tensor):
        if value.numel() == 1 and _is_real(value):
            return value.squeeze() if value.dim() else value
    elif isinstance(value, SupportsFloat):
        # Raised by an array of several numbers, and by an integer that no float can hold.
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            float(value)
            return int(value) if isinstance(value, Integral) else float(value)
    raise TypeError(f"{name} is {_tree.describe(value)}, but must be a number")


def check_numbers(groups: Sequence[dict[str, Any]], defaults: dict[str, Any]) -> None:
    """Raise if a group has something other than a number where the default is a number.

    As in torch.optim, ranges are checked in constructors only, so that schedules may leave them.
    """
    for i, group in enumerate(groups):
        for key, default in defaults.items():
            value = group.get(key)
            if type(default) in _FLAGS:
                unset = value is None and (key in _MAY_BE_UNSET or key not in group)
                if type(default) is bool and not (unset or type(value) is bool):
                    found = _tree.describe(value)
                    raise TypeError(f"param_groups[{i}][{key!r}] is {found}, but must be a bool")
            elif type(default) is tuple:
                _check_tuple(key, value, len(default), i, group)
            elif not _is_plain(value) and is_number(default):
                check_number(value, f"param_groups[{i}][{key!r}]", group)


def is_number(value: Any) -> bool:
    """Whether a default is a number instead of a flag."""
    return type(value) not in _FLAGS and isinstance(value, SupportsFloat)


def check_number(value: Any, name: str, group: dict[str, Any]) -> None:
    """Raise where a value is not a number with which the parameters of a group can be stepped."""
    plain_number(value, name)
    if isinstance(value, Tensor) and value.is_meta and not all(p.is_meta for p in group["params"]):
        raise ValueError(f"{name} has device meta, where the parameters have values")


def _is_plain(value: Any) -> bool:
    """Whether it is a Python number that a float can hold."""
    return type(value) is float or (type(value) is int and not too_large(value))


def _is_real(value: Tensor) -> bool:
    return not value.is_complex() and value.dtype != torch.bool and value.layout is torch.strided


def _check_tuple(key: str, values: Any, length: int, i: int, group: dict[str, Any]) -> None:
    name = f"param_groups[{i}][{key!r}]"
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != length:
        raise TypeError(f"{name} is {_tree.describe(values)}, but must be {length} numbers")
    for k, value in enumerate(values):
        if not _is_plain(value) and not (value is None and (key, k) == _MAY_BE_NONE):
            check_number(value, f"{name}[{k}]", group)


def with_betas(group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The group with `betas` in place of beta1 and beta2, if its defaults have `betas`."""
    if "betas" in defaults and group.keys() & set(_BETAS):
        old = group.get("betas", defaults["betas"])
        group["betas"] = tuple(group.pop(name, old[k]) for k, name in enumerate(_BETAS))
    return group


def options(maker: Callable[..., Any], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The records created by a maker, and their fields as options of a group, checked.

    If several parts have an `lr`, so that each is "part.lr", `lr` is a common factor: a scheduler
    that changes it changes all.
    """
    given = dict(given)
    if "betas" in given:
        betas: Any = given.pop("betas")
        if not isinstance(betas, (tuple, list)) or len(cast(Sequence[Any], betas)) != len(_BETAS):
            raise TypeError(f"betas is {_tree.describe(betas)}, but must be 2 numbers")
        given |= zip(_BETAS, cast(Sequence[Any], betas), strict=True)
    template = _made(maker, given)
    template = _tree.map(
        _checked, records(template, _numbers(template) | given), is_leaf=hyper.is_record
    )
    numbers = _numbers(template)
    if numbers.keys() >= set(_BETAS):
        numbers["betas"] = tuple(numbers.pop(name) for name in _BETAS)
    if "lr" not in numbers and any(name.endswith(".lr") for name in numbers):
        numbers["lr"] = 1.0
    return template, numbers


def _made(maker: Callable[..., Any], given: dict[str, Any]) -> Any:
    """The records of a maker, whose keywords have no dots; unknown names raise."""
    try:
        template = maker(**{name: value for name, value in given.items() if "." not in name})
    except TypeError:
        _refuse_unknown(given, _numbers(maker()))
        raise
    _refuse_unknown(given, _numbers(template))
    return template


def _refuse_unknown(given: dict[str, Any], known: dict[str, Any]) -> None:
    if unknown := given.keys() - known.keys():
        raise TypeError(f"there is no hyperparameter {min(unknown)!r}, only {list(known)}")


def records(template: Any, group: Mapping[str, Any]) -> Any:
    """The records with the values of a group."""
    values = iter([_value(group, name) for name in _numbers(template)])

    def filled(record: Any) -> Any:
        return hyper.assemble(type(record), [next(values) for _ in _fields(record)])

    return _tree.map(filled, template, is_leaf=hyper.is_record)


def _value(group: Mapping[str, Any], name: str) -> Any:
    if name in _BETAS and name not in group:
        return _plain(group["betas"][_BETAS.index(name)], name)
    factor = group.get("lr", 1.0) if name.endswith(".lr") else 1.0
    rate = _plain(group[name], name)
    if type(factor) is float and factor == 1:
        return rate
    return _tree.map(lambda x: x * factor, rate)


def _plain(tree: Any, name: str) -> Any:
    """The hyperparameter with all numbers converted to Python numbers or tensors."""
    if type(tree) in _PLAIN:
        return tree
    return _tree.map(lambda x: x if isinstance(x, Tensor) else plain_number(x, name), tree)


def _checked(record: Any) -> Any:
    return type(record)(**{field.name: getattr(record, field.name) for field in _fields(record)})


def _numbers(template: Any) -> dict[str, Any]:
    """The hyperparameters by name; names that are not unique are prefixed by their part's."""
    fields = [
        ((*path, field.name), getattr(record, field.name))
        for path, record in _records(template)
        for field in _fields(record)
    ]
    return dict(zip(short_names([path for path, _ in fields]), [v for _, v in fields], strict=True))


def short_names(paths: Sequence[Sequence[str]]) -> list[str]:
    """The last component of each path if it is unique, otherwise the whole path."""
    ends = Counter(path[-1] for path in paths)
    return [path[-1] if ends[path[-1]] == 1 else ".".join(path) for path in paths]


def _records(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The records in a tree of hyperparameters, each with its path."""
    if hyper.is_record(tree):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from _records(child, (*path, str(key)))
    elif isinstance(tree, (tuple, list)):
        for i, child in enumerate(tree):
            yield from _records(child, (*path, str(i)))


def _fields(record: Any) -> tuple[hyper.Field, ...]:
    return hyper.FIELDS[type(record)]
