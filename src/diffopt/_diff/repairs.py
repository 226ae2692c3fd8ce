"""Fixes for what torch gets wrong in derivatives of a loss.

Each fix names the versions of torch that need it. For each, a test of torch alone in
tests/test_repairs.py fails as soon as torch is right: then the fix can be removed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffopt import _modes, _torch
from diffopt._diff.lacking import explain_second_derivative


def mended() -> contextlib.AbstractContextManager[Any]:
    """A context in which the active transforms differentiate a loss correctly.

    What plain autograd gets wrong is left to `mend_graph`, since torch.compile would trace a mode.
    While it traces, it is told for good what weight normalization and some losses are; the other
    fixes need a mode.
    """
    forward = _modes.forward_differentiated()
    if _modes.compiling():
        _torch.trace_as(_torch.weight_norm, _weight_norm)
        for loss, same in _FORWARD.items() if forward else ():
            _torch.trace_as(loss, same)
        return contextlib.nullcontext()
    if not (forward or _modes.transformed()):
        return contextlib.nullcontext()
    return _Mended(stops=forward)


def mend_graph(value: Tensor, first: int) -> None:
    """Fix the backward pass of the nodes of autograd's graph with numbers from `first` on.

    Raises:
        ValueError: a reentrant checkpoint is among them: `torch.autograd.grad` does not run its
            backward pass, which would make its result a constant.
    """
    root: Any = value.grad_fn
    number = _torch.node_number
    nodes = [root] if root is not None and number(root) >= first else []
    seen = {None, *nodes}
    for node in nodes:  # which grows meanwhile
        if type(node) not in _RIGHT:
            _mend_node(node)
        for child, _ in node.next_functions:
            if child not in seen and number(child) >= first:
                seen.add(child)
                nodes.append(child)


_RIGHT: set[type] = {_torch.AccumulateGrad}
"""The types of nodes, of torch's own, that need no fix."""


def _mend_node(node: Any) -> None:
    name = node.name()
    if name == "CheckpointFunctionBackward":
        raise ValueError(
            "the loss calls torch.utils.checkpoint with use_reentrant=True, which blocks the "
            "gradient with respect to params: call it with use_reentrant=False"
        )
    if name == "WeightNormInterfaceBackward0":
        node.register_hook(_weight_norm_gradient(node))
    elif not explain_second_derivative(node) and _torch.is_node_type(type(node), name):
        _RIGHT.add(type(node))


class _Mended(TorchFunctionMode):
    """Replaces functions of torch; with `stops`, `torch.no_grad` stops forward derivatives too.

    Then hooks of tensors may only look at gradients: in reverse mode they act on second
    derivatives, too, which in forward mode they do not.
    """

    def __init__(self, *, stops: bool) -> None:
        self.stops, self.replacements = stops, {**_REPLACEMENTS, **(_FORWARD if stops else {})}

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.stops and func is Tensor.register_hook:
            args = args[0], _looking(*args[1:], **(kwargs or {}))
            kwargs = None
        result = (self.replacements.get(func) or func)(*args, **(kwargs or {}))
        if self.stops and func is _torch.set_grad_enabled and _by_the_loss():
            _torch.set_forward_enabled(args[0])
        return result


def _looking(hook: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    """The hook, which raises if it changes the gradient."""

    def looking(grad: Tensor) -> None:
        new = hook(grad)
        if new is not None and new is not grad:
            raise NotImplementedError(
                "a hook of a tensor in the loss (register_hook) changes its gradient, which has "
                "no forward derivative: use Unrolled() or Checkpointed(), whose derivatives it "
                "changes, too, or a torch.autograd.Function with a jvp in place of the hook"
            )

    return looking


def _by_the_loss() -> bool:
    """Whether gradients are enabled or disabled by the loss itself.

    In torch (2.11 to 2.15) `torch.no_grad` does not stop forward derivatives, so adjoints would
    disagree. Its use by checkpoints and by this package is not affected.
    """
    frame: Any = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    names: list[str] = []
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name not in ("torch.autograd.grad_mode", "torch.utils._contextlib"):
            names.append(name)
            if name.partition(".")[0] != "torch":
                break
        frame = frame.f_back
    ours = names[-1].partition(".")[0] == __name__.partition(".")[0]
    return not ours and names[0] != "torch.utils.checkpoint"


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Weight normalization in basic operations: torch's double backward is wrong (2.11 to 2.15)."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _weight_norm_gradient(node: Any) -> Callable[..., tuple[Tensor | None, ...]]:
    """A hook that computes the gradient of weight normalization in a differentiable way.

    It must not hold a reference that leads back to the node: the cycle would never be freed.
    """
    v, g, dim = _torch.weight_norm_inputs(node)

    def gradient(
        grads: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        if cotangents[0] is None:  # autograd's zero
            return tuple(grads)
        norm = torch.norm_except_dim(v, 2, dim)
        unit, cotangent = v / norm, cotangents[0]
        dims = [i for i, size in enumerate(norm.shape) if size == 1]
        along = (unit * cotangent).sum(dims, keepdim=True).reshape(g.shape)
        pair = g / norm * (cotangent - unit * along), along
        return tuple(
            None if grad is None else mended for grad, mended in zip(grads, pair, strict=True)
        )

    return gradient


def _scaled_afterwards(norm: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """A normalization whose weights are multiplied afterwards.

    When one differentiates around torch.vmap, torch (2.11 to 2.15) computes wrong second
    derivatives of layer_norm, batch_norm and instance_norm with respect to their weights: its
    batching rule ignores that the mean and the variance depend on the input.
    """
    given = _signature(norm).bind(*args, **kwargs).arguments
    weight, bias = given.pop("weight", None), given.pop("bias", None)
    scaled = result = norm(**given)
    shape = (-1, *(1,) * (result.dim() - 2)) if norm is not F.layer_norm else None
    for operation, x in ((torch.mul, weight), (torch.add, bias)):
        if x is not None:
            scaled = operation(scaled, x.reshape(shape) if shape else x)
    return scaled.to(result.dtype)


# In forward mode torch (2.11 to 2.15) has no derivative of the gradients of these losses; compiled
# code that asks for that of the first one crashes.


def _mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    losses = (input - target).square()
    if weight is None:
        return _reduced(losses, size_average, reduce, reduction)
    return _reduced(losses * weight, size_average, reduce, reduction, weight.sum())


def _huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    losses = delta * F.smooth_l1_loss(input, target, reduction="none", beta=delta)
    return _reduced(losses if weight is None else losses * weight, reduction=reduction)


def _soft_margin_loss(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    margins = target * input
    labels = torch.ones_like(margins)
    losses = F.binary_cross_entropy_with_logits(margins, labels, reduction="none")
    return _reduced(losses, *args, **kwargs)


def _reduced(
    losses: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    count: Tensor | None = None,
) -> Tensor:
    """As torch.nn.functional reduces losses, given its arguments."""
    if size_average is not None or reduce is not None:
        reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if reduction == "mean":
        return losses.mean() if count is None else losses.sum() / count
    return losses.sum() if reduction == "sum" else losses


_signature = functools.cache(inspect.signature)
_NORMS = (F.layer_norm, F.batch_norm, F.instance_norm)
_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    _torch.weight_norm: _weight_norm,
    **{norm: functools.partial(_scaled_afterwards, norm) for norm in _NORMS},
}
_FORWARD: dict[Any, Callable[..., Any]] = {
    F.mse_loss: _mse_loss,
    F.huber_loss: _huber_loss,
    F.soft_margin_loss: _soft_margin_loss,
}


def _batch_norm(*args: Any, **kwargs: Any) -> Tensor:
    return _scaled_afterwards(F.batch_norm, *args, **kwargs)


def _instance_norm(*args: Any, **kwargs: Any) -> Tensor:
    return _scaled_afterwards(F.instance_norm, *args, **kwargs)


_TRACED = {F.batch_norm: _batch_norm, F.instance_norm: _instance_norm}
"""What replaces functions in a graph, by names of this module: torch finds its own by theirs."""


def mend_traced(graph: Any) -> None:
    """Fix what torch.compile has traced through torch.vmap, where `mended` can be no mode.

    It breaks layer_norm up into basic operations, whose derivatives are right.
    """
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    if any(_torch.enters_vmap(node.target) for node in nodes):
        for node in nodes:
            node.target = _TRACED.get(node.target, node.target)
        graph.recompile()
