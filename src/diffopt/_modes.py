"""Which transforms and modes of torch are active, and what kind of tensor a tensor is."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor

from diffopt import _torch


def compiling() -> bool:
    """Whether torch.compile or torch.export is tracing, in this thread: torch's flag is global."""
    here = torch.compiler.is_dynamo_compiling
    return torch.compiler.is_compiling() and (here() or intercepted())


def transformed() -> bool:
    """Whether a torch.func transform is active, also in code that is being traced."""
    traced = torch.compiler.is_compiling() and compiling()  # one call, as a rule
    return traced or _torch.innermost_transform() is not None


def intercepted() -> bool:
    """Whether a dispatch mode, such as make_fx's or FakeTensorMode, sees every operation."""
    return _torch.dispatch_modes() > 0


def observed() -> bool:
    """Whether a transform, a trace or a mode sees operations: tensors may have no memory."""
    return transformed() or intercepted()


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def forward_differentiated() -> bool:
    """Whether torch.autograd.forward_ad is active."""
    return _torch.forward_level() >= 0


def differentiable() -> bool:
    """Whether results may be differentiated in any mode."""
    return torch.is_grad_enabled() or forward_differentiated()


def differentiated(tensors: Iterable[Tensor]) -> bool:
    """Whether results computed from `tensors` may be differentiated."""
    if transformed() or _torch.forward_level() >= 0:
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def exact_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def exact(scalar: Tensor) -> Tensor:
    """A 0-d tensor in float64: `beta ** step` in float32 would be wrong in the sixth digit."""
    return scalar.to(exact_dtype(scalar.device))


def number_of(value: Any) -> Any:
    """A number for a 0-d tensor, if that needs no synchronization and loses no derivative."""
    if not isinstance(value, Tensor) or value.dim() > 0 or value.device.type != "cpu":
        return value
    if differentiated([value]) or intercepted():
        return value
    return value.item()


def tensor_of(value: Any) -> Tensor:
    """A number as an exact 0-d tensor of the CPU, whatever the default device; tensors as given."""
    if isinstance(value, Tensor):
        return value
    dtype = torch.float64 if isinstance(value, float) else None
    return torch.tensor(value, dtype=dtype, device="cpu")


def counted(count: Tensor) -> tuple[Tensor, Any]:
    """The step after a count of steps, exactly, and `number_of` that."""
    if count.device.type == "cpu" and not (differentiated([count]) or intercepted()):
        t = float(count.item() + 1)
        return torch.scalar_tensor(t, dtype=torch.float64, device=count.device), t
    step = exact(count) + 1
    return step, number_of(step)


_ORDINARY = {Tensor, torch.nn.Parameter}


def ordinary(tensor: Tensor) -> bool:
    """Whether code can walk through its memory: it is of no subclass but Parameter."""
    return type(tensor) in _ORDINARY


def all_ordinary(tensors: Iterable[Any]) -> bool:
    """Whether all are ordinary tensors; much faster for thousands."""
    return set(map(type, tensors)) <= _ORDINARY


def all_plain(tensors: Iterable[Any]) -> bool:
    """Whether all are ordinary tensors, and nothing sees operations on them."""
    return not observed() and all_ordinary(tensors)


def versioned(x: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor on a device whose version tells whether somebody writes to it.

    Those of a CPU need not be remembered: they can be read.
    """
    return (
        isinstance(x, Tensor)
        and x.device.type not in ("cpu", "meta")
        and not (x.is_inference() or observed())
        and ordinary(x)
    )


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of reals, and a real one as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def reals(tensor: Tensor) -> Tensor:
    """All entries as a real vector, complex ones as pairs.

    Not by `view_as_real`, whose derivative (torch 2.11 to 2.15) raises for a cotangent that begins
    at an odd offset in memory, as a piece of a vector may.
    """
    pairs = torch.stack((tensor.real, tensor.imag), -1) if tensor.is_complex() else tensor
    return pairs.reshape(-1)


def locked(tensor: Tensor) -> bool:
    """Whether it is an inference tensor, which can only be written to in inference mode."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


def distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which every process holds a part."""
    module = sys.modules.get("torch.distributed.tensor")  # there are none if it is not loaded
    return module is not None and any(isinstance(x, module.DTensor) for x in levels(tensor))


def levels(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor, and the tensors that torch.func's transforms have wrapped in it, outside in."""
    yield tensor
    while _torch.is_wrapped(tensor):
        tensor = _torch.unwrapped(tensor)
        yield tensor


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each tensor has been written to."""
    inner = ([*levels(x)][-1] for x in tensors) if transformed() else tensors
    return [0 if x.is_inference() else _torch.version(x) for x in inner]


def with_tangents(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where torch cannot give it a tangent: a lazy or an expanded view."""
    if tensor.is_conj() or tensor.is_neg():
        return tensor.resolve_conj().resolve_neg()
    return tensor.clone() if 0 in tensor.stride() else tensor


def has_derivative(tensor: Tensor) -> bool:
    """Whether its dtype allows a gradient, needed or not."""
    return tensor.is_floating_point() or tensor.is_complex()


def needs_gradient(tensor: Tensor) -> bool:
    """Whether autograd, or a torch.func transform at any level, may need its gradient."""
    return any(level.requires_grad for level in levels(tensor))


def batches(tensor: Tensor) -> set[int]:
    """The levels of torch.func.vmap at which it is batched."""
    return {_torch.level_of(level) for level in levels(tensor) if _torch.is_batched(level)}


def all_samples(tensor: Tensor) -> Tensor:
    """The tensor inside torch.func's wrappers: all samples of a batch, batch dimensions in front.

    The outermost batch is the first dimension. `_diff.isolation.batched` is its inverse.
    """
    while _torch.is_wrapped(tensor):
        inner = _torch.unwrapped(tensor)
        dim = _torch.batch_dim(tensor) if _torch.is_batched(tensor) else 0
        tensor = inner.movedim(dim, 0) if dim else inner
    return tensor


def concrete(tensor: Tensor | None) -> Tensor | None:
    """`all_samples` as a constant whose values can be read; None if there are no values."""
    if tensor is None or tensor.is_meta or compiling() or intercepted():
        return None
    return all_samples(tensor).detach()


def holds_anywhere(condition: Tensor | None) -> bool:
    """Whether a condition is known to hold for some element of some sample."""
    values = concrete(condition)
    return values is not None and bool(values.any())


def users_frame() -> tuple[Any, int]:
    """The innermost frame of the user's program, and the `stacklevel` of a warning at its line."""
    frame: Any = sys._getframe(1)  # pyright: ignore[reportPrivateUsage] (as warnings does)
    level = 1
    inside = ("diffopt", "torch")  # which runs a backward pass
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in inside:
        frame, level = frame.f_back, level + 1
    return frame, level
