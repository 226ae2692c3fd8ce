"""Numbers that a rule sees where its program is kept: what it computes from them is noted.

With other numbers the same computations are repeated, in the same order, so their results have the
same bits as if the rule had been run. A comparison has to come out as it did; otherwise, and where
a rule needs a number itself, as `math` does, it must run again.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_ARITHMETIC = ("add", "sub", "mul", "truediv", "pow")


class Sheet:
    """Computations on some numbers, the first of its cells.

    Args:
        numbers: their values; `Unknown` ones need none.
        kind: what stands for them.
    """

    def __init__(self, numbers: Iterable[Any], kind: type[Symbol] | None = None) -> None:
        self._cells = list(numbers)
        self._kind = kind or Symbol
        self.inputs = [self._kind(self, k) for k in range(len(self._cells))]
        self._lines: list[tuple[Callable[..., Any], tuple[int, ...], int, bool | None]] = []

    def cell(self, value: Any) -> int:
        """The index of the cell with this value."""
        if isinstance(value, Symbol):
            return value.index
        self._cells.append(value)
        return len(self._cells) - 1

    def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result as a symbol, or, if it is a known bool, as it is."""
        cells = tuple(map(self.cell, arguments))
        unknown = self._kind is Unknown
        result = None if unknown else function(*[self._cells[k] for k in cells])
        known = result if isinstance(result, bool) else None
        self._lines.append((function, cells, len(self._cells), known))
        self._cells.append(result)
        return self._kind(self, len(self._cells) - 1) if known is None else known

    def seal(self) -> None:
        """Forget the numbers and the results, some of which may be tensors."""
        for k in (*range(len(self.inputs)), *(line[2] for line in self._lines)):
            self._cells[k] = None

    def cells(self, numbers: list[Any]) -> list[Any] | None:
        """All cells for other numbers; None where a comparison comes out differently."""
        cells = [*numbers, *self._cells[len(numbers) :]]
        for function, arguments, k, known in self._lines:
            result = cells[k] = function(*[cells[i] for i in arguments])
            if known is not None and result is not known:
                return None
        return cells


class Symbol:
    """Stands for a number; it is not one, so that nothing can read it unnoticed."""

    __slots__ = ("index", "sheet")

    def __init__(self, sheet: Sheet, index: int) -> None:
        self.sheet, self.index = sheet, index

    def then(self, function: Callable[[Any], Any]) -> Any:
        """The result of a function of one number."""
        return self.sheet.compute(function, self)

    def sqrt(self) -> Any:
        return self.then(math.sqrt)

    def __bool__(self) -> bool:
        return self.then(bool)

    def __neg__(self) -> Any:
        return self.then(operator.neg)

    def __abs__(self) -> Any:
        return self.then(abs)

    @classmethod
    def __torch_function__(cls, *args: Any) -> Any:
        """With it, torch accepts symbols as numbers, beside what stands for a tensor."""
        return NotImplemented


class Unknown(Symbol):
    """Stands for a number of any value: what is recorded with it holds for all of them."""

    __slots__ = ()

    def __bool__(self) -> bool:
        raise TypeError("the rule asks for the value of a number")


def _operator(function: Callable[[Any, Any], Any], *, swapped: bool = False) -> Any:
    def operator(self: Symbol, other: Any) -> Any:
        if not isinstance(other, (int, float, Symbol)):
            return NotImplemented
        return self.sheet.compute(function, *((other, self) if swapped else (self, other)))

    return operator


for _name in (*_ARITHMETIC, *_COMPARISONS):
    setattr(Symbol, f"__{_name}__", _operator(getattr(operator, _name)))
for _name in _ARITHMETIC:
    setattr(Symbol, f"__r{_name}__", _operator(getattr(operator, _name), swapped=True))
