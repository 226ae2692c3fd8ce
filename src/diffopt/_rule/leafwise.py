"""leafwise(): an optimizer from the mathematics of one tensor.

The only place that knows about buckets, None gradients, and how a rule is executed on whole trees.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._modes import exact, exact_dtype
from diffopt._rule import checks, hyper, ops, ways
from diffopt._rule.checks import Shape
from diffopt._rule.ways import Execution, Rule, is_scalar, unused
from diffopt._tree import Tree
from diffopt.optimizer import Optimizer, refuse_gradients

S = TypeVar("S", bound=tuple[Any, ...])
H = TypeVar("H")

_HALF = (torch.float16, torch.bfloat16)


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
) -> Leafwise[S, H]:
    """Make an optimizer from the mathematics of one tensor.

    Args:
        state: a NamedTuple class whose first field is `step`. The same class holds trees in the
            state of the optimizer, and tensors in what `init` and `rule` see. A field a
            configuration does not need holds `()`.
        hparams: a record class made by `diffopt.rules.hparams`.
        init: `(param, step) -> state` for one tensor; `zeros_like` makes its buffers.
        rule: `(param, grad, state, hparams, scalars) -> (new_param, new_state)` for one tensor, in
            out-of-place operations of `diffopt._rule.ops` and operators. `state.step` has been
            incremented: it is 1 at the first step. `hparams` has a number or a tensor that
            broadcasts in each field. It must not raise for some tensors only: `update_` checks
            all arguments first, and then writes one result after the other.
        scalars: `(step, hparams) -> anything`: what is computed once per step and not once per
            tensor, such as bias corrections.
        initial: `hparams -> {field: value}`: what `init`, which knows no hyperparameters, could not
            put into the state. The first step adds it to the field.
        maximize: ascend instead of descend.
        native: `(params, grads, state, hparams, first, amp) -> bool`, the rule as one of torch's
            fused kernels, in place, on lists of contiguous tensors of one dtype on one CPU or CUDA
            device. Fields of the state are lists or `()`, `state.step` a list of 0-d tensors, and
            hyperparameters numbers; `first` says whether this is step 1 (None: not known), and
            `amp` holds keyword arguments for the kernel. It ascends where the optimizer does;
            where the kernel does not compute the rule it returns False and has changed nothing.
        elementwise: whether each element of the new tensors depends on the same element of the old
            ones only. Then big tensors may be updated in pieces, and small ones together.
        batchable: False where the rule computes with a tensor as a whole, as by a mean or a product
            of matrices: then it sees one tensor at a time, never several as one.
        shapes: `(shape of the param) -> shapes of its buffers`, one for each field of the state
            after `step`, where they are not all that of the parameter. Such a rule must refuse
            complex parameters.
        refuse: `(param) -> reason or None`: why the rule cannot update it, such as "is complex".
        stackable: whether small tensors of one shape may be updated as one batch, by `torch.vmap`
            of the rule, and big ones in pieces, where all that the rule does beside elementwise
            operations is `ops.total`. Either rounds sums in another order. It is for rules that
            are not elementwise.

    Returns:
        The optimizer. Parameters in half precision are updated in float32 arithmetic, complex ones
        as pairs of reals.

    Example:
        >>> from typing import Any, NamedTuple
        >>> import torch
        >>> from diffopt.rules import hparams, leafwise, number
        >>> class SignState(NamedTuple):
        ...     step: Any
        >>> @hparams
        ... class SignHParams:
        ...     lr: float = number(1e-3, ge=0)
        >>> def sign_descent(p, g, s, hp, _):
        ...     return p - hp.lr * g.sign(), s
        >>> opt = leafwise(SignState, SignHParams, lambda p, step: SignState(step), sign_descent)
        >>> p, g = torch.zeros(2), torch.tensor([3.0, -2.0])
        >>> opt.update(p, g, opt.init(p), opt.hparams(lr=0.5))[0]
        tensor([-0.5000,  0.5000])
    """
    if not _modes.compiling():  # then it does not trace
        torch.serialization.add_safe_globals([state])  # checkpoints load with weights_only=True
    fields = init(torch.empty(0), torch.empty(()))
    execution = (native, elementwise, batchable, shapes, refuse, stackable)
    mathematics = Rule(hparams, state, init, rule, scalars, maximize, initial, *execution)
    return Leafwise(hparams, mathematics, tuple(unused(field) for field in fields[1:]))


def zeros_like(param: Tensor) -> Tensor:
    """A buffer for `param`: zeros of its shape, in float32 where it has half precision."""
    dtype = ways.WORKING_DTYPE.get(param.dtype)
    return torch.zeros_like(param, dtype=dtype, requires_grad=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Leafwise(Optimizer[S, H]):
    """What `leafwise` returns.

    Attributes:
        rule: the mathematics of one tensor.
        unused: which fields of the state, after `step`, hold `()` in this configuration.
        execution: "leaf": tensor by tensor; "foreach": horizontally batched kernels, which carry
            no derivative; "auto": the fastest that applies. That is, for `update_`, a native kernel
            where there is one, else tiles of the cache's size or stacks on a CPU; foreach on other
            devices where no derivative can be asked for, and on a CPU a native kernel on copies;
            and else leaf. "compiled": `update_` runs one kernel that `torch.compile` makes of the
            rule for these shapes, which takes seconds at the first step; `update` is "leaf", to be
            compiled with what surrounds it.
    """

    hparams: type[H]  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    rule: Rule
    unused: tuple[bool, ...]
    execution: Execution = "auto"

    def init(self, params: Tree) -> S:
        tensors, spec = _tree.flatten(params)
        checks.params(tensors, params, self.rule.refuse)
        device = tensors[0].device if tensors else torch.get_default_device()
        step = torch.zeros((), dtype=exact_dtype(device), device=device)
        states = [self.rule.init(p, step) for p in tensors]
        columns = [[state[k + 1] for state in states] for k in range(len(self.unused))]
        return self._pack(step, columns, spec)

    def update(self, params: Tree, grads: Tree, state: S, hparams: H) -> tuple[Tree, S]:
        work = self._gather(params, grads, state, hparams)
        step = exact(state[0]) + 1
        number = _modes.number_of(step)
        differentiated = _modes.differentiated(work.tensors(step))
        if self.execution == "foreach" and differentiated:
            raise ValueError('execution="foreach" carries no derivative, and one may be wanted')
        new: list[Any] = [list(work.params), *(list(column) for column in work.buffers)]
        for indices in work.groups():
            values, columns = work.values(indices), work.columns(indices)
            if not differentiated and (results := self._copied(step, values, columns)):
                for column, result in zip(new, results, strict=True):
                    for i, tensor in zip(indices, result, strict=False):
                        column[i] = tensor
                continue
            numbers = self.rule.at(number, values, columns[0][0])
            if not differentiated and self._batched(columns, values):
                for column, result in zip(new, self.rule.apply(numbers, columns), strict=True):
                    for i, tensor in zip(indices, result, strict=False):
                        column[i] = tensor
                continue
            for k, i in enumerate(indices):
                row = [ways.pick(column, k) for column in columns]
                for column, result in zip(new, self.rule.apply(numbers, row), strict=True):
                    column[i] = result
        step = step if state[0].dtype in _HALF else step.to(state[0].dtype)
        return _tree.unflatten(new[0], work.spec), self._pack(step, new[1:], work.spec)

    def update_(self, params: Tree, grads: Tree, state: S, hparams: H) -> None:
        refuse_gradients(grads, hparams)
        with torch.no_grad():
            work = self._gather(params, grads, state, hparams)
            checks.writable(work.params, params)
            if state[0].dtype in _HALF:
                raise ValueError(f"state.step has dtype {state[0].dtype}, which cannot count")
            step = exact(state[0]) + 1
            for indices in work.groups():
                self._step_(step, work.values(indices), work.columns(indices))
            state[0].copy_(step)

    def _step_(self, step: Tensor, values: list[Any], columns: list[Any]) -> None:
        """Update tensors that share device, dtype and hyperparameters, in place."""
        if self._native_(step, values, columns):
            return
        if self.execution == "compiled":
            ways.compiled_(self.rule, step, values, columns)
            return
        numbers = self.rule.at(_modes.number_of(step), values, columns[0][0])
        if self._batched(columns, values):
            ways.foreach_(self.rule, numbers, columns)
        elif self.execution == "auto" and ways.tileable(self.rule, columns, values):
            ways.tiled_(self.rule, numbers, columns)
        elif self.execution == "auto" and ways.stackable(self.rule, columns, values):
            ways.stacked_(self.rule, numbers, columns)
        else:
            ways.leaf_(self.rule, numbers, columns)

    def _native_(self, step: Tensor, values: list[Any], columns: list[Any]) -> bool:
        """The same by a native kernel; False, and nothing has changed, where there is none."""
        numeric = all(isinstance(value, (int, float)) for value in values)
        native = self.execution == "auto" and self.rule.native and numeric
        if not (native and ways.kernel_ready(columns)):
            return False
        number = _modes.number_of(step)
        if isinstance(number, float) and not number.is_integer():
            return False  # kernels take the step in float32, exact for counts alone
        # A kernel that is told of the first step would ignore a buffer that was given for it.
        first = None if isinstance(number, Tensor) or number == 1 else False
        steps = [step.to(columns[0][0].device, torch.float32)] * len(columns[0])
        return ways.native_(self.rule, steps, first, values, columns)

    def _copied(self, step: Tensor, values: list[Any], columns: list[Any]) -> list[Any] | None:
        """Updated copies, where a native kernel on a CPU makes them: one pass instead of ten."""
        cpu = columns[0][0].device.type == "cpu"
        native = self.execution == "auto" and self.rule.native and cpu
        if not (native and ways.kernel_ready(columns)) or torch.is_inference_mode_enabled():
            return None
        values = [ops.coefficient(value) for value in values]
        params, grads, *buffers = columns
        written = [[x.clone() for x in column] for column in (params, *buffers)]
        copies = [written[0], grads, *(c if c else () for c in written[1:])]
        return written if self._native_(step, values, copies) else None

    def _batched(self, columns: list[Any], values: list[Any]) -> bool:
        """Whether foreach kernels are to run."""
        if self.execution == "auto":
            wanted = columns[0][0].device.type != "cpu" and not _modes.transformed()
        else:
            wanted = self.execution == "foreach"
        return wanted and self.rule.batchable and all(map(is_scalar, values))

    def _gather(self, params: Tree, grads: Tree, state: S, hparams: H) -> _Work:
        """The arguments as lists in the order of the leaves of params, or an error."""
        tensors, spec = _tree.flatten(params)
        checks.params(tensors, params, self.rule.refuse)
        gradients = _tree.leaves_like(grads, spec, params, ("grads", "params"))
        checks.grads(gradients, tensors, params)
        if not isinstance(state, self.rule.state):
            raise TypeError(f"state is a {type(state).__name__}, not a {self.rule.state.__name__}")
        checks.step(state[0], tensors, params)
        buffers: list[list[Any]] = []
        rows = [self.rule.shapes(p.shape) for p in tensors] if self.rule.shapes else []
        for k, (name, absent) in enumerate(zip(self._names(), self.unused, strict=True)):
            field = state[k + 1]
            if absent != unused(field):
                expected = "()" if absent else "a tree like params"
                raise ValueError(f"{name} must be {expected}: make the state by this init()")
            column: list[Any] = [()] * len(tensors)
            if not absent:
                column = _tree.leaves_like(field, spec, params, (name, "params"))
                shapes = [row[k] for row in rows]
                checks.buffers(column, tensors, params, name, shapes)
            buffers.append(column)
        if not isinstance(hparams, self.hparams):
            found, expected = type(hparams).__name__, self.hparams.__name__
            raise TypeError(f"hparams is a {found}, not a {expected}: make it by hparams(...)")
        numbers = hyper.broadcast(hparams, spec, params)
        checks.numbers(numbers, tensors, params)
        return _Work(spec, tensors, gradients, buffers, numbers)

    def _names(self) -> list[str]:
        fields: Any = getattr(self.rule.state, "_fields")  # noqa: B009 (of every NamedTuple)
        return [f"state.{name}" for name in fields[1:]]

    def _pack(self, step: Tensor, buffers: list[list[Any]], spec: _tree.Spec) -> S:
        columns = zip(self.unused, buffers, strict=True)
        return self.rule.state(step, *(() if u else _tree.unflatten(c, spec) for u, c in columns))


@dataclasses.dataclass(frozen=True)
class _Work:
    """The arguments of one update, leaf by leaf."""

    spec: _tree.Spec
    params: list[Tensor]
    grads: list[Tensor | None]
    buffers: list[list[Any]]
    numbers: list[hyper.Covered]

    def tensors(self, step: Any) -> Iterator[Tensor]:
        values = (v for number in self.numbers for v in _tree.leaves(number.values))
        for leaf in itertools.chain([step], self.params, self.grads, *self.buffers, values):
            if isinstance(leaf, Tensor):
                yield leaf

    def groups(self) -> list[list[int]]:
        """Leaves that share device, dtype and hyperparameters, hence the per-step scalars too."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, (param, grad) in enumerate(zip(self.params, self.grads, strict=True)):
            if grad is not None:
                key = (param.device, param.dtype, tuple(n.cover[i] for n in self.numbers))
                groups.setdefault(key, []).append(i)
        return list(groups.values())

    def values(self, indices: list[int]) -> list[Any]:
        """The hyperparameters of one group."""
        return [number.at(indices[0]) for number in self.numbers]

    def columns(self, indices: list[int]) -> list[Any]:
        """The tensors of one group."""
        columns = (
            [column[i] for i in indices] for column in (self.params, self.grads, *self.buffers)
        )
        return [() if unused(column[0]) else column for column in columns]
