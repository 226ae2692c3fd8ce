"""Making and reading the checkpoints of torch.optim, which are copies here."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffopt import _torch, _tree
from diffopt.optim._plan import Group, Row, name_of


class Checkpoints(torch.optim.Optimizer):
    """Makes and reads the checkpoints of torch.optim, which are copies here."""

    scalar_state: ClassVar[tuple[str, ...]] = ("step",)
    """What torch keeps in one 0-d tensor for each parameter."""
    scalars_follow: ClassVar[bool] = False
    """Whether torch has those on the parameter's device even where no graph is captured."""

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, which may have values of their own.

        Args:
            param_group: "params", and any of the class's options. It is copied.
        """
        super().add_param_group(copy.copy(param_group))

    @_torch.disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state and the parameter groups, as torch.optim has them, but copied and detached."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        index: dict[int, int] = {}
        for group in self.param_groups:
            for param in group["params"]:
                index.setdefault(id(param), len(index))
        groups: list[Group] = []
        for group in self.param_groups:
            params = [index[id(param)] for param in group["params"]]
            groups.append(copied({k: v for k, v in group.items() if k != "params"}))
            groups[-1]["params"] = params
        state = {
            index[id(key)] if isinstance(key, Tensor) else key: copied(_plain(row))
            for key, row in self.state.items()
        }
        saved: dict[str, Any] = {"state": state, "param_groups": groups}
        for hook in self._optimizer_state_dict_post_hooks.values():
            result = hook(self, saved)
            saved = saved if result is None else result
        return saved

    @_torch.disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of this class, or of its namesake in torch.optim, returned.

        Every tensor is copied to the device of its parameter and keeps its dtype.

        Raises:
            ValueError: groups, shapes or names of the state do not match; nothing is changed.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        groups: list[Group] = copied(state_dict["param_groups"])
        params = self._matched(groups)
        state: defaultdict[Any, Any] = defaultdict(dict)
        for key, row in state_dict["state"].items():
            if key not in params:
                state[key] = copied(row)
                continue
            param, group, _ = params[key]
            state[param] = {k: self._loaded(k, v, param, group) for k, v in row.items()}
        for mine, theirs in zip(self.param_groups, groups, strict=True):
            theirs["params"] = mine["params"]
            if "param_names" in mine:
                theirs.setdefault("param_names", mine["param_names"])
        before = {"state": self.state, "param_groups": self.param_groups}
        try:
            self.__setstate__({"state": state, "param_groups": groups})  # it knows older formats
            for param, group, name in params.values():
                if missing := sorted(self.defaults.keys() - group.keys() - {"differentiable"}):
                    raise KeyError(missing[0])
                self.check_state(state.get(param, {}), param, group, name)
        except Exception as error:
            self.__setstate__(before)
            if isinstance(error, KeyError):
                kind = type(self).__name__
                message = f"loaded state dict is not that of a {kind}: it has no {error}"
                raise ValueError(message) from error
            raise
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def check_state(self, row: dict[str, Any], param: Tensor, group: Group, name: str) -> None:
        """Raise where a saved state cannot be that of this parameter."""

    def _matched(self, groups: list[Group]) -> dict[Any, tuple[Tensor, Group, str]]:
        """Each saved index with our parameter, its saved group and its name."""
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

    def _loaded(self, key: str, value: Any, param: Tensor, group: Group) -> Any:
        if key not in self.scalar_state or not isinstance(value, Tensor):
            return copied(value, param.device)
        captured = group.get("fused") or group.get("capturable")
        dtype = torch.float32 if captured and key == "step" else value.dtype
        on_device = captured or self.scalars_follow
        return copied(value.to(dtype), param.device if on_device else "cpu")


def copied(tree: Any, device: Any = None) -> Any:
    """A tree of which no tensor shares memory or history with the old one."""

    def copy_of(leaf: Any) -> Any:
        return leaf.detach().to(device, copy=True) if isinstance(leaf, Tensor) else leaf

    return _tree.map(copy_of, tree)


def _plain(row: Any) -> Any:
    return dict(row) if isinstance(row, Row) else row
