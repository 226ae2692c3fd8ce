"""explain(): which inputs got no, zero or non-finite meta-gradients, and why."""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from diffopt import _function, _tree
from diffopt._tree import Tree
from diffopt.adjoint import Checkpointed, FirstOrder, Unrolled
from diffopt.inspect._graph import Graph, graph
from diffopt.inspect._names import named
from diffopt.inspect._trace import Event, Trace


class Row(NamedTuple):
    """What became of one input.

    Attributes:
        name: the input's path.
        status: "ok", "None", "zero" (every entry exactly) or "non-finite" (any entry).
        norm: 2-norm of the gradient, NaN without one.
        entries: the number of the gradient's entries, 0 without one.
        zeros: how many of them are exactly zero.
        nonfinite: how many of them are not finite.
        step: the step at which it first happened, where that is known.
        reason: why, as far as it can be found out; empty where all is well.
    """

    name: str
    status: Literal["ok", "None", "zero", "non-finite"]
    norm: float
    entries: int
    zeros: int
    nonfinite: int
    step: int | None
    reason: str


@dataclass(frozen=True, repr=False)
class Explanation:
    """What became of every input: a table when printed, `rows` as data.

    Attributes:
        rows: one for each input.
        events: what happened in the traced loop, in words when printed.
    """

    rows: tuple[Row, ...]
    events: tuple[Event, ...]

    @property
    def ok(self) -> bool:
        """Whether every input has a meta-gradient that is finite and not zero."""
        return all(row.status == "ok" for row in self.rows)

    def __getitem__(self, name: str) -> Row:
        """The row of an input."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no input is called {name!r}: there are {[row.name for row in self.rows]}")

    def __repr__(self) -> str:
        table = [
            ("input", "gradient", "norm", "zeros", "non-finite", "why"),
            *map(_cells, self.rows),
        ]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
        return "\n".join([*lines, *(f"loop: {event}" for event in self.events)])


def explain(
    meta_grads: Tree, inputs: Tree, *, outer: Tensor | None = None, trace: Trace | None = None
) -> Explanation:
    """Say which inputs have a meta-gradient of None, of zeros, or one that is not finite, and why.

    Args:
        meta_grads: a tree like `inputs`, or the tuple `torch.autograd.grad(outer, leaves)` returns;
            give that `allow_unused=True`, or it raises where an input has none.
        inputs: a pytree of what was differentiated by, such as `{"lr": lr, "params": params}`.
        outer: what was differentiated. With it the graph is searched for every input.
        trace: what the loop was run with. With it the step is told at which things went wrong.

    Returns:
        An `Explanation`: print it, or look into its `rows`.

    Raises:
        ValueError: `meta_grads` does not match `inputs`.

    Example:
        >>> import torch, diffopt
        >>> opt = diffopt.sgd()
        >>> inputs = {"lr": torch.tensor(0.1, requires_grad=True), "decay": torch.tensor(0.01)}
        >>> hp = opt.hparams(lr=inputs["lr"], weight_decay=inputs["decay"].item())
        >>> sol = diffopt.minimize(
        ...     lambda w: w**2, torch.tensor(1.0), optimizer=opt, hparams=hp, steps=3
        ... )
        >>> grads = (*torch.autograd.grad(sol.params, inputs["lr"]), None)
        >>> print(diffopt.inspect.explain(grads, inputs, outer=sol.params))
        input  gradient  norm  zeros  non-finite  why
        lr     ok        3.85  0/1    0/1
        decay  None                               it does not require a gradient: ...
    """
    names = named(inputs)
    grads = _grads(meta_grads, inputs, [name for name, _ in names])
    picture = graph(outer, inputs) if outer is not None and outer.requires_grad else None
    events = tuple(trace.events) if trace is not None else ()
    rows: list[Row] = []
    for (name, leaf), grad in zip(names, grads, strict=True):
        search = _Search(name, leaf, outer, picture, trace, events)
        rows.append(_row(name, grad, search))
    return Explanation(tuple(rows), events)


def _grads(meta_grads: Tree, inputs: Tree, names: list[str]) -> list[Any]:
    leaves, spec = _tree.flatten(inputs)
    if isinstance(meta_grads, tuple) and all(map(_is_grad, cast(tuple[Any, ...], meta_grads))):
        grads = list(cast(tuple[Any, ...], meta_grads))
        if len(grads) != len(leaves):
            raise ValueError(f"meta_grads has {len(grads)} entries, but the inputs are {names}")
    else:
        grads = _tree.leaves_like(meta_grads, spec, inputs, ("meta_grads", "inputs"))
    for name, grad in zip(names, grads, strict=True):
        if not _is_grad(grad):
            raise ValueError(f"the meta-gradient of {name} is {_tree.describe(grad)}, not a tensor")
    return grads


def _is_grad(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, Tensor)


def _row(name: str, grad: Tensor | None, search: _Search) -> Row:
    if grad is None:
        step, reason = search.none()
        return Row(name, "None", torch.nan, 0, 0, 0, step, reason)
    grad = grad.detach().to_dense() if grad.is_sparse else grad.detach()
    entries, zeros = grad.numel(), int((grad == 0).sum())
    nonfinite = int((~grad.isfinite()).sum())
    counts = (float(torch.linalg.vector_norm(grad)), entries, zeros, nonfinite)
    if nonfinite:
        return Row(name, "non-finite", *counts, *search.nonfinite())
    if zeros == entries > 0:
        return Row(name, "zero", *counts, *search.zero())
    return Row(name, "ok", *counts, None, "")


@dataclass(frozen=True)
class _Search:
    """Where to look for reasons; each answer is `(step, reason)`."""

    name: str
    leaf: Any
    outer: Tensor | None
    picture: Graph | None
    trace: Trace | None
    events: tuple[Event, ...]

    def none(self) -> tuple[int | None, str]:
        leaf = self.leaf
        if not isinstance(leaf, Tensor):
            return None, f"it is {_tree.describe(leaf)}: give a tensor"
        if not _function.has_derivative(leaf):
            return None, f"it is of {leaf.dtype}: only floating-point and complex tensors have one"
        if not leaf.requires_grad:
            return None, "it does not require a gradient: requires_grad_() before it is used"
        if self.outer is not None and not self.outer.requires_grad:
            return None, "outer has no graph: no_grad, detach, adjoint=None or Truncated(0)"
        if self.picture is not None and self.picture.feeds(self.name):
            if not leaf.is_leaf:
                return None, ".grad stays None as it is no leaf: autograd.grad() or retain_grad()"
            return None, "it is in the graph of outer: was backward() called, and with it as input?"
        return self._unreached(leaf)

    def zero(self) -> tuple[int | None, str]:
        if self.picture is not None and not self.picture.feeds(self.name):
            return self._unreached(self.leaf)
        for event in reversed(self._events("zero")):  # the adjoint first
            steps = self._steps() or [event.step]
            if max(steps) < event.step if event.quantity == "adjoint" else min(steps) >= event.step:
                return event.step, str(event)
        causes = ["a derivative on the way is exactly zero, as that of sign or of a dead relu"]
        return None, ", or ".join([*causes, *self._dropped()])

    def nonfinite(self) -> tuple[int | None, str]:
        for event in self._events("non-finite"):
            steps = self._steps()
            if event.quantity != "adjoint" or steps is None or min(steps) < event.step:
                return event.step, str(event)
        if self.trace is None:
            return None, "run the loop with a Trace and give trace= to see the step"
        return None, "losses and adjoints are finite: it happens between it and the steps it feeds"

    def _unreached(self, leaf: Tensor) -> tuple[int | None, str]:
        step, reason = None, "no path from outer"
        if self.picture is None:
            reason += ", it seems (give outer= to see)"
        else:
            for other in self.picture.leaves:
                if other is not leaf and other.data_ptr() == leaf.data_ptr() != 0:
                    return None, "another tensor with its memory is in the graph: it was detached"
            step = min((step.first for step in self.picture.steps), default=0) or None
        if step is not None:
            reason += f", whose graph begins at step {step}"
        causes = ["not used", "cut by detach, .data, .item() or no_grad", *self._dropped()]
        return step, f"{reason}: {', or '.join(causes)}"

    def _dropped(self) -> list[str]:
        """What the adjoint may have to do with it."""
        adjoint = None if self.trace is None else self.trace.adjoint
        if isinstance(adjoint, FirstOrder):
            return ["acts through the loss alone, which FirstOrder drops"]
        if adjoint is None or isinstance(adjoint, (Unrolled, Checkpointed)):
            return []
        return [f"dropped by {type(adjoint).__name__}"]

    def _events(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    def _steps(self) -> list[int] | None:
        """The steps it feeds, where they can be told apart."""
        nodes = [] if self.picture is None else self.picture.feeds(self.name)
        steps = [x.first for x in nodes if x.kind == "step" and x.first == x.last]
        return steps if nodes and len(steps) == len(nodes) else None


def _cells(row: Row) -> tuple[str, ...]:
    if row.status == "None":
        return row.name, row.status, "", "", "", row.reason
    counts = f"{row.zeros}/{row.entries}", f"{row.nonfinite}/{row.entries}"
    return row.name, row.status, f"{row.norm:.4g}", *counts, row.reason
