"""Parameters and hyperparameters in every kind of tree, and errors where trees do not fit."""

import collections
import contextlib
import copy
import dataclasses
import itertools
import pickle
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

import diffopt
from diffopt import _tree
from diffopt.rules import hparams, number


class Pair(NamedTuple):
    a: object
    b: object


@dataclasses.dataclass
class Box:
    inside: object


pytree.register_dataclass(Box)


class Opaque:
    """A node that is registered without names for its children."""

    def __init__(self, inside):
        self.inside = inside

    def __repr__(self):
        return f"Opaque({self.inside!r})"


pytree.register_pytree_node(Opaque, lambda o: ([o.inside], None), lambda c, _: Opaque(*c))

X, Y = torch.tensor([1.0, 2.0]), torch.tensor(3.0)
TREES = {
    "tensor": X,
    "list": [X, Y],
    "tuple": (X, [Y]),
    "dict": {"x": X, 1: {"y": Y}},
    "ordered": collections.OrderedDict(x=X, y=Y),
    "default": collections.defaultdict(list, x=X, y=Y),
    "deque": collections.deque([X, Y]),
    "named": Pair(X, {"y": Y}),
    "dataclass": Box([X, Y]),
    "opaque": [Opaque(X), Y],
    "module": dict(torch.nn.Linear(2, 1).named_parameters()),
    "empty": {"x": [], "y": ()},
}


@pytest.mark.parametrize("kind", TREES)
def test_every_kind_of_tree(kind):
    params = TREES[kind]
    opt = diffopt.adam()
    grads = pytree.tree_map(torch.ones_like, params)
    new, state = opt.update(params, grads, opt.init(params), opt.hparams(lr=0.1))
    assert pytree.tree_structure(new) == pytree.tree_structure(params)
    assert pytree.tree_structure(state.exp_avg) == pytree.tree_structure(params)
    for before, after in zip(pytree.tree_leaves(params), pytree.tree_leaves(new), strict=True):
        torch.testing.assert_close(after, before - 0.1)
    assert state.step == 1


def test_dictionaries_match_by_key_whatever_their_order():
    params, opt = {"x": X, "y": Y, "z": {"a": X.clone(), "b": Y.clone()}}, diffopt.sgd()
    grads = {"z": {"b": torch.tensor(7.0), "a": 3 * X}, "y": torch.tensor(5.0), "x": X}
    rates = {"z": {"b": 0.1, "a": 0.2}, "y": 0.3, "x": 0.4}
    new, _ = opt.update(params, grads, opt.init(params), opt.hparams(lr=rates))
    expected = {"x": 0.6 * X, "y": Y - 1.5, "z": {"a": 0.4 * X, "b": Y - 0.7}}
    torch.testing.assert_close(new, expected)
    new, _ = opt.update(params, grads, opt.init(params), opt.hparams(lr={"z": 0, "y": 1, "x": 0}))
    torch.testing.assert_close(new, {**params, "y": Y - 5})


def test_a_rate_for_each_weight():
    params, opt = {"w": torch.zeros(2, 3)}, diffopt.sgd()
    grads = {"w": torch.ones(2, 3)}
    for shape in [(2, 3), (3,), (2, 1), (1,), ()]:
        rate = torch.rand(shape)
        new, _ = opt.update(params, grads, opt.init(params), opt.hparams(lr={"w": rate}))
        torch.testing.assert_close(new["w"], -rate.expand(2, 3))


def test_paths_name_every_leaf():
    tree = {"x": [X, Pair(X, Box(Y))], 1: Opaque(Y)}
    assert _tree.paths(tree, "params") == [
        "params['x'][0]",
        "params['x'][1].a",
        "params['x'][1].b.inside",
        "params[1][0]",
    ]


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"x": [X]}, r"grads must have the structure of params: grads\['y'\] is missing"),
        ({"x": [X], "y": Y, "z": Y}, r"grads\['z'\] is not expected there"),
        (
            {"x": X, "y": Y},
            r"grads\['x'\] is a tensor of shape \(2,\), where type list is expected",
        ),
        ({"x": [X, Y], "y": Y}, r"grads\['x'\]\[1\] is not expected there"),
        ({"x": [], "y": Y}, r"grads\['x'\]\[0\] is missing"),
        ({"x": (X,), "y": Y}, r"grads\['x'\] has type tuple, where type list is expected"),
        (
            {"x": [[X]], "y": Y},
            r"\['x'\]\[0\] has type list, where a tensor of shape \(2,\) is exp",
        ),
        (None, r"grads is None, where type dict is expected"),
        ({"x": None, "y": Y}, r"grads\['x'\] is None, where type list is expected"),
    ],
)
def test_gradients_of_another_structure(grads, message):
    params, opt = {"x": [X], "y": Y}, diffopt.sgd()
    with pytest.raises(ValueError, match=message):
        opt.update(params, grads, opt.init(params), opt.hparams())


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        ({"x": 0.1}, r"hparams.lr must be a prefix tree of params: hparams.lr\['y'\] is missing"),
        ({"x": 0.1, "y": 0.1, "z": 1.0}, r"hparams.lr\['z'\] is not expected there"),
        (
            {"x": 0.1, "Y": 0.1},
            r"lr\['y'\] is missing, and hparams.lr\['Y'\] is not expected there",
        ),
        ((0.1, 0.2), r"hparams.lr has type tuple, where type dict is expected"),
        (
            {"x": 0.1, "y": [0.1]},
            r"lr\['y'\] has type list, where a tensor of shape \(\) is expected",
        ),
        ({"x": [0.1, 0.2], "y": 0.1}, r"hparams.lr\['x'\]\[1\] is not expected there"),
        (torch.ones(3), r"hparams.lr has shape \(3,\), .* to params\['x'\]\[0\] of shape \(2,\)"),
        ({"x": torch.ones(1, 2), "y": 0.1}, r"lr\['x'\] has shape \(1, 2\), which does not"),
        ({"x": 0.1, "y": torch.tensor(True)}, r"hparams.lr\['y'\] has dtype torch.bool"),
    ],
)
def test_hyperparameters_that_are_no_prefix(lr, message):
    params, opt = {"x": [X], "y": Y}, diffopt.sgd()
    record = opt.hparams(lr=lr)
    with pytest.raises(ValueError, match=message):
        opt.update(params, params, opt.init(params), record)


@pytest.mark.parametrize("name", ["same tensor", "same parameter"])
def test_tied_tensors_are_refused(name):
    tied = X.clone() if name == "same tensor" else torch.nn.Parameter(X)
    params, opt = {"a": tied, "b": {"c": tied}}, diffopt.sgd()
    message = r"params\['b'\]\['c'\] and params\['a'\] are the same tensor"
    with pytest.raises(ValueError, match=message):
        opt.init(params)
    state = opt.init({"a": X.clone(), "b": {"c": X.clone()}})
    for update in (opt.update, opt.update_):
        with pytest.raises(ValueError, match=message):
            update(params, {"a": X, "b": {"c": X}}, state, opt.hparams())
    assert torch.equal(tied, X)


def test_memory_is_written_once():
    opt, memory = diffopt.sgd(), torch.zeros(4)
    for params, message in [
        ({"a": memory, "b": memory.view(4)}, r"params\['b'\] and params\['a'\] share memory"),
        ({"a": memory[:3], "b": memory[2:]}, r"params\['b'\] and params\['a'\] share memory"),
        ({"a": memory[::3], "b": memory[3:]}, r"params\['b'\] and params\['a'\] share memory"),
        ({"a": memory.view(2, 2), "b": memory.view(2, 2).T}, r"\['b'\] and params\['a'\] share"),
        ({"a": torch.zeros(1).expand(4), "b": memory}, r"params\['a'\] is an expanded tensor"),
        ({"a": memory.as_strided((2, 2), (1, 1))}, r"params\['a'\] is an expanded tensor"),
    ]:
        state, grads = opt.init(params), pytree.tree_map(torch.ones_like, params)
        with pytest.raises(ValueError, match=message):
            opt.update_(params, grads, state, opt.hparams(lr=1.0))
        assert not memory.any()
        assert state.step == 0


def test_an_expanded_tensor_is_refused_also_where_update_does_the_work():
    opt, p = diffopt.lbfgs(), torch.zeros(1).expand(4)
    with pytest.raises(ValueError, match="params is an expanded tensor"):
        opt.update_(p, torch.ones(4), opt.init(p), opt.hparams())
    assert not p.any()


@pytest.mark.parametrize(
    "split",
    [lambda m: [m[:2], m[2:]], lambda m: [m[::2], m[1::2]], lambda m: list(m.view(2, 2).T)],
    ids=["slices", "every other element", "columns"],
)
def test_views_that_share_no_element_are_updated(split):
    opt, memory = diffopt.sgd(), torch.zeros(4)
    params = split(memory)
    opt.update_(params, [X, 3 * X], opt.init([X, X.clone()]), opt.hparams(lr=1.0))
    torch.testing.assert_close(params, [-X, -3 * X])


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop", "adafactor", "muon"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, g: g.update(a=p["b"]), r"grads\['a'\] and params\['b'\] share memory"),
        (lambda p, g: g.update(b=p["a"].T), r"grads\['b'\] and params\['a'\] share memory"),
        (lambda p, g: g.update(a=p["a"].T), r"grads\['a'\] and params\['a'\] share memory"),
        (lambda p, g: g.update(lr=p["b"][0, 0]), r"hparams.lr and params\['b'\] share memory"),
        (lambda p, g: g.update(lr=p["a"]), r"hparams.lr and params\['a'\] share memory"),
    ],
)
def test_what_is_read_shares_no_memory_with_what_is_written(name, change, message):
    opt = getattr(diffopt, name)()
    params = {k: torch.ones(3, 3) for k in "ab"}
    given = {"a": torch.ones(3, 3), "b": None, "lr": 0.1}
    change(params, given)
    hp, state = opt.hparams(lr=given.pop("lr")), opt.init(params)
    with pytest.raises(ValueError, match=message):
        opt.update_(params, given, state, hp)
    assert all(p.eq(1).all() for p in params.values())
    assert state.step == 0


T = diffopt.transforms
ALIASED = [
    diffopt.sgd(),
    diffopt.adam(),
    diffopt.nadam(),
    diffopt.lbfgs(),
    T.chain(T.clip_by_global_norm(), diffopt.sgd()),
    T.partition({"x": diffopt.sgd(), "y": diffopt.adam()}, {"a": "x", "b": "y"}),
    T.ema(diffopt.sgd()),
    T.ema(T.accumulate(diffopt.adam(), 1)),
    T.hypergradient(diffopt.sgd()),
    T.flatten(diffopt.adam()),
]


def clones(tree):
    return pytree.tree_map_only(torch.Tensor, torch.clone, tree)


@pytest.mark.parametrize("given", ["hparams", "grads"])
@pytest.mark.parametrize("opt", ALIASED, ids=repr)
def test_what_is_read_may_be_anything_that_is_written_or_is_refused(opt, given):
    generator = torch.Generator().manual_seed(0)
    params = {k: torch.rand(2, 2, generator=generator, dtype=torch.float64) for k in "ab"}
    old = params, opt.update(params, params, opt.init(params), opt.hparams())[1]
    read, spec = pytree.tree_flatten(opt.hparams() if given == "hparams" else params)
    for i, k in itertools.product(range(len(pytree.tree_leaves(old))), range(len(read))):
        params, state = clones(old)
        written = pytree.tree_leaves((params, state))[i]
        if given == "hparams":
            written = written.reshape(-1)[:1].reshape(())
        elif written.shape != (2, 2):
            continue

        def arguments(value, k=k):
            leaves = [*clones(read[:k]), value, *clones(read[k + 1 :])]
            tree = pytree.tree_unflatten(leaves, spec)
            return (clones(old[0]), tree) if given == "hparams" else (tree, opt.hparams())

        grads, hp = arguments(written.clone())
        expected = opt.update(params, grads, state, hp)
        grads, hp = arguments(written)
        try:
            opt.update_(params, grads, state, hp)
        except ValueError:
            expected = old
        torch.testing.assert_close((params, state), expected, equal_nan=True)


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop", "adafactor", "muon"])
def test_gradients_may_share_memory_among_them_and_be_their_own_parameters(name):
    opt = getattr(diffopt, name)()
    params = {k: torch.arange(9.0).view(3, 3) + i for i, k in enumerate("abc")}
    grads = {"a": params["a"], **dict.fromkeys("bc", torch.ones(1, 1).expand(3, 3))}
    state, hp = opt.init(params), opt.hparams(lr=0.1)
    expected = opt.update(params, grads, state, hp)[0]
    opt.update_(params, grads, state, hp)
    torch.testing.assert_close(params, expected)


@pytest.mark.parametrize("leaf", ["a", "b"])
@pytest.mark.parametrize("field", ["lr", "weight_decay", "beta2"])
def test_a_buffer_is_no_hyperparameter(field, leaf):
    opt, params = diffopt.adam(), {k: torch.ones(2) for k in "ab"}
    state = opt.init(params)
    hp = opt.hparams(**{field: state.exp_avg[leaf]})
    message = rf"hparams.{field} and state.exp_avg\['{leaf}'\] share memory"
    with pytest.raises(ValueError, match=message):
        opt.update_(params, clones(params), state, hp)
    assert state.step == 0


def test_buffers_that_share_memory_are_refused():
    opt, params = diffopt.adam(), {"a": torch.ones(2)}
    shared = {"a": torch.zeros(2)}
    state = opt.init(params)._replace(exp_avg=shared, exp_avg_sq=shared)
    message = r"state.exp_avg_sq\['a'\] and state.exp_avg\['a'\] share memory"
    with pytest.raises(ValueError, match=message):
        opt.update_(params, params, state, opt.hparams())
    assert state.step == 0


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (3, TypeError, "state.step is 3 of type int, not a tensor"),
        (torch.zeros(2), ValueError, r"state.step has shape \(2,\), but must be a 0-d tensor"),
        (torch.zeros((), device="meta"), ValueError, "state.step has device meta, but params has"),
    ],
)
def test_the_step_is_a_scalar(step, error, message):
    opt = diffopt.sgd()
    state = opt.init(X)._replace(step=step)
    for update in (opt.update, opt.update_):
        with pytest.raises(error, match=message):
            update(X, X, state, opt.hparams())


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (torch.ones((), device="meta"), "hparams.lr has device meta, but params has device cpu"),
        (torch.ones((), dtype=torch.complex64), "hparams.lr has dtype torch.complex64"),
        (torch.tensor(True), "hparams.lr has dtype torch.bool, but must be real"),
    ],
)
def test_tensors_that_are_no_hyperparameter(lr, message):
    opt = diffopt.sgd()
    with pytest.raises(ValueError, match=message):
        opt.update(X, X, opt.init(X), opt.hparams(lr=lr))


# Records of hyperparameters


@hparams
class Numbers:
    rate: object = number(0.1, gt=0, le=1)
    weights: object = number(0.0, per_parameter=False)


def test_a_record_is_a_tree():
    record = Numbers(rate={"a": X, "b": 0.5})
    doubled = pytree.tree_map(lambda x: 2 * x, record)
    assert isinstance(doubled, Numbers)
    torch.testing.assert_close(doubled.rate["a"], 2 * X)
    assert doubled.rate["b"] == 1.0
    assert _tree.paths(record, "hparams") == [
        "hparams.rate['a']",
        "hparams.rate['b']",
        "hparams.weights",
    ]


def test_a_record_travels():
    record = diffopt.adam().hparams(lr={"a": X, "b": 0.5})
    for twin in (pickle.loads(pickle.dumps(record)), copy.deepcopy(record)):
        torch.testing.assert_close(twin.lr["a"], X)
        assert twin.beta1 == 0.9
    assert dataclasses.replace(record, lr=0.2).lr == 0.2


@pytest.mark.parametrize("make", [diffopt.sgd, diffopt.adam, diffopt.rmsprop, diffopt.adagrad])
def test_a_checkpoint_goes_on_as_if_unbroken(make, tmp_path):
    opt, params = make(), {"x": X, "y": Y}
    record, state = opt.hparams(lr={"x": torch.tensor(0.1), "y": 0.2}), opt.init(params)
    params, state = opt.update(params, params, state, record)
    torch.save((params, state, record), tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert [type(part) for part in loaded] == [dict, type(state), type(record)]
    torch.testing.assert_close(
        opt.update(loaded[0], loaded[0], *loaded[1:]), opt.update(params, params, state, record)
    )


def test_a_record_is_frozen_and_takes_keywords_only():
    record = diffopt.adam().hparams()
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.lr = 1.0
    with pytest.raises(TypeError):
        diffopt.adam().hparams(0.1)
    with pytest.raises(TypeError, match="has no hyperparameter 'betas': pass beta1 and beta2"):
        diffopt.adam().hparams(betas=(0.9, 0.99))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"rate": 0.0}, ValueError, r"^hparams.rate is 0.0, but must be > 0 and <= 1$"),
        ({"rate": 1.5}, ValueError, r"hparams.rate is 1.5, but must be > 0 and <= 1"),
        ({"rate": float("nan")}, ValueError, r"hparams.rate is nan, but must be"),
        ({"rate": {"a": [0.5, -1]}}, ValueError, r"hparams.rate\['a'\]\[1\] is -1, but must be"),
        ({"rate": "0.1"}, TypeError, r"hparams.rate is '0.1' of type str, not a number or a ten"),
        ({"rate": None}, TypeError, r"hparams.rate is None, not a number or a tensor"),
        ({"rate": diffopt.schedules.constant(0.1)}, TypeError, r"tensor: call it with the step"),
        (
            {"rate": torch.nn.ParameterDict({"a": 0.1, "b": "0.1"})},
            TypeError,
            r"rate\['b'\] is '0.1' of type str, not a number or a tensor",
        ),
        ({"rate": torch.nn.ReLU()}, TypeError, r"pass dict\(module.named_parameters\(\)\)"),
        ({"rate": True}, TypeError, r"hparams.rate is True of type bool"),
    ],
)
def test_numbers_are_checked_when_the_record_is_made(values, error, message):
    with pytest.raises(error, match=message):
        Numbers(**values)


def test_tensors_are_never_inspected():
    with torch.device("meta"):
        Numbers(rate=torch.empty(()))
    assert torch.vmap(lambda rate: Numbers(rate=rate).rate * 2)(-X).tolist() == [-2.0, -4.0]


@pytest.mark.parametrize("device", ["meta", "cuda"])
@pytest.mark.parametrize("name", ["adam", "adagrad", "nadam", "asgd", "rprop", "adafactor", "muon"])
def test_steps_of_tensors_without_values(name, device):
    opt = getattr(diffopt, name)()
    hp = opt.hparams(lr=0.1)
    with contextlib.nullcontext() if device == "meta" else FakeTensorMode():
        params, grads = (
            {k: torch.empty(3, 4, device=device) for k in "ab"} for _ in ("params", "grads")
        )
        state = opt.init(params)
        new, _ = opt.update(params, grads, state, hp)
        opt.update_(params, grads, state, hp)
    assert {(p.shape, p.device.type) for p in new.values()} == {((3, 4), device)}


def test_numpy_numbers_count_as_numbers():
    opt = diffopt.sgd()
    for rate in (np.float64(0.5), np.float32(0.5)):
        new, _ = opt.update(X, X, opt.init(X), opt.hparams(lr=rate))
        torch.testing.assert_close(new, 0.5 * X)


@pytest.mark.parametrize(
    "make",
    [
        lambda: diffopt.sgd(momentum=0.9),
        lambda: diffopt.sgd(nesterov=1),
        lambda: diffopt.adam(amsgrad="yes"),
        lambda: diffopt.rmsprop(centered=None),
        lambda: diffopt.adagrad(maximize=0),
    ],
)
def test_flags_are_no_numbers(make):
    with pytest.raises(TypeError, match=r"is .*, not a bool: pass numbers to hparams"):
        make()


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="nesterov=True requires momentum=True"):
        diffopt.sgd(nesterov=True, momentum=False)
    with pytest.raises(TypeError, match="momentum"):
        diffopt.sgd(momentum=False).hparams(momentum=0.9)


STRUCTURES = [
    torch.ones(2),
    3.0,
    None,
    (),
    [],
    {},
    [1, torch.ones(1)],
    [torch.ones(1), [1]],
    [[], torch.ones(1)],
    (torch.ones(1), 2),
    torch.ones(2).shape,
    Pair(1, torch.ones(1)),
    Pair((1, 2), {"a": 3}),
    {"a": 1, "b": torch.ones(1)},
    {"b": 1, "a": torch.ones(1)},
    collections.OrderedDict(a=1, b=[2, 3]),
    collections.defaultdict(list, a=1, b=2),
    collections.deque([1, 2]),
    [collections.deque([1, 2], maxlen=3), 1],
    Opaque(1),
    Box([1, 2]),
    diffopt.sgd().hparams(lr={"a": 0.1, "b": 0.2}),
    (diffopt.sgd().hparams(lr=0.1), [None]),
    (torch.return_types.max((torch.ones(1), torch.ones(1))), 1),
]


@pytest.mark.parametrize(
    "order", [STRUCTURES, STRUCTURES[::-1], [*STRUCTURES[6:9], STRUCTURES[6]] * 3]
)
def test_flattening_is_torchs_whatever_came_before(order):
    for tree in order:
        leaves, spec = _tree.flatten(tree)
        expected, expected_spec = pytree.tree_flatten(tree)
        assert len(leaves) == len(expected)
        assert all(x is y for x, y in zip(leaves, expected, strict=True))
        assert spec == expected_spec
        again = _tree.unflatten(range(len(leaves)), spec)
        other = pytree.tree_unflatten(range(len(leaves)), expected_spec)
        assert repr(again) == repr(other)
        assert repr(_tree.map(type, tree)) == repr(pytree.tree_map(type, tree))


def test_a_subclass_of_a_container_is_a_leaf():
    class Own(list):
        pass

    own = Own([1, 2])
    for tree, leaves in (([1, 2], [1, 2]), (own, [own]), ([1, own], [1, own]), ([1, [2]], [1, 2])):
        assert _tree.flatten(tree)[0] == leaves


@pytest.mark.parametrize("values", [[1], [1, 2, 3]])
def test_unflatten_wants_as_many_values_as_leaves(values):
    _, spec = _tree.flatten((torch.ones(1), [torch.ones(1)]))
    with pytest.raises(ValueError, match="leaves"):
        _tree.unflatten(values, spec)


def test_a_structure_that_came_first_is_forgotten():
    specs = [_tree.flatten({name: 1})[1] for name in "abcdefgh"]
    assert len(_tree._KNOWN[dict, 1]) == _tree._REMEMBERED
    for name, spec in zip("abcdefgh", specs, strict=True):
        assert _tree.unflatten([2], spec) == {name: 2}


@pytest.mark.parametrize("half", [np.float64(0.5), np.float32(0.5), np.array(0.5)], ids=repr)
@pytest.mark.parametrize("name", ["sgd", "adamw", "rprop", "asgd", "radam", "adafactor", "muon"])
def test_numbers_of_numpy_become_pythons(name, half):
    opt, params, grads = getattr(diffopt, name)(), [torch.ones(2, 2)], [torch.ones(2, 2)]
    results = []
    for lr in (half, [half], 0.5):
        hp = opt.hparams(lr=lr)
        assert all(type(number) is float for number in _tree.leaves(hp.lr))
        results.append(opt.update(params, grads, opt.init(params), hp)[0])
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0)
    torch.testing.assert_close(results[1], results[2], rtol=0, atol=0)


def test_an_array_of_several_numbers_is_refused():
    with pytest.raises(TypeError, match=r"hparams.lr is .* not a number or a tensor"):
        diffopt.sgd().hparams(lr=np.ones(2))
