"""Fields of the state in the shape of hyperparameters: one number where these are numbers."""

import copy
import dataclasses

import pytest
import torch
from torch.nn import Parameter
from torch.utils import _pytree as pytree

import diffopt
from diffopt import optim
from diffopt.adjoint import (
    Checkpointed,
    Evolution,
    FirstOrder,
    ForwardMode,
    Implicit,
    OneStep,
    Truncated,
    Unrolled,
)
from diffopt.transforms import accumulate, chain, clip_by_global_norm, ema, flatten, masked
from emulated_gpu import DEVICE, cuda, emulated
from registry import REGISTRY

SHAPES = [(3, 4), (5,), (), (2, 1, 3)]
RULES = {
    "nadam": {"lr": 0.1, "beta1": 0.8, "momentum_decay": 0.1, "weight_decay": 0.05},
    "asgd": {"lr": 0.1, "lambd": 0.1, "alpha": 0.6, "t0": 1.5},
}
NUMBERS = {"nadam": ("mu_product",), "asgd": ("eta", "mu")}
WAYS = ("leaf", "auto", "foreach")


def normal(shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tree(seed=0, dtype=torch.float64):
    return {f"p{i}": normal(shape, seed + i, dtype) for i, shape in enumerate(SHAPES)}


def clone(value):
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, value)


def rule(name, way="auto"):
    return getattr(diffopt, name)(execution=way)


def per_weight(value, params):
    return pytree.tree_map(lambda p: value * (1 - 0.1 * torch.tanh(p.abs())), params)


KINDS = {
    "numbers": lambda value, params: value,
    "tensors": lambda value, params: torch.tensor(value, dtype=torch.float64),
    "prefix": lambda value, params: {k: value * (1 - 0.1 * i) for i, k in enumerate(params)},
    "weights": per_weight,
}


def record(opt, name, kind, params):
    return opt.hparams(**{k: KINDS[kind](v, params) for k, v in RULES[name].items()})


def expanded(state, params, name):
    """The state with the numbers in the shape of the parameters."""
    wide = {
        field: pytree.tree_map(lambda x, p: x.expand(p.shape).to(p), getattr(state, field), params)
        for field in NUMBERS[name]
    }
    return state._replace(**wide)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_leaf_of_a_state_is_a_count_a_tensor_like_its_parameter_or_a_declared_number(name):
    case = REGISTRY[name]
    opt = case.optimizer
    if not isinstance(opt, diffopt.rules.Leafwise):
        pytest.skip("a composition, made of these")
    params = [normal(shape, i) for i, shape in enumerate(case.shapes)]
    grads = [torch.ones_like(p) for p in params]
    state = opt.init(params)
    for _ in range(2):
        assert state.step.shape == ()
        for field in opt.buffer_names:
            for x, p in zip(getattr(state, field), params, strict=False):
                own = opt.shapes(p.shape)
                if field in opt.per_hyperparameter:
                    assert x.shape == ()
                    assert x.dtype == torch.float64
                elif own is None:
                    assert x.shape == p.shape
                else:
                    assert x.shape == tuple(own[opt.buffer_names.index(field)])
        params, state = opt.update(params, grads, state, case.record())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RULES)
def test_numbers_have_the_shape_of_their_hyperparameters(name, kind):
    opt, params = rule(name), tree()
    params, state = opt.update(params, tree(9), opt.init(params), record(opt, name, kind, params))
    for field in NUMBERS[name]:
        for key, x in getattr(state, field).items():
            weights = kind == "weights" and params[key].dim()
            assert x.shape == (params[key].shape if weights else ())


def test_a_number_has_the_shape_of_no_other_hyperparameter():
    opt, params = diffopt.nadam(), {"w": normal((3, 4), 0)}
    for lr, beta1, shape in [
        (torch.rand(3, 4), 0.9, ()),
        (0.1, torch.full((4,), 0.5), (4,)),
        (0.1, torch.full((3, 1), 0.5), (3, 1)),
    ]:
        hp = opt.hparams(lr=lr, beta1=beta1)
        _, state = opt.update(params, params, opt.init(params), hp)
        assert state.mu_product["w"].shape == shape


SEQUENCES = [
    ("numbers", "numbers", "numbers", "numbers"),
    ("numbers", "tensors", "prefix", "numbers"),
    ("weights", "weights", "weights", "weights"),
    ("numbers", "weights", "numbers", "weights"),
    ("prefix", "weights", "tensors", "prefix"),
]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kinds", SEQUENCES)
@pytest.mark.parametrize("name", RULES)
def test_values_are_those_of_numbers_kept_for_every_weight(name, kinds, way, in_place):
    reference, opt = rule(name, "leaf"), rule(name, way)
    right, params = tree(), tree()
    expected, state = expanded(reference.init(right), right, name), opt.init(params)
    for t, kind in enumerate(kinds):
        grads = tree(20 + t)
        if t in (1, 2):  # from here on the numbers of the leaves differ
            grads[f"p{t}"] = None
        hp = record(opt, name, kind, tree())
        right, expected = reference.update(right, grads, expected, hp)
        if in_place:
            opt.update_(params, grads, state, hp)
        else:
            params, state = opt.update(params, grads, state, hp)
    torch.testing.assert_close(params, right, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(expanded(state, params, name), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RULES)
def test_the_ways_agree_in_other_dtypes(name, kind, dtype):
    ends = []
    for way in WAYS:
        for in_place in (False, True):
            opt, params = rule(name, way), tree(dtype=dtype)
            state = opt.init(params)
            hp = record(opt, name, kind, tree())
            for t in range(3):
                if in_place:
                    opt.update_(params, tree(20 + t, dtype), state, hp)
                else:
                    params, state = opt.update(params, tree(20 + t, dtype), state, hp)
            for field in NUMBERS[name]:
                assert not any(x.is_complex() for x in getattr(state, field).values())
            ends.append((params, state))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0])


@pytest.mark.parametrize("name", RULES)
def test_the_pure_rule_agrees_with_the_class(name):
    params = tree()
    module = [Parameter(p.clone()) for p in params.values()]
    optimizer = getattr(optim, {"nadam": "NAdam", "asgd": "ASGD"}[name])(
        module,
        **{k: v for k, v in RULES[name].items() if k != "beta1"},
    )
    opt = rule(name)
    state = opt.init(params)
    hp = opt.hparams(**{k: v for k, v in RULES[name].items() if k != "beta1"})
    for t in range(4):
        grads = tree(20 + t)
        for p, g in zip(module, grads.values(), strict=True):
            p.grad = g
        optimizer.step()
        opt.update_(params, grads, state, hp)
    torch.testing.assert_close(
        [p.detach() for p in module], list(params.values()), rtol=1e-6, atol=0
    )
    pure, _, converted, _ = optim.to_pure(optimizer)
    assert pure == opt
    for field in NUMBERS[name]:
        for x, y in zip(getattr(converted, field), getattr(state, field).values(), strict=True):
            assert (x.shape, x.dtype) == ((), torch.float64)
            torch.testing.assert_close(x, y, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["tensors", "weights"])
@pytest.mark.parametrize("name", RULES)
def test_derivatives_through_numbers_that_grow_are_right_to_second_order(name, kind):
    opt, start = rule(name), {"w": normal((2, 1), 1)}
    names = list(RULES[name])
    values = [
        torch.as_tensor(KINDS[kind](v, start)["w"] if kind == "weights" else v)
        for v in RULES[name].values()
    ]
    values = [v.double().clone().requires_grad_() for v in values]

    def end(w, *values):
        params = {"w": w}
        state, hp = opt.init(params), opt.hparams(**dict(zip(names, values, strict=True)))
        for _ in range(3):
            grads = {"w": torch.sin(params["w"]) + params["w"]}
            params, state = opt.update(params, grads, state, hp)
        return params["w"]

    inputs = (start["w"].clone().requires_grad_(), *values)
    torch.autograd.gradcheck(end, inputs, check_forward_ad=True)
    torch.autograd.gradgradcheck(end, inputs, fast_mode=True)


def quadratic(params):
    return sum((p - 0.3).square().sum() + torch.sin(p).sum() for p in params.values())


EXACT = [Unrolled(), Checkpointed(), Checkpointed(segments=4), ForwardMode()]
BIASED = [
    FirstOrder(),
    Truncated(2),
    OneStep(),
    None,
    Evolution(samples=2),
    Evolution(samples=2, persistent=2, chunk_size=4),
    Implicit(root_tolerance=1e3),
]


@pytest.mark.parametrize("kind", ["numbers", "weights"])
@pytest.mark.parametrize("name", RULES)
def test_loops_take_states_that_grow(name, kind):
    opt = rule(name)

    def solve(adjoint, **options):
        leaves = {"w": normal((2, 3), 1).requires_grad_(), "b": normal((), 2).requires_grad_()}
        lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
        hp = dataclasses.replace(record(opt, name, kind, leaves), lr=lr)
        if isinstance(adjoint, Implicit):  # which refuses a decay
            none = [f.name for f in dataclasses.fields(hp) if f.name in ("weight_decay", "lambd")]
            hp = dataclasses.replace(hp, **dict.fromkeys(none, 0.0))
        hp = pytree.tree_map(
            lambda x: x.detach() if isinstance(x, torch.Tensor) and x is not lr else x, hp
        )
        solution = diffopt.minimize(
            quadratic, leaves, optimizer=opt, hparams=hp, steps=5, adjoint=adjoint, **options
        )
        return solution, [*leaves.values(), lr]

    right, inputs = solve(Unrolled())
    expected = torch.autograd.grad(quadratic(right.params), inputs)
    for adjoint in EXACT:
        for options in ({}, {"tol": 1e-9}):
            found, inputs = solve(adjoint, **options)
            torch.testing.assert_close(found.params, right.params)
            torch.testing.assert_close(found.state, right.state)
            grads = torch.autograd.grad(quadratic(found.params), inputs)
            torch.testing.assert_close(grads, expected)
    for adjoint in BIASED:
        found, _ = solve(adjoint)
        if not isinstance(adjoint, Implicit):
            torch.testing.assert_close(found.params, right.params)


@pytest.mark.parametrize("kind", ["tensors", "weights"])
@pytest.mark.parametrize("name", RULES)
def test_models_stacked_by_vmap_have_numbers_of_their_own(name, kind):
    opt = rule(name)

    def steps(params, state, scale):
        hp = record(opt, name, kind, params)
        hp = pytree.tree_map(lambda x: x * scale, hp)
        for _ in range(3):
            params, state = opt.update(params, params, state, hp)
        return params, state

    models = [tree(10 * k) for k in range(3)]
    stacked = pytree.tree_map(lambda *xs: torch.stack(xs), *models)
    scales = torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64)
    states = torch.vmap(opt.init)(stacked)
    assert all(x.shape == (3,) for field in NUMBERS[name] for x in getattr(states, field).values())
    found = torch.vmap(steps)(stacked, states, scales)
    alone = [steps(m, opt.init(m), s) for m, s in zip(models, scales, strict=True)]
    torch.testing.assert_close(found, pytree.tree_map(lambda *xs: torch.stack(xs), *alone))


@pytest.mark.parametrize("name", RULES)
def test_a_compiled_step_takes_a_state_that_grows(name):
    opt, params = rule(name), {"w": normal((3, 4), 0)}
    hp = record(opt, name, "weights", params)
    torch.compiler.reset()
    compiled = torch.compile(opt.update, backend="aot_eager", fullgraph=True)
    right, expected = params, opt.init(params)
    state = opt.init(params)
    for t in range(3):
        grads = {"w": normal((3, 4), 20 + t)}
        params, state = compiled(params, grads, state, hp)
        right, expected = opt.update(right, grads, expected, hp)
    torch.testing.assert_close((params, state), (right, expected))


@pytest.mark.parametrize("kind", ["numbers", "weights"])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "compose",
    [
        lambda opt: chain(clip_by_global_norm(), opt),
        lambda opt: accumulate(opt, k=2),
        lambda opt: ema(opt),
        lambda opt: masked(opt, {"p0": True, "p1": True, "p2": False, "p3": True}),
        lambda opt: diffopt.transforms.skip_nonfinite(opt),
        flatten,
    ],
)
def test_compositions_take_numbers_that_grow_also_in_place(compose, name, kind):
    opt = compose(rule(name))
    own = {k: KINDS[kind](v, tree()) for k, v in RULES[name].items()}
    hp = opt.hparams(**own)
    ends = []
    for in_place in (False, True):
        params = tree()
        state = opt.init(params)
        for t in range(4):
            grads = tree(20 + t)
            grads["p1"] = None if t == 2 and compose is flatten else grads["p1"]
            if in_place:
                opt.update_(params, grads, state, hp)
            else:
                params, state = opt.update(params, grads, state, hp)
        ends.append((params, state))
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("name", RULES)
def test_flatten_leaves_the_number_of_a_tensor_without_a_gradient(name):
    params, opt = [normal((3,), 1), normal((2,), 2)], rule(name)
    flat = flatten(opt)
    hp = opt.hparams(**RULES[name])
    ends = []
    for optimizer in (opt, flat):
        moved, state = params, optimizer.init(params)
        for t in range(4):
            grads = [normal((3,), 10 + t), None if t in (1, 2) else normal((2,), 20 + t)]
            moved, state = optimizer.update(moved, grads, state, hp)
        ends.append(moved)
    torch.testing.assert_close(*ends)


def test_a_number_that_may_not_grow_is_refused_before_anything_changes():
    opt, params = diffopt.nadam(), normal((2, 3), 0)
    hp = opt.hparams(beta1=torch.rand(3))

    def step(params, grads, state):
        opt.update_(params, grads, state, hp)
        return params

    batch, state = normal((4, 2, 3), 0), opt.init(params)
    states = pytree.tree_map(lambda x: torch.stack([x] * 4), state)
    before = clone((batch, states))
    with pytest.raises(
        ValueError, match=r"state.mu_product has shape \(\), .* first step with update"
    ):
        torch.vmap(step)(batch, batch, states)
    torch.testing.assert_close((batch, states), before)


BAD = [
    (
        torch.zeros(5),
        r"state.mu_product\['w'\] has shape \(5,\), which does not broadcast to params",
    ),
    (torch.zeros((), dtype=torch.int64), "has dtype torch.int64, but must be floating-point"),
    (
        torch.zeros((), dtype=torch.complex64),
        "has dtype torch.complex64, but must be floating-point",
    ),
    (torch.zeros((), device="meta"), "has device meta"),
    (torch.zeros(1).to_sparse(), "has layout torch.sparse_coo, but must be dense"),
]


@pytest.mark.parametrize(("number", "message"), BAD)
def test_a_wrong_number_is_refused(number, message):
    opt, params = diffopt.nadam(), {"w": normal((2, 3), 0)}
    state = opt.init(params)._replace(mu_product={"w": number})
    for update in (opt.update, opt.update_):
        with pytest.raises(ValueError, match=message):
            update(params, params, state, opt.hparams())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*RULES, "adam", "rprop"])
def test_negated_views_are_written_to(name, way):
    opt, params = getattr(diffopt, name)(execution=way), tree()
    hp, grads = opt.hparams(**RULES.get(name, {"lr": 0.1})), tree(9)
    state = opt.update(params, grads, opt.init(params), hp)[1]
    expected = opt.update(params, grads, state, hp)
    params, state = pytree.tree_map(lambda x: torch._neg_view(-x), (params, state))
    opt.update_(params, grads, state, hp)
    torch.testing.assert_close((params, state), expected)


@pytest.mark.parametrize("name", RULES)
def test_a_state_survives_copies_and_files(name, tmp_path):
    opt, params = rule(name), tree()
    hp = opt.hparams(**RULES[name])
    params, state = opt.update(params, params, opt.init(params), hp)
    torch.save(state, tmp_path / "state")
    for other in (copy.deepcopy(state), torch.load(tmp_path / "state", weights_only=True)):
        torch.testing.assert_close(
            opt.update(params, params, other, hp), opt.update(params, params, state, hp)
        )


@pytest.mark.parametrize("kind", ["numbers", "weights"])
@pytest.mark.parametrize("name", RULES)
def test_a_converted_optimizer_saves_and_loads_its_numbers(name, kind):
    params = {k: Parameter(p) for k, p in tree().items()}
    own = {k: KINDS[kind](v, tree()) for k, v in RULES[name].items()}

    def begun():
        return optim.from_pure(rule(name), params, **own)

    def step(optimizer, t):
        for p, g in zip(params.values(), tree(20 + t).values(), strict=True):
            p.grad = g
        optimizer.step()
        return clone({k: p.detach() for k, p in params.items()})

    first = begun()
    before = step(first, 0)
    second = begun()
    second.load_state_dict(first.state_dict())
    expected = step(first, 1)
    with torch.no_grad():
        for p, x in zip(params.values(), before.values(), strict=True):
            p.copy_(x)
    torch.testing.assert_close(step(second, 1), expected, rtol=0, atol=0)
    pure = optim.to_pure(second)
    new, _ = pure.optimizer.update(
        pure.params,
        tree(30) if kind == "weights" else dict(zip(pure.params, tree(30).values(), strict=True)),
        pure.state,
        pure.hparams,
    )
    third = step(second, 10)
    torch.testing.assert_close([*new.values()], [*third.values()])


# On a device


@pytest.fixture
def device(monkeypatch):
    with emulated(monkeypatch):
        yield


@pytest.mark.parametrize("way", ["update", "update_"])
@pytest.mark.parametrize("name", RULES)
def test_no_step_waits_where_gradients_come_and_go_and_launches_are_few(name, way, device):
    opt = rule(name)
    params = [cuda(normal((4,), i, torch.float32)) for i in range(30)]
    right = [p.inner.double() for p in params]
    state, expected = opt.init(params), rule(name, "leaf").init(right)
    hp = opt.hparams(**RULES[name])
    for t in range(7):
        grads = [cuda(normal((4,), 50 + i + t, torch.float32)) for i in range(30)]
        if t in (2, 3, 5):
            grads[t] = grads[9] = None
        DEVICE.reset()
        if way == "update":
            params, state = opt.update(params, grads, state, hp)
        else:
            opt.update_(params, grads, state, hp)
        waits, launches = DEVICE.count("wait"), DEVICE.count("launch")
        assert t == 0 or waits == 0
        assert launches < 60 if t < 3 else launches < 60 * 5
        own = [g if g is None else g.inner.double() for g in grads]
        right, expected = rule(name, "leaf").update(right, own, expected, hp)
    torch.testing.assert_close([p.inner.double() for p in params], right, rtol=1e-4, atol=1e-5)


def test_a_number_that_a_user_writes_on_a_device_is_read(device):
    opt = diffopt.nadam()
    params = [cuda(torch.ones(3)) for _ in range(4)]
    state = opt.init(params)
    for _ in range(2):
        opt.update_(params, params, state, opt.hparams())
    state.mu_product[1].fill_(0.25)
    before = [x.inner.item() for x in state.mu_product]
    opt.update_(params, params, state, opt.hparams())
    ratios = [x.inner.item() / y for x, y in zip(state.mu_product, before, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 4)


def test_what_a_user_writes_is_read_where_a_number_beside_it_has_grown(device):
    opt = diffopt.nadam()
    params = [cuda(torch.ones(3)) for _ in range(4)]
    state = opt.init(params)

    def step(*gone):
        grads = [None if i in gone else cuda(torch.ones(3)) for i in range(4)]
        opt.update_(params, grads, state, opt.hparams())
        return [x.inner.max().item() for x in state.mu_product[1:]]

    step()
    state.mu_product[0] = cuda(torch.full((3,), 0.5, dtype=torch.float64))
    state.mu_product[3].fill_(0.25)
    before = step(2, 3)
    ratios = [x / y for x, y in zip(step(0), before, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 3)
