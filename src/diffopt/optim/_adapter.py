"""The adapter that puts a rule under a class of torch.optim.

A class here inherits constructor, argument checks, parameter groups, hooks and `zero_grad` from its
namesake in torch.optim. Ours is `step`, which runs a rule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffopt import _memory, _modes, _torch, _tree
from diffopt._rule import running
from diffopt._rule.leafwise import Leafwise
from diffopt.optim import _state
from diffopt.optim._checkpoints import Planned, check_dense
from diffopt.optim._groups import Group, name_of, plain_number, values_of
from diffopt.optim._options import Options, made
from diffopt.optim._plan import Plan, trace_
from diffopt.optim._state import State

_SMALL = 1 << 14  # elements
_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu")


class RuleOptimizer(Planned):
    """A `torch.optim.Optimizer` whose step is a rule's."""

    sparse_gradients: ClassVar[bool] = False
    integer_steps: ClassVar[bool] = False
    foreach_unrolls: ClassVar[bool] = False
    """Whether torch accepts foreach=True together with differentiable=True."""
    strict: ClassVar[bool] = False
    """Whether numbers set later must be in their ranges, too: for classes that torch lacks."""
    make: ClassVar[Callable[..., Leafwise[Any, Any]]]
    """Makes a pure optimizer."""
    flags: ClassVar[tuple[str, ...]] = ("maximize",)
    """The options of a group that are arguments of `make`."""

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        """The pure optimizer of a group: it depends on flags and on signs of numbers only."""
        return made(type(self).make, **{name: group[name] for name in self.flags})

    def fields(self, opt: Leafwise[Any, Any], param: Tensor) -> dict[str, torch.Size]:
        """The state of a parameter as in torch: the shape of each buffer, () for scalars."""
        used, names = opt.buffers_of(param), opt.buffer_names
        shapes = opt.shapes(param.shape) or [param.shape] * len(names)
        buffers = {k: torch.Size(v) for k, v in zip(names, shapes, strict=True) if k in used}
        scalars = dict.fromkeys(self.scalar_state, torch.Size())
        return scalars | buffers | scalars  # in this order

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step.

        If Ctrl-C interrupts it, some parameters may have been stepped and others not. Where they
        are stepped one by one, the count of each agrees with it. Where they are stepped together,
        their counts may be off by one if the interrupt falls between counting and writing, or,
        without a fused kernel, while the parameters are written.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            TypeError, ValueError, KeyError, RuntimeError: a hyperparameter, parameter, gradient or
                state with which no step can be made. Nothing has changed.
        """
        loss = self._loss(closure)
        if not _modes.compiling() and _torch.frame_compiler() is None:
            self._step_all()
        elif _modes.compiling() and not self.integer_steps:  # torch has such steps run eagerly
            self._traced_step()
        else:
            self._eager_step()
        return loss

    def _traced_step(self) -> None:
        """Tensor by tensor, as operations of a graph."""
        with torch.no_grad():
            for group in self.param_groups:
                opt = self.rule(group)
                names = self._names(opt, group)
                columns: list[list[Any]] = [[] for _ in ("param", "grad", *names)]
                self._init_group(group, *columns)
                values = values_of(opt, group)
                for param, grad, *state in zip(*columns, strict=True):
                    trace_(opt, values, param, grad, dict(zip(names, state, strict=True)))

    def _fill(self, group: Group, *columns: list[Any]) -> None:
        """Put a group's tensors into columns: params, gradients, and those of `_names`."""
        params, index = group["params"], self.param_groups.index(group)
        grads = [param.grad for param in params]
        self._check(group, index, grads)
        options = Options(self, group)
        options.check(f"param_groups[{index}]")
        plan = Plan(self, group, options, grads)
        self._refuse_trace(group, plan)
        names = self._names(plan.options.opt, group)
        for param, grad in zip(params, grads, strict=True):
            if grad is not None:
                row = self.state.get(param, {})
                found = [param, grad, *(row.get(name) for name in names)]
                for column, value in zip(columns, found, strict=True):
                    column.append(value)

    _init_group: Any = _fill  # under this name torch.compile runs it, and knows what it finds

    def _refuse_trace(self, group: Group, plan: Plan) -> None:
        reason = None
        if group.get("differentiable"):
            reason = "is differentiable: compile `update` of the pure optimizer"
        elif getattr(self, "grad_scale", None) is not None or hasattr(self, "found_inf"):
            reason = "is scaled by a GradScaler"
        elif any(bucket.key.kind.layout == "sparse" for bucket in plan.buckets):
            reason = "has sparse gradients"
        elif group.get("dampening") and any(bucket.key.fresh for bucket in plan.buckets):
            reason = "is the first one of a dampened momentum: take one step before"
        if reason:
            raise RuntimeError(
                f"torch.compile cannot take a step of {type(self).__name__} that {reason}"
            )

    def _names(self, opt: Leafwise[Any, Any], group: Group) -> list[str]:
        """What the state of some parameter has."""
        return list(dict.fromkeys(k for param in group["params"] for k in self.fields(opt, param)))

    def _step_all(self) -> None:
        if "capturable" in self.defaults:
            _torch.refuse_capture(self)
        groups = self.param_groups
        grads = [[param.grad for param in group["params"]] for group in groups]
        enabled = torch.is_grad_enabled()
        try:  # torch's contexts take as long as stepping some five small tensors
            _torch.set_grad_enabled(False)
            plans = self._planned(grads)  # all checks come before any change
            for group, plan, gradients in zip(groups, plans, grads, strict=True):
                plan = plan or self._plan(group, Options(self, group), gradients)
                _torch.set_grad_enabled(bool(group.get("differentiable")))
                plan.step_(self, group, gradients)
        finally:
            _torch.set_grad_enabled(enabled)

    _eager_step = _torch.disable_dynamo(_step_all)

    def _planned(self, grads: list[list[Any]]) -> list[Any]:
        """How each group is stepped: as before where nothing has changed.

        None where that depends on the steps of the groups before it.
        """
        groups = self.param_groups
        kept: list[Any] = self.state.plans if type(self.state) is State else []
        plans: list[Any] = [*kept] if len(kept) == len(groups) else [None] * len(groups)
        options = self._read(plans)
        stale: list[int] = []
        for i, group in enumerate(groups):
            if not (plans[i] and plans[i].holds(self, group, options[i], grads[i])):
                plans[i] = None
                stale.append(i)
        if not stale:
            return plans
        kept.clear()
        with _state.unread(self.state):
            for i in stale:
                self._check(groups[i], i, grads[i])
            if self._entwined():
                return [None] * len(groups)
        for i in stale:
            plans[i] = self._plan(groups[i], options[i], grads[i])
        kept[:] = [plan if plan.lasting else None for plan in plans]
        return plans

    def _plan(self, group: Group, options: Options, grads: list[Any]) -> Plan:
        with torch.no_grad(), _state.unread(self.state):
            return Plan(self, group, options, grads)

    def _entwined(self) -> bool:
        """Whether two groups share a parameter or a count, which each of them moves in turn."""
        if len(self.param_groups) < 2:
            return False
        moved = [set(self._moved(group["params"])) for group in self.param_groups]
        return len(set[int]().union(*moved)) < sum(map(len, moved))

    def _moved(self, params: list[Tensor]) -> Iterator[int]:
        """What identifies params, their rows of the state, and the counts in these."""
        for param in params:
            yield id(param)
            if row := self.state.get(param):
                yield id(row)
                counts = [x for name in self.scalar_state if isinstance(x := row.get(name), Tensor)]
                yield from (_memory.address(x) or id(x) for x in counts)

    def _read(self, plans: list[Any]) -> list[Options]:
        """The options of each group."""
        pairs = zip(self.param_groups, plans, strict=True)
        known = [plan and plan.options.current(group) for group, plan in pairs]
        if all(known):
            return known
        self.check_numbers()
        options = [Options(self, group) for group in self.param_groups]
        for i, found in enumerate(options):
            found.check(f"param_groups[{i}]")
        return options

    def new_states(self, params: Sequence[Tensor], group: Group) -> list[dict[str, Any]]:
        """The state of parameters before their first step."""
        opt = self.rule(group)
        initial = running.initial_of(opt, values_of(opt, group))
        scalars = {name: initial.get(name, 0.0) for name in self.scalar_state}
        return [
            {name: self.new_scalar(value, param, group) for name, value in scalars.items()} | row
            for param, row in zip(params, self.new_buffers(opt, params, initial), strict=True)
        ]

    def new_buffers(
        self, opt: Leafwise[Any, Any], params: Sequence[Tensor], initial: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """The buffers of parameters before their first step, with torch's shapes and dtypes."""
        fields = [self.fields(opt, param) for param in params]
        rows: list[dict[str, Any]] = [{} for _ in params]
        for name in [name for name in opt.buffer_names if name not in self.scalar_state]:
            owners = [i for i, shapes in enumerate(fields) if name in shapes]
            shapes = [fields[i][name] for i in owners]
            buffers = _filled([params[i] for i in owners], shapes, initial.get(name, 0.0))
            for i, buffer in zip(owners, buffers, strict=True):
                rows[i][name] = buffer
        return rows

    def new_scalar(self, value: Any, param: Tensor, group: Group) -> Tensor:
        """A 0-d tensor of the state, where torch has it and in torch's dtype."""
        if isinstance(value, Tensor) and torch.is_grad_enabled():  # a differentiable step
            return value.clone()
        fused = self.by_torch(group)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        dtype = torch.float32 if fused else dtype
        on_device = fused or group.get("capturable") or self.scalars_follow
        device = param.device if on_device else "cpu"
        if not isinstance(value, Tensor):  # filled in there: a copy would wait for the device
            return torch.full((), value, dtype=dtype, device=device)
        return value.detach().to(device, dtype, copy=True).reshape(())

    def _check(self, group: Group, index: int, grads: list[Any]) -> None:
        """Raise for what cannot be stepped."""
        opt = self.rule(group)
        for i, (param, grad) in enumerate(zip(group["params"], grads, strict=True)):
            if grad is None:
                continue
            name = name_of(group, index, i)
            self.check_param(param, group, name)
            if reason := opt.refuse(param):
                raise (ValueError if self.strict else RuntimeError)(f"{name} {reason}")
            _check_tensor(grad, param, param.shape, f"the gradient of {name}")
            _check_written(param, name)
            if not opt.elementwise:
                _check_shards(param, name)
            self._check_row(opt, self.state.get(param) or {}, param, name)

    def _check_row(self, opt: Leafwise[Any, Any], row: Any, param: Tensor, name: str) -> None:
        """Raise where the state of a parameter is not complete or does not fit it."""
        for key, value in row.items():
            check_dense(value, param, f"{key} of {name}")
        for key, shape in self.fields(opt, param).items() if row else ():
            where, value = f"{key} of {name}", row.get(key)
            if value is None and "step" not in self.scalar_state:
                continue  # made at the first step that needs it, as in torch
            if key not in row:
                raise KeyError(f"the state of {name} has {sorted(map(str, row))}, but no {key}")
            if key in self.scalar_state:
                plain_number(value, where)
            else:
                _check_tensor(value, param, shape, where)
            if isinstance(value, Tensor):
                _check_written(value, where)

    def check_param(self, param: Tensor, group: Group, name: str) -> None:
        """Raise torch's error for a parameter that cannot be stepped, when torch raises it."""
        kind = type(self).__name__
        grad: Any = param.grad
        if grad.is_sparse and not self.sparse_gradients:
            raise RuntimeError(f"{kind} does not support sparse gradients: {name} has one")
        if self.by_torch(group) and not (
            param.is_floating_point() and param.device.type in _FUSED_DEVICES
        ):
            raise RuntimeError(
                "`fused=True` requires all the params to be floating point Tensors of supported "
                f"devices: {_FUSED_DEVICES}, but {name} has {param.dtype} on {param.device.type}"
            )
        if self.by_torch(group) and grad.is_sparse:
            raise RuntimeError(f"`fused=True` does not support sparse gradients: {name} has one")
        if group.get("foreach") and group.get("differentiable") and not self.foreach_unrolls:
            raise AssertionError("foreach=True and differentiable=True exclude each other")
        if group.get("capturable") and param.device.type == "cpu":
            raise AssertionError(
                f"If capturable=True, params must be on an accelerator, but {name} is on the cpu"
            )
        if group.get("differentiable") and param.requires_grad and param.is_leaf:
            raise RuntimeError(
                f"{name} is a leaf that requires grad, which a differentiable step cannot write "
                "to: optimize a clone of it"
            )

    def check_state(self, row: dict[str, Any], param: Tensor, group: Group, name: str) -> None:
        try:
            self._check_row(self.rule(group), row, param, name)
        except (KeyError, ValueError) as error:
            raise ValueError(f"loaded state dict: {error.args[0]}") from None


class Fusible(RuleOptimizer):
    """A class that takes `fused`, unlike its namesake in torch: torch.compile makes the kernel.

    Its signature stays torch's, as its groups do where `fused` is not given.
    """

    later = ("fused",)

    def __init_subclass__(cls) -> None:
        if Fusible in cls.__bases__:
            cls.__signature__ = inspect.signature(cls.__bases__[-1])
        elif "__init__" in vars(cls):
            cls.__signature__ = None

    def __init__(
        self, params: Iterable[Any], *args: Any, fused: bool | None = None, **options: Any
    ) -> None:
        super().__init__(params, *args, **options)
        if fused and self.defaults["differentiable"]:
            raise RuntimeError("`fused` does not support `differentiable`")
        if fused and self.defaults["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if fused is None:
            return
        self.defaults["fused"] = fused
        for group in self.param_groups:
            group.setdefault("fused", fused)

    def by_torch(self, group: Group) -> bool:
        return False


def _check_tensor(value: Any, param: Tensor, shape: torch.Size, name: str) -> None:
    """Raise where a gradient or a buffer does not fit its parameter."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {_tree.describe(value)}, not a tensor")
    if value.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but must have {tuple(shape)}, since the "
            f"parameter has shape {tuple(param.shape)}"
        )
    if value.device != param.device:
        raise ValueError(f"{name} is on {value.device}, but the parameter is on {param.device}")
    if value.is_complex() != param.is_complex() or not _modes.has_derivative(value):
        raise ValueError(
            f"{name} has dtype {value.dtype}, but the parameter has dtype {param.dtype}"
        )


def _check_written(tensor: Tensor, name: str) -> None:
    if _modes.locked(tensor):
        raise RuntimeError(
            f"{name} was made in torch.inference_mode, outside of which it cannot be written: "
            "clone it"
        )


def _check_shards(param: Tensor, name: str) -> None:
    """Raise on all ranks for a DTensor that has no elements on one: torch cannot reduce those."""
    mesh: Any = getattr(param, "device_mesh", None)
    sizes = {dim: {n} for dim, n in enumerate(param.shape)}
    for k, placement in enumerate(getattr(param, "placements", ())):
        if placement.is_shard():
            parts = {(n, -(-n // mesh.size(k))) for n in sizes[placement.dim]}
            sizes[placement.dim] = {
                max(min(most, n - most * rank), 0)
                for n, most in parts
                for rank in range(mesh.size(k))
            }
    if param.numel() and any(0 in of for of in sizes.values()):
        raise ValueError(
            f"{name} of shape {tuple(param.shape)} has no elements on some rank of its mesh, where "
            "this optimizer cannot compute: shard it by another dimension, or replicate it"
        )


def _filled(params: Sequence[Tensor], shapes: Sequence[torch.Size], value: Any) -> list[Tensor]:
    """Buffers for params; those of many small ones are pieces of one vector, faster to walk."""
    lengths = [shape.numel() for shape in shapes]
    alike = len({(param.dtype, param.device) for param in params}) == 1
    plain = all(_modes.ordinary(param) and param.is_contiguous() for param in params)
    if len(params) < 2 or sum(lengths) > _SMALL * len(params) or not (alike and plain):
        return [_filled_like(p, shape, value) for p, shape in zip(params, shapes, strict=True)]
    vector = _filled_like(params[0], torch.Size([sum(lengths)]), value)
    return [x.view(shape) for x, shape in zip(vector.split(lengths), shapes, strict=True)]


def _filled_like(param: Tensor, shape: torch.Size, value: Any) -> Tensor:
    if isinstance(value, Tensor) and torch.is_grad_enabled():  # a differentiable step
        whole = torch.ones(shape, dtype=param.dtype.to_real(), device=param.device) * value
        return torch.complex(whole, whole) if param.is_complex() else whole
    value = value.item() if isinstance(value, Tensor) else value
    value = complex(value, value) if param.is_complex() else value
    same = shape == param.shape  # then the memory format is kept too
    return torch.full_like(param, value) if same else param.new_full(shape, value)
