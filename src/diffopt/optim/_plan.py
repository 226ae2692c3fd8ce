"""How a parameter group is stepped, worked out once and kept for as long as nothing changes.

A plan is only a cache: it depends on nothing but the group, the tensors and the state as they are,
so a step that makes a new plan gives the same bits. A plan that is kept

- holds no gradients or hyperparameters that are tensors, and only those parameters and tensors of
  the state whose rows drop the plan before they change: what a user releases is freed at once;
- is checked before each step, and used only if the parameters are the same objects, the flags, the
  rule and the missing gradients are the same, every parameter, gradient and tensor of the state has
  the type, dtype, device, layout, shape and strides that it had, all but the gradients have the
  address that they had, and the step counts that were equal are equal. If a native kernel of a CPU
  steps all parameters of the group, they may move: it takes one after the other, so that it makes
  no difference which of them share memory. Tensors of the state that no user has read or put in
  are not checked: nobody else can change them. If one has, counts on a device are used one by one:
  what `.data` writes there cannot be seen. Parameters whose counts differed and have been made
  equal are still stepped apart: no bit depends on that.

Anything that cannot be checked this way is planned anew at every step: subclasses of tensors,
rows that are not ours, the first step of a momentum, steps that are recorded or traced.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import _memory, _modes
from diffopt._rule import marks, running, tiles, ways
from diffopt._rule.leafwise import Leafwise
from diffopt._rule.prints import Prints, addresses_of
from diffopt._rule.running import Shared
from diffopt.optim import _state
from diffopt.optim._groups import Group
from diffopt.optim._options import Options
from diffopt.optim._state import Counts, Integers, State

KEPT = True
"""Whether plans are kept between steps; switching it off changes no bit of a result."""


class Plan:
    """The parameters of a group that have gradients, in buckets that are stepped together."""

    def __init__(self, optimizer: Any, group: Group, options: Options, grads: list[Any]) -> None:
        params, opt = group["params"], options.opt
        self.options = options
        self.inference = torch.is_inference_mode_enabled()
        self.absent = _missing(grads)
        live = [i for i, grad in enumerate(grads) if grad is not None]
        new = _begin(optimizer, group, opt, [params[i] for i in live])
        rows = {i: _row(optimizer, group, params[i]) for i in live}
        scalars = (row[name] for row in rows.values() for name in optimizer.scalar_state)
        marks.learn([*filter(_modes.versioned, scalars)])
        # The state keeps those alive that have rows; to compare these takes half the time.
        self.params = [*params] if all(map(rows.get, range(len(params)))) else []
        self.ids = [] if self.params else list(map(id, params))
        entangled = set[int]() if group.get("differentiable") else _entangled(params, rows)
        members: dict[_Key, list[int]] = {}
        for i in live:
            key = _key(optimizer, group, opt, params[i], grads[i], rows[i])
            key = key._replace(
                fresh=id(params[i]) in new and "step" not in rows[i],
                alone=i if i in entangled else None,
            )
            members.setdefault(key, []).append(i)
        whole = len(members) == 1 and not self.absent
        self.buckets: list[Bucket] = []
        for key, indices in members.items():
            some = [params[i] for i in indices], [rows[i] for i in indices]
            indices = [] if whole else indices
            self.buckets.append(Bucket(optimizer, group, opt, key, indices, *some))
        self.lasting = (
            KEPT
            and type(optimizer.state) is State
            and optimizer.state.owns(row for row in rows.values() if row)
            and not _modes.observed()
            and all(bucket.lasting for bucket in self.buckets)
        )
        for bucket in self.buckets if self.lasting else ():
            bucket.remember(*bucket.of(params, grads))

    def holds(self, optimizer: Any, group: Group, options: Options, grads: list[Any]) -> bool:
        """Whether a new plan would be the same; then it takes the numbers of these options."""
        before, self.options = self.options, options
        params, lent = group["params"], optimizer.state.plans.lent
        if (
            not self._is_of(params)
            or (self.absent and self.absent != _missing(grads))  # else a guard finds it
            or (before.flags, before.opt) != (options.flags, options.opt)
            or self.inference != torch.is_inference_mode_enabled()
            or _modes.observed()
        ):
            return False
        for bucket in self.buckets:  # no generator: this runs at every step
            if not bucket.holds(*bucket.of(params, grads), options, lent=lent):
                return False
        return True

    def _is_of(self, params: list[Tensor]) -> bool:
        """Whether these are the parameters of the group, one by one."""
        if self.ids:
            return list(map(id, params)) == self.ids
        return len(params) == len(self.params) and all(map(operator.is_, params, self.params))

    def step_(self, optimizer: Any, group: Group, grads: list[Any]) -> None:
        """One step of all buckets."""
        for bucket in self.buckets:
            bucket.step_(optimizer, self.options, *bucket.of(group["params"], grads))
        if not self.options.constant:
            self._let_go()

    def _let_go(self) -> None:
        """Forget numbers that may be tensors, which the next step reads again."""
        self.options.values = []
        for bucket in self.buckets:
            bucket.options, bucket.values, bucket.numbers = None, [], []


class Bucket:
    """Parameters of one group that share device, dtype, layout and step count."""

    def __init__(
        self,
        optimizer: Any,
        group: Group,
        opt: Leafwise[Any, Any],
        key: _Key,
        indices: list[int],
        params: list[Tensor],
        rows: list[dict[str, Any]],
    ) -> None:
        self.rule, self.key, self.indices = opt, key, indices
        self.options: Options | None = None
        self.way: ways.Way = "leaf"
        self.in_turn = False  # whether the last step took all of the group one after the other
        self.wanted: ways.Wanted = _wanted(group)
        self.differentiable = bool(group.get("differentiable"))
        plain = key.kind.layout != "foreign" and not self.differentiable
        self.lasting = plain and not key.fresh
        self.rows = [] if self.lasting else rows
        self.fields = _fields(opt, params[0])
        self.scalars: dict[str, Any] = {}
        for name in optimizer.scalar_state:
            whole, column = optimizer.integer_steps, [row[name] for row in rows]
            self.scalars[name] = Integers(rows, name) if whole else Counts(column)
        self.buffers: dict[str, list[Any]] = {}
        for name in [name for name in self.fields if name and name not in self.scalars]:
            column = [row.get(name) for row in rows]
            absent = column[0] is None  # these shapes do without it
            self.buffers[name] = [param.new_empty(0) for param in params] if absent else column
        orders = [_order(opt, param) for param in params] if key.kind.layout == "regular" else []
        self.orders = orders if any(orders) else []
        self.extent: _memory.Extent | None = None
        self.layout: tiles.Layout | None = None

    def of(self, params: list[Tensor], grads: list[Any]) -> tuple[list[Tensor], list[Any]]:
        """The parameters and gradients of this bucket among those of the group."""
        if not self.indices:
            return params, grads
        return [params[i] for i in self.indices], [grads[i] for i in self.indices]

    def remember(self, params: list[Tensor], grads: list[Tensor]) -> None:
        """Keep what `holds` compares with; of counts, which have no strides, the address."""
        self.kept = [x for column in self.buffers.values() for x in column]
        self.counted = [x for counts in self.scalars.values() for x in counts.tensors]
        self.given, self.own = Prints(params, grads), Prints(self.kept, ())
        self.addresses = addresses_of(self.counted)

    def holds(
        self, params: list[Tensor], grads: list[Any], options: Options, *, lent: bool
    ) -> bool:
        """Whether all tensors are as they were."""
        moved = self.in_turn and self._chosen(options)
        return self.given.fit(params, grads, moved=moved) and (not lent or self._kept_hold())

    def _kept_hold(self) -> bool:
        """Whether those of the state are."""
        return (
            self.own.fit(self.kept, ())
            and addresses_of(self.counted) == self.addresses
            and all(counts.equal() for counts in self.scalars.values())
        )

    def step_(self, optimizer: Any, options: Options, params: Any, grads: Any) -> None:
        if options is not self.options:
            self._read(options)
        if self.differentiable:
            self._differentiable_step_(params, grads)
            return
        columns = self._columns(params, grads)
        amp = {
            name: scale.to(self.key.device)
            for name in ("grad_scale", "found_inf")
            if (scale := getattr(optimizer, name, None)) is not None
        }
        way, apart = self.way, self._unsure(optimizer)
        self.in_turn = False
        if way == "native":
            if self._native_step_(columns, amp, apart=apart):
                self.in_turn = not self.indices and self.key.device.type == "cpu"
                return
            way = ways.choose(self.rule, self.key.kind, self.values, "unfused")
        self._rule_step_(way, columns, amp, apart=apart)

    def _unsure(self, optimizer: Any) -> bool:
        """Whether counts on a device may differ: a write through `.data` leaves no trace there."""
        if type(optimizer.state) is State and not optimizer.state.plans.lent:
            return False
        counts = [x for x in self.scalars.values() if isinstance(x, Counts)]
        return any(x.marks and len(x.tensors) > 1 for x in counts)

    def _read(self, options: Options) -> None:
        """Take the numbers of a group, and choose how to step with them."""
        chosen, self.options = self._chosen(options), options
        self.values = self.numbers = filled(options.values, self.key.kind.dtype)
        if chosen:
            return
        self.numbers, wanted = self._for_kernels(self.values)
        self.way = ways.choose(self.rule, self.key.kind, [0.0, *self.numbers[1:]], wanted)

    def _chosen(self, options: Options) -> bool:
        """Whether the way of the step before is that for these numbers, too."""
        return options.constant and self.options is not None and self.options.constant

    def _columns(self, params: list[Tensor], grads: list[Tensor]) -> list[Any]:
        columns: list[Any] = [params, grads]
        for name in self.fields:
            if name in self.scalars:
                columns.append(Shared(self.scalars[name].at(0).clone()))
            else:
                columns.append(self.buffers[name] if name else ())
        if not self.orders:
            return columns
        return [self._walk(c) if isinstance(c, list) else c for c in columns]

    def _walk(self, column: list[Tensor]) -> list[Tensor]:
        """Views with their axes in the order of memory, such as NHWC of channels_last."""
        pairs = zip(column, self.orders, strict=True)
        return [x.permute(order) if order else x for x, order in pairs]

    def _for_kernels(self, values: list[Any]) -> tuple[list[Any], ways.Wanted]:
        """The hyperparameters as kernels take them, and the wish that `ways.choose` should follow.

        They are numbers, except that a learning rate on a device stays a tensor. torch's loop
        computes the step size in the dtype of a rate that is a tensor: if that is narrower than the
        parameter's, the kernel, which would be more exact, is not used.
        """
        lr, *rest = values  # every record begins with the rate
        rest = [_modes.number_of(value) for value in rest]
        fused_here = self.wanted == "fused" and self.key.device.type == "cpu"
        if isinstance(lr, Tensor) and lr.device.type == "cpu" and not fused_here:
            if lr.dtype != self.key.kind.dtype == torch.float64 and self.wanted == "auto":
                return [lr, *rest], "unfused"
            lr = _modes.number_of(lr)
        if isinstance(lr, Tensor) and self.key.device.type != "cpu":  # whose kernels read float32
            lr = lr.to(self.key.device, torch.float32)
        return [lr, *rest], self.wanted

    def _native_step_(self, columns: list[Any], amp: dict[str, Tensor], *, apart: bool) -> bool:
        """By torch's fused kernel; False where that computes something else."""
        counts = self.scalars.get("step")
        steps: list[Tensor] = []
        first: bool | None = self.key.fresh
        if counts:
            n = len(columns[0])
            t = _modes.number_of(counts.at(0))
            # One tensor many times takes a kernel a fifth less time than as many tensors.
            steps = [*map(self._for_kernel, range(n))] if apart else [self._for_kernel(0)] * n
            first = None if isinstance(t, Tensor) else t == 0
            if first is not False and running.initial_of(self.rule, self.numbers):
                first = False  # the state is past its initial values
            counts.add_(1)  # at the last moment: Ctrl-C is handled after the kernel
        try:
            done = running.native_(self.rule, steps, first, self.numbers, columns, **amp)
        except Exception:
            if counts:
                counts.add_(-1)
            raise
        if counts and not done:
            counts.add_(-1)
        if done and "found_inf" in amp:
            self._uncount(amp["found_inf"])
        return done

    def _for_kernel(self, i: int) -> Tensor:
        """A count, which is that of this step when the kernel runs."""
        count = self.scalars["step"].at(i)
        if count.dtype == torch.float32 and count.device == self.key.device:
            return count
        return running.scalar_on(_modes.number_of(count) + 1, torch.float32, self.key.device)

    def _uncount(self, found_inf: Tensor) -> None:
        """Do not count a step that the kernel has skipped."""
        if "step" in self.scalars:
            self.scalars["step"].add_(-found_inf)
        elif self.key.fresh and found_inf.item():
            self._forget()

    def _forget(self) -> None:
        """The next step is the first one again."""
        for row in self.rows if self.key.fresh else ():
            row.clear()

    def _rule_step_(
        self, way: ways.Way, columns: list[Any], amp: dict[str, Tensor], *, apart: bool
    ) -> None:
        """Step by the rule. Where it writes parameter by parameter, it counts in the same way."""
        if "found_inf" in amp and amp["found_inf"].item():
            self._forget()
            return
        if "grad_scale" in amp:  # which native kernels take themselves
            columns[1] = [grad / amp["grad_scale"] for grad in columns[1]]
        numbers = self._numbers(0)
        if way in _JOINT and (apart or self._crossed(columns)):
            way = "leaf"
        if way in ways.PIECEWISE:
            self.layout = ways.PIECEWISE[way](self.rule, numbers, columns, self.layout)
        elif way in _JOINT:
            ways.RUN[way](self.rule, numbers, columns)
        if way in _JOINT:
            self._count(columns)
            return
        for i in range(len(columns[0])):
            if apart:
                numbers = self._numbers(i)
                self._enter(columns, i)
            row = [[c[i]] if isinstance(c, list) else c for c in columns]
            ways.RUN[way](self.rule, numbers, row)
            self._count(columns, i)

    def _numbers(self, i: int) -> running.Numbers:
        """What the rule sees besides columns, by the count of one parameter."""
        t: Any = 1.0 if self.key.fresh else 2.0
        if "step" in self.scalars:
            t = _modes.number_of(self.scalars["step"].at(i)) + 1
        placed = running.on_device(self.values, self.key.device)
        return running.numbers_of(self.rule, t, placed)

    def _enter(self, columns: Sequence[Any], i: int) -> None:
        """Take the numbers of one parameter's state."""
        for name, column in zip(self.fields, columns[2:], strict=True):
            if isinstance(column, Shared):
                column.value = column.new = self.scalars[name].at(i).clone()

    def _crossed(self, columns: list[Any]) -> bool:
        """Whether a gradient lies where the step writes, maybe that of a parameter before it."""
        if self.key.device.type == "meta":
            return False
        if self.extent is None:  # the addresses of what is written stay while the plan holds
            written = (c for c in running.written(columns) if isinstance(c, list))
            self.extent = _memory.Extent(itertools.chain(*written), columns[1])
        return self.extent.meets(columns[1])

    def _count(self, columns: Sequence[Any], i: int | None = None) -> None:
        """Put the new numbers into the state, of all parameters or of one."""
        if "step" in self.scalars:
            self.scalars["step"].add_(1, i)
        for name, column in zip(self.fields, columns[2:], strict=True):
            if isinstance(column, Shared):
                self.scalars[name].fill_(column.new, i)

    def _differentiable_step_(self, params: list[Tensor], grads: list[Any]) -> None:
        """Parameter by parameter, in the autograd graph; the state is replaced, not changed."""
        for param, grad, row in zip(params, grads, self.rows, strict=True):
            t: Any = 1.0 if self.key.fresh else 2.0
            if "step" in row:
                row["step"] = row["step"] + 1
                t = _modes.number_of(row["step"])
            old = [row[name] if name else () for name in self.fields]
            # The derivative needs the old value, which is about to be overwritten.
            new_param, *new = _stepped(self.rule, t, self.values, [param.clone(), grad, *old])
            row.update((name, x) for name, x in zip(self.fields, new, strict=True) if name)
            param.copy_(new_param)


_JOINT = ("compiled", "tiles", "stacks", "foreach")
"""The ways that may write one parameter before they read the gradient of another."""


def _missing(grads: Sequence[Any]) -> list[int]:
    return [i for i, grad in enumerate(grads) if grad is None]


def _fields(opt: Leafwise[Any, Any], param: Tensor) -> list[str]:
    """The fields of the state after the step; "" for one that this configuration lacks."""
    used = opt.buffers_of(param)
    return [name if name in used else "" for name in opt.buffer_names]


def filled(values: list[Any], dtype: torch.dtype) -> list[Any]:
    """The values, with the machine epsilon of the dtype for None, torch's default for eps1."""
    return [torch.finfo(dtype).eps if value is None else value for value in values]


def trace_(
    opt: Leafwise[Any, Any], values: list[Any], param: Tensor, grad: Tensor, row: dict[str, Any]
) -> None:
    """One parameter's step in operations that torch.compile can trace."""
    t: Any = 2.0
    if "step" in row:
        row["step"].add_(1)
        t = _modes.exact(row["step"])
    old: list[Any] = [row.get(name) if name else () for name in _fields(opt, param)]
    old = [param.new_empty(0) if x is None else x for x in old]  # what its shape does without
    stepped = _stepped(opt, t, filled(values, param.dtype), [param, grad, *old])
    for x, new in zip([param, *old], stepped, strict=True):
        if isinstance(x, Tensor):
            x.copy_(new)


def _stepped(opt: Leafwise[Any, Any], t: Any, values: list[Any], row: list[Any]) -> list[Any]:
    """The new parameter and buffers."""
    param, grad, *old = row
    numbers = running.numbers_of(opt, t, running.placed(values, param))
    whole = [name in opt.per_hyperparameter for name in opt.buffer_names]
    enter = [Shared(x) if one else x for one, x in zip(whole, old, strict=True)]
    new = running.apply(opt, numbers, [param, grad, *enter])
    return [x.new if isinstance(x, Shared) else x for x in new]


class _Key(NamedTuple):
    """What parameters have in common that are updated together."""

    kind: ways.Kind
    device: torch.device
    dtypes: tuple[Any, ...]
    scalars: tuple[Any, ...]
    fresh: bool = False
    """Whether a momentum begins, in a class that keeps no count."""
    alone: int | None = None
    """The index of a parameter that shares memory or state with another: it is stepped alone."""


def _key(
    optimizer: Any,
    group: Group,
    opt: Leafwise[Any, Any],
    param: Tensor,
    grad: Any,
    row: Any,
) -> _Key:
    names = [name for name in optimizer.fields(opt, param) if name not in optimizer.scalar_state]
    tensors = [param, grad, *(row[name] for name in names)]
    plain = all(map(_modes.ordinary, tensors)) and not grad.is_sparse
    order = _order(opt, param) if plain else None
    kind = ways.survey([[x.permute(order) if order else x] for x in tensors])
    scalars: list[Any] = []
    for name in () if group.get("differentiable") else optimizer.scalar_state:
        value = row[name]
        if isinstance(value, Tensor):
            scalars += [value.dtype, value.device, _value(value)]
        else:
            scalars.append(value)  # SparseAdam's
    dtypes = (*names, *(x.dtype for x in tensors))
    return _Key(kind, param.device, dtypes, tuple(scalars))


def _wanted(group: Group) -> ways.Wanted:
    """What the flags of a group say."""
    if group.get("fused"):
        return "fused"
    if group.get("foreach") is not None:
        return "foreach" if group["foreach"] else "leaf"
    return "auto" if group.get("fused") is None else "unfused"


def _entangled(params: Sequence[Tensor], rows: dict[int, dict[str, Any]]) -> set[int]:
    """The parameters that share memory with another one, themselves or by their states.

    What one of them writes another reads, so they are stepped one after the other, as in torch.
    """
    if _modes.observed():
        return set()
    spans: list[tuple[int, int, int]] = []
    for i, row in rows.items():
        tensors = [x for x in (params[i], *row.values()) if isinstance(x, Tensor)]
        own = [x for x in tensors if _modes.ordinary(x) and x.data_ptr()]
        spans += [(x.data_ptr(), x.data_ptr() + _memory.span(x), i) for x in own]
    found = set[int]()
    end, owner = 0, -1
    for start, stop, i in sorted(spans):
        if start < end and i != owner:
            found |= {i, owner}
        if stop > end:
            end, owner = stop, i
    return found


def _begin(optimizer: Any, group: Group, opt: Leafwise[Any, Any], params: list[Tensor]) -> set[int]:
    """Make the state of parameters that have none, or not all; their ids.

    Even in inference mode it consists of normal tensors: a later step may be outside.
    """
    new = {id(p): p for p in params if _lacking(optimizer, opt, p)}
    if not new:
        return set()
    differentiable = bool(group.get("differentiable"))
    with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
        rows = optimizer.new_states([*new.values()], group)
        if not differentiable:
            alike = sorted(rows, key=list)  # the counts of a bucket side by side
            _state.pack(alike, optimizer.scalar_state)
        for name in optimizer.scalar_state:  # all of a name are equal
            value = (None, 0.0) if name == "step" else marks.unknown()
            marks.note([*filter(_modes.versioned, (row.get(name) for row in rows))], value)
    for p, row in zip(new.values(), rows, strict=True):
        _state.row_of(optimizer.state, p).update(row)
    return set(new)


def _lacking(optimizer: Any, opt: Leafwise[Any, Any], param: Tensor) -> bool:
    """Whether a parameter has no state or, in a class without counts, an incomplete one."""
    needed = optimizer.fields(opt, param)
    row = optimizer.state.get(param)
    if not row:
        return bool(needed)
    return "step" not in needed and any(row.get(name) is None for name in needed)


def _row(optimizer: Any, group: Group, param: Tensor) -> dict[str, Any]:
    """The state of a parameter; a count that is a number, as in old states, becomes a tensor."""
    row: dict[str, Any] = optimizer.state.get(param, {})
    for key in optimizer.scalar_state:
        if not isinstance(row[key], Tensor) and not optimizer.integer_steps:
            row[key] = optimizer.new_scalar(row[key], param, group)
    return row


def _order(opt: Leafwise[Any, Any], tensor: Tensor) -> tuple[int, ...] | None:
    """The axes in the order of memory; None where that is their own order, or must not change."""
    if not opt.elementwise or tensor.is_contiguous():
        return None
    return tuple(_memory.order(tensor))


def _value(scalar: Tensor) -> Any:
    """What tells the number in a 0-d tensor from others; a device is not waited for."""
    if scalar.is_meta:
        return None
    if not _modes.ordinary(scalar) or _modes.intercepted():
        return id(scalar)
    if scalar.device.type == "cpu":
        return scalar.item()
    if not _modes.versioned(scalar):
        return id(scalar)
    return marks.known([scalar])[0] or id(scalar)
