"""A tensor whose first gradient comes late has its initial state by then."""

import copy

import pytest
import torch
from torch.utils import _pytree as pytree

import diffopt
from diffopt import optim
from diffopt.adjoint import Checkpointed, ForwardMode, Unrolled
from diffopt.rules import Leafwise
from diffopt.transforms import (
    accumulate,
    chain,
    clip_by_global_norm,
    ema,
    flatten,
    freeze,
    masked,
    maximize,
    partition,
    precision,
    skip_nonfinite,
)
from emulated_gpu import DEVICE, cuda, emulated
from registry import REGISTRY

RULES = {name: case for name, case in REGISTRY.items() if isinstance(case.optimizer, Leafwise)}
INITIAL = {
    "nadam": {"lr": 0.1, "beta1": 0.8, "momentum_decay": 0.1, "weight_decay": 0.05},
    "asgd": {"lr": 0.1, "lambd": 0.1, "alpha": 0.6, "t0": 1.5},
    "rprop": {"lr": 0.1, "etaplus": 1.3, "step_size_max": 0.15},
    "adagrad": {"lr": 0.1, "initial_accumulator_value": 0.2, "lr_decay": 0.1},
}
ORDERS = ["eellb", "nnelb", "eeebb"]  # per step: early, late, both or none
USED = {"e": {"early"}, "l": {"late"}, "b": {"early", "late"}, "n": set()}
F64 = torch.float64


def normal(shape, seed, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tree(shapes, seed, dtype=F64):
    pairs = zip(("early", "late"), shapes, strict=True)
    return {name: normal(shape, seed + i, dtype) for i, (name, shape) in enumerate(pairs)}


def all_grads(params, order):
    """For each step a tree of gradients, None where the order has none."""
    for t, who in enumerate(order):
        shapes = [p.shape for p in params.values()]
        grads = tree(shapes, 10 + 2 * t, next(iter(params.values())).dtype)
        yield {k: g if k in USED[who] else None for k, g in grads.items()}


def run(opt, params, hp, order, in_place=False):
    params, state = dict(params), opt.init(params)
    if in_place:
        params = {k: p.clone() for k, p in params.items()}
    for grads in all_grads(params, order):
        if in_place:
            opt.update_(params, grads, state, hp)
        else:
            params, state = opt.update(params, grads, state, hp)
    return params


def alone(opt, params, hp, order, name):
    """One tensor of the tree, with initial values put into its state by hand."""
    p = params[name]
    state = opt.init(p)
    for field, value in opt.initial(hp).items():
        old = getattr(state, field)
        new = torch.view_as_complex(torch.view_as_real(old) + value) if old.is_complex() else None
        state = state._replace(**{field: old + value if new is None else new})
    began = False
    for t, grads in enumerate(all_grads(params, order)):
        if grads[name] is not None:
            # The first step of the tree adds initial values by itself.
            state = opt.init(p) if t == 0 else state
            state = state._replace(step=torch.full_like(state.step, t))
            p, state = opt.update(p, grads[name], state, hp)
            began = True
    assert began
    return p


def expected(opt, params, hp, order):
    return {name: alone(opt, params, hp, order, name) for name in params}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", RULES)
def test_initial_values_are_there_at_the_first_gradient(name, order):
    case = RULES[name]
    opt, hp, params = case.optimizer, case.record(), tree(case.shapes[:2], 0)
    right = expected(opt, params, hp, order)
    torch.testing.assert_close(run(opt, params, hp, order), right)
    torch.testing.assert_close(run(opt, params, hp, order, in_place=True), right)


@pytest.mark.parametrize("way", ["leaf", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("shapes", [[(3,), (2, 2)], [(2,), ()], [(), (0,)]])
@pytest.mark.parametrize("name", INITIAL)
def test_dtypes_and_shapes(name, shapes, dtype, way):
    opt = getattr(diffopt, name)(execution=way)
    hp, params = opt.hparams(**INITIAL[name]), tree(shapes, 0, dtype)
    right = expected(opt, params, hp, "eelb")
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if dtype is torch.bfloat16 else {}
    with torch.no_grad():
        torch.testing.assert_close(run(opt, params, hp, "eelb"), right, **tolerance)
        found = run(opt, params, hp, "eelb", in_place=True)
    torch.testing.assert_close(found, right, **tolerance)


@pytest.mark.parametrize("kind", ["tensor", "prefix", "weights"])
@pytest.mark.parametrize("name", INITIAL)
def test_hyperparameters_of_every_shape(name, kind):
    opt, params = getattr(diffopt, name)(), tree([(3,), (2, 2)], 0)

    def spread(value, like):
        return {
            "tensor": torch.tensor(value),
            "prefix": {"early": value, "late": 0.9 * value},
            "weights": pytree.tree_map(lambda p: value * (1 - 0.1 * torch.tanh(p.abs())), like),
        }[kind]

    def record(like):
        return opt.hparams(**{k: spread(v, like) for k, v in INITIAL[name].items()})

    found = run(opt, params, record(params), "nelb")
    if kind != "weights":  # whose state may grow in update_ only
        torch.testing.assert_close(run(opt, params, record(params), "nelb", in_place=True), found)
    values = {k: spread(v, params) for k, v in INITIAL[name].items()}
    own = opt.hparams(**{k: v["late"] if isinstance(v, dict) else v for k, v in values.items()})
    torch.testing.assert_close(found["late"], alone(opt, params, own, "nelb", "late"))


@pytest.mark.parametrize(
    ("name", "hparams"),
    [
        ("rprop", {"lr": 0.1}),
        ("adagrad", {"lr": 0.1, "initial_accumulator_value": 0.3, "weight_decay": 0.1}),
        ("asgd", {"lr": 0.1, "lambd": 0.0, "weight_decay": 0.1}),
    ],
)
def test_values_are_torchs_where_no_count_matters(name, hparams):
    cls = {"rprop": "Rprop", "adagrad": "Adagrad", "asgd": "ASGD"}[name]
    opt, params = getattr(diffopt, name)(), tree([(3,), (2, 2)], 0)
    for make in (getattr(torch.optim, cls), getattr(optim, cls)):
        theirs = {k: p.clone().requires_grad_() for k, p in params.items()}
        reference = make(theirs.values(), **hparams)
        for grads in all_grads(params, "eelbb"):
            for k, p in theirs.items():
                p.grad = grads[k]
            reference.step()
        found = run(opt, params, opt.hparams(**hparams), "eelbb")
        torch.testing.assert_close(found, {k: p.detach() for k, p in theirs.items()})


def test_nadam_is_its_formula():
    params, hp = tree([(3,), (2, 2)], 0), {"lr": 0.1, "beta1": 0.8, "momentum_decay": 0.1}
    opt = diffopt.nadam()
    p, product, m, v = params["late"], 1.0, 0.0, 0.0
    for t, grads in enumerate(all_grads(params, "eelb"), 1):
        if grads["late"] is None:
            continue
        mu, after = (0.8 * (1 - 0.5 * 0.96 ** (0.1 * when)) for when in (t, t + 1))
        g, product = grads["late"], product * mu
        m, v = 0.8 * m + 0.2 * g, 0.999 * v + 0.001 * g * g
        step = (1 - mu) / (1 - product) * g + after / (1 - product * after) * m
        p = p - 0.1 * step / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    found = run(opt, params, opt.hparams(**hp), "eelb")["late"]
    torch.testing.assert_close(found, p)


@pytest.mark.parametrize("name", INITIAL)
def test_params_without_gradient_are_the_same_objects_and_state_changes_once(name):
    opt, params = getattr(diffopt, name)(), {"early": torch.ones(2), "late": torch.tensor(1.0)}
    hp, state = opt.hparams(**INITIAL[name]), opt.init(params)
    grads = {"early": torch.ones(2), "late": None}
    new, first = opt.update(params, grads, state, hp)
    _, second = opt.update(new, grads, first, hp)
    assert new["late"] is params["late"]
    for field in opt.buffer_names:
        begun = opt.initial(hp).get(field, 0.0)
        assert torch.equal(getattr(state, field)["late"], torch.zeros_like(params["late"]))
        torch.testing.assert_close(getattr(first, field)["late"].item(), begun)
        assert getattr(second, field)["late"] is getattr(first, field)["late"]
    version = params["late"]._version
    opt.update_(params, grads, state, hp)
    assert params["late"]._version == version
    torch.testing.assert_close(state, first)


@pytest.mark.parametrize("name", ["asgd", "rprop", "adagrad"])
def test_initial_values_are_those_of_the_first_step(name):
    opt, params = getattr(diffopt, name)(), {"early": torch.ones(1), "late": torch.ones(1)}
    field = "initial_accumulator_value" if name == "adagrad" else "lr"
    rates = [{**INITIAL[name], field: value} for value in (0.1, 0.2, 0.2)]
    state = opt.init(params)
    for rate in rates:
        grads = {"early": torch.ones(1), "late": None}
        params, state = opt.update(params, grads, state, opt.hparams(**rate))
    buffer = {"asgd": "eta", "rprop": "step_size", "adagrad": "sum"}[name]
    torch.testing.assert_close(getattr(state, buffer)["late"].item(), 0.1)


@pytest.mark.parametrize("name", RULES)
def test_derivatives_of_first_and_second_order(name):
    case = RULES[name]
    if name == "muon":
        pytest.skip("bfloat16 is too coarse")
    opt, params = case.optimizer, tree(case.shapes[:2], 0)
    numbers, spec = pytree.tree_flatten(case.interior())
    grads = [g["late"] for g in all_grads(params, "lll")]

    def late(p, g1, g2, *numbers):
        both, hp = {"early": p, "late": p * 1}, pytree.tree_unflatten(numbers, spec)
        state = opt.init(both)
        for g in (None, None, g1, g2):
            both, state = opt.update(both, {"early": None, "late": g}, state, hp)
        return both["late"]

    inputs = [params["late"], *grads[:2], *numbers]
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(late, inputs)
    assert torch.autograd.gradgradcheck(late, inputs, atol=1e-4)


@pytest.mark.parametrize("name", ["rprop", "asgd", "adagrad"])
def test_the_initial_value_carries_its_derivative(name):
    opt, field = getattr(diffopt, name)(), "lr"
    if name == "adagrad":
        field = "initial_accumulator_value"

    def late(value):
        hp, none = opt.hparams(**{**INITIAL[name], field: value}), {"early": None, "late": None}
        params = {"early": torch.ones(1, dtype=F64), "late": torch.ones(1, dtype=F64)}
        state = opt.init(params)
        own = opt.hparams(**INITIAL[name])  # of later steps
        params, state = opt.update(params, none, state, hp)
        for _ in range(2):
            params, state = opt.update(params, {**none, "late": params["late"]}, state, own)
        return params["late"]

    value = torch.tensor(0.11, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(late(value), value)
    h = 1e-6
    with torch.no_grad():
        torch.testing.assert_close(grad, ((late(value + h) - late(value - h)) / (2 * h))[0])
    assert grad != 0
    assert torch.autograd.gradgradcheck(late, value)


@pytest.mark.parametrize("name", INITIAL)
def test_vmap(name):
    opt, params = getattr(diffopt, name)(), tree([(3,), (2, 2)], 0)

    def end(lr):
        return run(opt, params, opt.hparams(**{**INITIAL[name], "lr": lr}), "neelb")

    rates = torch.tensor([0.05, 0.1], dtype=F64)
    found = torch.vmap(end, randomness="same")(rates)
    torch.testing.assert_close(
        found, pytree.tree_map(lambda *x: torch.stack(x), *map(end, rates.unbind()))
    )


@pytest.mark.parametrize("name", INITIAL)
def test_compiled_steps(name):
    opt, params = getattr(diffopt, name)(), tree([(3,), (2, 2)], 0)
    hp, step = opt.hparams(**INITIAL[name]), torch.compile(opt.update, backend="eager")
    new, state = params, opt.init(params)
    for grads in all_grads(params, "eelb"):
        new, state = step(new, grads, state, hp)
    torch.testing.assert_close(new, expected(opt, params, hp, "eelb"))


def test_compiled_steps_in_place_which_leave_the_graph():
    opt, params = diffopt.adagrad(), tree([(3,), (2, 2)], 0)
    hp, step = opt.hparams(**INITIAL["adagrad"]), torch.compile(opt.update_, backend="eager")
    new, state = pytree.tree_map(torch.clone, params), opt.init(params)
    for grads in all_grads(params, "el"):
        step(new, grads, state, hp)
    torch.testing.assert_close(new, expected(opt, params, hp, "el"))


@pytest.mark.parametrize("name", INITIAL)
@pytest.mark.parametrize("in_place", [False, True])
def test_steps_on_a_gpu_do_not_wait(name, in_place, monkeypatch):
    opt = getattr(diffopt, name)()
    hp = opt.hparams(**INITIAL[name])
    with emulated(monkeypatch):
        params = {k: cuda(p.float()) for k, p in tree([(3,), (2, 2)], 0).items()}
        state = opt.init(params)
        for t, who in enumerate("eeeelb"):
            if t == 2:
                DEVICE.reset()
            grads = {k: torch.ones_like(p) if k in USED[who] else None for k, p in params.items()}
            if in_place:
                opt.update_(params, grads, state, hp)
            else:
                with torch.no_grad():
                    params, state = opt.update(params, grads, state, hp)
        assert DEVICE.count("wait") == 0


COMPOSED = {
    "chain": lambda opt: chain(clip_by_global_norm(), opt),
    "partition": lambda opt: partition({"x": opt}, "x"),
    "masked": lambda opt: masked(opt, True),
    "freeze": lambda opt: freeze(opt, {"early": True, "late": False}),
    "accumulate": lambda opt: accumulate(opt, 1),
    "ema": ema,
    "flatten": flatten,
    "flatten-chain": lambda opt: flatten(chain(clip_by_global_norm(), opt)),
    "maximize": maximize,
    "skip": skip_nonfinite,
    "precision": lambda opt: precision(opt, state_dtype=None),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("composition", COMPOSED)
@pytest.mark.parametrize("name", INITIAL)
def test_compositions(name, composition, in_place):
    inner, params = getattr(diffopt, name)(), tree([(3,), (2, 2)], 0)
    opt = COMPOSED[composition](inner)
    more = {"max_norm": 1e9} if "chain" in composition else {}
    found = run(opt, params, opt.hparams(**INITIAL[name], **more), "enelb", in_place)["late"]
    if composition == "maximize":
        inner = getattr(diffopt, name)(maximize=True)
    hp = inner.hparams(**INITIAL[name])
    torch.testing.assert_close(found, alone(inner, params, hp, "enelb", "late"))


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("master_dtype", [None, torch.float32])
@pytest.mark.parametrize("name", INITIAL)
def test_precision_in_place(name, master_dtype, state_dtype):
    inner, params = getattr(diffopt, name)(), tree([(3,), (2, 2)], 0, torch.bfloat16)
    opt = precision(inner, state_dtype=state_dtype, master_dtype=master_dtype, stochastic=False)
    hp = opt.hparams(**INITIAL[name])
    right = run(opt, params, hp, "enelb")
    torch.testing.assert_close(run(opt, params, hp, "enelb", in_place=True), right, rtol=0, atol=0)
    exact = alone(inner, pytree.tree_map(torch.Tensor.double, params), hp, "enelb", "late")
    torch.testing.assert_close(right["late"].double(), exact, rtol=2e-2, atol=2e-2)


def test_flatten_keeps_the_order_of_a_history():
    params, opt = tree([(3,), (2, 2)], 0), diffopt.lbfgs()
    hp = opt.hparams(lr=0.1)
    torch.testing.assert_close(
        run(flatten(opt), params, hp, "blbeb"), run(opt, params, hp, "blbeb")
    )


@pytest.mark.parametrize("name", ["Rprop", "Adagrad"])
def test_from_pure_and_to_pure(name):
    params = tree([(3,), (2, 2)], 0)
    opt, hparams = getattr(diffopt, name.lower())(), INITIAL[name.lower()]
    hparams = {k: v for k, v in hparams.items() if k in ("lr", "initial_accumulator_value")}
    theirs = [p.clone().requires_grad_() for p in params.values()]
    mine = copy.deepcopy(theirs)
    composed = optim.from_pure(chain(clip_by_global_norm(), opt), mine, max_norm=1e9, **hparams)
    reference = getattr(torch.optim, name)(theirs, **hparams)
    for t, grads in enumerate(all_grads(params, "eelb")):
        if t == 2:
            pure = optim.to_pure(reference)
        for p, q, g in zip(theirs, mine, grads.values(), strict=True):
            p.grad, q.grad = g, g
        reference.step()
        composed.step()
    torch.testing.assert_close(mine, theirs)
    new, state = pure.params, pure.state
    for grads in [*all_grads(params, "eelb")][2:]:
        new, state = pure.optimizer.update(new, [*grads.values()], state, pure.hparams)
    torch.testing.assert_close(new, [p.detach() for p in theirs])


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed(), Checkpointed(2), ForwardMode()])
@pytest.mark.parametrize("name", INITIAL)
def test_loops_whose_first_steps_do_not_use_a_head(name, adjoint):
    opt, target = getattr(diffopt, name)(), normal((2,), 5)
    fields = {k: torch.tensor(v, dtype=F64, requires_grad=True) for k, v in INITIAL[name].items()}
    params = {"body": normal((2,), 0), "heads": [normal((2,), 1), normal((2,), 2)]}

    def loss(params, head):
        return ((params["body"] * params["heads"][head]).tanh() - target).square().sum()

    def objective(params):
        return sum(leaf.cos().sum() for leaf in pytree.tree_leaves(params))

    order, hp = [0, 0, 1, 0, 1], opt.hparams(**fields)
    sol = diffopt.minimize(
        loss, params, optimizer=opt, hparams=hp, batches=[(h,) for h in order], adjoint=adjoint
    )
    found = torch.autograd.grad(objective(sol.params), fields.values(), allow_unused=True)

    new, state = pytree.tree_map(lambda p: p.clone().requires_grad_(), params), opt.init(params)
    for head in order:
        leaves, spec = pytree.tree_flatten(new)
        grads = torch.autograd.grad(loss(new, head), leaves, create_graph=True, allow_unused=True)
        new, state = opt.update(new, pytree.tree_unflatten(list(grads), spec), state, hp)
    right = torch.autograd.grad(objective(new), fields.values(), allow_unused=True)
    torch.testing.assert_close(sol.params, new)
    for mine, theirs in zip(found, right, strict=True):
        zero = torch.zeros((), dtype=F64)
        torch.testing.assert_close(
            zero if mine is None else mine, zero if theirs is None else theirs
        )


@pytest.mark.parametrize("name", ["NAdam", "ASGD", "Rprop", "Adagrad", "Adam"])
def test_copying_back_leaves_the_state_of_what_no_loss_used(name):
    net = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 1), "head": torch.nn.Linear(2, 1)})
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=0.1)
    head = net["head"].weight
    before = copy.deepcopy(optimizer.state.get(head))
    with diffopt.innerloop(net, optimizer) as (copied, inner):
        for _ in range(2):
            inner.step(copied["used"](torch.ones(2)).sum())
    inner.copy_back()
    torch.testing.assert_close(optimizer.state.get(head), before)
    assert optimizer.state[net["used"].weight]["step"] == 2
