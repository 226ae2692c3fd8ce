"""The updates of a loop, each of which starts from what the one before has returned."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._rule import parts, running
from diffopt._rule.rule import WORKING_DTYPE, is_ours, unused
from diffopt._rule.work import Work
from diffopt._tree import Tree


class Repeated:
    """Params and state as lists that nobody else has, so that they need not be checked again.

    An update with gradients or hyperparameters of other kinds than before is refused, and left to
    `Optimizer.update`.

    Attributes:
        params: the leaves of the params.
        spec: their structure.
        apart: whether none of the params depends on another, nor anything else on any of them.
    """

    def __init__(self, work: Work, count: Tensor, hparams: Any) -> None:
        leaves, self._hparams_spec = _tree.flatten(hparams)
        self._forms = [*map(_form, leaves)]
        # By group, the indices of its params, and the places of its numbers among the leaves.
        sizes = [len(number.values) for number in work.numbers]
        starts = [0, *itertools.accumulate(sizes)]
        self._groups = [
            (group, [i + n.cover[group[0]] for i, n in zip(starts, work.numbers, strict=False)])
            for group in work.groups()
        ]
        self.rule, self.spec, self.params = work.rule, work.spec, work.params
        self._buffers = [() if unused(column[0]) else column for column in work.buffers]
        self._count = count
        t = _modes.number_of(count)
        self._t = _modes.exact(t) if isinstance(t, Tensor) else float(t)
        self._ours = is_ours(self.rule)
        self.apart = False
        # A rule of a user's may return tensors of other kinds.
        self._kinds = None if self._ours else self._found_kinds()
        self._as_is = running.as_is([self.params, *self._buffers])
        # The last hyperparameters: their leaves; if these are numbers, the record that the rule
        # sees; and if nobody can change that, the object that was given.
        self._leaves, self._record, self._same = leaves, None, None
        self._small = False  # whether tensor by tensor is known to be the fastest way
        self._names = [number.name for number in work.numbers]
        self._grads: Sequence[Any] = ()

    @classmethod
    def of(cls, work: Work, count: Tensor, hparams: Any) -> Repeated | None:
        """For the arguments of the first update; None where they are not of the usual kinds."""
        buffers = [x for column in work.buffers for x in column if not unused(x)]
        plain = _modes.all_plain([count, *work.params, *buffers])
        trees = all(number.per_parameter for number in work.numbers)
        usual = plain and trees and not work.numbers_of_state()
        return cls(work, count, hparams) if usual else None

    def update(
        self, grads: Sequence[Any], hparams: Any, *, params: list[Tensor] | None = None
    ) -> bool:
        """Take a step; False, with nothing done, where one of these must be checked.

        `params` are aliases of the params, where others may have written to them.
        """
        dense = _modes.all_ordinary(grads) and {g.layout for g in grads} == {torch.strided}
        usual = self._ours or self._found_kinds() == self._kinds
        if not (dense and usual and self._known(hparams)):
            return False
        self._t = self._t + 1 if isinstance(self._t, Tensor) else float(self._t + 1)
        if params is not None:
            self.params = params
        columns: list[Any] = [self.params, [*grads], *self._buffers]
        differentiated = self._differentiated(columns)
        self._keep(self._updated(hparams, columns, differentiated), columns[1])
        return True

    def _updated(self, hparams: Any, columns: list[Any], differentiated: bool) -> list[Any]:
        """The new columns."""
        if len(self._groups) > 1:
            return self._updated_groups(columns, differentiated)
        new = None if differentiated else self._batched(columns)
        if new is not None:
            return new
        numbers = self._numbers(hparams, columns)
        safe = self._ours and self._record is not None
        # Not by foreach kernels or as one vector, whose nodes tensors share: a backward pass would
        # go on from each tensor, and pass zeros to functions and hooks of users that nothing
        # depends on, which become NaN where a derivative is infinite.
        return running.leaf_by_leaf(self.rule, numbers, columns, as_is=self._as_is, safe=safe)

    def _batched(self, columns: list[Any]) -> list[Any] | None:
        """The new columns, where tensor by tensor is not the fastest way: after the first step."""
        if self._small:
            return None
        new = parts.batched(self.rule, self._t, self._numbers_of(0), columns)
        self._small = new is None and not isinstance(self._t, Tensor) and self._t > 1
        return new

    def _known(self, hparams: Any) -> bool:
        """Whether hyperparameters are of the same kinds as before; remembers them."""
        if hparams is self._same:
            return True
        leaves, spec = _tree.flatten(hparams)
        if spec is not self._hparams_spec:
            return False
        if self._record is not None and all(map(operator.is_, leaves, self._leaves)):
            return True
        self._leaves, self._record, self._same = leaves, None, None
        return [*map(_form, leaves)] == self._forms

    def _numbers_of(self, group: int) -> list[Any]:
        """The last hyperparameters of a group."""
        return [self._leaves[k] for k in self._groups[group][1]]

    def _numbers(self, hparams: Any, columns: list[Any]) -> running.Numbers:
        """What the rule sees of this step, where there is one group."""
        if self._record is not None and self._t > 1:
            scalars = self.rule.scalars(self._t, self._record)
            return running.Numbers(self._t, self._record, scalars, {})
        numbers = running.numbers_at(self.rule, self._t, self._numbers_of(0), columns)
        if not any(isinstance(x, Tensor) for x in (self._t, *self._leaves)):
            self._record = numbers.hparams
            # A record without containers cannot change: it is frozen.
            fields = [getattr(hparams, name) for name in self._names]
            frozen = [*map(id, fields)] == [*map(id, self._leaves)]
            self._same = hparams if frozen else None
        return numbers

    def _updated_groups(self, columns: list[Any], differentiated: bool) -> list[Any]:
        run = parts.leaf_by_leaf if differentiated else parts.updated
        new = [[*column] for column in (self.params, *self._buffers)]
        for g, (group, _) in enumerate(self._groups):
            part = [column and [column[i] for i in group] for column in columns]
            parts.scatter(run(self.rule, self._t, self._numbers_of(g), part), group, new)
        return new

    def _keep(self, new: list[Any], grads: Sequence[Any]) -> None:
        if not self._ours:
            new = [column and parts.apart(column, grads) for column in new]
        params, *buffers = new
        self.params = params
        self.apart = self._ours  # others may return a parameter as it is
        self._buffers = [() if not c or unused(c[0]) else c for c in buffers]
        self._grads = grads  # which may stand in buffers

    def _differentiated(self, columns: list[Any]) -> bool:
        """`_modes.differentiated`, where no transform is active."""
        if not torch.is_grad_enabled():
            return False
        tensors = [x for x in (self._count, *self._leaves) if isinstance(x, Tensor)]
        return any(x.requires_grad for column in (*columns, tensors) for x in column)

    def trees(self) -> tuple[Tree, Any]:
        """The params and the state."""
        count = self._count
        if isinstance(self._t, Tensor):
            step = self._t
        else:
            step = torch.full(
                (), self._t, dtype=_modes.exact_dtype(count.device), device=count.device
            )
        step = step if count.dtype in WORKING_DTYPE else step.to(count.dtype)
        buffers = [column and parts.apart(column, self._grads) for column in self._buffers]
        columns = [column and _tree.unflatten(column, self.spec) for column in buffers]
        return _tree.unflatten(self.params, self.spec), self.rule.State(step, *columns)

    def _found_kinds(self) -> set[Any]:
        tensors = itertools.chain(self.params, *self._buffers)
        return {(type(x), x.device, x.dtype, x.layout) for x in tensors}


def _form(leaf: Any) -> Any:
    """What the checks of a hyperparameter look at."""
    if isinstance(leaf, Tensor):
        return type(leaf), leaf.dtype, leaf.shape, leaf.device, leaf.layout
    return None if type(leaf) in (int, float) else type(leaf)
