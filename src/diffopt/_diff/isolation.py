"""Running code outside of every derivative in progress, and looking through torch.func's wrappers.

The only module that touches functorch's private functions on wrapped tensors.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffopt import _modes, _torch, _tree
from diffopt._tree import Tree


def isolated(
    function: Callable[..., Tree], *trees: Tree, plain: bool = False, sequential: bool = False
) -> Tree:
    """`function(*trees)` as constants: no graph, no tangents, but the batches of torch.func.vmap.

    With `plain` the function runs outside of every transform unless its arguments are batched, so
    that it may leave torch; but it cannot use tensors that were made inside of nested transforms.
    With `sequential` it is called so for every sample of a batch.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_torch.forward_enabled(False))
        trees = _tensors(_constant, trees)
        if sequential:
            return _each_sample(function, trees)
        leaves = [leaf for leaf in _tree.leaves(trees) if isinstance(leaf, Tensor)]
        if plain and not any(map(_is_batched, leaves)):
            stack.enter_context(_torch.outside_transforms())
        return _tensors(_constant, function(*trees))


def _each_sample(function: Callable[..., Tree], trees: Tree) -> Tree:
    batched = [t for t in _tree.leaves(trees) if isinstance(t, Tensor) and _is_batched(t)]
    if not batched:
        with _torch.outside_transforms():
            return _tensors(_constant, function(*trees))
    level = max(map(_level, batched))
    sizes = {_inner(t).shape[_batch_dim(t)] for t in batched if _level(t) == level}

    def sample(index: int) -> Tree:
        def select(tensor: Tensor) -> Tensor:
            if not _is_batched(tensor) or _level(tensor) != level:
                return tensor
            return _constant(_inner(tensor).select(_batch_dim(tensor), index))

        return _each_sample(function, _tensors(select, trees))

    def join(*leaves: Any) -> Any:
        if all(isinstance(leaf, Tensor) for leaf in leaves):
            stacked = torch.stack(leaves)
        elif all(isinstance(leaf, numbers.Real) for leaf in leaves):
            stacked = torch.tensor(leaves)
        elif all(leaf is leaves[0] for leaf in leaves):
            return leaves[0]
        else:
            raise TypeError(
                "under vmap with sequential=True solve must return tensors or numbers, or the same "
                f"object for every sample, not {_tree.describe(leaves[0])}"
            )
        return _torch.add_batch_dim(_constant(stacked), 0, level)

    (size,) = sizes
    return _tree.map(join, *(sample(index) for index in range(size)))


@contextmanager
def outer_derivatives(*tensors: Tensor) -> Generator[list[Tensor]]:
    """Inside the jvp of an autograd.Function: see `tensors` as the next transform outside does.

    Torch runs a jvp with forward derivatives off, at every level of nested transforms. Here they
    are on again, and the tensors have lost the tangents of the level whose jvp it is.
    """
    stack = _torch.interpreter_stack() or []
    levels = [i.level() for i in stack if i.key() == _torch.TransformType.Jvp]
    level = max(levels, default=0)

    def primal(tensor: Tensor) -> Tensor:
        if _is_batched(tensor):
            inner, dim = primal(_inner(tensor)), _batch_dim(tensor)
            return _torch.add_batch_dim(inner, dim, _level(tensor))
        if level:
            return _torch.unwrap_for_grad(tensor, level)
        return forward_ad.unpack_dual(tensor).primal

    with _torch.forward_enabled(True):
        yield [primal(tensor) for tensor in tensors]


def concrete(tensor: Tensor) -> Tensor:
    """The values of a constant; under vmap those of all samples, batch dimensions in front."""
    while _torch.is_wrapped(tensor):
        if _is_batched(tensor):
            tensor = _inner(tensor).movedim(_batch_dim(tensor), 0)
        else:
            tensor = _inner(tensor)
    return tensor


def alive(tensor: Tensor) -> Tensor:
    """The tensor without the wrapper of a transform that has ended since it was saved."""
    return _torch.unwrap_if_dead(tensor)


def batched(tensor: Any, dim: int, others: Sequence[Tensor]) -> Any:
    """The inverse of `concrete` for a tensor of `dim` dimensions behind those of batches.

    Its batches are those of the others. Anything without a dimension for each is left as it is.
    """
    levels = sorted({_level(x) for other in others for x in _modes.levels(other) if _is_batched(x)})
    if isinstance(tensor, Tensor) and tensor.dim() == dim + len(levels):
        for level in levels:
            tensor = _torch.add_batch_dim(tensor, 0, level)
    return tensor


def refuse_captured(function: Callable[..., Tree], name: str, *trees: Tree) -> None:
    """Raise if `function` computes with a tensor of a derivative or batch that is no argument.

    Such a tensor cannot be differentiated by an implicit rule, and its batch is gone when the
    rule runs. Not seen are tensors which are used where gradients are disabled.
    """
    if not (_modes.differentiable() or _modes.transformed()):
        return
    with torch.enable_grad():
        outputs = function(*_tensors(_one_sample, trees))
    if any(_belongs(leaf) for leaf in _tree.leaves(outputs) if isinstance(leaf, Tensor)):
        raise ValueError(
            f"{name} computes with a tensor that needs a gradient, or is batched by vmap, but is "
            "not among its arguments: pass it as an argument (a module's parameters by "
            "diffopt.nn.functionalize), or detach it; a gradient inside is for torch.func.grad"
        )


def _belongs(tensor: Tensor) -> bool:
    while True:
        if tensor.requires_grad or _is_batched(tensor):
            return True
        if _torch.forward_level() >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            return True
        if not _torch.is_wrapped(tensor):
            return False
        tensor = _inner(tensor)


def _tensors(function: Callable[[Tensor], Any], tree: Tree) -> Tree:
    return _tree.map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _constant(tensor: Tensor) -> Tensor:
    """The tensor without its wrappers for derivatives, but with those for batches."""
    if _is_batched(tensor):
        inner, dim, level = _constant(_inner(tensor)), _batch_dim(tensor), _level(tensor)
        return _torch.add_batch_dim(inner, dim, level)
    if _torch.is_wrapped(tensor):
        return _constant(_inner(tensor))
    # Not at the level in progress, which would wrap the result.
    with _torch.outside_transforms(), _torch.forward_enabled(False):
        return tensor.detach()


def _one_sample(tensor: Tensor) -> Tensor:
    """The tensor without any wrapper: of a batch, the first sample."""
    tensor = _constant(tensor)
    while _is_batched(tensor):
        tensor = _constant(_inner(tensor).select(_batch_dim(tensor), 0))
    return tensor


def _is_batched(tensor: Tensor) -> bool:
    return _torch.is_batched(tensor)


def _inner(tensor: Tensor) -> Tensor:
    return _torch.unwrapped(tensor)


def _batch_dim(tensor: Tensor) -> int:
    return _torch.batch_dim(tensor)


def _level(tensor: Tensor) -> int:
    return _torch.level_of(tensor)
