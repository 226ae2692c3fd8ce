"""A rule as a program: its operations, recorded once per step and run on one piece after another.

A program consists of operations and places. What is computed anew at every step, numbers and 0-d
tensors, are its constants, so it is kept for as long as the rule takes the same steps.

Results are written to existing memory: a new value over the old one, once that is no longer needed,
and all others into registers. So nothing is allocated, and everything that a piece needs stays in
the cache. Since the operations are elementwise, a result may overwrite its own operand.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import _modes
from diffopt._rule.symbols import Symbol

_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_ARITHMETIC = ("add", "sub", "mul", "div", "neg", "abs", "sqrt", "rsqrt", "sign", "reciprocal")
_OTHERS = ("pow", "square", "clamp", "maximum", "minimum", "where", "addcmul", "addcdiv", "lerp")
_FUNCTIONS = {name: getattr(torch, name) for name in (*_COMPARISONS, *_ARITHMETIC, *_OTHERS)}
"""Elementwise functions that can write to existing memory (`out=`)."""

_OF_THE_WHOLE = ("dim", "numel")

_ALIASES = {"truediv": "div", "true_divide": "div", "multiply": "mul", "negative": "neg"}


class Unrecordable(Exception):
    """The rule uses an operation that is not in `_FUNCTIONS`."""


class Summed(Unrecordable):
    """The rule needs the sum of all elements of `terms` before it can go on."""

    def __init__(self, terms: Recorded) -> None:
        super().__init__("sum")
        self.terms = terms


class Operation(NamedTuple):
    """`function(*arguments, **options)`; n stands for the n-th value, ~n for the n-th constant."""

    function: Callable[..., Tensor]
    arguments: tuple[int, ...]
    options: tuple[tuple[str, int], ...]
    result: int
    boolean: bool


class Tape:
    """The operations on some tensors, in order, and the constants among their arguments.

    Args:
        inputs: the number of tensors.
        dtype: of the tensors.
        whole: the tensor whose shape the rule sees; None where it must not ask for it.
        sums: what the calls of `sum()` return in order; any further call raises `Summed`.
        known: the function of a name, or None where there is none.
    """

    def __init__(
        self,
        inputs: int,
        dtype: torch.dtype,
        whole: Tensor | None = None,
        sums: Sequence[float] = (),
        known: Callable[[str], Any] = _FUNCTIONS.get,
    ) -> None:
        self.size, self.dtype = inputs, dtype
        self.operations: list[Operation] = []
        self.constants: list[Any] = []
        self.whole, self.sums, self.known = whole, iter(sums), known

    @property
    def inputs(self) -> list[Recorded]:
        """What stands for the tensors; not kept here, where each would be in a cycle."""
        return [Recorded(self, i) for i in range(self.size)]

    def place(self, argument: Any) -> int:
        """How an operation names a constant."""
        if isinstance(argument, Tensor) and self.whole is not None and argument.dim() > 0:
            raise Unrecordable("a tensor that is not cut into pieces")
        self.constants.append(argument)
        return -len(self.constants)

    def program(self, outputs: Sequence[Any]) -> Program:
        """What computes the outputs: for each input its new value, or None where it has none."""
        return _program(self.size, (*self.operations,), indices(outputs))


def indices(outputs: Sequence[Any]) -> tuple[int | None, ...]:
    """Which values they are; None where there is none."""
    if not all(x is None or isinstance(x, Recorded) for x in outputs):
        raise Unrecordable("a new value that is not the result of an operation")
    return tuple(None if x is None else x.index for x in outputs)


class Recorded:
    """Stands for a tensor; every operation on it is recorded and returns another `Recorded`."""

    __slots__ = ("index", "tape")

    requires_grad = False

    def __init__(self, tape: Tape, index: int) -> None:
        self.tape, self.index = tape, index

    def record(self, name: str, *arguments: Any, **options: Any) -> Recorded:
        name, tape = _spelled(name), self.tape
        function = tape.known(name)
        if function is None:
            raise Unrecordable(name)
        if options and any(isinstance(x, Recorded) for x in options.values()):
            raise Unrecordable(name)
        if name == "where":  # which takes `out=` for tensors only
            if not any(isinstance(x, Recorded) for x in arguments[1:]):
                raise Unrecordable("a choice between numbers, whose dtype is the default one")
            arguments = tuple(map(_as_tensor, arguments))
        places = tuple([x.index if type(x) is Recorded else tape.place(x) for x in arguments])
        named = tuple([(key, tape.place(x)) for key, x in options.items()])
        index = tape.size + len(tape.operations)
        boolean = name in _COMPARISONS
        tape.operations.append(Operation(function, places, named, index, boolean))
        return Recorded(tape, index)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Recorded:
        for x in args:
            if type(x) is Recorded:
                return x.record(function.__name__, *args, **(kwargs or {}))
        raise Unrecordable(function.__name__)  # they are in a list, as for stack and cat

    @property
    def dtype(self) -> torch.dtype:
        k = self.index - self.tape.size
        return torch.bool if k >= 0 and self.tape.operations[k].boolean else self.tape.dtype

    def sum(self) -> float:
        known = next(self.tape.sums, None)
        if known is None:
            raise Summed(self)
        return known

    def __getattr__(self, name: str) -> Any:
        if name in _OF_THE_WHOLE:
            if self.tape.whole is None:
                raise Unrecordable(name)
            return getattr(self.tape.whole, name)
        return functools.partial(self.record, name, self)

    def __rsub__(self, other: Any) -> Recorded:
        return self.record("add", self.record("neg", self), other)

    def __rtruediv__(self, other: Any) -> Recorded:
        return self.record("mul", self.record("reciprocal", self), other)


def _as_tensor(x: Any) -> Any:
    if isinstance(x, Symbol):
        return x.then(_modes.tensor_of)
    return _modes.tensor_of(x) if isinstance(x, (int, float)) else x


@functools.cache
def _spelled(name: str) -> str:
    """The name in `_FUNCTIONS`, if it is there."""
    return _ALIASES.get(name.strip("_"), name.strip("_"))


def _operator(name: str) -> Any:
    def operator(self: Recorded, *others: Any) -> Recorded:
        return self.record(name, self, *others)

    return operator


for _name in ("add", "sub", "mul", "truediv", "neg", "abs", "pow", *_COMPARISONS):
    setattr(Recorded, f"__{_name}__", _operator(_name))
for _name in ("add", "mul"):
    setattr(Recorded, f"__r{_name}__", _operator(_name))


@dataclasses.dataclass
class _Register:
    """Memory for one value after another."""

    boolean: bool
    until: float  # the operation, by the index of its result, that needs the present value last
    due: float = math.inf  # the operation that makes the value it holds in the end


class Program:
    """Some operations, on tensors some of which they overwrite.

    Args:
        inputs: the number of tensors.
        operations: what was recorded.
        outputs: for each input the index of its new value, or None where it is only read.
    """

    def __init__(
        self, inputs: int, operations: Sequence[Operation], outputs: Sequence[int | None]
    ) -> None:
        new = {k: index for k, index in enumerate(outputs) if index is not None}
        wanted = {index: k for k, index in reversed(new.items())}  # of several places, the first
        last = _last_uses(operations, wanted)
        needed = [x for x in operations if x.result in last]
        self.inputs = inputs
        self.memory = [_Register(False, last.get(k, -1), new.get(k, -1)) for k in range(inputs)]
        place = {k: k for k in range(inputs)}  # the register of each value
        for x in needed:
            place[x.result] = self._register(x, last[x.result], wanted.get(x.result))
        size = len(self.memory)  # constants follow the registers

        def at(k: int) -> int:
            return place[k] if k >= 0 else size + ~k

        self.lines = [
            (f, (*map(at, arguments),), [(name, at(k)) for name, k in options], at(result))
            for f, arguments, options, result, _ in needed
        ]
        self.copies = [(k, place[i]) for k, i in new.items() if place[i] != k]
        if {k for k, _ in self.copies} & {source for _, source in self.copies}:
            raise Unrecordable("a new value is the old value of an overwritten tensor")

    def _register(self, operation: Operation, needed: float, wanted: int | None) -> int:
        """A register for a result: the one wanted if free, the last one used, or a new one."""
        free = [
            k
            for k, register in enumerate(self.memory)
            if register.boolean == operation.boolean
            and register.until <= operation.result
            and (needed <= register.due or k == wanted)
        ]
        if not free:
            free = [len(self.memory)]
            self.memory.append(_Register(operation.boolean, operation.result))
        best = max(free, key=lambda k: (k == wanted, self.memory[k].until))
        self.memory[best].until = needed
        return best

    def registers(self, size: int, like: Tensor) -> list[Tensor]:
        """Memory for everything but the inputs, for pieces of up to `size` elements."""
        dtypes = (torch.bool if x.boolean else like.dtype for x in self.memory[self.inputs :])
        return [torch.empty(size, dtype=dtype, device=like.device) for dtype in dtypes]

    def run(
        self, inputs: Sequence[Tensor], registers: Sequence[Tensor], constants: Sequence[Any]
    ) -> None:
        """Overwrite the inputs that have new values; `constants` are those of the tape."""
        size = inputs[0].numel()
        own = (x if x.numel() == size else x[:size] for x in registers)
        values = [*inputs, *own, *constants]
        for function, arguments, options, result in self.lines:
            named = {name: values[k] for name, k in options}
            function(*[values[k] for k in arguments], **named, out=values[result])
        for target, source in self.copies:
            values[target].copy_(values[source])


_program = functools.lru_cache(maxsize=256)(Program)
"""Kept programs: they hold no tensors, and depend on nothing but the arguments of `Program`."""


def _last_uses(operations: Sequence[Operation], wanted: Iterable[int]) -> dict[int, float]:
    """The last operation that needs each value; values that are not needed are left out."""
    last: dict[int, float] = dict.fromkeys(wanted, math.inf)
    for operation in reversed(operations):
        if operation.result in last:
            for k in operation.arguments:
                if k >= 0:
                    last.setdefault(k, operation.result)
    return last
