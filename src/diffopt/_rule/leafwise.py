"""Leafwise: an optimizer that applies a rule, the mathematics of one tensor, to every leaf."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree
from diffopt._arguments import check_choice, check_function
from diffopt._modes import exact, exact_dtype
from diffopt._rule import checks, fields, hyper, lists, ops, running, ways
from diffopt._rule.prints import Passed
from diffopt._rule.rule import (
    EXECUTIONS,
    WORKING_DTYPE,
    Execution,
    H,
    Rule,
    S,
    Shape,
    is_ours,
    unused,
)
from diffopt._tree import Tree
from diffopt._value import Flags, brief
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
            which takes seconds at the first step, and is the same for all shapes; that of other
            rules, such as Adafactor and Muon, runs as by "auto". `update` runs as "leaf", to be
            compiled together with the code around it.

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

    def __post_init__(self) -> None:
        if _modes.compiling():  # which does not trace dataclasses.fields
            return
        flags, others = _fields(type(self))
        hyper.check_flags(**{name: getattr(self, name) for name in flags})
        for name in others:
            _check_hashable(getattr(self, name), name)
        check_choice(self.execution, "execution", *EXECUTIONS)
        _check_classes(getattr(self, "State", None), getattr(self, "hparams", None))
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
        device = tensors[0].device if tensors else torch.get_default_device()
        step = torch.zeros((), dtype=exact_dtype(device), device=device)
        states = [_begun(self, p, step) for p in tensors]
        columns = [[state[k + 1] for state in states] for k in range(len(self.buffer_names))]
        for k in self._numbers(columns):
            columns[k] = fields.packed(columns[k])
        return self._pack(step, columns, spec)

    def update(self, params: Tree, grads: Tree, state: S, hparams: H) -> tuple[Tree, S]:
        work = self.gather(params, grads, state, hparams)
        step = exact(state[0]) + 1
        differentiated = _modes.differentiated(work.tensors(step))
        if self.execution == "foreach" and differentiated:
            raise ValueError(
                'execution="foreach" is not differentiable, but a derivative may be needed here: '
                "use update_, call it under torch.no_grad(), or use another execution"
            )
        new: list[list[Any]] = [list(work.params), *(list(column) for column in work.buffers)]
        compute = self._leaf_by_leaf if differentiated else self._updated
        t = _modes.number_of(step)
        for indices, columns in self._parts(work, t, apart=differentiated or _modes.observed()):
            run = self._leaf_by_leaf if columns[1][0] is None else compute
            results = run(t, work.values(indices), columns)
            for k in self._numbers(work.buffers):
                old = [work.buffers[k][i] for i in indices]
                results[k + 1] = fields.left(columns[k + 2], old, columns[0][0])
            for column, result in zip(new, results, strict=True):
                for i, tensor in zip(indices, result, strict=False):
                    column[i] = tensor
        step = step if state[0].dtype in WORKING_DTYPE else step.to(state[0].dtype)
        return _tree.unflatten(new[0], work.spec), self._pack(step, new[1:], work.spec)

    def prepare_(self, params: Tree, grads: Tree, state: S, hparams: H) -> Write:
        work = self._as_before(params, grads, state, hparams)
        if work is None:
            work = self.gather(params, grads, state, hparams)
            named = zip(self.buffer_names, work.buffers, strict=True)
            used = {f"state.{name}": c for name, c in named if c and not unused(c[0])}
            columns = {"params": work.params, **used}
            checks.writable(columns, params, state[0], work.grads, work.numbers)
            if self.may_grow(work) and not _modes.all_plain(work.tensors(state[0])):
                return super().prepare_(params, grads, state, hparams)
            self._remember(work, [*itertools.chain(*used.values()), state[0]])
        return functools.partial(self.write_, work, state[0], functools.partial(self._part_, work))

    def _part_(
        self, work: Work, indices: list[int], t: Any, values: list[Any], columns: list[Any]
    ) -> None:
        kind = work.kind if len(indices) == len(work.params) else None
        self.step_(t, values, columns, kind)

    def _as_before(self, params: Tree, grads: Tree, state: S, hparams: H) -> Work | None:
        """What `gather` returns, if tensors like these have passed all checks before."""
        made = type(state) is self.State and type(hparams) is self.hparams
        if _modes.observed() or not (made and _PASSED):
            return None
        tensors, spec = _tree.flatten(params)
        known = _PASSED.get(_passed_as(self, tensors, map(unused, state[1:])))
        if known is None:
            return None
        passed, kind = known
        used = [field for field in state[1:] if not unused(field)]
        (gradients, *columns), specs = zip(*map(_tree.flatten, (grads, *used)), strict=True)
        numbers = hyper.broadcast(hparams, spec, params)
        if not (
            all(structure is spec for structure in specs)
            and all(len(n.values) == 1 and type(n.values[0]) in (float, int) for n in numbers)
            and passed.by(tensors, [*itertools.chain(*columns), state[0]], gradients)
        ):
            return None
        rest = iter(columns)
        buffers = [[()] * len(tensors) if unused(x) else next(rest) for x in state[1:]]
        return Work(spec, tensors, gradients, buffers, numbers, kind)

    def _remember(self, work: Work, others: list[Tensor]) -> None:
        """Note what has passed all checks, the second time that these params do."""
        if _modes.observed() or len(work.params) < checks.MANY or not is_ours(self):
            return
        if not _modes.all_ordinary([*work.params, *others, *work.grads]):
            return
        key = _passed_as(self, work.params, (unused(column[0]) for column in work.buffers))
        _PASSED[key] = self._passed(work, others) if key in _PASSED else None
        for old in [*_PASSED][:-_REMEMBERED]:
            _PASSED.pop(old, None)

    def _passed(self, work: Work, others: list[Tensor]) -> tuple[Passed, ways.Kind | None]:
        grads: list[Any] = work.grads
        groups, kind = work.groups(), None
        if len(groups) == 1:
            numbers = self._numbers(work.buffers)
            columns = work.columns(groups[0])
            kind = ways.survey([c for k, c in enumerate(columns) if k - 2 not in numbers])
        return Passed(work.params, others, grads), kind

    def write_(self, work: Work, count: Tensor, step_: Callable[..., None]) -> None:
        """Update what was gathered in place: `step_(indices, t, values, columns)` does one part."""
        step = exact(count) + 1
        t = _modes.number_of(step)
        for indices, columns in self._parts(work, t, apart=_modes.observed()):
            step_(indices, t, work.values(indices), columns)
            for k in self._numbers(work.buffers):
                old = [work.buffers[k][i] for i in indices]
                fields.write_(columns[k + 2], old, columns[0][0])
        torch.ops.aten.copy_.default(count, step)  # see running.leaf_

    def _numbers(self, buffers: list[list[Any]]) -> list[int]:
        """The places of what has the shape of hyperparameters, among the buffers."""
        pairs = enumerate(zip(self.buffer_names, buffers, strict=True))
        numbers = self.per_hyperparameter
        return [k for k, (name, c) in pairs if name in numbers and c and not unused(c[0])]

    def may_grow(self, work: Work) -> bool:
        """Whether a number of the state may become a larger tensor."""
        return any(x.dim() == 0 for k in self._numbers(work.buffers) for x in work.buffers[k]) and (
            not all(map(running.is_scalar, itertools.chain(*(n.values for n in work.numbers))))
        )

    def _parts(self, work: Work, t: Any, *, apart: bool) -> Iterator[tuple[list[int], list[Any]]]:
        """The leaves that are updated together, and their columns.

        What may be the first step also begins the state of leaves without a gradient.
        Numbers of the state are equal within a part, or else `apart`: there is one for each leaf.
        """
        numbers = self._numbers(work.buffers)
        absent = (isinstance(t, Tensor) or t <= 1) and self._has_initial(work)
        for group in work.groups(absent=absent):
            parts = [group]
            if numbers and not apart:
                parts = fields.equal_parts(
                    group, [[work.buffers[k][i] for i in group] for k in numbers]
                )
            for indices in parts:
                columns = work.columns(indices)
                for k in numbers:
                    columns[k + 2] = fields.entered(columns[k + 2], columns[0][0], apart=apart)
                yield indices, columns

    def _has_initial(self, work: Work) -> bool:
        """Whether hyperparameters determine initial values of the state."""
        if not work.params:
            return False
        return len(self.initial(hyper.assemble(self.hparams, work.values([0])))) > 0

    def _leaf_by_leaf(self, t: Any, values: list[Any], columns: list[Any]) -> list[Any]:
        """The new columns, out of place, computed tensor by tensor."""
        numbers = running.numbers_at(self, t, values, columns)
        rows = [[running.pick(column, k) for column in columns] for k in range(len(columns[0]))]
        new = [running.apply(self, numbers, row, widen=True) for row in rows]
        return list(map(list, zip(*new, strict=True)))

    def _updated(self, t: Any, values: list[Any], columns: list[Any]) -> list[Any]:
        """The new columns, out of place, in the fastest way; only where no derivative is needed."""
        kernel_values = _for_kernels(values, columns[0][0])
        way = self._way(t, kernel_values, columns)
        if way == "native":
            copies = _copied(columns)
            if self._native_(t, kernel_values, copies):
                return running.written(copies)
            way = self._way(t, kernel_values, columns, kernel=False)
        if _pays(way, columns):
            copies = _copied(columns)
            numbers = running.numbers_at(self, t, kernel_values, columns)
            with torch.no_grad():
                ways.RUN[way](self, numbers, copies)
            return running.written(copies)
        if way == "foreach":
            numbers = running.numbers_at(self, t, values, columns)
            return lists.foreach(self, numbers, columns, widen=True)
        return self._leaf_by_leaf(t, values, columns)

    def step_(
        self, t: Any, values: list[Any], columns: list[Any], kind: ways.Kind | None = None
    ) -> None:
        """Update tensors that share device, dtype and hyperparameters, in place.

        Without gradients it adds the initial values of their state.
        """
        if columns[1][0] is None:
            ways.RUN["leaf"](self, running.numbers_at(self, t, values, columns), columns)
            return
        kernel_values = _for_kernels(values, columns[0][0])
        way = self._way(t, kernel_values, columns, kind)
        if way == "native":
            if self._native_(t, kernel_values, columns):
                return
            way = self._way(t, kernel_values, columns, kind, kernel=False)
        ways.RUN[way](self, running.numbers_at(self, t, values, columns), columns)

    def _way(
        self,
        t: Any,
        values: list[Any],
        columns: list[Any],
        kind: ways.Kind | None = None,
        *,
        kernel: bool = True,
    ) -> ways.Way:
        """The way to run the rule; never "native" where that kernel has refused."""
        # Kernels take the step in float32, which is exact for whole numbers only.
        kernel = kernel and (isinstance(t, Tensor) or float(t).is_integer())
        wanted = "unfused" if self.execution == "auto" and not kernel else self.execution
        if isinstance(t, Tensor) and t.is_meta:
            wanted = "leaf"  # foreach kernels ask for the value of a scalar
        lr, *rest = values
        numeric = isinstance(lr, Tensor) and _takes_rate(lr, columns[0][0])
        rest += [column.value for column in columns if isinstance(column, running.Shared)]
        kind = kind or ways.survey(columns)
        return ways.choose(self, kind, [0.0 if numeric else lr, *rest], wanted)

    def _native_(self, t: Any, values: list[Any], columns: list[Any]) -> bool:
        """Run a native kernel; False, with nothing changed, where none applies."""
        # At the first step a kernel ignores the buffers; they may hold values that a user has set.
        first = None if isinstance(t, Tensor) or t == 1 else False
        step = running.scalar_on(t, torch.float32, columns[0][0].device)
        return running.native_(self, [step] * len(columns[0]), first, values, columns)

    def gather(
        self, params: Tree, grads: Tree, state: S, hparams: H, *, sparse: bool = False
    ) -> Work:
        """The arguments, checked, as lists in the order of the leaves of params."""
        tensors, spec = _tree.flatten(params)
        checks.params(tensors, params, self.refuse)
        gradients = _tree.leaves_like(grads, spec, params, ("grads", "params"))
        like = checks.like(gradients)
        if not like(tensors):
            checks.grads(gradients, tensors, params, sparse=sparse)
        checks.instance(state, self.State, "state", "init()")
        checks.scalar(state[0], "state.step", tensors, params)
        buffers = self._buffers(state, tensors, spec, params, like)
        checks.instance(hparams, self.hparams, "hparams", "optimizer.hparams(...)")
        numbers = hyper.broadcast(hparams, spec, params)
        checks.numbers(numbers, tensors, params)
        return Work(spec, tensors, gradients, buffers, numbers)

    def _buffers(
        self,
        state: S,
        tensors: list[Tensor],
        spec: _tree.Spec,
        params: Tree,
        like: Callable[[list[Any]], bool],
    ) -> list[Any]:
        """For each field of the state after `step`, a list of tensors or of ().

        `like` is true of tensors that certainly are like the gradients, which are like params.
        """
        if not tensors:
            return [[] for _ in self.buffer_names]
        columns: list[list[Any]] = []
        shapes = [self.shapes(p.shape) for p in tensors]
        used = self.buffers_of(tensors[0])
        for k, (name, field) in enumerate(zip(self.buffer_names, state[1:], strict=True)):
            dtype, name = used.get(name), f"state.{name}"
            if (dtype is None) != unused(field):
                expected = "()" if dtype is None else "a tree like params"
                raise ValueError(
                    f"{name} must be {expected}: create the state with this optimizer's init()"
                )
            columns.append([()] * len(tensors))
            if dtype is not None:
                columns[-1] = _tree.leaves_like(field, spec, params, (name, "params"))
                if self.buffer_names[k] in self.per_hyperparameter:
                    checks.per_hyperparameter(columns[-1], tensors, params, name)
                    continue
                own = [row[k] for row in shapes if row is not None]
                if own or not like(columns[-1]):
                    checks.buffers(columns[-1], tensors, params, name, dtype, own)
        return columns

    def buffers_of(self, p: Tensor) -> Mapping[str, torch.dtype]:
        """The fields of the state after `step` that this configuration uses, and their dtypes.

        `p` is any tensor that the rule can update; the dtypes are those of its buffers.
        """
        if _modes.compiling():
            return _used(_begun(self, p, p.new_zeros(())), self.buffer_names)
        return _buffers_of(self, p.shape, p.dtype)

    def _pack(self, step: Tensor, buffers: list[list[Any]], spec: _tree.Spec) -> S:
        trees = [() if c and unused(c[0]) else _tree.unflatten(c, spec) for c in buffers]
        return self.State(step, *trees)


def _check_hashable(flag: Any, name: str) -> None:
    """Raise for a flag that cannot be a key: what a rule has prepared goes by its flags."""
    try:
        hash(flag)
    except TypeError:
        raise TypeError(
            f"{name} is {_tree.describe(flag)}, which has no hash: pass a constant, such as a tuple"
        ) from None


_PASSED: dict[Any, tuple[Passed, ways.Kind | None] | None] = {}
"""By rule and ids of params, what has passed all checks, and what all tensors have in common.

None after the first time.
"""

_REMEMBERED = 8


def _passed_as(
    rule: Leafwise[Any, Any], params: list[Any], absent: Iterable[bool]
) -> tuple[Any, ...]:
    return (rule, torch.is_inference_mode_enabled(), *absent, *map(id, params))


_KIND = operator.attrgetter("device", "dtype")  # in C: a step reads thousands


@functools.lru_cache(maxsize=64)  # torch.optim's classes make a rule at every step
def _fields(kind: type[Leafwise[Any, Any]]) -> tuple[list[str], list[str]]:
    """The fields of a class: those that are bools, and the others."""
    names: tuple[list[str], list[str]] = [], []
    for field in dataclasses.fields(kind):
        names[not isinstance(field.default, bool)].append(field.name)
    return names


_MANY, _BIG = 16, 1 << 18  # tensors, or elements of one, from which copies cost less than they save


def _pays(way: ways.Way, columns: list[Any]) -> bool:
    """Whether a step in place on copies is faster than one tensor by tensor, and gives the same."""
    params, *_ = columns
    if way == "tiles":
        fast = len(params) >= _MANY or any(p.numel() >= _BIG for p in params)
    else:
        fast = way == "stacks" and len(params) >= _MANY
    tensors = itertools.chain(*(c for c in columns if isinstance(c, list)))
    dtypes = {x.dtype for x in tensors} if fast else ()
    # The new value of an integer may be wider.
    return fast and all(dtype.is_floating_point or dtype.is_complex for dtype in dtypes)


def _copied(columns: list[Any]) -> list[Any]:
    """Columns with copies of all but the gradients, in the dtype of params where wider."""
    params, grads, *buffers = columns
    dtype = params[0].dtype

    def copies(column: list[Tensor]) -> list[Tensor]:
        if len({(x.dtype, x.device) for x in column}) > 1 or column[0].device.type == "cpu":
            return [*map(copy, column)]
        new = [torch.empty_like(x, dtype=wider(x)) for x in column]
        _torch.foreach_copy_(new, column)  # by few kernels
        return new

    def wider(x: Tensor) -> torch.dtype:
        same = x.dtype == dtype or x.is_complex() != dtype.is_complex
        return x.dtype if same else torch.promote_types(x.dtype, dtype)

    def copy(x: Tensor) -> Tensor:
        return x.to(wider(x), copy=True)

    return [copies(params), grads, *(copies(c) if isinstance(c, list) else c for c in buffers)]


def _for_kernels(values: list[Any], like: Tensor) -> list[Any]:
    """Hyperparameters as native kernels take them: as numbers, where nobody waits for them.

    The first one, the learning rate, may be a 0-d tensor on the device.
    """
    lr, *rest = values
    if isinstance(lr, Tensor) and _takes_rate(lr, like):
        return [lr.to(torch.float32), *map(ops.coefficient, rest)]
    return [*map(ops.coefficient, values)]


def _takes_rate(lr: Tensor, like: Tensor) -> bool:
    """Whether kernels for a parameter take this rate, which they read in float32."""
    on_device = lr.device == like.device and lr.device.type == "cuda"
    return on_device and lr.dim() == 0 and like.dtype != torch.float64


@functools.lru_cache(maxsize=256)
def _buffers_of(
    rule: Rule[Any, Any], shape: torch.Size, dtype: torch.dtype
) -> Mapping[str, torch.dtype]:
    """What `buffers_of` returns for parameters of this shape and dtype."""
    try:
        example = torch.empty(shape, dtype=dtype, device="meta")
        state = _begun(rule, example, torch.empty((), device="meta"))
    except Exception:  # a user's `begin` may depend on values
        state = _begun(rule, torch.zeros(shape, dtype=dtype), torch.zeros(()))
    return _used(state, rule.buffer_names)


def _begun(rule: Rule[Any, Any], p: Tensor, step: Tensor) -> Any:
    """The state of one tensor before its first step; raises where a user's rule returns none."""
    state = rule.begin(p, step)
    if not isinstance(state, rule.State):
        own = not isinstance(rule, FunctionRule)
        raise TypeError(
            f"{f'{type(rule).__name__}.begin' if own else 'init'} must return a "
            f"{rule.State.__name__}, not {_tree.describe(state)}"
        )
    return state


def _used(state: tuple[Any, ...], fields: tuple[str, ...]) -> Mapping[str, torch.dtype]:
    pairs = zip(fields, state[1:], strict=True)
    return {name: field.dtype for name, field in pairs if not unused(field)}


class FunctionRule(Leafwise[S, H]):
    """What `leafwise` returns: a rule whose methods and attributes are the arguments.

    Attributes:
        members: each by its name in `Rule`.
    """

    members: tuple[tuple[str, Any], ...]

    def __post_init__(self) -> None:
        for name, member in self.members:
            object.__setattr__(self, name, member)
        super().__post_init__()

    def __repr__(self) -> str:
        """The functions and classes by name, on one line."""
        named = [brief(member).rpartition(".")[2] for _, member in self.members[:4]]
        flags = [f"{k}={v!r}" for k, v in self._inherited().items()]
        return f"leafwise({', '.join([*named, *flags])})"

    def rule(self, p: Any, g: Any, s: S, hp: H, c: Any) -> tuple[Any, S]:
        raise NotImplementedError  # a member takes its place


def leafwise(
    state: type[S],
    hparams: type[H],
    init: Callable[[Tensor, Tensor], S],
    rule: Callable[..., tuple[Any, S]],
    *,
    scalars: Callable[[Any, H], Any] | None = None,
    initial: Callable[[H], dict[str, Any]] | None = None,
    maximize: bool = False,
    native: Callable[..., bool] | None = None,
    elementwise: bool = False,
    batchable: bool = True,
    shapes: Callable[[Shape], tuple[Shape, ...]] | None = None,
    refuse: Callable[[Tensor], str | None] | None = None,
    stackable: bool = False,
    per_hyperparameter: tuple[str, ...] = (),
    execution: Execution = "auto",
) -> FunctionRule[S, H]:
    """Make an optimizer from functions on one tensor: quicker to write than a class.

    A subclass of `Leafwise` does the same, with flags that can be read and compared; it pickles.

    Args:
        state: a NamedTuple class whose first field is `step`. Its fields hold trees in the state of
            the optimizer, and tensors in what `init` and `rule` see. A field that a configuration
            does not need holds `()`.
        hparams: a record class made by `diffopt.rules.hparams`.
        init: `(param, step) -> state` for one tensor; create buffers with `zeros_like`.
        rule: `(param, grad, state, hparams, scalars) -> (new_param, new_state)` for one tensor,
            written with operators and the out-of-place operations of `diffopt.rules.ops`: see
            `Leafwise.rule`.
        scalars: `(step, hparams) -> anything`: see `Leafwise.scalars`.
        initial: `hparams -> {field: value}`: see `Leafwise.initial`.
        maximize: ascend instead of descend.
        native: `(params, grads, state, hparams, first, amp) -> bool`, the rule as one of torch's
            fused kernels, in place, on lists of contiguous tensors of one dtype on one CPU or CUDA
            device. Fields of the state are lists or `()`, `state.step` a list of 0-d tensors, and
            hyperparameters numbers, or, of the first, a 0-d tensor in float32 on the CUDA device;
            `first` says whether this is step 1 (None: unknown), and `amp`
            holds keyword arguments for the kernel. It must handle `maximize` itself; where the
            kernel does not compute the rule it must return False and change nothing.
        elementwise: whether each element of the new tensors depends only on the same element of the
            old ones. Then big tensors may be updated in pieces, and small ones together.
        batchable: False where the rule mixes the elements of a tensor, as a mean or a matrix
            product does: then it is called with one tensor at a time, never with a list of several.
        shapes: `(shape of the param) -> shapes of its buffers`: see `Leafwise.shapes`.
        refuse: `(param) -> reason or None`: see `Leafwise.refuse`.
        stackable: for rules that are not elementwise: whether tensors of one shape may be updated
            as one batch, by `torch.vmap` of the rule, and big ones in pieces if the rule uses
            nothing but elementwise operations and `ops.total`. Both change the order in which sums
            are rounded.
        per_hyperparameter: the fields of the state that have the shape of hyperparameters: see
            `Leafwise.per_hyperparameter`; `init` makes them as 0-d tensors.
        execution: how it runs, see `Leafwise`.

    Returns:
        The optimizer. Parameters in half precision are updated in float32 arithmetic, complex ones
        as pairs of reals.

    Examples:
        >>> from typing import Any, NamedTuple
        >>> import torch
        >>> from diffopt.rules import Hyperparameter, hparams, leafwise, number
        >>> class SignState(NamedTuple):
        ...     step: Any
        >>> @hparams
        ... class SignHParams:
        ...     lr: Hyperparameter = number(default=1e-3, ge=0)
        >>> def sign_descent(p, g, s, hp, _):
        ...     return p - hp.lr * g.sign(), s
        >>> opt = leafwise(SignState, SignHParams, lambda p, step: SignState(step), sign_descent)
        >>> p, g = torch.zeros(2), torch.tensor([3.0, -2.0])
        >>> opt.update(p, g, opt.init(p), opt.hparams(lr=0.5))[0]
        tensor([-0.5000,  0.5000])
    """
    _check_classes(state, hparams, "state")
    required = {"init": init, "rule": rule}
    optional = {
        "scalars": scalars,
        "initial": initial,
        "native": native,
        "shapes": shapes,
        "refuse": refuse,
    }
    flags = {"elementwise": elementwise, "batchable": batchable, "stackable": stackable}
    for name, function in {**required, **optional}.items():
        check_function(function, name, optional=name in optional)
    hyper.check_flags(maximize=maximize, **flags)
    if not _modes.compiling():  # it cannot be traced
        torch.serialization.add_safe_globals([state])  # checkpoints load with weights_only=True
    given = {name: function for name, function in optional.items() if function is not None}
    constants = {**flags, "per_hyperparameter": per_hyperparameter}
    members = {
        "State": state,
        "hparams": hparams,
        "begin": init,
        "rule": rule,
        **given,
        **constants,
    }
    return FunctionRule(members=(*members.items(),), maximize=maximize, execution=execution)


def _check_classes(state: Any, hparams: Any, name: str = "State") -> None:
    """Raise unless a leafwise optimizer can have these."""
    if not isinstance(state, type) or getattr(state, "_fields", ())[:1] != ("step",):
        raise TypeError(
            f"{name} is {_tree.describe(state)}, not a NamedTuple class whose first field is step"
        )
    hyper.check_record_class(hparams)


@dataclasses.dataclass(frozen=True)
class Work:
    """The arguments of one update, leaf by leaf."""

    spec: _tree.Spec
    params: list[Tensor]
    grads: list[Tensor | None]
    buffers: list[list[Any]]
    numbers: list[hyper.Covered]
    kind: ways.Kind | None = None
    """What all tensors have in common, where that is known and the hyperparameters are numbers."""

    def tensors(self, step: Any) -> Iterator[Tensor]:
        values = (v for number in self.numbers for v in _tree.leaves(number.values))
        for leaf in itertools.chain([step], self.params, self.grads, *self.buffers, values):
            if isinstance(leaf, Tensor):
                yield leaf

    def groups(self, *, absent: bool = False) -> list[list[int]]:
        """Leaves that share device, dtype and hyperparameters, hence also the per-step scalars.

        Those without a gradient are left out, or, with `absent`, are groups of their own.
        """
        if self.kind or (not _modes.compiling() and self._alike()):
            return [[*range(len(self.params))]]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, (param, grad) in enumerate(zip(self.params, self.grads, strict=True)):
            if absent or grad is not None:
                numbers = tuple(n.cover[i] for n in self.numbers)
                key = (param.device, param.dtype, grad is None, numbers)
                groups.setdefault(key, []).append(i)
        return list(groups.values())

    def _alike(self) -> bool:
        """Whether all leaves are in one group: a quick look at thousands."""
        return (
            len({*map(_KIND, self.params)}) == 1
            and not any(grad is None for grad in self.grads)
            and all(len({*number.cover}) == 1 for number in self.numbers)
        )

    def values(self, indices: list[int]) -> list[Any]:
        """The hyperparameters of one group."""
        return [number.at(indices[0]) for number in self.numbers]

    def columns(self, indices: list[int]) -> list[Any]:
        """The tensors of one group."""
        columns: Any = (self.params, self.grads, *self.buffers)
        if len(indices) < len(self.params):
            columns = [[column[i] for i in indices] for column in columns]
        return [() if unused(column[0]) else column for column in columns]
