"""partition(), masked() and freeze(): different updates for different parts of the params."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, overload

from diffopt import _tree
from diffopt._arguments import explains_calls
from diffopt._rule import checks
from diffopt._tree import Tree
from diffopt._value import Value
from diffopt.optimizer import Optimizer, Write, check_optimizer
from diffopt.transforms._base import (
    Leaves,
    Transformation,
    Wrapper,
    applied,
    check_apart,
    gather,
    matched,
)
from diffopt.transforms._records import ByLabel

S = TypeVar("S")
H = TypeVar("H")
Parts: TypeAlias = dict[Hashable, Any]


class Partition(Value, Optimizer[Parts, Parts]):
    """Update every tensor with the optimizer that its label names.

    Hyperparameters: a dict with the record of each label's optimizer. Keywords go to the one
    optimizer that accepts them; if several do, write the label before the name, as in
    `hparams(**{"body.lr": 0.1, "head.lr": 0.2})`, or pass records: `hparams({"body": record,
    "head": record})`. Fields are Python numbers, tensors or prefix trees of *all* params.

    The state is a dict with the state for each label: trees like params with `[]` where a tensor
    has another label.

    Args:
        optimizers: an optimizer for each label.
        labels: a prefix tree of the params whose leaves are labels, or a function from params to
            such a tree. It may depend on shapes and dtypes, never on values.

    Raises:
        TypeError: `optimizers` is not a dict, or one of its values is not an optimizer.
        ValueError: (from `init` and `update`) `labels` is not a prefix tree of params, or a label
            is not a key of `optimizers`.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.transforms.partition(
        ...     {"fast": diffopt.adam(), "slow": diffopt.sgd()}, {"body": "slow", "head": "fast"}
        ... )
        >>> params = {"body": [torch.zeros(2), torch.zeros(1)], "head": torch.zeros(1)}
        >>> grads = {"body": [torch.ones(2), torch.ones(1)], "head": torch.ones(1)}
        >>> hp = opt.hparams(**{"fast.lr": 0.5, "slow.lr": 0.1})
        >>> opt.update(params, grads, opt.init(params), hp)[0]
        {'body': [tensor([-0.1000, -0.1000]), tensor([-0.1000])], 'head': tensor([-0.5000])}
    """

    optimizers: Mapping[Hashable, Optimizer[Any, Any]]
    labels: Tree | Callable[[Tree], Tree]

    def __post_init__(self) -> None:
        if not isinstance(self.optimizers, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            kind = type(self.optimizers).__name__
            raise TypeError(f"optimizers is a {kind}, not a dict with an optimizer for each label")
        for label, optimizer in self.optimizers.items():
            check_optimizer(optimizer, f"optimizers[{label!r}]")
        object.__setattr__(self, "optimizers", dict(self.optimizers))
        object.__setattr__(self, "labels", _owned(self.labels))

    @property
    def hparams(self) -> ByLabel:  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride] (never assigned)
        return ByLabel({label: optimizer.hparams for label, optimizer in self.optimizers.items()})

    def init(self, params: Tree) -> Parts:
        tensors, spec = _tree.flatten(params)
        checks.params(tensors, params)
        return {
            label: self.optimizers[label].init(_pruned(tensors, spec, chosen))
            for label, chosen in self._split(params, spec).items()
        }

    def update(self, params: Tree, grads: Tree, state: Parts, hparams: Parts) -> tuple[Tree, Parts]:
        leaves = gather(params, grads, sparse=True)  # which the optimizer of the leaf may accept
        parts = self._parts(leaves, params, state, hparams)
        new_params, new_state = leaves.params, dict(state)
        for label, (chosen, arguments) in parts.items():
            new, new_state[label] = self.optimizers[label].update(*arguments)
            new_params = _replaced(new_params, new, chosen, arguments[0])
        return leaves.tree(new_params), new_state

    def prepare_(self, params: Tree, grads: Tree, state: Parts, hparams: Parts) -> Write:
        leaves = gather(params, grads, sparse=True)
        parts = self._parts(leaves, params, state, hparams)
        read = {"grads": grads, "hparams": hparams}  # by one part, where another may have written
        check_apart({"params": params, "state": state}, read, len(leaves.params))
        updates = [self.optimizers[name].prepare_(*args) for name, (_, args) in parts.items()]

        def write() -> None:
            for update_ in updates:
                update_()

        return write

    def _parts(
        self, leaves: Leaves, params: Tree, state: Parts, hparams: Parts
    ) -> dict[Hashable, tuple[list[bool], tuple[Any, ...]]]:
        """For each label, its leaves and the arguments of its update."""
        for name, values in (("state", state), ("hparams", hparams)):
            if not isinstance(values, dict) or values.keys() != self.optimizers.keys():  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"{name} must be a dict with the keys {list(self.optimizers)}")
        return {
            label: (chosen, (*_part(leaves, chosen), state[label], hparams[label]))
            for label, chosen in self._split(params, leaves.spec).items()
        }

    def _split(self, params: Tree, spec: _tree.Spec) -> dict[Hashable, list[bool]]:
        labels, known = _spread(self.labels, params, spec, "labels"), list(self.optimizers)
        for i, label in enumerate(labels):
            if label not in known:
                path = _tree.paths(params, "params")[i]
                given = _tree.shown(label)
                raise ValueError(f"{path} has the label {given}, but optimizers has {known}")
        return {label: [mine == label for mine in labels] for label in self.optimizers}


partition = Partition


@overload
def masked(part: Optimizer[S, H], mask: Tree | Callable[[Tree], Tree]) -> Optimizer[S, H]: ...
@overload
def masked(
    part: Transformation[S, H], mask: Tree | Callable[[Tree], Tree]
) -> Transformation[S, H]: ...
@explains_calls
def masked(part: Any, mask: Tree | Callable[[Tree], Tree]) -> Any:
    """Restrict a transformation or an optimizer to some of the params.

    Where the mask is False, a transformation returns the gradients unchanged, and an optimizer the
    params. A global norm is over the remaining gradients only.

    Args:
        part: a gradient transformation, or an optimizer.
        mask: a prefix tree of the params whose leaves are bools, or a function from params to such
            a tree. `diffopt.nn.decay_mask` returns one for a module.

    Returns:
        A part of the same kind, with the same hyperparameters. Its state holds `[]` where the mask
        is False.

    Raises:
        TypeError: `part` is neither of these.
        ValueError: (from `init` and `update`) `mask` is not a prefix tree of params, or a leaf of
            it is not a bool.

    Examples:
        >>> import torch, diffopt
        >>> from diffopt.transforms import chain, clip_by_global_norm, masked
        >>> clip = clip_by_global_norm()
        >>> opt = chain(masked(clip, {"a": True, "b": False}), diffopt.sgd())
        >>> params = {"a": torch.zeros(1), "b": torch.zeros(1)}
        >>> grads = {"a": torch.tensor([4.0]), "b": torch.tensor([3.0])}
        >>> opt.update(params, grads, opt.init(params), opt.hparams(lr=1.0, max_norm=1.0))[0]
        {'a': tensor([-1.0000]), 'b': tensor([-3.])}
    """
    if isinstance(part, Optimizer):
        return MaskedOptimizer(part, _owned(mask))
    if isinstance(part, Transformation):
        return MaskedTransformation(part, _owned(mask))
    given = _tree.shown(part)
    raise TypeError(f"part is {given}, neither an optimizer nor a gradient transformation")


@explains_calls
def freeze(optimizer: Optimizer[S, H], frozen: Tree | Callable[[Tree], Tree]) -> Optimizer[S, H]:
    """Keep some of the params unchanged: `masked` by the negated mask.

    Args:
        optimizer: any optimizer; it does not see what is frozen and keeps no state for it.
        frozen: a prefix tree of the params, or a function from params to such a tree: True for
            those that stay unchanged, whatever their gradients.

    Returns:
        The optimizer, with the same hyperparameters. Frozen params are returned as the very same
        tensors.

    Raises:
        TypeError: `optimizer` is not an optimizer.
        ValueError: (from `init` and `update`) `frozen` is not a prefix tree of params, or a leaf of
            it is not a bool.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.transforms.freeze(diffopt.sgd(), {"body": True, "head": False})
        >>> params = {"body": torch.zeros(2), "head": torch.zeros(1)}
        >>> grads = {"body": torch.ones(2), "head": torch.ones(1)}
        >>> opt.update(params, grads, opt.init(params), opt.hparams(lr=1.0))[0]
        {'body': tensor([0., 0.]), 'head': tensor([-1.])}
    """
    return MaskedOptimizer(optimizer, _owned(frozen), "frozen")


class MaskedOptimizer(Wrapper[Any]):
    """What `masked` returns for an optimizer, and `freeze`, whose argument is the negated mask."""

    mask: Tree | Callable[[Tree], Tree]
    name: str = "mask"

    def init(self, params: Tree) -> Any:
        tensors, spec = _tree.flatten(params)
        checks.params(tensors, params)
        return self.optimizer.init(_pruned(tensors, spec, self._chosen(params, spec)))

    def update(self, params: Tree, grads: Tree, state: Any, hparams: Any) -> tuple[Tree, Any]:
        leaves = gather(params, grads, sparse=True)
        chosen = self._chosen(params, leaves.spec)
        part = _part(leaves, chosen)
        new, new_state = self.optimizer.update(*part, state, hparams)
        return leaves.tree(_replaced(leaves.params, new, chosen, part[0])), new_state

    def prepare_(self, params: Tree, grads: Tree, state: Any, hparams: Any) -> Write:
        leaves = gather(params, grads, writable=True, sparse=True)
        part = _part(leaves, self._chosen(params, leaves.spec))
        return self.optimizer.prepare_(*part, state, hparams)

    def _chosen(self, params: Tree, spec: _tree.Spec) -> list[bool]:
        flags = _flags(self.mask, params, spec, self.name)
        return [flag is (self.name == "mask") for flag in flags]


class MaskedTransformation(Value, Transformation[Any, Any]):
    """What `masked` returns for a gradient transformation."""

    transformation: Transformation[Any, Any]
    mask: Tree | Callable[[Tree], Tree]

    @property
    def hparams(self) -> Callable[..., Any]:  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride] (never assigned)
        return self.transformation.hparams

    def init(self, params: Tree) -> Any:
        tensors, spec = _tree.flatten(params)
        chosen = _flags(self.mask, params, spec, "mask")
        return self.transformation.init(_pruned(tensors, spec, chosen))

    def apply(self, grads: Tree, params: Tree, state: Any, hparams: Any) -> tuple[Tree, Any]:
        leaves = matched(grads, params)
        chosen = _flags(self.mask, params, leaves.spec, "mask")
        part = _part(leaves, chosen)
        new, new_state = applied(self.transformation, part[1], part[0], state, hparams)
        return leaves.tree(_replaced(leaves.grads, new, chosen, part[1])), new_state


def _owned(prefix: Tree | Callable[[Tree], Tree]) -> Tree | Callable[[Tree], Tree]:
    """A copy of a prefix tree, which its owner may change later; a function as it is."""
    prefix = _tree.plain(prefix)
    return prefix if callable(prefix) else _tree.map(lambda leaf: leaf, prefix)


def _spread(
    prefix: Tree | Callable[[Tree], Tree], params: Tree, spec: _tree.Spec, name: str
) -> list[Any]:
    """For each leaf of params, the leaf of a prefix tree that covers it."""
    function = callable(prefix) and not isinstance(prefix, type)
    tree = prefix(_tree.plain(params)) if function else prefix
    values, cover = _tree.broadcast_prefix(tree, spec, params, (name, "params"))
    return [values[i] for i in cover]


def _flags(
    mask: Tree | Callable[[Tree], Tree], params: Tree, spec: _tree.Spec, name: str
) -> list[bool]:
    flags = _spread(mask, params, spec, name)
    for i, flag in enumerate(flags):
        if not isinstance(flag, bool):
            path = _tree.paths(params, "params")[i]
            raise ValueError(f"{name} has {_tree.describe(flag)} for {path}, but must have a bool")
    return flags


def _pruned(leaves: Sequence[Any], spec: _tree.Spec, chosen: list[bool]) -> Tree:
    """The tree with `[]`, which has no leaves, in place of those that are not chosen.

    So a prefix tree of all params is also one of the pruned tree.
    """
    return _tree.unflatten((x if c else [] for x, c in zip(leaves, chosen, strict=True)), spec)


def _part(leaves: Leaves, chosen: list[bool]) -> tuple[Tree, Tree]:
    """The params and the gradients, pruned."""
    spec = leaves.spec
    return _pruned(leaves.params, spec, chosen), _pruned(leaves.grads, spec, chosen)


def _replaced(leaves: Sequence[Any], pruned: Tree, chosen: list[bool], like: Tree) -> list[Any]:
    """The leaves, the chosen ones replaced with those of a pruned tree, which is like `like`."""
    spec = _tree.flatten(like)[1]
    new = iter(_tree.leaves_like(pruned, spec, like, ("the new tree", "the old one")))
    return [next(new) if c else x for x, c in zip(leaves, chosen, strict=True)]
