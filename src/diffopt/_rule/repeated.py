"""The updates of a loop, each of which starts from what the one before has returned."""

from __future__ import annotations

import itertools
import math
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

_SMALL = 4096  # elements of a tensor, on average: more take too long to copy


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
        # Where gradients have a graph and a rule is not brief, small tensors are updated as one
        # vector: then each column of the buffers holds one. The params are joined in every step,
        # as a loss may write to them.
        self._as_vector = False
        self._joinable = self._can_join(leaves)

    @classmethod
    def of(cls, work: Work, count: Tensor, hparams: Any) -> Repeated | None:
        """For the arguments of the first update; None where they are not of the usual kinds."""
        buffers = [x for column in work.buffers for x in column if not unused(x)]
        plain = _modes.all_plain([count, *work.params, *buffers])
        trees = all(number.per_parameter for number in work.numbers)
        usual = plain and trees and not work.numbers_of_state()
        return cls(work, count, hparams) if usual else None

    def _can_join(self, leaves: list[Any]) -> bool:
        """Whether the update of one vector gives the same, and copies of it cost little."""
        elementwise = self._ours and self.rule.elementwise and self._as_is and not self.rule.brief
        alike = len(self._groups) == 1 and all(map(running.is_scalar, leaves))
        small = sum(map(Tensor.numel, self.params)) <= _SMALL * len(self.params)
        dense = all(map(Tensor.is_contiguous, self.params))
        return elementwise and alike and small and dense and len(self.params) > 1

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
        # Where gradients are constants, no tensor depends on another: derivatives with respect to
        # that are None, not zero.
        if self._joinable and differentiated and all(x.requires_grad for x in grads):
            self._join()
        if self._as_vector:
            joined = [[_joined(self.params)], [_joined(grads)], *self._buffers]
            if self._differentiated([]) and not _finite(joined[:2]):
                self._part()
            columns = joined if self._as_vector else [*columns[:2], *self._buffers]
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
        # Not by foreach kernels, whose nodes tensors share: a backward pass would go on from each
        # tensor, and pass zeros or None to functions and hooks of users that nothing depends on.
        return running.leaf_by_leaf(self.rule, numbers, columns, as_is=self._as_is, safe=safe)

    def _join(self) -> None:
        self._joinable, self._as_vector = False, True
        self._buffers = [column and [_joined(column)] for column in self._buffers]

    def _part(self) -> None:
        """Update tensor by tensor from now on.

        The derivative with respect to a number is a sum over the vector, in which a tensor that is
        not finite makes NaN of it, even where nothing depends on that tensor: 0 times infinity.
        """
        self._buffers = [column and self._split(column) for column in self._buffers]
        self._as_vector = False

    def _split(self, column: list[Tensor]) -> list[Tensor]:
        """A vector as tensors like the params, none of which shares memory with another."""
        sizes = [*map(Tensor.numel, self.params)]
        pieces: Any = torch.split_with_sizes_copy(column[0], sizes)  # its stub says None
        return [*map(Tensor.view_as, pieces, self.params)]

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
        self.params = self._split(params) if self._as_vector else params
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
        if self._as_vector:
            buffers = [column and self._split(column) for column in buffers]
        columns = [column and _tree.unflatten(column, self.spec) for column in buffers]
        return _tree.unflatten(self.params, self.spec), self.rule.State(step, *columns)

    def _found_kinds(self) -> set[Any]:
        tensors = itertools.chain(self.params, *self._buffers)
        return {(type(x), x.device, x.dtype, x.layout) for x in tensors}


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([*map(torch.ravel, tensors)])


def _finite(columns: list[Any]) -> bool:
    """Whether vectors, and their squares, are known to be finite."""
    squares = (_modes.number_of(x.detach().dot(x.detach())) for (x,) in columns)
    return all(isinstance(x, float) and math.isfinite(x) for x in squares)


def _form(leaf: Any) -> Any:
    """What the checks of a hyperparameter look at."""
    if isinstance(leaf, Tensor):
        return type(leaf), leaf.dtype, leaf.shape, leaf.device, leaf.layout
    return None if type(leaf) in (int, float) else type(leaf)
