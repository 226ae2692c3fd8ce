"""Evolution strategies: against exact gradients, closed forms of smoothed functions, and bias."""

import functools
import math

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

import diffopt
from diffopt.adjoint import Evolution, FirstOrder, PersistentEvolution, Unrolled, smooth, unroll

F64 = torch.float64
MATRIX = torch.tensor([[0.5, 0.2, 0.0], [-0.3, 0.9, 0.1], [0.0, 0.4, 0.7]], dtype=F64)
START = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
SHIFT = torch.tensor([0.3, 0.1, -0.4], dtype=F64)
RATE = torch.tensor(0.1, dtype=F64)
INPUTS = torch.linspace(-1, 1, 12, dtype=F64).reshape(4, 3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def leaves(*tensors):
    return [x.clone().requires_grad_() for x in tensors]


def affine(x, shift, u):
    x = MATRIX @ x + shift + u
    return x, (x**2).sum()


def losses(adjoint, start=START, shift=SHIFT, inputs=INPUTS):
    return unroll(affine, start, shift, xs=inputs, adjoint=adjoint)[1]


def normal(seed, *sizes):
    """The perturbations that come from the seed of a sample, one after another."""
    generator = seeded(seed)
    return [torch.randn(n, generator=generator, dtype=F64) for n in sizes]


def seeds(generator, count):
    return torch.randint(2**63 - 1, (count,), generator=generator).tolist()


def assert_unbiased(estimates, exact):
    """The mean is within 4 standard errors, and those are no excuse."""
    estimates = torch.stack(estimates)
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert (error < 0.2 * exact.abs().max()).all()
    assert ((estimates.mean(0) - exact).abs() <= 4 * error).all()


def loss(w, target, x):
    """A quadratic in w."""
    return 0.5 * ((w["a"] - target) ** 2).sum() + 0.3 * (w["a"][0] * w["b"] * x).sum()


def outcome(adjoint, a, b, target, lr, exp_avg, x, steps=3):
    """A number that depends on all of a solution."""
    opt = diffopt.sgd()
    params = {"a": a, "b": b}
    state = opt.init(params)
    state = state._replace(momentum_buffer={"a": exp_avg, "b": state.momentum_buffer["b"]})
    sol = diffopt.minimize(
        loss, params, target, optimizer=opt, hparams=opt.hparams(lr=lr, momentum=0.8),
        batches=[x, *INPUTS[1:steps]], state=state, adjoint=adjoint,
    )  # fmt: skip
    return (sol.params["a"] ** 2).sum() + sol.params["b"].sum() + sol.losses.sum()


EVERY = (START, SHIFT, 0.5 * SHIFT, RATE, 0.1 * START, INPUTS[0])
NAMES = ("params a", "params b", "argument", "rate", "state", "batch")


# The estimate


def test_the_estimate_is_the_formula():
    samples, sigma = 3, 0.7
    (shift,) = leaves(SHIFT)
    adjoint = Evolution(samples=samples, sigma=sigma, generator=seeded())
    (grad,) = torch.autograd.grad(losses(adjoint, shift=shift).sum().sin(), shift)
    slope, expected = losses(Unrolled()).sum().cos(), 0
    for seed in seeds(seeded(), samples):
        (eps,) = normal(seed, 3)
        ahead, behind = (losses(Unrolled(), shift=SHIFT + s * sigma * eps).sum() for s in (1, -1))
        expected += eps * slope * (ahead - behind) / (2 * samples * sigma)
    torch.testing.assert_close(grad, expected)


def test_the_persistent_estimate_is_the_formula():
    samples, sigma, k = 3, 0.7, 2
    (shift,) = leaves(SHIFT)
    adjoint = Evolution(samples=samples, sigma=sigma, persistent=k, generator=seeded())
    x, path = unroll(affine, START, shift, xs=INPUTS, adjoint=adjoint)
    (grad,) = torch.autograd.grad(path.sum() + 3 * x.sum(), shift)
    expected = 0
    for seed in seeds(seeded(), samples):
        xi, carries = 0, {1: START, -1: START}
        for tau, eps in enumerate(normal(seed, 3, 3)):
            xi, total = xi + eps, {}
            for sign in (1, -1):
                perturbed = SHIFT + sign * sigma * eps
                inputs = INPUTS[tau * k : (tau + 1) * k]
                carries[sign], path = unroll(affine, carries[sign], perturbed, xs=inputs)
                total[sign] = path.sum() + (3 * carries[sign].sum() if tau == 1 else 0)
            expected += xi * (total[1] - total[-1]) / (2 * samples * sigma)
    torch.testing.assert_close(grad, expected)


def test_curvature_gives_no_bias_to_antithetic_pairs():
    """Of a quadratic the estimate does not depend on sigma, however large."""

    def estimate(sigma):
        inputs = leaves(START, SHIFT, INPUTS)
        total = losses(Evolution(samples=2, sigma=sigma, generator=seeded()), *inputs).sum()
        return torch.autograd.grad(total, inputs)

    torch.testing.assert_close(estimate(1e-3), estimate(100.0), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("persistent", [None, 1, 3])
def test_estimates_are_unbiased_on_quadratics(persistent):
    inputs = leaves(START, SHIFT, INPUTS)
    generator = seeded()

    def gradient(adjoint):
        grads = torch.autograd.grad(losses(adjoint, *inputs).sum(), inputs)
        return torch.cat([g.flatten() for g in grads])

    adjoint = Evolution(
        samples=20, sigma=0.3, persistent=persistent, generator=generator, chunk_size=20
    )
    assert_unbiased([gradient(adjoint) for _ in range(150)], gradient(Unrolled()))


@pytest.mark.parametrize("persistent", [None, 1])
def test_every_input_receives_an_unbiased_estimate(persistent):
    inputs, generator = leaves(*EVERY), seeded()
    exact = torch.autograd.grad(outcome(Unrolled(), *inputs, steps=2), inputs)
    adjoint = Evolution(
        samples=10, sigma=1e-3, persistent=persistent, generator=generator, chunk_size=10
    )
    estimates = [torch.autograd.grad(outcome(adjoint, *inputs, steps=2), inputs) for _ in range(60)]
    for name, truth, *given in zip(NAMES, exact, *estimates, strict=True):
        mean, error = torch.stack(given).mean(0), torch.stack(given).std(0) / math.sqrt(60)
        assert ((mean - truth).abs() <= 4 * error + 1e-4).all(), name
        assert (error <= 0.5 * torch.stack([g.abs().max() for g in exact]).max()).all(), name


@pytest.mark.parametrize("persistent", [None, 1])
@pytest.mark.parametrize("chunk_size", [2, 5, 8])
def test_pairs_that_run_at_once_give_the_same_estimate(persistent, chunk_size):
    def noisy(x, shift, u):
        x, value = affine(x, shift, u + torch.randn(3, dtype=F64))
        return x, {"value": value, "name": "step"}

    def estimate(chunk_size):
        torch.manual_seed(1)
        adjoint = Evolution(5, 0.2, persistent, seeded(), chunk_size)
        inputs = leaves(START, SHIFT, INPUTS)
        _, outputs = unroll(noisy, *inputs[:2], xs=inputs[2], adjoint=adjoint)
        return torch.autograd.grad(sum(o["value"] for o in outputs), inputs)

    torch.testing.assert_close(estimate(chunk_size), estimate(1))


def test_minimize_with_pairs_that_run_at_once():
    def estimate(chunk_size):
        inputs = leaves(*EVERY)
        adjoint = Evolution(samples=4, generator=seeded(), chunk_size=chunk_size)
        return torch.autograd.grad(outcome(adjoint, *inputs), inputs)

    torch.testing.assert_close(estimate(4), estimate(1))


def test_own_hyperparameters_and_buffers_receive_unbiased_estimates():
    opt = diffopt.sgd(momentum=False)
    rates, buffers = leaves(torch.tensor([0.1, 0.2, 0.3], dtype=F64), SHIFT)

    def gradient(adjoint):
        sol = diffopt.minimize(
            lambda w, b: (0.5 * ((w - b) ** 2).sum(), 0.9 * b), START, optimizer=opt,
            hparams=lambda t: opt.hparams(lr=rates[t]), steps=3, buffers=buffers, adjoint=adjoint,
        )  # fmt: skip
        total = (sol.params**2).sum() + sol.losses.sum() + sol.buffers.sum()
        return torch.cat(torch.autograd.grad(total, (rates, buffers)))

    adjoint = Evolution(samples=20, sigma=1e-3, generator=seeded(), chunk_size=20)
    assert_unbiased([gradient(adjoint) for _ in range(40)], gradient(Unrolled()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_estimates_have_the_dtype_of_their_input(dtype):
    (shift,) = leaves(SHIFT.to(dtype))
    adjoint = Evolution(samples=2000, sigma=1.0, generator=seeded(), chunk_size=2000)
    x, _ = unroll(lambda x, s, t: (x + s, None), START.to(dtype), shift, 3, adjoint=adjoint)
    (grad,) = torch.autograd.grad(x.sum(), shift)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), torch.full((3,), 3.0, dtype=F64), atol=0.5, rtol=0)
    value = smooth(torch.sum, generator=seeded())(shift)
    (grad,) = torch.autograd.grad(value, shift)
    assert grad.dtype == dtype


def test_only_what_needs_a_gradient_is_perturbed():
    start, shift = START, *leaves(SHIFT)
    adjoint = Evolution(samples=1, sigma=1.0, generator=seeded())
    x, _ = unroll(lambda x, shift, t: (x + shift, None), start, shift, 1, adjoint=adjoint)
    (grad,) = torch.autograd.grad(x.sum(), shift)
    (eps,) = normal(*seeds(seeded(), 1), 3)
    torch.testing.assert_close(grad, eps * eps.sum())


def test_a_tensor_at_two_places_has_one_perturbation():
    (w,) = leaves(START)
    adjoint = Evolution(samples=1, sigma=1.0, generator=seeded())
    x, _ = unroll(lambda x, shift, t: (x - shift, None), w, w, 1, adjoint=adjoint)
    (grad,) = torch.autograd.grad(x.sum(), w)
    torch.testing.assert_close(grad, torch.zeros(3, dtype=F64))


def test_a_cubic_is_smoothed():
    """The derivative of E (x + sigma eps)^3 is 3 x^2 + 3 sigma^2."""
    x = torch.tensor(0.8, dtype=F64, requires_grad=True)
    adjoint = Evolution(samples=4000, sigma=0.5, generator=seeded(), chunk_size=1000)
    y, _ = unroll(lambda x, args, t: (x**3, None), x, (), 1, adjoint=adjoint)
    (grad,) = torch.autograd.grad(y, x)
    assert abs(grad - (3 * 0.64 + 3 * 0.25)) < 0.15


def test_steps_without_a_derivative():
    """E sign(x + sigma eps) has the derivative 2 phi(x / sigma) / sigma."""
    sigma = 0.5
    x = torch.tensor([0.3, -0.1], dtype=F64, requires_grad=True)
    adjoint = Evolution(samples=4000, sigma=sigma, generator=seeded(), chunk_size=1000)
    y, _ = unroll(lambda x, args, t: (torch.sign(x), None), x, (), 1, adjoint=adjoint)
    (grad,) = torch.autograd.grad(y, x, torch.tensor([1.0, 2.0], dtype=F64))
    density = torch.exp(-((x.detach() / sigma) ** 2) / 2) / math.sqrt(2 * math.pi)
    expected = torch.tensor([1.0, 2.0], dtype=F64) * 2 * density / sigma
    torch.testing.assert_close(grad, expected, rtol=0.08, atol=0)


def test_complex_inputs():
    w = torch.tensor([1.0 - 2.0j, 0.5j], dtype=torch.complex128, requires_grad=True)

    def solve(adjoint):
        y, _ = unroll(lambda w, args, t: ((1 + 2j) * w, None), w, (), 1, adjoint=adjoint)
        return torch.autograd.grad((y.abs() ** 2).sum(), w)[0]

    adjoint, generator = (
        Evolution(samples=4000, sigma=0.1, generator=seeded(), chunk_size=1000),
        Unrolled(),
    )
    torch.testing.assert_close(solve(adjoint), solve(generator), rtol=0.1, atol=0.5)


# Values and random numbers


@pytest.mark.parametrize("adjoint", [Evolution(), Evolution(persistent=2)], ids=str)
def test_values_are_those_at_theta(adjoint):
    def noisy(x, shift, u):
        x = x + shift + torch.randn(3, dtype=F64)
        return x, {"sum": x.sum(), "count": torch.tensor(1)}

    def run(adjoint):
        torch.manual_seed(0)
        return unroll(noisy, START, *leaves(SHIFT), xs=INPUTS, adjoint=adjoint)

    torch.testing.assert_close(run(adjoint), run(Unrolled()))


@pytest.mark.parametrize("persistent", [None, 1])
def test_all_loops_see_the_same_random_numbers(persistent):
    """Noise that is added to the outputs of linear steps does not change the estimate."""
    own = torch.Generator()

    def estimate(scale):
        def step(x, args, t):
            shift, generator = args
            noise = torch.randn(3, dtype=F64) + torch.randn(3, generator=generator, dtype=F64)
            return x + shift + scale * noise, (2 * x).sum()

        (shift,) = leaves(SHIFT)
        torch.manual_seed(1)
        own.manual_seed(2)
        adjoint = Evolution(samples=3, persistent=persistent, generator=seeded())
        x, path = unroll(step, START, (shift, own), 3, adjoint=adjoint)
        before = torch.get_rng_state(), own.get_state()
        (grad,) = torch.autograd.grad(x.sum() + path.sum(), shift)
        assert torch.equal(before[0], torch.get_rng_state())
        assert torch.equal(before[1], own.get_state())
        return grad

    torch.testing.assert_close(estimate(10.0), estimate(0.0))


def test_estimates_are_determined_by_the_generator():
    (shift,) = leaves(SHIFT)

    def estimate(adjoint):
        return torch.autograd.grad(losses(adjoint, shift=shift).sum(), shift)[0]

    generator = seeded(3)
    first, second = (estimate(Evolution(generator=generator)) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, estimate(Evolution(generator=seeded(3))))
    torch.manual_seed(4)
    first, second = (estimate(Evolution()) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    assert torch.equal(first, estimate(Evolution()))


def test_backward_twice_repeats_the_estimate():
    (shift,) = leaves(SHIFT)
    total = losses(Evolution(), shift=shift).sum()
    first, second = (torch.autograd.grad(total, shift, retain_graph=True) for _ in range(2))
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("create_graph", [False, True])
def test_memory_does_not_grow_with_samples_or_steps(create_graph):
    def saved(samples, steps):
        (shift,) = leaves(SHIFT)
        kept = []

        def pack(x):
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            x, _ = unroll(
                lambda x, s, t: (x + s, None), START, shift, steps,
                adjoint=Evolution(samples=samples),
            )  # fmt: skip
            torch.autograd.grad((x**2).sum(), shift, create_graph=create_graph)
        return sum(kept)

    assert saved(2, 2) == saved(50, 30)


def test_tol_and_no_steps():
    opt = diffopt.sgd(momentum=False)
    (target,) = leaves(SHIFT)
    sol = diffopt.minimize(
        lambda w, t: 0.5 * ((w - t) ** 2).sum(), START, target, optimizer=opt,
        hparams=opt.hparams(lr=0.5), steps=100, tol=1e-2,
        adjoint=Evolution(samples=2000, generator=seeded(), chunk_size=500),
    )  # fmt: skip
    assert sol.steps < 100
    (grad,) = torch.autograd.grad(sol.params.sum(), target)
    torch.testing.assert_close(grad, torch.ones(3, dtype=F64), atol=0.15, rtol=0)
    (start,) = leaves(START)
    carry, outputs = unroll(affine, start, SHIFT, 0, adjoint=Evolution())
    assert carry is start
    assert outputs == []


# Transforms


def at(adjoint):
    def f(start, shift):
        return losses(adjoint, start, shift).sum().sin()

    return f


def evolution(persistent=None):
    return Evolution(samples=2, sigma=0.3, persistent=persistent, generator=seeded())


@pytest.mark.parametrize("persistent", [None, 3])
def test_all_reverse_transforms_agree(persistent):
    inputs = leaves(START, SHIFT)
    expected = torch.autograd.grad(at(evolution(persistent))(*inputs), inputs)
    assert all(g.count_nonzero() for g in expected)
    by_func = torch.func.grad(at(evolution(persistent)), (0, 1))(START, SHIFT)
    torch.testing.assert_close(by_func, expected)
    stacked = [torch.stack([x, x]) for x in (START, SHIFT)]
    twice = tuple(torch.stack([g, g]) for g in expected)
    by_vmap = torch.vmap(torch.func.grad(at(evolution(persistent)), (0, 1)))(*stacked)
    torch.testing.assert_close(by_vmap, twice)
    f = at(evolution(persistent))
    total = torch.func.grad(lambda *v: torch.vmap(f)(*v).sum(), (0, 1))(*stacked)
    torch.testing.assert_close(total, twice)


def test_minimize_under_transforms():
    inputs = leaves(*EVERY)
    numbers = tuple(range(len(EVERY)))
    expected = torch.autograd.grad(outcome(evolution(), *inputs), inputs)
    by_func = torch.func.grad(lambda *v: outcome(evolution(), *v), numbers)(*EVERY)
    torch.testing.assert_close(by_func, expected)
    tasks = [torch.stack([x, 1.1 * x]) for x in EVERY]
    one_by_one = [
        torch.func.grad(lambda *v: outcome(evolution(), *v), numbers)(*(x[i] for x in tasks))
        for i in range(2)
    ]
    batched = torch.vmap(torch.func.grad(lambda *v: outcome(evolution(), *v), numbers))(*tasks)
    torch.testing.assert_close(batched, tuple(torch.stack(g) for g in zip(*one_by_one)))  # noqa: B905


def test_the_jacobian_of_all_outputs():
    (shift,) = leaves(SHIFT)
    path = losses(evolution(), shift=shift)
    rows = [torch.autograd.grad(y, shift, retain_graph=True)[0] for y in path]
    by_func = torch.func.jacrev(lambda s: losses(evolution(), shift=s))(SHIFT)
    torch.testing.assert_close(by_func, torch.stack(rows))
    eye = torch.eye(4, dtype=F64)
    (batched,) = torch.autograd.grad(path, shift, eye, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack(rows))


def test_a_product_can_be_differentiated_by_its_vector():
    (shift,) = leaves(SHIFT)
    vector = torch.ones(4, dtype=F64, requires_grad=True)
    path = losses(evolution(persistent=3), shift=shift)
    (product,) = torch.autograd.grad(path, shift, vector, create_graph=True)
    by_vector = [torch.autograd.grad(p, vector, retain_graph=True)[0] for p in product]
    rows = torch.autograd.functional.jacobian(
        lambda s: losses(evolution(persistent=3), shift=s), SHIFT
    )
    torch.testing.assert_close(torch.stack(by_vector).T, rows)


SECOND = {
    "jacrev jacrev": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "autograd": lambda f: lambda x: torch.autograd.functional.hessian(f, x),
    "vmap grad grad": lambda f: (
        lambda x: torch.vmap(torch.func.grad(lambda x: torch.func.grad(f)(x).sum()))(x[None])
    ),
}


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_raise(name):
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        SECOND[name](lambda shift: at(evolution())(START, shift))(SHIFT)


def test_second_derivatives_by_another_input_raise():
    f = at(evolution())
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.func.grad(lambda start: torch.func.grad(f, 1)(start, SHIFT).sum())(START)
    start, shift = leaves(START, SHIFT)
    (grad,) = torch.autograd.grad(f(start, shift), shift, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.autograd.grad(grad.sum(), start)


def test_forward_mode_and_compiling_raise():
    with pytest.raises(NotImplementedError, match="neither in forward mode"):
        torch.func.jacfwd(at(evolution()), 1)(START, SHIFT)
    with pytest.raises(NotImplementedError, match="neither in forward mode"):
        torch.func.hessian(at(evolution()), 1)(START, SHIFT)


def test_without_a_graph():
    with torch.no_grad():
        assert not losses(evolution(), shift=leaves(SHIFT)[0]).requires_grad


@pytest.mark.parametrize("adjoint", [None, FirstOrder()], ids=str)
def test_a_loop_that_an_outer_loop_learns_from(adjoint):
    """The outer loop has no derivative through estimates, but it may run on them."""
    opt = diffopt.sgd(momentum=False)

    def outer_loss(shift):
        return losses(Evolution(samples=50, generator=seeded(), chunk_size=50), shift=shift).sum()

    rate = torch.tensor(0.005, dtype=F64, requires_grad=True)
    sol = diffopt.minimize(
        outer_loss, SHIFT, optimizer=opt, hparams=opt.hparams(lr=rate), steps=5, adjoint=adjoint
    )
    assert sol.losses[-1] < 0.9 * sol.losses[0]
    if adjoint is not None:
        assert torch.autograd.grad(sol.params.sum(), rate)[0].isfinite()
    exact = diffopt.minimize(
        outer_loss, SHIFT, optimizer=opt, hparams=opt.hparams(lr=rate), steps=2
    )
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.autograd.grad(exact.params.sum(), rate)


# What is refused


def test_tensors_that_steps_close_over_are_refused():
    (shift,) = leaves(SHIFT)
    with pytest.raises(ValueError, match="closes over a tensor of shape"):
        unroll(lambda x, args, t: (x + shift, None), START, (), 2, adjoint=Evolution())
    opt = diffopt.sgd()
    with pytest.raises(ValueError, match="the loss or step closes over a tensor of shape"):
        diffopt.minimize(
            lambda w: ((w - shift) ** 2).sum(), START, optimizer=opt,
            hparams=opt.hparams(lr=0.1), steps=2, adjoint=Evolution(),
        )  # fmt: skip
    with pytest.raises(ValueError, match="closes over a tensor of shape"):
        smooth(lambda x: (x * shift).sum())(START)
    pes = PersistentEvolution(lambda c, x, y: (c, (x * y).sum()))
    with pytest.raises(ValueError, match="closes over a tensor of shape"):
        pes(pes.init(()), START, shift)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples is 0, but must be an integer >= 1"),
        ({"samples": 2.5}, "samples is 2.5, but must be an integer >= 1"),
        ({"sigma": 0.0}, "sigma is 0.0, but must be a number > 0"),
        ({"sigma": -1}, "sigma is -1, but must be a number > 0"),
        ({"sigma": math.nan}, "sigma is nan, but must be a number > 0"),
        ({"sigma": math.inf}, "sigma is inf, but must be a number > 0"),
        ({"sigma": "1"}, "sigma is '1', but must be a number > 0"),
        ({"chunk_size": 0}, "chunk_size is 0, but must be an integer >= 1"),
        ({"persistent": 0}, "persistent is 0, but must be an integer >= 1"),
    ],
)
def test_errors_of_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Evolution(**arguments)
    if "persistent" not in arguments:
        with pytest.raises(ValueError, match=message):
            smooth(torch.sum, **arguments)
        with pytest.raises(ValueError, match=message):
            PersistentEvolution(torch.sum, **arguments)


@pytest.mark.parametrize("make", [smooth, PersistentEvolution])
def test_what_is_no_function_or_generator_raises(make):
    with pytest.raises(TypeError, match="function is 3 of type int, not a function"):
        make(3)
    for wrong in (Evolution, functools.partial(make, torch.sum)):
        with pytest.raises(TypeError, match=r"generator is 0 of type int, not a torch.Generator"):
            wrong(generator=0)


@pytest.mark.parametrize(
    ("function", "theta", "error", "message"),
    [
        (torch.sin, START, TypeError, r"loss must be a real 0-d tensor or a number, .*\(3,\)"),
        (lambda x: "loss", START, TypeError, r"loss must be a real 0-d .* 'loss' of type str"),
        (torch.sum, {"n": torch.ones(2).long()}, ValueError, r"theta\['n'\] has dtype .*int64"),
        (torch.sum, {"n": 1.0}, ValueError, r"theta\['n'\] is 1.0 of type float, not a tensor"),
        (torch.sum, {}, ValueError, "theta has no leaves"),
    ],
)
def test_errors_of_smooth(function, theta, error, message):
    with pytest.raises(error, match=message):
        smooth(function)(theta)


def test_errors_of_persistent_evolution():
    pes = PersistentEvolution(lambda c, x: (c, x.sum()), samples=2)
    with pytest.raises(ValueError, match="state has 3 pairs, but samples is 2"):
        pes((*pes.init(()), pes.init(())[0]), START)
    state, _ = pes(pes.init(()), START)
    with pytest.raises(ValueError, match=r"of shapes \[\(2,\)\], but .* in state are \[\(3,\)\]"):
        pes(state, START[:2])
    with pytest.raises(TypeError, match=r"function must return \(carry, loss\), not a tensor"):
        PersistentEvolution(lambda c, x: x.sum())(((pes.init(()))[0],) * 16, START)


# Any function


def test_smooth_of_a_sign_is_an_error_function():
    theta, sigma = torch.tensor(0.3, dtype=F64, requires_grad=True), 0.7
    value = smooth(torch.sign, samples=20000, sigma=sigma, generator=seeded(), chunk_size=5000)(
        theta
    )
    (grad,) = torch.autograd.grad(value, theta)
    ratio = theta.detach() / sigma
    torch.testing.assert_close(value, torch.erf(ratio / math.sqrt(2)), atol=0.02, rtol=0)
    density = torch.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi)
    torch.testing.assert_close(grad, 2 * density / sigma, atol=0, rtol=0.03)


def test_smooth_of_a_quadratic():
    def f(theta):
        return (theta["a"] ** 2).sum() + theta["a"][0] * theta["b"]

    inputs, generator = leaves(START, RATE), seeded()
    exact = torch.autograd.grad(f({"a": inputs[0], "b": inputs[1]}), inputs)
    g = smooth(f, samples=50, sigma=0.5, generator=generator, chunk_size=50)
    values, grads = [], []
    for _ in range(100):
        value = g({"a": inputs[0], "b": inputs[1]})
        values.append(value.detach())
        grads.append(torch.cat([x.flatten() for x in torch.autograd.grad(value, inputs)]))
    assert_unbiased(grads, torch.cat([x.flatten() for x in exact]))
    smoothed = f({"a": START, "b": RATE}) + 3 * 0.25
    assert_unbiased(values, smoothed)


def test_smooth_under_transforms():
    def f(x):
        return torch.round(x * 3).sum()

    def g(x):
        return smooth(f, samples=5, generator=seeded())(x.exp())

    (x,) = leaves(SHIFT)
    (expected,) = torch.autograd.grad(g(x), x)
    assert expected.count_nonzero()
    torch.testing.assert_close(torch.func.grad(g)(SHIFT), expected)
    torch.testing.assert_close(torch.func.jacfwd(g)(SHIFT), expected)
    xs = torch.stack([SHIFT, SHIFT])
    torch.testing.assert_close(torch.vmap(torch.func.grad(g))(xs)[1], expected)
    torch.testing.assert_close(torch.func.grad(lambda x: torch.vmap(g)(x).sum())(xs)[1], expected)
    for outer in (torch.func.jacrev, torch.func.jacfwd):
        with pytest.raises(NotImplementedError, match="has no second derivative"):
            outer(torch.func.grad(g))(SHIFT)
        with pytest.raises(NotImplementedError, match="has no second derivative"):
            outer(torch.func.jacfwd(g))(SHIFT)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_smooth_of_losses_of_any_dtype(dtype):
    theta = torch.tensor(0.1, dtype=F64, requires_grad=True)
    g = smooth(lambda x: (x > 0).to(dtype), samples=3000, generator=seeded(), chunk_size=1000)
    (grad,) = torch.autograd.grad(g(theta), theta)
    torch.testing.assert_close(grad, torch.tensor(2.4197, dtype=F64), rtol=0.08, atol=0)


def test_smooth_calls_a_simulator_twice_per_sample():
    """It leaves torch, and all its calls see the same random numbers."""
    calls = []

    def simulator(theta):
        calls.append(float(torch.rand(())))
        return float(np.round(theta.numpy() * 4).sum())

    theta = leaves(START)[0]
    value = smooth(simulator, samples=5, sigma=0.3, generator=seeded())(theta)
    (grad,) = torch.autograd.grad(value, theta)
    assert len(calls) == 2 * 5 + 1  # one more to see what it closes over
    assert len(set(calls)) == 1
    assert grad.dtype == F64
    assert grad.count_nonzero() == 3


def test_the_accuracy_after_an_inner_loop_is_learned():
    """An outer loss without any derivative: how many points a trained model gets right."""
    x = torch.randn(40, 2, generator=seeded(), dtype=F64)
    noise = torch.randn(40, generator=seeded(1), dtype=F64)
    y = torch.sign(x[:, 0] + 0.5 * x[:, 1] + noise)
    opt = diffopt.sgd()

    def error(log_weights):
        def loss(w):
            return (log_weights.exp() * (x @ w - y) ** 2).mean()

        sol = diffopt.minimize(
            loss, torch.zeros(2, dtype=F64), optimizer=opt, hparams=opt.hparams(lr=0.1), steps=3,
            adjoint=None,
        )  # fmt: skip
        return (torch.sign(x @ sol.params) != y).sum() / 40

    theta = torch.zeros(40, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(
        smooth(error, samples=8, sigma=2.0, generator=seeded())(theta), theta
    )
    assert grad.isfinite().all()
    assert grad.count_nonzero() == 40


# Persistent evolution strategies


def delayed(carry, theta, *_):
    """What theta does at once costs 1; what it does a step later gains 3."""
    return theta, theta - 3 * carry


def test_persistent_evolution_is_unbiased_where_truncations_have_the_wrong_sign():
    steps = 6
    theta, start = torch.tensor(0.4, dtype=F64), torch.tensor(0.4, dtype=F64)
    exact = torch.tensor(steps - 3.0 * (steps - 1), dtype=F64)
    pes = PersistentEvolution(delayed, samples=20, sigma=0.1, generator=seeded(), chunk_size=20)

    def run(forget):
        state, total = pes.init(start), 0
        for _ in range(steps):
            if forget:
                state = tuple(pair._replace(total={}) for pair in state)
            leaf = theta.clone().requires_grad_()
            state, value = pes(state, leaf)
            total = total + torch.autograd.grad(value, leaf)[0]
        return total

    truncated = torch.tensor(1.0 * steps, dtype=F64)
    assert_unbiased([run(forget=False) for _ in range(50)], exact)
    assert_unbiased([run(forget=True) for _ in range(50)], truncated)
    assert exact < 0 < truncated


def test_persistent_evolution_equals_the_adjoint_in_expectation():
    """Of a loop whose gradient is known, in truncations of two steps."""
    exact = torch.func.grad(lambda s: losses(Unrolled(), shift=s).sum())(SHIFT)

    def truncation(carry, shift, inputs):
        carry, path = unroll(affine, carry, shift, xs=inputs)
        return carry, path.sum()

    pes = PersistentEvolution(truncation, samples=30, sigma=0.2, generator=seeded(), chunk_size=30)
    (shift,) = leaves(SHIFT)

    def run():
        state, total = pes.init(START), 0
        for inputs in INPUTS.split(2):
            state, value = pes(state, shift, inputs)
            total = total + value
        return torch.autograd.grad(total, shift)[0]

    assert_unbiased([run() for _ in range(100)], exact)


def test_persistent_evolution_with_pairs_that_run_at_once():
    def truncation(carry, theta):
        hidden, name = carry
        hidden = torch.tanh(hidden + theta["a"])
        return (hidden, name), (hidden * theta["b"]).sum()

    def run(chunk_size):
        theta = dict(zip("ab", leaves(START, SHIFT), strict=True))
        pes = PersistentEvolution(truncation, 5, generator=seeded(), chunk_size=chunk_size)
        state, first = pes(pes.init((START, "name")), theta)
        state, second = pes(state, theta)
        return state, torch.autograd.grad(first + second, [*theta.values()])

    for some, one in zip(run(2), run(1), strict=True):
        torch.testing.assert_close(
            [x for x in tree_leaves(some) if isinstance(x, torch.Tensor)],
            [x for x in tree_leaves(one) if isinstance(x, torch.Tensor)],
        )


@pytest.mark.parametrize("shared", [False, True], ids=["default", "an argument"])
def test_every_truncation_has_new_perturbations_whatever_the_generator(shared):
    """Also one that the function uses itself, whose state is the same for both of a pair."""

    def perturbations(generator, *args):
        pes = PersistentEvolution(delayed, samples=2, generator=generator)
        state = pes.init(SHIFT.sum())
        states = [state := pes(state, SHIFT.sum(), *args)[0] for _ in range(3)]
        return [torch.stack([pair.total[0] for pair in state]) for state in states]

    generator = seeded() if shared else None
    torch.manual_seed(0)
    mine = perturbations(generator, *[generator] * shared)
    torch.testing.assert_close(mine, perturbations(seeded()))
    assert not torch.allclose(2 * mine[0], mine[1])


def test_smooth_draws_from_the_default_generator_as_from_any_other():
    torch.manual_seed(0)
    mine = smooth(torch.sum, samples=2)
    theirs = smooth(torch.sum, samples=2, generator=seeded())
    first, second = mine(START), mine(START)
    torch.testing.assert_close((first, second), (theirs(START), theirs(START)))


def test_a_state_is_a_value():
    """It can be used twice, with the same result from the same generator."""
    pes = PersistentEvolution(delayed, samples=3, generator=seeded())
    theta = torch.tensor(0.4, dtype=F64)
    state, _ = pes(pes.init(theta), theta)
    again = [
        PersistentEvolution(delayed, samples=3, generator=seeded(1))(state, theta) for _ in range(2)
    ]
    torch.testing.assert_close(again[0], again[1])


def test_persistent_evolution_under_func_transforms():
    theta = torch.tensor(0.4, dtype=F64)

    def two(theta):
        pes = PersistentEvolution(delayed, samples=3, generator=seeded())
        state, first = pes(pes.init(torch.tensor(0.4, dtype=F64)), theta)
        state, second = pes(state, theta)
        return first + 2 * second, state

    (leaf,) = leaves(theta)
    value, state = two(leaf)
    expected = torch.autograd.grad(value, leaf)[0], state
    torch.testing.assert_close(torch.func.grad(two, has_aux=True)(theta), expected)
    torch.testing.assert_close(torch.func.jacfwd(lambda x: two(x)[0])(theta), expected[0])


def test_persistent_evolution_has_no_second_derivative():
    pes = PersistentEvolution(delayed, samples=3, generator=seeded())
    theta = torch.tensor(0.4, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(pes(pes.init(theta), theta)[1], theta, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.autograd.grad(grad, theta)


def test_an_outer_optimizer_acts_after_every_truncation():
    """It finds the rate at which a quadratic is minimized best, from one a tenth of it."""
    inner, outer = diffopt.sgd(momentum=False), diffopt.adam()

    def truncation(w, log_lr):
        sol = diffopt.minimize(
            lambda w: 0.5 * (torch.tensor([1.0, 0.2], dtype=F64) * w**2).sum(), w,
            optimizer=inner, hparams=inner.hparams(lr=log_lr.exp()), steps=2, adjoint=None,
        )  # fmt: skip
        return sol.params, sol.losses.sum()

    pes = PersistentEvolution(truncation, samples=4, sigma=0.1, generator=seeded())
    log_lr = torch.tensor(math.log(0.1), dtype=F64)
    meta_state, totals = outer.init(log_lr), []
    for _ in range(6):
        state, total = pes.init(torch.ones(2, dtype=F64)), 0
        for _ in range(4):
            log_lr = log_lr.detach().requires_grad_()
            state, value = pes(state, log_lr)
            (grad,) = torch.autograd.grad(value, log_lr)
            log_lr, meta_state = outer.update(log_lr, grad, meta_state, outer.hparams(lr=0.2))
            log_lr, meta_state = diffopt.detach((log_lr, meta_state))
            total += value.item()
        totals.append(total)
    assert totals[-1] < 0.5 * totals[0]
