"""Assertions on trees, whose messages name the leaf at fault."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from diffopt import _torch, _tree
from diffopt._tree import Tree
from diffopt.testing._case import Point


def same(
    actual: Tree, expected: Tree, name: str, rtol: float | None = None, atol: float | None = None
) -> None:
    """Assert that structures and dtypes are equal, and values within the tolerances."""
    same_structure(actual, expected, name)
    if rtol is not None and atol is None:
        atol = rtol / 10
    for (path, theirs), mine in zip(_tree.named(expected, name), _tree.leaves(actual), strict=True):
        try:
            torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)
        except AssertionError as error:
            raise AssertionError(f"{path} differs: {error}") from error


def same_structure(actual: Tree, expected: Tree, name: str) -> None:
    mine, theirs = _tree.flatten(actual)[1], _tree.flatten(expected)[1]
    if mine != theirs:
        raise AssertionError(f"{name} has the structure {mine}, but {theirs} is expected")


def finite(tree: Tree, name: str) -> None:
    for path, tensor in named(tree, name):
        if not tensor.isfinite().all():
            raise AssertionError(f"{path} is not finite: {tensor}")


def disjoint(old: Iterable[tuple[str, Tensor]], new: Iterable[tuple[str, Tensor]]) -> None:
    """Assert that new tensors share memory neither with one another nor with old ones."""
    owners = {t.untyped_storage().data_ptr(): path for path, t in old if t.numel()}
    for path, tensor in new:
        owner = owners.setdefault(tensor.untyped_storage().data_ptr(), path)
        if tensor.numel() and owner != path:
            raise AssertionError(f"{path} shares its memory with {owner}")


class Snapshot:
    """Remembers the values of tensors, to detect which have been written to."""

    def __init__(self, point: Point) -> None:
        self.tensors = named(point, "arguments")
        self.copies = [tensor.clone() for _, tensor in self.tensors]
        self.versions = [_torch.version(tensor) for _, tensor in self.tensors]

    def check(self) -> None:
        """Raise `AssertionError` with the path of the first tensor that was changed."""
        for (path, tensor), copy, version in zip(
            self.tensors, self.copies, self.versions, strict=True
        ):
            same = tensor.is_meta or torch.equal(tensor.nan_to_num(), copy.nan_to_num())
            if not same or _torch.version(tensor) != version:
                raise AssertionError(f"{path} was changed")


def named(tree: Tree, name: str) -> list[tuple[str, Tensor]]:
    """The path and value of every tensor."""
    return [(path, leaf) for path, leaf in _tree.named(tree, name) if isinstance(leaf, Tensor)]
