"""Tensors that autograd saves, kept on the host and copied while the GPU computes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import _torch


class _Copy:
    """A tensor in pinned memory.

    Attributes:
        host: its values.
        device: where it belongs.
        before: the copies that the node of autograd's graph before saved.
        ahead: the tensor on its device again, where that was begun before it is needed.
    """

    def __init__(self, host: Tensor, device: torch.device, before: weakref.WeakSet[_Copy]) -> None:
        self.host, self.device, self.before = host, device, before
        self.ahead: _Ahead | None = None


class _Ahead(NamedTuple):
    tensor: Tensor
    arrived: Any  # an event


class Offloaded(torch.autograd.graph.saved_tensors_hooks):
    """A context in which what autograd saves of a GPU is kept in pinned memory.

    Copies run on a stream of their own, one after the other. No one waits for them on the host:
    the computation waits on the GPU, before it uses what has been copied back, and at the end of
    the context, after which anybody may write to what was saved.

    Args:
        stay: the addresses of tensors that stay on the GPU.
    """

    def __init__(self, stay: Iterable[int]) -> None:
        super().__init__(self.pack, self.unpack)
        self.stay = set(stay)
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        self.node, self.before = -1, weakref.WeakSet[_Copy]()
        self.copies = weakref.WeakSet[_Copy]()

    def pack(self, x: Tensor) -> Tensor | _Copy:
        if not x.is_cuda or x.data_ptr() in self.stay:
            return x
        if self.node != _torch.next_node():
            self.node, self.before = _torch.next_node(), self.copies
            self.copies = weakref.WeakSet()
        side = self._side(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            host = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
        x.record_stream(side)
        copy = _Copy(host, x.device, self.before)
        self.copies.add(copy)
        return copy

    def unpack(self, packed: Tensor | _Copy) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        tensor, arrived = packed.ahead or self._returned(packed)
        packed.ahead = None
        for copy in packed.before:
            copy.ahead = copy.ahead or self._returned(copy)
        current = torch.cuda.current_stream(packed.device)
        current.wait_event(arrived)
        tensor.record_stream(current)
        return tensor

    def _returned(self, copy: _Copy) -> _Ahead:
        """The tensor on its device, and when it has arrived there."""
        side = self._side(copy.device)
        with torch.cuda.stream(side):
            return _Ahead(copy.host.to(copy.device, non_blocking=True), side.record_event())

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        return self.streams[device]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for device, side in self.streams.items():
            torch.cuda.current_stream(device).wait_stream(side)


def staying() -> torch.autograd.graph.saved_tensors_hooks:
    """A context within that of `Offloaded` in which autograd saves tensors as they are."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
