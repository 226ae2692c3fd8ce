"""How a parameter group is stepped, worked out once and kept for as long as nothing changes.

Lists of tensors are gathered by C loops over references, and the step counts of all parameters
stand in one vector, of which each `state[p]["step"]` is an element. So a step does little in
Python, and still every parameter has a count of its own, which anybody may read or overwrite.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffopt import _modes, _torch
from diffopt._rule import hyper, running, tiles
from diffopt._rule.leafwise import Leafwise
from diffopt._rule.running import Shared
from diffopt.optim._groups import plain_number

Group: TypeAlias = dict[str, Any]

PAIRS = {
    "beta1": ("betas", 0),
    "beta2": ("betas", 1),
    "etaminus": ("etas", 0),
    "etaplus": ("etas", 1),
    "step_size_min": ("step_sizes", 0),
    "step_size_max": ("step_sizes", 1),
    "eps1": ("eps", 0),
    "eps2": ("eps", 1),
    "ns_a": ("ns_coefficients", 0),
    "ns_b": ("ns_coefficients", 1),
    "ns_c": ("ns_coefficients", 2),
}
"""Hyperparameters that torch.optim keeps in a tuple."""

_KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Plan:
    """The parameters of a group that have gradients, in buckets that are updated together."""

    def __init__(self, optimizer: Any, group: Group, index: int) -> None:
        self.opt: Leafwise[Any, Any] = optimizer.rule(group)
        self.flags = _flags(group)
        self.params: list[Tensor] = list(group["params"])
        self.absent = [param.grad is None for param in self.params]
        live = [i for i, absent in enumerate(self.absent) if not absent]
        for i in live:
            optimizer.check_param(self.params[i], group, name_of(group, index, i))
        new = self._begin(optimizer, group, live)
        members: dict[_Key, list[int]] = {}
        rows: dict[int, dict[str, Any]] = {}
        for i in live:
            param, name = self.params[i], name_of(group, index, i)
            rows[i], begun = _row(optimizer, group, self.opt, param, name)
            fresh = "step" not in rows[i] and (begun or i in new)
            key = _key(optimizer, group, self.opt, param, rows[i], fresh)
            members.setdefault(key, []).append(i)
        whole = len(members) == 1 and not any(self.absent)
        self.buckets = [
            Bucket(
                optimizer,
                group,
                self.opt,
                key,
                [self.params[i] for i in indices],
                [rows[i] for i in indices],
                None if whole else indices,
            )
            for key, indices in members.items()
        ]

    def _begin(self, optimizer: Any, group: Group, live: list[int]) -> set[int]:
        """Make the state of parameters that have none; the indices of those."""
        stateless = not any(self.opt.buffers_of(self.params[i]) for i in live[:1])
        if stateless and not optimizer.scalar_state:
            return set()
        new = [i for i in live if not optimizer.state.get(self.params[i])]
        with torch.set_grad_enabled(bool(group.get("differentiable"))):
            states = optimizer.new_states([self.params[i] for i in new], group)
        for i, state in zip(new, states, strict=True):
            optimizer.state.setdefault(self.params[i], Row(optimizer.watch)).update(state)
        return set(new)

    def take(self, optimizer: Any, group: Group) -> list[Any] | None:
        """The columns of each bucket; None where something has changed since the plan was made."""
        params = group["params"]
        if not same(params, self.params) or self.flags != _flags(group):
            return None
        grads = [param.grad for param in params]
        if [grad is None for grad in grads] != self.absent or self.opt != optimizer.rule(group):
            return None
        taken: list[Any] = []
        for bucket in self.buckets:
            indices = bucket.indices
            grads_of = grads if indices is None else [grads[i] for i in indices]
            columns = bucket.take(grads_of, changed=optimizer.watch.changed)
            if columns is None:
                return None
            taken.append(columns)
        return taken

    def step_(self, optimizer: Any, group: Group, taken: list[Any]) -> None:
        """One step of all buckets."""
        values = values_of(self.opt, group)
        for bucket, columns in zip(self.buckets, taken, strict=True):
            bucket.step_(optimizer, values, columns)


class Bucket:
    """Parameters of one group that share device, dtype, layout and step count."""

    def __init__(
        self,
        optimizer: Any,
        group: Group,
        opt: Leafwise[Any, Any],
        key: _Key,
        params: list[Tensor],
        rows: list[dict[str, Any]],
        indices: list[int] | None,
    ) -> None:
        self.rule, self.layout, self.fresh = opt, key.layout, key.fresh
        self.params, self.rows, self.indices = params, rows, indices
        self.spent = False  # a first step is planned for once
        self.begun = False  # whether the count is known to be past 1
        used = opt.buffers_of(params[0])
        self.fields = [name if name in used else "" for name in opt.State._fields[1:]]
        self.fused = bool(group.get("fused"))
        self.way = self._way(group, key)
        self.scalars: dict[str, Any] = {}
        self.buffers: dict[str, list[Any]] = {}
        for name in rows[0].keys() & {*optimizer.scalar_state, *self.fields}:
            if name in optimizer.scalar_state and self.way != "differentiable":
                whole = optimizer.integer_steps
                self.scalars[name] = (Integers if whole else Elements)(rows, name)
            else:
                self.buffers[name] = [row[name] for row in rows]
        views = {name: s.views for name, s in self.scalars.items() if isinstance(s, Elements)}
        self.columns = {**self.buffers, **views}
        for name in self.fields:
            if name and name not in rows[0]:  # what these shapes do without
                self.buffers[name] = [param.new_empty(0) for param in params]
        self.watched = all(type(row) is Row for row in rows)
        self.dtype = {params[0].dtype}
        self.pointers: list[int] = []
        self.orders: list[Any] | None = None
        if key.layout == "regular" and self.way != "differentiable":
            self.pointers = list(map(Tensor.data_ptr, params))
            orders = [_order(param) for param in params]
            self.orders = orders if any(orders) else None

    def _way(self, group: Group, key: _Key) -> str:
        """How it is stepped: as torch's flags say, and where they say nothing, the fastest."""
        foreach, fused = group.get("foreach"), group.get("fused")
        cpu = key.device.type == "cpu"
        if group.get("differentiable"):
            return "differentiable"
        if key.layout == "sparse":
            return "sparse"
        walkable = key.device.type in ("cpu", "cuda")
        if fused or (foreach is None and fused is None and self.rule.native and walkable):
            fits = key.layout == "regular" or (fused and key.layout == "foreign")
            uniform = set(key.dtypes) == {key.dtype}
            if fits and uniform and key.dtype in _KERNEL_DTYPES:
                return "native"
        if foreach is None and key.layout == "regular" and cpu:
            return "tiles"
        if foreach is None and key.layout == "strided" and cpu and self.rule.stackable:
            return "stacks"
        batched = (foreach or (foreach is None and not cpu)) and self.rule.batchable
        # DTensor has no rule for all foreach kernels.
        return "foreach" if batched and key.layout != "foreign" else "leaf"

    def _rows_hold(self) -> bool:
        """Whether the state holds the very tensors that it held."""
        rows = self.rows
        try:
            return all(
                same([row[name] for row in rows], column) for name, column in self.columns.items()
            )
        except KeyError:
            return False

    def take(self, grads: list[Any], *, changed: bool) -> list[Any] | None:
        """The columns; None where something has changed, as the state may have."""
        if self.spent or ((changed or not self.watched) and not self._rows_hold()):
            return None
        if not all(scalar.holds() for scalar in self.scalars.values()):
            return None
        params, buffers = self.params, self.buffers
        if self.way == "differentiable":
            return []  # nothing is done to columns
        if self.layout == "regular":
            if self.orders:  # such views, when kept, would keep others from swapping the params
                params, grads = self._walk(params), self._walk(grads)
                buffers = {name: self._walk(column) for name, column in buffers.items()}
            if not (
                all(map(Tensor.is_contiguous, grads))
                and list(map(Tensor.data_ptr, self.params)) == self.pointers
            ):
                return None
        elif any(grad.is_sparse != (self.layout == "sparse") for grad in grads):
            return None
        columns: list[Any] = [params, grads]
        for name in self.fields:
            scalar = self.scalars.get(name)
            columns.append(Shared(scalar.first) if scalar else buffers[name] if name else ())
        return columns

    def step_(self, optimizer: Any, values: list[Any], columns: list[Any]) -> None:
        if self.way == "differentiable":
            self._differentiable_step_(values)
        else:
            self._in_place_step_(optimizer, values, columns)
        self.spent = self.fresh

    def _in_place_step_(self, optimizer: Any, values: list[Any], columns: list[Any]) -> None:
        counts = self.scalars.get("step")
        if counts:
            counts.add_(1)
        if self.way != "native" or not self._native_step_(optimizer, values, columns):
            if self._scaled(optimizer, columns):
                return
            t: Any = 1.0 if self.fresh else 2.0
            if counts:
                t = _modes.number_of(counts.first)
            way = self.way
            if way == "native":
                way = "tiles" if self.params[0].device.type == "cpu" else "foreach"
            placed = running.on_device(self._filled(values), self.params[0].device)
            numbers = running.numbers_of(self.rule, t, placed)
            _WAYS[way](self.rule, numbers, columns)
        for name, column in zip(self.fields, columns[2:], strict=True):
            if isinstance(column, Shared):
                self.scalars[name].fill_(column.new)

    def _native_step_(self, optimizer: Any, values: list[Any], columns: list[Any]) -> bool:
        """By torch's fused kernel; False where that computes something else."""
        lr, *rest = values  # every record begins with the rate
        rest = [_modes.number_of(value) for value in rest]
        if any(isinstance(value, Tensor) for value in rest):
            return False
        if isinstance(lr, Tensor) and not self.fused and lr.device.type == "cpu":
            if lr.dtype not in self.dtype and self.dtype == {torch.float64}:
                return False  # torch's loop would compute the step size in the rate's precision
            lr = lr.item()
        device = self.params[0].device
        if isinstance(lr, Tensor) and device.type != "cpu":  # whose kernels read float32
            lr = lr.to(device, torch.float32)
        amp = {
            name: scale.to(device)
            for name in ("grad_scale", "found_inf")
            if (scale := getattr(optimizer, name, None)) is not None
        }
        counts = self.scalars.get("step")
        steps = counts.on(device) if counts else []
        first: bool | None = self.fresh
        initial = self.rule.initial(hyper.assemble(self.rule.hparams, values))
        if counts and not (self.begun or initial):  # else it is past its initial values
            t = _modes.number_of(counts.first)
            first = None if isinstance(t, Tensor) else t == 1
            self.begun = first is False
        if not running.native_(self.rule, steps, first, [lr, *rest], columns, **amp):
            return False
        if "found_inf" in amp:
            self._uncount(amp["found_inf"])
        return True

    def _scaled(self, optimizer: Any, columns: list[Any]) -> bool:
        """Undo a scaler's scale where a kernel is not to; whether the step is to be skipped."""
        found_inf, scale = (getattr(optimizer, name, None) for name in ("found_inf", "grad_scale"))
        if scale is not None:
            columns[1] = [grad / scale.to(grad.device) for grad in columns[1]]
        if found_inf is None or not found_inf.item():
            return False
        self._uncount(found_inf)
        return True

    def _uncount(self, found_inf: Tensor) -> None:
        """A step that was skipped does not count."""
        if "step" in self.scalars:
            self.scalars["step"].add_(-found_inf)
        elif self.fresh and found_inf.item():
            for row in self.rows:
                row.clear()

    def _differentiable_step_(self, values: list[Any]) -> None:
        """Parameter by parameter, in the autograd graph; the state is replaced, not changed."""
        for param, row in zip(self.params, self.rows, strict=True):
            t: Any = 1.0 if self.fresh else 2.0
            if "step" in row:
                row["step"] = row["step"] + 1
                t = _modes.number_of(row["step"])
            numbers = running.numbers_of(self.rule, t, running.placed(self._filled(values), param))
            old: list[Any] = [row[name] if name else () for name in self.fields]
            enter = [Shared(x) if running.is_scalar(x) and param.dim() else x for x in old]
            # The derivative needs the old value, which is about to be overwritten.
            new_param, *new = running.apply(self.rule, numbers, [param.clone(), param.grad, *enter])
            for name, value in zip(self.fields, new, strict=True):
                if name:
                    row[name] = value.new if isinstance(value, Shared) else value
            param.copy_(new_param)

    def _filled(self, values: list[Any]) -> list[Any]:
        """Torch's None for a number, Adafactor's eps1, is the dtype's machine epsilon."""
        eps = torch.finfo(self.params[0].dtype).eps
        return [eps if value is None else value for value in values]

    def _walk(self, column: list[Tensor]) -> list[Tensor]:
        """Views with their axes in the order of memory, such as NHWC of channels_last."""
        pairs = zip(column, self.orders or (), strict=True)
        return [x.permute(order) if order else x for x, order in pairs]


class Watch:
    """Whether somebody has changed what rows of the state hold."""

    changed = True


class Row(dict[str, Any]):
    """The state of a parameter; it says so when a value is put in or taken out.

    Looking at a thousand rows at every step would take as long as updating them.
    """

    watch = Watch()

    def __init__(self, watch: Watch, values: Mapping[str, Any] | None = None) -> None:
        super().__init__(values or {})
        self.watch = watch

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def _watched(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(self: Row, *args: Any, **kwargs: Any) -> Any:
        self.watch.changed = True
        return method(self, *args, **kwargs)

    return wrapper


_CHANGES = (
    "__setitem__",
    "__delitem__",
    "__ior__",
    "clear",
    "pop",
    "popitem",
    "setdefault",
    "update",
)
for _name in _CHANGES:
    setattr(Row, _name, _watched(getattr(dict, _name)))


class Elements:
    """A 0-d tensor of the state of each parameter of a bucket, as the elements of one vector."""

    def __init__(self, rows: list[dict[str, Any]], name: str) -> None:
        values = [row[name].detach() for row in rows]
        if len(rows) == 1:
            self.vector = values[0].view(1)
            self.views = [rows[0][name]]
        else:
            self.vector = torch.stack(values)
            self.views = list(self.vector.unbind())
            for row, view in zip(rows, self.views, strict=True):
                row[name] = view
        self.version = _torch.version(self.vector)
        self.twin: Tensor | None = None  # the value as kernels read it, where it is not so itself

    def holds(self) -> bool:
        """Whether nobody else has overwritten an element."""
        return _torch.version(self.vector) == self.version

    @property
    def first(self) -> Tensor:
        """The value that all elements have."""
        return self.vector[0]

    def add_(self, number: Any) -> None:
        """Count."""
        self.vector.add_(number.to(self.vector.device) if isinstance(number, Tensor) else number)
        if self.twin is not None:
            self.twin.add_(number)
        self.version = _torch.version(self.vector)

    def fill_(self, value: Any) -> None:
        """Set all elements."""
        self.vector.copy_(torch.as_tensor(value, dtype=self.vector.dtype))
        self.version = _torch.version(self.vector)

    def on(self, device: torch.device) -> list[Tensor]:
        """The value for each parameter, where a kernel on this device reads it.

        One tensor many times, which takes a kernel a fifth less time than as many tensors.
        """
        if self.vector.device == device and self.vector.dtype == torch.float32:
            return self.views[:1] * len(self.views)
        twin = self.twin
        if twin is None:
            twin = self.twin = self.vector[0].to(device, torch.float32, non_blocking=True)
        return [twin] * len(self.views)


class Integers:
    """The step counts of torch.optim.SparseAdam, which are Python's."""

    def __init__(self, rows: list[dict[str, Any]], name: str) -> None:
        self.rows, self.name, self.first = rows, name, rows[0][name]

    def holds(self) -> bool:
        """Whether nobody else has set a count."""
        return all(row.get(self.name) == self.first for row in self.rows)

    def add_(self, number: int) -> None:
        """Count."""
        self.first += number
        for row in self.rows:
            row[self.name] = self.first


class _Key(NamedTuple):
    """What parameters have in common that are updated together."""

    device: torch.device
    dtype: torch.dtype
    layout: str
    """"regular": dense in memory, like its gradient and state; "sparse": the gradient is;
    "foreign": a subclass of tensors; else "strided"."""
    fresh: bool
    dtypes: tuple[Any, ...]
    scalars: tuple[Any, ...]


def _key(
    optimizer: Any,
    group: Group,
    opt: Leafwise[Any, Any],
    param: Tensor,
    row: dict[str, Any],
    fresh: bool,
) -> _Key:
    grad: Any = param.grad
    buffers = (v for k, v in row.items() if k not in optimizer.scalar_state)
    tensors = [param, grad, *(v for v in buffers if isinstance(v, Tensor))]
    if grad.is_sparse:
        layout = "sparse"
    elif any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
        layout = "foreign"
    else:
        order = _order(param)
        walked = [x.permute(order) if order and x.dim() == param.dim() else x for x in tensors]
        regular = opt.elementwise and all(
            x.is_contiguous() and x.shape == walked[0].shape for x in walked
        )
        layout = "regular" if regular else "strided"
    scalars: list[Any] = []
    for name in () if group.get("differentiable") else optimizer.scalar_state:
        if isinstance(row.get(name), Tensor):
            value = row[name]
            scalars += [value.dtype, value.device, _known(value)]
        else:
            scalars.append(row.get(name))
    dtypes = tuple(x.dtype for x in tensors)
    return _Key(param.device, param.dtype, layout, fresh, dtypes, (*scalars, *row))


def _row(
    optimizer: Any, group: Group, opt: Leafwise[Any, Any], param: Tensor, name: str
) -> tuple[dict[str, Any], bool]:
    """The state of a parameter, and whether it was incomplete, as before a first momentum."""
    needed = [*optimizer.scalar_state, *optimizer.buffers(opt, param)]
    if not needed:
        return {}, False
    row = optimizer.state[param]
    if "step" not in optimizer.scalar_state and any(row.get(key) is None for key in needed):
        row.update(optimizer.new_states([param], group)[0])
        return row, True
    for key in needed:
        if key not in row:
            raise KeyError(f"the state of {name} has no {key!r}, only {sorted(row)}")
        whole = optimizer.integer_steps
        if key in optimizer.scalar_state and not (whole or isinstance(row[key], Tensor)):
            row[key] = optimizer.new_scalar(row[key], param, group)
    return row, False


def _flags(group: Group) -> tuple[Any, ...]:
    return tuple(map(group.get, ("foreach", "fused", "capturable", "differentiable")))


def _order(tensor: Tensor) -> tuple[int, ...] | None:
    """The axes in the order of memory; None where that is their own order."""
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda axis: -strides[axis]))


def _known(value: Tensor) -> Any:
    """The number in a 0-d tensor; where that must not be asked for, the tensor itself."""
    if value.is_meta:
        return None
    return id(value) if _capturing() else value.item()


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def values_of(opt: Leafwise[Any, Any], group: Group) -> list[Any]:
    """The hyperparameters of a group in the order of the rule's record."""
    values: list[Any] = []
    for field in hyper.FIELDS[opt.hparams]:
        key, k = (field.name, None) if field.name in group else PAIRS[field.name]
        value = group[key] if k is None else group[key][k]
        values.append(value if field.name == "eps1" and value is None else plain_number(value, key))
    return values


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two sequences hold the very same objects."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


def name_of(group: Group, i: int, j: int) -> str:
    """What to call a parameter in an error."""
    names = group.get("param_names")
    return names[j] if names else f"param_groups[{i}]['params'][{j}]"


_WAYS = {
    "leaf": running.leaf_,
    "tiles": tiles.tiled_,
    "stacks": tiles.stacked_,
    "foreach": running.foreach_,
    "sparse": running.sparse_,
}
