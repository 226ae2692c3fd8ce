"""Parameters sharded over two processes are trained as unsharded ones are.

All cases run in one pair of processes, by gloo on the CPU; each is then a subtest.
"""

import datetime as dt
import functools
import itertools
import os
import sys
import time
import traceback

import pytest
import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_
from torch.utils import _pytree as pytree

import diffopt
from diffopt import optim, transforms as t
from diffopt.linear import BiCGStab, ConjugateGradient, Neumann
from diffopt.testing import Case
from registry import COMPOSITIONS, REGISTRY, SKIPPED

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch has no gloo", allow_module_level=True)

from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

PROCESSES = 2
SECONDS = 240  # far more than it takes: a hang must end

CLASSES = {
    "Adam": {},
    "Adam-amsgrad": {"amsgrad": True},
    "Adam-foreach": {"foreach": True},
    "Adam-fused": {"fused": True},
    "AdamW-fused": {"fused": True},
    "SGD-momentum": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01},
    "SGD-nesterov-foreach": {"momentum": 0.9, "nesterov": True, "foreach": True},
    "RMSprop": {"centered": True, "momentum": 0.5},
    "RMSprop-foreach": {"foreach": True},
    "Adagrad": {"lr_decay": 0.1, "initial_accumulator_value": 0.1},
    "Adadelta": {},
    "Adafactor": {},
    "Adamax": {},
    "ASGD": {"t0": 1.0},
    "Muon": {},
    "NAdam": {},
    "RAdam": {"betas": (0.8, 0.9)},
    "Rprop": {},
}
# Those whose dtype may decide how they run; elsewhere nothing depends on dtype and shards at once.
WAYS = ["Adam", *(name for name in CLASSES if name.endswith(("-foreach", "-fused")))]
RELOADED = ["Adam-amsgrad", "AdamW-fused", "SGD-momentum", "RMSprop", "Adafactor", "ASGD", "Muon"]
TOLERANCES = {
    torch.float32: {"rtol": 1e-6, "atol": 1e-7},
    torch.float64: {"rtol": 1e-12, "atol": 1e-15},
}
ROWS = REGISTRY | {name: COMPOSITIONS[name] for name in ("chain-global-norm", "ema", "freeze")}
ROUNDED = {"Muon"}  # products of rounded matrices depend on how they are cut
MATRICES_ONLY = {"Muon"}
# What is computed from a whole tensor cannot be written where a process has nothing of it.
NOT_ELEMENTWISE = {"Adafactor", "Muon"}
UNSHARDABLE = {"lbfgs", "muon"}  # one vector of all weights needs equal shards


def network(name, dtype):
    """Its shards are uneven, and one process has nothing of the last bias."""
    torch.manual_seed(0)
    sizes = [5, 7, 3, 2 if name in NOT_ELEMENTWISE else 1]
    bias = name not in MATRICES_ONLY
    layers = [torch.nn.Linear(m, n, bias) for m, n in itertools.pairwise(sizes)]
    return torch.nn.Sequential(layers[0], torch.nn.Tanh(), *layers[1:]).to(dtype)


def sharded(name, dtype, mesh):
    model = network(name, dtype)
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model, optimizer, steps):
    dtype = next(model.parameters()).dtype
    x = torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5).sin().to(dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()


def make(name, model, library=optim):
    return getattr(library, name.split("-")[0])(model.parameters(), lr=0.05, **CLASSES[name])


def full(tree):
    return pytree.tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, tree)


def values(model):
    return full([p.detach() for p in model.parameters()])


def expected(name, dtype, mesh):
    if name in ROUNDED:
        model = sharded(name, dtype, mesh)
        train(model, make(name, model, torch.optim), 3)
    else:
        model = network(name, dtype)
        train(model, make(name, model), 3)
    return values(model)


# What is compared: each returns what was found and what must be.


def unbroken(name, dtype, mesh):
    shards = sharded(name, dtype, mesh)
    optimizer = make(name, shards)
    train(shards, optimizer, 3)
    moments = [x for x in pytree.tree_leaves(optimizer.state_dict()["state"]) if x.dim()]
    assert moments
    assert all(isinstance(x, DTensor) for x in moments)
    return values(shards), expected(name, dtype, mesh)


def reloaded(name, dtype, mesh):
    """By the optimizer's own state_dict, into a new optimizer."""
    shards = sharded(name, dtype, mesh)
    before = make(name, shards)
    train(shards, before, 2)
    after = make(name, shards)
    after.load_state_dict(before.state_dict())
    train(shards, after, 1)
    return values(shards), expected(name, dtype, mesh)


def reloaded_by_name(name, dtype, mesh):
    """By torch.distributed.checkpoint, which keys the state by the names of parameters."""
    shards = sharded(name, dtype, mesh)
    before = make(name, shards)
    train(shards, before, 2)
    saved = get_optimizer_state_dict(shards, before)
    after = make(name, shards)
    set_optimizer_state_dict(shards, after, saved)
    train(shards, after, 1)
    return values(shards), expected(name, dtype, mesh)


def gathered(name, dtype, mesh):
    """A checkpoint of shards, gathered, continues without shards."""
    shards, alone = sharded(name, dtype, mesh), network(name, dtype)
    optimizer = make(name, shards)
    train(shards, optimizer, 2)
    everything = StateDictOptions(full_state_dict=True)
    saved = get_optimizer_state_dict(shards, optimizer, options=everything)
    with torch.no_grad():
        for mine, theirs in zip(alone.parameters(), values(shards), strict=True):
            mine.copy_(theirs)
    after = make(name, alone)
    set_optimizer_state_dict(alone, after, saved, options=everything)
    train(alone, after, 1)
    return values(alone), expected(name, dtype, mesh)


def pure(row, mesh):
    """Three updates, and the derivative through them by start, gradients and hyperparameters."""
    case: Case = ROWS[row]

    def run(place):
        inputs = draw(case, 0, place), [draw(case, seed, place) for seed in (1, 2, 3)]
        inputs = (*inputs, case.interior())
        params, gradients, record = pytree.tree_map(torch.Tensor.requires_grad_, inputs)
        state = case.optimizer.init(params)
        for grads in gradients:
            params, state = case.optimizer.update(params, grads, state, record)
        outer = sum(p.square().sum() for p in full(params))
        leaves = pytree.tree_leaves(inputs)
        derivative = torch.autograd.grad(outer, leaves, materialize_grads=True)
        return full((params, state, derivative))

    return run(functools.partial(shard, mesh=mesh)), run(torch.clone)


def in_place(row, mesh):
    case: Case = ROWS[row]

    def run(place):
        params = draw(case, 0, place)
        state = case.optimizer.init(params)
        for seed in (1, 2, 3):
            case.optimizer.update_(params, draw(case, seed, place), state, case.record())
        return full((params, state))

    return run(functools.partial(shard, mesh=mesh)), run(torch.clone)


def draw(case, seed, place):
    generator = torch.Generator().manual_seed(seed)
    least = 0 if case.elementwise else PROCESSES
    shapes = [shape for shape in case.shapes if shape and shape[0] >= least]
    return [place(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]


def shard(x, mesh):
    return distribute_tensor(x, mesh, [Shard(0)])


# In torch 2.11, `DTensor.full_tensor` has no second derivative.
_DIFFERENTIATED_TWICE = torch.__version__ >= "2.13"


def clipped(places, clip, mesh):
    """The gradients of a tree, some of them shards, and two derivatives."""

    def run(place):
        grads = [place(x, i) for i, x in enumerate((torch.arange(1.0, 6), torch.ones(1), ALL))]
        grads = [x.double().requires_grad_() for x in grads]
        bound = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        record = clip.hparams(**dict.fromkeys(vars(clip.hparams()), bound))
        new, _ = clip.apply(grads, grads, (), record)
        inputs = [*grads, bound]
        outer = sum(x.pow(3).sum() for x in full(new))
        first = torch.autograd.grad(outer, inputs, create_graph=True)
        total = sum(x.square().sum() for x in full(first))
        second = torch.autograd.grad(total, inputs) if _DIFFERENTIATED_TWICE else ()
        return full((new, first, second))

    return run(lambda x, i: shard(x, mesh) if places[i] else x), run(lambda x, i: x)


def skipped(place, mesh):
    """A gradient that is not finite in one process only; shards may be empty."""
    opt = t.skip_nonfinite(diffopt.sgd())
    params = [shard(torch.zeros(3), mesh), shard(torch.zeros(1), mesh), torch.zeros(2)]
    grads = [torch.ones_like(p) for p in params]
    if place is not None:
        mine = grads[place].to_local() if isinstance(grads[place], DTensor) else grads[place]
        mine.fill_(torch.nan if dist.get_rank() == 0 else 1.0)
    state, record = opt.init(params), opt.hparams(lr=1.0)
    new, _ = opt.update(params, grads, state, record)
    opt.update_(params, grads, state, record)
    expected = [torch.full(p.shape, -1.0 if place is None else 0.0) for p in params]
    return full((new, params)), (expected, expected)


def solved(solver, mesh):
    """The fixed point x = a cos(x) / 2 and its derivative; products of the solver are sharded."""

    def iterated(_, a):
        x = a.detach() * 0
        for _ in range(60):
            x = 0.5 * x.cos() * a.detach()
        return x

    def run(place):
        a = place(torch.linspace(-1, 1, 12).double().reshape(4, 3)).requires_grad_()
        root = diffopt.implicit_fixed_point(lambda x, a: 0.5 * x.cos() * a, iterated, solver=solver)
        x = root(None, a)
        (grad,) = torch.autograd.grad(full(x.square().sum()), a)
        return full((x, grad))

    return run(lambda x: shard(x, mesh)), run(lambda x: x)


ALL = torch.full((2, 3), 0.5)
MIXES = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
CASES = {
    **{
        ("clipped", type(clip).__name__, *places, torch.float64): functools.partial(
            clipped, places, clip
        )
        for clip in (t.clip_by_global_norm(), t.clip_by_norm(), t.clip_by_value())
        for places in MIXES
    },
    **{
        ("solved", type(solver).__name__, torch.float32): functools.partial(solved, solver)
        for solver in (ConjugateGradient(rtol=1e-12), BiCGStab(rtol=1e-12), Neumann(60))
    },
    **{
        ("skipped", place, torch.float32): functools.partial(skipped, place)
        for place in (None, 0, 1, 2)
    },
    **{
        (check.__name__, name, dtype): functools.partial(check, name, dtype)
        for check, names, dtypes in (
            (unbroken, CLASSES, [torch.float64]),
            (unbroken, WAYS, [torch.float32]),
            (reloaded, RELOADED, [torch.float64]),
            (reloaded_by_name, RELOADED, [torch.float64]),
            (gathered, RELOADED, [torch.float64]),
        )
        for name in names
        if not (check is gathered and name in ROUNDED)
        for dtype in dtypes
    },
    **{
        (check.__name__, row, torch.float64): functools.partial(check, row)
        for check in (pure, in_place)
        for row in ROWS
        if row not in UNSHARDABLE and "derivatives" not in SKIPPED.get(row, ())  # as others do
    },
}


# The processes


def work(rank, folder):
    """Run all cases, and save for each None or what went wrong."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=PROCESSES,
        timeout=dt.timedelta(seconds=30),
    )
    mesh = init_device_mesh("cpu", (PROCESSES,))
    problems = {}
    for key, run in CASES.items():
        try:
            found, wanted = run(mesh=mesh)
            torch.testing.assert_close(found, wanted, **TOLERANCES[key[-1]])
        except Exception:
            problems[key] = traceback.format_exc()
    torch.save(problems, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def problems(folder):
    """What went wrong in either process, by case."""
    context = torch.multiprocessing.start_processes(
        work, (folder,), PROCESSES, join=False, start_method="spawn"
    )
    end = time.monotonic() + SECONDS
    try:
        while not context.join(max(0.0, end - time.monotonic())):
            assert time.monotonic() < end, f"not done after {SECONDS} seconds"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.slow
def test_sharded_training_equals_unsharded(tmp_path, subtests):
    for rank, found in enumerate(problems(tmp_path)):
        for case in CASES:
            with subtests.test("-".join(map(str, case)), process=rank):
                if case in found:
                    pytest.fail(found[case])
