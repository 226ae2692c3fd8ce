"""Running the steps of a loop compiled, one by one or all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffopt import _modes, _torch
from diffopt._diff.calls import Drawn, UnevenError
from diffopt._diff.kernels import UnfitError
from diffopt._diff.series import Pushforward, Series
from diffopt._diff.tasks import Joint, Program, Routine, Task, for_each, routine_of
from diffopt._tree import Tree


class Compiler(Program):
    """Runs the functions of one loop compiled."""

    def __call__(self, task: Task) -> Tree:
        """The results, compiled where that is possible and right."""
        function, inputs = task.make(()), task.inputs
        if self.gave_up or _modes.compiling() or _modes.intercepted():
            return function(*inputs)
        routine, tensors, _ = routine_of(self, task)
        try:
            _refuse_forward_mode()
            series = _series(routine, [routine.element], routine.needed)
            results = series(tensors)
        except Exception as error:
            found = function(*inputs)  # if the fault is the function's own, this raises it
            self.give_up(error)
            return found
        return routine.finished(zip(results, series.differentiable(), strict=True))

    def loop(
        self,
        task: Task,
        xs: Sequence[Any],
        eagerly: Callable[[], tuple[Tree, list[Any]]],
        ends: bool,
    ) -> tuple[Tree, list[Any]]:
        """The last carry and the outputs of a step for each of the xs, the last of its inputs.

        Args:
            task: the first step.
            xs: the last of the inputs of each step.
            eagerly: takes the steps one by one, for where they cannot be run together.
            ends: whether the loop ends with the first step whose last result, a flag, is true.
        """
        if self.gave_up or _modes.compiling() or _modes.intercepted():
            return eagerly()
        routine, tensors, numbering = routine_of(self, task)
        pairs = for_each(numbering.element, xs)
        elements = [element for _, element in pairs]
        if not all(element.like(routine.element) for element in {*elements}):
            return eagerly()
        more = [x for tensors, _ in pairs for x in tensors]
        each = routine.count - routine.split
        needed = [*map(_modes.needs_gradient, more)]
        routine.needed[routine.split :] = [any(needed[i::each]) for i in range(each)]
        needed = [*routine.needed[: routine.split], *needed]
        series = _series(routine, elements, needed, ends)
        routine.facts.carry = Joint.of(task.inputs[0])
        try:
            _refuse_forward_mode()
            results = series([*tensors[: routine.split], *more])
        except UnevenError:
            return eagerly()
        except Exception as error:
            self.gave_up = True
            found = eagerly()  # if the fault is the function's own, this raises it
            self.warn(error)
            return found
        return _finished(series, results)

    def pushforward(
        self,
        task: Task,
        xs: Sequence[Any],
        size: int,
        directions: Sequence[Tensor | None],
        of_xs: Iterable[Sequence[Tensor | None]],
    ) -> tuple[Tree, list[Tensor | None]] | None:
        """What `loop` returns, without derivatives, and the tangents along rows of directions.

        Args:
            task: the first step.
            xs: the last of the inputs of each step.
            size: how many rows a direction has.
            directions: one for each leaf of the other inputs, or None.
            of_xs: the same for the xs.

        Returns:
            The results and for each of their tensors its tangents, None for a constant; None if
            the steps cannot be run together, or not compiled.
        """
        if self.gave_up or _modes.intercepted():
            return None
        routine, tensors, numbering = routine_of(self, task)
        pairs = for_each(numbering.element, xs)
        if not all(element.like(routine.element) for element in {element for _, element in pairs}):
            return None
        routine.facts.carry = Joint.of(task.inputs[0]) if len(pairs) > 1 else None
        rows = [directions[i] for i in routine.head.places]
        try:
            # A jvp of a gradient in vmap needs `aten._fw_primal`, which torch 2.13 cannot trace.
            if _torch.interpreter_stack():
                raise UnfitError("torch.compile cannot trace forward mode in torch.func transforms")
            steps = Pushforward(routine, tensors[: routine.split], rows, size)
            return steps.run(pairs, of_xs)
        except UnevenError:
            return None
        except Exception as error:
            before = Drawn((tensors, self.generators()))
            task.make(())(*task.inputs)  # if the fault is the function's own, this raises it
            before.restore()
            self.give_up(error)
            return None


def _series(
    routine: Routine, elements: list[Joint], needed: Sequence[bool], ends: bool = False
) -> Series:
    """The steps, one for each element."""
    keep = torch.is_grad_enabled() and any(routine.needed)
    return Series(routine, elements, tuple(needed), keep, ends)


def _refuse_forward_mode() -> None:
    if _modes.forward_differentiated():
        raise UnfitError("only ForwardMode() compiles derivatives in forward mode")


def _finished(series: Series, results: Sequence[Tensor]) -> tuple[Tree, list[Any]]:
    """The last carry and the outputs of all steps as trees."""
    last: Tree = None
    steady, each, outputs = series.routine.steady, series.outputs, list[Any]()
    pairs = [*zip(results, series.differentiable(), strict=True)]
    for t in range(len(series.elements)):
        start = steady + t * each
        last, output = series.routine.finished([*pairs[:steady], *pairs[start : start + each]])
        outputs.append(output)
    return last, outputs


@dataclass(frozen=True, eq=False)
class CompiledStep:
    """A step `(carry, args, x) -> results`, compiled."""

    compiler: Compiler
    step: Callable[..., Tree]

    def __call__(self, carry: Tree, args: Tree, x: Any) -> Tree:
        return self.compiler(self.task(carry, args, x))

    def task(self, carry: Tree, args: Tree, x: Any) -> Task:
        """The step, for the compiler."""
        return Task(lambda used: self.step, (carry, args, x), integer=type(x) is int)

    def elements(self, carry: Tree, xs: Iterable[Any]) -> list[Any]:
        """The last of the task's inputs, for each x."""
        return [*xs]
