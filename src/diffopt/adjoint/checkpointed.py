"""Reverse mode through the whole loop, with most of it recomputed instead of stored."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._arguments import check_choice, check_integer
from diffopt._diff import functions
from diffopt._diff.captured import (
    refuse_closed_over,
    refuse_other,
    refuse_varying,
    varying,
    watched,
)
from diffopt._diff.functions import AmbientState, recomputed
from diffopt._diff.gradient import HVP, check_hvp
from diffopt._diff.unmodified import Captured, kept
from diffopt._tree import Tree
from diffopt.adjoint._base import Adjoint, GradientStep, Step, is_compiled
from diffopt.adjoint._offloaded import Offloaded, staying
from diffopt.adjoint._steps import one_by_one, taken
from diffopt.adjoint.unrolled import Unrolled


@dataclass(frozen=True)
class Checkpointed(Adjoint):
    """Exact, in little memory: carries are kept at checkpoints, steps in between are recomputed.

    The loop of T steps is cut into `segments`, of which only the first carries are kept. A segment
    is run again, with its graph, when its derivative is needed: each step is run twice, always with
    the same random numbers, and in memory are the carries and the graph of one segment. If the
    graph of a step is r times as large as a carry, that is least for sqrt(r T) segments, the
    default: both together are as large as 2 sqrt(r T) carries.

    With `levels` > 1 each segment is cut in the same way when it is recomputed, and so on: a step
    is run levels + 1 times, and about (levels + 1) (r T)^(1/(levels + 1)) carries are in memory.
    More than log2(T) levels gain nothing. With `graph="step"` the steps of the last segments are
    run once more, and differentiated one by one: then about (levels + 1) T^(1/(levels + 1)) carries
    and the graph of a single step are in memory.

    There are derivatives of any order with respect to the initial params, state and buffers, every
    tensor hyperparameter, the loss's arguments and the batches, but not tensors that the loss
    closes over: those raise. The backward pass is itself recomputed when it is differentiated, so
    higher orders take little memory too, and torch.func.grad no more than autograd. In forward mode
    (`torch.func.jvp`, `torch.autograd.forward_ad`) and under torch.compile the loop is simply
    unrolled, as by `Unrolled`.

    Args:
        segments: the number of segments at each level. By default that which takes the least
            memory, for r as measured in the first step of `minimize`, or 4 for steps of `unroll`.
        levels: the number of levels of nested segments.
        graph: whether a whole "segment" is differentiated at a time, or each "step" by itself.
        offload: "cpu" keeps the carries of the first level in pinned host memory if they are on a
            GPU. They are copied while the GPU computes, and on the way back each one while the
            segment after it is differentiated, so that two are on the GPU at a time. Not supported
            under torch.func transforms.
        hvp: how the gradient in a step is differentiated. "reverse-over-reverse": through its
            graph, one step at a time. "forward-over-reverse": without a graph; by the symmetry of
            second derivatives its vector-Jacobian product is a forward derivative. That takes fewer
            floating-point operations, but every operation of the loss needs a forward derivative,
            which some lack, such as flash attention. In torch it has been slower in every case
            measured, much slower for small models.

    Raises:
        ValueError: an argument is out of range; `run`: the step closes over a tensor that needs a
            gradient.
        NotImplementedError: in the backward pass with "forward-over-reverse": an operation of the
            loss has no forward derivative.

    Examples:
        >>> import torch, diffopt
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> opt = diffopt.sgd()
        >>> sol = diffopt.minimize(
        ...     lambda w: 0.5 * w**2, torch.tensor(1.0), optimizer=opt,
        ...     hparams=opt.hparams(lr=lr), steps=9, adjoint=diffopt.adjoint.Checkpointed(),
        ... )
        >>> torch.autograd.grad(sol.params, lr)  # -9 (1 - lr)^8
        (tensor(-3.8742),)

    Sources: Griewank and Walther, "Revolve", 2000; Kemaev et al., "Scalable meta-learning via
    mixed-mode differentiation", 2025.
    """

    segments: int | None = None
    levels: int = 1
    offload: Literal["cpu"] | None = None
    hvp: HVP = "reverse-over-reverse"
    graph: Literal["segment", "step"] = "segment"

    def __post_init__(self) -> None:
        if self.segments is not None:
            check_integer(self.segments, "segments", 1)
        check_integer(self.levels, "levels", 1)
        check_choice(self.offload, "offload", None, "cpu")
        check_hvp(self.hvp)
        check_choice(self.graph, "graph", "segment", "step")

    def run(self, step: Step, carry: Tree, args: Tree, xs: Iterable[Any]) -> tuple[Tree, list[Any]]:
        if _modes.compiling() or _modes.forward_differentiated() or not torch.is_grad_enabled():
            return Unrolled().run(step, carry, args, xs)
        xs = kept(xs)
        if not xs:
            return carry, []
        captured = Captured("the loss or step", step)
        first = _with_graph(step) if isinstance(step, GradientStep) else step
        results = refuse_closed_over(captured.name, first, carry, args, xs[0], captured=captured)
        if isinstance(step, GradientStep):
            # Compiled, it copies params that it leaves alone.
            varies = varying(replace(step, compiler=None), carry, args, xs, results)
            step = replace(step, hvp=self.hvp, varies=tuple(varies[_tree.count(carry[:2]) :]))
        else:
            varies = [_modes.has_derivative(x) for x in _tree.tensors(carry)]
            with torch.no_grad(), AmbientState((carry, args, xs[0])).restored():
                refuse_other(results, _tree.tensors(step(carry, args, xs[0])))
        frugal = isinstance(step, GradientStep) and self.hvp == "forward-over-reverse"
        small = frugal or is_compiled(step)  # the graph of a step holds little but its inputs
        whole = small or self.graph == "segment"
        ratio = 1.0 if small or not whole else _ratio(step, carry, captured.kept)
        least = (len(xs) * ratio) ** (1 / (self.levels + 1)) - 1e-9  # what rounding may add
        pieces = self.segments or math.ceil(least)
        loop = _Loop(step, pieces, frugal, whole, varies, captured, self.offload is not None)
        with self._offloaded(args, xs):
            return loop.by_pieces(self.levels, (carry, args, xs))

    def _offloaded(self, args: Tree, xs: list[Any]) -> contextlib.AbstractContextManager[Any]:
        """A context in which autograd keeps GPU tensors on the host, except args and xs."""
        if self.offload is None:
            return contextlib.nullcontext()
        if _modes.transformed():
            raise ValueError("offload='cpu' does not work under torch.func transforms: use None")
        return Offloaded(x.data_ptr() for x in _tree.tensors((args, xs)))


@dataclass(frozen=True)
class _Loop:
    """A loop over one step, in pieces.

    A loop consists of pieces, and these of smaller pieces, down to single steps. Each is
    recomputed: autograd keeps only its arguments, and runs it again when its derivative is needed.

    Attributes:
        step: the step.
        pieces: the number of pieces that a run is cut into.
        frugal: whether the graph of a step holds little more than carries, and not the loss.
        whole: whether the last pieces are run with their graph as they are, not step by step.
        varies: which tensors of a carry depend on what may be differentiated.
        captured: what the step captures.
        offloaded: whether what autograd saves is offloaded, which the graph of a step is not.
        losses: the first loss of each run, by the number of its step.
    """

    step: Step
    pieces: int
    frugal: bool
    whole: bool
    varies: list[bool]
    captured: Captured
    offloaded: bool
    losses: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def by_pieces(self, level: int, inputs: Tree, first: int = 0) -> tuple[Tree, list[Any]]:
        """The steps in pieces, each cut again at levels above 1; at level 0 one by one."""
        carry, args, xs = inputs
        size = -(-len(xs) // self.pieces) if level else 1
        outputs: list[Any] = []
        for start in range(0, len(xs), size):
            piece = xs[start : start + size]
            single = len(piece) == 1 or (level == 1 and self.whole)
            run = self.run if single else functools.partial(self.by_pieces, level - 1)
            run = functools.partial(run, first=first + start)
            carry, some = recomputed(run, (carry, args, piece), varies=self.varies)
            outputs.extend(some)
        return carry, outputs

    def run(self, inputs: Tree, first: int) -> tuple[Tree, list[Any]]:
        """The steps one after another; raises if a derivative would be lost."""
        self.captured.check()
        steps = functools.partial(one_by_one, self.step)
        # The graph of a frugal step does not show the loss, which is checked elsewhere.
        eager = steps if self.frugal else watched("the loss or step", steps)
        with staying() if self.offloaded else contextlib.nullcontext():
            carry, outputs = taken(self.step, *inputs, eager=eager)
        _refuse_change(inputs[0], carry)
        if isinstance(self.step, GradientStep):
            self._compare(first, _modes.concrete(outputs[0][0]))
        starts, ends = (_tree.tensors(tree) for tree in (inputs[0], carry))
        constants = [x for x, v in zip(starts, self.varies, strict=True) if not v]
        if torch.is_grad_enabled() and not any(x.requires_grad for x in constants):
            refuse_varying(ends, self.varies)
        return carry, outputs

    def _compare(self, first: int, loss: Tensor | None) -> None:
        """Raise if a step that is run again has another loss, beyond rounding."""
        before = None if loss is None else self.losses.setdefault(first, loss)
        if loss is None or before is None or before.shape != loss.shape or before.equal(loss):
            return
        rounding = torch.finfo(loss.dtype).eps ** 0.5
        size = max(x.abs().nan_to_num(0.0, 0.0, 0.0).max() for x in self.losses.values())
        if not loss.allclose(before, rounding, rounding * float(size), equal_nan=True):
            raise RuntimeError(
                f"step {first}, run again for its derivative, has another loss: what the loss "
                "reads beside its arguments, or an argument through .data or numpy, has been "
                "modified since: modify it after the backward pass"
            )


def _refuse_change(before: Tree, after: Tree) -> None:
    """Raise if the carry has tensors in other places after some steps."""
    leaves = _tree.leaves(before), _tree.leaves(after)
    for i, (old, new) in enumerate(zip(*leaves, strict=True)):
        if isinstance(old, Tensor) is not isinstance(new, Tensor):
            raise ValueError(
                f"{_tree.paths(before, 'carry')[i]} is {_tree.describe(old)} before some steps and "
                f"{_tree.describe(new)} after them, but Checkpointed requires tensors in the same "
                "places: start with a tensor, such as one of zeros, or use Unrolled()"
            )


def _with_graph(step: GradientStep) -> Step:
    """The step, with the graph that it has where its params need a gradient."""

    def run(carry: Tree, args: Tree, x: Any) -> tuple[Tree, Any]:
        params, *rest = carry
        if not _modes.transformed():
            params = _tree.map(lambda p: functions.alias(p, attached=False), params)
        return step((params, *rest), args, x)

    return run


def _ratio(step: Step, carry: Tree, kept: int) -> float:
    """How many times as large as a carry the graph of a step is, about; 4 where that is not known.

    A power of 4, so that the segments, and with them the order of sums, depend on little else. A
    step of `unroll` has been run without its graph.
    """
    whole = sum(_modes.all_samples(x).nbytes for x in _tree.tensors(carry))
    known = isinstance(step, GradientStep) and kept and whole
    return 4.0 ** max(0, round(math.log(kept / whole, 4))) if known else 4.0
