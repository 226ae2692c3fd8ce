"""Choosing how a rule is run: one table, for trees and for parameter groups."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffopt import _modes
from diffopt._rule import compiled, lists, running, tiles
from diffopt._rule.running import AnyRule, Numbers

Way: TypeAlias = Literal["sparse", "native", "compiled", "tiles", "stacks", "foreach", "leaf"]

Wanted: TypeAlias = Literal["auto", "leaf", "foreach", "compiled", "fused", "unfused"]

Layout: TypeAlias = Literal["regular", "strided", "foreign", "sparse"]

_KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Kind(NamedTuple):
    """What the tensors of some columns have in common.

    Attributes:
        device: the type of device, such as "cpu".
        dtype: the dtype of the params.
        uniform: whether gradients and buffers have the same dtype.
        layout: "regular": contiguous tensors; "strided": ordinary tensors that are not contiguous,
            or are conjugated or negated as views (`z.conj().imag`);
            "foreign": tensor subclasses, or tensors seen by a transform or a mode; "sparse": the
            gradients are sparse.
    """

    device: str
    dtype: torch.dtype
    uniform: bool
    layout: Layout


@dataclasses.dataclass
class Alike:
    """What holds for columns whose params share device and dtype, as long as all tensors stay.

    The hyperparameters are numbers.
    """

    kind: Kind
    way: Way | None = None
    """How the rule is run, once it has been."""
    layout: tiles.Layout | None = None
    """How tiles cut them, once they have."""


def survey(columns: Sequence[Any]) -> Kind:
    """The `Kind` of columns whose params share device and dtype."""
    lists = [c for c in columns if isinstance(c, list) and not isinstance(c[0], running.Shared)]
    like = columns[0][0]
    uniform = {x.dtype for column in lists for x in column} <= {like.dtype}
    return Kind(like.device.type, like.dtype, uniform, _layout(lists))


def _layout(lists: list[list[Tensor]]) -> Layout:
    if lists[1][0].is_sparse:
        return "sparse"
    if _modes.observed() or not all(map(_modes.all_ordinary, lists)):
        return "foreign"
    flags = [Tensor.is_neg, *[Tensor.is_conj] * lists[0][0].is_complex()]
    lazy = any(any(map(flag, itertools.chain(*lists))) for flag in flags)
    contiguous = all(map(Tensor.is_contiguous, itertools.chain(*lists)))
    return "regular" if contiguous and not lazy else "strided"


class _Asked(NamedTuple):
    """What the choice depends on: rule, tensors, hyperparameters and the user's wish."""

    rule: AnyRule
    kind: Kind
    wanted: Wanted
    numeric: bool
    scalar: bool


def _native(a: _Asked) -> bool:
    walkable = a.kind.layout == "regular" or (a.wanted == "fused" and a.kind.layout == "foreign")
    fits = a.kind.uniform and a.kind.dtype in _KERNEL_DTYPES and a.kind.device in ("cpu", "cuda")
    return a.rule.native is not None and a.numeric and fits and walkable


def _compiled(a: _Asked) -> bool:
    asked = a.wanted == "compiled" or a.rule.native is None  # fused=True: torch's, if there is one
    real = a.kind.device != "meta" and a.kind.layout in ("regular", "strided")
    return asked and a.rule.elementwise and a.scalar and real


def _tiles(a: _Asked) -> bool:
    regular_on_cpu = a.kind.device == "cpu" and a.kind.layout == "regular"
    return a.rule.elementwise and a.scalar and regular_on_cpu


def _stacks(a: _Asked) -> bool:
    real = a.kind.device != "meta" and a.kind.layout in ("regular", "strided")
    fits = a.rule.stackable or (a.rule.batched and a.kind.device != "cpu")
    return fits and a.scalar and real


def _foreach(a: _Asked) -> bool:
    pays = a.wanted == "foreach" or a.kind.device != "cpu"
    # Neither DTensor nor the transforms of torch.func support all foreach kernels.
    return a.rule.batchable and a.scalar and pays and a.kind.layout != "foreign"


_EAGER: tuple[Wanted, ...] = ("auto", "fused", "unfused", "foreach", "leaf", "compiled")

_TABLE: tuple[tuple[Way, Callable[[_Asked], bool], tuple[Wanted, ...]], ...] = (
    ("sparse", lambda a: a.kind.layout == "sparse", _EAGER),
    ("native", _native, ("auto", "fused")),
    ("compiled", _compiled, ("compiled", "fused")),
    ("tiles", _tiles, ("auto", "fused", "unfused", "compiled")),
    ("stacks", _stacks, ("auto", "fused", "unfused", "compiled")),
    ("foreach", _foreach, ("auto", "fused", "unfused", "compiled", "foreach")),
    ("leaf", lambda a: True, _EAGER),
)
"""Each way, whether it applies, and the wishes that allow it; the first that fits is taken."""


def choose(rule: AnyRule, kind: Kind, values: Sequence[Any], wanted: Wanted) -> Way:
    """The way to run a rule in place where no derivative is needed.

    Args:
        rule: the rule to run.
        kind: what its tensors have in common.
        values: its hyperparameters. Native kernels take Python numbers, tiles and foreach kernels
            0-d tensors as well.
        wanted: `execution` of a pure optimizer; or what the flags of a parameter group say: "fused"
            and "unfused" (fused=False), "foreach" and "leaf" (foreach=False).
    """
    numeric = all(isinstance(value, (int, float)) for value in values)
    asked = _Asked(rule, kind, wanted, numeric, numeric or all(map(running.is_scalar, values)))
    return next(way for way, fits, wishes in _TABLE if wanted in wishes and fits(asked))


def _compiled_(
    rule: AnyRule, numbers: Numbers, columns: Sequence[Any], layout: tiles.Layout | None = None
) -> tiles.Layout | None:
    layout = compiled.compiled_(rule, numbers, columns, layout)
    if layout is None:
        RUN[choose(rule, survey(columns), (), "unfused")](rule, numbers, columns)
    return layout


PIECEWISE: dict[Way, Callable[..., tiles.Layout | None]] = {
    "compiled": _compiled_,
    "tiles": tiles.tiled_,
}
"""The ways that take the layout of the step before, and return that for the next."""

RUN: dict[Way, Callable[[AnyRule, Numbers, Sequence[Any]], object]] = {
    **PIECEWISE,
    "sparse": running.sparse_,
    "stacks": tiles.stacked_,
    "foreach": lists.foreach_,
    "leaf": running.leaf_,
}
"""The ways that need only numbers and columns."""
