"""Implicit derivatives against closed forms, finite differences and unrolled loops."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import diffopt
from diffopt.implicit import (
    ImplicitDerivative,
    fixed_point_iteration,
    implicit_fixed_point,
    implicit_root,
)
from diffopt.linear import (
    GMRES,
    BiCGStab,
    ConjugateGradient,
    ConvergenceError,
    ConvergenceWarning,
    Direct,
    LinearSolution,
    Neumann,
    NormalCG,
    Nystrom,
)

TIGHT = {"rtol": 1e-12}
GENERAL = [GMRES(**TIGHT), BiCGStab(**TIGHT), NormalCG(**TIGHT), Direct(**TIGHT)]
SYMMETRIC = [*GENERAL, ConjugateGradient(**TIGHT), Nystrom(100, damping=1e-9)]


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def name(solver):
    return type(solver).__name__


def number(value):
    return torch.tensor(value, dtype=torch.float64)


# One unknown: x^2 = a^3, of which every derivative is known


def residual(x, a):
    return x**2 - a**3


root = implicit_root(residual, lambda init, a: a**1.5, solver=GMRES(**TIGHT))


def scalar(a):
    return root(None, a)


A = number(4.0)
DERIVATIVES = [1.5 * 2, 0.75 / 2, -0.375 / 8, 0.5625 / 32]  # of a^(3/2) at 4


def test_derivatives_of_every_order_by_autograd():
    a = A.clone().requires_grad_()
    y = scalar(a)
    for expected in DERIVATIVES:
        (y,) = torch.autograd.grad(y, a, create_graph=True)
        torch.testing.assert_close(y, number(expected))


def forward(function):
    return lambda a: jvp(function, (a,), (torch.ones_like(a),))[1]


@pytest.mark.parametrize("modes", [*itertools.product("fr", repeat=3)], ids="".join)
def test_third_derivatives_in_any_nesting_of_modes(modes):
    function = scalar
    for mode in modes:
        function = forward(function) if mode == "f" else grad(function)
    third, fourth = (number(d) for d in DERIVATIVES[2:])
    torch.testing.assert_close(function(A), third)
    torch.testing.assert_close(vmap(function)(A[None]), third[None])
    for outer in (grad, forward):
        torch.testing.assert_close(outer(lambda a: vmap(function)(a[None])[0])(A), fourth)


def test_transforms_of_torch_func():
    first, second = number(DERIVATIVES[0]), number(DERIVATIVES[1])
    for transform in (grad, jacrev, jacfwd):
        torch.testing.assert_close(transform(scalar)(A), first)
    torch.testing.assert_close(hessian(scalar)(A), second)
    torch.testing.assert_close(vjp(scalar, A)[1](number(2.0))[0], 2 * first)


def test_transforms_over_batches():
    a = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    torch.testing.assert_close(vmap(scalar)(a), a**1.5)
    torch.testing.assert_close(vmap(grad(scalar))(a), 1.5 * a**0.5)
    torch.testing.assert_close(grad(lambda a: vmap(scalar)(a).sum())(a), 1.5 * a**0.5)
    torch.testing.assert_close(jacrev(vmap(scalar))(a), torch.diag(1.5 * a**0.5))
    torch.testing.assert_close(jacfwd(vmap(scalar))(a), torch.diag(1.5 * a**0.5))
    total = hessian(lambda a: vmap(scalar)(a).sum())(a)
    torch.testing.assert_close(total, torch.diag(0.75 * a**-0.5))
    leaf = a.clone().requires_grad_()
    (first,) = torch.autograd.grad(vmap(scalar)(leaf).sum(), leaf, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), leaf)[0], 0.75 * a**-0.5)


def test_autograd_outside_of_torch_func():
    a = A.clone().requires_grad_()
    for function in (grad(scalar), forward(scalar)):
        (second,) = torch.autograd.grad(function(a), a)
        torch.testing.assert_close(second, number(DERIVATIVES[1]))


def test_forward_mode_duals_also_over_reverse():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(A, number(1.0))
        tangent = forward_ad.unpack_dual(scalar(dual)).tangent
        torch.testing.assert_close(tangent, number(DERIVATIVES[0]))
        gradient = forward_ad.unpack_dual(grad(scalar)(dual))
        torch.testing.assert_close(gradient.tangent, number(DERIVATIVES[1]))
        batch = forward_ad.make_dual(A[None], torch.ones(1, dtype=A.dtype))
        tangent = forward_ad.unpack_dual(vmap(scalar)(batch)).tangent
        torch.testing.assert_close(tangent[0], number(DERIVATIVES[0]))
        dual = forward_ad.make_dual(A.clone().requires_grad_(), number(1.0))
        (first,) = torch.autograd.grad(scalar(dual), dual, create_graph=True)
        tangent = forward_ad.unpack_dual(first).tangent
        torch.testing.assert_close(tangent, number(DERIVATIVES[1]))


# Ridge regression: (X'X + n lambda I) w = X'y, so dw/dlambda = -n (X'X + n lambda I)^-1 w

X, Y = random(12, 4), random(12, seed=1)


def ridge_loss(w, x, y, log_lambda):
    return 0.5 * ((x @ w - y) ** 2).sum() + 0.5 * len(y) * log_lambda.exp() * (w**2).sum()


def ridge_matrix(x, log_lambda):
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    return x.T @ x + len(x) * log_lambda.exp() * eye


def ridge_solve(init, x, y, log_lambda):
    # Not by torch.linalg.solve: its forward derivative of a forward derivative is wrong.
    return torch.linalg.inv(ridge_matrix(x, log_lambda)) @ (x.T @ y)


LOG_LAMBDA = number(-1.0)


@pytest.mark.parametrize("solver", SYMMETRIC, ids=name)
def test_ridge_regression(solver):
    ridge = implicit_root(grad(ridge_loss), ridge_solve, solver=solver, symmetric=True)
    log_lambda, x = LOG_LAMBDA.clone().requires_grad_(), X.clone().requires_grad_()
    w = ridge(None, x, Y, log_lambda)
    matrix = ridge_matrix(X, LOG_LAMBDA)
    expected = -len(X) * LOG_LAMBDA.exp() * torch.linalg.solve(matrix, w.detach())
    for i in range(4):
        (derivative,) = torch.autograd.grad(w[i], log_lambda, retain_graph=True)
        torch.testing.assert_close(derivative, expected[i], rtol=1e-6, atol=1e-6)
    direct = torch.autograd.functional.jacobian(
        lambda x: ridge_solve(None, x, Y, LOG_LAMBDA), X, vectorize=True
    )
    torch.testing.assert_close(
        torch.autograd.functional.jacobian(lambda x: ridge(None, x, Y, LOG_LAMBDA), X), direct,
        rtol=1e-6, atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("solver", [GMRES(**TIGHT), ConjugateGradient(**TIGHT)], ids=name)
def test_ridge_has_the_derivatives_of_finite_differences(solver):
    ridge = implicit_root(grad(ridge_loss), ridge_solve, solver=solver)
    inputs = [t.clone().requires_grad_() for t in (X[:5, :2], Y[:5], LOG_LAMBDA)]

    def solve(*args):
        return ridge(None, *args)

    closely = {"fast_mode": True, "rtol": 1e-5, "atol": 1e-7}
    assert torch.autograd.gradcheck(solve, inputs, check_forward_ad=True, **closely)
    assert torch.autograd.gradgradcheck(solve, inputs, check_fwd_over_rev=True, **closely)


def test_hyperhessian_of_a_validation_loss():
    ridge = implicit_root(grad(ridge_loss), ridge_solve, solver=ConjugateGradient(**TIGHT))
    valid_x, valid_y = random(6, 4, seed=2), random(6, seed=3)

    def validation(solve, log_lambda):
        return ((valid_x @ solve(None, X, Y, log_lambda) - valid_y) ** 2).mean()

    for transform in (grad, hessian, lambda f: jacrev(hessian(f))):
        torch.testing.assert_close(
            transform(lambda p: validation(ridge, p))(LOG_LAMBDA),
            transform(lambda p: validation(ridge_solve, p))(LOG_LAMBDA),
        )


def test_neumann_is_unrolling_of_the_last_steps():
    """From the solution, k steps of descent have the derivative of a series of k terms."""
    k, rate = 5, 0.02
    w = ridge_solve(None, X, Y, LOG_LAMBDA)
    truncated = implicit_root(
        grad(ridge_loss), ridge_solve, solver=Neumann(k, rate), symmetric=True
    )

    def unrolled(log_lambda):
        params = w
        for _ in range(k):
            params = params - rate * grad(ridge_loss)(params, X, Y, log_lambda)
        return params

    torch.testing.assert_close(
        jacrev(lambda p: truncated(None, X, Y, p))(LOG_LAMBDA), jacrev(unrolled)(LOG_LAMBDA)
    )


# Logistic regression: no closed form; H dw = -(d of the gradient)


def logistic_loss(w, x, y, penalty):
    return torch.nn.functional.softplus(-y * (x @ w)).mean() + 0.5 * penalty * (w**2).sum()


def newton(init, x, y, penalty):
    w = torch.zeros(x.shape[1], dtype=x.dtype)
    for _ in range(8):
        p = torch.sigmoid(-y * (x @ w))
        gradient = -(y * p) @ x / len(y) + penalty * w
        curvature = (x.T * (p * (1 - p))) @ x / len(y) + penalty * torch.eye(len(w))
        w = w - torch.linalg.inv(curvature) @ gradient
    return w


@pytest.mark.parametrize("solver", [GMRES(**TIGHT), ConjugateGradient(**TIGHT)], ids=name)
def test_logistic_regression(solver):
    labels = torch.sign(Y[:8])
    fit = implicit_root(
        grad(logistic_loss), newton, solver=solver, root_tolerance=1e-10, on_failure="raise"
    )
    penalty = number(0.1)
    x, labels = X[:5, :2].clone(), labels[:5]
    w = newton(None, x, labels, penalty)
    matrix = hessian(logistic_loss)(w, x, labels, penalty)
    torch.testing.assert_close(
        jacrev(lambda p: fit(None, x, labels, p))(penalty), -torch.linalg.solve(matrix, w)
    )
    inputs = (x.requires_grad_(), penalty.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, p: fit(None, x, labels, p), inputs)
    assert torch.autograd.gradgradcheck(lambda x, p: fit(None, x, labels, p), inputs)


def test_weights_of_examples_for_a_batch_of_problems():
    labels = torch.sign(Y[:8])

    def loss(w, x, weights):
        return (weights * torch.nn.functional.softplus(-labels * (x @ w))).mean() + 0.05 * w @ w

    def solve(init, x, weights):
        w = torch.zeros_like(x[0])
        for _ in range(12):
            h, g = hessian(loss)(w, x, weights), grad(loss)(w, x, weights)
            w = w - torch.linalg.inv(h) @ g
        return w

    fit = implicit_root(grad(loss), solve, solver=ConjugateGradient(**TIGHT))
    xs = torch.stack([X[:8, :2], X[:8, 2:], 3 * X[:8, :2]])
    weights = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)

    def meta(x, weights):
        return fit(None, x, weights).sum()

    batch = vmap(grad(meta, argnums=1), in_dims=(0, None))(xs, weights)
    for x, result in zip(xs, batch, strict=True):
        torch.testing.assert_close(result, grad(meta, argnums=1)(x, weights))
    total = grad(lambda weights: vmap(meta, in_dims=(0, None))(xs, weights).sum())(weights)
    torch.testing.assert_close(total, batch.sum(0))


# A deep equilibrium layer, x = tanh(W x + u), whose Jacobian is not symmetric

W, U = 0.4 * random(5, 5, seed=4), random(5, seed=5)


def layer(x, w, u):
    return torch.tanh(w @ x + u)


@pytest.mark.parametrize("solver", GENERAL, ids=name)
def test_deep_equilibrium(solver):
    deq = implicit_fixed_point(layer, solver=solver)
    x = deq(torch.zeros_like(U), W, U)
    slope = torch.diag(1 - x**2)
    exact = torch.linalg.solve(torch.eye(5) - slope @ W, slope)
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(transform(lambda u: deq(torch.zeros_like(U), W, u))(U), exact)


def test_deep_equilibrium_has_the_derivatives_of_finite_differences():
    deq = implicit_fixed_point(layer, solver=GMRES(**TIGHT))
    inputs = (W[:3, :3].clone().requires_grad_(), U[:3].clone().requires_grad_())
    function = lambda w, u: deq(torch.zeros_like(u), w, u)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True)


def test_deep_equilibrium_agrees_with_unrolling():
    deq = implicit_fixed_point(layer, solver=GMRES(**TIGHT))

    def unrolled(init, w, u):
        for _ in range(80):
            init = layer(init, w, u)
        return init

    zero = torch.zeros_like(U)
    for transform in (grad, hessian):
        torch.testing.assert_close(
            transform(lambda u: deq(zero, W, u).square().sum())(U),
            transform(lambda u: unrolled(zero, W, u).square().sum())(U),
        )


def test_batches_of_equilibria_that_take_different_numbers_of_steps():
    reports = []
    deq = implicit_fixed_point(layer, solver=GMRES(**TIGHT), on_solve=reports.append)
    ws = torch.stack([0 * W, 0.5 * W, W])
    zero = torch.zeros_like(U)
    meta = grad(lambda w: deq(zero, w, U).square().sum())
    batch = vmap(meta)(ws)
    (report,) = reports
    assert report.iterations.shape == (3,)
    assert report.iterations[0] < report.iterations[2]
    assert report.value.shape == (3, 5)
    for w, result in zip(ws, batch, strict=True):
        torch.testing.assert_close(result, meta(w))


def test_trees():
    def step(x, args):
        return {"a": torch.cos(args["w"] * x["a"]) + x["b"][0].sum(), "b": (0.1 * x["a"][:2],)}

    deq = implicit_fixed_point(step, solver=GMRES(**TIGHT))
    init = {"b": (torch.zeros(2, dtype=torch.float64),), "a": torch.zeros(3, dtype=torch.float64)}
    x = deq(init, {"w": number(0.3), "name": "unused", "n": 3})
    torch.testing.assert_close(step(x, {"w": number(0.3)})["a"], x["a"])

    def function(w):
        x = deq(init, {"w": w, "name": "unused", "n": torch.tensor(3)})
        return x["a"], x["b"][0]

    assert torch.autograd.gradcheck(function, number(0.3).requires_grad_())
    assert torch.autograd.gradgradcheck(function, number(0.3).requires_grad_())


def test_modules_by_their_parameters():
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 3).double()
    params = dict(network.named_parameters())

    def step(x, params, u):
        return 0.5 * torch.tanh(torch.func.functional_call(network, params, (x,)) + u)

    deq = implicit_fixed_point(step, solver=GMRES(**TIGHT))
    deq(torch.zeros(3, dtype=torch.float64), params, U[:3]).sum().backward()
    expected = grad(
        lambda p: deq(torch.zeros(3, dtype=torch.float64), p, U[:3]).sum()
    )({k: v.detach() for k, v in params.items()})  # fmt: skip
    torch.testing.assert_close(network.weight.grad, expected["weight"])
    assert network.weight.grad.count_nonzero() == 9


def test_a_solution_that_is_the_same_for_a_whole_batch():
    """Solved without a look at what is batched, yet each sample has its own derivatives."""
    root = implicit_root(
        lambda x, a, c: x**2 - a * c, lambda init, a, c: a.sqrt(), solver=GMRES(**TIGHT)
    )
    ones, weights = torch.ones(3, dtype=torch.float64), number([1.0, 2.0, 3.0])

    def batch(a, c):
        return vmap(lambda c: root(None, a, c))(c)

    def exact(a, c):
        return (a * c) ** 0.5

    def weighted(function):
        return lambda a, c: weights @ function(a, c)

    for argnums in (0, 1):
        for transform in (jacrev, jacfwd, hessian):
            result = transform(weighted(batch), argnums)(A, ones)
            torch.testing.assert_close(result, transform(weighted(exact), argnums)(A, ones))
        result = vmap(grad(lambda a, c: root(None, a, c), argnums), in_dims=(None, 0))(A, ones)
        torch.testing.assert_close(result, jacrev(exact, argnums)(A, ones).reshape(3, -1).sum(1))
    leaf = ones.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(weights @ batch(A, leaf), leaf)
    torch.testing.assert_close(derivative, weights)


def test_a_batch_of_solutions_of_one_equation():
    root = implicit_root(lambda x, a: x**2 - a, lambda init, a: init * a.sqrt())
    signs, weights = number([1.0, -1.0, 1.0]), number([1.0, 2.0, 4.0])

    def total(a):
        return weights @ vmap(lambda sign: root(sign, a))(signs)

    for transform, expected in ((grad, 3 / 4), (jacfwd, 3 / 4), (hessian, -3 / 32)):
        torch.testing.assert_close(transform(total)(A), number(expected))


# Any solver


def by_numpy(init, a):
    return torch.from_numpy(a.numpy() ** 1.5)


def test_a_solver_that_leaves_torch():
    pytest.importorskip("numpy")
    root = implicit_root(residual, by_numpy, solver=GMRES(**TIGHT))
    one = A[None]
    for transform, order in ((grad, 0), (hessian, 1), (lambda f: grad(grad(grad(f))), 2)):
        result = transform(lambda a: root(None, a[None])[0])(A)
        torch.testing.assert_close(result, number(DERIVATIVES[order]))
    torch.testing.assert_close(jacfwd(lambda a: root(None, a))(one), number([[DERIVATIVES[0]]]))


def test_a_solver_that_leaves_torch_is_called_sample_by_sample():
    pytest.importorskip("numpy")
    a = torch.tensor([[1.0, 4.0], [9.0, 16.0]], dtype=torch.float64)
    batched = implicit_root(residual, by_numpy, solver=GMRES(**TIGHT))
    with pytest.raises(RuntimeError) as error:
        vmap(lambda a: batched(None, a[None]))(a[0])
    assert "sequential=True" in error.value.__notes__[0]
    root = implicit_root(residual, by_numpy, solver=GMRES(**TIGHT), sequential=True)

    def function(a):
        return root(None, a[None])[0]

    torch.testing.assert_close(vmap(vmap(function))(a), a**1.5)
    torch.testing.assert_close(vmap(vmap(grad(function)))(a), 1.5 * a**0.5)
    total = grad(lambda a: vmap(vmap(function, in_dims=1), in_dims=1)(a[None]).sum())(a)
    torch.testing.assert_close(total, 1.5 * a**0.5)


def test_scipy():
    optimize = pytest.importorskip("scipy.optimize")

    def residual(x, w, u):
        return x - torch.tanh(w @ x + u)

    def solve(init, w, u):
        solution = optimize.root(
            lambda x: residual(torch.from_numpy(x), w, u).numpy(), init.numpy(), tol=1e-13
        )
        return torch.from_numpy(solution.x)

    by_scipy = implicit_root(residual, solve, solver=GMRES(**TIGHT), root_tolerance=1e-9)
    ours = implicit_fixed_point(layer, solver=GMRES(**TIGHT))
    for transform in (jacrev, hessian):
        torch.testing.assert_close(
            transform(lambda u: by_scipy(torch.zeros_like(U), W, u))(U),
            transform(lambda u: ours(torch.zeros_like(U), W, u))(U),
        )


def test_minimize_as_the_solver():
    opt = diffopt.sgd()

    def solve(init, *args):
        hparams = opt.hparams(lr=0.03, momentum=0.5)
        return diffopt.minimize(
            ridge_loss, init, *args, optimizer=opt, hparams=hparams, steps=300
        ).params

    ridge = implicit_root(
        grad(ridge_loss), solve, solver=ConjugateGradient(**TIGHT), root_tolerance=1e-9
    )
    init = torch.zeros(4, dtype=torch.float64)
    derivative = jacrev(lambda p: ridge(init, X, Y, p))(LOG_LAMBDA)
    expected = jacrev(lambda p: ridge_solve(None, X, Y, p))(LOG_LAMBDA)
    torch.testing.assert_close(derivative, expected)


def test_the_solver_builds_no_graph():
    seen = []

    def solve(init, a):
        seen.append((torch.is_grad_enabled(), a.requires_grad, type(a)))
        return torch.sqrt(a)

    root = implicit_root(lambda x, a: x**2 - a, solve)
    root(None, A.clone().requires_grad_())
    grad(grad(lambda a: root(None, a)))(A)
    assert seen == [(False, False, torch.Tensor)] * 2


def test_auxiliary_output_has_no_derivative():
    root = implicit_root(
        lambda x, a: x**2 - a,
        lambda init, a: (torch.sqrt(a), {"twice": 2 * a, "name": "sqrt"}),
        has_aux=True,
    )
    a = A.clone().requires_grad_()
    x, aux = root(None, a)
    assert x.requires_grad
    assert not aux["twice"].requires_grad
    assert aux["name"] == "sqrt"
    torch.testing.assert_close(grad(lambda a: root(None, a)[0])(A), number(0.25))
    with pytest.raises(TypeError, match=r"solve must return \(x, aux\)"):
        implicit_root(residual, lambda init, a: a, has_aux=True)(None, A)


def test_the_start_has_no_derivative():
    heron = implicit_fixed_point(lambda x, a: (x + a / x) / 2)
    init = number(1.0).requires_grad_()
    assert not heron(init, A).requires_grad
    x = heron(init, A.clone().requires_grad_())
    assert torch.autograd.grad(x, init, allow_unused=True) == (None,)
    assert grad(lambda init: heron(init, A))(number(1.0)) == 0
    assert jacfwd(lambda init: heron(init, A))(number(1.0)) == 0


def test_only_what_needs_a_gradient_is_differentiated():
    x = X.clone()
    log_lambda = LOG_LAMBDA.clone().requires_grad_()
    ridge = implicit_root(grad(ridge_loss), ridge_solve, solver=ConjugateGradient())
    ridge(None, x, Y, log_lambda).sum().backward()
    assert x.grad is None
    assert log_lambda.grad is not None
    with torch.no_grad():
        assert not ridge(None, x, Y, log_lambda).requires_grad


def test_arguments_may_be_complex_or_integers():
    radius = implicit_root(
        lambda x, c, n: x**2 - n * (c * c.conj()).real,
        lambda init, c, n: n**0.5 * c.abs(),
        solver=GMRES(**TIGHT),
    )
    c = torch.tensor([3.0 + 4.0j, 1.0 - 2.0j], dtype=torch.complex128, requires_grad=True)
    n = torch.tensor([4, 9])
    torch.testing.assert_close(radius(None, c, n)[0].detach(), number(10.0))

    def function(c):
        return radius(None, c, n)

    assert torch.autograd.gradcheck(function, c, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, c)
    batch = vmap(grad(lambda c, n: radius(None, c, n)))(c.detach(), n)
    exact = torch.autograd.grad((n**0.5 * c.abs()).sum(), c)[0]
    torch.testing.assert_close(batch, exact)


def test_float32_stays_float32():
    ridge = implicit_root(grad(ridge_loss), ridge_solve, solver=ConjugateGradient())
    log_lambda = LOG_LAMBDA.float().requires_grad_()
    w = ridge(None, X.float(), Y.float(), log_lambda)
    (derivative,) = torch.autograd.grad(w.sum(), log_lambda)
    assert w.dtype == derivative.dtype == torch.float32
    expected = jacrev(lambda p: ridge_solve(None, X, Y, p).sum())(LOG_LAMBDA)
    torch.testing.assert_close(derivative.double(), expected, rtol=1e-3, atol=1e-4)


# Solutions that are known


def test_a_known_root_and_minimum_get_their_derivatives():
    def known(p):
        w = ridge_solve(None, X, Y, p)
        derivative = ImplicitDerivative(ConjugateGradient(**TIGHT))
        return derivative.attach(grad(ridge_loss), w, X, Y, p, symmetric=True)

    def as_root(p):
        w = ridge_solve(None, X, Y, p)
        return ImplicitDerivative(GMRES(**TIGHT)).attach(grad(ridge_loss), w, X, Y, p)

    exact = lambda p: ridge_solve(None, X, Y, p)  # noqa: E731
    for transform in (jacrev, jacfwd, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacrev(f))):
        torch.testing.assert_close(transform(known)(LOG_LAMBDA), transform(exact)(LOG_LAMBDA))
        torch.testing.assert_close(transform(as_root)(LOG_LAMBDA), transform(exact)(LOG_LAMBDA))
    p = LOG_LAMBDA.clone().requires_grad_()
    assert torch.autograd.gradcheck(known, p)
    assert torch.autograd.gradgradcheck(known, p)


# Reports and refusals


def test_every_linear_solve_is_reported():
    reports = []
    ridge = implicit_root(
        grad(ridge_loss), ridge_solve, solver=ConjugateGradient(**TIGHT), on_solve=reports.append
    )
    log_lambda = LOG_LAMBDA.clone().requires_grad_()
    w = ridge({"unused": 1}, X, Y, log_lambda)
    assert not reports
    (first,) = torch.autograd.grad(w.sum(), log_lambda, create_graph=True)
    (report,) = reports
    assert isinstance(report, LinearSolution)
    assert report.converged
    assert report.residual < 1e-10
    assert not report.value.requires_grad
    torch.autograd.grad(first, log_lambda)
    assert len(reports) == 3


def test_a_linear_solve_that_fails_is_reported():
    ridge = implicit_root(grad(ridge_loss), ridge_solve, solver=ConjugateGradient(max_steps=1))
    with pytest.warns(ConvergenceWarning, match="ConjugateGradient stopped after 1 iterations"):
        grad(lambda p: ridge(None, X, Y, p).sum())(LOG_LAMBDA)
    raising = ConjugateGradient(max_steps=1, on_failure="raise")
    ridge = implicit_root(grad(ridge_loss), ridge_solve, solver=raising)
    with pytest.raises(ConvergenceError, match="ConjugateGradient stopped"):
        grad(lambda p: ridge(None, X, Y, p).sum())(LOG_LAMBDA)


def test_a_singular_jacobian_is_reported():
    """x^2 = a at a = 0: the derivative is infinite."""
    root = implicit_root(lambda x, a: x**2 - a, lambda init, a: torch.sqrt(a))
    with pytest.warns(ConvergenceWarning, match="GMRES stopped"):
        grad(lambda a: root(None, a))(number(0.0))


def test_what_is_no_root_is_reported():
    def rough(init, a):
        return a**1.5 + 1e-3

    implicit_root(residual, rough, root_tolerance=0.1)(None, A)
    with pytest.warns(ConvergenceWarning, match=r"norm of its residual is 0.016, .*=0.01,"):
        implicit_root(residual, rough, root_tolerance=0.01)(None, A)
    raising = implicit_root(residual, rough, root_tolerance=0.01, on_failure="raise")
    with pytest.raises(ConvergenceError, match="x is not a solution"):
        grad(lambda a: raising(None, a))(A)
    with pytest.raises(ConvergenceError, match="x is not a solution"):
        vmap(lambda a: raising(None, a))(A[None])
    with pytest.warns(ConvergenceWarning, match="is not finite"):
        implicit_root(residual, lambda init, a: a * torch.nan)(None, A)


def test_an_iteration_that_does_not_end_is_reported():
    solve = fixed_point_iteration(lambda x: -x, max_steps=5)
    with pytest.warns(ConvergenceWarning, match="max_steps=5"):
        solve(number(1.0))
    diverging = implicit_fixed_point(lambda x, a: 2 * x + a, on_failure="raise")
    with pytest.raises(ConvergenceError):
        diverging(number(1.0), A)


@pytest.mark.parametrize("step", [lambda x: 3 * x, lambda x: 1e300 * x**3, torch.log])
def test_an_iteration_that_leaves_the_numbers_is_reported(step):
    raising = fixed_point_iteration(step, on_failure="raise")
    for call in (raising, lambda x: vmap(raising)(torch.stack([x, 2 * x]))):
        with pytest.raises(ConvergenceError, match="diverged: x is not finite"):
            call(number(0.5))
    with pytest.warns(ConvergenceWarning, match="diverged"):
        fixed_point_iteration(step)(number(0.5))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_an_iteration_ends_where_it_converges_at_any_scale(scale):
    solve = fixed_point_iteration(lambda x, a: (x + a) / 2, on_failure="raise")
    target = torch.tensor([1.0, -2.0]) * scale
    torch.testing.assert_close(solve(torch.zeros(2), target) / scale, target / scale)


@pytest.mark.parametrize("order", ["func", "autograd"])
def test_a_root_within_the_residual_of_another(order):
    """z^2 + z - sqrt(a z) = 1, with the square root as a root."""
    inner = implicit_root(lambda x, a: x**2 - a, lambda init, a: torch.sqrt(a), solver=Direct())

    def solve(init, a):
        z = torch.ones_like(a)
        for _ in range(60):
            z = (torch.sqrt(a * z) + 1) / (z + 1)
        return z

    nested = implicit_root(lambda z, a: z**2 + z - inner(None, a * z) - 1, solve, solver=Direct())
    plain = implicit_root(lambda z, a: z**2 + z - torch.sqrt(a * z) - 1, solve, solver=Direct())

    def twice(f):
        a = A.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(a), a, create_graph=True)
        return torch.autograd.grad(first, a)[0]

    modes = (grad, forward)
    orders = [lambda f, o=o, i=i: o(i(f))(A) for o in modes for i in modes]
    for derivative in orders if order == "func" else [twice]:
        expected = derivative(lambda a: plain(None, a))
        torch.testing.assert_close(derivative(lambda a: nested(None, a)), expected)


def test_auxiliary_numbers_of_samples_are_stacked_and_other_things_refused():
    def make(aux):
        return implicit_root(
            residual, lambda init, a: (a**1.5, aux(a)), has_aux=True, sequential=True
        )

    a = torch.stack([A, 4 * A])
    for batch in (a, torch.stack([a, a])):
        counting = make(lambda a: {"whole": int(a), "part": float(a)})
        stacked = vmap(counting, (None, 0))
        for _ in range(batch.dim() - 1):
            stacked = vmap(stacked, (None, 0))
        aux = stacked(None, batch)[1]
        assert (aux["whole"] == batch.long()).all()
        torch.testing.assert_close(aux["part"], batch.float())
    with pytest.raises(TypeError, match="must return tensors or numbers, or the same object"):
        vmap(lambda a: make(lambda a: object())(None, a)[0])(a)


def test_a_warm_start_may_be_the_last_report_of_a_batch():
    reports, start = [], []
    root = implicit_root(
        lambda x, a: x**3 + 0.1 * x.sum() - a,
        fixed_point,
        solver=GMRES(**TIGHT),
        on_solve=reports.append,
        warm_start=lambda: start[0] if start else None,
    )

    def f(a):
        return root(None, a).sin().sum()

    a = 1 + random(2, 3, 4).abs()
    for transform in (
        lambda a: vmap(grad(f))(a[0]),
        lambda a: grad(lambda a: vmap(f)(a).sum())(a[0]),
        lambda a: vmap(vmap(grad(f)), in_dims=1)(a),
        lambda a: vmap(grad(lambda a: vmap(f)(a).sum()))(a),
    ):
        start.clear()
        cold = transform(a)
        start.append(reports[-1].value)
        torch.testing.assert_close(transform(a), cold)
        assert not reports[-1].iterations.any()
        start[0] = torch.ones(4, dtype=torch.float64)  # one for all samples
        torch.testing.assert_close(transform(a), cold)


def fixed_point(init, a):
    x = a
    for _ in range(200):
        x = (x + (a - 0.1 * x.sum()) / x**2 + x) / 3
    return x


CAPTURED = [
    lambda a, w: torch.autograd.grad(hidden(w.requires_grad_())(None, a), w),
    lambda a, w: hidden(w.requires_grad_())(None, a.clone().requires_grad_()),
    lambda a, w: grad(lambda w: hidden(w)(None, a))(w),
    lambda a, w: grad(lambda w: hidden(w)(None, a * w))(w),
    lambda a, w: grad(grad(lambda w: hidden(w)(None, a * w)))(w),
    lambda a, w: grad(lambda v: grad(lambda w: hidden(v)(None, w))(a))(w),
    lambda a, w: jacfwd(lambda w: hidden(w)(None, a * w))(w),
    lambda a, w: vmap(lambda w: hidden(w)(None, a * w))(w[None]),
    lambda a, w: vmap(grad(lambda w: hidden(w)(None, a * w)))(w[None]),
    lambda a, w: vmap(lambda w: grad(lambda a: hidden(w)(None, a))(a))(w[None]),
    lambda a, w: grad(lambda w: vmap(lambda a: hidden(w)(None, a))(a[None]).sum())(w),
]


def hidden(w):
    return implicit_root(lambda x, a: x**2 - a * w, lambda init, a: torch.sqrt(a))


@pytest.mark.parametrize("call", CAPTURED)
def test_a_residual_that_hides_what_needs_a_gradient_is_refused(call):
    with pytest.raises(ValueError, match=r"residual closes over a tensor .* pass it as an arg"):
        call(A.clone(), number(2.0))


def test_a_residual_may_hide_constants():
    def function(a):
        return hidden(torch.full((), 4.0, dtype=torch.float64))(None, a)

    def solved(a):
        return 2 * a**0.5

    def hidden(w):
        return implicit_root(lambda x, a: x**2 - a * w, lambda init, a: (a * w) ** 0.5)

    twice, batch = lambda f: grad(grad(f)), lambda f: grad(lambda a: vmap(f)(a[None]).sum())
    for transform in (grad, forward, twice, batch):
        torch.testing.assert_close(transform(function)(A), transform(solved)(A))
    torch.testing.assert_close(vmap(grad(function))(A[None]), vmap(grad(solved))(A[None]))
    with pytest.raises(RuntimeError) as error:
        hessian(function)(A)
    assert "pass it as an argument" in error.value.__notes__[0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: implicit_root(residual, by_numpy, on_failure="x"), ValueError, "on_failure is"),
        (
            lambda: implicit_root(residual, by_numpy, root_tolerance=-1),
            ValueError,
            "root_tolerance",
        ),
        (lambda: implicit_root(residual, lambda i, a: 1.0)(None, A), TypeError, "x is 1.0 of type"),
        (
            lambda: implicit_root(residual, lambda i, a: torch.tensor(1))(None, A),
            TypeError,
            "x has dtype torch.int64, but must be real floating-point",
        ),
        (
            lambda: implicit_root(lambda x, a: (x, a), lambda i, a: a)(None, A),
            ValueError,
            "the output of residual has type tuple",
        ),
        (
            lambda: implicit_root(lambda x, a: x[:1], lambda i, a: a)(None, U),
            ValueError,
            r"output of residual is a tensor of shape \(1,\), but must be .*\(5,\)",
        ),
        (
            lambda: implicit_fixed_point(lambda x, a: x[:1], lambda i, a: a)(None, U),
            ValueError,
            r"output of step is a tensor of shape \(1,\)",
        ),
        (lambda: implicit_root(residual, by_numpy, solver=GMRES), TypeError, "solver is"),
        (lambda: implicit_root(3, by_numpy), TypeError, "residual is 3 .*, not a function"),
        (lambda: implicit_root(residual, 3), TypeError, "solve is 3 .*, not a function"),
        (lambda: implicit_fixed_point(3), TypeError, "step is 3 .*, not a function"),
        (lambda: fixed_point_iteration(3), TypeError, "step is 3 .*, not a function"),
        (lambda: implicit_root(residual, by_numpy, warm_start=A), TypeError, "warm_start is a"),
        (lambda: fixed_point_iteration(layer, max_steps=0), ValueError, "max_steps is 0"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_torch_compile_is_refused_clearly():
    compiled = torch.compile(scalar, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"cannot be traced by torch.compile"):
        compiled(A)
    torch.compiler.reset()
