"""Tensors that a step captures besides its arguments, and parts of its carry that are constant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree
from diffopt._diff import functions
from diffopt._diff.unmodified import Captured
from diffopt._tree import Tree


def refuse_closed_over(
    name: str, function: Callable[..., Any], *arguments: Tree, captured: Captured | None = None
) -> list[Tensor]:
    """The tensors of `function(*arguments)` as constants, if it captures none that need a gradient.

    Raises if the result depends on a tensor that needs a gradient and is not an argument. Such a
    tensor is a leaf of the graph of the result at detached arguments. So are tensors that
    `function` creates itself, but those are different ones in a second run. What it captures
    otherwise is noticed for `captured`.
    """
    found: dict[int, Tensor] = {}
    outputs: Tree = None
    for run in range(2):
        with functions.AmbientState(arguments).restored(), functions.noticed() as aliases:
            inputs = _tree.detach(arguments)
            notice = captured.noticed(inputs) if captured and run == 0 else nullcontext()
            with torch.enable_grad(), notice:
                outputs = function(*inputs)
            leaves = {id(x): x for x in graph_leaves(outputs) if id(x) not in aliases}
        found = leaves if run == 0 else {key: leaves[key] for key in found.keys() & leaves.keys()}
        if not found:
            return _tree.detach(_tree.tensors(outputs))
    leaf = next(iter(found.values()))
    raise ValueError(
        f"{name} closes over a tensor of shape {tuple(leaf.shape)} that requires a gradient (or "
        "was computed from one that does), which would be lost: pass it as an argument"
    )


def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which raises like `refuse_closed_over` where that is cheap to check.

    That is, when autograd records it and no transform of torch.func is active.
    """

    def run(*arguments: Tree) -> Any:
        if _modes.transformed() or not torch.is_grad_enabled():
            return function(*arguments)
        with functions.noticed() as aliases:
            results = function(*arguments)
        known = {*aliases, *map(id, graph_leaves(arguments))}
        if any(id(leaf) not in known for leaf in graph_leaves(results)):
            refuse_closed_over(name, function, *arguments)
        return results

    return run


def varying(
    step: Callable[..., Any], carry: Tree, args: Tree, xs: list[Any], results: list[Tensor]
) -> list[bool]:
    """Which tensors of the carry depend on what may be differentiated, after any number of steps.

    The step is one of `minimize`: params and state do. Step counts and buffers, such as the running
    statistics of batch normalization, do if a run of the first step with a graph shows it.

    Raises:
        ValueError: run again, the first step returns values other than `results`.
    """
    tensors, join = _tree.split((carry, args, xs[0]))
    varies = [*map(_modes.has_derivative, tensors)]
    size = _tree.count(carry)
    if len({_tree.count(x) for x in xs}) > 1:  # later steps may depend on other tensors
        return varies[:size]
    state = _tree.named(carry[1], "state")
    counts = [path.endswith(".step") for path, leaf in state if isinstance(leaf, Tensor)]
    unsure = [*counts, *[True] * _tree.count(carry[2])]
    for i, unknown in enumerate(unsure, _tree.count(carry[0])):
        varies[i] &= not unknown or _modes.needs_gradient(tensors[i])
    depends: list[bool] = []

    def run(*chosen: Tensor) -> list[Tensor]:
        aliases = iter(chosen)
        inputs = [
            next(aliases) if varied else x.detach()
            for x, varied in zip(tensors, varies, strict=True)
        ]
        outputs = _tree.tensors(step(*join(inputs)))
        depends[:] = [x.requires_grad for x in outputs[:size]]
        refuse_other(results, outputs)
        return [x for x in outputs if _modes.has_derivative(x)]

    while True:
        chosen = [x.detach() for x, varied in zip(tensors, varies, strict=True) if varied]
        with functions.AmbientState((carry, args, xs[0])).restored(), torch.enable_grad():
            if _modes.transformed():
                torch.func.vjp(run, *chosen)
            else:
                run(*(functions.alias(x, attached=False) for x in chosen))
        grown = [v or d for v, d in zip(varies, depends, strict=False)]
        if grown == varies[: len(depends)]:
            return varies[:size]
        varies[: len(depends)] = grown


def detach_constants(
    buffers: Tree, step: Callable[..., Any], carry: Tree, args: Tree, xs: list[Any]
) -> Tree:
    """The buffers after a loop of `minimize`, detached where they are constants in it.

    Otherwise a module may reject them: torch's batch_norm has no derivative for its statistics.
    """
    tensors, join = _tree.split(buffers)
    if not tensors:
        return buffers
    varies = varying(step, carry, args, xs, [])[_tree.count(carry[:2]) :]
    return join(x if v else x.detach() for x, v in zip(tensors, varies, strict=True))


def refuse_varying(outputs: Iterable[Tensor], varies: Iterable[bool]) -> None:
    """Raise if an output found to be constant depends on what is differentiated after all."""
    for output, varied in zip(outputs, varies, strict=False):
        if not varied and output.requires_grad and _modes.has_derivative(output):
            raise ValueError(
                f"a tensor of shape {tuple(output.shape)} of the optimizer's state or the buffers "
                "depends on what is differentiated in some steps, but not in the first: "
                "Checkpointed cannot differentiate that, use Unrolled()"
            )


def refuse_other(before: list[Tensor], after: list[Tensor]) -> None:
    """Raise if a step that is run again gives other values, beyond rounding in parallel kernels.

    What should be zero, like the gradient of a bias before batch normalization, is pure rounding.
    """
    if all(map(_same, before, after)):
        return
    sizes = [0.0 if x is None else _magnitude(x) for x in map(_values, before)]
    for old, new, size in zip(before, after, sizes, strict=False):
        a, b = _values(old), _values(new)
        if a is None or b is None or a.shape != b.shape:
            continue
        rounding = torch.finfo(old.dtype).eps if _modes.has_derivative(old) else 0.0
        tolerance = max(1e-2 * size, 100 * rounding * max(sizes))
        wide = a.to(torch.complex128), b.to(torch.complex128)
        if _magnitude(wide[0] - wide[1]) > tolerance or not torch.equal(a.isnan(), b.isnan()):
            raise ValueError(
                "the loss draws random numbers that cannot be repeated: pass the generator it "
                "draws from as an argument"
            )


def _same(old: Tensor, new: Tensor) -> bool:
    """Whether two tensors certainly have the same values, bit by bit."""
    a, b = _values(old), _values(new)
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def _values(tensor: Tensor) -> Any:
    """Its values, of a DTensor those that this process holds."""
    values: Any = _modes.concrete(tensor)
    return values.to_local() if values is not None and _modes.distributed(values) else values


def _magnitude(tensor: Tensor) -> float:
    """The largest magnitude among the entries that are not NaN."""
    wide = tensor.to(torch.complex128).abs().nan_to_num(0.0)
    return wide.max().item() if wide.numel() else 0.0


def graph_leaves(tree: Tree) -> Iterator[Tensor]:
    """Leaves of the graphs of a tree's tensors, of autograd's and at every level of torch.func."""
    nodes: list[Any] = []
    for tensor in _tree.tensors(tree):
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
