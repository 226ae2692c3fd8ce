"""Gradients that autograd computes in a batch are those that it computes one after another."""

import pytest
import torch

from diffopt import adjoint as a, linear, minimize, sgd
from diffopt.implicit import implicit_root

EYE = torch.eye(2, dtype=torch.float64)
TARGET = torch.tensor([1.0, 0.5], dtype=torch.float64)


def solution(adjoint, target, **options):
    def loss(w, target):
        return 0.5 * ((w - target) ** 2).sum() + 0.02 * (w**4).sum() * target.sum()

    steps, opt = 40 if isinstance(adjoint, a.Implicit) else 3, sgd()
    return minimize(
        loss, torch.ones(2, dtype=torch.float64), target, optimizer=opt,
        hparams=opt.hparams(lr=0.5, momentum=0.1), steps=steps, adjoint=adjoint, **options,
    ).params  # fmt: skip


def both(results, inputs):
    """The rows of a Jacobian, one by one and in a batch."""
    rows = [torch.autograd.grad(y, inputs, retain_graph=True)[0] for y in results]
    batch = torch.autograd.grad(results, inputs, EYE, is_grads_batched=True, retain_graph=True)
    return torch.stack(rows), batch[0]


FIRST = {
    "Unrolled": a.Unrolled(),
    "Checkpointed": a.Checkpointed(),
    "forward-over-reverse": a.Checkpointed(hvp="forward-over-reverse"),
    "Truncated": a.Truncated(2),
    "ForwardMode": a.ForwardMode(),
    "Reversible": a.Reversible(),
    "Implicit": a.Implicit(),
    "GMRES": a.Implicit(solver=linear.GMRES()),
    "Direct": a.Implicit(solver=linear.Direct()),
    "OneStep": a.OneStep(),
    "Evolution": a.Evolution(samples=1),
}


@pytest.mark.parametrize("name", FIRST)
def test_first_derivatives(name):
    target = TARGET.clone().requires_grad_()
    torch.testing.assert_close(*both(solution(FIRST[name], target), target), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["Unrolled", "Checkpointed", "forward-over-reverse", "Implicit"])
def test_second_derivatives(name):
    def square(target):
        return solution(FIRST[name], target).square().sum()

    target = TARGET.clone().requires_grad_()
    (first,) = torch.autograd.grad(square(target), target, create_graph=True)
    rows, batch = both(first, target)
    torch.testing.assert_close(rows, batch, rtol=1e-9, atol=1e-9)
    whole = torch.autograd.functional.hessian(square, TARGET, vectorize=True)
    torch.testing.assert_close(rows, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:the loss .* in a batch .* are not compiled")
def test_compiled():
    target = TARGET.clone().requires_grad_()
    results = solution(FIRST["Unrolled"], target, compile={"backend": "eager"})
    torch.testing.assert_close(*both(results, target), rtol=1e-9, atol=1e-9)


def test_a_residual_that_draws_random_numbers():
    def residual(x, c):
        return x * (1 + torch.nn.functional.dropout(torch.ones(2), 0.5)) - c  # the same each time

    c = torch.ones(2, requires_grad=True)
    x = implicit_root(residual, lambda init, c: c, solver=linear.Direct())(None, c)
    (batch,) = torch.autograd.grad(x, c, torch.eye(2), is_grads_batched=True)
    assert batch.isfinite().all()
