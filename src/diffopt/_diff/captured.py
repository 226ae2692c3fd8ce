"""What a step depends on beside its arguments, and which of its carry never varies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree
from diffopt._diff import functions
from diffopt._tree import Tree


def refuse_closed_over(name: str, function: Callable[..., Any], *arguments: Tree) -> list[Tensor]:
    """The tensors of `function(*arguments)` as constants, if it depends on nothing else.

    Raises where the result depends on a tensor that needs a gradient and is no argument. Such a
    tensor is a leaf of the graph of what `function` makes of detached arguments. So are tensors
    that `function` makes itself, but they are others in a second run.
    """
    found: dict[int, Tensor] = {}
    outputs: Tree = None
    for run in range(2):
        with functions.Surroundings(arguments).restored(), functions.noticed() as aliases:
            with torch.enable_grad():
                outputs = function(*_tree.detach(arguments))
            leaves = {id(x): x for x in graph_leaves(outputs) if id(x) not in aliases}
        found = leaves if run == 0 else {key: leaves[key] for key in found.keys() & leaves.keys()}
        if not found:
            return _tree.detach(_tree.split(outputs)[0])
    leaf = next(iter(found.values()))
    raise ValueError(
        f"{name} closes over a tensor of shape {tuple(leaf.shape)} that requires a gradient (or "
        "over what was computed from it), which cannot arrive there: pass it as an argument"
    )


def varying(
    step: Callable[..., Any], carry: Tree, args: Tree, xs: list[Any], results: list[Tensor]
) -> list[bool]:
    """Which tensors of the carry depend on what may be differentiated, after any number of steps.

    Others, such as a count of steps and the running statistics of a batch normalisation, are
    constants. The step is one of `minimize`; the first is run with a graph, twice as a rule.

    Raises:
        ValueError: the first step returns other numbers than `results` when it is run again.
    """
    tensors, join = _tree.split((carry, args, xs[0]))
    everything = [functions.has_derivative(tensor) for tensor in tensors]
    starts = _tree.split(carry)[0]
    if len({len(_tree.split(x)[0]) for x in xs}) > 1:  # later steps may depend on something new
        return everything[: len(starts)]
    varies = list(everything)
    for i in range(len(_tree.split(carry[0])[0]), len(starts)):  # params always do
        varies[i] &= any(level.requires_grad for level in _modes.levels(tensors[i]))
    depends: list[bool] = []

    def run(*chosen: Tensor) -> list[Tensor]:
        aliases = iter(chosen)
        inputs = [
            next(aliases) if varied else x.detach()
            for x, varied in zip(tensors, varies, strict=True)
        ]
        outputs = _tree.split(step(*join(inputs)))[0]
        depends[:] = [x.requires_grad for x in outputs[: len(starts)]]
        refuse_other(results, outputs)
        return [x for x in outputs if functions.has_derivative(x)]

    while True:
        chosen = [x.detach() for x, varied in zip(tensors, varies, strict=True) if varied]
        with functions.Surroundings((carry, args, xs[0])).restored(), torch.enable_grad():
            if _modes.transformed():
                torch.func.vjp(run, *chosen)
            else:
                run(*(functions.alias(x, attached=False) for x in chosen))
        if len(depends) != len(starts):
            return everything[: len(starts)]
        grown = [v or d for v, d in zip(varies, depends, strict=False)]
        if grown == varies[: len(starts)]:
            return grown
        varies[: len(starts)] = grown


def refuse_varying(outputs: Iterable[Tensor], varies: Iterable[bool]) -> None:
    """Raise where one depends on what is differentiated that was found to be a constant."""
    for output, varied in zip(outputs, varies, strict=False):
        if not varied and output.requires_grad and functions.has_derivative(output):
            raise ValueError(
                f"a tensor of shape {tuple(output.shape)} of the optimizer's state or the buffers "
                "depends on what is differentiated in some steps, but not in the first: "
                "Checkpointed cannot differentiate that, Unrolled can"
            )


def refuse_other(before: list[Tensor], after: list[Tensor]) -> None:
    """Raise where a step run again gives other numbers, beyond what kernels in parallel round."""
    for old, new in zip(before, after, strict=False):
        old, new = _modes.concrete(old), _modes.concrete(new)
        if old is None or new is None or old.shape != new.shape or not old.numel():
            continue
        old, new = old.to(torch.complex128), new.to(torch.complex128)
        size = old.abs().nan_to_num().max().item()
        if not torch.allclose(old, new, rtol=0.0, atol=1e-2 * size, equal_nan=True):
            raise ValueError(
                "the loss is random in a way that cannot be repeated: pass the generator it draws "
                "from as an argument"
            )


def graph_leaves(tree: Tree) -> Iterator[Tensor]:
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
        if isinstance(node, _torch.AccumulateGrad):
            yield node.variable
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                nodes.append(child)
