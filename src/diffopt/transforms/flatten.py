"""flatten(): many small tensors as one long vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import _tree
from diffopt._modes import has_derivative, real
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

    The state is that of the optimizer, with lists of vectors in place of trees like params. The
    parts of a tensor without a gradient do not change.

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
        return layout.leaves.tree(layout.params(new_vectors)), layout.whole(new_state, state)

    def prepare_(self, params: Tree, grads: Tree, state: Any, hparams: Any) -> Write:
        layout = _Layout.of(gather(params, grads, writable=True))
        if layout.groups != layout.some:
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
    """Which leaves each vector holds, which of them have a gradient, and their lengths."""

    leaves: Leaves
    groups: list[list[int]]
    some: list[list[int]]
    sizes: list[int]

    @classmethod
    def of(cls, leaves: Leaves) -> _Layout:
        groups = _groups(leaves.params)
        some = [[i for i in group if leaves.grads[i] is not None] for group in groups]
        return cls(leaves, groups, some, [real(param).numel() for param in leaves.params])

    def arguments(self, params: Tree, state: Any, hparams: Any) -> Any:
        """The arguments of the optimizer's update, as vectors."""
        spec, tensors, grads = self.leaves

        def flat(record: Any) -> Any:
            if not hyper.is_record(record):
                return record
            numbers = hyper.broadcast(record, spec, params)
            checks.numbers(numbers, tensors, params)
            values = [_flat_number(number, tensors, self.groups) for number in numbers]
            return hyper.assemble(type(record), values)

        filled = [p if g is None else g for p, g in zip(tensors, grads, strict=True)]
        vectors = ([_ravel(column, g) for g in self.groups] for column in (tensors, filled))
        return self.part((*vectors, state, _tree.map(flat, hparams, is_leaf=hyper.is_record)))

    def params(self, vectors: list[Tensor]) -> list[Tensor]:
        """The params in these vectors; those without a gradient are unchanged."""
        params = list(self.leaves.params)
        for vector, group in zip(vectors, self.some, strict=True):
            # Copies instead of views of one vector: no two params may share memory.
            pieces: Any = torch.split_with_sizes_copy(vector, [self.sizes[i] for i in group])
            for i, piece in zip(group, pieces, strict=True):
                old = params[i]
                piece = piece.reshape(real(old).shape)
                new = torch.view_as_complex(piece) if old.is_complex() else piece
                params[i] = new.to(old.dtype)
        return params

    def part(self, tree: Any) -> Any:
        """The tree with its vectors restricted to the leaves that have a gradient."""

        def cut(vector: Tensor, group: list[int], some: list[int]) -> Tensor:
            if vector.dim() == 0:
                return vector
            pieces = self._pieces(vector, group)
            return torch.cat([vector[:0], *(pieces[i] for i in some)])

        return tree if self.groups == self.some else self._map_vectors(cut, tree)

    def whole(self, new: Any, old: Any) -> Any:
        """The tree with vectors of all leaves: the old values where there is no gradient."""

        def merge(old: Tensor, new: Tensor, group: list[int], some: list[int]) -> Tensor:
            if group == some or not some:
                return new if some else old
            old, new = (x.expand(self._size(part)) for x, part in ((old, group), (new, some)))
            return torch.cat([*(self._pieces(old, group) | self._pieces(new, some)).values()])

        return new if self.groups == self.some else self._map_vectors(merge, old, new)

    def _pieces(self, vector: Tensor, group: list[int]) -> dict[int, Tensor]:
        pieces = torch.split(vector, [self.sizes[i] for i in group])
        return dict(zip(group, pieces, strict=True))

    def _size(self, group: list[int]) -> int:
        return sum(self.sizes[i] for i in group)

    def _map_vectors(self, function: Callable[..., Tensor], *trees: Any) -> Any:
        """Apply to each list of whole vectors in the first tree; keep the rest of the last tree.

        A vector whose elements are all equal may be a number.
        """
        sizes = list(map(self._size, self.groups))

        def is_column(node: Any) -> bool:
            if not isinstance(node, list) or len(node) != len(sizes):
                return False
            shapes = (getattr(x, "shape", None) for x in node)
            return all(shape in ((), (n,)) for shape, n in zip(shapes, sizes, strict=True))

        nodes, spec = _tree.flatten(trees[0], is_leaf=is_column)
        rows = zip(nodes, *(spec.flatten_up_to(tree) for tree in trees[1:]), strict=True)
        new = (
            [*map(function, *row, self.groups, self.some)] if is_column(row[0]) else row[-1]
            for row in rows
        )
        return _tree.unflatten(new, spec)


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


def _ravel(tensors: Sequence[Tensor], group: list[int]) -> Tensor:
    return torch.cat([real(wide(tensors[i])).reshape(-1) for i in group])
