"""The interface of every optimizer: `hparams`, `init`, `update`, and `update_` in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from diffopt import _memory, _modes, _tree
from diffopt._tree import Tree

S = TypeVar("S")
H = TypeVar("H")

Write: TypeAlias = Callable[[], None]
"""Writes what has been checked or computed before."""


class Optimizer(ABC, Generic[S, H]):
    """A pure function `(params, grads, state, hparams) -> (new_params, new_state)`.

    Subclass it for an algorithm that does not update tensors one by one; `diffopt.rules.Leafwise`
    is for those that do. `diffopt.testing.check` tests either.

    Attributes:
        hparams: creates the record of hyperparameters, a pytree: `opt.hparams(lr=0.1)`.
    """

    hparams: ClassVar[Any]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in ("repeated", "update_", "prepare_"):
            if _place(cls, name) > _place(cls, "update"):  # it does what another update does
                setattr(cls, name, vars(Optimizer)[name])

    @abstractmethod
    def init(self, params: Tree) -> S:
        """The state before the first step, for params of these shapes and dtypes."""

    @abstractmethod
    def update(self, params: Tree, grads: Tree, state: S, hparams: H) -> tuple[Tree, S]:
        """One step. Pure, and differentiable in every argument.

        Args:
            params: a pytree of tensors. Here and in every tree, an `nn.ParameterDict` stands for a
                dict and an `nn.ParameterList` for a list; what is returned has dicts and lists.
                Another module is refused: pass `diffopt.nn.functionalize(module).params`.
            grads: the same structure; `None` for a leaf that must not change.
            state: what `init` or the last `update` returned.
            hparams: what `self.hparams(...)` returned.

        Returns:
            The new params and the new state; the arguments are not changed. A leaf without a
            gradient is the very same tensor, and so, after the first step, is its state.

        Raises:
            ValueError: structures, shapes, dtypes or devices do not match, or one tensor occurs at
                two paths; the message names the path and both sides.
            TypeError: a leaf is not a tensor.
        """

    def repeated(self, params: Tree, state: S, hparams: H) -> Any:
        """What takes the updates of a loop that starts with these; None for one `update` each.

        See `diffopt._rule.repeated.Repeated`. It raises what `update` raises.
        """
        return None

    def update_(self, params: Tree, grads: Tree, state: S, hparams: H) -> None:
        """The same step in place: overwrites the tensors of `params` and `state`, without autograd.

        Arguments and errors are those of `update`; if it raises, nothing has been changed. A number
        of the state becomes a larger tensor where `update` would return one.

        Raises:
            ValueError: also if autograd is recording and `grads` or `hparams` require a gradient,
                which would be lost.
        """
        refuse_gradients(grads, hparams)
        with torch.no_grad():
            self.prepare_(params, grads, state, hparams)()

    def prepare_(self, params: Tree, grads: Tree, state: S, hparams: H) -> Write:
        """What `update_` consists of: it checks, and returns a function that writes.

        All that can raise is done before anything is written, so that several updates can be made
        together or not at all. It runs under `torch.no_grad`. A subclass that knows a faster way
        than `update` overrides this method instead of `update_`.
        """
        new_params, new_state = self.update(params, grads, state, hparams)
        old, new = {"params": params, "state": state}, {"params": new_params, "state": new_state}
        return partial(copy_, overwriting(old, new))


def _place(cls: type, name: str) -> int:
    """The position of the class that defines this in the method resolution order."""
    return next(i for i, base in enumerate(cls.__mro__) if name in vars(base))


def overwriting(old: dict[str, Tree], new: dict[str, Tree]) -> list[tuple[Tensor, Any]]:
    """The tensors of old trees that new ones replace, each with its new value, in other memory.

    Raises if a tensor cannot be overwritten; the trees are named in the paths of errors.
    """
    pairs: list[tuple[Any, Any]] = []
    places: list[tuple[str, int]] = []
    every: list[Any] = []
    for name, tree in old.items():
        leaves, spec = _tree.flatten(tree)
        values = _tree.leaves_like(new[name], spec, tree, (f"the new {name}", name))
        every += leaves
        for i, pair in enumerate(zip(leaves, values, strict=True)):
            if pair[0] is not pair[1] and (isinstance(pair[0], Tensor) or pair[0] != pair[1]):
                pairs.append(pair)
                places.append((name, i))

    def path(k: int) -> str:
        name, i = places[k]
        return _tree.paths(old[name], name)[i]

    for k, (leaf, value) in enumerate(pairs):
        if fault := _fault(leaf, value, places[k][0]):
            raise ValueError(f"{path(k)} {fault}")
    replaced = [leaf for leaf, _ in pairs]
    if not _modes.transformed():
        _memory.check_apart(path, replaced)
    values = _memory.copies([value for _, value in pairs], replaced, every)
    return list(zip(replaced, values, strict=True))


def copy_(pairs: Iterable[tuple[Tensor, Any]]) -> None:
    """Overwrite tensors, such as those of `overwriting`, each with its new value."""
    for old, new in pairs:
        overwrite_(old, new)


def overwrite_(old: Tensor, new: Tensor) -> None:
    """Overwrite a tensor; a number of the state can become a larger tensor (see `_fault`)."""
    if old.shape == new.shape:
        # Tensor.copy_, which is faster, asks for a device that fake tensors need not have.
        (Tensor.copy_ if old.is_cpu else torch.ops.aten.copy_.default)(old, new)
        return
    old.data = new.clone()
    if not old.is_inference():
        torch.autograd.graph.increment_version(old)


def _fault(old: Any, new: Any, tree: str) -> str | None:
    """Why a leaf of the tree of this name cannot be overwritten; None if it can."""
    if not isinstance(old, Tensor):
        return f"is {_tree.describe(old)}, which update_ cannot overwrite: keep it in a tensor"
    if not isinstance(new, Tensor):
        return f"is a tensor, but its new value is {_tree.describe(new)}"
    if old.shape != new.shape:
        fault = f"has shape {tuple(old.shape)}, but its new value has shape {tuple(new.shape)}"
        number = old.dim() == 0 and old.is_floating_point() and new.is_floating_point()
        if tree != "state" or not number:
            return fault
        if _modes.observed() or not _modes.all_ordinary([old, new]):
            return f"{fault}: take the first step with update, whose state has that shape"
    if _modes.transformed():
        return None
    if not torch.can_cast(new.dtype, old.dtype):
        return f"has dtype {old.dtype}, which cannot hold its new value of dtype {new.dtype}"
    if _modes.locked(old):
        return _memory.LOCKED
    return None


def refuse_gradients(grads: Tree, hparams: Any) -> None:
    """Raise if an in-place step would silently lose a gradient."""
    if not torch.is_grad_enabled():
        return
    for name, tree in (("grads", grads), ("hparams", hparams)):
        leaves = _tree.flatten(tree)[0]
        quick = not _modes.compiling() and _modes.all_ordinary(leaves)
        if quick and not any(leaf.requires_grad for leaf in leaves):
            continue
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                raise ValueError(
                    f"{_tree.paths(tree, name)[i]} requires a gradient, but update_ is not "
                    "differentiable: use update, or call it under torch.no_grad()"
                )


def check_optimizer(value: object, name: str) -> None:
    """Raise unless it is a pure optimizer."""
    if isinstance(value, Optimizer):
        return
    kind = value if isinstance(value, type) else type(value)
    if issubclass(kind, torch.optim.Optimizer):
        raise TypeError(
            f"{name} is {kind.__name__}, a torch.optim.Optimizer, which changes parameters in "
            "place: pass a pure one such as diffopt.sgd(), or convert it with diffopt.optim.to_pure"
        )
    raise TypeError(
        f"{name} is {_tree.shown(value)}, not a diffopt optimizer: create one by a call such as "
        "diffopt.adam()"
    )
