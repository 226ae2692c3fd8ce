"""Pytrees: flattening, paths, structure checks and prefix broadcast."""

from __future__ import annotations

import builtins
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

from torch import Tensor, nn

from diffopt import _modes, _torch

Tree: TypeAlias = Any
"""A tensor, or a container of trees that is registered with torch's pytree."""

pytree = _torch.pytree

Spec: TypeAlias = pytree.TreeSpec

GetAttrKey = pytree.GetAttrKey
register_node = pytree.register_pytree_node


def flatten(tree: Tree, is_leaf: Callable[[Tree], bool] | None = None) -> tuple[list[Any], Spec]:
    """The leaves and the structure; much faster than torch's for structures seen before.

    ParameterDicts are dicts, and ParameterLists lists. `is_leaf` says which containers to treat as
    leaves.
    """
    quick = is_leaf is None and not _modes.compiling()
    key = _key(tree) if quick else ()
    seen = _seen_before(tree, key) if quick else None
    if seen is not None:
        return seen
    values, spec = pytree.tree_flatten(tree, is_leaf)
    if _has_modules(values):
        return flatten(plain(tree), is_leaf)
    node = _node(spec) if quick else None
    if node is not None:
        first, *rest = node, *_KNOWN.get(key, ())
        for forgotten in rest[_REMEMBERED - 1 :]:
            _NODES.pop(id(forgotten.spec), None)
        _KNOWN[key] = first, *rest[: _REMEMBERED - 1]
        _NODES[id(spec)] = node
    return values, spec


def leaves(tree: Tree) -> list[Any]:
    """The leaves; much faster than torch's for structures that `flatten` has seen before."""
    seen = None if _modes.compiling() else _seen_before(tree, _key(tree))
    if seen is not None:
        return seen[0]
    values = pytree.tree_leaves(tree)
    return flatten(tree)[0] if _has_modules(values) else values


def _seen_before(tree: Tree, key: tuple[Any, ...]) -> tuple[list[Any], Spec] | None:
    """The leaves and the structure, if `flatten` has seen that; for `key` see `_key`."""
    for known in _KNOWN.get(key, ()):
        values: list[Any] = []
        if _collect(tree, known, values):
            return values, known.spec
    return None


def _key(tree: Tree) -> tuple[Any, ...]:
    """What `_KNOWN` has few structures for: its type and length; if short, which parts are what."""
    if not isinstance(tree, (list, tuple, dict)):
        return (type(tree),)
    parts = cast(Any, tree)
    if len(parts) > 4 or isinstance(tree, dict):
        return type(tree), len(parts)
    return type(tree), *[type(x) if isinstance(x, (list, tuple, dict)) else None for x in parts]


def leaves_as(tree: Tree, spec: Spec) -> list[Any] | None:
    """The leaves of a tree of a structure that `flatten` returned of late; None of other trees.

    Faster than `flatten`, as it takes any object for a leaf: for callers that know their types.
    """
    node, values = _NODES.get(id(spec)), list[Any]()
    fits = node is not None and node.spec is spec and _collect(tree, node, values, unchecked=True)
    return values if fits else None


def unflatten(values: Iterable[Any], spec: Spec) -> Tree:
    """The tree of structure `spec` that holds `values`."""
    node = None if _modes.compiling() else _NODES.get(id(spec))
    if node is None or node.spec is not spec:
        return pytree.tree_unflatten(values, spec)
    values = list(values)
    if len(values) != spec.num_leaves:
        raise ValueError(f"{len(values)} values for {spec.num_leaves} leaves")
    return _built(node.kind, node.context, values) if node.flat else _build(node, iter(values))


def map(
    function: Callable[..., Any],
    tree: Tree,
    *others: Tree,
    is_leaf: Callable[[Tree], bool] | None = None,
) -> Tree:
    """The tree of `function(leaf, *leaves)`, for trees of the same structure."""
    values, spec = flatten(tree, is_leaf)
    rows = [values, *(spec.flatten_up_to(plain(other)) for other in others)]
    return unflatten([function(*row) for row in zip(*rows, strict=True)], spec)


def map_tensors(function: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """The tree of `function(leaf)` for every tensor; other leaves are unchanged."""
    return map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def clone(tree: Tree) -> Tree:
    """A copy whose tensors keep their history."""
    return map_tensors(Tensor.clone, tree)


class _Node(NamedTuple):
    """A structure in a form that can be traversed quickly."""

    spec: Spec
    kind: Any  # None for a leaf
    context: Any
    children: tuple[_Node, ...]
    flat: bool = False  # whether all children are leaves


_LEAVES = {Tensor, nn.Parameter, int, float, bool, str, type(None)}  # that no registry has
_MODULES = (nn.ParameterDict, nn.ParameterList)  # containers that are leaves to torch
_SEQUENCES = (list, tuple, pytree.namedtuple)
_LEAF = _Node(pytree.tree_structure(0), None, None, ())
_REMEMBERED = 4
_KNOWN: dict[tuple[Any, ...], tuple[_Node, ...]] = {}  # by the key of the root
_NODES: dict[int, _Node] = {}  # those of `_KNOWN` by the id of their specs


def _node(spec: Spec) -> _Node | None:
    """The structure; None if it contains nodes of other types than Python's and this package's."""
    kind: Any = spec.type
    if kind is None:
        return _LEAF
    children = tuple(_node(spec.child(i)) for i in range(spec.num_children))
    ours = kind in (list, tuple, dict, pytree.namedtuple) or spec.context is None
    if not ours or None in children:
        return None
    flat = all(child is _LEAF for child in children)
    return _Node(spec, kind, spec.context, cast(Any, children), flat)


def _collect(tree: Tree, node: _Node, values: list[Any], *, unchecked: bool = False) -> bool:
    """Add the leaves to the values, if the tree has this structure.

    `unchecked`: whatever stands in the place of a leaf is one.
    """
    _, kind, context, children, flat = node
    if kind is None:
        values.append(tree)
        return unchecked or type(tree) in _LEAVES or is_leaf(tree)
    if type(tree) is not (context if kind is pytree.namedtuple else kind):
        return False
    mine: Any = tree
    if kind is dict:
        if [*tree] != context:
            return False
        mine = tree.values()
    elif kind not in _SEQUENCES:
        mine = pytree.SUPPORTED_NODES[kind].flatten_fn(tree)[0]
    if len(mine) != len(children):
        return False
    # All in C: there may be thousands.
    if flat and (unchecked or _LEAVES.issuperset(builtins.map(type, mine))):
        values += mine
        return True
    for child, structure in zip(mine, children):  # noqa: B905 (`strict` is slower)
        if structure is _LEAF and isinstance(child, Tensor):
            values.append(child)
        elif not _collect(child, structure, values, unchecked=unchecked):
            return False
    return True


def _build(node: _Node, values: Iterator[Any]) -> Tree:
    """The tree of this structure with the next values."""
    _, kind, context, nodes, _ = node
    if kind is None:
        return next(values)
    children = [next(values) if child is _LEAF else _build(child, values) for child in nodes]
    return _built(kind, context, children)


def _built(kind: Any, context: Any, children: list[Any]) -> Tree:
    if kind is dict:
        return dict(zip(context, children))  # noqa: B905 (`strict` is slower)
    return (
        children if kind is list else pytree.SUPPORTED_NODES[kind].unflatten_fn(children, context)
    )


def split(tree: Tree) -> tuple[list[Tensor], Callable[[Iterable[Tensor]], Tree]]:
    """The tensors of a tree, and a function that builds the tree with others in their place.

    That function holds none of the tensors, so it keeps no memory alive.
    """
    values, spec = flatten(tree)
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    rest = [None if isinstance(value, Tensor) else value for value in values]

    def join(tensors: Iterable[Tensor]) -> Tree:
        joined = list(rest)
        for place, tensor in zip(places, tensors, strict=True):
            joined[place] = tensor
        return unflatten(joined, spec)

    return [values[i] for i in places], join


def tensors(tree: Tree) -> list[Tensor]:
    """The tensors of a tree."""
    return [value for value in flatten(tree)[0] if isinstance(value, Tensor)]


def count(tree: Tree) -> int:
    """The number of tensors in a tree."""
    return len(tensors(tree))


def is_leaf(node: Tree) -> bool:
    """Whether `node` is not a container."""
    if isinstance(node, Tensor) or type(node) in (int, float):
        return True
    return pytree.tree_is_leaf(node) and not isinstance(node, _MODULES)


def paths(tree: Tree, name: str) -> list[str]:
    """One name per leaf, such as `params['layers'][0].weight`."""
    tree = as_dict(tree)
    if is_leaf(tree):
        return [name]
    return [path for key, child in _children(tree) for path in paths(child, name + key)]


def named(tree: Tree, name: str) -> list[tuple[str, Any]]:
    """The leaves with their paths."""
    return list(zip(paths(tree, name), leaves(tree), strict=True))


def leaves_like(tree: Tree, spec: Spec, like: Tree, names: tuple[str, str]) -> list[Any]:
    """The leaves of `tree` in the order of `spec`, the structure of `like`.

    Dictionaries match by key, in any order. Raises `ValueError` with the path of the first
    difference; `names` are those of `tree` and `like`.
    """
    found, structure = flatten(tree)
    if structure == spec:
        return found
    tree = plain(tree)
    difference = _difference(tree, plain(like), names[0], prefix=False)
    if difference:
        raise ValueError(f"{names[0]} must have the structure of {names[1]}: {difference}")
    return spec.flatten_up_to(tree)


def column(node: Tree, spec: Spec) -> list[Any] | None:
    """The leaves of a tree of tensors of this structure; [] where a part of a partition has none.

    None for other trees.
    """
    try:
        values = spec.flatten_up_to(plain(node))
    except ValueError:
        return None
    return values if all(isinstance(x, Tensor) or x == [] for x in values) else None


def ordered_like(tree: Tree, like: Tree, names: tuple[str, str]) -> Tree:
    """`tree` with its dictionaries in the order of `like`; raises as `leaves_like` does."""
    spec = flatten(like)[1]
    return unflatten(leaves_like(tree, spec, like, names), spec)


def broadcast_prefix(
    prefix: Tree, spec: Spec, like: Tree, names: tuple[str, str]
) -> tuple[list[Any], Sequence[int]]:
    """The leaves of `prefix`, and for each leaf of `like` the index of the one that covers it.

    `prefix` is a tree with leaves where `like`, of structure `spec`, has whole subtrees. Dotted
    names of a module's parameters count as nested: "body" covers "body.0.weight" and "body.0.bias",
    and {"body": {"0": x}} is {"body.0": x}.
    Raises `ValueError` with the path of the first difference.
    """
    if is_leaf(prefix):
        return [prefix], [0] * spec.num_leaves
    values, structure = flatten(prefix)
    if structure == spec:
        return values, range(len(values))
    prefix, like = plain(prefix), plain(like)
    difference = _difference(_spelled_out(prefix, like, names[0]), like, names[0], prefix=True)
    if difference:
        raise ValueError(f"{names[0]} must be a prefix tree of {names[1]}: {difference}")
    numbered = unflatten(range(len(values)), structure)
    indices, structure = flatten(_spelled_out(numbered, like, names[0]))
    cover = [0] * spec.num_leaves
    positions = unflatten(range(spec.num_leaves), spec)
    subtrees = structure.flatten_up_to(positions)
    for index, subtree in zip(indices, subtrees, strict=True):
        for position in leaves(subtree):
            cover[position] = index
    return values, cover


def _spelled_out(prefix: Tree, like: Tree, path: str) -> Tree:
    """The prefix with its keys expanded to the dotted names of `like` that begin with them.

    Names may be nested too: {"body": {"0": x}} is {"body.0": x}, where `like` has no such dicts.
    """
    if not isinstance(prefix, dict) or not isinstance(like, dict):
        return prefix
    names = cast(dict[Any, Any], like)
    given: dict[Any, Any] = {}  # torch.compile traces no `dict[Any, Any]()`
    for key, value in _flat(cast(dict[Any, Any], prefix), names):
        if key in given:
            raise ValueError(f"{path} has {key!r} twice, once of them nested")
        given[key] = value
    if names.keys() >= given.keys():
        return given
    used: set[Any] = set()
    result: dict[Any, Any] = {}
    for name in names:
        keys = [key for key in given if name == key or f"{name}".startswith(f"{key}.")]
        if len(keys) > 1:
            raise ValueError(f"{path} has {keys[0]!r} and {keys[1]!r}, which both cover {name!r}")
        used.update(keys)
        result.update((name, given[key]) for key in keys)
    return result | {key: value for key, value in given.items() if key not in used}


def _flat(prefix: dict[Any, Any], names: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """The items, with dicts replaced by dotted keys where some of the names begin with those."""
    for key, value in prefix.items():
        part = key not in names and any(f"{name}".startswith(f"{key}.") for name in names)
        if part and isinstance(value, dict):
            children = cast(dict[Any, Any], value).items()
            yield from _flat({f"{key}.{name}": child for name, child in children}, names)
        else:
            yield key, value


def as_dict(value: Any) -> Any:
    """A ParameterDict as a dict, and a ParameterList as a list; anything else is itself."""
    if isinstance(value, nn.ParameterDict):
        return dict(value.items())
    return list(cast(Iterable[Any], value)) if isinstance(value, nn.ParameterList) else value


def plain(tree: Tree) -> Tree:
    """A tree with ParameterDicts and ParameterLists in it as dicts and lists; or itself."""
    if not _modes.compiling() and _seen_before(tree, _key(tree)) is not None:
        return tree
    values, spec = pytree.tree_flatten(tree)
    if not _has_modules(values):
        return tree
    return plain(pytree.tree_unflatten([as_dict(x) for x in values], spec))


def _has_modules(values: list[Any]) -> bool:
    return any(isinstance(value, _MODULES) for value in values)


def trained(value: Any) -> Any:
    """The parameters by name that a module trains, or what `as_dict` returns."""
    if isinstance(value, nn.Module) and not isinstance(value, _MODULES):
        return {name: p for name, p in value.named_parameters() if p.requires_grad}
    return as_dict(value)


def detach(tree: Tree) -> Tree:
    """Detach every tensor of `tree` from the autograd graph: `x.detach()` leaf by leaf.

    Args:
        tree: any pytree: parameters, optimizer state, hyperparameters, a `Solution`, or a tuple of
            them. Leaves that are not tensors are unchanged.

    Returns:
        The same structure; each tensor shares its data with the old one and has no history.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.adam()
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> params = {"w": torch.ones(2)}
        >>> state, hp = opt.init(params), opt.hparams(lr=lr)
        >>> params, state = opt.update(params, {"w": torch.ones(2)}, state, hp)
        >>> params["w"].requires_grad
        True
        >>> params, state, hp = diffopt.detach((params, state, hp))
        >>> params["w"].requires_grad, hp.lr.requires_grad
        (False, False)
    """
    return map_tensors(Tensor.detach, tree)


def _children(node: Tree) -> list[tuple[str, Tree]]:
    handler = pytree.SUPPORTED_NODES[_torch.node_type(node)]
    if handler.flatten_with_keys_fn is not None:
        return [(str(key), child) for key, child in handler.flatten_with_keys_fn(node)[0]]
    return [(f"[{i}]", child) for i, child in enumerate(handler.flatten_fn(node)[0])]


def _difference(tree: Tree, like: Tree, path: str, *, prefix: bool) -> str | None:
    """Where `tree` first differs from `like` (or is not its prefix tree); None if it does not."""
    if is_leaf(tree):
        if prefix or is_leaf(like):
            return None
        return f"{path} is {describe(tree)}, where type {type(like).__name__} is expected"
    if is_leaf(like):
        return f"{path} has type {type(tree).__name__}, where {describe(like)} is expected"
    dicts = isinstance(tree, dict) and isinstance(like, dict)
    if not dicts and type(tree) is not type(like):
        given, wanted = type(tree).__name__, type(like).__name__
        return f"{path} has type {given}, where type {wanted} is expected"
    mine, theirs = dict(_children(tree)), dict(_children(like))
    missing = [key for key in theirs if key not in mine] if dicts else [*theirs][len(mine) :]
    others = [key for key in mine if key not in theirs] if dicts else [*mine][len(theirs) :]
    if missing or others:  # both where a key is misspelled
        faults = [f"{path}{key} is missing" for key in missing[:1]]
        faults += [f"{path}{key} is not expected there" for key in others[:1]]
        return ", and ".join(faults)
    for key, child in theirs.items():
        difference = _difference(mine[key], child, path + key, prefix=prefix)
        if difference:
            return difference
    return None


def shown(value: object) -> str:
    """A value in an error message: a tensor's shape, otherwise a repr of at most 100 characters."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return textwrap.shorten(repr(value), 100)


def describe(leaf: object) -> str:
    """A short description of a leaf for error messages, with its type."""
    clear = leaf is None or isinstance(leaf, Tensor)
    return shown(leaf) if clear else f"{shown(leaf)} of type {type(leaf).__name__}"
