"""functionalize(): modules as pure functions of their parameters and buffers."""

import copy
import functools
import itertools
import operator
import pickle
import sys
import types
import warnings
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import diffopt
from diffopt import _modes
from diffopt.adjoint import (
    Checkpointed,
    FirstOrder,
    ForwardMode,
    Implicit,
    OneStep,
    Reversible,
    Truncated,
    Unrolled,
    unroll,
)
from diffopt.linear import GMRES


def model(*, track=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=track), nn.Linear(4, 1)
    ).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, generator=generator, dtype=torch.float64)


def adapt(functional, params, x, **numbers):
    opt = diffopt.adam()

    def loss(params, buffers, x):
        y, buffers = functional(params, buffers, x)
        return y.square().mean(), buffers

    return diffopt.minimize(
        loss,
        params,
        x,
        optimizer=opt,
        hparams=opt.hparams(lr=0.1, weight_decay=0.1, **numbers),
        steps=3,
        buffers=functional.buffers,
    )


def test_the_call_is_the_modules_own():
    module, x = model(), data()
    apply, params, buffers = diffopt.nn.functionalize(module)
    twin = copy.deepcopy(module)
    outputs, new_buffers = apply(params, buffers, x)
    torch.testing.assert_close(outputs, twin(x))
    torch.testing.assert_close(new_buffers, dict(twin.named_buffers()))
    assert list(params) == [name for name, _ in module.named_parameters()]
    assert all(params[name] is param for name, param in module.named_parameters())


def test_an_inner_loop_leaves_the_module_as_it_was():
    module = model()
    before = copy.deepcopy(module.state_dict())
    sol = adapt(diffopt.nn.functionalize(module), dict(module.named_parameters()), data())
    torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)
    assert sol.buffers["1.num_batches_tracked"] == 3
    assert not torch.equal(sol.buffers["1.running_mean"], before["1.running_mean"])
    assert set(sol.buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_adapted_buffers_are_those_of_training_the_module():
    module, x = model(), data()
    sol = adapt(diffopt.nn.functionalize(module), dict(module.named_parameters()), x)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(sol.params, dict(module.named_parameters()))
    torch.testing.assert_close(sol.buffers, dict(module.named_buffers()))


def test_gradients_arrive_in_the_modules_parameters():
    module, x = model(), data()
    functional = diffopt.nn.functionalize(module)
    adapt(functional, functional.params, x).losses[-1].backward()
    expected = torch.func.grad(lambda p: adapt(functional, p, x).losses[-1])(functional.params)
    actual = {name: param.grad for name, param in module.named_parameters()}
    torch.testing.assert_close(actual, expected)
    assert all(grad.count_nonzero() > 0 for name, grad in actual.items() if name != "0.bias")


def smooth():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


# torch's third derivative of batch normalisation, which the second of a loop needs, is wrong.
@pytest.mark.parametrize(
    ("module", "orders"), [(model(), 1), (model(track=False), 1), (smooth(), 2)]
)
def test_an_inner_loop_has_the_derivatives_of_finite_differences(module, orders):
    functional = diffopt.nn.functionalize(module)
    inputs = [p.detach().clone().requires_grad_() for p in functional.params.values()]

    def solve(*tensors):
        params = dict(zip(functional.params, tensors, strict=True))
        return adapt(functional, params, data(), eps=0.1).losses[-1]

    assert torch.autograd.gradcheck(solve, inputs)
    assert orders == 1 or torch.autograd.gradgradcheck(solve, inputs)


def test_frozen_parameters_stay_bit_identical():
    module = model()
    module[0].weight.requires_grad_(False)
    frozen = module[0].weight.clone()
    functional = diffopt.nn.functionalize(module)
    sol = adapt(functional, functional.params, data())
    assert "0.weight" not in functional.params
    assert sol.buffers["0.weight"] is module[0].weight
    assert torch.equal(module[0].weight, frozen)


class Tied(nn.Module):
    """One layer under two names, and one tensor in two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.again = self.first
        self.other = nn.Linear(3, 3, bias=False)
        self.other.weight = self.first.weight
        self.head = nn.Linear(3, 1, bias=False)

    def forward(self, x):
        return self.head(self.other(self.again(self.first(x))))


def test_tied_weights_count_once_and_their_gradients_add():
    torch.manual_seed(0)
    module, x = Tied().double(), data()
    before = copy.deepcopy(module.state_dict())
    functional = diffopt.nn.functionalize(module)
    assert list(functional.params) == ["first.weight", "head.weight"]

    def outer(params):
        return functional(params, functional.buffers, x)[0].square().sum()

    w, head = functional.params["first.weight"].detach(), functional.params["head.weight"].detach()
    expected = torch.func.grad(lambda w: (x @ w.T @ w.T @ w.T @ head.T).square().sum())(w)
    torch.testing.assert_close(torch.func.grad(outer)(functional.params)["first.weight"], expected)
    sol = adapt(functional, functional.params, x)
    assert list(sol.params) == ["first.weight", "head.weight"]
    torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)
    assert module.other.weight is module.first.weight


class Counter(nn.Module):
    """Replaces its buffer instead of writing into it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, *, offset=0.0):
        self.calls = self.calls + 1
        return self.scale * x + offset


def test_replaced_buffers_come_back():
    module = Counter()
    functional = diffopt.nn.functionalize(module)
    y, buffers = functional(functional.params, functional.buffers, torch.ones(2), offset=1.0)
    assert buffers["calls"] == 1
    assert module.calls == 0
    torch.testing.assert_close(y, torch.full((2,), 2.0), check_stride=False)


def test_vmap_over_models_with_batched_buffers():
    module, x = model(), torch.stack([data(), 2 * data()])
    functional = diffopt.nn.functionalize(module)
    stacked = {k: b.expand(2, *b.shape) for k, b in functional.buffers.items()}

    def last_loss(buffers, x):
        return adapt(functional._replace(buffers=buffers), functional.params, x).losses[-1]

    looped = torch.stack([last_loss(functional.buffers, task) for task in x])
    torch.testing.assert_close(torch.vmap(last_loss)(stacked, x), looped)


def test_batch_statistics_need_no_batched_buffers():
    functional, x = diffopt.nn.functionalize(model(track=False)), torch.stack([data(), 2 * data()])
    assert functional.buffers == {}
    losses = torch.vmap(lambda x: adapt(functional, functional.params, x).losses[-1])(x)
    looped = torch.stack([adapt(functional, functional.params, t).losses[-1] for t in x])
    torch.testing.assert_close(losses, looped)


def test_training_mode_is_that_of_the_call():
    module, x = model(), data()
    functional = diffopt.nn.functionalize(module)
    module.eval()
    y, buffers = functional(functional.params, functional.buffers, x)
    torch.testing.assert_close(y, module(x))
    torch.testing.assert_close(buffers, functional.buffers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, b: p.pop("0.bias"), r"params lacks \['0.bias'\]"),
        (lambda p, b: p.update(extra=1), r"params has unknown \['extra'\]"),
        (lambda p, b: b.pop("1.running_var"), r"buffers lacks \['1.running_var'\]"),
        (
            lambda p, b: p.update({"0.bias": torch.ones(5)}),
            r"params\['0.bias'\] has shape \(5,\), but the module's has \(4,\)",
        ),
    ],
)
def test_errors(change, message):
    functional = diffopt.nn.functionalize(model())
    params, buffers = dict(functional.params), dict(functional.buffers)
    change(params, buffers)
    with pytest.raises(ValueError, match=message):
        functional(params, buffers, data())


@pytest.mark.parametrize(
    ("params", "buffers", "message"),
    [
        (
            None,
            {},
            "params is None, not a dictionary of the module's parameters: call model\\(params",
        ),
        ([1], {}, "params is \\[1\\] of type list, not a dictionary"),
        ([torch.ones(99)], {}, "params is [^\\n]{,100} of type list, not a dictionary"),
        (
            {},
            None,
            "buffers is None, not a dictionary .* has none: call model\\(params, \\*inputs",
        ),
        ({"bias": 3}, {}, "params\\['bias'\\] is 3 of type int, not a tensor"),
    ],
)
def test_what_is_not_a_dictionary_of_tensors_is_refused(params, buffers, message):
    functional = diffopt.nn.functionalize(nn.Linear(3, 2))
    if isinstance(params, dict):
        params = functional.params | params
    with pytest.raises(TypeError, match=message):
        functional(params, buffers, torch.ones(6, 3))


def test_buffers_that_are_not_a_dictionary_are_refused():
    functional, x = diffopt.nn.functionalize(model()), data()
    message = r"buffers is a tensor of shape .*: call model\(params, buffers, \*inputs\)"
    with pytest.raises(TypeError, match=message):
        functional(functional.params, x)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, scale=None, buffers=1.0):
        x = x["x"] if isinstance(x, dict) else x
        y = self.layer(x) * buffers
        return y if scale is None else y * scale


def test_a_module_without_buffers_is_called_without_them():
    module, x, two = Keywords(), torch.ones(6, 3), torch.tensor(2.0)
    apply, params, buffers = functional = diffopt.nn.functionalize(module)
    assert buffers == {}
    for call in (functional, apply):
        for inputs, keywords in (
            ((x,), {}), ((x, two), {}), ((x,), {"scale": two}), ((), {"x": x, "scale": two}),
            (({"x": x},), {}), (({"x": x},), {"scale": two}), ((x,), {"buffers": two}),
        ):  # fmt: skip
            torch.testing.assert_close(
                call(params, *inputs, **keywords), module(*inputs, **keywords)
            )
        y, new = call(params, {}, x)
        torch.testing.assert_close((y, new), (module(x), {}))
        torch.testing.assert_close(call(params, buffers={}, x=x)[0], module(x))
    with pytest.raises(ValueError, match=r"buffers has unknown \['other'\]"):
        functional(params, {"other": x}, x)


def test_a_module_without_buffers_is_called_under_transforms():
    functional, x = diffopt.nn.functionalize(nn.Linear(3, 2)), torch.ones(6, 3)

    def loss(params):
        return functional(params, x).square().mean()

    expected = torch.func.grad(lambda p: functional(p, {}, x)[0].square().mean())(functional.params)
    torch.testing.assert_close(torch.func.grad(loss)(functional.params), expected)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(functional.params), loss(functional.params))


def test_modules_and_parameter_dicts_are_params():
    module, other, x = nn.Linear(3, 2), nn.Linear(3, 2), torch.ones(6, 3)
    functional = diffopt.nn.functionalize(module)
    entries = nn.ParameterDict(dict(other.named_parameters()))
    for params in (other, entries):
        torch.testing.assert_close(functional(params, {}, x)[0], other(x))
    torch.testing.assert_close(functional(other, x), other(x))


class Recomputed(nn.Module):
    """A block of it is not kept for the backward pass."""

    def __init__(self, way):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 1)
        self.way = way

    def block(self, x):
        return torch.tanh(self.norm(torch.tanh(self.first(x))))

    def forward(self, x):
        if self.way == "plain":
            return self.last(self.block(x))
        if self.way == "sequential":
            layers = nn.Sequential(self.first, nn.Tanh(), self.norm, nn.Tanh())
            return self.last(checkpoint_sequential(layers, 2, x, use_reentrant=False))
        if self.way == "nested":
            inner = functools.partial(checkpoint, self.block, use_reentrant=False)
            return self.last(checkpoint(inner, x, use_reentrant=False))
        if self.way == "submodule":
            x = torch.tanh(checkpoint(self.first, x, use_reentrant=False))
            return self.last(torch.tanh(checkpoint(self.norm, x, use_reentrant=False)))
        if self.way == "reentrant":  # the first layer is outside, as its input needs no gradient
            return self.last(checkpoint(self.norm, self.first(x), use_reentrant=True))
        return self.last(checkpoint(self.block, x, use_reentrant=False))


def adapted(way, adjoint):
    """The end of an inner loop, and its derivatives with respect to its start and the rates."""
    torch.manual_seed(0)
    functional, x = diffopt.nn.functionalize(Recomputed(way).double()), data()
    opt = diffopt.sgd(momentum=True)
    rates = {name: torch.tensor(0.1, requires_grad=True) for name in functional.params}

    def loss(params, x):
        return (functional(params, functional.buffers, x)[0] - 1).square().mean()

    sol = diffopt.minimize(
        loss,
        functional.params,
        x,
        optimizer=opt,
        hparams=opt.hparams(lr=rates, momentum=0.5),
        steps=3,
        adjoint=adjoint,
    )
    inputs = [*functional.params.values(), *rates.values()]
    if adjoint is None:
        return [*sol.params.values()]
    grads = torch.autograd.grad(loss(sol.params, 2 * x), inputs, materialize_grads=True)
    return [*sol.params.values(), *grads]


@pytest.mark.parametrize("way", ["block", "sequential", "nested", "submodule"])
@pytest.mark.parametrize(
    "adjoint",
    [
        None,
        Unrolled(),
        Checkpointed(),
        Checkpointed(hvp="forward-over-reverse"),
        Truncated(2),
        FirstOrder(),
        OneStep(),
        Reversible(),
    ],
    ids=lambda adjoint: type(adjoint).__name__,
)
def test_a_block_that_is_recomputed_gives_the_same(way, adjoint):
    if "forward-over-reverse" in str(adjoint) and torch.__version__ < "2.12":
        pytest.skip("recomputed blocks have no forward derivative in torch 2.11")
    actual, expected = adapted(way, adjoint), adapted("plain", adjoint)
    torch.testing.assert_close(actual, expected)


def test_forward_mode_cannot_recompute_a_block_and_raises():
    with pytest.raises(RuntimeError, match=r"saved tensor hooks|forward mode|vmap"):
        adapted("block", ForwardMode())


def derivative_of_a_solution(way, order):
    """Of the params, as if they were a minimum, with respect to an L2 penalty."""
    torch.manual_seed(0)
    functional, x = diffopt.nn.functionalize(Recomputed(way).double()), data()
    decay = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(params, decay):
        error = (functional(params, functional.buffers, x)[0] - 1).square().mean()
        return error + decay * sum(p.square().sum() for p in params.values())

    opt = diffopt.sgd(momentum=True)
    hp = opt.hparams(lr=0.1, momentum=0.5)
    sol = diffopt.minimize(
        loss,
        functional.params,
        decay,
        optimizer=opt,
        hparams=hp,
        steps=50,
        adjoint=Implicit(GMRES(), root_tolerance=1e9),
    )
    value = sum(p.pow(3).sum() for p in sol.params.values())
    for _ in range(order):
        (value,) = torch.autograd.grad(value, decay, create_graph=order > 1)
    return value


@pytest.mark.parametrize("way", ["block", "sequential", "nested", "submodule"])
def test_solutions_of_a_block_that_is_recomputed_are_differentiated_once(way):
    torch.testing.assert_close(
        derivative_of_a_solution(way, 1), derivative_of_a_solution("plain", 1)
    )
    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        derivative_of_a_solution(way, 2)


def test_torch_func_refuses_a_block_that_is_recomputed():
    functional = diffopt.nn.functionalize(Recomputed("block").double())
    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(lambda p: functional(p, {}, data())[0].sum())(functional.params)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_recomputation_reaches_the_given_tensors_by_backward():
    torch.manual_seed(0)
    module = Recomputed("reentrant").double()
    functional, x = diffopt.nn.functionalize(module), data().requires_grad_()
    params = {k: (2 * p).detach().requires_grad_() for k, p in functional.params.items()}
    functional(params, {}, x)[0].sum().backward()
    actual = {k: p.grad for k, p in params.items()}
    module.block = lambda x: module.norm(module.first(x))
    module.way = "plain"
    expected = torch.func.grad(lambda p: functional(p, {}, x)[0].sum())(params)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "adjoint",
    [None, Unrolled(), Checkpointed(), FirstOrder(), Implicit(), Reversible(), ForwardMode()],
    ids=lambda adjoint: type(adjoint).__name__,
)
def test_reentrant_recomputation_through_which_no_gradient_arrives_is_refused(adjoint):
    with pytest.raises(ValueError, match="call it with use_reentrant=False"):
        adapted("reentrant", adjoint)


class Normalized(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.layer, self.norm, self.head = wrap(nn.Linear(3, 4)), nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.layer(x))))


def pruned(layer):
    generator = torch.Generator().manual_seed(0)
    return prune.custom_from_mask(layer, "weight", torch.rand(4, 3, generator=generator) > 0.5)


WRAPPINGS = {
    "plain": lambda layer: layer,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": pruned,
    "data parallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_threads_may_share_a_functionalized_module(wrap):
    torch.manual_seed(0)
    module = Normalized(wrap).double()
    functional, opt = diffopt.nn.functionalize(module), diffopt.sgd()
    tensors, values = [*module.parameters()], copy.deepcopy(module.state_dict())

    def loss(params, buffers, x):
        y, buffers = functional(params, buffers, x)
        return (y - 1).square().mean(), buffers

    def task(index):
        sol = diffopt.minimize(
            loss,
            functional.params,
            (1 + index) * data(),
            optimizer=opt,
            hparams=opt.hparams(lr=0.1),
            steps=6,
            buffers=functional.buffers,
            adjoint=None,
        )
        return sol.params, sol.buffers

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = [*pool.map(task, range(8))]
    finally:
        sys.setswitchinterval(interval)
    torch.testing.assert_close(found, [task(index) for index in range(8)])
    assert all(p is q for p, q in zip(module.parameters(), tensors, strict=True))
    torch.testing.assert_close(module.state_dict(), values, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_write_to_their_weights_are_refused(kind):
    net = nn.Sequential(nn.Linear(2, 2), kind(3, 2, max_norm=1.0))
    with pytest.raises(ValueError, match=r"^module\.1 has max_norm"):
        diffopt.nn.functionalize(net)
    with pytest.raises(ValueError, match=r"^module\.1 has max_norm"):
        diffopt.innerloop(net, diffopt.optim.SGD(net.parameters(), lr=0.1)).__enter__()


class Shrinking(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(0.9)
        return super().forward(x)


@pytest.mark.parametrize("transform", [lambda f: f, torch.func.grad, torch.vmap])
def test_a_module_that_writes_to_its_params_is_refused(transform):
    model = diffopt.nn.functionalize(Shrinking(2, 1))
    params = {name: p.detach().expand(3, *p.shape).clone() for name, p in model.params.items()}
    params = params if transform is torch.vmap else {name: p[0] for name, p in params.items()}
    with pytest.raises(RuntimeError, match=r"the module has written to params\['weight'\]"):
        transform(lambda params: model(params, torch.ones(2)).sum())(params)


def test_a_module_is_not_touched_while_another_thread_compiles():
    """torch says in all threads that it is compiling."""
    module, seen = nn.Linear(2, 1), []
    module.register_forward_hook(lambda called, inputs, outputs: seen.append(id(called)))
    functional = diffopt.nn.functionalize(module)

    def backend(graph, inputs):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(functional, functional.params, torch.ones(2)).result()
            assert not pool.submit(_modes.observed).result()
        return graph.forward

    torch.compile(torch.sin, backend=backend)(torch.ones(2))
    assert len(seen) == 1
    assert seen[0] != id(module)


class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.layer, self.error = nn.Linear(3, 3), error
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.kept = x = self.layer(x)
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_inside_the_module_leaves_it_as_it_was(error):
    module = Failing(error).double()
    attributes, tensors = dict(vars(module)), [*module.parameters(), *module.buffers()]
    functional = diffopt.nn.functionalize(module)
    with pytest.raises(error):
        functional({k: p + 1 for k, p in functional.params.items()}, functional.buffers, data())
    assert vars(module) == attributes
    assert all(
        a is b for a, b in zip([*module.parameters(), *module.buffers()], tensors, strict=True)
    )
    assert module.calls == 0


class Observer:
    """An object of a user's, which holds the module it belongs to."""

    def __init__(self, module):
        self.module, self.seen = module, []

    def hook(self, module, inputs, output):
        self.seen.append(output.detach())
        return output + self.module.a.bias.sum()


class Entangled(nn.Module):
    """Its parts are referred to from many places beside its attributes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.order, self.table, self.weights = [self.a, self.b], {"a": (self.a,)}, [self.b.weight]
        self.index = {self.a: 0.5}
        self.method, self.partial = self.first, functools.partial(Entangled.second, self)
        a, b, forward = self.a, self.b, self.a.forward
        self.closure, self.default = (lambda x: b(x)), (lambda x, layer=a: layer(x))
        self.a.forward = lambda x: 2 * forward(x)
        self.observer = Observer(self)
        self.b.register_forward_hook(self.observer.hook)
        self.a.__dict__["parent"] = self

    def first(self, x):
        return self.a(x) + 1

    def second(self, x):
        return self.a.parent.b(x)

    def forward(self, x):
        for layer in self.order:
            x = layer(x)
        x = self.table["a"][0](x) @ self.weights[0] * self.index[self.a]
        return self.default(self.closure(self.partial(self.method(x))))


class Slotted:
    __slots__ = ("layer", "unset")

    def __init__(self, layer):
        self.layer = layer


class WeaklyEntangled(nn.Module):
    """The same by references that keep nothing alive, and by rarer containers."""

    __slots__ = ("scale", "slot", "unset")

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.a.parent = weakref.ref(self)
        self.weak_method = weakref.WeakMethod(self.a.forward)
        self.weak_set, self.weak_keys = weakref.WeakSet([self.b]), weakref.WeakKeyDictionary()
        self.weak_keys[self.a] = 0.5
        self.weak_values = weakref.WeakValueDictionary({"a": self.a})
        self.queue = deque([self.a, self.b], maxlen=2)
        self.fixed = types.MappingProxyType({"b": self.b})
        self.slotted, self.slot, self.scale = Slotted(self.b), self.a, 2.0

    def forward(self, x):
        for layer in self.queue:
            x = layer(x)
        for layer in self.weak_set:
            x = layer(x) * self.weak_keys[self.weak_values["a"]]
        x = self.weak_method()(self.fixed["b"](x)) * self.scale
        return self.slot(self.slotted.layer(self.a.parent().b(x)))


class Caller:
    """An object that holds itself and a method of its own."""

    def __init__(self, layer):
        self.layer, self.call, self.me = layer, self.run, self

    def run(self, x):
        return self.me.layer(x)


class Wrapped(nn.Module):
    """The same by functions that wrap others, call themselves or each other, or hold tensors."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        a, b, table = self.a, self.b, {}

        def alone(x, n):
            return a(x) if n == 0 else alone(x, n - 1)

        def even(x, n):
            return b(x) if n == 0 else odd(x, n - 1)

        def odd(x, n):
            return even(x, n - 1)

        def listed(x, n):
            return a(x) if n == 0 else table["listed"](x, n - 1)

        def attributed(x):
            return x

        table["listed"], attributed.weight = listed, self.b.weight
        self.alone, self.odd, self.table, self.attributed = alone, odd, table, attributed
        self.cached = functools.lru_cache(maxsize=3)(lambda n: n * self.b.weight)
        self.caller = Caller(self.a)
        self.layer, self.times, self.plus = [self.a].__getitem__, self.b.bias.mul, a.bias.__add__

    def forward(self, x):
        x = self.odd(self.alone(x, 2), 3)
        x = self.table["listed"](self.caller.call(x), 2) @ self.attributed.weight
        return self.plus(self.times(self.layer(0)(x @ self.cached(2))))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru = nn.LSTM(3, 4, 2), nn.GRU(4, 2)

    def forward(self, x):
        return self.gru(self.lstm(x[None])[0])[0]


def compiled():
    return torch.compile(smooth(), backend="eager")


def compiled_in_place():
    module = smooth()
    module.compile(backend="eager")
    return module


@pytest.mark.parametrize(
    "make",
    [
        Entangled,
        WeaklyEntangled,
        Wrapped,
        Recurrent,
        Tied,
        compiled,
        compiled_in_place,
        lambda: Normalized(pruned),
    ],
    ids=[
        "Entangled",
        "weakly",
        "Wrapped",
        "Recurrent",
        "Tied",
        "compiled",
        "compiled in place",
        "pruned",
    ],
)
def test_the_call_uses_the_given_tensors_wherever_the_module_refers_to_its_own(make):
    torch.manual_seed(0)
    module = make().double()
    functional, x = diffopt.nn.functionalize(module), data()
    params = {k: (0.5 * p + 0.1).detach().requires_grad_() for k, p in functional.params.items()}
    actual = functional(params, functional.buffers, x)[0]
    if isinstance(module, Entangled):
        assert len(module.observer.seen) == 3
    own = make().double()
    own.load_state_dict(params | functional.buffers, strict=False)
    expected = own(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual.sum(), [*params.values()]),
        torch.autograd.grad(expected.sum(), [*own.parameters()]),
    )


class Single:
    """An object of which there is only one."""

    def __init__(self, layer):
        self.layer = layer

    def __copy__(self):
        return self


class Uncopied(Single):
    def __copy__(self):
        raise TypeError("there is only one")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (Single, "Single"),
        (Uncopied, "Uncopied"),
        (itertools.repeat, "repeat"),
        (lambda layer: operator.methodcaller("mul", layer.weight), "methodcaller"),
    ],
    ids=["Single", "Uncopied", "repeat", "methodcaller"],
)
def test_an_attribute_that_can_only_refer_to_the_modules_own_tensors_is_refused(make, kind):
    module = smooth()
    module.held = held = make(module[0])
    functional = diffopt.nn.functionalize(module)
    given = {name: p + 1 for name, p in functional.params.items()}
    with pytest.raises(ValueError, match=f"attribute 'held' .* holds an object of type {kind}, "):
        functional(given, functional.buffers, data())
    if isinstance(held, Single):
        assert module.held is held
        assert held.layer is module[0]


class Registering(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        self.layer.register_forward_hook(lambda module, inputs, output: 2 * output)
        self.register_buffer("last", x, persistent=False)
        return self.layer(x)


def test_what_a_call_registers_is_registered_in_its_replica_only():
    module = Registering()
    functional = diffopt.nn.functionalize(module)
    ends = [functional(functional.params, {}, torch.ones(3))[0] for _ in range(2)]
    assert torch.equal(*ends)
    assert not module.layer._forward_hooks
    assert not module._non_persistent_buffers_set


@pytest.mark.parametrize("kind", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_a_cached_parametrization_is_that_of_the_given_tensors(kind):
    torch.manual_seed(0)
    module, x = kind(nn.Linear(3, 3).double()), data()
    functional = diffopt.nn.functionalize(module)
    given = [{k: p * s + s for k, p in functional.params.items()} for s in (0.5, 2.0)]
    expected = [functional(params, functional.buffers, x)[0] for params in given] + [module(x)]
    with parametrize.cached():
        actual = [functional(params, functional.buffers, x)[0] for params in given] + [module(x)]
    torch.testing.assert_close(actual, expected)


def replace_tensors(module):
    module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)


def replace_buffer(module):
    module[1].running_mean = torch.zeros(4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_tensors, "'0.weight' has been replaced"),
        (replace_buffer, "'1.running_mean' has been replaced"),
        (lambda m: m[0].requires_grad_(False), "'0.weight' has been frozen"),
        (lambda m: m.__setitem__(0, nn.Linear(3, 4).double()), "'0.weight' has been replaced"),
        (lambda m: m.append(nn.Linear(1, 1)), r"'3.(weight|bias)' has been added"),
        (lambda m: m.__delitem__(2), r"'2.(weight|bias)' has been removed"),
        (lambda m: prune.identity(m[0], "weight"), r"'0.weight\w*' has been (added|removed)"),
    ],
)
@pytest.mark.parametrize("way", ["call", "minimize"])
def test_a_module_changed_since_is_not_called_with_what_it_was(change, message, way):
    module = model()
    functional = diffopt.nn.functionalize(module)
    change(module)
    call = adapt if way == "minimize" else lambda f, params, x: f(params, f.buffers, x)
    with pytest.raises(ValueError, match=message + ".* call diffopt.nn.functionalize again"):
        call(functional, functional.params, data())
    adapted = diffopt.nn.functionalize(module)
    assert set(adapted.params) == {k for k, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "change", [lambda m: m.requires_grad_(True), lambda m: m.load_state_dict(m.state_dict())]
)
def test_a_module_whose_tensors_are_the_same_is_called(change):
    module = model()
    module[0].requires_grad_(False)
    functional = diffopt.nn.functionalize(module)
    change(module)
    sol = adapt(functional, functional.params, data())
    assert sol.buffers["0.weight"] is module[0].weight


def test_modules_whose_tensors_cannot_be_replaced_are_refused():
    with pytest.raises(ValueError, match=r"module.0.weight is not initialized yet: run the module"):
        diffopt.nn.functionalize(nn.Sequential(nn.LazyLinear(2)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.trace")
        traced = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(TypeError, match=r"module.0 is a torch.jit.ScriptModule"):
        diffopt.nn.functionalize(nn.Sequential(traced))


def enter(net):
    diffopt.innerloop(net, diffopt.sgd()).__enter__()


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("make", [diffopt.nn.functionalize, enter])
def test_a_scripted_container_is_refused(make):
    with pytest.raises(TypeError, match=r"^module is a torch.jit.ScriptModule"):
        make(torch.jit.script(nn.Sequential(nn.Linear(2, 2))))


@pytest.mark.parametrize("make", [diffopt.nn.functionalize, enter])
@pytest.mark.parametrize("kind", [nn.Parameter, nn.Buffer, lambda x: nn.Parameter(x, False)])
def test_a_parameter_in_the_memory_of_another_tensor_is_refused(kind, make):
    """torch.optim, which steps in place, would change both."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    del net[1].weight
    net[1].weight = kind(net[0].weight.data.t())
    with pytest.raises(ValueError, match=r"'1.weight' and '0.weight' of the module share memory"):
        make(net)


def test_parameters_side_by_side_in_one_memory_are_taken():
    net, flat = nn.Linear(2, 3), torch.arange(9.0)
    net.weight.data, net.bias.data = flat[:6].view(3, 2), flat[6:]
    model = diffopt.nn.functionalize(net)
    x = torch.ones(1, 2)
    torch.testing.assert_close(model(model.params, x), net(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
def test_a_functional_is_a_value(copied):
    torch.manual_seed(0)
    module = Tied().double()
    module.register_buffer("count", torch.zeros(()))
    functional = diffopt.nn.functionalize(module)
    other = copied(functional)
    assert (
        repr(other) == "Functional(Tied, params=['first.weight', 'head.weight'], buffers=['count'])"
    )
    actual = other(other.params, other.buffers, data())
    torch.testing.assert_close(actual, functional(*functional[1:], data()))
    assert other.params["head.weight"] is not functional.params["head.weight"]
    with torch.no_grad():
        other.params["head.weight"].zero_()
    assert not other(other.params, other.buffers, data())[0].any()


def test_a_call_is_traced_by_torch_compile():
    torch.manual_seed(0)
    functional, x = diffopt.nn.functionalize(model()), data()

    def call(params, buffers, x):
        return functional(params, buffers, x)

    arguments = functional.params, functional.buffers, x
    actual = torch.compile(call, backend="aot_eager", fullgraph=True)(*arguments)
    torch.testing.assert_close(actual, call(*arguments))
    assert functional.buffers["1.num_batches_tracked"] == 0


def test_a_name_that_others_begin_with_stands_for_a_part_of_the_model():
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    params = diffopt.nn.functionalize(module).params | {"20.weight": torch.ones(2)}
    opt = diffopt.adam()
    state, grads = opt.init(params), {k: torch.ones_like(p) for k, p in params.items()}

    def update(parts, spelled_out):
        rates = {name: torch.tensor(rate, requires_grad=True) for name, rate in parts.items()}
        record = opt.hparams(lr=rates if not spelled_out else spelled_out(rates))
        new, _ = opt.update(params, grads, state, record)
        loss = sum((i + 1) * p.sum() for i, p in enumerate(new.values()))
        return new, torch.autograd.grad(loss, [*rates.values()])

    parts = {"20": 0.3, "2.0": 0.2, "0.weight": 0.1, "0.bias": 0.4}
    actual = update(parts, None)
    expected = update(
        parts,
        lambda r: {
            "0.weight": r["0.weight"],
            "0.bias": r["0.bias"],
            "2.0.weight": r["2.0"],
            "2.0.bias": r["2.0"],
            "20.weight": r["20"],
        },
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        (
            {"0": 0.1, "0.weight": 0.2, "2": 0.3},
            "lr has '0' and '0.weight', which both cover '0.weight'",
        ),
        ({"0": 0.1}, r"lr\['2.weight'\] is missing$"),
        ({"0": 0.1, "3": 0.2}, r"lr\['2.weight'\] is missing, and .*\['3'\] is not expected there"),
        ({"0": 0.1, "2": 0.2, "3": 0.3}, r"lr\['3'\] is not expected there"),
        ({"0": 0.1, "2": 0.2, "0.w": 0.3}, r"lr\['0.w'\] is not expected there"),
    ],
)
def test_names_of_parts_that_do_not_fit_are_refused(rates, message):
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1, bias=False))
    params, opt = diffopt.nn.functionalize(module).params, diffopt.sgd()
    with pytest.raises(ValueError, match=message):
        opt.update(params, params, opt.init(params), opt.hparams(lr=rates))


@pytest.mark.parametrize("optimizer", ["partition", "masked"])
def test_names_of_parts_serve_transforms_too(optimizer):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    params = dict(module.named_parameters())
    sgd = diffopt.sgd()
    if optimizer == "partition":
        opt = diffopt.transforms.partition({"a": sgd, "b": sgd}, {"0": "a", "2": "b"})
        record = opt.hparams({"a": sgd.hparams(lr={"0": 0.1, "2": 9.0}), "b": sgd.hparams(lr=0.2)})
    else:
        opt = diffopt.transforms.masked(sgd, {"0": True, "2": False})
        record = opt.hparams(lr=0.1)
    new, _ = opt.update(params, params, opt.init(params), record)
    torch.testing.assert_close(new["0.weight"], 0.9 * params["0.weight"])
    torch.testing.assert_close(
        new["2.weight"], (0.8 if optimizer == "partition" else 1) * params["2.weight"]
    )


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.head = nn.Linear(2, 1)


@pytest.mark.parametrize(
    "rates",
    [
        {"encoder": {"0": 0.1, "1": 0.2}, "head": 0.3},
        {"encoder": {"0": 0.1, "1": {"weight": 0.2, "bias": 0.2}}, "head.weight": 0.3,
         "head": {"bias": 0.3}},
        {"encoder.0": 0.1, "encoder": {"1": 0.2}, "head": {"weight": 0.3, "bias": 0.3}},
        {"encoder": {"0.weight": 0.1, "0.bias": 0.1, "1": 0.2}, "head": 0.3},
    ],
)  # fmt: skip
def test_names_of_parts_may_be_nested(rates):
    params = dict(Deep().named_parameters())
    sgd = diffopt.sgd()
    new, _ = sgd.update(params, params, sgd.init(params), sgd.hparams(lr=rates))
    for name, p in params.items():
        rate = 0.3 if "head" in name else 0.2 if ".1." in name else 0.1
        torch.testing.assert_close(new[name], (1 - rate) * p)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"encoder": {"0": 0.1}, "head": 0.3}, r"lr\['encoder.1.weight'\] is missing"),
        ({"encoder": {"0": 0.1, "2": 0.1}, "head": 0.3}, r"lr\['encoder.2'\] is not expected"),
        ({"encoder": {"0": 0.1, "1": 1}, "encoder.0": 0.1, "head": 0.3}, r"'encoder.0' twice"),
        ({"encoder": {"0": 0.1, "1": 1}, "encoder.0.bias": 0.1, "head": 0.3}, "both cover"),
    ],
)
def test_mistaken_nested_names_are_rejected(rates, message):
    params = dict(Deep().named_parameters())
    sgd = diffopt.sgd()
    with pytest.raises(ValueError, match=message):
        sgd.update(params, params, sgd.init(params), sgd.hparams(lr=rates))


@pytest.mark.parametrize(
    "rates",
    [
        nn.ParameterDict({"weight": torch.tensor(0.5), "bias": torch.tensor(0.25)}),
        {"weight": torch.tensor(0.5), "bias": torch.tensor(0.25)},
    ],
)
def test_a_parameter_dict_holds_hyperparameters(rates):
    params = dict(nn.Linear(2, 1).named_parameters())
    sgd = diffopt.sgd()
    new, _ = sgd.update(params, params, sgd.init(params), sgd.hparams(lr=rates))
    expected = {"weight": 0.5 * params["weight"], "bias": 0.75 * params["bias"]}
    torch.testing.assert_close(new, expected)
    if isinstance(rates, nn.ParameterDict):
        new["weight"].sum().backward()
        assert rates["weight"].grad == -params["weight"].sum()


def test_parameter_lists_and_dicts_are_params_of_a_loop():
    sgd = diffopt.sgd()
    for make in (nn.ParameterDict, nn.ParameterList):
        value = torch.ones(2)
        params = make({"w": value} if make is nn.ParameterDict else [value])
        sol = diffopt.minimize(
            lambda p: sum(x.square().sum() for x in (p.values() if isinstance(p, dict) else p)),
            params, optimizer=sgd, hparams=sgd.hparams(lr=0.25), steps=1,
        )  # fmt: skip
        expected = {"w": value / 2} if make is nn.ParameterDict else [value / 2]
        torch.testing.assert_close(sol.params, expected)


class Words(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 3, sparse=sparse), nn.Linear(3, 1)

    def forward(self, words):
        return self.head(torch.tanh(self.table(words)).mean(1))


def sparse_beside_dense(kind, params):
    """An optimizer that gives the table to SparseAdam, and its hyperparameters."""
    sparse, dense = diffopt.sparse_adam(), diffopt.sgd()
    if kind == "masked":
        opt = diffopt.transforms.masked(sparse, {"table": True, "head": False})
        return opt, opt.hparams(lr=0.1)
    labels = {name: "sparse" if name.startswith("table") else "dense" for name in params}
    opt = diffopt.transforms.partition({"sparse": sparse, "dense": dense}, labels)
    return opt, opt.hparams({"sparse": sparse.hparams(lr=0.1), "dense": dense.hparams(lr=0.2)})


@pytest.mark.parametrize("kind", ["partition", "masked"])
def test_a_sparse_embedding_is_trained_beside_dense_layers(kind):
    torch.manual_seed(0)
    module, words = Words(sparse=True).double(), torch.tensor([[0, 1, 1], [4, 5, 1]])
    functional = diffopt.nn.functionalize(module)
    opt, hp = sparse_beside_dense(kind, functional.params)

    def loss(params):
        return functional(params, {}, words)[0].square().mean()

    start = {name: p.detach().clone() for name, p in functional.params.items()}
    sol = diffopt.minimize(loss, start, optimizer=opt, hparams=hp, steps=3, adjoint=None)
    in_place, state = {k: p.clone().requires_grad_() for k, p in start.items()}, opt.init(start)
    for _ in range(3):
        tensors = [*in_place.values()]
        grads = dict(zip(in_place, torch.autograd.grad(loss(in_place), tensors), strict=True))
        opt.update_(in_place, grads, state, hp)
    optimizers = [torch.optim.SparseAdam([module.table.weight], lr=0.1)]
    if kind == "partition":
        optimizers.append(torch.optim.SGD(module.head.parameters(), lr=0.2))
    for _ in range(3):
        module.zero_grad()
        module(words).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(sol.params, dict(module.named_parameters()))
    torch.testing.assert_close(in_place, dict(module.named_parameters()))


def test_optimizers_that_take_no_sparse_gradients_say_what_to_do():
    functional = diffopt.nn.functionalize(Words(sparse=True))
    opt, words = diffopt.sgd(), torch.tensor([[0, 1]])

    def loss(params):
        return functional(params, {}, words)[0].square().mean()

    with pytest.raises(
        ValueError, match=r"grads\['table.weight'\] .* sparse=False, or .* sparse_adam"
    ):
        diffopt.minimize(
            loss,
            functional.params,
            optimizer=opt,
            hparams=opt.hparams(lr=0.1),
            steps=1,
            adjoint=None,
        )


def test_running_averages_carry_no_derivative():
    functional = diffopt.nn.functionalize(model())
    _, buffers = functional(functional.params, functional.buffers, data().requires_grad_())
    assert not torch.equal(buffers["1.running_mean"], functional.buffers["1.running_mean"])
    assert not any(b.requires_grad for b in buffers.values())


def test_modules_that_fsdp_has_sharded_are_refused():
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    module = smooth()
    module[2].__class__ = type(
        "FSDPLinear", (fsdp.FSDPModule, nn.Linear), {}
    )  # as fully_shard does
    with pytest.raises(ValueError, match=r"module.2 is sharded by FSDP \(fully_shard\)"):
        diffopt.nn.functionalize(module)
    assert diffopt.nn.decay_mask(module)["2.weight"]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_encoder_in_eval_mode_runs_under_vmap():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    model = diffopt.nn.functionalize(layer)
    x = torch.randn(2, 3, 5, 4)
    mine = torch.vmap(lambda x: model(model.params, model.buffers, x)[0])(x)
    torch.testing.assert_close(mine, torch.stack([layer(one) for one in x]))
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3),), r"params is a tensor .* not a dictionary .*: call model\(params"),
        ((), r"params is None, not a dictionary .*: call model\(params, buffers, \*inputs\)"),
        (({},), r"params lacks|buffers is None, not a dictionary"),
    ],
    ids=["like a module", "nothing", "params only"],
)
@pytest.mark.parametrize("unpacked", [False, True])
def test_a_call_without_params_and_buffers_says_what_to_pass(arguments, message, unpacked):
    model = diffopt.nn.functionalize(nn.BatchNorm1d(3))
    with pytest.raises((TypeError, ValueError), match=message):
        (model.apply if unpacked else model)(*arguments)


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed(), ForwardMode(), Implicit()])
def test_parameter_dicts_are_arguments_of_loops(adjoint):
    weights = nn.ParameterDict({"a": torch.tensor(2.0), "b": torch.tensor(0.5)})

    def derivative(given):
        opt = diffopt.sgd()
        sol = diffopt.minimize(
            lambda w, given: given["a"] * (w - given["b"]) ** 2,
            torch.tensor(1.0),
            given,
            optimizer=opt,
            hparams=opt.hparams(lr=0.2),
            steps=40,
            adjoint=adjoint,
        )
        return torch.autograd.grad(sol.params, [*weights.values()])

    assert derivative(weights) == derivative(dict(weights))


def test_parameter_dicts_are_arguments_of_implicit_functions_and_of_inspection():
    weights = nn.ParameterDict({"a": torch.tensor(2.0)})
    root = diffopt.implicit_root(lambda x, w: x**2 - w["a"], lambda _, w: w["a"].detach().sqrt())
    found = root(torch.tensor(1.0), weights)
    grads = torch.autograd.grad(found, [*weights.values()], retain_graph=True)
    torch.testing.assert_close(grads[0], torch.tensor(0.125**0.5))
    (row,) = diffopt.inspect.explain(grads, weights, outer=found).rows
    assert (row.name, row.status) == ("a", "ok")
    assert str(diffopt.inspect.graph(found, weights)) == "a -> outer"
    carry, _ = unroll(lambda c, a, x: ({"a": c["a"] * a["a"]}, x), weights, weights, 2)
    assert carry["a"].item() == 8.0
