"""Optimizers are values: what they say of themselves, equality, and how they travel."""

import concurrent.futures
import copy
import dataclasses
import functools
import inspect
import multiprocessing
import pickle
import re
from typing import Any, Generic, NamedTuple, TypeVar

import pytest
import torch

import diffopt
from diffopt import linear, transforms
from diffopt.rules import Leafwise, hparams, leafwise, number, zeros_like
from diffopt.schedules import Formula
from diffopt.transforms import clip_by_norm, freeze, masked, partition

FACTORIES = {
    "sgd": {"nesterov": True},
    "adam": {"amsgrad": True},
    "adamw": {"amsgrad": True},
    "adamax": {"maximize": True},
    "nadam": {"decoupled_weight_decay": True},
    "radam": {"decoupled_weight_decay": True},
    "rmsprop": {"centered": True},
    "adagrad": {"maximize": True},
    "adadelta": {"maximize": True},
    "asgd": {"maximize": True},
    "rprop": {"maximize": True},
    "adafactor": {"eps1": True},
    "muon": {"precision": None},
    "lbfgs": {"history_size": 3},
    "sparse_adam": {"maximize": True},
}
T = TypeVar("T")
every_factory = pytest.mark.parametrize("name", FACTORIES)


class LionState(NamedTuple):
    step: Any
    exp_avg: Any


@hparams
class LionHParams:
    lr: float = number(1e-4, ge=0)
    beta1: float = number(0.9, ge=0, lt=1)
    beta2: float = number(0.99, ge=0, lt=1)


class Lion(Leafwise[LionState, LionHParams]):
    State = LionState
    hparams = LionHParams
    elementwise = True

    def begin(self, p, step):
        return LionState(step, zeros_like(p))

    def rule(self, p, g, s, hp, c):
        direction = (hp.beta1 * s.exp_avg + (1 - hp.beta1) * g).sign()
        average = hp.beta2 * s.exp_avg + (1 - hp.beta2) * g
        return p - hp.lr * direction, LionState(s.step, average)


class Flagged(Lion):
    flag: object = ()


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class FlaggedByField(Lion):
    flag: tuple[int, ...] = dataclasses.field(default_factory=tuple, metadata={"unit": "steps"})


def begin(p, step):
    return LionState(step, zeros_like(p))


def lion(p, g, s, hp, _):
    return Lion().rule(p, g, s, hp, None)


def step_of(opt):
    """What one update makes of ones, where the optimizer has travelled to."""
    params = [torch.ones(2, 2, dtype=torch.float64)]
    new, _ = opt.update(params, params, opt.init(params), opt.hparams())
    return new


@pytest.mark.parametrize(
    ("opt", "text"),
    [
        (diffopt.adam(), "Adam(amsgrad=False, maximize=False)"),
        (diffopt.adamw(maximize=True), "AdamW(amsgrad=False, maximize=True)"),
        (
            diffopt.sgd(execution="leaf"),
            "SGD(nesterov=False, momentum=True, maximize=False, execution='leaf')",
        ),
        (Lion(), "Lion(maximize=False)"),
        (
            leafwise(LionState, LionHParams, begin, lion),
            "leafwise(LionState, LionHParams, begin, lion, maximize=False)",
        ),
    ],
    ids=str,
)
def test_the_repr_is_one_line_of_flags(opt, text):
    assert repr(opt) == text


class Callable:
    """A rule that is an object."""

    def __call__(self, p, g, s, hp, c):
        return p - hp.lr * g, s


@pytest.mark.parametrize(
    ("rule", "name"),
    [(functools.partial(lion), "lion"), (Callable(), "<Callable>"), (Lion().rule, "rule")],
)
def test_any_kind_of_function_has_a_name_in_the_repr(rule, name):
    opt = leafwise(LionState, LionHParams, functools.partial(begin), rule)
    assert repr(opt) == f"leafwise(LionState, LionHParams, begin, {name}, maximize=False)"
    assert " at 0x" not in repr(masked(opt, functools.partial(dict.fromkeys, value=Callable())))


class Ramp(Formula):
    """A schedule of a user's."""

    slope: float
    pieces: Any = None

    def at(self, step):
        return self.slope * step

    @functools.cached_property
    def doubled(self):
        return Ramp(2 * self.slope)


@dataclasses.dataclass(frozen=True)
class Decorated(Ramp):
    shift: float = 1.0


class Own(Formula):
    def __init__(self, *slopes):
        object.__setattr__(self, "slopes", slopes)

    def at(self, step):
        return sum(self.slopes) * step


class Inherited(Own):
    pass


VALUES = {
    "fields": lambda: Ramp(0.5, pieces=[1, {2: (3,)}]),
    "a tensor": lambda: Ramp(0.5, TENSOR),
    "decorated": lambda: Decorated(0.5, TENSOR, shift=2.0),
    "a constructor": lambda: Own(0.5, 1.0),
    "an inherited constructor": lambda: Inherited(0.5, 1.0),
    "a partial function": lambda: masked(diffopt.sgd(), functools.partial(begin, step=[1])),
}
TENSOR = torch.ones(2)


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
def test_classes_of_values_may_be_extended_and_decorated(make):
    value, twin = make(), make()
    assert value == twin
    assert hash(value) == hash(twin)
    assert value == copy.copy(value)
    assert "\n" not in repr(value)
    assert " at 0x" not in repr(value)
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.slope = 1.0


def test_what_a_value_has_cached_is_no_part_of_it():
    value, twin = Ramp(0.5), Ramp(0.5)
    before = hash(value), repr(value)
    assert value.doubled == Ramp(1.0)
    assert value == twin
    assert (hash(value), repr(value)) == before


def test_trees_that_a_user_changes_later_stay_as_they_were_given():
    tree, labels, params = {"a": True, "b": [False]}, {"a": "x", "b": ["y"]}, {"x": diffopt.sgd()}
    params["y"] = diffopt.adam()
    makers = [
        lambda: masked(diffopt.sgd(), tree),
        lambda: masked(clip_by_norm(), tree),
        lambda: freeze(diffopt.sgd(), tree),
        lambda: partition(params, labels),
    ]
    values, twins = [make() for make in makers], [make() for make in makers]
    copies = copy.deepcopy(values)
    tree["b"][0], labels["b"][0], params["y"] = True, "x", diffopt.sgd()
    assert values == twins == copies


def test_a_flag_that_cannot_be_hashed_is_named():
    @dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
    class Tabled(Lion):
        table: Any = ()

    with pytest.raises(TypeError, match=r"table is \(\[1\],\) .* has no hash"):
        Tabled(table=([1],))


@every_factory
def test_equal_flags_make_equal_optimizers(name):
    make, flags = getattr(diffopt, name), FACTORIES[name]
    assert make() == make()
    assert hash(make()) == hash(make())
    assert make(**flags) != make()
    assert len({make(), make(), make(**flags)}) == 2
    assert all(getattr(make(**flags), flag) == value for flag, value in flags.items())


@every_factory
def test_copies_are_equal_and_step_alike(name):
    opt = getattr(diffopt, name)(**FACTORIES[name])
    for twin in (pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt), copy.copy(opt)):
        assert twin == opt
        if name != "sparse_adam":  # which wants sparse gradients
            torch.testing.assert_close(step_of(twin), step_of(opt))


@every_factory
def test_flags_cannot_be_set_afterwards(name):
    opt = getattr(diffopt, name)()
    with pytest.raises(dataclasses.FrozenInstanceError):
        opt.execution = "leaf"


class Averaging(Lion):
    begin = Leafwise.begin


def test_buffers_start_at_zero_unless_begin_says_otherwise():
    params = [torch.ones(3, 2, dtype=torch.bfloat16), torch.ones(())]
    state = Averaging().init(params)
    assert state.step == 0
    torch.testing.assert_close(state.exp_avg, [torch.zeros(3, 2), torch.zeros(())])
    torch.testing.assert_close(step_of(Averaging()), step_of(Lion()))


def test_functions_at_the_top_of_a_module_travel():
    opt = leafwise(LionState, LionHParams, begin, lion, elementwise=True)
    twin = pickle.loads(pickle.dumps(opt))
    assert twin == opt
    torch.testing.assert_close(step_of(twin), step_of(Lion()))


def test_optimizers_go_to_worker_processes_and_threads():
    opts = [diffopt.adam(amsgrad=True), Lion(), diffopt.muon(precision=None)]
    expected = [step_of(opt) for opt in opts]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        torch.testing.assert_close(list(threads.map(step_of, opts)), expected)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as processes:
        torch.testing.assert_close(list(processes.map(step_of, opts)), expected)


def test_an_optimizer_is_a_constant_of_a_compiled_function():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend, fullgraph=True)
    def stepped(opt, p, state, hp):
        return opt.update(p, p, state, hp)

    p = torch.ones(2)
    for opt in (diffopt.adam(), diffopt.adam()):  # equal values share a graph
        new, _ = stepped(opt, p, opt.init(p), opt.hparams(lr=0.1))
        torch.testing.assert_close(new, torch.full((2,), 0.9))
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_class_of_ones_own_runs_in_every_way(dtype):
    torch.manual_seed(0)
    start = {"a": torch.randn(3, 2, dtype=dtype), "b": torch.randn(4, dtype=dtype)}
    results = []
    for execution in ("auto", "leaf", "foreach"):
        opt = Lion(execution=execution)
        params, state = start, opt.init(start)
        mine = {name: p.clone() for name, p in start.items()}
        my_state = opt.init(mine)
        for _ in range(3):
            params, state = opt.update(params, params, state, opt.hparams(lr=0.1))
            opt.update_(mine, mine, my_state, opt.hparams(lr=0.1))
        results += [(params, state), (mine, my_state)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_a_class_of_ones_own_may_be_generic():
    class Tagged(Lion, Generic[T]):
        pass

    assert Tagged.__parameters__ == (T,)
    assert isinstance(Tagged[int](), Lion)


@pytest.mark.parametrize("join", [torch.stack, lambda xs: torch.cat([x.unsqueeze(0) for x in xs])])
@pytest.mark.parametrize("execution", ["auto", "leaf", "foreach"])
@pytest.mark.parametrize("elementwise", [True, False])
def test_a_rule_may_join_tensors(join, execution, elementwise):
    def rule(p, g, s, hp, _):
        return p - hp.lr * join([g, s.exp_avg]).sum(0), LionState(s.step, g * 1)

    opt = leafwise(
        LionState, LionHParams, begin, rule, elementwise=elementwise, execution=execution
    )
    params = [torch.ones(3), torch.ones(2, 2)]
    grads, state, hp = [torch.full_like(p, 2) for p in params], opt.init(params), opt.hparams(lr=1)
    for _ in range(2):
        opt.update_(params, grads, state, hp)
    torch.testing.assert_close(params, [torch.full_like(p, 1 - 2 - 4) for p in params])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"State": None}, "State is None, not a NamedTuple class whose first field is step"),
        ({"State": dict}, "State is <class 'dict'> .*, not a NamedTuple class"),
        ({"hparams": None}, "hparams is None, not a class made by diffopt.rules.hparams"),
        ({"hparams": dict}, "hparams is <class 'dict'>, not a class made by"),
        ({"rule": lambda *_: None}, r"the rule must return \(new_param, new_state\), not None"),
        ({"rule": lambda _, p, *__: p}, r"the rule must return .*, not a tensor of shape"),
        (
            {"rule": lambda _, p, g, s, *__: (p, (s.step,))},
            "the rule returned 1 fields of its state, but it has 2",
        ),
    ],
)
def test_mistakes_in_a_class_of_ones_own_are_explained(members, message):
    opt_class = dataclasses.dataclass(frozen=True, kw_only=True, repr=False)(
        type("Mine", (Lion,), members)
    )
    with pytest.raises(TypeError, match=message):
        step_of(opt_class())


def test_a_rule_of_matrices_is_only_shown_matrices():
    def begin(p, step):
        return LionState(step, p.new_zeros(p.shape[1], p.shape[1]))

    def rule(p, g, s, hp, _):
        gram = s.exp_avg + g.mT @ g
        return p - hp.lr * g @ gram, LionState(s.step, gram)

    opt = leafwise(
        LionState,
        LionHParams,
        begin,
        rule,
        batchable=False,
        shapes=lambda shape: ((shape[1], shape[1]),),
        refuse=lambda p: None if p.dim() == 2 else "is not a matrix",
    )
    w, g = torch.ones(3, 2), torch.full((3, 2), 2.0)
    new, state = opt.update(w, g, opt.init(w), opt.hparams(lr=0.1))
    torch.testing.assert_close(state.exp_avg, torch.full((2, 2), 12.0))
    torch.testing.assert_close(new, torch.full((3, 2), 1 - 0.1 * 48))
    with pytest.raises(ValueError, match=r"params\['v'\] is not a matrix"):
        opt.init({"v": torch.ones(3)})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: diffopt.adam(amsgrad=1), TypeError, "amsgrad is 1, not a bool"),
        (lambda: diffopt.adam(execution="fast"), ValueError, "execution is 'fast', but must be"),
        (
            lambda: diffopt.adam().hparams(0.1),
            TypeError,
            "takes only keyword arguments, such as lr",
        ),
        (lambda: diffopt.adam().hparams(lrr=0.1), TypeError, "'lrr': did you mean 'lr'?"),
        (lambda: diffopt.adam().hparams(betas=(0, 0)), TypeError, "pass beta1 and beta2"),
        (lambda: diffopt.muon().hparams(ns_coefficients=0), TypeError, "pass ns_a and ns_b and"),
        (lambda: diffopt.sgd().hparams(q=1), TypeError, "no hyperparameter 'q': pass lr, "),
        (lambda: diffopt.sgd(0.1), TypeError, r"go to sgd\(\).hparams\(...\)"),
        (
            lambda: diffopt.adam(amsgard=True),
            TypeError,
            "no argument amsgard, only maximize, execution, amsgrad: did you mean 'amsgrad'?",
        ),
        (lambda: Lion(lr=-1), TypeError, r"go to Lion\(\).hparams\(lr=-1\)"),
        (
            lambda: Lion([TENSOR]),
            TypeError,
            r"use diffopt.optim.from_pure\(Lion\(\), params, ...\)",
        ),
        (lambda: FlaggedByField(falg=()), TypeError, "did you mean 'flag'?"),
        (
            lambda: clip_by_norm(0.1),
            TypeError,
            r"takes no positional arguments: hyperparameters go to clip_by_norm\(\)",
        ),
        (lambda: diffopt.adam(betas=(0, 0)), TypeError, "pass beta1 and beta2"),
        (lambda: diffopt.lbfgs(line_search_fn="strong_wolfe"), TypeError, "the method `search`"),
        (lambda: diffopt.lbfgs(max_iter=3), TypeError, "an update is one iteration"),
        *(
            (lambda kind=kind: kind(maxiter=3), TypeError, "maxiter, .*: did you mean 'max_steps'?")
            for kind in (linear.ConjugateGradient, linear.NormalCG, linear.GMRES, linear.BiCGStab)
        ),
        (lambda: linear.Direct(tol=1e-3), TypeError, "no argument tol, .*: did you mean 'rtol'?"),
        (lambda: linear.Neumann(3, step=1), TypeError, "no argument step, only rtol"),
        (
            lambda: transforms.chain(diffopt.sgd(), lr=torch.ones(())),
            TypeError,
            r"lr: hyperparameters go to chain\(...\).hparams\(lr=...\)",
        ),
        (
            lambda: transforms.ema(diffopt.sgd(), decay=0.9),
            TypeError,
            r"decay: hyperparameters go to ema\(...\).hparams\(decay=0.9\)",
        ),
        (lambda: Flagged(flag=[1]), TypeError, r"flag is \[1\] of type list, which has no hash"),
    ],
)
def test_a_wrong_argument_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@every_factory
def test_a_factory_says_where_hyperparameters_go(name):
    call = re.escape(f"lr: hyperparameters go to {name}().hparams(lr=0.1)")
    with pytest.raises(TypeError, match=call):
        getattr(diffopt, name)(**FACTORIES[name], lr=0.1)


@every_factory
@pytest.mark.parametrize("numbers", [{}, {"lr": 0.1}])
def test_a_factory_says_where_params_go(name, numbers):
    make = getattr(diffopt, name)
    message = rf"takes no params here: use (diffopt.optim.\w+)\(params, ...\), or {name}\(\).init"
    with pytest.raises(TypeError, match=message) as caught:
        make([TENSOR], **numbers)
    owner = re.search(message, str(caught.value))[1].rpartition(".")[2]
    assert owner.lower() == name.replace("_", "")
    assert hasattr(diffopt.optim, owner)


@every_factory
def test_flags_are_keywords_of_the_signature(name):
    parameters = inspect.signature(getattr(diffopt, name)).parameters
    assert FACTORIES[name].keys() <= parameters.keys()
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters.values())


def test_a_class_of_ones_own_may_be_decorated():
    opt = FlaggedByField()
    assert opt == FlaggedByField(flag=()) != FlaggedByField(flag=(1,))
    assert dataclasses.replace(opt, flag=(2,)).flag == (2,)
    assert [f.metadata for f in dataclasses.fields(opt)][-1] == {"unit": "steps"}
    assert repr(opt) == "FlaggedByField(flag=(), maximize=False)"
    torch.testing.assert_close(step_of(opt), step_of(Lion()))


def test_optimizers_are_made_inside_a_compiled_function():
    @torch.compile(backend="eager", fullgraph=True)
    def stepped(p):
        made = [
            diffopt.adam(amsgrad=True),
            diffopt.muon(precision=None),
            diffopt.lbfgs(history_size=2),
            transforms.chain(clip_by_norm(), diffopt.sgd(nesterov=True)),
            Flagged(flag=(1,)),
        ]
        return [opt.update(p, p, opt.init(p), opt.hparams(lr=0.1))[0] for opt in made]

    first, *_ = stepped(torch.ones(2, 2))
    torch.testing.assert_close(first, torch.full((2, 2), 0.9))


# State of another dtype than its parameter's


@pytest.mark.parametrize("name", ["adam", "nadam", "adafactor", "muon", "sgd", "rprop"])
def test_narrow_state_is_widened(name):
    opt = getattr(diffopt, name)()
    hp = opt.hparams(lr=0.1)
    p, g = torch.full((2, 2), 1.5, dtype=torch.float64), torch.eye(2, dtype=torch.float64) + 0.5
    state = opt.init(p.float())
    new, mine = p, state
    for _ in range(2):
        new, mine = opt.update(new, g, mine, hp)
    assert {x.dtype for x in mine[1:] if isinstance(x, torch.Tensor)} == {torch.float64}
    expected, theirs = p, opt.init(p)
    for _ in range(2):
        expected, theirs = opt.update(expected, g, theirs, hp)
    torch.testing.assert_close(new, expected, rtol=1e-6, atol=0)
    in_place = p.clone()
    for _ in range(2):
        opt.update_(in_place, g, state, hp)  # rounded to float32 after each step
    torch.testing.assert_close(in_place, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_average_in_half_precision_does_not_stand_still(dtype):
    opt, p = diffopt.adam(), {"w": torch.ones(2)}
    state = opt.init(p)
    coarse = state._replace(exp_avg_sq={"w": torch.full((2,), 0.5, dtype=dtype)})
    zero, hp = {"w": torch.zeros(2)}, opt.hparams()
    message = r"state.exp_avg_sq\['w'\] has dtype .*, too coarse for params\['w'\]"
    with pytest.raises(ValueError, match=message):
        opt.update_(p, zero, coarse, hp)
    for _ in range(100):
        p, coarse = opt.update(p, zero, coarse, hp)
    torch.testing.assert_close(coarse.exp_avg_sq["w"], torch.full((2,), 0.5 * 0.999**100))


def test_wide_state_is_kept():
    opt, p = diffopt.adam(), torch.ones(2)
    state = opt.init(p.double())
    new, mine = opt.update(p, p, state, opt.hparams(lr=0.1))
    assert (new.dtype, mine.exp_avg.dtype) == (torch.float32, torch.float64)
    opt.update_(p, p.clone(), state, opt.hparams(lr=0.1))
    torch.testing.assert_close((p, state), (new, mine))


def test_inference_tensors_are_refused_before_anything_moves():
    opt = diffopt.sgd()
    with torch.inference_mode():
        frozen = torch.ones(2)
    params = {"a": torch.ones(2), "b": frozen}
    state, hp = opt.init(params), opt.hparams(lr=1.0)
    with pytest.raises(ValueError, match=r"params\['b'\] is an inference tensor"):
        opt.update_(params, {"a": torch.ones(2), "b": torch.ones(2)}, state, hp)
    assert torch.equal(params["a"], torch.ones(2))
    assert state.step == 0
    with torch.inference_mode():
        opt.update_(params, {"a": torch.ones(2), "b": torch.ones(2)}, state, hp)
    assert torch.equal(params["b"], torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_buffer_of_another_kind_is_refused(dtype):
    opt, params = diffopt.adam(), {"w": torch.ones(2)}
    state = opt.init(params)._replace(exp_avg={"w": torch.ones(2, dtype=dtype)})
    message = r"state.exp_avg\['w'\] has dtype .* must be floating-point"
    for update in (opt.update, opt.update_):
        with pytest.raises(ValueError, match=message):
            update(params, {"w": torch.ones(2)}, state, opt.hparams())


def test_a_rule_may_count_in_integers():
    def begin(p, step):
        return LionState(step, torch.zeros_like(p, dtype=torch.int64))

    def rule(p, g, s, hp, _):
        count = s.exp_avg + (g != 0)
        return p - hp.lr * g / count.clamp(min=1), LionState(s.step, count)

    opt, p = leafwise(LionState, LionHParams, begin, rule), torch.ones(2)
    state, g = opt.init(p), torch.tensor([0.0, 1.0])
    for _ in range(2):
        p, state = opt.update(p, g, state, opt.hparams(lr=0.1))
    opt.update_(p, g, state, opt.hparams(lr=0.1))
    assert state.exp_avg.tolist() == [0, 3]
    torch.testing.assert_close(p, torch.tensor([1.0, 1 - 0.1 - 0.05 - 0.1 / 3]))


class Started(NamedTuple):
    step: Any
    exp_avg: Any


@hparams
class StartedHParams:
    lr: float = number(0.1, ge=0)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Unfinished(Leafwise[Started, StartedHParams]):
    State = Started
    hparams = StartedHParams
    returned: Any = None

    def begin(self, p, step):
        return self.returned

    def rule(self, p, g, s, hp, c):
        return p - hp.lr * g, s


def step_of_a_class(opt, p):
    param = torch.nn.Parameter(p)
    param.grad = p
    diffopt.optim.from_pure(opt, [param], lr=0.1).step()


@pytest.mark.parametrize(
    "call",
    [
        lambda opt, p: opt.init(p),
        lambda opt, p: opt.update(p, p, Started(torch.zeros(()), p), opt.hparams()),
        step_of_a_class,
    ],
    ids=["init", "update", "class"],
)
@pytest.mark.parametrize("returned", [None, (0, 1), 1.0], ids=str)
def test_a_begin_that_returns_no_state_is_named(returned, call):
    with pytest.raises(TypeError, match=r"Unfinished\.begin must return a Started, not"):
        call(Unfinished(returned=returned), torch.zeros(2))


@pytest.mark.parametrize("shape", [(2, 8), (1, 2), ()])
def test_a_begin_that_returns_a_buffer_of_another_shape_is_named(shape):
    opt = Unfinished(returned=Started(None, torch.zeros(shape)))
    with pytest.raises(ValueError, match=r"begin returned exp_avg of shape \(.* define shapes\(\)"):
        opt.init(torch.zeros(2))


def test_an_init_of_leafwise_that_returns_no_state_is_named():
    opt = leafwise(Started, StartedHParams, lambda p, step: None, lambda p, g, s, hp, c: (p, s))
    with pytest.raises(TypeError, match=r"^init must return a Started, not None"):
        opt.init(torch.zeros(2))
