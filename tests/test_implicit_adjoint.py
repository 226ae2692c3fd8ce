"""minimize(adjoint=Implicit()): what is right, and what is refused."""

import warnings

import pytest
import torch

import diffopt
from diffopt.adjoint import Implicit, Unrolled, unroll
from diffopt.linear import ConjugateGradient, ConvergenceError, ConvergenceWarning, Direct

OPT = diffopt.sgd()
TARGET = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def loss(w, target, decay):
    """Its Hessian depends on w."""
    return ((w - target) ** 2).sum() + 0.1 * (w**4).sum() + 0.5 * decay * (w**2).sum()


def solve(target, decay, adjoint=Implicit(), start=None, steps=120, opt=OPT, **numbers):  # noqa: B008
    start = torch.zeros_like(target) if start is None else start
    hparams = opt.hparams(**{"lr": 0.15, **numbers})
    return diffopt.minimize(
        loss, start, target, decay, optimizer=opt, hparams=hparams, steps=steps, adjoint=adjoint
    )


def inputs():
    return TARGET.clone().requires_grad_(), torch.tensor(0.3, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("solver", [ConjugateGradient(rtol=1e-14), Direct()], ids=str)
def test_first_and_second_derivatives_are_those_of_the_unrolled_loop(solver):
    def derivatives(adjoint):
        leaves = inputs()
        grads = torch.autograd.grad(
            solve(*leaves, adjoint).params.sin().sum(), leaves, create_graph=True
        )
        return grads, torch.autograd.grad(sum(g.cos().sum() for g in grads), leaves)

    implicit, unrolled = derivatives(Implicit(solver)), derivatives(Unrolled())
    torch.testing.assert_close(implicit, unrolled, rtol=1e-9, atol=1e-12)


def test_a_loss_that_closes_over_a_tensor_that_needs_a_gradient_is_refused_by_name():
    target, decay = inputs()
    hparams = OPT.hparams(lr=0.15)
    with pytest.raises(ValueError, match=r"^loss closes over a tensor .* pass it as an argument"):
        diffopt.minimize(
            lambda w: loss(w, target.detach(), decay),
            torch.zeros_like(target),
            optimizer=OPT,
            hparams=hparams,
            steps=120,
            adjoint=Implicit(),
        )


def minimum(weight, scale):
    return diffopt.minimize(
        lambda w, a: (weight() * (w - a) ** 2).sum(), torch.zeros(3), scale,
        optimizer=OPT, hparams=OPT.hparams(lr=0.1), steps=2, adjoint=Implicit(on_failure="raise"),
    ).params  # fmt: skip


RANDOM = {
    "loss": minimum,
    "residual": lambda weight, a: diffopt.implicit_root(
        lambda x, a: weight() * (x - a), lambda x, a: a
    )(torch.zeros(3), a),
    "operator": lambda weight, a: ConjugateGradient().solve(lambda v: weight() * v, a).value,
}


@pytest.mark.parametrize("what", RANDOM)
@pytest.mark.parametrize(
    "transform", [lambda f: f, lambda f: torch.func.grad(lambda a: f(a).sum())]
)
def test_random_numbers_that_differ_between_samples_are_told_from_captured_tensors(what, transform):
    def solved(weight):
        function = transform(lambda a: RANDOM[what](weight, a))
        return torch.vmap(function, randomness="different")(torch.rand(2, 3) + 1)

    with pytest.raises(ValueError, match=f"^{what} draws random numbers, which differ between"):
        solved(lambda: 1 + torch.rand(()))
    captured = torch.ones((), requires_grad=True)
    for weight in (lambda: captured, lambda: captured * torch.rand(())):
        with pytest.raises(ValueError, match=f"^{what} closes over a tensor"):
            solved(weight)
    with pytest.raises(ValueError, match=f"^{what} closes over a tensor"):
        torch.vmap(
            lambda a, b: transform(lambda a: RANDOM[what](lambda: b, a))(a), randomness="different"
        )(torch.ones(2, 3), torch.ones(2))


def test_it_works_under_transforms_in_any_nesting():
    def outer(adjoint):
        return lambda target, decay: solve(target, decay, adjoint).params.sin().sum()

    decays = torch.tensor([0.1, 0.3], dtype=torch.float64)
    implicit, unrolled = outer(Implicit(ConjugateGradient(rtol=1e-14))), outer(Unrolled())
    for transform in (
        lambda f: torch.func.grad(f, (0, 1))(TARGET, decays[0]),
        lambda f: torch.func.hessian(f, (0, 1))(TARGET, decays[0]),
        lambda f: torch.func.jacfwd(f, (0, 1))(TARGET, decays[0]),
        lambda f: torch.vmap(torch.func.grad(f, (0, 1)), (None, 0))(TARGET, decays),
        lambda f: torch.func.grad(lambda t: torch.vmap(f, (None, 0))(t, decays).sum())(TARGET),
    ):
        torch.testing.assert_close(transform(implicit), transform(unrolled), rtol=1e-8, atol=1e-10)


def test_batches_stand_for_their_mean():
    x = torch.randn(4, 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def ridge(w, decay, x, y):
        return 0.5 * ((x @ w - y) ** 2).mean() + 0.5 * decay * (w**2).sum()

    decay = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x_all, y_all = x.reshape(-1, 3), y.reshape(-1)
    system = x_all.T @ x_all / 32 + decay.detach() * torch.eye(3, dtype=torch.float64)
    solution = torch.linalg.solve(system, x_all.T @ y_all / 32)
    sol = diffopt.minimize(
        ridge, solution, decay, optimizer=OPT, hparams=OPT.hparams(lr=1e-9),
        batches=list(zip(x, y, strict=True)) * 3, adjoint=Implicit(),
    )  # fmt: skip
    (grad,) = torch.autograd.grad(sol.params.sum(), decay)
    expected = -torch.linalg.solve(system, solution).sum()
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0)


def test_what_the_minimum_does_not_depend_on_gets_zeros():
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    sol = solve(*inputs(), start=start, lr=lr)
    for grad in torch.autograd.grad(sol.params.sum(), (lr, start)):
        assert not grad.any()


def test_losses_and_state_have_no_derivative():
    sol = solve(*inputs(), opt=diffopt.adam(), steps=600)
    for value in (sol.losses[-1], sol.state.exp_avg.sum()):
        with pytest.raises(NotImplementedError, match=r"derivatives of sol\.params, not of losses"):
            value.backward()
    _, tangent = torch.func.jvp(
        lambda d: solve(TARGET, d).losses[0], (torch.tensor(0.3),), (torch.tensor(1.0),)
    )
    assert tangent.isnan()


@pytest.mark.parametrize(
    ("opt", "numbers"),
    [
        (diffopt.sgd(), {"weight_decay": 0.1}),
        (diffopt.sgd(), {"weight_decay": torch.tensor(0.0, requires_grad=True)}),
        (diffopt.adamw(), {}),
    ],
)
def test_an_optimizer_that_decays_is_refused_each_time_and_no_other_is(opt, numbers):
    for _ in range(2):
        still = Implicit(root_tolerance=torch.inf)
        solve(*inputs(), still, opt=opt, steps=1, weight_decay=0.0)
        with pytest.raises(ValueError, match="put the decay into the loss"):
            solve(*inputs(), opt=opt, **numbers)


def test_an_optimizer_that_decays_is_refused_where_the_params_are_zero():
    with pytest.raises(ValueError, match="put the decay into the loss"):
        solve(torch.zeros_like(TARGET).requires_grad_(), inputs()[1], weight_decay=0.1)


def test_a_diverged_loop_is_no_minimum():
    with pytest.warns(ConvergenceWarning, match="x is not a solution: it is not finite"):
        solve(*inputs(), lr=10.0)


@pytest.mark.parametrize("power", [0.5, 0.9], ids=["nan", "infinite"])
def test_an_end_where_the_gradient_is_not_finite_is_no_minimum(power):
    def loss(w, scale):
        return (w**2 + 0.0 * scale).sum() + (w - 0.5).pow(power).sum()

    scale = torch.tensor(1.0, requires_grad=True)
    start = torch.full((2,), 1.0)
    (slope,) = torch.autograd.grad(loss(x := start.clone().requires_grad_(), scale), x)
    lr = (0.6 if power == 0.5 else 0.5) / slope[0].item()
    with pytest.warns(ConvergenceWarning, match="x is not a solution: its distance"):
        diffopt.minimize(
            loss, start, scale, optimizer=OPT, hparams=OPT.hparams(lr=lr), steps=1,
            adjoint=Implicit(),
        )  # fmt: skip


@pytest.mark.parametrize("solver", [ConjugateGradient(), Direct()], ids=str)
def test_an_outer_gradient_that_is_not_finite_stays_so(solver):
    leaves = inputs()
    params = solve(*leaves, Implicit(solver)).params
    for outer in (torch.sqrt((params - params).sum()), (1000 * params).exp().sum()):
        with pytest.warns(ConvergenceWarning, match="b is not finite"):
            grads = torch.autograd.grad(outer, leaves, retain_graph=True)
        assert all(grad.isnan().all() for grad in grads)


def test_a_loop_that_tol_ends_before_its_first_step_has_the_derivative_of_its_end():
    target, decay = inputs()
    end = solve(target, decay, steps=300).params.detach().requires_grad_()
    arguments = {"optimizer": OPT, "hparams": OPT.hparams(lr=0.1), "steps": 9, "tol": 1e-6}
    sol = diffopt.minimize(loss, end, target, decay, adjoint=Implicit(), **arguments)
    assert sol.steps == 0
    expected = torch.autograd.grad(solve(target, decay, steps=300).params.sum(), (target, decay))
    *grads, start = torch.autograd.grad(sol.params.sum(), (target, decay, end))
    torch.testing.assert_close(tuple(grads), expected)
    assert not start.any()
    sol = diffopt.minimize(loss, end, target, batches=[decay] * 9, adjoint=Implicit(), **arguments)
    torch.testing.assert_close(torch.autograd.grad(sol.params.sum(), decay), expected[1:])


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ({"solver": 3}, TypeError),
        ({"solver": ConjugateGradient}, TypeError),
        ({"root_tolerance": float("nan")}, ValueError),
        ({"root_tolerance": -1}, ValueError),
        ({"root_tolerance": "a"}, ValueError),
        ({"on_failure": "ignore"}, ValueError),
        ({"on_solve": 3}, TypeError),
        ({"warm_start": TARGET}, TypeError),
    ],
)
def test_wrong_arguments_are_refused_at_once(argument, error):
    with pytest.raises(error, match=next(iter(argument)) + " is "):
        Implicit(**argument)


def test_an_end_that_is_no_minimum_warns_or_raises():
    with pytest.warns(ConvergenceWarning, match=r"above root_tolerance=0\.001"):
        solve(*inputs(), steps=3)
    with pytest.raises(ConvergenceError, match="x is not a solution"):
        solve(*inputs(), Implicit(on_failure="raise"), steps=3)


def test_linear_solves_are_reported():
    reports = []
    leaves = inputs()
    torch.autograd.grad(solve(*leaves, Implicit(on_solve=reports.append)).params.sum(), leaves)
    (report,) = reports
    assert bool(report.converged)
    assert 0 < int(report.iterations) <= 3


def test_forward_mode_without_a_graph():
    target, decay = (x.detach() for x in inputs())

    def end(decay):
        return solve(target, decay).params

    with torch.no_grad():
        tangent = torch.func.jvp(end, (decay,), (torch.ones_like(decay),))[1]
        difference = (end(decay + 1e-5) - end(decay - 1e-5)) / 2e-5
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-9)


def test_a_backward_solve_starts_where_warm_start_says():
    reports = []
    leaves = inputs()

    def derivatives(warm_start=None):
        adjoint = Implicit(on_solve=reports.append, warm_start=warm_start)
        value = solve(*leaves, adjoint).params.sum()
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        return *grads, *torch.autograd.grad(grads[0].sum(), leaves, allow_unused=True)

    cold = derivatives()
    first = reports[0]
    assert first.iterations > 0
    reports.clear()
    torch.testing.assert_close(derivatives(lambda: first.value), cold)
    assert reports[0].iterations == 0
    torch.testing.assert_close(derivatives(lambda: None), cold, rtol=0, atol=0)
    with pytest.raises(ValueError, match="the output of warm_start is a tensor of shape"):
        derivatives(lambda: torch.ones(1))


def test_closed_over_tensors_and_other_steps_are_refused():
    target, decay = inputs()
    with pytest.raises(ValueError, match="pass it as"):
        diffopt.minimize(
            lambda w: loss(w, target, decay), torch.zeros_like(TARGET), optimizer=OPT,
            hparams=OPT.hparams(lr=0.1), steps=300, adjoint=Implicit(),
        )  # fmt: skip
    with pytest.raises(TypeError, match="use implicit_fixed_point"):
        unroll(lambda c, a, x: (c, ()), TARGET, (), 3, adjoint=Implicit())


def test_without_gradients_nothing_is_checked_or_solved():
    with torch.no_grad():
        sol = solve(*inputs(), steps=3)
    assert not sol.params.requires_grad


def test_a_start_within_the_tolerance_has_the_derivative_of_the_solution():
    opt = diffopt.sgd()
    start = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    decay = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    sol = diffopt.minimize(
        lambda w, decay: 0.5 * (w - 3) ** 2 + 0.5 * decay * w**2, start, decay, optimizer=opt,
        hparams=opt.hparams(lr=0.5), steps=100, tol=1e-5, adjoint=Implicit(),
    )  # fmt: skip
    assert sol.steps == 0
    assert len(sol.losses) == 0
    by_start, by_decay = torch.autograd.grad(sol.params, (start, decay))
    assert by_start == 0
    torch.testing.assert_close(by_decay, -4 / 3 * torch.ones_like(by_decay))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("far", [False, True])
def test_root_tolerance_is_a_distance_whatever_the_scale_of_the_loss(scale, far):
    start = torch.tensor([1.0, 2.0 if far else 1 + 1e-5], dtype=torch.float64)
    decay = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def loss(w, decay):  # eigenvalues 1 and 3e-5, times the scale
        return scale * (0.5 * (w[0] - decay).square() + 1.5e-5 * (w[1] - decay).square())

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        diffopt.minimize(
            loss, start, decay, optimizer=diffopt.sgd(), hparams=diffopt.sgd().hparams(lr=0.0),
            steps=1, adjoint=Implicit(),
        )  # fmt: skip
    assert [w.category for w in caught] == [ConvergenceWarning] * far


def test_flat_or_negative_curvature_is_not_taken_for_a_minimum():
    opt = diffopt.sgd()
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    for loss in (lambda w, s: 1e-4 * s * w, lambda w, s: -1e-4 * s * (w - 2).square()):
        with pytest.warns(ConvergenceWarning, match="x is not a solution"):
            diffopt.minimize(
                loss, torch.ones((), dtype=torch.float64), scale, optimizer=opt,
                hparams=opt.hparams(lr=0.0), steps=1, adjoint=Implicit(),
            )  # fmt: skip


def test_complex_parameters():
    opt = diffopt.sgd()
    target = torch.tensor([1.0 + 2j, -0.5j], dtype=torch.complex128, requires_grad=True)

    def size(z):  # torch has no second derivative of z.abs().square() at 0
        return (z * z.conj()).real.sum()

    def end(target):
        sol = diffopt.minimize(
            lambda p, target: size(p["z"] - target**2) + (p["x"] - 1).square(),
            {"x": torch.zeros((), dtype=torch.float64), "z": torch.zeros_like(target)},
            target, optimizer=opt, hparams=opt.hparams(lr=0.5),
            steps=2,
            adjoint=Implicit(on_failure="raise"),
        )  # fmt: skip
        return sol.params["z"]

    torch.testing.assert_close(end(target), target**2)
    assert torch.autograd.gradcheck(end, target)
    assert torch.autograd.gradgradcheck(end, target)


class _Square(torch.autograd.Function):
    """As torch.func refuses it: without `setup_context`."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_a_derivative_outside_transforms_takes_autograd_alone():
    def gradients(square):
        leaves = inputs()
        sol = diffopt.minimize(
            lambda w, target, decay: square(w - target).sum() + (decay * square(w)).sum(),
            torch.zeros_like(TARGET), *leaves, optimizer=OPT, hparams=OPT.hparams(lr=0.1),
            steps=500, tol=1e-12, adjoint=Implicit(ConjugateGradient(rtol=1e-14)),
        )  # fmt: skip
        return torch.autograd.grad(sol.params.sin().sum(), leaves)

    torch.testing.assert_close(gradients(_Square.apply), gradients(torch.square))


def test_the_first_backward_pass_does_not_run_the_loss_again():
    runs = []

    def counted(w, target, decay):
        runs.append(0)
        return loss(w, target, decay)

    leaves = inputs()
    sol = diffopt.minimize(
        counted, torch.zeros_like(TARGET), *leaves, optimizer=OPT, hparams=OPT.hparams(lr=0.1),
        steps=500, tol=1e-12, adjoint=Implicit(ConjugateGradient(rtol=1e-14)),
    )  # fmt: skip
    value, taken = sol.params.sin().sum(), len(runs)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    assert len(runs) == taken
    torch.testing.assert_close(torch.autograd.grad(value, leaves), first)
    assert len(runs) > taken  # the first pass has freed the graph


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_only_among_several_params_does_a_run_of_the_loss_look_for_unused_ones(several):
    runs, zero = [], torch.tensor(0.0)

    def counted(params, target):
        runs.append(0)
        return ((params[0] if several else params) - target) ** 2

    diffopt.minimize(
        counted, [zero, zero.clone()] if several else zero, torch.tensor(2.0, requires_grad=True),
        optimizer=OPT, hparams=OPT.hparams(lr=0.5), steps=3, adjoint=Implicit(),
    )  # fmt: skip
    assert len(runs) == 3 + 1 + several


@pytest.mark.parametrize("compile", [False, {"backend": "eager"}], ids=["eager", "compiled"])
@pytest.mark.parametrize("transform", [lambda f: f, torch.func.grad], ids=["autograd", "func"])
def test_a_loss_that_uses_no_params_is_refused(transform, compile):
    def solution(target):
        return diffopt.minimize(
            lambda w, target: target**2, torch.tensor(0.0), target, optimizer=OPT,
            hparams=OPT.hparams(lr=0.1), steps=2, adjoint=Implicit(), compile=compile,
        ).params  # fmt: skip

    with pytest.raises(ValueError, match="loss does not depend on params"):
        transform(solution)(torch.tensor(1.0, requires_grad=True))


def test_many_backward_passes_at_once_are_those_one_by_one():
    leaves = inputs()
    params = solve(*leaves, Implicit(ConjugateGradient(rtol=1e-14))).params.flatten()
    rows = torch.eye(params.numel(), dtype=params.dtype)

    def pull(row):
        return torch.autograd.grad(params, leaves, row, retain_graph=True)

    found, expected = torch.vmap(pull)(rows), map(pull, rows)
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*expected, strict=True))))


@pytest.mark.parametrize("change", ["in place", "through .data"])
def test_what_the_loss_captures_must_stay_the_same_until_the_first_backward_pass(change):
    decay, scale = torch.ones((), requires_grad=True), torch.tensor([1.0, 2.0])
    opt = diffopt.sgd()
    sol = diffopt.minimize(
        lambda w, decay: (scale * (w - 1) ** 2).sum() + decay * (w**2).sum(),
        torch.zeros(2), decay, optimizer=opt, hparams=opt.hparams(lr=0.2), steps=200, tol=1e-6,
        adjoint=Implicit(),
    )  # fmt: skip
    if change == "in place":
        scale.mul_(2)
    else:
        scale.data = 2 * scale
    with pytest.raises(RuntimeError, match="modified"):
        torch.autograd.grad(sol.params.sum(), decay)
