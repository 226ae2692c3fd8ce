"""Leafwise: an optimizer that applies a rule, the mathematics of one tensor, to every leaf."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._arguments import check_choice
from diffopt._modes import exact
from diffopt._rule import checks, fields, hyper, parts, prints, ways
from diffopt._rule.repeated import Repeated
from diffopt._rule.rule import (
    EXECUTIONS,
    WORKING_DTYPE,
    Execution,
    H,
    Rule,
    S,
    begun,
    is_ours,
    unused,
    zero_for,
)
from diffopt._rule.work import Work, gather
from diffopt._tree import Tree
from diffopt._value import Flags
from diffopt.optimizer import Optimizer, Write


class Leafwise(Flags, Rule[S, H], Optimizer[S, H]):
    """An optimizer that updates each tensor of a tree by the same rule.

    A value: two with the same flags are equal. A subclass is a frozen dataclass: annotate its
    flags, mostly bools, and implement the methods of `Rule`. `leafwise` makes one from functions.
    Parameters in half precision are updated in float32 arithmetic, complex ones as pairs of reals.

    Attributes:
        maximize: ascend instead of descend.
        execution: "leaf": tensor by tensor; "foreach": horizontally fused kernels, which are not
            differentiable; "auto": the fastest way that applies, see `diffopt._rule.ways`, whose
            results may differ in the last bits; in `update` where no derivative is needed.
            "compiled": `update_` of an elementwise rule runs as one kernel made by `torch.compile`,
            which takes seconds at the first step, and is the same for all shapes; 100 small tensors
            or more take torch's fused kernel, if it has one. That of other rules, such as Adafactor
            and Muon, runs as by "auto". `update` runs as "leaf", to be compiled together with the
            code around it.

    Raises:
        TypeError: a flag is not a bool, or has no hash.
        ValueError: `execution` or another flag has a value that is not allowed.

    Examples:
        >>> from typing import Any, NamedTuple
        >>> import torch
        >>> from diffopt.rules import Hyperparameter, Leafwise, hparams, number
        >>> class SignState(NamedTuple):
        ...     step: Any
        >>> @hparams
        ... class SignHParams:
        ...     lr: Hyperparameter = number(default=1e-3, ge=0)
        >>> class SignDescent(Leafwise[SignState, SignHParams]):
        ...     State = SignState
        ...     hparams = SignHParams
        ...     def rule(self, p, g, s, hp, c):
        ...         return p - hp.lr * g.sign(), s
        >>> opt, p, g = SignDescent(), torch.zeros(2), torch.tensor([3.0, -2.0])
        >>> opt.update(p, g, opt.init(p), opt.hparams(lr=0.5))[0]
        tensor([-0.5000,  0.5000])
        >>> SignDescent(maximize=True)
        SignDescent(maximize=True)
    """

    maximize: bool = False
    execution: Execution = "auto"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # Generic's, which notes the type variables
        if isinstance(vars(cls).get("State"), type):  # checkpoints load with weights_only=True
            torch.serialization.add_safe_globals([cls.State])

    @property
    def steps_by_rule(self) -> bool:
        """Whether `init` and `update` are these, so that a step is what `begin` and `rule` say."""
        kind = type(self)
        return kind.init is Leafwise.init and kind.prepare_ is Leafwise.prepare_

    def __post_init__(self) -> None:
        if _modes.compiling():  # which does not trace dataclasses.fields
            return
        flags, others = _fields(type(self))
        hyper.check_flags(**{name: getattr(self, name) for name in flags})
        for name in others:
            _check_hashable(getattr(self, name), name)
        check_choice(self.execution, "execution", *EXECUTIONS)
        check_classes(getattr(self, "State", None), getattr(self, "hparams", None))
        for name in self.per_hyperparameter:
            if name not in self.buffer_names:
                known = f"the fields of its state after step are {[*self.buffer_names]}"
                raise ValueError(f"per_hyperparameter has {_tree.shown(name)}, but {known}")

    def __repr__(self) -> str:
        """The flags, and `execution` where it is not "auto"."""
        names = [field.name for field in dataclasses.fields(self)]
        own = names[len(dataclasses.fields(Leafwise)) :]
        flags = {name: getattr(self, name) for name in own} | self._inherited()
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in flags.items())})"

    def _inherited(self) -> dict[str, Any]:
        execution = {} if self.execution == "auto" else {"execution": self.execution}
        return {"maximize": self.maximize, **execution}

    def init(self, params: Tree) -> S:
        tensors, spec = _tree.flatten(params)
        checks.params(tensors, params, self.refuse)
        step = zero_for(tensors)
        states = [begun(self, p, step) for p in tensors]
        columns = [[state[k + 1] for state in states] for k in range(len(self.buffer_names))]
        for k in fields.places(self, columns):
            columns[k] = fields.packed(columns[k])
        return self._pack(step, columns, spec)

    def update(self, params: Tree, grads: Tree, state: S, hparams: H) -> tuple[Tree, S]:
        work = gather(self, params, grads, state, hparams)
        new, step = updated(work, state[0])
        return _tree.unflatten(new[0], work.spec), self._pack(step, new[1:], work.spec)

    def repeated(self, params: Tree, state: S, hparams: H) -> Repeated | None:
        if self.execution == "foreach":
            return None
        work = gather(self, params, params, state, hparams)  # gradients are like params
        return Repeated.of(work, state[0], hparams)

    def update_(self, params: Tree, grads: Tree, state: S, hparams: H) -> None:
        work = prints.as_before(self, params, grads, state, hparams)
        if work is None:
            super().update_(params, grads, state, hparams)
            return
        with torch.no_grad():
            write_(work, state[0])

    def prepare_(self, params: Tree, grads: Tree, state: S, hparams: H) -> Write:
        work = prints.as_before(self, params, grads, state, hparams)
        if work is None:
            work = gather(self, params, grads, state, hparams)
            named = zip(self.buffer_names, work.buffers, strict=True)
            used = {f"state.{name}": c for name, c in named if c and not unused(c[0])}
            columns = {"params": work.params, **used}
            checks.writable(columns, params, state[0], work.grads, work.numbers)
            if work.may_grow() and not _modes.all_plain(work.tensors(state[0])):
                return super().prepare_(params, grads, state, hparams)
            prints.remember(work, [*itertools.chain(*used.values()), state[0]])
        return functools.partial(write_, work, state[0])

    def _pack(self, step: Tensor, buffers: list[list[Any]], spec: _tree.Spec) -> S:
        trees = [
            () if unused(c) or (c and unused(c[0])) else _tree.unflatten(c, spec) for c in buffers
        ]
        return self.State(step, *trees)


def updated(work: Work, count: Tensor) -> tuple[list[list[Any]], Tensor]:
    """The new params and buffers of what was gathered, and the new count of steps."""
    rule = work.rule
    step, t = _modes.counted(count)
    differentiated = _modes.differentiated(work.tensors(step))
    if rule.execution == "foreach" and differentiated:
        raise ValueError(
            'execution="foreach" is not differentiable, but a derivative may be needed here: '
            "use update_, call it under torch.no_grad(), or use another execution"
        )
    new: list[list[Any]] = [list(work.params), *(list(column) for column in work.buffers)]
    for indices, columns in work.parts(t, apart=differentiated or _modes.observed()):
        as_written = differentiated or columns[1][0] is None
        run = parts.leaf_by_leaf if as_written else parts.updated
        results = run(rule, t, work.values(indices), columns)
        for k in work.numbers_of_state():
            old = [work.buffers[k][i] for i in indices]
            results[k + 1] = fields.left(columns[k + 2], old, columns[0][0])
        results = [column and parts.apart(column, columns[1]) for column in results]
        if len(indices) == len(work.params):
            new = results
            continue
        parts.scatter(results, indices, new)
    return new, step if count.dtype in WORKING_DTYPE else step.to(count.dtype)


def write_(work: Work, count: Tensor, step_: Callable[..., None] | None = None) -> None:
    """Update what was gathered in place.

    `step_(indices, t, values, columns)` does one part; by default as the rule says.
    """
    step_ = step_ or functools.partial(_part_, work)
    t = _modes.number_of(count)
    t = exact(t) + 1 if isinstance(t, Tensor) else t + 1
    for indices, columns in work.parts(t, apart=_modes.observed()):
        step_(indices, t, work.values(indices), columns)
        for k in work.numbers_of_state():
            old = [work.buffers[k][i] for i in indices]
            fields.write_(columns[k + 2], old, columns[0][0])
    if isinstance(t, Tensor):
        torch.ops.aten.copy_.default(count, t)  # see running.leaf_
    else:
        count.fill_(t)


def _part_(work: Work, indices: list[int], t: Any, values: list[Any], columns: list[Any]) -> None:
    alike = work.alike if len(indices) == len(work.params) else None
    parts.step_(work.rule, t, values, columns, alike)


def repeatable(rule: Any, params: Tree, grads: Tree, state: Any, hparams: Any) -> ways.Alike | None:
    """What `repeat_` needs to know of the arguments of an update in place that passed all checks.

    None where it cannot repeat the update: it takes a rule of this package, plain numbers, a count
    on the CPU, and tensors that share device and dtype.
    """
    if not (isinstance(rule, Leafwise) and is_ours(rule)) or state[0].device.type != "cpu":
        return None
    plain = {*map(type, vars(hparams).values())} <= {float, int}
    work = gather(rule, params, grads, state, hparams)
    return prints.alike(work) if plain and not work.numbers_of_state() else None


def repeat_(
    rule: Any, known: ways.Alike, params: Tree, grads: Tree, state: Any, hparams: Any
) -> None:
    """Update in place, unchecked: all but the numbers must be what `repeatable` was given."""
    count = state[0]
    t = count.item() + 1
    columns = [() if unused(x) else _tree.leaves(x) for x in (params, grads, *state[1:])]
    parts.step_(rule, t, [*vars(hparams).values()], columns, known)
    count.fill_(t)


def _check_hashable(flag: Any, name: str) -> None:
    """Raise for a flag that cannot be a key: what a rule has prepared goes by its flags."""
    try:
        hash(flag)
    except TypeError:
        raise TypeError(
            f"{name} is {_tree.describe(flag)}, which has no hash: pass a constant, such as a tuple"
        ) from None


@functools.lru_cache(maxsize=64)  # torch.optim's classes make a rule at every step
def _fields(kind: type[Leafwise[Any, Any]]) -> tuple[list[str], list[str]]:
    """The fields of a class: those that are bools, and the others."""
    names: tuple[list[str], list[str]] = [], []
    for field in dataclasses.fields(kind):
        names[not isinstance(field.default, bool)].append(field.name)
    return names


def check_classes(state: Any, hparams: Any, name: str = "State") -> None:
    """Raise unless a leafwise optimizer can have these."""
    if not isinstance(state, type) or getattr(state, "_fields", ())[:1] != ("step",):
        raise TypeError(
            f"{name} is {_tree.describe(state)}, not a NamedTuple class whose first field is step"
        )
    hyper.check_record_class(hparams)
