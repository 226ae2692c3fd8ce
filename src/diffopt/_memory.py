"""Finding tensors that share memory, since aliased tensors cannot be updated in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffopt import _modes


def overlap(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """The indices of two tensors that share an element, or twice that of one that overlaps itself.

    Tensors without an address of their own (DTensors, fake tensors, meta tensors) share nothing.
    """
    known = [i for i, x in enumerate(tensors) if _modes.ordinary(x)]
    ordinary = [tensors[i] for i in known]
    whole = list(map(Tensor.is_contiguous, ordinary))
    for i, x, contiguous in zip(known, ordinary, whole, strict=True):
        if not contiguous and _folds(x):
            return i, i
    starts, order = torch.tensor(list(map(Tensor.data_ptr, ordinary))).sort(stable=True)
    spans = [x.nbytes if c else span(x) for x, c in zip(ordinary, whole, strict=True)]
    ends = (starts + torch.tensor(spans)[order]).cummax(0).values
    meeting = (starts[1:] < ends[:-1]) & (starts[1:] != 0)
    for k in meeting.nonzero().flatten().tolist():
        this = int(order[k + 1])
        for before in order[: k + 1].tolist():
            if _meet(ordinary[before], ordinary[this]):
                return known[before], known[this]
    return None


def span(tensor: Tensor) -> int:
    """The number of bytes from the first element to the end of the last one."""
    if not tensor.numel():
        return 0
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in sizes)) * tensor.element_size()


def _folds(tensor: Tensor) -> bool:
    """Whether two elements of one tensor have the same address, as in an expanded tensor."""
    sizes = sorted(
        (stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    extent = 1
    for stride, size in sizes:
        if size > 1 and stride < extent:
            return bool(tensor.numel()) and len(_offsets(tensor).unique()) < tensor.numel()
        extent += (size - 1) * stride
    return False


def _meet(a: Tensor, b: Tensor) -> bool:
    if a.device != b.device or not (
        a.data_ptr() < b.data_ptr() + span(b) and b.data_ptr() < a.data_ptr() + span(a)
    ):
        return False
    if a.element_size() != b.element_size():
        return True
    shift = b.data_ptr() - a.data_ptr()
    mine, theirs = _offsets(a) * a.element_size(), _offsets(b) * b.element_size() + shift
    return bool(torch.isin(mine, theirs).any())


def _offsets(tensor: Tensor) -> Tensor:
    """The offsets of the elements from the first one."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
    return offsets.flatten()
