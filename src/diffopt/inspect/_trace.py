"""Trace: an adjoint that watches another, and what it saw."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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
from diffopt.adjoint._base import Step
from diffopt.inspect import _plots
from diffopt.inspect._run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Norms(NamedTuple):
    """2-norms along a loop of T steps, in float64 on the CPU; NaN where one is not known.

    Of a loop of `unroll` only the adjoint is known, of the whole carry. `Unrolled` takes the step
    counter in the optimizer's state for a constant; an adjoint that runs steps again, such as
    `Checkpointed`, has a derivative with respect to it, part of `state_adjoint` there.

    Attributes:
        losses: the loss before step t, shape [T].
        grads: norm of the inner gradient of step t, shape [T].
        updates: norm of params_{t+1} - params_t, shape [T].
        adjoint: norm of the derivative of the outer loss with respect to params_t, shape [T + 1]:
            the first entry is that of the initial params, the last that of the final ones.
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
        kind: "non-finite", "zero" (exactly), or "cut": from this step on backwards there is no
            adjoint, though it was known at the step behind and goes back through the steps.
        step: t of the loss, gradient or update of step t or of the adjoint of params_t. For
            adjoints, whose pass runs backwards, it is the last one; a "zero" lasts from there on.
    """

    quantity: Literal["loss", "gradient", "update", "adjoint"]
    kind: Literal["non-finite", "zero", "cut"]
    step: int

    def __str__(self) -> str:
        if self.kind == "cut":
            return f"no adjoint arrives at params_{self.step} or any before"
        value = "exactly zero" if self.kind == "zero" else "not finite"
        if self.quantity == "adjoint":
            return f"going backwards, the adjoint is {value} from params_{self.step} on"
        return f"the {self.quantity} is first {value} at step {self.step}"


class Trace(Adjoint):
    """Watches a loop: differentiates as another adjoint does, and keeps norms of every step.

    Losses, gradients and updates are seen in the forward pass, the adjoint dL/dparams_t in every
    backward pass through the loop, also where the steps are run again for it, as by `Checkpointed`.
    An adjoint that does not go back through the steps shows that of the final params alone. Steps
    are known by the batch in their `x`: what one of your own does with other batches is not seen.
    `Reversible` takes its steps as such only on the way back, where they are seen then.

    A trace holds norms, no tensors of the loop. They are those of the last loop run with it and of
    the last backward pass through that, be it one for a second derivative; a pass goes no further
    back than the inputs it was asked for. Under `torch.vmap` norms have further dimensions, one for
    the examples. In forward mode the adjoint is not seen.

    Args:
        adjoint: how the loop is differentiated.

    Raises:
        TypeError: `adjoint` is not an `Adjoint`, or is itself a `Trace`.
        RuntimeError: nothing has been run yet; `run`: under torch.compile.

    Example:
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
        if not isinstance(adjoint, Adjoint):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"adjoint is {adjoint!r}, not one of diffopt.adjoint such as Unrolled")
        if isinstance(adjoint, Trace):
            raise TypeError(f"adjoint is {adjoint!r} already: give what that watches")
        self.adjoint = adjoint
        self._last: Run | None = None

    def __repr__(self) -> str:
        return f"Trace({self.adjoint!r})"

    def run(self, step: Step, carry: Tree, args: Tree, xs: Iterable[Any]) -> tuple[Tree, list[Any]]:
        if _modes.compiling():
            raise RuntimeError("Trace looks at values, and torch.compile has none: use it eagerly")
        run = Run(isinstance(step, GradientStep))
        result = self.adjoint.run(run.watched(step), run.enter(carry), args, run.numbered(xs))
        self._last = run
        return run.end(*result)

    @property
    def norms(self) -> Norms:
        """The norms at every step, as they are known by now."""
        run = self._run()
        adjoints = [run.series(name, run.steps + 1) for name in ("adjoint", "state_adjoint")]
        forward = [run.series(name, run.steps) for name in ("losses", "grads", "updates")]
        return Norms(*forward, *adjoints)

    @property
    def events(self) -> list[Event]:
        """Where something first was zero or not finite, and where the adjoint ends."""
        run, events = self._run(), list[Event]()
        for name, quantity in _FORWARD.items():
            for step in range(run.steps):
                if _is("non-finite", run.values(name, step)):
                    events.append(Event(quantity, "non-finite", step))
                    break
        zero = next((t for t in range(run.steps) if _is("zero", run.values("grads", t))), None)
        if zero is not None:
            events.append(Event("gradient", "zero", zero))
        known = [t for t in range(run.steps, -1, -1) if run.values("adjoint", t) is not None]
        nonfinite = [t for t in known if _is("non-finite", run.values("adjoint", t))]
        if nonfinite:
            events.append(Event("adjoint", "non-finite", nonfinite[0]))
        zeros = itertools.takewhile(lambda t: _is("zero", run.values("adjoint", t)), known[::-1])
        for step in list(zeros)[-1:]:  # and at all steps before
            events.append(Event("adjoint", "zero", step))
        stepwise = not isinstance(self.adjoint, (OneStep, Implicit, ForwardMode, Evolution))
        if stepwise and known and known[-1] > 1:  # params_0 are seldom among the inputs
            events.append(Event("adjoint", "cut", known[-1] - 1))
        return sorted(events, key=_in_time)

    def plot(self) -> Figure:
        """The loss and the norms against the step, the latter on a logarithmic axis.

        Returns:
            A `matplotlib.figure.Figure`; a notebook shows it, `savefig` writes it.

        Raises:
            ImportError: matplotlib is missing; `pip install 'diffopt[plots]'`.
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
                dashes = (2 * i, (2, 6))  # so that lines at the same step do not hide each other
                axes.axvline(event.step, color=color, linestyle=dashes, label=str(event))
        bottom.set_yscale("log", nonpositive="mask")
        top.set_ylabel("loss")
        bottom.set(xlabel="step", ylabel="norm")
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
        return figure

    def _run(self) -> Run:
        if self._last is None:
            raise RuntimeError("nothing was traced yet: give it to minimize(..., adjoint=trace)")
        return self._last


_FORWARD: dict[str, Literal["loss", "gradient", "update"]] = {
    "losses": "loss",
    "grads": "gradient",
    "updates": "update",
}


def _in_time(event: Event) -> tuple[bool, int]:
    backwards = event.quantity == "adjoint"
    return backwards, -event.step if backwards else event.step


def _is(kind: str, values: Tensor | None) -> bool:
    """Whether a norm, or that of any example, is zero or not finite."""
    if values is None:
        return False
    return bool((values == 0 if kind == "zero" else ~values.isfinite()).any())
