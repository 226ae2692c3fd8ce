"""What diffopt.inspect shows, against closed forms and planted faults."""

import sys
import weakref
from dataclasses import replace

import pytest
import torch

import diffopt
from diffopt import inspect
from diffopt.adjoint import (
    Checkpointed,
    Evolution,
    FirstOrder,
    ForwardMode,
    Implicit,
    OneStep,
    Reversible,
    Truncated,
    Unrolled,
)
from diffopt.optimizer import Optimizer

F64 = torch.float64
STEPS = 6
LR = 0.3
H = torch.tensor([[2.0, 0.4], [0.4, 0.7]], dtype=F64)
W = torch.tensor([1.0, -2.0], dtype=F64)
V = torch.tensor([0.6, 0.3], dtype=F64)
EXACT = [
    Unrolled(),
    Checkpointed(),
    Checkpointed(levels=2),
    Checkpointed(segments=1),
    Checkpointed(hvp="forward-over-reverse"),
    Checkpointed(levels=3, hvp="forward-over-reverse"),
]
EVERY = [*EXACT, Truncated(4), FirstOrder()]


def quadratic(w):
    return 0.5 * w @ H @ w


def descend(trace, w=W, lr=LR, loss=quadratic, steps=STEPS, **kwargs):
    opt = diffopt.sgd()
    return diffopt.minimize(
        loss, w, optimizer=opt, hparams=opt.hparams(lr=lr), steps=steps, adjoint=trace, **kwargs
    )


def leaf(value):
    return torch.as_tensor(value, dtype=F64).clone().requires_grad_()


def powers(matrix, vector, count=STEPS + 1):
    """Norms of matrix^t vector."""
    return torch.stack([torch.linalg.matrix_power(matrix, t) @ vector for t in range(count)]).norm(
        dim=1
    )


# Norms


@pytest.mark.parametrize("adjoint", EXACT, ids=str)
def test_norms_of_a_quadratic_are_those_of_the_closed_form(adjoint):
    trace, w = inspect.Trace(adjoint), leaf(W)
    sol = descend(trace, w)
    torch.autograd.grad(sol.params @ V, w)
    step = torch.eye(2, dtype=F64) - LR * H
    norms = trace.norms
    points = torch.stack([torch.linalg.matrix_power(step, t) @ W for t in range(STEPS)])
    torch.testing.assert_close(norms.adjoint, powers(step, V).flip(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(norms.grads, (points @ H).norm(dim=1), rtol=1e-12, atol=0)
    torch.testing.assert_close(norms.updates, LR * norms.grads, rtol=1e-12, atol=0)
    torch.testing.assert_close(norms.losses, sol.losses.detach(), rtol=0, atol=0)
    assert (norms.state_adjoint.nan_to_num() == 0).all()  # there is no momentum


def test_norms_are_unknown_before_the_backward_pass():
    trace = inspect.Trace()
    descend(trace, leaf(W))
    assert trace.norms.adjoint.isnan().all()
    assert trace.norms.adjoint.shape == (STEPS + 1,)
    assert trace.norms.grads.isfinite().all()


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed()], ids=str)
def test_the_adjoint_of_an_exploding_loop_grows_backwards(adjoint):
    trace, w = inspect.Trace(adjoint), leaf(1.0)
    sol = descend(trace, w, lr=3.0, loss=lambda w: 0.5 * w**2)
    torch.autograd.grad(sol.params, w)
    expected = 2.0 ** torch.arange(STEPS, -1, -1, dtype=F64)
    torch.testing.assert_close(trace.norms.adjoint, expected, rtol=0, atol=0)


def test_the_adjoint_of_the_state_is_that_of_momentum():
    trace, w, opt, mu = inspect.Trace(), leaf(W), diffopt.sgd(), 0.9
    hparams = opt.hparams(lr=LR, momentum=mu)
    sol = diffopt.minimize(quadratic, w, optimizer=opt, hparams=hparams, steps=STEPS, adjoint=trace)
    torch.autograd.grad(sol.params @ V, w)
    adjoint = trace.norms.state_adjoint
    assert adjoint[-1].isnan()  # the outer loss does not depend on the last state
    torch.testing.assert_close(adjoint[-2], LR * mu * V.norm(), rtol=1e-12, atol=0)


def test_truncated_ends_the_adjoint_and_first_order_keeps_it_constant():
    trace, lr = inspect.Trace(Truncated(2)), leaf(LR)
    torch.autograd.grad(descend(trace, W, lr).params @ V, lr)
    step = torch.eye(2, dtype=F64) - LR * H
    torch.testing.assert_close(trace.norms.adjoint[-2:], powers(step, V, 2).flip(0))
    assert trace.norms.adjoint[:-2].isnan().all()
    assert trace.events[-1] == inspect.Event("adjoint", "cut", STEPS - 2)
    trace, w = inspect.Trace(FirstOrder()), leaf(W)
    torch.autograd.grad(descend(trace, w).params @ V, w)
    torch.testing.assert_close(trace.norms.adjoint, V.norm().expand(STEPS + 1))


def test_the_carry_of_any_step_function_is_traced():
    trace, rate = inspect.Trace(), leaf(0.5)

    def step(y, rate, t):
        return y * (1 + rate), t

    y, numbers = diffopt.adjoint.unroll(step, torch.tensor(1.0).double(), rate, 3, adjoint=trace)
    torch.autograd.grad(y, rate)
    assert numbers == [0, 1, 2]
    assert trace.norms.adjoint[1:].tolist() == [2.25, 1.5, 1.0]
    assert trace.norms.grads.isnan().all()


def test_norms_have_a_column_for_each_example_under_vmap():
    trace = inspect.Trace()

    def outcome(w, lr):
        return descend(trace, w, lr).params @ V

    ws, lrs = torch.stack([W, 2 * W]), torch.tensor([LR, 0.1], dtype=F64)
    torch.vmap(torch.func.grad(outcome))(ws, lrs)
    inside = trace.norms
    torch.func.grad(lambda ws: torch.vmap(outcome)(ws, lrs).sum())(ws)
    outside = trace.norms
    for i, lr in enumerate(lrs):
        expected = powers(torch.eye(2, dtype=F64) - lr * H, V).flip(0)
        for norms in (inside, outside):
            torch.testing.assert_close(norms.adjoint[:, i], expected, rtol=1e-12, atol=0)
            assert norms.losses.shape == norms.grads.shape == (STEPS, 2)


def test_the_last_backward_pass_counts_and_passes_do_not_mix():
    trace, w = inspect.Trace(), leaf(W)

    def loss(w):
        return quadratic(w), 3 * w

    sol = descend(trace, w, loss=loss, has_aux=True)
    torch.autograd.grad(sol.aux[2].sum(), w, retain_graph=True)
    assert trace.norms.adjoint.isnan().tolist() == [False] * 3 + [True] * 4
    torch.autograd.grad(sol.params @ V, w, retain_graph=True)
    first = trace.norms.adjoint
    torch.autograd.grad(2 * sol.params @ V, w, retain_graph=True)
    torch.testing.assert_close(trace.norms.adjoint, 2 * first)
    torch.autograd.grad(sol.aux[2].sum(), w)
    assert trace.norms.adjoint.isnan().tolist() == [False] * 3 + [True] * 4


def test_an_older_loop_does_not_write_into_a_newer_one():
    trace, w = inspect.Trace(), leaf(W)
    old = descend(trace, w)
    descend(trace, w, steps=2)
    torch.autograd.grad(old.params @ V, w)
    assert trace.norms.adjoint.isnan().all()
    assert trace.norms.losses.shape == (2,)


def test_norms_neither_overflow_nor_underflow_in_float32():
    trace = inspect.Trace()
    w = torch.tensor([1e30, 1e30], requires_grad=True)
    sol = descend(trace, w, lr=0.5, loss=lambda w: (1e-30 * w).sum(), steps=1)
    torch.autograd.grad((1e-30 * sol.params).sum(), w)
    expected = torch.tensor(2.0, dtype=F64).sqrt() * 1e-30
    torch.testing.assert_close(trace.norms.adjoint, expected.expand(2), rtol=1e-6, atol=0)
    assert trace.norms.grads[0] > 0


class Token:
    """Lives as long as the graph that holds it."""


class Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tokens):
        ctx.token = Token()
        tokens.append(weakref.ref(ctx.token))
        return x.clone()

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent, None


def test_a_trace_keeps_no_graph_alive():
    trace, tokens = inspect.Trace(), []
    sol = descend(trace, leaf(W), loss=lambda w: quadratic(Hold.apply(w, tokens)))
    assert all(token() is not None for token in tokens)
    del sol
    assert len(tokens) == STEPS
    assert all(token() is None for token in tokens)
    assert trace.norms.grads.isfinite().all()


# Tracing changes nothing


def derivatives(adjoint):
    inputs = [leaf(W), leaf(LR), leaf(0.9), leaf(0.01)]
    w, lr, momentum, shift = inputs
    opt = diffopt.sgd()
    sol = diffopt.minimize(
        lambda w, s, x: quadratic(w - s * x) + (w**4).sum(), {"w": w}["w"], shift,
        batches=[1.0, 2.0, 3.0, 2.0, 1.0, 0.5], optimizer=opt,
        hparams=opt.hparams(lr=0.1 * lr, momentum=momentum), adjoint=adjoint,
    )  # fmt: skip
    outer = sol.params @ V + sol.losses.sum()
    grads = torch.autograd.grad(outer, inputs, create_graph=True, allow_unused=True)
    total = sum((g**2).sum() for g in grads if g is not None)
    again = torch.autograd.grad(total, inputs, allow_unused=True)
    return [sol, grads, again]


@pytest.mark.parametrize("adjoint", EVERY, ids=str)
def test_values_and_both_derivatives_are_those_without_trace(adjoint):
    expected, found = derivatives(adjoint), derivatives(inspect.Trace(adjoint))
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    # autograd adds up what arrives at a tensor in another order
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-14, atol=0)


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f, (0, 1))(W, torch.tensor(LR).double()),
    "vmap grad": lambda f: torch.vmap(torch.func.grad(f, (0, 1)), (0, None))(
        torch.stack([W, -W]), torch.tensor(LR).double()
    ),
    "grad vmap": lambda f: torch.func.grad(
        lambda lr: torch.vmap(f, (0, None))(torch.stack([W, -W]), lr).sum()
    )(torch.tensor(LR).double()),
    "hessian": lambda f: torch.func.hessian(f, 0)(W, torch.tensor(LR).double()),
    "jacrev grad": lambda f: torch.func.jacrev(torch.func.grad(f, 1), 0)(
        W, torch.tensor(LR).double()
    ),
    "jacfwd": lambda f: torch.func.jacfwd(f, (0, 1))(W, torch.tensor(LR).double()),
}


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed(), Checkpointed(levels=2)], ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_results_are_those_without_trace_under(name, adjoint):
    def outcome(adjoint):
        def function(w, lr):
            return descend(adjoint, w, 0.1 * lr, lambda w: (w**4).sum() + quadratic(w)).params @ V

        return TRANSFORMS[name](function)

    torch.testing.assert_close(
        outcome(inspect.Trace(adjoint)), outcome(adjoint), rtol=1e-14, atol=0
    )


class LastStep(diffopt.adjoint.Adjoint):
    """Looks into what `minimize` gives it, and differentiates the last step."""

    def run(self, step, carry, args, xs):
        xs = list(xs)
        assert type(step.optimizer) is type(diffopt.sgd())
        assert [(own.lr, batch) for own, batch in xs] == [(t + 1.0, ()) for t in range(len(xs))]
        return Truncated(1).run(replace(step, tol=None), carry, args, xs)


def test_an_adjoint_finds_the_step_and_its_inputs_as_without_trace():
    trace, opt = inspect.Trace(LastStep()), diffopt.sgd()
    diffopt.minimize(
        quadratic, leaf(W), optimizer=opt, hparams=lambda t: opt.hparams(lr=t + 1.0), steps=3,
        adjoint=trace,
    )  # fmt: skip
    assert trace.norms.grads.isfinite().all()


class Rebuilt(diffopt.adjoint.Adjoint):
    """Takes the documented pairs apart and builds them again, or with batches of its own."""

    def __init__(self, own_batches):
        self.own_batches = own_batches

    def run(self, step, carry, args, xs):
        pairs = [(own, tuple(batch) if self.own_batches else batch) for own, batch in xs]
        return Unrolled().run(step, carry, args, pairs)


def test_an_adjoint_may_build_the_inputs_of_steps_anew():
    traces = [inspect.Trace(adjoint) for adjoint in (Unrolled(), Rebuilt(False), Rebuilt(True))]
    for trace in traces:
        w = leaf(W)
        torch.autograd.grad(descend(trace, w).params @ V, w)
    expected, found, unseen = (trace.norms for trace in traces)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(unseen.losses, expected.losses, rtol=0, atol=0)
    assert unseen.grads.isnan().all()
    assert unseen.adjoint[-1] == expected.adjoint[-1]


class Counted(diffopt.adjoint.Adjoint):
    def run(self, step, carry, args, xs):
        return Unrolled().run(step, carry, args, range(len(list(xs))))


def test_a_step_function_may_be_given_inputs_of_the_adjoints_own():
    y, numbers = diffopt.adjoint.unroll(
        lambda y, rate, t: (rate * y, t), leaf(1.0), 2.0, 3, adjoint=inspect.Trace(Counted())
    )
    assert (y.item(), numbers) == (8.0, [0, 1, 2])


def test_norms_of_a_loop_run_backwards_are_those_of_the_unrolled_one():
    opt, found = diffopt.sgd(momentum=True), []
    for adjoint in (Unrolled(), Reversible()):
        trace, w, lr = inspect.Trace(adjoint), leaf(W), leaf(0.1)
        sol = diffopt.minimize(
            quadratic, w, optimizer=opt, hparams=opt.hparams(lr=lr, momentum=0.5), steps=STEPS,
            adjoint=trace,
        )  # fmt: skip
        torch.autograd.grad(sol.params @ V, (w, lr))
        found.append(trace.norms)
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10, equal_nan=True)


class Elsewhere(diffopt.adjoint.Adjoint):
    """Runs the loop again from other parameters, as differences do."""

    def run(self, step, carry, args, xs):
        xs = list(xs)
        result = Unrolled().run(step, carry, args, xs)
        Unrolled().run(step, (2 * carry[0], *carry[1:]), args, xs)
        return result


def test_norms_are_those_of_the_first_run():
    traces = [inspect.Trace(Elsewhere()), inspect.Trace()]
    for trace in traces:
        descend(trace, leaf(W))
    torch.testing.assert_close(traces[0].norms, traces[1].norms, equal_nan=True)


class Opaque(diffopt.adjoint.Adjoint):
    """A derivative of its own, which does not go through the steps."""

    def run(self, step, carry, args, xs):
        end, outputs = Truncated(0).run(step, carry, args, xs)
        return (end[0] + 0 * carry[0], *end[1:]), outputs


def test_the_adjoint_of_the_final_params_is_seen_whatever_the_derivative_is():
    trace, w = inspect.Trace(Opaque()), leaf(W)
    outer = descend(trace, w).params @ V
    grads = torch.autograd.grad(outer, w)
    torch.testing.assert_close(trace.norms.adjoint[-1], V.norm())
    assert trace.norms.adjoint[1:-1].isnan().all()
    row = inspect.explain(grads, {"w": w}, outer=outer, trace=trace)["w"]
    assert row.status == "zero"
    assert "or dropped by Opaque" in row.reason


def test_a_gradient_of_none_stays_none():
    w, buffer = leaf(W), leaf(1.0)

    def loss(w, buffer):
        return quadratic(w), 0.9 * buffer

    for adjoint in (Unrolled(), inspect.Trace()):
        sol = descend(adjoint, w, loss=loss, buffers=buffer)
        grads = torch.autograd.grad(sol.params @ V, (w, buffer), allow_unused=True)
        assert grads[0] is not None
        assert grads[1] is None


def test_tol_and_generators_of_batches_are_traced():
    trace = inspect.Trace()
    sol = descend(trace, leaf(W), tol=1.0)
    assert trace.norms.losses.shape == sol.losses.shape
    assert len(trace.norms.updates) == sol.steps
    sol = descend(trace, leaf(W), loss=lambda w, x: quadratic(w - x), batches=iter(range(STEPS)))
    assert trace.norms.grads.shape == (STEPS,)


def test_errors_say_what_to_do():
    with pytest.raises(RuntimeError, match=r"nothing was traced yet: .*adjoint=trace"):
        _ = inspect.Trace().norms
    with pytest.raises(TypeError, match=r"not one of diffopt\.adjoint"):
        inspect.Trace("unrolled")
    with pytest.raises(TypeError, match=r"adjoint is Trace\(.*\) already"):
        inspect.Trace(inspect.Trace())
    compiled = torch.compile(lambda w: descend(inspect.Trace(), w).params, backend="eager")
    with pytest.raises(RuntimeError, match="use it in eager mode"):
        compiled(W)


# Events


def kinds(w, kind):
    if kind == "kink":
        return (w**2).sqrt().sum() if (w != 0).all() else w.abs().pow(1.5).sum()
    return float(kind) * quadratic(w)


def test_the_step_at_which_the_loss_is_first_not_finite_is_told():
    trace = inspect.Trace()
    descend(trace, leaf(W), loss=kinds, batches=["1", "1", "nan", "1"], steps=4)
    assert trace.events == [
        inspect.Event("loss", "non-finite", 2),
        inspect.Event("gradient", "non-finite", 2),
        inspect.Event("update", "non-finite", 2),
    ]


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed()], ids=str)
def test_the_step_at_which_the_adjoint_is_first_not_finite_is_told(adjoint):
    trace, w = inspect.Trace(adjoint), leaf([0.0, 0.0])

    def loss(w, kind):  # w stays at zero, where the third has no second derivative
        return w.abs().pow(1.5).sum() if kind == "kink" else quadratic(w)

    batches = ["smooth", "smooth", "kink", "smooth", "smooth"]
    opt = diffopt.sgd()
    sol = diffopt.minimize(
        loss, w, optimizer=opt, hparams=opt.hparams(lr=LR), batches=batches, adjoint=trace
    )
    grads = torch.autograd.grad(sol.params @ V, w)
    assert inspect.Event("adjoint", "non-finite", 2) in trace.events
    assert trace.norms.adjoint.isfinite().tolist() == [False] * 3 + [True] * 3
    row = inspect.explain(grads, {"w": w}, trace=trace)["w"]
    assert (row.status, row.step) == ("non-finite", 2)
    assert "adjoint is not finite from params_2 on" in row.reason


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed()], ids=str)
def test_the_step_at_which_the_adjoint_is_first_zero_is_told(adjoint):
    trace, w, lr = inspect.Trace(adjoint), leaf(W), leaf(0.5)
    opt = diffopt.sgd()
    sol = diffopt.minimize(
        lambda w: 0.5 * (w**2).sum(), w, optimizer=opt, steps=STEPS, adjoint=trace,
        hparams=lambda t: opt.hparams(lr=1.0 if t == 3 else lr),  # jumps to 0, wherever it was
    )  # fmt: skip
    outer = sol.params @ V
    grads = torch.autograd.grad(outer, {"w": w, "lr": lr}.values())
    assert inspect.Event("adjoint", "zero", 3) in trace.events
    explanation = inspect.explain(grads, {"w": w, "lr": lr}, outer=outer, trace=trace)
    assert (explanation["w"].status, explanation["w"].zeros) == ("zero", 2)
    if isinstance(adjoint, Unrolled):
        assert explanation["w"].step == 3
        assert "exactly zero from params_3 on" in explanation["w"].reason


WITHOUT_STEPS = [ForwardMode(), Implicit(), OneStep(), Evolution(samples=1)]


def bowl(w, decay):
    return 0.5 * ((w - 1) ** 2).sum() + 0.5 * decay * (w**2).sum()


def inner(adjoint, loss=bowl, lr=0.5, steps=40):
    """An inner loop that ends at its minimum, and its inputs."""
    trace, inputs, opt = inspect.Trace(adjoint), {"decay": leaf(0.1), "lr": leaf(lr)}, diffopt.sgd()
    sol = diffopt.minimize(
        loss, torch.zeros(2, dtype=F64), inputs["decay"], optimizer=opt,
        hparams=opt.hparams(lr=inputs["lr"]), steps=steps, adjoint=trace,
    )  # fmt: skip
    return trace, inputs, sol


@pytest.mark.parametrize("adjoint", WITHOUT_STEPS, ids=lambda adjoint: type(adjoint).__name__)
def test_an_adjoint_that_is_not_that_of_steps_is_not_said_to_be_cut(adjoint):
    trace, inputs, sol = inner(adjoint)
    torch.autograd.grad(sol.params @ V, inputs["decay"])
    assert trace.events == []


class Forgetful(Optimizer):
    """Gradient descent that detaches the params it is given at one step."""

    def __init__(self, at):
        self.at, self.hparams = at, diffopt.sgd().hparams

    def init(self, params):
        return 0

    def update(self, params, grads, state, hparams):
        params = params.detach() if state == self.at else params
        return params - hparams.lr * grads, state + 1


def test_a_detach_in_the_loop_is_found_with_its_step():
    trace, w, lr, opt = inspect.Trace(), leaf(W), leaf(LR), Forgetful(at=4)
    sol = diffopt.minimize(
        lambda w: V @ w, w, optimizer=opt, hparams=opt.hparams(lr=lr), steps=STEPS,
        adjoint=trace,
    )  # fmt: skip
    outer, inputs = sol.params @ V, {"w": w, "lr": lr}
    grads = torch.autograd.grad(outer, inputs.values(), allow_unused=True)
    assert trace.events == [inspect.Event("adjoint", "cut", 4)]
    explanation = inspect.explain(grads, inputs, outer=outer, trace=trace)
    assert [row.status for row in explanation.rows] == ["None", "ok"]
    assert explanation["w"].step == 4
    assert "whose graph begins at step 4" in explanation["w"].reason
    assert "there is no adjoint of params_4 or any params before" in str(explanation)


# explain


def explained(inputs, outer, grads=None, **kwargs):
    if grads is None:
        grads = torch.autograd.grad(outer, [*inputs.values()], allow_unused=True)
    return inspect.explain(grads, inputs, outer=outer, **kwargs)


def test_every_reason_for_none_is_found():
    x = leaf([1.0, 2.0])
    used, hidden, middle = leaf(W), leaf(W), 2 * x
    outer = (used * hidden.detach().requires_grad_() * middle).sum()
    inputs = {
        "number": 0.1,
        "integer": torch.tensor(3),
        "constant": torch.tensor(1.0),
        "unused": leaf(1.0),
        "hidden": hidden,
        "middle": middle,
        "used": used,
    }
    rows = inspect.explain(dict.fromkeys(inputs), inputs, outer=outer)
    assert {row.status for row in rows.rows} == {"None"}
    assert not rows.ok
    reasons = {
        "number": "0.1 of type float: pass a tensor",
        "integer": "torch.int64",
        "constant": "does not require a gradient",
        "unused": "no path from outer: not used, or cut",
        "hidden": "it was detached",
        "middle": "not a leaf",
        "used": "was backward",
    }
    for name, reason in reasons.items():
        assert reason in rows[name].reason
    assert "pass outer=" in inspect.explain((None,), [leaf(1.0)]).rows[0].reason
    nothing = explained({"x": x}, torch.tensor(1.0), (None,))
    assert "outer has no graph" in nothing["x"].reason


def test_adjoints_that_drop_an_input_are_named():
    lr, w, shift = leaf(LR), leaf(W), leaf(0.1)
    inputs = {"lr": lr, "w": w, "shift": shift}
    for adjoint, name, reason, step in (
        (FirstOrder(), "shift", "or acts only through the loss, which FirstOrder drops", None),
        (Truncated(2), "w", "begins at step 4: not used, or cut by", 4),
        (Truncated(2), "w", "or dropped by Truncated", 4),
    ):
        trace, opt = inspect.Trace(adjoint), diffopt.sgd()
        sol = diffopt.minimize(
            lambda w, s: quadratic(w - s), w, shift, optimizer=opt, hparams=opt.hparams(lr=lr),
            steps=STEPS, adjoint=trace,
        )  # fmt: skip
        found = explained(inputs, sol.params @ V, trace=trace)
        assert [row.name for row in found.rows if row.status == "None"] == [name]
        assert reason in found[name].reason
        assert found[name].step == step


@pytest.mark.parametrize("steps", [1, 3])
def test_an_input_that_a_loop_run_again_does_not_differentiate_is_not_blamed_on_the_user(steps):
    trace, inputs, sol = inner(Checkpointed(), lambda w, d: bowl(w, d.detach()), steps=steps)
    outer = sol.params @ V
    grads = torch.autograd.grad(outer, inputs.values(), allow_unused=True)
    for known in (trace, None):
        found = explained(inputs, outer, grads, trace=known)
        assert [row.status for row in found.rows] == ["None", "ok"]
        assert found["decay"].reason.startswith(
            "the loop returned none for it: no step uses it, except"
        )
    trace, inputs, sol = inner(Unrolled(), steps=steps)
    assert "the loop returned" not in explained(inputs, sol.params @ V, (None, None))["lr"].reason


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed(), *WITHOUT_STEPS], ids=str)
def test_zeros_from_the_outer_loss_are_found_whatever_the_adjoint(adjoint):
    trace, inputs, sol = inner(adjoint)
    dead = torch.relu(sol.params.sum() - 100)
    grads = torch.autograd.grad(dead, inputs.values(), retain_graph=True)
    for outer in (dead, None):
        for row in inspect.explain(grads, inputs, outer=outer, trace=trace).rows:
            assert (row.status, row.step) == ("zero", 40)
            assert "adjoint is exactly zero from params_40 on" in row.reason
    elsewhere = inspect.explain(grads, inputs, outer=dead + 0 * sum(inputs.values()), trace=trace)
    assert {row.step for row in elsewhere.rows} == {None}


def test_zeros_of_an_input_that_acts_by_another_are_found():
    trace, log = inspect.Trace(), leaf(-1.0)
    inputs = {"log": log, "lr": log.exp()}
    outer = torch.relu(descend(trace, lr=inputs["lr"]).params.sum() - 100)
    assert [row.step for row in explained(inputs, outer, trace=trace).rows] == [STEPS, STEPS]


def test_a_zero_at_some_step_is_no_reason_for_an_input_of_unknown_steps():
    trace, w, lr = inspect.Trace(Checkpointed()), leaf(W), leaf(0.5)
    sol = descend(trace, w, lr, loss=kinds, batches=["1", "0", "0"], steps=3)
    torch.autograd.grad(sol.params @ V, lr)
    assert inspect.Event("gradient", "zero", 1) in trace.events
    row = inspect.explain((torch.zeros((), dtype=F64),), {"lr": lr}, trace=trace).rows[0]
    assert row.step is None


def test_an_adjoint_is_named_where_it_may_have_to_do_with_it_and_only_there():
    for adjoint in WITHOUT_STEPS:
        trace, inputs, sol = inner(adjoint, lr=0.5)
        outer, inputs = sol.params @ V, inputs | {"unused": leaf(1.0)}
        found = explained(inputs, outer, trace=trace)
        assert ("dropped by" in found["unused"].reason) == isinstance(adjoint, OneStep)
        assert found["decay"].status == "ok"
        if isinstance(adjoint, Implicit):
            assert found["lr"].reason.startswith("a learning rate or initial value, on which Impl")


def test_an_outer_loss_without_graph_is_not_laid_to_what_the_trace_rules_out():
    trace, inputs, opt = inspect.Trace(FirstOrder()), {"lr": leaf(LR)}, diffopt.sgd()
    sol = diffopt.minimize(
        quadratic, W, optimizer=opt, hparams=opt.hparams(lr=inputs["lr"].item()), steps=2,
        adjoint=trace,
    )  # fmt: skip
    (row,) = explained(inputs, sol.params.sum(), (None,), trace=trace).rows
    assert "float()" in row.reason
    assert "through the loss, which FirstOrder drops" in row.reason
    assert "Truncated" not in row.reason
    (row,) = explained(inputs, sol.params.sum(), (None,)).rows
    assert "adjoint=None or Truncated(0)" in row.reason


def test_zeros_and_non_finite_entries_are_counted():
    x = leaf([0.0, 1.0, 4.0])
    grads = {"a": torch.tensor([0.0, torch.nan, torch.inf]), "b": [torch.zeros(2)], "c": 1 + x}
    found = inspect.explain(grads, {"a": x, "b": [leaf(W)], "c": x})
    assert [row.name for row in found.rows] == ["a", "b[0]", "c"]
    assert [row.status for row in found.rows] == ["non-finite", "zero", "ok"]
    assert [row.zeros for row in found.rows] == [1, 2, 0]
    assert [row.nonfinite for row in found.rows] == [2, 0, 0]
    assert found["c"].norm == pytest.approx((1 + 4 + 25) ** 0.5)
    assert found["c"].reason == ""


def test_a_forward_fault_explains_the_meta_gradient():
    trace, w, lr = inspect.Trace(), leaf(W), leaf(LR)
    sol = descend(trace, w, lr, loss=kinds, batches=["1", "1", "nan", "1"], steps=4)
    found = explained({"w": w, "lr": lr}, sol.params @ V, trace=trace)
    for row in found.rows:
        assert (row.status, row.step) == ("non-finite", 2)
        assert row.reason == "the loss is first not finite at step 2"


def test_the_table_is_readable():
    x, y = leaf([0.0, 1.0]), leaf(1.0)
    found = explained({"x": x, "unused": y}, (x**2).sum())
    header, first, second = str(found).splitlines()
    assert header.split() == ["input", "gradient", "norm", "zeros", "non-finite", "why"]
    assert first.split() == ["x", "ok", "2", "1/2", "0/2"]
    assert second.startswith("unused  None")
    assert second[header.index("why") :].startswith("no path from outer")


def test_meta_gradients_that_do_not_match_raise():
    with pytest.raises(ValueError, match=r"meta_grads\['w'\] is missing"):
        inspect.explain({}, {"w": W})
    with pytest.raises(ValueError, match="meta_grads has 2 entries, but the inputs are"):
        inspect.explain((W, W), {"w": W})
    with pytest.raises(ValueError, match=r"meta-gradient of w is 1\.0 of type float"):
        inspect.explain({"w": 1.0}, {"w": W})
    with pytest.raises(ValueError, match=r"of w has shape \(\), but w has \(2,\)"):
        inspect.explain((W.sum(), W), {"w": W, "lr": W.sum()})
    with pytest.raises(TypeError, match=r"outer is 2\.0 of type float, not the tensor"):
        inspect.explain((W,), {"w": W}, outer=2.0)
    with pytest.raises(TypeError, match=r"trace is Unrolled\(\), not a Trace"):
        inspect.explain((W,), {"w": W}, trace=Unrolled())
    with pytest.raises(KeyError, match="no input is called 'v'"):
        inspect.explain((W,), {"w": W})["v"]


# graph


def scheduled(adjoint, steps=5):
    """`early` feeds only the steps before the third, `shift` all, `unused` none."""
    inputs = {name: leaf(0.1) for name in ("early", "shift", "unused")} | {"w": leaf(W)}
    opt = diffopt.sgd()
    sol = diffopt.minimize(
        lambda w, s: quadratic(w - s), inputs["w"], inputs["shift"], optimizer=opt, steps=steps,
        hparams=lambda t: opt.hparams(lr=2 * inputs["early"] if t < 3 else LR), adjoint=adjoint,
    )  # fmt: skip
    return inputs, sol


def names(nodes):
    return [node.name for node in nodes]


@pytest.mark.parametrize("adjoint", [Unrolled(), FirstOrder()], ids=str)
def test_the_graph_tells_which_steps_an_input_feeds(adjoint):
    inputs, sol = scheduled(inspect.Trace(adjoint))
    graph = inspect.graph(sol.params @ V, inputs)
    assert names(graph.steps) == [f"step {t}" for t in range(5)]
    assert names(graph.feeds("early")) == ["step 0", "step 1", "step 2"]
    assert names(graph.feeds("w")) == ["step 0"]
    assert names(graph.feeds("unused")) == []
    all_steps = names(graph.steps) if type(adjoint) is Unrolled else []
    assert names(graph.feeds("shift")) == all_steps
    chain = {(x.name, y.name) for x, y in graph.edges if x.kind == "step"}
    expected = {(f"step {t}", f"step {t + 1}") for t in range(4)} | {("step 4", "outer")}
    assert chain == expected


def test_the_graph_is_there_after_the_backward_pass_and_for_losses():
    inputs, sol = scheduled(inspect.Trace())
    outer = sol.losses.sum()
    before = inspect.graph(outer, inputs)
    outer.backward()
    after = inspect.graph(outer, inputs)
    assert before.edges == after.edges
    to_outer = [x.name for x, y in after.edges if y.name == "outer"]
    assert sorted(to_outer) == names(after.steps)


def test_steps_behind_what_is_differentiated_are_no_part_of_its_graph():
    w = leaf(W)
    sol = descend(inspect.Trace(), w, loss=lambda w: (quadratic(w), 3 * w), has_aux=True)
    graph = inspect.graph(sol.aux[2].sum(), {"w": w})
    assert names(graph.steps) == ["step 0", "step 1", "step 2"]


def test_a_loop_that_is_run_again_is_one_node():
    inputs, sol = scheduled(inspect.Trace(Checkpointed()))
    graph = inspect.graph(sol.params @ V, inputs)
    assert names(graph.steps) == ["steps 0-4"]
    assert names(graph.feeds("early")) == names(graph.feeds("w")) == ["steps 0-4"]
    assert names(graph.feeds("unused")) == []


def test_an_untraced_loop_belongs_to_the_outer_loss():
    inputs, sol = scheduled(Unrolled())
    graph = inspect.graph(sol.params @ V, inputs)
    assert graph.steps == ()
    assert names(graph.feeds("early")) == ["outer"]


def test_truncation_shows_in_the_graph():
    inputs, sol = scheduled(inspect.Trace(Truncated(3)))
    graph = inspect.graph(sol.params @ V, inputs)
    assert names(graph.steps) == ["step 2", "step 3", "step 4"]
    assert names(graph.feeds("early")) == ["step 2"]
    assert names(graph.feeds("w")) == []


def test_loops_that_follow_each_other_are_told_apart():
    trace, w, lr = inspect.Trace(), leaf(W), leaf(LR)
    first = descend(trace, w, lr, steps=2)
    second = descend(trace, first.params, lr, steps=2)
    graph = inspect.graph(second.params @ V, {"w": w, "lr": lr})
    steps = [f"step {t} of loop {i}" for i in range(2) for t in range(2)]
    assert names(graph.steps) == steps == names(graph.feeds("lr"))
    assert names(graph.feeds("w")) == ["step 0 of loop 0"]
    assert (graph.steps[1], graph.steps[2]) in graph.edges


def test_inputs_may_feed_each_other_stand_twice_and_be_no_leaves():
    log_lr, w = leaf(-1.0), leaf(W)
    lr = log_lr.exp()
    sol = descend(inspect.Trace(), w, lr, steps=2)
    graph = inspect.graph(sol.params @ V, {"log_lr": log_lr, "lr": lr, "again": lr, "w": w})
    assert names(graph.feeds("log_lr")) == ["lr", "again"]
    assert names(graph.feeds("lr")) == names(graph.feeds("again")) == ["step 0", "step 1"]


def test_steps_with_the_same_neighbours_are_merged():
    inputs, sol = scheduled(inspect.Trace(), steps=50)
    merged = inspect.graph(sol.params @ V, inputs).merged()
    assert names(merged.steps) == ["step 0", "steps 1-2", "steps 3-49"]
    assert names(merged.feeds("early")) == ["step 0", "steps 1-2"]
    assert (merged.steps[-1].name, "outer") in {(x.name, y.name) for x, y in merged.edges}
    everywhere = inspect.graph(sol.params @ V + sol.losses.sum(), inputs).merged()
    assert names(everywhere.steps) == names(merged.steps)


def test_a_graph_prints_what_feeds_what():
    inputs, sol = scheduled(inspect.Trace())
    outer = sol.params @ V + inputs["early"]
    assert str(inspect.graph(outer, inputs)).splitlines() == [
        "early  -> steps 0-2, outer",
        "shift  -> steps 0-4",
        "unused -> nothing",
        "w      -> step 0",
    ]


def test_dot_has_every_node_and_edge_and_dashes_what_is_not_reached():
    inputs, sol = scheduled(inspect.Trace())
    graph = inspect.graph(sol.params @ V, {"a": [inputs["early"]], 'q"': inputs["unused"]})
    assert graph.dot.count("->") == len(graph.edges)
    assert '[label="a[0]", shape=ellipse];' in graph.dot
    assert '[label="q\\"", shape=ellipse, style=dashed];' in graph.dot
    assert graph.dot.startswith("digraph {")
    assert graph.dot.endswith("}")


def test_a_graph_needs_a_graph():
    with pytest.raises(TypeError, match=r"outer is .*tuple.*, not the tensor"):
        inspect.graph((leaf(1.0),), {"w": W})
    with pytest.raises(ValueError, match="outer does not require a gradient"):
        inspect.graph(W, {"w": W})
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda w: inspect.graph(w, w))(torch.tensor(1.0))
    with pytest.raises(KeyError, match="no input is called 'v'"):
        inspect.graph(leaf(1.0) * 2, {"w": leaf(1.0)}).feeds("v")


# Pictures


def test_the_plot_shows_the_norms():
    pytest.importorskip("matplotlib")
    trace, w, opt = inspect.Trace(), leaf(W), diffopt.sgd()
    hp = opt.hparams(lr=LR, momentum=0.5)
    sol = diffopt.minimize(quadratic, w, optimizer=opt, hparams=hp, steps=STEPS, adjoint=trace)
    torch.autograd.grad(sol.params @ V, w)
    top, bottom = trace.plot().axes
    lines = {line.get_label(): line.get_ydata() for axes in (top, bottom) for line in axes.lines}
    norms = trace.norms
    assert lines.keys() == {"loss", "gradient", "update", "adjoint", "adjoint of the state"}
    assert lines["loss"].tolist() == norms.losses.tolist()
    assert lines["gradient"].tolist() == norms.grads.tolist()
    assert lines["update"].tolist() == norms.updates.tolist()
    assert lines["adjoint"].tolist() == norms.adjoint.tolist()
    assert bottom.get_yscale() == "log"


def test_the_plot_marks_what_is_not_finite_and_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    trace, w = inspect.Trace(), leaf(W)
    sol = descend(trace, w, loss=kinds, batches=["1", "1", "nan", "1"], steps=4)
    torch.autograd.grad(sol.params @ V, w)
    figure = trace.plot()
    labels = [line.get_label() for axes in figure.axes for line in axes.lines]
    assert "the loss is first not finite at step 2" in labels
    figure.savefig(tmp_path / "trace.png")
    top, bottom = (axes.get_position() for axes in figure.axes)
    assert min(top.width, bottom.width) > 0.7  # the legend is below


def test_the_plot_has_one_color_for_a_quantity_of_all_examples():
    pytest.importorskip("matplotlib")
    trace = inspect.Trace()
    torch.vmap(lambda w: descend(trace, w).params)(torch.stack([W] * 5))
    lines = trace.plot().axes[1].lines
    assert [line.get_color() for line in lines] == ["C1"] * 5 + ["C2"] * 5
    assert [x.get_label() for x in lines if x.get_label()[0] != "_"] == ["gradient", "update"]


def test_the_graph_is_drawn_with_every_name(tmp_path):
    pytest.importorskip("matplotlib")
    inputs, sol = scheduled(inspect.Trace())
    graph = inspect.graph(sol.params @ V, inputs)
    figure = graph.plot()
    (axes,) = figure.axes
    styles = {text.get_text(): text.get_bbox_patch().get_linestyle() for text in axes.texts[:10]}
    assert styles.pop("unused") == "dashed"
    assert set(styles.values()) == {"solid"}
    assert styles.keys() == {"outer", "early", "shift", "w", *names(graph.steps)}
    assert len(axes.texts) == 10 + len(graph.edges)
    figure.savefig(tmp_path / "graph.svg")


def test_many_steps_are_drawn_merged():
    pytest.importorskip("matplotlib")
    inputs, sol = scheduled(inspect.Trace(), steps=50)
    figure = inspect.graph(sol.params @ V, inputs).plot()
    assert {"step 0", "steps 1-2", "steps 3-49"} <= {x.get_text() for x in figure.axes[0].texts}
    assert figure.get_figwidth() < 12


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trace = inspect.Trace()
    descend(trace)
    with pytest.raises(ImportError, match=r"pip install 'torch-diffopt\[plots\]'"):
        trace.plot()
