"""Trace: an adjoint that watches another one, and the norms and events it has recorded."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

from diffopt import _modes
from diffopt._tree import Tree
from diffopt.adjoint import (
    Adjoint,
    Evolution,
    ForwardMode,
    GradientStep,
    Implicit,
    OneStep,
    Unrolled,
)
from diffopt.adjoint._base import Step, check_adjoint
from diffopt.inspect import _plots
from diffopt.inspect._run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Quantity: TypeAlias = Literal["loss", "gradient", "update", "adjoint"]
Kind: TypeAlias = Literal["non-finite", "zero", "cut"]


class Norms(NamedTuple):
    """2-norms along a loop of T steps, in float64 on the CPU; NaN where unknown.

    For a loop of `unroll` only the adjoint is known, that of the whole carry. `Unrolled` treats the
    step count in the optimizer's state as a constant; adjoints that recompute steps, such as
    `Checkpointed`, have a derivative with respect to it, which is part of `state_adjoint`.

    Attributes:
        losses: the loss before step t, shape [T].
        grads: the norm of the inner gradient at step t, shape [T].
        updates: the norm of params_{t+1} - params_t, shape [T].
        adjoint: the norm of the derivative of the outer loss with respect to params_t, shape [T +
            1]: the first entry is for the initial params, the last for the final ones.
        state_adjoint: the same for the optimizer's state and the buffers, shape [T + 1].
    """

    losses: Tensor
    grads: Tensor
    updates: Tensor
    adjoint: Tensor
    state_adjoint: Tensor


class Event(NamedTuple):
    """Where in a loop something first happened.

    Attributes:
        quantity: what it happened to.
        kind: "non-finite", "zero" (exactly), or "cut": from this step backwards there is no
            adjoint, although it is known at later steps.
        step: t for the loss, gradient or update of step t, or for the adjoint of params_t. For
            adjoints, whose pass runs backwards, it is the last such t; a "zero" lasts from there
            on.
    """

    quantity: Quantity
    kind: Kind
    step: int

    def __str__(self) -> str:
        if self.kind == "cut":
            return f"there is no adjoint of params_{self.step} or any params before"
        value = "exactly zero" if self.kind == "zero" else "not finite"
        if self.quantity == "adjoint":
            return f"going backwards, the adjoint is {value} from params_{self.step} on"
        return f"the {self.quantity} is first {value} at step {self.step}"


class Trace(Adjoint):
    """Watches a loop: differentiates like another adjoint, and records norms at every step.

    Losses, gradients and updates are recorded in the forward pass, and the adjoints dL/dparams_t in
    every backward pass through the loop, also if steps are recomputed for it, as by `Checkpointed`.
    For an adjoint that does not go back through the steps, only that of the final params is known.
    Steps are identified by the batch in their `x`: steps that a custom adjoint runs with other
    batches are not recorded. `Reversible` runs the steps themselves only on the way back, where
    they are recorded then.

    A trace holds norms, but no tensors of the loop. They are those of the last loop run with it and
    of the last backward pass through that, even one for a second derivative; a pass goes no further
    back than the inputs it is for. Under `torch.vmap` norms have one more dimension, for the
    examples. In forward mode the adjoint is not recorded.

    Args:
        adjoint: how the loop is differentiated.

    Raises:
        TypeError: `adjoint` is not an `Adjoint`, or is itself a `Trace`.
        RuntimeError: nothing has been run yet; `run`: under torch.compile.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.sgd()
        >>> w = torch.tensor(1.0, requires_grad=True)
        >>> trace = diffopt.inspect.Trace()
        >>> sol = diffopt.minimize(
        ...     lambda w: 0.5 * w**2, w, optimizer=opt, hparams=opt.hparams(lr=3.0), steps=3,
        ...     adjoint=trace,
        ... )
        >>> (meta_grad,) = torch.autograd.grad(sol.params, w)
        >>> trace.norms.grads  # |w_t| = |1 - lr|^t
        tensor([1., 2., 4.], dtype=torch.float64)
        >>> trace.norms.adjoint  # |1 - lr|^(3 - t): it explodes
        tensor([8., 4., 2., 1.], dtype=torch.float64)
    """

    def __init__(self, adjoint: Adjoint = Unrolled()) -> None:  # noqa: B008 (frozen)
        check_adjoint(adjoint)
        if isinstance(adjoint, Trace):
            raise TypeError(f"adjoint is {adjoint!r} already: pass the adjoint that it watches")
        self.adjoint = adjoint
        self._last: Run | None = None

    def __repr__(self) -> str:
        return f"Trace({self.adjoint!r})"

    def run(self, step: Step, carry: Tree, args: Tree, xs: Iterable[Any]) -> tuple[Tree, list[Any]]:
        if _modes.compiling():
            raise RuntimeError(
                "Trace reads values, which torch.compile lacks: use it in eager mode"
            )
        run = Run(isinstance(step, GradientStep))
        result = self.adjoint.run(run.watched(step), run.enter(carry), args, run.numbered(xs))
        self._last = run
        return run.end(*result)

    @property
    def norms(self) -> Norms:
        """The norms at every step, as far as they are known by now."""
        run = self._run()
        adjoints = [run.series(name, run.steps + 1) for name in ("adjoint", "state_adjoint")]
        forward = [run.series(name, run.steps) for name in ("loss", "gradient", "update")]
        return Norms(*forward, *adjoints)

    @property
    def events(self) -> list[Event]:
        """Where something first became zero or non-finite, and where the adjoint ends."""
        run, events = self._run(), list[Event]()
        forward = range(run.steps)
        known = [t for t in range(run.steps + 1) if run.values("adjoint", t) is not None]
        zeros = itertools.takewhile(lambda t: _is("zero", run.values("adjoint", t)), known)
        searches: list[tuple[Quantity, Kind, Iterable[int]]] = [
            ("loss", "non-finite", forward),
            ("gradient", "non-finite", forward),
            ("update", "non-finite", forward),
            ("gradient", "zero", forward),
            ("adjoint", "non-finite", reversed(known)),
            ("adjoint", "zero", [*zeros][-1:]),  # and at all steps before
        ]
        for quantity, kind, steps in searches:
            found = (t for t in steps if _is(kind, run.values(quantity, t)))
            events += [Event(quantity, kind, t) for t in itertools.islice(found, 1)]
        stepwise = not isinstance(self.adjoint, (OneStep, Implicit, ForwardMode, Evolution))
        if stepwise and known and known[0] > 1:  # params_0 are rarely among the inputs
            events.append(Event("adjoint", "cut", known[0] - 1))
        return sorted(events, key=_in_time)

    def plot(self) -> Figure:
        """Plot the loss and the norms by step, the latter on a logarithmic axis.

        Returns:
            A `matplotlib.figure.Figure`; a notebook shows it, `savefig` writes it.

        Raises:
            ImportError: matplotlib is missing; `pip install 'torch-diffopt[plots]'`.
        """
        norms = self.norms
        figure, (top, bottom) = _plots.subplots(2, (7.0, 6.0))
        lines = {
            "loss": (top, norms.losses),
            "gradient": (bottom, norms.grads),
            "update": (bottom, norms.updates),
            "adjoint": (bottom, norms.adjoint),
            "adjoint of the state": (bottom, norms.state_adjoint),
        }
        colors = {label: f"C{i}" for i, label in enumerate(lines)}
        for label, (axes, values) in lines.items():
            if values.isnan().all():
                continue
            columns = values.reshape(len(values), -1).numpy()  # one for each example
            axes.plot(columns, marker=".", color=colors[label])[0].set_label(label)
        for i, event in enumerate(self.events):
            if event.kind == "non-finite":
                axes, color = lines[event.quantity][0], colors[event.quantity]
                dashes = (2 * i, (2, 6))  # so that coinciding lines do not hide one another
                axes.axvline(event.step, color=color, linestyle=dashes, label=str(event))
        bottom.set_yscale("log", nonpositive="mask")
        top.set_ylabel("loss")
        bottom.set(xlabel="step", ylabel="norm")
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
        return figure

    def _run(self) -> Run:
        if self._last is None:
            raise RuntimeError("nothing was traced yet: pass it to minimize(..., adjoint=trace)")
        return self._last


def _is(kind: str, values: Tensor | None) -> bool:
    """Whether the norm, or that of any example, is zero or non-finite."""
    if values is None:
        return False
    return bool((values == 0 if kind == "zero" else ~values.isfinite()).any())


def _in_time(event: Event) -> tuple[bool, int]:
    backwards = event.quantity == "adjoint"
    return backwards, -event.step if backwards else event.step
