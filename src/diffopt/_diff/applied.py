"""Functions of tensors that run compiled: with derivatives, and over batches of torch.vmap."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffopt import _modes, _torch
from diffopt._diff import functions
from diffopt._diff.kernels import UnfitError
from diffopt._diff.tasks import Routine

Self = TypeVar("Self", bound="Applied")  # typing.Self is in Python 3.11


class Applied(ABC):
    """A function of tensors that runs compiled."""

    @property
    @abstractmethod
    def routine(self) -> Routine:
        """The step that it is made of."""

    @abstractmethod
    def run(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The results, distinct from the tensors, which have no wrappers and no derivatives."""

    @abstractmethod
    def eager(self, *tensors: Tensor) -> list[Tensor]:
        """The same function as it is."""

    @abstractmethod
    def over(self: Self, dims: Sequence[int | None]) -> Self:
        """The same for a batch, which is in front in the inputs that have one."""

    @abstractmethod
    def spread(self, own: Sequence[bool]) -> list[int]:
        """The inputs that are expanded along a batch, of those without one of their own."""

    def differentiable(self) -> Sequence[bool]:
        """For each result whether it is not a constant; `()` if none is known to be one."""
        return ()

    def pulled(
        self, inputs: list[Tensor], needed: Sequence[bool], given: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The compiled vector-Jacobian product; raises where there is none."""
        raise UnfitError("a derivative of its derivative is not compiled")

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The results, with derivatives and batches."""
        if not _torch.only_vmap():
            return _Transformed.apply(self, *tensors)  # pyright: ignore[reportReturnType]
        function, tensors, batches = self._over_batches(tensors)
        with _torch.outside_transforms():
            results: Any = _Plain.apply(function, *tensors)
            for level in batches:
                results = [_torch.add_batch_dim(y, 0, level) for y in results]
        return tuple(results)

    def _over_batches(
        self: Self, tensors: Sequence[Tensor]
    ) -> tuple[Self, list[Tensor], list[int]]:
        """The same for all samples of torch.vmap at once, its tensors, and torch.vmap's levels."""
        sizes = {
            _torch.level_of(x): _torch.unwrapped(x).shape[_torch.batch_dim(x)]
            for tensor in tensors
            for x in _modes.levels(tensor)
            if _torch.is_batched(x)
        }
        if not sizes:
            return self, [*tensors], []
        own, levels, function = [*map(_modes.batches, tensors)], sorted(sizes), self
        samples = [*map(_modes.all_samples, tensors)]
        for place, level in enumerate(levels):
            for i in self.spread([level in batches for batches in own]):
                x = samples[i].unsqueeze(place)
                samples[i] = x.expand(*x.shape[:place], sizes[level], *x.shape[place + 1 :])
                own[i].add(level)
        for level in reversed(levels):
            function = function.over([0 if level in batches else None for batches in own])
        return function, samples, levels

    def batched(
        self: Self, size: int, dims: Sequence[int | None], tensors: Sequence[Tensor]
    ) -> tuple[Self, list[Tensor]]:
        """The same for a batch, and its tensors with the batch in front."""
        pairs = zip(tensors, dims, strict=True)
        moved = [x if dim is None else x.movedim(dim, 0) for x, dim in pairs]
        own = [None if dim is None else 0 for dim in dims]
        for i in self.spread([dim is not None for dim in dims]):
            moved[i], own[i] = moved[i].expand(size, *moved[i].shape), 0
        return self.over(own), moved

    def pullback(
        self, inputs: list[Tensor], needed: Sequence[bool], given: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The vector-Jacobian product, compiled where possible."""
        program = self.routine.program
        assert program.ambient is not None
        assert program.captured is not None
        self.routine.facts.captured.check()
        program.captured.check()
        with program.ambient.restored():
            try:
                if _modes.forward_differentiated():
                    raise UnfitError("a derivative of its derivative is not compiled")
                if _torch.gradient_batch():
                    raise UnfitError("gradients in a batch (is_grads_batched) are not compiled")
                return self.pulled(inputs, needed, given)
            except Exception as error:
                program.warn(error)
                return functions.vjp(self.eager, inputs, needed, given)


def _keep(
    ctx: Any, function: Applied, tensors: Sequence[Tensor], results: Sequence[Tensor]
) -> None:
    """What the derivative needs."""
    ctx.function = function
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    carries = function.differentiable() or [True] * len(results)
    pairs = zip(results, carries, strict=True)
    ctx.mark_non_differentiable(*(y for y, carry in pairs if not carry))


def _pulled_back(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    # Tensors saved in a torch.func transform that has ended still have its wrapper.
    inputs = [_torch.unwrap_if_dead(x) for x in ctx.saved_tensors]
    return None, *ctx.function.pullback(inputs, ctx.needs_input_grad[1:], cotangents)


class _Plain(torch.autograd.Function):
    """For autograd alone: in the form for transforms, torch takes longer."""

    @staticmethod
    def forward(ctx: Any, function: Applied, *tensors: Tensor) -> tuple[Tensor, ...]:
        results = function.run(tensors)
        _keep(ctx, function, tensors, results)
        return tuple(results)

    backward = staticmethod(_pulled_back)


class _Transformed(torch.autograd.Function):
    @staticmethod
    def forward(function: Applied, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(function.run(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        function, *tensors = inputs
        _keep(ctx, function, tensors, output)

    backward = staticmethod(_pulled_back)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        function, tensors = inputs[0].batched(info.batch_size, in_dims[1:], inputs[1:])
        results: Any = _Transformed.apply(function, *tensors)
        return results, (0,) * len(results)
