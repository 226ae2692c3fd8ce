"""Derivatives of solved loops against what mathematics says they are."""

import pytest
import torch

import diffopt
from diffopt.adjoint import Checkpointed, ForwardMode, Implicit, Truncated, Unrolled
from diffopt.linear import GMRES, BiCGStab, ConjugateGradient, Direct, Neumann, NormalCG

EXACT = [
    Unrolled(),
    Checkpointed(levels=3),
    Checkpointed(hvp="forward-over-reverse"),
    ForwardMode(),
]
SGD = diffopt.sgd()


def matrix(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positive_definite(size):
    root = matrix(size, size, seed=1)
    return root @ root.T / size + torch.eye(size, dtype=torch.float64)


def jacobian(function, x):
    return torch.autograd.functional.jacobian(function, x)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


# Ridge regression: dw/dlambda = -n (X'X + n lambda I)^-1 w

X, Y = matrix(30, 4), matrix(30, seed=2)


def ridge(w, decay):
    return 0.5 * ((X @ w - Y) ** 2).mean() + 0.5 * decay * (w**2).sum()


SOLVERS = [ConjugateGradient(), NormalCG(), GMRES(), BiCGStab(), Neumann(300, 0.3), Direct()]


@pytest.mark.parametrize("adjoint", [*EXACT, *map(Implicit, SOLVERS)], ids=str)
def test_ridge_regression(adjoint):
    def solve(decay):
        return diffopt.minimize(
            ridge, torch.zeros_like(X[0]), decay,
            optimizer=SGD, hparams=SGD.hparams(lr=0.5), steps=120, adjoint=adjoint,
        ).params  # fmt: skip

    decay = scalar(0.3)
    eye = torch.eye(4, dtype=torch.float64)
    w = torch.linalg.solve(X.T @ X + 30 * decay * eye, X.T @ Y)
    torch.testing.assert_close(solve(decay), w, rtol=1e-10, atol=0)
    expected = -30 * torch.linalg.solve(X.T @ X + 30 * decay * eye, w)
    torch.testing.assert_close(jacobian(solve, decay), expected, rtol=1e-9, atol=0)


# iMAML on a quadratic: (I + H / lambda)^-1


@pytest.mark.parametrize("adjoint", [*EXACT, Implicit()], ids=str)
def test_implicit_maml_on_a_quadratic(adjoint):
    hessian, decay = positive_definite(3), 2.0

    def loss(w, start):
        return 0.5 * w @ hessian @ w - w.sum() + 0.5 * decay * ((w - start) ** 2).sum()

    def adapt(start):
        return diffopt.minimize(
            loss, start, start,
            optimizer=SGD, hparams=SGD.hparams(lr=0.2), steps=150, adjoint=adjoint,
        ).params  # fmt: skip

    eye = torch.eye(3, dtype=torch.float64)
    expected = torch.linalg.inv(eye + hessian / decay)
    start = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(jacobian(adapt, start), expected, rtol=1e-10, atol=1e-12)


# Truncation at the fixed point is a Neumann series: (I - (I - lr H)^K) H^-1


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_truncation_at_the_fixed_point_is_a_neumann_series(steps):
    hessian, lr = positive_definite(3), 0.3

    def loss(w, b):
        return 0.5 * w @ hessian @ w - w @ b

    def solve(b, adjoint):
        return diffopt.minimize(
            loss, torch.linalg.solve(hessian, b).detach(), b,
            optimizer=SGD, hparams=SGD.hparams(lr=lr), steps=30, adjoint=adjoint,
        ).params  # fmt: skip

    eye, b = torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    power = torch.linalg.matrix_power(eye - lr * hessian, steps)
    expected = (eye - power) @ torch.linalg.inv(hessian)
    for adjoint in (Truncated(steps), Implicit(Neumann(steps, lr))):
        found = jacobian(lambda b, adjoint=adjoint: solve(b, adjoint), b)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


# The curse of unrolling: the derivative's error grows before it decays as T (1 - lr mu)^(T-1)


@pytest.mark.parametrize("adjoint", EXACT, ids=str)
def test_the_error_of_an_unrolled_derivative_grows_and_then_decays(adjoint):
    start, b, h, lr = 5.0, 1.0, 0.5, 0.1

    def error(steps):
        curvature = scalar(h).requires_grad_()
        sol = diffopt.minimize(
            lambda w, h: 0.5 * h * w**2 - b * w, scalar(start), curvature,
            optimizer=SGD, hparams=SGD.hparams(lr=lr), steps=steps, adjoint=adjoint,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(sol.params, curvature)
        return grad.item() + b / h**2  # of the minimum b / h

    def closed_form(steps):
        rate, distance = 1 - lr * h, start - b / h
        return -lr * steps * rate ** (steps - 1) * distance + rate**steps * b / h**2

    steps = [1, 10, 20, 40, 80, 160]
    errors = [error(t) for t in steps]
    assert errors == pytest.approx([closed_form(t) for t in steps], rel=1e-10)
    sizes = [abs(e) for e in errors]
    assert max(sizes[:4]) > sizes[1]
    assert sizes[-1] < 1e-2 * max(sizes)


# One-step MAML on linear regression


@pytest.mark.parametrize("adjoint", EXACT, ids=str)
def test_one_step_maml_on_linear_regression(adjoint):
    support, query = (matrix(5, 3, seed=3), matrix(5, seed=4)), (matrix(6, 3, seed=5), Y[:6])
    lr = 0.1

    def loss(w, x, y):
        return 0.5 * ((x @ w - y) ** 2).sum()

    start = matrix(3, seed=6).requires_grad_()
    sol = diffopt.minimize(
        loss, start, *support,
        optimizer=SGD, hparams=SGD.hparams(lr=lr), steps=1, adjoint=adjoint,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss(sol.params, *query), start)
    (x, y), (xq, yq) = support, query
    eye = torch.eye(3, dtype=torch.float64)
    adapted = start.detach() - lr * x.T @ (x @ start.detach() - y)
    expected = (eye - lr * x.T @ x) @ xq.T @ (xq @ adapted - yq)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=0)


# Hypergradient descent: dL_{t+1} / dlr_t = -g_{t+1} . g_t


@pytest.mark.parametrize("adjoint", EXACT, ids=str)
def test_the_next_loss_by_the_rate_is_minus_the_product_of_gradients(adjoint):
    start = matrix(4, seed=7)
    lr = scalar(0.05).requires_grad_()

    def loss(w):
        return (w**4).sum() + w.prod()

    sol = diffopt.minimize(
        loss, start, optimizer=SGD, hparams=SGD.hparams(lr=lr), steps=2, adjoint=adjoint
    )
    (grad,) = torch.autograd.grad(sol.losses[1], lr)
    first = torch.func.grad(loss)(start)
    second = torch.func.grad(loss)(start - lr.detach() * first)
    torch.testing.assert_close(grad, -second @ first, rtol=1e-12, atol=0)


# L2 logistic regression on real data: implicit, long unroll and central differences agree


def test_logistic_regression_on_breast_cancer():
    datasets = pytest.importorskip("sklearn.datasets")
    features, labels = datasets.load_breast_cancer(return_X_y=True)
    x, y = torch.tensor(features), torch.tensor(labels).double()
    x = (x - x.mean(0)) / x.std(0)
    (x, x_val), (y, y_val) = (x[::2], x[1::2]), (y[::2], y[1::2])
    entropy = torch.nn.functional.binary_cross_entropy_with_logits

    def loss(w, log_decay):
        return entropy(x @ w, y) + 0.5 * (log_decay.exp() * w**2).sum()

    def validation(log_decay, adjoint):
        sol = diffopt.minimize(
            loss, torch.zeros_like(x[0]), log_decay,
            optimizer=SGD, hparams=SGD.hparams(lr=0.25), steps=20_000, tol=1e-10, adjoint=adjoint,
        )  # fmt: skip
        return entropy(x_val @ sol.params, y_val)

    log_decay = torch.linspace(-2, 0, 30, dtype=torch.float64)
    grads = [
        torch.func.grad(lambda d, a=adjoint: validation(d, a))(log_decay)
        for adjoint in (Implicit(ConjugateGradient(rtol=1e-12)), Implicit(Direct()))
    ]
    leaf = log_decay.clone().requires_grad_()
    for adjoint in (Checkpointed(), Truncated(1000)):
        grads.extend(torch.autograd.grad(validation(leaf, adjoint), leaf))
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-6, atol=1e-12)
    for i in (0, 13, 29):
        step = 1e-4 * torch.eye(30, dtype=torch.float64)[i]
        up, down = (validation(log_decay + s, None).item() for s in (step, -step))
        assert grads[0][i].item() == pytest.approx((up - down) / 2e-4, rel=1e-5, abs=1e-10)
