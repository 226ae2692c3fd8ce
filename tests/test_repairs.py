"""What torch gets wrong is mended, and torch is still wrong."""

import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations

import diffopt
from diffopt._diff import repairs
from diffopt.adjoint import Checkpointed, ForwardMode, Unrolled

PINNED = re.search(
    r"^torch==(\d+\.\d+)\.", Path(__file__).parents[1].joinpath("constraints.txt").read_text(), re.M
)
still_wrong = pytest.mark.skipif(
    PINNED is None or not torch.__version__.startswith(PINNED[1]),
    reason="the torch that development pins tells whether a repair can go",
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(hessian):
    return torch.allclose(hessian, hessian.T, rtol=1e-6, atol=1e-9)


# torch alone. When one of these fails, torch is right, and the repair of that name in
# diffopt._diff.repairs can go once no supported torch needs it.


@still_wrong
def test_torch_takes_wrong_second_derivatives_of_weight_norm():
    g, x = randn(5, 1), randn(5, 4, seed=1)
    hessian = torch.autograd.functional.hessian(
        lambda v: (torch._weight_norm(v, g, 0) * x).sum().square(), randn(5, 4, seed=2)
    )
    assert not symmetric(hessian.reshape(20, 20))


NORMS = {
    "layer_norm": lambda x, w: F.layer_norm(x, (4,), w),
    "batch_norm": lambda x, w: F.batch_norm(x, None, None, w, training=True),
    "instance_norm": lambda x, w: F.instance_norm(x[None], weight=w)[0],
}


def batched(norm):
    """The Hessian of a loss of inputs and weights, around a vmap over them."""
    x, w = randn(2, 4, 4), randn(2, 4, seed=1)

    def loss(flat):
        xs, ws = flat[:32].reshape(2, 4, 4), flat[32:].reshape(2, 4)

        def gradient(x, w):
            return torch.func.grad(lambda w: norm(x, w).pow(3).sum())(w).square().sum()

        return torch.vmap(gradient)(xs, ws).sum()

    flat = torch.cat([x.flatten(), w.flatten()]).requires_grad_()
    return torch.autograd.gradcheck(loss, flat, raise_exception=False)


@still_wrong
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_torch_takes_wrong_second_derivatives_of_norms_around_vmap(norm):
    assert not batched(norm)


@still_wrong
def test_torch_leaves_forward_derivatives_on_in_no_grad():
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(torch.ones(()), torch.ones(()))
        assert forward_ad.unpack_dual(2 * dual).tangent is not None


LOSSES = {
    "mse_loss": F.mse_loss,
    "mse_loss of sums": lambda x, y: F.mse_loss(input=x, target=y, reduction="sum"),
    "mse_loss with weights": lambda x, y: F.mse_loss(x, y, weight=y.exp()),
    "MSELoss": nn.MSELoss(),
    "huber_loss": lambda x, y: F.huber_loss(x, y, delta=0.5),
    "huber_loss with weights": lambda x, y: F.huber_loss(x, y, weight=y.exp()),
    "HuberLoss": nn.HuberLoss("none", 0.5),
    "soft_margin_loss": lambda x, y: F.soft_margin_loss(x, y.sign()),
    "SoftMarginLoss": nn.SoftMarginLoss(reduction="sum"),
}


@still_wrong
@pytest.mark.parametrize("name", ["mse_loss", "huber_loss", "soft_margin_loss"])
def test_torch_lacks_forward_derivatives_of_the_gradients_of_losses(name):
    x, y = randn(5), randn(5, seed=1)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"ZeroTensors|forward AD"):
        torch.func.jvp(torch.func.grad(lambda x: LOSSES[name](x, y)), (x,), (x,))


# Mended.


def hook(layer, dim):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, dim=dim)


def parametrization(layer, dim):
    return parametrizations.weight_norm(layer, dim=dim)


class Direct(nn.Module):
    """Without a module of torch's."""

    def __init__(self, layer, dim):
        super().__init__()
        self.v, self.bias, self.dim = nn.Parameter(layer.weight.detach()), layer.bias, dim
        self.g = nn.Parameter(torch.norm_except_dim(self.v, 2, -1 if dim is None else dim).detach())

    def forward(self, x):
        return F.linear(x, torch._weight_norm(self.v, self.g, self.dim), self.bias)


WEIGHT_NORMS = [
    (hook, 0),
    (hook, 1),
    (hook, None),
    (parametrization, 0),
    (parametrization, -1),
    (Direct, 0),
    (Direct, 1),
]


def solve(make, dim, adjoint, **options):
    """A function from params and a rate to the last loss of an inner loop."""
    torch.manual_seed(0)
    net = nn.Sequential(make(nn.Linear(3, 2).double(), dim), nn.Tanh(), nn.Linear(2, 1).double())
    functional, opt, x = diffopt.nn.functionalize(net), diffopt.adam(), randn(5, 3)

    def loss(params, x):
        return (functional(params, functional.buffers, x)[0] - 1).square().mean()

    def outer(lr, *tensors):
        params = dict(zip(functional.params, tensors, strict=True))
        hp = opt.hparams(lr=lr, eps=0.1)
        sol = diffopt.minimize(
            loss, params, x, optimizer=opt, hparams=hp, steps=2, adjoint=adjoint, **options
        )
        return sum(p.pow(3).sum() for p in sol.params.values())

    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    tensors = [p.detach().clone().requires_grad_() for p in functional.params.values()]
    return outer, (lr, *tensors)


@pytest.mark.parametrize(("make", "dim"), WEIGHT_NORMS)
def test_derivatives_of_loops_with_weight_norm_are_those_of_finite_differences(make, dim):
    outer, inputs = solve(make, dim, Unrolled())
    assert torch.autograd.gradcheck(outer, inputs)
    assert torch.autograd.gradgradcheck(outer, inputs, fast_mode=True)


@pytest.mark.parametrize(
    "adjoint",
    [Checkpointed(), Checkpointed(hvp="forward-over-reverse"), ForwardMode()],
    ids=["Checkpointed", "forward-over-reverse", "ForwardMode"],
)
def test_all_adjoints_agree_on_weight_norm(adjoint):
    outer, inputs = solve(parametrization, 0, adjoint)
    expected, _ = solve(parametrization, 0, Unrolled())
    torch.testing.assert_close(
        torch.autograd.grad(outer(*inputs), inputs), torch.autograd.grad(expected(*inputs), inputs)
    )
    if not isinstance(adjoint, ForwardMode):
        assert torch.autograd.gradgradcheck(outer, inputs, fast_mode=True)


@pytest.mark.parametrize("way", ["torch.func", "vmap"])
def test_weight_norm_is_mended_inside_torch_func(way):
    outer, inputs = solve(parametrization, 0, Unrolled())
    expected = torch.autograd.grad(outer(*inputs), inputs)
    gradient = torch.func.grad(outer, argnums=tuple(range(len(inputs))))
    if way == "torch.func":
        torch.testing.assert_close(gradient(*inputs), expected)
    else:
        stacked = [torch.stack([x, x]) for x in inputs]
        actual = [both[1] for both in torch.vmap(gradient)(*stacked)]
        torch.testing.assert_close(actual, [*expected])


@pytest.mark.parametrize("net", [parametrization, Direct])
def test_weight_norm_is_mended_where_torch_compile_traces_the_whole_loop(net):
    torch.manual_seed(0)
    functional = diffopt.nn.functionalize(net(nn.Linear(3, 2).double(), 0))
    opt, x = diffopt.sgd(), randn(5, 3)

    def loss(params):
        return functional(params, {}, x)[0].pow(3).sum()

    def outer(params):
        sol = diffopt.minimize(loss, params, optimizer=opt, hparams=opt.hparams(lr=0.1), steps=1)
        return sum(p.pow(3).sum() for p in sol.params.values())

    params = {name: p.detach() for name, p in functional.params.items()}
    gradient = torch.func.grad(outer)
    compiled = torch.compile(gradient, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(params), gradient(params))
    torch.compiler.reset()


START, X, Y = randn(3), randn(6, 3, seed=1), randn(6, seed=2)


def fitted(loss, rate, adjoint, **options):
    """A value that depends on the rate of some steps on a loss."""
    opt = diffopt.sgd()
    sol = diffopt.minimize(
        lambda w: loss(X @ w, Y).sum(), START, optimizer=opt, hparams=opt.hparams(lr=rate),
        steps=3, adjoint=adjoint, **options,
    )  # fmt: skip
    return sol.params.square().sum() + sol.losses.sum()


@pytest.mark.parametrize(
    "adjoint",
    [Checkpointed(hvp="forward-over-reverse"), ForwardMode()],
    ids=["forward-over-reverse", "ForwardMode"],
)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_forward_derivatives_of_their_gradients(name, adjoint):
    def outcome(adjoint):
        rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
        value = fitted(LOSSES[name], rate, adjoint)
        return value, *torch.autograd.grad(value, rate)

    torch.testing.assert_close(outcome(adjoint), outcome(Unrolled()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mse_loss", "MSELoss", "huber_loss", "soft_margin_loss"])
def test_transforms_in_forward_mode_differentiate_loops_on_losses(name):
    rates = torch.tensor([0.05, 0.1], dtype=torch.float64)

    def outer(rate):
        return fitted(LOSSES[name], rate, Unrolled())

    found = torch.vmap(torch.func.jacfwd(outer))(rates)
    torch.testing.assert_close(found, torch.stack([*map(torch.func.grad(outer), rates)]))
    found = torch.func.hessian(outer)(rates[0])
    torch.testing.assert_close(found, torch.func.grad(torch.func.grad(outer))(rates[0]))


@pytest.mark.filterwarnings("error:.*torch.compile")
def test_compiled_loops_on_the_squared_error_have_forward_derivatives():
    rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    value = fitted(F.mse_loss, rate, ForwardMode(), compile={"backend": "eager"})
    expected = torch.autograd.grad(fitted(F.mse_loss, rate, Unrolled()), rate)
    torch.testing.assert_close(torch.autograd.grad(value, rate), expected)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_mended_losses_take_the_arguments_of_torchs(reduction):
    x, y = randn(2, 3), randn(3, seed=1).sign().expand(2, 3)
    legacy = {"none": (None, False), "mean": (True, None), "sum": (False, True)}[reduction]
    for mine, torchs in repairs._FORWARD.items():
        torch.testing.assert_close(
            torchs(x, y, reduction=reduction), mine(x, y, reduction=reduction)
        )
        if mine is not F.huber_loss:
            with warnings.catch_warnings(action="ignore"):
                torch.testing.assert_close(torchs(x, y, *legacy), mine(x, y, *legacy))
        with pytest.raises(ValueError, match="not a valid value for reduction"):
            torchs(x, y, reduction="max")


def test_compiled_steps_under_vmap_differentiate_batch_norm_right_after_a_step_that_hides_it():
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4),
        torch.nn.BatchNorm1d(4, track_running_stats=False),
        torch.nn.Linear(4, 2),
    ).double()
    torch.nn.init.zeros_(net[2].weight)  # so no wrong term counts in the first step
    model, opt = diffopt.nn.functionalize(net), diffopt.sgd()
    x = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 0, 0, 1])

    def loss(params, x):
        return F.cross_entropy(model(params, {}, x)[0], y)

    def meta_gradient(compile):
        def adapted(x):
            hp = opt.hparams(lr=0.1)
            return loss(
                diffopt.minimize(
                    loss, model.params, x, optimizer=opt, hparams=hp, steps=3, compile=compile
                ).params,
                x + 0.1,
            )

        return torch.autograd.grad(torch.vmap(adapted)(x).sum(), [*net.parameters()])

    torch.testing.assert_close(meta_gradient({"backend": "aot_eager"}), meta_gradient(False))
