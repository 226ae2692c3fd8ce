"""ForwardMode against Unrolled and finite differences, its memory, and its use online."""

import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd import gradcheck

import diffopt
from diffopt.adjoint import Checkpointed, ForwardMode, Unrolled, unroll
from test_adjoints import BATCHES, INPUTS, TRANSFORMS, at, outcome
from test_memory import START, Census, no_garbage_collector, solve

SECOND_ORDER_IN_REVERSE = ["jacrev grad", "vmap grad grad"]
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def double(*values):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


# Against Unrolled


@pytest.mark.parametrize(
    "name", [name for name in TRANSFORMS if name not in SECOND_ORDER_IN_REVERSE]
)
def test_equals_unrolled_under(name):
    transform = TRANSFORMS[name]
    torch.testing.assert_close(transform(at(ForwardMode())), transform(at(Unrolled())), **CLOSE)


def test_jacrev_and_vmap_of_jacrev_equal_unrolled():
    def losses(adjoint):
        def of(lr, shift):
            opt = diffopt.adam()
            params = {"a": INPUTS["a"], "c": INPUTS["c"]}
            sol = diffopt.minimize(
                lambda w, shift: (w["a"] ** 2 * shift).sum() + w["c"].sin().sum(), params, shift,
                optimizer=opt, hparams=opt.hparams(lr=lr), steps=4, adjoint=adjoint,
            )  # fmt: skip
            return sol.losses

        jacobian = torch.func.jacrev(of, (0, 1))
        rates, shifts = double(0.1, 0.2), torch.stack([INPUTS["shift"], INPUTS["a"]])
        return jacobian(rates[0], shifts[0]), torch.vmap(jacobian)(rates, shifts)

    torch.testing.assert_close(losses(ForwardMode()), losses(Unrolled()), **CLOSE)


@pytest.mark.parametrize("names", [[name] for name in INPUTS] + [list(INPUTS)], ids=str)
def test_equals_unrolled_under_autograd(names):
    def derivatives(adjoint):
        inputs = {name: x.clone().requires_grad_(name in names) for name, x in INPUTS.items()}
        value = outcome(adjoint, *inputs.values())
        return [value, *torch.autograd.grad(value, [inputs[name] for name in names])]

    torch.testing.assert_close(derivatives(ForwardMode()), derivatives(Unrolled()), **CLOSE)


def test_agrees_with_finite_differences():
    leaves = [x.clone().requires_grad_() for x in INPUTS.values()]
    assert gradcheck(at(ForwardMode()), leaves)


def test_rates_by_step_and_batches_that_need_gradients():
    def gradients(adjoint):
        rates = torch.linspace(0.01, 0.1, 5, dtype=torch.float64, requires_grad=True)
        batches = torch.stack(BATCHES[:5]).requires_grad_()
        opt = diffopt.sgd()
        sol = diffopt.minimize(
            lambda w, x: ((w * x - 1) ** 4).sum(), INPUTS["c"], batches=batches, optimizer=opt,
            hparams=lambda t: opt.hparams(lr=rates[t], momentum=0.9), adjoint=adjoint,
        )  # fmt: skip
        return torch.autograd.grad(sol.params.sin().sum() + sol.losses[3], [rates, batches])

    torch.testing.assert_close(gradients(ForwardMode()), gradients(Unrolled()), **CLOSE)


def test_buffers_aux_and_tensors_without_derivatives():
    def run(adjoint, scale):
        opt = diffopt.sgd()

        def loss(w, buffers, scale):
            mean, count = buffers
            mean = 0.9 * mean + 0.1 * w
            return ((w - scale * mean) ** 2).sum(), (mean, count + 1), {"n": count, "x": scale * w}

        sol = diffopt.minimize(
            loss, INPUTS["c"], scale, optimizer=opt, hparams=opt.hparams(lr=0.1), steps=4,
            buffers=(torch.zeros(3, dtype=torch.float64), torch.tensor(0)), has_aux=True,
            adjoint=adjoint,
        )  # fmt: skip
        assert [aux["n"] for aux in sol.aux] == [0, 1, 2, 3]
        assert sol.buffers[1] == 4
        total = sol.buffers[0].sum() + sol.aux[2]["x"].sum()
        return [total, *torch.autograd.grad(total, scale)]

    scale = double(0.7).requires_grad_()
    torch.testing.assert_close(run(ForwardMode(), scale), run(Unrolled(), scale), **CLOSE)
    scale = double(0.7, 0.2, -0.4).requires_grad_()
    torch.testing.assert_close(run(ForwardMode(), scale), run(Unrolled(), scale), **CLOSE)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inputs", [1, 3])
def test_running_statistics_are_constants(inputs, training):
    torch.manual_seed(0)
    norm = diffopt.nn.functionalize(torch.nn.BatchNorm1d(3).double().train(training))
    x = torch.randn(8, 3, dtype=torch.float64)
    params = {name: w.detach() for name, w in norm.params.items()}

    def loss(params, buffers, scale):
        y, buffers = norm(params, buffers, x)
        return (scale * (y - 1) ** 2).mean(), buffers

    def derivative(adjoint):
        scale = torch.linspace(0.5, 1, inputs, dtype=torch.float64).requires_grad_()
        opt = diffopt.adam()
        sol = diffopt.minimize(
            loss, params, scale, buffers=norm.buffers, optimizer=opt,
            hparams=opt.hparams(lr=0.1), steps=3, adjoint=adjoint,
        )  # fmt: skip
        assert not any(buffer.requires_grad for buffer in sol.buffers.values())
        return torch.autograd.grad(loss(sol.params, sol.buffers, 1.0)[0], scale)

    torch.testing.assert_close(derivative(ForwardMode()), derivative(Unrolled()), **CLOSE)


def test_results_that_depend_on_no_input_are_constants():
    w = {"a": INPUTS["a"], "c": INPUTS["c"].clone().requires_grad_()}
    opt = diffopt.sgd()
    sol = diffopt.minimize(
        lambda w: (w["a"] ** 2).sum() + (w["c"] ** 2).sum(), w, optimizer=opt, steps=3,
        hparams=opt.hparams(lr=0.1), adjoint=ForwardMode(),
    )  # fmt: skip
    assert sol.params["c"].requires_grad
    assert not sol.params["a"].requires_grad


@pytest.mark.parametrize("alone", [True, False])
def test_tensors_without_numbers(alone):
    w = [double(1.0, 2.0).requires_grad_(not alone), double([]).requires_grad_()]
    sol = solve(lambda w: (w[0] ** 2).sum() + w[1].sum(), w, lr=0.1, adjoint=ForwardMode())
    (grad,) = torch.autograd.grad(sol.params[0].sum() + sol.params[1].sum(), w[1])
    assert grad.shape == (0,)


def test_goes_on_from_a_state_with_tensors_without_numbers():
    def derivative(adjoint):
        opt, w = diffopt.adafactor(), torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
        call = {"optimizer": opt, "hparams": opt.hparams(lr=0.1), "steps": 2, "adjoint": adjoint}
        sol = diffopt.minimize(lambda w: (w**2).sum(), w, **call)
        sol = diffopt.minimize(lambda w: (w**2).sum(), sol.params, state=sol.state, **call)
        return torch.autograd.grad(sol.params.sum(), w)

    torch.testing.assert_close(derivative(ForwardMode()), derivative(Unrolled()), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(dtype):
    def run(adjoint):
        w, scale = torch.ones(2, dtype=dtype), torch.tensor([0.5, 1.0], requires_grad=True)
        opt = diffopt.sgd()
        sol = diffopt.minimize(
            lambda w, s: (s.to(w.dtype) * w**2).sum(), w, scale, optimizer=opt,
            hparams=opt.hparams(lr=0.1, momentum=0.5), steps=3, adjoint=adjoint,
        )  # fmt: skip
        assert sol.params.dtype == dtype
        return torch.autograd.grad(sol.params.sum(), scale)

    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(run(ForwardMode()), run(Unrolled()), rtol=16 * eps, atol=16 * eps)


def test_complex_inputs():
    def run(adjoint, w, target):
        opt = diffopt.sgd()
        return diffopt.minimize(
            lambda w, target: (w - target).abs().pow(3).sum(), w, target, optimizer=opt,
            hparams=opt.hparams(lr=0.05), steps=3, adjoint=adjoint,
        ).params  # fmt: skip

    w = torch.tensor([0.3 + 0.1j, -1.0 + 0.2j], dtype=torch.complex128, requires_grad=True)
    target = torch.tensor([1.0 - 2.0j, 0.5j], dtype=torch.complex128, requires_grad=True)
    assert gradcheck(lambda *inputs: run(ForwardMode(), *inputs), (w, target))


@pytest.mark.parametrize("inputs", [1, 3])
@pytest.mark.parametrize("generator", [False, True])
def test_values_and_tangents_see_the_same_noise(inputs, generator):
    def run(adjoint, scale):
        torch.manual_seed(0)
        own = torch.Generator().manual_seed(1) if generator else None
        opt = diffopt.sgd()

        def loss(w, scale, own):
            noise = torch.randn(3, dtype=torch.float64, generator=own)
            return ((w - scale * noise) ** 2).sum() + torch.dropout(w, 0.5, True).sum()

        sol = diffopt.minimize(
            loss, INPUTS["c"], scale, own, optimizer=opt, hparams=opt.hparams(lr=0.1), steps=4,
            adjoint=adjoint,
        )  # fmt: skip
        return [sol.params, *torch.autograd.grad(sol.params.sin().sum(), scale)], torch.rand(1)

    scale = torch.linspace(0.5, 1, inputs, dtype=torch.float64).requires_grad_()
    # What comes next from the generators is the same as well: noise is drawn once.
    torch.testing.assert_close(run(ForwardMode(), scale), run(Unrolled(), scale), **CLOSE)


def test_any_step_function():
    def euler(y, args, t):
        rate, force = args
        return y + 0.1 * rate * y + force * t, {"y": y**2, "t": torch.tensor(t)}

    def run(adjoint):
        args = double(1.0).requires_grad_(), double(0.2, -0.3).requires_grad_()
        y, path = unroll(euler, double(1.0, 2.0), args, 6, adjoint=adjoint)
        assert path["t"].tolist() == [*range(6)]
        return torch.autograd.grad(y.sum() + path["y"][3].sum(), args)

    torch.testing.assert_close(run(ForwardMode()), run(Unrolled()), **CLOSE)


@pytest.mark.parametrize("inputs", [1, 3])
def test_stopping_by_tolerance(inputs):
    def run(adjoint):
        scale = torch.linspace(0.5, 1, inputs, dtype=torch.float64).requires_grad_()
        opt = diffopt.sgd()
        sol = diffopt.minimize(
            lambda w, s: (s * w**2).sum(), INPUTS["c"], scale, optimizer=opt, steps=200, tol=0.1,
            hparams=opt.hparams(lr=0.1), adjoint=adjoint,
        )  # fmt: skip
        return [sol.steps, *torch.autograd.grad(sol.params.sum(), scale)]

    torch.testing.assert_close(run(ForwardMode()), run(Unrolled()), **CLOSE)


@pytest.mark.parametrize("by", [0, 1])
def test_an_output_that_is_one_for_a_whole_batch(by):
    """Its cotangent is the sum over the batch, and counts once."""

    def total(adjoint, lr, w, target):
        def loss(w, lr, target):
            return (w**4).sum() + (w * target).sum(), {"early": lr * w}

        opt = diffopt.sgd()
        sol = diffopt.minimize(
            loss, w, lr, target, optimizer=opt, hparams=opt.hparams(lr=lr, momentum=0.9), steps=2,
            has_aux=True, adjoint=adjoint,
        )  # fmt: skip
        return sol.aux[0]["early"].sin().sum() + sol.params.sum()

    def derivative(adjoint):
        def over_targets(lr, w):
            targets = torch.linspace(-1, 1, 4, dtype=torch.float64)
            return torch.vmap(lambda target: total(adjoint, lr, w, target))(targets).sum()

        return torch.func.grad(over_targets, by)(INPUTS["lr"], INPUTS["c"])

    torch.testing.assert_close(derivative(ForwardMode()), derivative(Unrolled()), **CLOSE)


DETERMINANTS = {
    "logdet": lambda w, x: torch.logdet(w @ w.T + torch.eye(3, dtype=w.dtype)) * x,
    "solve": lambda w, x: torch.linalg.solve(w @ w.T + x * torch.eye(3, dtype=w.dtype), w).sum(),
    "slogdet": lambda w, x: torch.linalg.slogdet(w + 3 * torch.eye(3, dtype=w.dtype))[1] * x,
}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("loss", DETERMINANTS.values(), ids=DETERMINANTS)
def test_factorizations_under_vmap(loss, shared):
    """Of which torch's derivatives along a batch of directions are wrong under vmap."""

    def end(adjoint):
        def one(w, x):
            opt = diffopt.sgd()
            return diffopt.minimize(
                loss, w, x, optimizer=opt, hparams=opt.hparams(lr=0.1), steps=2, adjoint=adjoint,
            ).params.pow(3).sum()  # fmt: skip

        w = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3).sin().flip(1)
        x = torch.linspace(0.5, 2, 4, dtype=torch.float64)
        if shared:
            return torch.vmap(torch.func.grad(one, (0, 1)), (None, 0))(w, x)
        return torch.vmap(torch.func.grad(one, (0, 1)))(w.expand(4, 3, 3), x)

    torch.testing.assert_close(end(ForwardMode()), end(Unrolled()), **CLOSE)


def test_values_and_tangents_see_the_same_noise_under_vmap():
    def grads(adjoint):
        def one(scale):
            opt = diffopt.sgd()
            return diffopt.minimize(
                lambda w, s: ((w - s * torch.rand(3, dtype=w.dtype)) ** 2).sum(), INPUTS["c"],
                scale, optimizer=opt, hparams=opt.hparams(lr=0.1), steps=3, adjoint=adjoint,
            ).params.sin().sum()  # fmt: skip

        torch.manual_seed(0)
        scales = torch.linspace(0.5, 1, 6, dtype=torch.float64).reshape(2, 3)
        return torch.vmap(torch.func.grad(one), randomness="different")(scales), torch.rand(1)

    torch.testing.assert_close(grads(ForwardMode()), grads(Unrolled()), **CLOSE)


def test_batched_gradients_of_autograd():
    def losses(lr):
        return solve(lambda w: (w**4).sum(), lr=lr, adjoint=ForwardMode()).losses

    lr = torch.tensor([0.01, 0.02, 0.01, 0.03], dtype=torch.float64)
    one_by_one = torch.autograd.functional.jacobian(losses, lr)
    at_once = torch.autograd.functional.jacobian(losses, lr, vectorize=True)
    torch.testing.assert_close(at_once, one_by_one)


def test_without_anything_to_differentiate_it_is_the_loop():
    sol = solve(lambda w: (w**4).sum(), adjoint=ForwardMode())
    torch.testing.assert_close(sol.params, solve(lambda w: (w**4).sum()).params.detach())
    assert not sol.params.requires_grad
    assert solve(lambda w: (w**4).sum(), steps=0, adjoint=ForwardMode()).params is START
    with torch.no_grad():
        sol = solve(lambda w: (w**4).sum(), lr=torch.tensor(0.1, requires_grad=True))
    assert not sol.params.requires_grad


def test_compiles_as_a_whole():
    def meta_gradient(lr):
        def outer(lr):
            return solve(lambda w: (w**4).sum(), lr=lr, steps=2, adjoint=ForwardMode()).params.sum()

        return torch.func.grad(outer)(lr)

    compiled = torch.compile(meta_gradient, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(double(0.1)), meta_gradient(double(0.1)))


# Memory


@pytest.mark.parametrize("inputs", [1, 3])
def test_memory_is_flat_in_the_number_of_steps(inputs):
    def run(steps):
        loss, scale = Census(), torch.linspace(0.5, 1, inputs, dtype=torch.float64)
        scale.requires_grad_()
        opt = diffopt.adam()
        with no_garbage_collector():
            sol = diffopt.minimize(
                lambda w, s: loss(w, s.mean()), START, scale, optimizer=opt,
                hparams=opt.hparams(lr=0.01), steps=steps, adjoint=ForwardMode(),
            )  # fmt: skip
            torch.autograd.grad(sol.params.sum(), scale)
            inner = weakref.ref(sol.params)
            del sol
            return loss.most, loss.alive(), inner()

    run(1)  # torch's first derivative in forward mode in a process leaves a cycle behind
    assert run(10) == run(100) == (2, 0, None)


# Online


def regression_step(carry, log_lr, batch):
    """Momentum on a regression; the learning rate is made within the step."""
    params, state = carry
    x, y = batch

    def loss(w):
        return ((torch.tanh(x @ w) - y) ** 2).mean()

    grads, value = torch.func.grad_and_value(loss)(params)
    opt = diffopt.sgd()
    return opt.update(params, grads, state, opt.hparams(lr=log_lr.exp(), momentum=0.9)), value


def batches(count):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(5, 4, generator=generator, dtype=torch.float64),
            torch.rand(5, generator=generator, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def validation(w):
    return (torch.sin(w) - 0.3).square().sum()


@pytest.mark.parametrize("log_lr", [double(-2.0), double(-2.0, -1.5, -3.0, -2.5)])
def test_hypergradients_of_every_step_equal_those_of_the_unrolled_loop(log_lr):
    log_lr, data = log_lr.requires_grad_(), batches(8)
    start = (START, diffopt.sgd().init(START))
    online = ForwardMode().iterate(regression_step, start, log_lr, data)
    for t, ((params, _), value) in enumerate(online):
        (w, _), values = Unrolled().run(regression_step, start, log_lr, data[: t + 1])
        pairs = [(validation(params), validation(w)), (value, values[-1])]
        for mine, other in pairs[: t + 1]:  # the first loss does not depend on the rate
            grads = [torch.autograd.grad(y, log_lr, retain_graph=True) for y in (mine, other)]
            torch.testing.assert_close([mine, *grads[0]], [other, *grads[1]], **CLOSE)
    assert t == 7


def test_hyperparameters_may_change_during_the_run():
    """The derivative is by a shift of all rates so far."""
    log_lr, data = double(-2.0).requires_grad_(), batches(6)
    meta = torch.optim.SGD([log_lr], lr=0.5)
    start, taken = (START, diffopt.sgd().init(START)), []
    for (params, _), _ in ForwardMode().iterate(regression_step, start, log_lr, data):
        taken.append(log_lr.item())
        shift = double(0.0).requires_grad_()
        carry = start
        for rate, batch in zip(taken, data, strict=False):
            carry, _ = regression_step(carry, rate + shift, batch)
        (log_lr.grad,) = torch.autograd.grad(validation(params), log_lr)
        (expected,) = torch.autograd.grad(validation(carry[0]), shift)
        torch.testing.assert_close(log_lr.grad, expected, **CLOSE)
        meta.step()
    assert len(set(taken)) == 6


def test_one_step_tangents_are_hypergradient_descent():
    """dL(w_{t+1})/dlr_t = -g_{t+1} . g_t (Baydin et al. 2018)."""

    def loss(w):
        return (w**4).sum() + w.prod()

    def descent(w, lr, t):
        return w - lr * torch.func.grad(loss)(w), w

    lr = double(0.02).requires_grad_()
    meta = torch.optim.SGD([lr], lr=1e-4)
    for w, before in ForwardMode().iterate(descent, START, lr, range(6), discount=0.0):
        (lr.grad,) = torch.autograd.grad(loss(w), lr)
        g, g_next = (torch.func.grad(loss)(x.detach()) for x in (before, w))
        torch.testing.assert_close(lr.grad, -g_next @ g, **CLOSE)
        meta.step()
    assert lr != 0.02


def test_a_discount_lies_between():
    """w_{t+1} = w_t - lr: the tangent is -(1 + mu + ... + mu^t)."""
    lr = double(0.1).requires_grad_()
    online = ForwardMode().iterate(
        lambda w, lr, t: (w - lr, None), double(1.0), lr, range(4), discount=0.5
    )
    tangents = [torch.autograd.grad(w, lr)[0].item() for w, _ in online]
    assert tangents == [-1, -1.5, -1.75, -1.875]


def test_an_endless_run_keeps_nothing():
    log_lr, alive = double(-3.0).requires_grad_(), []

    def endless():
        while True:
            batch = tuple(x.clone() for x in batches(1)[0])
            alive.append(weakref.ref(batch[0]))
            yield batch

    start = (START, diffopt.sgd().init(START))
    for t, ((params, _), _) in enumerate(
        ForwardMode().iterate(regression_step, start, log_lr, endless())
    ):
        torch.autograd.grad(validation(params), log_lr)
        assert sum(ref() is not None for ref in alive) <= 2
        if t == 50:
            break


def test_iterating_without_autograd():
    start = (START, diffopt.sgd().init(START))
    with torch.no_grad():
        log_lr = double(-2.0).requires_grad_()
        *_, (carry, _) = ForwardMode().iterate(regression_step, start, log_lr, batches(3))
    assert not carry[0].requires_grad
    expected, _ = Unrolled().run(regression_step, start, log_lr.detach(), batches(3))
    torch.testing.assert_close(carry[0], expected[0])


# What it cannot do


@pytest.mark.parametrize("name", SECOND_ORDER_IN_REVERSE)
def test_second_derivatives_in_reverse_raise_under(name):
    with pytest.raises(NotImplementedError, match="no second derivatives in reverse mode"):
        TRANSFORMS[name](at(ForwardMode()))


def test_second_derivatives_raise_under_autograd():
    leaves = [x.clone().requires_grad_() for x in INPUTS.values()]
    grads = torch.autograd.grad(outcome(ForwardMode(), *leaves), leaves, create_graph=True)
    assert all(grad.requires_grad for grad in grads)
    with pytest.raises(NotImplementedError, match=r"use Unrolled\(\) or Checkpointed\(\)"):
        torch.autograd.grad(grads[3], leaves[3])


def test_too_many_inputs_raise():
    w = torch.zeros(40, 30, requires_grad=True)
    with pytest.raises(ValueError, match=r"1200 numbers need a gradient.*max_inputs=1200 or more"):
        solve(lambda w: (w**2).sum(), w, adjoint=ForwardMode())
    opt = diffopt.sgd()
    sol = diffopt.minimize(
        lambda w: (w**2).sum(), w, optimizer=opt, hparams=opt.hparams(lr=0.25), steps=2,
        adjoint=ForwardMode(max_inputs=1200),
    )  # fmt: skip
    (grad,) = torch.autograd.grad(sol.params.sum(), w)
    torch.testing.assert_close(grad, torch.full_like(w, 0.25))


def test_one_tensor_used_in_many_places_counts_once():
    lr = double(0.1).requires_grad_()
    opt = diffopt.sgd()
    sol = diffopt.minimize(
        lambda w, scale: (scale * w**2).sum(), START, lr, optimizer=opt, steps=5,
        hparams=lambda t: opt.hparams(lr=lr), adjoint=ForwardMode(max_inputs=1),
    )  # fmt: skip
    (grad,) = torch.autograd.grad(sol.params[0], lr)  # START (1 - 2 lr^2)^5
    torch.testing.assert_close(
        grad, START[0] * 5 * (1 - 2 * lr.detach() ** 2) ** 4 * -4 * lr.detach()
    )


def test_closed_over_tensors_raise():
    scale = double(2.0).requires_grad_()
    with pytest.raises(ValueError, match="loss or step closes over a tensor of shape"):
        solve(lambda w: (scale * w**2).sum(), adjoint=ForwardMode())
    with pytest.raises(ValueError, match="loss or step closes over a tensor of shape"):
        next(ForwardMode().iterate(lambda w, _, x: (scale * w, None), START, (), [0]))


@pytest.mark.parametrize("inputs", [0, 1, 3])
@pytest.mark.parametrize("transform", [lambda f: f, torch.vmap], ids=["autograd", "vmap"])
def test_tensors_closed_over_in_a_later_step_raise(inputs, transform):
    scale = double(2.0).requires_grad_()
    lr = torch.full((inputs,), 0.1, dtype=torch.float64, requires_grad=True) if inputs else 0.1
    opt = diffopt.sgd()

    def end(w):
        return diffopt.minimize(
            lambda w, t: (w**2).sum() * (scale if t == 2 else 1), w, batches=range(4),
            optimizer=opt, hparams=opt.hparams(lr=lr), adjoint=ForwardMode(),
        ).params  # fmt: skip

    start = torch.ones(3, inputs or 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="loss or step closes over a tensor of shape"):
        transform(end)(start if transform is torch.vmap else start[0])


def test_a_tensor_that_the_step_makes_itself_is_not_closed_over():
    def step(w, lr, t):
        inner = w.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad((inner**4).sum(), inner, create_graph=True)
        return w - lr * grad, None

    lr = double(0.1).requires_grad_()
    w, _ = unroll(step, START, lr, 3, adjoint=ForwardMode())
    torch.autograd.grad(w.sum(), lr)


class Cube(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


@pytest.mark.parametrize("numbers", [1, 3])
def test_an_operation_without_a_forward_derivative_raises(numbers):
    lr = torch.full((numbers,), 0.1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"has no forward derivative .*Unrolled"):
        solve(lambda w: Cube.apply(w).sum(), START[:numbers], lr=lr, adjoint=ForwardMode())


@pytest.mark.parametrize("value", [0, -1, 1.5, None, True])
def test_max_inputs_is_checked(value):
    with pytest.raises(ValueError, match=r"max_inputs is .*, but must be an integer >= 1"):
        ForwardMode(value)


@pytest.mark.parametrize("discount", [-0.1, 1.1])
def test_discount_is_checked(discount):
    with pytest.raises(ValueError, match=r"discount is .*, but must be a number from 0 to 1"):
        ForwardMode().iterate(lambda w, lr, t: (w, None), START, START, [0], discount=discount)


def test_tangents_have_the_dtype_of_what_they_belong_to():
    """torch.vmap of torch.func.jvp makes that of a number times a 0-d tensor float64."""
    start = {"w": torch.zeros(3, requires_grad=True), "b": torch.zeros((), requires_grad=True)}
    lr, momentum = torch.tensor(0.1, requires_grad=True), torch.tensor(0.9, requires_grad=True)
    opt = diffopt.sgd()

    def grads(adjoint):
        sol = diffopt.minimize(
            lambda p: 0.5 * ((p["w"] + p["b"] - 1) ** 2).sum(), start, optimizer=opt,
            hparams=opt.hparams(lr=lr, momentum=momentum), steps=5, adjoint=adjoint,
        )  # fmt: skip
        value = sol.params["w"].sum() + sol.params["b"]
        return torch.autograd.grad(value, (lr, momentum, *start.values()))

    torch.testing.assert_close(grads(ForwardMode()), grads(Unrolled()))


@pytest.mark.parametrize("adjoint", [ForwardMode(), Checkpointed(hvp="forward-over-reverse")])
def test_loops_in_threads_do_not_disturb_each_other(adjoint):
    opt = diffopt.adam()
    x = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3)

    def loss(w):
        return (x @ w.tanh()).square().mean() + w.pow(4).sum()

    def hypergradient(rate, adjoint):
        lr = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
        sol = diffopt.minimize(
            loss, torch.ones(3, dtype=torch.float64), optimizer=opt, hparams=opt.hparams(lr=lr),
            steps=10, adjoint=adjoint,
        )  # fmt: skip
        return torch.autograd.grad(sol.losses.sum(), lr)[0]

    rates = [0.01, 0.02, 0.03, 0.04]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda rate: hypergradient(rate, adjoint), rates))
    torch.testing.assert_close(found, [hypergradient(rate, Unrolled()) for rate in rates])


def hooked(w, a, hook):
    inner = (w * a).sin()
    if inner.requires_grad:
        inner.register_hook(hook)
    return (inner**2).sum()


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    "how", [ForwardMode(), Checkpointed(hvp="forward-over-reverse"), "jvp"], ids=["F", "C", "jvp"]
)
def test_hooks_in_a_loss_that_change_gradients_are_refused_and_others_called(how, number):
    opt, seen = diffopt.sgd(), []

    def final(a, lr, hook, adjoint):
        return diffopt.minimize(
            lambda w, a: hooked(w, a, hook),
            torch.full((2,), 0.3, dtype=torch.float64),
            a,
            optimizer=opt,
            hparams=opt.hparams(lr=lr),
            steps=2,
            adjoint=adjoint,
        ).params.sum()

    def derivative(hook, adjoint):
        a, lr = (torch.tensor(x, dtype=torch.float64) for x in (0.7, 0.1))
        if adjoint == "jvp":
            given = (a, lr)[:number]
            run = lambda *xs: final(*xs, *(a, lr)[number:], hook, Unrolled())  # noqa: E731
            return torch.func.jvp(run, given, tuple(map(torch.ones_like, given)))[1]
        inputs = [x.requires_grad_() for x in (a, lr)[:number]]
        return sum(torch.autograd.grad(final(a, lr, hook, adjoint), inputs))

    expected = derivative(seen.append, Unrolled())
    for looks in (seen.append, lambda grad: grad):
        torch.testing.assert_close(derivative(looks, how), expected)
    with pytest.raises(NotImplementedError, match="register_hook"):
        derivative(lambda grad: 2 * grad, how)


@pytest.mark.parametrize("adjoint", [ForwardMode(), Checkpointed(hvp="forward-over-reverse")])
@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.expand(2, 3),
        lambda w: torch.complex(w, w).conj(),
        lambda w: torch.complex(w, -w).conj().imag,
    ],
    ids=["expanded", "conjugated", "negated"],
)
def test_params_that_are_lazy_or_expanded_views_have_their_derivatives(view, adjoint):
    opt = diffopt.adam()

    def gradients(adjoint):
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        w = view(torch.arange(1.0, 4.0, dtype=torch.float64)).detach().requires_grad_()
        sol = diffopt.minimize(
            lambda w: (w.abs() ** 4).sum() / 9, w, optimizer=opt, hparams=opt.hparams(lr=lr),
            steps=3, adjoint=adjoint,
        )  # fmt: skip
        return torch.autograd.grad(sol.params.abs().square().sum(), (lr, w))

    torch.testing.assert_close(gradients(adjoint), gradients(Unrolled()))
