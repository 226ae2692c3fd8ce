"""diffopt.optim beside torch.optim: the same numbers, states, errors and manners, class by class.

The configurations are those of torch's own tests.
"""

import copy
import inspect
import io
import itertools
import pickle
import weakref

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler as sched, swa_utils
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from diffopt import optim
from diffopt.optim import _plan
from registry import PAIRS, REGISTRY, skip_old_adagrad
from torch_optimizers import OptimizerErrorEnum, optim_db

BOTH = [optim, torch.optim]
ROWS = {row.name: row for row in optim_db}
CONFIGURATIONS = [
    pytest.param(name, config.kwargs, id=f"{name}-{config.desc.replace(' ', '_')}")
    for name, row in ROWS.items()
    for config in row.optim_inputs_func(device="cpu")
]
FUSED = [name for name, row in ROWS.items() if "cpu" in row.supports_fused_on]
ONE_GROUP = {"LBFGS"}
SPARSE_ONLY = {"SparseAdam"}
MATRICES_ONLY = {"Muon"}

configuration = pytest.mark.parametrize(("name", "numbers"), CONFIGURATIONS)
every_class = pytest.mark.parametrize("name", ROWS)
several_groups = pytest.mark.parametrize("name", [name for name in ROWS if name not in ONE_GROUP])
library = pytest.mark.parametrize("library", BOTH, ids=["diffopt", "torch"])

# What the second group has instead, where the class has it.
OTHERS = {
    "lr": 0.03,
    "weight_decay": 0.2,
    "betas": (0.7, 0.95),
    "momentum": 0.7,
    "eps": 1e-4,
    "alpha": 0.8,
    "rho": 0.8,
    "lambd": 0.01,
    "momentum_decay": 0.01,
    "etas": (0.4, 1.3),
    "lr_decay": 0.1,
    "beta2_decay": -0.7,
    "maximize": True,
    "amsgrad": True,
    "centered": True,
    "decoupled_weight_decay": True,
}


@pytest.fixture(autouse=True, params=[True, pytest.param(False, marks=pytest.mark.slow)])
def plans(request, monkeypatch):
    """Everything holds bit by bit whether plans are kept or each step makes its own."""
    monkeypatch.setattr(_plan, "KEPT", request.param)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def normal(generator, shape, dtype):
    drawn = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=drawn).to(dtype)


def draw(name, dtype, dense=False):
    """Parameters of all layouts. The last three get gradients late, never, and can't have any."""
    generator = rng(1)

    def new(*shape):
        return normal(generator, shape, dtype)

    if name in MATRICES_ONLY:
        tensors = [new(4, 3), new(3, 5).T, new(0, 3), new(6, 2)[::2]]
        tensors += [new(2, 3), new(3, 3), new(3, 2)]
    else:
        tensors = [new(4, 3), new(0, 3), new(3, 5).T]
        tensors += [] if name in SPARSE_ONLY else [new()]
        tensors += [new(2, 3, 2, 2).to(memory_format=torch.channels_last)]
        tensors += [] if dense else [new(5, 2)[:, 0]]
        tensors += [new(3), new(2), new(4)]
    if name == "LBFGS":  # torch's can't flatten other gradients
        tensors = [t.contiguous() for t in tensors]
    if name == "Adafactor":  # torch's divides by the number of elements
        tensors = [t for t in tensors if t.numel()]
    return [Parameter(t, requires_grad=i < len(tensors) - 1) for i, t in enumerate(tensors)]


class Run:
    """A training run by a class of one of the libraries, the same each time it is made."""

    def __init__(
        self, library, name, numbers=None, *, dtype=torch.float64, dense=False, late=2, **flags
    ):
        self.name, self.t, self.late = name, 0, late
        self.params = draw(name, dtype, dense)
        cls = getattr(library, name)
        groups, numbers = self.params, copy.deepcopy(numbers or {})
        if name in ONE_GROUP:
            numbers.setdefault("max_iter", 5)
        else:
            groups = [{"params": groups[::2]}, {"params": groups[1::2], **self.others(cls)}]
        self.optimizer = cls(groups, **numbers, **flags)

    @staticmethod
    def others(cls):
        defaults = inspect.signature(cls).parameters
        return {
            key: value
            for key, value in OTHERS.items()
            if key in defaults
            and isinstance(defaults[key].default, tuple) == isinstance(value, tuple)
        }

    def advance(self, steps, set_to_none=True):
        for _ in range(steps):
            self.optimizer.zero_grad(set_to_none=set_to_none)
            if ROWS[self.name].step_requires_closure:
                self.optimizer.step(self.closure)
            else:
                self.draw_gradients()
                self.optimizer.step()
            self.t += 1
        return self

    def trained(self):
        *params, late, _, _ = self.params
        return [*params, late] if self.t >= self.late else params

    def draw_gradients(self):
        generator = rng(self.t)
        for p in self.trained():
            g = torch.empty_like(p).copy_(normal(generator, p.shape, p.dtype))
            if self.name in SPARSE_ONLY:
                g[: p.shape[0] // 3] = 0
                g = g.to_sparse(1)
            p.grad = g if p.grad is None else p.grad + g

    def closure(self):
        """A convex loss, for an optimizer that asks for the gradient at points of its choice.

        One that ascends gets its negative, since it would follow the loss itself to infinity.
        """
        self.optimizer.zero_grad()
        distances = [(1 + i) * (p - i).abs().square() for i, p in enumerate(self.trained())]
        loss = sum((d + 0.1 * d.square()).sum() for d in distances)
        loss = -loss if self.optimizer.param_groups[0].get("maximize") else loss
        loss.backward()
        return loss

    def values(self):
        return [p.detach() for p in self.params]

    def saved(self):
        """The state dict as it comes back from a file."""
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def takes_over(self, other):
        """Go on where another run stopped."""
        self.t = other.t
        for p, q in zip(self.params, other.params, strict=True):
            p.data.copy_(q.data)
        self.optimizer.load_state_dict(other.saved())
        return self


def assert_same(ours, theirs, groups=True, **tolerance):
    """The parameters, what the optimizers keep, and the groups."""
    state, their_state = ours.optimizer.state_dict(), theirs.optimizer.state_dict()
    torch.testing.assert_close(ours.values(), theirs.values(), **tolerance)
    torch.testing.assert_close(state["state"], their_state["state"], **tolerance)
    assert not groups or state["param_groups"] == their_state["param_groups"]


def outcome(act):
    """What happens: the type of the error, or None."""
    try:
        act()
    except Exception as error:  # any kind: it is compared with torch's
        return type(error)
    return None


EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-12, "atol": 1e-14}

# Values


def tensor_by_tensor(name):
    """The flags that choose the plain code of torch."""
    return {flag: False for flag in ("foreach", "fused") if flag in ROWS[name].supported_impls}


NOT_BIT_BY_BIT = {"Adafactor", "SparseAdam"}


@configuration
def test_plain_values(name, numbers):
    flags = tensor_by_tensor(name)
    ours, theirs = (Run(lib, name, numbers, **flags).advance(5) for lib in BOTH)
    assert_same(ours, theirs, **(CLOSE if name in NOT_BIT_BY_BIT else EXACT))


@configuration
def test_default_values(name, numbers):
    ours, theirs = (Run(lib, name, numbers).advance(5) for lib in BOTH)
    assert_same(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "name", [name for name, row in ROWS.items() if "foreach" in row.supported_impls]
)
def test_foreach_values(name):
    ours = Run(optim, name, foreach=True).advance(5)
    plain = Run(torch.optim, name, foreach=False).advance(5)  # their foreach ASGD rounds more
    assert_same(ours, plain, groups=False, rtol=1e-10, atol=1e-12)


@configuration
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.complex128], ids=str
)
def test_values_of_other_dtypes(name, numbers, dtype):
    if dtype.is_complex and not ROWS[name].supports_complex:
        pytest.skip("torch has it for real parameters only")
    half = dtype is torch.bfloat16  # torch rounds every intermediate result
    ours, theirs = (Run(lib, name, numbers, dtype=dtype).advance(3) for lib in BOTH)
    tolerance = {"rtol": 0.03, "atol": 0.03} if half else {}
    torch.testing.assert_close(ours.values(), theirs.values(), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "numbers"), [config for config in CONFIGURATIONS if config.values[0] in FUSED]
)
def test_fused_values_bit_by_bit(name, numbers, dtype):
    # torch's kernels overwrite the neighbours of a parameter with gaps, and that of SGD fails
    # where the first gradient comes late
    flags = {"dtype": dtype, "dense": True, "late": 0, "fused": True}
    ours, theirs = (Run(lib, name, numbers, **flags).advance(5) for lib in BOTH)
    assert_same(ours, theirs, **EXACT)


@pytest.mark.parametrize("name", FUSED)
def test_fused_steps_take_parameters_of_all_layouts(name):
    ours = Run(optim, name, fused=True).advance(5)
    assert_same(ours, Run(optim, name).advance(5), groups=False, rtol=1e-10, atol=1e-12)


@every_class
def test_gradients_set_to_zero_instead_of_none(name):
    ours, theirs = (Run(lib, name).advance(5, set_to_none=False) for lib in BOTH)
    assert_same(ours, theirs, **CLOSE)


@every_class
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_tensor_rates(name, shape):
    numbers = {"lr": torch.full(shape, 0.02, dtype=torch.float64)}
    ours, theirs = (Run(lib, name, numbers).advance(3) for lib in BOTH)
    assert_same(ours, theirs, **CLOSE)


@pytest.mark.parametrize("name", sorted(set(ROWS) - SPARSE_ONLY))
def test_several_dtypes_in_one_group(name):
    dtypes = [torch.float32, torch.float64, torch.float32]
    dtypes += [torch.complex64] * ROWS[name].supports_complex
    params = [[Parameter(normal(rng(0), (3, 2), dtype)) for dtype in dtypes] for _ in BOTH]
    if name in ONE_GROUP:
        pytest.skip("torch's makes one vector of all")
    for lib, leaves in zip(BOTH, params, strict=True):
        optimizer = getattr(lib, name)(leaves, lr=0.1)
        for t in range(3):
            for p in leaves:
                p.grad = normal(rng(t), p.shape, p.dtype)
            optimizer.step()
    torch.testing.assert_close(*params)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_tensor_betas(name):
    numbers = {"betas": (torch.tensor(0.8), torch.tensor(0.9))}
    ours, theirs = (Run(lib, name, numbers).advance(3) for lib in BOTH)
    assert_same(ours, theirs, rtol=1e-6, atol=1e-7)  # torch computes some factors in float32


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("name", "numbers"),
    [("SGD", {}), ("SGD", {"momentum": 0.9}), ("Adagrad", {"lr_decay": 0.1}), ("SparseAdam", {})],
)
def test_sparse_gradients(name, numbers, maximize):
    params = [Parameter(torch.arange(8.0, dtype=torch.float64).view(4, 2)) for _ in BOTH]
    both = [
        getattr(lib, name)([p], lr=0.1, maximize=maximize, **numbers)
        for lib, p in zip(BOTH, params, strict=True)
    ]
    for t in range(3):
        rows = torch.tensor([[1, 3, 1], [0, 2, 2], [3, 3, 3]][t])  # not coalesced
        values = normal(rng(t), (3, 2), torch.float64)
        for optimizer, p in zip(both, params, strict=True):
            p.grad = torch.sparse_coo_tensor(rows[None], values, (4, 2), check_invariants=True)
            optimizer.step()
    torch.testing.assert_close(params[0], params[1], **CLOSE)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "SparseAdam"])
def test_a_sparse_gradient_may_have_no_dimensions(name, empty):
    params = [Parameter(torch.tensor(2.0, dtype=torch.float64)) for _ in BOTH]
    both = [getattr(lib, name)([p], lr=0.1) for lib, p in zip(BOTH, params, strict=True)]
    for t in range(3):
        size = 0 if empty and t == 1 else 2  # two values for one place: not coalesced
        parts = torch.zeros(0, size, dtype=torch.long), normal(rng(t), (size,), torch.float64)
        for optimizer, p in zip(both, params, strict=True):
            p.grad = torch.sparse_coo_tensor(*parts, (), check_invariants=True)
            optimizer.step()
    torch.testing.assert_close(params[0], params[1], **CLOSE)


@several_groups
def test_a_step_leaves_gradients_alone(name):
    run = Run(optim, name).advance(3)
    versions = [p.grad._version for p in run.trained()]
    run.optimizer.step()
    assert versions == [p.grad._version for p in run.trained()]


# State


def form(value):
    """A state dict without its numbers: keys in order, dtypes and shapes."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.stride(), value.requires_grad
    if isinstance(value, dict):
        return [(key, form(entry)) for key, entry in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [form(entry) for entry in value]
    return type(value)


@configuration
@pytest.mark.parametrize("steps", [0, 3])
def test_state_dict_has_the_form_of_torchs(name, numbers, steps):
    ours, theirs = (Run(lib, name, numbers).advance(steps) for lib in BOTH)
    assert form(ours.optimizer.state_dict()) == form(theirs.optimizer.state_dict())
    keys = [[list(run.optimizer.state[p]) for p in run.params] for run in (ours, theirs)]
    assert keys[0] == keys[1]


# Their float32 scalars become float64 when torch loads them for float64 parameters, and go on so.
SINGLES = {"ASGD", "NAdam"}


@configuration
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("first", [0, 1], ids=["from_diffopt", "from_torch"])
def test_a_run_goes_on_in_the_other_library(name, numbers, steps, first):
    one, other = BOTH[first], BOTH[1 - first]
    begun = Run(one, name, numbers).advance(steps)
    moved = Run(other, name).takes_over(begun).advance(3)
    unbroken = Run(torch.optim, name, numbers).advance(steps + 3)
    if other is torch.optim and name in SINGLES and steps:
        torch.testing.assert_close(moved.values(), unbroken.values(), rtol=1e-6, atol=1e-8)
    else:
        assert_same(moved, unbroken, rtol=1e-10, atol=1e-12)


@every_class
def test_a_state_dict_is_a_copy(name):
    run = Run(optim, name).advance(3)
    taken = run.optimizer.state_dict()
    before = copy.deepcopy(taken)
    run.advance(1)
    torch.testing.assert_close(taken["state"], before["state"], **EXACT)
    assert taken["param_groups"] == before["param_groups"]


@every_class
def test_a_loaded_state_dict_is_copied(name):
    taken = Run(optim, name).advance(3).optimizer.state_dict()
    before = copy.deepcopy(taken)
    run = Run(optim, name)
    run.optimizer.load_state_dict(taken)
    run.advance(3)
    torch.testing.assert_close(taken["state"], before["state"], **EXACT)


@several_groups
@library
def test_every_parameter_counts_its_own_steps(library, name):
    run = Run(library, name).advance(3)
    state = run.optimizer.state
    counts = [state[p]["step"] for p in run.trained() if "step" in state[p]]
    tensors = [count for count in counts if isinstance(count, torch.Tensor)]
    assert len({count.data_ptr() for count in tensors}) == len(tensors)
    assert [int(count) for count in counts] in ([], [3] * (len(run.trained()) - 1) + [1])
    rows = run.optimizer.state_dict()["state"].values()
    saved = [value for row in rows for value in row.values() if isinstance(value, torch.Tensor)]
    memory = {value.untyped_storage().data_ptr() for value in saved if value.numel()}
    assert len(memory) == len([value for value in saved if value.numel()])


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adagrad", "RMSprop", "NAdam"])
def test_exact_moments_of_rounded_parameters_stay_exact(name):
    exact = Run(optim, name).advance(3)
    taken = exact.optimizer.state_dict()
    for state in taken["state"].values():
        state.update({key: value.float() for key, value in state.items()})
    rounded = Run(optim, name, dtype=torch.bfloat16)
    rounded.optimizer.load_state_dict(taken)
    rounded.t = exact.t
    for _ in range(2):
        states = rounded.optimizer.state.values()
        assert {value.dtype for state in states for value in state.values()} == {torch.float32}
        rounded.advance(1)


@library
def test_a_state_dict_with_other_groups_is_refused(library):
    a, b, c = (Parameter(torch.ones(2)) for _ in range(3))
    optimizer = library.Adam([a, b], lr=0.1)
    for groups in ([c], [{"params": [a, b]}, {"params": [c]}]):
        with pytest.raises(ValueError, match="group"):
            optimizer.load_state_dict(library.Adam(groups).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_state_dict_with_other_shapes_is_refused_by_name():
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(3))]
    optimizers = [optim.Adam([p], lr=lr) for p, lr in zip(params, (0.1, 0.2), strict=True)]
    for p, optimizer in zip(params, optimizers, strict=True):
        p.grad = torch.ones_like(p)
        optimizer.step()
    before = copy.deepcopy(optimizers[0].state_dict())
    with pytest.raises(ValueError, match="exp_avg") as error:
        optimizers[0].load_state_dict(optimizers[1].state_dict())
    assert "(2,)" in str(error.value)
    assert "(3,)" in str(error.value)
    torch.testing.assert_close(optimizers[0].state_dict(), before, **EXACT)


def test_a_computed_rate_is_saved_without_its_history():
    log_lr = torch.tensor(-2.0, requires_grad=True)
    p = Parameter(torch.ones(2))
    optimizer = optim.SGD([p], lr=log_lr.exp(), differentiable=True)
    rate = optimizer.state_dict()["param_groups"][0]["lr"]
    assert not rate.requires_grad
    assert rate == log_lr.exp()
    assert optimizer.param_groups[0]["lr"].requires_grad
    copy.deepcopy(optimizer.state_dict())


@every_class
@library
def test_names_of_parameters_are_kept(library, name):
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 2, bias=False)
    )
    optimizer = getattr(library, name)(model.named_parameters())
    (group,) = optimizer.state_dict()["param_groups"]
    assert group["param_names"] == ["0.weight", "1.weight"]
    unnamed = getattr(library, name)(model.parameters())
    unnamed.load_state_dict(optimizer.state_dict())
    assert unnamed.param_groups[0]["param_names"] == ["0.weight", "1.weight"]


# Hooks


def record_hooks(optimizer):
    """Register a hook of every kind; the list gets a name whenever one runs."""
    events = []

    def hook(name):
        return lambda *args: events.append(name)

    optimizer.register_step_pre_hook(hook("step pre"))
    optimizer.register_step_post_hook(hook("step post"))
    optimizer.register_state_dict_pre_hook(hook("save pre"))
    optimizer.register_state_dict_post_hook(hook("save post"))
    optimizer.register_state_dict_post_hook(hook("save post first"), prepend=True)
    optimizer.register_load_state_dict_pre_hook(hook("load pre"))
    optimizer.register_load_state_dict_pre_hook(hook("load pre first"), prepend=True)
    optimizer.register_load_state_dict_post_hook(hook("load post"))
    return events


@every_class
@library
def test_hooks_run_in_order(library, name):
    run = Run(library, name)
    events = record_hooks(run.optimizer)
    run.advance(1)
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    saves = ["save pre", "save post first", "save post"]
    loads = ["load pre first", "load pre", "load post"]
    assert events == ["step pre", "step post", *saves, *loads]


@library
def test_hooks_of_all_optimizers_run_around_those_of_one(library):
    events = []
    optimizer = library.SGD([Parameter(torch.ones(2))])
    optimizer.register_step_pre_hook(lambda *_: events.append("one"))
    optimizer.register_step_post_hook(lambda *_: events.append("one"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: events.append("all")),
        register_optimizer_step_post_hook(lambda *_: events.append("all")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert events == ["all", "one", "one", "all"]


@every_class
@library
def test_a_hook_may_replace_the_arguments_of_step(library, name):
    run = Run(library, name)
    run.draw_gradients()

    def closure():
        return run.closure() if ROWS[name].step_requires_closure else torch.tensor(7.0)

    run.optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, closure), {}))
    assert run.optimizer.step(lambda: pytest.fail("the first closure ran")) is not None


@library
def test_hooks_may_change_what_is_saved_and_loaded(library):
    optimizer = library.Adam([Parameter(torch.ones(2))], lr=0.1)
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "more": 1})
    taken = optimizer.state_dict()
    assert taken["more"] == 1

    def double_rates(_, loaded):
        loaded = copy.deepcopy(loaded)
        loaded["param_groups"][0]["lr"] *= 2
        return loaded

    optimizer.register_load_state_dict_pre_hook(double_rates)
    optimizer.load_state_dict(taken)
    assert optimizer.param_groups[0]["lr"] == 0.2
    assert taken["param_groups"][0]["lr"] == 0.1


# Copies


@every_class
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_made_in_the_middle_goes_on(name, duplicate):
    original, twin = Run(optim, name).advance(3), Run(optim, name)
    twin.optimizer, twin.t = duplicate(original.optimizer), original.t
    groups = [group["params"] for group in twin.optimizer.param_groups]
    params = groups[0] if len(groups) == 1 else [None] * len(original.params)
    if len(groups) == 2:
        params[::2], params[1::2] = groups
    twin.params = params
    after_three = [p.clone() for p in original.values()]
    twin.advance(2)
    torch.testing.assert_close(original.values(), after_three, **EXACT)
    assert_same(twin, original.advance(2), **CLOSE)  # a copy may have other strides


@configuration
def test_repr_is_that_of_torch(name, numbers):
    ours, theirs = (Run(lib, name, numbers).optimizer for lib in BOTH)
    assert repr(ours) == repr(theirs)


@every_class
def test_every_class_is_one_of_torchs(name):
    cls, base = getattr(optim, name), getattr(torch.optim, name)
    assert issubclass(cls, base)
    assert inspect.signature(cls) == inspect.signature(base)


# Groups


@several_groups
def test_a_group_added_later(name):
    skip_old_adagrad(name)
    both = [Run(lib, name).advance(2) for lib in BOTH]
    for run in both:
        late = [Parameter(p.detach() + 1) for p in draw(name, torch.float64)[:2]]
        run.optimizer.add_param_group({"params": late, "lr": 0.05})
        run.params[:0] = late
        run.advance(3)
    assert_same(*both, **CLOSE)


@every_class
def test_a_list_of_groups_is_not_changed(name):
    p = Parameter(torch.ones(2, 2))
    groups = [{"params": [p]}]
    optimizers = [getattr(optim, name)(groups, lr=lr) for lr in (0.1, 0.2)]
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [0.1, 0.2]
    assert groups == [{"params": [p]}]


@library
def test_what_users_add_to_groups_and_state_is_kept(library):
    p = Parameter(torch.ones(2))
    optimizer = library.Adam([{"params": [p], "label": "body", "scale": (1, None)}])
    for _ in range(2):
        p.grad = torch.ones(2)
        optimizer.step()
        optimizer.state[p]["notes"] = [1, {"a": torch.ones(3)}]
        optimizer.state["all"] = "global"
        optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["label"] == "body"
    assert optimizer.param_groups[0]["scale"] == (1, None)
    assert optimizer.state["all"] == "global"
    torch.testing.assert_close(optimizer.state[p]["notes"], [1, {"a": torch.ones(3)}])


@library
def test_modules_may_be_converted_by_swapping_their_tensors(library):
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2)
    model = torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)
    optimizer = library.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3, 3, 3)).sum().backward()
    optimizer.step()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@library
def test_steps_during_the_backward_pass(library):
    model = torch.nn.Linear(3, 2)
    optimizers = {p: library.Adam([p], lr=0.1) for p in model.parameters()}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    before = model.bias.detach().clone()
    model(torch.ones(3)).sum().backward()
    torch.testing.assert_close(model.bias.detach(), before - 0.1)
    assert model.bias.grad is None


@several_groups
def test_an_empty_group(name):
    p = Parameter(torch.ones(2, 2))
    optimizer = getattr(optim, name)([{"params": [p]}, {"params": []}])
    p.grad = torch.ones(2, 2).to_sparse(1) if name in SPARSE_ONLY else torch.ones(2, 2)
    optimizer.step()
    assert not torch.equal(p, torch.ones(2, 2))
    assert optimizer.state_dict()["param_groups"][1]["params"] == []


@every_class
def test_gradients_are_not_kept_alive(name):
    run = Run(optim, name).advance(3)
    gradients = [weakref.ref(p.grad) for p in run.trained()]
    run.optimizer.zero_grad()
    assert not any(gradient() is not None for gradient in gradients)


@library
def test_one_parameter_twice_is_refused(library):
    p = Parameter(torch.ones(2))
    optimizer = library.Adam([p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [p]})


# What users do to an optimizer between steps


def some_state(run):
    return run.optimizer.state[run.params[0]]


def change_buffers(run, change):
    row = some_state(run)
    for key, value in row.items():
        if isinstance(value, torch.Tensor) and value.dim():
            row[key] = change(value)


def replace_count(run):
    row = some_state(run)
    if "step" in row:  # a number where torch has a number
        row["step"] = torch.tensor(7.0) if isinstance(row["step"], torch.Tensor) else 7


def fill_count(run):
    if isinstance(some_state(run).get("step"), torch.Tensor):
        some_state(run)["step"].fill_(7)


def replace(p, value):
    p.data = value


MEDDLING = {
    "clears the state": lambda run: run.optimizer.state.clear(),
    "deletes a row of it": lambda run: run.optimizer.state.pop(run.params[0], None),
    "replaces a count": replace_count,
    "overwrites a count": fill_count,
    "overwrites buffers": lambda run: change_buffers(run, lambda x: x.mul_(0.5)),
    "replaces buffers": lambda run: change_buffers(run, lambda x: x * 0.5),
    "overwrites a parameter": lambda run: run.params[0].data.mul_(2),
    "replaces a parameter's memory": lambda run: replace(run.params[0], run.params[0] * 2),
    "replaces its layout": lambda run: replace(run.params[0], run.params[0].T.contiguous().T),
    "unties all layouts": lambda run: [replace(p, p.data.contiguous()) for p in run.params],
    "sets a rate": lambda run: run.optimizer.param_groups[0].update(lr=0.05),
    "sets a tensor rate": lambda run: run.optimizer.param_groups[0].update(
        lr=torch.tensor(0.05, dtype=torch.float64)
    ),
    "flips maximize": lambda run: run.optimizer.param_groups[0].update(maximize=True),
    "drops a parameter": lambda run: run.optimizer.param_groups[0]["params"].pop(0),
    "moves a parameter": lambda run: run.optimizer.param_groups[1]["params"].append(
        run.optimizer.param_groups[0]["params"].pop(0)
    ),
    "reorders parameters": lambda run: run.optimizer.param_groups[0]["params"].reverse(),
    "drops a group": lambda run: run.optimizer.param_groups.pop(),
    "swaps groups": lambda run: run.optimizer.param_groups.reverse(),
}


@several_groups
@pytest.mark.parametrize("meddling", MEDDLING)
def test_changes_between_steps_count(meddling, name):
    if meddling in ("clears the state", "deletes a row of it"):
        skip_old_adagrad(name)
    both = [Run(lib, name).advance(3) for lib in BOTH]
    errors = []
    for run in both:
        MEDDLING[meddling](run)
        errors.append(outcome(lambda run=run: run.advance(3)))
    assert errors[0] is errors[1]
    states = [[dict(run.optimizer.state[p]) for p in run.params] for run in both]
    if errors == [None, None]:
        values = [run.values() for run in both]
        torch.testing.assert_close(*values, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(*states, rtol=1e-10, atol=1e-12)


LAYOUTS = {
    "transposed": lambda g: g.T.contiguous().T,
    "expanded": lambda g: g[:1].expand_as(g),
    "strided": lambda g: g.repeat_interleave(2, 0)[::2],
    "shared": lambda g: g,
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", sorted(set(ROWS) - ONE_GROUP - SPARSE_ONLY))
def test_gradients_of_other_layouts_than_their_parameters(name, layout, fused):
    if fused and name not in FUSED:
        pytest.skip("has no fused kernel")
    params = [[Parameter(torch.ones(3, 4, dtype=torch.float64)) for _ in "ab"] for _ in BOTH]
    for lib, leaves, flags in zip(
        BOTH, params, ({"fused": True} if fused else {}, {}), strict=True
    ):
        optimizer = getattr(lib, name)(leaves, lr=0.1, **flags)
        for t in range(3):
            gradient = normal(rng(t), (3, 4), torch.float64)
            for p in leaves:
                p.grad = gradient if t == 0 else LAYOUTS[layout](gradient)
            optimizer.step()
    torch.testing.assert_close(*params, rtol=1e-10, atol=1e-12)


# Schedulers

SCHEDULERS = {
    "LambdaLR": lambda o: sched.LambdaLR(o, [lambda t: 0.9**t, lambda t: 1 / (t + 1)]),
    "MultiplicativeLR": lambda o: sched.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: sched.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: sched.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: sched.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: sched.LinearLR(o, 0.3, total_iters=4),
    "ExponentialLR": lambda o: sched.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: sched.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: sched.CosineAnnealingLR(o, 5, 0.01),
    "CosineAnnealingWarmRestarts": lambda o: sched.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: sched.CyclicLR(o, 0.01, 0.1, 3),
    "OneCycleLR": lambda o: sched.OneCycleLR(o, 0.1, 10),
    "ReduceLROnPlateau": lambda o: sched.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": lambda o: sched.SequentialLR(
        o, [sched.ConstantLR(o, 0.1, 3), sched.ExponentialLR(o, 0.8)], [3]
    ),
    "ChainedScheduler": lambda o: sched.ChainedScheduler(
        [sched.ConstantLR(o, 0.1, 3), sched.ExponentialLR(o, 0.8)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.01, 3),
}


def test_every_scheduler_of_torch_is_tested():
    assert {*sched.__all__, "SWALR"} == {*SCHEDULERS, "LRScheduler"}


@pytest.mark.parametrize("tensor_rate", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize(("name", "numbers"), [("SGD", {"momentum": 0.9}), ("Adam", {})])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(scheduler, name, numbers, tensor_rate):
    both, rates = [], []
    for lib in BOTH:
        run = Run(lib, name, numbers)
        both.append(run)
        for group in run.optimizer.param_groups if tensor_rate else []:
            group["lr"] = torch.tensor(group["lr"])
        given = [group["lr"] for group in run.optimizer.param_groups]
        schedule = SCHEDULERS[scheduler](run.optimizer)
        rates.append([])
        for _ in range(8):
            run.advance(1)
            schedule.step(*[1.0] * (scheduler == "ReduceLROnPlateau"))
            rates[-1].append([float(group["lr"]) for group in run.optimizer.param_groups])
        if tensor_rate:
            groups = run.optimizer.param_groups
            assert all(g["lr"] is lr for g, lr in zip(groups, given, strict=True))
    assert rates[0] == rates[1]
    assert_same(*both, **CLOSE)


@every_class
def test_a_schedule_acts_on_every_class(name):
    both = [Run(lib, name) for lib in BOTH]
    for run in both:
        schedule = sched.ExponentialLR(run.optimizer, 0.5)
        for _ in range(4):
            run.advance(1)
            schedule.step()
    assert_same(*both, **CLOSE)


@library
def test_a_schedule_stepped_before_the_optimizer_warns(library):
    optimizer = library.SGD([Parameter(torch.ones(2))])
    schedule = sched.ExponentialLR(optimizer, 0.5)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        schedule.step()


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop"])
def test_averages_of_weights(name):
    averages = []
    for lib in BOTH:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2).double()
        optimizer = getattr(lib, name)(model.parameters(), lr=0.1)
        average = swa_utils.AveragedModel(model)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.ones(3, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
            average.update_parameters(model)
        averages.append([p.detach() for p in average.parameters()])
    torch.testing.assert_close(*averages, **CLOSE)


# Scaled gradients


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_a_scaler_skips_steps_with_infinite_gradients(name, fused):
    both = []
    for lib in BOTH:
        run = Run(lib, name, dtype=torch.float32, dense=True, late=0, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        for t in range(5):
            run.optimizer.zero_grad()
            run.draw_gradients()
            for p in run.params:
                if p.grad is not None:
                    p.grad *= scaler.scale(torch.ones(()))
            if t in (1, 3):
                run.params[0].grad[0, 0] = torch.inf
            scaler.step(run.optimizer)
            scaler.update()
            run.t += 1
        states = [run.optimizer.state[p] for p in run.trained()]
        assert {int(state["step"]) for state in states if "step" in state} <= {2, 3}
        both.append(run)
    assert_same(*both, **(EXACT if fused else {}))


@library
@pytest.mark.parametrize("name", FUSED)
def test_a_scaler_may_unscale_first(library, name):
    p = Parameter(torch.ones(2))
    optimizer = getattr(library, name)([p], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(p.sum()).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(p.grad, torch.ones(2))
    scaler.step(optimizer)
    twin = Parameter(torch.ones(2))
    twin.grad = torch.ones(2)
    getattr(torch.optim, name)([twin], lr=0.1).step()
    torch.testing.assert_close(p, twin)


# Closures


@every_class
@library
def test_a_closure_runs_with_autograd_and_its_loss_comes_back(library, name):
    run, grad_modes = Run(library, name), []

    def closure():
        grad_modes.append(torch.is_grad_enabled())
        if ROWS[name].step_requires_closure:
            return run.closure()
        run.draw_gradients()
        return torch.tensor(7.0)

    with torch.no_grad():
        loss = run.optimizer.step(closure)
    assert all(grad_modes)
    assert grad_modes
    if not ROWS[name].step_requires_closure:
        assert loss == 7
        assert run.optimizer.step() is None


# Errors


@every_class
def test_what_torch_refuses_is_refused_likewise(name):
    for case in ROWS[name].optim_error_inputs_func(device="cpu", dtype=torch.float32):
        params, numbers = case.optimizer_error_input.params, case.optimizer_error_input.kwargs
        cls = getattr(optim, name)
        warns = issubclass(case.error_type, Warning)
        expect = pytest.warns if warns else pytest.raises
        if case.error_on is OptimizerErrorEnum.STEP_ERROR:
            optimizer = cls(params, **numbers)
            with expect(case.error_type, match=case.error_regex):
                optimizer.step()
        else:
            with expect(case.error_type, match=case.error_regex):
                cls(params, **numbers)


FLAGS = {
    "foreach and fused": {"foreach": True, "fused": True},
    "fused and differentiable": {"fused": True, "differentiable": True},
    "foreach and differentiable": {"foreach": True, "differentiable": True},
    "capturable on a CPU": {"capturable": True},
    "capturable and differentiable": {"capturable": True, "differentiable": True},
    "tensor rate and foreach": {"lr": torch.tensor(0.1), "foreach": True},
    "tensor rate and fused": {"lr": torch.tensor(0.1), "fused": True},
    "rate of two": {"lr": torch.tensor([0.1, 0.2])},
    "negative rate": {"lr": -0.1},
    "nesterov without momentum": {"nesterov": True, "momentum": 0.0},
}


@every_class
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_combinations_of_flags(name, flags):
    if not flags.keys() <= inspect.signature(getattr(optim, name)).parameters.keys():
        pytest.skip("has no such flags")

    def step(library):
        p = Parameter(torch.ones(2, 2))
        p.grad = torch.ones(2, 2)
        if flags.get("differentiable"):
            p.requires_grad_(False)
        optimizer = getattr(library, name)([p], **flags)
        optimizer.step(*[lambda: torch.ones(())] * ROWS[name].step_requires_closure)

    assert outcome(lambda: step(optim)) is outcome(lambda: step(torch.optim))


GRADIENTS = {
    "sparse": (lambda: torch.ones(2, 2), lambda p: p.to_sparse()),
    "dense": (lambda: torch.ones(2, 2), lambda p: p.clone()),
    "complex": (lambda: torch.ones(2, 2, dtype=torch.cfloat), lambda p: p.clone()),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's, once in a process
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", GRADIENTS)
@several_groups
def test_kinds_of_gradients(name, kind, fused):
    if fused and name not in FUSED:
        pytest.skip("has no fused kernel")

    def step(library):
        make, derive = GRADIENTS[kind]
        p = Parameter(make())
        p.grad = derive(p.detach())
        getattr(library, name)([p], **({"fused": True} if fused else {})).step()

    assert outcome(lambda: step(optim)) is outcome(lambda: step(torch.optim))


@several_groups
def test_steps_on_a_meta_device(name):
    def step(library):
        p = Parameter(torch.ones(2, 2, device="meta"))
        p.grad = torch.ones_like(p)
        getattr(library, name)([p]).step()

    if outcome(lambda: step(torch.optim)) is None:
        step(optim)


@pytest.mark.parametrize("name", sorted(set(ROWS) - ONE_GROUP - SPARSE_ONLY))
def test_a_refused_step_changes_nothing(name):
    params = [Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = getattr(optim, name)([{"params": [p]} for p in params])
    for p in params:
        p.grad = torch.ones(2, 2)
    optimizer.step()
    values, state = copy.deepcopy([[p.detach() for p in params], optimizer.state_dict()])
    params[1].grad = torch.ones(2, 2).to_sparse()
    if outcome(optimizer.step):
        torch.testing.assert_close(list(params), values, **EXACT)
        torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], **EXACT)


@pytest.mark.parametrize("name", sorted(ONE_GROUP))
def test_a_step_without_the_closure_that_it_needs_is_refused(name):
    with pytest.raises(TypeError, match="closure"):
        getattr(optim, name)([Parameter(torch.ones(2))]).step()


# Derivatives

NUMBERS = {
    "SGD": [("sgd-momentum", {}), ("sgd-nesterov", {"nesterov": True})],
    "Adam": [("adam-numbers", {}), ("adam-amsgrad", {"amsgrad": True})],
    "AdamW": [("adam-numbers", {}), ("adam-amsgrad", {"amsgrad": True, "maximize": True})],
    "RMSprop": [("rmsprop-momentum", {}), ("rmsprop-centered-momentum", {"centered": True})],
    "Adagrad": [("adagrad-numbers", {})],
    "Adadelta": [("adadelta-numbers", {})],
    "Adamax": [("adamax", {})],
    "RAdam": [("radam", {}), ("radam-decoupled", {"decoupled_weight_decay": True})],
    "NAdam": [("nadam", {}), ("nadam-decoupled", {"decoupled_weight_decay": True})],
    "ASGD": [("asgd", {})],
    "Rprop": [("rprop", {})],
}
DERIVATIVES = [
    pytest.param(name, REGISTRY[row].hparams, flags, number, id=f"{row}-{name}-{number}")
    for name, rows in NUMBERS.items()
    for row, flags in rows
    for number in ["start", *REGISTRY[row].hparams]
    if number != "initial_accumulator_value"  # which torch's constructor takes as a number only
]


@pytest.fixture
def doubles():
    """Scalars of a state, which have the default dtype, in double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def as_arguments(numbers):
    """Pairs put together, as the classes take them."""
    numbers = dict(numbers)
    for pair, fields in PAIRS.items():
        if fields[0] in numbers:
            numbers[pair] = tuple(numbers.pop(field) for field in fields)
    return numbers


def trained(library, name, start, numbers, flags, steps=3):
    """Parameters after some steps whose graph is kept."""
    p = (start if start.requires_grad else start.clone().requires_grad_()).clone()
    optimizer = getattr(library, name)([p], **as_arguments(numbers), **flags, differentiable=True)
    target = torch.tensor([0.3, -0.2, 0.7])
    for _ in range(steps):
        x = p.clone()  # what a loss keeps must not be overwritten by the step
        loss = ((x - target).square() + 0.1 * x**4).sum()
        (p.grad,) = torch.autograd.grad(loss, p, create_graph=True)
        optimizer.step()
    return p


def test_every_differentiable_class_has_its_derivatives_checked():
    assert {n for n, row in ROWS.items() if "differentiable" in row.supported_impls} == set(NUMBERS)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("plans", [True], indirect=True)  # values without plans are the same bits
@pytest.mark.parametrize(("name", "numbers", "flags", "number"), DERIVATIVES)
def test_derivatives_through_steps(name, numbers, flags, number):
    """First and second order, by finite differences."""
    start = torch.tensor([1.0, -0.5, 0.25])
    # pairs must be both numbers or both tensors
    tensors = {key: torch.tensor(value) for key, value in numbers.items()}

    def final(x):
        if number == "start":
            return trained(optim, name, x, tensors, flags)
        return trained(optim, name, start, {**tensors, number: x}, flags)

    x = (start if number == "start" else tensors[number]).clone().requires_grad_()
    assert torch.autograd.gradcheck(final, (x,))
    assert torch.autograd.gradgradcheck(final, (x,))


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("name", NUMBERS)
def test_transforms_differentiate_by_the_rate(name):
    row, flags = NUMBERS[name][0]

    def final(rate):
        p = torch.tensor([1.0, -0.5, 0.25])
        numbers = as_arguments({**REGISTRY[row].hparams, "lr": rate})
        optimizer = getattr(optim, name)([p], **numbers, **flags, differentiable=True)
        for _ in range(3):
            x = p.clone()
            p.grad = 2 * (x - 0.3) + 0.4 * x**3
            optimizer.step()
        return p.square().sum()

    rate, eps = torch.tensor(0.1), 1e-6
    expected = (final(rate + eps) - final(rate - eps)) / (2 * eps)
    close = {"rtol": 1e-6, "atol": 1e-8}
    _, tangent = torch.func.jvp(final, (rate,), (torch.tensor(1.0),))
    torch.testing.assert_close(tangent, expected, **close)
    torch.testing.assert_close(torch.func.grad(final)(rate), expected, **close)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(rate, torch.tensor(1.0))
        tangent = torch.autograd.forward_ad.unpack_dual(final(dual)).tangent
    torch.testing.assert_close(tangent, expected, **close)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("name", NUMBERS)
def test_differentiable_steps_have_the_values_of_torch(name):
    row, flags = NUMBERS[name][0]
    start = torch.tensor([1.0, -0.5, 0.25])
    ours, theirs = (trained(lib, name, start, REGISTRY[row].hparams, flags) for lib in BOTH)
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_every_group_has_its_own_derivative(name):
    def final(*rates):
        params = [torch.tensor([1.0]).requires_grad_().clone() for _ in rates]
        groups = [{"params": [p], "lr": lr} for p, lr in zip(params, rates, strict=True)]
        optimizer = getattr(optim, name)(groups, differentiable=True)
        for _ in range(2):
            for p in params:
                loss = p.clone().square().sum()
                (p.grad,) = torch.autograd.grad(loss, p, create_graph=True)
            optimizer.step()
        return params[0] * 2 + params[1]

    rates = [torch.tensor(0.1, requires_grad=True), torch.tensor(0.2, requires_grad=True)]
    assert torch.autograd.gradcheck(final, rates)


@pytest.mark.parametrize("layout", ["dense", "strided"])
def test_gradients_after_the_first_are_dampened(layout):
    runs = []
    for library in (torch.optim, optim):
        torch.manual_seed(0)
        whole = torch.randn(4, 6, dtype=torch.float64)
        param = (whole[:, ::2] if layout == "strided" else whole).requires_grad_()
        optimizer = library.SGD([param], lr=0.1, momentum=0.9, dampening=0.5, fused=False)
        for _ in range(3):
            param.grad = torch.ones_like(param)
            optimizer.step()
        runs.append(param)
    torch.testing.assert_close(*runs, rtol=1e-12, atol=0)


def test_a_scaler_acts_where_the_kernel_cannot():
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = optim.Adam([param], lr=0.1, fused=True)
    moments = {name: torch.zeros(3) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[param].update(step=torch.zeros(()), **moments)
    for inf, expected in ((1.0, 0.0), (0.0, 1.0)):
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(inf), torch.tensor(8.0)
        param.grad = torch.full_like(param, 8.0)
        optimizer.step()
        assert optimizer.state[param]["step"] == expected
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], torch.full((3,), 0.1))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        *itertools.product(["Adagrad", "Adadelta"], ["SGD", "Rprop", "NAdam"]),
        *itertools.product(["Adam", "RAdam", "NAdam", "ASGD"], ["SGD", "Adamax", "Adagrad"]),
    ],
)
def test_a_state_dict_of_another_class_is_refused_and_changes_nothing(name, other):
    param = torch.nn.Parameter(torch.ones(2))
    options = {"momentum": 0.9} if other == "SGD" else {}
    theirs = getattr(torch.optim, other)([param], lr=0.3, **options)
    mine = getattr(optim, name)([param], lr=0.1)
    before = mine.state_dict()
    param.grad = torch.ones(2)
    theirs.step()
    with pytest.raises(ValueError, match=rf"does not belong to {name}|, but no \w+$"):
        mine.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(mine.state_dict(), before)
