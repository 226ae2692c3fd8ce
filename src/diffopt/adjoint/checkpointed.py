"""Reverse mode through the whole loop, with most of it computed again instead of kept."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._diff import functions
from diffopt._diff.captured import (
    graph_leaves,
    refuse_closed_over,
    refuse_other,
    refuse_varying,
    varying,
)
from diffopt._diff.gradient import HVP
from diffopt._tree import Tree
from diffopt.adjoint._base import Adjoint, GradientStep, Step
from diffopt.adjoint.unrolled import Unrolled


@dataclass(frozen=True)
class Checkpointed(Adjoint):
    """Exact, in little memory: carries are kept at checkpoints, the steps between are run again.

    The loop of T steps is cut into `segments`, of which only the first carries are kept; with
    `levels` > 1 so is each of them when its turn comes to be run again, and so on. At any time
    about (levels + 1) T^(1/(levels + 1)) carries and the activations of one step are there. A step
    is run levels + 2 times at most, the last time with its graph; random numbers repeat themselves.
    `levels=1` keeps 2 sqrt(T) carries; more than log2(T) levels are no gain. `segments=T` keeps all
    carries and so runs each step just twice.

    Derivatives of any order reach the initial parameters, state and buffers, every tensor
    hyperparameter, the loss's arguments and the batches, but not tensors that the loss closes over:
    that raises. The backward pass is run again in turn where it is differentiated, so that higher
    orders take little memory as well, and torch.func.grad no more than autograd. In forward mode
    (`torch.func.jvp`, `torch.autograd.forward_ad`) and under torch.compile the loop is run as it
    stands, as `Unrolled` does.

    Args:
        segments: the number of pieces on each level, T^(1/(levels + 1)) by default.
        levels: how often pieces are cut into pieces.
        offload: "cpu" keeps the carries of the first level in pinned host memory when they are on
            a GPU; not under torch.func transforms.
        hvp: how the gradient in a step is differentiated. "reverse-over-reverse": by its own graph,
            that of one step at a time. "forward-over-reverse": its vector-Jacobian product is a
            forward derivative of it, by the symmetry of second derivatives; no graph of it is made.
            That takes fewer floating-point operations and needs a forward derivative of every
            operation of the loss, which some lack, such as flash attention. In torch it has been
            the slower of the two so far, by much for small models.

    Raises:
        ValueError: an argument is out of its range; `run`: the step closes over a tensor that needs
            a gradient.
        NotImplementedError: in the backward pass by "forward-over-reverse", an operation of the
            loss has no forward derivative.

    Example:
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

    def __post_init__(self) -> None:
        for name, value, least in (("segments", self.segments, 1), ("levels", self.levels, 1)):
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{name} is {value!r}, but must be an integer >= {least}")
        if self.offload not in (None, "cpu"):
            raise ValueError(f"offload is {self.offload!r}, but must be None or 'cpu'")
        if self.hvp not in ("forward-over-reverse", "reverse-over-reverse"):
            raise ValueError(
                f"hvp is {self.hvp!r}, but must be 'forward-over-reverse' or 'reverse-over-reverse'"
            )

    def run(self, step: Step, carry: Tree, args: Tree, xs: Iterable[Any]) -> tuple[Tree, list[Any]]:
        xs = list(xs)
        if _modes.compiling() or _modes.forward_differentiated() or not torch.is_grad_enabled():
            return Unrolled().run(step, carry, args, xs)
        if not xs:
            return carry, []
        results = refuse_closed_over("the loss or step", step, carry, args, xs[0])
        if isinstance(step, GradientStep):
            varies = varying(step, carry, args, xs, results)
            buffers = varies[len(_tree.split(carry[:2])[0]) :]
            step = replace(step, hvp=self.hvp, varies=tuple(buffers))
            if self.hvp == "forward-over-reverse":  # all gradients count as varying there
                varies = varying(step, carry, args, xs, results)
        else:
            varies = [functions.has_derivative(x) for x in _tree.split(carry)[0]]
            with torch.no_grad(), functions.Surroundings((carry, args, xs[0])).restored():
                refuse_other(results, _tree.split(step(carry, args, xs[0]))[0])
        frugal = isinstance(step, GradientStep) and self.hvp == "forward-over-reverse"
        loop = _Loop(step, self.segments or _root(len(xs), self.levels + 1), frugal, varies)
        outputs: list[Any] = []
        with self._offloaded(args, xs):
            for piece in loop.cut(xs):
                carry, some = loop.checkpointed(self.levels - 1, carry, args, piece)
                outputs.extend(some)
        return carry, outputs

    def _offloaded(self, args: Tree, xs: list[Any]) -> contextlib.AbstractContextManager[Any]:
        """Where what autograd saves on a GPU goes to the host, but for what is there anyway."""
        if self.offload is None:
            return contextlib.nullcontext()
        if _modes.transformed():
            raise ValueError("offload='cpu' does not work under torch.func transforms: give None")
        stay = {x.data_ptr() for x in _tree.split((args, xs))[0]}

        def pack(x: Tensor) -> Tensor | tuple[torch.device, Tensor]:
            if not x.is_cuda or x.data_ptr() in stay:
                return x
            return x.device, torch.empty_like(x, device="cpu", pin_memory=True).copy_(x)

        def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            device, host = packed
            return host.to(device, non_blocking=True)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


@dataclass(frozen=True)
class _Loop:
    """A step that is run many times.

    Attributes:
        step: the step.
        pieces: into how many a run is cut.
        frugal: whether the graph of a step keeps little more than carries.
        varies: which tensors of a carry depend on what may be differentiated.
    """

    step: Step
    pieces: int
    frugal: bool
    varies: list[bool]

    def cut(self, xs: list[Any]) -> list[list[Any]]:
        size = -(-len(xs) // self.pieces)
        return [xs[start : start + size] for start in range(0, len(xs), size)]

    def run(self, carry: Tree, args: Tree, xs: list[Any]) -> tuple[Tree, list[Any]]:
        outputs: list[Any] = []
        for x in xs:
            carry, output = self.step(carry, args, x)
            outputs.append(output)
        return carry, outputs

    def checkpointed(
        self, level: int, carry: Tree, args: Tree, xs: list[Any]
    ) -> tuple[Tree, list[Any]]:
        """`run`, of which nothing but its arguments is kept; on level 0 it is not cut again."""
        if not torch.is_grad_enabled():
            return self.run(carry, args, xs)
        inputs = carry, args, xs
        _, join = _tree.split(inputs)
        surroundings = functions.Surroundings(inputs)
        sizes: list[int] = []

        def run(inputs: Tree) -> tuple[Tree, list[Any]]:
            carry, outputs = self.run(*inputs)
            sizes[:] = _sizes([carry, *outputs])
            return carry, outputs

        def pullback(
            tensors: Sequence[Tensor], needed: Sequence[bool], cotangents: Sequence[Tensor | None]
        ) -> Sequence[Tensor | None]:
            inputs = carry, args, xs = join(tensors)
            wanted = _cut(needed, _sizes([carry, args, *xs]))
            with surroundings.restored():
                grads = self.sweep(level, inputs, wanted, _cut(cotangents, sizes))
            return list(itertools.chain(*grads))

        return functions.custom(run, inputs, pullback, sparse=True, varies=self.varies)

    def sweep(
        self,
        level: int,
        inputs: Tree,
        wanted: list[list[bool]],
        cotangents: list[list[Tensor | None]],
    ) -> list[list[Tensor | None]]:
        """The vector-Jacobian product of `run(*inputs)`, from the last step to the first.

        Args:
            level: how often pieces are cut into pieces still, before they are single steps.
            inputs: the carry, args and xs.
            wanted: which gradients are, of those by the tensors of the carry, args and each x.
            cotangents: for the tensors of the last carry and of each output.

        Returns:
            The gradients, in the order of `wanted`.
        """

        def product(arguments: Tree) -> list[list[Tensor | None]]:
            (carry, args, xs), (by_carry, *by_outputs) = arguments
            if len(xs) == 1 or (level == 0 and self.frugal):
                return self.recorded((carry, args, xs), wanted, [by_carry, *by_outputs])
            pieces = self.cut(xs) if level else [[x] for x in xs]
            starts: list[tuple[Tree, functions.Surroundings]] = []
            surroundings = functions.Surroundings(inputs)
            for piece in pieces:
                starts.append((carry, surroundings.now()))
                if piece is not pieces[-1]:
                    carry, _ = self.checkpointed(level - 1, carry, args, piece)
            want_carry, want_args, *want_xs = wanted
            by_args: list[Tensor | None] = [None] * len(want_args)
            by_xs: list[list[Tensor | None]] = []
            end = len(xs)
            while starts:
                carry, there = starts.pop()
                piece = pieces.pop()
                steps = slice(end - len(piece), end)
                end -= len(piece)
                with there.restored():
                    by_carry, by_these_args, *by_these_xs = self.sweep(
                        level - 1,
                        (carry, args, piece),
                        [self.varies if starts else want_carry, want_args, *want_xs[steps]],
                        [by_carry, *by_outputs[steps]],
                    )
                by_args = list(map(_sum, by_args, by_these_args))
                by_xs[:0] = by_these_xs
            return [by_carry, by_args, *by_xs]

        # Where the product is differentiated in turn, no more is kept of it than of the run.
        return functions.recomputed(product, (inputs, cotangents))

    def recorded(
        self, inputs: Tree, wanted: list[list[bool]], cotangents: list[list[Tensor | None]]
    ) -> list[list[Tensor | None]]:
        """The vector-Jacobian product of `run(*inputs)`, by the graph of all its steps."""
        tensors, join = _tree.split(inputs)

        def run(*tensors: Tensor) -> list[Tensor]:
            outputs = _tree.split(self.run(*join(tensors)))[0]
            if not any(want and not v for want, v in zip(wanted[0], self.varies, strict=True)):
                refuse_varying(outputs, self.varies)
            # Of a frugal step the graph does not show the loss, which is looked at elsewhere.
            if not (_modes.transformed() or self.frugal):
                self.refuse_closed_over(outputs, inputs, aliases)
            return outputs

        with functions.noticed() as aliases:
            grads = functions.vjp(
                run, tensors, list(itertools.chain(*wanted)), list(itertools.chain(*cotangents))
            )
        return _cut(grads, list(map(len, wanted)))

    def refuse_closed_over(
        self, outputs: list[Tensor], inputs: Tree, aliases: dict[int, Tensor]
    ) -> None:
        """Raise where a step closes over a tensor, though the first does not."""
        carry, args, xs = inputs
        if any(id(leaf) not in aliases for leaf in graph_leaves(outputs)):
            for x in xs:
                refuse_closed_over("the loss or step", self.step, carry, args, x)


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return x if y is None else y if x is None else x + y


def _sizes(trees: list[Tree]) -> list[int]:
    """The number of tensors in each."""
    return [len(_tree.split(tree)[0]) for tree in trees]


def _cut(values: Iterable[Any], sizes: list[int]) -> list[list[Any]]:
    values = iter(values)
    return [list(itertools.islice(values, size)) for size in sizes]


def _root(number: int, degree: int) -> int:
    """The smallest integer whose power is no less than the number."""
    root = 1
    while root**degree < number:
        root += 1
    return root
