"""Telling whether tensors are still what they were, without keeping any of them alive."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt import _memory, _modes, _torch, _tree
from diffopt._rule import hyper, ways
from diffopt._rule.rule import Rule, is_ours, unused
from diffopt._rule.work import Work
from diffopt._tree import Tree


class Prints:
    """What tensors were: types, dtypes, devices, shapes, strides, and the addresses of some."""

    def __init__(self, placed: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        self.kept: list[tuple[slice, _torch.TensorGuards, list[int]]] = []
        guards: _torch.TensorGuards | None = None
        for i in range(0, len(placed), _CHUNK):
            chunk = slice(i, i + _CHUNK)
            tensors = *placed[chunk], *others[chunk]
            if guards is None or not guards.hold(tensors):  # chunks alike share what a core reads
                guards = _torch.TensorGuards(tensors)
            self.kept.append((chunk, guards, addresses_of(placed[chunk])))

    def fit(
        self, placed: Sequence[Tensor], others: Sequence[Tensor], *, moved: bool = False
    ) -> bool:
        """Whether as many tensors are what these were; if `moved`, wherever they are."""
        for chunk, guards, addresses in self.kept:  # no generators: this runs at every step
            some = placed[chunk]
            if not guards.hold((*some, *others[chunk])):
                return False
            if not moved and addresses_of(some) != addresses:
                return False
        return True


_CHUNK = 100  # tensors that stay in a core's cache while they are read twice


def addresses_of(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


class Passed:
    """What the tensors of an update in place that passed all checks were: others like them pass.

    The checks look at nothing but types, dtypes, devices, shapes, strides, addresses and whether
    gradients require one, and at whether all params are different objects: they are if they have
    different addresses.
    """

    def __init__(self, params: list[Tensor], others: list[Tensor], grads: list[Tensor]) -> None:
        self._sizes = len(others), len(grads)
        with torch.enable_grad():  # where guards look at requires_grad
            self._given, self._others = Prints(params, grads), Prints(others, ())
        self._extent = _memory.Extent([*params, *others], grads)

    def by(self, params: list[Tensor], others: list[Any], grads: list[Any]) -> bool:
        """Whether these, as many params as before, have passed."""
        with torch.enable_grad():
            return (
                self._sizes == (len(others), len(grads))
                and self._given.fit(params, grads)
                and self._others.fit(others, ())
                and not self._extent.meets(grads)
            )


_PASSED: dict[Any, tuple[Passed, Any] | None] = {}
"""What has passed all checks, and what was found out about it; None if it has passed only once.

By `_key`, which is quick to compute: what has the same key need not be the same.
"""

_REMEMBERED = 16


def found(key: tuple[Any, ...], params: list[Any]) -> tuple[Passed, Any] | None:
    """What may have passed with these params, and what was found out about it."""
    return None if _modes.observed() or not _PASSED else _PASSED.get(_key(key, params))


def keep(
    key: tuple[Any, ...],
    params: list[Tensor],
    others: list[Tensor],
    grads: list[Any],
    facts: Callable[[], Any],
) -> None:
    """Remember what has passed all checks, from the second time that these params pass them."""
    if _modes.observed() or not params or not _modes.all_ordinary([*params, *others, *grads]):
        return
    apart = len({*addresses_of(params)}) == len(params)
    if not apart or any(map(_modes.needs_gradient, grads)):
        return
    key = _key(key, params)
    _PASSED[key] = (Passed(params, others, grads), facts()) if key in _PASSED else None
    for old in [*_PASSED][:-_REMEMBERED]:
        _PASSED.pop(old, None)


def as_before(
    rule: Rule[Any, Any], params: Tree, grads: Tree, state: Any, hparams: Any
) -> Work | None:
    """What `gather` returns, if tensors like these have passed all checks before.

    Then none of the gradients and hyperparameters requires a gradient.
    """
    if type(state) is not rule.State or type(hparams) is not rule.hparams:
        return None
    tensors, spec = _tree.flatten(params)
    known = found((rule, *map(unused, state[1:])), tensors)
    if known is None:
        return None
    passed, alike = known
    used = [field for field in state[1:] if not unused(field)]
    rows: list[Any] = [_tree.leaves_as(tree, spec) for tree in (grads, *used)]
    if None in rows:
        return None
    gradients, *columns = rows
    numbers = hyper.broadcast(hparams, spec, params)
    if not (
        all(len(n.values) == 1 and type(n.values[0]) in (float, int) for n in numbers)
        and passed.by(tensors, [*itertools.chain(*columns), state[0]], gradients)
    ):
        return None
    rest = iter(columns)
    buffers = [[()] * len(tensors) if unused(x) else next(rest) for x in state[1:]]
    return Work(rule, spec, tensors, gradients, buffers, numbers, alike)


def remember(work: Work, others: list[Tensor]) -> None:
    """Remember the arguments of an update for `as_before`."""
    if work.params and is_ours(work.rule):
        key = work.rule, *(unused(column[0]) for column in work.buffers)
        keep(key, work.params, others, work.grads, lambda: alike(work))


def alike(work: Work) -> ways.Alike | None:
    """What all tensors have in common."""
    groups = work.groups()
    if len(groups) > 1:
        return None
    numbers, columns = work.numbers_of_state(), work.columns(groups[0])
    return ways.Alike(ways.survey([c for k, c in enumerate(columns) if k - 2 not in numbers]))


def _key(key: tuple[Any, ...], params: list[Any]) -> tuple[Any, ...]:
    first = id(params[0]) if params else None
    return (*key, torch.is_inference_mode_enabled(), len(params), first)
