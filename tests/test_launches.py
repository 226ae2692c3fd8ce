"""What a step asks of a GPU, by counts on an emulated one: launches, waiting, memory."""

import contextlib

import pytest
import torch
from torch.nn import Parameter

import diffopt
from diffopt import _torch, optim
from diffopt.adjoint._offloaded import Offloaded
from emulated_gpu import DEVICE, Cuda, cuda, emulated
from registry import skip_old_adagrad

LIBRARIES = (torch.optim, optim)
SHAPES = [(40, 30), (40,), (40,), (50, 40), (50,), (5, 4, 3, 3), (5,), (5,), (1,), ()] * 3
CLASSES = {
    "SGD": {"momentum": 0.9},
    **{name: {} for name in ("Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam")},
    **{name: {} for name in ("RAdam", "RMSprop", "Rprop")},
}
KERNELS = ("SGD", "Adam", "AdamW", "Adagrad")
CAPTURABLE = [name for name in CLASSES if name not in ("SGD", "Adagrad")]


@pytest.fixture(autouse=True)
def device(monkeypatch):
    with emulated(monkeypatch):
        yield


def params(shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    tensors = [cuda(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    return [Parameter(x) for x in tensors]


def stepped(optimizer, steps, absent=lambda i, t: False):
    """Count what the last of some steps asks for."""
    for t in range(steps):
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            p.grad = None if absent(i, t) else torch.full_like(p, 0.1 * (i % 3) + 0.1)
        DEVICE.reset()
        optimizer.step()
    return DEVICE.count("launch"), DEVICE.count("wait"), DEVICE.bytes


FLAGS = [{}, {"foreach": True}, {"capturable": True}, {"fused": True}]


def takes(name, flags):
    if "capturable" in flags:
        return name in CAPTURABLE
    return "fused" not in flags or name in KERNELS


ASKED = [(name, flags) for name in CLASSES for flags in FLAGS if takes(name, flags)]


@pytest.mark.parametrize(("name", "flags"), [x for x in ASKED if x[0] not in ("ASGD", "Rprop")])
def test_a_step_takes_no_more_launches_and_memory_than_torchs(name, flags):
    if "fused" in flags:
        skip_old_adagrad(name)
    theirs, ours = (
        stepped(getattr(lib, name)(params(), **CLASSES[name], **flags), 8) for lib in LIBRARIES
    )
    counted = flags == {"capturable": True}  # the count of this step is one more number
    assert ours[0] <= theirs[0] + counted
    assert ours[1] == 0
    assert ours[2] <= theirs[2] + 4 * counted


@pytest.mark.parametrize("name", CLASSES)
def test_half_precision_takes_no_more_memory_than_the_params(name, monkeypatch):
    monkeypatch.setattr("diffopt._rule.lists._LEAST", 1 << 10)
    given = params([(64,)] * 40, torch.bfloat16)
    optimizer = getattr(optim, name)(given, **CLASSES[name], foreach=True)
    assert stepped(optimizer, 3)[2] <= 40 * 64 * 2 * 1.1


def test_half_precision_fills_the_memory_it_may_take(monkeypatch):
    monkeypatch.setattr("diffopt._rule.lists._LEAST", 1 << 10)
    optimizer = optim.Adam(params([(900,)] * 10, torch.bfloat16), foreach=True)
    launches, _, size = stepped(optimizer, 3)
    assert launches <= 7 * 14  # three lists in float32 take six times the params
    assert size <= 10 * 900 * 2


@pytest.mark.parametrize(("name", "flags"), ASKED)
def test_no_step_waits_where_gradients_come_and_go(name, flags):
    optimizer = getattr(optim, name)(params(), **CLASSES[name], **flags)

    def absent(i, t):
        return (i == 3 and t % 2) or (i == 5 and t < 3) or (i > 8 and t % 4 == 1)

    stepped(optimizer, 1)
    for steps in (6, 1, 1):
        assert stepped(optimizer, steps, absent)[1] == 0


def test_counts_that_differ_are_kept_apart_without_reading_them():
    values = []
    for lib in LIBRARIES:
        given = params([(3,)] * 4)
        optimizer = lib.Adam(given, capturable=True, lr=0.1)
        stepped(optimizer, 7, lambda i, t: (i + t) % 3 == 0 or (i == 2 and t > 3))
        optimizer.state[given[0]]["step"].add_(5)  # a user does
        optimizer.state[given[1]]["step"] = cuda(torch.tensor(2.0))
        stepped(optimizer, 5, lambda i, t: i == t)
        values.append([p.detach().inner for p in given])
        values[-1] += [optimizer.state[p]["step"].inner for p in given]
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)


COUNTED = [(n, f) for n, f in ASKED if f.get("capturable") or (f.get("fused") and n != "SGD")]


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize(("name", "flags"), [*COUNTED, ("ASGD", {})])
def test_counts_written_through_data_are_used_without_waiting(name, flags, replaced):
    mine = params([(3,)] * 4)
    theirs = [Parameter(p.detach().inner.clone()) for p in mine]
    optimizers = getattr(torch.optim, name)(theirs), getattr(optim, name)(mine, **flags)
    for optimizer in optimizers:
        stepped(optimizer, 3)
        for i, p in enumerate(optimizer.param_groups[0]["params"][:2]):
            for count in (x for x in optimizer.state[p].values() if x.dim() == 0):
                if replaced and isinstance(count, Cuda):  # the memory, as after offloading
                    count.inner = count.inner.clone()
                count.data.mul_(i + 2)
        assert stepped(optimizer, 3, lambda i, t: i == t)[1] == 0 or optimizer is optimizers[0]
    found = [[p.detach().inner, *(x.inner for x in optimizer.state[p].values())] for p in mine]
    right = [[p.detach(), *optimizers[0].state[p].values()] for p in theirs]
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_a_loaded_optimizer_waits_once_and_is_captured_whole():
    begun = optim.Adam(params(), fused=True, capturable=True)
    stepped(begun, 2)
    loaded = optim.Adam(params(), fused=True, capturable=True)
    loaded.load_state_dict(begun.state_dict())
    for p in loaded.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    DEVICE.reset()
    DEVICE.capturing = True
    try:
        loaded.step()
    finally:
        DEVICE.capturing = False
    assert DEVICE.count("launch") <= 3
    assert stepped(loaded, 2)[:2] == (2, 0)


def test_what_a_graph_counts_is_not_known():
    """Its replays count too, which nobody sees; parameters that it counts together stay equal."""
    optimizer = optim.Adam(params([(3,)] * 3), capturable=True)
    stepped(optimizer, 2)
    DEVICE.capturing = True
    try:
        stepped(optimizer, 1, lambda i, t: i == 2)
    finally:
        DEVICE.capturing = False
    stepped(optimizer, 1, lambda i, t: i < 2)  # the third has the count that the others had
    assert stepped(optimizer, 1)[1] == 0
    (plan,) = optimizer.state.plans
    assert sorted(len(bucket.indices) for bucket in plan.buckets) == [1, 2]


# Rules that mix the elements of a tensor

MATRICES = [*[(8, 6)] * 9, *[(6, 8)] * 5, (1, 4), *[(12, 4)] * 3]
MIXING = [
    ("Adafactor", {"lr": 0.1, "weight_decay": 0.1}, [*MATRICES, *[(7,)] * 4, *[()] * 3, (2, 3, 4)]),
    ("Muon", {}, MATRICES),
    ("Muon", {"adjust_lr_fn": "match_rms_adamw", "nesterov": False}, MATRICES),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "flags", "shapes"), MIXING)
def test_tensors_of_one_shape_are_stepped_together(name, flags, shapes, dtype):
    theirs, ours = (
        stepped(getattr(lib, name)(params(shapes, dtype), **flags), 1) for lib in LIBRARIES
    )
    assert ours[0] < theirs[0]
    assert ours[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "flags", "shapes"), MIXING)
def test_steps_together_are_those_of_a_cpu(name, flags, shapes, dtype):
    there = params(shapes, dtype)
    here = [Parameter(p.detach().inner.clone()) for p in there]
    for given in (there, here):
        stepped(getattr(optim, name)(given, **flags), 2)
    exact = dtype is not torch.bfloat16 and name != "Muon"  # which iterates in bfloat16
    tolerances = {} if exact else {"rtol": 0.02, "atol": 1e-3}
    torch.testing.assert_close([p.detach().inner for p in there], list(here), **tolerances)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
def test_tensors_of_one_shape_are_stacked_in_memory_of_limited_size(name, dtype, monkeypatch):
    monkeypatch.setattr("diffopt._rule.tiles._LEAST", 1 << 14)
    given = params([(16, 8)] * 60, dtype)
    launches, _, size = stepped(getattr(optim, name)(given), 2)
    assert size <= 1 << 14
    if dtype is not torch.bfloat16:  # whose pieces are smaller
        assert launches < stepped(getattr(torch.optim, name)(given), 2)[0]


# A resnet18 of an eighth of its width, so a 64th of its weights.
CONVOLUTIONS = [
    *[(8, 3, 7, 7), *[(8, 8, 3, 3)] * 4, (16, 8, 3, 3), *[(16, 16, 3, 3)] * 3, (32, 16, 3, 3)],
    *[*[(32, 32, 3, 3)] * 3, (64, 32, 3, 3), *[(64, 64, 3, 3)] * 3, (125, 64)],
]
VECTORS = [*[(8,)] * 5, *[(16,)] * 4, (125,)]
ALONE = [
    ("Adafactor", {}, [*CONVOLUTIONS, *VECTORS]),
    ("Adafactor", {"weight_decay": 0.1}, [*CONVOLUTIONS, *VECTORS]),
    ("Muon", {}, [(125, 64)]),
    ("Muon", {"nesterov": False}, [(48, 64), (64, 48)]),
]


@pytest.mark.parametrize(("name", "flags", "shapes"), ALONE)
def test_rules_that_mix_elements_ask_for_no_more_than_torchs(name, flags, shapes, monkeypatch):
    monkeypatch.setattr("diffopt._rule.tiles._LEAST", (1 << 24) // 64)
    theirs, ours = (stepped(getattr(lib, name)(params(shapes), **flags), 3) for lib in LIBRARIES)
    assert ours[0] <= theirs[0]
    assert ours[1] == 0
    assert ours[2] <= theirs[2]


# Offloading


class Stream:
    """What is asked of a stream."""

    def __init__(self, device=None):
        self.waits = []

    def wait_stream(self, stream):
        self.waits.append(stream)

    wait_event = wait_stream

    def record_event(self):
        return object()


@pytest.fixture
def stream(monkeypatch):
    """The current stream; others are emulated too."""
    current = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: None)
    return current


def test_offloaded_tensors_are_copied_beside_the_computation(stream, monkeypatch):
    nodes = [params([(3,), (2, 2)]) for _ in range(4)]
    hooks = Offloaded([nodes[0][0].data_ptr()])
    DEVICE.reset()
    packed = []
    for number, tensors in enumerate(nodes):
        monkeypatch.setattr(_torch, "next_node", lambda number=number: number)
        packed.append([hooks.pack(x.detach()) for x in tensors])
    assert isinstance(packed[0][0], Cuda)
    assert DEVICE.count("copy") == 7
    (side,) = hooks.streams.values()
    assert side.waits == [stream] * 7
    for number in (3, 2, 1, 0):
        back = [hooks.unpack(x) for x in packed[number]]
        before = packed[number - 1] if number else []
        assert all(isinstance(x, Cuda) or x.ahead for x in before)
        values = [x.inner for x in back]
        torch.testing.assert_close(values, [x.detach().inner for x in nodes[number]])
    assert DEVICE.count("copy") == 14
    assert DEVICE.count("wait") == 0
    assert len(stream.waits) == 7


# Pure optimizers

RULES = {name.lower(): numbers for name, numbers in CLASSES.items()}


def pure(name, way, lr):
    opt = getattr(diffopt, name)()
    given = [x.detach() for x in params()]
    grads = [torch.ones_like(x) for x in given]
    numbers = RULES[name] | ({} if lr is None else {"lr": lr})
    state, record = opt.init(given), opt.hparams(**numbers)
    for _ in range(3):
        DEVICE.reset()
        if way == "update":
            given, state = opt.update(given, grads, state, record)
        else:
            opt.update_(given, grads, state, record)
    return given


@pytest.mark.parametrize("on", ["number", "cpu", "cuda"])
@pytest.mark.parametrize("way", ["update", "update_"])
@pytest.mark.parametrize("name", RULES)
def test_pure_steps_wait_for_nothing_and_launch_lists(name, way, on):
    rate = torch.tensor(0.01)
    pure(name, way, {"number": None, "cpu": rate, "cuda": cuda(rate)}[on])
    assert DEVICE.count("wait") == 0
    if name in ("sgd", "adam", "adamw", "adagrad"):
        assert DEVICE.count("launch") <= (4 if way == "update_" else 8)
    elif name != "rprop":  # which has no foreach kernels for comparisons
        assert DEVICE.count("launch") < 90  # scalars on the device, for any number of tensors


@pytest.mark.parametrize("name", RULES)
def test_pure_steps_are_captured(name):
    opt = getattr(diffopt, name)()
    given = [x.detach() for x in params()]
    state, grads = opt.init(given), [torch.ones_like(x) for x in given]
    DEVICE.capturing = True
    try:
        opt.update_(given, grads, state, opt.hparams())
    finally:
        DEVICE.capturing = False


def test_what_is_on_the_cpu_is_copied_once_to_the_device():
    opt = diffopt.transforms.accumulate(diffopt.adamw(), k=4)
    given = [x.detach() for x in params()]
    state, grads = opt.init(given), [torch.ones_like(x) for x in given]
    DEVICE.reset()
    opt.update(given, grads, state, opt.hparams())
    assert DEVICE.count("wait") <= 2


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_are_moved_by_lists(bias_correction, dtype):
    opt = diffopt.transforms.ema(diffopt.adamw(), bias_correction=bias_correction)
    there = [p.detach() for p in params(dtype=dtype)]
    here = [p.inner.clone() for p in there]
    averages = []
    for given in (there, here):
        state, grads = opt.init(given), [torch.ones_like(x) for x in given]
        decay = {"decay": torch.tensor(0.9)} if given is there else {"decay": 0.9}
        for _ in range(3):
            DEVICE.reset()
            opt.update_(given, grads, state, opt.hparams(**decay))
        averages.append([x.inner if isinstance(x, Cuda) else x for x in state.average])
        if given is there:
            assert DEVICE.count("launch") < 50  # for any number of tensors
            assert DEVICE.count("wait") <= 1  # for the decay
    torch.testing.assert_close(*averages)


@pytest.mark.parametrize("name", KERNELS)
def test_a_rate_in_a_tensor_on_the_cpu_is_not_copied_at_every_step(name):
    rate = torch.tensor(0.01)
    optimizer = getattr(optim, name)(params(), lr=rate, fused=True)
    launches, waits, _ = stepped(optimizer, 3)
    assert launches <= 3
    assert waits == 0
    rate.fill_(0.0)
    before = [p.detach().inner.clone() for p in optimizer.param_groups[0]["params"]]
    stepped(optimizer, 1)
    after = [p.detach().inner for p in optimizer.param_groups[0]["params"]]
    torch.testing.assert_close(before, after)
