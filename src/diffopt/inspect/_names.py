"""Names for the inputs of `explain` and `graph`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffopt import _tree
from diffopt._tree import Tree


def named(inputs: Tree) -> list[tuple[str, Any]]:
    """Name and value of every leaf: `lr` and `params['w']` of `{"lr": ..., "params": {...}}`."""
    if type(inputs) is dict and all(isinstance(key, str) for key in inputs):
        names = [path for key, child in inputs.items() for path in _tree.paths(child, key)]
    else:
        names = _tree.paths(inputs, "inputs")
    leaves = _tree.leaves(inputs)
    if not leaves:
        raise ValueError(f"inputs is {inputs!r}, which holds no tensor")
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, (Tensor, float, int, type(None))) or isinstance(leaf, bool):
            raise TypeError(f"{name} of the inputs is {_tree.describe(leaf)}, not a tensor")
    return list(zip(names, leaves, strict=True))
