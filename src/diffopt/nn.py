"""An nn.Module as a pure function of its parameters and buffers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.func import functional_call  # pyright: ignore[reportPrivateImportUsage]


class Functional(NamedTuple):
    """What `functionalize` returns; calling it is calling `apply`.

    Attributes:
        apply: `(params, buffers, *inputs, **kwargs) -> (outputs, new_buffers)`.
        params: the module's own trainable parameters by name, each once.
        buffers: every other tensor of the module by name: its buffers and its frozen parameters.
    """

    apply: Callable[..., tuple[Any, dict[str, Tensor]]]
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def __call__(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        *inputs: Any,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        """The module's outputs at these tensors, and the buffers after the call."""
        return self.apply(params, buffers, *inputs, **kwargs)


def functionalize(module: nn.Module) -> Functional:
    """Make a pure function of a module.

    The call computes `module(*inputs, **kwargs)` with `params` and `buffers` in place of the
    module's own tensors. What the module writes into its buffers goes into the new buffers that are
    returned; the module and the arguments are left alone. The module's mode (`train`, `eval`) is
    that at the time of the call. Under `torch.vmap`, buffers that are written to must be batched.

    Args:
        module: any module. A parameter with `requires_grad=False` counts as a buffer, so that no
            optimizer moves it. A tensor that is reachable by several names (tied weights) stands
            under the first one, and its gradient is the sum over all its uses.

    Returns:
        A `Functional`, which unpacks as `apply, params, buffers`. Its `params` are the module's own
        tensors: gradients of a solution that started there arrive in the module's parameters.

    Raises:
        TypeError: `module` is no module.
        ValueError: (from the call) `params` or `buffers` miss a name, have one too many, or a
            parameter's shape is not the module's.

    Example:
        >>> import torch, diffopt
        >>> model = diffopt.nn.functionalize(torch.nn.BatchNorm1d(2))
        >>> sorted(model.params), sorted(model.buffers)
        (['bias', 'weight'], ['num_batches_tracked', 'running_mean', 'running_var'])
        >>> x = torch.tensor([[0.0, 2.0], [4.0, 2.0]])
        >>> y, buffers = model(model.params, model.buffers, x)
        >>> buffers["running_mean"], model.buffers["running_mean"]
        (tensor([0.2000, 0.2000]), tensor([0., 0.]))
    """
    if not isinstance(module, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"module is {module!r}, not a torch.nn.Module")
    names = _slots(module)
    canonical = {id(tensor): name for name, tensor in reversed(names.items())}
    own = {name: tensor for name, tensor in names.items() if canonical[id(tensor)] == name}
    params: dict[str, Tensor] = {
        k: t for k, t in own.items() if isinstance(t, nn.Parameter) and t.requires_grad
    }
    buffers = {k: t for k, t in own.items() if k not in params}
    aliases = {k: canonical[id(t)] for k, t in names.items() if k not in own}

    def apply(
        new_params: Mapping[str, Tensor],
        new_buffers: Mapping[str, Tensor],
        *inputs: Any,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        _check_names("params", new_params, params.keys())
        _check_names("buffers", new_buffers, buffers.keys())
        _check_shapes(new_params, params)
        # The module may write into its buffers, or replace them: functional_call leaves what it
        # finds afterwards in this dictionary. Frozen parameters are only read.
        tensors = {
            k: b if isinstance(buffers[k], nn.Parameter) else b.clone()
            for k, b in new_buffers.items()
        }
        tensors |= new_params
        tensors |= {alias: tensors[name] for alias, name in aliases.items()}
        outputs = functional_call(module, tensors, inputs, kwargs, tie_weights=False)
        return outputs, {name: tensors[name] for name in buffers}

    return Functional(apply, params, buffers)


def decay_mask(module: nn.Module) -> dict[str, bool]:
    """Which parameters are to be decayed: all but biases, and the parameters of norms.

    A bias is what its module calls so (`bias`, `in_proj_bias`, `bias_ih_l0`); a norm is a module
    whose class, or a base of it, has "norm" in its name (`BatchNorm2d`, `LayerNorm`, `MyRMSNorm`).

    Args:
        module: any module.

    Returns:
        A bool for each of `functionalize(module).params`, by the same names: a tied tensor goes by
        its first one. It is a mask for `diffopt.transforms.masked`, holds labels for
        `diffopt.transforms.partition`, and makes a hyperparameter.

    Raises:
        TypeError: `module` is no module.

    Example:
        >>> import torch, diffopt
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
        >>> mask = diffopt.nn.decay_mask(model)
        >>> mask
        {'0.weight': True, '0.bias': False, '1.weight': False, '1.bias': False}
        >>> opt = diffopt.adamw()
        >>> decay = {name: 0.01 if decays else 0.0 for name, decays in mask.items()}
        >>> hp = opt.hparams(lr=0.1, weight_decay=decay)
        >>> params = dict(model.named_parameters())
        >>> params, state = opt.update(params, params, opt.init(params), hp)
    """
    return {name: _decays(module, name) for name in functionalize(module).params}


def _decays(module: nn.Module, name: str) -> bool:
    prefix, _, own = name.rpartition(".")
    bases = type(module.get_submodule(prefix)).__mro__
    return "bias" not in own and not any("norm" in base.__name__.lower() for base in bases)


def _slots(module: nn.Module) -> dict[str, Tensor]:
    """Every place that holds a tensor, once, though its module be reachable by several names."""
    slots: dict[str, Tensor] = {}
    for prefix, owner in cast(Iterable[tuple[str, nn.Module]], module.named_modules()):
        own = itertools.chain(
            owner.named_parameters(recurse=False, remove_duplicate=False),
            owner.named_buffers(recurse=False, remove_duplicate=False),
        )
        slots |= {f"{prefix}.{name}" if prefix else name: tensor for name, tensor in own}
    return slots


def _check_names(argument: str, given: Mapping[str, Tensor], expected: Any) -> None:
    for kind, names in (
        ("misses", expected - given.keys()),
        ("does not know", given.keys() - expected),
    ):
        if names:
            raise ValueError(f"{argument}: the call {kind} {sorted(names)}")


def _check_shapes(params: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for name, tensor in own.items():
        if params[name].shape != tensor.shape:
            raise ValueError(
                f"params[{name!r}] has shape {tuple(params[name].shape)}, but the module's has "
                f"{tuple(tensor.shape)}"
            )
