"""Reversible against Unrolled, against autograd on its own arithmetic, and its way back."""

import weakref
from fractions import Fraction

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._pytree import tree_leaves

import diffopt
from diffopt.adjoint import Reversible, Unrolled, unroll
from test_memory import Census, no_garbage_collector

STEPS = 7
BATCHES = torch.linspace(-1, 1, 3 * STEPS, dtype=torch.float64).reshape(STEPS, 3)
INPUTS = {
    "a": torch.tensor([0.3, -1.2, 0.8, 0.1], dtype=torch.float64),
    "c": torch.tensor([0.5, 0.2, -0.7], dtype=torch.float64),
    "shift": torch.tensor([0.1, 0.4, -0.3, 0.9], dtype=torch.float64),
    "lr": torch.tensor(0.05, dtype=torch.float64),
    "momentum": torch.tensor(0.8, dtype=torch.float64),
    "dampening": torch.tensor(0.2, dtype=torch.float64),
    "weight_decay": torch.tensor(0.1, dtype=torch.float64),
    "batches": BATCHES,
    "momentum_buffer": torch.tensor([0.1, 0.2, -0.1, 0.3], dtype=torch.float64),
}
NAMES = tuple(INPUTS)
EVERY = tuple(range(len(INPUTS)))
# A momentum of n / 2^30 is wrong by 5e-10; positions are multiples of 1e-12.
ROUNDED = {"rtol": 2e-8, "atol": 2e-8}


def loss(w, shift, x):
    quartic = ((w["a"] - shift) ** 4).sum() + w["a"][0] * w["a"][1] * w["a"][3]
    return 0.1 * quartic + torch.sin(w["c"] * x).sum() + w["a"][0] * w["c"][1]


def solution(adjoint, a, c, shift, lr, momentum, dampening, weight_decay, batches, buffer, **flags):
    opt = diffopt.sgd(**flags)
    params = {"a": a, "c": c}
    state = opt.init(params)
    state = state._replace(
        step=state.step + 1,  # or the first step would not be dampened
        momentum_buffer={"a": buffer, "c": state.momentum_buffer["c"]},
    )
    hparams = opt.hparams(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay)
    return diffopt.minimize(
        loss, params, shift, optimizer=opt, hparams=hparams, batches=batches.unbind(),
        state=state, adjoint=adjoint,
    )  # fmt: skip


def outcome(adjoint, *inputs, **flags):
    """A number that depends on all of a solution."""
    sol = solution(adjoint, *inputs, **flags)
    end = (sol.params["a"] ** 2).sum() + sol.params["c"].sin().sum()
    return end + (sol.losses**2).sum() + sol.state.momentum_buffer["a"].sum()


def at(adjoint, **flags):
    return lambda *inputs: outcome(adjoint, *inputs, **flags)


def leaves():
    return [x.clone().requires_grad_() for x in INPUTS.values()]


def solve(loss, w, *args, steps=5, adjoint=Reversible(), opt=None, **hparams):  # noqa: B008
    opt = diffopt.sgd() if opt is None else opt
    hparams = {"lr": 0.1, "momentum": 0.9} | hparams
    return diffopt.minimize(
        loss, w, *args, optimizer=opt, hparams=opt.hparams(**hparams), steps=steps, adjoint=adjoint
    )


# Derivatives


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("hvp", ["forward-over-reverse", "reverse-over-reverse"])
def test_gradients_to_every_input_equal_unrolled(hvp, maximize):
    def derivatives(adjoint):
        inputs = leaves()
        value = outcome(adjoint, *inputs, maximize=maximize)
        return [value, *torch.autograd.grad(value, inputs)]

    torch.testing.assert_close(derivatives(Reversible(hvp=hvp)), derivatives(Unrolled()), **ROUNDED)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_to_one_input_alone_equals_unrolled(name):
    def derivative(adjoint):
        inputs = {key: x.clone().requires_grad_(key == name) for key, x in INPUTS.items()}
        return torch.autograd.grad(outcome(adjoint, *inputs.values()), inputs[name])

    torch.testing.assert_close(derivative(Reversible()), derivative(Unrolled()), **ROUNDED)


def test_agrees_with_finite_differences():
    """With differences that are great against the fraction that the momentum is rounded to."""
    assert gradcheck(at(Reversible(bits=50)), leaves(), eps=1e-4, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bits", [30, 40])
def test_equals_autograd_on_the_same_arithmetic(bits):
    """Python's integers and fractions; autograd sees the real-valued formula."""
    steps, scale = 20, 2**bits
    target = torch.tensor([0.3, 0.1, -0.4], dtype=torch.float64)

    def loss(w, target):
        return 0.5 * ((w - target) ** 2).sum() + 0.1 * ((w - target) ** 4).sum() + w.prod()

    def straight_through(value, integers):
        """`integers / scale`, with the derivative of `value`."""
        images = torch.tensor([i / scale for i in integers], dtype=torch.float64)
        return value + (images - value).detach()

    def rounded(x):
        return [round(Fraction(y) * scale) for y in x.tolist()]

    def reference(w, lr, momentum, decay, target):
        p, b = rounded(w), [0, 0, 0]
        fraction, v = Fraction(round(momentum.item() * 2**30), 2**30), torch.zeros_like(w)
        momentum = momentum + (float(fraction) - momentum).detach()
        w = straight_through(w, p)
        for _ in range(steps):
            (g,) = torch.autograd.grad(loss(w, target), w, create_graph=True)
            g = g + decay * w
            b = [(i * fraction).__floor__() + j for i, j in zip(b, rounded(g), strict=True)]
            v = straight_through(momentum * v + g, b)
            move = lr * v
            p = [i - j for i, j in zip(p, rounded(move), strict=True)]
            w = straight_through(w - move, p)
        return w

    def mine(w, lr, momentum, decay, target):
        hparams = {"lr": lr, "momentum": momentum, "weight_decay": decay}
        return solve(loss, w, target, steps=steps, adjoint=Reversible(bits), **hparams).params

    results = []
    for run in (mine, reference):
        inputs = [
            torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True),
            *(torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.02, 0.9, 0.1)),
            target.clone().requires_grad_(),
        ]
        end = run(*inputs)
        results.append([end, *torch.autograd.grad((end**2).sum(), inputs)])
    assert results[0][0].tolist() == results[1][0].tolist()
    close = 1e-10 if bits == 40 else 1e-7  # one rounding of the units
    torch.testing.assert_close(results[0], results[1], rtol=close, atol=close)


@pytest.mark.parametrize("momentum", [0.05, 0.5, 0.7, 0.99, 1.0])
def test_every_momentum(momentum):
    def derivatives(adjoint):
        inputs = leaves()
        with torch.no_grad():
            inputs[NAMES.index("momentum")].fill_(momentum)
        value = outcome(adjoint, *inputs)
        return [value, *torch.autograd.grad(value, inputs)]

    torch.testing.assert_close(derivatives(Reversible()), derivatives(Unrolled()), **ROUNDED)


def test_hyperparameters_by_step():
    def derivatives(adjoint):
        rates = torch.linspace(0.01, 0.1, 5, dtype=torch.float64, requires_grad=True)
        momenta = torch.linspace(0.5, 0.9, 5, dtype=torch.float64, requires_grad=True)
        opt = diffopt.sgd()
        sol = diffopt.minimize(
            loss, {"a": INPUTS["a"], "c": INPUTS["c"]}, INPUTS["shift"], batches=BATCHES[:5],
            optimizer=opt, hparams=lambda t: opt.hparams(lr=rates[t], momentum=momenta[t]),
            adjoint=adjoint,
        )  # fmt: skip
        return torch.autograd.grad(sol.params["a"].sin().sum() + sol.losses[3], [rates, momenta])

    torch.testing.assert_close(derivatives(Reversible()), derivatives(Unrolled()), **ROUNDED)


def test_hyperparameters_for_each_tensor_and_each_weight():
    def derivatives(adjoint):
        inputs = leaves()
        lr = {"a": torch.full((4,), 0.05, dtype=torch.float64).requires_grad_(), "c": inputs[3]}
        momentum = {"a": torch.linspace(0.3, 0.9, 4).double().requires_grad_(), "c": 0.6}
        inputs[3:5] = [lr, momentum]
        tensors = [*inputs[:3], *lr.values(), momentum["a"], *inputs[5:]]
        return torch.autograd.grad(outcome(adjoint, *inputs), tensors)

    torch.testing.assert_close(derivatives(Reversible()), derivatives(Unrolled()), **ROUNDED)


def test_parameters_of_one_number():
    def derivatives(adjoint):
        w, lr = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.0, 0.1))
        rates = {"lr": lr.reshape(1), "momentum": torch.tensor([0.9])}
        return torch.autograd.grad(
            solve(lambda w: w.cos(), w, adjoint=adjoint, **rates).params, [w, lr]
        )

    torch.testing.assert_close(derivatives(Reversible()), derivatives(Unrolled()), **ROUNDED)


def test_losses_and_aux_carry_derivatives_buffers_stay():
    def derivatives(adjoint):
        scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        mask = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
        opt = diffopt.sgd()

        def masked(w, mask, scale):
            value = (mask * (w - scale) ** 4).sum()
            return value, mask, {"w": scale * w, "name": "x", "mask": mask, "n": torch.tensor(3)}

        sol = diffopt.minimize(
            masked, INPUTS["c"], scale, buffers=mask, has_aux=True, optimizer=opt,
            hparams=opt.hparams(lr=0.1, momentum=0.9), steps=4, adjoint=adjoint,
        )  # fmt: skip
        assert [(aux["name"], aux["n"].item()) for aux in sol.aux] == [("x", 3)] * 4
        value = sol.losses[2] + sol.aux[1]["w"].sum() + (sol.buffers**2).sum()
        early = torch.autograd.grad(sol.aux[1]["mask"].sum(), mask, retain_graph=True)
        return [value, *early, *torch.autograd.grad(value, [scale, mask])]

    torch.testing.assert_close(derivatives(Reversible()), derivatives(Unrolled()), **ROUNDED)


@pytest.mark.parametrize("hvp", ["forward-over-reverse", "reverse-over-reverse"])
def test_running_statistics_are_constants(hvp):
    norm = diffopt.nn.functionalize(torch.nn.BatchNorm1d(3).double().eval())
    x = BATCHES + torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)

    def loss(params, buffers, scale):
        y, buffers = norm(params, buffers, x)
        return (scale * (y - 1) ** 2).mean(), buffers

    def derivatives(adjoint):
        scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        opt = diffopt.sgd()
        sol = diffopt.minimize(
            loss, norm.params, scale, buffers=norm.buffers, optimizer=opt,
            hparams=opt.hparams(lr=0.1, momentum=0.9), steps=4, adjoint=adjoint,
        )  # fmt: skip
        assert not any(buffer.requires_grad for buffer in sol.buffers.values())
        assert not sol.state.step.requires_grad
        leaves = [scale, *norm.params.values()]
        return torch.autograd.grad(loss(sol.params, sol.buffers, 1.0)[0], leaves)

    torch.testing.assert_close(derivatives(Reversible(hvp=hvp)), derivatives(Unrolled()), **ROUNDED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    def run(adjoint):
        w = torch.tensor([1.0, -0.5], dtype=dtype, requires_grad=True)
        lr = torch.tensor(0.1, requires_grad=True)
        sol = solve(lambda w: (w**4).sum(), w, steps=3, adjoint=adjoint, lr=lr)
        assert sol.params.dtype == dtype
        grads = torch.autograd.grad(sol.params.sum(), [w, lr])
        assert [x.dtype for x in grads] == [dtype, torch.float32]
        return [sol.params.detach(), sol.state.momentum_buffer.detach(), *grads]

    eps = max(torch.finfo(dtype).eps, 1e-9)
    torch.testing.assert_close(run(Reversible()), run(Unrolled()), rtol=32 * eps, atol=32 * eps)


# torch.func


def stacked():
    return [torch.stack([x, 0.9 * x]) for x in INPUTS.values()]


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f, EVERY)(*INPUTS.values()),
    "vmap": lambda f: torch.vmap(f)(*stacked()),
    "vmap grad": lambda f: torch.vmap(torch.func.grad(f, EVERY))(*stacked()),
    "grad vmap": lambda f: torch.func.grad(lambda *v: torch.vmap(f)(*v).sum(), EVERY)(*stacked()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_equals_unrolled_under(name):
    transform = TRANSFORMS[name]
    torch.testing.assert_close(
        transform(at(Reversible())), transform(at(Unrolled())), check_stride=False, **ROUNDED
    )


@pytest.mark.parametrize("batched", [False, True])
def test_equals_unrolled_under_jacrev(batched):
    def jacobian(adjoint):
        transform = torch.func.jacrev(lambda *inputs: solution(adjoint, *inputs).losses, EVERY)
        return torch.vmap(transform)(*stacked()) if batched else transform(*INPUTS.values())

    torch.testing.assert_close(jacobian(Reversible()), jacobian(Unrolled()), **ROUNDED)


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

    torch.testing.assert_close(derivative(Reversible()), derivative(Unrolled()), **ROUNDED)


def test_batched_gradients_of_autograd():
    def losses(lr):
        return solve(lambda w: (w**4).sum(), INPUTS["c"], lr=lr, weight_decay=lr[0]).losses

    lr = torch.tensor([0.01, 0.02, 0.03], dtype=torch.float64)
    one_by_one = torch.autograd.functional.jacobian(losses, lr)
    at_once = torch.autograd.functional.jacobian(losses, lr, vectorize=True)
    torch.testing.assert_close(at_once, one_by_one)


# The way back


@pytest.mark.slow
def test_2_500_steps_come_back_bit_for_bit():
    """The loss sees the same weights on the way back, from the last step to the first."""
    torch.manual_seed(0)
    w, data, aim = torch.randn(8), torch.randn(6, 8), torch.randn(6)
    seen = []

    def loss(w, aim):
        seen.append(w.detach().clone())
        return ((torch.tanh(data @ w) - aim) ** 2).mean()

    w.requires_grad_()
    sol = solve(loss, w, aim, steps=2_500, lr=0.05)
    forth = seen[1:]  # the first call looks for tensors that are closed over
    assert len(forth) == 2_500
    assert sum(x.numel() for x in sol.params.grad_fn.saved_tensors) < 8 * 20
    seen.clear()
    torch.autograd.grad(sol.losses[-1], w)
    back = seen[::2]  # for the gradient, and for its derivative
    assert len(back) == len(seen[1::2]) == 2_500
    assert all(torch.equal(x, y) for x, y in zip(forth, reversed(back), strict=True))
    assert torch.equal(back[-1], w)
    assert not torch.equal(forth[-1], forth[0])


def test_a_loss_that_is_not_deterministic_raises():
    calls = []

    def loss(w):
        calls.append(0)
        return (w**2).sum() * (1 + 1e-6 * len(calls))

    w = torch.ones(3, requires_grad=True)
    sol = solve(loss, w)
    with pytest.raises(RuntimeError, match="did not recover the initial params"):
        torch.autograd.grad(sol.params.sum(), w)


def test_random_numbers_repeat_themselves():
    def derivatives(adjoint):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        w = INPUTS["c"].clone().requires_grad_()

        def loss(w, generator):
            noise = torch.randn(3, dtype=torch.float64, generator=generator)
            return torch.dropout((w - noise) ** 2, 0.5, True).sum()

        sol = solve(loss, w, generator, adjoint=adjoint)
        after = torch.rand(1)
        grads = torch.autograd.grad((sol.params**2).sum(), w)
        return [sol.params, *grads, after, torch.rand(1, generator=generator), torch.rand(1)]

    torch.testing.assert_close(derivatives(Reversible()), derivatives(Unrolled()), **ROUNDED)


def test_the_backward_pass_can_be_run_twice():
    w = INPUTS["c"].clone().requires_grad_()
    sol = solve(lambda w: (w**4).sum(), w, steps=400)
    first = torch.autograd.grad(sol.params[0], w, retain_graph=True)
    second = torch.autograd.grad(sol.params[0], w)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_values_are_the_same_without_autograd():
    w = INPUTS["c"].clone().requires_grad_()
    sol = solve(lambda w: (w**4).sum(), w)
    with torch.no_grad():
        again = solve(lambda w: (w**4).sum(), w)
    assert not again.params.requires_grad
    assert torch.equal(sol.params, again.params)
    assert torch.equal(sol.losses, again.losses)
    assert solve(lambda w: (w**4).sum(), w, steps=0).params is w


def test_it_goes_on_from_the_state():
    whole = solve(lambda w: (w**4).sum(), INPUTS["c"], steps=5)
    head = solve(lambda w: (w**4).sum(), INPUTS["c"], steps=2)
    opt = diffopt.sgd()
    tail = diffopt.minimize(
        lambda w: (w**4).sum(), head.params, optimizer=opt, state=head.state, steps=3,
        hparams=opt.hparams(lr=0.1, momentum=0.9), adjoint=Reversible(),
    )  # fmt: skip
    assert torch.equal(tail.params, whole.params)
    assert tail.state.step == whole.state.step == 5


# Memory


def test_memory_is_flat_up_to_the_tape():
    def run(steps):
        loss, w = Census(), torch.linspace(-1, 1, 4, dtype=torch.float64, requires_grad=True)
        with no_garbage_collector():
            sol = solve(loss, w, steps=steps)
            forth = loss.most
            torch.autograd.grad(sol.params.sum(), w)
            inner = weakref.ref(sol.params)
            del sol
            return forth, loss.most, loss.alive(), inner()

    run(1)
    assert run(10) == run(300) == (2, 2, 0, None)


@pytest.mark.parametrize(("momentum", "words"), [(0.5, 30), (0.9, 7), (0.99, 1), (1.0, 1)])
def test_the_tape_has_as_many_bits_as_it_must(momentum, words):
    """2 (1 - momentum) bits for every step and weight: one word has 63."""
    torch.manual_seed(0)
    w, steps = torch.randn(100, requires_grad=True), 1600
    sol = solve(lambda w: w.cos().sum(), w, steps=steps, lr=0.01, momentum=momentum)
    saved = sol.params.grad_fn.saved_tensors
    # The inputs are params, step and momentum buffer; params and buffer are among the integers.
    assert steps * 2 * (1 - momentum) / 63 <= len(saved) - 5 <= words * 2
    assert sum(x.numel() * x.element_size() for x in saved) < 100 * steps


# What it cannot do


def test_second_derivatives_raise():
    inputs = leaves()
    grads = torch.autograd.grad(outcome(Reversible(), *inputs), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="Reversible has no second derivatives"):
        torch.autograd.grad(grads[3], inputs[3])
    with pytest.raises(NotImplementedError, match="Reversible has no second derivatives"):
        torch.func.grad(lambda *v: torch.func.grad(at(Reversible()), 3)(*v), 3)(*INPUTS.values())


@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.hessian])
def test_forward_mode_raises(transform):
    with pytest.raises(NotImplementedError, match=r"neither in forward mode nor .*Unrolled\(\)"):
        transform(at(Reversible()), 3)(*INPUTS.values())


def test_compiling_raises():
    def run(w):
        return solve(lambda w: (w**4).sum(), w).params

    with pytest.raises(Exception, match=r"nor under torch\.compile"):
        torch.compile(run, backend="eager", fullgraph=True)(INPUTS["c"])


def test_closed_over_tensors_raise():
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="loss closes over a tensor of shape"):
        solve(lambda w: (scale * w**2).sum(), INPUTS["c"])


@pytest.mark.parametrize("hvp", ["forward-over-reverse", "reverse-over-reverse"])
def test_tensors_closed_over_in_a_later_step_raise(hvp):
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    opt = diffopt.sgd()
    with pytest.raises(ValueError, match="loss closes over a tensor of shape"):
        diffopt.minimize(
            lambda w, lr, t: (lr * w**2).sum() * (scale if t == 2 else 1), INPUTS["c"],
            INPUTS["lr"].clone().requires_grad_(), batches=range(4), optimizer=opt,
            hparams=opt.hparams(lr=0.1, momentum=0.9), adjoint=Reversible(hvp=hvp),
        )  # fmt: skip


def test_another_step_raises():
    with pytest.raises(TypeError, match="Reversible requires minimize"):
        unroll(lambda y, _, t: (y, None), torch.ones(2), length=3, adjoint=Reversible())


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (diffopt.adam(), r"Reversible requires diffopt.sgd\(\)"),
        (diffopt.rmsprop(), r"Reversible requires diffopt.sgd\(\)"),
        (type("Own", (diffopt.sgd,), {"rule": lambda *_: None})(), r"requires diffopt.sgd\(\)"),
        (diffopt.sgd(momentum=False), r"requires sgd\(momentum=True\)"),
        (diffopt.sgd(nesterov=True), r"requires sgd\(nesterov=False\)"),
    ],
)
def test_other_optimizers_raise(optimizer, message):
    with pytest.raises(TypeError, match=message):
        diffopt.minimize(
            lambda w: (w**2).sum(), INPUTS["c"], optimizer=optimizer,
            hparams=optimizer.hparams(lr=0.1), steps=2, adjoint=Reversible(),
        )  # fmt: skip


@pytest.mark.parametrize(
    "momentum",
    [0.0, 1e-10, 1.5, float("inf"), torch.tensor(0.0), torch.tensor([0.9, 0, 0.9]),
     {"a": 0.9, "c": 0.0}, {"a": torch.tensor(float("nan")), "c": 0.5}],
)  # fmt: skip
def test_a_momentum_of_zero_loses_everything(momentum):
    params = {"a": INPUTS["a"], "c": INPUTS["c"]} if isinstance(momentum, dict) else INPUTS["c"]
    with pytest.raises(ValueError, match=r"momentum is .*, but must be > 0 and <= 1 .*discards"):
        solve(lambda w: sum((x**2).sum() for x in tree_leaves(w)), params, momentum=momentum)


def test_parameters_without_numbers():
    w = {"some": INPUTS["c"].clone().requires_grad_(), "none": torch.zeros(0, 3)}
    sol = solve(lambda w: (w["some"] ** 4).sum() + w["none"].sum(), w, steps=400, momentum=0.5)
    assert sol.params["none"].shape == (0, 3)
    assert torch.autograd.grad(sol.params["some"].sum(), w["some"])[0].isfinite().all()


@pytest.mark.parametrize("lr", [1e30, 3.0, float("nan")])
def test_numbers_out_of_range_raise(lr):
    lr = torch.tensor(lr, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"not finite, or too large for this number of fractional"):
        solve(lambda w: (w**2).sum(), INPUTS["c"], lr=lr, steps=300)
    with pytest.raises(ValueError, match=r"not finite, or too large for this number of fractional"):
        solve(lambda w: (w**2).sum(), 1e7 * INPUTS["c"])


def test_changing_buffers_raise():
    def run(new):
        opt = diffopt.sgd()
        buffers = {"count": torch.tensor(0), "mean": torch.zeros(3, dtype=torch.float64)}
        return diffopt.minimize(
            lambda w, buffers: ((w**2).sum(), new(w, buffers)), INPUTS["c"], optimizer=opt,
            hparams=opt.hparams(lr=0.1, momentum=0.9), steps=3, buffers=buffers,
            adjoint=Reversible(),
        )  # fmt: skip

    for new in (
        lambda w, buffers: buffers | {"count": buffers["count"] + 1},
        lambda w, buffers: buffers | {"mean": 0.9 * buffers["mean"] + w},
    ):
        with pytest.raises(ValueError, match="loss changes its buffers, which Reversible cannot"):
            run(new)
    assert run(lambda w, buffers: buffers | {"count": buffers["count"] + 0}).buffers["count"] == 0


def test_other_errors():
    opt, w = diffopt.sgd(), INPUTS["c"]
    call = {"optimizer": opt, "hparams": opt.hparams(lr=0.1, momentum=0.9), "steps": 2}
    call["adjoint"] = Reversible()
    with pytest.raises(ValueError, match="does not support tol"):
        diffopt.minimize(lambda w: (w**2).sum(), w, tol=0.1, **call)
    params = {"w": torch.ones(2, dtype=torch.complex64)}
    with pytest.raises(ValueError, match=r"params\['w'\] is complex"):
        diffopt.minimize(lambda p: p["w"].abs().sum(), params, **call)
    with pytest.raises(TypeError, match="state has type tuple"):
        diffopt.minimize(lambda w: (w**2).sum(), w, state=(), **call)


@pytest.mark.parametrize("bits", [0, 62, 40.0, None])
def test_bits_are_checked(bits):
    with pytest.raises(ValueError, match=r"bits is .*, but must be an integer from 1 to 61"):
        Reversible(bits)


def test_hvp_is_checked():
    with pytest.raises(ValueError, match="hvp is 'reverse', but must be"):
        Reversible(hvp="reverse")
