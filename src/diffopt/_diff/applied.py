"""Functions of tensors that run compiled: with derivatives, and over batches of torch.vmap."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt import _modes, _torch
from diffopt._diff import functions
from diffopt._diff.kernels import UnfitError
from diffopt._diff.tasks import Routine


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
    def over(self, dims: Sequence[int | None]) -> Applied:
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

    def __call__(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The results, with derivatives and batches."""
        level = _torch.innermost_level()
        if level is None:
            return _apply(self, level, *tensors)
        if level.key() == _torch.TransformType.Vmap:
            return self._over_batch(level, tensors)
        if level.key() != _torch.TransformType.Grad:
            raise UnfitError(f"the transform {level.key().name} is not compiled")
        with _torch.in_one_level():
            return _apply(self, level, *map(_torch.lifted(level), tensors))

    def _over_batch(self, level: Any, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The results of all samples of a level of torch.vmap at once."""
        pairs = [_torch.unwrap_batched(x, level.level()) for x in tensors]
        with level.lower():
            samples = [x if dim is None else x.movedim(dim, 0) for x, dim in pairs]
            dims = [None if dim is None else 0 for _, dim in pairs]
            if not any(dim == 0 for dim in dims):
                return self(samples)
            for i in self.spread([dim == 0 for dim in dims]):
                samples[i], dims[i] = samples[i].expand(level.batch_size(), *samples[i].shape), 0
            results = self.over(dims)(samples)
        return [_torch.add_batch_dim(y, 0, level.level()) for y in results]

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


class _Differentiated(_torch.SingleLevelFunction):
    """One level of derivatives: autograd's, or one of torch.func.

    Like torch.autograd.Function, but without its support for trees, which takes longer than a step.
    """

    @staticmethod
    def forward(ctx: Any, function: Applied, level: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        results = function.run(tensors) if level is None else _below(level, function, tensors)
        ctx.function = function
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        carries = function.differentiable() or [True] * len(results)
        pairs = zip(results, carries, strict=True)
        ctx.mark_non_differentiable(*(y for y, carry in pairs if not carry))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        # Tensors saved in a torch.func transform that has ended still have its wrapper.
        inputs = [_torch.unwrap_if_dead(x) for x in ctx.saved_tensors]
        return None, None, *ctx.function.pullback(inputs, ctx.needs_input_grad[2:], cotangents)


_apply: Any = _Differentiated.apply  # pyright: ignore[reportAttributeAccessIssue] (written in C++)


def _below(level: Any, function: Applied, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The results, with the derivatives and batches of the levels below."""
    number = level.level()
    inner = [_torch.unwrap_for_grad(x, number) for x in tensors]
    with torch.enable_grad(), _torch.forward_enabled(True), level.lower():
        results = function(inner)
    return [_torch.wrap_for_grad(y, number) for y in results]
