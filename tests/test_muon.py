"""Muon: its iteration, in bfloat16 and precisely, and what it refuses."""

import dataclasses

import pytest
import torch

import diffopt
from diffopt.testing import CHECKS
from registry import muon_row

F64 = torch.float64
NUMBERS = {
    "lr": 0.1,
    "weight_decay": 0.05,
    "momentum": 0.8,
    "ns_a": 3.0,
    "ns_b": -4.0,
    "ns_c": 1.9,
    "eps": 0.3,
}
CONVERGENT = {"ns_a": 15 / 8, "ns_b": -10 / 8, "ns_c": 3 / 8}  # Newton and Schulz's own


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def direction(opt, grad, **numbers):
    """What is subtracted from zeros in a first step with rate 1, before it is scaled."""
    zeros = torch.zeros_like(grad)
    new, _ = opt.update(zeros, grad, opt.init(zeros), opt.hparams(lr=1.0, **numbers))
    return -new / max(1, grad.shape[0] / grad.shape[1]) ** 0.5


@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("numbers", [{}, NUMBERS], ids=["defaults", "numbers"])
def test_follows_torch_in_bfloat16(numbers, nesterov, adjust_lr_fn):
    flags = {"nesterov": nesterov, "ns_steps": 4, "adjust_lr_fn": adjust_lr_fn}
    row = muon_row(numbers, torch.bfloat16, **flags)
    CHECKS["parity"](dataclasses.replace(row, shapes=((16, 8), (8, 16), (5, 5), (1, 3))))


@pytest.mark.parametrize(("shape", "ratio"), [((2, 8), 0.5), ((8, 2), 2), ((3, 3), 1)])
def test_the_spectral_adjustment_is_not_clamped(shape, ratio):
    grad, zeros = draw(*shape), torch.zeros(shape, dtype=F64)

    def step(adjust_lr_fn):
        opt = diffopt.muon(precision=None, adjust_lr_fn=adjust_lr_fn)
        return opt.update(zeros, grad, opt.init(zeros), opt.hparams(lr=1.0))[0]

    torch.testing.assert_close(step("spectral_unclamped"), step("original") * min(1, ratio))


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_a_convergent_iteration_makes_singular_values_one(shape):
    opt = diffopt.muon(precision=None, ns_steps=30)
    x, grad = direction(opt, draw(*shape), **CONVERGENT), draw(*shape)
    u, _, v = torch.linalg.svd(grad, full_matrices=False)
    torch.testing.assert_close(x, u @ v)


def test_a_precision_is_that_of_the_iteration():
    grad = draw(8, 6)
    exact = direction(diffopt.muon(precision=None), grad)
    for precision in (torch.bfloat16, torch.float16, torch.float32, F64):
        error = direction(diffopt.muon(precision=precision), grad) - exact
        assert error.norm() <= 10 * torch.finfo(precision).eps * exact.norm()


@pytest.mark.parametrize(
    ("precision", "wrt", "error"),
    [
        (torch.bfloat16, ("grad", "lr"), 0.2),
        (torch.float32, ("grad", "lr", "ns_a", "ns_b", "ns_c", "eps"), 1e-4),
    ],
)
def test_derivatives_are_as_good_as_the_precision(precision, wrt, error):
    def slopes(precision):
        arguments = {"grad": draw(32, 32), **NUMBERS, "ns_a": 3.4445, "ns_b": -4.775, "eps": 50.0}
        inputs = {name: torch.tensor(arguments[name], dtype=F64) for name in wrt[1:]}
        inputs = {"grad": arguments["grad"], **inputs}
        inputs = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        grad, *numbers = {**arguments, **inputs}.values()
        opt, param = diffopt.muon(precision=precision), torch.zeros(32, 32, dtype=F64)
        hp = opt.hparams(**dict(zip(NUMBERS, numbers, strict=True)))
        new, _ = opt.update(param, grad, opt.init(param), hp)
        return torch.autograd.grad((new * draw(32, 32, seed=1)).sum(), list(inputs.values()))

    for rough, exact in zip(slopes(precision), slopes(None), strict=True):
        assert rough.dtype == F64
        assert (rough - exact).norm() <= error * exact.norm()


def two_steps(param, grad, *numbers):
    opt = diffopt.muon(precision=None)
    hp = opt.hparams(**dict(zip(NUMBERS, numbers, strict=True)))
    state = opt.init(param)
    for _ in range(2):
        param, state = opt.update(param, grad, state, hp)
    return param, state.momentum_buffer


@pytest.mark.parametrize("shape", [(3, 2), (2, 3)])
def test_derivatives_at_a_zero_gradient_are_those_of_finite_differences(shape):
    numbers = [torch.tensor(value, dtype=F64) for value in NUMBERS.values()]
    inputs = (draw(*shape), torch.zeros(shape, dtype=F64), *numbers)
    inputs = [x.requires_grad_() for x in inputs]
    torch.autograd.gradcheck(two_steps, inputs, check_forward_ad=True)
    torch.autograd.gradgradcheck(two_steps, inputs)


def test_a_zero_gradient_is_divided_by_eps():
    for opt in (diffopt.muon(), diffopt.muon(precision=None)):
        grad = torch.zeros(2, 3, requires_grad=True)
        x = direction(opt, grad, momentum=0.0)
        assert not x.any()
        (slope,) = torch.autograd.grad(x.sum(), grad, create_graph=True)
        torch.testing.assert_close(slope, torch.full((2, 3), 3.4445**5 / 1e-7), rtol=0.02, atol=0)
        (curvature,) = torch.autograd.grad(slope.sum(), grad)
        assert curvature.isfinite().all()


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_nothing_comes_of_matrices_without_elements_but_finite_numbers(shape, adjust_lr_fn):
    opt, empty = diffopt.muon(adjust_lr_fn=adjust_lr_fn, precision=None), draw(*shape)
    lr = torch.tensor(0.1, requires_grad=True)
    new, _ = opt.update(empty, empty, opt.init(empty), opt.hparams(lr=lr))
    assert new.shape == shape
    assert torch.autograd.grad(new.sum(), lr)[0] == 0


def test_a_batch_of_numbers_keeps_the_dtype_of_the_params():
    param = draw(2, 3).float()
    numbers = {name: torch.full((4,), value, dtype=F64) for name, value in NUMBERS.items()}
    for opt in (diffopt.muon(), diffopt.muon(precision=None)):

        def step(numbers, opt=opt):
            return opt.update(param, param, opt.init(param), opt.hparams(**numbers))

        new, state = torch.vmap(step)(numbers)
        assert new.dtype == state.momentum_buffer.dtype == torch.float32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            draw(3),
            r"params\['b'\]\[0\] has shape \(3,\), but Muon updates only matrices: give it to",
        ),
        (
            draw(2, 3, 4),
            r"params\['b'\]\[0\] has shape \(2, 3, 4\), but Muon updates only matrices",
        ),
        (draw(2, 3).to(torch.complex128), r"params\['b'\]\[0\] is complex"),
    ],
    ids=["vector", "batch", "complex"],
)
def test_what_is_no_real_matrix_is_refused_before_anything_changes(wrong, message):
    opt, params = diffopt.muon(), {"a": draw(2, 3), "b": [wrong]}
    state = opt.init({"a": draw(2, 3), "b": [draw(2, 3)]})
    before = params["a"].clone()
    for call in (opt.update, opt.update_):
        with pytest.raises(ValueError, match=message):
            call(params, params, state, opt.hparams())
    with pytest.raises(ValueError, match=message):
        opt.init(params)
    assert torch.equal(params["a"], before)
    assert state.step == 0


def test_coefficients_for_each_weight_are_refused_and_rates_are_not():
    opt, params = diffopt.muon(precision=None), {"w": draw(2, 3)}
    for name in ("ns_a", "ns_b", "ns_c", "eps"):
        hp = opt.hparams(**{name: torch.ones(2, 3)})
        with pytest.raises(ValueError, match=rf"hparams.{name} has shape \(2, 3\).*params\['w'\]"):
            opt.update(params, params, opt.init(params), hp)
    rates = torch.rand(2, 3, dtype=F64)
    new, one = (
        opt.update(params, params, opt.init(params), opt.hparams(lr=lr))[0]["w"] - params["w"]
        for lr in (rates, 1.0)
    )
    torch.testing.assert_close(new, rates * one)


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"nesterov": 0.9}, TypeError, "nesterov is 0.9, not a bool"),
        ({"ns_steps": -1}, ValueError, "ns_steps is -1"),
        ({"ns_steps": 100}, ValueError, "ns_steps is 100"),
        ({"ns_steps": 2.5}, ValueError, "ns_steps is 2.5"),
        ({"ns_steps": True}, ValueError, "ns_steps is True"),
        ({"adjust_lr_fn": "other"}, ValueError, "adjust_lr_fn is 'other'"),
        ({"precision": "bfloat16"}, TypeError, "precision is 'bfloat16', not a dtype"),
        ({"precision": torch.int32}, ValueError, "precision is torch.int32"),
    ],
)
def test_wrong_flags_are_refused(flags, error, message):
    with pytest.raises(error, match=message):
        diffopt.muon(**flags)


@pytest.mark.parametrize("kind", [diffopt.adafactor, diffopt.muon])
def test_a_subclass_may_have_a_rule_that_overwrites_nothing(kind):
    class Halved(kind):
        def rule(self, p, g, s, hp, c):
            return super().rule(p, g * 0.5, s, hp, c)

    own, opt = Halved(), kind()
    stepped = []
    for rule, grad in ((own, torch.full((3, 4), 2.0)), (opt, torch.ones(3, 4))):
        params = [torch.ones(3, 4)]
        state, hp = rule.init(params), rule.hparams(lr=0.1)
        for _ in range(2):
            rule.update_(params, [grad], state, hp)
        stepped.append([*params, *state[1:]])
    torch.testing.assert_close(*stepped)


@pytest.mark.parametrize("opt", [diffopt.adafactor(), diffopt.muon(nesterov=False)])
def test_what_a_step_out_of_place_is_given_stays_where_nothing_is_differentiated(opt):
    params = [torch.randn(4, 3), torch.randn(3, 4)]
    grads = [torch.randn(4, 3), torch.randn(3, 4)]
    hp = opt.hparams(lr=0.1, weight_decay=0.1)
    with torch.no_grad():
        state = opt.update(params, grads, opt.init(params), hp)[1]
        given = params, grads, state
        before = torch.utils._pytree.tree_map(torch.clone, given)
        opt.update(*given, hp)
    torch.testing.assert_close(given, before, rtol=0, atol=0)
