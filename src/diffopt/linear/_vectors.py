"""Trees as vectors, and norms of vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._diff.isolation import batched
from diffopt._tree import Tree

Linear: TypeAlias = Callable[[Tensor], Tensor]
"""A linear map on vectors."""


def ravel(tree: Tree, name: str) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """All leaves in one vector, and the function that converts such a vector back to a tree.

    Raises if a leaf is not a real floating-point tensor; `name` is the tree's name in errors.
    """
    leaves, spec = _tree.flatten(tree)
    for i, leaf in enumerate(leaves):
        if fault := _fault(leaf):
            raise type(fault)(f"{_tree.paths(tree, name)[i]} {fault}")
    if not leaves:
        raise ValueError(f"{name} holds no tensors")
    kinds = [(leaf.shape, leaf.dtype) for leaf in leaves]
    sizes = [leaf.numel() for leaf in leaves]

    def unravel(vector: Tensor) -> Tree:
        pieces = [vector] if len(sizes) == 1 else vector.split(sizes)
        pairs = zip(pieces, kinds, strict=True)
        return _tree.unflatten([_shaped(x, shape).to(dtype) for x, (shape, dtype) in pairs], spec)

    return torch.cat([leaf.reshape(-1) for leaf in leaves]), unravel


def _fault(leaf: Any) -> Exception | None:
    """What is wrong with a leaf that cannot be a part of a vector; its path is yet to be named."""
    if not isinstance(leaf, Tensor):
        return TypeError(f"is {_tree.describe(leaf)}, not a tensor")
    if not leaf.is_floating_point():
        return TypeError(f"has dtype {leaf.dtype}, but must be real floating-point")
    if not _has_values(leaf):
        where = f"layout {leaf.layout} and device {leaf.device}"
        return ValueError(f"has {where}, but must be a dense tensor with values")
    return None


def template(tree: Tree) -> Tree:
    """The tree without its values, for `ravel_like`."""
    return _tree.map(lambda leaf: torch.empty_like(leaf, device="meta"), tree)


def ravel_like(
    tree: Tree, like: Tree, names: tuple[str, str], others: Sequence[Tensor] = ()
) -> Tensor:
    """The leaves of `tree` in one vector; they must have the shapes of `like`.

    They may also have the batch dimensions of `others` in front.
    """
    references, spec = _tree.flatten(like)
    leaves = _tree.leaves_like(tree, spec, like, names)
    leaves = [batched(x, ref.dim(), others) for x, ref in zip(leaves, references, strict=True)]
    for i, (leaf, reference) in enumerate(zip(leaves, references, strict=True)):
        fits = isinstance(leaf, Tensor) and leaf.is_floating_point() and _has_values(leaf)
        if not fits or leaf.shape != reference.shape:
            raise ValueError(
                f"{_tree.paths(like, names[0])[i]} is {_tree.describe(leaf)}, but must be a dense "
                f"floating-point tensor of shape {tuple(reference.shape)}, as in {names[1]}"
            )
    pairs = zip(leaves, references, strict=True)
    pieces = [_shaped(leaf.to(ref.dtype), (leaf.numel(),)) for leaf, ref in pairs]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _shaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor itself where it has this shape: a view would cost time in each product."""
    return x if x.shape == shape else x.reshape(shape)


def _has_values(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta


def magnitude(vector: Tensor) -> Any:
    """A power of two near its largest entry, to divide by without rounding; 1 if not finite.

    It is a number where `dot` is.
    """
    # At most half of the entry, since log2 of the largest number rounds up.
    smallest = vector.new_full((1,), 4 * torch.finfo(vector.dtype).tiny)
    largest = number(torch.cat([vector.abs(), smallest]).max())
    if not isinstance(largest, Tensor):
        return 2.0 ** (math.frexp(largest)[1] - 2) if math.isfinite(largest) else 1.0
    return torch.where(largest.isfinite(), torch.exp2(torch.floor(torch.log2(largest / 2))), 1.0)


def gathered(value: Tensor) -> Tensor:
    """Of a DTensor the whole value, of which each process may hold a term of a sum."""
    full: Any = getattr(value, "full_tensor", None)
    return value if full is None else full()


def number(value: Tensor) -> Any:
    """A number for a 0-d tensor that is the same in all processes; see `_modes.number_of`."""
    return _modes.number_of(gathered(value))


def all_finite(vector: Tensor) -> Any:
    """Whether all entries are finite: a bool where `dot` is a number."""
    return number(torch.isfinite(vector).all())


def norm(vector: Tensor) -> Tensor:
    """The 2-norm."""
    return gathered(torch.linalg.vector_norm(vector))


def dot(x: Tensor, y: Tensor) -> Any:
    """The dot product; a number where that needs no synchronization: then there is one sample."""
    return number(x.dot(y))


def length(vector: Tensor) -> Any:
    """The 2-norm; a number where `dot` is."""
    return _modes.number_of(norm(vector))


def quotient(mask: Any, x: Any, y: Any) -> Any:
    """The quotient x / y where the mask holds, else 0; of numbers or tensors."""
    if isinstance(mask, bool):
        return x / y if mask else 0.0
    return torch.where(mask, x / y, 0.0)


def chosen(mask: Any, x: Tensor, other: float) -> Tensor:
    """`x` where the mask, a tensor or a bool, holds, else the number."""
    return x if mask is True else torch.where(torch.as_tensor(mask, device=x.device), x, other)


def anywhere(mask: Tensor | bool) -> bool:
    """Whether a constant boolean tensor is True for any sample."""
    return mask if isinstance(mask, bool) else bool(gathered(_modes.all_samples(mask)).any())


def greatest(constant: Tensor | float) -> Any:
    """The largest value of a constant 0-d tensor among all samples, as a number."""
    if not isinstance(constant, Tensor):
        return constant
    return gathered(_modes.all_samples(constant)).max().item()
