"""explain(): which inputs have missing, zero or non-finite meta-gradients, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._arguments import check_type
from diffopt._tree import Tree
from diffopt.adjoint import (
    Adjoint,
    Checkpointed,
    Evolution,
    FirstOrder,
    ForwardMode,
    Implicit,
    Reversible,
    Unrolled,
)
from diffopt.inspect._graph import Graph, Node, graph, named
from diffopt.inspect._trace import Event, Trace


class Row(NamedTuple):
    """The diagnosis of one input.

    Attributes:
        name: the input's path.
        status: "ok", "None", "zero" (every entry exactly zero) or "non-finite" (any entry).
        norm: the 2-norm of the gradient, NaN if there is none.
        entries: the number of entries of the gradient, 0 if there is none.
        zeros: how many of them are exactly zero.
        nonfinite: how many of them are not finite.
        step: the step at which it first happened, if known.
        reason: why, as far as can be determined; empty if the gradient is ok.
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
    """The diagnosis of every input: a table when printed, `rows` as data.

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
        raise KeyError(f"no input is called {name!r}, only {[row.name for row in self.rows]}")

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
    """Say which inputs have missing (None), zero or non-finite meta-gradients, and why.

    Args:
        meta_grads: a tree like `inputs`, or the tuple that `torch.autograd.grad(outer, leaves)`
            returns; pass that `allow_unused=True`, or it raises if an input has none.
        inputs: a pytree of the tensors the derivative is with respect to, such as `{"lr": lr,
            "params": params}`; or a module, for the parameters that it trains.
        outer: the tensor that was differentiated. If given, its graph is searched for every input.
        trace: the `Trace` that the loop was run with. If given, the step at which things went wrong
            is reported.

    Returns:
        An `Explanation`, to print or to read by its `rows`.

    Raises:
        ValueError: `meta_grads` does not match `inputs` in structure or shapes.
        TypeError: `outer` is not a tensor, or `trace` is not a `Trace`.

    Examples:
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
    if trace is not None and not isinstance(trace, Trace):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"trace is {_tree.shown(trace)}, not a Trace: pass the one that the loop was run with"
        )
    check_type(outer, (Tensor, type(None)), "outer", "the tensor that is differentiated")
    if outer is not None and not _modes.has_derivative(outer):
        raise ValueError(f"outer has dtype {outer.dtype}, which has no derivative")
    inputs = _tree.plain(_tree.trained(inputs))
    names = named(inputs)
    grads = _grads(meta_grads, inputs, names)
    picture = graph(outer, inputs) if outer is not None and outer.requires_grad else None
    events = tuple(trace.events) if trace is not None else ()
    rows = (
        _row(grad, _Search(name, leaf, outer, picture, trace, events))
        for (name, leaf), grad in zip(names, grads, strict=True)
    )
    return Explanation(tuple(rows), events)


def _grads(meta_grads: Tree, inputs: Tree, names: list[tuple[str, Any]]) -> list[Any]:
    leaves, spec = _tree.flatten(inputs)
    if isinstance(meta_grads, tuple) and all(map(_is_grad, cast(tuple[Any, ...], meta_grads))):
        grads = list(cast(tuple[Any, ...], meta_grads))
        if len(grads) != len(leaves):
            known = [name for name, _ in names]
            raise ValueError(f"meta_grads has {len(grads)} entries, but the inputs are {known}")
    else:
        grads = _tree.leaves_like(meta_grads, spec, inputs, ("meta_grads", "inputs"))
    for (name, leaf), grad in zip(names, grads, strict=True):
        if not _is_grad(grad):
            raise ValueError(f"the meta-gradient of {name} is {_tree.describe(grad)}, not a tensor")
        if isinstance(leaf, Tensor) and grad is not None and grad.shape != leaf.shape:
            shapes = f"{tuple(grad.shape)}, but {name} has {tuple(leaf.shape)}"
            raise ValueError(f"the meta-gradient of {name} has shape {shapes}")
    return grads


def _is_grad(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, Tensor)


def _row(grad: Tensor | None, search: _Search) -> Row:
    name = search.name
    if grad is None:
        return Row(name, "None", torch.nan, 0, 0, 0, *search.none())
    grad = grad.detach().to_dense() if grad.is_sparse else grad.detach()
    entries, zeros = grad.numel(), int((grad == 0).sum())
    nonfinite = int((~grad.isfinite()).sum())
    counts = (float(torch.linalg.vector_norm(grad)), entries, zeros, nonfinite)
    if nonfinite:
        return Row(name, "non-finite", *counts, *search.nonfinite())
    if zeros == entries > 0:
        return Row(name, "zero", *counts, *search.zero())
    return Row(name, "ok", *counts, None, "")


_CUT = "cut by detach, .data, .item(), float(), torch.tensor() or no_grad"
_UNUSED = (
    "no step uses it, except through detach, .item(), no_grad or an operation without a derivative "
    "such as argmax"
)
_DROP_NOTHING = Unrolled, Checkpointed, Reversible, ForwardMode, Evolution, Implicit


@dataclass(frozen=True)
class _Search:
    """Searches for reasons; each answer is `(step, reason)`."""

    name: str
    leaf: Any
    outer: Tensor | None
    picture: Graph | None
    trace: Trace | None
    events: tuple[Event, ...]

    def none(self) -> tuple[int | None, str]:
        leaf = self.leaf
        if not isinstance(leaf, Tensor):
            return None, f"it is {_tree.describe(leaf)}: pass a tensor"
        if not _modes.has_derivative(leaf):
            return (
                None,
                f"it is of {leaf.dtype}: only floating-point and complex tensors have a gradient",
            )
        if not leaf.requires_grad:
            return None, "it does not require a gradient: call requires_grad_() before it is used"
        if self.outer is not None and not self.outer.requires_grad:
            causes = ["it uses nothing that requires a gradient", _CUT, *self._dropped()]
            if self.trace is None:
                causes.append("adjoint=None or Truncated(0)")
            return None, f"outer has no graph: {', or '.join(causes)}"
        if not self._nodes:
            return self._unreached(leaf)
        asked = "was backward() called, with it among the inputs?"
        if not leaf.is_leaf:
            asked = "its .grad is None as it is not a leaf: use autograd.grad() or retain_grad()"
        if self._acts_within():
            return None, f"the loop returned none for it: {_UNUSED}; otherwise: {asked}"
        reason = f"it is in the graph of outer: {asked}"
        if any(node.kind == "outer" for node in self._nodes):
            reason += " Or a function with its own backward, as a Checkpointed loop, returned none"
        return None, reason

    def zero(self) -> tuple[int | None, str]:
        if self.picture is not None and not self._nodes:
            return self._unreached(self.leaf)
        for event in reversed(self._events("zero")):  # adjoints first
            if self.trace is None or any(node.kind != "step" for node in self._nodes):
                break  # it also acts elsewhere
            steps = self._steps() or range(len(self.trace.norms.losses))  # or all
            before = max(steps, default=-1) < event.step
            if before if event.quantity == "adjoint" else min(steps, default=0) >= event.step:
                return event.step, str(event)
        causes = ["a derivative on the way is exactly zero, such as that of sign or a dead relu"]
        if self._acts_within():
            causes.append(_UNUSED)
        if isinstance(self._adjoint, Implicit):
            causes.insert(
                0, "a learning rate or initial value, on which Implicit's minimum does not depend"
            )
        return None, ", or ".join([*causes, *self._dropped()])

    def nonfinite(self) -> tuple[int | None, str]:
        for event in self._events("non-finite"):
            steps = self._steps()
            if event.quantity != "adjoint" or steps is None or min(steps) < event.step:
                return event.step, str(event)
        if self.trace is None:
            return None, "run the loop with a Trace and pass trace= to see the step"
        return None, "losses and adjoints are finite: it happens between it and the steps it feeds"

    def _unreached(self, leaf: Tensor) -> tuple[int | None, str]:
        step, reason = None, "no path from outer"
        if self.picture is None:
            reason += ", it seems (pass outer= to check)"
        else:
            for other in self.picture.leaves:
                if other is not leaf and other.data_ptr() == leaf.data_ptr() != 0:
                    return None, "a tensor with the same memory is in the graph: it was detached"
            step = min((step.first for step in self.picture.steps), default=0) or None
        if step is not None:
            reason += f", whose graph begins at step {step}"
        causes = ["not used", _CUT, *self._dropped()]
        return step, f"{reason}: {', or '.join(causes)}"

    def _dropped(self) -> list[str]:
        """How the adjoint may have caused it."""
        if isinstance(self._adjoint, FirstOrder):
            return ["acts only through the loss, which FirstOrder drops"]
        if self._adjoint is None or isinstance(self._adjoint, _DROP_NOTHING):
            return []
        return [f"dropped by {type(self._adjoint).__name__}"]

    @property
    def _adjoint(self) -> Adjoint | None:
        return None if self.trace is None else self.trace.adjoint

    @property
    def _nodes(self) -> list[Node]:
        """The steps and the outer loss that it feeds, directly or through other inputs."""
        names, nodes = [self.name], list[Node]()
        for name in names:
            fed = [] if self.picture is None else self.picture.feeds(name)
            names.extend(node.name for node in fed if node.kind == "input")
            nodes.extend(node for node in fed if node.kind != "input")
        return nodes

    def _acts_within(self) -> bool:
        """Whether it feeds a loop whose steps autograd's graph does not show."""
        return any(node.whole for node in self._nodes)

    def _events(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    def _steps(self) -> list[int] | None:
        """The steps it feeds, if they can be distinguished."""
        steps = [x.first for x in self._nodes if x.kind == "step" and not x.whole]
        return steps if steps and len(steps) == len(self._nodes) else None


def _cells(row: Row) -> tuple[str, ...]:
    if row.status == "None":
        return row.name, row.status, "", "", "", row.reason
    counts = f"{row.zeros}/{row.entries}", f"{row.nonfinite}/{row.entries}"
    return row.name, row.status, f"{row.norm:.4g}", *counts, row.reason
