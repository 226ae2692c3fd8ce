"""One step run by a kernel: looked at, compared with what it computes as it is, and repeated."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import random
import sys
import weakref
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree
from diffopt._diff import functions
from diffopt._diff.captured import graph_leaves
from diffopt._diff.kernels import (
    Again,
    Asked,
    Kernel,
    Operator,
    Pull,
    Run,
    TracedError,
    Tracing,
    UnfitError,
    composed,
    kept,
)
from diffopt._diff.tasks import Joint, Routine, Seen, Used
from diffopt._diff.unmodified import stamp
from diffopt._tree import Tree


class UnevenError(UnfitError):
    """Why the steps of a loop are not run together: they are not steps of one function."""


@dataclass(frozen=True, eq=False)
class Call:
    """What operators have made of a step, as a function of tensors that a kernel computes.

    Attributes:
        outputs: the results, besides the carry, whose cotangents its vector-Jacobian product takes;
            None if that is not needed.
    """

    routine: Routine
    operators: tuple[Operator, ...]
    outputs: frozenset[int] | None = None

    def eager(self, *tensors: Tensor) -> list[Tensor]:
        """The function as it is."""
        return composed(self.routine.function, self.operators)(*tensors)

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Pull | None, Again | None]:
        """The results; their vector-Jacobian product, if asked for; what computes more of them.

        The first results are compared, and torch.compile checks the tensors until they are known.
        """
        known: list[Seen] = kept(("seen", self.routine.key), list)
        if not known:
            self._refuse_effects(tensors)
            known.append(self._look(tensors))
        while True:
            seen = known[0]
            asked = None if self.outputs is None else self.routine.asked(seen, self.outputs)
            kernel = self._kernel(tensors, seen.used, asked)
            run = self._run(kernel, tensors, seen.used)
            tests = self._tested(kernel, run, tensors, seen)
            if run.variant.facts == seen:
                break
            known[0] = run.variant.facts
        if run.pull and kernel.replays:  # comparisons have overwritten what it needs
            run = self._run(kernel, tensors, seen.used)
        self._note(run)
        return run.results, run.pull, None if tests else kernel.again(run)

    def _tested(self, kernel: Kernel, run: Run, tensors: Sequence[Tensor], seen: Seen) -> int:
        """How many more results are compared, now that these have been if they had to be."""
        variant = run.variant
        if variant.tests is None:
            variant.tests = self.routine.tests
        if variant.tests <= 0:
            return 0
        if any(map(_torch.is_wrapped, run.captured)):
            raise UnfitError(_CAPTURES.format("a tensor of an active transform"))
        variant.facts = self._look(tensors)
        if variant.facts == seen:
            self._compare(kernel, run, tensors, seen.used)
            variant.tests -= 1  # another thread may count, too
        return variant.tests

    def _refuse_effects(self, tensors: Sequence[Tensor]) -> None:
        """Raise before the function has run once if it may write to something else, and does."""
        program = self.routine.program
        if program.captured and program.captured.writes:
            scalars = [not x.dim() for x in tensors]
            with contextlib.suppress(TracedError):
                kernel = kept(
                    ("trace", self.routine.key, self.operators, tuple(scalars)),
                    lambda: Kernel(self.operators, scalars, program.name, Tracing(), None),
                )
                self._run(kernel, tensors, ())

    def _kernel(self, tensors: Sequence[Tensor], used: Used, asked: Asked | None) -> Kernel:
        program = self.routine.program
        metas = tuple((x.shape, x.dtype, x.device) for x in tensors)
        names = " of ".join(_NAMES[name] for name, _ in reversed(self.operators))
        what = f"{names} of {program.name}" if names else program.name
        scalars = [not x.dim() for x in tensors]
        return kept(
            (self.routine.key, self.operators, used, asked, metas),
            lambda: Kernel(self.operators, scalars, what, program.backend, asked),
        )

    def _run(self, kernel: Kernel, tensors: Sequence[Tensor], used: Used) -> Run:
        vectors, count = kernel.vectors(tensors), self.routine.count
        inputs = self.routine.join(vectors[:count])
        with torch.set_grad_enabled(kernel.asked is not None):
            return kernel(self.routine.make(used), inputs, vectors[count:])

    def _compare(self, kernel: Kernel, run: Run, tensors: Sequence[Tensor], used: Used) -> None:
        """Raise unless the kernel computes what the function does, and its derivative.

        It is compared at two points: zeros in the inputs, such as a head's at first, hide terms.
        """
        sample = [*map(_sample, tensors[self.routine.count :])]
        if sample:
            tensors = [*tensors[: self.routine.count], *sample]
            run = self._run(kernel, tensors, used)
        self._compare_all(kernel, tensors, run.results, run.pull)
        again = kernel.again(run) if run.pull else None  # the comparison has compiled it
        if again:
            self._compare_all(kernel, tensors, *again(tensors))
        tensors = self._elsewhere(tensors)
        try:
            self.eager(*tensors)
        except Exception:  # it is not defined there
            return
        run = self._run(kernel, tensors, used)
        self._compare_all(kernel, tensors, run.results, run.pull)

    def _elsewhere(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Inputs near these, without zeros and equal elements; those made of numbers are kept."""
        joints = self.routine.head, self.routine.element
        fixed = [place in joint.numbers for joint in joints for place in joint.places]
        pairs = enumerate(itertools.zip_longest(tensors, fixed))
        moved = {id(x): x if stays else _moved(x, i) for i, (x, stays) in pairs}
        return [moved[id(x)] for x in tensors]

    def _compare_all(
        self, kernel: Kernel, tensors: Sequence[Tensor], results: list[Tensor], pull: Pull | None
    ) -> None:
        kernel.compare(results, self.eager, tensors, self.routine.steady)
        asked = kernel.asked
        if asked is None or pull is None:
            return
        cotangents = [_sample(y) for y, there in zip(results, asked.there, strict=True) if there]

        def pulled(*xs: Tensor) -> list[Tensor]:
            return asked.pulled(self.eager, xs)

        kernel.compare(pull(cotangents, True), pulled, [*tensors, *cotangents])

    def _note(self, run: Run) -> None:
        facts, tree = self.routine.facts, run.join(run.results)[0]
        form = Joint.of(tree)
        if facts.carry and not facts.carry.like(Joint.of(tree[0])):
            raise UnevenError("its steps change the structure of the carry, or a number in it")
        if facts.form and not facts.form.like(form):
            raise UnevenError("its steps return trees of different structures")
        if facts.form and facts.seen != run.variant.facts:
            raise UnevenError("its steps depend on different tensors")
        facts.seen = run.variant.facts
        facts.join, facts.form = run.join, form
        facts.captured.versions = [(weakref.ref(x), stamp(x)) for x in run.captured]
        self.routine.program.settle()

    def _look(self, tensors: Sequence[Tensor]) -> Seen:
        """Run the function as it is, with its graph."""
        routine, noted = self.routine, list[bool]()
        tensors = tensors[: routine.count]
        dims = [(name, (d[: routine.count],)) for name, (d, *_) in self.operators if name == "vmap"]
        function = composed(
            lambda *xs: _tree.tensors(routine.make(noted)(*routine.join(xs, plain=True))), dims
        )

        def run(constants: Iterable[int]) -> tuple[list[Tensor], list[Tensor]]:
            xs = [
                functions.alias(x, False) if i not in constants and _modes.has_derivative(x) else x
                for i, x in enumerate(tensors)
            ]
            return xs, function(*xs)

        inputs = tensors, routine.program.generators()
        with functions.noticed() as aliases, torch.enable_grad(), _undrawn(inputs):
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
        return Seen(() if all(noted) else tuple(noted), on)


class Drawn:
    """The states of all generators: torch's, Python's, and numpy's if that has been imported.

    Args:
        inputs: a tree with the tensors whose devices' generators count, and other generators.
    """

    def __init__(self, inputs: Tree) -> None:
        numpy = sys.modules.get("numpy.random")
        self.torch = functions.AmbientState(inputs)
        self.others = random.getstate(), numpy and numpy.get_state(legacy=False)

    def equals(self, other: Drawn) -> bool:
        same = all(map(torch.equal, self.torch.states, other.torch.states))
        return same and pickle.dumps(self.others) == pickle.dumps(other.others)

    def restore(self) -> None:
        self.torch.restore()
        random.setstate(self.others[0])
        if self.others[1]:
            sys.modules["numpy.random"].set_state(self.others[1])


@contextlib.contextmanager
def _undrawn(inputs: Tree) -> Generator[None]:
    """Raises if random numbers are drawn within, which can then be drawn again."""
    before = Drawn(inputs)
    try:
        yield
    except Exception:
        before.restore()
        raise
    if not Drawn(inputs).equals(before):
        before.restore()
        raise UnfitError("it draws random numbers, which compiled code draws differently")


_CONTIGUOUS = torch.contiguous_format
_NAMES = {
    "vmap": "a batch",
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


def _sample(x: Tensor, step: float = 1.0) -> Tensor:
    """Directions in which a derivative is compared: those of a loop are often zero at first."""
    numbers = torch.arange(1, x.numel() + 1, dtype=torch.float32, device=x.device)
    return (step * numbers).cos().to(x.dtype).reshape(x.shape)


def _moved(x: Tensor, seed: int) -> Tensor:
    """The tensor a little nearer to zero, or positive where it is zero: in the domain of most."""
    if not _modes.has_derivative(x):
        return x
    part = _sample(x.new_empty(x.shape, dtype=torch.float32), 1 + seed / 16)
    zeros = (0.3 + 0.2 * part) / max(1, x.numel()) ** (1 / 3)
    return torch.where(x == 0, zeros, x * (0.95 + 0.04 * part)).to(x.dtype)
