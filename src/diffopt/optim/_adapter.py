"""The adapter that puts a rule under a class of torch.optim.

A class here inherits constructor, argument checks, parameter groups, hooks and `zero_grad` from its
namesake in torch.optim. Ours is `step`, which runs a rule.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffopt import _torch, _tree
from diffopt._rule import hyper, ways
from diffopt._rule.leafwise import Leafwise
from diffopt.optim._checkpoints import Checkpoints
from diffopt.optim._plan import Group, Plan, Row, Watch, same, values_of

_SMALL = 1 << 14  # elements
_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu")


class RuleOptimizer(Checkpoints):
    """A `torch.optim.Optimizer` whose step is a rule's."""

    sparse_gradients: ClassVar[bool] = False
    integer_steps: ClassVar[bool] = False
    foreach_unrolls: ClassVar[bool] = False
    """Whether torch accepts foreach=True together with differentiable=True."""

    _plans: list[Any]
    _rows: list[Any]
    watch: Watch

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        """The pure optimizer of a parameter group."""
        raise NotImplementedError

    def buffers(self, opt: Leafwise[Any, Any], param: Tensor) -> Sequence[str]:
        """The fields of the state, after the step, that this parameter has."""
        return list(opt.buffers_of(param))

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """What torch puts around every class's `step`, entered where there is a hook or profiler.

        It takes as long as stepping some 50 small tensors.
        """
        hooked: Any = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            return (hooked if _torch.watched(self) else func)(self, *args, **kwargs)

        return step

    @_torch.disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if "capturable" in self.defaults:
            _torch.refuse_capture(self)
        self.check_numbers()
        with torch.no_grad():
            taken = self._take()  # all checks come before any change
        for group, plan, columns in zip(self.param_groups, self._plans, taken, strict=True):
            with torch.set_grad_enabled(bool(group.get("differentiable"))):
                plan.step_(self, group, columns)
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans, self._rows, self.watch = [], [], Watch()
        for key, row in self.state.items():
            if type(row) is dict:
                self.state[key] = Row(self.watch, row)

    def new_states(self, params: Sequence[Tensor], group: Group) -> list[dict[str, Any]]:
        """The state of parameters before their first step: torch's names, shapes and dtypes."""
        opt = self.rule(group)
        numbers = hyper.assemble(opt.hparams, values_of(opt, group))
        initial = opt.initial(numbers)
        rows: list[dict[str, Any]] = [{} for _ in params]
        for name in ("step", *opt.State._fields[1:]):
            value = initial.get(name, 0.0)
            if name in self.scalar_state:
                for row, param in zip(rows, params, strict=True):
                    row[name] = self.new_scalar(value, param, group)
            elif name != "step":
                owners = [i for i, param in enumerate(params) if name in self.buffers(opt, param)]
                shapes = [self._shapes(opt, params[i])[name] for i in owners]
                buffers = _filled([params[i] for i in owners], shapes, value)
                for i, buffer in zip(owners, buffers, strict=True):
                    rows[i][name] = buffer
        return rows

    def _shapes(self, opt: Leafwise[Any, Any], param: Tensor) -> dict[str, Any]:
        """The shape of each buffer."""
        names = opt.State._fields[1:]
        shapes = opt.shapes(param.shape) or [param.shape] * len(names)
        return dict(zip(names, map(torch.Size, shapes), strict=True))

    def new_scalar(self, value: Any, param: Tensor, group: Group) -> Tensor:
        """A 0-d tensor of the state, where torch has it and in torch's dtype."""
        fused = bool(group.get("fused"))
        dtype = torch.float32
        if torch.get_default_dtype() == torch.float64 and not fused:
            dtype = torch.float64
        on_device = fused or group.get("capturable") or self.scalars_follow
        device = param.device if on_device else "cpu"
        if isinstance(value, Tensor) and torch.is_grad_enabled():  # a differentiable step
            return value.clone()
        value = value.detach() if isinstance(value, Tensor) else value
        return torch.as_tensor(value, dtype=dtype, device=device).clone().reshape(())

    def _take(self) -> list[Any]:
        """What each group is to be stepped with; plans are kept where nothing has changed."""
        if "watch" not in self.__dict__:
            self._plans, self._rows, self.watch = [], [], Watch()
        plans: list[Any] = self._plans
        rows = list(self.state.values())
        if len(plans) != len(self.param_groups) or not same(rows, self._rows):
            plans = [None] * len(self.param_groups)
        taken: list[Any] = []
        for i, (group, plan) in enumerate(zip(self.param_groups, plans, strict=True)):
            columns = plan and plan.take(self, group)
            if columns is None:
                plans[i] = Plan(self, group, i)
                columns = plans[i].take(self, group)
                rows = list(self.state.values())
            taken.append(columns)
        self._plans, self._rows, self.watch.changed = plans, rows, False
        return taken

    def check_param(self, param: Tensor, group: Group, name: str) -> None:
        """Raise for a parameter that cannot be stepped, as torch does and when it does."""
        kind = type(self).__name__
        grad: Any = param.grad
        if grad.is_sparse and not self.sparse_gradients:
            raise RuntimeError(f"{kind} does not support sparse gradients: {name} has one")
        if group.get("fused") and not (
            param.is_floating_point() and param.device.type in _FUSED_DEVICES
        ):
            raise RuntimeError(
                "`fused=True` requires all the params to be floating point Tensors of supported "
                f"devices: {_FUSED_DEVICES}, but {name} has {param.dtype} on {param.device.type}"
            )
        if group.get("fused") and grad.is_sparse:
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
        opt = self.rule(group)
        shapes = self._shapes(opt, param)
        buffers = self.buffers(opt, param)
        for key in (*self.scalar_state, *buffers) if row else ():
            if "step" not in self.scalar_state and row.get(key) is None:
                continue  # made at the first step that needs it, as in torch
            if key not in row:
                raise ValueError(
                    f"loaded state dict does not match the optimizer: the state of {name} has "
                    f"{sorted(map(str, row))}, but no {key}"
                )
            if key not in self.scalar_state:
                _check_buffer(row[key], key, param, shapes[key], name)


def _check_buffer(value: Any, key: str, param: Tensor, shape: torch.Size, name: str) -> None:
    """Raise where a saved buffer cannot be that of this parameter."""
    if not isinstance(value, Tensor):
        found = _tree.describe(value)
        raise ValueError(f"loaded state dict: {key} of {name} is {found}, not a tensor")
    if value.shape != shape:
        raise ValueError(
            f"loaded state dict does not match the parameters: {key} of {name} has shape "
            f"{tuple(value.shape)}, but must have {tuple(shape)}, since {name} has "
            f"shape {tuple(param.shape)}"
        )
    if value.is_complex() != param.is_complex() or not (
        value.is_floating_point() or value.is_complex()
    ):
        raise ValueError(
            f"loaded state dict does not match the parameters: {key} of {name} has dtype "
            f"{value.dtype}, but {name} has dtype {param.dtype}"
        )


def _filled(params: Sequence[Tensor], shapes: Sequence[torch.Size], value: Any) -> list[Tensor]:
    """Buffers for params; those of many small ones are pieces of one vector, faster to walk."""
    lengths = [shape.numel() for shape in shapes]
    alike = len({(param.dtype, param.device) for param in params}) == 1
    plain = ways.ordinary(params) and all(map(Tensor.is_contiguous, params))
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
    if value == 0 and shape == param.shape:
        return torch.zeros_like(param, memory_format=torch.preserve_format, requires_grad=False)
    if shape != param.shape:
        return param.new_zeros(shape) if value == 0 else param.new_full(shape, value)
    return torch.full_like(param, value, memory_format=torch.preserve_format, requires_grad=False)
