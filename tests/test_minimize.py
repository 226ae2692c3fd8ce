"""minimize() against closed forms, finite differences and itself run in other ways."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import diffopt
from diffopt.adjoint import Checkpointed, FirstOrder, ForwardMode, Truncated, Unrolled

CURVATURE = torch.diag(torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64))
CURVATURE[0, 1] = CURVATURE[1, 0] = 0.2
START = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
TARGET = torch.tensor([0.3, 0.1, -0.4], dtype=torch.float64)


def quadratic(w: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (w - target) @ CURVATURE @ (w - target)


def quartic(w: Tensor, target: Tensor) -> Tensor:
    """Its Hessian depends on w, so that second derivatives of the loop are no accident."""
    return quadratic(w, target) + 0.1 * ((w - target) ** 4).sum()


def run(w, target=TARGET, *, opt=None, steps=4, loss=quartic, adjoint=Unrolled(), **numbers):  # noqa: B008
    opt = diffopt.sgd() if opt is None else opt
    hparams = opt.hparams(**numbers)
    return diffopt.minimize(
        loss, w, target, optimizer=opt, hparams=hparams, steps=steps, adjoint=adjoint
    )


# Closed forms


def test_gradient_descent_on_a_quadratic():
    step = torch.eye(3) - 0.1 * CURVATURE

    def solve(w):
        return run(w, loss=quadratic, steps=7, lr=0.1).params

    power = torch.linalg.matrix_power(step, 7)
    torch.testing.assert_close(solve(START) - TARGET, power @ (START - TARGET))
    torch.testing.assert_close(torch.func.jacrev(solve)(START), power)
    torch.testing.assert_close(torch.func.jacfwd(solve)(START), power)
    torch.testing.assert_close(torch.autograd.functional.jacobian(solve, START), power)


def test_derivative_to_the_learning_rate_on_a_quadratic():
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    solution = run(START, loss=quadratic, steps=5, lr=lr)
    (first,) = torch.autograd.grad(solution.params[2], lr, create_graph=True)
    (second,) = torch.autograd.grad(first, lr)
    step, error = torch.eye(3) - lr.detach() * CURVATURE, START - TARGET
    powers = [torch.linalg.matrix_power(step, n) for n in (4, 3)]
    torch.testing.assert_close(first, (-5 * powers[0] @ CURVATURE @ error)[2])
    torch.testing.assert_close(second, (20 * powers[1] @ CURVATURE @ CURVATURE @ error)[2])


def test_heavy_ball_is_a_power_of_its_companion_matrix():
    lr, momentum, eye = 0.1, 0.8, torch.eye(3, dtype=torch.float64)
    companion = torch.cat(  # (w, b) -> (w - lr (m b + A w), m b + A w)
        [
            torch.cat([eye - lr * CURVATURE, -lr * momentum * eye], 1),
            torch.cat([CURVATURE, momentum * eye], 1),
        ]
    )
    power = torch.linalg.matrix_power(companion, 6)

    def solve(w):
        zero = torch.zeros(3, dtype=torch.float64)
        return run(w, zero, loss=quadratic, steps=6, lr=lr, momentum=momentum).params

    torch.testing.assert_close(solve(START), power[:3, :3] @ START)
    torch.testing.assert_close(torch.func.jacrev(solve)(START), power[:3, :3])


@pytest.mark.parametrize("g", [0.0, 1e-6, -0.3, 5.0])
def test_one_adam_step(g):
    lr, eps = 0.1, 1e-3
    opt = diffopt.adam()
    hparams = opt.hparams(lr=lr, eps=eps)
    param = torch.zeros(1, dtype=torch.float64)

    def step(grad):
        return opt.update(param, grad, opt.init(param), hparams)[0]

    grad = torch.tensor([g], dtype=torch.float64)
    expected = torch.tensor([[-lr * eps / (abs(g) + eps) ** 2]], dtype=torch.float64)
    torch.testing.assert_close(torch.func.jacrev(step)(grad), expected)
    torch.testing.assert_close(torch.func.jacfwd(step)(grad), expected)
    torch.testing.assert_close(torch.autograd.functional.jacobian(step, grad), expected)


def test_one_step_maml_on_linear_regression():
    """d/dw of 1/2 |B (w - lr A'(A w - a)) - b|^2 = (I - lr A'A) B' residual."""
    generator = torch.Generator().manual_seed(0)
    x, y, qx, qy, w = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in [(5, 3), (5,), (4, 3), (4,), (3,)]
    )

    def loss(w, x, y):
        return 0.5 * ((x @ w - y) ** 2).sum()

    w.requires_grad_()
    opt = diffopt.sgd(momentum=False)
    sol = diffopt.minimize(loss, w, x, y, optimizer=opt, hparams=opt.hparams(lr=0.05), steps=1)
    (grad,) = torch.autograd.grad(loss(sol.params, qx, qy), w)
    adapted = w - 0.05 * x.T @ (x @ w - y)
    expected = (torch.eye(3) - 0.05 * x.T @ x) @ qx.T @ (qx @ adapted - qy)
    torch.testing.assert_close(grad, expected)


def test_hypergradient_descent():
    """dL(w_{t+1})/dlr at step t alone is minus the product of consecutive gradients."""
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    w = run(START, lr=lr, steps=1).params
    (hypergradient,) = torch.autograd.grad(quartic(w, TARGET), lr)
    gradient = torch.func.grad(quartic)
    torch.testing.assert_close(
        hypergradient, -gradient(START, TARGET) @ gradient(w.detach(), TARGET)
    )


# Finite differences, first and second order, through loops

OPTIMIZERS = {
    "sgd": (diffopt.sgd(), {"lr": 0.1, "momentum": 0.7, "dampening": 0.2, "weight_decay": 0.1}),
    "adam": (diffopt.adam(), {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-2}),
    "rmsprop": (diffopt.rmsprop(centered=True), {"lr": 0.1, "alpha": 0.8, "eps": 0.1}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loops_have_the_derivatives_of_finite_differences(name):
    opt, numbers = OPTIMIZERS[name]
    inputs = [START, TARGET, *(torch.tensor(v, dtype=torch.float64) for v in numbers.values())]
    inputs = [x.clone().requires_grad_() for x in inputs]

    def solve(w, target, *values):
        named = dict(zip(numbers, values, strict=True))
        sol = run(w, target, opt=opt, steps=3, **named)
        return sol.params, sol.losses

    assert torch.autograd.gradcheck(solve, inputs)
    assert torch.autograd.gradgradcheck(solve, inputs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_func_transforms_agree_with_autograd(name):
    opt, numbers = OPTIMIZERS[name]
    values = {k: torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()}

    def outer(w, values):
        return quadratic(run(w, opt=opt, **values).params, -TARGET)

    leaf, learned = (
        START.clone().requires_grad_(),
        {k: v.clone().requires_grad_() for k, v in values.items()},
    )
    expected = torch.autograd.grad(outer(leaf, learned), [leaf, *learned.values()])
    grads = torch.func.grad(outer, argnums=(0, 1))(START, values)
    torch.testing.assert_close([grads[0], *grads[1].values()], list(expected))
    hessian = torch.autograd.functional.hessian(lambda w: outer(w, values), START)
    torch.testing.assert_close(torch.func.hessian(outer)(START, values), hessian)
    twice = torch.func.jacfwd(torch.func.jacfwd(outer))(START, values)
    torch.testing.assert_close(twice, hessian)


def test_forward_mode_duals():
    tangent = torch.tensor([0.2, -1.0, 0.4], dtype=torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(START, tangent)
        params = run(dual, opt=diffopt.adam(), lr=0.1).params
        derivative = forward_ad.unpack_dual(params).tangent
    expected = torch.func.jvp(
        lambda w: run(w, opt=diffopt.adam(), lr=0.1).params, (START,), (tangent,)
    )[1]
    torch.testing.assert_close(derivative, expected)


def test_vmap_over_tasks_and_rates_equals_a_loop():
    targets = torch.stack([TARGET, -TARGET, 2 * TARGET])
    rates = torch.tensor([0.05, 0.1, 0.2], dtype=torch.float64)

    def solve(target, lr):
        return run(START, target, opt=diffopt.adam(), lr=lr).params

    looped = torch.stack([solve(t, r) for t, r in zip(targets, rates, strict=True)])
    torch.testing.assert_close(torch.vmap(solve)(targets, rates), looped.detach())
    meta = torch.func.grad(lambda rates: torch.vmap(solve)(targets, rates).square().sum())
    one = torch.func.grad(lambda lr, target: solve(target, lr).square().sum())
    torch.testing.assert_close(
        meta(rates), torch.stack([one(r, t) for t, r in zip(targets, rates, strict=True)])
    )


def test_a_solution_passes_through_transforms():
    targets = torch.stack([TARGET, -TARGET])
    sols = torch.vmap(lambda target: run(START, target, opt=diffopt.adam(), lr=0.1))(targets)
    assert sols.losses.shape == (2, 4)
    torch.testing.assert_close(
        sols.params[1], run(START, -TARGET, opt=diffopt.adam(), lr=0.1).params.detach()
    )


def test_compiles_as_a_whole():
    def meta_gradient(w, lr):
        def outer(w, lr):
            return quadratic(run(w, opt=diffopt.adam(), steps=2, lr=lr).params, -TARGET)

        return torch.func.grad(outer, argnums=(0, 1))(w, lr)

    lr = torch.tensor(0.1, dtype=torch.float64)
    compiled = torch.compile(meta_gradient, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(START, lr), meta_gradient(START, lr))


def test_compiles_with_a_truncated_derivative():
    def last(w, lr):
        return quadratic(run(w, steps=2, lr=lr, adjoint=Truncated(1)).params, -TARGET)

    lr = torch.tensor(0.1, dtype=torch.float64)
    function = torch.func.grad(last, argnums=(0, 1))
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(START, lr), function(START, lr))


@pytest.mark.parametrize("opt", [diffopt.sgd(), diffopt.transforms.chain(diffopt.adam())], ids=type)
def test_compiles_with_a_tolerance_buffers_and_hparams_of_each_step(opt):
    def solve(w, lr):
        return diffopt.minimize(
            lambda w, count: (quadratic(w, TARGET), {"n": count["n"] + 1}), w, optimizer=opt,
            hparams=lambda t: opt.hparams(lr=lr / (t + 1)), steps=4, tol=1.5,
            buffers={"n": torch.tensor(0)},
        )  # fmt: skip

    lr = torch.tensor(0.5, dtype=torch.float64)
    found, expected = (
        torch.compile(solve, backend="eager", fullgraph=True)(START, lr),
        solve(START, lr),
    )
    assert found.steps == expected.steps < 4
    torch.testing.assert_close(found.params, expected.params)
    assert found.buffers == expected.buffers == {"n": expected.steps}


def test_traces_with_make_fx():
    opt, params = diffopt.adam(), [START]
    arguments = params, [TARGET], opt.init(params)

    def update(params, grads, state):
        return opt.update(params, grads, state, opt.hparams(lr=0.1))

    traced = make_fx(update)(*arguments)
    later = (*arguments[:2], arguments[2]._replace(step=torch.tensor(5.0, dtype=torch.float64)))
    torch.testing.assert_close(traced(*later), update(*later))


def test_batched_gradients_of_autograd():
    def solve(w):
        return run(w, opt=diffopt.adam(), lr=0.1, eps=1e-2).params

    one_by_one = torch.autograd.functional.jacobian(solve, START)
    at_once = torch.autograd.functional.jacobian(solve, START, vectorize=True)
    torch.testing.assert_close(at_once, one_by_one)


def test_an_inner_loop_inside_an_inner_loop():
    """The middle loop learns the innermost's rate; the outermost differentiates the middle's."""
    opt = diffopt.sgd()

    def middle_loss(log_rate, w):
        inner = run(w, steps=2, lr=log_rate.exp()).params
        return quadratic(inner, -TARGET)

    def outer(rate, w):
        sol = diffopt.minimize(
            middle_loss,
            torch.tensor(-3.0, dtype=torch.float64),
            w,
            optimizer=opt,
            hparams=opt.hparams(lr=rate),
            steps=2,
        )
        return sol.params

    inputs = (
        torch.tensor(0.02, dtype=torch.float64, requires_grad=True),
        START.clone().requires_grad_(),
    )
    assert torch.autograd.gradcheck(outer, inputs)
    assert torch.autograd.gradgradcheck(outer, inputs)
    torch.testing.assert_close(
        torch.func.grad(outer)(*(x.detach() for x in inputs)),
        torch.autograd.grad(outer(*inputs), inputs[0])[0],
    )


# A coordinate whose gradient is always zero

RULES = {
    "sgd": diffopt.sgd(),
    "adam": diffopt.adam(),
    "amsgrad": diffopt.adam(amsgrad=True),
    "adamw": diffopt.adamw(),
    "adamax": diffopt.adamax(),
    "nadam": diffopt.nadam(),
    "radam": diffopt.radam(),
    "rmsprop": diffopt.rmsprop(centered=True),
    "adagrad": diffopt.adagrad(),
    "adadelta": diffopt.adadelta(),
}


def regression(features):
    """The error on new data after 3 steps on data with these features, by start and rate."""
    generator = torch.Generator().manual_seed(0)
    x, y, new_x, new_y = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in [(5, 3), (5,), (4, 3), (4,)]
    )
    x[:, 2] = 0  # a feature that is constantly zero
    x, new_x = x[:, features], new_x[:, features]

    def outer(opt, w, lr):
        sol = diffopt.minimize(
            lambda w, x, y: ((x @ w - y) ** 2).mean(),
            w,
            x,
            y,
            optimizer=opt,
            hparams=opt.hparams(lr=lr, weight_decay=0.0),
            steps=3,
        )
        return ((new_x[:, :2] @ sol.params[:2] - new_y) ** 2).mean()

    return outer


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("rule", RULES)
def test_a_feature_that_is_zero_changes_no_meta_gradient(rule):
    opt, lr = RULES[rule], torch.tensor(0.1, dtype=torch.float64)
    whole, reduced = regression([0, 1, 2]), regression([0, 1])

    def derivatives(outer, start):
        inputs = [start.clone().requires_grad_(), lr.clone().requires_grad_()]
        with torch.autograd.detect_anomaly():
            first = torch.autograd.grad(outer(opt, *inputs), inputs, create_graph=True)
            total = first[0].sum() + first[1]
            return [*first, *torch.autograd.grad(total, inputs, materialize_grads=True)]

    with_zero, without = derivatives(whole, START), derivatives(reduced, START[:2])
    assert all(d.isfinite().all() for d in with_zero)
    by_func = torch.func.grad(lambda w, lr: whole(opt, w, lr), argnums=(0, 1))(START, lr)
    torch.testing.assert_close(list(by_func), with_zero[:2])
    for d, expected in zip(with_zero, without, strict=True):
        torch.testing.assert_close(d[:2] if d.dim() else d, expected)
    torch.testing.assert_close(with_zero[0][2], torch.zeros_like(lr))


# Adjoints


def test_first_order_drops_second_derivatives_of_the_loss_only():
    w = START.clone().requires_grad_()
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    target = TARGET.clone().requires_grad_()
    sol = run(w, target, steps=3, adjoint=FirstOrder(), lr=lr, momentum=0.5)
    by_w, by_lr, by_target = torch.autograd.grad(
        sol.params.sum(), (w, lr, target), allow_unused=True
    )
    gradient, v, total = torch.func.grad(quartic), torch.zeros(3), START
    moved = torch.zeros(3, dtype=torch.float64)
    for _ in range(3):
        v = 0.5 * v + gradient(total, TARGET)
        moved, total = moved - v, total - 0.1 * v
    torch.testing.assert_close(sol.params.detach(), total)
    torch.testing.assert_close(by_w, torch.ones_like(w))
    torch.testing.assert_close(by_lr, moved.sum())
    assert by_target is None
    assert not sol.losses.requires_grad


def test_first_order_under_func_transforms():
    def outer(w, lr, target):
        sol = run(w, target, steps=3, adjoint=FirstOrder(), lr=lr, weight_decay=0.1)
        return quadratic(sol.params, -TARGET) + sol.losses.sum()

    lr = torch.tensor(0.1, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (START, lr)]
    expected = torch.autograd.grad(outer(*leaves, TARGET), leaves)
    *grads, by_target = torch.func.grad(outer, argnums=(0, 1, 2))(START, lr, TARGET)
    torch.testing.assert_close(grads, list(expected))
    assert by_target.count_nonzero() == 0


@pytest.mark.parametrize("by_batches", [False, True])
def test_truncated_differentiates_the_last_steps(by_batches):
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    opt = diffopt.adam()
    steps = {"batches": ((TARGET,) for _ in range(5))} if by_batches else {"steps": 5}
    args = [] if by_batches else [TARGET]
    sol = diffopt.minimize(
        quartic,
        START,
        *args,
        optimizer=opt,
        hparams=opt.hparams(lr=lr),
        adjoint=Truncated(2),
        **steps,
    )
    start = run(START, opt=opt, steps=3, adjoint=None, lr=0.1)
    tail = diffopt.minimize(
        quartic,
        start.params,
        TARGET,
        optimizer=opt,
        hparams=opt.hparams(lr=lr),
        steps=2,
        state=start.state,
    )
    torch.testing.assert_close(sol.params, tail.params)
    torch.testing.assert_close(
        torch.autograd.grad(sol.params.sum(), lr), torch.autograd.grad(tail.params.sum(), lr)
    )
    torch.testing.assert_close(
        torch.func.grad(
            lambda lr: run(START, opt=opt, steps=5, adjoint=Truncated(2), lr=lr).params.sum()
        )(lr.detach()),
        torch.func.grad(
            lambda lr: diffopt.minimize(
                quartic,
                start.params,
                TARGET,
                optimizer=opt,
                hparams=opt.hparams(lr=lr),
                steps=2,
                state=start.state,
            ).params.sum()
        )(lr.detach()),
    )


@pytest.mark.parametrize("adjoint", [Truncated(2), Truncated(5)])
def test_truncated_has_the_derivatives_of_finite_differences(adjoint):
    """Of a run whose first steps took the rate at which the derivative is wanted."""
    opt, rate, kept = diffopt.adam(), 0.1, min(adjoint.k, 5)
    start = run(START, opt=opt, steps=5 - kept, adjoint=None, lr=rate)

    def last_steps(lr):
        """Differences of the kept steps, and derivatives of the truncated loop."""
        if not lr.requires_grad:
            return diffopt.minimize(
                quartic, start.params, TARGET, optimizer=opt, hparams=opt.hparams(lr=lr),
                steps=kept, state=start.state, adjoint=None,
            ).params  # fmt: skip
        return run(START, opt=opt, steps=5, adjoint=adjoint, lr=lr).params

    width, lr = 1e-4, torch.tensor(rate, dtype=torch.float64, requires_grad=True)
    ahead, here, behind = (last_steps(lr.detach() + d) for d in (width, 0, -width))
    for i, param in enumerate(last_steps(lr)):
        (first,) = torch.autograd.grad(param, lr, create_graph=True)
        (second,) = torch.autograd.grad(first, lr, retain_graph=True)
        torch.testing.assert_close(first, (ahead - behind)[i] / (2 * width), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            second, (ahead - 2 * here + behind)[i] / width**2, rtol=1e-3, atol=1e-4
        )


def test_truncated_is_exact_where_the_loop_is_short():
    w = START.clone().requires_grad_()
    exact = torch.autograd.grad(run(w, steps=3, lr=0.1).params.sum(), w)
    truncated = torch.autograd.grad(run(w, steps=3, lr=0.1, adjoint=Truncated(3)).params.sum(), w)
    torch.testing.assert_close(truncated, exact)


@pytest.mark.parametrize("adjoint", [Unrolled(), FirstOrder(), Truncated(2), None])
def test_every_adjoint_has_the_same_values(adjoint):
    reference = run(START, opt=diffopt.adam(), lr=0.1)
    sol = run(START.clone().requires_grad_(), opt=diffopt.adam(), lr=0.1, adjoint=adjoint)
    torch.testing.assert_close(sol.params, reference.params)
    torch.testing.assert_close(sol.losses, reference.losses)
    torch.testing.assert_close(sol.state, reference.state)


@pytest.mark.parametrize("k", [-1, 1.5, None, True])
def test_truncated_refuses(k):
    with pytest.raises(ValueError, match=r"k is .*, but must be an integer >= 0"):
        Truncated(k)


@pytest.mark.parametrize("no_grad", [False, True])
def test_evaluation_builds_no_graph(no_grad):
    w = START.clone().requires_grad_()
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    with torch.set_grad_enabled(not no_grad):
        sol = run(w, opt=diffopt.adam(), lr=lr, adjoint=Unrolled() if no_grad else None)
    leaves = tree_leaves(sol)
    assert not any(x.requires_grad for x in leaves if isinstance(x, Tensor))
    torch.testing.assert_close(sol.params, run(START, opt=diffopt.adam(), lr=0.1).params.detach())


# What goes in and out


def test_losses_are_those_before_each_step():
    sol = run(START, steps=3, lr=0.1)
    first, second = run(START, steps=1, lr=0.1), run(START, steps=2, lr=0.1)
    torch.testing.assert_close(
        sol.losses, torch.stack([quartic(p, TARGET) for p in (START, first.params, second.params)])
    )


def test_state_goes_in_and_out():
    opt = diffopt.adam()
    whole = run(START, opt=opt, steps=5, lr=0.1)
    head = run(START, opt=opt, steps=2, lr=0.1)
    tail = diffopt.minimize(
        quartic,
        head.params,
        TARGET,
        optimizer=opt,
        hparams=opt.hparams(lr=0.1),
        steps=3,
        state=head.state,
    )
    torch.testing.assert_close(tail.params, whole.params)
    torch.testing.assert_close(tail.state, whole.state)
    assert tail.state.step == 5


def test_the_initial_state_carries_derivatives():
    opt = diffopt.adam()

    def solve(exp_avg, exp_avg_sq):
        state = opt.init(START)._replace(
            step=torch.tensor(3.0), exp_avg=exp_avg, exp_avg_sq=exp_avg_sq
        )
        return diffopt.minimize(
            quartic,
            START,
            TARGET,
            optimizer=opt,
            hparams=opt.hparams(lr=0.1, beta2=0.9),
            steps=2,
            state=state,
        ).params

    inputs = [TARGET.clone().requires_grad_(), (TARGET**2 + 0.1).requires_grad_()]
    assert torch.autograd.gradcheck(solve, inputs)
    assert torch.autograd.gradgradcheck(solve, inputs)


def test_batches_are_arguments_after_the_fixed_ones():
    seen = []

    def loss(w, scale, x, y):
        seen.append((float(x), float(y)))
        return scale * ((w * x - y) ** 2).sum()

    opt = diffopt.sgd()
    batches = [(torch.tensor(float(i)), torch.tensor(2.0 * i)) for i in range(1, 4)]
    arguments = {"optimizer": opt, "hparams": opt.hparams(lr=0.1)}
    sol = diffopt.minimize(loss, torch.zeros(()), torch.tensor(0.5), batches=batches, **arguments)
    assert seen == [(1.0, 2.0), (2.0, 4.0), (3.0, 6.0)]
    assert sol.losses.shape == (3,)
    seen.clear()
    diffopt.minimize(
        loss, torch.zeros(()), torch.tensor(0.5), batches=iter(batches), steps=2, **arguments
    )
    assert len(seen) == 2
    with pytest.raises(ValueError, match="batches has 3 entries, but steps is 4"):
        diffopt.minimize(
            loss, torch.zeros(()), torch.tensor(0.5), batches=batches, steps=4, **arguments
        )


def test_a_batch_that_is_no_tuple_is_one_argument():
    opt = diffopt.sgd()
    sol = diffopt.minimize(
        lambda w, batch: ((w - batch["y"]) ** 2).sum(),
        torch.zeros(2),
        batches=[{"y": torch.ones(2)}, {"y": torch.ones(2)}],
        optimizer=opt,
        hparams=opt.hparams(lr=0.5),
    )
    torch.testing.assert_close(sol.params.detach(), torch.ones(2))


def test_batches_carry_derivatives():
    opt = diffopt.adam()
    data = torch.stack([TARGET, -TARGET]).requires_grad_()

    def solve(data):
        return diffopt.minimize(
            quartic, START, batches=data, optimizer=opt, hparams=opt.hparams(lr=0.1)
        ).params

    assert torch.autograd.gradcheck(solve, data)
    assert torch.autograd.gradgradcheck(solve, data)


@pytest.mark.parametrize("tol", [None, 0.0])
@pytest.mark.parametrize(
    "name", ["Checkpointed", "Truncated", "Reversible", "Evolution", "Implicit", "OneStep", "None"]
)
def test_batches_in_one_buffer_are_refused_where_they_are_kept(name, tol):
    given = {"Truncated": {"k": 2}, "Implicit": {"root_tolerance": 1e9}}.get(name, {})
    adjoint = None if name == "None" else getattr(diffopt.adjoint, name)(**given)

    def refilled():
        buffer = torch.empty_like(TARGET)
        for t in range(6):
            yield buffer.copy_(TARGET * t)

    def solve(batches):
        opt = diffopt.sgd(momentum=name == "Reversible")
        momentum = {"momentum": 0.9} if name == "Reversible" else {}
        return diffopt.minimize(
            quartic,
            START.clone().requires_grad_(),
            optimizer=opt,
            hparams=opt.hparams(lr=0.01, **momentum),
            batches=batches,
            tol=tol,
            adjoint=adjoint,
        )

    if adjoint is None:
        expected = solve([TARGET * t for t in range(6)])
        torch.testing.assert_close(solve(refilled()).params, expected.params)
        return
    with pytest.raises(RuntimeError, match="of a batch"):
        solve(refilled())


@pytest.mark.parametrize("transform", [lambda f: f, lambda f: torch.func.grad_and_value(f)])
def test_aux_may_be_anything(transform):
    opt = diffopt.sgd()

    def loss(w):
        return (w**2).sum(), {"norm": w.norm(), "name": "step", "nothing": None}

    recorded = []

    def outer(w):
        sol = diffopt.minimize(
            loss, w, optimizer=opt, hparams=opt.hparams(lr=0.1), steps=2, has_aux=True
        )
        recorded.extend(aux["name"] for aux in sol.aux)
        assert sol.aux[0]["nothing"] is None
        return sol.aux[1]["norm"]

    result = transform(outer)(torch.tensor([3.0, 4.0]))
    norm = result[1] if isinstance(result, tuple) else result
    torch.testing.assert_close(norm, torch.tensor(4.0), check_stride=False)
    assert recorded == ["step", "step"]


def test_buffers_are_handed_on():
    opt = diffopt.sgd()

    def loss(w, count, scale):
        return scale * (w**2).sum(), count + 1, count

    sol = diffopt.minimize(
        loss,
        torch.ones(2),
        0.5,
        optimizer=opt,
        hparams=opt.hparams(lr=0.1),
        steps=3,
        buffers=torch.tensor(10),
        has_aux=True,
    )
    assert sol.buffers == 13
    assert sol.aux == [10, 11, 12]


def test_gradients_are_partial_where_arguments_depend_on_params():
    """A proximal term around the start: its centre is the start itself, but held fixed."""
    w = START.clone().requires_grad_()
    opt = diffopt.sgd()

    def loss(w, centre):
        return quadratic(w, TARGET) + 2.0 * ((w - centre) ** 2).sum()

    def solve(w):
        return diffopt.minimize(
            loss, w, w, optimizer=opt, hparams=opt.hparams(lr=0.1), steps=3
        ).params

    torch.testing.assert_close(
        torch.autograd.functional.jacobian(solve, w), torch.func.jacrev(solve)(w)
    )
    assert torch.autograd.gradcheck(solve, w)


def test_params_that_depend_on_each_other():
    """Generated weights: the second is made from the first, yet each moves by its own gradient."""
    opt = diffopt.sgd()

    def solve(z):
        params = {"a": z, "b": 3 * z}
        return diffopt.minimize(
            lambda p: (p["a"] * p["b"]).sum(),
            params,
            optimizer=opt,
            hparams=opt.hparams(lr=0.1),
            steps=2,
        ).params["a"]

    z = START.clone().requires_grad_()
    torch.testing.assert_close(
        torch.autograd.functional.jacobian(solve, z), torch.func.jacrev(solve)(z)
    )
    torch.testing.assert_close(solve(z)[0], 0.41 * z[0])


def test_a_hypernetwork_receives_gradients():
    torch.manual_seed(0)
    network = torch.nn.Linear(2, 3).double()
    opt = diffopt.adam()
    params = {"w": network(torch.ones(2, dtype=torch.float64))}
    sol = diffopt.minimize(
        lambda p: quartic(p["w"], TARGET),
        params,
        optimizer=opt,
        hparams=opt.hparams(lr=0.1),
        steps=2,
    )
    sol.params["w"].sum().backward()
    assert network.weight.grad is not None
    assert network.weight.grad.count_nonzero() == 6


def test_a_parameter_the_loss_ignores_is_left_alone():
    opt = diffopt.sgd()

    def solve(unused):
        params = {"used": START, "unused": unused}
        return diffopt.minimize(
            lambda p: quartic(p["used"], TARGET),
            params,
            optimizer=opt,
            hparams=opt.hparams(lr=0.1, weight_decay=0.5),
            steps=1,
        ).params["unused"]

    torch.testing.assert_close(solve(TARGET), TARGET)
    torch.testing.assert_close(torch.vmap(solve)(TARGET[None]), TARGET[None])


@pytest.mark.parametrize("make", [diffopt.sgd, diffopt.adam])
def test_complex_parameters(make):
    """As the pair of their real and imaginary parts, with derivatives."""
    opt, target = make(), torch.tensor([1.0 - 2.0j, 0.5j], dtype=torch.complex128)
    start = torch.tensor([0.3 + 0.1j, -1.0 + 0.2j], dtype=torch.complex128)

    def solve(start, lr, *, real=False):
        def loss(w):
            w = torch.view_as_complex(w) if real else w
            return (w - target).abs().pow(3).sum()

        return diffopt.minimize(
            loss, start, optimizer=opt, hparams=opt.hparams(lr=lr), steps=3
        ).params

    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    pairs = solve(torch.view_as_real(start), lr, real=True)
    torch.testing.assert_close(torch.view_as_real(solve(start, lr)), pairs)
    assert torch.autograd.gradcheck(solve, (start.requires_grad_(), lr))
    assert torch.autograd.gradgradcheck(solve, (start, lr))

    def of_complex(lr):
        return solve(start.detach(), lr).abs().sum()

    def of_pairs(lr):
        pairs = solve(torch.view_as_real(start.detach()), lr, real=True)
        return torch.view_as_complex(pairs).abs().sum()

    lr = lr.detach()
    torch.testing.assert_close(torch.func.grad(of_complex)(lr), torch.func.grad(of_pairs)(lr))


def test_no_steps():
    sol = run(START, steps=0, lr=0.1)
    assert sol.params is START
    assert sol.losses.shape == (0,)


def test_a_tensor_the_loss_closes_over_receives_a_gradient():
    target = TARGET.clone().requires_grad_()
    opt = diffopt.sgd()
    arguments = {"optimizer": opt, "hparams": opt.hparams(lr=0.1), "steps": 3}
    closed = diffopt.minimize(lambda w: quartic(w, target), START, **arguments)
    passed = diffopt.minimize(quartic, START, target, **arguments)
    torch.testing.assert_close(
        torch.autograd.grad(closed.params.sum(), target),
        torch.autograd.grad(passed.params.sum(), target),
    )


OPT = diffopt.sgd()
CHAIN = diffopt.transforms.chain(OPT)
GOOD = {"optimizer": OPT, "hparams": OPT.hparams(lr=0.1), "steps": 1}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": None}, ValueError, r"requires steps= or batches="),
        ({"steps": -1}, ValueError, r"steps is -1, but must be an integer >= 0"),
        ({"steps": 2.5}, ValueError, r"steps is 2.5, but must be an integer >= 0"),
        ({"loss": lambda w: w}, ValueError, r"real 0-d tensor, .* shape \(3,\)"),
        ({"loss": lambda w: (w.sum(), 1)}, TypeError, "not a tensor: has_aux=True takes"),
        ({"has_aux": True}, TypeError, r"loss must return \(value, aux\)"),
        ({"loss": lambda w: 1.0}, TypeError, r"1.0 of type float as its value"),
        ({"loss": lambda w: torch.ones(())}, ValueError, r"loss does not depend on params"),
        ({"params": {"n": torch.ones(2).long()}}, ValueError, r"params\['n'\] has dtype .*int64"),
        ({"params": {"n": 3.0}}, TypeError, r"params\['n'\] is 3.0 of type float, not a tensor"),
        ({"optimizer": torch.optim.SGD}, TypeError, r"optimizer is "),
        ({"adjoint": "unrolled"}, TypeError, r"adjoint is 'unrolled', not one of diffopt.adjoint"),
        ({"adjoint": Unrolled}, TypeError, r"adjoint is <class .*, not one of diffopt.adjoint"),
        ({"hparams": {"lr": 0.1}}, TypeError, r"hparams is .* of type dict, not a record"),
        ({"hparams": OPT.hparams}, TypeError, r"hparams is .*, which must be called"),
        (
            {"hparams": lambda t: OPT.hparams() if t else None},
            TypeError,
            r"hparams\(0\) returned None",
        ),
        ({"hparams": lambda t: 0.1}, TypeError, r"hparams\(0\) returned 0.1 of type float"),
        ({"optimizer": CHAIN, "hparams": CHAIN.hparams}, TypeError, r"must be called"),
        ({"tol": "a"}, TypeError, r"tol is 'a' of type str, not a number"),
        ({"tol": [0.1]}, TypeError, r"tol is \[0.1\] of type list, not a number"),
        ({"tol": torch.ones(2)}, TypeError, r"tol is a tensor of shape \(2,\), not a number"),
        ({"batches": {"x": START}}, TypeError, r"batches is a dict"),
        ({"batches": [], "steps": None}, ValueError, r"batches has no entries"),
        ({"batches": iter([]), "steps": None, "tol": 0.1}, ValueError, r"batches has no entries"),
    ],
)
def test_errors(arguments, error, message):
    call = {"loss": lambda w: (w**2).sum(), "params": START, **GOOD, **arguments}
    with pytest.raises(error, match=message):
        diffopt.minimize(call.pop("loss"), call.pop("params"), **call)


def test_no_steps_need_no_batches():
    sol = diffopt.minimize(lambda w: w.sum(), START, **{**GOOD, "steps": 0}, batches=[])
    assert sol.params is START
    assert sol.steps == 0


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed(), ForwardMode(), None], ids=str)
@pytest.mark.parametrize("tol", [None, 1e-3])
@pytest.mark.parametrize(
    ("new", "message"),
    [
        (lambda b: {"c": b["a"]}, r"the new buffers\['a'\] is missing"),
        (lambda b: {"a": b["a"], "d": b["a"]}, r"the new buffers\['d'\] is not expected there"),
        (lambda b: None, "the new buffers is None, where type dict is expected"),
        (lambda b: {"a": None}, r"new buffers\['a'\] is None, but buffers\['a'\] is .*\(2,\)"),
        (lambda b: {"a": torch.ones(3)}, r"\(3,\), but buffers\['a'\] is a tensor of shape \(2,\)"),
    ],
)
def test_new_buffers_are_like_the_old_ones(adjoint, tol, new, message):
    hparams = OPT.hparams(lr=torch.tensor(0.1, requires_grad=True))
    with pytest.raises(ValueError, match=message):
        diffopt.minimize(
            lambda w, buffers: ((w**2).sum(), new(buffers)), START, buffers={"a": torch.ones(2)},
            optimizer=OPT, hparams=hparams, steps=2, tol=tol, adjoint=adjoint,
        )  # fmt: skip


def test_inference_mode_is_refused():
    opt = diffopt.sgd()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad"):
        diffopt.minimize(
            lambda w: w**2, torch.tensor(1.0), optimizer=opt, hparams=opt.hparams(lr=0.1), steps=1
        )


def test_rates_of_every_weight_are_compiled():
    opt = diffopt.adam()
    params, rates = torch.ones(3), torch.tensor([0.1, 0.2, 0.3])

    def end(rates):
        return diffopt.minimize(
            lambda w: (w**2).sum(), params, optimizer=opt, hparams=opt.hparams(lr=rates), steps=2
        ).params

    compiled = torch.compile(end, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rates), end(rates))
