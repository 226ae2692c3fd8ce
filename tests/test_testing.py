"""The conformance kit fails on planted defects, each in the check that is there to find it."""

import dataclasses
import inspect
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch

import diffopt
from diffopt import _tree, testing
from diffopt.rules import hparams, leafwise, number, zeros_like
from diffopt.testing import CHECKS, Case


class State(NamedTuple):
    step: Any
    square_avg: Any


@hparams
class HParams:
    lr: float = number(0.1, ge=0)
    beta: float = number(0.9, ge=0, lt=1)


def root(x):
    """The square root with derivative 0 at 0."""
    zero = x == 0
    return x.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def sound(p, g, s, hp, _):
    v = hp.beta * s.square_avg + (1 - hp.beta) * g * g
    return p - hp.lr * g / (root(v) + 1), State(s.step, v)


def make(rule=sound, **options):
    return leafwise(State, HParams, lambda p, step: State(step, zeros_like(p)), rule, **options)


class Reference(torch.optim.Optimizer):
    """The sound rule as torch would have it."""

    def __init__(self, tensors):
        super().__init__(tensors, {})
        self.averages = [torch.zeros_like(tensor) for tensor in tensors]

    @torch.no_grad()
    def step(self):
        for v, p in zip(self.averages, self.param_groups[0]["params"], strict=True):
            v, p, g = (torch.view_as_real(x) if x.is_complex() else x for x in (v, p, p.grad))
            v.mul_(0.9).add_(g * g, alpha=1 - 0.9)
            p.sub_(0.1 * g / (v.sqrt() + 1))


# Each defect is the sound rule, or the optimizer made of it, with one thing wrong.


def wrong_formula(p, g, s, hp, _):
    v = hp.beta * s.square_avg + (1 - hp.beta) * g * g
    return p - hp.lr * g / (root(v) + 1.000001), State(s.step, v)


def float32_arithmetic(p, g, s, hp, c):
    new_p, new_s = sound(p, g, s, hp, c)
    return new_p.float().to(p.dtype), new_s


def float32_step_count(p, g, s, hp, c):
    count = torch.tensor(float(s.step), dtype=torch.float32)
    new_p, new_s = sound(p, g, s, hp, c)
    return new_p + 1e-3 * (1 - hp.beta**count), new_s


def detached_gradient(p, g, s, hp, c):
    return sound(p, g.detach(), s, hp, c)


def detached_buffer(p, g, s, hp, c):
    new_p, new_s = sound(p, g, s, hp, c)
    return new_p, State(s.step, new_s.square_avg.detach())


def detached_state(p, g, s, hp, c):
    return sound(p, g, State(s.step, s.square_avg.detach()), hp, c)


def number_of_tensor(p, g, s, hp, c):
    hp = dataclasses.replace(hp, beta=float(hp.beta))
    return sound(p, g, s, hp, c)


class OnceDifferentiable(torch.autograd.Function):
    """x squared, whose second derivative is wrong."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, cotangent):
        return 2 * ctx.saved_tensors[0].detach() * cotangent

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * ctx.saved_tensors[0] * tangent


def wrong_second_order(p, g, s, hp, _):
    v = hp.beta * s.square_avg + (1 - hp.beta) * OnceDifferentiable.apply(g)
    return p - hp.lr * g / (root(v) + 1), State(s.step, v)


def infinite_root(p, g, s, hp, _):
    v = hp.beta * s.square_avg + (1 - hp.beta) * g * g
    return p - hp.lr * g / (v.sqrt() + 1), State(s.step, v)


def zero_over_zero(p, g, s, hp, _):
    v = hp.beta * s.square_avg + (1 - hp.beta) * g * g
    return p - hp.lr * torch.where(v == 0, 0, g / v.sqrt()), State(s.step, v)


def branch_on_value(p, g, s, hp, c):
    return sound(p, g if g.sum() > 0 else 1 * g, s, hp, c)


def in_place(p, g, s, hp, c):
    return p.sub_(hp.lr * g), s


def in_place_on_grads(p, g, s, hp, c):
    with torch.no_grad():
        g.data.mul_(1.0000001)
    return sound(p, g, s, hp, c)


# Optimizers that are not made of a rule have more ways to go wrong.


@hparams
class TrustHParams:
    lr: float = number(0.1, ge=0)
    trust: float = number(1.0, ge=0, per_parameter=False)


def widen(leaf):
    half = leaf is not None and leaf.dtype in (torch.float16, torch.bfloat16)
    return leaf.float() if half else leaf


class Trust(diffopt.Optimizer):
    """Descent by the norm of all gradients together: not elementwise, but sound."""

    hparams = TrustHParams

    inner = diffopt.sgd(momentum=False)

    def init(self, params):
        return self.inner.init(params)

    def update(self, params, grads, state, hp):
        inner_hp = self.inner.hparams(lr=hp.lr, weight_decay=0)
        _, new_state = self.inner.update(params, grads, state, inner_hp)  # looks whether all fits
        wide, wide_grads = _tree.map(widen, (params, grads))
        target, _ = self.inner.update(wide, wide_grads, state, inner_hp)
        squares = [(g * g.conj()).real.double().sum() for g in _tree.leaves(grads) if g is not None]
        factor = 1 / (1 + hp.trust * root(sum(squares, torch.zeros((), dtype=torch.float64))))

        def blend(p, old, new):
            return p if new is old else (old + factor * (new - old)).to(p.dtype)

        return _tree.map(blend, params, wide, target), new_state


class AliasedState(Trust):
    """Keeps the old params themselves."""

    inner = diffopt.sgd(momentum=True)

    def update(self, params, grads, state, hp):
        new, new_state = super().update(params, grads, state, hp)
        return new, new_state._replace(momentum_buffer=params)


class AliasedResults(AliasedState):
    """Keeps the new params themselves."""

    def update(self, params, grads, state, hp):
        new, new_state = super().update(params, grads, state, hp)
        return new, new_state._replace(momentum_buffer=new)


class Careless(Trust):
    """Touches gradients of None, too."""

    def update(self, params, grads, state, hp):
        grads = _tree.map(lambda p, g: torch.zeros_like(p) if g is None else g, params, grads)
        return super().update(params, grads, state, hp)


class Unchecked(Trust):
    """Never looks whether its arguments fit."""

    def update(self, params, grads, state, hp):
        def move(p, g):
            return p if g is None else p - (hp.lr * g).to(p.dtype)

        return _tree.map(move, params, grads), state._replace(step=state.step + 1)


class Promoting(Trust):
    """Lets a 0-d float64 hyperparameter promote 0-d parameters."""

    def update(self, params, grads, state, hp):
        _, new_state = super().update(params, grads, state, hp)
        return _tree.map(lambda p, g: p if g is None else p - hp.lr * g, params, grads), new_state


class InOrder(Trust):
    """Pairs params and grads by position, not by key."""

    def update(self, params, grads, state, hp):
        _, new_state = super().update(params, grads, state, hp)
        leaves, spec = _tree.flatten(params)
        grads = _tree.leaves(grads)
        new = [p if g is None else p - g.sum() * p for p, g in zip(leaves, grads, strict=True)]
        return _tree.unflatten(new, spec), new_state


class OtherInPlace(Trust):
    """Does something else in place."""

    def update_(self, params, grads, state, hp):
        super().update_(params, grads, state, dataclasses.replace(hp, lr=1.01 * hp.lr))


class WritesBeforeItLooks(Trust):
    """Changes the state in place and only then finds the arguments wrong."""

    def update_(self, params, grads, state, hp):
        state.step.add_(1)
        super().update_(params, grads, state._replace(step=state.step - 1), hp)


class NumbersOnly(Trust):
    """Knows no trees of hyperparameters."""

    def update(self, params, grads, state, hp):
        return super().update(params, grads, state, dataclasses.replace(hp, lr=1 * hp.lr))


class ByModulus(Trust):
    """Divides by the modulus, which of a pair of reals is another."""

    def update(self, params, grads, state, hp):
        _, new_state = super().update(params, grads, state, hp)

        def move(p, g):
            return p if g is None else p - (hp.lr * g / (1 + g.abs())).to(p.dtype)

        return _tree.map(move, params, grads), new_state


class CountsInBfloat16(Trust):
    def init(self, params):
        state = super().init(params)
        return state._replace(step=state.step.bfloat16())

    def update(self, params, grads, state, hp):
        new, new_state = super().update(params, grads, state._replace(step=state.step.double()), hp)
        return new, new_state._replace(step=new_state.step.bfloat16())


class HalfArithmetic(Trust):
    """Divides by the square of a gradient in the gradient's own precision."""

    def update(self, params, grads, state, hp):
        _, new_state = super().update(params, grads, state, hp)

        def move(p, g):
            return p if g is None else p - (hp.lr * g / (g * g.conj() + 1e-10)).to(p.dtype)

        return _tree.map(move, params, grads), new_state


DEFECTS = [
    ("parity", wrong_formula),
    ("parity", float32_arithmetic),
    ("numbers", float32_step_count),
    ("half_step", HalfArithmetic),
    ("half_zero_gradient", HalfArithmetic),
    ("half_long_run", CountsInBfloat16),
    ("derivatives", detached_gradient),
    ("derivatives", detached_buffer),
    ("derivatives", detached_state),
    ("derivatives", number_of_tensor),
    ("derivatives", wrong_second_order),
    ("derivatives_from_init", detached_gradient),
    ("derivatives_from_init", wrong_second_order),
    ("derivatives_per_weight", number_of_tensor),
    ("jvp", detached_gradient),
    ("jvp", wrong_second_order),
    ("zero_gradient", infinite_root),
    ("zero_gradient", zero_over_zero),
    ("vmap", number_of_tensor),
    ("vmap", branch_on_value),
    ("compiled", branch_on_value),
    ("kept", Promoting),
    ("pure", in_place),
    ("pure", in_place_on_grads),
    ("pure", AliasedState),
    ("pure", AliasedResults),
    ("no_gradient", Careless),
    ("in_place", OtherInPlace),
    ("key_order", InOrder),
    ("complex_pairs", ByModulus),
    ("prefix", NumbersOnly),
    ("errors", Unchecked),
    ("errors", WritesBeforeItLooks),
]


@pytest.mark.parametrize(("name", "defect"), DEFECTS)
def test_the_check_finds_the_defect(name, defect):
    optimizer = defect() if isinstance(defect, type) else make(defect)
    with pytest.raises(AssertionError, match=rf"^{name}: "):
        CHECKS[name](Case(optimizer, reference=Reference))


def test_what_was_not_kept_is_named():
    with pytest.raises(AssertionError, match=r"has dtype torch\.\w+, but had torch\.\w+\n"):
        CHECKS["kept"](Case(Promoting(), dtypes=(torch.float64, torch.float32)))


def test_no_check_is_without_a_defect_that_it_finds():
    assert {name for name, _ in DEFECTS} == CHECKS.keys()


@pytest.mark.usefixtures("frugal")
def test_a_sound_rule_passes():
    testing.check(make(), reference=Reference)


@pytest.mark.usefixtures("frugal")
def test_a_sound_optimizer_that_is_not_elementwise_passes():
    testing.check(Trust())


# Compositions: their states are trees of states, some pruned, and some of their params frozen.


class Cloning(diffopt.Optimizer):
    """Makes new state for what has no gradient, in a state that some tensors are not part of."""

    inner = diffopt.transforms.masked(
        make(), lambda params: _tree.map(lambda p: p.dim() > 0, params)
    )
    hparams = inner.hparams

    def init(self, params):
        return self.inner.init(params)

    def update(self, params, grads, state, hp):
        params, state = self.inner.update(params, grads, state, hp)
        return params, _tree.map(torch.clone, state)


def everything(params):
    return _tree.map(lambda _: True, params)


COMPOSED_DEFECTS = [
    ("half_long_run", Case(diffopt.transforms.chain(CountsInBfloat16()))),
    ("half_long_run", Case(diffopt.transforms.partition({0: CountsInBfloat16()}, 0))),
    ("no_gradient", Case(Cloning(), frozen=lambda p: _tree.map(lambda x: x.dim() == 0, p))),
    ("no_gradient", Case(diffopt.sgd(), frozen=everything)),
    ("pure", Case(diffopt.transforms.freeze(make(), everything))),  # and nobody says so
    ("derivatives", Case(diffopt.transforms.chain(make(detached_gradient)))),
    (
        "derivatives_per_weight",
        Case(diffopt.transforms.chain(make(number_of_tensor)), elementwise=True),
    ),
]


@pytest.mark.parametrize(("name", "case"), COMPOSED_DEFECTS)
def test_the_check_finds_the_defect_of_a_composition(name, case):
    with pytest.raises(AssertionError, match=rf"^{name}: "):
        CHECKS[name](case)


@pytest.mark.usefixtures("frugal")
def test_a_frozen_composition_passes():
    testing.check(diffopt.transforms.freeze(make(), everything), frozen=everything)


def test_hyperparameters_may_be_records():
    opt = diffopt.transforms.chain(diffopt.sgd())
    case = Case(opt, (diffopt.sgd().hparams(lr=0.3),))
    assert case.record()[0].lr == 0.3
    assert case.interior()[0].momentum == pytest.approx(0.05)


class LearnedState(NamedTuple):
    step: Any
    exp_avg: Any


@hparams
class LearnedHParams:
    lr: float = number(1e-2, ge=0)
    weights: Any = number(0.0, per_parameter=False)


def learned(p, g, s, hp, _):
    average = 0.9 * s.exp_avg + 0.1 * g
    features = torch.stack([g, average, p], -1) @ hp.weights["in"]
    update = torch.tanh(features + hp.weights["bias"]) @ hp.weights["out"]
    return p - hp.lr * update, LearnedState(s.step, average)


@pytest.mark.usefixtures("frugal")
def test_a_tree_of_weights_may_be_a_hyperparameter():
    def init(p, step):
        return LearnedState(step, zeros_like(p))

    opt = leafwise(LearnedState, LearnedHParams, init, learned, elementwise=True)
    torch.manual_seed(0)
    shapes = {"in": (3, 2), "bias": (2,), "out": (2,)}
    weights = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    options = {"dtypes": (torch.float64,), "skip": {"compiled"}}
    testing.check(opt, hparams={"weights": weights, "lr": 0.1}, **options)


def test_a_tree_like_params_is_refused():
    with pytest.raises(ValueError, match=r"hparams.lr is a tree like params, but the checks use"):
        Case(diffopt.sgd(), {"lr": {"a": 0.1}}).record()


def test_skip_leaves_checks_out():
    with pytest.raises(AssertionError, match=r"^parity: "):
        testing.check(make(wrong_formula), reference=Reference)
    others = [name for name in CHECKS if name != "numbers"]
    testing.check(make(wrong_formula), reference=Reference, skip=others)


def test_a_rule_that_writes_to_its_state_fails_for_that_and_a_note_explains_the_check():
    def in_place(p, g, s, hp, c):
        s.square_avg.add_(g * g)
        return sound(p, g, s, hp, c)

    with pytest.raises(AssertionError, match=r"^pure: arguments.state.\S+ was changed") as raised:
        testing.check(make(in_place))
    assert raised.value.__notes__ == [f"pure checks this: {inspect.getdoc(CHECKS['pure'])}"]


def test_a_rule_that_makes_nan_is_not_said_to_change_its_arguments():
    def nan(p, g, s, hp, c):
        return p - hp.lr * (g * float("nan")), State(s.step, s.square_avg + g * g)

    CHECKS["pure"](Case(make(nan)))


def test_skip_of_an_unknown_check_raises():
    with pytest.raises(ValueError, match=r"skip has \['compile'\], but the checks are \['pure'"):
        testing.check(make(), skip=["compile"])


def test_derivatives_are_taken_inside_of_ranges():
    case = Case(diffopt.adam(), {"lr": 0.3, "beta2": 0.999})
    inside = case.interior()
    assert [float(x) for x in (inside.lr, inside.beta2, inside.eps)] == pytest.approx(
        [0.3, 0.95, 0.05]
    )


def test_only_the_kit_needs_hypothesis_and_its_error_says_what_to_install():
    code = """
import sys; sys.modules["hypothesis"] = None
import diffopt; assert "diffopt.testing" not in sys.modules
import diffopt.testing"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *_, said = run.stderr.splitlines()
    message = "diffopt.testing needs hypothesis: pip install 'torch-diffopt[testing]'"
    assert said == f"ImportError: {message}"
