"""Names for the inputs of `explain` and `graph`."""

from __future__ import annotations

from typing import Any

from diffopt import _tree
from diffopt._tree import Tree


def named(inputs: Tree) -> list[tuple[str, Any]]:
    """Name and value of every leaf: `lr` and `params['w']` of `{"lr": ..., "params": {...}}`."""
    if type(inputs) is dict and all(isinstance(key, str) for key in inputs):
        names = [path for key, child in inputs.items() for path in _tree.paths(child, key)]
    else:
        names = _tree.paths(inputs, "inputs")
    return list(zip(names, _tree.leaves(inputs), strict=True))
