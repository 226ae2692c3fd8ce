"""Constants that a function captures, modified between its run and the backward pass."""

import array
import collections
import functools
import types
import weakref

import numpy as np
import pytest
import torch

import diffopt
from diffopt import adjoint
from diffopt.implicit import implicit_fixed_point, implicit_root
from diffopt.linear import ConjugateGradient

F64 = torch.float64
opt = diffopt.sgd()


def loop(how, loss, x, steps=5):
    start = torch.zeros(3, dtype=F64)
    hp = opt.hparams(lr=0.1, momentum=0.5)
    return diffopt.minimize(
        loss, start, x, optimizer=opt, hparams=hp, steps=steps, adjoint=how
    ).params


def minimized(how):
    def solve(c, x):
        return loop(how, lambda w, x: (1 + x) * (w - c).square().sum(), x)

    return solve


def batched(c, x):
    return torch.vmap(lambda s: minimized(adjoint.Checkpointed())(c, s * x))(torch.ones(2).to(F64))


def unrolled(c, x):
    return adjoint.Checkpointed().run(lambda k, a, _: ((k - c) * a, None), c * 0, x, [0] * 4)[0]


def root(c, x):
    solve = implicit_root(lambda w, x: w**3 * x - c, lambda w, x: (c / x) ** (1 / 3))
    return solve(torch.ones(3, dtype=F64), x)


def fixed_point(c, x):
    return implicit_fixed_point(lambda w, x: torch.cos(w * x + c))(torch.ones(3, dtype=F64), x)


def linear(c, x):
    return ConjugateGradient().solve(lambda v: c * v, x.expand(3)).value


RECOMPUTE = {
    "Checkpointed": minimized(adjoint.Checkpointed()),
    "levels": minimized(adjoint.Checkpointed(levels=2)),
    "forward-over-reverse": minimized(adjoint.Checkpointed(hvp="forward-over-reverse")),
    "Reversible": minimized(adjoint.Reversible()),
    "Implicit": minimized(adjoint.Implicit(root_tolerance=float("inf"))),
    "vmap": batched,
    "unroll": unrolled,
    "implicit_root": root,
    "implicit_fixed_point": fixed_point,
    "linear": linear,
}
DO_NOT = [adjoint.OneStep(), adjoint.Truncated(2), adjoint.ForwardMode(), adjoint.Unrolled()]


def modified(solve):
    """The derivative before a captured constant is modified, and a function that computes it."""
    c = torch.ones(3, dtype=F64)
    x = torch.tensor(0.5, dtype=F64, requires_grad=True)
    y = solve(c, x).sum()
    before = torch.autograd.grad(y, x, retain_graph=True)
    c[0] += 1  # through a view
    return before, lambda: torch.autograd.grad(y, x)


@pytest.mark.parametrize("name", RECOMPUTE)
def test_what_recomputes_refuses_a_captured_constant_that_was_modified(name):
    _, again = modified(RECOMPUTE[name])
    with pytest.raises(RuntimeError, match=r"captures a tensor of shape \(3,\) and torch.float64"):
        again()


@pytest.mark.parametrize("how", DO_NOT, ids=lambda how: type(how).__name__)
def test_what_does_not_recompute_takes_one(how):
    before, again = modified(minimized(how))
    assert again() == before


@pytest.mark.parametrize("name", ["Checkpointed", "Reversible"])
def test_a_constant_that_the_loss_itself_writes_to_is_not_checked(name):
    calls = torch.zeros(())

    def loss(w, x):
        calls.add_(1)
        return (1 + x) * (w - 1).square().sum()

    x = torch.tensor(0.5, dtype=F64, requires_grad=True)
    assert torch.autograd.grad(loop(getattr(adjoint, name)(), loss, x).sum(), x)


def test_what_the_loss_makes_itself_is_not_checked_and_nothing_is_kept():
    kept = []

    def loss(w, x):
        scale = torch.tensor(1.0, dtype=F64)  # made in every call
        kept.append(weakref.ref(scale))
        return scale.mul_(1 + x.detach()) * x * (w - 1).square().sum()

    x = torch.tensor(0.5, dtype=F64, requires_grad=True)
    y = loop(adjoint.Checkpointed(), loss, x).sum()
    assert not any(reference() is not None for reference in kept[:1])
    assert torch.autograd.grad(y, x)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_loss_is_compiled_once():
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module

    loss = torch.compile(lambda w, x: (1 + x) * (w - 1).square().sum(), backend=backend)
    x = torch.tensor(0.5, dtype=F64, requires_grad=True)
    for steps in (3, 4):
        y = loop(adjoint.Checkpointed(), loss, x, steps).sum()
        count = len(graphs)
        assert count
        torch.autograd.grad(y, x)
    assert len(graphs) == count


class _Trainer:
    """What a loss that is a method belongs to: of its attributes the loss reads some."""

    def __init__(self):
        self.step, self.history, self.scale, self.config = 0, [], 2.0, {"power": 2}

    @property
    def factor(self):
        return self.scale

    def powers(self, w):
        return w ** self.config["power"]

    def loss(self, w):
        return self.factor * self.powers(w).sum()


@pytest.mark.parametrize(
    ("change", "matters"),
    [
        (lambda trainer: setattr(trainer, "step", 1), False),
        (lambda trainer: trainer.history.append(1.0), False),
        (lambda trainer: setattr(trainer, "other", 1.0), False),
        (lambda trainer: setattr(trainer, "scale", 3.0), True),
        (lambda trainer: trainer.config.update(power=4), True),
    ],
    ids=["step", "history", "new", "by a property", "by another method"],
)
def test_attributes_matter_that_the_loss_reads(change, matters):
    trainer, opt, lr = _Trainer(), diffopt.sgd(), torch.tensor(0.1, requires_grad=True)
    sol = diffopt.minimize(
        trainer.loss,
        torch.ones(2),
        optimizer=opt,
        hparams=opt.hparams(lr=lr),
        steps=3,
        adjoint=diffopt.adjoint.Checkpointed(),
    )
    change(trainer)
    outer = sol.params.sum()
    if matters:
        with pytest.raises(RuntimeError, match="has been replaced since"):
            outer.backward()
    else:
        outer.backward()
        assert lr.grad.item() == pytest.approx(-2 * 3 * 4 * (1 - 4 * 0.1) ** 2)


class _Net(torch.nn.Module):
    """Reads its mode and a number, in what `forward` calls; its dropout in a submodule."""

    def __init__(self, p=0.0, scale=2.0):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Dropout(p))
        self.scale, self.calls = scale, 0

    def scaled(self, x):
        return self.scale * x if self.training else x

    def forward(self, x):
        return self.scaled(self.body(x))


NETS = {
    "dropout": lambda: torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Dropout(0.5)),
    "norm": lambda: torch.nn.Sequential(
        torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3, track_running_stats=False)
    ),
    "own": _Net,
    "plain": lambda: torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh()),
}
CALLS = {
    "functionalize": diffopt.nn.functionalize,
    "functional_call": lambda net: lambda params, x: torch.func.functional_call(net, params, (x,)),
}


def of_module(net, call=diffopt.nn.functionalize, how=None):
    """A function of a learning rate that trains the module, by an adjoint that recomputes."""
    model, x = call(net), torch.linspace(-1, 1, 8).view(4, 2)
    lr = torch.tensor(0.1, requires_grad=True)
    sol = diffopt.minimize(
        lambda params, x: (model(params, x) - 1).square().sum(),
        dict(net.named_parameters()),
        x,
        optimizer=opt,
        hparams=opt.hparams(lr=lr, momentum=0.5),
        steps=3,
        adjoint=how or adjoint.Checkpointed(),
    )
    outer = sum(p.sum() for p in sol.params.values())
    return lambda: torch.autograd.grad(outer, lr, retain_graph=True)


@pytest.mark.parametrize("how", [adjoint.Checkpointed(), adjoint.Reversible()])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", ["dropout", "norm", "own"])
def test_a_module_that_has_been_switched_to_eval_is_refused_until_switched_back(name, call, how):
    net = NETS[name]()
    derivative = of_module(net, call, how)
    before = derivative()
    net.eval()
    with pytest.raises(RuntimeError, match=r"training, which train\(\) or eval\(\) has switched"):
        derivative()
    net.train()
    assert derivative() == before


@pytest.mark.parametrize(
    ("name", "change", "matters"),
    [
        ("plain", lambda net: net.eval(), False),
        ("own", lambda net: setattr(net, "calls", 1), False),
        ("own", lambda net: setattr(net, "scale", 3.0), True),
        ("own", lambda net: setattr(net.body[1], "p", 0.5), True),
        ("dropout", lambda net: setattr(net[1], "p", 0.2), True),
    ],
)
def test_attributes_of_modules_matter_that_their_forward_reads(name, change, matters):
    net = NETS[name]()
    derivative = of_module(net)
    before = derivative()
    change(net)
    if matters:
        with pytest.raises(RuntimeError, match="has been replaced since"):
            derivative()
    else:
        assert derivative() == before


def test_a_module_may_count_its_own_calls():
    class Counting(_Net):
        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    assert of_module(Counting(), CALLS["functional_call"])()


class Settings:
    rate = 2.0  # read through an object, too

    def __init__(self):
        self.scale = 2.0


class Slotted:
    __slots__ = ("scale",)

    def __init__(self):
        self.scale = 2.0


class Derived:
    def __init__(self):
        self._scale = 2.0

    @property
    def scale(self):
        return self._scale


def entries(kind, number=100):
    values = [torch.tensor(float(i), dtype=F64) for i in range(number)]
    return dict(enumerate(values)) if kind is dict else values


def changes():
    """Losses of w that read what is not an argument, and functions that change that."""
    many, table, numbers = entries(list), entries(dict), [float(i) for i in range(100)]
    yield "list", lambda w: w - many[80], lambda: many.__setitem__(80, many[3])
    yield "dict", lambda w: w - table[80], lambda: table.__setitem__(80, many[3])
    yield "numbers", lambda w: w - numbers[80], lambda: numbers.__setitem__(80, 3.0)
    few, some, queue = [1.0], {1.0}, collections.deque([1.0])
    yield "append", lambda w: w - sum(few), lambda: few.append(2.0)
    yield "set", lambda w: w - sum(some), lambda: some.add(2.0)
    yield "deque", lambda w: w - sum(queue), lambda: queue.append(2.0)
    own, slots, derived, part = Settings(), Slotted(), Derived(), types.SimpleNamespace()
    part.own = Settings()
    yield "object", lambda w: w - own.scale, lambda: setattr(own, "scale", 3.0)
    yield "slots", lambda w: w - slots.scale, lambda: setattr(slots, "scale", 3.0)
    yield "property", lambda w: w - derived.scale, lambda: setattr(derived, "_scale", 3.0)
    yield "nested", lambda w: w - part.own.scale, lambda: setattr(part.own, "scale", 3.0)
    kind = type("Kind", (Settings,), {"rate": 2.0})
    yield "class", lambda w: w - kind.rate, lambda: setattr(kind, "rate", 3.0)
    kind2 = type("Kind", (Settings,), {"rate": 2.0})
    made = kind2()
    yield "its class", lambda w: w - made.rate, lambda: setattr(kind2, "rate", 3.0)
    module = types.ModuleType("settings")
    module.scale = 2.0
    yield "module", lambda w: w - module.scale, lambda: setattr(module, "scale", 3.0)
    net = torch.nn.Linear(1, 1).to(F64).requires_grad_(False)
    weight = torch.nn.Parameter(torch.ones(1, 1, dtype=F64), requires_grad=False)
    yield "parameter", lambda w: w - net.weight, lambda: setattr(net, "weight", weight)
    tensor = torch.tensor(1.0, dtype=F64)
    yield ".data", lambda w: w - tensor, lambda: setattr(tensor, "data", tensor + 1)


class Configured(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rates, self.table, self.array = [2.0], {"rate": 2.0}, np.array([2.0])

    def forward(self, w):
        rate = self.rates[0] * self.table["rate"] * float(self.array[0])
        return w - rate - sum(self.buffers())


def constant(w, rate=(2.0,), **more):
    return w - rate[0] - more.get("shift", 0.0) - getattr(constant, "shift", 0.0)


def changes_within():
    """More of them, that change what is inside of what is captured."""
    values, numbers = np.ones(2), array.array("d", [1.0])
    yield "numpy", lambda w: w - values[1], lambda: values.__imul__(2)
    strided = np.ones((4, 4))[:, ::2]
    yield "strided", lambda w: w - strided[1, 1], lambda: strided.__setitem__((1, 1), 2.0)
    pair = [np.ones(1), np.zeros(1)]
    yield "numpy in a list", lambda w: w - pair[0][0], lambda: pair[0].__imul__(2)
    large = np.ones(3 << 20)
    yield "large", lambda w: w - large[7], lambda: large.__imul__(2)
    yield "array", lambda w: w - numbers[0], lambda: numbers.__setitem__(0, 2.0)
    memory = bytearray([1, 2])
    yield "bytearray", lambda w: w - memory[0], lambda: memory.__setitem__(0, 2)
    table, counts = {"a": 1.0}, collections.Counter(a=1)
    yield "key", lambda w: w - sum(table.values()), lambda: table.update(b=1.0)
    yield "missing key", lambda w: w - counts["b"], lambda: counts.update(b=1)
    own, kind = Settings(), Settings()
    yield "attribute", lambda w: w - getattr(own, "shift", 0), lambda: setattr(own, "shift", 1.0)
    kind.table = {"a": 1.0}
    yield "its dict", lambda w: w - len(kind.table), lambda: kind.table.update(b=1.0)
    for name in ("rates", "table", "array"):
        net, key = Configured(), "rate" if name == "table" else 0
        yield f"module's {name}", net, functools.partial(getattr(net, name).__setitem__, key, 3.0)
    buffered = Configured()
    yield "buffer", buffered, lambda: buffered.register_buffer("new", torch.ones((), dtype=F64))
    part = functools.partial(constant)
    yield "keyword", part, lambda: part.keywords.update(shift=1.0)
    yield "default", constant, lambda: setattr(constant, "__defaults__", ((3.0,),))
    yield "function", constant, lambda: setattr(constant, "shift", 1.0)


@pytest.mark.parametrize("name", [name for name, *_ in changes_within()])
def test_what_is_inside_of_what_is_read_may_not_change(name, monkeypatch):
    monkeypatch.setattr(constant, "__defaults__", ((2.0,),))
    monkeypatch.setattr(constant, "shift", 0.0, raising=False)
    monkeypatch.delattr(constant, "shift")
    read, change = {case: rest for case, *rest in changes_within()}[name]
    x = torch.tensor(0.5, dtype=F64, requires_grad=True)
    solve = implicit_root(lambda w, x: x * read(w), lambda init, x: init)
    y = solve(torch.ones(1, dtype=F64), x).sum()
    before = torch.autograd.grad(y, x, retain_graph=True)
    assert before[0].isfinite()
    change()
    with pytest.raises(RuntimeError, match="captures"):
        torch.autograd.grad(y, x)


@pytest.mark.parametrize("name", [name for name, *_ in changes()])
@pytest.mark.parametrize("how", [adjoint.Checkpointed(), adjoint.Implicit()], ids=["C", "I"])
def test_what_is_read_beside_arguments_may_not_change(how, name):
    read, change = {case: rest for case, *rest in changes()}[name]
    x = torch.tensor(0.5, dtype=F64, requires_grad=True)
    y = loop(how, lambda w, x: ((1 + x) * w + read(w)).square().sum(), x, steps=60).sum()
    before = torch.autograd.grad(y, x, retain_graph=True)
    assert before[0].isfinite()
    change()
    with pytest.raises(RuntimeError, match="captures"):
        torch.autograd.grad(y, x)


def add_attribute(table, array):
    table.b = 1.0


def write_array(table, array):
    array[...] = 2.0


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("change", [add_attribute, write_array])
def test_a_step_that_has_another_loss_when_it_is_run_again_raises(change, levels):
    table, array = types.SimpleNamespace(a=1.0), np.array(1.0)
    shared = torch.from_numpy(array)
    x = torch.tensor(0.5, dtype=F64, requires_grad=True)

    def loss(w, x):
        return (x * w - sum(vars(table).values()) - shared).square().sum()

    y = loop(adjoint.Checkpointed(levels=levels), loss, x, steps=9).sum()
    torch.autograd.grad(y, x, retain_graph=True)
    change(table, array)
    with pytest.raises(RuntimeError, match=r"step \d, run again"):
        torch.autograd.grad(y, x)


def test_a_list_that_the_loss_appends_to_may_grow():
    history = [0.0] * 63

    def loss(w, x):
        history.append(0.0)
        return (x * w - 1).square().sum()

    x = torch.tensor(0.5, dtype=F64, requires_grad=True)
    torch.autograd.grad(loop(adjoint.Checkpointed(), loss, x).sum(), x)
