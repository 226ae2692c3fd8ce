"""A ParameterDict stands for a dict, and a ParameterList for a list, in every tree."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import diffopt
from diffopt import _tree, linear, transforms as t
from diffopt.testing._case import generic_point
from registry import COMPOSITIONS, REGISTRY

ROWS = REGISTRY | COMPOSITIONS


def modules(tree):
    """The tree with its dicts and lists as modules."""
    if isinstance(tree, dict):
        return nn.ParameterDict({name: modules(child) for name, child in tree.items()})
    return nn.ParameterList(map(modules, tree)) if isinstance(tree, list) else tree


def assert_same(mine, theirs):
    assert _tree.flatten(mine)[1] == _tree.flatten(theirs)[1]
    torch.testing.assert_close(_tree.leaves(mine), _tree.leaves(theirs))


@pytest.mark.parametrize("row", ROWS)
def test_they_are_params_and_grads_of_every_optimizer(row):
    opt, point = ROWS[row].optimizer, generic_point(ROWS[row])
    params, grads = modules(point.params), modules(point.grads)
    torch.manual_seed(0)
    assert_same(opt.init(params), opt.init(point.params))
    new = opt.update(params, grads, point.state, point.hparams)
    assert_same(new, opt.update(*point))
    assert type(new[0]) is dict
    assert type(new[0]["rest"]) is list
    with torch.no_grad():
        for _ in range(3):  # the last one finds what passed its checks before
            opt.update_(params, grads, point.state, point.hparams)
    again = generic_point(ROWS[row])
    for _ in range(3):
        opt.update_(*again)
    assert_same(_tree.plain(params), again.params)
    assert_same(point.state, again.state)


@pytest.mark.parametrize("make", [diffopt.adam, diffopt.lbfgs, diffopt.muon])
def test_they_stand_anywhere_in_a_tree_and_in_states(make):
    opt, params = make(), {"body": [torch.ones(2, 2)], "head": torch.ones(2, 1)}
    lr = 0.1 if make is diffopt.lbfgs else nn.ParameterDict({"body": 0.1, "head": 0.2})
    hp, grads = opt.hparams(lr=lr), _tree.clone(params)
    expected = opt.update(params, grads, opt.init(params), hp)
    inside = {"body": modules(params["body"]), "head": params["head"]}
    for given in ((inside, grads), (params, modules(grads)), (inside, inside)):
        assert_same(opt.update(*given, opt.init(params), hp), expected)
    state = opt.init(params)
    state = type(state)(*(modules(x) if isinstance(x, dict) else x for x in state))
    assert_same(opt.update(params, grads, state, hp), expected)
    opt.update_(params, grads, state, hp)
    assert_same((params, state), expected)


def test_they_are_traced_and_transformed():
    opt, params = diffopt.sgd(), modules({"a": torch.ones(2), "b": [torch.ones(3)]})
    hp, state, grads = opt.hparams(lr=0.1), opt.init(params), torch.arange(2.0)

    def stepped(g):
        return opt.update(params, {"a": g**2, "b": [torch.ones(3)]}, state, hp)[0]["a"].sum()

    compiled = torch.compile(stepped, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(grads), stepped(grads))
    slopes = torch.vmap(torch.func.grad(stepped))(torch.stack([grads, 2 * grads]))
    torch.testing.assert_close(slopes, torch.stack([-0.2 * grads, -0.4 * grads]))


class Sums(t.Transformation):
    """A transformation of a user's own, which takes dicts and lists only."""

    hparams = tuple

    def init(self, params):
        return tree_map(torch.zeros_like, params)

    def apply(self, grads, params, state, hparams):
        return grads, tree_map(torch.add, state, grads)


def test_transformations_of_ones_own_receive_dicts_and_lists():
    params = modules({"a": torch.ones(2), "b": [torch.ones(1)]})
    grads = _tree.map(torch.ones_like, params)
    chain = t.chain(Sums(), diffopt.sgd())
    _, (sums, _) = chain.update(params, grads, chain.init(params), chain.hparams(lr=0.1))
    assert_same(sums, grads)


@pytest.mark.parametrize("labels", [{"a": "x", "b": "y"}, lambda p: tree_map(lambda _: "x", p)])
def test_they_are_labels_and_what_labels_are_made_from(labels):
    params = modules({"a": torch.ones(2), "b": [torch.ones(1)]})
    labels = labels if callable(labels) else nn.ParameterDict(labels)
    opt = t.partition({"x": diffopt.sgd(), "y": diffopt.sgd()}, labels)
    hp = opt.hparams(**{"x.lr": 0.5, "y.lr": 0.5})
    new, _ = opt.update(params, params, opt.init(params), hp)
    assert_same(new, {"a": torch.full((2,), 0.5), "b": [torch.full((1,), 0.5)]})


def test_they_are_trees_of_loops_solvers_and_inspection():
    sgd = diffopt.sgd()
    for params in (nn.ParameterDict({"w": torch.ones(2)}), nn.ParameterList([torch.ones(2)])):
        sol = diffopt.minimize(
            lambda p: _tree.leaves(p)[0].square().sum(),
            {"inside": params},
            optimizer=sgd,
            hparams=sgd.hparams(lr=0.25),
            steps=1,
        )
        assert_same(sol.params, {"inside": _tree.map(lambda x: x / 2, params)})
    b = nn.ParameterDict({"x": torch.tensor([2.0, 4.0])})
    found = linear.ConjugateGradient().solve(lambda v: {"x": 2 * v["x"]}, b).value
    torch.testing.assert_close(found, {"x": torch.tensor([1.0, 2.0])})
    net = nn.Linear(2, 1)
    net.bias.requires_grad_(False)
    outer = net(torch.ones(2)).sum()
    (row,) = diffopt.inspect.explain(torch.autograd.grad(outer, net.weight), net, outer=outer).rows
    assert (row.name, row.status) == ("weight", "ok")


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"w": torch.ones(2)}, r"grads\['b'\] is missing"),
        ({"w": torch.ones(2), "b": torch.ones(3)}, r"grads\['b'\] has shape \(3,\)"),
        ({"w": torch.ones(2), "b": {"c": torch.ones(1)}}, r"grads\['b'\] has type dict"),
    ],
)
def test_errors_name_paths_in_them(grads, message):
    opt, params = diffopt.sgd(), modules({"w": torch.ones(2), "b": torch.ones(1)})
    for given in (grads, modules(grads)):
        with pytest.raises(ValueError, match=message):
            opt.update(params, given, opt.init(params), opt.hparams(lr=0.1))


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: {"net": net}])
def test_another_module_is_no_tree_of_params(wrap):
    params, opt = wrap(nn.Linear(2, 1)), diffopt.sgd()
    hp, advice = opt.hparams(lr=0.1), "functionalize.* pass model.params"
    with pytest.raises(TypeError, match=advice):
        opt.init(params)
    with pytest.raises(TypeError, match=advice):
        opt.update_(params, params, (), hp)
    with pytest.raises(TypeError, match=advice):
        diffopt.minimize(lambda p: 0.0, params, optimizer=opt, hparams=hp, steps=1)
