"""Running code outside every active derivative, with the wrappers of torch.func removed."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffopt import _modes, _torch, _tree
from diffopt._diff import functions
from diffopt._diff.captured import graph_leaves
from diffopt._diff.unmodified import Captured
from diffopt._tree import Tree


def isolated(
    function: Callable[..., Tree], *trees: Tree, plain: bool = False, sequential: bool = False
) -> Tree:
    """`function(*trees)` as constants: no graph, no tangents, but still batched by torch.func.vmap.

    With `plain` the function runs outside every transform unless its arguments are batched, so it
    may leave torch; but then it cannot use tensors created inside nested transforms. With
    `sequential` it is called that way for each sample of a batch.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_torch.forward_enabled(False))
        trees = _tree.map_tensors(_constant, trees)
        if sequential:
            return _each_sample(function, trees)
        if plain and not any(map(_torch.is_batched, _tree.tensors(trees))):
            stack.enter_context(_torch.outside_transforms())
        return _tree.map_tensors(_constant, function(*trees))


def _each_sample(function: Callable[..., Tree], trees: Tree) -> Tree:
    batched = [x for x in _tree.tensors(trees) if _torch.is_batched(x)]
    if not batched:
        with _torch.outside_transforms():
            return _tree.map_tensors(_constant, function(*trees))
    level = max(map(_torch.level_of, batched))
    batch = [x for x in batched if _torch.level_of(x) == level]
    sizes = {_torch.unwrapped(x).shape[_torch.batch_dim(x)] for x in batch}

    def sample(index: int) -> Tree:
        def select(tensor: Tensor) -> Tensor:
            if not _torch.is_batched(tensor) or _torch.level_of(tensor) != level:
                return tensor
            return _constant(_torch.unwrapped(tensor).select(_torch.batch_dim(tensor), index))

        return _each_sample(function, _tree.map_tensors(select, trees))

    def join(*leaves: Any) -> Any:
        if all(isinstance(leaf, Tensor) for leaf in leaves):
            stacked = torch.stack(leaves)
        elif all(isinstance(leaf, numbers.Real) for leaf in leaves):
            stacked = torch.tensor(leaves, device="cpu")
        elif all(leaf is leaves[0] for leaf in leaves):
            return leaves[0]
        else:
            raise TypeError(
                "under vmap with sequential=True, solve must return tensors or numbers, or the "
                f"same object for every sample, not {_tree.describe(leaves[0])}"
            )
        return _torch.add_batch_dim(_constant(stacked), 0, level)

    (size,) = sizes
    return _tree.map(join, *(sample(index) for index in range(size)))


@contextmanager
def outer_derivatives(*tensors: Tensor) -> Generator[list[Tensor]]:
    """Inside the jvp of an autograd.Function: `tensors` as the next outer transform sees them.

    torch runs a jvp with forward derivatives disabled at every level of nested transforms. Here
    they are enabled again, and the tensors have lost the tangents of the level being
    differentiated.
    """
    stack = _torch.interpreter_stack() or []
    levels = [i.level() for i in stack if i.key() == _torch.TransformType.Jvp]
    level = max(levels, default=0)

    def primal(tensor: Tensor) -> Tensor:
        if _torch.is_batched(tensor):
            inner = primal(_torch.unwrapped(tensor))
            return _torch.add_batch_dim(inner, _torch.batch_dim(tensor), _torch.level_of(tensor))
        if level:
            return _torch.unwrap_for_grad(tensor, level)
        return forward_ad.unpack_dual(tensor).primal

    with _torch.forward_enabled(True):
        yield [primal(tensor) for tensor in tensors]


def batched(tensor: Any, dim: int, others: Sequence[Tensor]) -> Any:
    """The inverse of `all_samples` for a tensor with `dim` dimensions after the batch dimensions.

    The batches are those of the others. Anything with fewer dimensions than that is unchanged.
    """
    levels = sorted({level for other in others for level in _modes.batches(other)})
    if isinstance(tensor, Tensor) and tensor.dim() == dim + len(levels):
        for level in levels:
            tensor = _torch.add_batch_dim(tensor, 0, level)
    return tensor


def refuse_captured(function: Callable[..., Tree], captured: Captured, *trees: Tree) -> None:
    """Raise if `function` closes over a tensor that takes part in a derivative or a batch.

    An implicit rule cannot differentiate with respect to such a tensor, and its batch is gone when
    the rule runs. Tensors used where gradients are disabled are not detected. What it captures
    otherwise is noticed for `captured`.
    """
    if not (_modes.differentiable() or _modes.transformed()):
        return
    inputs = _tree.map_tensors(_one_sample, trees)
    with torch.enable_grad(), captured.noticed(inputs), functions.noticed() as aliases:
        outputs = function(*inputs)
    plain = not (_modes.transformed() or _modes.forward_differentiated())
    own = plain and all(id(leaf) in aliases for leaf in graph_leaves(outputs))
    results = _tree.tensors(outputs)
    if not own and any(map(_belongs, results)):
        if not any(map(_differentiated, results)) and _draws_batches(function, inputs):
            raise ValueError(
                f"{captured.name} draws random numbers, which differ between the samples of "
                'torch.vmap(randomness="different"): draw them beforehand, and pass them as an '
                "argument"
            )
        raise ValueError(
            f"{captured.name} closes over a tensor that needs a gradient or is batched by vmap: "
            "pass it as an argument (a module's params by diffopt.nn.functionalize), or detach it; "
            "compute gradients inside with torch.func.grad"
        )


def _belongs(tensor: Tensor) -> bool:
    """Whether it takes part in an active derivative or batch, at any level."""
    return _differentiated(tensor) or any(map(_torch.is_batched, _modes.levels(tensor)))


def _differentiated(tensor: Tensor) -> bool:
    return any(
        level.requires_grad
        or (_torch.forward_level() >= 0 and forward_ad.unpack_dual(level).tangent is not None)
        for level in _modes.levels(tensor)
    )


def _draws_batches(function: Callable[..., Tree], inputs: Tree) -> bool:
    """Whether it draws random numbers where each sample of a batch has its own."""
    before = functions.AmbientState(inputs)
    with before.restored():
        function(*inputs)
        after = functions.AmbientState(inputs).states
        drawn = not all(map(torch.equal, before.states, after))
        return drawn and any(map(_torch.is_batched, _modes.levels(torch.rand(()))))


def _constant(tensor: Tensor) -> Tensor:
    """The tensor with its wrappers for derivatives removed, but not those for batches."""
    if _torch.is_batched(tensor):
        inner = _constant(_torch.unwrapped(tensor))
        return _torch.add_batch_dim(inner, _torch.batch_dim(tensor), _torch.level_of(tensor))
    if _torch.is_wrapped(tensor):
        return _constant(_torch.unwrapped(tensor))
    if not (_modes.transformed() or _modes.forward_differentiated()):
        return tensor.detach()
    # Not at the current level, which would wrap the result.
    with _torch.outside_transforms(), _torch.forward_enabled(False):
        return tensor.detach()


def _one_sample(tensor: Tensor) -> Tensor:
    """The tensor with all wrappers removed; of a batch, its first sample."""
    tensor = _constant(tensor)
    while _torch.is_batched(tensor):
        tensor = _constant(_torch.unwrapped(tensor).select(_torch.batch_dim(tensor), 0))
    return tensor
