"""State in bfloat16 with stochastic rounding, and float32 master weights."""

import io
import itertools
import math
import pickle
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils import _pytree as pytree

import diffopt
from diffopt import adjoint, transforms as t
from diffopt._rule import tiles
from diffopt.optim import from_pure, to_pure
from diffopt.rules import hparams, leafwise, number, zeros_like
from diffopt.testing import CHECKS, Case
from diffopt.testing._assertions import Snapshot
from diffopt.transforms import _rounding
from registry import REGISTRY

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LARGEST = torch.finfo(BF16).max
precision = t.precision


def _batches_bits():
    """Whether torch.vmap can batch a view of another dtype: torch 2.11 cannot."""
    try:
        torch.vmap(lambda x: x.view(torch.int32))(torch.zeros(2))
    except RuntimeError:
        return False
    return True


needs_batched_bits = pytest.mark.skipif(not _batches_bits(), reason="torch cannot batch the bits")


def draw(*shape, seed=0, dtype=F32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def tree(seed=0, dtype=F32, **more):
    shapes = {"a": (2, 3), "b": (3,), "c": (), "d": (0,), "e": (50,), **more}
    return {k: draw(*s, seed=seed + i, dtype=dtype) for i, (k, s) in enumerate(shapes.items())}


def steps(opt, params, grads, record, *, in_place=False):
    """Some steps with the random numbers of one seed."""
    torch.manual_seed(0)
    params, state = pytree.tree_map(torch.clone, params), opt.init(params)
    for grad in grads:
        if in_place:
            opt.update_(params, grad, state, record)
        else:
            params, state = opt.update(params, grad, state, record)
    return params, state


def equal(mine, theirs):
    pairs = zip(pytree.tree_leaves(mine), pytree.tree_leaves(theirs), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


# Rounding

ORDINARY = [1.001, -1.001, 0.99999, 3.14159e-5, -7.7e20, 1.7e-38, 3e-41, -1e-44, 0.0, -0.0, 1.0]
ORDINARY += [2.0**-126, LARGEST, -LARGEST, LARGEST * (1 - 2**-10)]
EVERY = torch.arange(1 << 16, dtype=torch.int32)


@pytest.mark.parametrize("x", ORDINARY)
def test_the_mean_of_all_roundings_is_the_number_itself(x):
    exact = torch.tensor(x)
    found = _rounding.stochastic(exact.expand(1 << 16), EVERY).double()
    assert found.mean().item() == exact.double().item()


@pytest.mark.parametrize("x", ORDINARY)
def test_a_number_becomes_one_of_its_neighbors_and_keeps_its_sign(x):
    exact = torch.tensor(x)
    found = _rounding.stochastic(exact.expand(1 << 16), EVERY)
    below = (exact.view(torch.int32) & -65536).view(F32).item()
    above = ((exact.view(torch.int32) & -65536) + 65536).view(F32).item()
    neighbors = {below} if below == exact.item() else {below, above}
    assert set(found.tolist()) == neighbors
    assert (found.float() * exact >= 0).all()


def nan(bits):
    return torch.tensor(bits, dtype=torch.int32).view(F32).item()


EXTREME = torch.tensor(
    [math.inf, -math.inf, math.nan, nan(0x7F800001), nan(0x7FFFFFFF), nan(-1), 3.39e38, -3.4e38]
)


def test_what_bfloat16_cannot_hold_is_rounded_as_torch_does():
    for noise in (0, 1, 0x8000, 0xFFFF):
        found = _rounding.stochastic(EXTREME, torch.full((8,), noise, dtype=torch.int32))
        torch.testing.assert_close(found, EXTREME.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("extreme", [None, *EXTREME.tolist()])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_rounding_in_place_is_the_same(extreme, dtype):
    x = torch.cat([torch.tensor(ORDINARY), draw(500)]).to(dtype)
    x[3] = x[3] if extreme is None else extreme
    noise = torch.randint(1 << 16, x.shape, generator=torch.Generator().manual_seed(0)).int()
    expected, found = _rounding.stochastic(x, noise), x.to(BF16)
    _rounding.write_stochastic_(found, x.clone(), noise)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("length", [1, 5, 4096, 4097, 20000])
def test_random_numbers_belong_to_positions(length):
    torch.manual_seed(0)
    noise = _rounding.Noise.draw(length, torch.device("cpu"))
    whole = noise.at(0, length)
    assert len(whole) == length
    assert 0 <= whole.min() <= whole.max() < 1 << 16
    for start, stop in ((0, 1), (length // 3, length), (length // 2, length // 2 + 1)):
        assert torch.equal(noise.at(start, stop - start), whole[start:stop])


def test_random_numbers_are_uniform_and_uncorrelated():
    torch.manual_seed(0)
    many = torch.stack(
        [_rounding.Noise.draw(9000, torch.device("cpu")).at(0, 9000) for _ in range(300)]
    )
    units = many.double() / (1 << 16) - 0.5
    assert abs(units.mean()) < 4 / math.sqrt(12 * units.numel() / 30)
    assert abs(units.square().mean() - 1 / 12) < 1e-3
    pairs = [(0, 1), (0, 4096), (5, 4101), (4095, 4096), (17, 8999)]
    for i, j in pairs:
        assert abs((units[:, i] * units[:, j]).mean()) < 4 / 12 / math.sqrt(len(units))


def test_the_derivative_of_rounding_is_the_identity():
    x, noise = draw(4).requires_grad_(), torch.tensor([1, 70, 40000, 65535], dtype=torch.int32)

    def function(x):
        return _rounding.stochastic(x, noise).float()

    rounded = function(x).detach()
    (first,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(first, 3 * rounded**2, rtol=1e-2, atol=1e-2)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * rounded, rtol=1e-2, atol=1e-2)
    _, tangent = torch.func.jvp(function, (x.detach(),), (torch.ones(4),))
    assert torch.equal(tangent, torch.ones(4))
    wide = x.detach().requires_grad_()
    extreme = _rounding.stochastic(torch.cat([wide, EXTREME]), torch.zeros(12, dtype=torch.int32))
    assert torch.equal(torch.autograd.grad(extreme.float()[:4].sum(), wide)[0], torch.ones(4))


# The state

RULES = {name: case for name, case in REGISTRY.items() if name not in ("lbfgs",)}


@pytest.mark.parametrize("row", RULES)
def test_buffers_like_their_params_are_narrow_and_single_numbers_are_not(row):
    case = RULES[row]
    params = [draw(*shape, seed=i) for i, shape in enumerate(case.shapes)]
    plain, state = case.optimizer.init(params), precision(case.optimizer).init(params)
    for name, old, new in zip(plain._fields, plain, state.inner, strict=True):
        old, new = (x if isinstance(x, list) else [x] for x in (old, new))
        for p, x, y in zip(params, old, new, strict=False) if old != [()] else ():
            like = name != "step" and x.dim() > 0 and x.shape == p.shape
            assert y.dtype == (BF16 if like else x.dtype), name
            assert torch.equal(y, x.to(y.dtype))


def test_other_buffers_stay_as_they_are():
    params = {"complex": draw(3).to(torch.complex64), "wide": draw(3, dtype=F64), "scalar": draw()}
    state = precision(diffopt.adam()).init(params)
    dtypes = {name: x.dtype for name, x in state.inner.exp_avg.items()}
    assert dtypes == {"complex": torch.complex64, "wide": BF16, "scalar": F32}
    assert state.inner.step.dtype == F64
    assert state.master == {"complex": [], "wide": [], "scalar": []}


@pytest.mark.parametrize("p", [draw(), draw(3), draw(1)], ids=["0-d", "vector", "one"])
def test_a_single_tensor_is_a_tree_too(p):
    opt = precision(diffopt.adam())
    state = opt.init(p)
    assert state.inner.step.dtype == F64
    assert state.inner.exp_avg.dtype == (BF16 if p.dim() else F32)
    new, state = opt.update(p, torch.ones_like(p), state, opt.hparams(lr=0.1))
    torch.testing.assert_close(new, p - 0.1, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("inside", [t.ema, t.maximize, lambda o: t.chain(t.clip_by_norm(), o)])
def test_the_state_inside_compositions_is_narrow_too(inside):
    opt = precision(inside(diffopt.adam()))
    params, grads = tree(dtype=BF16), [tree(7 * i, BF16) for i in range(3)]
    record = opt.hparams(lr=0.1)
    for in_place in (False, True):
        new, state = steps(opt, params, grads, record, in_place=in_place)
        dtypes = {x.dtype for x in pytree.tree_leaves(state.inner) if x.dim() > 0}
        assert dtypes == {BF16}
        rounded = pytree.tree_map(lambda x: x.to(BF16), state.master)
        assert equal(new, rounded)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_an_average_decays_only_if_rounded_at_random(stochastic, in_place):
    opt = precision(diffopt.adam(), stochastic=stochastic)
    params = {"w": torch.zeros(4000)}
    record = opt.hparams(lr=0.0, beta2=0.999)
    grads = [{"w": torch.ones(4000)}] + 300 * [{"w": torch.zeros(4000)}]
    _, state = steps(opt, params, grads, record, in_place=in_place)
    average = state.inner.exp_avg_sq["w"].float()
    assert (average >= 0).all()
    if stochastic:
        torch.testing.assert_close(
            average.mean(), torch.tensor(0.001 * 0.999**300), rtol=2e-3, atol=0
        )
    else:
        assert torch.equal(average, torch.full((4000,), 0.001).bfloat16().float())


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize(
    "row", ["adamw-amsgrad", "sgd-momentum", "rmsprop-centered", "nadam", "asgd"]
)
def test_update_in_place_draws_the_same_numbers(row, dtype):
    case = REGISTRY[row]
    params, grads = tree(dtype=dtype), [tree(9 * i, dtype) for i in range(3)]
    grads[1]["b"] = grads[1]["e"] = None
    for options in ({}, {"master_dtype": None}, {"state_dtype": None}, {"master_dtype": F64}):
        opt = precision(case.optimizer, **options)
        pure = steps(opt, params, grads, case.record())
        in_place = steps(opt, params, grads, case.record(), in_place=True)
        for x, y in zip(pytree.tree_leaves(in_place), pytree.tree_leaves(pure), strict=True):
            assert x.dtype == y.dtype
            torch.testing.assert_close(x, y)
        assert {x.dtype for x in pytree.tree_leaves(pure[0])} == {dtype}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_pieces_give_what_whole_tensors_give(dtype, monkeypatch):
    opt = precision(diffopt.adamw())
    params = {k: draw(*s, dtype=dtype) for k, s in {"a": (70, 9), "b": (3,), "c": (40,)}.items()}
    grads = [{k: draw(*p.shape, seed=i, dtype=dtype) for k, p in params.items()} for i in range(3)]
    whole = steps(opt, params, grads, opt.hparams(lr=0.1), in_place=True)
    monkeypatch.setattr(tiles, "TILE", 50)
    pieces = steps(opt, params, grads, opt.hparams(lr=0.1), in_place=True)
    torch.testing.assert_close(pieces, whole)


class Counted(NamedTuple):
    step: Any
    sum: Any
    count: Any


@hparams
class CountedHParams:
    lr: float = number(1e-3, ge=0)


def counted(p, g, s, hp, _):
    total = 0.9 * s.sum + g
    return p - hp.lr * (1 + s.count.sum()) * total, Counted(s.step, total, s.count + 1)


def test_buffers_of_other_shapes_stay_as_they_are():
    rule = leafwise(
        Counted,
        CountedHParams,
        lambda p, step: Counted(step, zeros_like(p), torch.zeros(2)),
        counted,
        shapes=lambda shape: (shape, (2,)),
    )
    params = [torch.ones(5000), torch.ones(3)]
    grads, record = 3 * [[torch.ones_like(p) for p in params]], rule.hparams(lr=0.1)
    expected, _ = steps(rule, params, grads, record)
    for in_place in (False, True):
        new, state = steps(precision(rule), params, grads, record, in_place=in_place)
        torch.testing.assert_close(new, expected, rtol=2e-2, atol=2e-2)
        assert state.inner.sum[0].dtype == BF16
        assert [x.tolist() for x in state.inner.count] == [[3.0, 3.0], [3.0, 3.0]]


def test_a_number_of_the_state_may_grow():
    opt, params = precision(diffopt.nadam()), {"w": draw(6)}
    grads = [{"w": draw(6, seed=i)} for i in range(1, 4)]
    record = opt.hparams(lr=0.1, beta1={"w": torch.linspace(0.1, 0.9, 6)})
    pure = steps(opt, params, grads, record)
    in_place = steps(opt, params, grads, record, in_place=True)
    torch.testing.assert_close(in_place, pure)
    assert pure[1].inner.mu_product["w"].shape == (6,)
    assert pure[1].inner.mu_product["w"].dtype != BF16


def peak_bytes(function, *args):
    """The most memory that is taken beyond what was there at first."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        kept = function(*args)
    events = profile.profiler.kineto_results.events()
    del kept
    return max(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]"))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_step_in_place_allocates_no_more_than_pieces(dtype):
    opt = precision(diffopt.adamw())
    params, grads = [draw(3_000_000, dtype=dtype)], [draw(3_000_000, seed=1, dtype=dtype)]
    state, record = opt.init(params), opt.hparams(lr=0.1)
    peak = peak_bytes(opt.update_, params, grads, state, record)
    assert 0 < peak < 6 * 4 * tiles.TILE * torch.get_num_threads()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("master_dtype", [None, F32], ids=str)
def test_the_first_state_is_made_tensor_by_tensor(master_dtype, dtype):
    opt = precision(diffopt.adamw(), master_dtype=master_dtype)
    params = [draw(100_000, seed=i, dtype=dtype) for i in range(6)]
    masters = 4 if dtype == BF16 and master_dtype else 0
    per_number = 6 * (masters + 2 * 2) + 3 * 4  # and the float32 of one tensor
    assert peak_bytes(opt.init, params) < 1.1 * per_number * 100_000


# Master weights


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_masters_are_a_run_in_float32_whose_params_are_rounded(dtype, in_place):
    rule, record = diffopt.adamw(), diffopt.adamw().hparams(lr=1e-3)
    params, grads = tree(dtype=dtype), [tree(9 * i, dtype) for i in range(5)]
    wide = pytree.tree_map(torch.Tensor.float, (params, grads))
    expected, expected_state = steps(rule, *wide, record)
    opt = precision(rule, state_dtype=None)
    new, state = steps(opt, params, grads, record, in_place=in_place)
    torch.testing.assert_close(state.master, expected)
    torch.testing.assert_close(state.inner, expected_state)
    assert equal(new, pytree.tree_map(lambda x: x.to(dtype), state.master))


def test_small_steps_add_up_in_the_masters_and_in_params_rounded_at_random():
    params, grads = [torch.ones(4000, dtype=BF16)], 100 * [[torch.ones(4000, dtype=BF16)]]
    record = diffopt.sgd().hparams(lr=1e-4)
    plain, _ = steps(diffopt.sgd(), params, grads, record)
    assert torch.equal(plain[0], params[0])
    _, state = steps(precision(diffopt.sgd()), params, grads, record)
    torch.testing.assert_close(state.master[0], torch.full((4000,), 0.99))
    without, state = steps(precision(diffopt.sgd(), master_dtype=None), params, grads, record)
    assert state.master == [[]]
    torch.testing.assert_close(without[0].double().mean().item(), 0.99, rtol=1e-4, atol=0)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_param_that_was_set_since_is_what_its_master_goes_on_from(in_place):
    opt = precision(diffopt.sgd())
    record = opt.hparams(lr=2.0**-12)
    params, grads = [torch.ones(4, dtype=BF16)], [torch.ones(4, dtype=BF16)]
    params, state = opt.update(params, grads, opt.init(params), record)
    master = state.master[0].clone()
    params[0][1], params[0][2] = 3.0, math.nan
    if in_place:
        opt.update_(params, grads, state, record)
    else:
        params, state = opt.update(params, grads, state, record)
    lr = 2.0**-12
    expected = torch.tensor([master[0] - lr, 3.0 - lr, math.nan, master[3] - lr])
    torch.testing.assert_close(state.master[0], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_master_goes_on_where_its_param_overflows(in_place):
    params, grads = [torch.tensor([65504.0, 1.0]).half()], [torch.tensor([-1.0, 1.0]).half()]
    opt = precision(diffopt.sgd())
    new, state = steps(opt, params, 3 * [grads], opt.hparams(lr=100.0), in_place=in_place)
    assert new[0].tolist() == [math.inf, -299.0]
    assert state.master[0].tolist() == [65804.0, -299.0]


def test_the_derivative_of_a_master_is_that_of_its_param():
    opt, record = precision(diffopt.sgd()), diffopt.sgd().hparams

    def solved(opt, dtype, start, lr, state=None):
        p, state = start.to(dtype), state or opt.init(start.detach().to(dtype))
        for _ in range(3):
            p, state = opt.update(p, (p.float() ** 2).to(dtype), state, record(lr=lr))
        return p, state

    start, lr = draw(5).bfloat16().float().requires_grad_(), torch.tensor(0.1, requires_grad=True)
    exact, _ = solved(diffopt.sgd(), F32, start, lr)
    p, state = solved(opt, BF16, start, lr)
    for result in (p.float(), state.master):
        values = exact.square().sum(), result.square().sum()
        first = [torch.autograd.grad(x, (start, lr), create_graph=True) for x in values]
        torch.testing.assert_close(first[1], first[0], rtol=3e-2, atol=3e-2)
        second = [torch.autograd.grad(g[1], (start, lr), retain_graph=True) for g in first]
        torch.testing.assert_close(second[1], second[0], rtol=3e-2, atol=3e-2)


def test_a_composition_that_widens_params_inside_is_refused():
    params, grads = tree(dtype=BF16), tree(dtype=BF16)
    for opt in (
        t.chain(t.clip_by_norm(), precision(diffopt.adam())),
        t.accumulate(precision(diffopt.adam()), 1),
    ):
        state = opt.init(params)
        before = Snapshot((params, state))
        for method in (opt.update, opt.update_):
            with pytest.raises(ValueError, match="put precision around a composition"):
                method(params, grads, state, opt.hparams(lr=0.1))
        before.check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.inner, "state has type AdamState"),
        (lambda s: s._replace(master={**s.master, "a": draw(4)}), r"state.master\['a'\] has shape"),
        (
            lambda s: s._replace(master={**s.master, "a": draw(2, 3).int()}),
            "must be floating-point",
        ),
        (lambda s: s._replace(master={**s.master, "a": []}), r"state.master\['a'\]"),
        (lambda s: s._replace(inner=s.inner._replace(exp_avg=s.inner.exp_avg_sq)), "share memory"),
        (lambda s: s._replace(inner=s.inner._replace(exp_avg=s.master)), "share memory"),
        (lambda s: s._replace(inner=5), "state has type int"),
    ],
)
def test_a_wrong_state_is_refused_before_anything_changes(change, message):
    opt, params, grads = precision(diffopt.adam()), tree(dtype=BF16), tree(dtype=BF16)
    state = change(opt.init(params))
    before = Snapshot((params, state))
    with pytest.raises((TypeError, ValueError), match=message):
        opt.update_(params, grads, state, opt.hparams(lr=0.1))
    before.check()


# Random numbers


def loss(params, target):
    return sum((p.float() - target).square().sum() for p in pytree.tree_leaves(params))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_loops_that_recompute_draw_the_same_numbers_again(dtype):
    opt = precision(diffopt.adamw())

    def solved(how):
        torch.manual_seed(3)
        lr, target = torch.tensor(0.1, requires_grad=True), torch.tensor(0.3, requires_grad=True)
        start, record = {"w": draw(40, dtype=dtype).requires_grad_()}, opt.hparams(lr=lr)
        options = {"optimizer": opt, "hparams": record, "steps": 9, "adjoint": how}
        new = diffopt.minimize(loss, start, target, **options).params
        grads = torch.autograd.grad(loss(new, 0.0), (lr, target, start["w"]))
        return new, grads, torch.rand(())

    expected = solved(adjoint.Unrolled())
    for how in (adjoint.Checkpointed(), adjoint.Checkpointed(segments=2)):
        torch.testing.assert_close(solved(how), expected)


@needs_batched_bits
def test_derivatives_are_in_the_mean_those_of_the_exact_rule():
    """Of first and second order, through three steps, with respect to start and numbers."""
    start, grads = draw(3), [i**2 * draw(3, seed=i) for i in range(1, 4)]

    def solved(opt, p, lr, beta2):
        record, state = opt.hparams(lr=lr, beta2=beta2), opt.init(p)
        for g in grads:
            p, state = opt.update(p, g + 0.3 * p, state, record)
        return p.square().sum()

    def derivatives(opt):
        def first(*inputs):
            gradient = torch.func.grad(lambda *x: solved(opt, *x), argnums=(0, 1, 2))
            return gradient(*inputs)

        def second(*inputs):
            return torch.func.grad(lambda *x: sum(g.sum() for g in first(*x)), argnums=(0, 1, 2))(
                *inputs
            )

        inputs = start, torch.tensor(0.1), torch.tensor(0.9)
        return first(*inputs), second(*inputs)

    torch.manual_seed(0)
    opt = precision(diffopt.adamw())
    samples = torch.vmap(lambda _: derivatives(opt), randomness="different")(torch.zeros(500))
    means = pytree.tree_map(lambda x: x.mean(0), samples)
    torch.testing.assert_close(means, derivatives(diffopt.adamw()), rtol=3e-2, atol=1e-2)
    spread = pytree.tree_map(lambda x: x.std(0).max().item(), samples)
    assert min(pytree.tree_leaves(spread)) > 1e-5


@needs_batched_bits
def test_under_vmap_randomness_is_what_torch_says():
    opt = precision(diffopt.adam())
    params, grads, record = torch.zeros(50), torch.full((4, 50), 1.003), opt.hparams(lr=0.1)

    def average(grad):
        return opt.update(params, grad, opt.init(params), record)[1].inner.exp_avg

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(average)(grads)
    same = torch.vmap(average, randomness="same")(grads)
    assert (same == same[0]).all()
    different = torch.vmap(average, randomness="different")(grads)
    assert not (different == different[0]).all()


@pytest.mark.parametrize("options", [{"state_dtype": None}, {"stochastic": False}])
def test_no_numbers_are_drawn_where_none_are_needed(options):
    opt, params = precision(diffopt.adam(), **options), tree(dtype=BF16)
    before = torch.get_rng_state()
    _, state = opt.update(params, tree(dtype=BF16), opt.init(params), opt.hparams(lr=0.1))
    opt.update_(params, tree(dtype=BF16), state, opt.hparams(lr=0.1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_compiles():
    opt, params, grads = precision(diffopt.sgd()), draw(5, dtype=BF16), draw(5, seed=1, dtype=BF16)
    state, record = opt.init(params), opt.hparams(lr=0.1, momentum=0.9)
    step = torch.compile(opt.update, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    expected = opt.update(params, grads, state, record)
    torch.manual_seed(0)
    torch.testing.assert_close(step(params, grads, state, record), expected)


STRUCTURAL = ["kept", "pure", "no_gradient", "in_place", "key_order", "complex_pairs", "prefix"]
STRUCTURAL += ["errors", "half_zero_gradient"]


@pytest.mark.parametrize("check", STRUCTURAL)
def test_conforms_where_exactness_is_not_asked_for(check):
    torch.manual_seed(0)
    hparams = {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.05}
    optimizer = precision(diffopt.adam(), stochastic=check != "in_place")
    CHECKS[check](Case(optimizer, hparams, elementwise=True))


# As a torch.optim.Optimizer


def model(dtype=BF16):
    torch.manual_seed(0)
    layers = torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    return torch.nn.Sequential(*layers).to(dtype)


def train(net, optimizer, count=3):
    for i in range(count):
        torch.manual_seed(100 + i)
        x = draw(16, 4, seed=i, dtype=net[0].weight.dtype)
        optimizer.zero_grad()
        (net(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()


def new(net, opt=None):
    return from_pure(opt or precision(diffopt.adamw()), net.parameters(), lr=1e-2)


def loaded(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def kinds(optimizer, net):
    row = optimizer.state[net[0].weight]
    return {name: row[name].dtype for name in ("master", "exp_avg", "exp_avg_sq")}


NARROW = {"master": F32, "exp_avg": BF16, "exp_avg_sq": BF16}


@pytest.mark.parametrize(
    "inner", [diffopt.adamw(), t.chain(t.clip_by_norm(), diffopt.adamw())], ids=["rule", "chain"]
)
def test_a_run_goes_on_from_its_checkpoint_with_the_same_bits(inner):
    net, other = model(), model()
    optimizer = new(net, precision(inner))
    train(net, optimizer)
    assert kinds(optimizer, net) == NARROW
    assert set(optimizer.state[net[0].weight]) == {"step", *NARROW}
    resumed = new(other, precision(inner))
    resumed.load_state_dict(loaded(optimizer.state_dict()))
    other.load_state_dict(net.state_dict())  # afterwards
    assert kinds(resumed, other) == NARROW
    train(net, optimizer)
    train(other, resumed)
    assert equal(list(other.parameters()), list(net.parameters()))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("plain", [torch.optim.AdamW, diffopt.optim.AdamW])
def test_a_checkpoint_without_masters_loads_and_one_with_them_loads_without(plain, dtype):
    before, net, after = model(dtype), model(), model(dtype)
    trained = plain(before.parameters(), lr=1e-2)
    train(before, trained)
    optimizer = new(net)
    optimizer.load_state_dict(loaded(trained.state_dict()))
    net.load_state_dict(before.state_dict())
    assert kinds(optimizer, net) == NARROW
    train(net, optimizer)
    row = optimizer.state[net[0].weight]
    assert row["step"] == 6
    assert torch.equal(row["master"].to(BF16), net[0].weight)
    torch.testing.assert_close(row["master"], net[0].weight.float(), rtol=1e-2, atol=1e-3)
    back = plain(after.parameters(), lr=1e-2)
    back.load_state_dict(loaded(optimizer.state_dict()))
    train(after, back)


def test_other_state_that_a_checkpoint_lacks_is_still_missed():
    net = model()
    trained = torch.optim.AdamW(net.parameters(), lr=1e-2)
    train(net, trained)
    with pytest.raises(ValueError, match="but no max_exp_avg_sq"):
        new(net, precision(diffopt.adamw(amsgrad=True))).load_state_dict(trained.state_dict())


def test_parameters_that_are_loaded_later_are_what_training_goes_on_from():
    net = model()
    optimizer = new(net)
    train(net, optimizer)
    fresh = {name: x + 1 for name, x in model().state_dict().items()}
    net.load_state_dict(fresh)
    train(net, optimizer, 1)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), fresh[name], rtol=0, atol=0.03)


def test_it_becomes_pure_in_the_middle_of_a_run():
    net = model()
    optimizer = new(net)
    train(net, optimizer)
    opt, params, state, record = to_pure(optimizer)
    assert opt == precision(diffopt.adamw())
    assert {x.dtype for x in pytree.tree_leaves(state.master)} == {F32}
    opt.update(params, [torch.ones_like(p) for p in params], state, record)


# Values and arguments


def test_it_is_a_value():
    opt = precision(diffopt.adamw(), stochastic=False)
    assert opt == precision(diffopt.adamw(), stochastic=False) == pickle.loads(pickle.dumps(opt))
    assert hash(opt) == hash(pickle.loads(pickle.dumps(opt)))
    assert opt != precision(diffopt.adamw())
    assert "state_dtype=torch.bfloat16" in repr(opt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dtype": F16}, "state_dtype is torch.float16, but must be torch.bfloat16 or None"),
        ({"state_dtype": "bf16"}, "state_dtype is 'bf16'"),
        ({"master_dtype": BF16}, "master_dtype is torch.bfloat16, but must be torch.float32"),
        ({"stochastic": 1}, "stochastic is 1"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        precision(diffopt.adam(), **options)
