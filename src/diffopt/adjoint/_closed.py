"""Finding tensors that a function closes over, which a derivative could not reach."""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from diffopt import _function, _modes, _tree
from diffopt._tree import Tree


def refuse_closed_over(name: str, function: Callable[..., Any], *arguments: Tree) -> None:
    """Raise where a function's result depends on a tensor that needs a gradient and is no argument.

    Such a tensor is a leaf of the graph of what `function` makes of detached arguments. So are
    tensors that `function` makes itself, but they are others in a second run.
    """
    found: dict[int, Tensor] = {}
    for run in range(2):
        with _function.Surroundings(arguments).restored(), _function.noticed() as aliases:
            with torch.enable_grad():
                outputs = function(*_tree.detach(arguments))
            leaves = {id(x): x for x in _graph_leaves(outputs) if id(x) not in aliases}
        found = leaves if run == 0 else {key: leaves[key] for key in found.keys() & leaves.keys()}
        if not found:
            return
    leaf = next(iter(found.values()))
    raise ValueError(
        f"{name} closes over a tensor of shape {tuple(leaf.shape)} that requires a gradient (or "
        "over what was computed from it), which cannot arrive there: pass it as an argument"
    )


def _graph_leaves(tree: Tree) -> Iterator[Tensor]:
    """Tensors on which those of a tree depend, by autograd and at every level of torch.func."""
    nodes: list[Any] = []
    for tensor in _tree.split(tree)[0]:
        for level in _modes.levels(tensor):
            if level.grad_fn is not None:
                nodes.append(level.grad_fn)
            elif level.requires_grad:
                yield level
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                nodes.append(child)
