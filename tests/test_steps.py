"""A loop does once what is the same for all its steps, and still sees what differs between them."""

import itertools
from typing import Any, NamedTuple

import pytest
import torch

import diffopt
from diffopt._rule import work
from diffopt.adjoint import FirstOrder, Implicit, Truncated, Unrolled, _base, _steps

F64 = torch.float64
START = {"w": torch.tensor([0.5, -1.0, 2.0], dtype=F64), "b": torch.tensor([0.3], dtype=F64)}
RULES = {
    "sgd": (diffopt.sgd(), {"lr": 0.1}),
    "no momentum": (diffopt.sgd(momentum=False), {"lr": 0.1, "weight_decay": 0.01}),
    "momentum": (diffopt.sgd(), {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "nesterov": (diffopt.sgd(nesterov=True), {"lr": 0.1, "momentum": 0.9}),
    "adam": (diffopt.adam(amsgrad=True), {"lr": 0.05, "eps": 1e-3}),
    "adamw": (diffopt.adamw(), {"lr": 0.05, "weight_decay": {"w": 0.1, "b": 0.0}}),
    "rmsprop": (diffopt.rmsprop(centered=True), {"lr": 0.05, "momentum": 0.5}),
    "plain rmsprop": (diffopt.rmsprop(), {"lr": 0.05}),
    "adagrad": (diffopt.adagrad(), {"lr": 0.05, "initial_accumulator_value": 0.2}),
    "nadam": (diffopt.nadam(), {"lr": 0.05}),
    "clipped": (
        diffopt.transforms.chain(diffopt.transforms.clip_by_global_norm(), diffopt.sgd()),
        {"lr": 0.1, "max_norm": 0.5},
    ),
}


def loss(params, scale=1.0):
    w, b = params["w"], params["b"]
    return scale * ((w * b).sin().sum() + 0.5 * (w**2).sum() + b.exp().sum())


def started():
    return {k: p.clone().requires_grad_() for k, p in START.items()}


def by_hand(loss, params, opt, hparams, steps):
    """The loop with nothing but `update`."""
    state = opt.init(params)
    for t in range(steps):
        hp = hparams(t) if callable(hparams) else hparams
        aliases = {k: p.view_as(p) for k, p in params.items()}
        grads = torch.autograd.grad(
            loss(aliases), list(aliases.values()), create_graph=True, allow_unused=True
        )
        params, state = opt.update(params, dict(zip(params, grads, strict=True)), state, hp)
    return params, state


def minimized(loss, params, opt, hparams, steps, **options):
    sol = diffopt.minimize(loss, params, optimizer=opt, hparams=hparams, steps=steps, **options)
    return sol.params, sol.state


def derivatives(run, loss, opt, hparams, steps=4):
    """What the loop returns, and its first and second derivatives with respect to the start."""
    start = started()
    params, state = run(loss, start, opt, hparams, steps)
    leaves = [*params.values(), *torch.utils._pytree.tree_leaves(state)]
    total = sum(x.square().sum() for x in leaves)
    first = torch.autograd.grad(total, list(start.values()), create_graph=True)
    second = torch.autograd.grad(sum(x.sin().sum() for x in first), list(start.values()))
    return [*leaves, *first, *second]


@pytest.mark.parametrize("rule", RULES)
def test_a_loop_gives_what_update_gives(rule):
    opt, numbers = RULES[rule]
    hp = opt.hparams(**numbers)
    found, expected = (derivatives(run, loss, opt, hp) for run in (minimized, by_hand))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rule", RULES)
def test_derivatives_of_a_loop_equal_finite_differences_twice(rule):
    opt, numbers = RULES[rule]

    def end(lr, w):
        hp = opt.hparams(**{**numbers, "lr": lr})
        return minimized(loss, {"w": w, "b": START["b"]}, opt, hp, 3)[0]["w"]

    inputs = [torch.tensor(0.07, dtype=F64), START["w"].clone()]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(end, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(end, inputs, fast_mode=True)


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
def test_arguments_are_gathered_once_per_loop(rule, monkeypatch):
    calls = []
    gather = work.gather
    for module in (work, diffopt._rule.leafwise):
        monkeypatch.setattr(module, "gather", lambda *a, **k: calls.append(1) or gather(*a, **k))
    opt, numbers = RULES[rule]
    minimized(loss, START, opt, opt.hparams(**numbers), 9)
    assert len(calls) == 1


RATES = torch.tensor([0.1, 0.05, 0.2, 0.1, 0.3], dtype=F64)
CHANGING = {
    "numbers": lambda t: 0.1 / (t + 1),
    "tensors": lambda t: RATES[t],
    "a number, then a tensor": lambda t: 0.1 if t < 2 else RATES[t],
    "a number, then a tree": lambda t: 0.1 if t < 2 else {"w": 0.1, "b": RATES[t]},
    "other shapes": lambda t: RATES[t] if t < 2 else {"w": RATES[:3], "b": RATES[t]},
}


@pytest.mark.parametrize("kind", CHANGING)
def test_hyperparameters_may_change_between_steps(kind):
    opt = diffopt.adam()

    def hparams(t):
        return opt.hparams(lr=CHANGING[kind](t), eps=1e-3)

    found, expected = (derivatives(run, loss, opt, hparams, 5) for run in (minimized, by_hand))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("value", [0.3, torch.tensor(0.3, dtype=F64)], ids=["number", "tensor"])
def test_a_tree_of_rates_that_the_loss_changes_is_read_in_each_step(value):
    opt = diffopt.sgd()

    def run(loop):
        rates = {"w": 0.1, "b": torch.tensor(0.1, dtype=F64)}
        calls = []

        def changes(params):
            calls.append(1)
            if len(calls) == 3:
                rates["w"] = value
                rates["b"] = rates["b"] * 2
            return loss(params)

        return derivatives(loop, changes, opt, opt.hparams(lr=rates))

    torch.testing.assert_close(run(minimized), run(by_hand), rtol=1e-12, atol=1e-13)


def test_a_tree_of_a_single_rate_is_read_in_each_step():
    opt, rates = diffopt.sgd(), {"w": 1.0}

    def halves(params):
        rates["w"] /= 2
        return params["w"].sum()

    sol = diffopt.minimize(
        halves, {"w": torch.zeros(1)}, optimizer=opt, hparams=opt.hparams(lr=rates), steps=4
    )
    assert sol.params["w"].item() == -(1 / 2 + 1 / 4 + 1 / 8 + 1 / 16)


def test_a_rate_that_is_overwritten_between_steps_is_seen():
    opt, rate = diffopt.sgd(), torch.tensor(0.1, dtype=F64)

    def decays(params):
        with torch.no_grad():
            rate.mul_(0.5)
        return (params["w"].detach().square() * params["w"]).sum() + params["b"].sum()

    sol = diffopt.minimize(decays, START, optimizer=opt, hparams=opt.hparams(lr=rate), steps=3)
    expected = 0.3 - 0.05 - 0.025 - 0.0125
    torch.testing.assert_close(sol.params["b"], torch.tensor([expected], dtype=F64))


def test_a_parameter_that_only_some_steps_use_is_left_alone_in_the_others():
    opt, hp = RULES["momentum"][0], diffopt.sgd().hparams(lr=0.1, momentum=0.9)

    def alternating():
        calls = []

        def one(params):
            calls.append(1)
            return (params["w"] ** 2).sum() + (
                0 if len(calls) in (2, 3) else params["b"].exp().sum()
            )

        return one

    found, expected = (derivatives(run, alternating(), opt, hp, 5) for run in (minimized, by_hand))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_gradients_are_partial_in_every_step():
    """Also where a rule of one's own computes one parameter from another, or returns it."""
    previous = []

    def mixed(p, g, s, hp, c):
        new = p - hp.lr * g + (0.1 * previous[-1].sum() if previous else 0.0)
        previous.append(new)
        return (p if len(previous) == 2 else new), s

    opt = diffopt.rules.leafwise(
        diffopt.sgd().State, diffopt.sgd(momentum=False).hparams,
        lambda p, step: diffopt.sgd().State(step, ()), mixed,
    )  # fmt: skip
    results = []
    for run in (minimized, by_hand):
        previous.clear()
        results.append(derivatives(run, loss, opt, opt.hparams(lr=0.1), 3))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rule", RULES)
def test_neither_arguments_nor_results_share_memory_with_a_gradient(rule):
    opt, numbers = RULES[rule]
    grads = {k: torch.ones_like(p) for k, p in START.items()}
    new = opt.update(START, grads, opt.init(START), opt.hparams(**numbers))
    given = {x.data_ptr() for x in grads.values()}
    assert given.isdisjoint(x.data_ptr() for x in torch.utils._pytree.tree_leaves(new))


class LastState(NamedTuple):
    step: Any
    grad: Any


class Last(diffopt.rules.Leafwise):
    """Its state is the last gradient."""

    State = LastState
    hparams = diffopt.sgd(momentum=False).hparams

    def rule(self, p, g, s, hp, c):
        return p - hp.lr * g, LastState(s.step, g)


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64])
@pytest.mark.parametrize("ours", [True, False])
def test_a_state_shares_no_memory_with_a_gradient_in_any_dtype_and_shape(ours, dtype, shape):
    opt = diffopt.sgd() if ours else Last()
    params, grads = ([torch.ones(shape, dtype=dtype)] for _ in range(2))
    _, state = opt.update(params, grads, opt.init(params), opt.hparams(lr=0.1))
    grads[0].zero_()
    assert state[1][0].eq(1).all()


class Linear(torch.autograd.Function):
    """The product of a tensor with a constant, which is the gradient itself."""

    @staticmethod
    def forward(ctx, x, constant):
        ctx.constant = constant
        return (x * constant).sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.constant, None


@pytest.mark.parametrize("written", [torch.Tensor.detach, lambda x: x.data], ids=["detach", "data"])
@pytest.mark.parametrize("rule", ["adam", "adamw", "plain rmsprop", "momentum"])
def test_what_the_loss_writes_to_its_params_stays(rule, written):
    opt, hparams = RULES[rule]

    def clamped(params):
        written(params["w"]).clamp_(min=-0.9)
        return loss(params)

    def run(needed):
        params = {k: p.clone().requires_grad_(needed) for k, p in START.items()}
        return minimized(clamped, params, opt, opt.hparams(**hparams), 4)[0]

    torch.testing.assert_close(run(True), {k: p.requires_grad_() for k, p in run(False).items()})


@pytest.mark.parametrize("rule", ["adam", "adamw", "plain rmsprop", "momentum"])
def test_derivatives_of_first_order_are_none_where_a_tensor_does_not_depend_on_another(rule):
    opt, hparams = RULES[rule]
    params = started()
    params["b"].requires_grad_(False)
    hp, adjoint = opt.hparams(**hparams), FirstOrder()
    found, state = minimized(loss, params, opt, hp, 3, adjoint=adjoint)
    assert not found["b"].requires_grad
    alone = minimized(loss, dict(START), opt, hp, 3)
    torch.testing.assert_close(({k: p.detach() for k, p in found.items()}, state), alone)
    params = started()
    found, _ = minimized(loss, params, opt, hp, 3, adjoint=adjoint)
    grads = torch.autograd.grad(found["w"].sum(), [*params.values()], allow_unused=True)
    assert [grad is None for grad in grads] == [False, True]


class Root(torch.autograd.Function):
    """To a function of a user's, torch passes zeros where there is no gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx, grad):
        return grad / (2 * ctx.saved_tensors[0].sqrt())


NONE_REACHES = ["sgd", "no momentum", "momentum", "nesterov", "adam", "plain rmsprop", "adagrad"]


@pytest.mark.parametrize("rule", NONE_REACHES)
def test_no_gradient_reaches_a_tensor_that_nothing_in_use_depends_on(rule):
    """A zero would become NaN, as the derivative of a root at 0 is infinite."""
    opt, hparams = RULES[rule]
    start = {"w": START["w"].clone().requires_grad_(), "b": torch.zeros(1, requires_grad=True)}
    params = {"w": start["w"], "b": Root.apply(start["b"]).double()}

    def separable(params):
        return params["w"].square().sum() + (params["b"] - 1).square().sum()

    found, _ = minimized(separable, params, opt, opt.hparams(**hparams), 3)
    found["b"].register_hook(lambda grad: pytest.fail(f"a hook was given {grad}"))
    found["w"].sum().backward()
    assert start["w"].grad.isfinite().all()
    assert start["b"].grad is None


@pytest.mark.parametrize("rule", ["adam", "adamw", "plain rmsprop", "momentum"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e200])
@pytest.mark.parametrize("late", [False, True])
def test_a_tensor_that_diverges_leaves_the_derivatives_of_others_alone(rule, bad, late):
    opt, numbers = RULES[rule]

    def derivative(bad):
        lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
        params, scales = started(), [1.0, bad, 1.0] if late else [bad, 1.0, 1.0]
        sol = diffopt.minimize(
            lambda p, scale: p["w"].square().sum() + scale * p["b"].exp().sum(),
            params,
            optimizer=opt,
            hparams=opt.hparams(**{**numbers, "lr": lr}),
            batches=scales,
        )
        return torch.autograd.grad(sol.params["w"].sum(), [lr, params["w"]])

    torch.testing.assert_close(derivative(bad), derivative(1.0))


def test_a_state_shares_no_memory_with_a_gradient_that_the_loss_has_passed_through():
    constant = torch.ones(3, dtype=torch.float64)
    params = {"w": torch.zeros(3, dtype=torch.float64), "b": torch.zeros(2, dtype=torch.float64)}

    def loss(p, constant):
        return Linear.apply(p["w"], constant) + p["b"].sum()  # the gradient of b is expanded

    opt = diffopt.sgd()
    hp = opt.hparams(lr=0.1)
    sol = diffopt.minimize(loss, params, constant, optimizer=opt, hparams=hp, steps=2, adjoint=None)
    opt.update_(sol.params, sol.params, sol.state, hp)
    assert constant.eq(1).all()


def test_a_state_of_another_optimizer_raises_before_the_first_step():
    opt, calls = diffopt.adam(), []
    state = opt.init({"w": START["w"], "b": torch.zeros(2, dtype=F64)})
    with pytest.raises(ValueError, match=r"state.exp_avg\['b'\] has shape \(2,\)"):
        diffopt.minimize(
            lambda params: calls.append(1) or loss(params), START, optimizer=opt,
            hparams=opt.hparams(), steps=2, state=state,
        )  # fmt: skip
    assert not calls


def test_an_update_is_refused_once_a_rule_has_returned_tensors_of_another_kind():
    def meta(p, g, s, hp, c):
        return (p - hp.lr * g).to("meta"), s

    opt = diffopt.rules.leafwise(
        diffopt.sgd().State, diffopt.sgd(momentum=False).hparams,
        lambda p, step: diffopt.sgd().State(step, ()), meta,
    )  # fmt: skip
    hp = opt.hparams(lr=0.1)
    updates = opt.repeated(START, opt.init(START), hp)
    grads = [torch.ones_like(p) for p in updates.params]
    assert updates.update(grads, hp)
    assert not updates.update(grads, hp)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_the_count_of_steps_keeps_its_dtype(dtype):
    opt = diffopt.adam()
    state = opt.init(START)
    state = state._replace(step=torch.tensor(7, dtype=dtype))
    sol = diffopt.minimize(loss, START, optimizer=opt, hparams=opt.hparams(), steps=3, state=state)
    assert sol.state.step.item() == 10
    assert sol.state.step.dtype == dtype
    assert state.step.item() == 7


def test_steps_of_a_subclass_are_run_as_they_are():
    class Twice(_base.GradientStep):
        def __call__(self, carry, args, x):
            return super().__call__(super().__call__(carry, args, x)[0], args, x)

    step = Twice(lambda params, inputs: (loss(params), ((), None)), diffopt.sgd())
    opt, hp = diffopt.sgd(), diffopt.sgd().hparams(lr=0.1)
    steps = _steps.Steps(step, (START, opt.init(START), ()), (hp, ()))
    steps.take((None, ()))
    expected, _ = minimized(loss, START, opt, hp, 2)
    torch.testing.assert_close(steps.carry()[0], expected)


class Halved(type(diffopt.adam())):
    """Adam whose update moves half as far, as a user may write it."""

    def update(self, params, grads, state, hparams):
        new, state = super().update(params, grads, state, hparams)
        return {k: (params[k] + p) / 2 for k, p in new.items()}, state


@pytest.mark.parametrize("adjoint", [None, Unrolled(), Truncated(2)])
def test_an_update_of_ones_own_is_what_a_loop_takes(adjoint):
    opt, hp = Halved(), Halved().hparams(lr=0.1)
    expected, _ = by_hand(loss, started(), opt, hp, 3)
    found, _ = minimized(loss, START, opt, hp, 3, adjoint=adjoint)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("adjoint", [None, Truncated(2)], ids=str)
def test_a_loop_without_a_graph_gives_the_same(rule, adjoint):
    opt, numbers = RULES[rule]
    hp = opt.hparams(**numbers)
    found = minimized(loss, START, opt, hp, 5, adjoint=adjoint)
    expected = by_hand(loss, started(), opt, hp, 5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


# Loops that end by a tolerance


@pytest.mark.parametrize("rule", RULES)
def test_a_loop_that_ends_by_its_tolerance_is_one_of_that_many_steps(rule):
    opt, numbers = RULES[rule]
    hp, tol = opt.hparams(**numbers), 2.5
    steps = int(diffopt.minimize(loss, START, optimizer=opt, hparams=hp, steps=99, tol=tol).steps)
    assert 0 < steps < 99

    def ending(loss, params, opt, hparams, _):
        return minimized(loss, params, opt, hparams, 99, tol=tol)

    found, expected = (derivatives(run, loss, opt, hp, steps) for run in (ending, minimized))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("adjoint", [None, Unrolled(), FirstOrder(), Implicit(), Truncated(0)])
@pytest.mark.parametrize("transform", [lambda run: run, torch.func.jacrev], ids=["plain", "jacrev"])
def test_a_loop_that_ends_by_its_tolerance_takes_each_step_once(adjoint, transform):
    calls, steps = [], 0

    def counted(w, target):
        calls.append(w)
        return 0.5 * ((w - target) ** 2).sum()

    def run(w):
        nonlocal steps
        batches = itertools.repeat(torch.ones(2, dtype=F64))
        hp = opt.hparams(lr=0.5)
        sol = diffopt.minimize(
            counted, w, batches=batches, optimizer=opt, hparams=hp, tol=1e-3, adjoint=adjoint
        )
        steps = int(sol.steps)
        return sol.params

    opt = diffopt.sgd()
    with torch.no_grad():
        transform(run)(torch.zeros(2, dtype=F64))
    assert steps == 11
    assert len(calls) <= steps + 1 + 3 * isinstance(adjoint, Implicit)  # it looks at the minimum


def test_a_loop_at_a_minimum_takes_no_step():
    start, opt = torch.ones(2, dtype=F64, requires_grad=True), diffopt.adam()
    for adjoint in (None, Unrolled(), FirstOrder()):
        sol = diffopt.minimize(
            lambda w: ((w - 1) ** 2).sum(), start, optimizer=opt, hparams=opt.hparams(), steps=3,
            tol=0.0, adjoint=adjoint,
        )  # fmt: skip
        assert int(sol.steps) == len(sol.losses) == int(sol.state.step) == 0
        assert torch.equal(sol.params, start)


def test_each_example_of_a_batch_ends_by_its_own_gradient():
    opt, scales = diffopt.sgd(), torch.tensor([0.5, 0.1, 1.0], dtype=F64)

    def run(scale):
        sol = diffopt.minimize(
            lambda w: 0.5 * scale * (w - 1) ** 2, torch.zeros((), dtype=F64), optimizer=opt,
            hparams=opt.hparams(lr=1.0), steps=99, tol=0.02,
        )  # fmt: skip
        return sol.params, sol.steps

    for found, expected in zip(
        torch.vmap(run)(scales), zip(*map(run, scales), strict=True), strict=True
    ):
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=0)
