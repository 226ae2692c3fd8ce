"""Saving and loading checkpoints in the format of torch.optim, as copies."""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffopt import _torch, _tree
from diffopt._arguments import check_function
from diffopt._modes import has_derivative
from diffopt.optim import _state
from diffopt.optim._groups import Group, check_numbers, name_of, plain_number, with_betas
from diffopt.optim._state import State


class Checkpoints(torch.optim.Optimizer):
    """Saves and loads checkpoints in the format of torch.optim; unlike torch's they are copies."""

    state: Any
    scalar_state: ClassVar[tuple[str, ...]] = ("step",)
    """The fields of the state that torch keeps as one 0-d tensor per parameter."""
    scalars_follow: ClassVar[bool] = False
    """Whether torch keeps those on the parameter's device even without graph capture."""
    later: ClassVar[tuple[str, ...]] = ()
    """Options that older checkpoints lack, which keep what the constructor was given."""

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """What torch puts around every class's `step`, used only for hooks and profilers.

        It takes as long as stepping some 50 small tensors.
        """
        hooked: Any = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            return (hooked if _torch.watched(self) else func)(self, *args, **kwargs)

        return step

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, which may have its own options.

        Args:
            param_group: "params" and any of the class's options. It is copied.
        """
        super().add_param_group(with_betas(copy.copy(param_group), self.defaults))

    def _loss(self, closure: Callable[[], Any] | None) -> Any:
        """What the closure of a step returns, called with gradients enabled; None without one."""
        if closure is None:
            return None
        check_function(closure, "closure")
        with torch.enable_grad():
            return closure()

    @_torch.disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state and the parameter groups, as in torch.optim, but copied and detached."""
        for hook in _torch.hooks(self, "state_dict_pre"):
            hook(self)
        index: dict[int, int] = {}
        groups: list[Group] = []
        for group in self.param_groups:
            indices = [index.setdefault(id(param), len(index)) for param in group["params"]]
            options = {k: v for k, v in group.items() if k != "params"}
            groups.append(copied(options) | {"params": indices})
        with _state.unread(self.state):
            state = {
                index.get(id(key), key): copied(dict(row) if isinstance(row, _state.Row) else row)
                for key, row in self.state.items()
            }
        saved: dict[str, Any] = {"state": state, "param_groups": groups}
        for hook in _torch.hooks(self, "state_dict_post"):
            result = hook(self, saved)
            saved = saved if result is None else result
        return saved

    @_torch.disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict` of this class or of the class of the same name in torch.optim.

        Every tensor is copied to the device of its parameter. One with a narrower dtype than the
        parameter is converted to the parameter's, so that a run in bfloat16 can continue in
        float32; one with a wider dtype keeps it.

        Raises:
            TypeError: `state_dict`, or a part of it, is not a dict.
            ValueError: groups, shapes or names of the state do not match, a buffer is not a
                floating-point tensor, or a step is not a count.

        Nothing is changed when it, or one of its hooks, raises.
        """
        state_dict = _as_dict(state_dict, "state_dict")
        for hook in _torch.hooks(self, "load_state_dict_pre"):
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        before = self.__dict__.copy()
        try:
            self._load(*_parts(state_dict))
            for hook in _torch.hooks(self, "load_state_dict_post"):
                hook(self)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _load(self, saved: dict[Any, Any], groups: list[Group]) -> None:
        params = self._matched(groups)
        for mine, theirs in zip(self.param_groups, groups, strict=True):
            theirs["params"] = mine["params"]
            if "param_names" in mine:
                theirs.setdefault("param_names", mine["param_names"])
        state: defaultdict[Any, Any] = defaultdict(dict)
        for key, row in saved.items():
            if key in params:
                state[params[key][0]] = self._loaded(row, *params[key])
            else:
                state[key] = copied(row)
        _state.pack([row for row in state.values() if isinstance(row, dict)], self.scalar_state)
        self.__setstate__({"state": state, "param_groups": groups})  # it converts older formats
        for group in self.param_groups:
            if missing := sorted(self.defaults.keys() - group.keys() - {"differentiable"}):
                kind = type(self).__name__
                raise ValueError(
                    f"loaded state dict does not belong to {kind}: its groups have no "
                    f"{missing[0]!r}"
                )
        self.check_numbers()
        for param, group, name in params.values():
            self.check_state(self.state.get(param, {}), param, group, name)
        _state.mark_unlent(self.state, self.scalar_state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name in self.defaults.keys() & {*self.later}:
                group.setdefault(name, self.defaults[name])

    def by_torch(self, group: Group) -> bool:
        """Whether a group asks for a fused kernel of torch's, which counts steps on the device."""
        return bool(group.get("fused"))

    def check_numbers(self) -> None:
        """Raise if a group has something other than a number for a number."""
        check_numbers(self.param_groups, self.defaults)

    def check_state(self, row: dict[str, Any], param: Tensor, group: Group, name: str) -> None:
        """Raise if a saved state does not fit this parameter."""

    def _matched(self, groups: list[Group]) -> dict[Any, tuple[Tensor, Group, str]]:
        """For each saved index, the parameter of this optimizer, its saved group and its name."""
        if len(groups) != len(self.param_groups):
            raise ValueError(
                "loaded state dict has a different number of parameter groups: "
                f"{len(groups)}, but the optimizer has {len(self.param_groups)}"
            )
        params: dict[Any, tuple[Tensor, Group, str]] = {}
        for i, (mine, theirs) in enumerate(zip(self.param_groups, groups, strict=True)):
            sizes = len(theirs["params"]), len(mine["params"])
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"loaded state dict contains a parameter group that doesn't match the size of "
                    f"optimizer's group: param_groups[{i}] has {sizes[0]} parameters, but the "
                    f"optimizer's has {sizes[1]}"
                )
            for j, (key, param) in enumerate(zip(theirs["params"], mine["params"], strict=True)):
                params[key] = param, theirs, name_of(mine, i, j)
        return params

    def _loaded(self, row: Any, param: Tensor, group: Group, name: str) -> dict[str, Any]:
        """A copy of a parameter's state, on its device and in suitable dtypes."""

        def widened(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            dtype = self.state_dtype(leaf, param, group) if has_derivative(leaf) else leaf.dtype
            return leaf.detach().to(param.device, dtype, copy=True)

        loaded = _as_dict(row, f"state of {name}")
        missing = [key for key in self.scalar_state if loaded and key not in loaded]
        if missing:  # torch's __setstate__ would fail to find it
            raise ValueError(
                f"loaded state dict: the state of {name} has {sorted(map(str, loaded))}, but no "
                f"{missing[0]}"
            )
        for key, value in loaded.items():
            for leaf in _tree.leaves(value):
                check_dense(leaf, param, f"loaded state dict: {key} of {name}")
            if key in self.scalar_state:
                check_scalar(key, value, name)
                loaded[key] = self.loaded_scalar(key, value, param, group)
            else:
                loaded[key] = _tree.map(widened, value)
        return loaded

    def state_dtype(self, value: Tensor, param: Tensor, group: Group) -> torch.dtype:
        """The dtype for a saved buffer: its own, or the parameter's if that is wider."""
        alike = value.is_complex() == param.is_complex()
        return torch.promote_types(value.dtype, param.dtype) if alike else value.dtype

    def loaded_scalar(self, key: str, value: Any, param: Tensor, group: Group) -> Any:
        """A saved scalar, such as a step, in at least float32, which counts to 2^24."""
        if not isinstance(value, Tensor):
            return value  # torch's __setstate__ converts it to a tensor
        captured = self.by_torch(group) or group.get("capturable")
        dtype = torch.promote_types(value.dtype, torch.float32)
        dtype = torch.float32 if captured and key == "step" else dtype
        device = param.device if captured or self.scalars_follow else "cpu"
        return value.detach().reshape(()).to(device, dtype, copy=True)


class Planned(Checkpoints):
    """A class with plans for its next steps, which any change of its state drops."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "state":
            self._drop_plans()
            if not value and "param_groups" not in self.__dict__:  # torch's, at construction
                value = State()
        super().__setattr__(name, value)

    def _drop_plans(self) -> None:
        state: Any = self.__dict__.get("state")
        if type(state) is State:
            state.plans.clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._drop_plans()
        super().__setstate__(state)
        if type(self.state) is not State:
            self.state = State(self.state)


def copied(tree: Any) -> Any:
    """A copy of the tree, whose tensors share neither memory nor history with the old ones."""
    return _tree.map_tensors(lambda x: x.detach().clone(), tree)


def check_dense(value: Any, param: Tensor, name: str) -> None:
    """Raise for a tensor of the state that has no values to compute with."""
    if not isinstance(value, Tensor):
        return
    if value.layout is not torch.strided or (value.is_meta and not param.is_meta):
        raise ValueError(
            f"{name} has layout {value.layout} and device {value.device}, but must be a dense "
            "tensor with values"
        )


def check_scalar(key: str, value: Any, name: str) -> None:
    """Raise if a saved scalar is not a number, or a step is not a count."""
    number = plain_number(value, f"{key} of {name}")
    if isinstance(value, bool):
        raise TypeError(f"{key} of {name} is {value}, but must be a number")
    if key != "step" or (isinstance(number, Tensor) and number.is_meta):
        return
    if not (float(number) >= 0 and float(number).is_integer()):
        raise ValueError(f"step of {name} is {float(number)}, but must be a count of steps")


def _parts(state_dict: Any) -> tuple[dict[Any, Any], list[Group]]:
    """The state and copies of the groups of a state dict; raises if it is not one."""
    if missing := {"state", "param_groups"} - _as_dict(state_dict, "state_dict").keys():
        raise ValueError(
            f"state_dict has no {min(missing)!r}, only {list(state_dict)}: it is not the "
            "state_dict() of an optimizer"
        )
    groups = state_dict["param_groups"]
    if not isinstance(groups, (list, tuple)):
        raise TypeError(f"state_dict['param_groups'] is {_tree.describe(groups)}, not a list")
    for i, group in enumerate(groups):
        name = f"state_dict['param_groups'][{i}]"
        if not isinstance(_as_dict(group, name).get("params"), (list, tuple)):
            raise ValueError(f"{name} has no list of 'params'")
    return _as_dict(state_dict["state"], "state_dict['state']"), [copied(g) for g in groups]


def _as_dict(value: Any, name: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is {_tree.describe(value)}, not a dict")
    return dict(value)
