"""Records of hyperparameters: defaults, ranges, and a pytree whose leaves are their values."""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, SupportsFloat, TypeAlias, TypeVar, dataclass_transform

import torch
from torch import Tensor

from diffopt import _tree
from diffopt._arguments import check_bool, did_you_mean, too_large

Hyperparameter: TypeAlias = Any
"""A Python number, a tensor, or a prefix tree of the params with such leaves.

Annotate the fields of a record with it: type checkers then accept all of these.
"""

T = TypeVar("T")

FIELDS: dict[type, tuple[Field, ...]] = {}  # of every record class; dataclasses.fields won't trace


class Field(NamedTuple):
    """A hyperparameter as declared by `number`."""

    name: str
    bounds: dict[str, float | None]
    per_parameter: bool
    per_weight: bool

    def ends(self) -> tuple[float, float]:
        """The ends of its range, whether they belong to it or not."""
        low = [x for x in (self.bounds["ge"], self.bounds["gt"]) if x is not None]
        high = [x for x in (self.bounds["le"], self.bounds["lt"]) if x is not None]
        return max(low, default=-math.inf), min(high, default=math.inf)


_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "ge": (">=", operator.ge),
    "gt": (">", operator.gt),
    "le": ("<=", operator.le),
    "lt": ("<", operator.lt),
}


def number(
    default: float,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    per_parameter: bool = True,
    per_weight: bool = True,
) -> Any:
    """Declare a field of a record made by `hparams`.

    Args:
        default: its default value.
        ge: an inclusive lower bound.
        gt: an exclusive lower bound.
        le: an inclusive upper bound.
        lt: an exclusive upper bound.
        per_parameter: whether a tree given for it is a prefix tree of the params. False for what
            belongs to no single parameter, such as the weights of a learned optimizer.
        per_weight: whether it may be a tensor of the parameter's shape. False where the algorithm
            needs one value for the whole tensor.

    Returns:
        A `dataclasses.field`.

    Raises:
        TypeError: the default or a bound is not a number, or a flag is not a bool.
        ValueError: the default or a bound is an integer too large for a float.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    for value in _tree.leaves(default):
        _check_real(value, "default")
    for name, bound in bounds.items():
        if bound is not None:
            _check_real(bound, name)
    check_bool(per_parameter, "per_parameter")
    check_bool(per_weight, "per_weight")
    metadata = {"bounds": bounds, "per_parameter": per_parameter, "per_weight": per_weight}
    return dataclasses.field(default=default, metadata=metadata)


def _check_real(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, Tensor)):
        raise TypeError(f"{name} is {_tree.describe(value)}, not a number")
    if too_large(value):
        raise ValueError(f"{name} is an integer too large for a float")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def hparams(cls: type[T]) -> type[T]:
    """Turn a class of annotated `number` fields into a frozen record that is a pytree node.

    Python numbers are checked against the field's range when a record is created; tensors are never
    inspected, so records can be created inside `torch.vmap` and `torch.compile`.

    Raises:
        TypeError: `cls` is not a class, or an annotated field was not made by `number`; when a
            record is created, a leaf of a field is neither a number nor a tensor.
        ValueError: when a record is created, a number is out of range; the message names field,
            value and range.

    Examples:
        >>> from diffopt.rules import Hyperparameter, hparams, number
        >>> @hparams
        ... class Decay:
        ...     rate: Hyperparameter = number(default=0.1, ge=0, lt=1)
        >>> Decay(rate=0.5)
        Decay(rate=0.5)
        >>> Decay(rate=2.0)
        Traceback (most recent call last):
            ...
        ValueError: hparams.rate is 2.0, but must be >= 0 and < 1
    """
    _check_class(cls)
    cls.__post_init__ = _check  # pyright: ignore[reportAttributeAccessIssue]
    record = dataclasses.dataclass(frozen=True, kw_only=True, eq=False)(cls)
    fields = dataclasses.fields(record)  # pyright: ignore[reportArgumentType]
    FIELDS[record] = tuple(Field(field.name, **field.metadata) for field in fields)
    names = [field.name for field in FIELDS[record]]
    make = record.__init__

    def init(self: T, *args: Any, **values: Any) -> None:
        if args or not values.keys() <= {*names}:
            raise TypeError(_misnamed(record.__name__, names, args, values))
        make(self, **values)

    record.__init__ = init

    def flatten(node: Any) -> tuple[list[Any], None]:
        return [getattr(node, name) for name in names], None

    def flatten_with_keys(node: Any) -> tuple[list[tuple[Any, Any]], None]:
        return [(_tree.GetAttrKey(name), getattr(node, name)) for name in names], None

    torch.serialization.add_safe_globals([record])  # pyright: ignore[reportUnknownMemberType]
    _tree.register_node(
        record,
        flatten,
        lambda values, _: assemble(record, values),
        serialized_type_name=f"{record.__module__}.{record.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,  # pyright: ignore[reportArgumentType]
    )
    return record


def _check_class(cls: Any) -> None:
    if not isinstance(cls, type):
        raise TypeError(f"cls is {_tree.describe(cls)}, not a class: decorate one by hparams")
    declared = inspect.get_annotations(cls)
    fields = {name: getattr(vars(cls).get(name), "metadata", {}) for name in declared}
    wrong = [name for name, metadata in fields.items() if "bounds" not in metadata]
    if wrong or not declared:
        fault = f"the field {wrong[0]!r} was not" if wrong else "there is no field"
        raise TypeError(
            f"cls is {cls.__name__}, where {fault} made by number(...): declare hyperparameters "
            "such as lr: Hyperparameter = number(default=1e-3, ge=0)"
        )


TORCH_PAIRS = {
    "betas": ("beta1", "beta2"),
    "etas": ("etaminus", "etaplus"),
    "step_sizes": ("step_size_min", "step_size_max"),
    "eps": ("eps1", "eps2"),
    "ns_coefficients": ("ns_a", "ns_b", "ns_c"),
}
"""Where torch.optim has a tuple, which is a tree here, each of its numbers is a field."""


def _misnamed(record: str, names: list[str], args: tuple[Any, ...], values: dict[str, Any]) -> str:
    """What is wrong with the arguments of a record, and what to pass instead."""
    if args:
        given = _tree.shown(args[0])
        return f"{record} takes only keyword arguments, such as {names[0]}=..., but got {given}"
    wrong = next(name for name in values if name not in names)
    hint = f": pass {' and '.join(names) if len(names) < 3 else ', '.join(names)}"
    if pair := instead_of_pair(wrong, names):
        hint = f": {pair}"
    elif question := did_you_mean(names, wrong):
        hint = f"{question} The hyperparameters are {', '.join(names)}"
    return f"{record} has no hyperparameter {wrong!r}{hint}"


def instead_of_pair(name: str, known: list[str]) -> str | None:
    """What to pass instead of a tuple of torch.optim; None if it is none of those known here."""
    fields = TORCH_PAIRS.get(name, ())
    return f"pass {' and '.join(fields)}" if fields and fields[0] in known else None


def check_flags(**flags: object) -> None:
    """Raise `TypeError` for a flag that is not a bool, such as `sgd(momentum=0.9)`."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(
                f"{name} is {_tree.shown(flag)}, not a bool: pass numbers to hparams(...)"
            )


def assemble(record: type[T], values: Iterable[Any]) -> T:
    """A record of these values, unchecked: pytree operations put placeholders in leaves."""
    node = object.__new__(record)
    for field, value in zip(FIELDS[record], values, strict=True):
        object.__setattr__(node, field.name, value)
    return node


def is_record(node: Any) -> bool:
    """Whether it is a record of hyperparameters."""
    return type(node) in FIELDS


def records(tree: _tree.Tree) -> list[Any]:
    """All records in a tree of them: one for each part of a composition."""
    return list(filter(is_record, _tree.flatten(tree, is_leaf=is_record)[0]))


def map_records(function: Callable[[Any], Any], tree: _tree.Tree) -> _tree.Tree:
    """The tree with `function(record)` in place of every record in it."""
    if is_record(tree):
        return function(tree)
    return _tree.map(lambda x: function(x) if is_record(x) else x, tree, is_leaf=is_record)


def map_fields(function: Callable[[Field, Any], Any], tree: _tree.Tree) -> _tree.Tree:
    """The tree with `function(field, value)` as the value of every field of the records in it."""

    def mapped(record: Any) -> Any:
        kind: type[Any] = type(record)
        return assemble(kind, [function(x, getattr(record, x.name)) for x in FIELDS[kind]])

    return map_records(mapped, tree)


def is_record_class(kind: Any) -> bool:
    """Whether it is a class made by `hparams`."""
    return isinstance(kind, type) and kind in FIELDS


def check_record_class(kind: Any) -> None:
    """Raise unless the argument `hparams` is a class made by `hparams`."""
    if not is_record_class(kind):
        raise TypeError(
            f"hparams is {_tree.shown(kind)}, not a class made by diffopt.rules.hparams"
        )


def made_by(record: Any, maker: Any) -> bool:
    """Whether an optimizer's `hparams` may have made it: only a class of records can tell."""
    return type(record) is maker if is_record_class(maker) else record is not None


class Covered(NamedTuple):
    """A hyperparameter, its values, and the index of the value that applies to each leaf."""

    name: str
    per_parameter: bool
    per_weight: bool
    values: list[Any]
    cover: Sequence[int]
    tree: _tree.Tree

    def path(self, index: int) -> str:
        """The path of the value with this index."""
        return _tree.paths(self.tree, f"hparams.{self.name}")[index]

    def at(self, i: int) -> Any:
        """The value for leaf `i`."""
        return self.values[self.cover[i]]


def broadcast(record: Any, spec: _tree.Spec, params: _tree.Tree) -> list[Covered]:
    """Broadcast every field of a record to the leaves of params, whose structure is `spec`."""
    covered: list[Covered] = []
    for field in FIELDS[type(record)]:
        value, per_parameter = getattr(record, field.name), field.per_parameter
        if per_parameter:
            names = (f"hparams.{field.name}", "params")
            values, cover = _tree.broadcast_prefix(value, spec, params, names)
        else:
            values, cover = [value], [0] * spec.num_leaves
        covered.append(Covered(field.name, per_parameter, field.per_weight, values, cover, value))
    return covered


def _check(record: Any) -> None:
    for field in FIELDS[type(record)]:
        value = getattr(record, field.name)
        if not _tree.is_leaf(value):
            value = _tree.plain(value)
            object.__setattr__(record, field.name, value)
        leaves = _tree.leaves(value)
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) and (fault := fault_of(leaf, field.bounds)):
                path = _tree.paths(value, f"hparams.{field.name}")[i]
                raise type(fault)(f"{path} {fault}")
        if not all(type(leaf) in (int, float) or isinstance(leaf, Tensor) for leaf in leaves):
            object.__setattr__(record, field.name, _tree.map(_plain, value))


def fault_of(leaf: Any, bounds: Mapping[str, float | None]) -> Exception | None:
    """What is wrong with a leaf, unless it is a number within the bounds."""
    if type(leaf) is float and within(leaf, bounds):  # isinstance of an ABC is slow
        return None
    if isinstance(leaf, bool) or not (isinstance(leaf, numbers.Real) or _is_scalar(leaf)):
        return TypeError(f"is {_tree.describe(leaf)}, not a number or a tensor{_instead(leaf)}")
    if too_large(leaf):
        return ValueError("is an integer too large for a float")
    if within(float(leaf), bounds):
        return None
    limits = [f"{_BOUNDS[kind][0]} {b}" for kind, b in bounds.items() if b is not None]
    return ValueError(f"is {leaf}, but must be {' and '.join(limits)}")


def within(number: float, bounds: Mapping[str, float | None]) -> bool:
    for kind, bound in bounds.items():  # no generator: this runs at every step of a schedule
        if bound is not None and not _BOUNDS[kind][1](number, bound):
            return False
    return True


def _instead(leaf: Any) -> str:
    """What to pass in place of what a user of torch may try."""
    if isinstance(leaf, torch.nn.Module):
        return ": pass dict(module.named_parameters())"
    if callable(leaf):
        return ": call it with the step, as in schedule(state.step)"
    return ""


def _is_scalar(leaf: Any) -> bool:
    """Whether it is a scalar of another library, such as a 0-d numpy array."""
    return getattr(leaf, "shape", None) == () and isinstance(leaf, SupportsFloat)


def _plain(leaf: Any) -> Any:
    """A Python number for numpy's, whose comparisons torch does not accept."""
    return leaf if isinstance(leaf, Tensor) else float(leaf)
