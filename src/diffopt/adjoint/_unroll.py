"""unroll(): a loop of any step function, differentiated as its `adjoint` says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffopt import _tree
from diffopt._arguments import check_function, check_result, explains_keywords
from diffopt._diff.compiled import CompiledStep
from diffopt._tree import Tree
from diffopt.adjoint._base import Adjoint, GradientStep, Step, check_adjoint, compiler_of
from diffopt.adjoint.unrolled import Unrolled


@explains_keywords
def unroll(
    step: Callable[[Tree, Tree, Any], tuple[Tree, Any]],
    carry: Tree,
    args: Tree = (),
    length: int | None = None,
    *,
    xs: Tree = None,
    adjoint: Adjoint = Unrolled(),  # noqa: B008 (frozen)
    compile: bool | Mapping[str, Any] = False,
) -> tuple[Tree, Any]:
    """Run a step function repeatedly; the result is differentiable.

    Computes carry_{t+1}, output_t = step(carry_t, args, x_t) for t = 0, 1, ..., where x_t is
    `xs[t]`, or t itself without `xs`. A step may be any pure function: a learned optimizer's
    update, a policy update, a step of an ODE solver. To minimize a loss use `minimize`.

    Args:
        step: `step(carry, args, x)` returns the next carry, of the same structure, and an output.
        carry: a pytree of tensors.
        args: a pytree of what the steps depend on. Adjoints that recompute steps cannot
            differentiate with respect to tensors that `step` closes over, and raise.
        length: the number of steps; with `xs` it is optional and must equal the leading dimension.
        xs: a pytree of tensors whose leading dimension is time.
        adjoint: how the result is differentiated, see `diffopt.adjoint`.
        compile: whether the step is compiled, see `minimize`. The numbers in `args` and `xs` are
            then tensors in the step.

    Returns:
        The last carry, and the outputs of all steps, stacked along a leading time dimension if
        `step` returns trees of tensors, otherwise as a list.

    Raises:
        ValueError: neither `length` nor `xs` is given, they and the leaves of `xs` disagree, or
            `step` returns a carry of another structure, or outputs that cannot be stacked since
            their structures or shapes differ; `compile` has an option that it does not
            take.
        TypeError: `adjoint` is not an `Adjoint`, or `step` does not return a tuple of two.

    Examples:
        >>> import torch, diffopt
        >>> def euler(y, rate, t):
        ...     return y + 0.1 * rate * y, y
        >>> rate = torch.tensor(1.0, requires_grad=True)
        >>> y, path = diffopt.adjoint.unroll(
        ...     euler, torch.tensor(1.0), rate, 3, adjoint=diffopt.adjoint.Checkpointed()
        ... )
        >>> path
        tensor([1.0000, 1.1000, 1.2100], grad_fn=<StackBackward0>)
        >>> torch.autograd.grad(y, rate)  # 3 * 0.1 * 1.1^2
        (tensor(0.3630),)
    """
    check_adjoint(adjoint)
    check_function(step, "step")
    compiler = compiler_of(compile, "the step", step)
    if not isinstance(step, GradientStep):
        step = _checked(step)
        step = step if compiler is None else CompiledStep(compiler, step)
    elif compiler is not None:
        step = replace(step, compiler=compiler)
    carry, args, xs = (_tree.plain(tree) for tree in (carry, args, xs))
    carry, outputs = adjoint.run(step, carry, args, _elements(xs, length))
    return carry, _stack(outputs)


def _checked(step: Step) -> Step:
    """The step, which raises unless it returns a carry of the same structure and an output."""

    def checked(carry: Tree, args: Tree, x: Any) -> tuple[Tree, Any]:
        new, output = check_result(step(carry, args, x), "step", "carry", "output")
        return _tree.ordered_like(new, carry, ("the carry that step returned", "carry")), output

    return checked


def _elements(xs: Tree, length: int | None) -> list[Any]:
    if xs is None:
        if type(length) is not int or length < 0:
            given = _tree.shown(length)
            raise ValueError(f"length is {given}, but must be an integer >= 0 without xs=")
        return list(range(length))
    leaves, spec = _tree.flatten(xs)
    if not leaves:
        raise ValueError(f"xs is {xs!r}, which holds no tensor: give length without xs")
    for path, leaf in _tree.named(xs, "xs"):
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            raise ValueError(
                f"{path} is {_tree.describe(leaf)}, but must be a tensor with a leading time "
                "dimension"
            )
        length = len(leaf) if length is None else length
        if len(leaf) != length:
            raise ValueError(f"{path} has {len(leaf)} entries, but there are {length} steps")
    columns = [leaf.unbind() for leaf in leaves]
    return [_tree.unflatten(row, spec) for row in zip(*columns, strict=True)]


def _stack(outputs: list[Any]) -> Any:
    """The outputs as one tree with a leading time dimension, if all are trees of tensors."""
    if not outputs or not all(isinstance(x, Tensor) for x in _tree.leaves(outputs)):
        return outputs
    first, name = outputs[0], "the output of step {}".format
    spec = _tree.flatten(first)[1]
    rows = [
        _tree.leaves_like(output, spec, first, (name(t), name(0)))
        for t, output in enumerate(outputs)
    ]
    for t, row in enumerate(rows):
        for i, (x, like) in enumerate(zip(row, rows[0], strict=True)):
            if x.shape != like.shape:
                mine, theirs = (_tree.paths(first, name(step))[i] for step in (t, 0))
                raise ValueError(
                    f"{mine} is {_tree.describe(x)}, but {theirs} is {_tree.describe(like)}: they "
                    "are stacked, so return tensors of the same shapes in all steps"
                )
    return _tree.unflatten(map(torch.stack, zip(*rows, strict=True)), spec)
