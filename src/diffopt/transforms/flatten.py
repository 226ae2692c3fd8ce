"""flatten(): many small tensors as one long vector."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import _tree
from diffopt._modes import has_derivative, real, reals
from diffopt._rule import checks, hyper, running
from diffopt._rule.leafwise import Leafwise
from diffopt._rule.rule import working_real
from diffopt._tree import Tree
from diffopt.optimizer import Write, copy_
from diffopt.transforms._base import Leaves, Wrapper, gather, wide


class Flatten(Wrapper[Any]):
    """Concatenate all tensors into one vector, so that a step runs each operation only once.

    With small tensors an eager step spends most of its time on calls, even more so under
    `torch.vmap` and with derivatives. There is one vector for each device and real dtype;
    half-precision tensors go into the float32 vector, and complex ones in as pairs of reals. Values
    are the same as without it.

    Hyperparameters are those of the optimizer, still prefix trees of the params. One that differs
    between tensors becomes a vector, and is computed with in the dtype of the params.

    The state is that of the optimizer, with lists of vectors in place of trees like params. In a
    step in which only some tensors have gradients, the others are vectors of their own.

    Args:
        optimizer: an elementwise optimizer, such as `adam()`, or a composition of it with
            transformations that do not depend on shapes, such as `clip_by_global_norm`. An
            optimizer that depends on shapes, like Muon, cannot be flattened. `partition`, whose
            labels refer to names, cannot either, but its parts can.

    Raises:
        TypeError: `optimizer` is not an optimizer.
        ValueError: its rule mixes the elements of a tensor, as Muon's does.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.transforms.flatten(diffopt.sgd())
        >>> params = {"w": torch.zeros(2, 2), "b": torch.zeros(1)}
        >>> grads = {"w": torch.ones(2, 2), "b": torch.ones(1)}
        >>> params, state = opt.update(
        ...     params, grads, opt.init(params), opt.hparams(lr={"w": 0.1, "b": 0.2}, momentum=0.9)
        ... )
        >>> params["b"], state.momentum_buffer
        (tensor([-0.2000]), [tensor([1., 1., 1., 1., 1.])])
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.optimizer, Leafwise) and not self.optimizer.batchable:
            raise ValueError(
                "optimizer mixes the elements of each tensor: flatten would mix those of all "
                "tensors"
            )

    def init(self, params: Tree) -> Any:
        tensors = _tree.leaves(params)
        checks.params(tensors, params)
        return self.optimizer.init([_ravel(tensors, group) for group in _groups(tensors)])

    def update(self, params: Tree, grads: Tree, state: Any, hparams: Any) -> tuple[Tree, Any]:
        layout = _Layout.of(gather(params, grads))
        vectors, *others = layout.arguments(params, state, hparams)
        new_vectors, new_state = self.optimizer.update(vectors, *others)
        return layout.leaves.tree(layout.params(new_vectors)), layout.joined(new_state, state)

    def prepare_(self, params: Tree, grads: Tree, state: Any, hparams: Any) -> Write:
        layout = _Layout.of(gather(params, grads, writable=True))
        if not layout.uncut:
            return super().prepare_(params, grads, state, hparams)
        vectors, *others = layout.arguments(params, state, hparams)
        update_ = self.optimizer.prepare_(vectors, *others)

        def write() -> None:
            update_()
            pairs = zip(layout.leaves.params, layout.params(vectors), strict=True)
            copy_((old, new) for old, new in pairs if new is not old)

        return write


flatten = Flatten


class _Layout(NamedTuple):
    """Which leaves each vector holds, and their lengths.

    The state has a vector for each group. The optimizer sees one for each run: each stretch of a
    group whose leaves all have a gradient, or all none.
    """

    leaves: Leaves
    groups: list[list[int]]
    runs: list[list[int]]
    sizes: list[int]
    lengths: list[list[int]]
    """For each group, those of its runs."""

    @classmethod
    def of(cls, leaves: Leaves) -> _Layout:
        groups = _groups(leaves.params)
        nested = [_runs(group, leaves.grads) for group in groups]
        sizes = [real(param).numel() for param in leaves.params]
        lengths = [[sum(sizes[i] for i in run) for run in runs] for runs in nested]
        return cls(leaves, groups, [*itertools.chain(*nested)], sizes, lengths)

    @property
    def uncut(self) -> bool:
        """Whether the optimizer sees the vectors of the state."""
        return len(self.runs) == len(self.groups)

    def arguments(self, params: Tree, state: Any, hparams: Any) -> Any:
        """The arguments of the optimizer's update, as vectors."""
        spec, tensors, grads = self.leaves

        def flat(record: Any) -> Any:
            numbers = hyper.broadcast(record, spec, params)
            checks.numbers(numbers, tensors, params)
            values = [_flat_number(number, tensors, self.runs) for number in numbers]
            return hyper.assemble(type(record), values)

        vectors = [_ravel(tensors, run) for run in self.runs]
        flat_grads = [None if grads[run[0]] is None else _ravel(grads, run) for run in self.runs]
        return vectors, flat_grads, self._cut(state), hyper.map_records(flat, hparams)

    def params(self, vectors: list[Tensor]) -> list[Tensor]:
        """The params in these vectors; those without a gradient are unchanged."""
        params = list(self.leaves.params)
        for vector, run in zip(vectors, self.runs, strict=True):
            if self.leaves.grads[run[0]] is None:
                continue
            # Copies instead of views of one vector: no two params may share memory.
            pieces: Any = torch.split_with_sizes_copy(vector, [self.sizes[i] for i in run])
            for i, piece in zip(run, pieces, strict=True):
                old = params[i]
                piece = piece.reshape(real(old).shape)
                new = torch.complex(*piece.unbind(-1)) if old.is_complex() else piece
                params[i] = new.to(old.dtype)
        return params

    def _cut(self, state: Any) -> Any:
        """The state with a vector for each run."""
        if self.uncut:
            return state

        def cut(column: list[Tensor]) -> list[Tensor]:
            pairs = zip(column, self.lengths, strict=True)
            return [x for vector, lengths in pairs for x in _split(vector, lengths)]

        return _tree.map(lambda x: cut(x) if self._whole(x) else x, state, is_leaf=self._whole)

    def joined(self, new: Any, old: Any) -> Any:
        """The new state with a vector for each group, like the old one."""
        if self.uncut:
            return new

        def join(column: list[Tensor]) -> list[Tensor]:
            pieces = iter(column)
            return [_cat([(next(pieces), n) for n in lengths]) for lengths in self.lengths]

        nodes, spec = _tree.flatten(old, is_leaf=self._whole)
        pairs = zip(nodes, spec.flatten_up_to(new), strict=True)
        return _tree.unflatten([join(y) if self._whole(x) else y for x, y in pairs], spec)

    def _whole(self, node: Any) -> bool:
        """Whether this is a list of one vector for each group.

        A vector whose elements are all equal may be a number.
        """
        if not isinstance(node, list) or len(node) != len(self.groups):
            return False
        pairs = zip(node, self.lengths, strict=True)
        return all(getattr(x, "shape", None) in ((), (sum(lengths),)) for x, lengths in pairs)


def _runs(group: list[int], grads: Sequence[Tensor | None]) -> list[list[int]]:
    """The group cut where leaves with a gradient meet those without."""
    runs: list[list[int]] = []
    for i in group:
        if not runs or (grads[i] is None) != (grads[runs[-1][-1]] is None):
            runs.append([])
        runs[-1].append(i)
    return runs


def _split(vector: Tensor, lengths: list[int]) -> Sequence[Tensor]:
    return vector.split(lengths) if vector.dim() else [vector] * len(lengths)


def _cat(pieces: list[tuple[Tensor, int]]) -> Tensor:
    return pieces[0][0] if len(pieces) == 1 else torch.cat([x.expand(n) for x, n in pieces])


def _flat_number(number: hyper.Covered, params: list[Tensor], groups: list[list[int]]) -> Any:
    """A hyperparameter for the vectors: unchanged, or as vectors if it differs between leaves."""
    used = {number.cover[i] for group in groups for i in group}
    values = [number.values[k] for k in used] if number.per_parameter else number.values
    if not number.per_parameter or (len(values) == 1 and running.is_scalar(values[0])):
        return values[0]
    return [torch.cat([_expanded(number.at(i), params[i]) for i in group]) for group in groups]


def _expanded(value: Any, param: Tensor) -> Tensor:
    """One value for each real number of a tensor."""
    pairs = real(param)
    tensor = torch.as_tensor(value, dtype=working_real(param.dtype), device=param.device)
    if param.is_complex() and tensor.dim() > 0:
        tensor = tensor.unsqueeze(-1)
    return tensor.expand(pairs.shape).reshape(-1)


def _groups(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Leaves by dtype and device; integers, which have no gradient, are left out."""
    groups: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if has_derivative(tensor):
            groups.setdefault((working_real(tensor.dtype), tensor.device), []).append(i)
    return list(groups.values())


def _ravel(tensors: Sequence[Any], group: list[int]) -> Tensor:
    return torch.cat([reals(wide(tensors[i])) for i in group])
