"""Running a rule on tensors: one by one, sparse or native.

All of them take columns: the params, their gradients, and one column for each field of the state
after the step. A column is a list of tensors, `()` for a field that is not used, or a `Shared`; to
run tensor by tensor also a list of these. Its tensors share device, dtype, step and
hyperparameters, so that per-step scalars are computed once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffopt import _memory, _modes, _torch
from diffopt._arguments import check_result
from diffopt._rule import hyper, ops
from diffopt._rule.rule import Rule, is_ours, unused, working_real

AnyRule: TypeAlias = Rule[Any, Any]

AS_IS = (torch.float32, torch.float64)
"""The dtypes that rules compute in."""

_MANY = 100  # tensors, for which it pays to leave autograd's checks out
_WIDE = (torch.float64, torch.complex128)
_MOVING = ("weight_decay", "momentum")  # these move a parameter whose gradient is zero


class Numbers(NamedTuple):
    """The step count, the hyperparameters, and what is computed from them once per step."""

    t: Any
    hparams: Any
    scalars: Any
    initial: dict[str, Any]  # what the first step adds to buffers that start at 0


class Shared:
    """A field of the state that all tensors of the columns share, and its new value.

    It is a number, or where that varies within a tensor, what broadcasts to it.
    """

    __slots__ = ("new", "value")

    def __init__(self, value: Tensor) -> None:
        self.value, self.new = value, value


def numbers_at(rule: AnyRule, step: Any, values: Sequence[Any], columns: Sequence[Any]) -> Numbers:
    """What the rule sees besides columns; without gradients, initial values only."""
    t, *values = placed([step, *values], columns[0][0])
    if columns[1][0] is None:
        numbers = Numbers(t, hyper.assemble(rule.hparams, values), None, {})
    else:
        numbers = numbers_of(rule, t, values)
    first = 1 - ops.after_first(t)
    if ops.is_zero(first):
        return numbers
    initial = {name: first * value for name, value in rule.initial(numbers.hparams).items()}
    return Numbers(*numbers[:-1], initial)  # dynamo of torch 2.11 fails to return a _replace


def numbers_of(rule: AnyRule, t: Any, values: Sequence[Any]) -> Numbers:
    """The numbers for values that are already placed, without initial values of the state."""
    hparams = hyper.assemble(rule.hparams, values)
    return Numbers(t, hparams, rule.scalars(t, hparams), {})


def initial_of(rule: AnyRule, values: Sequence[Any]) -> dict[str, Any]:
    """The initial values of the state that these hyperparameters determine."""
    return rule.initial(hyper.assemble(rule.hparams, values))


def leaf_by_leaf(
    rule: AnyRule, numbers: Numbers, columns: Sequence[Any], *, as_is: bool, safe: bool = False
) -> list[list[Any]]:
    """The new columns, out of place, tensor by tensor.

    `as_is` is what that function returns; `safe` says that all results have the right form.
    """
    if not as_is:
        return _columns([apply(rule, numbers, row, widen=True) for row in _rows_of(columns)])
    new = _columns([run(rule, numbers, row) for row in _rows_of(columns)])
    if safe:
        return new
    wide = columns[0][0].dtype
    return [
        x if _alike(x, old) else [leave(*pair, wide) for pair in zip(x, old, strict=True)]
        for x, old in zip(new, written(columns), strict=True)
    ]


def _columns(rows: list[list[Any]]) -> list[list[Any]]:
    return list(map(list, zip(*rows, strict=True)))


def as_is(columns: Sequence[Any]) -> bool:
    """Whether the rule sees the tensors as they are, and all have gradients."""
    if _modes.compiling() or any(isinstance(column, Shared) for column in columns):
        return False
    every = [*itertools.chain(*(column for column in columns if isinstance(column, list)))]
    if not all(isinstance(x, Tensor) for x in every) or not all(map(Tensor.dim, every)):
        return False
    return len({x.dtype for x in every}) == 1 and every[0].dtype in AS_IS


def _alike(new: list[Any], old: Any) -> bool:
    """Whether results have the shapes and dtypes that they must have."""
    if not isinstance(old, list):
        return True
    return [(x.dtype, x.shape) for x in new] == [(x.dtype, x.shape) for x in old]


def apply(
    rule: AnyRule,
    numbers: Numbers,
    columns: Sequence[Any],
    *,
    widen: bool = False,
    into: bool = False,
) -> list[Any]:
    """The new params and buffers of one row of columns.

    New tensors have the dtypes of the old ones; with `widen`, a buffer of a narrower dtype than its
    parameter is converted to the parameter's. Without a gradient only initial values are added.
    """
    dtype, wide = widest(columns), columns[0].dtype if widen else None
    if columns[1] is None:
        return _raised(rule, numbers, columns, dtype, wide)
    given = [enter(column, dtype) for column in columns]
    new = [x.clone() if x is given[1] else x for x in run(rule, numbers, given, into=into)]
    return [leave(x, old, wide) for x, old in zip(new, written(columns), strict=True)]


def _raised(
    rule: AnyRule,
    numbers: Numbers,
    columns: Sequence[Any],
    dtype: torch.dtype,
    wide: torch.dtype | None,
) -> list[Any]:
    """What the first step makes of a tensor without a gradient, which may come later."""
    old = rule.State(numbers.t, *columns[2:])
    pairs = [(name, getattr(old, name), value) for name, value in numbers.initial.items()]
    new = {name: leave(enter(x, dtype) + value, x, wide) for name, x, value in pairs}
    return [columns[0], *old._replace(**new)[1:]]


def run(
    rule: AnyRule, numbers: Numbers, columns: Sequence[Any], *, into: bool = False
) -> list[Any]:
    """What the rule returns for tensors in the form that it sees, as columns.

    `into` says that it may overwrite all but the gradient.
    """
    p, g, *buffers = columns
    t, hparams, scalars, initial = numbers
    s = rule.State(t, *buffers)
    if initial:
        s = s._replace(**{name: getattr(s, name) + value for name, value in initial.items()})
    into = into and rule.overwrites and not (_modes.differentiable() or _modes.observed())
    options = {"into": True} if into and _modes.all_ordinary([p]) else {}
    new = rule.rule(p, -g if rule.maximize else g, s, hparams, scalars, **options)
    if type(new) is not tuple or len(new) != 2:
        check_result(new, "the rule", "new_param", "new_state")
    new_p, new_s = new
    if len(new_s) != len(s):
        raise TypeError(f"the rule returned {len(new_s)} fields of its state, but it has {len(s)}")
    results = [new_p, *new_s[1:]]
    return results if is_ours(rule) else _memory.copies(results, [p, *s[1:]], [g])


def leaf_(rule: AnyRule, numbers: Numbers, columns: Sequence[Any]) -> None:
    """In place, tensor by tensor."""
    if not columns[0]:
        return
    plain = as_is(columns)
    # Tensor.copy_ is faster, but asks for the device, which a machine with fake tensors may lack.
    copy_: Any = Tensor.copy_ if columns[0][0].is_cpu else torch.ops.aten.copy_.default

    def step_(row: Sequence[Any]) -> None:  # whose results are freed before the next step
        stepped = (run if plain else apply)(rule, numbers, row, into=True)
        for old, new in zip(written(row), stepped, strict=True):
            if isinstance(old, Tensor) and new is not old:
                copy_(old, leave(new, old) if plain and new.shape != old.shape else new)

    for row in _rows_of(columns):
        step_(row)


def sparse_(rule: AnyRule, numbers: Numbers, columns: Sequence[Any]) -> None:
    """In place, for sparse gradients: only their rows if zero gradients move nothing."""
    rowwise = all(ops.is_zero(getattr(numbers.hparams, name, 0)) for name in _MOVING)
    for i, grad in enumerate(columns[1]):
        row = [pick(column, i) for column in columns]
        if rowwise:
            grad = grad.coalesce()
            if not len(grad.values()):
                continue
        if not (rowwise and grad.sparse_dim()):
            row[1] = grad.to_dense()
            leaf_(rule, numbers, [[x] if isinstance(x, Tensor) else x for x in row])
            continue
        where = tuple(grad.indices())
        picked = [_rows(x, where) if isinstance(x, Tensor) else x for x in row[2:]]
        new = apply(rule, numbers, [_rows(row[0], where), grad.values(), *picked])
        for old, pieces in zip(written(row), new, strict=True):
            if isinstance(old, Tensor) and len(where) == 1:
                old.index_copy_(0, where[0], pieces)
            elif isinstance(old, Tensor):
                old[where] = pieces


def _rows(x: Tensor, where: tuple[Tensor, ...]) -> Tensor:
    """`x[where]`, by `index_select` for rows, which is several times faster."""
    return x.index_select(0, where[0]) if len(where) == 1 else x[where]


def native_(
    rule: AnyRule,
    steps: list[Tensor],
    first: bool | None,
    values: Sequence[Any],
    columns: Sequence[Any],
    **amp: Tensor,
) -> bool:
    """In place, by the rule's native kernel; False, with nothing changed, where none applies.

    `steps` are 0-d tensors, one for each param; `first` says whether this is step 1 (None: unknown
    without synchronizing with the device); `amp` may have `grad_scale` and `found_inf`.
    """
    if rule.native is None:
        return False
    params, grads, *buffers = columns
    state, hparams = rule.State(steps, *buffers), hyper.assemble(rule.hparams, values)
    if len(params) < _MANY:
        done = rule.native(params, grads, state, hparams, first, amp)
    else:
        with _torch.below_autograd():
            done = rule.native(params, grads, state, hparams, first, amp)
    if done:  # torch's kernels don't tell autograd that tensors it may have saved were modified
        torch.autograd.graph.increment_version(params)
    return done


def scalar_on(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-d tensor; a number is filled in there, since a copy would wait for the device."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


def is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dim() == 0)


def pick(column: Any, batch: int | list[int]) -> Any:
    """One element of a column, or a list of some of them."""
    if isinstance(column, Shared) or unused(column):
        return column
    return column[batch] if isinstance(batch, int) else [column[i] for i in batch]


def _rows_of(columns: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The columns as rows: one element of each, tensor by tensor."""
    lists = (c if isinstance(c, list) else itertools.repeat(c) for c in columns)
    return zip(*lists, strict=False)


def in_place_of_lists(values: Iterable[Any], columns: Sequence[Any]) -> list[Any]:
    """The columns with these values instead of their lists."""
    rest = iter(values)
    return [next(rest) if isinstance(column, list) else column for column in columns]


def written(columns: Sequence[Any]) -> list[Any]:
    """All columns but the gradients."""
    return [columns[0], *columns[2:]]


# Tensors as a rule sees them: real, all of one dtype, at least one-dimensional (a 0-d float32
# tensor would be promoted by a 0-d float64 hyperparameter, and then not match its neighbors).


def widest(columns: Sequence[Any]) -> torch.dtype:
    """The dtype of the arithmetic: the widest of params and buffers, and at least float32."""
    for column in written(columns):
        for x in column if isinstance(column, list) else (column,):
            if isinstance(x, Tensor) and x.dtype in _WIDE:
                return torch.float64
    return torch.float32


def enter(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value.value if isinstance(value, Shared) else value
    if value.dtype == dtype and value.dim() > 0:
        return value
    value = seen(value)
    return value.to(dtype) if value.is_floating_point() else value


def seen(tensor: Tensor) -> Tensor:
    """A view of real numbers with at least one dimension."""
    return _modes.real(tensor.reshape(1) if tensor.dim() == 0 else tensor)


def leave(value: Any, old: Any, dtype: torch.dtype | None = None) -> Any:
    """The value in the shape and dtype of the old one, or in `dtype` if that is wider."""
    if isinstance(old, Shared):
        old.new = value
        return old
    if unused(old):
        return old
    wanted = old.dtype
    if dtype is not None and wanted != dtype and old.is_complex() == dtype.is_complex:
        wanted = torch.promote_types(wanted, dtype) if value.is_floating_point() else wanted
    if value.dtype != wanted or old.dim() == 0:
        value = torch.view_as_complex(value) if old.is_complex() else value
        value = value.reshape(()) if value.numel() == 1 and old.dim() == 0 else value
        value = value.to(wanted)
    if value.shape != old.shape:
        shapes = tuple(value.shape), tuple(old.shape)
        raise ValueError(f"the rule returned shape {shapes[0]} for a tensor of shape {shapes[1]}")
    return value


def placed(values: Sequence[Any], like: Tensor) -> list[Any]:
    """Hyperparameters in the form that the rule's arithmetic needs, for tensors like this one."""
    if not any(isinstance(value, Tensor) for value in values):
        return [*values]
    device, dtype = like.device, like.dtype
    result: list[Any] = []
    for value in on_device(values, device):
        if isinstance(value, Tensor) and value.dim() == 0:
            value = _modes.exact(value)
        elif isinstance(value, Tensor):
            value = value.to(working_real(dtype))
            value = value.unsqueeze(-1) if dtype.is_complex else value
        result.append(value)
    return result


def on_device(values: Sequence[Any], device: torch.device) -> list[Any]:
    """The values, with 0-d tensors moved to this device in their own precision, as in torch."""
    return [
        v.to(device) if isinstance(v, Tensor) and v.dim() == 0 and v.device.type != "cpu" else v
        for v in values
    ]
