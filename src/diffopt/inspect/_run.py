"""One watched loop: its steps record norms here, and leave marks in autograd's graph."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._diff.kernels import UnfitError
from diffopt._tree import Tree
from diffopt.adjoint import GradientStep
from diffopt.adjoint._base import Step
from diffopt.transforms import Wrapper

_NUMBERS = itertools.count()


class Region(NamedTuple):
    """What is behind a mark in autograd's graph: a step, or all steps if it is None."""

    run: Run
    step: int | None


class Run:
    """The record of one loop.

    Quantities are kept leaf by leaf, on their devices: `seen[quantity][step][leaf]`. The adjoints
    are those of the last backward pass. A pass visits steps in decreasing order, so a step that
    does not decrease starts another pass.
    """

    def __init__(self, of_gradients: bool) -> None:
        self.number = next(_NUMBERS)
        self.of_gradients = of_gradients  # whether the steps are `GradientStep`s
        self.steps = 0
        self.seen: dict[str, dict[int, dict[int, Tensor]]] = {}
        self._lowest = 0

    def watched(self, step: Step) -> Step:
        """The step, which records what it does here, unless an adjoint passes its own x."""
        if isinstance(step, GradientStep):
            if step.compiler is not None:
                step.compiler.give_up(UnfitError("a Trace() looks into its steps"))
            return _WatchedGradientStep(**vars(step), run=self)

        def watched(carry: Tree, args: Tree, x: Any) -> tuple[Tree, Any]:
            if not isinstance(x, _Numbered):
                return step(carry, args, x)
            return self.leave(x.number, carry, *step(carry, args, *x))

        return watched

    def numbered(self, xs: Iterable[Any]) -> Iterator[Any]:
        """The xs with their step numbers, which are kept when steps are recomputed.

        The x of a `GradientStep` is a pair, which adjoints unpack and rebuild, so its second part,
        the batch, holds the step number. Any other x is wrapped.
        """
        for number, x in enumerate(xs):
            if self.of_gradients:
                own, batch = x
                yield own, _Numbered.of(number, batch)
            else:
                yield _Numbered.of(number, (x,))

    def see(self, quantity: str, step: int, tree: Tree) -> None:
        """Keep the norms of a tree, unless they are known: the step is being recomputed."""
        if self.seen.setdefault(quantity, {}).get(step):
            return
        norms = enumerate(map(_norm, _tree.tensors(tree)))
        self.seen[quantity][step] = {i: x for i, x in norms if x is not None}

    def enter(self, carry: Tree) -> Tree:
        """The initial carry, watched by the backward pass."""
        return self._watch(carry, 0, None)

    def leave(self, step: int, old: Tree, new: Tree, output: Any) -> tuple[Tree, Any]:
        """What a step returns, watched by the backward pass."""
        if self.of_gradients:
            self.see(
                "update", step, _tree.map(lambda x, y: y.detach() - x.detach(), old[0], new[0])
            )
        region = Region(self, step)
        return self._watch(new, step + 1, region), self._marked(output, region)

    def end(self, carry: Tree, outputs: list[Any]) -> tuple[Tree, list[Any]]:
        """The results of the loop, marked as a whole if no single step could be marked."""
        self.steps = len(outputs)
        if self.of_gradients:
            losses = [_modes.concrete(value) for value, _, _ in outputs]
            self.seen["loss"] = {t: {0: x} for t, x in enumerate(losses) if x is not None}
        if not outputs:
            return carry, outputs
        region = Region(self, None)
        return self._watch(carry, self.steps, region, twice=False), self._marked(outputs, region)

    def values(self, quantity: str, step: int) -> Tensor | None:
        """The norm over all leaves at one step, on the CPU; None if unknown."""
        leaves = [x.cpu() for x in self.seen.get(quantity, {}).get(step, {}).values()]
        if not leaves:
            return None
        if quantity == "loss":
            return leaves[0]
        return torch.linalg.vector_norm(torch.stack(torch.broadcast_tensors(*leaves)), dim=0)

    def series(self, quantity: str, length: int) -> Tensor:
        """The norms at all steps; NaN where unknown."""
        if length == 0:
            return torch.empty(0, dtype=torch.float64, device="cpu")
        nan = _modes.tensor_of(torch.nan)
        rows = [self.values(quantity, step) for step in range(length)]
        rows = [nan if row is None else row.double() for row in rows]
        return torch.stack(torch.broadcast_tensors(*rows))

    def _watch(self, carry: Tree, step: int, region: Region | None, *, twice: bool = True) -> Tree:
        params = carry[0] if self.of_gradients else carry
        count = len(_tree.leaves(params))  # which come first
        leaves, spec = _tree.flatten(carry)
        for i, leaf in enumerate(leaves):
            if twice or not self._is_marked(leaf):
                quantity = "adjoint" if i < count else "state_adjoint"
                see = functools.partial(self._arrive, quantity, step, i)
                leaves[i] = _tapped(leaf, see, region)
        return _tree.unflatten(leaves, spec)

    def _marked(self, tree: Tree, region: Region) -> Tree:
        """The tree, marked in autograd's graph as results of `region` where it has no mark yet."""

        def marked(leaf: Any) -> Any:
            return leaf if self._is_marked(leaf) else _tapped(leaf, None, region)

        return _tree.map(marked, tree)

    def _is_marked(self, leaf: Any) -> bool:
        region = region_of(getattr(leaf, "grad_fn", None))
        return region is not None and region.run is self

    def _arrive(self, quantity: str, step: int, leaf: int, cotangent: Tensor) -> None:
        norms = self.seen.setdefault(quantity, {})
        if step > self._lowest or leaf in norms.get(step, {}):
            norms = self.seen[quantity] = {}
            self.seen.pop("state_adjoint" if quantity == "adjoint" else "adjoint", None)
        self._lowest = step
        norm = _norm(cotangent)
        if norm is not None:
            norms.setdefault(step, {})[leaf] = norm


def region_of(node: Any) -> Region | None:
    """The region behind a node of autograd's graph, if the node is a mark."""
    region = getattr(node, "region", None)
    return region if isinstance(region, Region) else None


def _tapped(leaf: Any, see: Callable[[Tensor], None] | None, region: Region | None) -> Any:
    if not (isinstance(leaf, Tensor) and _modes.has_derivative(leaf)):
        return leaf
    needed = _modes.needs_gradient(leaf)
    if not (needed and torch.is_grad_enabled()) or _modes.forward_differentiated():
        return leaf
    return _Tap.apply(see, region, leaf)


class _Tap(torch.autograd.Function):
    """The identity, which reports the cotangents that pass through it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(see: Any, region: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.see, ctx.region, _ = inputs
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[None, None, Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is not None and ctx.see is not None:
            ctx.see(cotangent)
        return None, None, cotangent


@dataclass(frozen=True, eq=False, kw_only=True)
class _WatchedGradientStep(GradientStep):
    run: Run

    def __call__(self, carry: Tree, args: Tree, x: Any) -> tuple[Tree, Any]:
        own, batch = x
        if not isinstance(batch, _Numbered):
            return super().__call__(carry, args, x)
        see = functools.partial(self.run.see, "gradient", batch.number)
        step = replace(self, optimizer=_Watched(self.optimizer, see))
        results = GradientStep.__call__(step, carry, args, (own, tuple(batch)))
        return self.run.leave(batch.number, carry, *results)


class _Watched(Wrapper[Any]):
    """An optimizer that reports the gradients passed to it."""

    see: Callable[[Tree], None]

    def update(self, params: Tree, grads: Tree, state: Any, hparams: Any) -> tuple[Tree, Any]:
        self.see(grads)
        return self.optimizer.update(params, grads, state, hparams)


class _Numbered(tuple[Any, ...]):
    """A tuple that knows its step number."""

    number: int

    @classmethod
    def of(cls, number: int, x: Iterable[Any]) -> _Numbered:
        numbered = cls(x)
        numbered.number = number
        return numbered


_tree.register_node(
    _Numbered,
    lambda x: (list(x), x.number),
    lambda values, number: _Numbered.of(cast(int, number), values),
)


def _norm(tensor: Tensor) -> Tensor | None:
    """The 2-norm in float64, where squares do not overflow; one for each example under vmap."""
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    exact = _modes.exact_dtype(tensor.device)
    dtype = exact.to_complex() if tensor.is_complex() else exact
    return _modes.concrete(torch.linalg.vector_norm(tensor, dtype=dtype))
