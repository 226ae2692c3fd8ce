"""The contract of every optimizer: four pure pieces over pytrees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from diffopt import _tree
from diffopt._tree import Tree

S = TypeVar("S")
H = TypeVar("H")


class Optimizer(ABC, Generic[S, H]):
    """A pure function `(params, grads, state, hparams) -> (new_params, new_state)`.

    Subclass it for an algorithm that is not elementwise; `diffopt.rules.leafwise` makes one from
    the mathematics of a single tensor. `diffopt.testing.check` tests either.

    Attributes:
        hparams: makes the record of hyperparameters, a pytree: `opt.hparams(lr=0.1)`.
    """

    hparams: Callable[..., H]

    @abstractmethod
    def init(self, params: Tree) -> S:
        """The state before the first step, for parameters of these shapes and dtypes."""

    @abstractmethod
    def update(self, params: Tree, grads: Tree, state: S, hparams: H) -> tuple[Tree, S]:
        """One step. Pure, and differentiable in every argument.

        Args:
            params: a pytree of tensors.
            grads: the same structure; `None` for a leaf that must stay as it is.
            state: what `init` or the last `update` returned.
            hparams: what `self.hparams(...)` returned.

        Returns:
            The new params and the new state; the arguments are left alone. A leaf without a
            gradient, and its state, are the very same tensors.

        Raises:
            ValueError: structures, shapes, dtypes or devices do not match, or one tensor stands at
                two paths; the message names the path and both sides.
            TypeError: a leaf is no tensor.
        """

    def update_(self, params: Tree, grads: Tree, state: S, hparams: H) -> None:
        """The same step in place: overwrites the tensors of `params` and `state`, without autograd.

        Args and errors are those of `update`; nothing is changed when it raises.

        Raises:
            ValueError: moreover, where autograd is recording and `grads` or `hparams` ask for a
                gradient, which could not arrive.
        """
        refuse_gradients(grads, hparams)
        with torch.no_grad():
            new = self.update(params, grads, state, hparams)
            for old_leaf, new_leaf in zip(
                _tree.leaves((params, state)), _tree.leaves(new), strict=True
            ):
                if new_leaf is not old_leaf:
                    old_leaf.copy_(new_leaf)


def refuse_gradients(grads: Tree, hparams: Any) -> None:
    """Raise where an in-place step would silently drop a gradient somebody waits for."""
    if not torch.is_grad_enabled():
        return
    for name, tree in (("grads", grads), ("hparams", hparams)):
        for i, leaf in enumerate(_tree.leaves(tree)):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                raise ValueError(
                    f"{_tree.paths(tree, name)[i]} requires a gradient, which update_ cannot "
                    "carry: use update, or call it under torch.no_grad()"
                )
