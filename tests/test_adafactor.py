"""Adafactor: its factored state, its derivatives at zeros, and what it refuses."""

import dataclasses
import math
from typing import Any, NamedTuple

import pytest
import torch

import diffopt
from diffopt import optim
from diffopt._rule import tiles
from diffopt.rules import hparams, leafwise, number, ops

F64 = torch.float64
NUMBERS = {"lr": 0.1, "beta2_decay": -0.6, "eps1": 0.3, "eps2": 0.2, "d": 1.2, "weight_decay": 0.05}


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def a_matrix_with_a_zero_row_and_column():
    matrix = draw(3, 4)
    matrix[1], matrix[:, 2] = 0, 0
    return matrix


def two_steps(param, grad, *numbers):
    """Param and state after two steps from scratch, as tensors with elements."""
    opt = diffopt.adafactor(eps1=True)
    hp = opt.hparams(**dict(zip(NUMBERS, numbers, strict=True)))
    state = opt.init(param)
    for _ in range(2):
        param, state = opt.update(param, grad, state, hp)
    return tuple(x for x in (param, *state[1:]) if x.numel())


@pytest.mark.parametrize(
    ("shape", "row_var", "col_var", "variance"),
    [
        ((), (0,), (0,), ()),
        ((5,), (0,), (0,), (5,)),
        ((3, 4), (3, 1), (1, 4), (0,)),
        ((2, 3, 4), (2, 3, 1), (2, 1, 4), (0,)),
    ],
)
def test_a_matrix_has_one_average_for_each_row_and_column(shape, row_var, col_var, variance):
    opt, param = diffopt.adafactor(), draw(*shape).bfloat16()
    state = opt.init(param)
    for _ in range(2):
        assert [x.shape for x in state[1:]] == [row_var, col_var, variance]
        assert all(x.dtype == torch.float32 for x in state[1:])
        param, state = opt.update(param, param, state, opt.hparams())


def test_a_batch_of_matrices_has_the_averages_of_each():
    opt, grad = diffopt.adafactor(), draw(2, 3, 4)
    _, state = opt.update(draw(2, 3, 4), grad, opt.init(grad), opt.hparams())
    for i in range(2):
        _, alone = opt.update(grad[i], grad[i], opt.init(grad[i]), opt.hparams())
        torch.testing.assert_close((alone.row_var, alone.col_var), (state[1][i], state[2][i]))


@pytest.mark.parametrize(
    ("param", "grad"),
    [
        (draw(3, 4), torch.zeros(3, 4, dtype=F64)),
        (torch.zeros(3, 4, dtype=F64), draw(3, 4)),
        (torch.zeros(3, 4, dtype=F64), torch.zeros(3, 4, dtype=F64)),
        (draw(3, 4, seed=1), a_matrix_with_a_zero_row_and_column()),
        (torch.zeros(4, dtype=F64), torch.zeros(4, dtype=F64)),
        (draw(), torch.zeros((), dtype=F64)),
    ],
    ids=["zero gradient", "zero matrix", "all zero", "zero row and column", "vector", "number"],
)
def test_derivatives_at_zeros_are_those_of_finite_differences(param, grad):
    numbers = [torch.tensor(value, dtype=F64) for value in NUMBERS.values()]
    inputs = [x.clone().requires_grad_() for x in (param, grad, *numbers)]
    torch.autograd.gradcheck(two_steps, inputs, check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(two_steps, inputs, fast_mode=True)


@pytest.mark.parametrize("shape", [(2, 3), (3,)])
def test_the_variance_of_a_zero_gradient_is_bounded_by_the_machine_epsilon(shape):
    for dtype in (torch.float32, F64):
        opt, param = diffopt.adafactor(), torch.ones(shape, dtype=dtype)
        grad = torch.zeros(shape, dtype=dtype, requires_grad=True)
        new, _ = opt.update(param, grad, opt.init(param), opt.hparams(lr=0.1))
        torch.testing.assert_close(new, param, rtol=0, atol=0)
        (slope,) = torch.autograd.grad(new.sum(), grad, create_graph=True)
        torch.testing.assert_close(slope, -0.1 / torch.finfo(dtype).eps * torch.ones_like(param))
        assert slope.sum().backward() is None
        assert grad.grad.isfinite().all()


def test_zero_params_without_a_least_scale_stay_with_finite_derivatives():
    opt = diffopt.adafactor()
    param, grad = torch.zeros(2, 3, dtype=F64, requires_grad=True), draw(2, 3)
    new, _ = opt.update(param, grad, opt.init(param), opt.hparams(lr=0.1, eps2=0.0))
    assert not new.any()
    (slope,) = torch.autograd.grad(new.sum(), param, create_graph=True)
    torch.testing.assert_close(slope, torch.ones_like(slope))
    (curvature,) = torch.autograd.grad(slope.sum(), param)
    assert not curvature.any()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3), (0, 2, 3)])
def test_nothing_comes_of_tensors_without_elements_but_finite_numbers(shape):
    opt, params = diffopt.adafactor(), {"empty": draw(*shape), "full": draw(2)}
    lr = torch.tensor(0.1, requires_grad=True)
    state = opt.init(params)
    for _ in range(2):
        params, state = opt.update(params, params, state, opt.hparams(lr=lr))
    assert all(tree["empty"].isfinite().all() for tree in state[1:])
    alone = {"full": draw(2)}
    state = opt.init(alone)
    for _ in range(2):
        alone, state = opt.update(alone, alone, state, opt.hparams(lr=lr))
    slopes = [torch.autograd.grad(p["full"].sum() + 0 * lr, lr)[0] for p in (params, alone)]
    assert slopes[0] == slopes[1]


@pytest.mark.parametrize("d", [1.0, 2.0])
def test_a_step_is_bounded_relative_to_its_tensor(d):
    opt, param = diffopt.adafactor(), draw(4, 5)
    hp, state = opt.hparams(lr=0.1, d=d), opt.init(param)
    for seed in range(5):
        new, state = opt.update(param, 10.0**seed * draw(4, 5, seed=seed), state, hp)
        rms_step, rms = ((x * x).mean().sqrt() for x in (new - param, param))
        assert rms_step <= d * 0.1 * rms * (1 + 1e-12)
        param = new


def test_late_steps_do_not_depend_on_a_greater_lr():
    opt, param = diffopt.adafactor(), draw(2, 3)
    state = opt.init(param)._replace(step=torch.tensor(99.0, dtype=F64))
    lr = torch.tensor([0.2, 0.05], dtype=F64, requires_grad=True)
    for rate, bounded in zip(lr, (True, False), strict=True):
        new, _ = opt.update(param, draw(2, 3), state, opt.hparams(lr=rate))
        (slope,) = torch.autograd.grad(new.sum(), lr)
        assert bounded == (not slope.any())
    new, _ = opt.update(param, draw(2, 3), state, opt.hparams(lr=math.inf))
    late, _ = opt.update(param, draw(2, 3), state, opt.hparams(lr=0.1))
    torch.testing.assert_close(new, late)


def test_a_rate_for_each_weight_scales_its_step():
    opt, param, grad = diffopt.adafactor(), draw(2, 3), draw(2, 3, seed=1)
    rates = 0.1 * torch.rand(2, 3, dtype=F64)
    new, _ = opt.update(param, grad, opt.init(param), opt.hparams(lr=rates))
    one, _ = opt.update(param, grad, opt.init(param), opt.hparams(lr=0.1))
    torch.testing.assert_close(new - param, (one - param) * rates / 0.1)


def test_a_batch_of_rates_keeps_the_dtype_of_the_params():
    opt, param = diffopt.adafactor(eps1=True), draw(2, 3).float()
    numbers = {name: torch.full((4,), value, dtype=F64) for name, value in NUMBERS.items()}

    def step(numbers):
        return opt.update(param, param, opt.init(param), opt.hparams(**numbers))

    new, state = torch.vmap(step)(numbers)
    assert [x.dtype for x in (new, *state[1:])] == [torch.float32] * 4


@pytest.mark.parametrize("name", ["update", "update_"])
def test_a_decay_for_each_weight_is_refused(name):
    opt, params = diffopt.adafactor(), {"w": draw(2, 3)}
    hp = opt.hparams(beta2_decay=-torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"hparams.beta2_decay has shape \(2, 3\).*params\['w'\]"):
        getattr(opt, name)(params, params, opt.init(params), hp)


def test_a_state_for_other_shapes_is_refused():
    opt, params = diffopt.adafactor(), {"w": draw(2, 3)}
    state = opt.init({"w": draw(3, 3)})
    message = r"state.row_var\['w'\] has shape \(3, 1\), .*\(2, 1\), since params\['w'\] .*\(2, 3\)"
    with pytest.raises(ValueError, match=message):
        opt.update(params, params, state, opt.hparams())


def test_complex_params_are_refused():
    opt, params = diffopt.adafactor(), {"w": draw(2, 3).to(torch.complex128)}
    state = opt.init({"w": draw(2, 3)})
    for call in (opt.init, lambda p: opt.update(p, p, state, opt.hparams())):
        with pytest.raises(ValueError, match=r"params\['w'\] is complex"):
            call(params)


def test_numbers_are_no_flags():
    with pytest.raises(TypeError, match=r"eps1 is 1e-30, not a bool"):
        diffopt.adafactor(eps1=1e-30)


ALIKE = [(5,), (3, 4), (2, 3, 4), (), (0,)]
BESIDE = [(7,), (70, 70), (70, 70)]  # too few, and too big


def by_class(params, lr, *, stacked):
    params = [p.clone().requires_grad_() for p in params]
    optimizer = optim.Adafactor(params, lr, weight_decay=0.1, foreach=None if stacked else False)
    for seed in range(3):
        for i, p in enumerate(params):
            p.grad = draw(*p.shape, seed=100 * seed + i).to(p.dtype)
        optimizer.step()
    rows = [optimizer.state[p] for p in params]
    return [params, *([row[key] for key in sorted(row)] for row in rows)]


def by_rule(params, lr, *, stacked):
    params = [p.clone() for p in params]
    opt = diffopt.adafactor(eps1=True, maximize=True)
    opt = opt if stacked else dataclasses.replace(opt, execution="leaf")
    state, hp = opt.init(params), opt.hparams(lr=lr, weight_decay=0.1)
    for seed in range(3):
        grads = [draw(*p.shape, seed=100 * seed + i).to(p.dtype) for i, p in enumerate(params)]
        opt.update_(params, grads, state, hp)
    return params, state


@pytest.mark.parametrize("run", [by_class, by_rule])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=F64)], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_small_tensors_of_one_shape_are_stepped_together_as_they_are_alone(
    run, lr, dtype, monkeypatch
):
    shapes = [shape for _ in range(17) for shape in ALIKE] + BESIDE
    params = [draw(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    calls, vmap = [], torch.func.vmap

    def spy(leaf):
        return lambda *stacks: calls.append(stacks[0].shape) or vmap(leaf)(*stacks)

    monkeypatch.setattr(torch.func, "vmap", spy)
    expected = run(params, lr, stacked=False)
    assert calls == []
    together = run(params, lr, stacked=True)
    assert sorted(calls) == sorted([(17, *shape) for shape in ALIKE] * 3)
    exact = {"rtol": 1e-12, "atol": 1e-12} if dtype == F64 else {"rtol": 1e-2, "atol": 0}
    torch.testing.assert_close(together, expected, **exact)


def test_rates_of_each_weight_are_not_stepped_together(monkeypatch):
    opt, params = diffopt.adafactor(), [draw(5, seed=i) for i in range(17)]
    state, hp = opt.init(params), opt.hparams(lr=torch.linspace(0.1, 0.5, 5, dtype=F64))
    expected, _ = opt.update(params, params, state, hp)
    monkeypatch.delattr(torch.func, "vmap")
    opt.update_(params, [p.clone() for p in params], state, hp)
    torch.testing.assert_close(params, expected)


@pytest.fixture
def pieced(monkeypatch):
    """The lengths of the vectors that are stepped by pieces, of some seven elements."""
    monkeypatch.setattr(tiles, "TILE", 7)
    lengths, pieced_ = [], tiles._pieced_

    def spy(rule, numbers, row):
        done = pieced_(rule, numbers, row)
        lengths.extend([row[0].numel()] * done)
        return done

    monkeypatch.setattr(tiles, "_pieced_", spy)
    return lengths


LENGTHS = [1, 6, 7, 8, 13, 14, 15, 100]


@pytest.mark.parametrize("run", [by_class, by_rule])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=F64)], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_long_vectors_are_stepped_by_pieces_as_they_are_whole(run, lr, dtype, pieced):
    params = [draw(n, seed=n).to(dtype) for n in LENGTHS]
    params += [draw().to(dtype), draw(0).to(dtype), draw(9, 9).to(dtype)]
    expected = run(params, lr, stacked=False)
    assert pieced == []
    assert_close = torch.testing.assert_close
    close = {"rtol": 1e-12, "atol": 1e-14} if dtype == F64 else {"rtol": 1e-5, "atol": 1e-7}
    result = run(params, lr, stacked=True)
    assert_close(result, expected, **close)
    assert pieced == LENGTHS[2:] * 3
    assert_close(run(params, lr, stacked=True), result, rtol=0, atol=0)


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("flags", [{}, {"maximize": True}])
@pytest.mark.parametrize("zero", ["params", "grads", "neither"])
def test_pieces_equal_the_rule_for_all_hyperparameters(tensors, flags, zero, pieced):
    numbers = {k: torch.tensor(v, dtype=F64) if tensors else v for k, v in NUMBERS.items()}
    opt = diffopt.adafactor(eps1=True, **flags)
    leaf, hp = dataclasses.replace(opt, execution="leaf"), opt.hparams(**numbers)
    params = [draw(n, seed=n) * (zero != "params") for n in (20, 50)]
    twin = [p.clone() for p in params]
    state, twin_state = opt.init(params), opt.init(twin)
    for seed in range(4):
        grads = [draw(p.numel(), seed=90 + seed) * (zero != "grads") for p in params]
        opt.update_(params, grads, state, hp)
        leaf.update_(twin, grads, twin_state, hp)
        torch.testing.assert_close((params, state), (twin, twin_state), rtol=1e-12, atol=1e-14)
    assert pieced == [20, 50] * 4


@pytest.mark.parametrize(
    "param", [draw(30).bfloat16(), draw(6, 5)], ids=["half precision", "matrix"]
)
def test_what_cannot_be_cut_is_stepped_whole(param, pieced):
    for run in (by_class, by_rule):
        result, expected = (run([param], 0.1, stacked=stacked) for stacked in (True, False))
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert pieced == []


@pytest.mark.parametrize("strided", ["param", "grad"])
def test_a_vector_with_gaps_is_stepped_whole(strided, pieced):
    gaps, dense = draw(60)[::2], draw(30)
    param, grad = (gaps, dense) if strided == "param" else (dense, gaps)
    opt, twin = diffopt.adafactor(), param.clone()
    opt.update_(twin, grad, opt.init(twin), opt.hparams(lr=0.1))
    pieced.clear()
    param = param.requires_grad_()
    param.grad = grad
    optim.Adafactor([param], 0.1).step()
    torch.testing.assert_close(param.detach(), twin, rtol=1e-12, atol=1e-14)
    assert pieced == []


class Nothing(NamedTuple):
    step: Any


@hparams
class Rate:
    lr: float = number(0.1, ge=0)


@pytest.mark.parametrize(
    ("change", "by_pieces"),
    [
        (lambda p, g: g / (p * p).sum() + (p - p.sum()).sum(), True),
        (lambda p, g: g / ops.norm(p), True),
        (lambda p, g: g.flip(0), False),
        (lambda p, g: g * torch.arange(30.0, dtype=F64), False),
        (lambda p, g: g * p.shape[0], False),
        (lambda p, g: g / (p.sum() * g).sum(0, keepdim=True), False),
        (lambda p, g: torch.ones(30, dtype=F64), False),
    ],
    ids=["sums", "a norm", "order", "a constant for each", "shape", "another sum", "no operation"],
)
def test_pieces_are_for_rules_of_elementwise_operations_and_sums(change, by_pieces, pieced):
    def rule(p, g, s, hp, _):
        return p - hp.lr * change(p, g), s

    opt = leafwise(
        Nothing, Rate, lambda p, step: Nothing(step), rule, batchable=False, stackable=True
    )
    param, grad = draw(30), draw(30, seed=1)
    expected, _ = opt.update(param, grad, opt.init(param), opt.hparams())
    opt.update_(param, grad, opt.init(param), opt.hparams())
    torch.testing.assert_close(param, expected, rtol=1e-12, atol=1e-12)
    assert pieced == [30] * by_pieces
