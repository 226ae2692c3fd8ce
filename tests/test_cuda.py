"""On a GPU every optimizer does what it does on the CPU. Run where one is by `pytest -m cuda`.

Where there is only torch and pytest, run it by
`PYTHONPATH=src:tests python -m pytest -c /dev/null --rootdir=. --noconftest tests/test_cuda.py`.
"""

import contextlib
import copy
import dataclasses
import importlib
import sys
import types
import unittest
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter
from torch.utils import _pytree as pytree

import diffopt
from diffopt import optim


def stand_in(name, module):
    """Take this for a module that is not installed, of which nothing is needed here."""
    try:
        importlib.import_module(name)
    except ImportError:
        sys.modules[name] = module


stand_in("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))

from torch_optimizers import optim_db  # noqa: E402

stand_in("hypothesis", mock.MagicMock())

from registry import REGISTRY, SKIPPED  # noqa: E402

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]


def cuda(tree):
    return pytree.tree_map(lambda x: x.cuda() if isinstance(x, torch.Tensor) else x, tree)


def trees(case, dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    w, b, *_, c = (shape for shape in case.shapes if 0 not in shape)
    params = {"w": draw(*w), "b": [draw(*b), draw(*c)], "none": draw(*w)}
    gradients = [{"w": draw(*w), "b": [draw(*b), draw(*c)], "none": None} for _ in range(4)]
    return params, gradients


def accuracy(row):
    """Products of rounded matrices depend on the device."""
    return {"rtol": 0.05, "atol": 0.05} if row == "muon" else {}


def run(opt, params, gradients, record, *, in_place=False):
    state = opt.init(params)
    for grads in gradients:
        if in_place:
            opt.update_(params, grads, state, record)
        else:
            params, state = opt.update(params, grads, state, record)
    return params, state


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("way", ["leaf", "foreach", "in place"])
@pytest.mark.parametrize("row", REGISTRY)
def test_values(row, way, dtype):
    case, in_place = REGISTRY[row], way == "in place"
    if dtype not in case.dtypes:
        pytest.skip("cannot update this dtype")
    params, gradients = trees(case, dtype)
    opt = case.optimizer
    if not in_place:
        if not hasattr(opt, "execution"):
            pytest.skip("is not leafwise")
        opt = dataclasses.replace(opt, execution=way)
    on_gpu = run(opt, cuda(params), cuda(gradients), case.record(), in_place=in_place)
    on_cpu = run(case.optimizer, params, gradients, case.record())
    assert all(x.is_cuda for x in pytree.tree_leaves(on_gpu))
    torch.testing.assert_close(on_gpu, cuda(on_cpu), **accuracy(row))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("row", [r for r in REGISTRY if "derivatives" not in SKIPPED.get(r, ())])
def test_derivatives_with_hyperparameters_on_either_device(row, device):
    case = REGISTRY[row]
    params, gradients = trees(case, torch.float64)

    def meta_gradients(params, gradients, device):
        record = pytree.tree_map(lambda x: x.to(device).requires_grad_(), case.interior())
        params = pytree.tree_map(lambda x: x.requires_grad_(), params)
        new, _ = run(case.optimizer, params, gradients, record)
        outer = sum(leaf.square().sum() for leaf in pytree.tree_leaves(new))
        inputs = pytree.tree_leaves((params, record))
        return torch.autograd.grad(outer, inputs, materialize_grads=True)

    on_gpu = meta_gradients(cuda(params), cuda(gradients), device)
    on_cpu = meta_gradients(params, gradients, "cpu")
    torch.testing.assert_close([g.cpu() for g in on_gpu], list(on_cpu))


@pytest.mark.parametrize("row", [row for row in REGISTRY if row != "lbfgs"])
def test_params_on_two_devices(row):
    case = REGISTRY[row]
    params, gradients = trees(case, torch.float64)
    mixed = [{**tree, "w": tree["w"].cuda()} for tree in (params, *gradients)]
    new, _ = run(case.optimizer, mixed[0], mixed[1:], case.record())
    expected, _ = run(case.optimizer, params, gradients, case.record())
    assert new["w"].is_cuda
    assert not new["b"][0].is_cuda
    torch.testing.assert_close(new["w"].cpu(), expected["w"], **accuracy(row))
    torch.testing.assert_close(new["b"], expected["b"], **accuracy(row))


def test_an_update_waits_for_nothing():
    params, gradients = trees(REGISTRY["adam"], torch.float32)
    params, gradients = cuda(params), cuda(gradients)
    opt = diffopt.adam(amsgrad=True)
    state, record = opt.init(params), opt.hparams()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for grads in gradients:
            params, state = opt.update(params, grads, state, record)
            opt.update_(params, grads, state, record)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.step == 8


def test_a_captured_graph_counts_its_replays():
    params = {"w": torch.ones(4, device="cuda")}
    grads = {"w": torch.full((4,), 0.5, device="cuda")}
    opt = diffopt.adam()
    state, record = opt.init(params), opt.hparams(lr=0.1)
    twin = pytree.tree_map(torch.clone, (params, state))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # warms up, as capturing needs
        opt.update_(params, grads, state, record)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.update_(params, grads, state, record)
    for _ in range(5):
        graph.replay()
    for _ in range(6):
        opt.update_(twin[0], grads, twin[1], record)
    assert state.step == 6
    torch.testing.assert_close((params, state), twin)


def test_an_inner_loop():
    opt = diffopt.adam()

    def outer(w, lr):
        sol = diffopt.minimize(
            lambda w: (w**4).sum(), w, optimizer=opt, hparams=opt.hparams(lr=lr), steps=4
        )
        return sol.params.square().sum()

    arguments = torch.linspace(-1, 1, 5, dtype=torch.float64), torch.tensor(0.1)
    expected = torch.func.grad(outer, argnums=(0, 1))(*arguments)
    for lr in (arguments[1], arguments[1].cuda()):
        found = torch.func.grad(outer, argnums=(0, 1))(arguments[0].cuda(), lr)
        torch.testing.assert_close([g.cpu() for g in found], list(expected))


def test_devices_must_match():
    params, opt = {"w": torch.ones(2, device="cuda")}, diffopt.sgd()
    state = opt.init(params)
    with pytest.raises(ValueError, match=r"grads\['w'\] has device cpu, but params\['w'\] .* cuda"):
        opt.update(params, {"w": torch.ones(2)}, state, opt.hparams())
    with pytest.raises(ValueError, match=r"hparams.lr has device cpu, but params\['w'\] .* cuda"):
        opt.update(params, params, state, opt.hparams(lr=torch.ones(2)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("row", REGISTRY)
def test_values_with_numbers_as_tensors_of_either_device(row, in_place, dtype, device):
    case = REGISTRY[row]
    params, gradients = trees(case, torch.float64)
    record = pytree.tree_map(lambda x: torch.tensor(x, dtype=dtype), case.record())
    expected = run(case.optimizer, params, gradients, record)
    record = pytree.tree_map(lambda x: x.to(device), record)
    found = run(case.optimizer, cuda(params), cuda(gradients), record, in_place=in_place)
    torch.testing.assert_close(found, cuda(expected), **accuracy(row))


# diffopt.optim beside torch.optim


BOTH = [optim, torch.optim]
ROWS = {row.name: row for row in optim_db}
CONFIGURATIONS = [
    pytest.param(name, config.kwargs, id=f"{name}-{config.desc.replace(' ', '_')}")
    for name, row in ROWS.items()
    for config in row.optim_inputs_func(device="cuda")
]
CAPTURABLE = [config for config in CONFIGURATIONS if config.values[1].get("capturable")]
FUSED = [name for name, row in ROWS.items() if "cuda" in row.supports_fused_on]
SPARSE_ONLY, MATRICES_ONLY, WITH_CLOSURE = {"SparseAdam"}, {"Muon"}, {"LBFGS"}
STEPPED = [name for name in ROWS if name not in SPARSE_ONLY | WITH_CLOSURE]
FLAGS = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
EXACT = {"rtol": 0, "atol": 0}
# A count in float32 on the device makes factors in float32, as do the state and foreach of ASGD;
# torch rounds the bias corrections of a capturable Adam.
ROUNDED = {"rtol": 1e-5, "atol": 1e-5}

configuration = pytest.mark.parametrize(("name", "numbers"), CONFIGURATIONS)
library = pytest.mark.parametrize("library", BOTH, ids=["diffopt", "torch"])


def tolerance(name, numbers, dtype):
    exact = dtype is torch.float64 and name != "ASGD" and not numbers.get("capturable")
    return {"rtol": 1e-10, "atol": 1e-12} if exact else ROUNDED


class Run:
    """A training run by a class of one of the libraries, the same each time it is made."""

    def __init__(
        self, library, name, numbers=None, *, dtype=torch.float64, device="cuda", dense=False, **kw
    ):
        self.name, self.t = name, 0
        numbers = {"lr": 0.1, **copy.deepcopy(numbers or {}), **kw}
        dense = dense or numbers.get("fused")  # which torch's fused kernels need
        self.params = [Parameter(x) for x in self.draw(dtype, device, dense)]
        if name in WITH_CLOSURE:
            numbers.setdefault("max_iter", 5)
        self.optimizer = getattr(library, name)(self.params, **numbers)

    def draw(self, dtype, device, dense):
        shapes = [(4, 3), (3, 5), (2, 2)]
        if self.name not in SPARSE_ONLY | MATRICES_ONLY:
            shapes += [(), (7,)]
        tensors = [self.normal(shape, dtype, i).to(device) for i, shape in enumerate(shapes)]
        if self.name not in SPARSE_ONLY | MATRICES_ONLY | WITH_CLOSURE:
            image = self.normal((2, 3, 2, 2), dtype, 9).to(device)
            tensors.append(image.to(memory_format=torch.channels_last))
            tensors += [] if dense else [self.normal((5, 2), dtype, 10).to(device)[:, 0]]
        return tensors

    @staticmethod
    def normal(shape, dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def advance(self, steps):
        for _ in range(steps):
            self.optimizer.zero_grad()
            if self.name in WITH_CLOSURE:
                self.optimizer.step(self.closure)
            else:
                self.draw_gradients()
                self.optimizer.step()
            self.t += 1
        return self

    def draw_gradients(self, scale=1.0):
        for i, p in enumerate(self.params):
            g = torch.empty_like(p).copy_(self.normal(p.shape, p.dtype, 100 * self.t + 50 + i))
            p.grad = (g * scale).to_sparse(1) if self.name in SPARSE_ONLY else g * scale

    def closure(self):
        self.optimizer.zero_grad()
        loss = sum((1 + i) * (p - i).square().sum() for i, p in enumerate(self.params))
        loss.backward()
        return loss

    def values(self):
        return [p.detach().cpu() for p in self.params]

    def state(self):
        return pytree.tree_map(
            lambda x: x.cpu() if isinstance(x, torch.Tensor) else x,
            self.optimizer.state_dict()["state"],
        )

    def takes_over(self, other):
        self.t = other.t
        with torch.no_grad():
            for p, q in zip(self.params, other.params, strict=True):
                p.copy_(q)
        self.optimizer.load_state_dict(other.optimizer.state_dict())
        return self


def assert_same(ours, theirs, **tolerance):
    torch.testing.assert_close(ours.values(), theirs.values(), **tolerance)
    torch.testing.assert_close(ours.state(), theirs.state(), **tolerance)


def has(name, flags):
    """Whether torch has this way of stepping it on a GPU."""
    row = ROWS[name]
    fused = "cuda" in row.supports_fused_on
    return all(fused if flag == "fused" else flag in row.supported_impls for flag in flags)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@configuration
def test_values_of_torchs_classes(name, numbers, flags, dtype):
    if not has(name, flags):
        pytest.skip("torch has none")
    if name in WITH_CLOSURE and dtype is torch.bfloat16:
        pytest.skip("its iterations diverge in half precision")
    settings = {"dtype": dtype, **flags}
    ours, theirs = (Run(lib, name, numbers, **settings).advance(4) for lib in BOTH)
    if "fused" in flags:
        assert_same(ours, theirs, **EXACT)  # it is the same kernel
    elif dtype is torch.bfloat16:  # torch rounds every intermediate result
        torch.testing.assert_close(ours.values(), theirs.values(), rtol=0.05, atol=0.05)
    else:
        assert_same(ours, theirs, **tolerance(name, numbers, dtype))


@configuration
def test_state_is_where_torch_keeps_it(name, numbers):
    ours, theirs = (Run(lib, name, numbers).advance(2).optimizer for lib in BOTH)

    def places(optimizer):
        rows = optimizer.state_dict()["state"].values()
        tensors = [
            {key: x for key, x in row.items() if isinstance(x, torch.Tensor)} for row in rows
        ]
        return [{key: (x.device, x.dtype) for key, x in row.items()} for row in tensors]

    assert places(ours) == places(theirs)


# Graphs


@contextlib.contextmanager
def side_stream():
    """Where the steps before a capture must run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def replay(run, before, times):
    """Some steps, one captured, and its replays; all with the same gradients."""
    run.draw_gradients()
    if before:
        with side_stream():
            for _ in range(before):
                run.optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # which records the step and does not run it
        run.optimizer.step()
    for _ in range(times):
        graph.replay()


def repeat(run, steps):
    run.draw_gradients()
    for _ in range(steps):
        run.optimizer.step()
    return run


CAPTURED = [
    *CAPTURABLE,
    *(pytest.param(name, {"fused": True}, id=f"{name}-fused") for name in FUSED),
    *(pytest.param(name, {}, id=name) for name in ("SGD", "Muon") if name in ROWS),
]


def capture_settings(name, numbers):
    """With the flag where the class has it."""
    flag = ROWS[name].has_capturable_arg
    return {**numbers, "capturable": True} if flag else numbers


@pytest.mark.parametrize(("name", "numbers"), CAPTURED)
def test_replays_of_a_captured_step_are_steps(name, numbers):
    numbers = capture_settings(name, numbers)
    captured = Run(optim, name, numbers)
    replay(captured, before=3, times=3)
    assert_same(captured, repeat(Run(optim, name, numbers), 6), **ROUNDED)
    captured.optimizer.step()  # which sees what the replays did
    assert_same(captured, repeat(Run(torch.optim, name, numbers), 7), **ROUNDED)


@pytest.mark.parametrize(("name", "numbers"), CAPTURED)
def test_a_loaded_optimizer_may_be_captured_at_once(name, numbers):
    numbers = capture_settings(name, numbers)
    begun = repeat(Run(optim, name, numbers), 3)
    loaded = Run(optim, name, numbers).takes_over(begun)
    replay(loaded, before=0, times=3)
    assert_same(loaded, repeat(Run(torch.optim, name, numbers), 6), **ROUNDED)


@pytest.mark.parametrize("name", [n for n, row in ROWS.items() if row.has_capturable_arg])
def test_a_step_that_counts_on_the_cpu_refuses_to_be_captured(name):
    run = repeat(Run(optim, name), 2)
    with (
        pytest.raises(RuntimeError, match="capturable is False"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        run.optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [n for n, row in ROWS.items() if row.has_capturable_arg])
def test_a_captured_step_reads_a_rate_on_the_device(name, dtype):
    rates = [torch.tensor(0.1, dtype=dtype, device="cuda") for _ in BOTH]
    captured, other = (
        Run(lib, name, {"lr": lr, "capturable": True}) for lib, lr in zip(BOTH, rates, strict=True)
    )
    captured.draw_gradients()
    with side_stream():
        captured.optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.optimizer.step()
    repeat(other, 1)
    for rate in (0.1, 0.05, 0.2):
        rates[0].fill_(rate)
        graph.replay()
        rates[1].fill_(rate)
        other.optimizer.step()
    assert_same(captured, other, **ROUNDED)


# Waiting


@pytest.mark.parametrize("flags", [{}, {"capturable": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("name", STEPPED)
def test_a_step_waits_for_nothing(name, flags):
    if not ("fused" not in flags or has(name, flags)):
        pytest.skip("has no fused kernel")
    if "capturable" in flags and not ROWS[name].has_capturable_arg:
        pytest.skip("has no such flag")
    run = Run(optim, name, flags)
    for before in (True, True, False, False, False):
        run.optimizer.zero_grad()
        run.draw_gradients()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("default" if before else "error")
        try:
            run.optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        run.t += 1
    assert_same(run, Run(torch.optim, name, flags).advance(5), **ROUNDED)


@pytest.mark.parametrize("flags", [{}, {"capturable": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("name", STEPPED)
def test_no_step_waits_where_gradients_come_and_go(name, flags):
    if not ("fused" not in flags or has(name, flags)):
        pytest.skip("has no fused kernel")
    if "capturable" in flags and not ROWS[name].has_capturable_arg:
        pytest.skip("has no such flag")
    runs = [Run(lib, name, flags) for lib in BOTH]
    for t in range(8):
        for run in runs:
            run.draw_gradients()
            run.params[1].grad = None if t % 2 else run.params[1].grad
            torch.cuda.synchronize()
            watched = t > 1 and run is runs[0]
            torch.cuda.set_sync_debug_mode("error" if watched else "default")
            try:
                run.optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            run.t += 1
    assert_same(*runs, **ROUNDED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in STEPPED if name not in ("Adafactor", "Muon")])
def test_a_step_takes_no_more_memory_than_torchs(name, dtype):
    taken = []
    for lib in BOTH:
        params = [Parameter(torch.ones(1 << 20, dtype=dtype, device="cuda")) for _ in range(24)]
        optimizer = getattr(lib, name)(params, lr=0.1, foreach=True)
        for p in params:
            p.grad = torch.full_like(p, 0.1)
        for _ in range(2):
            optimizer.step()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        taken.append(torch.cuda.max_memory_allocated() - before)
    assert taken[0] <= max(taken[1], sum(p.nbytes for p in params)) + (1 << 20)


# Scaled gradients


def scaled(run, gradients):
    """Steps by a scaler; where a gradient is infinite there is none."""
    device = run.params[0].device.type
    scaler = torch.amp.GradScaler(device, init_scale=8.0, growth_interval=2)
    scaler.scale(torch.ones((), device=device))  # which makes the scale
    for finite in gradients:
        run.optimizer.zero_grad()
        run.draw_gradients(scale=scaler.get_scale())
        if not finite:
            run.params[0].grad[0, 0] = torch.inf
        scaler.step(run.optimizer)
        scaler.update()
        run.t += 1
    return run


@pytest.mark.parametrize("gradients", [(1, 0, 1, 0, 1), (0, 1, 1)], ids=["later", "first"])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("name", STEPPED)
def test_a_scaler_skips_infinite_gradients(name, flags, gradients):
    if not has(name, flags):
        pytest.skip("torch has none")
    settings = {"dtype": torch.float32, "dense": True, **flags}
    ours = scaled(Run(optim, name, **settings), gradients)
    theirs = scaled(Run(torch.optim, name, **{**settings, **tensor_by_tensor(name)}), gradients)
    assert_same(ours, theirs, **ROUNDED)
    counts = {int(row["step"]) for row in ours.state().values() if "step" in row}
    assert counts <= {sum(gradients)}


def tensor_by_tensor(name):
    return {flag: False for flag in ("foreach", "fused") if flag in ROWS[name].supported_impls}


# Checkpoints


PLACES = [(lib, device) for lib in BOTH for device in ("cpu", "cuda")]
MOVES = [(a, b) for a in PLACES for b in PLACES if a != b and optim in (a[0], b[0])]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "move", MOVES, ids=lambda m: "-".join(f"{lib.__name__.split('.')[0]}_{on}" for lib, on in m)
)
@pytest.mark.parametrize("name", ROWS)
def test_a_checkpoint_moves_between_devices_and_libraries(name, move, fused):
    if fused and name not in FUSED:
        pytest.skip("has no fused kernel")
    flags = {"fused": True} if fused else {}
    (lib, device), (other, other_device) = move
    begun = Run(lib, name, flags, device=device, dense=True).advance(2)
    moved = Run(other, name, flags, device=other_device, dense=True).takes_over(begun).advance(2)
    assert {p.device.type for p in moved.params} == {other_device}
    unbroken = Run(torch.optim, name, device="cpu", dense=True).advance(4)
    # torch makes float32 counts of other state float64 when it loads them for float64 parameters
    torch.testing.assert_close(moved.values(), unbroken.values(), rtol=1e-6, atol=1e-8)


# One group of everything


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("name", STEPPED)
def test_one_group_may_have_several_devices_and_dtypes(name, flags):
    if not has(name, flags):
        pytest.skip("torch has none")
    kinds = [(d, t) for d in ("cpu", "cuda") for t in (torch.float32, torch.float64)] * 2
    values = [Run.normal((3, 2), torch.float64, i) for i in range(len(kinds))]
    found = []
    for lib in BOTH:
        params = [Parameter(x.to(d, t)) for x, (d, t) in zip(values, kinds, strict=True)]
        chosen = flags if lib is optim else tensor_by_tensor(name)
        optimizer = getattr(lib, name)(params, lr=0.1, **chosen)
        for t in range(3):
            for i, p in enumerate(params):
                late = i == 5 and t == 0
                p.grad = None if late else torch.full_like(p, 0.1 * i + t - 1)
            optimizer.step()
        found.append([p.detach().cpu() for p in params])
    torch.testing.assert_close(*found, **ROUNDED)


# Counts


def test_a_count_on_the_cpu_is_the_kernels_whatever_happens_between():
    found = []
    for lib in BOTH:
        p = Parameter(torch.ones(3, device="cuda"))
        optimizer = lib.Adam([p], lr=0.1)
        betas = torch.tensor(0.9, device="cuda"), torch.tensor(0.999, device="cuda")
        for change in (None, betas, (0.9, 0.999), None):
            if change and lib is optim:
                optimizer.param_groups[0]["betas"] = change
            p.grad = torch.full_like(p, 0.5)
            optimizer.step()
        optimizer.state[p]["step"].fill_(10)
        p.grad = torch.full_like(p, 0.1)
        optimizer.step()
        assert optimizer.state[p]["step"] == 11
        found.append(p.detach())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", [n for n, row in ROWS.items() if row.has_capturable_arg])
def test_counts_in_double_precision(name):
    torch.set_default_dtype(torch.float64)
    try:
        numbers = {"capturable": True}
        ours, theirs = (Run(lib, name, numbers).advance(3) for lib in BOTH)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(ours, theirs, **ROUNDED)


# Subclasses of tensors


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_nccl_available()), reason="torch has no nccl"
)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("name", STEPPED)
def test_sharded_parameters(name, flags, tmp_path):
    """One shard only: what is shown is that these tensors can be stepped."""
    if not has(name, flags) or (flags.get("fused") and name not in ("Adam", "AdamW")):
        pytest.skip("torch has none")
    from torch.distributed.fsdp import fully_shard

    torch.cuda.set_device(0)
    rendezvous = f"file://{tmp_path}/rendezvous"
    dist.init_process_group("nccl", init_method=rendezvous, rank=0, world_size=1)
    try:
        found = []
        for shard in (lambda model: model, fully_shard):
            torch.manual_seed(0)
            model = shard(torch.nn.Linear(4, 3, bias=name not in MATRICES_ONLY, device="cuda"))
            optimizer = getattr(optim, name)(model.parameters(), lr=0.1, **flags)
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.ones(2, 4, device="cuda")).square().sum().backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
            parameters = [p.detach() for p in model.parameters()]
            found.append([p.full_tensor() if shard is fully_shard else p for p in parameters])
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(*found)


if not torch.cuda.is_available():  # at the end: without a device, too, the module must import
    pytest.skip("no CUDA device", allow_module_level=True)
