"""Operations that torch cannot differentiate or batch, and advice to add to its errors."""

from __future__ import annotations

import functools
import re
import traceback
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from diffopt import _modes

_REMEDIES = {  # by names of operations, or of nodes in autograd's graph
    r"scaled_dot_product|ScaledDotProduct": (
        "compute the loss under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    ),
    r"_transformer_encoder_layer_fwd|_native_multi_head_attention": (
        "put the module in training mode with train(), or disable the fast path with "
        "torch.backends.mha.set_fastpath_enabled(False)"
    ),
    r"support saved tensor hooks|_NoopSaveInputs": (
        "transforms of torch.func do not differentiate torch.utils.checkpoint, nor other hooks on "
        "saved tensors: compute the loss without, and save memory with adjoint=Checkpointed()"
    ),
    r"mkldnn_rnn": "compute the loss under torch.backends.mkldnn.flags(enabled=False)",
    r"CompiledFunction": "compute the loss with the function or module that is not compiled",
    r"cudnn_rnn|cudnn RNN|CudnnRnn": (
        "compute the loss under torch.backends.cudnn.flags(enabled=False)"
    ),
}
_MODULES = {  # by the module of torch whose code raised
    r"torch\.nn\.modules\.rnn": (
        "torch.vmap cannot batch the kernels of nn.RNN, nn.LSTM, nn.GRU and their cells: write the "
        "recurrence with torch.nn.functional.linear, or loop over the tasks instead of torch.vmap"
    ),
    r"torch\.nn\.parallel": "functionalize the module inside the DataParallel, its `.module`",
}
_ONCE = re.compile("ScaledDotProduct|CudnnRnn|CompiledFunction")  # differentiable only once


def remedy(error: BaseException) -> str | None:
    """What to do about an error of torch; None if nothing is known."""
    for pattern, advice in _REMEDIES.items():
        if re.search(pattern, str(error)):
            return advice
    frames = [
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    for pattern, advice in _MODULES.items():
        if _modes.transformed() and any(re.match(pattern, name) for name in frames):
            return advice
    return None


class Explained:
    """A context that adds advice to errors of torch about missing support."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, RuntimeError):
            return
        advice = remedy(error)
        if advice is not None and advice not in str(error):
            raise NotImplementedError(f"{str(error).splitlines()[0]}: {advice}") from error


def explain_second_derivative(node: Any) -> bool:
    """Make a kernel in autograd's graph raise with advice, if it is differentiable only once."""
    once = _ONCE.search(node.name()) is not None
    if once:
        node.register_hook(functools.partial(_mark, node.name()))
    return once


def _mark(name: str, gradients: Iterable[Tensor | None], _: Any) -> None:
    """Insert nodes that raise where the gradients would be differentiated."""
    for gradient in gradients:
        if gradient is not None and gradient.grad_fn is not None:
            gradient.grad_fn.register_prehook(functools.partial(_refuse, name))


def _refuse(name: str, _: Any) -> None:
    (advice,) = (advice for pattern, advice in _REMEDIES.items() if re.search(pattern, name))
    raise NotImplementedError(f"{name} has no derivative in torch: {advice}")
