"""All steps of a compiled loop as one function, so that a step costs little but its kernel."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffopt import _torch
from diffopt._diff.calls import Call, Pulled, compact, distinct
from diffopt._diff.kernels import Operator, Wires
from diffopt._diff.tasks import Joint


@dataclass(frozen=True, eq=False)
class Series(Call):
    """Steps one after another: `(carry, fixed inputs, xs of all steps) -> (carry, outputs of all)`.

    Its vector-Jacobian product also takes the carries in between, after the cotangents.

    Attributes:
        routine: a step.
        elements: how each step joins its x.
        keep: whether the carries in between are kept for derivatives.
    """

    elements: tuple[Joint, ...] = ()
    keep: bool = False

    @property
    def each(self) -> int:
        """How many tensors an x has."""
        return self.routine.count - self.routine.split

    @property
    def count(self) -> int:
        return self.routine.split + self.each * len(self.elements)

    @property
    def outputs(self) -> int:
        """How many results a step has besides the carry."""
        return len(self.routine.facts.depends) - self.steady

    @property
    def function(self) -> Any:
        return self._eagerly

    def _eagerly(self, *tensors: Tensor) -> list[Tensor]:
        carry, fixed, xs = self._parts(tensors)
        outputs: list[Tensor] = []
        for element, x in zip(self.elements, xs, strict=True):
            results = self.routine.at(element).function(*carry, *fixed, *x)
            carry = results[: self.steady]
            outputs += results[self.steady :]
        return [*carry, *outputs]

    def _parts(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Any]]:
        """The first carry, what is the same for all steps, and their xs."""
        split = self.routine.split
        xs = _chunks(tensors[split : self.count], self.each, len(self.elements))
        return [*tensors[: self.steady]], [*tensors[self.steady : split]], xs

    def differentiable(self) -> list[bool]:
        carries = self.routine.differentiable()
        return [*carries[: self.steady], *carries[self.steady :] * len(self.elements)]

    def batched_anyway(self, own: Sequence[bool]) -> list[int]:
        """Also the xs of all steps, if one is."""
        split, each = self.routine.split, self.each
        some = [any(own[split + i : self.count : each]) for i in range(each)]
        xs = [i for i in range(split, self.count) if some[(i - split) % each] and not own[i]]
        return [*super().batched_anyway(own), *xs]

    def run(self, given: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        step = _Repeated(Call(self.routine, self._of_a_step()))
        if self.pulled:
            return distinct(self._backward(step, given), given), []
        results, path = self._forward(step, compact(given))
        # Autograd marks the carries in between as constants, which no result may be.
        return distinct(results, [*given, *path]), path

    def _of_a_step(self) -> tuple[Operator, ...]:
        """The operators that make the same of a step."""
        split, inputs, more = self.routine.split, self.routine.count, 0
        found: list[Operator] = []
        for name, arguments in self.operators:
            if name == "vjp":
                wanted, there = arguments
                more = sum(there[: self.steady + self.outputs])
                arguments = wanted[:inputs], there[: self.steady + self.outputs]
            else:
                (dims,) = arguments
                arguments = ((*dims[: split + self.each], *(0,) * more),)
            found.append((name, arguments))
        return tuple(found)

    def _forward(
        self, step: _Repeated, tensors: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The results, and the carries in between."""
        carry, fixed, xs = self._parts(tensors)
        outputs, path = list[Tensor](), list[Tensor]()
        for t, (element, x) in enumerate(zip(self.elements, xs, strict=True)):
            if self.keep and t > 0:
                path += carry
            results = step(element, [*carry, *fixed, *x])
            carry = results[: self.steady]
            outputs += results[self.steady :]
        return [*carry, *outputs], path

    def _backward(self, step: _Repeated, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The gradients, from the results' cotangents and the carries in between."""
        carry, fixed, xs = self._parts(compact(tensors[: self.count]))
        wanted, there = next(a for name, a in step.call.operators if name == "vjp")
        places = [i for i, want in enumerate(wanted) if want]
        through = [i for i, takes in enumerate(there[: self.steady]) if takes]
        each, rest = sum(there[self.steady :]), iter(tensors[self.count :])
        carried = [*itertools.islice(rest, len(through))]
        given = [[*itertools.islice(rest, each)] for _ in self.elements]
        starts = [carry, *_chunks([*rest], self.steady, len(self.elements) - 1)]
        zeros = {i: torch.zeros_like(carry[i]) for i in through if not wanted[i]}
        totals, grads = dict[int, Tensor](), dict[int, Tensor]()
        of_xs: list[list[Tensor]] = []
        steps = zip(self.elements, starts, xs, given, strict=True)
        for element, start, x, cotangents in reversed([*steps]):
            grads = dict(
                zip(places, step(element, [*start, *fixed, *x, *carried, *cotangents]), strict=True)
            )
            carried = [grads[i] if wanted[i] else zeros[i] for i in through]
            for i in places:
                if self.steady <= i < self.routine.split:
                    totals[i] = totals[i] + grads[i] if i in totals else grads[i]
            of_xs.append([grads[i] for i in places if i >= self.routine.split])
        first = [g for i, g in grads.items() if i < self.steady]
        return [*first, *totals.values(), *itertools.chain(*reversed(of_xs))]

    def _asked(self, needed: Sequence[bool], present: Sequence[bool]) -> Pulled:
        """The same for every step: what is needed or present in some step is so in all."""
        split, steady, steps = self.routine.split, self.steady, len(self.elements)
        wanted, there = Pulled.of(
            self.routine,
            [*needed[:split], *any_of(needed[split:], steps)],
            [*present[:steady], *any_of(present[steady:], steps)],
        )
        return Pulled(
            (*wanted[:split], *wanted[split:] * steps), (*there[:steady], *there[steady:] * steps)
        )

    def _zeros(self, o: int, inputs: Sequence[Tensor], given: Sequence[Tensor | None]) -> Tensor:
        if o < self.steady:
            return super()._zeros(o, inputs, given)
        same = given[self.steady + (o - self.steady) % self.outputs :: self.outputs]
        return torch.zeros_like(next(x for x in same if x is not None))


def _chunks(tensors: Sequence[Tensor], size: int, count: int) -> list[list[Tensor]]:
    return [[*tensors[i * size : (i + 1) * size]] for i in range(count)]


def any_of(flags: Sequence[bool], steps: int) -> list[bool]:
    """Of flags for each step, those that hold in some step."""
    each = len(flags) // steps
    return [any(flags[i::each]) for i in range(each)]


class _Repeated:
    """Runs a call for one step after another, without torch.compile's checks where they hold.

    They do when a first run has shown the graph, and all tensors are like those of that run.
    Nothing else changes in between: a graph with other effects is run with the checks.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.wires: Wires | None = None
        self.guards: Any = None

    def __call__(self, element: Joint, tensors: list[Tensor]) -> list[Tensor]:
        if self.wires is not None:
            if self.guards.hold(tensors):
                return self.wires(tensors)
            tensors = compact(tensors)
            if self.guards.hold(tensors):
                return self.wires(tensors)
        tensors = compact(tensors)
        call = replace(self.call, routine=self.call.routine.at(element))
        results, self.wires = call.computed(tensors)
        self.guards = _torch.TensorGuards(tensors)
        return results
