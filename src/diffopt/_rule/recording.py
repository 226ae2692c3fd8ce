"""A rule as a program: its operations, recorded once per step and run on one piece after another.

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

_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_ARITHMETIC = ("add", "sub", "mul", "div", "neg", "abs", "sqrt", "rsqrt", "sign", "reciprocal")
_OTHERS = ("pow", "square", "clamp", "maximum", "minimum", "where", "addcmul", "addcdiv", "lerp")
_FUNCTIONS = {name: getattr(torch, name) for name in (*_COMPARISONS, *_ARITHMETIC, *_OTHERS)}
"""Elementwise functions that can write to existing memory (`out=`)."""

_OF_THE_WHOLE = ("dim", "dtype", "numel")

_ALIASES = {"truediv": "div", "true_divide": "div", "multiply": "mul", "negative": "neg"}


class Unrecordable(Exception):
    """The rule uses an operation that is not in `_FUNCTIONS`."""


class Summed(Unrecordable):
    """The rule needs the sum of all elements of `terms` before it can go on."""

    def __init__(self, terms: Recorded) -> None:
        super().__init__("sum")
        self.terms = terms


class Operation(NamedTuple):
    """`function(*arguments, **options)`; `result` is the index of its result."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    result: Recorded


class Tape:
    """The operations on some tensors, in order.

    Args:
        inputs: the number of tensors.
        whole: the tensor whose shape and dtype the rule sees; None where it must not ask for them.
        sums: what the calls of `sum()` return in order; any further call raises `Summed`.
    """

    def __init__(
        self, inputs: int, whole: Tensor | None = None, sums: Sequence[float] = ()
    ) -> None:
        self.inputs = [Recorded(self, i) for i in range(inputs)]
        self.operations: list[Operation] = []
        self.whole, self.sums = whole, iter(sums)


class Recorded:
    """Stands for a tensor; every operation on it is recorded and returns another `Recorded`."""

    __slots__ = ("boolean", "index", "tape")

    requires_grad = False

    def __init__(self, tape: Tape, index: int, *, boolean: bool = False) -> None:
        self.tape, self.index, self.boolean = tape, index, boolean

    def record(self, name: str, *arguments: Any, **options: Any) -> Recorded:
        name = _ALIASES.get(name.strip("_"), name.strip("_"))
        if name not in _FUNCTIONS or any(isinstance(x, Recorded) for x in options.values()):
            raise Unrecordable(name)
        if self.tape.whole is not None and any(
            isinstance(x, Tensor) and x.dim() > 0 for x in arguments
        ):
            raise Unrecordable("a tensor that is not cut into pieces")
        if name == "where":  # which takes `out=` for tensors only
            arguments = tuple(
                torch.tensor(x) if isinstance(x, (int, float)) else x for x in arguments
            )
        index = len(self.tape.inputs) + len(self.tape.operations)
        result = Recorded(self.tape, index, boolean=name in _COMPARISONS)
        self.tape.operations.append(Operation(_FUNCTIONS[name], arguments, options, result))
        return result

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Recorded:
        one = next((x for x in args if isinstance(x, Recorded)), None)
        if one is None:  # they are in a list, as for stack and cat
            raise Unrecordable(function.__name__)
        return one.record(function.__name__, *args, **(kwargs or {}))

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
    """The operations of a tape, on tensors some of which they overwrite.

    Args:
        tape: what was recorded.
        outputs: for each input the new value, or None where it is only read.
    """

    def __init__(self, tape: Tape, outputs: Sequence[Any]) -> None:
        if not all(x is None or isinstance(x, Recorded) for x in outputs):
            raise Unrecordable("a new value that is not the result of an operation")
        new = {k: x.index for k, x in enumerate(outputs) if x is not None}
        wanted = {index: k for k, index in reversed(new.items())}  # of several places, the first
        last = _last_uses(tape.operations, wanted)
        self.lines = [x for x in tape.operations if x.result.index in last]
        self.inputs = len(tape.inputs)
        self.memory = [
            _Register(False, last.get(k, -1), new.get(k, -1)) for k in range(self.inputs)
        ]
        self.place = {k: k for k in range(self.inputs)}  # the register of each value
        for _, _, _, result in self.lines:
            index = result.index
            self.place[index] = self._register(result, last[index], wanted.get(index))
        self.copies = [(k, self.place[i]) for k, i in new.items() if self.place[i] != k]
        if {k for k, _ in self.copies} & {source for _, source in self.copies}:
            raise Unrecordable("a new value is the old value of an overwritten tensor")

    def _register(self, result: Recorded, needed: float, wanted: int | None) -> int:
        """A register for a result: the one wanted if free, the last one used, or a new one."""
        free = [
            k
            for k, register in enumerate(self.memory)
            if register.boolean == result.boolean
            and register.until <= result.index
            and (needed <= register.due or k == wanted)
        ]
        if not free:
            free = [len(self.memory)]
            self.memory.append(_Register(result.boolean, result.index))
        best = max(free, key=lambda k: (k == wanted, self.memory[k].until))
        self.memory[best].until = needed
        return best

    def registers(self, size: int, like: Tensor) -> list[Tensor]:
        """Memory for everything but the inputs, for pieces of up to `size` elements."""
        dtypes = (torch.bool if x.boolean else like.dtype for x in self.memory[self.inputs :])
        return [torch.empty(size, dtype=dtype, device=like.device) for dtype in dtypes]

    def run(self, inputs: Sequence[Tensor], registers: Sequence[Tensor]) -> None:
        """Overwrite the inputs that have new values."""
        size = inputs[0].numel()
        values = [*inputs, *(x if x.numel() == size else x[:size] for x in registers)]

        def value(x: Any) -> Any:
            return values[self.place[x.index]] if isinstance(x, Recorded) else x

        for function, arguments, options, result in self.lines:
            function(*map(value, arguments), **options, out=value(result))
        for target, source in self.copies:
            values[target].copy_(values[source])


def _last_uses(operations: Sequence[Operation], wanted: Iterable[int]) -> dict[int, float]:
    """The last operation that needs each value; values that are not needed are left out."""
    last: dict[int, float] = dict.fromkeys(wanted, math.inf)
    for operation in reversed(operations):
        if operation.result.index in last:
            for x in operation.arguments:
                if isinstance(x, Recorded):
                    last.setdefault(x.index, operation.result.index)
    return last
