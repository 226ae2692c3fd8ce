"""What a loop runs compiled: functions of trees as functions of tensors, and facts about them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._compiler import brief, warn_once
from diffopt._diff import functions
from diffopt._diff.kernels import Asked, UnfitError, backend
from diffopt._diff.unmodified import Captured
from diffopt._tree import Tree

T = TypeVar("T")

Used = tuple[bool, ...]
"""For each param whether the loss uses it, which a trace does not show; `()` before it is known."""


class Task(NamedTuple):
    """A function to run compiled: `make(())(*inputs)`.

    Attributes:
        make: returns the function, given which params its loss uses.
        inputs: its arguments. The first is the carry: the first results replace it.
        kind: what tells this function from others of the loop.
        integer: whether the last argument is the number of the step.
        buffers: how many of the carry's last tensors may be ones that must not need a gradient.
        params: how many of its first the function takes a differentiable gradient for.
    """

    make: Callable[[Used], Callable[..., Tree]]
    inputs: tuple[Any, ...]
    kind: Any = None
    integer: bool = False
    buffers: int = 0
    params: int = 0


class Program:
    """What the compiled functions of one loop share.

    Args:
        name: what is compiled, in messages: the loss or the step.
        key: what tells this loop's functions from others.
        options: those of torch.compile.

    Attributes:
        ambient: the ambient state of the first run, in which derivatives are computed.
        captured: what the functions capture.
        gave_up: whether the loop runs eagerly from now on.
    """

    def __init__(self, name: str, key: Any, options: Mapping[str, Any]) -> None:
        self.name, self.key = name, key
        self.backend = backend(dict(options))
        self.ambient: functions.AmbientState | None = None
        self.captured: Captured | None = None
        self.settled = False
        self.gave_up = False

    def begin(self, task: Task) -> None:
        """Before the first run of a function."""
        if self.ambient is None:
            self.captured = Captured(self.name, task.make(()))
            self.ambient = functions.AmbientState((task.inputs, self.generators()))

    def generators(self) -> list[torch.Generator]:
        """Those of random numbers that the functions capture."""
        values = (held() for held in self.captured.values.values()) if self.captured else ()
        return [x for x in values if isinstance(x, torch.Generator)]

    def settle(self) -> None:
        """After a run: see `Captured.settle`; what later runs replace is the same."""
        if self.captured and not self.settled:
            self.captured.settle()
            self.settled = True

    def give_up(self, error: Exception) -> None:
        """Compile nothing more in this loop."""
        self.gave_up = True
        self.warn(error)

    def warn(self, error: Exception) -> None:
        """Say once why something runs without compiling."""
        reason = str(error) if isinstance(error, UnfitError) else brief(error)
        warn_once(f"{self.name} runs without torch.compile: {reason}")


def identity(function: Any) -> Any:
    """What functions have in common that torch.compile can tell apart itself: their code."""
    if isinstance(function, functools.partial):
        return "partial", identity(cast(Any, function.func))
    if isinstance(function, types.MethodType):
        return type(function.__self__), function.__func__.__code__
    return getattr(function, "__code__", None) or type(function)


@dataclass(frozen=True, eq=False)
class Joint:
    """How to join tensors to a tree, of which some may stand for numbers; it has no tensors.

    Attributes:
        rest: the leaves that are neither tensors nor numbers, and None in the place of others.
        places: the places of the tensors among the leaves.
        numbers: the numbers themselves, by place.
    """

    spec: _tree.Spec
    rest: list[Any]
    places: list[int]
    numbers: dict[int, Any]

    @classmethod
    def of(cls, tree: Tree) -> Joint:
        """How to join tensors to a tree like this one."""
        return cls.of_leaves(*_tree.flatten(tree), {})

    @classmethod
    def of_leaves(cls, leaves: Sequence[Any], spec: _tree.Spec, numbers: dict[int, Any]) -> Joint:
        """The same for the leaves, of which some stand for numbers."""
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        rest = [None if isinstance(x, Tensor) else x for x in leaves]
        return cls(spec, rest, places, numbers)

    def __call__(self, tensors: Iterable[Tensor], plain: bool = False) -> Tree:
        """The tree; `plain` with the numbers as they were."""
        values = list(self.rest)
        for place, tensor in zip(self.places, tensors, strict=True):
            values[place] = self.numbers[place] if plain and place in self.numbers else tensor
        return _tree.unflatten(values, self.spec)

    def like(self, other: Joint) -> bool:
        """Whether torch.compile would see no difference, but for tensors."""
        same = self.spec == other.spec and self.places == other.places
        return same and all(map(_same, self.rest, other.rest))


def _same(x: Any, y: Any) -> bool:
    return x is y or (type(x) is type(y) in (bool, int, float, str) and x == y)


def for_each(function: Callable[[Any], T], xs: Iterable[Any]) -> list[T]:
    """The results of the function, which is called once for each distinct object."""
    known: dict[int, T] = {}
    values = list(xs)
    for x in values:
        if id(x) not in known:
            known[id(x)] = function(x)
    return [known[id(x)] for x in values]


class Numbering:
    """Makes tensors of the numbers in the inputs of a task.

    Args:
        inputs: the inputs. Those of the first, the carry, remain numbers.
        integer: whether the last is an integer to be made a tensor, too.
    """

    def __init__(self, inputs: tuple[Any, ...], integer: bool) -> None:
        first = next(filter(_modes.has_derivative, _tree.tensors(inputs)), None)
        wide = first is not None and first.dtype in (torch.float64, torch.complex128)
        self.dtype = torch.float64 if wide else torch.float32
        self.device = None if first is None else first.device
        self.integer = integer

    def __call__(self, tree: Tree, skip: int = 0) -> tuple[list[Tensor], Joint]:
        """The tensors of a tree, whose first leaves remain numbers, and how to join them."""
        leaves, spec = _tree.flatten(tree)
        numbers = {i: leaf for i, leaf in enumerate(leaves) if i >= skip and type(leaf) is float}
        values = [self._tensor(x) if i in numbers else x for i, x in enumerate(leaves)]
        joint = Joint.of_leaves(values, spec, numbers)
        return [values[i] for i in joint.places], joint

    def element(self, x: Any) -> tuple[list[Tensor], Joint]:
        """The same for the last of the inputs."""
        if self.integer:
            spec = _tree.flatten(x)[1]
            return [self._tensor(x)], Joint(spec, [None], [0], {0: x})
        return self(x)

    def _tensor(self, number: float) -> Tensor:
        dtype = torch.int64 if isinstance(number, int) else self.dtype
        return torch.full((), number, dtype=dtype, device=self.device)


class Seen(NamedTuple):
    """What a run of a function as it is, with its graph, has shown.

    Attributes:
        used: see `Used`.
        depends: for each result, the places of the inputs on which it depends.
    """

    used: Used
    depends: list[set[int]]


class Facts:
    """What runs of a function have shown.

    Attributes:
        seen: see `Seen`.
        join: makes a tree of the results.
        form: that tree without its tensors; None before a run.
        carry: the carry without its tensors, if others are to replace them; None for a single step.
        captured: what compiled code captures.
    """

    def __init__(self, name: str) -> None:
        self.form: Joint | None = None
        self.carry: Joint | None = None
        self.seen = Seen((), [])
        self.join: Callable[..., Tree] = lambda results: results
        self.captured = Captured(name)


@dataclass(frozen=True, eq=False)
class Routine:
    """A task as a function of tensors; it has no tensors, since graphs keep it.

    Attributes:
        program: what this function shares with others of its loop.
        make: see `Task`.
        key: what tells this function from others.
        head: how to join the inputs but the last.
        element: how to join the last of the inputs.
        split: how many tensors the inputs but the last have.
        steady: how many the carry has.
        count: how many the inputs have.
        needed: which of them need a gradient.
        buffers: the places of those that may have to need none.
        params: how many are params, see `Task`.
        tests: how many results of a kernel are compared.
    """

    program: Program
    make: Callable[[Any], Callable[..., Tree]]
    key: Any
    head: Joint
    element: Joint
    split: int
    steady: int
    count: int
    needed: list[bool]
    buffers: range
    params: int
    tests: int
    facts: Facts

    def join(self, tensors: Sequence[Tensor], plain: bool = False) -> tuple[Any, ...]:
        """The inputs."""
        last = self.element(tensors[self.split :], plain)
        return (*self.head(tensors[: self.split], plain), last)

    def function(self, *tensors: Tensor) -> list[Tensor]:
        """The function as it is, of tensors."""
        return _tree.tensors(self.make(())(*self.join(tensors, plain=True)))

    def at(self, element: Joint) -> Routine:
        """The same for another last input, with the same facts."""
        return replace(self, element=element)

    def moving(self, depends: Sequence[set[int]], needed: Sequence[bool]) -> set[int]:
        """The inputs that depend on those needed in some step, if the results replace the first."""
        moving = {i for i, need in enumerate(needed) if need}
        while True:
            found = depends[: self.steady]
            more = {i for i, on in enumerate(found) if on & moving} - moving
            if not more:
                return moving
            moving |= more

    def carries(self, moving: set[int]) -> list[bool]:
        """For each result whether it requires a gradient if these inputs do.

        If the loss does, autograd takes gradients by aliases of all params, which require one.
        """
        depends = self.facts.seen.depends
        found = [bool(on & moving) for on in depends]
        beside = [*found[self.buffers.start : self.buffers.stop], *found[self.steady :]]
        if not any(beside) and moving.isdisjoint(range(self.params)):
            return found
        aliases = {*range(self.params)}
        pairs = enumerate(zip(found, depends, strict=True))
        return [carry or (on != {o} and bool(on & aliases)) for o, (carry, on) in pairs]

    def asked(self, seen: Seen, outputs: frozenset[int]) -> Asked:
        """Gradients of all inputs needed, from cotangents of the carry and of these results."""
        depends, moving = seen.depends, self.moving(seen.depends, self.needed)
        there = tuple(
            bool(on & moving) and (o < self.steady or o in outputs) for o, on in enumerate(depends)
        )
        reached = set[int]().union(*(on for on, t in zip(depends, there, strict=True) if t))
        return Asked(tuple(i in moving and i in reached for i in range(self.count)), there)

    def finished(self, pairs: Iterable[tuple[Tensor, bool]]) -> Tree:
        """Results as a tree, without derivatives where they carry none."""
        return self.facts.join(
            y if carry or not _modes.needs_gradient(y) else y.detach() for y, carry in pairs
        )[0]


def routine_of(program: Program, task: Task) -> tuple[Routine, list[Tensor], Numbering]:
    """The task as a function of tensors, those tensors, and what makes more of them."""
    program.begin(task)
    numbering = Numbering(task.inputs, task.integer)
    *first, last = task.inputs
    given, head = numbering(tuple(first), skip=len(_tree.leaves(first[0])))
    more, element = numbering.element(last)
    tensors, steady = [*given, *more], _tree.count(first[0])
    routine = Routine(
        program,
        cast(Any, task.make),
        (program.backend, program.key, (task.kind, task.integer), steady),
        head,
        element,
        len(given),
        steady,
        len(tensors),
        [*map(_modes.needs_gradient, tensors)],
        range(steady - task.buffers, steady),
        task.params,
        3 if task.integer else 1,  # powers of the step's number agree at 0
        Facts(program.name),
    )
    return routine, tensors, numbering
