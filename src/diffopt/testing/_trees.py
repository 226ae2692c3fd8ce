"""Checks on trees drawn by hypothesis: structure, purity, None, execution, prefix trees."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import _tree
from diffopt._rule import hyper
from diffopt._rule.leafwise import Leafwise
from diffopt._tree import Tree
from diffopt.testing._assertions import Snapshot, disjoint, named, same, same_structure
from diffopt.testing._case import Case, Point, random_tensor, scalars_as, twice

try:
    from hypothesis import HealthCheck, Phase, given, settings, strategies as st
except ImportError as error:
    message = "diffopt.testing needs hypothesis: pip install 'torch-diffopt[testing]'"
    raise ImportError(message) from error

SETTINGS = settings(
    max_examples=10,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


class Pair(NamedTuple):
    left: Tree
    right: Tree


@functools.cache  # making and checking a strategy takes longer than drawing ten trees from it
def trees(
    shapes: tuple[tuple[int, ...], ...], dtypes: tuple[torch.dtype, ...]
) -> st.SearchStrategy[Tree]:
    choices = st.sampled_from(shapes), st.sampled_from(dtypes), st.integers(0, 9)
    tensors = st.builds(random_tensor, *choices)

    def containers(children: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
        dicts = st.dictionaries(st.sampled_from("abc"), children, max_size=3)
        pairs = st.builds(Pair, children, children)
        lists = st.lists(children, max_size=3)
        return st.one_of(dicts, dicts.map(OrderedDict), pairs, lists, lists.map(tuple))

    return st.recursive(tensors, containers, max_leaves=4).filter(_tree.leaves)


@st.composite
def points(draw: st.DrawFn, case: Case) -> Point:
    """The arguments of a second step; some gradients are None."""
    params = draw(trees(tuple(map(tuple, case.shapes)), tuple(case.dtypes)))
    return second_step(case, params, lambda: draw(st.integers(0, 3)) == 3)


def every_tensor(case: Case) -> Point:
    """The arguments of a second step for a tensor of each shape and dtype; every third has None."""
    kinds = itertools.product(case.shapes, case.dtypes)
    params = [random_tensor(shape, dtype, i) for i, (shape, dtype) in enumerate(kinds)]
    return second_step(case, params, functools.partial(next, itertools.cycle((0, 0, 1))))


def second_step(case: Case, params: Tree, is_none: Callable[[], int]) -> Point:
    grads = _tree.map(lambda p: random_tensor(p.shape, p.dtype, 10), params)
    hparams = case.record()
    params, state = case.optimizer.update(params, grads, case.optimizer.init(params), hparams)
    some = _tree.map(lambda g: None if is_none() else g, grads)
    return Point(params, some, state, hparams)


def drawn(body: Callable[[Case, Point], None]) -> Callable[[Case], None]:
    """The check that `body` holds for every kind of tensor and every tree that hypothesis draws."""

    @functools.wraps(body)
    def run(case: Case) -> None:
        body(case, every_tensor(case))

        @SETTINGS
        @given(points(case))
        def holds(point: Point) -> None:
            body(case, point)

        holds()

    return run


@drawn
def kept(case: Case, point: Point) -> None:
    """Structures, shapes and dtypes are preserved, for any dtype of the hyperparameters."""
    old = (point.params, point.state)
    for dtype in (None, torch.float64, torch.float32):
        new = case.optimizer.update(*point._replace(hparams=scalars_as(dtype, point.hparams)))
        same_structure(new, old, "result")
        for (path, theirs), mine in zip(_tree.named(old, "result"), _tree.leaves(new), strict=True):
            for attribute in ("shape", "dtype", "device", "layout"):
                now, before = getattr(mine, attribute), getattr(theirs, attribute)
                if now != before:
                    raise AssertionError(f"{path} has {attribute} {now}, but had {before}")


@drawn
def pure(case: Case, point: Point) -> None:
    """The arguments are not changed; results share no memory with them or with one another."""
    exempt = {id(leaf) for _, leaf in staying(case, point, point.params, point.state)}
    if any(grad is None for grad in _tree.leaves(point.grads)):  # so may be vectors of params
        like_params = {id(x) for column in columns(point, point.state) for x in column}
        exempt |= {id(x) for x in _tree.tensors(point.state) if x.dim() > 0} - like_params
    for hparams in (point.hparams, scalars_as(torch.float64, point.hparams), least(point.hparams)):
        arguments = point._replace(hparams=hparams)
        before = Snapshot(arguments)
        new = named(case.optimizer.update(*arguments), "result")
        before.check()
        disjoint(named(arguments, "arguments"), [n for n in new if id(n[1]) not in exempt])
    disjoint(named(point.params, "params"), named(case.optimizer.init(point.params), "state"))


@drawn
def no_gradient(case: Case, point: Point) -> None:
    """A parameter without a gradient, and its state, are the very same tensors afterwards."""
    if _tree.is_leaf(point.params):
        return
    old = staying(case, point, point.params, point.state)
    new = staying(case, point, *case.optimizer.update(*point))
    for (path, x), (_, y) in zip(old, new, strict=True):
        if isinstance(x, Tensor) and x is not y:
            raise AssertionError(f"{path} has no gradient, but it or its state was replaced")


@drawn
def in_place(case: Case, point: Point) -> None:
    """`update_` writes what `update` returns; leaf and foreach execution agree."""
    expected, optimizers = twice(case.optimizer, point), [case.optimizer]
    if isinstance(case.optimizer, Leafwise):
        ways = ("auto", "leaf", "foreach")
        optimizers = [dataclasses.replace(case.optimizer, execution=way) for way in ways]
    for optimizer in optimizers:
        same(twice(optimizer, point), expected, "result")
        mine = _tree.clone(point)
        for _ in range(2):
            optimizer.update_(*mine)
        same((mine.params, mine.state), expected, "the result of update_")


@drawn
def key_order(case: Case, point: Point) -> None:
    """Gradients are matched by key, in any order of the dictionary."""
    other = point._replace(grads=reordered(point.grads))
    same(case.optimizer.update(*other), case.optimizer.update(*point), "result")


def reordered(tree: Tree) -> Tree:
    """The tree with the keys of every dictionary reversed."""
    if _tree.is_leaf(tree):
        return tree
    if isinstance(tree, dict):
        return type(tree)([(key, reordered(tree[key])) for key in reversed(tree)])
    children, spec = _tree.flatten(tree, is_leaf=lambda node: node is not tree)
    return _tree.unflatten([reordered(child) for child in children], spec)


@drawn
def complex_pairs(case: Case, point: Point) -> None:
    """A complex tensor is updated as pairs of reals."""
    pairs = Point(*_tree.map(as_pairs, tuple(point)))
    new = case.optimizer.update(*point)
    same(_tree.map(as_pairs, new), case.optimizer.update(*pairs), "result")


def as_pairs(leaf: Any) -> Any:
    is_complex = isinstance(leaf, Tensor) and leaf.is_complex()
    return torch.view_as_real(leaf).clone() if is_complex else leaf


def prefix(case: Case) -> None:
    """A hyperparameter for a subtree is the same as one for each of its leaves.

    In an elementwise optimizer, a tensor with its own hyperparameters moves as if it were alone.
    """

    @SETTINGS
    @given(st.data(), points(case))
    def holds(data: st.DataObject, point: Point) -> None:
        short, long = data.draw(prefixes(point))
        params, state = case.optimizer.update(*point._replace(hparams=short))
        leafwise = point._replace(hparams=long)
        same((params, state), case.optimizer.update(*leafwise), "result")
        if isinstance(case.optimizer, Leafwise):
            for i, leaf in enumerate(_tree.leaves(params)):
                same(leaf, case.optimizer.update(*alone(leafwise, i))[0], "one tensor")

    holds()


def alone(point: Point, i: int) -> Point:
    """The arguments for the `i`-th tensor only; each field of state and hparams has one for it."""
    spec = _tree.flatten(point.params)[1]

    def at(tree: Tree) -> Tree:
        return _tree.leaves(tree)[i] if _tree.flatten(tree)[1] == spec else tree

    state = type(point.state)(point.state[0], *map(at, point.state[1:]))
    hparams = hyper.map_fields(lambda _, value: at(value), point.hparams)
    return Point(at(point.params), at(point.grads), state, hparams)


@st.composite
def prefixes(draw: st.DrawFn, point: Point) -> tuple[Any, Any]:
    """Hyperparameters as prefix trees, and the same broadcast to all leaves of the params."""

    def cut(tree: Tree, number: float) -> tuple[Tree, Tree]:
        if _tree.is_leaf(tree) or draw(st.booleans()):
            value = draw(st.sampled_from([0.7, 0.8, 0.9])) * number
            value = torch.tensor(value) if draw(st.booleans()) else value
            return value, _tree.map(lambda _: value, tree)
        children, spec = _tree.flatten(tree, is_leaf=lambda node: node is not tree)
        both = [cut(child, number) for child in children]
        return tuple(_tree.unflatten([pair[i] for pair in both], spec) for i in (0, 1))

    def choose(field: hyper.Field, value: Any) -> tuple[Tree, Tree]:
        free = field.per_parameter and isinstance(value, (int, float))
        return cut(point.params, value) if free else (value, value)

    pairs = hyper.map_fields(choose, point.hparams)
    short, long = (hyper.map_fields(lambda _, pair, i=i: pair[i], pairs) for i in (0, 1))
    return short, long


def columns(point: Point, state: Any) -> list[list[Any]]:
    """The leaves of the trees in a state that are like the params; some may be `[]`."""
    spec = _tree.flatten(point.params)[1]

    def column(node: Any) -> list[Any]:
        leaves = _tree.column(node, spec) or []
        return leaves if any(isinstance(leaf, Tensor) for leaf in leaves) else []

    return [*filter(None, map(column, _tree.flatten(state, lambda node: bool(column(node)))[0]))]


def staying(case: Case, point: Point, params: Tree, state: Any) -> list[tuple[str, Any]]:
    """The leaves without a gradient, or frozen, and their state; each with the leaf's path."""
    paths = _tree.paths(point.params, "params")
    missing = [grad is None for grad in _tree.leaves(point.grads)]
    frozen = _tree.leaves(case.frozen(point.params)) if case.frozen else missing
    stays = [a or b for a, b in zip(missing, frozen, strict=True)]
    rows = [(_tree.leaves(params), stays), *((c, missing) for c in columns(point, state))]
    return [
        (path, leaf)
        for column, flags in rows
        for path, leaf, flag in zip(paths, column, flags, strict=True)
        if flag
    ]


def least(hparams: Any) -> Any:
    """Every field at the lower end of its range, where rules may take a shortcut."""

    def bound(field: hyper.Field, value: Any) -> Any:
        return value if field.bounds["ge"] is None else field.bounds["ge"]

    return hyper.map_fields(bound, hparams)
