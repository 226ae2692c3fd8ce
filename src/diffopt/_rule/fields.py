"""Fields of the state that have the shape of hyperparameters: most often one number per tensor.

Tensors whose numbers are equal are updated together. On a CPU the numbers are read. On a device,
where that would wait, marks remember which ones were written together. Numbers made together are
views of one vector, so that one kernel makes them and one version tells whether somebody else has
written to any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt import _modes, _torch
from diffopt._rule import marks
from diffopt._rule.rule import unused
from diffopt._rule.running import AnyRule, Shared, placed, scalar_on
from diffopt.optimizer import overwrite_


def packed(column: list[Tensor]) -> list[Tensor]:
    """The same numbers; on a device as views of one vector."""
    kinds = {(x.device, x.dtype, x.dim()) for x in column}
    if len(kinds) != 1 or not _markable(column[0]):
        return column
    with torch.no_grad():
        return [*torch.stack(column).unbind()]


def places(rule: AnyRule, buffers: list[list[Any]]) -> list[int]:
    """The places of these fields among the buffers, where they are used."""
    numbers = rule.per_hyperparameter
    if not numbers:
        return []
    pairs = enumerate(zip(rule.buffer_names, buffers, strict=True))
    return [k for k, (name, c) in pairs if name in numbers and c and not unused(c[0])]


def equal_parts(indices: Sequence[int], columns: Sequence[list[Tensor]]) -> list[list[int]]:
    """The indices in parts in which all numbers of a column are equal."""
    found = [*map(_values, columns)]
    if all(len({*values}) == 1 for values in found):
        return [[*indices]]
    parts: dict[Any, list[int]] = {}
    for i, values in zip(indices, zip(*found, strict=True), strict=True):
        parts.setdefault(values, []).append(i)
    return [*parts.values()]


def entered(column: list[Tensor], like: Tensor, *, apart: bool) -> Any:
    """The numbers as the rule sees them: like hyperparameters of params like this one.

    That is one `Shared` for tensors whose numbers are equal, or, with `apart`, a list.
    """
    if apart:
        return list(map(Shared, placed(column, like)))
    return Shared(placed(column[:1], like)[0])


def left(column: Any, old: list[Tensor], like: Tensor) -> list[Tensor]:
    """The new values of what `entered` returned, one for each of the old ones."""
    if isinstance(column, list):
        return [_left(x.new, y, like) for x, y in zip(column, old, strict=True)]
    new = _left(column.new, old[0], like)
    if not _markable(new):
        return [new.clone() for _ in old]
    with torch.no_grad():
        numbers = new.expand(len(old)).clone().unbind()
    marks.note(numbers, marks.unknown())
    return [*numbers]


def write_(column: Any, old: list[Tensor], like: Tensor) -> None:
    """Put the new values into the old tensors, which may grow."""
    if isinstance(column, list):
        for x, y in zip(column, old, strict=True):
            overwrite_(y, _left(x.new, y, like))
        return
    new = _left(column.new, old[0], like)
    if new.shape != old[0].shape or any(map(Tensor.is_neg, old)):  # foreach kernels refuse those
        for x in old:
            overwrite_(x, new)
        return
    _torch.foreach_copy_(old, [new] * len(old))
    if all(map(_markable, old)):
        marks.note(old, marks.unknown())


def _left(new: Any, old: Tensor, like: Tensor) -> Tensor:
    """A new value in the form that the state has."""
    if not isinstance(new, Tensor):
        return scalar_on(new, old.dtype, old.device)
    if new.dim() and like.is_complex():
        new = new.squeeze(-1)
    return new.to(old) if new.shape == old.shape else new


def _values(column: list[Tensor]) -> list[Any]:
    """What tells the numbers apart; they are equal where these are."""
    if not _modes.all_ordinary(column) or any(map(Tensor.dim, column)):
        marks.known([*filter(_markable, column)])  # before `write_` renews those of one vector
        return [*map(id, column)]
    if all(x.is_cpu for x in column):
        return [*map(Tensor.item, column)]
    if all(map(_markable, column)):
        return marks.learn(column)
    if column[0].is_meta or _modes.capturing():
        return [*map(id, column)]
    return marks.read(column)


def _markable(x: Tensor) -> bool:
    """Whether marks can tell its value."""
    return x.dim() == 0 and _modes.versioned(x)
