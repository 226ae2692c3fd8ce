"""leafwise(): an optimizer from the mathematics of one tensor.

The only place that knows about buckets, None gradients, maximize, and how a rule is executed.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false
from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from diffopt import _checks, _hparams, _modes, _tree
from diffopt._tensorlist import TensorList
from diffopt._tree import Tree
from diffopt.optimizer import Optimizer, refuse_gradients

S = TypeVar("S", bound=tuple[Any, ...])
H = TypeVar("H")
Execution = Literal["auto", "leaf", "foreach"]

_AS_IS = (torch.float32, torch.float64)
_HALF = (torch.float16, torch.bfloat16)
_WORKING_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.complex64,
}


def leafwise(
    state: type[S],
    hparams: type[H],
    init: Callable[[Tensor, Tensor], S],
    rule: Callable[..., tuple[Any, S]],
    *,
    scalars: Callable[[Any, H], Any] | None = None,
    maximize: bool = False,
    native: Callable[[list[Tensor], list[Tensor], S, H], bool] | None = None,
) -> Leafwise[S, H]:
    """Make an optimizer from the mathematics of one tensor.

    Args:
        state: a NamedTuple class whose first field is `step`. The same class holds trees in the
            state of the optimizer, and tensors in what `init` and `rule` see. A field a
            configuration does not need holds `()`.
        hparams: a record class made by `diffopt.rules.hparams`.
        init: `(param, step) -> state` for one tensor; `zeros_like` makes its buffers.
        rule: `(param, grad, state, hparams, scalars) -> (new_param, new_state)` for one tensor, in
            out-of-place operations of `diffopt._ops` and operators. `state.step` has been
            incremented: it is 1 at the first step. `hparams` has a number or a tensor that
            broadcasts in each field. It must not raise for some tensors only: `update_` checks
            all arguments first, and then writes one result after the other.
        scalars: `(step, hparams) -> anything`: what is computed once per step and not once per
            tensor, such as bias corrections.
        maximize: ascend instead of descend.
        native: `(params, grads, state, hparams) -> bool`, the rule as one of torch's fused kernels,
            in place, on lists of contiguous float32 or float64 tensors of one CPU or CUDA device.
            Fields of the state are lists or `()`, `state.step` is a 0-d float32 tensor, and all
            hyperparameters are numbers. It ascends where the optimizer does; where the kernel does
            not compute the rule it returns False and has changed nothing.

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
    unused = tuple(_unused(field) for field in fields[1:])
    return Leafwise(hparams, state, unused, init, rule, scalars, maximize, native)


def zeros_like(param: Tensor) -> Tensor:
    """A buffer for `param`: zeros of its shape, in float32 where it has half precision."""
    return torch.zeros_like(param, dtype=_WORKING_DTYPE.get(param.dtype), requires_grad=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Leafwise(Optimizer[S, H]):
    """What `leafwise` returns.

    Attributes:
        unused: which fields of the state, after `step`, hold `()` in this configuration.
        execution: "leaf": tensor by tensor; "foreach": horizontally batched kernels, which carry
            no derivative; "auto": the fastest that applies. That is, for `update_`, a native kernel
            where there is one; foreach where no derivative can be asked for, but not on a CPU,
            where it is a loop whose temporaries fall out of the cache; and else leaf.
    """

    hparams: type[H]  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    state: type[S]
    unused: tuple[bool, ...]
    init_leaf: Callable[[Tensor, Tensor], S]
    rule: Callable[..., tuple[Any, S]]
    scalars: Callable[[Any, H], Any] | None = None
    maximize: bool = False
    native: Callable[[list[Tensor], list[Tensor], S, H], bool] | None = None
    execution: Execution = "auto"

    def init(self, params: Tree) -> S:
        tensors, spec = _tree.flatten(params)
        _checks.params(tensors, params)
        device = tensors[0].device if tensors else torch.get_default_device()
        step = torch.zeros((), dtype=exact_dtype(device), device=device)
        states = [self.init_leaf(p, step) for p in tensors]
        columns = [[state[k + 1] for state in states] for k in range(len(self.unused))]
        return self._pack(step, columns, spec)

    def update(self, params: Tree, grads: Tree, state: S, hparams: H) -> tuple[Tree, S]:
        work = self._gather(params, grads, state, hparams)
        step = exact(state[0]) + 1
        new_params, new_buffers = list(work.params), [list(column) for column in work.buffers]
        for i, new_param, *new_row in self._steps(work, _as_number(step), work.groups()):
            new_params[i] = new_param
            for column, new in zip(new_buffers, new_row, strict=True):
                column[i] = new
        step = step if state[0].dtype in _HALF else step.to(state[0].dtype)
        return _tree.unflatten(new_params, work.spec), self._pack(step, new_buffers, work.spec)

    def update_(self, params: Tree, grads: Tree, state: S, hparams: H) -> None:
        refuse_gradients(grads, hparams)
        with torch.no_grad():
            work = self._gather(params, grads, state, hparams)
            _checks.writable(work.params, params)
            if state[0].dtype in _HALF:
                raise ValueError(f"state.step has dtype {state[0].dtype}, which cannot count")
            step = exact(state[0]) + 1
            groups = work.groups()
            for key in list(groups):
                if self.execution == "auto" and self._natively(work, step, groups[key]):
                    del groups[key]
            for i, *new in self._steps(work, _as_number(step), groups):
                old: list[Any] = [work.params[i], *(column[i] for column in work.buffers)]
                for tensor, result in zip(old, new, strict=True):
                    if not _unused(tensor):
                        tensor.copy_(result)
            state[0].copy_(step)

    def _gather(self, params: Tree, grads: Tree, state: S, hparams: H) -> _Work:
        """The arguments as lists in the order of the leaves of params, or an error."""
        tensors, spec = _tree.flatten(params)
        _checks.params(tensors, params)
        gradients = _tree.leaves_like(grads, spec, params, ("grads", "params"))
        _checks.grads(gradients, tensors, params)
        if not isinstance(state, self.state):
            raise TypeError(f"state is a {type(state).__name__}, not a {self.state.__name__}")
        _checks.step(state[0], tensors, params)
        buffers: list[list[Any]] = []
        for name, field, unused in zip(self._names(), state[1:], self.unused, strict=True):
            if unused != _unused(field):
                expected = "()" if unused else "a tree like params"
                raise ValueError(f"{name} must be {expected}: make the state by this init()")
            column: list[Any] = [()] * len(tensors)
            if not unused:
                column = _tree.leaves_like(field, spec, params, (name, "params"))
                _checks.buffers(column, tensors, params, name)
            buffers.append(column)
        if not isinstance(hparams, self.hparams):
            raise TypeError(f"hparams is a {type(hparams).__name__}: make it by hparams(...)")
        numbers = _hparams.broadcast(hparams, spec, params)
        _checks.numbers(numbers, tensors, params)
        return _Work(spec, tensors, gradients, buffers, numbers)

    def _natively(self, work: _Work, step: Tensor, group: list[int]) -> bool:
        """Step a group by a native kernel; False where that is not possible."""
        values = [number.at(group[0]) for number in work.numbers]
        lists = [_pick(column, group) for column in (work.params, work.grads, *work.buffers)]
        tensors = [tensor for column in lists if not _unused(column[0]) for tensor in column]
        numeric = all(isinstance(value, (int, float)) for value in values)
        if self.native is None or not (numeric and _plain(tensors)):
            return False
        params, grads, *buffers = lists
        t = step.to(tensors[0].device, torch.float32)
        state = self.state(t, *(() if _unused(column[0]) else column for column in buffers))
        return self.native(params, grads, state, _hparams.assemble(self.hparams, values))

    def _steps(
        self, work: _Work, step: Any, groups: dict[tuple[Any, ...], list[int]]
    ) -> Iterator[tuple[Any, ...]]:
        """Index, new tensor and new buffers of each leaf in these groups."""
        batchable = self.execution != "leaf" and not _modes.differentiated(work.tensors(step))
        if self.execution == "foreach" and not batchable:
            raise ValueError('execution="foreach" carries no derivative, and one may be wanted')
        for (device, dtype, _), indices in groups.items():
            values = [_place(n.at(indices[0]), device, dtype) for n in work.numbers]
            hparams = _hparams.assemble(self.hparams, values)
            t = _place(step, device, dtype)
            scalars = self.scalars(t, hparams) if self.scalars else None
            batched = batchable and all(map(_is_scalar, values))
            batched = batched and (self.execution == "foreach" or device.type != "cpu")
            batches: list[Any] = [indices] if batched else indices
            for batch in batches:
                p, g, *buffers = (_pick(c, batch) for c in (work.params, work.grads, *work.buffers))
                g = -_enter(g) if self.maximize else _enter(g)
                s = self.state(t, *map(_enter, buffers))
                new_p, new_s = self.rule(_enter(p), g, s, hparams, scalars)
                new = map(_leave, (new_p, *new_s[1:]), (p, *buffers))
                yield from zip(batch, *new, strict=True) if batched else [(batch, *new)]

    def _names(self) -> list[str]:
        fields: Any = getattr(self.state, "_fields")  # noqa: B009 (of every NamedTuple)
        return [f"state.{name}" for name in fields[1:]]

    def _pack(self, step: Tensor, buffers: list[list[Any]], spec: _tree.Spec) -> S:
        columns = zip(self.unused, buffers, strict=True)
        return self.state(step, *(() if u else _tree.unflatten(c, spec) for u, c in columns))


@dataclasses.dataclass(frozen=True)
class _Work:
    """The arguments of one update, leaf by leaf."""

    spec: _tree.Spec
    params: list[Tensor]
    grads: list[Tensor | None]
    buffers: list[list[Any]]
    numbers: list[_hparams.Covered]

    def tensors(self, step: Any) -> Iterator[Tensor]:
        values = (v for number in self.numbers for v in _tree.leaves(number.values))
        for leaf in itertools.chain([step], self.params, self.grads, *self.buffers, values):
            if isinstance(leaf, Tensor):
                yield leaf

    def groups(self) -> dict[tuple[Any, ...], list[int]]:
        """Leaves that share device, dtype and hyperparameters, hence the per-step scalars too."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, (param, grad) in enumerate(zip(self.params, self.grads, strict=True)):
            if grad is not None:
                key = (param.device, param.dtype, tuple(n.cover[i] for n in self.numbers))
                groups.setdefault(key, []).append(i)
        return groups


def _unused(field: Any) -> bool:
    """Whether a field of a state is the () of a configuration that does not need it."""
    return isinstance(field, tuple) and not field


# Tensors as a rule sees them: real, at least float32, at least one-dimensional (a 0-d float32
# tensor would be promoted by a 0-d float64 hyperparameter, and then not match its neighbours).


def _pick(column: Sequence[Any], batch: int | list[int]) -> Any:
    return column[batch] if isinstance(batch, int) else [column[i] for i in batch]


def _enter(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.dtype in _AS_IS and value.dim() > 0:
            return value
        tensor = value.to(_WORKING_DTYPE.get(value.dtype, value.dtype))
        tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor
        return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    if _unused(value) or _unused(value[0]):
        return ()
    return TensorList(map(_enter, value))


def _leave(value: Any, old: Any) -> Any:
    if not isinstance(old, Tensor):
        return old if _unused(old) or _unused(old[0]) else list(map(_leave, value, old))
    if value.dtype != old.dtype or old.dim() == 0:
        value = torch.view_as_complex(value) if old.is_complex() else value
        value = value.reshape(()) if value.numel() == 1 and old.dim() == 0 else value
        value = value.to(old.dtype)
    if value.shape != old.shape:
        shapes = tuple(value.shape), tuple(old.shape)
        raise ValueError(f"the rule returned shape {shapes[0]} for a tensor of shape {shapes[1]}")
    return value


def _plain(tensors: list[Tensor]) -> bool:
    """Whether a native kernel can walk through the memory of all these tensors at once."""
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    dtype, device = next(iter(kinds))
    return (
        len(kinds) == 1
        and dtype in _AS_IS
        and device.type in ("cpu", "cuda")
        and not (_modes.transformed() or _modes.intercepted())
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
        and all(tensor.is_contiguous() for tensor in tensors)
    )


def exact_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def exact(scalar: Tensor) -> Tensor:
    """A 0-d tensor in float64: `beta ** step` in float32 costs parity in the sixth digit."""
    return scalar.to(exact_dtype(scalar.device))


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dim() == 0)


def _as_number(step: Tensor) -> Any:
    """A number, for torch's fused scalar arguments, where that costs no wait and no derivative."""
    if step.device.type != "cpu" or _modes.differentiated([step]) or _modes.intercepted():
        return step
    return step.item()


def _place(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A hyperparameter as the rule's arithmetic wants it, for tensors of this device and dtype."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 0:
        value = value if value.device.type == "cpu" else value.to(device)
        return exact(value)
    value = value.to(_WORKING_DTYPE.get(dtype, dtype).to_real())
    return value.unsqueeze(-1) if dtype.is_complex else value
