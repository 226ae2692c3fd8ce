"""from_pure and to_pure: the same run as a class and as a function, from the middle too."""

import copy
import dataclasses
import io

import pytest
import torch

import diffopt
from diffopt import optim
from diffopt.transforms import accumulate, chain, clip_by_global_norm, ema, flatten, partition
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

    with pytest.raises(TypeError, match="is a Mine, but must be one of"):
        optim.to_pure(Mine(params))
    groups = [{"params": params[:1], "amsgrad": True}, {"params": params[1:]}]
    with pytest.raises(ValueError, match="differ in an option"):
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
    with pytest.raises(TypeError, match=r"not a diffopt\.Optimizer"):
        optim.from_pure(torch.optim.Adam(params), params)


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
