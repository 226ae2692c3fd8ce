"""Optimizers made from optimizers, against torch, closed forms and finite differences."""

import concurrent.futures
import copy
import dataclasses
import io
import itertools
import multiprocessing
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import _pytree as pytree

import diffopt
from diffopt import transforms as t
from diffopt.rules import Hyperparameter, hparams, number
from diffopt.testing._assertions import Snapshot
from registry import COMPOSITIONS, REGISTRY

F64 = torch.float64


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tree(seed=0, dtype=F64):
    shapes = {"a": (2, 3), "b": (3,), "c": ()}
    return {
        k: draw(*shape, seed=seed + i, dtype=dtype) for i, (k, shape) in enumerate(shapes.items())
    }


def run(opt, params, grads, *args, **numbers):
    """Steps with a list of gradients, pure and in place, which must agree."""
    record = opt.hparams(*args, **numbers)
    pure, in_place = params, pytree.tree_map(torch.clone, params)
    state, state_ = opt.init(params), opt.init(params)
    for grad in grads:
        pure, state = opt.update(pure, grad, state, record)
        opt.update_(in_place, grad, state_, record)
    exactly((in_place, state_), (pure, state))
    return pure, state


def exactly(mine, theirs):
    """Equal to the rounding of each dtype."""
    for x, y in zip(pytree.tree_leaves(mine), pytree.tree_leaves(theirs), strict=True):
        fine = x.dtype in (F64, torch.complex128)
        tolerances = {"rtol": 1e-12, "atol": 1e-12} if fine else {}
        torch.testing.assert_close(x, y, equal_nan=True, **tolerances)


def clipped(transformation, grads, params=None, **numbers):
    record = transformation.hparams(**numbers)
    params = pytree.tree_map(torch.zeros_like, grads) if params is None else params
    return transformation.apply(grads, params, transformation.init(params), record)[0]


def check_derivatives(function, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


# Clips


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("max_norm", [0.0, 0.1, 1.0, 100.0])
def test_clips_by_norm_are_clip_grad_norm(max_norm, dtype):
    grads = tree(dtype=dtype)

    def by_torch(groups):
        params = {name: nn.Parameter(torch.zeros_like(grad)) for name, grad in grads.items()}
        for name, param in params.items():
            param.grad = grads[name].clone()
        for group in groups:
            clip_grad_norm_([params[name] for name in group], max_norm)
        return {name: param.grad for name, param in params.items()}

    for clip, groups in ((t.clip_by_global_norm(), ["abc"]), (t.clip_by_norm(), "abc")):
        torch.testing.assert_close(clipped(clip, grads, max_norm=max_norm), by_torch(groups))


@pytest.mark.parametrize(
    "clip", [t.clip_by_global_norm(), t.clip_by_norm()], ids=["global", "each"]
)
def test_a_norm_at_the_threshold_shrinks_by_torchs_epsilon(clip):
    grad = torch.tensor([3.0, 4.0], dtype=F64)
    expected = grad * (5.0 / (5.0 + 1e-6))
    torch.testing.assert_close(clipped(clip, grad, max_norm=5.0), expected, rtol=1e-15, atol=0)
    assert torch.equal(clipped(clip, grad, max_norm=5.0 + 2e-6), grad)


def test_clip_by_value_is_clip_grad_value():
    param = nn.Parameter(torch.zeros(100, dtype=F64))
    param.grad = draw(100)
    expected = clipped(t.clip_by_value(), param.grad.clone(), clip_value=0.7)
    clip_grad_value_(param, 0.7)
    assert torch.equal(param.grad, expected)


def test_a_complex_value_is_clipped_in_either_part():
    grad = torch.tensor([2 + 0.1j, -0.3 - 4j], dtype=torch.complex128)
    expected = torch.tensor([1 + 0.1j, -0.3 - 1j], dtype=torch.complex128)
    torch.testing.assert_close(clipped(t.clip_by_value(), grad), expected)
    bound = torch.tensor([0.05, 2.0])
    expected = torch.tensor([0.05 + 0.05j, -0.3 - 2j], dtype=torch.complex128)
    torch.testing.assert_close(clipped(t.clip_by_value(), grad, clip_value=bound), expected)


def test_missing_gradients_do_not_count_in_the_norm():
    grads = {"a": torch.tensor([3.0]), "b": None, "c": torch.tensor([4.0])}
    params = {"a": torch.ones(1), "b": torch.full((1,), 7.0), "c": torch.ones(1)}
    new = clipped(t.clip_by_global_norm(), grads, params)
    torch.testing.assert_close(new["c"], torch.tensor([0.8]))
    assert new["b"] is None


def test_nothing_but_missing_gradients():
    params = {"a": torch.ones(2)}
    for clip in (t.clip_by_global_norm(), t.clip_by_norm(), t.clip_by_value()):
        opt = t.chain(clip, diffopt.sgd())
        new, _ = opt.update(params, {"a": None}, opt.init(params), opt.hparams())
        assert new["a"] is params["a"]


def test_norms_of_half_precision_are_float32():
    grad = torch.full((4096,), 300.0, dtype=torch.float16)  # its square is infinite
    expected = torch.full((4096,), 1 / 64, dtype=torch.float16)
    torch.testing.assert_close(clipped(t.clip_by_global_norm(), grad), expected)
    opt = t.chain(t.clip_by_norm(), diffopt.sgd())
    param = torch.zeros(4096, dtype=torch.float16)
    new, _ = opt.update(param, grad, opt.init(param), opt.hparams(lr=1.0))
    torch.testing.assert_close(new, -expected)


def test_thresholds_may_differ_from_tensor_to_tensor():
    grads = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    bounds = {"a": 1.0, "b": torch.tensor(2.0)}
    torch.testing.assert_close(
        clipped(t.clip_by_global_norm(), grads, max_norm=bounds),
        {"a": torch.tensor([0.6]), "b": torch.tensor([1.6])},
    )
    torch.testing.assert_close(
        clipped(t.clip_by_norm(), grads, max_norm=bounds),
        {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])},
    )


CLIPS = {
    "global": (t.clip_by_global_norm(), "max_norm"),
    "each": (t.clip_by_norm(), "max_norm"),
    "value": (t.clip_by_value(), "clip_value"),
}


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("bound", [0.3, 50.0])
def test_clips_have_the_derivatives_of_finite_differences(name, bound):
    clip, field = CLIPS[name]

    def function(x, y, bound):
        new = clipped(clip, {"x": x, "y": y}, **{field: bound})
        return new["x"], new["y"]

    check_derivatives(function, draw(3), draw(2, 2, seed=1), torch.tensor(bound, dtype=F64))


@pytest.mark.parametrize("name", CLIPS)
def test_at_zero_gradients_clips_are_the_identity_with_its_derivatives(name):
    clip, field = CLIPS[name]

    def function(x, y, bound):
        new = clipped(clip, {"x": x, "y": y}, **{field: bound})
        return new["x"], new["y"]

    zeros = torch.zeros(3, dtype=F64), torch.zeros(2, dtype=F64), torch.tensor(0.5, dtype=F64)
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        check_derivatives(function, *zeros)
    jacobian = torch.func.jacrev(function, argnums=(0, 2))(*zeros)[0]
    torch.testing.assert_close(jacobian[0], torch.eye(3, dtype=F64), rtol=0, atol=0)
    assert torch.equal(jacobian[1], torch.zeros(3, dtype=F64))


@pytest.mark.parametrize("name", CLIPS)
def test_a_threshold_of_zero_gives_zeros_with_finite_derivatives(name):
    clip, field = CLIPS[name]
    for grad in (torch.zeros(3, dtype=F64), draw(3)):
        inputs = grad.requires_grad_(), torch.zeros((), dtype=F64, requires_grad=True)
        new = clipped(clip, inputs[0], **{field: inputs[1]})
        assert torch.equal(new, torch.zeros(3, dtype=F64))
        first = torch.autograd.grad(new.sum(), inputs, create_graph=True)
        total = sum(x.square().sum() for x in (*first, *inputs))
        second = torch.autograd.grad(total, inputs)
        assert all(x.isfinite().all() for x in (*first, *second))


def test_a_zero_tensor_among_others_has_finite_derivatives():
    x, zero = draw(3).requires_grad_(), torch.zeros(2, dtype=F64, requires_grad=True)
    for clip in (t.clip_by_global_norm(), t.clip_by_norm()):
        new = clipped(clip, [x, zero], max_norm=0.5)
        first = torch.autograd.grad(new[0].sum() + new[1].sum(), (x, zero), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, zero))
        assert all(g.isfinite().all() for g in (*first, *second))


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex64, torch.float16], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_clips_of_gradients_that_are_not_finite_are_those_of_torch(bad, dtype):
    grads = [torch.tensor([bad, 1.0], dtype=dtype), torch.tensor([1e4, -1e4], dtype=dtype)]
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]

    def by_torch(clip_, *groups):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        for group in groups:
            clip_(group, 1.0)
        return [param.grad for param in params]

    ours = clipped(t.clip_by_global_norm(), grads)
    torch.testing.assert_close(ours, by_torch(clip_grad_norm_, params), equal_nan=True)
    ours = clipped(t.clip_by_norm(), grads)
    torch.testing.assert_close(ours, by_torch(clip_grad_norm_, *params), equal_nan=True)
    if not dtype.is_complex:  # which torch refuses
        for bound in (1.0, torch.tensor(1.0, dtype=dtype), torch.ones(2, dtype=dtype)):
            ours = clipped(t.clip_by_value(), grads, clip_value=bound)
            torch.testing.assert_close(ours, by_torch(clip_grad_value_, params), equal_nan=True)


@pytest.mark.parametrize("name", CLIPS)
def test_a_bound_that_is_nan_shows(name):
    clip, field = CLIPS[name]
    for grad in (draw(3), torch.zeros(3, dtype=F64)):
        new = clipped(clip, grad, **{field: torch.tensor(torch.nan, dtype=F64)})
        assert new.isnan().all()


@pytest.mark.parametrize("wrap", [lambda opt: opt, t.flatten, t.ema, lambda o: t.accumulate(o, 1)])
def test_no_step_is_greater_than_the_bound_beside_a_nan(wrap):
    opt = wrap(t.chain(t.clip_by_global_norm(), diffopt.sgd()))
    grads = [torch.tensor([torch.nan, 1.0]), torch.tensor([1e6, -1e6])]
    new, _ = run(opt, [torch.zeros(2), torch.zeros(2)], [grads], lr=0.1)
    assert not any((p.abs() > 0.1).any() for p in new)


@pytest.mark.parametrize("bound", [5.0, torch.tensor(5.0, dtype=F64), "per weight"])
@pytest.mark.parametrize("name", CLIPS)
def test_a_gradient_that_meets_the_bound_has_the_derivatives_of_the_identity(name, bound):
    clip, field = CLIPS[name]
    grad = torch.tensor([3.0, 4.0 if name != "value" else 5.0], dtype=F64)
    at = 5.0 if name == "value" else 5.0 + 1e-6
    if isinstance(bound, str):
        bound = torch.full((2,), at, dtype=F64)
    else:
        bound = torch.full_like(bound, at) if isinstance(bound, torch.Tensor) else at

    def function(x):
        return clipped(clip, x, **{field: bound})

    assert torch.equal(function(grad), grad)
    jacobian = torch.func.jacrev(function)(grad)
    assert torch.equal(jacobian, torch.eye(2, dtype=F64))
    x = grad.clone().requires_grad_()
    first = torch.autograd.grad(function(x).sum(), x, create_graph=True)[0]
    assert torch.equal(first, torch.ones(2, dtype=F64))
    if first.requires_grad:
        second = torch.autograd.grad(first.square().sum(), x, materialize_grads=True)[0]
        assert torch.equal(second, torch.zeros(2, dtype=F64))


@pytest.mark.parametrize("shapes", [[(0,)], [(0,), (2,)], [(2, 0), (), (0,)]], ids=str)
def test_steps_of_empty_tensors_are_not_skipped(shapes):
    params = [torch.zeros(shape) for shape in shapes]
    new, _ = run(t.skip_nonfinite(sgd), params, [[torch.ones_like(p) for p in params]], lr=1.0)
    assert all((p == -1).all() for p in new)


# Values


@dataclasses.dataclass(frozen=True)
class Descent(diffopt.Optimizer):
    """An optimizer of a user's own, as a value."""

    rate: float = 0.1

    @staticmethod
    def hparams(factor=1.0):
        return {"factor": factor}

    def init(self, params):
        return ()

    def update(self, params, grads, state, hparams):
        return pytree.tree_map(lambda p, g: p - self.rate * g, params, grads), state


@hparams
class Factor:
    factor: float = number(1.0)


def scaled(grads, params, records):
    return [record.factor * grad for grad, record in zip(grads, records, strict=True)]


def is_matrix(params):
    return pytree.tree_map(lambda p: p.dim() == 2, params)


ONE = torch.ones(())
MASK = {"a": True, "b": [False, True]}
MAKERS = {
    "chain": lambda o: t.chain(t.clip_by_global_norm(), t.clip_by_norm(), t.clip_by_value(), o),
    "decay": lambda o: t.chain(t.add_decayed_weights(), o),
    "stateless": lambda o: t.chain(t.stateless(Factor, scaled), o),
    "partition": lambda o: t.partition({"x": o, 2: t.ema(o)}, {"a": "x", "b": [2, "x"]}),
    "partition-function": lambda o: t.partition({True: o, False: o}, is_matrix),
    "masked": lambda o: t.masked(o, dict(reversed(MASK.items()))),
    "masked-transformation": lambda o: t.chain(t.masked(t.clip_by_norm(), MASK), o),
    "freeze": lambda o: t.freeze(o, MASK),
    "accumulate": lambda o: t.accumulate(o, 3),
    "ema": lambda o: t.ema(o, bias_correction=True),
    "flatten": t.flatten,
    "maximize": t.maximize,
    "skip": t.skip_nonfinite,
    "nested": lambda o: t.chain(t.clip_by_norm(), t.skip_nonfinite(t.ema(t.freeze(o, MASK)))),
}


@pytest.mark.parametrize("name", MAKERS)
def test_compositions_are_values(name):
    make = MAKERS[name]
    opt, same = make(Descent()), make(Descent())
    assert opt == same
    assert hash(opt) == hash(same)
    assert opt != make(Descent(0.2))
    assert opt.hparams == same.hparams
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert twin == opt
        assert twin.hparams == opt.hparams
    with pytest.raises(dataclasses.FrozenInstanceError):
        opt.optimizer = None


@pytest.mark.parametrize("name", MAKERS)
def test_the_repr_of_a_composition_is_one_line(name):
    text = repr(MAKERS[name](Descent()))
    assert "\n" not in text
    assert "0x" not in text
    assert len(text) < 250
    assert "Descent(rate=0.1)" in text


def test_the_repr_of_a_composition_names_parts_and_arguments():
    assert repr(MAKERS["chain"](Descent())) == (
        "Chain(parts=(ClipByGlobalNorm(), ClipByNorm(), ClipByValue(), Descent(rate=0.1)))"
    )
    assert repr(t.accumulate(Descent(), 3)) == "Accumulate(optimizer=Descent(rate=0.1), k=3)"
    assert repr(t.stateless(Factor, scaled)) == "FromFunction(hparams=Factor, function=scaled)"
    wide = repr(t.freeze(Descent(), {f"layer{i}": True for i in range(1000)}))
    assert len(wide) < 250


@pytest.mark.parametrize("different", [t.clip_by_norm(), t.masked(t.clip_by_norm(), MASK)])
def test_compositions_with_other_arguments_are_not_equal(different):
    assert t.chain(t.clip_by_global_norm(), sgd) != t.chain(different, sgd)
    assert t.chain(different, sgd) == t.chain(different, sgd)
    assert t.masked(sgd, MASK) != t.freeze(sgd, MASK)
    assert t.masked(sgd, MASK) != t.masked(sgd, {**MASK, "a": False})
    assert t.accumulate(sgd, 2) != t.accumulate(sgd, 3)
    assert t.maximize(sgd) != t.skip_nonfinite(sgd)
    assert t.ema(sgd) != "ema"


def test_a_composition_with_labels_that_cannot_be_hashed_says_so():
    opt = t.partition({"x": sgd}, {"a": {"x"}})
    assert opt == opt
    with pytest.raises(TypeError, match="unhashable type: 'set'"):
        hash(opt)


@pytest.mark.slow
def test_compositions_go_to_other_processes():
    opt = MAKERS["nested"](Descent())
    params = {"a": torch.ones(2), "b": [torch.ones(1), torch.ones(3)]}
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(repr, opt).result() == repr(opt)
        assert pool.submit(opt.init, params).result()[0] == ()


@pytest.mark.parametrize("name", ["chain", "partition-function", "nested"])
def test_equal_compositions_are_one_constant_for_torch_compile(name):
    params = {"a": torch.ones(2), "b": [torch.ones(()), torch.ones(3)]}
    counter = CompileCounter()

    def step(opt, params, state, record):
        return opt.update(params, params, state, record)[0]

    for call in (step, lambda opt, *args: opt.update(args[0], *args)[0]):
        compiled = torch.compile(call, backend=counter, fullgraph=True)
        for _ in range(2):
            opt = MAKERS[name](Descent())
            arguments = opt, params, opt.init(params), opt.hparams()
            torch.testing.assert_close(compiled(*arguments), step(*arguments))
    assert counter.frame_count == 2
    torch.compiler.reset()


# Chains and their hyperparameters


def test_a_chain_is_its_parts_by_hand():
    params, grads = tree(), [tree(10), tree(20), tree(30)]
    decay, clip, sgd = t.add_decayed_weights(), t.clip_by_global_norm(), diffopt.sgd()
    records = (
        decay.hparams(weight_decay=0.1),
        clip.hparams(max_norm=0.5),
        sgd.hparams(lr=0.1, momentum=0.9),
    )
    new, _ = run(t.chain(decay, clip, sgd), params, grads, *records)
    mine = {k: nn.Parameter(p.clone()) for k, p in params.items()}
    torch_sgd = torch.optim.SGD(mine.values(), lr=0.1, momentum=0.9)
    for grad in grads:
        for name, param in mine.items():
            param.grad = grad[name] + 0.1 * param.detach()
        clip_grad_norm_(mine.values(), 0.5)
        torch_sgd.step()
    torch.testing.assert_close(new, {k: p.detach() for k, p in mine.items()})


def test_keywords_find_their_part():
    opt = t.chain(t.clip_by_global_norm(), t.clip_by_value(), t.ema(diffopt.adam()))
    record = opt.hparams(lr=0.3, max_norm=2.0, decay=0.5, beta1=0.8)
    assert (record[0].max_norm, record[1].clip_value) == (2.0, 1.0)
    assert (record[2][0].decay, record[2][1].lr, record[2][1].beta1) == (0.5, 0.3, 0.8)


def test_wrappers_have_the_hyperparameters_of_the_optimizer():
    adam = diffopt.adam()
    for wrap in (t.maximize, t.skip_nonfinite, t.flatten, lambda opt: t.accumulate(opt, 2)):
        assert wrap(adam).hparams(lr=0.3).lr == 0.3
        assert wrap(t.chain(adam)).hparams(lr=0.3)[0].lr == 0.3


def test_numbers_are_checked_when_the_record_is_made():
    opt = t.chain(t.clip_by_global_norm(), diffopt.sgd())
    with pytest.raises(ValueError, match=r"hparams.max_norm is -1.0, but must be >= 0"):
        opt.hparams(max_norm=-1.0)


def test_keywords_of_other_makers_of_records_are_found_by_their_signature():
    class Halves(diffopt.Optimizer):
        @staticmethod
        def hparams(rate=0.5):
            return {"rate": rate}

        def init(self, params):
            return ()

        def update(self, params, grads, state, hparams):
            return pytree.tree_map(lambda p, g: p - hparams["rate"] * g, params, grads), state

    opt = t.chain(t.clip_by_value(), Halves())
    new, _ = run(opt, torch.zeros(1), [torch.ones(1)], rate=0.25, clip_value=0.5)
    torch.testing.assert_close(new, torch.tensor([-0.125]))


class Forgetful(t.Transformation):
    hparams = tuple

    def init(self, params):
        return ()

    def apply(self, grads, params, state, hparams):
        return grads


@pytest.mark.parametrize("part", [Forgetful(), t.masked(Forgetful(), True)])
def test_an_apply_that_returns_no_state_is_named(part):
    params = {"a": torch.zeros(1), "b": torch.zeros(1)}  # which two names could stand for
    with pytest.raises(TypeError, match=r"^Forgetful\.apply must return \(grads, state\), not"):
        run(t.chain(part, diffopt.sgd()), params, [params], lr=0.1)


def both(*optimizers):
    return t.partition(dict(enumerate(optimizers)), 0)


sgd, adam = diffopt.sgd(), diffopt.adam()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: t.chain(t.add_decayed_weights(), sgd).hparams(weight_decay=0.1),
            "the hyperparameter 'weight_decay' belongs to the parts 0 and 1: name its part",
        ),
        (
            lambda: both(sgd, adam).hparams(lr=0.1),
            r"'lr' belongs to the parts 0 and 1: .* hparams\(\{label: record, \.\.\.\}\)",
        ),
        (
            lambda: t.chain(t.clip_by_value(), both(sgd, adam)).hparams(lr=0.1),
            "the hyperparameter 'lr' belongs to the parts 0 and 1: name its part",
        ),
        (
            lambda: t.chain(t.clip_by_norm(), diffopt.sgd(momentum=False)).hparams(lrr=0.1),
            "no part has a hyperparameter 'lrr'.* of part 0: max_norm; of part 1: lr, weight_decay",
        ),
        (
            lambda: t.chain(t.clip_by_norm(), adam).hparams(betas=(0.9, 0.99)),
            "no part has a hyperparameter 'betas': pass beta1 and beta2",
        ),
        (
            lambda: t.chain(t.clip_by_value(), sgd).hparams(sgd.hparams()),
            r"each of the parts \[0, 1\], but got records for \[0\] and the keywords \[\]",
        ),
        (
            lambda: t.chain(t.clip_by_value(), sgd).hparams(sgd.hparams(), sgd.hparams()),
            r"hparams\[0\] has type MomentumHParams, but must have type ClipValue",
        ),
        (
            lambda: t.chain(sgd).hparams(sgd.hparams(), lr=0.1),
            r"records for \[0\] and the keywords \['lr'\]",
        ),
        (
            lambda: both(sgd, adam).hparams({0: sgd.hparams()}),
            r"each of the parts \[0, 1\], but got records for \[0\] and the keywords \[\]",
        ),
        (
            lambda: both(sgd, adam).hparams({0: sgd.hparams(), 1: 0.1}),
            r"hparams\[1\] has type float, but must have type AdamHParams",
        ),
        (
            lambda: t.partition({"a": sgd, "b": adam}, "a").hparams(a=sgd.hparams()),
            r"'a' is a part, not a hyperparameter: pass .* hparams\(\{label: record, \.\.\.\}\)",
        ),
        (lambda: t.chain(), "chain requires an optimizer"),
        (lambda: t.chain(t.clip_by_value()), "the last part of a chain is .*, not a diffopt"),
        (lambda: t.chain(sgd, adam), "part 0 of a chain is .*: all but the last must be gradient"),
        (lambda: t.partition({"a": 1}, "a"), r"optimizers\['a'\] is 1, not a diffopt optimizer"),
        (lambda: t.partition([adam], "a"), "optimizers is a list, not a dict with an optimizer"),
        (lambda: t.masked(1, True), "part is 1, neither an optimizer nor a gradient transfor"),
        (lambda: t.freeze(t.clip_by_norm(), True), "optimizer is .*, not a diffopt optimizer"),
        (lambda: t.flatten(None), "optimizer is None, not a diffopt optimizer"),
        (lambda: t.maximize(torch.optim.SGD), "optimizer is SGD, a torch.optim.Optimizer"),
        (lambda: t.ema(sgd, bias_correction=0.9), "bias_correction is 0.9, not a bool"),
        (lambda: t.ema(t.clip_by_norm()), r"optimizer is ClipByNorm\(\), not a diffopt optimizer"),
        (lambda: t.accumulate(3, 2), "optimizer is 3, not a diffopt optimizer"),
        (lambda: t.ema(nn.Linear(2, 2)), "optimizer is [^\\n]*, not a diffopt optimizer"),
        (
            lambda: t.skip_nonfinite(torch.optim.SGD([torch.zeros(1)])),
            "optimizer is SGD, a torch.optim.Optimizer, .*convert it with diffopt.optim.to_pure",
        ),
        (lambda: both(sgd, adam).hparams([1]), r"takes keywords or a dict of records, not \[1\]"),
        (lambda: t.stateless(dict, scaled), "hparams is <class 'dict'>, not a class made by"),
        (lambda: t.stateless(Factor, None), "function is None, not a function"),
        (
            lambda: t.stateless(tuple, lambda g, p, hp: g[0]).apply([ONE], [ONE], (), ()),
            "returned a tensor, not a list of gradients",
        ),
    ],
)
def test_wrong_calls_raise_and_say_what_is_right(call, message):
    with pytest.raises(TypeError, match=message):
        call()


class Negated(t.Transformation):
    hparams = tuple

    def init(self, params):
        return ()

    def apply(self, grads, params, state, hparams):
        return pytree.tree_map(lambda g: None if g is None else -g, grads), state


@pytest.mark.parametrize(
    "negated", [Negated(), t.stateless(tuple, lambda grads, params, hp: [-g for g in grads])]
)
def test_a_gradient_transformation_may_have_no_hyperparameters(negated):
    opt = t.chain(t.clip_by_value(), negated, sgd)
    params, grads = {"a": ONE, "b": ONE.clone()}, {"a": ONE, "b": None}
    new, _ = opt.update(params, grads, opt.init(params), opt.hparams(lr=0.25))
    assert (new["a"], new["b"]) == (1.25, 1)
    optimizer = diffopt.optim.from_pure(opt, [param := nn.Parameter(ONE.clone())], lr=0.25)
    param.grad = ONE
    optimizer.step()
    assert param == 1.25


@pytest.mark.parametrize("k", [0, -1, 2.0, True])
def test_a_wrong_k_raises(k):
    with pytest.raises(ValueError, match=f"k is {k}, but must be an integer >= 1"):
        t.accumulate(sgd, k)


# Every composition: what it refuses, and that nothing has changed then


def point(case, seed=0):
    params = {"first": draw(*case.shapes[0], seed=seed), "rest": [draw(*case.shapes[1], seed=1)]}
    grads = pytree.tree_map(lambda p: 0.5 * p + 1, params)
    state, record = case.optimizer.init(params), case.record()
    return (*case.optimizer.update(params, grads, state, record), grads, record)


@pytest.mark.parametrize("row", COMPOSITIONS)
def test_wrong_states_and_hyperparameters_are_refused_before_anything_changes(row):
    case = COMPOSITIONS[row]
    params, state, grads, record = point(case)
    leaves, spec = pytree.tree_flatten(state)
    numbers, record_spec = pytree.tree_flatten(record)
    wrong = [(5, record), (state, 5), ([], record), (state, [])]
    for i, leaf in enumerate(leaves):
        if leaf.dim():
            longer = [*leaves[:i], torch.zeros(7, *leaf.shape, dtype=F64), *leaves[i + 1 :]]
            wrong.append((pytree.tree_unflatten(longer, spec), record))
    for i, bad in itertools.product(range(len(numbers)), ({"nope": 0.1}, torch.ones(7, 2, 3))):
        changed = [*numbers[:i], bad, *numbers[i + 1 :]]
        wrong.append((state, pytree.tree_unflatten(changed, record_spec)))
    for bad_state, bad_record in wrong:
        arguments = (params, grads, bad_state, bad_record)
        before = Snapshot(arguments)
        for call in (case.optimizer.update, case.optimizer.update_):
            with pytest.raises((TypeError, ValueError)):
                call(*arguments)
            before.check()


@pytest.mark.parametrize("row", COMPOSITIONS)
def test_an_expanded_tensor_is_refused_in_place_before_anything_changes(row):
    case = COMPOSITIONS[row]
    params, state, grads, record = point(case)
    params["rest"] = [torch.zeros(1, dtype=F64).expand(2)]
    params["first"] = torch.ones(2, dtype=F64)
    grads = pytree.tree_map(torch.ones_like, params)
    state = case.optimizer.init(params)
    before = Snapshot((params, state))
    with pytest.raises(ValueError, match=r"params\['rest'\]\[0\] is an expanded tensor"):
        case.optimizer.update_(params, grads, state, record)
    before.check()


WRITTEN = {
    "an inference tensor": lambda x: inference(x),
    "an expanded tensor": lambda x: x.flatten()[:1].expand(max(2, x.numel()))[: x.numel()],
    "not a tensor": lambda x: 3.0,
}


def inference(x):
    with torch.inference_mode():
        return x.clone()


def unchanged(*tree):
    """A snapshot; inference tensors have no version that it could look at."""
    return Snapshot([x for x in pytree.tree_leaves(tree) if not getattr(x, "is_inference", bool)()])


def replaced(tree, i, leaf):
    leaves, spec = pytree.tree_flatten(tree)
    return pytree.tree_unflatten([*leaves[:i], leaf, *leaves[i + 1 :]], spec)


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("row", COMPOSITIONS)
def test_nothing_changes_where_one_leaf_cannot_be_written(row, kind):
    case = COMPOSITIONS[row]
    params, state, grads, record = point(case)
    for i, leaf in enumerate(pytree.tree_leaves(state)):
        bad = WRITTEN[kind](leaf)
        if kind == "an expanded tensor" and (leaf.dim() == 0 or leaf.numel() < 2):
            continue
        bad = bad.view(leaf.shape) if kind == "an expanded tensor" and leaf.dim() == 1 else bad
        broken = replaced(state, i, bad)
        before = unchanged(params, broken)
        with pytest.raises((TypeError, ValueError)):
            case.optimizer.update_(params, grads, broken, record)
        before.check()


def test_a_chain_whose_transformation_cannot_be_written_moves_nothing():
    class Count(t.Transformation):
        """A state of a user's own."""

        hparams = dict

        def __init__(self, start, step=1):
            self.start, self.step = start, step

        def init(self, params):
            return {"count": self.start}

        def apply(self, grads, params, state, hparams):
            return grads, {"count": state["count"] + self.step}

    zero = torch.zeros((), dtype=torch.int64)
    wrong = [
        (Count(0), r"state\[0\]\['count'\] is 0 of type int, which update_ cannot overwrite"),
        (Count(zero, 0.5), "has dtype torch.int64, which cannot hold its new value of dtype"),
        (Count(zero, torch.ones(2).int()), r"has shape \(\), but its new value has shape \(2,\)"),
        (Count(inference(zero)), "is an inference tensor"),
    ]
    for dtype, (count, message) in itertools.product((torch.float32, torch.bfloat16), wrong):
        opt, params = t.chain(count, adam), {"w": torch.ones(2, dtype=dtype)}
        state = opt.init(params)
        before = unchanged(params, state[1])
        with pytest.raises(ValueError, match=message):
            opt.update_(params, params, state, opt.hparams())
        before.check()
        new, _ = opt.update(params, params, state, opt.hparams(lr=0.5))
        assert not torch.equal(new["w"], params["w"])


@pytest.mark.parametrize("name", ["chain", "ema", "accumulate", "flatten", "skip", "freeze"])
def test_a_bad_part_of_a_partition_changes_no_other_part(name):
    wrap = {
        "chain": lambda o: t.chain(t.clip_by_global_norm(), o),
        "ema": t.ema,
        "accumulate": lambda o: t.accumulate(o, 1),
        "flatten": t.flatten,
        "skip": t.skip_nonfinite,
        "freeze": lambda o: t.freeze(o, {"a": False, "b": False, "c": False}),
    }[name]
    parts = {"a": diffopt.sgd(), "b": wrap(diffopt.adam()), "c": wrap(diffopt.rmsprop())}
    opt = t.partition(parts, {"a": "a", "b": "b", "c": "c"})
    params = {key: torch.ones(3) for key in "abc"}
    records = {key: part.hparams() for key, part in parts.items()}
    for bad in "abc":
        record = records[bad]
        rate = {"lr": torch.ones(7)}
        wide = type(record)(**rate) if not isinstance(record, tuple) else None
        wrong = {**records, bad: wide or (record[0], type(record[1])(**rate))}
        state = opt.init(params)
        before = unchanged(params, state)
        with pytest.raises(ValueError, match="which does not broadcast to"):
            opt.update_(params, params, state, wrong)
        before.check()
        state = opt.init(params)
        leaves = pytree.tree_leaves(state)
        place = next(i for i, x in enumerate(leaves) if x is pytree.tree_leaves(state[bad])[-1])
        broken = replaced(state, place, inference(leaves[place]))
        before = unchanged(params, broken)
        with pytest.raises(ValueError, match="inference tensor"):
            opt.update_(params, params, broken, records)
        before.check()
        mixed = {**params, bad: params[bad].double()}
        state = opt.init(params)
        before = unchanged(mixed, state)
        with pytest.raises(ValueError, match=r"grads\['.'\] has dtype torch.float"):
            opt.update_(mixed, params, state, records)
        before.check()


@pytest.mark.parametrize("row", ["ema", "accumulate"])
def test_averages_of_integers_are_refused(row):
    case = COMPOSITIONS[row]
    params, state, grads, record = point(case)
    name = "average" if row == "ema" else "grad_sum"
    wrong = state._replace(**{name: pytree.tree_map(torch.Tensor.int, getattr(state, name))})
    before = Snapshot((params, wrong))
    for call in (case.optimizer.update, case.optimizer.update_):
        with pytest.raises(
            ValueError, match=rf"state.{name}\['first'\] has dtype torch.int32, but"
        ):
            call(params, grads, wrong, record)
        before.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, F64], ids=str)
def test_averages_and_sums_are_as_precise_as_their_params(dtype):
    params, grads = {"w": torch.ones(3)}, {"w": torch.full((3,), 1e-3)}

    def cast(state):
        return pytree.tree_map(lambda x: x.to(dtype) if x.dim() else x, state)

    opt = t.ema(sgd)
    expected = opt.update(params, grads, opt.init(params), opt.hparams())[1]
    state = opt.init(params)._replace(average=cast(params))
    found = opt.update(params, grads, state, opt.hparams())[1]
    wider = torch.promote_types(dtype, torch.float32)
    assert found.average["w"].dtype == wider
    torch.testing.assert_close(found.average["w"].float(), expected.average["w"])
    opt = t.accumulate(sgd, 3)
    state = opt.init(params)._replace(grad_sum=cast(grads))
    found = opt.update(params, grads, state, opt.hparams())[1].grad_sum["w"]
    assert found.dtype == wider
    torch.testing.assert_close(found.float(), cast(grads)["w"].float() + grads["w"])


@pytest.mark.parametrize("row", COMPOSITIONS | REGISTRY)
def test_states_load_with_weights_only(row):
    case = (COMPOSITIONS | REGISTRY)[row]
    _, state, _, record = point(case)
    file = io.BytesIO()
    torch.save((state, record), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    torch.testing.assert_close(pytree.tree_leaves(loaded), pytree.tree_leaves((state, record)))
    assert pytree.tree_structure(loaded) == pytree.tree_structure((state, record))


# Loops


def quartic(params):
    return sum((p**4).sum() / 4 + (p - 0.3).square().sum() for p in pytree.tree_leaves(params))


def inside(value):
    return pytree.tree_map(lambda x: torch.tensor(max(float(x), 0.05), dtype=F64), value)


@pytest.mark.parametrize("row", COMPOSITIONS)
def test_hypergradients_of_a_loop_are_those_of_finite_differences(row):
    case = COMPOSITIONS[row]
    numbers, spec = pytree.tree_flatten(inside(case.record()))
    start = {"first": draw(*case.shapes[0]), "rest": [draw(*case.shapes[1], seed=1)]}
    leaves, tree_spec = pytree.tree_flatten(start)

    def solve(*inputs):
        params = pytree.tree_unflatten(inputs[: len(leaves)], tree_spec)
        sol = diffopt.minimize(
            quartic,
            params,
            optimizer=case.optimizer,
            hparams=pytree.tree_unflatten(inputs[len(leaves) :], spec),
            steps=4,
        )
        averages = [leaf for leaf in pytree.tree_leaves(sol.state) if leaf.dim()]
        return (quartic(sol.params), *averages[:2])

    inputs = [x.clone().requires_grad_() for x in (*leaves, *numbers)]
    how = {"fast_mode": True, "check_undefined_grad": False}  # which the kit tries in each update
    assert torch.autograd.gradcheck(solve, inputs, rtol=1e-5, atol=1e-7, **how)
    assert torch.autograd.gradgradcheck(solve, inputs, **how)
    expected = torch.autograd.grad(solve(*inputs)[0], inputs, materialize_grads=True)
    scalar = torch.func.grad(lambda *x: solve(*x)[0], argnums=tuple(range(len(inputs))))
    torch.testing.assert_close(scalar(*(x.detach() for x in inputs)), expected)


# Weight decay


def test_added_decay_is_the_weight_decay_of_sgd():
    params, grads = tree(), [tree(10), tree(20)]
    decay = t.add_decayed_weights()
    opt = t.chain(decay, diffopt.sgd())
    rate = {"a": 0.1, "b": torch.tensor([0.1, 0.2, 0.3]), "c": 0.0}
    records = decay.hparams(weight_decay=rate), sgd.hparams(lr=0.1, momentum=0.9)
    mine, _ = run(opt, params, grads, *records)
    theirs, _ = run(diffopt.sgd(), params, grads, lr=0.1, momentum=0.9, weight_decay=rate)
    torch.testing.assert_close(mine, theirs)


# Partitions


def test_a_partition_is_torchs_optimizer_with_groups():
    params, grads = tree(), [tree(10), tree(20), tree(30)]
    adamw = diffopt.adamw()
    opt = t.partition({True: adamw, False: adamw}, {"a": True, "b": False, "c": False})
    records = {True: adamw.hparams(lr=0.1, weight_decay=0.3), False: adamw.hparams(lr=0.2)}
    new, state = run(opt, params, grads, records)
    mine = {k: nn.Parameter(p.clone()) for k, p in params.items()}
    groups = [
        {"params": [mine["a"]], "lr": 0.1, "weight_decay": 0.3},
        {"params": [mine["b"], mine["c"]], "lr": 0.2},
    ]
    theirs = torch.optim.AdamW(groups)
    for grad in grads:
        for name, param in mine.items():
            param.grad = grad[name]
        theirs.step()
    torch.testing.assert_close(new, {k: p.detach() for k, p in mine.items()})
    assert state[True].exp_avg["b"] == []
    assert state[False].exp_avg["a"] == []


def test_prefix_trees_are_those_of_all_params():
    params = {"body": [draw(2), draw(3)], "head": draw(2)}
    grads = [pytree.tree_map(lambda p: p + 1, params)] * 2
    opt = t.partition({"x": sgd, "y": sgd}, {"body": ["x", "y"], "head": "x"})
    for lr in (
        {"body": 0.1, "head": 0.2},
        {"body": [0.1, torch.tensor(0.3)], "head": torch.tensor([0.1, 0.5])},
        {"body": [0.1, torch.tensor([0.3, 0.2, 0.1])], "head": 0.1},
    ):
        record = sgd.hparams(lr=lr, momentum=0.9)
        mine, _ = run(opt, params, grads, {"x": record, "y": record})
        theirs, _ = run(sgd, params, grads, lr=lr, momentum=0.9)
        torch.testing.assert_close(mine, theirs)


def test_a_norm_in_a_partition_is_that_of_its_part():
    grads = {"a": torch.tensor([3.0]), "b": torch.tensor([8.0]), "c": torch.tensor([4.0])}
    params = pytree.tree_map(torch.zeros_like, grads)
    clip = t.chain(t.clip_by_global_norm(), diffopt.sgd())
    opt = t.partition({"clip": clip, "as is": sgd}, {"a": "clip", "b": "as is", "c": "clip"})
    records = {"clip": clip.hparams(lr=1.0, max_norm=1.0), "as is": sgd.hparams(lr=1.0)}
    new, _ = run(opt, params, [grads], records)
    expected = {"a": torch.tensor([-0.6]), "b": torch.tensor([-8.0]), "c": torch.tensor([-0.8])}
    torch.testing.assert_close(new, expected)


def test_labels_may_be_a_function_and_parts_compositions():
    params, grads = tree(), [tree(10), tree(20)]

    def labels(params):
        return pytree.tree_map(lambda p: "matrix" if p.dim() == 2 else "other", params)

    parts = {"matrix": t.chain(t.clip_by_value(), adam), "other": t.ema(sgd)}
    records = {
        "matrix": parts["matrix"].hparams(lr=0.1),
        "other": parts["other"].hparams(lr=0.2, decay=0.5),
    }
    new, state = run(t.partition(parts, labels), params, grads, records)
    rest = [{k: v for k, v in x.items() if k != "a"} for x in (params, *grads)]
    others, other_state = run(parts["other"], rest[0], rest[1:], *records["other"])
    torch.testing.assert_close({k: v for k, v in new.items() if k != "a"}, others)
    torch.testing.assert_close(state["other"].average["b"], other_state.average["b"])
    matrix, _ = run(parts["matrix"], params["a"], [g["a"] for g in grads], *records["matrix"])
    torch.testing.assert_close(new["a"], matrix)


def test_a_part_may_update_matrices_only():
    params, grads = tree(), [tree(10), tree(20)]
    muon, adamw = diffopt.muon(), diffopt.adamw()
    opt = t.partition({True: muon, False: adamw}, {"a": True, "b": False, "c": False})
    new, _ = run(opt, params, grads, {True: muon.hparams(lr=0.1), False: adamw.hparams()})
    matrix, _ = run(muon, params["a"], [g["a"] for g in grads], lr=0.1)
    torch.testing.assert_close(new["a"], matrix)
    with pytest.raises(ValueError, match=r"params\['b'\] "):
        t.partition({True: muon}, True).init(params)


def test_flatten_refuses_what_computes_with_a_tensor_as_a_whole():
    with pytest.raises(ValueError, match="optimizer mixes the elements of each tensor"):
        t.flatten(diffopt.muon())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"a": "x", "b": "x"}, r"labels must be a prefix tree of params: labels\['c'\] is missing"),
        (
            {"a": "x", "b": "z", "c": "y"},
            r"params\['b'\] has the label 'z', but optimizers has \['x', 'y'\]",
        ),
        (
            {"a": ["x"], "b": "x", "c": "y"},
            r"labels must be a prefix tree of params: labels\['a'\]",
        ),
        (
            {"a": {"x"}, "b": "x", "c": "y"},
            r"params\['a'\] has the label {'x'}, but",
        ),
        (None, r"params\['a'\] has the label None, but optimizers has"),
    ],
)
def test_wrong_labels_raise(labels, message):
    opt = t.partition({"x": sgd, "y": adam}, labels)
    with pytest.raises(ValueError, match=message):
        opt.init(tree())


def test_an_error_of_a_part_changes_no_other_part():
    foreign = t.chain(sgd)
    for parts in ((sgd, adam), (foreign, sgd), (sgd, foreign), (foreign, foreign, sgd)):
        names = "abc"[: len(parts)]
        params = {name: torch.ones(2) for name in names}
        opt = t.partition(dict(zip(names, parts, strict=True)), {name: name for name in names})
        record = {name: part.hparams() for name, part in zip(names, parts, strict=True)}
        for name in names:
            state = opt.init(params)
            state[name] = pytree.tree_map(lambda x: torch.zeros(5), state[name])
            before = Snapshot((params, state))
            with pytest.raises(ValueError, match="state"):
                opt.update_(params, params, state, record)
            before.check()


# Masks


def test_frozen_params_are_the_same_tensors_and_have_no_state():
    params, grads = tree(), tree(10)
    opt = t.freeze(adam, {"a": True, "b": False, "c": True})
    state = opt.init(params)
    new, state = opt.update(params, grads, state, opt.hparams(lr=0.1))
    assert new["a"] is params["a"]
    assert new["c"] is params["c"]
    assert (state.exp_avg["a"], state.exp_avg["c"]) == ([], [])
    alone, _ = adam.update(params["b"], grads["b"], adam.init(params["b"]), adam.hparams(lr=0.1))
    torch.testing.assert_close(new["b"], alone)


def test_freeze_is_masked_by_the_opposite():
    params, grads = tree(), [tree(10)]

    def is_no_matrix(params):
        return pytree.tree_map(lambda p: p.dim() != 2, params)

    frozen = run(t.freeze(adam, is_matrix), params, grads, lr=0.1)
    torch.testing.assert_close(run(t.masked(adam, is_no_matrix), params, grads, lr=0.1), frozen)


def test_two_masked_clips_are_norms_of_two_groups():
    grads = {"a": torch.tensor([3.0]), "b": torch.tensor([8.0]), "c": torch.tensor([4.0])}
    params = pytree.tree_map(torch.zeros_like, grads)
    mask = {"a": True, "b": False, "c": True}
    other = {name: not flag for name, flag in mask.items()}
    clip = t.clip_by_global_norm()
    opt = t.chain(t.masked(clip, mask), t.masked(clip, other), sgd)
    new, _ = run(
        opt, params, [grads], clip.hparams(), clip.hparams(max_norm=2.0), sgd.hparams(lr=1.0)
    )
    expected = {"a": torch.tensor([-0.6]), "b": torch.tensor([-2.0]), "c": torch.tensor([-0.8])}
    torch.testing.assert_close(new, expected)


@pytest.mark.parametrize("name", ["mask", "frozen"])
def test_a_mask_without_bools_raises(name):
    make = t.masked if name == "mask" else t.freeze
    opt = make(sgd, {"a": True, "b": 1, "c": False})
    with pytest.raises(ValueError, match=rf"{name} has 1 of type int for params\['b'\]"):
        opt.init(tree())
    with pytest.raises(ValueError, match=rf"{name}\['b'\] is missing"):
        make(sgd, {"a": True}).init({"a": torch.ones(1), "b": torch.ones(1)})


# Accumulation


@pytest.mark.parametrize("k", [1, 2, 3])
def test_accumulation_by_hand(k):
    params, grads = tree(), [tree(10 * i) for i in range(1, 8)]
    mine, state = run(t.accumulate(adam, k), params, grads, lr=0.1, weight_decay=0.1)
    means = [
        pytree.tree_map(lambda *g: sum(g) / k, *grads[i : i + k])
        for i in range(0, len(grads) - k + 1, k)
    ]
    theirs, inner = run(adam, params, means, lr=0.1, weight_decay=0.1)
    torch.testing.assert_close((mine, state.inner), (theirs, inner))
    assert (state.step, state.inner.step) == (7, 7 // k)


def test_accumulation_of_parts_is_the_step_of_the_whole_batch():
    x, w = draw(6, 3), draw(3, seed=1)
    opt = t.accumulate(diffopt.sgd(), 3)

    def loss(w, x):
        return (x @ w - 1).square().mean()

    arguments = {"hparams": opt.hparams(lr=0.1)}
    parts = diffopt.minimize(loss, w, optimizer=opt, batches=x.split(2), **arguments)
    whole = diffopt.minimize(loss, w, x, optimizer=sgd, steps=1, **arguments)
    torch.testing.assert_close(parts.params, whole.params)


def test_one_gradient_is_the_optimizer_itself():
    params, grads = tree(), [tree(10), tree(20)]
    mine, state = run(t.accumulate(adam, 1), params, grads, lr=0.1)
    theirs, inner = run(adam, params, grads, lr=0.1)
    assert all(map(torch.equal, *map(pytree.tree_leaves, ((mine, state.inner), (theirs, inner)))))


def test_a_tensor_without_a_gradient_at_the_kth_call_waits():
    opt, params = t.accumulate(sgd, 2), {"a": torch.zeros(1), "b": torch.zeros(1)}
    one, two = torch.ones(1), torch.full((1,), 2.0)
    grads = [
        {"a": one, "b": one},
        {"a": one, "b": None},
        {"a": two, "b": None},
        {"a": two, "b": two},
    ]
    new, state = run(opt, params, grads[:2], lr=1.0)
    assert new == {"a": torch.tensor([-1.0]), "b": torch.tensor([0.0])}
    assert state.grad_sum == {"a": torch.tensor([0.0]), "b": torch.tensor([1.0])}
    new, state = run(opt, params, grads, lr=1.0)
    assert new == {"a": torch.tensor([-3.0]), "b": torch.tensor([-1.5])}


def test_models_in_different_phases_are_batched():
    opt = t.accumulate(sgd, 2)
    record, params = opt.hparams(lr=1.0), torch.zeros(2, 1)
    states = [opt.init(params[0]), opt.init(params[1])]
    states[1] = opt.update(params[1], torch.ones(1), states[1], record)[1]
    stacked = pytree.tree_map(lambda *x: torch.stack(x), *states)
    step = torch.vmap(opt.update, in_dims=(0, 0, 0, None))
    new, state = step(params, torch.ones(2, 1), stacked, record)
    torch.testing.assert_close(new, torch.tensor([[0.0], [-1.0]]))
    torch.testing.assert_close(state.grad_sum, torch.tensor([[1.0], [0.0]]))


def test_half_precision_is_summed_in_float32():
    opt, param = t.accumulate(sgd, 2), torch.zeros(1, dtype=torch.bfloat16)
    grads = [torch.tensor([256.0], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.bfloat16)]
    _, state = run(opt, param, grads[:1], lr=1.0)
    assert state.grad_sum.dtype == torch.float32
    _, state = run(t.accumulate(sgd, 3), param, [*grads, torch.zeros(1, dtype=torch.bfloat16)])
    assert state.inner.momentum_buffer == 257 / 3


# Averages


def test_the_average_is_that_of_swa_utils():
    module = nn.Linear(3, 2).double()
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    grads = [pytree.tree_map(lambda p, i=i: p.cos() + i, params) for i in range(4)]
    for grad in grads:
        for name, param in module.named_parameters():
            param.grad = grad[name]
        optimizer.step()
        averaged.update_parameters(module)
    new, state = run(t.ema(adam), params, grads, lr=0.1, decay=0.7)
    theirs = {name: p.detach() for name, p in averaged.module.named_parameters()}
    torch.testing.assert_close(state.average, theirs)
    torch.testing.assert_close(new, {name: p.detach() for name, p in module.named_parameters()})


def test_bias_correction_weighs_by_powers_of_the_decay():
    opt, decay = t.ema(sgd, bias_correction=True), 0.7
    p, state = draw(3), opt.init(draw(3))
    seen = []
    for i in range(1, 6):
        p, state = opt.update(p, draw(3, seed=i), state, opt.hparams(lr=0.1, decay=decay))
        seen.append(p)
        weights = [decay ** (i - j) for j in range(1, i + 1)]
        mean = sum(w * q for w, q in zip(weights, seen, strict=True)) / sum(weights)
        torch.testing.assert_close(state.average, mean)


@pytest.mark.parametrize("bias_correction", [False, True])
def test_the_average_of_a_tensor_without_gradient_stays(bias_correction):
    opt = t.ema(sgd, bias_correction=bias_correction)
    params, grads = {"a": draw(2), "b": draw(2)}, {"a": draw(2, seed=1), "b": None}
    state = opt.init(params)
    torch.testing.assert_close(state.average, params)
    _, new = opt.update(params, grads, state, opt.hparams(lr=0.1))
    assert new.average["b"] is state.average["b"]


def test_decays_may_differ_from_tensor_to_tensor():
    params, grads = (
        {"a": draw(2), "b": draw(2)},
        [{"a": draw(2, seed=i), "b": draw(2)} for i in (1, 2)],
    )
    _, state = run(
        t.ema(sgd), params, grads, lr=0.1, decay={"a": 0.5, "b": torch.tensor([0.0, 0.9])}
    )
    _, alone = run(t.ema(sgd), params["a"], [g["a"] for g in grads], lr=0.1, decay=0.5)
    torch.testing.assert_close(state.average["a"], alone.average)


def test_the_average_of_half_precision_is_float32():
    opt, param = t.ema(sgd), torch.ones(2, dtype=torch.bfloat16)
    state, expected = opt.init(param), None
    for _ in range(50):
        param, state = opt.update(param, torch.ones_like(param), state, opt.hparams(lr=0.01))
        wide = param.float()
        expected = wide if expected is None else 0.999 * expected + 0.001 * wide
    torch.testing.assert_close(state.average, expected)
    assert state.average.dtype == torch.float32


# Flattening


def mixed(seed=0):
    return {
        "a": draw(2, 3, seed=seed),
        "b": [draw(3, seed=seed + 1, dtype=torch.float32), draw(seed=seed + 2)],
        "c": draw(2, seed=seed + 3, dtype=torch.complex128),
        "d": draw(4, seed=seed + 4, dtype=torch.bfloat16),
        "e": draw(0, seed=seed + 5),
    }


ELEMENTWISE = [
    name for name, case in REGISTRY.items() if getattr(case.optimizer, "elementwise", False)
]


@pytest.mark.parametrize("row", ELEMENTWISE)
@pytest.mark.parametrize("missing", [(), ("a",), ("b", "d"), ("a", "b", "c", "d", "e")], ids=str)
def test_flattened_values_are_those_of_the_optimizer(row, missing):
    case = REGISTRY[row]
    flat, params = t.flatten(case.optimizer), mixed()
    everything = mixed(10)
    some = {
        k: pytree.tree_map(lambda g, k=k: None if k in missing else g, v)
        for k, v in mixed(20).items()
    }
    grads = [everything, some, everything]
    mine, _ = run(flat, params, grads, **case.hparams)
    theirs, _ = run(case.optimizer, params, grads, **case.hparams)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    names = ["a", "c", "e"]
    torch.testing.assert_close([mine[k] for k in names], [theirs[k] for k in names])


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    "opt", [t.flatten(diffopt.sgd(momentum=True)), diffopt.lbfgs(history_size=2)], ids=repr
)
def test_complex_parameters_after_an_odd_number_of_reals_have_their_derivatives(opt, batched):
    def outer(a, b, rate):
        params = {"a": a, "b": b}
        state, hp = opt.init(params), opt.hparams(lr=rate)
        for _ in range(3):
            grads = {"a": a + params["b"].abs().sum(), "b": params["b"] * params["a"]}
            params, state = opt.update(params, grads, state, hp)
        return params["b"].abs().square().sum() + params["a"]

    def values(a, b, rate):
        return torch.vmap(outer, (None, None, 0))(a, b, rate * torch.tensor([1.0, 2.0], dtype=F64))

    start = draw(), draw(2, seed=1, dtype=torch.complex128), torch.tensor(0.1, dtype=F64)
    check_derivatives(values if batched else outer, *start)


def test_a_tensor_without_a_gradient_keeps_its_part_of_the_vectors():
    opt, params = t.flatten(adam), {"a": torch.zeros(2), "b": torch.zeros(3)}
    state, record = opt.init(params), opt.hparams(lr=0.1)
    params, state = opt.update(params, {"a": draw(2).float(), "b": draw(3).float()}, state, record)
    new, after = opt.update(params, {"a": torch.ones(2), "b": None}, state, record)
    assert new["b"] is params["b"]
    assert torch.equal(after.exp_avg[0][2:], state.exp_avg[0][2:])
    assert not torch.equal(after.exp_avg[0][:2], state.exp_avg[0][:2])
    assert after.step == 2


def test_tensors_of_one_dtype_are_one_vector():
    params = {"a": torch.zeros(2, 2), "b": [torch.zeros(()), torch.zeros(3, dtype=torch.complex64)]}
    state = t.flatten(adam).init(
        {**params, "c": torch.zeros(2, dtype=F64), "d": torch.zeros(5).int()}
    )
    assert [v.shape for v in state.exp_avg] == [(11,), (2,)]
    assert [v.dtype for v in state.exp_avg] == [torch.float32, F64]


LR = {
    "tensors": {"a": 0.1, "b": [torch.tensor(0.2), 0.3], "c": 0.1, "d": 0.2, "e": 0.1},
    "weights": {
        "a": draw(2, 3).abs(),
        "b": [torch.tensor([0.1, 0.2, 0.3]), 0.3],
        "c": torch.tensor([0.1, 0.5], dtype=F64),
        "d": 0.2,
        "e": 0.1,
    },
    "rows": {"a": draw(2, 1).abs(), "b": 0.3, "c": 0.1, "d": 0.2, "e": 0.1},
}


@pytest.mark.parametrize("lr", LR)
@pytest.mark.parametrize("missing", [(), ("b",)])
def test_flattened_hyperparameters_are_those_of_each_tensor(lr, missing):
    some = {
        k: pytree.tree_map(lambda g, k=k: None if k in missing else g, v)
        for k, v in mixed(20).items()
    }
    grads, numbers = (
        [mixed(10), some],
        {"lr": LR[lr], "beta1": {**LR["rows"], "a": 0.9}, "eps": 0.1},
    )
    mine, _ = run(t.flatten(adam), mixed(), grads, **numbers)
    theirs, _ = run(adam, mixed(), grads, **numbers)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_numbers_stay_numbers():
    seen = []

    class Spy(type(sgd)):
        def update(self, params, grads, state, hparams):
            seen.append((len(params), hparams.lr, hparams.momentum))
            return super().update(params, grads, state, hparams)

    opt, params = t.flatten(Spy()), {"a": torch.zeros(2), "b": torch.zeros(3)}
    record = opt.hparams(lr=0.1, momentum={"a": 0.5, "b": 0.9})
    opt.update(params, params, opt.init(params), record)
    ((count, lr, (momentum,)),) = seen
    assert (count, lr) == (1, 0.1)
    torch.testing.assert_close(momentum, torch.tensor([0.5, 0.5, 0.9, 0.9, 0.9]))


# Ascent


def test_maximize_is_the_flag_of_the_rule():
    params, grads = tree(), [tree(10), tree(20)]
    mine = run(t.maximize(diffopt.adam()), params, grads, lr=0.1, weight_decay=0.1)
    theirs = run(diffopt.adam(maximize=True), params, grads, lr=0.1, weight_decay=0.1)
    torch.testing.assert_close(mine, theirs)


# Steps that do not happen


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_nonfinite_step_leaves_everything_as_it_was(bad):
    opt, params = t.skip_nonfinite(adam), tree()
    grads, wrong = tree(10), tree(20)
    wrong["c"] = torch.tensor(bad, dtype=F64)
    new, state = run(opt, params, [grads, wrong, wrong], lr=0.1)
    expected, expected_state = run(adam, params, [grads], lr=0.1)
    assert all(
        map(torch.equal, *map(pytree.tree_leaves, ((new, state), (expected, expected_state))))
    )
    new, state = run(opt, params, [grads, wrong, grads], lr=0.1)
    torch.testing.assert_close((new, state), run(adam, params, [grads, grads], lr=0.1))


def test_nonfinite_gradients_have_no_derivative():
    opt, params = t.skip_nonfinite(adam), draw(2).requires_grad_()
    lr, grad = torch.tensor(0.1, requires_grad=True), torch.tensor([1.0, torch.inf], dtype=F64)
    grad.requires_grad_()

    def step(params, grad, lr):
        return opt.update(params, grad, opt.init(params.detach()), opt.hparams(lr=lr))[0].sum()

    new = step(params, grad, lr)
    found = torch.autograd.grad(new, (params, grad, lr), materialize_grads=True)
    ones, zeros = torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64)
    torch.testing.assert_close(found, (ones, zeros, torch.tensor(0.0)))
    arguments = tuple(x.detach() for x in (params, grad, lr))
    torch.testing.assert_close(torch.func.grad(step, argnums=(0, 1, 2))(*arguments), found)
    tangents = torch.ones(2, dtype=F64), torch.ones(2, dtype=F64), torch.tensor(1.0)
    assert torch.func.jvp(step, arguments, tangents)[1] == 2


def test_models_of_a_batch_skip_by_themselves():
    opt, record = t.skip_nonfinite(sgd), sgd.hparams(lr=1.0)
    params, grads = torch.zeros(2, 2), torch.tensor([[1.0, torch.nan], [1.0, 2.0]])
    state = pytree.tree_map(lambda *x: torch.stack(x), *(opt.init(p) for p in params))
    step = torch.vmap(opt.update, in_dims=(0, 0, 0, None))
    new, state = step(params, grads, state, record)
    torch.testing.assert_close(new, torch.tensor([[0.0, 0.0], [-1.0, -2.0]]))
    assert state.step.tolist() == [0, 1]


def test_compiled_steps_are_skipped_too():
    opt, record = t.skip_nonfinite(sgd), sgd.hparams(lr=1.0)
    step = torch.compile(opt.update, backend="aot_eager", fullgraph=True)
    param = torch.zeros(2)
    for grad, expected in (([1.0, torch.nan], [0.0, 0.0]), ([1.0, 2.0], [-1.0, -2.0])):
        new, _ = step(param, torch.tensor(grad), opt.init(param), record)
        torch.testing.assert_close(new, torch.tensor(expected))
    torch.compiler.reset()


@pytest.mark.parametrize("bad", [torch.nan, 1e6])
def test_the_hypergradient_of_a_loop_is_that_without_the_skipped_steps(bad):
    opt = t.skip_nonfinite(sgd)
    good = [draw(3, seed=i) / 4 for i in range(3)]
    all_batches = [good[0], torch.full((3,), bad, dtype=F64), good[1], good[2]]

    def derivatives(batches):
        w, lr = draw(3).requires_grad_(), torch.tensor(0.1, dtype=F64, requires_grad=True)
        record = opt.hparams(lr=lr, momentum=0.9)
        sol = diffopt.minimize(
            lambda w, x: (w * x).exp().sum(), w, optimizer=opt, hparams=record, batches=batches
        )
        first = torch.autograd.grad(sol.params.square().sum(), (w, lr), create_graph=True)
        return first, torch.autograd.grad(first[0].sum() + first[1], (w, lr))

    torch.testing.assert_close(derivatives(all_batches), derivatives(good))


# Modules


class RootNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class Scale(nn.LayerNorm):
    """A norm whose name does not say so."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.attention = nn.MultiheadAttention(3, 1)
        self.recurrent = nn.GRU(3, 3)
        self.norms = nn.ModuleList([nn.BatchNorm1d(3), RootNorm(), Scale(3), nn.GroupNorm(1, 3)])
        self.head = nn.Linear(3, 4)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.gain = nn.Parameter(torch.ones(3))


def test_biases_and_norms_are_not_decayed():
    module = Net()
    mask = diffopt.nn.decay_mask(module)
    assert list(mask) == list(diffopt.nn.functionalize(module).params)
    assert {name for name, decays in mask.items() if decays} == {
        "gain",
        "embedding.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "recurrent.weight_ih_l0",
        "recurrent.weight_hh_l0",
    }
    assert diffopt.nn.decay_mask(nn.Linear(2, 2)) == {"weight": True, "bias": False}
    assert diffopt.nn.decay_mask(nn.LayerNorm(2)) == {"weight": False, "bias": False}
    with pytest.raises(TypeError, match=r"module is 3 .*, not a torch"):
        diffopt.nn.decay_mask(3)


def test_three_ways_to_decay_what_the_mask_says():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)).double()
    mask = diffopt.nn.decay_mask(module)
    params = {name: p.detach() for name, p in module.named_parameters()}
    grads = [pytree.tree_map(torch.cos, params), pytree.tree_map(torch.sin, params)]
    by_number = {name: 0.1 if decays else 0.0 for name, decays in mask.items()}
    plain, _ = run(sgd, params, grads, lr=0.1, momentum=0.9, weight_decay=by_number)
    decay = t.masked(t.add_decayed_weights(), mask)
    heavy = sgd.hparams(lr=0.1, momentum=0.9)
    chained, _ = run(t.chain(decay, sgd), params, grads, decay.hparams(weight_decay=0.1), heavy)
    records = {True: sgd.hparams(lr=0.1, momentum=0.9, weight_decay=0.1), False: heavy}
    parted, _ = run(t.partition({True: sgd, False: sgd}, mask), params, grads, records)
    torch.testing.assert_close(chained, plain)
    torch.testing.assert_close(parted, plain)


# Devices


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("row", COMPOSITIONS)
def test_params_on_two_devices(row):
    case = COMPOSITIONS[row]
    shapes = case.shapes[:2]
    params = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    grads = [draw(*shape, seed=10 + i) for i, shape in enumerate(shapes)]
    devices = ["cuda", "cpu"]
    spread = [[x.to(d) for x, d in zip(xs, devices, strict=True)] for xs in (params, grads)]
    args = case.hparams if isinstance(case.hparams, tuple) else ()
    numbers = {} if args else case.hparams
    expected, _ = run(case.optimizer, params, [grads] * 3, *args, **numbers)
    new, _ = run(case.optimizer, spread[0], [spread[1]] * 3, *args, **numbers)
    assert [p.device.type for p in new] == devices
    torch.testing.assert_close([p.cpu() for p in new], expected)


# Transformations of one's own


@pytest.mark.usefixtures("frugal")
def test_a_transformation_of_ones_own_passes_the_kit():
    @hparams
    class Scale:
        factor: float = number(1.0)

    scale = t.stateless(Scale, lambda grads, params, hp: [r.factor * g for g, r in zip(grads, hp)])  # noqa: B905
    from diffopt import testing

    testing.check(
        t.chain(scale, diffopt.sgd()),
        hparams={"factor": 0.5, "lr": 0.2},
        reference=lambda tensors: torch.optim.SGD(tensors, lr=0.1),
        elementwise=True,
    )


class Halved(t.Wrapper):
    """Steps with half of each gradient."""

    def update(self, params, grads, state, hparams):
        halves = pytree.tree_map(lambda g: None if g is None else g / 2, grads)
        return self.optimizer.update(params, halves, state, hparams)


@hparams
class ShareHParams:
    share: Hyperparameter = number(default=0.5, ge=0)


class Share(t.Wrapper):
    """The same with a share of its own."""

    own_hparams = ShareHParams

    def update(self, params, grads, state, hparams):
        own, inner = hparams
        shares = pytree.tree_map(lambda g: None if g is None else g * own.share, grads)
        return self.optimizer.update(params, shares, state, inner)


class Function(diffopt.Optimizer):
    """One that is no `Wrapper`, and whose hyperparameters are a function's."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def hparams(self, **numbers):
        return self.optimizer.hparams(**numbers)

    def init(self, params):
        return self.optimizer.init(params)

    def update(self, params, grads, state, hparams):
        return Halved(self.optimizer).update(params, grads, state, hparams)


@pytest.mark.parametrize("wrap", [Halved, Share, Function])
@pytest.mark.parametrize("where", ["alone", "chain", "partition"])
def test_keywords_find_their_way_through_wrappers_of_ones_own(wrap, where):
    opt, lr = wrap(diffopt.sgd()), torch.tensor(0.5, requires_grad=True)
    if where == "chain":
        opt = t.chain(t.clip_by_global_norm(), opt)
    if where == "partition":
        opt = t.freeze(opt, {"w": False, "v": True})
    params = {"w": torch.zeros(1), "v": torch.zeros(1)}
    grads = {"w": torch.ones(1), "v": None}
    hparams = opt.hparams(lr=lr, **({"max_norm": 9.0} if where == "chain" else {}))
    new, _ = opt.update(params, grads, opt.init(params), hparams)
    torch.testing.assert_close(new["w"], torch.tensor([-0.25]))
    assert torch.autograd.grad(new["w"].sum(), lr)[0] == -0.5
    optimizer = diffopt.optim.from_pure(opt, params, lr=0.5)
    params["w"].grad = torch.ones(1)
    optimizer.step()
    torch.testing.assert_close(params["w"], torch.tensor([-0.25]))


def test_wrappers_of_ones_own_are_values_and_check_what_they_wrap():
    assert Halved(diffopt.sgd()) == Halved(diffopt.sgd()) != Halved(diffopt.adam())
    assert repr(Share(diffopt.sgd())).startswith("Share(optimizer=SGD(")
    with pytest.raises(TypeError, match="optimizer is 3, not a diffopt optimizer"):
        Halved(3)


def test_a_keyword_may_name_its_part():
    opt = t.chain(t.clip_by_norm(), both(sgd, adam))
    clip, last = t.clip_by_norm().hparams(max_norm=2.0), {0: {"momentum": 0.5}, 1: {"lr": 0.1}}
    records = {0: sgd.hparams(lr=0.3, **last[0]), 1: adam.hparams(**last[1])}
    for prefix in ("", "1."):
        named = {f"{prefix}0.lr": 0.3, f"{prefix}1.lr": 0.1}
        made = opt.hparams(max_norm=2.0, momentum=0.5, **named)
        assert str(made) == str(opt.hparams(clip, records))
    decays = t.chain(t.add_decayed_weights(), sgd).hparams(**{"1.weight_decay": 0.1})
    assert (decays[0].weight_decay, decays[1].weight_decay) == (0.01, 0.1)
    with pytest.raises(TypeError, match="MomentumHParams has no hyperparameter 'beta1'"):
        both(sgd, adam).hparams(**{"0.beta1": 0.1})


def test_a_keyword_that_two_wrappers_might_take_is_refused():
    opt = t.partition({k: Function(diffopt.sgd()) for k in "ab"}, {"w": "a", "v": "b"})
    with pytest.raises(TypeError, match="'lr' belongs to the parts 'a' and 'b'"):
        opt.hparams(lr=0.1)
    assert opt.hparams(**{"b.lr": 0.1})["b"].lr == 0.1
