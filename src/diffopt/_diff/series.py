"""All steps of a compiled loop as one function, so that a step costs little but its kernel."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from diffopt import _modes, _torch
from diffopt._diff import functions
from diffopt._diff.applied import Applied
from diffopt._diff.calls import Call, compact
from diffopt._diff.kernels import Again, Asked, Operator, Pull, composed, kept
from diffopt._diff.tasks import Joint, Routine
from diffopt._tree import Tree

T = TypeVar("T")


class Kept(NamedTuple):
    """What steps have computed, and kept for derivatives.

    Attributes:
        operators: those of the series.
        outputs: the outputs of a step whose cotangents are taken; None if there is no derivative.
        results: the results; only their memory is shared with others.
        versions: how often that has been written to.
        pulls: the vector-Jacobian products of the steps.
    """

    operators: tuple[Operator, ...]
    outputs: frozenset[int] | None
    results: list[Tensor]
    versions: list[int]
    pulls: list[Pull]

    def serves(self, pullback: Pullback) -> bool:
        """Whether a derivative can be computed from it."""
        same = self.operators == pullback.series.operators and self.outputs == pullback.outputs
        return same and [*map(_torch.version, self.results)] == self.versions


@dataclass(frozen=True, eq=False)
class Series(Applied):
    """Steps one after another: `(carry, fixed inputs, xs of all steps) -> (carry, outputs of all)`.

    Attributes:
        step: one of them, the first.
        elements: how each step joins its x; a run removes those of steps after its end.
        needed: which of its inputs need a gradient.
        keep: whether it keeps what derivatives need.
        ends: whether it ends with the first step whose last result, a flag, is true.
        operators: what is made of it: see `kernels`.
        kept: what the last run has kept.
    """

    step: Routine
    elements: list[Joint]
    needed: tuple[bool, ...]
    keep: bool = False
    ends: bool = False
    operators: tuple[Operator, ...] = ()
    kept: list[Kept] = field(default_factory=list[Kept])

    @property
    def routine(self) -> Routine:
        return self.step

    @property
    def each(self) -> int:
        """How many tensors an x has."""
        return self.routine.count - self.routine.split

    @property
    def count(self) -> int:
        """How many inputs it has."""
        return len(self.needed)

    @property
    def outputs(self) -> int:
        """How many results a step has besides the carry."""
        return max(0, len(self.routine.facts.seen.depends) - self.routine.steady)

    def over(self, dims: Sequence[int | None]) -> Series:
        return replace(self, operators=(*self.operators, ("vmap", (tuple(dims),))))

    def spread(self, own: Sequence[bool]) -> list[int]:
        """The carry, what needs a gradient, and the xs of all steps if one is."""
        routine, split, each = self.routine, self.routine.split, self.each
        some = [any(own[split + i : self.count : each]) for i in range(each)]
        first = [i < routine.steady or need for i, need in enumerate(routine.needed[:split])]
        of_x = map(operator.or_, routine.needed[split:], some)
        spread = zip(own, itertools.chain(first, itertools.cycle(of_x)), strict=False)
        return [i for i, (has, needs) in enumerate(spread) if needs and not has]

    def differentiable(self) -> list[bool]:
        steady, split = self.routine.steady, self.routine.split
        carry, fixed = [*self.needed[:steady]], _chosen(self.needed[:split]) - {*range(steady)}
        outputs, before = list[bool](), None
        found = list[bool]()
        for x in _chunks(self.needed[split:], self.each, len(self.elements)):
            if (carry, x) != before:
                before = carry, x
                found = self.routine.carries(_chosen(carry) | fixed | _chosen(x, split))
            carry = found[:steady]
            outputs += found[steady:]
        return [*carry, *outputs]

    def eager(self, *tensors: Tensor) -> list[Tensor]:
        return composed(self._eagerly, self.operators)(*tensors)

    def _eagerly(self, *tensors: Tensor) -> list[Tensor]:
        carry, fixed, xs = self._parts(tensors)
        outputs: list[Tensor] = []
        for element, x in zip(self.elements, xs, strict=True):
            results = self.routine.at(element).function(*carry, *fixed, *x)
            carry = results[: self.routine.steady]
            outputs += results[self.routine.steady :]
        return [*carry, *outputs]

    def _parts(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Any]]:
        """The first carry, what is the same for all steps, and their xs."""
        steady, split = self.routine.steady, self.routine.split
        xs = _chunks(tensors[split:], self.each, len(self.elements))
        return [*tensors[:steady]], [*tensors[steady:split]], xs

    def run(self, given: Sequence[Tensor]) -> list[Tensor]:
        inputs = compact(given)
        kept = self.computed(inputs, self._usual() if self.keep else None)
        self.kept[:] = [kept] if self.keep else []
        return _distinct(kept.results, inputs)

    def computed(self, tensors: list[Tensor], outputs: frozenset[int] | None) -> Kept:
        """The results, and what derivatives need that take the cotangents of these outputs."""
        call = Call(self.routine, self._of_a_step(), outputs)
        late = outputs is not None and self.routine.program.backend.replays
        step, derived = _Repeated(replace(call, outputs=None) if late else call), _Repeated(call)
        carry, fixed, xs = self._parts(tensors)
        results, pulls = list[Tensor](), list[Pull]()
        for element, x in zip(self.elements, xs, strict=True):
            given = [*carry, *fixed, *x]
            found, pull = step(element, given)
            pull = functools.partial(_pulled_late, derived, element, given) if late else pull
            carry = found[: self.routine.steady]
            results += found[self.routine.steady :]
            pulls += [] if pull is None else [pull]
            if self.ends and bool(found[-1].all()):
                break
        del self.elements[len(results) // max(1, self.outputs) :]
        results = [*carry, *results]
        versions = [*map(_torch.version, results)]
        return Kept(self.operators, outputs, results, versions, pulls)

    def _of_a_step(self) -> tuple[Operator, ...]:
        """The operators that make the same of a step."""
        count = self.routine.count
        return tuple((name, (dims[:count],)) for name, (dims,) in self.operators)

    def pulled(
        self, inputs: list[Tensor], needed: Sequence[bool], given: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        reached = self._reached([x is not None for x in given])
        given = self._completed(given)
        pullback = Pullback.of(self, given)
        self._known()[:] = [pullback.outputs]
        pairs = [*zip(given, pullback.whole.there, strict=True)]
        if not any(x is not None and there for x, there in pairs):
            return [None] * len(inputs)
        cotangents = [
            self._zeros(o, inputs, given) if x is None else x
            for o, (x, there) in enumerate(pairs)
            if there
        ]
        grads = iter(pullback([*inputs, *cotangents]))
        found = [next(grads) if want else None for want in pullback.whole.wanted]
        wanted = map(operator.and_, needed, reached)
        return [g if want else None for g, want in zip(found, wanted, strict=True)]

    def _completed(self, given: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The cotangents, with zeros for constants among the outputs whose cotangents others took.

        In the first steps of a loop a loss may be a constant. Taken one by one, such a step would
        be asked for another derivative than the others, and run again.
        """
        last = self.kept[0] if self.kept else None
        if len(self.elements) > 1 or last is None or last.operators != self.operators:
            return given
        known, carries = frozenset[int]().union(*self._known()), self.differentiable()
        rows = zip(given, last.results, carries, strict=True)
        return [
            torch.zeros_like(y) if o in known and not carry else x
            for o, (x, y, carry) in enumerate(rows)
        ]

    def _reached(self, given: Sequence[bool]) -> list[bool]:
        """Which inputs the results depend on that are given a cotangent."""
        routine = self.routine
        depends, steady, split = routine.facts.seen.depends, routine.steady, routine.split
        carry, fixed, xs = _chosen(given[:steady]), set[int](), list[list[bool]]()
        for outputs in reversed(_chunks(given[steady:], self.outputs, len(self.elements))):
            results = carry | _chosen(outputs, steady)
            reached = set[int]().union(*(depends[o] for o in results))
            xs.append([split + i in reached for i in range(self.each)])
            carry, fixed = {i for i in reached if i < steady}, fixed | reached
        first = [i in carry for i in range(steady)]
        rest = [i in fixed for i in range(steady, split)]
        found = [*first, *rest, *itertools.chain(*reversed(xs))]
        return [*found, *[False] * (self.count - len(found))]

    def _usual(self) -> frozenset[int] | None:
        """The outputs of a step whose cotangents the last derivative took; None to wait and see.

        The first time none, since most loops are for their last carry, if there is one.
        """
        known = self._known()
        return known[0] if known else frozenset() if self.routine.steady else None

    def _known(self) -> list[frozenset[int]]:
        return kept(("outputs", self.routine.key), list)

    def _zeros(self, o: int, inputs: Sequence[Tensor], given: Sequence[Tensor | None]) -> Tensor:
        """The cotangent of a result without one."""
        steady = self.routine.steady
        if o < steady:
            return torch.zeros_like(inputs[o])
        same = given[steady + (o - steady) % self.outputs :: self.outputs]
        return torch.zeros_like(next(x for x in same if x is not None))


@dataclass(frozen=True, eq=False)
class Pullback(Applied):
    """The vector-Jacobian product of a series: `(inputs, cotangents) -> gradients`.

    Attributes:
        series: the series.
        outputs: the outputs of a step whose cotangents it takes.
        step: what is asked for of each step.
        whole: what is asked for of the series.
    """

    series: Series
    outputs: frozenset[int]
    step: Asked
    whole: Asked

    @staticmethod
    def of(series: Series, given: Sequence[Tensor | None]) -> Pullback:
        """For the cotangents given."""
        routine, steps = series.routine, len(series.elements)
        steady, split = routine.steady, routine.split
        rest = given[steady:]
        outputs = frozenset(
            steady + i
            for i in range(series.outputs)
            if any(x is not None for x in rest[i :: series.outputs])
        )
        wanted, there = step = routine.asked(routine.facts.seen, outputs)
        of_all = (*wanted[:split], *wanted[split:] * steps)
        of_all += (False,) * (series.count - len(of_all))  # of steps after its end
        whole = Asked(of_all, (*there[:steady], *there[steady:] * steps))
        return Pullback(series, frozenset(o for o in outputs if there[o]), step, whole)

    @property
    def routine(self) -> Routine:
        return self.series.routine

    def over(self, dims: Sequence[int | None]) -> Pullback:
        return replace(self, series=self.series.over(dims[: self.series.count]))

    def spread(self, own: Sequence[bool]) -> list[int]:
        """Also all cotangents."""
        count = self.series.count
        cotangents = [i for i in range(count, len(own)) if not own[i]]
        return [*self.series.spread(own[:count]), *cotangents]

    def eager(self, *tensors: Tensor) -> list[Tensor]:
        return self.whole.pulled(self.series.eager, tensors)

    def run(self, given: Sequence[Tensor]) -> list[Tensor]:
        series, retain = self.series, _torch.keeps_graph()
        inputs, cotangents = given[: series.count], compact(given[series.count :])
        found = series.kept.pop() if series.kept else None
        if found is None or not found.serves(self):
            found = series.computed(compact(inputs), self.outputs)
        series.kept[:] = [found] if retain else []
        pulls = [*found.pulls] if retain else found.pulls
        grads = self._steps(pulls, inputs, cotangents, retain)
        return _distinct(grads, [*inputs, *cotangents])

    def _steps(
        self, pulls: list[Pull], inputs: Sequence[Tensor], cotangents: list[Tensor], retain: bool
    ) -> list[Tensor]:
        """The gradients, from the derivatives of the steps, which are used up."""
        (wanted, there), steady, split = self.step, self.routine.steady, self.routine.split
        places = [i for i, want in enumerate(wanted) if want]
        through = [o for o, takes in enumerate(there[:steady]) if takes]
        zeros = {i: torch.zeros_like(inputs[i]) for i in through if not wanted[i]}
        carried, of_steps = cotangents[: len(through)], cotangents[len(through) :]
        totals, grads, of_xs = dict[int, Tensor](), dict[int, Tensor](), list[list[Tensor]]()
        for given in reversed(_chunks(of_steps, sum(there[steady:]), len(pulls))):
            grads = dict(zip(places, pulls.pop()([*carried, *given], retain), strict=True))
            carried = [grads[i] if wanted[i] else zeros[i] for i in through]
            for i in places:
                if steady <= i < split:
                    totals[i] = totals[i] + grads[i] if i in totals else grads[i]
            of_xs.append([grads[i] for i in places if i >= split])
        first = [g for i, g in grads.items() if i < steady]
        return [*first, *totals.values(), *itertools.chain(*reversed(of_xs))]


def _chunks(values: Sequence[T], size: int, count: int) -> list[list[T]]:
    return [[*values[i * size : (i + 1) * size]] for i in range(count)]


def _chosen(flags: Sequence[bool], start: int = 0) -> set[int]:
    """The numbers, from `start` on, of those that hold."""
    return {i for i, flag in enumerate(flags, start) if flag}


def _distinct(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results as an autograd.Function requires them: without a graph, and distinct tensors."""
    seen, found = {*map(id, inputs)}, list[Tensor]()
    for y in results:
        found.append(y.detach().clone() if id(y) in seen else y.detach())
        seen.add(id(y))
    return found


class _Repeated:
    """Runs a call for one step after another, without torch.compile's checks where they hold.

    They do when a first run has shown the graph, and all tensors are like those of that run.
    Nothing else changes in between, since what has other effects is not compiled.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.again: Again | None = None
        self.guards: Any = None

    def __call__(self, element: Joint, tensors: list[Tensor]) -> tuple[list[Tensor], Pull | None]:
        if self.again is not None and self.guards.hold(tensors):
            return self.again(tensors)
        tensors = compact(tensors)
        if self.again is not None and self.guards.hold(tensors):
            return self.again(tensors)
        call = replace(self.call, routine=self.call.routine.at(element))
        results, pull, self.again = call(tensors)
        self.guards = _torch.TensorGuards(tensors)
        return results, pull


def _pulled_late(
    step: _Repeated, element: Joint, given: list[Tensor], cotangents: Sequence[Tensor], _: bool
) -> list[Tensor]:
    """The gradients of a step that is run again, since other steps overwrite what it keeps."""
    pull = step(element, given)[1]
    assert pull is not None
    return pull(cotangents, False)


class Pushforward:
    """Steps one after another, and their Jacobian-vector products.

    Args:
        routine: one of them, the first.
        inputs: the first carry, and what is the same for all steps.
        directions: one for each of these, or None.
        size: how many rows a direction has.
    """

    def __init__(
        self,
        routine: Routine,
        inputs: Sequence[Tensor],
        directions: Sequence[Tensor | None],
        size: int,
    ) -> None:
        self.routine, self.inputs = routine, compact(inputs)
        self.moving = _chosen([row is not None for row in directions])
        # All of the carry moves, as it may in later steps, or the first needed its own kernel.
        self.directions = [
            x.new_zeros(size, *x.shape)
            if row is None and i < routine.buffers.start and _modes.has_derivative(x)
            else _like(row, x)
            for i, (x, row) in enumerate(zip(self.inputs, directions, strict=True))
        ]
        self.steps: dict[tuple[bool, ...], _Repeated] = {}

    def run(
        self,
        xs: Iterable[tuple[Sequence[Tensor], Joint]],
        directions: Iterable[Sequence[Tensor | None]],
    ) -> tuple[tuple[Tree, list[Any]], list[Tensor | None]]:
        """The last carry and the outputs of all steps, and their tangents."""
        carry: Tree = None
        along, outputs, of_outputs = list[Tensor | None](), list[Any](), list[Tensor | None]()
        for (x, element), rows in zip(xs, directions, strict=True):
            (carry, output), along = self._take(element, x, [rows[i] for i in element.places])
            outputs.append(output)
            of_outputs += along[self.routine.steady :]
        return (carry, outputs), [*along[: self.routine.steady], *of_outputs]

    def _take(
        self, element: Joint, x: Sequence[Tensor], directions: Sequence[Tensor | None]
    ) -> tuple[Tree, list[Tensor | None]]:
        """The results of the next step, and their tangents; None for constants."""
        inputs = [*self.inputs, *x]
        rows = [*self.directions, *map(_like, directions, x)]
        moved = tuple(row is not None for row in rows)
        if moved not in self.steps:
            self.steps[moved] = _Repeated(Call(self.routine, (("jvp", (moved,)),)))
        along = [row for row in rows if row is not None]
        with functions.forward_level():  # where it is traced
            found, _ = self.steps[moved](element, [*inputs, *along])
        results = _distinct(found, inputs)
        more = [row is not None for row in directions]
        return self.routine.facts.join(results)[0], self._moved(results, more)

    def _moved(self, results: list[Tensor], more: Sequence[bool]) -> list[Tensor | None]:
        """The tangents among the results, whose first replace the carry, if an x moves so."""
        steady, buffers = self.routine.steady, self.routine.buffers.start
        depends = self.routine.facts.seen.depends
        rest, values = iter(results[len(depends) :]), results[: len(depends)]
        rows = [next(rest) if _modes.has_derivative(y) else None for y in values]
        moving = self.moving | _chosen(more, self.routine.split)
        tangents = [t if on & moving else None for t, on in zip(rows, depends, strict=True)]
        self.inputs[:steady] = values[:steady]
        self.directions[:steady] = [*rows[:buffers], *tangents[buffers:steady]]
        carried = _chosen([t is not None for t in tangents[:steady]])
        self.moving = carried | {i for i in self.moving if i >= steady}
        return tangents


def _like(row: Tensor | None, x: Tensor) -> Tensor | None:
    return None if row is None else row.to(x.dtype)
