"""innerloop(): an existing module and optimizer, stepped so that one can differentiate."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import diffopt
from diffopt import transforms
from diffopt._rule import leafwise

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(6, 2)
Y = X.sin().sum(1, keepdim=True)
NEW_X = X.flip(1) * 0.7 + 0.1
NEW_Y = NEW_X.sin().sum(1, keepdim=True)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def loss_of(model, x=X, y=Y):
    return (model(x) - y).square().mean()


def leaf(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def adapted(net, opt, steps=3, loss=loss_of, outer=loss_of, **options):
    """The outer loss after some steps."""
    with diffopt.innerloop(net, opt, **options) as (fnet, inner):
        for _ in range(steps):
            inner.step(loss(fnet))
        return outer(fnet, NEW_X, NEW_Y)


def by_minimize(net, opt, hparams, steps=3, adjoint=None):
    model = diffopt.nn.functionalize(net)
    sol = diffopt.minimize(
        lambda p: (model(p, {}, X)[0] - Y).square().mean(), model.params,
        optimizer=opt, hparams=hparams, steps=steps, adjoint=adjoint or diffopt.adjoint.Unrolled(),
    )  # fmt: skip
    return (model(sol.params, {}, NEW_X)[0] - NEW_Y).square().mean()


def gradients(value, net, *others):
    return torch.autograd.grad(value, [*net.parameters(), *others])


RULES = [
    diffopt.sgd(), diffopt.sgd(nesterov=True), diffopt.adam(), diffopt.adamw(amsgrad=True),
    diffopt.rmsprop(), diffopt.adagrad(), diffopt.nadam(), diffopt.radam(),
    transforms.chain(transforms.clip_by_global_norm(), diffopt.adam()),
]  # fmt: skip


@pytest.mark.parametrize("opt", RULES, ids=repr)
def test_meta_gradients_equal_those_of_minimize(opt):
    net, lr = mlp(), leaf(0.05)
    found = gradients(adapted(net, opt, hparams=opt.hparams(lr=lr)), net, lr)
    expected = gradients(by_minimize(net, opt, opt.hparams(lr=lr)), net, lr)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("opt", "given"),
    [(diffopt.sgd(), torch.optim.SGD), (diffopt.adamw(), torch.optim.AdamW)],
    ids=["sgd", "adamw"],
)
def test_the_defaults_of_a_pure_optimizer_are_those_of_torch(opt, given):
    net = mlp()
    torch.testing.assert_close(adapted(net, opt), adapted(net, given(net.parameters())))


class FromStart(transforms.Wrapper):
    """Pulls the parameters back to where they started, which is its state."""

    def init(self, params):
        return self.optimizer.init(params), {name: p.clone() for name, p in params.items()}

    def update(self, params, grads, state, hparams):
        inner, start = state
        params, inner = self.optimizer.update(params, grads, inner, hparams)
        return {name: 0.7 * p + 0.3 * start[name] for name, p in params.items()}, (inner, start)


def test_a_state_that_starts_from_the_parameters_is_differentiated():
    net, opt = mlp(), FromStart(diffopt.sgd())
    found = adapted(net, opt, hparams=opt.hparams(lr=0.1))
    expected = by_minimize(net, opt, opt.hparams(lr=0.1))
    torch.testing.assert_close(gradients(found, net), gradients(expected, net))
    evaluated = adapted(net, opt, hparams=opt.hparams(lr=0.1), track_graph=False)
    torch.testing.assert_close(evaluated, expected)


def test_derivatives_are_right_to_second_order():
    net, opt = mlp(), diffopt.adam()

    def outer(scale, lr, beta2, x):
        hparams = opt.hparams(lr=lr, beta2=beta2)
        return adapted(Traced(net, scale), opt, hparams=hparams, loss=lambda f: loss_of(f, x))

    class Traced(nn.Module):
        """A module whose parameters are functions of a scale."""

        def __init__(self, net, scale):
            super().__init__()
            for name, p in net.named_parameters():
                self._parameters[name.replace(".", "_")] = scale * p.detach()

        def forward(self, x):
            h = torch.tanh(x @ self._parameters["0_weight"].T + self._parameters["0_bias"])
            return h @ self._parameters["2_weight"].T + self._parameters["2_bias"]

    inputs = leaf(1.3), leaf(0.1), leaf(0.9), X.clone().requires_grad_()
    assert torch.autograd.gradcheck(outer, inputs)
    assert torch.autograd.gradgradcheck(outer, inputs)


# Existing optimizers.


CLASSES = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
    "Adam": {"lr": 0.05, "amsgrad": True},
    "AdamW": {"lr": 0.05, "betas": (0.8, 0.9)},
    "Adamax": {"lr": 0.05},
    "NAdam": {"lr": 0.05, "momentum_decay": 0.1},
    "RAdam": {"lr": 0.05},
    "RMSprop": {"lr": 0.02, "momentum": 0.5, "centered": True},
    "Adagrad": {"lr": 0.1},
    "Adadelta": {"lr": 1.0},
    "ASGD": {"lr": 0.1, "t0": 1},
    "Rprop": {"lr": 0.02},
    "Adafactor": {"lr": 0.1},
}


def groups(net, **options):
    return [{"params": net[0].parameters()}, {"params": net[2].parameters(), **options}]


def trained(net, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()


@pytest.mark.parametrize("library", [torch.optim, diffopt.optim], ids=["torch", "diffopt"])
@pytest.mark.parametrize("name", CLASSES)
def test_steps_go_on_from_an_optimizer_and_can_be_copied_back(name, library):
    net = mlp()
    optimizer = getattr(library, name)(groups(net, lr=0.07), **CLASSES[name])
    trained(net, optimizer, 3)
    reference, net_before = copy.deepcopy((net, optimizer)), copy.deepcopy(net)
    trained(*reference, 2)
    with diffopt.innerloop(net, optimizer) as (fnet, inner):
        for _ in range(2):
            inner.step(loss_of(fnet))
    assert_equal_modules(fnet, reference[0])
    assert_equal_modules(net, net_before)
    inner.copy_back()
    assert_equal_modules(net, reference[0])
    trained(*reference, 2)
    trained(net, optimizer, 2)
    assert_equal_modules(net, reference[0])


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
@pytest.mark.parametrize("momenta", [(0.0, 0.9), (0.9, 0.0)])
def test_groups_with_and_without_momentum_go_on(name, momenta, steps):
    net = mlp()
    options = {"dampening": 0.5} if name == "SGD" and steps else {}
    optimizer = getattr(torch.optim, name)(
        [
            {"params": net[0].parameters(), "momentum": momenta[0], **options},
            {"params": net[2].parameters(), "momentum": momenta[1]},
        ],
        lr=0.05,
    )
    trained(net, optimizer, steps)
    reference = copy.deepcopy((net, optimizer))
    trained(*reference, 3)
    with diffopt.innerloop(net, optimizer) as (fnet, inner):
        for _ in range(3):
            inner.step(loss_of(fnet))
    inner.copy_back()
    trained(*reference, 1)
    trained(net, optimizer, 1)
    assert_equal_modules(net, reference[0])


def assert_equal_modules(net, other):
    found, expected = (dict(n.named_parameters()) | dict(n.named_buffers()) for n in (net, other))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)  # counts are float32


def trained_with_closures(net, optimizer, steps):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("library", [torch.optim, diffopt.optim], ids=["torch", "diffopt"])
@pytest.mark.parametrize("before", [0, 1, 4])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("history_size", [2, 100])
def test_lbfgs_goes_on_and_is_copied_back(library, before, steps, history_size):
    net = mlp()
    options = {"lr": 0.3, "max_iter": 1, "history_size": history_size}
    reference = copy.deepcopy(net)
    optimizer, other = (library.LBFGS(n.parameters(), **options) for n in (net, reference))
    trained_with_closures(net, optimizer, before)
    trained_with_closures(reference, other, before + steps)
    with diffopt.innerloop(net, optimizer) as (fnet, inner):
        for _ in range(steps):
            inner.step(loss_of(fnet))
    inner.copy_back()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kept = inner.state.old_dirs.clone()
    trained_with_closures(net, optimizer, 3)
    trained_with_closures(reference, other, 3)
    assert_equal_modules(net, reference)
    mine, theirs = (o.state[next(iter(o.state))] for o in (optimizer, other))
    assert mine.keys() == theirs.keys()
    assert [mine[key] for key in COUNTS] == [theirs[key] for key in COUNTS]
    torch.testing.assert_close(inner.state.old_dirs, kept, rtol=0, atol=0)


COUNTS = "n_iter", "func_evals"


WHOLE = {
    "LBFGS": lambda net: diffopt.optim.LBFGS(net.parameters(), lr=0.3, max_iter=1),
    "torch's LBFGS": lambda net: torch.optim.LBFGS(net.parameters(), lr=0.3, max_iter=1),
    "flatten": lambda net: diffopt.optim.from_pure(
        diffopt.transforms.flatten(diffopt.adam()), dict(net.named_parameters()), lr=0.1
    ),
}


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("frozen", [0, 1, 3])
@pytest.mark.parametrize("name", WHOLE)
def test_state_of_all_parameters_together_keeps_their_order_with_a_frozen_one(name, frozen, before):
    net = mlp()
    [*net.parameters()][frozen].requires_grad_(False)
    reference = copy.deepcopy(net)
    optimizer, other = map(WHOLE[name], (net, reference))
    trained_with_closures(net, optimizer, before)
    trained_with_closures(reference, other, before + 3)
    with diffopt.innerloop(net, optimizer) as (fnet, inner):
        for _ in range(3):
            inner.step(loss_of(fnet))
    inner.copy_back()
    assert_equal_modules(net, reference)
    trained_with_closures(net, optimizer, 2)
    trained_with_closures(reference, other, 2)
    assert_equal_modules(net, reference)


@pytest.mark.parametrize("library", [torch.optim, diffopt.optim], ids=["torch", "diffopt"])
def test_lbfgs_copied_back_twice_counts_each_step_once(library):
    net = mlp()
    optimizer = library.LBFGS(net.parameters(), lr=0.3, max_iter=1)
    trained_with_closures(net, optimizer, 2)
    with diffopt.innerloop(net, optimizer) as (fnet, inner):
        for _ in range(2):
            inner.step(loss_of(fnet))
            inner.copy_back()
    (row,) = optimizer.state.values()
    assert [row[key] for key in COUNTS] == [4, 4]


@pytest.mark.parametrize("name", [*CLASSES, "LBFGS"])
def test_copy_back_without_steps_changes_nothing(name):
    net = mlp()
    optimizer = getattr(torch.optim, name)(net.parameters(), **CLASSES.get(name, {}))
    trained_with_closures(net, optimizer, 1)
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    with diffopt.innerloop(net, optimizer) as (_, inner):
        pass
    inner.copy_back()
    after = net.state_dict(), optimizer.state_dict()
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    "pure", [transforms.chain(transforms.clip_by_global_norm(), diffopt.adam()), diffopt.adam()]
)
def test_optimizers_from_pure_go_on_and_are_copied_back(pure, named):
    net = mlp()
    params = dict(net.named_parameters()) if named else net.parameters()
    optimizer = diffopt.optim.from_pure(pure, params, lr=0.1)
    trained(net, optimizer, 2)
    reference = copy.deepcopy((net, optimizer))
    trained(*reference, 2)
    with diffopt.innerloop(net, optimizer) as (fnet, inner):
        for _ in range(2):
            inner.step(loss_of(fnet))
    inner.copy_back()
    trained(*reference, 1)
    trained(net, optimizer, 1)
    assert_equal_modules(net, reference[0])


def test_a_parameter_that_the_optimizer_lacks_is_not_moved_but_gets_a_meta_gradient():
    net = mlp()
    with diffopt.innerloop(net, torch.optim.SGD(net[2].parameters(), lr=0.1)) as (fnet, inner):
        inner.step(loss_of(fnet))
        torch.testing.assert_close(fnet[0].weight, net[0].weight, rtol=0, atol=0)
        loss_of(fnet, NEW_X, NEW_Y).backward()
    assert net[0].weight.grad.abs().min() > 0
    assert net[2].weight.grad.abs().min() > 0


def test_one_hyperparameter_for_each_group_is_learned():
    net, lrs, decay = mlp(), [leaf(0.1), leaf(0.2)], leaf(0.01)
    optimizer = torch.optim.SGD(groups(net), lr=1.0, momentum=0.9)
    override = {"lr": lrs, "weight_decay": decay}
    found = gradients(adapted(net, optimizer, override=override), net, *lrs, decay)
    opt = diffopt.sgd()
    hparams = opt.hparams(lr={"0": lrs[0], "2": lrs[1]}, momentum=0.9, weight_decay=decay)
    expected = gradients(by_minimize(net, opt, hparams), net, *lrs, decay)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("per_group", [False, True])
def test_betas_are_overridden_as_torch_names_them(per_group):
    net, b1, b2 = mlp(), leaf(0.8), leaf(0.9)
    optimizer = torch.optim.Adam(groups(net), lr=0.1)
    betas = [(b1, b2), (b1, b2)] if per_group else (b1, b2)
    found = gradients(adapted(net, optimizer, override={"betas": betas}), net, b1, b2)
    opt = diffopt.adam()
    hparams = opt.hparams(lr=0.1, beta1=b1, beta2=b2)
    expected = gradients(by_minimize(net, opt, hparams), net, b1, b2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_rate_in_a_group_that_requires_a_gradient_gets_one():
    net, lr = mlp(), leaf(0.1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = lr
    (found,) = torch.autograd.grad(adapted(net, optimizer), lr)
    opt = diffopt.sgd()
    (expected,) = torch.autograd.grad(by_minimize(net, opt, opt.hparams(lr=lr)), lr)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("way", ["function", "step", "override"])
def test_each_step_may_have_its_own_rate(way):
    net, lrs, opt = mlp(), [leaf(0.1), leaf(0.2), leaf(0.3)], diffopt.sgd()
    expected = by_minimize(net, opt, lambda t: opt.hparams(lr=lrs[t]))
    hparams = (lambda t: opt.hparams(lr=lrs[t])) if way == "function" else None
    with diffopt.innerloop(net, opt, hparams=hparams) as (fnet, inner):
        for lr in lrs:
            options = {
                "step": {"hparams": opt.hparams(lr=lr)},
                "override": {"override": {"lr": lr}},
            }
            inner.step(loss_of(fnet), **options.get(way, {}))
    found = loss_of(fnet, NEW_X, NEW_Y)
    torch.testing.assert_close(gradients(found, net, *lrs), gradients(expected, net, *lrs))


# Options.


def test_first_order_equals_that_of_minimize():
    net, lr, opt = mlp(), leaf(0.1), diffopt.adam()
    hparams = opt.hparams(lr=lr)
    found = gradients(adapted(net, opt, hparams=hparams, first_order=True), net, lr)
    expected = by_minimize(net, opt, hparams, adjoint=diffopt.adjoint.FirstOrder())
    torch.testing.assert_close(found, gradients(expected, net, lr), rtol=1e-12, atol=1e-14)


def test_losses_of_first_order_steps_can_be_part_of_the_outer_loss():
    net, opt = mlp(), diffopt.sgd()
    total = torch.zeros((), dtype=torch.float64)
    with diffopt.innerloop(net, opt, hparams=opt.hparams(lr=0.1), first_order=True) as (f, inner):
        for _ in range(2):
            value = loss_of(f)
            total = total + value
            inner.step(value)
    total.backward()
    assert net[0].weight.grad.abs().min() > 0
    torch.testing.assert_close(sum(inner.losses), total.detach())


def test_gradients_pass_through_the_callback_and_reach_what_it_learns():
    net, opt, lr, bound = mlp(), diffopt.sgd(), leaf(0.5), leaf(0.1)
    seen = []

    def clip(grads):
        seen.append([*grads])
        norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
        return {name: g * bound / (norm + 1e-6) for name, g in reversed(grads.items())}

    hparams = opt.hparams(lr=lr)
    found = adapted(net, opt, hparams=hparams, grad_callback=clip)
    chain = transforms.chain(transforms.clip_by_global_norm(), opt)
    expected = by_minimize(net, chain, chain.hparams(lr=lr, max_norm=bound))
    found, expected = (gradients(value, net, lr, bound) for value in (found, expected))
    torch.testing.assert_close(found, expected)
    assert seen == [[name for name, _ in net.named_parameters()]] * 3


@pytest.mark.parametrize("ambient", [False, True])
def test_without_a_graph_values_are_the_same_and_nothing_is_kept(ambient):
    net, opt = mlp(), diffopt.adam()
    hparams = opt.hparams(lr=leaf(0.1))
    expected = adapted(net, opt, hparams=hparams, steps=5)
    alive = []
    with torch.set_grad_enabled(not ambient):
        with diffopt.innerloop(net, opt, hparams=hparams, track_graph=ambient) as (fnet, inner):
            for _ in range(5):
                inner.step(loss_of(fnet))
                assert all(p.is_leaf and p.requires_grad for p in fnet.parameters())
                alive.append(weakref.ref(fnet[0].weight))
            assert [ref() is not None for ref in alive] == [False] * 4 + [True]
            found = loss_of(fnet, NEW_X, NEW_Y)
        assert torch.is_grad_enabled() is not ambient
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    with pytest.raises(IndexError, match="only the parameters after the last step, 5, are kept"):
        inner.params(2)
    assert [*inner.params()] == [*inner.params(5)] == [*dict(net.named_parameters())]


def clamped(fnet, inner):
    for p in fnet.parameters():
        p.data.clamp_(-0.2, 0.2)  # of which no version tells


def halved(fnet, inner):
    with torch.no_grad():
        for x in inner.state.exp_avg.values():
            x.mul_(0.5)


def replaced(fnet, inner):
    double = {name: 2 * x for name, x in inner.state.exp_avg.items()}
    inner.state = inner.state._replace(exp_avg=double)


def doubled(fnet, inner):
    inner.grad_callback = lambda grads: {name: 2 * g for name, g in grads.items()}


@pytest.mark.parametrize("track_graph", [True, False])
@pytest.mark.parametrize("interfere", [clamped, halved, replaced, doubled])
def test_what_changes_between_steps_is_seen_by_the_next(interfere, track_graph):
    ends, lr = [], leaf(0.1)
    for repeats in (True, False):
        net, opt = mlp(), diffopt.adam()
        hp = opt.hparams(lr=lr)
        with diffopt.innerloop(net, opt, hparams=hp, track_graph=track_graph) as (fnet, inner):
            inner._repeats = repeats
            for t in range(6):
                inner.step(loss_of(fnet))
                if t == 3:
                    interfere(fnet, inner)
        ends.append([*inner.params().values(), *inner.state.exp_avg_sq.values()])
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


def test_a_state_that_is_read_without_a_graph_keeps_its_own():
    net, opt = mlp(), diffopt.adam()
    with diffopt.innerloop(net, opt, hparams=opt.hparams(lr=leaf(0.1))) as (fnet, inner):
        for _ in range(3):
            inner.step(loss_of(fnet))
        with torch.no_grad():
            state = inner.state
    assert all(x.requires_grad for x in state.exp_avg.values())
    assert inner.state is state


def test_arguments_of_steps_are_gathered_once(monkeypatch):
    calls, gather = [], leafwise.gather
    monkeypatch.setattr(leafwise, "gather", lambda *a, **k: calls.append(1) or gather(*a, **k))
    adapted(mlp(), diffopt.adam(), steps=5)
    assert len(calls) == 1


@pytest.mark.parametrize("library", [torch.optim, diffopt.optim])
def test_without_a_graph_layers_of_the_copy_may_be_frozen_for_some_steps(library):
    net, trained = mlp(), mlp()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    opt = torch.optim.SGD(trained.parameters(), **options)
    given = library.SGD(net.parameters(), **options)
    with diffopt.innerloop(net, given, track_graph=False) as (fnet, inner):
        for frozen in (False, True, False):
            for model in (fnet, trained):
                model[0].requires_grad_(not frozen)
            inner.step(loss_of(fnet))
            opt.zero_grad()
            loss_of(trained).backward()
            opt.step()
    torch.testing.assert_close(dict(fnet.named_parameters()), dict(trained.named_parameters()))


def test_parameters_of_every_step_are_kept_and_differentiable():
    net, opt = mlp(), diffopt.sgd()
    with diffopt.innerloop(net, opt, hparams=opt.hparams(lr=0.1)) as (fnet, inner):
        seen = [inner.params()]
        for _ in range(3):
            inner.step(loss_of(fnet))
            seen.append(inner.params())
    assert inner.steps == len(inner.losses) == 3
    for t in range(4):
        for name, p in inner.params(t).items():
            assert p is seen[t][name] is inner.params(t - 4)[name]
    assert dict(fnet.named_parameters()) == inner.params(3)
    torch.testing.assert_close(inner.params(0), dict(net.named_parameters()))
    assert all(g is not None for g in gradients(inner.params(2)["0.weight"].sum(), net)[:1])
    for t in (4, -5):
        with pytest.raises(IndexError, match="3 steps have been taken"):
            inner.params(t)


def test_nothing_is_alive_afterwards():
    def loop(net, opt):
        with diffopt.innerloop(net, opt, hparams=opt.hparams(lr=0.1)) as (fnet, inner):
            for _ in range(3):
                inner.step(loss_of(fnet))
            outer = loss_of(fnet, NEW_X, NEW_Y)
        outer.backward()
        tensors = [p for t in range(4) for p in inner.params(t).values()]
        tensors += [*fnet.buffers(), *inner.state.exp_avg.values(), outer]
        return [*map(weakref.ref, tensors), weakref.ref(fnet), weakref.ref(inner)]

    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    gc.disable()
    try:
        assert {ref() for ref in loop(net, diffopt.adam())} == {None}
    finally:
        gc.enable()


# Modules.


class Net(nn.Module):
    """Submodules, methods, a buffer, tied weights, a frozen and an unused parameter."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh())
        self.head = nn.Linear(3, 1)
        self.tied = nn.Linear(2, 3)
        self.tied.weight = self.encoder[0].weight
        self.frozen = nn.Parameter(torch.full((1,), 0.5), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("calls", torch.zeros(()))

    def features(self, x):
        return self.encoder(x) + self.tied(x)

    def forward(self, x):
        self.calls += 1
        return self.head(self.features(x)) * self.frozen


def net_of_kinds():
    torch.manual_seed(0)
    return Net().double()


def test_a_copy_is_of_the_modules_class_and_keeps_all_kinds_of_tensors_apart():
    net, opt = net_of_kinds(), diffopt.adamw()
    before = copy.deepcopy(net.state_dict())
    with diffopt.innerloop(net, opt, hparams=opt.hparams(lr=0.1, weight_decay=0.1)) as (f, inner):
        assert type(f) is Net
        for _ in range(2):
            inner.step(loss_of(f))
        assert f.tied.weight is f.encoder[0].weight is inner.params()["encoder.0.weight"]
        assert f.frozen is net.frozen
        torch.testing.assert_close(f.unused, net.unused, rtol=0, atol=0)
        assert f.calls == f.encoder[1].num_batches_tracked == 2
        torch.testing.assert_close(f.features(X), f.encoder(X) + f.tied(X))
        loss_of(f).backward()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    grads = {name: p.grad is not None for name, p in net.named_parameters()}
    assert grads == {name: name not in ("frozen", "unused") for name in grads}


@pytest.mark.parametrize("optimizer", ["pure", "torch"])
def test_all_kinds_of_tensors_are_copied_back(optimizer):
    net, opt = net_of_kinds(), diffopt.sgd()
    trained_net = copy.deepcopy(net)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    trained(trained_net, torch.optim.SGD(trained_net.parameters(), lr=0.1, momentum=0.9), 2)
    opt, hparams = (sgd, None) if optimizer == "torch" else (opt, opt.hparams(lr=0.1, momentum=0.9))
    with diffopt.innerloop(net, opt, hparams=hparams) as (f, inner):
        for _ in range(2):
            inner.step(loss_of(f))
        outer = loss_of(f)
        inner.copy_back(state=optimizer == "torch")
    trained_net(X)
    assert_equal_modules(f, trained_net)
    outer.backward()
    assert net.encoder[0].weight.grad.abs().min() > 0
    assert net.calls == 3


@pytest.mark.parametrize("part", ["whole", "part"])
def test_a_pass_in_training_does_not_change_the_gradient_of_one_in_evaluation(part):
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()

    def meta_gradient(interfere):
        opt = diffopt.sgd()
        with diffopt.innerloop(net.eval(), opt, hparams=opt.hparams(lr=0.1)) as (f, inner):
            value = f(X).square().sum()
            if interfere:
                f.train()
                f(5 * X) if part == "whole" else f[1](5 * f[0](X))
                f.eval()
            inner.step(value)
            return gradients(f[0](X).square().sum(), net[0])

    torch.testing.assert_close(meta_gradient(True), meta_gradient(False), rtol=0, atol=0)


def test_several_passes_and_modes_belong_to_one_step():
    net, opt = net_of_kinds(), diffopt.sgd()
    with diffopt.innerloop(net, opt, hparams=opt.hparams(lr=0.1)) as (f, inner):
        inner.step(loss_of(f) + loss_of(f, NEW_X, NEW_Y))
        f.eval()
        assert net.training
        inner.step(loss_of(f))
        loss_of(f).backward()
    assert net.head.weight.grad.abs().min() > 0


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_modules(kind):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = kind(2, 3, batch_first=True), nn.Linear(3, 1)

        def forward(self, x):
            return self.head(self.rnn(x.reshape(3, 2, 2))[0]).reshape(6, 1)

    torch.manual_seed(0)
    net, opt, lr = Recurrent().double(), diffopt.sgd(), leaf(0.2)
    found = adapted(net, opt, hparams=opt.hparams(lr=lr))
    expected = by_minimize(net, opt, opt.hparams(lr=lr))
    torch.testing.assert_close(gradients(found, net, lr), gradients(expected, net, lr))


def test_dropout_draws_as_the_module_does():
    net, opt = nn.Sequential(nn.Linear(2, 8), nn.Dropout(), nn.Linear(8, 1)).double(), diffopt.sgd()
    values = []
    for run in (adapted, by_minimize):
        torch.manual_seed(1)
        values.append(run(net, opt, hparams=opt.hparams(lr=0.1)))
    torch.testing.assert_close(gradients(values[0], net), gradients(values[1], net))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    net, lr = mlp().float(), torch.tensor(0.1, requires_grad=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def run(enabled):
        with torch.autocast("cpu", dtype, enabled=enabled):
            return adapted(
                net, optimizer, override={"lr": lr},
                loss=lambda f: (f(X.float()).float() - Y.float()).square().mean(),
                outer=lambda f, *_: (f(NEW_X.float()).float() - NEW_Y.float()).square().mean(),
            )  # fmt: skip

    found, expected = (gradients(run(enabled), net, lr) for enabled in (True, False))
    assert all(g.dtype is torch.float32 for g in found)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.02)


def test_loops_nest():
    """The derivative of an inner loop's result is the gradient of an outer loop's step."""
    net, opt, lr = mlp(), diffopt.sgd(), leaf(0.1)
    hparams = opt.hparams(lr=lr)
    with diffopt.innerloop(net, opt, hparams=hparams) as (f, outer):
        for _ in range(2):
            outer.step(adapted(f, opt, hparams=hparams, steps=2))
        found = gradients(loss_of(f, NEW_X, NEW_Y), net, lr)

    model = diffopt.nn.functionalize(net)

    def loss(p, x, y):
        return (model(p, {}, x)[0] - y).square().mean()

    def meta_loss(p):
        sol = diffopt.minimize(loss, p, X, Y, optimizer=opt, hparams=hparams, steps=2)
        return loss(sol.params, NEW_X, NEW_Y)

    sol = diffopt.minimize(meta_loss, model.params, optimizer=opt, hparams=hparams, steps=2)
    expected = gradients(loss(sol.params, NEW_X, NEW_Y), net, lr)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_the_gradient_of_a_step_is_partial_where_the_loss_uses_the_module_itself():
    """As in iMAML, where the distance from the start is part of the loss."""
    net, opt = mlp(), diffopt.sgd()

    def proximal(f):
        pairs = zip(f.parameters(), net.parameters(), strict=True)
        return loss_of(f) + sum((p - q).square().sum() for p, q in pairs)

    found = adapted(net, opt, hparams=opt.hparams(lr=0.1), loss=proximal)
    model = diffopt.nn.functionalize(net)

    def loss(p, start):
        value = (model(p, {}, X)[0] - Y).square().mean()
        return value + sum((p[k] - start[k]).square().sum() for k in p)

    sol = diffopt.minimize(
        loss, model.params, model.params, optimizer=opt, hparams=opt.hparams(lr=0.1), steps=3
    )
    expected = (model(sol.params, {}, NEW_X)[0] - NEW_Y).square().mean()
    torch.testing.assert_close(gradients(found, net), gradients(expected, net), rtol=1e-10, atol=0)


def test_threads_may_adapt_one_module_at_once():
    net, opt = net_of_kinds(), diffopt.adam()
    results = {}

    def work(i):
        x = X * (1 + i)
        results[i] = adapted(
            net, opt, 4, loss=lambda f: loss_of(f, x), hparams=opt.hparams(lr=0.1)
        ).item()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = dict(results)
    for i in range(4):
        work(i)
    assert together == results


def test_hooks_belong_to_the_copy():
    net, opt, calls = mlp(), diffopt.sgd(), []
    net[0].register_forward_hook(lambda module, *_: calls.append(module))
    fired = []
    net[0].weight.register_hook(fired.append)
    with diffopt.innerloop(net, opt, hparams=opt.hparams(lr=0.1)) as (f, inner):
        handle = f[2].register_forward_hook(lambda *_: calls.append("copy"))
        inner.step(loss_of(f))
        assert calls == [f[0], "copy"]
        handle.remove()
        inner.step(loss_of(f))
        assert calls == [f[0], "copy", f[0]]
        assert not fired
        loss_of(f).backward()
    net(X)
    assert calls[-1] is net[0]
    assert len(fired) == 1


def test_what_is_done_in_place_to_a_copy_leaves_the_module_alone():
    net, opt = net_of_kinds(), diffopt.sgd()
    before = copy.deepcopy(net.state_dict())
    with diffopt.innerloop(net, opt) as (f, _):
        nn.init.zeros_(f.head.weight)
        f.encoder[1].reset_running_stats()
        assert not f.head.weight.any()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm,
                                  nn.utils.parametrizations.spectral_norm])  # fmt: skip
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
def test_normalized_weights(norm):
    """torch's double backward of weight normalization is wrong without a repair."""
    torch.manual_seed(0)
    net, opt = nn.Sequential(norm(nn.Linear(2, 3)), nn.Linear(3, 1)).double(), diffopt.sgd()
    if "spectral" in norm.__name__:
        net.eval()

    def outer(lr):
        return adapted(net, opt, hparams=opt.hparams(lr=lr))

    assert torch.autograd.gradcheck(outer, (leaf(0.1),))


def test_what_parametrize_caches_is_dropped_by_a_step():
    net, opt = nn.Sequential(nn.Linear(2, 1)).double(), diffopt.sgd()
    nn.utils.parametrizations.weight_norm(net[0])
    expected = adapted(net, opt, hparams=opt.hparams(lr=0.1))
    with nn.utils.parametrize.cached():
        found = adapted(net, opt, hparams=opt.hparams(lr=0.1))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Recomputed(nn.Module):
    """What it computes with `part`, a submodule, and a parameter of its own is checkpointed."""

    def __init__(self, part, way):
        super().__init__()
        self.part, self.way = part, way
        self.gate = nn.Parameter(torch.tensor([0.5, 2.0]))
        self.head = nn.Linear(2, 1)

    def hidden(self, x):
        if self.way == "nested":
            return checkpoint(self.part, x, use_reentrant=False).tanh() * self.gate
        return self.part(x).tanh() * self.gate

    def forward(self, x):
        if self.way == "plain":
            return self.head(self.hidden(x))
        return self.head(checkpoint(self.hidden, x, use_reentrant=False))


class Gated(nn.Module):
    """A recurrent layer over one step."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(2, 2)

    def forward(self, x):
        return self.cell(x[None])[0][0]


@pytest.mark.parametrize("way", ["checkpointed", "nested"])
@pytest.mark.parametrize("part", [
    lambda: nn.Linear(2, 2), lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), Gated,
])  # fmt: skip
def test_checkpoints_recompute_with_the_parameters_of_their_step(part, way):
    def found(way):
        torch.manual_seed(0)
        net = Recomputed(part(), way).double()
        early = []  # of a loss that no step minimizes

        def loss(f):
            early.append(loss_of(f, NEW_X, NEW_Y))
            return loss_of(f)

        opt = diffopt.adam()
        value = adapted(net, opt, hparams=opt.hparams(lr=0.1), loss=loss)
        return gradients(value + sum(early), net)

    torch.testing.assert_close(found(way), found("plain"))


def doubled(grads):
    return {name: None if grad is None else 2 * grad for name, grad in grads.items()}


@pytest.mark.parametrize("opt", [diffopt.sgd(), diffopt.lbfgs()], ids=repr)
def test_a_step_under_no_grad_is_differentiated(opt):
    def found(grad_enabled):
        net, lr = mlp(), leaf(0.1)
        with diffopt.innerloop(net, opt, override={"lr": lr}, grad_callback=doubled) as (f, inner):
            for _ in range(2):
                loss = loss_of(f)
                with torch.set_grad_enabled(grad_enabled):
                    inner.step(loss)
            return gradients(loss_of(f, NEW_X, NEW_Y), net, lr)

    torch.testing.assert_close(found(False), found(True), rtol=0, atol=0)


@pytest.mark.parametrize("steps", [0, 2])
def test_parameters_that_are_replaced_in_the_copy_are_used(steps):
    net, opt, other = mlp(), diffopt.sgd(), nn.Linear(3, 1).double()
    with diffopt.innerloop(net, opt) as (fnet, inner):
        for _ in range(steps):
            inner.step(loss_of(fnet))
        hidden = fnet[:2](X)
        fnet[2].weight, fnet[2].bias = other.weight, other.bias
        torch.testing.assert_close(fnet(X), other(hidden))
        fnet[2].bias = None
        torch.testing.assert_close(fnet(X), hidden @ other.weight.T)


def test_a_loop_inside_a_backward_pass_moves_its_copy():
    class Inside(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, cotangent):
            with torch.enable_grad():
                return adapted(mlp(), diffopt.sgd()).detach()

    x = leaf(1.0)
    Inside.apply(x).backward()
    torch.testing.assert_close(x.grad, adapted(mlp(), diffopt.sgd()).detach())


# Wrapped modules, and what torch cannot differentiate.


@pytest.fixture
def one_process():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def distributed(net):
    return nn.parallel.DistributedDataParallel(net)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("wrap", [
    distributed, torch.compile, lambda net: distributed(torch.compile(net)), nn.DataParallel,
    lambda net: Around(torch.compile(net)), lambda net: Around(distributed(net)),
    lambda net: net.compile() or net,
])  # fmt: skip
def test_wrapped_modules(wrap, one_process):
    net, opt = mlp(), diffopt.adam()
    expected = gradients(adapted(net, opt, hparams=opt.hparams(lr=0.1)), net)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    wrapped = wrap(copy.copy(net))
    torch.testing.assert_close(gradients(adapted(wrapped, optimizer), net), expected)


def test_a_loop_inside_the_forward_pass_of_distributed_data_parallel(one_process):
    class Meta(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self):
            return adapted(self.net, diffopt.sgd(), hparams=diffopt.sgd().hparams(lr=0.1))

    net = mlp()
    expected = gradients(Meta(net)(), net)
    distributed(Meta(net))().backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], [*expected])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo
def test_functions_that_are_compiled_say_what_to_do():
    class Compiled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)
            self.f = torch.compile(lambda h: h.sin() * h, backend="aot_eager")

        def forward(self, x):
            return self.f(self.layer(x))

    net, opt = Compiled().double(), diffopt.sgd()
    value = adapted(net, opt, hparams=opt.hparams(lr=0.1))
    with pytest.raises(NotImplementedError, match="that is not compiled"):
        value.backward()
    adapted(net, opt, hparams=opt.hparams(lr=0.1), first_order=True).backward()
    assert net.layer.weight.grad.abs().min() > 0


def test_attention_says_which_kernel_has_second_derivatives():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(2, 4)

        def forward(self, x):
            h = self.project(x)[None, None]
            return nn.functional.scaled_dot_product_attention(h, h, h)[0, 0].sum(1, keepdim=True)

    net, opt = Attention().double(), diffopt.sgd()
    hparams = opt.hparams(lr=0.1)
    with pytest.raises(NotImplementedError, match=r"sdpa_kernel\(SDPBackend\.MATH\)"):
        adapted(net, opt, hparams=hparams).backward()
    with sdpa_kernel(SDPBackend.MATH):
        value = adapted(net, opt, hparams=hparams)
    value.backward()
    assert net.project.weight.grad.abs().min() > 0


# Mistakes.


def enter(net, optimizer, **options):
    with diffopt.innerloop(net, optimizer, **options):
        pass


BAD_ARGUMENTS = {
    "model": (lambda net: (3, diffopt.sgd()), {}, TypeError, "not a torch.nn.Module"),
    "no parameters": (lambda net: (nn.ReLU(), diffopt.sgd()), {}, ValueError, "no parameters to"),
    "optimizer": (lambda net: (net, 3), {}, TypeError, "optimizer is 3, not a diffopt optimizer"),
    "class": (lambda net: (net, torch.optim.SGD), {}, TypeError, "is the class SGD: pass"),
    "another's": (lambda net: (net, torch.optim.SGD(mlp().parameters())), {}, ValueError,
                  r"param_groups\[0\]\['params'\]\[0\] is not a parameter of the module"),
    "hparams": (lambda net: (net, diffopt.sgd()), {"hparams": 0.1}, TypeError, "hparams is 0.1"),
    "state": (lambda net: (net, diffopt.sgd()), {"state": 3}, TypeError, "state has type int"),
    "torch's state": (lambda net: (net, torch.optim.SGD(net.parameters())), {"state": 3}, TypeError,
                      "pass a pure optimizer"),
    "unknown": (lambda net: (net, diffopt.sgd()), {"override": {"rate": 1}}, TypeError,
                "override has 'rate', but the hyperparameters are lr, weight_decay"),
    "momentum": (lambda net: (net, torch.optim.SGD(net.parameters())),
                 {"override": {"momentum": 0.9}}, TypeError,
                 "lr, weight_decay: create the optimizer with a momentum other than 0"),
    "groups": (lambda net: (net, diffopt.sgd()), {"override": {"lr": [1, 2]}}, ValueError,
               "override.'lr'. has 2 values"),
    "range": (lambda net: (net, diffopt.sgd()), {"override": {"lr": -1.0}}, ValueError, "lr is -1"),
    "override": (lambda net: (net, diffopt.sgd()), {"override": "lr"}, TypeError, "not a dict"),
    "betas": (lambda net: (net, diffopt.adam()), {"override": {"betas": 0.9}}, TypeError,
              "must be 2 numbers"),
    "callback": (lambda net: (net, diffopt.sgd()), {"grad_callback": 3}, TypeError, "a function"),
    "first_order": (lambda net: (net, diffopt.sgd()), {"first_order": 1}, TypeError, "not a bool"),
    "track_graph": (lambda net: (net, diffopt.sgd()), {"track_graph": 1}, TypeError, "not a bool"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BAD_ARGUMENTS)
def test_mistaken_arguments_are_rejected(mistake):
    arguments, options, error, match = BAD_ARGUMENTS[mistake]
    with pytest.raises(error, match=match):
        enter(*arguments(mlp()), **options)


def unfrozen(f):
    f.frozen = nn.Parameter(torch.ones(1, dtype=torch.float64))
    return loss_of(f)


BAD_LOSSES = {
    "number": (lambda f, net, old: 1.0, TypeError, "loss is 1.0 of type float, not a tensor"),
    "vector": (lambda f, net, old: f(X)[:, 0], ValueError, r"has shape \(6,\)"),
    "integer": (
        lambda f, net, old: torch.ones((), dtype=torch.long),
        ValueError,
        "dtype torch.int",
    ),
    "constant": (lambda f, net, old: loss_of(f).detach(), ValueError, "loss has no graph"),
    "stale": (lambda f, net, old: old, ValueError, "after the last step"),
    "the module's": (lambda f, net, old: loss_of(net), ValueError, "does not depend on"),
    "new parameter": (lambda f, net, old: unfrozen(f), ValueError, "'frozen' has been added"),
}


@pytest.mark.parametrize("track_graph", [True, False])
@pytest.mark.parametrize("mistake", BAD_LOSSES)
def test_mistaken_losses_are_rejected_and_nothing_has_changed(mistake, track_graph):
    net, opt = net_of_kinds(), diffopt.adam()
    make, error, match = BAD_LOSSES[mistake]
    with diffopt.innerloop(net, opt, track_graph=track_graph) as (f, inner):
        old = loss_of(f)
        inner.step(old)
        before = inner.params(), inner.state
        with pytest.raises(error, match=match):
            inner.step(make(f, net, old))
        assert (inner.params(), inner.state) == before
        assert inner.steps == len(inner.losses) == 1


@pytest.mark.parametrize(("returned", "error", "match"), [
    (lambda grads: None, TypeError, "grad_callback returned None"),
    (lambda grads: {"0.weight": grads["0.weight"]}, ValueError, "'0.bias'. is missing"),
    (lambda grads: dict.fromkeys(grads, 1.0), TypeError, r"grads\['0.weight'\] is 1.0"),
])  # fmt: skip
def test_what_a_callback_returns_is_checked(returned, error, match):
    with diffopt.innerloop(mlp(), diffopt.sgd(), grad_callback=returned) as (f, inner):
        value = loss_of(f)
        with pytest.raises(error, match=match):
            inner.step(value)


def test_a_step_has_no_adjoint_and_points_to_minimize():
    with diffopt.innerloop(mlp(), diffopt.sgd()) as (f, inner):
        with pytest.raises(TypeError, match=r"no adjoint.*diffopt\.minimize"):
            inner.step(loss_of(f), adjoint=diffopt.adjoint.Checkpointed())
        with pytest.raises(TypeError, match="no argument 'retain_graph'"):
            inner.step(loss_of(f), retain_graph=True)
        with pytest.raises(TypeError, match="no argument 'grad_callback': set inner"):
            inner.step(loss_of(f), grad_callback=dict)


def test_there_are_no_steps_after_the_context():
    with diffopt.innerloop(mlp(), diffopt.sgd()) as (f, inner):
        inner.step(loss_of(f))
    assert inner.ended
    with pytest.raises(RuntimeError, match="the innerloop has ended"):
        inner.step(loss_of(f))


@pytest.mark.parametrize("run", [
    lambda outer: torch.func.grad(outer)(torch.tensor(0.1)),
    lambda outer: torch.vmap(outer)(torch.ones(2)),
    lambda outer: torch.func.jvp(outer, (torch.ones(()),), (torch.ones(()),)),
])  # fmt: skip
def test_transforms_point_to_minimize(run):
    net, opt = mlp(), diffopt.sgd()
    with pytest.raises(RuntimeError, match=r"use diffopt\.minimize"):
        run(lambda lr: adapted(net, opt, hparams=opt.hparams(lr=lr)))


def test_inference_mode_is_rejected():
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad"):
        enter(mlp(), diffopt.sgd())


@pytest.mark.parametrize("run", [
    lambda step: torch.func.grad(lambda x: step() or x)(torch.tensor(0.1)),
    lambda step: torch.vmap(lambda x: step() or x)(torch.ones(2)),
    lambda step: torch.inference_mode()(step)(),
])  # fmt: skip
def test_a_step_is_refused_where_its_loop_would_be(run):
    with diffopt.innerloop(mlp(), diffopt.sgd()) as (f, inner):
        inner.step(loss_of(f))
        loss = loss_of(f)
        with pytest.raises(RuntimeError, match=r"use (diffopt\.minimize|torch\.no_grad)"):
            run(lambda: inner.step(loss))
        inner.step(loss)
        assert inner.steps == 2


def test_copying_back_is_refused_where_it_cannot_be():
    net = mlp()
    with diffopt.innerloop(net, torch.optim.SGD(net.parameters(), lr=0.1)) as (f, inner):
        inner.step(loss_of(f))
        with diffopt.innerloop(f, diffopt.sgd()) as (_, innermost):
            pass
        with pytest.raises(ValueError, match="copy of another innerloop"):
            innermost.copy_back()
        inner.copy_back(state=False)
    assert_equal_modules(net, f)


def test_an_optimizer_that_is_replaced_takes_the_next_step():
    net = nn.Linear(2, 1).double()
    start = {name: p.detach() for name, p in net.named_parameters()}
    with diffopt.innerloop(net, diffopt.adam()) as (fnet, inner):
        for maximize in (False, False, True):
            inner.optimizer = diffopt.adam(maximize=maximize)
            inner.step(fnet(torch.ones(1, 2, dtype=torch.float64)).sum())
        moved = {name: p - start[name] for name, p in inner.params().items()}
    lr = diffopt.adam().hparams().lr
    # Gradients of 1, 1 and -1: averages of 0.1, 0.19 and 0.071, with bias corrections.
    expected = -lr * (2 + (0.9 * 0.19 - 0.1) / (1 - 0.9**3))
    torch.testing.assert_close(
        moved, {name: torch.full_like(p, expected) for name, p in moved.items()}
    )
