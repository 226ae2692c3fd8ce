"""OneStep: closed forms, what it lacks, and that nothing wrong comes without an error."""

import pytest
import torch
from torch.autograd import forward_ad

import diffopt
from diffopt.adjoint import OneStep, Truncated, Unrolled, unroll

CURVATURE = torch.tensor([[0.5, 0.2, 0.0], [0.2, 1.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
START = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
TARGET = torch.tensor([0.3, 0.1, -0.4], dtype=torch.float64)
RATE = torch.tensor(0.3, dtype=torch.float64)


def quadratic(w, target):
    return 0.5 * (w - target) @ CURVATURE @ (w - target)


def quartic(w, target):
    return quadratic(w, target) + 0.1 * ((w - target) ** 4).sum()


def run(w, target=TARGET, lr=RATE, *, loss=quadratic, adjoint=OneStep(), **arguments):  # noqa: B008
    opt = diffopt.sgd(momentum=False)
    arguments = {"steps": 7, **arguments}
    return diffopt.minimize(
        loss, w, target, optimizer=opt, hparams=opt.hparams(lr=lr), adjoint=adjoint, **arguments
    )


def newton(x, a, _):
    """Of x^2 = a."""
    return x - (x**2 - a) / (2 * x), None


def leaves(*tensors):
    return [x.clone().requires_grad_() for x in tensors]


def test_gradient_descent_on_a_quadratic_has_the_closed_form():
    target, lr = leaves(TARGET, RATE)
    before = run(START, steps=6, adjoint=None).params
    sol = run(START, target, lr)
    by_target = torch.autograd.functional.jacobian(lambda t: run(START, t).params, TARGET)
    torch.testing.assert_close(by_target, RATE * CURVATURE)
    (by_lr,) = torch.autograd.grad(sol.params[2], lr)
    torch.testing.assert_close(by_lr, -(CURVATURE @ (before - TARGET))[2])
    torch.testing.assert_close(sol.params, run(START, adjoint=None).params)


def test_the_error_is_at_most_the_contraction_rate():
    for lr in (0.05, 0.2, 0.3):
        rate = torch.tensor(lr, dtype=torch.float64)
        rho = torch.linalg.matrix_norm(torch.eye(3) - rate * CURVATURE, 2)
        one = torch.func.jacrev(lambda t, rate=rate: run(START, t, rate).params)(TARGET)
        error = torch.linalg.matrix_norm(one - torch.eye(3), 2)  # the minimizer is the target
        assert error <= rho + 1e-12


def test_newton_steps_have_the_exact_derivative():
    a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x, _ = unroll(newton, torch.tensor(1.5, dtype=torch.float64), a, 6, adjoint=OneStep())
    (grad,) = torch.autograd.grad(x, a)
    torch.testing.assert_close(grad, 0.5 / torch.tensor(2.0, dtype=torch.float64).sqrt())


def test_it_is_truncated_to_one_step():
    def grads(adjoint):
        inputs = leaves(TARGET, RATE)
        sol = run(START, *inputs, loss=quartic, adjoint=adjoint)
        return torch.autograd.grad(sol.params.sin().sum() + sol.losses.sum(), inputs)

    torch.testing.assert_close(grads(OneStep()), grads(Truncated(1)))


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_initial_params_state_and_buffers_receive_none(steps):
    opt = diffopt.adam()
    w, exp_avg, buffers, lr = leaves(START, TARGET, START, RATE)
    state = opt.init(w)._replace(exp_avg=exp_avg)
    sol = diffopt.minimize(
        lambda w, b: (quadratic(w, TARGET) + b.sum(), 2 * b),
        w, optimizer=opt, hparams=opt.hparams(lr=lr), steps=steps, state=state, buffers=buffers,
        adjoint=OneStep(),
    )  # fmt: skip
    everything = sum(x.sum() for x in (*sol.params, *sol.state.exp_avg, sol.buffers, sol.losses))
    if steps == 0:
        torch.testing.assert_close(sol.params, START)
        assert not everything.requires_grad
        return
    inputs = (w, exp_avg, buffers, lr)
    grads = torch.autograd.grad(everything, inputs, allow_unused=True)
    assert grads[:3] == (None, None, None)
    assert grads[3].count_nonzero() == 1


def test_batches_and_own_hyperparameters_receive_those_of_the_last_step():
    opt = diffopt.sgd(momentum=False)
    batches = torch.stack([TARGET, 2 * TARGET, -TARGET]).requires_grad_()
    rates = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    sol = diffopt.minimize(
        quadratic, START, batches=batches, optimizer=opt,
        hparams=lambda t: opt.hparams(lr=rates[t]), adjoint=OneStep(),
    )  # fmt: skip
    by_batches, by_rates = torch.autograd.grad(sol.params[2], (batches, rates))
    assert by_batches[:2].count_nonzero() == 0
    torch.testing.assert_close(by_batches[2], 0.3 * CURVATURE[2])
    assert by_rates[:2].count_nonzero() == 0
    assert by_rates[2] != 0


@pytest.mark.parametrize("tol", [1e-8, 1e-1])
def test_a_loop_that_tol_ends_has_the_derivative_of_the_last_step_taken(tol):
    sol = run(START, loss=quartic, steps=500, tol=tol)
    assert sol.steps < 500
    one_more = run(sol.params, loss=quartic, steps=1, adjoint=None)
    torch.testing.assert_close(one_more.params, sol.params, atol=tol, rtol=0)
    torch.testing.assert_close(
        sol.params, run(START, loss=quartic, steps=500, tol=tol, adjoint=None).params
    )

    def solve(target, lr, **arguments):
        return run(START, target, lr, loss=quartic, steps=500, tol=tol, **arguments).params

    before = run(START, loss=quartic, steps=int(sol.steps) - 1, adjoint=None).params

    def step(target, lr):
        return run(before, target, lr, loss=quartic, steps=1, adjoint=Unrolled()).params

    by_both = torch.func.jacrev(step, (0, 1))(TARGET, RATE)
    torch.testing.assert_close(torch.func.jacrev(solve, (0, 1))(TARGET, RATE), by_both)
    torch.testing.assert_close(torch.func.jacfwd(solve, (0, 1))(TARGET, RATE), by_both)


def test_tol_under_vmap_ends_each_example_by_itself():
    """An example that stops before others has the derivative of a step from its solution."""
    targets = torch.stack([TARGET, START + 1e-3, -TARGET])

    def solve(target):
        return run(START, target, loss=quartic, steps=500, tol=1e-3).params

    def step(start, target):
        return run(start, target, loss=quartic, steps=1, adjoint=Unrolled()).params

    solutions = torch.stack([solve(target) for target in targets])
    last = torch.stack([torch.func.jacrev(solve)(target) for target in targets])
    further = torch.vmap(torch.func.jacrev(step, argnums=1))(solutions, targets)
    steps = [run(START, target, loss=quartic, steps=500, tol=1e-3).steps for target in targets]
    longest = torch.stack(steps) == max(steps)
    expected = torch.where(longest[:, None, None], last, further)
    torch.testing.assert_close(torch.vmap(torch.func.jacrev(solve))(targets), expected)


def test_tol_repeats_random_numbers():
    """The step that is run again for its derivative sees what it saw, and uses up no more."""

    def noisy(w, target):
        return quadratic(w, target) + (torch.randn(3, dtype=torch.float64) * w * target).sum()

    def solve(adjoint, target):
        torch.manual_seed(0)
        sol = run(START, target, loss=noisy, steps=5, tol=0.0, adjoint=adjoint)
        return sol.params.sum(), torch.rand(())

    (target,) = leaves(TARGET)
    values, exact = solve(OneStep(), target), solve(Truncated(1), target)
    torch.testing.assert_close(values, exact)
    torch.testing.assert_close(*(torch.autograd.grad(v[0], target) for v in (values, exact)))


def outer(target, lr):
    return run(START, target, lr, loss=quartic).params.sin().sum()


def test_all_transforms_agree():
    inputs = leaves(TARGET, RATE)
    expected = torch.autograd.grad(outer(*inputs), inputs)
    torch.testing.assert_close(torch.func.grad(outer, (0, 1))(TARGET, RATE), expected)
    torch.testing.assert_close(torch.func.jacfwd(outer, (0, 1))(TARGET, RATE), expected)
    stacked = [torch.stack([x, x]) for x in (TARGET, RATE)]
    twice = tuple(torch.stack([g, g]) for g in expected)
    torch.testing.assert_close(torch.vmap(torch.func.grad(outer, (0, 1)))(*stacked), twice)
    total = torch.func.grad(lambda *v: torch.vmap(outer)(*v).sum(), (0, 1))(*stacked)
    torch.testing.assert_close(total, twice)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(RATE, torch.ones_like(RATE))
        tangent = forward_ad.unpack_dual(outer(TARGET, dual)).tangent
    torch.testing.assert_close(tangent, expected[1])


SECOND = {
    "jacrev jacrev": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "jacfwd jacrev": lambda f: torch.func.jacfwd(torch.func.jacrev(f)),
    "jacrev jacfwd": lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
    "jacfwd jacfwd": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
    "vmap grad grad": lambda f: (
        lambda x: torch.vmap(torch.func.grad(lambda x: torch.func.grad(f)(x).sum()))(x[None])
    ),
    "autograd": lambda f: lambda x: torch.autograd.functional.hessian(f, x),
}


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_raise(name):
    with pytest.raises(NotImplementedError, match="OneStep has no second derivative"):
        SECOND[name](lambda target: outer(target, RATE))(TARGET)


def test_second_derivatives_by_another_input_raise():
    with pytest.raises(NotImplementedError, match="OneStep has no second derivative"):
        torch.func.grad(lambda lr: torch.func.grad(outer)(TARGET, lr).sum())(RATE)


def test_a_product_can_be_differentiated_by_its_vector():
    (target,) = leaves(TARGET)
    vector = torch.ones(3, dtype=torch.float64, requires_grad=True)
    params = run(START, target).params
    (product,) = torch.autograd.grad(params, target, vector, create_graph=True)
    (by_vector,) = torch.autograd.grad(product[0], vector)
    torch.testing.assert_close(by_vector, (RATE * CURVATURE)[0])


def test_the_second_derivative_that_raises_would_be_wrong():
    """Of Newton's method, whose first is exact: that of sqrt(2), -1/4 2^(-3/2)."""

    def root(a, adjoint):
        return unroll(newton, torch.tensor(1.5, dtype=torch.float64), a, 6, adjoint=adjoint)[0]

    a = torch.tensor(2.0, dtype=torch.float64)
    second = torch.func.hessian(lambda a: root(a, Truncated(1)))(a)
    exact = torch.func.hessian(lambda a: root(a, Unrolled()))(a)
    torch.testing.assert_close(exact, -(2.0**-3.5) * torch.ones_like(a))
    assert (second - exact).abs() > 0.9 * exact.abs()


def test_without_a_graph():
    (target,) = leaves(TARGET)
    with torch.no_grad():
        assert not run(START, target).params.requires_grad


def test_aux_of_any_type():
    opt = diffopt.sgd(momentum=False)
    (target,) = leaves(TARGET)
    sol = diffopt.minimize(
        lambda w, t: (quadratic(w, t), {"name": "step", "count": torch.tensor(3), "value": t}),
        START, target, optimizer=opt, hparams=opt.hparams(lr=0.1), steps=2, has_aux=True,
        adjoint=OneStep(),
    )  # fmt: skip
    assert sol.aux[1]["name"] == "step"
    assert sol.aux[1]["count"] == 3
    assert not sol.aux[0]["value"].requires_grad
    assert sol.aux[1]["value"].requires_grad


def test_a_tensor_the_loss_closes_over_receives_a_gradient():
    opt = diffopt.sgd(momentum=False)
    (target,) = leaves(TARGET)
    sol = diffopt.minimize(
        lambda w: quadratic(w, target),
        START, optimizer=opt, hparams=opt.hparams(lr=RATE), steps=7, adjoint=OneStep(),
    )  # fmt: skip
    (grad,) = torch.autograd.grad(sol.params[0], target)
    torch.testing.assert_close(grad, (RATE * CURVATURE)[0])
