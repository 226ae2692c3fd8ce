"""An nn.Module as a pure function of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], *inputs: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """The module's outputs at these tensors, and the buffers after the call."""
        return self.apply(params, buffers, *inputs, **kwargs)


def functionalize(module: nn.Module) -> Functional:
    """Make a pure function of a module.

    The call computes `module(*inputs, **kwargs)` with `params` and `buffers` in place of the
    module's own tensors. What the module writes into its buffers goes into the new buffers that are
    returned; the module and the arguments are left alone. The module's mode (`train`, `eval`) is
    that at the time of the call.

    Args:
        module: any module. A parameter with `requires_grad=False` counts as a buffer, so that no
            optimizer moves it. A tensor that is reachable by several names (tied weights) stands
            under the first one, and its gradient is the sum over all its uses.

    Returns:
        A `Functional`, which unpacks as `apply, params, buffers`. Its `params` are the module's own
        tensors: gradients of a solution that started there arrive in the module's parameters.

    Raises (from the call):
        ValueError: `params` or `buffers` miss a name, have one too many, or a parameter's shape is
            not the module's.

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
    named = dict(module.named_parameters())
    params: dict[str, Tensor] = {k: p for k, p in named.items() if p.requires_grad}
    frozen = named.keys() - params.keys()
    buffers: dict[str, Tensor] = {k: p for k, p in named.items() if k in frozen}
    buffers |= dict(module.named_buffers())
    shapes = {name: param.shape for name, param in params.items()}

    def apply(
        new_params: Mapping[str, Tensor],
        new_buffers: Mapping[str, Tensor],
        *inputs: Any,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        _check_names("params", new_params, shapes.keys())
        _check_names("buffers", new_buffers, names)
        _check_shapes(new_params, shapes)
        # The module may write into its buffers, or replace them: functional_call leaves what it
        # finds afterwards in this dictionary.
        own = {k: b if k in frozen else b.clone() for k, b in new_buffers.items()}
        tensors = {**new_params, **own}
        outputs = functional_call(module, tensors, inputs, kwargs, strict=False)
        return outputs, {name: tensors[name] for name in own}

    names = buffers.keys()
    return Functional(apply, params, buffers)


def _check_names(argument: str, given: Mapping[str, Tensor], expected: Any) -> None:
    for kind, names in (
        ("misses", expected - given.keys()),
        ("does not know", given.keys() - expected),
    ):
        if names:
            raise ValueError(f"{argument}: the call {kind} {sorted(names)}")


def _check_shapes(params: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> None:
    for name, shape in shapes.items():
        if params[name].shape != shape:
            raise ValueError(
                f"params[{name!r}] has shape {tuple(params[name].shape)}, but the module's has "
                f"{tuple(shape)}"
            )
