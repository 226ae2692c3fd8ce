"""from_pure and to_pure: the same run as a class and as a function, from the middle too."""

import copy
import dataclasses
import io
import re
import weakref
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler as sched

import diffopt
from diffopt import _tree, optim
from diffopt.optim._own import OwnClass
from diffopt.rules import hparams, leafwise, number
from diffopt.transforms import (
    accumulate,
    add_decayed_weights,
    chain,
    clip_by_global_norm,
    ema,
    flatten,
    freeze,
    hypergradient,
    masked,
    partition,
    skip_nonfinite,
)
from registry import PAIRS

NUMBERS = {
    "SGD": (diffopt.sgd(), {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "Adam": (diffopt.adam(), {"lr": 0.1, "beta1": 0.8, "beta2": 0.9}),
    "AdamW": (diffopt.adamw(), {"lr": 0.1, "weight_decay": 0.3}),
    "Adamax": (diffopt.adamax(), {"lr": 0.1}),
    "NAdam": (diffopt.nadam(), {"lr": 0.1}),
    "RAdam": (diffopt.radam(), {"lr": 0.1}),
    "RMSprop": (diffopt.rmsprop(momentum=False), {"lr": 0.01}),
    "Adagrad": (diffopt.adagrad(), {"lr": 0.1, "initial_accumulator_value": 0.3}),
    "Adadelta": (diffopt.adadelta(), {"lr": 1.0}),
    "ASGD": (diffopt.asgd(), {"lr": 0.1, "t0": 2.0}),
    "Rprop": (diffopt.rprop(), {"lr": 0.1}),
    "Muon": (diffopt.muon(), {"lr": 0.1}),
}


@pytest.fixture(autouse=True)
def doubles():
    """torch keeps the scalars of some optimizers in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_params(shapes=((3, 2), (2, 3))):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


def loss_of(params):
    return sum(((k + 1) * p - 1).square().sum() for k, p in enumerate(params))


def train(optimizer, params, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(params).backward()
        optimizer.step()


def run_pure(pure, steps):
    """The functional loop from there."""
    opt, params, state, hp = pure
    for _ in range(steps):
        leaves = [p.requires_grad_() for p in params]
        grads = list(torch.autograd.grad(loss_of(leaves), leaves))
        params, state = opt.update([p.detach() for p in leaves], grads, state, hp)
    return params


def torch_numbers(numbers):
    """Fields as torch.optim's arguments."""
    numbers = dict(numbers)
    for pair, fields in PAIRS.items():
        if fields[0] in numbers:
            numbers[pair] = tuple(numbers.pop(field) for field in fields)
    return numbers


@pytest.mark.parametrize("name", NUMBERS)
def test_from_pure_equals_torch(name):
    opt, numbers = NUMBERS[name]
    mine, theirs = make_params(), make_params()
    train(optim.from_pure(opt, mine, **numbers), mine, 4)
    train(getattr(torch.optim, name)(theirs, **torch_numbers(numbers)), theirs, 4)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("library", [torch.optim, optim], ids=["torch", "diffopt"])
@pytest.mark.parametrize("name", [*NUMBERS, "Adafactor"])
def test_to_pure_goes_on_where_the_class_stands(name, library, steps):
    numbers = torch_numbers(NUMBERS.get(name, (None, {}))[1])
    params = make_params()
    optimizer = getattr(library, name)(params, **numbers)
    train(optimizer, params, steps)
    pure = optim.to_pure(optimizer)
    before = copy.deepcopy((pure.params, pure.state))
    train(optimizer, params, 3)
    torch.testing.assert_close((pure.params, pure.state), before, rtol=0, atol=0)  # copies
    torch.testing.assert_close(run_pure(pure, 3), [*params], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NUMBERS)
def test_to_pure_takes_what_from_pure_made(name):
    opt, numbers = NUMBERS[name]
    params = make_params()
    optimizer = optim.from_pure(opt, params, **numbers)
    train(optimizer, params, 2)
    pure = optim.to_pure(optimizer)
    assert pure.optimizer is opt
    train(optimizer, params, 3)
    torch.testing.assert_close(run_pure(pure, 3), [*params], rtol=1e-12, atol=1e-12)


def test_to_pure_of_a_composition_with_two_groups_says_what_to_pass_instead():
    net = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Linear(1, 1))
    opt = chain(clip_by_global_norm(), diffopt.sgd())
    optimizer = optim.from_pure(opt, [{"params": layer.parameters()} for layer in net], lr=0.1)
    with pytest.raises(ValueError, match=r"has 2 parameter groups.*pass from_pure a tree for each"):
        optim.to_pure(optimizer)
    rates = {"0": 0.1, "1": 0.01}
    _, hparams = optim.to_pure(optim.from_pure(opt, net, lr=rates)).hparams
    assert hparams.lr == rates


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("library", [torch.optim, optim], ids=["torch", "diffopt"])
def test_lbfgs_to_pure(library, steps):
    params = make_params()
    optimizer = library.LBFGS(params, lr=0.3, max_iter=1, history_size=3)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(params) + sum((p**4).sum() for p in params)
        loss.backward()
        return loss

    for _ in range(2 * steps):
        optimizer.step(closure)
    opt, new, state, hp = optim.to_pure(optimizer)
    for _ in range(3):
        optimizer.step(closure)
        leaves = [p.requires_grad_() for p in new]
        loss = loss_of(leaves) + sum((p**4).sum() for p in leaves)
        grads = list(torch.autograd.grad(loss, leaves))
        new, state = opt.update([p.detach() for p in leaves], grads, state, hp)
    torch.testing.assert_close(new, [p.detach() for p in params], rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's, once in a process
@pytest.mark.parametrize("library", [torch.optim, optim], ids=["torch", "diffopt"])
def test_sparse_adam_to_pure(library):
    params = make_params([(5, 3)])
    optimizer = library.SparseAdam(params, lr=0.1)

    def grad_of(k):
        rows = torch.tensor([[k % 5, (k + 2) % 5]])
        values = torch.full((2, 3), k + 1.0)
        return torch.sparse_coo_tensor(rows, values, (5, 3), check_invariants=True)

    for k in range(3):
        params[0].grad = grad_of(k)
        optimizer.step()
    opt, new, state, hp = optim.to_pure(optimizer)
    for k in range(3, 6):
        params[0].grad = grad_of(k)
        optimizer.step()
        new, state = opt.update(new, [grad_of(k)], state, hp)
    torch.testing.assert_close(new, [p.detach() for p in params], rtol=1e-12, atol=1e-12)


def test_groups_become_prefix_trees():
    params = make_params()
    named = [{"params": [("a", params[0])], "lr": 0.5}, {"params": [("b", params[1])]}]
    optimizer = torch.optim.Adam(named, lr=0.1)
    train(optimizer, params, 2)
    pure = optim.to_pure(optimizer)
    assert pure.hparams.lr == {"a": 0.5, "b": 0.1}
    assert pure.hparams.beta1 == 0.9
    assert list(pure.params) == ["a", "b"]


def test_to_pure_refuses_what_a_pure_state_cannot_say():
    params = make_params()

    class Mine(torch.optim.SGD):
        pass

    with pytest.raises(TypeError, match="has class Mine, but must have one of"):
        optim.to_pure(Mine(params))
    with pytest.raises(TypeError, match=r"optimizer is SGD\(.*, which is pure already"):
        optim.to_pure(diffopt.sgd())
    groups = [{"params": params[:1], "amsgrad": True}, {"params": params[1:]}]
    with pytest.raises(ValueError, match=r"\[0\] is .*amsgrad=True.*\[1\] by .*amsgrad=False"):
        optim.to_pure(torch.optim.Adam(groups))
    optimizer = torch.optim.Adam(params)
    train(optimizer, params, 1)
    params[0].grad = None
    optimizer.step()
    with pytest.raises(ValueError, match=r"number of steps: \[1.0, 2.0\]"):
        optim.to_pure(optimizer)


COMPOSITIONS = {
    "chain": (chain(clip_by_global_norm(), diffopt.adamw()), {"lr": 0.1, "max_norm": 0.5}),
    "accumulate": (accumulate(diffopt.sgd(), 2), {"lr": 0.1, "momentum": 0.9}),
    "ema": (ema(diffopt.adam()), {"lr": 0.1}),
    "flatten": (flatten(diffopt.adam()), {"lr": 0.1}),
    "lbfgs": (diffopt.lbfgs(history_size=3), {"lr": 0.5}),
    "leaf": (dataclasses.replace(diffopt.rmsprop(), execution="leaf"), {"lr": 0.1}),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions_run_as_classes_and_back(name):
    opt, numbers = COMPOSITIONS[name]
    params = make_params()
    optimizer = optim.from_pure(opt, params, **numbers)
    start = optim.to_pure(optimizer)
    assert isinstance(optimizer, torch.optim.Optimizer)
    train(optimizer, params, 3)
    middle = optim.to_pure(optimizer)
    train(optimizer, params, 2)
    torch.testing.assert_close(run_pure(start, 5), [*params], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run_pure(middle, 2), [*params], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_checkpoints_of_compositions_resume_exactly(name):
    opt, numbers = COMPOSITIONS[name]
    params = make_params()
    optimizer = optim.from_pure(opt, params, **numbers)
    train(optimizer, params, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    twins = copy.deepcopy(params)
    file.seek(0)
    twin = optim.from_pure(opt, twins, lr=0.7)
    twin.load_state_dict(torch.load(file, weights_only=True))
    train(twin, twins, 2)
    train(optimizer, params, 2)
    torch.testing.assert_close(twins, params, rtol=0, atol=0)


def test_a_composition_is_the_hand_written_loop_with_schedulers_and_groups():
    mine, theirs = make_params(), make_params()
    opt = chain(clip_by_global_norm(), diffopt.adamw())
    first = optim.from_pure(opt, [{"params": mine[:1], "lr": 0.3}, {"params": mine[1:]}], lr=0.1)
    groups = [{"params": theirs[:1], "lr": 0.3}, {"params": theirs[1:]}]
    second = torch.optim.AdamW(groups, lr=0.1)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (first, second)]
    for _ in range(4):
        train(first, mine, 1)
        second.zero_grad()
        loss_of(theirs).backward()
        for p in theirs:  # a group is clipped by its own norm
            torch.nn.utils.clip_grad_norm_([p], 1.0)
        second.step()
        for scheduler in schedulers:
            scheduler.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_labels_refer_to_names():
    mine, theirs = make_params(), make_params()
    opt = partition({"x": diffopt.adamw(), "y": diffopt.sgd()}, {"a": "x", "b": "y"})
    named = {"a": mine[0], "b": mine[1]}
    train(optim.from_pure(opt, named, **{"x.lr": 0.1, "y.lr": 0.02}), mine, 3)
    train(torch.optim.AdamW(theirs[:1], lr=0.1), theirs[:1], 3)
    other = torch.optim.SGD(theirs[1:], lr=0.02)
    for _ in range(3):
        other.zero_grad()
        loss_of([torch.zeros(1), theirs[1]]).backward()
        other.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


CLIPPED = partial(chain, clip_by_global_norm())


@pytest.mark.parametrize("wrap", [hypergradient, CLIPPED, ema, skip_nonfinite])
def test_options_have_the_names_that_hparams_takes(wrap):
    opt = partition({"x": wrap(diffopt.adamw()), "y": wrap(diffopt.sgd())}, {"a": "x", "b": "y"})
    given = {"x.lr": 0.1, "y.lr": 0.02}
    optimizer = optim.from_pure(opt, dict(zip("ab", make_params(), strict=True)), **given)
    assert optimizer.param_groups[0].items() >= given.items()
    assert repr(optim.to_pure(optimizer)[3]) == repr(opt.hparams(**given))


def test_positions_tell_parts_of_equal_names_apart():
    opt = chain(add_decayed_weights(), add_decayed_weights(), diffopt.sgd())
    options = optim.from_pure(opt, make_params()).param_groups[0]
    assert options.keys() >= {"lr", "0.weight_decay", "1.weight_decay", "2.weight_decay"}


FROM_PURE = {
    "leafwise": (diffopt.adam(), ["lr", "betas"]),
    "lbfgs": (diffopt.lbfgs(), ["lr"]),
    "chain": (chain(clip_by_global_norm(), diffopt.adam()), ["lr", "max_norm", "betas"]),
    "parts": (partition({"x": diffopt.adam(), "y": diffopt.sgd()}, ["x", "y"]), ["x.lr", "betas"]),
}
OUT_OF_RANGE = [
    ("lr", -1.0, ValueError, "lr is -"),
    ("lr", float("nan"), ValueError, "lr is nan, but must be >= 0"),
    ("lr", "0.1", TypeError, "is '0.1' of type str, but must be a number"),
    ("x.lr", -1.0, ValueError, "lr is -1.0, but must be >= 0"),
    ("max_norm", -1.0, ValueError, "hparams.max_norm is -1.0, but must be >= 0"),
    ("betas", (0.9, 1.5), ValueError, "hparams.beta2 is 1.5, but must be >= 0 and < 1"),
    ("betas", (1, 0.9), ValueError, "hparams.beta1 is 1, but must be >= 0 and < 1"),
]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("case", "key", "value", "error", "message"),
    [(case, *row) for case in FROM_PURE for row in OUT_OF_RANGE if row[0] in FROM_PURE[case][1]],
)
def test_a_number_set_later_must_be_in_its_range(case, key, value, error, message, first):
    params = make_params()[:2]
    numbers = {"max_norm": 1.0} if case == "chain" else {}
    optimizer = optim.from_pure(FROM_PURE[case][0], params, **numbers)
    group = optimizer.param_groups[0]
    for p in params:
        p.grad = torch.ones_like(p)
    if not first:
        optimizer.step()
    old, group[key] = group[key], value
    before = copy.deepcopy([params, optimizer.state_dict()["state"]])
    for _ in range(2):
        with pytest.raises(error, match=rf"param_groups\[0\].*{message}"):
            optimizer.step()
    torch.testing.assert_close([params, optimizer.state_dict()["state"]], before)
    group[key] = old
    optimizer.step()
    assert not any(map(torch.equal, params, before[0]))


def test_unknown_hyperparameters_and_ranges_raise():
    params = make_params()
    with pytest.raises(TypeError, match="learning_rate"):
        optim.from_pure(diffopt.adam(), params, learning_rate=0.1)
    with pytest.raises(ValueError, match="lr is -1"):
        optim.from_pure(diffopt.adam(), params, lr=-1.0)
    opt = partition({"x": diffopt.adamw(), "y": diffopt.sgd()}, {"a": "x", "b": "y"})
    with pytest.raises(TypeError, match=r"'z.lr', only \['x.lr'"):
        optim.from_pure(opt, {"a": params[0], "b": params[1]}, **{"z.lr": 0.1})
    with pytest.raises(ValueError, match="lr is -1"):
        optim.from_pure(opt, {"a": params[0], "b": params[1]}, **{"x.lr": -1.0})
    with pytest.raises(TypeError, match=r"optimizer is Adam, a torch\.optim\.Optimizer, which"):
        optim.from_pure(torch.optim.Adam(params), params)
    with pytest.raises(TypeError, match=r"optimizer is <class .*Adam.>, not a diffopt optimizer"):
        optim.from_pure(diffopt.adam, params)
    for betas in (0.9, "ab", (0.9,), (0.9, 0.99, 0.999)):
        with pytest.raises(TypeError, match=r"betas is .* but must be 2 numbers"):
            optim.from_pure(diffopt.adam(), params, betas=betas)


def test_a_rate_for_each_tensor():
    mine, theirs = make_params(), make_params()
    train(
        optim.from_pure(diffopt.adam(), {"a": mine[0], "b": mine[1]}, lr={"a": 0.1, "b": 0.2}),
        mine,
        3,
    )
    groups = [{"params": theirs[:1]}, {"params": theirs[1:], "lr": 0.2}]
    train(torch.optim.Adam(groups, lr=0.1), theirs, 3)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


class OwnState(NamedTuple):
    step: Any
    a: Any


@hparams
class OwnHParams:
    lr: Any = number(0.1, ge=0)


def own_optimizer(init, **flags):
    def rule(p, g, s, hp, _):
        a = 0.5 * s.a + 0.5 * g
        return p - hp.lr * a, OwnState(s.step, a)

    return leafwise(OwnState, OwnHParams, lambda p, step: OwnState(step, init(p)), rule, **flags)


INITS = {
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "a_copy": torch.clone,
    "itself": lambda p: p,
}


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex128], ids=str)
@pytest.mark.parametrize("init", INITS)
def test_state_begins_as_the_rules_own_init_makes_it(init, dtype, elementwise):
    opt = own_optimizer(INITS[init], elementwise=elementwise)
    start = [p.detach().to(dtype) for p in make_params()]
    params, state = list(start), opt.init(start)
    twins = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = optim.from_pure(opt, twins)
    torch.testing.assert_close(optim.to_pure(optimizer).state.a, state.a, rtol=0, atol=0)
    for k in range(3):
        grads = [torch.full_like(p, k - 0.5) for p in params]
        params, state = opt.update(params, grads, state, opt.hparams())
        for p, grad in zip(twins, grads, strict=True):
            p.grad = grad
        optimizer.step()
    torch.testing.assert_close([*twins], params, rtol=1e-12, atol=1e-12)
    pure = optim.to_pure(optimizer)
    torch.testing.assert_close(pure.state.a, state.a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex128], ids=str)
def test_what_the_first_step_adds_to_init_is_added_once(dtype):
    opt = own_optimizer(torch.ones_like, initial=lambda hp: {"a": 3 * hp.lr})
    start = [p.detach().to(dtype) for p in make_params()]
    params, state = list(start), opt.init(start)
    twins = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = optim.from_pure(opt, twins, lr=0.5)
    for _ in range(2):
        grads = [torch.ones_like(p) for p in params]
        params, state = opt.update(params, grads, state, opt.hparams(lr=0.5))
        for p in twins:
            p.grad = torch.ones_like(p)
        optimizer.step()
    torch.testing.assert_close([*twins], params, rtol=1e-12, atol=1e-12)


# Compositions among the tools of torch.

NAMED = {
    "partition": partition({"x": diffopt.adamw(), "y": diffopt.sgd()}, {"0": "x", "1": "y"}),
    "nested": chain(
        clip_by_global_norm(),
        partition(
            {"x": ema(diffopt.adamw()), "y": accumulate(diffopt.sgd(momentum=True), 2)},
            {"0": "x", "1": "y"},
        ),
    ),
    "freeze": freeze(diffopt.adam(), {"0": True, "1": False}),
    "masked": chain(masked(clip_by_global_norm(), {"0": True, "1": False}), diffopt.adam()),
}
ALL = {**{name: opt for name, (opt, _) in COMPOSITIONS.items()}, **NAMED}
PER_PARAMETER = sorted(ALL.keys() - {"flatten", "lbfgs"})


def from_pure(name, params, **options):
    named = dict(zip("01", params, strict=True)) if name in NAMED else params
    return optim.from_pure(ALL[name], named, **options)


@pytest.mark.parametrize("name", ALL)
def test_the_state_of_a_composition_is_that_of_each_parameter(name):
    params = make_params()
    optimizer = from_pure(name, params, **numbers_of_named(name))
    train(optimizer, params, 3)
    saved = optimizer.state_dict()["state"]
    assert saved.keys() == {0, 1}
    for k, p in enumerate(params):
        assert all(isinstance(key, str) for key in saved[k])
        assert all(isinstance(value, torch.Tensor) for value in saved[k].values())
        if name in PER_PARAMETER:
            assert all(value.shape in ((), p.shape) for value in saved[k].values())


def numbers_of_named(name):
    lrs = [key for key in from_pure(name, make_params()).defaults if key.endswith(".lr")]
    return dict.fromkeys(lrs or ["lr"], 0.05)


@pytest.mark.parametrize("name", ALL)
def test_every_composition_resumes_exactly(name):
    params = make_params()
    optimizer = from_pure(name, params, **numbers_of_named(name))
    train(optimizer, params, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = copy.deepcopy(params)
    twin = from_pure(name, twins)
    twin.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(optimizer)
    train(twin, twins, 3)
    train(optimizer, params, 3)
    torch.testing.assert_close(twins, params, rtol=0, atol=0)
    others = [p for group in copied.param_groups for p in group["params"]]
    train(copied, others, 3)
    torch.testing.assert_close(others, params, rtol=0, atol=0)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for k, p in enumerate(make_params()):
            self.register_parameter(str(k), p)


@pytest.mark.parametrize(
    "options",
    [{}, {"full_state_dict": True}, {"flatten_optimizer_state_dict": True}, {"cpu_offload": True}],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.parametrize("name", ALL)
def test_distributed_checkpoints_carry_a_composition_over(name, options):
    options = StateDictOptions(**options)
    model, fresh = Net(), Net()
    params, twins = list(model.parameters()), list(fresh.parameters())
    optimizer = from_pure(name, params, **numbers_of_named(name))
    train(optimizer, params, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    fresh.load_state_dict(model.state_dict())
    twin = from_pure(name, twins)
    set_optimizer_state_dict(fresh, twin, saved, options=options)
    torch.testing.assert_close(twins, params, rtol=0, atol=0)
    train(optimizer, params, 2)
    train(twin, twins, 2)
    torch.testing.assert_close(twins, params, rtol=0, atol=0)


SCHEDULES = {
    "StepLR": lambda o: sched.StepLR(o, 2, 0.5),
    "ExponentialLR": lambda o: sched.ExponentialLR(o, 0.7),
    "LambdaLR": lambda o: sched.LambdaLR(o, lambda t: 1 / (t + 1)),
    "CosineAnnealingLR": lambda o: sched.CosineAnnealingLR(o, 5),
    "LinearLR": lambda o: sched.LinearLR(o),
    "ReduceLROnPlateau": lambda o: sched.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_rate_of_a_group_schedules_all_parts(schedule):
    mine, theirs = make_params(), make_params()
    both = from_pure("partition", mine, **{"x.lr": 0.1, "y.lr": 0.02})
    assert both.param_groups[0]["lr"] == 1
    apart = [torch.optim.AdamW(theirs[:1], lr=0.1), torch.optim.SGD(theirs[1:], lr=0.02)]
    schedulers = [SCHEDULES[schedule](o) for o in (both, *apart)]
    for _ in range(5):
        train(both, mine, 1)
        for p in theirs:
            p.grad = None
        loss_of(theirs).backward()
        for optimizer in apart:
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step(*([1.0] if schedule == "ReduceLROnPlateau" else []))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


CYCLES = {
    "OneCycleLR": lambda o: sched.OneCycleLR(o, 0.05, total_steps=8),
    "CyclicLR": lambda o: sched.CyclicLR(o, 0.01, 0.05, 3),
}
CYCLED = {
    "adamw": (diffopt.adamw(), torch.optim.AdamW, {}),
    "chain": (chain(clip_by_global_norm(), diffopt.adamw()), torch.optim.AdamW, {"max_norm": 1e9}),
    "sgd": (diffopt.sgd(momentum=True), torch.optim.SGD, {"momentum": 0.9}),
}


@pytest.mark.parametrize("cycle", CYCLES)
@pytest.mark.parametrize("name", CYCLED)
def test_schedulers_cycle_momentum(name, cycle):
    opt, kind, numbers = CYCLED[name]
    mine, theirs = make_params(), make_params()
    first = optim.from_pure(opt, mine, lr=0.1, **numbers)
    second = kind(theirs, lr=0.1, **{k: v for k, v in numbers.items() if k == "momentum"})
    schedulers = [CYCLES[cycle](o) for o in (first, second)]
    for _ in range(7):
        train(first, mine, 1)
        train(second, theirs, 1)
        for scheduler in schedulers:
            scheduler.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("opt", [diffopt.adamw(), ema(diffopt.adamw())], ids=["leafwise", "tree"])
def test_betas_may_be_given_either_way_and_set_later(opt):
    mine, theirs = make_params(), make_params()
    groups = [{"params": mine[:1], "beta1": 0.5}, {"params": mine[1:]}]
    first = optim.from_pure(opt, groups, betas=(0.8, 0.9), lr=0.1)
    assert [group["betas"] for group in first.param_groups] == [(0.5, 0.9), (0.8, 0.9)]
    groups = [{"params": theirs[:1], "betas": (0.5, 0.9)}, {"params": theirs[1:]}]
    second = torch.optim.AdamW(groups, betas=(0.8, 0.9), lr=0.1)
    for _ in range(2):
        train(first, mine, 2)
        train(second, theirs, 2)
        first.param_groups[1]["betas"] = second.param_groups[1]["betas"] = (0.3, 0.7)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_from_pure_goes_on_from_a_checkpoint_of_torch():
    mine, theirs = make_params(), make_params()
    second = torch.optim.AdamW(theirs, lr=0.1, betas=(0.7, 0.8))
    train(second, theirs, 3)
    first = optim.from_pure(diffopt.adamw(), mine)
    first.load_state_dict(second.state_dict())
    for p, q in zip(mine, theirs, strict=True):
        p.data.copy_(q)
    train(first, mine, 3)
    train(second, theirs, 3)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_state_of_bare_namedtuples_loads_with_weights_only():
    class Count(NamedTuple):  # torch does not know it
        calls: torch.Tensor
        sums: Any

    class Sums(diffopt.Optimizer):
        hparams = OwnHParams

        def init(self, params):
            return Count(torch.zeros(()), [torch.zeros_like(p) for p in params])

        def update(self, params, grads, state, hparams):
            sums = [s + g for s, g in zip(state.sums, grads, strict=True)]
            new = [p - hparams.lr * s for p, s in zip(params, sums, strict=True)]
            return new, Count(state.calls + 1, sums)

    params = make_params()
    optimizer = optim.from_pure(Sums(), params)
    train(optimizer, params, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = copy.deepcopy(params)
    twin = optim.from_pure(Sums(), twins)
    twin.load_state_dict(torch.load(file, weights_only=True))
    train(twin, twins, 2)
    train(optimizer, params, 2)
    torch.testing.assert_close(twins, params, rtol=0, atol=0)
    assert isinstance(optim.to_pure(twin).state, Count)


WRONG = {
    "step": (lambda row: {"step": torch.tensor(-1.0)}, "step of .* is -1"),
    "other steps": (lambda row: {"step": row["step"] + 1}, "must be the same for all parameters"),
    "shape": (lambda row: {"exp_avg": torch.zeros(7)}, r"exp_avg of .* has shape \(7,\)"),
    "integers": (lambda row: {"exp_avg": row["exp_avg"].long()}, "dtype torch.int64"),
    "text": (lambda row: {"exp_avg": "x"}, "exp_avg of .* is 'x'"),
    "none": (lambda row: {"exp_avg": None}, "exp_avg of .* is None"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_state_of_a_composition_is_refused_and_changes_nothing(wrong):
    params = make_params()
    optimizer = from_pure("chain", params, lr=0.1)
    train(optimizer, params, 2)
    change, message = WRONG[wrong]
    saved = optimizer.state_dict()
    saved["state"][1] |= change(saved["state"][1])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    del saved["state"][1]["exp_avg_sq"]
    with pytest.raises(ValueError, match=r"exp_avg|step|no exp_avg_sq"):
        optimizer.load_state_dict(saved)


def locked(x):
    with torch.inference_mode():
        return x + 1


SPOILED = {
    "memory": lambda o, p, q: setattr(q, "data", p.data.t()),
    "an inference tensor": lambda o, p, q: setattr(q, "data", locked(q.data)),
    "a rate": lambda o, p, q: o.param_groups[1].update(lr=torch.ones(5)),
    "a buffer": lambda o, p, q: o.state[p].update(
        {k: torch.ones(5) for k, v in o.state[p].items() if v.dim() == 2}
    ),
}


@pytest.mark.parametrize("spoil", SPOILED)
@pytest.mark.parametrize("name", ["chain", "ema", "accumulate", "skip"])
def test_a_group_that_is_refused_leaves_those_before_it_as_they_were(name, spoil):
    opt = {
        "chain": chain(clip_by_global_norm(), diffopt.adamw()),
        "ema": ema(diffopt.adam()),
        "accumulate": accumulate(diffopt.adam(), 1),
        "skip": skip_nonfinite(diffopt.adam()),
    }[name]
    params = [torch.nn.Parameter(torch.full((3, 3), 0.1 * k)) for k in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = optim.from_pure(opt, groups, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    SPOILED[spoil](optimizer, *params[1:])
    before = copy.deepcopy([[p.detach() for p in params], optimizer.state_dict()["state"]])
    with pytest.raises(ValueError, match=r"params\[|state|hparams"):
        optimizer.step()
    after = [[p.detach() for p in params], optimizer.state_dict()["state"]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["decay", "flatten"])
def test_groups_that_share_memory_are_stepped_in_turn(name):
    opt = {
        "decay": chain(add_decayed_weights(), diffopt.sgd()),
        "flatten": flatten(diffopt.sgd()),
    }[name]
    decay = {"0.weight_decay": 0.5} if name == "decay" else {}
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = optim.from_pure(opt, [{"params": [p]}, {"params": [q]}], lr=0.1, **decay)
    q.data = p.data
    p.grad, q.grad = torch.ones(2), torch.full((2,), 2.0)
    optimizer.step()
    w = 0.5 if decay else 0.0
    right = (1 - 0.1 * (1 + w)) * (1 - 0.1 * w) - 0.1 * 2
    torch.testing.assert_close(p.data, torch.full((2,), right))


def test_narrow_state_of_a_composition_becomes_what_init_makes():
    params = make_params()
    optimizer = from_pure("chain", params, lr=0.1)
    train(optimizer, params, 2)
    saved = optimizer.state_dict()
    for row in saved["state"].values():
        row |= {key: value.float() for key, value in row.items()}
    optimizer.load_state_dict(saved)
    assert {v.dtype for row in optimizer.state.values() for v in row.values()} == {torch.float64}


def test_state_put_in_by_users_is_used_and_state_taken_out_begins_anew():
    mine, theirs = make_params(), make_params()
    first = from_pure("chain", mine, lr=0.1, max_norm=1e9)
    second = torch.optim.AdamW(theirs, lr=0.1)
    for optimizer, params in ((first, mine), (second, theirs)):
        train(optimizer, params, 2)
        optimizer.state[params[0]]["exp_avg"] = torch.ones(3, 2)
        train(optimizer, params, 2)
        optimizer.state.clear()
        train(optimizer, params, 2)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [None, "fast", [1, "x"], np.ones(2)], ids=repr)
@pytest.mark.parametrize("opt", [diffopt.adamw(), ALL["chain"]], ids=["leafwise", "tree"])
def test_what_is_not_a_number_in_a_group_is_refused(opt, value):
    params = make_params()
    optimizer = optim.from_pure(opt, [{"params": [p]} for p in params], lr=0.1)
    before = copy.deepcopy(params)
    optimizer.param_groups[1]["lr"] = value
    with pytest.raises(TypeError, match=r"param_groups\[1\]\['lr'\]"):
        train(optimizer, params, 1)
    torch.testing.assert_close(params, before, rtol=0, atol=0)


@pytest.mark.parametrize("value", [np.float32(0.5), np.array(0.5), np.float64(0.5)], ids=repr)
@pytest.mark.parametrize("opt", [diffopt.adamw(), ALL["chain"]], ids=["leafwise", "tree"])
def test_numbers_may_be_numpys(opt, value):
    mine, theirs = make_params(), make_params()
    assert opt.hparams(lr=value) is not None
    assert diffopt.adam().hparams(lr=value).lr == 0.5
    for params, half in ((mine, value), (theirs, 0.5)):
        optimizer = optim.from_pure(opt, params, lr=half, beta1=half)
        train(optimizer, params, 1)
        optimizer.param_groups[0]["lr"] = half
        optimizer.param_groups[0]["betas"] = (half, half)
        train(optimizer, params, 1)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


# A class that torch.optim lacks.


class LionState(NamedTuple):
    step: Any
    exp_avg: Any


@hparams
class LionHParams:
    lr: Any = number(1e-4, ge=0)
    beta1: Any = number(0.9, ge=0, lt=1)
    beta2: Any = number(0.99, ge=0, lt=1)


def lion(*, maximize: bool = False):
    def rule(p, g, s, hp, _):
        update = (hp.beta1 * s.exp_avg + (1 - hp.beta1) * g).sign()
        new = hp.beta2 * s.exp_avg + (1 - hp.beta2) * g
        return p - hp.lr * update, LionState(s.step, new)

    def init(p, step):
        return LionState(step, torch.zeros_like(p))

    return leafwise(LionState, LionHParams, init, rule, maximize=maximize, elementwise=True)


class Lion(OwnClass):
    make = staticmethod(lion)


def test_a_class_that_torch_lacks_takes_two_lines():
    mine, theirs = make_params(), make_params()
    groups = [{"params": mine[:1], "maximize": True}, {"params": mine[1:], "lr": 0.5}]
    optimizer = Lion(groups, 0.1, betas=(0.8, 0.9))
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    scheduler = sched.StepLR(optimizer, 1, 0.5)
    opt = lion()
    hp = opt.hparams(lr=[0.1, 0.5], beta1=0.8, beta2=0.9)
    params, state = [p.detach() for p in theirs], opt.init(theirs)
    for _ in range(3):
        leaves = [p.requires_grad_() for p in params]
        grads = list(torch.autograd.grad(loss_of(leaves), leaves))
        grads[0] = -grads[0]
        params, state = opt.update([p.detach() for p in leaves], grads, state, hp)
        hp = opt.hparams(lr=[lr / 2 for lr in hp.lr], beta1=0.8, beta2=0.9)
        train(optimizer, mine, 1)
        scheduler.step()
    torch.testing.assert_close([*mine], params, rtol=1e-12, atol=1e-12)
    saved = copy.deepcopy(optimizer).state_dict()
    torch.testing.assert_close(saved["state"], optimizer.state_dict()["state"])
    with pytest.raises(TypeError, match="no option 'momentum'"):
        Lion(mine, momentum=0.9)
    with pytest.raises(ValueError, match="beta1 is 2"):
        Lion(mine, beta1=2.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight_deacy": 0.1}, "'weight_deacy': did you mean 'weight_decay'? The options are lr"),
        ({"maximise": True}, "'maximise': did you mean 'maximize'?"),
        ({"diferentiable": True}, "'diferentiable': did you mean 'differentiable'?"),
        ({"beta": (0.9, 0.9)}, "'beta': did you mean 'beta"),
        ({"xyz": 1}, "'xyz'. The options are lr, beta1, beta2, eps, weight_decay, betas, "),
    ],
    ids=str,
)
def test_an_unknown_option_of_a_class_of_ones_own_is_told_from_all_its_options(wrong, message):
    class Own(OwnClass):
        make = staticmethod(diffopt.adam)

    with pytest.raises(TypeError, match=rf"^Own has no option {re.escape(message)}"):
        Own([torch.nn.Parameter(torch.ones(2))], **wrong)


@pytest.mark.parametrize("make", [
    lambda net: torch.optim.Adam(net.parameters(), lr=0.1),
    lambda net: torch.optim.Adam([{"params": [net[1].bias], "lr": 0.2}, {"params": net[0].weight}]),
    lambda net: diffopt.optim.Adam(net.named_parameters(), lr=0.1),
    lambda net: diffopt.optim.from_pure(diffopt.adam(), net, lr=0.1),
    lambda net: diffopt.optim.from_pure(
        chain(clip_by_global_norm(), diffopt.adam()), net.parameters(), lr=0.1
    ),
    lambda net: diffopt.optim.from_pure(
        chain(clip_by_global_norm(), diffopt.adam()), dict(net.named_parameters()), lr=0.1
    ),
    lambda net: torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=1),
])  # fmt: skip
def test_to_pure_names_trees_as_the_module_does(make):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    optimizer, x = make(net), torch.ones(4, 2)

    def closure():
        net.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    plain, named = (diffopt.optim.to_pure(optimizer, **k) for k in ({}, {"module": net}))
    assert named.optimizer == plain.optimizer
    known = {p: name for name, p in net.named_parameters()}
    order = [known[p] for group in optimizer.param_groups for p in group["params"]]
    assert [*named.params] == order
    torch.testing.assert_close([*named.params.values()], _tree.leaves(plain.params))
    torch.testing.assert_close(_tree.leaves(named.state), _tree.leaves(plain.state))
    closure()
    grads = [net.get_parameter(name).grad for name in order]
    grads = dict(zip(order, grads, strict=True))
    new, _ = named.optimizer.update(named.params, grads, named.state, named.hparams)
    if not isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step()
        torch.testing.assert_close(new, {name: net.get_parameter(name) for name in order})


def test_to_pure_rejects_what_is_not_the_optimizers_module():
    net = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[0\] is not a parameter"):
        diffopt.optim.to_pure(optimizer, module=torch.nn.Linear(2, 1))
    with pytest.raises(TypeError, match="module is 3 of type int"):
        diffopt.optim.to_pure(optimizer, module=3)


def test_to_pure_keeps_the_history_of_a_rate():
    p, lr = torch.nn.Parameter(torch.ones(1)), torch.tensor(0.1, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.param_groups[0]["lr"] = lr
    opt, params, state, hparams = diffopt.optim.to_pure(optimizer)
    assert hparams.lr is not lr
    opt.update(params, [torch.ones(1)], state, hparams)[0][0].backward()
    assert lr.grad == -1


@pytest.mark.parametrize(
    "change",
    [
        lambda group: group.update(lr=0.5),
        lambda group: group.update(lr=torch.tensor(0.5)),
        lambda group: group["lr"].update(w=0.5),
        lambda group: group["lr"]["w"].fill_(0.5),
    ],
    ids=["number", "tensor", "in a tree", "in a tensor"],
)
def test_a_composition_sees_changed_numbers_after_steps_with_the_same(change):
    p = torch.nn.Parameter(torch.ones(1))
    opt = diffopt.transforms.chain(diffopt.transforms.clip_by_value(), diffopt.sgd())
    rate = {"w": torch.tensor(0.25)}
    optimizer = diffopt.optim.from_pure(opt, {"w": p}, lr=rate, clip_value=10.0)
    for _ in range(3):
        p.grad = torch.ones(1)
        optimizer.step()
    change(optimizer.param_groups[0])
    before = p.item()
    optimizer.step()
    assert p.item() == before - 0.5


def test_a_composition_checks_numbers_that_have_changed():
    p = torch.nn.Parameter(torch.ones(1))
    opt = diffopt.transforms.chain(diffopt.transforms.clip_by_value(), diffopt.sgd())
    optimizer = diffopt.optim.from_pure(opt, [p], lr=0.5, clip_value=10.0)
    p.grad = torch.ones(1)
    for lr in (0.5, 0.5, 0.25):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    assert p.item() == -0.25
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises(TypeError, match="lr"):
        optimizer.step()


def take_out_a_buffer(optimizer):
    del optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"]


def put_in_a_buffer(optimizer):
    first = optimizer.param_groups[0]["params"][0]
    optimizer.state[first]["exp_avg"] = torch.full_like(first, 7.0)


def replace_a_row(optimizer):
    first = optimizer.param_groups[0]["params"][0]
    row = optimizer.state[first]
    optimizer.state[first] = {k: x + 1 if x.dim() else x for k, x in row.items()}


def replace_the_state(optimizer):
    optimizer.state = copy.copy(optimizer.state)
    put_in_a_buffer(optimizer)


def load_another_state(optimizer):
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] += 1
    optimizer.load_state_dict(saved)


def drop_a_parameter(optimizer):
    del optimizer.param_groups[0]["params"][0]


def add_a_group(optimizer):
    extra = torch.nn.Parameter(torch.ones(2))
    extra.grad = torch.ones(2)
    optimizer.add_param_group({"params": [extra], "lr": 0.5})


@pytest.mark.parametrize(
    "change",
    [
        take_out_a_buffer,
        put_in_a_buffer,
        replace_a_row,
        replace_the_state,
        load_another_state,
        drop_a_parameter,
        add_a_group,
        torch.optim.Optimizer.zero_grad,
    ],
    ids=lambda change: change.__name__,
)
def test_what_changes_between_steps_of_a_composition_counts_at_the_next(change):
    ends = []
    for fresh in (False, True):
        params = [torch.nn.Parameter(torch.ones(n)) for n in (2, 3)]
        optimizer = optim.from_pure(ema(diffopt.adam()), params, lr=0.1)
        for t in range(4):
            for p in params:
                p.grad = torch.full_like(p, 1.0 + t)
            if t == 2:
                change(optimizer)
            if fresh:  # nothing is remembered from the step before
                optimizer.state, optimizer._layouts = dict(optimizer.state), {}
            optimizer.step()
        ends.append([p.detach() for group in optimizer.param_groups for p in group["params"]])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@pytest.mark.parametrize("release", ["clear the state", "take out the rows"])
def test_a_composition_keeps_no_state_that_the_user_has_let_go(release):
    params = [torch.nn.Parameter(torch.ones(n)) for n in (2, 3)]
    optimizer = optim.from_pure(ema(diffopt.adam()), params, lr=0.1)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    buffer = weakref.ref(optimizer.state[params[0]]["exp_avg"])
    if release == "clear the state":
        optimizer.state.clear()
    else:
        optimizer.state[params[0]].clear()
    assert buffer() is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*ALL, "hypergradient", "hypergradient of beta1"])
def test_a_composition_goes_on_where_its_parameters_get_another_dtype(name, dtype):
    opt = {
        "hypergradient": hypergradient(diffopt.adam()),
        "hypergradient of beta1": hypergradient(diffopt.adam(), learn=("lr", "beta1")),
        **ALL,
    }[name]
    start = dict(zip("01", [p.detach().float() for p in make_params()], strict=True))
    twins = {key: torch.nn.Parameter(p.clone()) for key, p in start.items()}
    optimizer = optim.from_pure(opt, twins)
    params, state, hp = start, opt.init(start), optim.to_pure(optimizer).hparams
    for t in range(4):
        if t == 2:
            params = {key: p.to(dtype) for key, p in params.items()}
            for p in twins.values():
                p.grad, p.data = None, p.data.to(dtype)
        grads = {key: torch.full_like(p, t + 1.0) for key, p in params.items()}
        params, state = opt.update(params, grads, state, hp)
        for key, p in twins.items():
            p.grad = grads[key].clone()
        optimizer.step()
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype is torch.float64 else {}
    torch.testing.assert_close({k: p.detach() for k, p in twins.items()}, params, **close)


@pytest.mark.parametrize("change", [list.pop, lambda given: given.append(given[0])], ids=[0, 1])
def test_a_named_tree_must_keep_its_parameters(change):
    params = make_params()
    optimizer = optim.from_pure(ALL["chain"], dict(zip("01", params, strict=True)), lr=0.1)
    train(optimizer, params, 1)
    change(optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match=r"has \d parameters, but from_pure was given 2, by name"):
        optimizer.step()
