"""Reading parameter groups, which users and schedulers may overwrite between steps.

A group has the fields of a record under the names that torch's schedulers use: `lr`, and `betas`
for beta1 and beta2.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, SupportsFloat, TypeAlias, cast

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree
from diffopt._arguments import too_large
from diffopt._rule import hyper
from diffopt._rule.leafwise import Leafwise

Group: TypeAlias = dict[str, Any]

_BETAS = hyper.TORCH_PAIRS["betas"]
_PAIRS = {
    field: (pair, k) for pair, fields in hyper.TORCH_PAIRS.items() for k, field in enumerate(fields)
}
_FLAGS = (bool, str, type(None))
_CONSTANT = (float, int, *_FLAGS)
_MAY_BE_NONE = ("eps", 0)  # Adafactor's eps1: machine epsilon
_MAY_BE_UNSET = ("foreach", "fused")  # None, or missing in older checkpoints


def name_of(group: Group, i: int, j: int) -> str:
    """The name of a parameter in errors."""
    names = group.get("param_names")
    return names[j] if names else f"param_groups[{i}]['params'][{j}]"


def values_of(opt: Leafwise[Any, Any], group: Group) -> list[Any]:
    """The hyperparameters of a group in the order of the rule's record.

    Tensors that the step may write, such as views of parameters, are copied.

    Raises:
        TypeError: one of them is not a number.
    """
    values: list[Any] = []
    for field in hyper.FIELDS[opt.hparams]:
        value = option(group, field.name)
        known = type(value) is float or (field.name == "eps1" and value is None)
        values.append(value if known else _kept(plain_number(value, field.name)))
    return values


def _kept(value: Any) -> Any:
    """A copy of a tensor; on a device, where that is a launch, only of a view or a parameter.

    Differentiable steps have derivatives with respect to the tensor.
    """
    if not isinstance(value, Tensor):
        return value
    cheap = value.device.type == "cpu" or _modes.compiling()
    if not (cheap or _torch.base(value) is not None or isinstance(value, torch.nn.Parameter)):
        return value
    with torch.enable_grad():
        return value.clone()


def constant(value: Any) -> bool:
    """Whether nobody can change it: numbers, flags, and tuples and records of them."""
    if type(value) is tuple:
        return all(map(constant, value))
    record = hyper.is_record(value)
    return all(map(constant, vars(value).values())) if record else type(value) in _CONSTANT


def option(group: Mapping[str, Any], name: str) -> Any:
    """A hyperparameter, which torch.optim may keep in a tuple."""
    if name in group:
        return group[name]
    pair, k = _PAIRS[name]
    return group[pair][k]


def plain_number(value: Any, name: str) -> Any:
    """A Python number or a 0-d tensor; other numbers, such as numpy's, are converted to Python's.

    Raises:
        TypeError: the value is not a number.
    """
    if _is_plain(value):
        return value
    if isinstance(value, Tensor):
        real = not value.is_complex() and value.dtype != torch.bool
        if value.numel() == 1 and real and value.layout is torch.strided:
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
            name, value = f"param_groups[{i}][{key!r}]", cast(Any, group.get(key))
            if type(default) is bool or key in _MAY_BE_UNSET:
                unset = value is None and (key in _MAY_BE_UNSET or key not in group)
                if not (unset or type(value) is bool):
                    raise TypeError(f"{name} is {_tree.describe(value)}, but must be a bool")
            elif type(default) is tuple:
                check_length(value, len(default), name)
                for k, number in enumerate(value):
                    if not _is_plain(number) and (number is not None or (key, k) != _MAY_BE_NONE):
                        check_number(number, f"{name}[{k}]", group)
            elif not _is_plain(value) and is_number(default):  # quick: every step may look
                check_number(value, name, group)


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


def check_length(values: Any, length: int, name: str) -> None:
    """Raise unless it is a sequence of this length."""
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != length:
        raise TypeError(f"{name} is {_tree.describe(values)}, but must be {length} numbers")


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
        betas = given.pop("betas")
        check_length(betas, len(_BETAS), "betas")
        given |= zip(_BETAS, betas, strict=True)
    template = _made(maker, given)
    template = checked(records(template, _numbers(template) | given))
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
        template = maker()
        if given.keys() <= _numbers(template).keys():
            raise
    known = _numbers(template)
    if unknown := given.keys() - known.keys():
        raise TypeError(f"there is no hyperparameter {min(unknown)!r}, only {list(known)}")
    return template


def overridden(record: Any, given: Mapping[str, Any], owners: Sequence[Sequence[str]]) -> Any:
    """The records with other values, given under the names of fields or of options of torch.optim.

    A list has one value for each parameter group; `owners` are the names of each group's params.
    """
    known = _numbers(record)
    values: dict[str, Any] = {}
    for name, value in _tree.plain(dict(given)).items():
        pair = () if name in known else hyper.TORCH_PAIRS.get(name, ())
        each = value if isinstance(value, list) else [value] * len(owners)
        if len(each) != len(owners):
            raise ValueError(
                f"override[{name!r}] has {len(each)} values, but the number of parameter groups is "
                f"{len(owners)}"
            )
        for part in each if pair else ():
            check_length(part, len(pair), f"override[{name!r}]")
        columns = zip(pair, zip(*each, strict=True), strict=True) if pair else [(name, each)]
        values.update((field, _of_groups(column, owners)) for field, column in columns)
    if unknown := values.keys() - known.keys():
        momentum = min(unknown) in ("momentum", "dampening")
        why = ": create the optimizer with a momentum other than 0" if momentum else ""
        raise TypeError(
            f"override has {min(unknown)!r}, but the hyperparameters are {', '.join(known)}{why}"
        )
    return checked(records(record, known | values))


def _of_groups(values: Sequence[Any], owners: Sequence[Sequence[str]]) -> Any:
    """A single value if all groups have the same one, otherwise a dict by parameter."""
    if all(value is values[0] for value in values):
        return values[0]
    pairs = zip(values, owners, strict=True)
    return {name: value for value, names in pairs for name in names}


def checked(template: Any) -> Any:
    """The records, made anew: their numbers are in range."""
    return hyper.map_records(lambda record: type(record)(**vars(record)), template)


def records(template: Any, group: Mapping[str, Any]) -> Any:
    """The records with the values of a group."""
    values = iter([_value(group, name) for name in _numbers(template)])
    return hyper.map_fields(lambda *_: next(values), template)


def _value(group: Mapping[str, Any], name: str) -> Any:
    """A hyperparameter, all of whose numbers are Python's or tensors."""
    value = option(group, name)
    if not _is_plain(value):
        value = _tree.map(lambda x: x if isinstance(x, Tensor) else plain_number(x, name), value)
    factor = group.get("lr", 1.0) if name.endswith(".lr") else 1.0
    if type(factor) is float and factor == 1:
        return value
    return _tree.map(lambda x: x * factor, value)


def _numbers(template: Any) -> dict[str, Any]:
    """The hyperparameters by name; names that are not unique are prefixed by their part's."""
    fields = {
        (*path, name): value
        for path, record in _records(template)
        for name, value in vars(record).items()
    }
    return dict(zip(short_names([*fields]), fields.values(), strict=True))


def short_names(paths: Sequence[Sequence[str]]) -> list[str]:
    """The last component of each path if it is unique, or the path without positions, or all of it.

    "m.lr" is the name of "m.1.lr", as in `hparams(**{"m.lr": 0.1})`, if nothing else has it.
    """
    ends = Counter(path[-1] for path in paths)
    labels = [tuple(part for part in path if not part.isdecimal()) for path in paths]
    counts = Counter(labels)

    def short(path: Sequence[str], labels: Sequence[str]) -> str:
        if ends[path[-1]] == 1:
            return path[-1]
        return ".".join(labels if len(labels) > 1 and counts[tuple(labels)] == 1 else path)

    return list(map(short, paths, labels))


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
