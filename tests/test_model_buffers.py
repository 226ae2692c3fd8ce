"""The buffers at the end of a loop can be fed to the model again, in a second loop as well."""

import pytest
import torch
from torch import nn

import diffopt
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

ADJOINTS = [
    Unrolled(),
    FirstOrder(),
    Truncated(1),
    Checkpointed(),
    Checkpointed(levels=2),
    Checkpointed(hvp="forward-over-reverse"),
    ForwardMode(),
    Implicit(on_failure="warn", root_tolerance=float("inf")),
    OneStep(),
    Evolution(samples=1),
    None,
]


@pytest.mark.filterwarnings("ignore::diffopt.linear.ConvergenceWarning")
@pytest.mark.parametrize("transform", ["none", "grad", "vmap", "vmap of grad"])
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_last_buffers_are_fed_to_the_model_again(adjoint, transform):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    model, opt = diffopt.nn.functionalize(net), diffopt.sgd(momentum=True)
    x, y = torch.randn(2, 6, 3).double(), torch.randn(2, 6, 1).double()

    def loss(p, buffers, x, y):
        out, buffers = model(p, buffers, x)
        return (out - y).square().mean(), buffers

    def run(lr, x, y, buffers):
        hparams = opt.hparams(lr=lr, momentum=0.5)
        arguments = {"optimizer": opt, "hparams": hparams, "steps": 2, "adjoint": adjoint}
        sol = diffopt.minimize(loss, model.params, x, y, buffers=buffers, **arguments)
        _, buffers = model(sol.params, sol.buffers, x)
        sol = diffopt.minimize(
            loss, sol.params, x, y, buffers=buffers, state=sol.state, **arguments
        )
        value, buffers = loss(sol.params, sol.buffers, x, y)
        return value, buffers

    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad="grad" not in transform)
    function = torch.func.grad(run, has_aux=True) if "grad" in transform else run
    if "vmap" in transform:
        function = torch.vmap(function, in_dims=(None, 0, 0, 0), randomness="same")
        arguments = x, y, {k: b.expand(2, *b.shape) for k, b in model.buffers.items()}
    else:
        arguments = x[0], y[0], model.buffers
    result, buffers = function(lr, *arguments)
    assert torch.isfinite(result).all()
    assert not any(b.requires_grad for b in buffers.values())
    counts = buffers["1.num_batches_tracked"].double()
    torch.testing.assert_close(counts, torch.full_like(counts, 6))
    if transform in ("none", "vmap") and adjoint is not None:
        assert torch.isfinite(torch.autograd.grad(result.sum(), lr)[0])


def test_a_bias_without_effect_is_not_taken_for_randomness():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model, opt = diffopt.nn.functionalize(net), diffopt.adam()
    x = torch.randn(6, 3)

    def loss(p, buffers):
        out, buffers = model(p, buffers, x)
        return (out - x[:, :1]).square().mean(), buffers

    def value(lr, hvp):
        sol = diffopt.minimize(
            loss, model.params, optimizer=opt, hparams=opt.hparams(lr=lr), steps=3,
            buffers=model.buffers, adjoint=Checkpointed(hvp=hvp),
        )  # fmt: skip
        return sol.losses.sum()

    for hvp in ("reverse-over-reverse", "forward-over-reverse"):
        assert torch.isfinite(torch.func.grad(value)(torch.tensor(0.01), hvp))
