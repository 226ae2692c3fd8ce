"""Finding tensors that share memory, since aliased tensors cannot be updated in place."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt import _modes

LOCKED = "is an inference tensor, which can only be written to inside torch.inference_mode()"


def check_apart(
    path: Callable[[int], str],
    tensors: Sequence[Tensor],
    read: Sequence[Any] = (),
    paired: int = 0,
) -> None:
    """Raise if writing to one of the tensors changes another one, or one of those in `read`.

    `path(i)` is the name of the tensor with index i, counted as in `overlap`.
    """
    pair = overlap(tensors, read, paired)
    if pair is None:
        return
    first, second = map(path, pair)
    if first == second:
        raise ValueError(f"{first} is an expanded tensor, which cannot be written to: clone it")
    raise ValueError(
        f"{second} and {first} share memory, so updating one would overwrite the other: clone one "
        "of them"
    )


def order(tensor: Tensor) -> list[int]:
    """The axes in the order of memory, such as that of NHWC for channels_last."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda axis: -strides[axis])


def overlap(
    tensors: Sequence[Tensor], read: Sequence[Any] = (), paired: int = 0
) -> tuple[int, int] | None:
    """The indices of two tensors that share an element, or twice that of one that overlaps itself.

    Those in `read`, whose indices go on from those of `tensors`, may share elements with one
    another, and of the first `paired` each may be the very view that has its place in `tensors`.

    Tensors without an address of their own (DTensors, fake tensors, meta tensors) share nothing.
    """
    n, every = len(tensors), [*tensors, *read]
    spans: list[tuple[int, int, int]] = []
    for k, x in enumerate(every):
        if _modes.ordinary(x) and x.layout is torch.strided:
            whole = x.is_contiguous()
            if k < n and not whole and _folds(x):
                return k, k
            spans.append((x.data_ptr(), k, x.nbytes if whole else span(x)))
    spans.sort()
    # What is written meets all that begin before it; what is read, only those that are written.
    reach = reach_written = 0
    for place, (start, k, length) in enumerate(spans):
        if 0 < start < (reach if k < n else reach_written):
            for _, before, _ in spans[:place]:
                i, j = sorted((before, k))
                x, y = every[i], every[j]
                if i < n and _meet(x, y) and not (j == i + n < n + paired and x.is_set_to(y)):
                    return i, j
        if start + length > reach:
            reach = start + length
        if k < n and start + length > reach_written:
            reach_written = start + length
    return None


class Extent:
    """Where tensors are written and others read, as long as the former stay where they are.

    Args:
        written: tensors that are written.
        read: others; later ones have the same shapes and strides.
    """

    def __init__(self, written: Iterable[Tensor], read: Iterable[Tensor]) -> None:
        spans = sorted((x.data_ptr(), x.data_ptr() + _length(x)) for x in written)
        self.starts = [start for start, _ in spans]
        self.ends = [0, *itertools.accumulate((end for _, end in spans), max)]
        self.lengths = list(map(_length, read))
        self.apart = list[int]()  # the last addresses that did not meet, which may well come again

    def meets(self, read: Iterable[Tensor]) -> bool:
        """Whether one of them may have an element where the others are written."""
        addresses = [x.data_ptr() for x in read]
        if addresses and addresses == self.apart:
            return False
        meeting = any(
            self.ends[bisect.bisect_left(self.starts, address + length)] > address
            for address, length in zip(addresses, self.lengths, strict=True)
        )
        self.apart = [] if meeting else addresses
        return meeting


def _length(tensor: Tensor) -> int:
    return tensor.nbytes if tensor.is_contiguous() else span(tensor)


def copies(new: Sequence[Any], old: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """The new values; copies of those that share memory with another one, an old one or the others.

    The old tensors are going to be overwritten, one after another. One that is the very tensor that
    it replaces is left as it is. Where memory cannot be seen, only the same tensors are.
    """
    place: Any = _itself if _modes.observed() else _storage
    taken = {place(x) for x in (*old, *others) if isinstance(x, Tensor)}
    result: list[Any] = []
    for x, replaced in zip(new, old, strict=True):
        if x is not replaced and isinstance(x, Tensor):
            x = x.clone() if place(x) in taken else x
            taken.add(place(x))
        result.append(x)
    return result


def _itself(tensor: Tensor) -> Tensor:
    return tensor  # whose hash is its identity; torch.compile does not know `id`


def _storage(tensor: Tensor) -> Any:
    """What tensors that share memory have in common, as far as it can be seen."""
    plain = _modes.ordinary(tensor) and tensor.layout is torch.strided
    return (tensor.untyped_storage().data_ptr() if plain else 0) or tensor


def address(tensor: Tensor) -> int:
    """The address of the first element; 0 where there is none, or it cannot be seen."""
    return 0 if _modes.observed() or not _modes.ordinary(tensor) else tensor.data_ptr()


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
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size, device="cpu") * stride
    return offsets.flatten()
