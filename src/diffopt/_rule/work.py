"""The arguments of one update: trees, checked, as lists in the order of the leaves."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from diffopt import _modes, _tree
from diffopt._rule import checks, fields, hyper, running, ways
from diffopt._rule.rule import Rule, unused
from diffopt._tree import Tree


@dataclasses.dataclass(frozen=True)
class Work:
    """The arguments of one update, leaf by leaf."""

    rule: Rule[Any, Any]
    spec: _tree.Spec
    params: list[Tensor]
    grads: list[Tensor | None]
    buffers: list[list[Any]]
    numbers: list[hyper.Covered]
    alike: ways.Alike | None = None
    """What all tensors have in common, where that is known and the hyperparameters are numbers."""

    def tensors(self, step: Any) -> Iterator[Tensor]:
        values = (v for number in self.numbers for v in _tree.leaves(number.values))
        for leaf in itertools.chain([step], self.params, self.grads, *self.buffers, values):
            if isinstance(leaf, Tensor):
                yield leaf

    def groups(self, *, absent: bool = False) -> list[list[int]]:
        """Leaves that share device, dtype and hyperparameters, hence also the per-step scalars.

        Those without a gradient are left out, or, with `absent`, are groups of their own.
        """
        if self.alike or (not _modes.compiling() and self._alike()):
            return [[*range(len(self.params))]]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, (param, grad) in enumerate(zip(self.params, self.grads, strict=True)):
            if absent or grad is not None:
                numbers = tuple(n.cover[i] for n in self.numbers)
                key = (param.device, param.dtype, grad is None, numbers)
                groups.setdefault(key, []).append(i)
        return list(groups.values())

    def _alike(self) -> bool:
        """Whether all leaves are in one group: a quick look at thousands."""
        return (
            len({(x.device, x.dtype) for x in self.params}) == 1
            and not any(grad is None for grad in self.grads)
            and all(len(n.values) == 1 or len({*n.cover}) == 1 for n in self.numbers)
        )

    def parts(self, t: Any, *, apart: bool) -> Iterator[tuple[list[int], list[Any]]]:
        """The leaves that are updated together, and their columns.

        A step that may be the first one also begins the state of leaves without a gradient. Numbers
        of the state are equal within a part, unless `apart`: then there is one for each leaf.
        """
        numbers = self.numbers_of_state()
        early = len(self.params) > 0 and (isinstance(t, Tensor) or t <= 1)
        absent = early and len(running.initial_of(self.rule, self.values([0]))) > 0
        for group in self.groups(absent=absent):
            parts = [group]
            if numbers and not apart:
                columns = [[self.buffers[k][i] for i in group] for k in numbers]
                parts = fields.equal_parts(group, columns)
            for indices in parts:
                columns = self.columns(indices)
                for k in numbers:
                    columns[k + 2] = fields.entered(columns[k + 2], columns[0][0], apart=apart)
                yield indices, columns

    def numbers_of_state(self) -> list[int]:
        """The places of buffers that have the shape of hyperparameters."""
        return fields.places(self.rule, self.buffers)

    def may_grow(self) -> bool:
        """Whether a number of the state may become a larger tensor."""
        buffers = itertools.chain(*(self.buffers[k] for k in self.numbers_of_state()))
        values = itertools.chain(*(n.values for n in self.numbers))
        return any(x.dim() == 0 for x in buffers) and not all(map(running.is_scalar, values))

    def values(self, indices: list[int]) -> list[Any]:
        """The hyperparameters of one group."""
        return [number.at(indices[0]) for number in self.numbers]

    def columns(self, indices: list[int]) -> list[Any]:
        """The tensors of one group."""
        columns: Any = (self.params, self.grads, *self.buffers)
        if len(indices) < len(self.params):
            columns = [[column[i] for i in indices] for column in columns]
        return [() if unused(column[0]) else column for column in columns]


def gather(
    rule: Rule[Any, Any],
    params: Tree,
    grads: Tree,
    state: Any,
    hparams: Any,
    *,
    sparse: bool = False,
) -> Work:
    """The arguments, checked, as lists in the order of the leaves of params."""
    tensors, spec = _tree.flatten(params)
    checks.params(tensors, params, rule.refuse)
    gradients = _tree.leaves_like(grads, spec, params, ("grads", "params"))
    like = checks.like(gradients)
    if not like(tensors):
        checks.grads(gradients, tensors, params, sparse=sparse)
    checks.instance(state, rule.State, "state", "init()")
    checks.scalar(state[0], "state.step", tensors, params)
    buffers = _buffers(rule, state, tensors, spec, params, like)
    checks.instance(hparams, rule.hparams, "hparams", "optimizer.hparams(...)")
    numbers = hyper.broadcast(hparams, spec, params)
    checks.numbers(numbers, tensors, params)
    return Work(rule, spec, tensors, gradients, buffers, numbers)


def _buffers(
    rule: Rule[Any, Any],
    state: Any,
    tensors: list[Tensor],
    spec: _tree.Spec,
    params: Tree,
    like: Callable[[list[Any]], bool],
) -> list[Any]:
    """For each field of the state after `step`, a list of tensors or of ().

    `like` is true of tensors that certainly are like the gradients, which are like params.
    """
    if not tensors:
        return [[] for _ in rule.buffer_names]
    columns: list[list[Any]] = []
    shapes = [rule.shapes(p.shape) for p in tensors]
    used = rule.buffers_of(tensors[0])
    for k, (name, field) in enumerate(zip(rule.buffer_names, state[1:], strict=True)):
        dtype, name = used.get(name), f"state.{name}"
        if (dtype is None) != unused(field):
            expected = "()" if dtype is None else "a tree like params"
            raise ValueError(
                f"{name} must be {expected}: create the state with this optimizer's init()"
            )
        columns.append([()] * len(tensors))
        if dtype is not None:
            columns[-1] = _tree.leaves_like(field, spec, params, (name, "params"))
            if rule.buffer_names[k] in rule.per_hyperparameter:
                checks.per_hyperparameter(columns[-1], tensors, params, name)
                continue
            own = [row[k] for row in shapes if row is not None]
            if own or not like(columns[-1]):
                checks.buffers(columns[-1], tensors, params, name, dtype, own)
    return columns
