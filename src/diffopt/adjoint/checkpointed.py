"""Reverse mode through the whole loop, with most of it computed again instead of kept."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffopt import _function, _modes, _tree
from diffopt._gradient import HVP
from diffopt._tree import Tree
from diffopt.adjoint._base import Adjoint, GradientStep, Step
from diffopt.adjoint._closed import refuse_closed_over
from diffopt.adjoint.unrolled import Unrolled


@dataclass(frozen=True)
class Checkpointed(Adjoint):
    """Exact, in little memory: carries are kept at checkpoints, the steps between are run again.

    The loop of T steps is cut into `segments`, of which only the first carries are kept; with
    `levels` > 1 so is each of them when its turn comes to be run again, and so on. At any time
    about (levels + 1) T^(1/(levels + 1)) carries and the activations of one step are there. The
    forward pass is run levels + 1 times, and random numbers repeat themselves. `levels=1` keeps
    2 sqrt(T) carries; more than log2(T) levels are no gain.

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
        hvp: how a step is differentiated. "forward-over-reverse": the vector-Jacobian product of
            the loss's gradient is a forward derivative of it, by the symmetry of second
            derivatives; nothing of a step's activations is kept. "reverse-over-reverse": by the
            graph of the gradient, for losses with operations that lack a forward derivative, such
            as flash attention.

    Raises:
        ValueError: an argument is out of its range; `run`: the step closes over a tensor that needs
            a gradient.
        NotImplementedError: in the backward pass, the loss has no forward derivative.

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
    hvp: HVP = "forward-over-reverse"

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
        refuse_closed_over("the loss or step", step, carry, args, xs[0])
        if isinstance(step, GradientStep):
            step = replace(step, hvp=self.hvp)
        pieces = self.segments or _root(len(xs), self.levels + 1)
        with self._offloaded(args, xs):
            return _run(step, self.levels, pieces, (carry, args, xs))

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


def _run(step: Step, level: int, pieces: int, inputs: Tree) -> tuple[Tree, list[Any]]:
    carry, args, xs = inputs
    outputs: list[Any] = []
    if level == 0:
        frugal = isinstance(step, GradientStep) and step.hvp == "forward-over-reverse"
        for x in xs:
            if frugal or len(xs) == 1:
                carry, output = step(carry, args, x)
            else:
                carry, output = _function.recomputed(lambda inputs: step(*inputs), (carry, args, x))
            outputs.append(output)
        return carry, outputs
    size = -(-len(xs) // pieces)
    for start in range(0, len(xs), size):
        run = functools.partial(_run, step, level - 1, pieces)
        carry, some = _function.recomputed(run, (carry, args, xs[start : start + size]))
        outputs.extend(some)
    return carry, outputs


def _root(number: int, degree: int) -> int:
    """The smallest integer whose power is no less than the number."""
    root = 1
    while root**degree < number:
        root += 1
    return root
