"""functionalize(): modules as pure functions of their parameters and buffers."""

import copy

import pytest
import torch
from torch import nn

import diffopt


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
        (lambda p, b: p.pop("0.bias"), r"params: the call misses \['0.bias'\]"),
        (lambda p, b: p.update(extra=1), r"params: the call does not know \['extra'\]"),
        (lambda p, b: b.pop("1.running_var"), r"buffers: the call misses \['1.running_var'\]"),
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
