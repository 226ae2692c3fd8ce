"""Bad calls of the public API: a valid call with one argument, or a leaf of it, made nonsense.

A call is judged by three questions: is its error clear, that is, does it name what is wrong; was
the nonsense taken; and has something changed although it raised. `python tests/bad_calls.py 5`
draws each of them five times and prints what is wrong.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import diffopt
from diffopt import adjoint, linear, schedules, transforms
from diffopt._tree import paths

NUMBERS = {"none", "nan", "inf", "negative", "fraction", "huge", "complex"}
TENSORS = {"integers", "bools", "shape", "dtype", "meta", "sparse"}
CONTAINERS = {"empty dict", "empty list", "empty tuple"}
CALLABLE = {"function", "class", "module"}


class Argument(NamedTuple):
    """A valid argument, the kinds of nonsense that it may be, and whether leaves are replaced.

    An error may call it by `name` instead of its own.
    """

    value: Any
    takes: Collection[str] = ()
    inside: bool = False
    name: str = ""


class Call(NamedTuple):
    """What is called, its arguments by name, and what must not change beside these."""

    function: Callable[..., Any]
    arguments: dict[str, Argument]
    watched: Any = ()
    keywords: bool = False  # whether a misspelt keyword is one of the public function


class Case(NamedTuple):
    row: str
    argument: str
    leaf: int | None
    kind: str


class Finding(NamedTuple):
    verdict: str  # "unclear", "accepted" or "changed"
    case: Case
    text: str


def like(valid: Any) -> Tensor:
    return torch.ones(valid.shape if isinstance(valid, Tensor) else ())


def other_shape(valid: Any) -> Tensor:
    return torch.ones(*like(valid).shape, 7)


def torch_optimizer(_: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)


def used_up(_: Any) -> Iterator[Any]:
    generator = (x for x in ())
    assert list(generator) == []
    return generator


def any_of(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Callable[[Any], Any]]:
    return values.map(lambda value: lambda _: value)


# What makes a bad value of a valid one; strategies are made once, which takes longer than drawing.
KINDS: dict[str, st.SearchStrategy[Callable[[Any], Any]]] = {
    "none": st.just(lambda _: None),
    "text": any_of(st.text(min_size=1, max_size=5)),
    "bytes": any_of(st.binary(max_size=5)),
    "bool": any_of(st.booleans()),
    "nan": st.just(lambda _: float("nan")),
    "inf": st.just(lambda _: float("inf")),
    "negative": any_of(st.integers(-9, -1) | st.floats(-9, -0.01)),
    "fraction": any_of(st.floats(0.01, 0.99)),
    "huge": st.just(lambda _: 10**400),
    "complex": any_of(st.complex_numbers(min_magnitude=0.1, max_magnitude=9)),
    "integers": st.just(lambda valid: torch.ones_like(like(valid), dtype=torch.int64)),
    "bools": st.just(lambda valid: torch.ones_like(like(valid), dtype=torch.bool)),
    "shape": st.just(other_shape),
    "dtype": st.just(lambda valid: torch.ones_like(like(valid), dtype=torch.float64)),
    "meta": st.just(lambda valid: torch.ones_like(like(valid), device="meta")),
    "sparse": st.just(lambda valid: torch.ones_like(like(valid)).to_sparse()),
    "class": any_of(st.sampled_from([torch.nn.Linear, diffopt.Optimizer, torch.optim.SGD, dict])),
    "torch optimizer": st.just(torch_optimizer),
    "module": st.just(lambda _: torch.nn.TransformerEncoderLayer(4, 1)),
    "function": st.just(lambda _: lambda: None),
    "empty dict": st.just(lambda _: {}),
    "empty list": st.just(lambda _: []),
    "empty tuple": st.just(lambda _: ()),
    "missing": st.just(lambda valid: dict(list(valid.items())[1:])),
    "extra": st.just(lambda valid: {**valid, "extra": next(iter(valid.values()))}),
    "renamed": st.just(lambda valid: {f"{key}_": value for key, value in valid.items()}),
    "used up": st.just(used_up),
    "object": st.just(lambda _: object()),
    "misspelt": st.just(lambda valid: valid),
}
OF_DICTS = {"missing", "extra", "renamed"}

ROWS: dict[str, Callable[[], Call]] = {}


def leaves_of(argument: Argument) -> list[int | None]:
    count = len(pytree.tree_leaves(argument.value)) if argument.inside else 0
    whole = argument.inside and pytree.tree_is_leaf(argument.value)
    return [None, *range(0 if whole else count)]


def cases(name: str) -> list[Case]:
    """The bad calls of a row."""
    call = ROWS[name]()
    return [
        Case(name, key, leaf, kind)
        for key, argument in call.arguments.items()
        for leaf in leaves_of(argument)
        for kind in KINDS
        if kind not in argument.takes and applies(kind, argument, leaf, call.keywords)
    ]


def applies(kind: str, argument: Argument, leaf: int | None, keywords: bool) -> bool:
    if kind == "misspelt":
        return keywords and leaf is None
    if kind in OF_DICTS:
        return leaf is None and isinstance(argument.value, dict) and bool(argument.value)
    return True


def snapshot(thing: Any) -> Any:
    """What can be observed of it, copied."""
    if isinstance(thing, Tensor):
        if thing.is_meta:
            return ("meta", thing.shape)
        value = thing.detach().to_dense() if thing.is_sparse else thing.detach()
        return (value.clone(), thing.requires_grad, snapshot(thing.grad) if thing.is_leaf else None)
    if isinstance(thing, torch.nn.Module):
        return (snapshot(thing.state_dict(keep_vars=True)), thing.training)
    if isinstance(thing, torch.optim.Optimizer):
        return snapshot((dict(thing.state), thing.param_groups))
    if isinstance(thing, dict):
        return {(id(k) if isinstance(k, Tensor) else k): snapshot(v) for k, v in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [snapshot(x) for x in thing]
    if not pytree.tree_is_leaf(thing):
        return [snapshot(x) for x in pytree.tree_leaves(thing)]
    return (id(thing), repr(thing) if isinstance(thing, (int, float, str)) else "")


def same(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor):
        return (
            isinstance(y, Tensor)
            and x.dtype == y.dtype
            and torch.equal(
                x.nan_to_num(nan=7e7) if x.is_floating_point() else x,
                y.nan_to_num(nan=7e7) if y.is_floating_point() else y,
            )
        )
    if isinstance(x, dict):
        return isinstance(y, dict) and x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(same, x, y))
    return x == y


def judge(case: Case, draw: Callable[[st.SearchStrategy[Any]], Any]) -> Finding | None:
    """What is wrong with the answer to this call; None where nothing is."""
    call = ROWS[case.row]()
    values = {name: argument.value for name, argument in call.arguments.items()}
    place, names = values[case.argument], [case.argument]
    names += filter(None, [call.arguments[case.argument].name])
    if case.leaf is not None:
        names += re.findall(r"\w+", paths(place, case.argument)[case.leaf])[-1:]
        leaves, spec = pytree.tree_flatten(place)
        leaves[case.leaf] = draw(KINDS[case.kind])(leaves[case.leaf])
        values[case.argument] = pytree.tree_unflatten(leaves, spec)
    elif case.kind == "misspelt":
        names += [f"{case.argument}s"]
        values[names[-1]] = values.pop(case.argument)
    else:
        values[case.argument] = draw(KINDS[case.kind])(place)
    watched = call.watched, values, torch.get_rng_state()
    before = snapshot(watched)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call.function(**values)
    except Exception as error:
        text = "\n".join([str(error), *getattr(error, "__notes__", ())])
        if not same(before, snapshot((*watched[:2], torch.get_rng_state()))):
            return Finding("changed", case, f"{type(error).__name__}: {text}")
        misspelt = case.kind == "misspelt" and case.argument in text  # Python's own error says so
        if not (misspelt or is_clear(error, text, names)):
            return Finding("unclear", case, f"{type(error).__name__}: {text}")
        return None
    return Finding("accepted", case, repr(values.get(case.argument))[:80])


def is_clear(error: Exception, text: str, names: Collection[str]) -> bool:
    """Whether an error names one of these, is brief, and was not raised by Python or torch."""
    named = any(re.search(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", text) for name in names)
    own = isinstance(error, (TypeError, ValueError, RuntimeError, KeyError))
    brief = len(str(error)) < 600 and "\n" not in str(error)
    return named and brief and own and not RAW.search(text)


RAW = re.compile(
    r"object is not|object has no|unhashable|required positional|unsupported operand|aten::"
    r"|not supported between|too large to convert|expected scalar type|INTERNAL ASSERT"
)
"""What errors say that come from the inside of Python or torch."""


def call(name: str) -> None:
    """Make the call of a row as it is."""
    call = ROWS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call.function(**{key: argument.value for key, argument in call.arguments.items()})


def row(name: str) -> Callable[[Callable[[], Call]], Callable[[], Call]]:
    def add(make: Callable[[], Call]) -> Callable[[], Call]:
        ROWS[name] = make
        return make

    return add


def plain(name: str, function: Callable[..., Any], /, **arguments: Argument) -> None:
    """A row of a function called by keywords, whose arguments nothing can change."""
    ROWS[name] = lambda: Call(function, arguments, keywords=True)


# Kinds of arguments.

OPTIMIZER = Argument(diffopt.adam())
FLAG = Argument(False, {"bool"})


def count(value: int) -> Argument:
    return Argument(value, {"huge"})


def optional(argument: Argument) -> Argument:
    return argument._replace(takes={*argument.takes, "none"})


def number(value: float, *takes: str) -> Argument:
    """A Python number >= 0."""
    return Argument(value, {"fraction", *takes})


def rate(value: Any, *takes: str) -> Argument:
    """A number or a tensor: a hyperparameter where it is used."""
    return Argument(value, {"fraction", "inf", "integers", "dtype", *takes})


def function(value: Callable[..., Any]) -> Argument:
    return Argument(value, CALLABLE)


# The contract.

FACTORIES = {
    "adadelta": {},
    "adafactor": {"eps1": FLAG},
    "adagrad": {},
    "adam": {"amsgrad": FLAG},
    "adamax": {},
    "adamw": {"amsgrad": FLAG},
    "asgd": {},
    "lbfgs": {"history_size": count(5)},
    "muon": {
        "nesterov": FLAG,
        "ns_steps": count(5),
        "adjust_lr_fn": optional(Argument("original")),
        "precision": optional(Argument(torch.float32)),
    },
    "nadam": {"decoupled_weight_decay": FLAG},
    "radam": {"decoupled_weight_decay": FLAG},
    "rmsprop": {"centered": FLAG, "momentum": FLAG},
    "rprop": {},
    "sgd": {"nesterov": FLAG, "momentum": Argument(True, {"bool"})},
    "sparse_adam": {"masked": FLAG},
}


def tensors() -> dict[str, Tensor]:
    return {"w": torch.full((2, 3), 0.5), "v": torch.full((3, 2), 0.25)}


TAKE_SPARSE = diffopt.sparse_adam(), transforms.freeze(diffopt.adam(), {"w": True, "v": False})


def grads_for(opt: Any) -> dict[str, Tensor]:
    return {k: x.to_sparse(1) if opt == diffopt.sparse_adam() else x for k, x in tensors().items()}


def contract(make: Callable[[], diffopt.Optimizer[Any, Any]], name: str) -> None:
    """The rows of an optimizer's methods."""
    tree = Argument(tensors(), inside=True)
    everything = TENSORS | CONTAINERS | OF_DICTS

    def init() -> Call:
        takes = everything
        return Call(make().init, {"params": Argument(tensors(), takes, inside=True)}, keywords=True)

    def update(method: str) -> Callable[[], Call]:
        def call() -> Call:
            opt = make()
            state = opt.init(tensors())
            sparse = {"sparse"} if opt in TAKE_SPARSE else ()
            grads = Argument(grads_for(opt), {"none", *sparse}, inside=True)
            arguments = {"params": tree._replace(value=tensors()), "grads": grads}
            arguments |= {"state": Argument(state), "hparams": Argument(opt.hparams())}
            return Call(getattr(opt, method), arguments, keywords=True)

        return call

    ROWS[f"{name}.init"] = init
    for method in ("update", "update_", "check"):
        if hasattr(make(), method):
            ROWS[f"{name}.{method}"] = update(method)


def of_leaves(make: Callable[[], Any], name: str, method: str) -> None:
    """The rows of what a state and a record of hyperparameters hold."""

    def call() -> Call:
        opt = make()
        state = opt.init(tensors())
        record = opt.hparams()
        fields = {k: v for k, v in state._asdict().items() if k != "step" and v != ()}
        takes = {"none"} & set()
        arguments = {"step": Argument(state.step, {"integers", "dtype"})}
        arguments |= {k: Argument(v, {"dtype", *takes}, inside=True) for k, v in fields.items()}
        numbers = {k: v for k, v in vars(record).items() if k not in arguments}
        arguments |= {k: rate(v, "negative", "nan") for k, v in numbers.items()}

        def run(step: Any, **values: Any) -> Any:
            mine = state._replace(step=step, **{k: values[k] for k in fields})
            hparams = opt.hparams(**{k: values[k] for k in numbers})
            return getattr(opt, method)(params, grads_for(opt), mine, hparams)

        params = tensors()
        return Call(run, arguments, params)

    ROWS[f"{name}.{method}: leaves"] = call


def records(make: Callable[[], Any], name: str) -> None:
    opt = make()
    takes = {"fraction", "inf", *TENSORS, *CONTAINERS}
    arguments = {}
    for key, value in vars(opt.hparams()).items():
        negative = set()
        for trial in (-1.0, -0.5):
            try:
                opt.hparams(**{key: trial})
                negative = {"negative", "nan"}
            except ValueError:
                pass
        arguments[key] = Argument(value, {*takes, *negative})
    plain(f"{name}.hparams", opt.hparams, **arguments)


for name, own in FACTORIES.items():
    inherited = {} if name == "lbfgs" else {"maximize": FLAG}
    if name not in ("lbfgs", "sparse_adam"):
        inherited["execution"] = Argument("auto")
    plain(name, getattr(diffopt, name), **own, **inherited)
    records(getattr(diffopt, name), name)

CONTRACTS: dict[str, Callable[[], Any]] = {
    "adam": diffopt.adam,
    "sgd": diffopt.sgd,
    "muon": diffopt.muon,
    "adafactor": diffopt.adafactor,
    "sparse_adam": diffopt.sparse_adam,
    "lbfgs": diffopt.lbfgs,
}
for name, make in CONTRACTS.items():
    contract(make, name)
    for method in ("update", "update_"):
        of_leaves(make, name, method)

COMPOSITIONS: dict[str, Callable[[], Any]] = {
    "chain": lambda: transforms.chain(transforms.clip_by_global_norm(), diffopt.adam()),
    "accumulate": lambda: transforms.accumulate(diffopt.adam(), 2),
    "ema": lambda: transforms.ema(diffopt.adam()),
    "flatten": lambda: transforms.flatten(diffopt.adam()),
    "freeze": lambda: transforms.freeze(diffopt.adam(), {"w": True, "v": False}),
    "hypergradient": lambda: transforms.hypergradient(diffopt.adam()),
    "maximize": lambda: transforms.maximize(diffopt.adam()),
    "partition": lambda: transforms.partition({"a": diffopt.adam()}, "a"),
    "precision": lambda: transforms.precision(diffopt.adam()),
    "skip_nonfinite": lambda: transforms.skip_nonfinite(diffopt.adam()),
}
for name, make in COMPOSITIONS.items():
    contract(make, f"{name}(...)")


# Compositions.

for name in ("ema", "flatten", "hypergradient", "maximize", "skip_nonfinite"):
    options = {"bias_correction": FLAG} if name == "ema" else {}
    plain(name, getattr(transforms, name), optimizer=OPTIMIZER, **options)
plain(
    "precision",
    transforms.precision,
    optimizer=OPTIMIZER,
    state_dtype=optional(Argument(torch.bfloat16)),
    master_dtype=optional(Argument(torch.float32)),
    stochastic=FLAG,
)
plain("accumulate", transforms.accumulate, optimizer=OPTIMIZER, k=count(2))
plain(
    "stateless",
    transforms.stateless,
    hparams=Argument(type(transforms.clip_by_norm().hparams())),
    function=function(lambda grads, params, hp: grads),
)


def first(composition: Callable[..., Any], method: str = "init") -> Callable[..., Any]:
    """A composition and its first use, by which what depends on params is checked."""

    def call(**arguments: Any) -> Any:
        return getattr(composition(**arguments), method)(tensors())

    return call


MASK = Argument({"w": True, "v": False}, {"bool", "function", "module"}, inside=True)
plain("freeze", first(transforms.freeze), optimizer=OPTIMIZER, frozen=MASK)
plain("masked", first(transforms.masked), part=OPTIMIZER, mask=MASK)
plain(
    "partition",
    first(transforms.partition),
    optimizers=Argument({"a": diffopt.adam(), "b": diffopt.sgd()}, {"extra"}, inside=True),
    labels=Argument({"w": "a", "v": "b"}, {"function", "module"}, inside=True, name="label"),
)
plain(
    "chain",
    lambda first, last: transforms.chain(first, last),
    first=Argument(transforms.clip_by_norm(), name="chain"),
    last=Argument(diffopt.adam(), name="chain"),
)


# Loops.


def quadratic(w: Tensor, target: Tensor) -> Tensor:
    return ((w - target) ** 2).sum()


@row("minimize")
def _minimize() -> Call:
    opt = diffopt.sgd()
    w = torch.zeros(2)

    def quadratic(w: Tensor) -> Tensor:
        return ((w - 1) ** 2).sum()

    arguments = {
        "loss": function(quadratic),
        "params": Argument({"w": w}["w"], {"dtype", "shape"}),
        "optimizer": Argument(opt),
        "hparams": Argument(opt.hparams(), {"function", "module"}),
        "steps": count(2),
        "state": optional(Argument(opt.init(w))),
        "has_aux": FLAG,
        "tol": optional(number(1e-3, "inf", "integers", "dtype")),
        "adjoint": optional(Argument(adjoint.Unrolled())),
        "callback": optional(function(lambda step, loss, params, state: None)),
    }
    return Call(diffopt.minimize, arguments, keywords=True)


def _net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(2, 1)


@row("innerloop")
def _innerloop() -> Call:
    opt, net = diffopt.sgd(), _net()
    arguments = {
        "model": Argument(net, {"module"}),
        "optimizer": Argument(opt),
        "hparams": optional(Argument(opt.hparams(), {"function", "module"})),
        "state": optional(Argument(opt.init(dict(net.named_parameters())))),
        "override": optional(Argument({"lr": 0.1}, {"empty dict", "missing"})),
        "first_order": FLAG,
        "grad_callback": optional(function(lambda grads: grads)),
        "track_graph": FLAG,
    }

    def run(**options: Any) -> Any:
        with diffopt.innerloop(**options) as (fnet, inner):
            inner.step(fnet(torch.ones(3, 2)).square().mean())

    return Call(run, arguments, net, keywords=True)


@row("InnerLoop.step")
def _inner_step() -> Call:
    opt, net = diffopt.sgd(), _net()

    def run(**options: Any) -> Any:
        with diffopt.innerloop(net, opt) as (fnet, inner):
            inner.step(fnet(torch.ones(3, 2)).square().mean(), **options)

    arguments = {
        "hparams": optional(Argument(opt.hparams(), {"function", "module"})),
        "override": optional(Argument({"lr": 0.1}, {"empty dict", "missing"})),
    }
    return Call(run, arguments, net, keywords=True)


@row("InnerLoop.step: loss")
def _inner_loss() -> Call:
    opt, net = diffopt.sgd(), _net()
    arguments = {"loss": function(lambda fnet: fnet(torch.ones(3, 2)).square().mean())}

    def run(loss: Any) -> Any:
        with diffopt.innerloop(net, opt) as (fnet, inner):
            inner.step(loss(fnet) if callable(loss) else loss)

    return Call(run, arguments, net)


@row("minimize: batches")
def _batches() -> Call:
    opt, w = diffopt.sgd(), {"w": torch.zeros(2)}
    batches = [torch.ones(2), torch.zeros(2)]

    def loss(params: Any, buffers: Any, batch: Tensor) -> Any:
        return quadratic(params["w"], batch), buffers

    arguments = {
        "batches": Argument(batches, {"dtype", "shape"}),
        "params": Argument(w, {"dtype", "shape", "extra", "renamed", "meta"}, inside=True),
        "buffers": Argument(
            {"b": torch.ones(1)}, {*TENSORS, *CONTAINERS, *OF_DICTS, *NUMBERS}, inside=True
        ),
    }

    def run(batches: Any, params: Any, buffers: Any) -> Any:
        return diffopt.minimize(
            loss, params, optimizer=opt, hparams=opt.hparams(), batches=batches, buffers=buffers
        )

    return Call(run, arguments)


CHOICE = Argument("warn")
GENERATOR = optional(Argument(torch.Generator()))
SOLVER = Argument(linear.GMRES())
HVP = Argument("reverse-over-reverse")
ADJOINTS: dict[str, dict[str, Argument]] = {
    "Checkpointed": {
        "segments": optional(count(2)),
        "levels": count(1),
        "offload": optional(Argument("cpu")),
        "hvp": HVP,
    },
    "Evolution": {
        "samples": count(2),
        "sigma": number(0.1),
        "persistent": optional(count(2)),
        "generator": GENERATOR,
        "chunk_size": count(1),
    },
    "ForwardMode": {"max_inputs": count(10)},
    "Implicit": {
        "solver": SOLVER,
        "root_tolerance": number(0.1, "inf"),
        "on_failure": CHOICE,
        "on_solve": optional(function(print)),
        "warm_start": optional(function(lambda: None)),
    },
    "PersistentEvolution": {
        "function": function(quadratic),
        "samples": count(2),
        "sigma": number(0.1),
        "generator": GENERATOR,
        "chunk_size": count(1),
    },
    "Reversible": {"bits": count(40), "hvp": HVP},
    "Truncated": {"k": count(2)},
    "smooth": {
        "function": function(quadratic),
        "samples": count(2),
        "sigma": number(0.1),
        "generator": GENERATOR,
        "chunk_size": count(1),
    },
}
for name, arguments in ADJOINTS.items():
    plain(f"adjoint.{name}", getattr(adjoint, name), **arguments)


def euler(carry: Any, args: Any, x: Any) -> tuple[Any, Any]:
    return carry * 2, x


plain(
    "adjoint.unroll",
    adjoint.unroll,
    step=function(euler),
    carry=Argument(torch.ones(2), {*KINDS} - {"misspelt"}),
    length=count(2),
    adjoint=Argument(adjoint.Unrolled()),
)
plain(
    "adjoint.unroll: xs",
    lambda xs: adjoint.unroll(euler, torch.ones(2), xs=xs),
    xs=Argument({"x": torch.ones(2, 2)}, {*TENSORS, *OF_DICTS}, inside=True),
)


# Solvers.

COMMON = {
    "rtol": optional(number(1e-3)),
    "atol": number(0.0),
    "damping": number(0.0),
    "on_failure": CHOICE,
}
KRYLOV = {"max_steps": optional(count(3)), "preconditioner": optional(function(lambda x: x))}
SOLVERS: dict[str, dict[str, Argument]] = {
    "BiCGStab": KRYLOV,
    "ConjugateGradient": KRYLOV,
    "Direct": {},
    "GMRES": {**KRYLOV, "restart": count(3)},
    "Neumann": {"k": count(3), "scale": number(1.0), "preconditioner": KRYLOV["preconditioner"]},
    "NormalCG": KRYLOV,
    "Nystrom": {"rank": count(2), "seed": count(0)},
}
for name, own in SOLVERS.items():
    arguments = {**COMMON, **own}
    if name == "Nystrom":
        arguments["damping"] = number(0.1)
    plain(f"linear.{name}", getattr(linear, name), **arguments)

plain(
    "linear.solve",
    lambda **arguments: linear.ConjugateGradient().solve(**arguments),
    operator=function(lambda x: x),
    b=Argument(torch.ones(2), {"dtype", "shape"}),
    x0=optional(Argument(torch.zeros(2), {"dtype"})),
)
IMPLICIT = {
    "solver": SOLVER,
    "symmetric": FLAG,
    "has_aux": FLAG,
    "sequential": FLAG,
    "root_tolerance": number(0.1, "inf"),
    "on_failure": CHOICE,
    "on_solve": optional(function(print)),
    "warm_start": optional(function(lambda: None)),
}
plain(
    "implicit_root",
    diffopt.implicit_root,
    residual=function(lambda x, a: x - a),
    solve=function(lambda init, a: a),
    **IMPLICIT,
)
plain(
    "implicit_fixed_point",
    diffopt.implicit_fixed_point,
    step=function(lambda x, a: a),
    solve=optional(function(lambda init, a: a)),
    **IMPLICIT,
)
plain(
    "fixed_point_iteration",
    diffopt.fixed_point_iteration,
    step=function(lambda x: x),
    rtol=optional(number(0.1)),
    atol=number(0.1),
    max_steps=count(2),
    on_failure=CHOICE,
)
plain(
    "implicit_fixed_point(...)",
    diffopt.implicit_fixed_point(lambda x: x / 2),
    init=Argument(torch.ones(2), {"dtype", "shape"}),
)


# Schedules.

ANY = Argument(0.5, {"fraction", "negative", "inf", "nan", *TENSORS})
POSITIVE = Argument(5, {"fraction", "inf", *TENSORS})
SCHEDULES: dict[str, dict[str, Argument]] = {
    "constant": {"value": ANY},
    "cosine": {"init": ANY, "steps": POSITIVE, "final": ANY},
    "exponential": {"init": ANY, "gamma": POSITIVE},
    "linear": {"init": ANY, "final": ANY, "steps": POSITIVE},
    "one_cycle": {
        "peak": ANY,
        "steps": POSITIVE,
        "pct_start": Argument(0.3, {"fraction", *TENSORS}),
        "div_factor": POSITIVE,
        "final_div_factor": POSITIVE,
        "anneal": Argument("cos"),
        "three_phase": FLAG,
    },
    "polynomial": {"init": ANY, "steps": POSITIVE, "power": POSITIVE, "final": ANY},
    "step": {"init": ANY, "gamma": POSITIVE, "every": POSITIVE},
    "warmup": {"peak": ANY, "steps": POSITIVE, "init": ANY},
    "piecewise": {"values": Argument([0.1, 0.2]), "boundaries": Argument([3])},
    "joined": {
        "schedules": Argument([schedules.constant(0.1), schedules.constant(0.2)]),
        "boundaries": Argument([3]),
    },
}
for name, arguments in SCHEDULES.items():
    plain(f"schedules.{name}", getattr(schedules, name), **arguments)


# Modules.


@row("nn.functionalize")
def _functionalize() -> Call:
    module = Argument(torch.nn.Linear(2, 1), {"module"})
    return Call(diffopt.nn.functionalize, {"module": module}, keywords=True)


@row("nn.decay_mask")
def _decay_mask() -> Call:
    module = Argument(torch.nn.Linear(2, 1), {"module"})
    return Call(diffopt.nn.decay_mask, {"module": module}, keywords=True)


@row("nn.Functional(...)")
def _functional() -> Call:
    module = torch.nn.BatchNorm1d(2)
    model = diffopt.nn.functionalize(module)
    arguments = {
        "params": Argument(dict(model.params), {"dtype"}, inside=True),
        "buffers": Argument(dict(model.buffers), TENSORS, inside=True),
    }
    return Call(lambda params, buffers: model(params, buffers, torch.ones(3, 2)), arguments, module)


# Looking at loops.

INPUTS = TENSORS | NUMBERS - {"complex"} | {"module"}


@row("inspect.explain")
def _explain() -> Call:
    lr = torch.tensor(0.1, requires_grad=True)
    outer = lr * 2
    arguments = {
        "meta_grads": Argument(
            {"lr": torch.ones(())}, TENSORS - {"shape"} | {"none", "empty tuple"}, inside=True
        ),
        "inputs": Argument({"lr": lr}, {"renamed", *INPUTS}, inside=True),
        "outer": optional(Argument(outer, {"dtype", "shape", "meta", "sparse"})),
        "trace": optional(Argument(traced())),
    }
    return Call(diffopt.inspect.explain, arguments, keywords=True)


def traced() -> diffopt.inspect.Trace:
    trace, opt = diffopt.inspect.Trace(), diffopt.sgd()
    w = torch.zeros(2, requires_grad=True)
    diffopt.minimize(
        quadratic, w, torch.ones(2), optimizer=opt, hparams=opt.hparams(), steps=1, adjoint=trace
    )
    return trace


@row("inspect.graph")
def _graph() -> Call:
    lr = torch.tensor(0.1, requires_grad=True)
    arguments = {
        "outer": Argument(lr * 2),
        "inputs": Argument({"lr": lr}, {*OF_DICTS, *INPUTS} - {"missing"}, inside=True),
    }
    return Call(diffopt.inspect.graph, arguments, keywords=True)


plain("inspect.Trace", diffopt.inspect.Trace, adjoint=Argument(adjoint.Unrolled()))


# The classes of torch.optim.

CLASSES = [
    name
    for name, cls in vars(diffopt.optim).items()
    if isinstance(cls, type) and cls.__module__.startswith("diffopt") and name != "Pure"
]
IN_GROUPS = {"negative", "nan", "fraction", "inf", "integers", "dtype", "bool"}
UNUSED = {"foreach", "fused", "capturable", "differentiable"}
OPTIONS = {
    "ns_steps": count(5),
    "adjust_lr_fn": optional(Argument("original")),
    "line_search_fn": optional(Argument("strong_wolfe")),
}
NOT_READ = {"initial_accumulator_value"}  # after the first step


def optimizer_of(name: str) -> torch.optim.Optimizer:
    params = [torch.nn.Parameter(x) for x in tensors().values()]
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(diffopt.optim, name)(params, **options)
    for param in params:
        param.grad = torch.ones_like(param)
        if name == "SparseAdam":
            param.grad = param.grad.to_sparse(1)
    optimizer.step(*closures(optimizer))
    return optimizer


def closures(optimizer: torch.optim.Optimizer) -> list[Any]:
    lbfgs = isinstance(optimizer, torch.optim.LBFGS)
    return [lambda: torch.ones(())] if lbfgs else []


def in_groups(name: str) -> Callable[[], Call]:
    def call() -> Call:
        optimizer = optimizer_of(name)
        group = optimizer.param_groups[0]
        values = {k: v for k, v in group.items() if k != "params" and k not in UNUSED}
        arguments = {}
        for key, value in values.items():
            takes = {"bool"} if isinstance(value, bool) else IN_GROUPS
            if key in NOT_READ:
                continue
            default = Argument(value, takes, inside=isinstance(value, tuple))
            arguments[key] = OPTIONS.get(key, default)
        if "eps" in arguments and name == "Adafactor":
            arguments["eps"] = Argument(group["eps"], {*IN_GROUPS, "none"}, inside=True)

        def run(**values: Any) -> None:
            group.update(values)
            optimizer.step(*closures(optimizer))

        return Call(run, arguments, (group["params"], dict(optimizer.state)))

    return call


def loading(name: str) -> Callable[[], Call]:
    def call() -> Call:
        optimizer = optimizer_of(name)
        saved = optimizer.state_dict()
        row = {f"state_{k}": v for k, v in saved["state"][0].items()}
        numbers = {"integers", "dtype", "fraction", "negative", "inf", "nan"}
        arguments: dict[str, Argument] = {
            "state_dict": Argument(saved, {"extra"}),
            "param_groups": Argument(saved["param_groups"], name="parameter groups"),
            "params": Argument(saved["param_groups"][0]["params"], name="parameters"),
        }
        for key, value in row.items():
            scalar = key[6:] in optimizer.scalar_state
            mine = numbers if scalar else {"dtype"}
            if key == "state_momentum_buffer":
                mine = {"dtype", "none"}  # as in torch, before the first step
            if key == "state_step":
                mine = {"integers", "dtype"}
            if isinstance(value, Tensor) or scalar:
                arguments[key] = Argument(value, mine, name=key[6:])

        def run(state_dict: Any, param_groups: Any, params: Any, **row: Any) -> None:
            if state_dict is saved:
                first = {**saved["state"][0], **{k[6:]: v for k, v in row.items()}}
                state = {**saved["state"], 0: first}
                groups = param_groups
                if groups is saved["param_groups"]:
                    groups = [{**groups[0], "params": params}]
                state_dict = {"state": state, "param_groups": groups}
            optimizer.load_state_dict(state_dict)

        return Call(run, arguments, (optimizer, optimizer.param_groups[0]["params"]))

    return call


def in_state(name: str) -> Callable[[], Call]:
    def call() -> Call:
        optimizer = optimizer_of(name)
        params = optimizer.param_groups[0]["params"]
        row = optimizer.state[params[1]]
        takes = {"dtype", "none"} if name in ("SGD", "Muon") else {"dtype"}
        arguments = {key: Argument(value, takes) for key, value in row.items()}
        for key in arguments.keys() & {*optimizer.scalar_state}:
            takes = {"integers", "dtype", "fraction", "negative", "inf", "nan", "bool"}
            arguments[key] = Argument(row[key], takes, name=key)

        def run(**values: Any) -> None:
            optimizer.state[params[1]] = values
            optimizer.step()

        return Call(run, arguments, (params, dict(optimizer.state[params[0]])))

    return call


def stepping(name: str) -> Callable[[], Call]:
    def call() -> Call:
        optimizer = optimizer_of(name)
        closure = optional(function(lambda: torch.ones(())))
        if name == "LBFGS":
            closure = function(lambda: torch.ones(()))
        return Call(optimizer.step, {"closure": closure}, optimizer, keywords=True)

    return call


for name in CLASSES:
    ROWS[f"optim.{name}.step"] = in_groups(name)
    ROWS[f"optim.{name}.step: closure"] = stepping(name)
    if name != "LBFGS":
        ROWS[f"optim.{name}.step: state"] = in_state(name)
    if name != "LBFGS":
        ROWS[f"optim.{name}.load_state_dict"] = loading(name)


def of_groups(opt: diffopt.Optimizer[Any, Any]) -> Callable[[], Call]:
    """The steps of what `from_pure` makes."""

    def call() -> Call:
        params = [torch.nn.Parameter(x) for x in tensors().values()]
        optimizer = diffopt.optim.from_pure(opt, params, lr=0.1)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        group = optimizer.param_groups[0]

        def run(**values: Any) -> None:
            group.update(values)
            optimizer.step()

        trees = {*CONTAINERS, "shape"}  # which a hyperparameter of a composition may be
        takes = IN_GROUPS if opt == diffopt.adam() else IN_GROUPS | trees
        arguments = {
            key: Argument(value, takes, inside=isinstance(value, tuple))
            for key, value in group.items()
            if key != "params"
        }
        return Call(run, arguments, (params, dict(optimizer.state)))

    return call


ROWS["optim.from_pure(adam).step"] = of_groups(diffopt.adam())
ROWS["optim.from_pure(ema).step"] = of_groups(transforms.ema(diffopt.adam()))
ROWS["optim.from_pure(lbfgs).step"] = of_groups(diffopt.lbfgs())


@row("optim.from_pure")
def _from_pure() -> Call:
    params = [torch.nn.Parameter(x) for x in tensors().values()]
    arguments = {
        "optimizer": OPTIMIZER,
        "params": Argument(params, {"module"}, name="parameter"),
        "lr": rate(0.1, "shape", "dtype", "sparse", "meta", "bools", *CONTAINERS),
        "beta1": rate(0.9, "shape", "dtype", "sparse", "meta", "bools", *CONTAINERS),
    }
    arguments["beta1"] = arguments["beta1"]._replace(takes={*arguments["beta1"].takes} - {"inf"})
    return Call(diffopt.optim.from_pure, arguments, keywords=True)


plain(
    "optim.to_pure",
    diffopt.optim.to_pure,
    optimizer=Argument(torch_optimizer(None), {"torch optimizer"}),
)


# Rules of one's own, and the kit.


class State(NamedTuple):
    step: Any


@diffopt.rules.hparams
class Rates:
    lr: float = diffopt.rules.number(0.1, ge=0)


plain(
    "rules.leafwise",
    diffopt.rules.leafwise,
    state=Argument(State),
    hparams=Argument(Rates),
    init=function(lambda p, step: State(step)),
    rule=function(lambda p, g, s, hp, c: (p, s)),
    scalars=optional(function(lambda t, hp: None)),
    initial=optional(function(lambda hp: {})),
    maximize=FLAG,
    native=optional(function(lambda *_: False)),
    elementwise=FLAG,
    batchable=FLAG,
    shapes=optional(function(lambda shape: ())),
    refuse=optional(function(lambda p: None)),
    stackable=FLAG,
    execution=Argument("auto"),
)
BOUND = optional(number(0.0, "negative", "inf", "nan", *TENSORS))
plain(
    "rules.number",
    diffopt.rules.number,
    default=number(0.1, "negative", "inf", "nan", *CONTAINERS, *TENSORS),
    ge=BOUND,
    gt=BOUND,
    le=BOUND,
    lt=BOUND,
    per_parameter=FLAG,
    per_weight=FLAG,
)


@row("rules.hparams")
def _hparams() -> Call:
    fields = {"__annotations__": {"lr": float}, "lr": diffopt.rules.number(0.1)}
    return Call(diffopt.rules.hparams, {"cls": Argument(type("Made", (), fields))}, keywords=True)


plain("rules.zeros_like", diffopt.rules.zeros_like, param=Argument(torch.ones(2), TENSORS))


@row("testing.check")
def _check() -> Call:
    from diffopt import testing

    arguments = {
        "optimizer": Argument(diffopt.sgd()),
        "hparams": optional(
            Argument({"lr": 0.1}, {"empty dict", "empty tuple", "missing"}, name="hyperparameter")
        ),
        "reference": optional(function(lambda tensors: None)),
        "skip": Argument(["parity"], {*CONTAINERS, "used up"}),
        "shapes": Argument([(2,), (1,)]),
        "dtypes": Argument([torch.float64]),
        "backend": Argument("aot_eager", {"text", *CALLABLE}),
        "elementwise": FLAG,
        "frozen": optional(function(lambda params: params)),
    }
    return Call(testing.check, arguments, keywords=True)


def findings_of(row: str, rounds: int) -> list[Finding]:
    """What is wrong with the answers to the bad calls of a row."""
    found: list[Finding] = []
    chosen = cases(row)

    @hypothesis.settings(
        max_examples=rounds,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(st.data())
    def run(data: st.DataObject) -> None:
        found.extend(filter(None, (judge(case, data.draw) for case in chosen)))

    run()
    return found


def report(pattern: str, rounds: int) -> None:
    """Print what is wrong, place by place."""
    findings = [f for name in ROWS if re.search(pattern, name) for f in findings_of(name, rounds)]
    places: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        case = finding.case
        places.setdefault((finding.verdict, case.row, case.argument), []).append(finding)
    for (verdict, name, argument), mine in places.items():
        kinds = sorted({finding.case.kind for finding in mine})
        print(f"{len(mine):4} {verdict:8} {name} {argument}: {', '.join(kinds)}")
        print(f"         {mine[0].text[:150]!r}")
    calls = rounds * sum(len(cases(name)) for name in ROWS if re.search(pattern, name))
    print(calls, "calls", dict(Counter(f.verdict for f in findings)), len(places), "places")


if __name__ == "__main__":
    report(sys.argv[2] if len(sys.argv) > 2 else "", int(sys.argv[1]))
