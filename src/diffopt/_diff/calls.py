"""A function that operators have made of a compiled one: its results, and their derivatives."""

from __future__ import annotations

import contextlib
import pickle
import random
import sys
import weakref
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree
from diffopt._diff import functions
from diffopt._diff.captured import graph_leaves
from diffopt._diff.kernels import Kernel, Operator, Run, UnfitError, Wires, composed, kept
from diffopt._diff.tasks import Joint, Routine, Used


class UnevenError(UnfitError):
    """Why the steps of a loop are not run together: they are not steps of one function."""


class _Seen(NamedTuple):
    """What a run of a function as it is, with its graph, has shown; see `Facts`."""

    used: Used
    depends: list[set[int]]


@dataclass(frozen=True, eq=False)
class Call:
    """A function of tensors that operators have made of a routine.

    Attributes:
        counts: how many results there are, once that is known.
    """

    routine: Routine
    operators: tuple[Operator, ...] = ()
    counts: list[int] = field(default_factory=list[int])

    @property
    def function(self) -> Any:
        """What the operators are applied to."""
        return self.routine.function

    @property
    def steady(self) -> int:
        """How many tensors the carry has."""
        return self.routine.steady

    @property
    def count(self) -> int:
        """How many inputs the function has that the operators are applied to."""
        return self.routine.count

    @property
    def pulled(self) -> bool:
        """Whether it is a vector-Jacobian product."""
        return any(name == "vjp" for name, _ in self.operators)

    @property
    def derived(self) -> bool:
        """Whether it is a derivative."""
        return any(name != "vmap" for name, _ in self.operators)

    def differentiable(self) -> list[bool]:
        """For each result whether it is not a constant; `()` if all may be differentiated."""
        return self.routine.differentiable()

    def followed(self, name: str, *arguments: Any) -> Call:
        counts = self.counts if name == "vmap" else []  # as many as without a batch
        return replace(self, operators=(*self.operators, (name, arguments)), counts=counts)

    def eager(self, *tensors: Tensor) -> list[Tensor]:
        return composed(self.function, self.operators)(*tensors)

    # With derivatives and batches

    def applied(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The results, with derivatives and batches."""
        if not _torch.only_vmap():
            results: Any = _Transformed.apply(self, *tensors)
            return results[: self.counts[-1]]
        call, tensors, batches = self._over_batches(tensors)
        with _torch.outside_transforms():
            results = _Plain.apply(call, *tensors)
            for level in batches:
                results = [_torch.add_batch_dim(y, 0, level) for y in results]
        return tuple(results)

    def _over_batches(self, tensors: Sequence[Tensor]) -> tuple[Call, list[Tensor], list[int]]:
        """A call for all samples of torch.vmap at once, its tensors, and torch.vmap's levels."""
        sizes = {
            _torch.level_of(x): _torch.unwrapped(x).shape[_torch.batch_dim(x)]
            for tensor in tensors
            for x in _modes.levels(tensor)
            if _torch.is_batched(x)
        }
        if not sizes:
            return self, [*tensors], []
        own, levels, call = [*map(_modes.batches, tensors)], sorted(sizes), self
        samples = [*map(_modes.all_samples, tensors)]
        for place, level in enumerate(levels):
            for i in self.batched_anyway([level in batches for batches in own]):
                x = samples[i].unsqueeze(place)
                samples[i] = x.expand(*x.shape[:place], sizes[level], *x.shape[place + 1 :])
                own[i].add(level)
        for level in reversed(levels):
            call = call.followed("vmap", tuple(0 if level in batches else None for batches in own))
        return call, samples, levels

    def batched(
        self, size: int, dims: Sequence[int | None], tensors: Sequence[Tensor]
    ) -> tuple[Call, list[Tensor]]:
        """A call for a batch, and its tensors with the batch in front."""
        pairs = zip(tensors, dims, strict=True)
        moved = [x if dim is None else x.movedim(dim, 0) for x, dim in pairs]
        own = [None if dim is None else 0 for dim in dims]
        for i in self.batched_anyway([dim is not None for dim in dims]):
            moved[i], own[i] = moved[i].expand(size, *moved[i].shape), 0
        return self.followed("vmap", tuple(own)), moved

    def batched_anyway(self, own: Sequence[bool]) -> list[int]:
        """The inputs that are expanded along a batch, of those without one of their own.

        Directions, and the carry: a first one that is not would need a kernel of its own.
        """
        places = range(len(own))
        return [i for i in places if not own[i] and (i < self.steady or i >= self.count)]

    # Without

    def run(self, given: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The results, and what derivatives need besides the inputs.

        The tensors have neither wrappers nor derivatives. The results are distinct from them.
        """
        return distinct(self.computed(compact(given))[0], given), []

    def computed(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Wires | None]:
        """The results, from a kernel, and how to get more; the first ones are compared."""
        routine = self.routine
        known: list[Used] = kept(("used", routine.key), list)
        if not known:
            known.append(self._look(tensors).used)
        used = routine.facts.used if self.pulled else known[0]
        while True:
            kernel = self._kernel(tensors, used)
            run = self._run(kernel, tensors, used)
            variant, compared = run.variant, False
            if variant.tests is None or variant.tests > 0:  # another thread may count, too
                if any(map(_torch.is_wrapped, run.captured)):
                    raise UnfitError(_CAPTURES.format("a tensor of an active transform"))
                variant.facts = _Seen(used, []) if self.pulled else self._look(tensors)
                if variant.facts.used == used:
                    self._compare(kernel, run, tensors, used)
                variant.tests = (routine.tests if variant.tests is None else variant.tests) - 1
                compared = variant.tests > 0
            if variant.facts.used == used:
                break
            used = known[0] = variant.facts.used
        if not self.pulled:
            self._note(run)
        return run.results, None if compared else run.wires

    def _kernel(self, tensors: Sequence[Tensor], used: Used) -> Kernel:
        program = self.routine.program
        metas = tuple((x.shape, x.dtype, x.device) for x in tensors)
        names = " of ".join(_NAMES[name] for name, _ in reversed(self.operators))
        what = f"{names} of {program.name}" if names else program.name
        scalars = [not x.dim() for x in tensors]
        return kept(
            (self.routine.key, self.operators, used, metas),
            lambda: Kernel(self.operators, scalars, what, program.backend),
        )

    def _run(self, kernel: Kernel, tensors: Sequence[Tensor], used: Used) -> Run:
        vectors, count = [*map(_vector, tensors)], self.count
        return kernel(self.routine.make(used), self.routine.join(vectors[:count]), vectors[count:])

    def _compare(self, kernel: Kernel, run: Run, tensors: Sequence[Tensor], used: Used) -> None:
        """Raise unless the kernel computes what the function does."""
        sample = [*map(_sample, tensors[self.count :])]
        tensors = [*tensors[: self.count], *sample]
        results = self._run(kernel, tensors, used).results if sample else run.results
        kernel.compare(results, self.eager, tensors, 0 if self.pulled else self.steady)

    def _note(self, run: Run) -> None:
        facts, form = self.routine.facts, Joint.of(run.join(run.results)[0])
        if facts.form and not facts.form.like(form):
            raise UnevenError("its steps return trees of different structures")
        if facts.form and (facts.used, facts.depends) != run.variant.facts:
            raise UnevenError("its steps depend on different tensors")
        facts.used, facts.depends = run.variant.facts
        facts.join, facts.form = run.join, form
        facts.captured.versions = [(weakref.ref(x), _torch.version(x)) for x in run.captured]
        self.routine.program.settle()

    def _look(self, tensors: Sequence[Tensor]) -> _Seen:
        """Run the function as it is, with its graph."""
        routine, noted = self.routine, list[bool]()
        tensors = tensors[: self.count]
        dims = [(name, (d[: self.count],)) for name, (d, *_) in self.operators if name == "vmap"]
        function = composed(
            lambda *xs: _tree.split(routine.make(noted)(*routine.join(xs, plain=True)))[0], dims
        )

        def run(constants: Iterable[int]) -> tuple[list[Tensor], list[Tensor]]:
            xs = [
                functions.alias(x, False) if i not in constants and _modes.has_derivative(x) else x
                for i, x in enumerate(tensors)
            ]
            return xs, function(*xs)

        with functions.noticed() as aliases, torch.enable_grad(), _undrawn(tensors):
            try:
                xs, outputs = run(())
            except RuntimeError:
                if not routine.buffers:
                    raise
                xs, outputs = run(routine.buffers)  # torch's batch_norm has no derivative for them
        places = {id(x): i for i, x in enumerate(xs)}
        leaves = [{*map(id, graph_leaves([y]))} for y in outputs]
        if set[int]().union(*leaves) - places.keys() - aliases.keys():
            raise UnfitError(_CAPTURES.format("a tensor that requires a gradient"))
        on = [
            {places[key] for key in {id(y), *keys} if key in places}
            for y, keys in zip(outputs, leaves, strict=True)
        ]
        return _Seen(() if all(noted) else tuple(noted), on)

    # Derivatives

    def pullback(
        self,
        inputs: list[Tensor],
        extra: list[Tensor],
        needed: Sequence[bool],
        given: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """The vector-Jacobian product, compiled where possible; `extra` is what `run` returned."""
        program = self.routine.program
        assert program.ambient is not None
        assert program.captured is not None
        self.routine.facts.captured.check()
        program.captured.check()
        with program.ambient.restored():
            try:
                if self.derived or _modes.forward_differentiated():
                    raise UnfitError("a derivative of its derivative is not compiled")
                return self._pullback(inputs, extra, needed, given)
            except Exception as error:
                program.warn(error)
                return functions.vjp(self.eager, inputs, needed, given)

    def _pullback(
        self,
        inputs: list[Tensor],
        extra: list[Tensor],
        needed: Sequence[bool],
        given: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        wanted, there = self._asked(needed, [x is not None for x in given])
        if not any(x is not None and takes for x, takes in zip(given, there, strict=True)):
            return [None] * len(inputs)
        cotangents = [
            self._zeros(o, inputs, given) if x is None else x
            for o, (x, takes) in enumerate(zip(given, there, strict=True))
            if takes
        ]
        call = self.followed("vjp", wanted, there)
        grads = iter(call.applied([*inputs, *cotangents, *extra]))
        found = [next(grads) if want else None for want in wanted]
        return [g if need else None for g, need in zip(found, needed, strict=True)]

    def _asked(self, needed: Sequence[bool], present: Sequence[bool]) -> Pulled:
        """Which gradients to ask for, and which cotangents to pass."""
        return Pulled.of(self.routine, needed, present)

    def _zeros(self, o: int, inputs: Sequence[Tensor], given: Sequence[Tensor | None]) -> Tensor:
        """The cotangent of a result without one, which is one of the carry's."""
        return torch.zeros_like(inputs[o])


class Pulled(NamedTuple):
    """The vector-Jacobian product of a routine that serves all of its steps.

    Attributes:
        wanted: the inputs whose gradients it returns.
        there: the results whose cotangents it takes.
    """

    wanted: tuple[bool, ...]
    there: tuple[bool, ...]

    @staticmethod
    def of(routine: Routine, needed: Sequence[bool], given: Sequence[bool]) -> Pulled:
        """For gradients of the inputs needed, from the cotangents given; all of the carry's."""
        depends, either = routine.facts.depends, zip(needed, routine.needed, strict=True)
        moving = routine.moving([a or b for a, b in either])
        there = tuple(
            bool(on & moving) and (o < routine.steady or given[o]) for o, on in enumerate(depends)
        )
        reached = set[int]().union(*(on for on, t in zip(depends, there, strict=True) if t))
        return Pulled(tuple(i in moving and i in reached for i in range(routine.count)), there)


class _Drawn:
    """The states of all generators: torch's, Python's, and numpy's if that has been imported."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        numpy = sys.modules.get("numpy.random")
        self.torch = functions.AmbientState(list(tensors))
        self.others = random.getstate(), numpy and numpy.get_state(legacy=False)

    def equals(self, other: _Drawn) -> bool:
        same = all(map(torch.equal, self.torch.states, other.torch.states))
        return same and pickle.dumps(self.others) == pickle.dumps(other.others)

    def restore(self) -> None:
        self.torch.restore()
        random.setstate(self.others[0])
        if self.others[1]:
            sys.modules["numpy.random"].set_state(self.others[1])


@contextlib.contextmanager
def _undrawn(tensors: Sequence[Tensor]) -> Generator[None]:
    """Raises if random numbers are drawn within, which can then be drawn again."""
    before = _Drawn(tensors)
    yield
    if not _Drawn(tensors).equals(before):
        before.restore()
        raise UnfitError("it draws random numbers, which compiled code draws differently")


_CONTIGUOUS = torch.contiguous_format
_NAMES = {
    "vmap": "a batch",
    "vjp": "the vector-Jacobian product",
    "jvp": "the Jacobian-vector products",
}
_CAPTURES = "it captures {}, which compiled code does not differentiate: pass it as an argument"


def compact(given: Sequence[Tensor]) -> list[Tensor]:
    """The tensors as kernels take them; raises for those that they cannot take.

    Detached, contiguous and at the start of their memory, which torch.compile would watch.
    """
    fault = next(filter(None, map(_fault, given)), None)
    if fault:
        raise UnfitError(fault)
    return [*map(_compact, given)]


def _compact(x: Tensor) -> Tensor:
    x = x.detach()
    return x.contiguous() if x.storage_offset() == 0 else x.clone(memory_format=_CONTIGUOUS)


def _fault(x: Tensor) -> str | None:
    """Why a tensor cannot be an input of a kernel."""
    if not _modes.ordinary(x):
        return f"it is given a {type(x).__name__}, not an ordinary tensor"
    if x.layout is not torch.strided or x.is_meta:
        return f"it is given a tensor of layout {x.layout} on {x.device}"
    return None


def _vector(x: Tensor) -> Tensor:
    """With at least one dimension; not as a view, since torch.compile would watch its base."""
    return x if x.dim() else x.reshape(1).detach()


def _sample(x: Tensor) -> Tensor:
    """Directions in which a derivative is compared: those of a loop are often zero at first."""
    numbers = torch.arange(1, x.numel() + 1, dtype=torch.float32, device=x.device)
    return numbers.cos().to(x.dtype).reshape(x.shape)


def distinct(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results as an autograd.Function requires them: distinct tensors, none an input."""
    seen = {id(x) for x in inputs}
    found: list[Tensor] = []
    for y in results:
        found.append(y.clone() if id(y) in seen else y)
        seen.add(id(y))
    return found


def _keep(
    ctx: Any,
    call: Call,
    tensors: Sequence[Tensor],
    results: Sequence[Tensor],
    extra: Sequence[Tensor],
) -> None:
    """What the derivative needs."""
    ctx.call, ctx.counts = call, (len(tensors), len(results))
    ctx.save_for_backward(*tensors, *extra)
    ctx.set_materialize_grads(False)
    carries = [True] * len(results) if call.derived else call.differentiable()
    constants = [y for y, carry in zip(results, carries, strict=True) if not carry]
    ctx.mark_non_differentiable(*constants, *extra)


def _pulled_back(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    # Tensors saved in a torch.func transform that has ended still have its wrapper.
    saved = [_torch.unwrap_if_dead(x) for x in ctx.saved_tensors]
    inputs, results = ctx.counts
    given, extra = saved[:inputs], saved[inputs:]
    grads = ctx.call.pullback(given, extra, ctx.needs_input_grad[1:], cotangents[:results])
    return (None, *grads)


class _Plain(torch.autograd.Function):
    """For autograd alone: in the form for transforms, torch takes longer."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        results, extra = call.run(tensors)
        _keep(ctx, call, tensors, results, extra)
        return tuple(results)

    backward = staticmethod(_pulled_back)


class _Transformed(torch.autograd.Function):
    """Its last results are those that derivatives need: a transform keeps nothing else."""

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        results, extra = call.run(tensors)
        call.counts.append(len(results))
        return *results, *distinct(extra, [*tensors, *results])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        count = call.counts[-1]
        _keep(ctx, call, tensors, output[:count], output[count:])

    backward = staticmethod(_pulled_back)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        call, tensors = inputs[0].batched(info.batch_size, in_dims[1:], inputs[1:])
        results: Any = _Transformed.apply(call, *tensors)
        return results, (0,) * len(results)
