"""Steps of diffopt.optim see all that users do to parameters, gradients and state in between."""

import collections
import copy
import gc
import inspect
import threading
import weakref

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter

import diffopt
from diffopt import optim
from diffopt.optim import _plan

BOTH = optim, torch.optim
NUMBERS = {
    "SGD": {"momentum": 0.9},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adagrad": {},
    "Adadelta": {},
    "Adamax": {},
    "ASGD": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.5},
    "Rprop": {},
    "Adafactor": {},
    "Muon": {},
}
COUNTED = [name for name in NUMBERS if name not in ("SGD", "Muon")]
every_class = pytest.mark.parametrize("name", NUMBERS)
elementwise = pytest.mark.parametrize(
    "name", [n for n in NUMBERS if n not in ("Adafactor", "Muon")]
)
every_way = pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"foreach": False}], ids=str)


def make(library, name, params, **flags):
    if name == "Muon":
        flags.pop("foreach", None)
    return getattr(library, name)(params, **({"lr": 0.01} | NUMBERS[name] | flags))


def parameters(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def step(optimizer, params, t=0):
    generator = torch.Generator().manual_seed(t)
    for p in dict.fromkeys(params):
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


def close(params, twins, **tolerance):
    values = [[p.detach().double() for p in side] for side in (params, twins)]
    torch.testing.assert_close(*values, **tolerance)


def picture(optimizer, params):
    return copy.deepcopy([[p.detach() for p in params], [dict(optimizer.state[p]) for p in params]])


# A plan is only a cache


def perturb(what, optimizer, params, generator):
    """One of the things that users do; the same for optimizers in the same condition."""
    state, (group, *_) = optimizer.state, optimizer.param_groups
    i = int(torch.randint(len(params), (), generator=generator))
    p, q, row = params[i], params[i - 1], state.get(params[i], {})
    tensors = {k: v for k, v in row.items() if isinstance(v, torch.Tensor)}
    wide = {k: v for k, v in tensors.items() if v.dim()}
    counts = [r["step"] for r in state.values() if "step" in r]
    match what:
        case "memory of a parameter":
            p.data = p.data.clone()
        case "strides of a parameter":
            p.data = p.data.t() if p.dim() == 2 and p.shape[0] == p.shape[1] else p.data
        case "layout of a parameter":
            p.data = p.data.t().contiguous().t() if p.dim() == 2 else p.data
        case "gaps":
            p.data = p.data.repeat_interleave(2, 0)[::2] if p.dim() else p.data
        case "dtype of a parameter":
            new = torch.float64 if p.dtype == torch.float32 else torch.float32
            p.grad, p.data = None, p.data.to(new)
            for key, value in wide.items():
                row[key] = value.to(new)
        case "one memory":
            if p.shape == q.shape and p.dtype == q.dtype and p is not q:
                p.data = q.data
        case "memory of the state":
            for value in tensors.values():
                value.data = value.data.clone()
        case "values through data":
            for value in tensors.values():
                value.data.mul_(0.5) if value.dim() else value.data.add_(1)
        case "tensors of the state":
            row.update({k: v.clone() for k, v in tensors.items()})
        case "layout of the state":
            row.update({k: v.t().contiguous().t() for k, v in wide.items() if v.dim() == 2})
        case "one count":
            if counts:
                row["step"] = counts[0]
        case "all counts":
            for count in counts:
                count.fill_(9)
        case "a row":
            state.pop(p, None)
        case "a plain row":
            if row:
                state[p] = dict(row)
        case "all rows":
            state.clear()
        case "a mapping":
            optimizer.state = collections.defaultdict(dict, state)
        case "checkpoint":  # which torch's does not copy
            for r in state.values():
                r.update({k: v.clone() for k, v in r.items()})
            optimizer.load_state_dict(optimizer.state_dict())
        case "order":
            group["params"].reverse()
        case "a rate":
            group["lr"] = 0.02
        case "a tensor rate":
            group["lr"] = torch.tensor(0.03)
        case "a flag":
            if "maximize" in group:
                group["maximize"] = not group["maximize"]
        case "foreach":
            if "foreach" in group:
                group["foreach"] = {None: True, True: False, False: None}[group["foreach"]]


PERTURBATIONS = [
    "nothing",
    "memory of a parameter",
    "strides of a parameter",
    "layout of a parameter",
    "gaps",
    "dtype of a parameter",
    "one memory",
    "memory of the state",
    "values through data",
    "tensors of the state",
    "layout of the state",
    "one count",
    "all counts",
    "a row",
    "a plain row",
    "all rows",
    "a mapping",
    "checkpoint",
    "order",
    "a rate",
    "a tensor rate",
    "a flag",
    "foreach",
]
GRADIENTS = ("dense", "transposed", "missing", "the same")


def give(params, kind, t):
    generator = torch.Generator().manual_seed(t)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator).to(p.dtype)
        if kind == "transposed" and p.dim() == 2:
            g = g.t().contiguous().t()
        if kind == "the same" and p.grad is not None and p.grad.dtype == p.dtype:
            p.grad.copy_(g)
        else:
            p.grad = None if kind == "missing" and i == t % len(params) else g


@every_class
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_no_bit_depends_on_a_plan_whatever_is_done_between_steps(name, data):
    shapes = [(3, 3), (3, 3), (2, 4), (4, 2)] + ([] if name == "Muon" else [(3,), ()])
    runs = [parameters(*shapes) for _ in range(3)]
    libraries = (optim, optim, torch.optim)
    optimizers = [make(lib, name, ps) for lib, ps in zip(libraries, runs, strict=True)]
    right = True  # torch itself
    for t in range(data.draw(st.integers(2, 7))):
        what = data.draw(st.sampled_from(PERTURBATIONS)) if t else "nothing"
        kind = data.draw(st.sampled_from(GRADIENTS))
        errors = []
        for optimizer, params, kept in zip(optimizers, runs, (True, False, True), strict=True):
            perturb(what, optimizer, params, torch.Generator().manual_seed(t))
            give(params, kind, t)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_plan, "KEPT", kept)
                try:
                    optimizer.step()
                    errors.append(None)
                except Exception as error:
                    errors.append(type(error))
        assert errors[0] is errors[1]
        right = right and errors[2] is None and errors[0] is None
        for p, q in zip(*runs[:2], strict=True):
            assert torch.equal(p, q)
            for key, value in optimizers[0].state.get(p, {}).items():
                torch.testing.assert_close(value, optimizers[1].state[q][key], rtol=0, atol=0)
        if right:
            close(runs[0], runs[2], rtol=2e-4, atol=2e-5)


@every_class
def test_a_plan_is_kept_while_nothing_changes_and_no_longer(name):
    params = parameters((3, 2), (2, 2))
    optimizer = make(optim, name, params)
    step(optimizer, params)
    step(optimizer, params)
    (plan,) = optimizer.state.plans
    step(optimizer, params)
    assert optimizer.state.plans == [plan]
    params[1].data = params[1].data.t()
    step(optimizer, params)
    assert optimizer.state.plans != [plan]


@pytest.mark.parametrize("name", ["SparseAdam", "SGD", "Adagrad"])
def test_a_plan_is_kept_where_gradients_are_sparse(name):
    ends, sparse = [], [1, 3, 2, 2]
    for kept in (True, False):
        (param,) = params = parameters((4, 2))
        numbers = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = getattr(optim, name)(params, lr=0.1, **numbers)
        plans = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_plan, "KEPT", kept)
            for rows in sparse:
                grad = torch.zeros(4, 2)
                grad[:rows] = rows
                param.grad = grad.to_sparse(1)
                optimizer.step()
                plans += optimizer.state.plans
            assert (plans[1] is plans[2] is plans[3]) is (kept or plans[1] is None)
            param.data = param.data.T.contiguous().T
            optimizer.step()
            assert optimizer.state.plans != plans[-1:] or not kept
        ends.append((param.detach(), optimizer.state_dict()["state"]))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_gradients_may_become_dense_where_they_were_sparse():
    runs = []
    for library in BOTH:
        (param,) = params = parameters((4, 2))
        optimizer = library.SGD(params, lr=0.1)
        for t in range(8):
            grad = torch.eye(4, 2) + t
            param.grad = grad.to_sparse(1) if t % 4 < 2 else grad
            optimizer.step()
        runs.append(params)
    close(*runs)


def test_the_state_that_a_constructor_makes_is_this_packages_own():
    params = parameters((3, 2), (2, 2), (3,))
    optimizer = optim.Adagrad(params, initial_accumulator_value=0.5)
    assert not optimizer.state.plans.lent
    counts = [optimizer.state[p]["step"] for p in params]
    assert len({count.untyped_storage().data_ptr() for count in counts}) == 1
    assert inspect.signature(optim.Adagrad) == inspect.signature(torch.optim.Adagrad)


NEW_NUMBERS = {
    "SGD": ({"lr": 0.5}, {"momentum": 0.0}, {"momentum": 0.9}, {"weight_decay": 0.1}),
    "Adam": ({"lr": 0.5}, {"betas": (0.5, 0.9)}, {"betas": (0.5, 0)}, {"betas": (0.5, 0.0)}),
    "RMSprop": ({"lr": 0.5}, {"momentum": 0.9}, {"momentum": 0.0}, {"alpha": 0.5}),
    "Adafactor": ({"eps": (None, 1e-3)}, {"eps": (1e-3, 1e-3)}, {"eps": (2e-3, 1e-3)}, {"lr": 1}),
    "NAdam": ({"lr": 1}, {"lr": torch.tensor(0.5)}, {"lr": 0.5}, {"maximize": True}),
}


@pytest.mark.parametrize("name", NEW_NUMBERS)
def test_every_new_number_of_a_group_is_used_in_the_next_step(name):
    runs = [parameters((3, 2), (2, 2)) for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        for library, params, kept in zip((*BOTH, optim), runs, (True, True, False), strict=True):
            patch.setattr(_plan, "KEPT", kept)
            optimizer = make(library, name, params)
            for t, numbers in enumerate(({}, {}, *NEW_NUMBERS[name])):
                optimizer.param_groups[0].update(numbers)
                step(optimizer, params, t)
    close(*runs[:2], rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, runs[0], runs[2]))


@every_class
def test_a_scheduled_number_is_all_that_is_read_anew(name, monkeypatch):
    params = parameters((3, 2), (2, 2))
    optimizer = make(optim, name, params)
    step(optimizer, params)
    step(optimizer, params)
    (plan,) = optimizer.state.plans
    monkeypatch.setattr(optimizer, "check_numbers", lambda: pytest.fail("all options are checked"))
    monkeypatch.setattr(_plan.ways, "choose", lambda *_: pytest.fail("the way is chosen again"))
    for t in range(2):
        optimizer.param_groups[0]["lr"] = 0.1 * (t + 1)
        step(optimizer, params)
    assert optimizer.state.plans == [plan]
    assert plan.options.values[0] == 0.2


def test_a_number_with_which_no_step_can_be_computed_is_refused_where_a_plan_is_kept():
    params = parameters((3, 2), (2, 2))
    optimizer = make(optim, "Adam", params)
    step(optimizer, params)
    step(optimizer, params)
    optimizer.param_groups[0]["betas"] = (1.0, 0.9)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"beta1 is 1.0, but must be >= 0 and < 1"):
        step(optimizer, params)
    assert all(map(torch.equal, params, before))


# Memory


def tie(a, b):
    b.data = a.data


OVERLAPS = {
    "by data": lambda: tied(torch.ones(3, 3), lambda x: x),
    "transposed": lambda: tied(torch.ones(3, 3), lambda x: x.t()),
    "a row": lambda: tied(torch.ones(3, 3), lambda x: x[1:2]),
    "a column": lambda: tied(torch.ones(3, 3), lambda x: x[:, 1:2]),
}


def tied(x, view):
    return [Parameter(x), Parameter(torch.ones(2, 2)), Parameter(view(x))]


@pytest.mark.parametrize("overlap", OVERLAPS)
@every_way
@every_class
def test_parameters_over_one_memory_are_stepped_one_after_the_other(name, flags, overlap):
    """As torch does, unless with `foreach=True`: then results depend on how kernels are grouped.

    torch's foreach AdamW lets every parameter decay before the first one moves, which differs from
    its own loop by lr * weight_decay * update, 1e-6 a step.
    """
    runs = [OVERLAPS[overlap]() for _ in BOTH]
    sequential = flags if not flags.get("foreach") else {"foreach": False}
    for library, params in zip(BOTH, runs, strict=True):
        optimizer = make(library, name, params, **(flags if library is optim else sequential))
        for t in range(3):
            step(optimizer, params, t)
    close(*runs, rtol=1e-5, atol=1e-6)


LATER = {
    "one memory": lambda p, q: setattr(q, "data", p.data),
    "a gradient in it": lambda p, q: setattr(q, "grad", p.data.view_as(p)),
    "apart, then one memory": lambda p, q: (
        setattr(p, "data", p.data.clone()),
        setattr(q, "data", p.data),
    ),
}


CASES = [(how, late) for how in LATER for late in (False, True)]
CASES.remove(("a gradient in it", True))  # parameters with other counts are stepped first


@pytest.mark.parametrize("remaining", [slice(0), slice(1), slice(1, 3)], ids=str)
@pytest.mark.parametrize(("name", "flags"), [("SGD", {"momentum": 0}), ("Adam", {}), ("NAdam", {})])
def test_the_parameters_of_a_group_may_change(name, flags, remaining):
    runs = [parameters(*[(2, 2)] * 3) for _ in BOTH]
    for library, params in zip(BOTH, runs, strict=True):
        optimizer = make(library, name, params, **flags)
        for t in range(3):
            step(optimizer, params, t)
        for group in (params[remaining], [*reversed(params)]):
            optimizer.param_groups[0]["params"] = group
            step(optimizer, params, 3)
    close(*runs)


@pytest.mark.parametrize(("how", "late"), CASES)
@elementwise
def test_parameters_may_come_to_share_memory(name, how, late):
    """Also where counts differ, and where a float32 rate keeps float64 from torch's kernels."""
    runs = [parameters(*[(3, 3)] * 3, dtype=torch.float64) for _ in BOTH]
    for library, params in zip(BOTH, runs, strict=True):
        optimizer = make(library, name, params)
        for t in range(3):
            step(optimizer, [p for p in params if t or not late or p is not params[1]], t)
        LATER[how](*params[1:])
        for rate in (0.01, 0.01, torch.tensor(0.01), torch.tensor(0.01)):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
    close(*runs, rtol=1e-6, atol=1e-8)


@every_way
@elementwise
def test_slices_of_one_buffer_are_no_overlap(name, flags, monkeypatch):
    found = []
    monkeypatch.setattr(
        _plan, "_entangled", lambda *a, f=_plan._entangled: found.append(f(*a)) or found[-1]
    )
    params = [Parameter(x) for x in torch.ones(6, 3).split(2)]
    optimizer = make(optim, name, params, **flags)
    step(optimizer, params)
    assert found == [set()]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@every_class
def test_a_parameter_twice_in_a_group_is_stepped_twice(name):
    runs = [parameters((4, 4), (4, 4)) for _ in BOTH]
    for library, (p, q) in zip(BOTH, runs, strict=True):
        optimizer = make(library, name, [p, q, p])
        for t in range(3):
            step(optimizer, [p, q], t)
    close(*runs)


def regrouped(make_, params, regroup):
    a, b, c = params
    optimizers = [make_([{"params": [a, b]}, {"params": [c]}]), make_([b])]
    step(optimizers[0], params)
    regroup(optimizers, *params)
    for t in range(1, 5):
        for optimizer in optimizers:
            step(optimizer, params, t)


def share_rows(optimizers, a, b, c):
    optimizers[0].state[c] = optimizers[0].state[a]


def share_counts(optimizers, a, b, c):
    rows = optimizers[0].state
    rows[c].update({"step": rows[a]["step"]} if "step" in rows[a] else {})


REGROUPED = {
    "a part of a group": lambda o, a, b, c: o[0].param_groups[1].update(params=[a]),
    "another order": lambda o, a, b, c: o[0].param_groups[1].update(params=[c, b]),
    "the same list": lambda o, a, b, c: o[0].param_groups[1].update(o[0].param_groups[0]),
    "a row": share_rows,
    "a count": share_counts,
    "a row of another optimizer": lambda o, a, b, c: o[1].state.update({b: o[0].state[b]}),
    "all state of another optimizer": lambda o, a, b, c: setattr(o[1], "state", o[0].state),
}


@pytest.mark.parametrize("how", REGROUPED)
@every_class
def test_what_groups_share_is_stepped_by_one_after_the_other(name, how):
    runs = [parameters((4, 4), (2, 3), (4, 4)) for _ in BOTH]
    for library, params in zip(BOTH, runs, strict=True):
        regrouped(lambda some, lib=library: make(lib, name, some), params, REGROUPED[how])
    close(*runs, rtol=1e-5, atol=1e-6)


def swap(params, states):
    for p, q in zip(params, params[::-1], strict=True):
        p.grad = q.data


def shift(params, states):
    start = torch.full((60, 4), 0.5)
    for k, p in enumerate(params):
        p.data = start[4 * k : 4 * k + 4].copy_(p.data)
        p.grad = start[4 * k + 3 : 4 * k + 7]  # partly its own, partly the next one's


def buffers(params, states):
    for p, row in zip(params, states[::-1], strict=True):
        found = [x for x in row.values() if isinstance(x, torch.Tensor) and x.shape == p.shape]
        p.grad = found[0] if found else torch.ones_like(p)


@pytest.mark.parametrize("place", [swap, shift, buffers])
@every_way
@elementwise
def test_a_gradient_may_lie_in_the_memory_that_a_step_writes(name, flags, place):
    """Then each parameter is stepped with what those before it have left there."""
    ends = []
    for joint in (True, False):
        params = parameters(*[(4, 4)] * 3)
        groups = [params] if joint else [[p] for p in params]
        optimizers = [make(optim, name, group, **flags) for group in groups]
        for t in range(4):
            if t == 0:
                for p in params:
                    p.grad = torch.ones_like(p)
            else:
                place(params, [o.state[p] for o in optimizers for p in o.param_groups[0]["params"]])
            for optimizer in optimizers:
                optimizer.step()
        ends.append(params)
    close(*ends, rtol=1e-5, atol=1e-6)


CHANGES = {
    "memory": lambda p: setattr(p, "data", p.data.clone()),
    "strides": lambda p: setattr(p, "data", p.data.t()),
    "those of the gradient": lambda p: setattr(p, "grad", p.grad.t()),
}


@pytest.mark.parametrize("i", [0, 99, 100, 150, 249])
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_one_of_many_like_parameters_is_noticed(what, i):
    """They are compared in chunks, all by the same guard."""
    runs = [parameters(*[(2, 2)] * 250) for _ in BOTH]
    for library, params in zip(BOTH, runs, strict=True):
        optimizer = make(library, "Adamax" if what == "memory" else "Adam", params)
        for t in range(3):
            step(optimizer, params, t)
        before = [*getattr(optimizer.state, "plans", ())]
        CHANGES[what](params[i])
        optimizer.step()
        assert library is not optim or optimizer.state.plans != before
    close(*runs)


@every_class
def test_strides_may_change_where_the_address_stays(name):
    runs = [parameters((4, 4)) for _ in BOTH]
    for library, (p,) in zip(BOTH, runs, strict=True):
        optimizer = make(library, name, [p])
        step(optimizer, [p])
        p.data = p.data.t()
        step(optimizer, [p], 1)
    close(*runs)


@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize("places", [[0], [1], [0, 1, 2]], ids=str)
@elementwise
def test_tensors_that_are_one_vector_may_get_storages_of_their_own_in_place(name, places, when):
    runs = [parameters((3,), (2, 2), (5,)) for _ in BOTH]
    for library, params in zip(BOTH, runs, strict=True):
        flat = torch.cat([p.detach().view(-1) for p in params])
        for p, part in zip(params, flat.split([3, 4, 5]), strict=True):
            p.data = part.view(p.shape)
        optimizer = make(library, name, params)
        for t in range(6):
            if t == when:
                rows = [[params[i], *optimizer.state.get(params[i], {}).values()] for i in places]
                for x in [x for row in rows for x in row if isinstance(x, torch.Tensor)]:
                    x.data = torch.from_numpy(x.detach().numpy())
            step(optimizer, params, t)
    close(*runs)


class Turning(optim.Adam):
    """Its rule depends on more than flags and signs."""

    ascend = False

    def rule(self, group):
        return diffopt.adam(maximize=self.ascend or group["lr"] > 0.05)


def test_the_rule_of_a_users_class_is_asked_for_at_every_step():
    (p,) = parameters((3,))
    optimizer = Turning([p], betas=(0.0, 0.0))
    changes = []
    for lr, ascend in ((0.01, False), (0.1, False), (0.01, False), (0.01, True), (0.01, False)):
        optimizer.ascend, optimizer.param_groups[0]["lr"] = ascend, lr
        before, p.grad = p.detach().clone(), torch.ones(3)
        optimizer.step()
        changes += [(p.detach() > before).all().item()]
    assert changes == [False, True, False, True, False]


@pytest.mark.parametrize("late", [False, True])
@every_class
def test_gradients_of_another_dtype_than_their_parameters(name, late):
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("torch has no such gradients")
    p = parameters((8, 4), dtype=torch.bfloat16)[0]
    exact = Parameter(p.detach().float())
    optimizer, twin = (make(optim, name, [x]) for x in (p, exact))
    for t in range(3):
        g = torch.randn(8, 4, generator=torch.Generator().manual_seed(t))
        dtype = torch.bfloat16 if late and t == 0 else torch.float32
        p.grad = None
        p.grad_dtype = dtype
        p.grad, exact.grad = g.to(dtype), g.to(dtype).float()
        optimizer.step()
        twin.step()
    close([p], [exact], rtol=0.02, atol=0.02)


# State


@pytest.mark.parametrize("view", ["conj", "neg"])
@every_way
@elementwise
def test_parameters_that_are_conjugated_or_negated_views(name, flags, view):
    def params():
        generator = torch.Generator().manual_seed(0)
        data = [torch.randn(n, 2, generator=generator, dtype=torch.complex128) for n in (1, 2, 3)]
        return [Parameter(x.conj() if view == "conj" else x.conj().imag) for x in data]

    sides = params(), [Parameter(p.detach().resolve_conj().resolve_neg()) for p in params()]
    optimizers = [make(optim, name, side, **flags) for side in sides]
    for t in range(3):
        for side, optimizer in zip(sides, optimizers, strict=True):
            step(optimizer, side, t)
    torch.testing.assert_close(
        [p.detach().resolve_conj().resolve_neg() for p in sides[0]], [p.detach() for p in sides[1]]
    )


RATES = {
    "a parameter": lambda params: params[0],
    "the data of one": lambda params: params[0].data.squeeze(),
    "a view of one": lambda params: params[1].detach()[0, 0],
}


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("flags", [{}, {"foreach": False}], ids=str)
@every_class
def test_a_rate_that_the_step_writes_is_read_before(name, flags, rate):
    sides = [parameters((1, 1), (2, 2), (3, 3), dtype=torch.float64) for _ in range(2)]
    both: list = []
    for params in sides:
        for p in params[:2]:
            p.data.fill_(0.1)
        given = [{"params": params[:2]}, {"params": params[2:]}]
        both.append(make(optim, name, given, lr=RATES[rate](params).squeeze(), **flags))
    for t in range(2):
        number = RATES[rate](sides[1]).item()
        for group in both[1].param_groups:
            group["lr"] = number
        for params, optimizer in zip(sides, both, strict=True):
            step(optimizer, params, t)
    close(*sides, rtol=1e-2 if name == "Muon" else 1e-6, atol=1e-7)


def offload(optimizer):
    for row in optimizer.state.values():
        for value in row.values():
            kept = value.data.clone()
            value.data = torch.empty(0, dtype=value.dtype)
            value.data = kept


@pytest.mark.parametrize("name", COUNTED)
def test_counts_go_on_where_the_memory_of_the_state_is_replaced(name):
    runs, counts = [], []
    for library in BOTH:
        params = parameters((3, 4), (3, 4), (3, 4))
        optimizer = make(library, name, params)
        for t in range(5):
            step(optimizer, params, t)
            offload(optimizer)
        runs.append(params)
        counts.append([float(row["step"]) for row in optimizer.state_dict()["state"].values()])
    assert counts == [[5.0] * 3] * 2
    close(*runs)


@pytest.mark.parametrize("shared", [False, True])
@every_way
@pytest.mark.parametrize("name", COUNTED)
def test_the_tensors_a_user_put_into_the_state_are_those_that_are_written(name, flags, shared):
    params = parameters((3, 4), (3, 4))
    made = make(optim, name, params, **flags)
    step(made, params)
    rows = copy.deepcopy([dict(made.state[p]) for p in params])
    if shared:
        rows[1]["step"] = rows[0]["step"]
    optimizer = make(optim, name, params, **flags)
    for p, row in zip(params, rows, strict=True):
        optimizer.state[p].update(row)
    for t in range(2):
        step(optimizer, params, t)
    for p, row in zip(params, rows, strict=True):
        assert all(optimizer.state[p][key] is value for key, value in row.items())
        assert row["step"] == (5 if shared else 3)  # as in torch, each parameter counts


def test_what_another_process_writes_is_seen():
    params = parameters((3,), (2,))
    optimizer = make(optim, "Adam", params)
    step(optimizer, params)
    elsewhere = [optimizer.state[p]["step"].numpy() for p in params]  # the same memory
    for count in elsewhere:
        count += 5
    step(optimizer, params)
    assert [float(optimizer.state[p]["step"]) for p in params] == [7.0, 7.0]
    elsewhere[0] += 1
    step(optimizer, params)
    assert [float(optimizer.state[p]["step"]) for p in params] == [9.0, 8.0]


def move(optimizer):
    for row in optimizer.state.values():
        for key, value in row.items():
            row[key] = value.double()


def drop_all(optimizer):
    optimizer.param_groups.clear()
    optimizer.state.clear()


LETTING_GO = {
    "moves": move,
    "clears": lambda o: o.state.clear(),
    "clears rows": lambda o: [row.clear() for row in o.state.values()],
    "pops": lambda o: [o.state.pop(p) for p in [*o.state]],
    "deletes": lambda o: [o.state.__delitem__(p) for p in [*o.state]],
    "replaces rows": lambda o: o.state.update({p: {} for p in o.state}),
    "replaces the mapping": lambda o: setattr(o, "state", collections.defaultdict(dict)),
    "drops all": drop_all,
    "reloads": lambda o: o.load_state_dict(o.state_dict()),
}


@pytest.mark.parametrize("act", LETTING_GO)
@every_class
def test_what_is_let_go_is_freed_at_once(name, act):
    params = parameters((30, 40))
    optimizer = make(optim, name, params)
    for t in range(3):
        step(optimizer, params, t)
    old = [weakref.ref(v) for v in optimizer.state[params[0]].values() if v.numel() > 1]
    gc.disable()
    try:
        LETTING_GO[act](optimizer)
        assert [ref() for ref in old] == [None] * len(old)
    finally:
        gc.enable()


@every_class
def test_an_optimizer_and_its_parameters_are_freed_without_a_collection(name):
    params = parameters((3, 4))
    optimizer = make(optim, name, params)
    for t in range(3):
        step(optimizer, params, t)
    refs = [weakref.ref(x) for x in (*params, *optimizer.state[params[0]].values(), optimizer)]
    gc.disable()
    try:
        del params, optimizer
        assert [ref() for ref in refs] == [None] * len(refs)
    finally:
        gc.enable()


def test_a_parameter_taken_out_of_a_group_is_freed_at_once():
    params = parameters((3,), (2,))
    optimizer = optim.SGD(params, lr=0.1)
    for t in range(2):
        step(optimizer, params, t)
    ref = weakref.ref(params.pop())
    optimizer.param_groups[0]["params"].pop()
    assert ref() is None


@every_class
def test_what_a_group_no_longer_holds_is_freed(name):
    params = parameters((3, 4), (4, 4))
    optimizer = make(optim, name, params)
    group = optimizer.param_groups[0]
    values = {"lr": torch.tensor(0.1), "centers": [torch.zeros(3)]}
    group.update(values)
    refs = [weakref.ref(values["lr"]), weakref.ref(values["centers"][0])]
    for t in range(3):
        step(optimizer, params, t)
    values.clear()
    del group["centers"]
    group["lr"] = 0.1
    assert [ref() for ref in refs] == [None, None]


@every_class
def test_a_rate_in_a_tensor_is_freed_after_the_step(name):
    params = parameters((200, 200))
    optimizer = make(optim, name, params)
    gc.disable()
    try:
        for t in range(7):  # RAdam's first five steps differ
            optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
            ref = weakref.ref(optimizer.param_groups[0]["lr"])
            step(optimizer, params, t)
            optimizer.param_groups[0]["lr"] = 0.1
            assert ref() is None
    finally:
        gc.enable()


def test_copies_of_the_state_are_plain():
    params = parameters((3,), (2,))
    optimizer = make(optim, "Adam", params)
    step(optimizer, params)
    for duplicate in (copy.copy, copy.deepcopy, lambda state: state.copy()):
        other = duplicate(optimizer.state)
        assert type(other) is collections.defaultdict
        assert {type(row) for row in copy.deepcopy(other).values()} == {dict}
    assert optimizer.state.plans


# Steps that are refused


UNCOMPUTABLE = [
    ("Adam", (0.9, 1.5)),
    ("Adam", (1.0, 0.999)),
    ("AdamW", (0.9, 1.5)),
    ("AdamW", (0.9, float("nan"))),
    ("Adamax", (1.0, 0.999)),
    ("RAdam", (0.9, 1.5)),
    ("RAdam", (1.0, 0.999)),
]


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize(("name", "betas"), UNCOMPUTABLE)
def test_betas_set_later_with_which_no_step_can_be_computed_change_nothing(name, betas, lr):
    params = parameters((3,), (2,))
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = getattr(optim, name)(groups, lr=lr)
    step(optimizer, params)
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    optimizer.param_groups[1]["betas"] = betas
    message = rf"param_groups\[1\]: hparams.beta\d is {betas[0] if betas[0] == 1 else betas[1]}"
    with pytest.raises(ValueError, match=message):
        step(optimizer, params)
    torch.testing.assert_close((params, optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    optimizer.param_groups[1]["betas"] = (0.9, 0.99)
    step(optimizer, params)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("SGD", "lr", -0.1),
        ("Adam", "betas", (1.5, 0.9)),
        ("Adam", "betas", (-0.5, 0.9)),
        ("Adam", "lr", -0.1),
        ("Adamax", "betas", (0.9, 1.5)),
        ("Adagrad", "lr_decay", -0.1),
        ("ASGD", "lambd", -0.1),
        ("AdamW", "weight_decay", -0.1),
    ],
)
def test_numbers_out_of_range_with_which_torch_trains_are_taken(name, key, value):
    ends = []
    for library in (torch.optim, optim):
        params = parameters((3,))
        optimizer = getattr(library, name)(params, lr=0.1)
        for t in range(4):
            if t == 1:
                optimizer.param_groups[0][key] = value
            step(optimizer, params, t)
        ends.append(params)
    torch.testing.assert_close(*ends)
    assert ends[0][0].isfinite().all()


def spoil_rate(value):
    return lambda o, ps: o.param_groups[1].update(lr=value)


def spoil_buffer(change):
    def spoil(o, ps):
        row = o.state[ps[1]]
        key = next(k for k, v in row.items() if v.dim())
        row[key] = change(row[key])

    return spoil


def resize(o, ps):
    ps[1].data, ps[1].grad = torch.ones(4, 3), torch.ones(4, 3)


def infer(x):
    with torch.inference_mode():
        return x.clone()


SPOILS = {
    "a rate of text": (spoil_rate("0.1"), "lr"),
    "a list of rates": (spoil_rate([0.1]), "lr"),
    "no rate": (spoil_rate(None), "lr"),
    "two rates": (spoil_rate(torch.ones(2)), "lr"),
    "a buffer of text": (spoil_buffer(lambda x: "x"), "not a tensor"),
    "a buffer of another shape": (spoil_buffer(lambda x: torch.ones(7)), r"shape \(7,\)"),
    "a buffer of integers": (spoil_buffer(lambda x: x.long()), "dtype"),
    "a buffer elsewhere": (spoil_buffer(lambda x: x.to("meta")), "meta"),
    "an inference buffer": (spoil_buffer(infer), "inference"),
    "a parameter of another shape": (resize, "shape"),
    "a count of text": (lambda o, ps: o.state[ps[1]].update(step="x"), "step"),
    "no count": (lambda o, ps: o.state[ps[1]].pop("step"), "step"),
}


@pytest.mark.parametrize("spoil", SPOILS)
@every_class
def test_a_step_that_is_refused_has_changed_nothing(name, spoil):
    if "count" in spoil and name not in COUNTED:
        pytest.skip("keeps no count")
    spoils, message = SPOILS[spoil]
    params = parameters((3, 3), (2, 2))
    optimizer = make(optim, name, [{"params": [p]} for p in params])
    step(optimizer, params)
    if "buffer" in spoil and not any(v.dim() for v in optimizer.state[params[1]].values()):
        pytest.skip("keeps no buffer")
    spoils(optimizer, params)
    before = picture(optimizer, params)
    with pytest.raises((TypeError, ValueError, RuntimeError, KeyError), match=message):
        optimizer.step()
    after = picture(optimizer, params)
    assert str(before) == str(after)


@pytest.mark.parametrize(
    ("name", "param"),
    [
        ("Muon", torch.ones(2, 2, 2)),
        ("Muon", torch.ones(2, 2, dtype=torch.complex64)),
        ("Adafactor", torch.ones(2, 2, dtype=torch.complex64)),
    ],
)
def test_a_parameter_that_the_rule_refuses_is_named_before_anything_changes(name, param):
    params = parameters((3, 3))
    optimizer = make(optim, name, params)
    step(optimizer, params)
    optimizer.add_param_group({"params": [Parameter(param)]})
    params += optimizer.param_groups[1]["params"]
    for p in params:
        p.grad = torch.ones_like(p)
    before = picture(optimizer, params)
    with pytest.raises(RuntimeError, match=rf"param_groups\[1\]\['params'\]\[0\] .*{name}"):
        optimizer.step()
    assert str(picture(optimizer, params)) == str(before)


@pytest.mark.parametrize("value", [np.float32(0.5), np.array(0.5), torch.tensor([0.5])], ids=repr)
@every_class
def test_numbers_of_other_kinds_are_rates(name, value):
    runs = [parameters((3, 3)) for _ in range(2)]
    for params, rate in zip(runs, (value, 0.5), strict=True):
        optimizer = make(optim, name, params)
        optimizer.param_groups[0]["lr"] = rate
        step(optimizer, params)
    close(*runs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [n for n in COUNTED if n in ("Adam", "AdamW", "Adagrad")])
def test_a_kernel_that_fails_has_not_counted(name, monkeypatch):
    params = parameters((3,), (2,))
    optimizer = make(optim, name, params)
    step(optimizer, params)

    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(torch, f"_fused_{name.lower()}_", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        step(optimizer, params)
    assert [float(optimizer.state[p]["step"]) for p in params] == [1.0, 1.0]


@pytest.mark.parametrize("name", ["RMSprop", "Adadelta", "Adamax"])
def test_an_interrupted_loop_has_counted_what_it_has_written(name, monkeypatch):
    params = parameters((3,), (2,), (4,))
    optimizer = make(optim, name, params, foreach=False)
    step(optimizer, params)
    before = [p.detach().clone() for p in params]
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return leaf_(*args)

    leaf_ = _plan.ways.RUN["leaf"]
    monkeypatch.setitem(_plan.ways.RUN, "leaf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step(optimizer, params)
    assert [float(optimizer.state[p]["step"]) for p in params] == [2.0, 2.0, 1.0]
    moved = [not torch.equal(p, old) for p, old in zip(params, before, strict=True)]
    assert moved == [True, True, False]


# Modes


@pytest.mark.parametrize("first", [True, False])
@every_class
def test_steps_inside_and_outside_of_inference_mode(name, first):
    runs = [parameters((3, 4), (3, 4)) for _ in range(2)]
    for params, inside in zip(runs, (True, False), strict=True):
        optimizer = make(optim, name, params)
        for t, here in enumerate((first, True, False, True)):
            with torch.inference_mode(inside and here):
                step(optimizer, params, t)
    close(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@every_way
@every_class
def test_fake_tensors_of_devices_that_are_not_there(name, flags, device):
    with FakeTensorMode():
        p = Parameter(torch.empty(3, 4, device=device))
        optimizer = make(optim, name, [p], **flags)
        for _ in range(2):
            p.grad = torch.empty(3, 4, device=device)
            optimizer.step()
        assert {v.shape for v in optimizer.state[p].values() if v.dim()} <= {
            torch.Size(shape) for shape in ((3, 4), (3, 1), (1, 4))
        }


@every_class
def test_first_steps_in_threads(name):
    start, errors = threading.Barrier(6), []
    runs = [parameters((4, 3)) for _ in range(6)]

    def train(params):
        start.wait()
        try:
            optimizer = make(optim, name, params)
            for t in range(3):
                for p in params:
                    p.grad = torch.full((4, 3), t + 1.0)
                optimizer.step()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(params,)) for params in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(torch.equal(params[0], runs[0][0]) for params in runs)


# Tracing


def compiled_run(name, compiled, **numbers):
    torch._dynamo.reset()
    params = parameters((3, 4), (4, 2))
    optimizer = make(optim, name, params, **numbers)
    advance = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    for t in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + i))
        (advance if compiled else optimizer.step)()
    return [p.detach() for p in params], optimizer.state_dict()["state"]


@every_class
def test_a_step_is_compiled_whole(name):
    torch.testing.assert_close(compiled_run(name, True), compiled_run(name, False))


def test_a_compiled_step_sees_a_replaced_state():
    torch._dynamo.reset()
    runs = [parameters((3,)) for _ in range(2)]
    for params, compiled in zip(runs, (True, False), strict=True):
        optimizer = make(optim, "Adam", params)
        advance = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for t in range(4):
            params[0].grad = torch.full((3,), t + 1.0)
            advance()
            row = optimizer.state[params[0]]
            row["exp_avg"] = row["exp_avg"] * 0.5
    close(*runs)


@pytest.mark.parametrize(
    ("flags", "prepare", "message"),
    [
        ({"differentiable": True}, lambda o: None, "differentiable"),
        ({"dampening": 0.5}, lambda o: None, "dampened"),
        ({}, lambda o: setattr(o, "found_inf", torch.tensor(0.0)), "GradScaler"),
    ],
    ids=["differentiable", "dampened", "scaled"],
)
def test_a_step_that_cannot_be_compiled_says_why(flags, prepare, message):
    torch._dynamo.reset()
    p = torch.ones(2)
    p.grad = torch.ones(2)
    optimizer = optim.SGD([p], lr=0.1, momentum=0.9, **flags)
    prepare(optimizer)
    with pytest.raises(Exception, match=message):
        torch.compile(optimizer.step, backend="eager")()
    assert p.tolist() == [1.0, 1.0]


@every_way
@every_class
def test_a_step_is_traced_with_its_state_as_an_input(name, flags):
    p = Parameter(torch.ones(3, 4))
    optimizer = make(optim, name, [p], **flags)
    step(optimizer, [p])
    row = {k: v.clone() for k, v in optimizer.state.pop(p).items()}

    def advance(x, grad, *state):
        optimizer.param_groups[0]["params"] = [x]
        optimizer.state[x] = dict(zip(row, state, strict=True))
        x.grad = grad
        optimizer.step()
        optimizer.state.clear()
        return [x, *state]

    def arguments(scale):
        return [
            scale * torch.ones(3, 4),
            torch.full((3, 4), 0.5),
            *(v.clone() for v in row.values()),
        ]

    traced = make_fx(advance)(*arguments(1.0))
    torch.testing.assert_close(
        traced(*arguments(2.0)), advance(*arguments(2.0)), rtol=1e-5, atol=2e-6
    )


# A state that nobody has read is not looked at

READS = {
    "item": lambda row: row["exp_avg"],
    "get": lambda row: row.get("exp_avg"),
    "values": lambda row: list(row.values())[1],
    "items": lambda row: dict(row.items())["exp_avg"],
    "dict": lambda row: dict(row)["exp_avg"],
    "unpacked": lambda row: {**row}["exp_avg"],
    "updated": lambda row: (lambda d: d.update(row) or d["exp_avg"])({}),
    "copy": lambda row: row.copy()["exp_avg"],
    "shallow copy": lambda row: copy.copy(row)["exp_avg"],
    "or": lambda row: (row | {})["exp_avg"],
    "ror": lambda row: ({} | row)["exp_avg"],
    "setdefault": lambda row: row.setdefault("exp_avg", None),
}


def adam_after_two_steps():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(3, 3))
    optimizer = optim.Adam([p], lr=0.1)
    for _ in range(2):
        p.grad = torch.arange(9.0).view(3, 3)
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("name", READS)
def test_what_has_been_read_is_looked_at(name):
    ends = []
    for kept in (True, False):
        p, optimizer = adam_after_two_steps()
        assert not optimizer.state.plans.lent
        optimizer.state_dict()
        assert not optimizer.state.plans.lent
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_plan, "KEPT", kept)
            buffer = READS[name](optimizer.state[p])
            optimizer.step()
            buffer.data = buffer.data.t()
            optimizer.step()
        ends.append(p.detach())
    assert torch.equal(*ends)


@every_way
@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("size", [6, 100], ids=["small", "programs"])
def test_counts_made_equal_leave_all_bits_as_they_are(name, flags, size, monkeypatch):
    ends = []
    for kept in (True, False):
        monkeypatch.setattr(_plan, "KEPT", kept)
        params = parameters((size, 200), (size, 200))
        optimizer = make(optim, name, params, **flags)
        step(optimizer, params[:1])
        for t in (1, 2):
            step(optimizer, params, t)
        for row in optimizer.state.values():
            row["step"].fill_(7)
        for t in (3, 4):
            step(optimizer, params, t)
        ends.append([x for p in params for x in (p.detach(), *optimizer.state[p].values())])
    for x, y in zip(*ends, strict=True):
        assert torch.equal(x, y)


def test_what_was_loaded_is_this_packages_own_and_what_was_put_in_is_not():
    p, optimizer = adam_after_two_steps()
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state.plans.lent
    optimizer.state[p]["exp_avg"] = torch.zeros(3, 3)
    assert optimizer.state.plans.lent
    p, optimizer = adam_after_two_steps()
    optimizer.__setstate__({"state": {p: dict(optimizer.state[p])}})
    assert optimizer.state.plans.lent


def test_what_another_thread_reads_meanwhile_is_looked_at(monkeypatch):
    (param,) = params = parameters((4, 3))
    optimizer = make(optim, "Adam", params)
    step(optimizer, params)
    assert not optimizer.state.plans.lent

    def copied(tree):
        reader = threading.Thread(target=lambda: optimizer.state[param]["exp_avg"])
        reader.start()
        reader.join()
        return copy.deepcopy(tree)

    monkeypatch.setattr("diffopt.optim._checkpoints.copied", copied)
    optimizer.state_dict()
    assert optimizer.state.plans.lent
