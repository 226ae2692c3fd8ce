"""Which code a step of diffopt.optim runs for which flags and tensors, and with which arguments."""

import copy
import itertools
import types

import pytest
import torch
from torch.nn import Parameter

from diffopt import optim
from diffopt.optim import _plan
from registry import skip_old_adagrad

KERNELS = {
    "SGD": ("_fused_sgd_", {"momentum": 0.9}),
    "Adam": ("_fused_adam_", {"amsgrad": True}),
    "AdamW": ("_fused_adamw_", {}),
    "Adagrad": ("_fused_adagrad_", {}),
}
WITHOUT_KERNEL = {
    "Adadelta": {},
    "Adamax": {},
    "ASGD": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.5},
    "Rprop": {},
}
NUMBERS = {name: numbers for name, (_, numbers) in KERNELS.items()} | WITHOUT_KERNEL
# What each kernel gets beside params and gradients.
ARGUMENTS = {
    "SGD": ["momentum_buffer"],
    "Adam": ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"],
    "AdamW": ["exp_avg", "exp_avg_sq", None, "step"],
    "Adagrad": ["sum", "step"],
}
FOREACH = [
    name
    for name in dir(torch)
    if name.startswith("_foreach_") and name != "_foreach_copy_"  # tiles are written back by it
]

every_kernel = pytest.mark.parametrize("name", KERNELS)


class Call(types.SimpleNamespace):
    """One call: the kernel's name, its lists of tensors, its other arguments."""


@pytest.fixture
def calls(monkeypatch):
    """The calls of torch's kernels on lists of tensors, in order."""
    torch.manual_seed(0)
    seen = []

    def spy_on(name):
        kernel = getattr(torch, name)

        def spy(*args, **kwargs):
            lists = [x for x in args if isinstance(x, (list, tuple))]
            seen.append(Call(name=name, lists=list(map(list, lists)), numbers=kwargs))
            return kernel(*args, **kwargs)

        monkeypatch.setattr(torch, name, spy)

    for name in [*(kernel for kernel, _ in KERNELS.values()), *FOREACH]:
        spy_on(name)
    return seen


def fused(calls):
    return [call for call in calls if call.name.startswith("_fused_")]


def tensors(*shapes, dtype=torch.float32, device="cpu"):
    return [Parameter(torch.randn(shape, dtype=dtype, device=device)) for shape in shapes]


def make(name, params, library=optim, **flags):
    return getattr(library, name)(params, lr=0.1, **copy.deepcopy(NUMBERS[name]), **flags)


def step(optimizer, params, times=1):
    for _ in range(times):
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        optimizer.step()


def kernel_of(name):
    return KERNELS[name][0]


def expect(call, name, optimizer, params):
    """The kernel gets the memory of parameters, gradients and state, and the count of each."""
    rows = [optimizer.state[p] for p in params]
    columns = [params, [p.grad for p in params]]
    columns += [[row[key] for row in rows] if key else [] for key in ARGUMENTS[name]]
    assert call.name == kernel_of(name)
    if "step" in ARGUMENTS[name]:
        assert [float(x) for x in call.lists.pop()] == [float(x) for x in columns.pop()]
    for found, expected in zip(call.lists, columns, strict=True):
        assert [x.data_ptr() for x in found] == [x.data_ptr() for x in expected]
        assert [x.dtype for x in found] == [x.dtype for x in expected]
        assert [x.numel() for x in found] == [x.numel() for x in expected]


# Flags


@every_kernel
@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": None}], ids=str)
def test_one_call_of_the_kernel_steps_all_tensors(name, flags, calls):
    params = tensors((3, 2), (), (0,), (5,))
    optimizer = make(name, params, **flags)
    for _ in range(3):
        calls.clear()
        step(optimizer, params)
        (call,) = calls
        expect(call, name, optimizer, params)


@pytest.mark.parametrize("name", NUMBERS)
def test_foreach_runs_foreach_kernels_only(name, calls):
    params = tensors((3, 2), (), (0,), (5,))
    step(make(name, params, foreach=True), params, 2)
    assert calls
    assert fused(calls) == []
    assert {len(x) for call in calls for x in call.lists} == {4}


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        *itertools.product(WITHOUT_KERNEL, [{}, {"foreach": False}]),
        *itertools.product(KERNELS, [{"fused": False}, {"foreach": False}]),
    ],
)
def test_other_steps_run_neither(name, flags, calls):
    params = tensors((3, 2), (), (0,), (5,))
    step(make(name, params, **flags), params, 2)
    assert calls == []


@pytest.mark.parametrize("name", NUMBERS)
def test_differentiable_steps_run_neither(name, calls):
    params = [p.detach() for p in tensors((3, 2), ())]
    step(make(name, params, differentiable=True), params, 2)
    assert calls == []


@every_kernel
def test_flags_may_change_between_steps(name, calls):
    params = tensors((3,), (2,))
    optimizer = make(name, params)
    step(optimizer, params)
    optimizer.param_groups[0]["foreach"] = True
    step(optimizer, params)
    assert len(fused(calls)) == 1
    assert len(calls) > 1
    calls.clear()
    optimizer.param_groups[0]["foreach"] = None
    step(optimizer, params)
    (call,) = calls
    expect(call, name, optimizer, params)


# Numbers


@every_kernel
@pytest.mark.parametrize("maximize", [False, True])
def test_the_numbers_of_the_group_arrive(name, maximize, calls):
    params = tensors((3,))
    optimizer = make(name, params, weight_decay=0.25, maximize=maximize)
    step(optimizer, params)
    optimizer.param_groups[0].update(lr=0.7, weight_decay=0.125)
    step(optimizer, params)
    for call, lr, weight_decay in zip(calls, (0.1, 0.7), (0.25, 0.125), strict=True):
        assert (call.numbers["lr"], call.numbers["weight_decay"]) == (lr, weight_decay)
        assert call.numbers["maximize"] is maximize
    defaults = getattr(torch.optim, name)(params).defaults
    beside = {"beta1": "betas", "beta2": "betas"}
    for key in calls[0].numbers.keys() - {"lr", "weight_decay", "maximize", "momentum", "amsgrad"}:
        expected = defaults.get(beside.get(key, key), True)  # is_first_step is no default
        expected = expected[key == "beta2"] if key in beside else expected
        assert calls[0].numbers[key] == expected, key


@pytest.mark.parametrize(("flags", "as_tensor"), [({}, False), ({"fused": True}, True)], ids=str)
@every_kernel
def test_a_tensor_rate_is_read_at_every_step(name, flags, as_tensor, calls):
    params, lr = tensors((3,)), torch.tensor(0.1)
    optimizer = make(name, params, **flags)
    optimizer.param_groups[0]["lr"] = lr
    step(optimizer, params)
    lr.fill_(0.25)
    step(optimizer, params)
    assert isinstance(calls[1].numbers["lr"], torch.Tensor) is as_tensor
    assert float(calls[1].numbers["lr"]) == 0.25


@every_kernel
def test_a_rate_less_exact_than_the_parameters_is_left_to_the_rule(name, calls):
    params = tensors((3,), dtype=torch.float64)
    optimizer = make(name, params)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    step(optimizer, params, 2)
    assert calls == []


@pytest.mark.parametrize("numbers", [{"dampening": 0.5}, {"nesterov": True}], ids=str)
@pytest.mark.parametrize("flags", [{}, {"fused": True}], ids=str)
def test_momentum_begins_with_the_first_gradient(numbers, flags, calls):
    params = tensors((3,))
    step(optim.SGD(params, lr=0.1, momentum=0.9, **numbers, **flags), params, 3)
    assert [call.numbers["is_first_step"] for call in calls] == [True, False, False]


def test_an_initial_accumulator_is_in_the_state_before_the_kernel_runs(calls):
    params = tensors((3,))
    step(optim.Adagrad(params, lr=0.1, initial_accumulator_value=0.5), params, 2)
    assert [call.name for call in calls] == ["_fused_adagrad_"] * 2


# Scaled gradients


@every_kernel
def test_the_scale_and_infinities_arrive(name, calls):
    skip_old_adagrad(name)
    params = tensors((3,))
    optimizer = make(name, params, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for gradient in (1.0, torch.inf, 1.0):
        scaler.scale(params[0].sum() * gradient).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    numbers = [(float(c.numbers["grad_scale"]), float(c.numbers["found_inf"])) for c in calls]
    assert numbers == [(4.0, 0.0), (4.0, 1.0), (2.0, 0.0)]
    assert optimizer.state[params[0]].get("step", 2) == 2


@every_kernel
def test_nothing_is_scaled_without_a_scaler(name, calls):
    params = tensors((3,))
    step(make(name, params, fused=True), params)
    assert calls[0].numbers.keys().isdisjoint({"grad_scale", "found_inf"})


def test_a_skipped_first_step_leaves_no_momentum(calls):
    (p,) = params = tensors((3,))
    optimizer = make("SGD", params, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    step(optimizer, params)
    assert not optimizer.state[p].get("momentum_buffer", torch.zeros(3)).any()
    optimizer.found_inf = torch.tensor(0.0)
    step(optimizer, params)
    assert calls[-1].numbers["is_first_step"]
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], p.grad)


# Tensors


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@every_kernel
def test_one_call_for_each_dtype(name, calls):
    dtypes = DTYPES[:2] if name == "SGD" else DTYPES  # its kernel fails in half precision
    params = [p for dtype in dtypes for p in tensors((3,), (2,), dtype=dtype)]
    params = [*params[::2], *params[1::2]]
    optimizer = make(name, params)
    step(optimizer, params)
    assert len(calls) == len(dtypes)
    for call, dtype in zip(calls, dtypes, strict=True):
        expect(call, name, optimizer, [p for p in params if p.dtype is dtype])


@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adagrad", "SGD"])
def test_exact_moments_of_rounded_parameters_are_left_to_the_rule(name, flags, calls):
    params = tensors((3,), (2,), dtype=torch.bfloat16)
    optimizer = make(name, params, **flags)
    step(optimizer, params)
    for row in optimizer.state.values():
        row.update({k: v.float() for k, v in row.items()})
    calls.clear()
    step(optimizer, params)
    assert fused(calls) == []
    moments = [v for row in optimizer.state.values() for k, v in row.items() if k != "step"]
    assert {moment.dtype for moment in moments} == {torch.float32}


@every_kernel
def test_complex_parameters_are_left_to_the_rule(name, calls):
    params = [*tensors((3,)), *tensors((3,), dtype=torch.complex64)]
    optimizer = make(name, params)
    step(optimizer, params)
    (call,) = calls
    expect(call, name, optimizer, params[:1])


@pytest.mark.parametrize("dtype", DTYPES[2:])
@pytest.mark.parametrize(
    ("name", "flags"),
    [*itertools.product(NUMBERS, [{}]), *itertools.product(KERNELS, [{"fused": True}])],
)
def test_steps_in_half_precision_are_those_in_single_but_for_rounding(name, flags, dtype):
    """torch's kernel of SGD on a CPU leaves most elements alone (pytorch#191763)."""
    torch.manual_seed(0)
    params = tensors((1000,), dtype=dtype)
    twins = [Parameter(p.detach().float()) for p in params]
    optimizer, twin = make(name, params, **flags), make(name, twins, torch.optim)
    for _ in range(3):
        params[0].grad = torch.randn(1000).to(dtype)
        twins[0].grad = params[0].grad.float()
        optimizer.step()
        twin.step()
    torch.testing.assert_close(params[0].float(), twins[0], rtol=0.02, atol=0.02)


LAYOUTS = {
    "channels_last": (lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), True),
    "transposed": (lambda: torch.randn(3, 2).T, True),
    "permuted": (lambda: torch.randn(2, 3, 4).permute(1, 2, 0), True),
    "axis of one": (lambda: torch.randn(3).as_strided((3, 1), (1, 7)), True),
    "gaps": (lambda: torch.randn(3, 4)[:, ::2], False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@every_kernel
def test_layouts_without_gaps_go_through_the_kernel(name, layout, calls):
    draw, kernel = LAYOUTS[layout]
    params, twins = [[Parameter(x), Parameter(torch.ones(3))] for x in (draw(), draw())]
    twins[0].data.copy_(params[0].data)
    optimizer, twin = make(name, params), make(name, twins, torch.optim)
    step(optimizer, params, 2)
    step(twin, twins, 2)
    torch.testing.assert_close(params, twins)
    calls.clear()
    step(optimizer, params)
    (call,) = calls
    expect(call, name, optimizer, params[0 if kernel else 1 :])
    assert all(x.is_contiguous() for column in call.lists for x in column)


@every_kernel
def test_gradients_of_another_layout_are_left_to_the_rule(name, calls):
    params = tensors((3, 2), (4,))
    optimizer = make(name, params)
    step(optimizer, params)
    calls.clear()
    params[0].grad = torch.ones(2, 3).T
    optimizer.step()
    (call,) = calls
    expect(call, name, optimizer, params[1:])


@pytest.mark.parametrize("name", NUMBERS)
def test_other_devices_are_stepped_apart(name, calls):
    params = [*tensors((3,), (2,)), *tensors((3,), (2,), (4,), device="meta")]
    optimizer = make(name, params)
    step(optimizer, params, 2)
    devices = [{x.device.type for column in call.lists for x in column[:1]} for call in calls]
    assert all(len(found) <= 1 or "cpu" in found for found in devices)
    assert {"meta"} in devices  # what is not on a CPU is batched
    assert all({len(column) for column in call.lists} <= {0, 2, 3} for call in calls)
    assert len(fused(calls)) == 2 * (name in KERNELS)


@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_cannot_be_batched_is_stepped_tensor_by_tensor(name, device, calls):
    params = tensors((3, 2), (2, 2), device=device)
    optimizer = getattr(optim, name)(params, **({"foreach": True} if name == "Adafactor" else {}))
    step(optimizer, params, 2)
    assert calls == []


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("flags", [{}, {"foreach": True}], ids=str)
def test_subclasses_are_stepped_as_tensors_are(name, flags):
    params = [torch.randn(3).as_subclass(Subclass).requires_grad_() for _ in range(2)]
    twins = [Parameter(p.detach().as_subclass(torch.Tensor).clone()) for p in params]
    step(make(name, params, **flags), params, 3)
    step(make(name, twins, torch.optim), twins, 3)
    torch.testing.assert_close([p.detach().as_subclass(torch.Tensor) for p in params], twins)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_subclasses_are_stepped_tensor_by_tensor(name, device, calls):
    """They may know fewer operations, as DTensor does."""
    params = [torch.randn(3, device=device).as_subclass(Subclass).requires_grad_() for _ in "ab"]
    step(make(name, params), params, 2)
    assert calls == []


# Steps


@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}], ids=str)
@every_kernel
def test_parameters_of_different_age_are_stepped_apart(name, flags, calls):
    params = tensors((3,), (2,), (4,))
    twins = [Parameter(p.detach().clone()) for p in params]
    optimizer, twin = make(name, params, **flags), make(name, twins, torch.optim)
    present = [(True, True, True), (True, False, True), (True, True, True), (False, False, True)]
    for which in present:
        for p, here in zip([*params, *twins], which * 2, strict=True):
            p.grad = torch.full_like(p, 0.5) if here else None
        calls.clear()
        optimizer.step()
        twin.step()
    torch.testing.assert_close(params, twins)
    if name != "SGD":  # keeps no count
        assert [int(optimizer.state[p]["step"]) for p in params] == [3, 2, 4]
    assert len({optimizer.state[p].get("step", p).data_ptr() for p in params}) == 3
    if not flags.get("foreach"):
        expect(calls[0], name, optimizer, params[2:])


def test_momentum_of_parameters_of_different_age(calls):
    params = tensors((3,), (2,))
    optimizer = make("SGD", params)
    step(optimizer, params[:1])
    params[0].grad = params[1].grad = None
    step(optimizer, params)
    first = {call.lists[0][0].numel(): call.numbers["is_first_step"] for call in calls[1:]}
    assert first == {3: False, 2: True}


DAMPENED = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize(
    "derive",
    [torch.clone, lambda x: x.repeat_interleave(2, 0)[::2], lambda x: x.as_subclass(Subclass)],
    ids=["dense", "gaps", "subclass"],
)
def test_only_the_first_gradient_is_not_dampened(derive, flags):
    results = []
    for library in (optim, torch.optim):
        p = derive(torch.ones(3)).requires_grad_()
        optimizer = library.SGD([p], **DAMPENED, **flags)
        step(optimizer, [p], 4)
        results.append(p.detach().as_subclass(torch.Tensor))
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_only_the_first_sparse_gradient_is_not_dampened():
    results = []
    for library in (optim, torch.optim):
        p = Parameter(torch.ones(3, 2))
        optimizer = library.SGD([p], **DAMPENED)
        for _ in range(4):
            p.grad = torch.ones(3, 2).to_sparse(1)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", NUMBERS)
def test_lists_are_gathered_once(name, monkeypatch):
    made = []

    class Counted(_plan.Plan):
        def __init__(self, *args):
            made.append(self)
            super().__init__(*args)

    monkeypatch.setattr("diffopt.optim._adapter.Plan", Counted)
    params = tensors((3,), (2,))
    optimizer = make(name, params)
    step(optimizer, params, 2)  # the first step of a momentum is unlike others
    made.clear()
    step(optimizer, params, 5)
    optimizer.zero_grad()
    step(optimizer, params, 5)
    assert made == []


@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}], ids=str)
@every_kernel
def test_a_backward_pass_that_needs_the_old_parameters_is_refused(name, flags):
    (p,) = params = tensors((3,))
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    make(name, params, **flags).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# What users change between steps


def replace(row, key, value):
    row[key] = value


def swap(p, value):
    p.data = value


def edit(group, params):
    group["params"][:] = params


CHANGES = {
    "nothing": lambda o, ps: None,
    "fills a count": lambda o, ps: o.state[ps[0]].get("step", torch.ones(())).fill_(7),
    "replaces a count": lambda o, ps: replace(o.state[ps[0]], "step", torch.tensor(7.0)),
    "replaces counts": lambda o, ps: [replace(o.state[p], "step", torch.tensor(7.0)) for p in ps],
    "replaces a buffer": lambda o, ps: [
        replace(o.state[ps[0]], k, torch.ones_like(v)) for k, v in o.state[ps[0]].items() if v.dim()
    ],
    "replaces a row": lambda o, ps: replace(o.state, ps[0], copy.deepcopy(o.state[ps[0]])),
    "clears the state": lambda o, ps: o.state.clear(),
    "clears a row": lambda o, ps: o.state[ps[0]].clear(),
    "swaps memory": lambda o, ps: swap(ps[0], ps[0].detach() * 2),
    "swaps shape": lambda o, ps: [o.state.pop(ps[0]), swap(ps[0], torch.ones(5, 2))],
    "swaps dtype": lambda o, ps: [o.state.pop(ps[0]), swap(ps[0], ps[0].detach().double())],
    "swaps layout": lambda o, ps: swap(ps[0], ps[0].detach().T.contiguous().T),
    "drops a parameter": lambda o, ps: edit(o.param_groups[0], ps[1:]),
    "reorders": lambda o, ps: edit(o.param_groups[0], ps[::-1]),
    "moves to a new group": lambda o, ps: [
        edit(o.param_groups[0], ps[1:]),
        o.add_param_group({"params": ps[:1], "lr": 0.3}),
    ],
}


@pytest.mark.parametrize("change", CHANGES)
@every_kernel
def test_the_kernel_sees_what_was_changed(name, change, calls):
    if change in ("clears the state", "clears a row", "swaps shape", "swaps dtype"):
        skip_old_adagrad(name)
    params = tensors((3, 2), (2, 2), (4,))
    twins = [Parameter(p.detach().clone()) for p in params]
    optimizer, twin = make(name, params), make(name, twins, torch.optim)
    for o, ps in ((optimizer, params), (twin, twins)):
        step(o, ps, 2)
        if "count" not in change or name != "SGD":
            CHANGES[change](o, ps)
        calls.clear()
        step(o, ps)
        if o is optimizer:
            found = fused(calls)
    torch.testing.assert_close(params, twins)
    given = {x.data_ptr() for call in found for column in call.lists for x in column}
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    if change != "swaps layout":  # then its state and gradient do not fit it
        assert sum(len(call.lists[0]) for call in found) == len(stepped)
    else:
        stepped = stepped[1:]
    for p in stepped:
        assert p.data_ptr() in given
        assert {v.data_ptr() for v in optimizer.state[p].values() if v.dim()} <= given


@every_kernel
def test_a_group_added_in_the_middle_gets_a_call_of_its_own(name, calls):
    params = tensors((3,), (2,), (4,))
    optimizer = make(name, params[:2])
    step(optimizer, params[:2])
    optimizer.add_param_group({"params": params[2:], "lr": 0.5})
    calls.clear()
    step(optimizer, params)
    assert [len(call.lists[0]) for call in calls] == [2, 1]
    assert [call.numbers["lr"] for call in calls] == [0.1, 0.5]
    expect(calls[1], name, optimizer, params[2:])


# Graphs of an accelerator, of which only the checks can run here


@pytest.fixture
def capturing(monkeypatch):
    """As if the current stream of a GPU were capturing."""
    stream = types.SimpleNamespace(is_capturing=lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: stream)
    if torch.__version__ < "2.13":  # which asks CUDA itself
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize("name", ["Adam", "AdamW", *WITHOUT_KERNEL])
def test_steps_that_count_on_the_cpu_are_not_captured(name):
    params = tensors((3,))
    with pytest.raises(RuntimeError, match="capturable is False"):
        step(make(name, params), params)


@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Muon"])
def test_classes_without_the_flag_are_captured_as_in_torch(name):
    for library in (torch.optim, optim):
        params = tensors((3, 2))
        step(getattr(library, name)(params), params, 2)


@pytest.mark.parametrize("flag", ["foreach", "fused"])
@pytest.mark.parametrize("value", ["yes", [True], 1j, 1])
def test_flags_that_may_be_unset_are_bools_or_none(flag, value):
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = optim.Adam([p])
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.param_groups[0][flag] = value
    with pytest.raises(TypeError, match=f"{flag}.* but must be a bool"):
        optimizer.step()
    assert optimizer.state[p]["step"] == 1
