"""Hypergradient descent, against closed forms and finite differences."""

import io
import math

import pytest
import torch
from torch import nn

import diffopt
from diffopt import transforms as t
from diffopt._rule import prints

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def trained(opt, hp, start, gradient, steps, *, in_place=False):
    """Params and state after some steps."""
    params, state = start.clone(), opt.init(start)
    for _ in range(steps):
        if in_place:
            opt.update_(params, gradient(params), state, hp)
        else:
            params, state = opt.update(params, gradient(params), state, hp)
    return params, state


CURVATURE = torch.tensor([1.0, 0.3], dtype=F64)


def slope(p):
    return CURVATURE * p


@pytest.mark.parametrize("in_place", [False, True])
def test_the_rate_of_gradient_descent_moves_as_by_hand(in_place):
    outer = diffopt.sgd(momentum=False)
    opt = t.hypergradient(diffopt.sgd(momentum=False), outer=outer)
    hp = opt.hparams(lr=0.1, discount=0.0, outer=outer.hparams(lr=0.3))
    start = torch.tensor([1.0, -2.0], dtype=F64)
    p, x, moved = start, 0.0, torch.zeros(2, dtype=F64)
    for _ in range(5):
        x = x - 0.3 * (slope(p) @ moved).item()  # the gradient times the last step
        moved = -0.1 * math.exp(x) * slope(p)
        p = p + moved
    params, state = trained(opt, hp, start, slope, 5, in_place=in_place)
    torch.testing.assert_close(params, p)
    torch.testing.assert_close(opt.current(state, hp).lr.item(), 0.1 * math.exp(x))


@pytest.mark.parametrize("in_place", [False, True])
def test_the_outer_optimizer_learns_its_own_rate(in_place):
    inner, top = diffopt.sgd(momentum=False), diffopt.sgd(momentum=False)
    outer = t.hypergradient(inner, outer=top)
    opt = t.hypergradient(inner, outer=outer)
    above = outer.hparams(lr=0.3, discount=0.0, outer=top.hparams(lr=0.7))
    hp = opt.hparams(lr=0.1, discount=0.0, outer=above)
    start = torch.tensor([1.0, -2.0], dtype=F64)
    p, moved = start, torch.zeros(2, dtype=F64)
    x = y = x_moved = 0.0
    for _ in range(5):
        d = (slope(p) @ moved).item()
        y = y - 0.7 * d * x_moved
        x_moved = -0.3 * math.exp(y) * d
        x = x + x_moved
        moved = -0.1 * math.exp(x) * slope(p)
        p = p + moved
    params, state = trained(opt, hp, start, slope, 5, in_place=in_place)
    torch.testing.assert_close(params, p)
    torch.testing.assert_close(outer.current(state.outer, hp[0].outer).lr.item(), 0.3 * math.exp(y))


class Saturating(diffopt.sgd):
    """Its steps are not proportional to the rate, unlike those of the class it is made from."""

    def rule(self, p, g, s, hp, c):
        return p - torch.tanh(hp.lr * g), s


LEARNED = {
    "a user's": (Saturating(), {"lr": 0.1}),
    "sgd": (diffopt.sgd(), {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1}),
    "sgd nesterov": (diffopt.sgd(nesterov=True), {"lr": 0.1, "momentum": 0.8}),
    "adam": (diffopt.adam(), {"lr": 0.1, "beta1": 0.8, "eps": 0.1, "weight_decay": 0.1}),
    "adamw": (diffopt.adamw(amsgrad=True), {"lr": 0.1, "beta1": 0.8, "weight_decay": 0.1}),
    "adamax": (diffopt.adamax(), {"lr": 0.1, "beta1": 0.8, "weight_decay": 0.1}),
    "nadam": (diffopt.nadam(), {"lr": 0.1, "beta1": 0.8, "weight_decay": 0.1}),
    "radam": (diffopt.radam(), {"lr": 0.1, "beta1": 0.8, "weight_decay": 0.1}),
    "rmsprop": (diffopt.rmsprop(), {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1}),
    "adagrad": (diffopt.adagrad(), {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1}),
    "adadelta": (diffopt.adadelta(), {"lr": 0.1, "rho": 0.8, "weight_decay": 0.1}),
    "muon": (diffopt.muon(precision=None), {"lr": 0.1, "weight_decay": 0.1}),
    "asgd": (diffopt.asgd(), {"lr": 0.1, "weight_decay": 0.1}),
    "adafactor": (diffopt.adafactor(), {"lr": 0.1, "weight_decay": 0.1}),
    "lbfgs": (diffopt.lbfgs(history_size=2), {"lr": 0.1}),
    "chain": (t.chain(t.clip_by_global_norm(), diffopt.sgd()), {"lr": 0.1, "max_norm": 0.1}),
    "ema": (t.ema(diffopt.adam()), {"lr": 0.1, "decay": 0.5}),
    "flatten": (t.flatten(diffopt.adam()), {"lr": 0.1, "weight_decay": 0.1}),
}
CASES = [
    (name, learn)
    for name, (opt, numbers) in LEARNED.items()
    for learn in numbers
    if learn not in ("decay", "rho") or name == "adadelta"
]


@pytest.mark.parametrize("in_place", [False, True], ids=["pure", "in place"])
@pytest.mark.parametrize(("name", "learn"), CASES)
def test_a_derivative_is_that_of_the_next_loss_by_finite_differences(name, learn, in_place):
    inner, numbers = LEARNED[name]
    learns = (learn,) if learn == "lr" else ("lr", learn)
    opt = t.hypergradient(inner, learn=learns)
    hp = opt.hparams(discount=0.0, **numbers)
    params = {"a": draw(3, 2), "b": draw(2, 2, seed=1)}

    def loss(params):
        return params["a"].square().sum() + (params["b"] ** 4).sum()

    def gradient(params):
        return torch.func.grad(loss)(params)

    state = opt.init(params)
    for _ in range(3):
        params, state = opt.update(params, gradient(params), state, hp)
    arguments = params, gradient(params), state
    new, after = opt.update(*arguments, hp)
    if in_place:
        new = {name: p.clone() for name, p in params.items()}
        after = torch.utils._pytree.tree_map(torch.clone, state)
        opt.update_(new, gradient(params), after, hp)

    def next_loss(change):  # of the offset with which that step was made
        offsets = {**after.offsets, learn: after.offsets[learn] + change}
        record = opt.current(after._replace(offsets=offsets), hp)
        return loss(inner.update(params, gradient(params), state.inner, record)[0])

    assert not any(x.requires_grad for x in torch.utils._pytree.tree_leaves((new, after)))
    eps = 1e-5
    expected = (next_loss(eps) - next_loss(-eps)) / (2 * eps)
    found = sum((gradient(new)[k] * after.derivatives[learn][k]).sum() for k in new)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_rate_of_decay_stays_between_0_and_1():
    opt = t.hypergradient(diffopt.adam(), learn=("beta1", "beta2"))
    hp = opt.hparams(beta1=0.9, beta2=0.0)
    state = opt.init(torch.zeros(1))
    for offset, beta1 in ((-1e4, 0.0), (math.log(2), 18 / 19), (1e4, 1.0)):
        offsets = dict.fromkeys(opt.learn, torch.tensor(offset, dtype=F64))
        current = opt.current(state._replace(offsets=offsets), hp)
        assert current.beta1.item() == pytest.approx(beta1)
        assert current.beta2 == 0
        assert current.lr == hp[1].lr


DECAYS = ("sgd", "momentum"), ("muon", "momentum"), ("rmsprop", "momentum"), ("rmsprop", "alpha")


@pytest.mark.parametrize(("make", "name"), DECAYS)
def test_what_decays_is_learned_in_its_range_although_torch_takes_more(make, name):
    opt = t.hypergradient(getattr(diffopt, make)(), learn=(name,))
    hp, params = opt.hparams(**{name: 0.9}), torch.zeros(1, 1)
    state = opt.init(params)
    for offset, value in ((-1e4, 0.0), (math.log(2), 18 / 19), (1e4, 1.0)):
        moved = state._replace(offsets={name: torch.tensor(offset, dtype=F64)})
        assert getattr(opt.current(moved, hp), name).item() == pytest.approx(value)
    with pytest.raises(ValueError, match=rf"hparams.{name} is 1.5, but must be <= 1 to be learned"):
        opt.update(params, params, state, opt.hparams(**{name: 1.5}))


def test_rates_of_parts_and_schedules_are_multiplied():
    opt = t.hypergradient(diffopt.sgd())
    params = {"a": torch.ones(2), "b": torch.ones(1)}
    state = opt.init(params)
    state = state._replace(offsets={"lr": torch.tensor(math.log(2), dtype=F64)})
    rates = opt.current(state, opt.hparams(lr={"a": 0.1, "b": torch.tensor([0.3])})).lr
    torch.testing.assert_close(rates["a"].item(), 0.2)
    torch.testing.assert_close(rates["b"], torch.tensor([0.6]))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_tensor_without_gradient_keeps_its_derivative(in_place):
    opt = t.hypergradient(diffopt.sgd())
    hp, params = opt.hparams(lr=0.1), {"a": draw(2), "b": draw(3, seed=1)}
    params, state = opt.update(params, params, opt.init(params), hp)
    kept = state.derivatives["lr"]["b"].clone()
    offset = state.offsets["lr"].clone()
    for grads in ({"a": params["a"].clone(), "b": None}, {"a": None, "b": None}):
        if in_place:
            opt.update_(params, grads, state, hp)
        else:
            params, state = opt.update(params, grads, state, hp)
        torch.testing.assert_close(state.derivatives["lr"]["b"], kept, rtol=0, atol=0)
        if grads["a"] is None:
            assert state.offsets["lr"] == offset
        else:
            assert state.offsets["lr"] != offset
        offset = state.offsets["lr"].clone()


@pytest.mark.parametrize("rate", [0.001, 0.1, 10.0])
@pytest.mark.parametrize("make", ["sgd", "adam", "rmsprop"])
def test_a_rate_recovers_that_is_100_times_off(make, rate):
    opt = t.hypergradient(getattr(diffopt, make)())
    start = torch.tensor([3.0, -2.0], dtype=F64)
    params, _ = trained(opt, opt.hparams(lr=rate), start, slope, 300)
    assert (slope(params) @ params) < 1e-3


@pytest.mark.parametrize("factor", [0.01, 1.0, 100.0])
@pytest.mark.parametrize(("make", "rate"), [("sgd", 0.3), ("adam", 0.01)])
@pytest.mark.parametrize("activation", ["Tanh", "ReLU"])
def test_networks_are_trained_from_a_rate_that_is_100_times_off(activation, make, rate, factor):
    torch.manual_seed(0)
    act = getattr(nn, activation)
    net = nn.Sequential(nn.Linear(8, 32), act(), nn.Linear(32, 32), act(), nn.Linear(32, 2))
    x = draw(64, 8).float()
    y = (x[:, 0] * x[:, 1] > 0).long()
    opt = t.hypergradient(getattr(diffopt, make)())
    optimizer = diffopt.optim.from_pure(opt, net, lr=rate * factor)
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_the_first_step_takes_a_part_of_the_rate():
    opt, p = t.hypergradient(diffopt.sgd(), learn=("lr", "momentum"), start=0.1), torch.ones(2)
    hp, state = opt.hparams(lr=0.5, momentum=0.9), opt.init(p)
    current = opt.current(state, hp)
    torch.testing.assert_close(current.lr, torch.tensor(0.05, dtype=F64))
    torch.testing.assert_close(current.momentum, torch.tensor(0.9, dtype=F64))
    torch.testing.assert_close(opt.update(p, p, state, hp)[0], 0.95 * p)
    for outer, start in ((None, 0.01), (diffopt.adam(), 1.0)):
        offset = t.hypergradient(diffopt.sgd(), outer=outer).init(p).offsets["lr"]
        assert offset == pytest.approx(math.log(start))


def test_an_optimizer_that_ascends_learns_to_ascend():
    start = torch.tensor([1.0, -2.0], dtype=F64)
    down = t.hypergradient(diffopt.sgd())
    expected, _ = trained(down, down.hparams(lr=0.1), start, slope, 5)
    for inner, clip in (
        (diffopt.sgd(maximize=True), {}),
        (t.maximize(diffopt.sgd()), {}),
        (t.chain(t.clip_by_value(), t.maximize(diffopt.sgd())), {"clip_value": 9.0}),
    ):
        up = t.hypergradient(inner)
        hp = up.hparams(lr=0.1, **clip)
        found, _ = trained(up, hp, start, lambda p: -slope(p), 5)
        torch.testing.assert_close(found, expected)
        with pytest.raises(ValueError, match="ascends and the other descends"):
            t.hypergradient(inner, outer=diffopt.sgd())
    t.hypergradient(t.maximize(diffopt.sgd(maximize=True)), outer=diffopt.sgd())


def test_the_parts_of_a_partition_ascend_or_descend_together():
    labels = {"a": "x", "b": "y"}
    start = {"a": draw(2), "b": draw(3, seed=1)}

    def parted(*ascend):
        return t.partition(
            {x: diffopt.sgd(maximize=up) for x, up in zip("xy", ascend, strict=True)}, labels
        )

    def found(inner, sign):
        opt = t.hypergradient(inner)
        one = {"x": diffopt.sgd().hparams(lr=0.1), "y": diffopt.sgd().hparams(lr=0.1)}
        own, _ = opt.hparams()
        params, state = start, opt.init(start)
        for _ in range(5):
            grads = {name: sign * p for name, p in params.items()}
            params, state = opt.update(params, grads, state, (own, one))
        return params

    expected = found(parted(False, False), 1)
    torch.testing.assert_close(found(parted(True, True), -1), expected)
    torch.testing.assert_close(found(t.masked(parted(True, True), True), -1), expected)
    for mixed in (parted(True, False), t.maximize(parted(True, False))):
        with pytest.raises(ValueError, match="ascend and others descend: use one hypergradient"):
            t.hypergradient(mixed)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("learn", [("lr",), ("lr", "momentum")])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_the_optimizer_skips_changes_no_rate(bad, learn, in_place):
    opt = t.hypergradient(t.skip_nonfinite(diffopt.sgd()), learn=learn)
    hp, start = opt.hparams(lr=0.1, momentum=0.5), torch.tensor([1.0, -2.0], dtype=F64)
    params, state = trained(opt, hp, start, slope, 3)
    offsets = {name: offset.clone() for name, offset in state.offsets.items()}
    grads = torch.tensor([1.0, bad], dtype=F64)
    if in_place:
        opt.update_(params, grads, state, hp)
    else:
        params, state = opt.update(params, grads, state, hp)
    assert state.offsets == offsets
    for _ in range(3):
        params, state = opt.update(params, slope(params), state, hp)
    assert state.offsets != offsets
    assert all(x.isfinite().all() for x in (params, *state.offsets.values()))


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("shared", ["state.inner", "grads", "hparams"])
def test_what_shares_memory_with_a_derivative_raises_before_anything_changes(shared, steps):
    opt = t.hypergradient(diffopt.sgd())
    params = {"w": draw(3)}
    grads, state, hp = {"w": draw(3, seed=1)}, opt.init(params), opt.hparams(lr=0.1)
    for _ in range(steps):  # which are remembered to have passed the checks
        opt.update_(params, grads, state, hp)
    derivative = state.derivatives["lr"]["w"]
    before = params["w"].clone(), derivative.clone()
    if shared == "grads":
        grads = {"w": derivative}
    elif shared == "hparams":
        hp = opt.hparams(weight_decay=derivative)
    else:
        state = state._replace(inner=state.inner._replace(momentum_buffer={"w": derivative}))
    with pytest.raises(ValueError, match=rf"{shared}.* and state.derivatives.* share memory"):
        opt.update_(params, grads, state, hp)
    assert torch.equal(params["w"], before[0])
    assert torch.equal(derivative, before[1])


CHANGES = {
    "another outer state": lambda s, hp: (s._replace(outer=diffopt.sgd().init(draw(2))), hp),
    "an offset in a vector": lambda s, hp: (s._replace(offsets={"lr": torch.zeros(2)}), hp),
    "a derivative of another shape": lambda s, hp: (s._replace(derivatives={"lr": draw(3)}), hp),
    "another offset": lambda s, hp: (s._replace(offsets={"lr": torch.ones((), dtype=F64)}), hp),
    "other numbers": lambda s, hp: (s, (hp[0], diffopt.sgd().hparams(lr=0.3))),
    "a rate in a tensor": lambda s, hp: (s, (hp[0], diffopt.sgd().hparams(lr=torch.tensor(0.3)))),
    "another record": lambda s, hp: (s, hp[1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_passed_the_checks_is_checked_again_where_it_has_changed(change):
    opt = t.hypergradient(diffopt.sgd())
    ends = []
    for forgetful in (False, True):
        params, hp = draw(2), opt.hparams(lr=0.1)
        state = opt.init(params)
        for _ in range(3):
            opt.update_(params, slope(params), state, hp)
        state, hp = CHANGES[change](state, hp)
        if forgetful:
            prints._PASSED.clear()
        try:
            opt.update_(params, slope(params), state, hp)
        except Exception as error:
            ends.append((type(error), str(error)))
        else:
            ends.append((params, state))
    if isinstance(ends[0][0], type) or isinstance(ends[1][0], type):
        assert ends[0] == ends[1]
    else:
        torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_a_loop_is_differentiated_through_the_rates_it_learns():
    outer = diffopt.sgd(momentum=False)
    opt = t.hypergradient(diffopt.sgd(), learn=("lr", "momentum"), outer=outer)

    def final(start, lr, momentum, outer_lr):
        hp = opt.hparams(lr=lr, momentum=momentum, outer=outer.hparams(lr=outer_lr))
        solution = diffopt.minimize(
            lambda p: (p**4).sum(), start, optimizer=opt, hparams=hp, steps=4
        )
        return solution.params

    inputs = [draw(2), *(torch.tensor(x, dtype=F64) for x in (0.02, 0.5, 0.3))]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(final, inputs)
    assert torch.autograd.gradgradcheck(final, inputs)


@pytest.mark.parametrize("learn", [("lr",), ("lr", "momentum")])
def test_every_adjoint_gives_the_same_hypergradient(learn):
    opt = t.hypergradient(diffopt.sgd(), learn=learn)

    def hypergradient(adjoint):
        lr = torch.tensor(0.05, dtype=F64, requires_grad=True)
        hp = opt.hparams(lr=lr, momentum=0.5)
        solution = diffopt.minimize(
            lambda p: (p**4).sum(), draw(2), optimizer=opt, hparams=hp, steps=4, adjoint=adjoint
        )
        return torch.autograd.grad(solution.params.square().sum(), lr)[0]

    expected = hypergradient(diffopt.adjoint.Unrolled())
    for adjoint in (diffopt.adjoint.Checkpointed(), diffopt.adjoint.ForwardMode()):
        torch.testing.assert_close(hypergradient(adjoint), expected)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(F64)


def advance(net, optimizer, steps):
    for _ in range(steps):
        advance_on(draw(8, 3), net, optimizer)


def advance_on(x, net, optimizer):
    optimizer.zero_grad()
    (net(x).sum(1) - x[:, 0]).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "opt",
    [
        t.hypergradient(diffopt.adam()),
        t.hypergradient(diffopt.adam(), learn=("lr", "beta1")),
        t.hypergradient(diffopt.sgd(), outer=t.hypergradient(diffopt.adam())),
    ],
    ids=["adam", "adam's two", "tower"],
)
def test_a_run_goes_on_from_a_checkpoint(opt):
    net, other = network(), network()
    optimizer = diffopt.optim.from_pure(opt, net.parameters(), lr=1e-3)
    advance(net, optimizer, 4)
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    model, state = torch.load(file, weights_only=True)
    resumed = diffopt.optim.from_pure(opt, other.parameters())
    other.load_state_dict(model)
    resumed.load_state_dict(state)
    advance(net, optimizer, 4)
    advance(other, resumed, 4)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    pure = diffopt.optim.to_pure(resumed)
    assert pure.optimizer.current(pure.state, pure.hparams).lr != 1e-3


def test_every_group_of_the_class_learns_its_own_rate():
    opt, net = t.hypergradient(diffopt.adam()), network()
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.1}]
    optimizer = diffopt.optim.from_pure(opt, groups, lr=1e-3)
    advance(net, optimizer, 4)
    offsets = [optimizer.state_of(i).offsets["lr"].item() for i in range(2)]
    assert len({0.0, *offsets}) == 3


def test_the_class_takes_the_pure_steps():
    opt = t.hypergradient(diffopt.adamw())
    net = network()
    model = diffopt.nn.functionalize(net)
    x = draw(8, 3)
    solution = diffopt.minimize(
        lambda params: (model(params, x).sum(1) - x[:, 0]).square().mean(),
        model.params,
        optimizer=opt,
        hparams=opt.hparams(lr=1e-3),
        steps=6,
    )
    advance(net, diffopt.optim.from_pure(opt, net, lr=1e-3), 6)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p, solution.params[name])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"learn": "lr"}, TypeError, r"learn is 'lr', not a sequence of names such as \('lr',\)"),
        ({"learn": 1}, TypeError, "learn is 1, not a sequence of names"),
        ({"learn": ("rl",)}, ValueError, "'rl', which is not a hyperparameter"),
        ({"learn": ("betas",)}, ValueError, r"of the optimizer\. They are lr, weight_decay"),
        ({"learn": ("dampening",)}, ValueError, "range is neither >= 0 nor"),
        ({"outer": 0.1}, TypeError, "outer is 0.1"),
        ({"start": 0.0}, ValueError, "start is 0.0, but must be a number > 0"),
        ({"start": math.inf}, ValueError, "start is inf, but must be a number > 0"),
        ({"start": torch.ones(())}, ValueError, "start is a tensor"),
    ],
)
def test_wrong_arguments_raise(arguments, error, message):
    with pytest.raises(error, match=message):
        t.hypergradient(diffopt.sgd(), **arguments)


def test_the_record_of_another_outer_optimizer_raises():
    opt, p = t.hypergradient(diffopt.sgd()), torch.ones(2)
    hp = opt.hparams(lr=0.1, outer=diffopt.sgd().hparams(lr=0.1))
    with pytest.raises(TypeError, match=r"hparams\[0\].outer has type"):
        opt.update(p, p, opt.init(p), hp)
    with pytest.raises(TypeError, match="state has type"):
        opt.update(p, p, diffopt.sgd().init(p), opt.hparams())


def test_current_names_arguments_that_belong_to_another_optimizer():
    opt, p = t.hypergradient(diffopt.sgd()), torch.ones(2)
    with pytest.raises(TypeError, match="hparams must be a tuple of 2"):
        opt.current(opt.init(p), diffopt.sgd().hparams(lr=0.1))
    with pytest.raises(TypeError, match="state has type SGDState"):
        opt.current(diffopt.sgd().init(p), opt.hparams(lr=0.1))


def tower(levels):
    opt = diffopt.sgd() if levels else diffopt.adagrad()
    return t.hypergradient(opt, outer=tower(levels - 1)) if levels else opt


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("learn", [("lr",), ("lr", "momentum")])
def test_a_discount_adds_up_the_derivatives_of_past_steps(learn, in_place):
    outer = diffopt.sgd(momentum=False)
    plain = t.hypergradient(diffopt.sgd(), learn=learn, outer=outer)
    hp = plain.hparams(lr=0.1, momentum=0.5, discount=0.0, outer=outer.hparams(lr=0.0))
    discounted = plain.hparams(lr=0.1, momentum=0.5, discount=0.8, outer=outer.hparams(lr=0.0))
    params, expected = torch.tensor([1.0, -2.0], dtype=F64), dict.fromkeys(learn, 0.0)
    state = plain.init(params)
    for _ in range(4):
        params, state = plain.update(params, slope(params), state, hp)
        expected = {name: 0.8 * expected[name] + state.derivatives[name] for name in learn}
    start = torch.tensor([1.0, -2.0], dtype=F64)
    _, found = trained(plain, discounted, start, slope, 4, in_place=in_place)
    torch.testing.assert_close(found.derivatives, expected)


@pytest.mark.parametrize("factor", [0.01, 1.0, 100.0])
def test_with_a_discount_gradient_descent_is_as_good_as_at_a_rate_that_suits(factor):
    losses = []
    for opt, numbers in (
        (diffopt.sgd(momentum=False), {"lr": 0.3}),
        (t.hypergradient(diffopt.sgd(momentum=False)), {"lr": 0.3 * factor, "discount": 0.9}),
    ):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
        x = draw(256, 8).float()
        y = (x[:, 0] * x[:, 1] > 0).long()
        optimizer = diffopt.optim.from_pure(opt, net, **numbers)
        for _ in range(20):
            for i in torch.randperm(256).split(32):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[i]), y[i]).backward()
                optimizer.step()
        losses.append(nn.functional.cross_entropy(net(x), y).item())
    assert losses[1] < 1.2 * losses[0]


@pytest.mark.parametrize("discount", [{"w": 0.1}, torch.ones(2)], ids=["tree", "vector"])
def test_a_discount_that_is_not_one_number_raises(discount):
    opt, p = t.hypergradient(diffopt.sgd()), {"w": torch.ones(2)}
    with pytest.raises(ValueError, match=r"hparams\[0\].discount is .*, but must be one number"):
        opt.update(p, p, opt.init(p), opt.hparams(discount=discount))


REPEATED = {
    "discount": (t.hypergradient(diffopt.adamw()), {"lr": 1e-3, "discount": 0.9}),
    "discounts": (t.hypergradient(diffopt.sgd(), outer=tower(1)), {"lr": 0.1, "discount": 0.5}),
    "adamw": (t.hypergradient(diffopt.adamw()), {"lr": 1e-3}),
    "ascent": (t.hypergradient(diffopt.adamw(maximize=True)), {"lr": 1e-3}),
    "tower": (tower(1), {"lr": 0.1}),
    "tower of three": (tower(3), {"lr": 0.1}),
    "adam outside": (t.hypergradient(diffopt.sgd(), outer=diffopt.adam()), {"lr": 0.1}),
    "nadam in nadam": (t.hypergradient(diffopt.nadam(), outer=diffopt.nadam()), {"lr": 0.1}),
    "muon": (t.hypergradient(diffopt.muon(precision=None)), {"lr": 0.1}),
    "chain": (t.hypergradient(t.chain(t.clip_by_global_norm(), diffopt.sgd())), {"lr": 0.1}),
    "in a chain": (t.chain(t.clip_by_global_norm(), t.hypergradient(diffopt.adam())), {"lr": 0.1}),
    "a rate for each": (t.hypergradient(diffopt.adam()), {"lr": {"w": 0.1, "v": 0.2}}),
    "a rate in a tensor": (t.hypergradient(diffopt.adam()), {"lr": torch.tensor(0.1)}),
    "an integer": (t.hypergradient(diffopt.sgd()), {"lr": 1}),
    "decay": (t.hypergradient(diffopt.adamw(), learn=("lr", "weight_decay")), {"lr": 0.1}),
}


DTYPES = torch.float32, torch.bfloat16, torch.complex64


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, d) for n in REPEATED for d in DTYPES if n != "muon" or not d.is_complex],
    ids=str,
)
def test_steps_that_are_repeated_in_place_are_those_of_the_pure_function(name, dtype):
    opt, numbers = REPEATED[name]
    start = {"w": draw(3, 2).to(dtype), "v": draw(2, 4, seed=1).to(dtype).mT}
    ends = []
    for way in ("repeated", "checked", "pure"):
        params = {key: p.clone() for key, p in start.items()}
        state, hp = opt.init(params), opt.hparams(**numbers)
        for step in range(7):
            grads = {key: p.sin() - 0.3 for key, p in params.items()}
            if step == 4:
                grads["v"] = None
            if way == "checked":
                prints._PASSED.clear()
            if way == "pure":
                params, state = opt.update(params, grads, state, hp)
            else:
                opt.update_(params, grads, state, hp)
        ends.append((params, state))
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2])


def by_closure(net, optimizer):
    def closure():
        optimizer.zero_grad()
        (net(draw(8, 3)).sum(1) - draw(8, 3)[:, 0]).square().mean().backward()

    optimizer.step(closure)


def scaled(net, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer.zero_grad()
    scaler.scale((net(draw(8, 3)).sum(1) - draw(8, 3)[:, 0]).square().mean()).backward()
    scaler.step(optimizer)


def compiled(net, optimizer):
    torch.compile(advance_on, backend="eager")(draw(8, 3), net, optimizer)


def copied_group(net, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())
    advance(net, optimizer, 1)


def test_the_first_update_may_be_traced():
    opt, p = t.hypergradient(diffopt.sgd()), torch.ones(2)

    def stepped(lr, state):
        return opt.update(p, p, state, opt.hparams(lr=lr))

    given = torch.tensor(0.1), opt.init(p)
    traced = torch.compile(stepped, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(*given), stepped(*given))


@pytest.mark.parametrize("way", [by_closure, scaled, compiled, copied_group])
def test_the_class_takes_the_same_steps_however_they_are_called(way):
    ends = []
    for step in (lambda net, optimizer: advance(net, optimizer, 1), way):
        net = network()
        opt = t.hypergradient(diffopt.adamw())
        optimizer = diffopt.optim.from_pure(opt, net, lr=1e-2, discount=0.5)
        for _ in range(5):
            step(net, optimizer)
        ends.append([p.detach() for p in net.parameters()])
    torch.testing.assert_close(*ends)


UPHILL = -20.0
FACTORS = [1.0, 0.9, UPHILL, 0.8, 0.7, 0.6, UPHILL, 0.9, 1.0]
"""What multiplies params in the gradient of each step: where negative, the step before overshot."""


def along(opt, hp, start, *, in_place=False):
    """Params and state after each step with these gradients."""
    params, state = start.clone(), opt.init(start)
    for factor in FACTORS:
        grads = factor * params
        if in_place:
            opt.update_(params, grads, state, hp)
        else:
            params, state = opt.update(params, grads, state, hp)
        yield params, state


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("sign", [1, -1], ids=["descent", "ascent"])
@pytest.mark.parametrize("discount", [0.0, 0.9])
def test_where_a_step_overshot_params_go_back_as_by_hand(discount, sign, in_place):
    outer = diffopt.sgd(momentum=False, maximize=sign < 0)
    opt = t.hypergradient(diffopt.sgd(maximize=sign < 0), outer=outer)
    hp = opt.hparams(lr=0.1, momentum=0.5, discount=discount, outer=outer.hparams(lr=0.3))
    start = torch.tensor([1.0, -2.0], dtype=F64)
    p, x, squares, overshot = start, 0.0, 0.0, 0
    z, momentum = torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64)
    steps = along(opt, hp, start, in_place=in_place)
    for factor, (params, state) in zip(FACTORS, steps, strict=True):
        g = factor * p
        d = (g @ z).item()
        far = 0 < 2 * squares**0.5 < sign * d
        d = sign * 2 * squares**0.5 if far else d
        x, squares, overshot = x - sign * 0.3 * d, squares + d * d, overshot + far
        if far:
            p, z = p - z, 0 * z
        else:
            momentum = 0.5 * momentum + sign * g
            step = -0.1 * math.exp(x) * momentum
            p, z = p + step, discount * z + step
        torch.testing.assert_close(params, p)
        torch.testing.assert_close(state.derivatives["lr"], z)
        torch.testing.assert_close(state.offsets["lr"].item(), x)
        torch.testing.assert_close(state.squares.item(), squares)
    assert overshot == 2


@pytest.mark.parametrize("outer", [diffopt.adagrad(), tower(1)], ids=["adagrad", "tower"])
def test_a_loop_is_differentiated_through_steps_that_overshot(outer):
    opt = t.hypergradient(diffopt.sgd(), outer=outer)

    def final(start, lr, momentum, discount, outer_lr):
        hp = opt.hparams(
            lr=lr, momentum=momentum, discount=discount, outer=outer.hparams(lr=outer_lr)
        )
        *_, (params, state) = along(opt, hp, start)
        return params, state.squares

    inputs = [draw(2), *(torch.tensor(x, dtype=F64) for x in (0.02, 0.5, 0.9, 0.3))]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(final, inputs)
    assert torch.autograd.gradgradcheck(final, inputs)
    jacobians = torch.autograd.functional.jacobian(final, tuple(inputs))
    torch.testing.assert_close(torch.func.jacrev(final, tuple(range(5)))(*inputs), jacobians)


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize(
    "opt",
    [
        t.hypergradient(diffopt.adamw()),
        t.hypergradient(diffopt.sgd(), outer=tower(1)),
        t.hypergradient(t.chain(t.clip_by_global_norm(), diffopt.sgd())),
        t.hypergradient(diffopt.sgd(), learn=("lr", "momentum")),
    ],
    ids=["adamw", "tower", "chain", "two"],
)
def test_in_place_params_go_back_as_in_the_pure_function(opt, dtype):
    hp, start = opt.hparams(lr=0.1), draw(3, 2).to(dtype)
    pairs = zip(along(opt, hp, start), along(opt, hp, start, in_place=True), strict=True)
    returned = 0
    for step, (pure, in_place) in enumerate(pairs):
        torch.testing.assert_close(in_place, pure)
        returned += step > 0 and not any(z.any() for z in pure[1].derivatives.values())
    assert returned == 2


def test_under_vmap_each_model_goes_back_or_skips_by_itself():
    opt = t.hypergradient(diffopt.adam())
    hp, start = opt.hparams(lr=0.1), torch.tensor([1.0, -2.0], dtype=F64)
    params, state = trained(opt, hp, start, slope, 3)
    factors = torch.tensor([1.0, UPHILL, math.nan], dtype=F64)

    def step(factor):
        return opt.update(params, factor * params, state, hp)

    batched = torch.vmap(step)(factors)
    for i, factor in enumerate(factors):
        single = step(factor)
        row = torch.utils._pytree.tree_map(lambda x: x[i], batched)  # noqa: B023 (used at once)
        torch.testing.assert_close(row, single, equal_nan=True)
    torch.testing.assert_close(batched[0][1], params - state.derivatives["lr"])


@pytest.mark.parametrize("in_place", [False, True])
def test_what_has_no_gradient_stays_where_the_others_go_back(in_place):
    opt = t.hypergradient(diffopt.sgd())
    params, hp = {"a": draw(2), "b": draw(3, seed=1)}, opt.hparams(lr=0.1)
    state = opt.init(params)
    for _ in range(3):
        params, state = opt.update(params, params, state, hp)
    grads = {"a": UPHILL * params["a"], "b": None}
    new = {name: p.clone() for name, p in params.items()}
    after = torch.utils._pytree.tree_map(torch.clone, state)
    if in_place:
        opt.update_(new, grads, after, hp)
    else:
        new, after = opt.update(params, grads, state, hp)
    z, left = state.derivatives["lr"], after.derivatives["lr"]
    torch.testing.assert_close(new, {"a": params["a"] - z["a"], "b": params["b"]})
    torch.testing.assert_close(left, {"a": torch.zeros_like(z["a"]), "b": z["b"]})
    torch.testing.assert_close(after.inner, state.inner)
