"""What `from_pure` returns for compositions and other optimizers that step whole trees."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterable
from itertools import starmap
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import _memory, _modes, _torch, _tree
from diffopt._tree import Tree
from diffopt.optim import _state
from diffopt.optim._checkpoints import Planned, check_scalar
from diffopt.optim._groups import (
    Group,
    check_length,
    check_number,
    checked,
    constant,
    name_of,
    records,
    short_names,
)
from diffopt.optim._state import State
from diffopt.optimizer import Optimizer, Write

Rows = list[dict[str, Any]]

_COPIED = ("master",)
"""What begins as a copy of the parameter also where a checkpoint lacks it."""


class TreeOptimizer(Planned):
    """A `torch.optim.Optimizer` that steps the params of a group as one tree."""

    scalar_state = ()

    def __init__(
        self,
        optimizer: Optimizer[Any, Any],
        params: Iterable[Any],
        template: Any,
        hparams: dict[str, Any],
        structure: Tree | None,
    ) -> None:
        self.optimizer, self.template, self.structure = optimizer, template, structure
        self._layouts: dict[int, Layout] = {}
        self._records: dict[int, tuple[list[Any], Any]] = {}
        super().__init__(params, hparams)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step; `closure` reevaluates the model and returns the loss."""
        quick = not _modes.compiling() and _torch.frame_compiler() is None
        return (self._step if quick else self._eager_step)(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = self._loss(closure)
        self.check_numbers()
        with torch.no_grad():
            groups = [*enumerate(map(self.record_of, range(len(self.param_groups))))]
            updates = [*starmap(self._prepared, groups)]  # all checks come before any change
            # Groups that share memory are prepared anew, each after the step of those before it.
            for update_ in updates if self._apart() else starmap(self._prepared, groups):
                update_()
        return loss

    _eager_step = _torch.disable_dynamo(_step)

    def _prepared(self, i: int, record: Any) -> Write:
        grads = self.tree(i, [param.grad for param in self.param_groups[i]["params"]])
        return self.optimizer.prepare_(self.params_of(i), grads, self.state_of(i), record)

    def _apart(self) -> bool:
        """Whether no two parameters share memory."""
        params = [param for group in self.param_groups for param in group["params"]]
        return len(self.param_groups) == 1 or _memory.overlap(params) is None

    def params_of(self, i: int) -> Tree:
        return self.tree(i, self.param_groups[i]["params"])

    def record_of(self, i: int) -> Any:
        """The hyperparameters of a group; raises for a number out of its range."""
        record = self._known(i)
        if record is None:
            record, given = records(self.template, self.param_groups[i]), self._given(i)
            try:
                checked(record)
            except ValueError as error:
                raise ValueError(f"param_groups[{i}]: {error}") from None
            if constant(tuple(given)):
                self._records[i] = given, record
        return record

    def _known(self, i: int) -> Any:
        """The record made and checked before, if the group still has the same numbers."""
        given, record = self._records.get(i, ((), None))
        return record if given and all(map(operator.is_, given, self._given(i))) else None

    def _given(self, i: int) -> list[Any]:
        return [*map(self.param_groups[i].get, ("lr", *self.defaults))]

    def state_of(self, i: int) -> Any:
        """The state of a group, assembled from the states of its parameters."""
        params, plans = self.param_groups[i]["params"], getattr(self.state, "plans", [])
        for plan in plans:
            if plan.group == i and plan.owners == [*map(id, params)]:
                return plan.state
        with _state.unread(self.state):
            rows = self._rows(i, params)
            joined = self._layouts[i].join(rows, functools.partial(self._names, i))
        if type(self.state) is State and all(rows) and self.state.owns(rows):
            others = [plan for plan in plans if plan.group != i]
            plans[:] = [*others, Joined(i, [*map(id, params)], joined)]
        return joined

    def _rows(self, i: int, params: list[Tensor]) -> Rows:
        """The states of the parameters of a group, begun where there is none."""
        rows = [self.state.get(param) or {} for param in params]
        layout = self._layouts.get(i)
        if layout is None or not layout.fits(rows):
            self._layouts[i], fresh = self._begin(i)
            for param, new, old in zip(params, fresh, rows, strict=True):
                if row := new | old:
                    _state.row_of(self.state, param).update(row)
            rows = [self.state.get(param) or {} for param in params]
        return rows

    def _names(self, i: int) -> list[str]:
        group = self.param_groups[i]
        return [name_of(group, i, j) for j in range(len(group["params"]))]

    def _begin(self, i: int) -> tuple[Layout, Rows]:
        """The layout of the state of a group, and the state before the first step."""
        params = self.params_of(i)
        return _laid_out(self.optimizer.init(params), params)

    def tree(self, i: int, leaves: list[Any]) -> Tree:
        """Leaves for the params of a group, in the structure in which the params were given."""
        if self.structure is None or i > 0:
            return leaves
        places, spec = _tree.flatten(self.structure)
        if len(places) != len(leaves):
            raise ValueError(
                f"param_groups[0] has {len(leaves)} parameters, but from_pure was given "
                f"{len(places)}, by name: create a new optimizer, or use add_param_group"
            )
        return _tree.unflatten(leaves, spec)

    def check_numbers(self) -> None:
        for i, group in enumerate(self.param_groups):
            for key in self.defaults.keys() & group.keys() if self._known(i) is None else ():
                name, value = f"param_groups[{i}][{key!r}]", group[key]
                if type(self.defaults[key]) is tuple:
                    check_length(value, 2, name)
                for leaf in _tree.leaves(value):
                    if not (isinstance(leaf, Tensor) and leaf.dim()):
                        check_number(leaf, name, group)

    def state_dtype(self, value: Tensor, param: Tensor, group: Group) -> torch.dtype:
        return value.dtype  # until _load knows the dtypes of `init`

    def _load(self, saved: dict[Any, Any], groups: list[Group]) -> None:
        super()._load(saved, groups)
        self._layouts = {}
        for i, group in enumerate(self.param_groups):
            if any(self.state.get(param) for param in group["params"]):
                self._fit(i, group["params"])

    def _fit(self, i: int, params: list[Tensor]) -> None:
        """Convert a saved state to the dtypes and devices that `init` chooses."""
        layout, fresh = self._begin(i)
        for param, row, name in zip(params, fresh, self._names(i), strict=True):
            old = self.state.get(param, {})
            old = {k: x for k, x in row.items() if k.rpartition(".")[2] in _COPIED} | old
            new = {k: _like(old, k, row[k], name) for k in row}
            _state.row_of(self.state, param).update(new)
        layout.join([self.state[p] for p in params], functools.partial(self._names, i))

    def __getstate__(self) -> dict[str, Any]:
        own = {"optimizer": self.optimizer, "template": self.template, "structure": self.structure}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._layouts, self._records = {}, {}


class Joined(NamedTuple):
    """The joined state of a group: a plan, dropped when the state of a parameter changes."""

    group: int
    owners: list[int]
    """The ids of the parameters, which the state keeps alive."""
    state: Any


class Layout(NamedTuple):
    """How the leaves of a state are distributed over the states of single parameters.

    Of a tree like params, each parameter has its own leaf. Of what belongs to the whole tree, all
    parameters share 0-d tensors, such as a step count, as one object; the first parameter has
    larger tensors, such as the history of L-BFGS.
    """

    params: _tree.Spec
    state: _tree.Spec
    names: list[str]
    owned: list[set[str]]
    """The names of what each parameter has."""
    shared: set[str]
    rest: dict[str, Any]
    """Leaves that are not tensors and never change."""

    def fits(self, rows: Rows) -> bool:
        """Whether the parameters have all parts of the state."""
        pairs = zip(self.owned, rows, strict=False)
        return len(rows) == len(self.owned) and all(own <= row.keys() for own, row in pairs)

    def join(self, rows: Rows, names: Callable[[], list[str]]) -> Any:
        """The state, from the states of the parameters; `names` returns theirs."""
        nodes: list[Any] = []
        for name in self.names:
            if name in self.rest:
                nodes.append(self.rest[name])
            elif name in self.shared:
                nodes.append(self._one(name, rows, names))
            else:
                pairs = zip(rows, self.owned, strict=True)
                leaves = [row[name] if name in own else [] for row, own in pairs]
                nodes.append(_tree.unflatten(leaves, self.params))
        return _tree.unflatten(nodes, self.state)

    def _one(self, name: str, rows: Rows, names: Callable[[], list[str]]) -> Tensor:
        """A tensor that parameters share; if each has its own, they must be equal."""
        first = rows[0][name]
        for i, (row, own) in enumerate(zip(rows, self.owned, strict=True)):
            if name in own and row[name] is not first:
                if not torch.equal(*map(_modes.tensor_of, (row[name], first))):
                    params = names()
                    raise ValueError(
                        f"{name} of {params[i]} is {row[name]}, but {name} of {params[0]} is "
                        f"{first}: it must be the same for all parameters of a group"
                    )
                row[name] = first
        return first


def _laid_out(state: Any, params: Tree) -> tuple[Layout, Rows]:
    """The layout of a state, and the states of the parameters."""
    tensors, spec = _tree.flatten(params)
    nodes, structure = _tree.flatten(state, lambda node: _tree.column(node, spec) is not None)
    numbered = _tree.unflatten(range(len(nodes)), structure)
    structure, paths = _tree.flatten(numbered)[1], _tree.paths(numbered, "")  # unflattened quickly
    names = short_names([re.findall(r"[^\[\]'.]+", path) or ["state"] for path in paths])
    rows: Rows = [{} for _ in tensors]
    shared, rest = set[str](), dict[str, Any]()
    for name, node in zip(names, nodes, strict=True):
        if isinstance(node, Tensor):
            shared.add(name)
            for row in rows if node.dim() == 0 else rows[:1]:
                row[name] = node
        elif (leaves := _tree.column(node, spec)) is None:
            rest[name] = node
        else:
            for row, leaf in zip(rows, leaves, strict=True):
                if isinstance(leaf, Tensor):
                    row[name] = leaf
    return Layout(spec, structure, names, list(map(set, rows)), shared, rest), rows


def _like(row: dict[str, Any], key: str, fresh: Tensor, name: str) -> Tensor:
    """A saved tensor, with the dtype and device that `init` gives it; raises if it does not fit."""
    if key not in row:
        raise ValueError(
            f"loaded state dict does not match the optimizer: the state of {name} has "
            f"{sorted(map(str, row))}, but no {key}"
        )
    value = row[key]
    if not isinstance(value, Tensor):
        raise ValueError(f"{key} of {name} is {_tree.describe(value)}, not a tensor")
    kinds = [(x.is_floating_point(), x.is_complex(), tuple(x.shape)) for x in (value, fresh)]
    grown = fresh.dim() == 0 and fresh.is_floating_point() and value.is_floating_point()
    if kinds[0] != kinds[1] and not grown:
        raise ValueError(
            f"{key} of {name} has shape {tuple(value.shape)} and dtype {value.dtype}, but must "
            f"have shape {tuple(fresh.shape)} and dtype {fresh.dtype}"
        )
    if key.rpartition(".")[2] == "step":
        check_scalar("step", value, name)
    return value.to(fresh.device, fresh.dtype)
