"""TensorList: a list of tensors whose arithmetic runs as torch's foreach operations.

Operations are noted first and run later, by a `Program`. It knows what is still needed, and so runs
them in place where an operand is not, as one would write them by hand.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree

_ARITY = {"lerp": 3, "addcmul": 3, "addcdiv": 3} | dict.fromkeys(
    ("add", "sub", "mul", "div", "pow", "maximum", "minimum", "clamp_min", "clamp_max"), 2
)
_LISTS = {"lerp": 2, "addcmul": 3, "addcdiv": 3}  # how many operands must be lists
_SCALABLE = ("add", "sub", "mul", "div")  # by a 0-d tensor
_OPTIONS = {"add": "alpha", "sub": "alpha", "addcmul": "value", "addcdiv": "value"}
_ALIASES = {"truediv": "div", "true_divide": "div", "negative": "neg", "radd": "add", "rmul": "mul"}
_COUNT = itertools.count()


class TensorList:
    """Takes the place of the tensor in a rule; each operation runs on all its tensors at once.

    Operators take another TensorList of the same length, a Python number or a 0-d tensor. Functions
    and methods without a foreach kernel run tensor by tensor. Foreach kernels cannot be batched by
    vmap nor differentiated with respect to a tensor hyperparameter, so this class is used only
    where no derivative is needed.

    Args:
        tensors: the tensors.
        dtype: that of the arithmetic, if it is not the tensors'.
    """

    __slots__ = ("_converted", "arguments", "dtype", "function", "index", "options", "tensors")

    def __init__(self, tensors: Iterable[Tensor] = (), dtype: torch.dtype | None = None) -> None:
        self.tensors = list(tensors)
        self.dtype, self._converted = dtype, None
        self.function: Any = None  # the name of a kernel, or what is called tensor by tensor
        self.arguments: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}
        self.index = next(_COUNT)  # results come after their operands

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Tensor]:
        if self.function is not None:
            given = [x for x in _needed([self]) if x.function is None]
            return iter(Program(given, [self]).run([x.tensors for x in given])[0])
        return iter(self.tensors)

    @property
    def kernel(self) -> bool:
        """Whether a foreach kernel computes it, which may overwrite its first operand."""
        return isinstance(self.function, str) and self.function != "convert"

    def operand(self) -> TensorList:
        """The list in the dtype of the arithmetic, converted when it is needed first."""
        if self.dtype is None:
            return self
        if self._converted is None:
            self._converted = _noted("convert", self, self.dtype)
        return self._converted

    def operands(self) -> list[TensorList]:
        """The lists that it is computed from."""
        given = (
            self.arguments
            if isinstance(self.function, str)
            else _tree.leaves((self.arguments, self.options))
        )
        return [x for x in given if isinstance(x, TensorList)]

    def compute(self, values: dict[int, list[Tensor]], *, in_place: bool) -> list[Tensor]:
        """Its tensors, where those of its operands are known."""
        if callable(self.function):
            return self._one_by_one(self.function, values)
        lists: list[Any] = [
            values[x.index] if isinstance(x, TensorList) else x for x in self.arguments
        ]
        first: list[Tensor] = lists[0]
        if self.function == "convert":
            new = [torch.empty_like(x, dtype=lists[1]) for x in first]
            _torch.foreach_copy_(new, first)
            return new
        # Another dtype, such as float64 of a scalar, would keep foreach from its fast route.
        lists = [x.to(first[0].dtype) if isinstance(x, Tensor) else x for x in lists]
        kernel, overwriting = _torch.foreach[self.function]
        if in_place:
            overwriting(*lists, **self.options)
        return first if in_place else list(kernel(*lists, **self.options))

    def _one_by_one(
        self, function: Callable[..., Any], values: dict[int, list[Tensor]]
    ) -> list[Tensor]:
        given = self.arguments, self.options  # lists among the arguments are those of stack and cat
        result: list[Tensor] = []
        for i in range(len(values[self.operands()[0].index])):

            def at(x: Any, i: int = i) -> Any:
                return values[x.index][i] if isinstance(x, TensorList) else x

            positional, named = _tree.map(at, given)
            result.append(function(*positional, **named))
        return result

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> TensorList:
        """By a foreach kernel, or as `function` of each tensor."""
        name: str = function.__name__.removeprefix("__").removesuffix("__")
        name, options = _ALIASES.get(name, name), kwargs or {}
        return _by_kernel(name, args, options) or _noted(
            function, *_tree.map(_operand, args), **_tree.map(_operand, options)
        )

    def clamp(self, min: Any = None, max: Any = None) -> TensorList:
        above = self if min is None else self.clamp_min(min)
        return above if max is None else above.clamp_max(max)

    def __rsub__(self, other: Any) -> TensorList:
        return self.neg() + other

    def __rtruediv__(self, other: Any) -> TensorList:
        return self.reciprocal() * other

    def __getattr__(self, name: str) -> Any:
        method = getattr(Tensor, name)
        if not callable(method):
            raise AttributeError(f"a TensorList has no {name}: it differs between its tensors")
        return functools.partial(_method(method), self)


def _method(method: Any) -> Any:
    def noted(*args: Any, **kwargs: Any) -> TensorList:
        return TensorList.__torch_function__(method, (), args, kwargs)

    return noted


for _name in ("add", "sub", "mul", "truediv", "neg", "abs", "pow", "rpow", "and", "or"):
    setattr(TensorList, f"__{_name}__", _method(getattr(Tensor, f"__{_name}__")))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "radd", "rmul"):
    setattr(TensorList, f"__{_name}__", _method(getattr(Tensor, f"__{_name}__")))


def _noted(function: Any, *arguments: Any, **options: Any) -> TensorList:
    result = TensorList()
    result.function, result.arguments, result.options = function, arguments, options
    return result


def _operand(x: Any) -> Any:
    """A number for a 0-d CPU tensor, which a foreach kernel on another device may refuse."""
    return x.operand() if isinstance(x, TensorList) else _modes.number_of(x)


def _by_kernel(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> TensorList | None:
    """The result of a foreach kernel; None where there is none for such operands."""
    if name not in _torch.foreach or len(args) != _ARITY.get(name, 1):
        return None
    args = tuple(map(_operand, args))
    if not isinstance(args[0], TensorList) and not options:
        if name in ("add", "mul"):
            args = args[1], args[0]
        elif name in ("sub", "div"):
            return args[0] + -args[1] if name == "sub" else args[1].reciprocal() * args[0]
    last, scaled = args[-1], set(options) == {_OPTIONS.get(name)}
    if name in _SCALABLE and isinstance(last, Tensor) and last.dim() == 0 and not options:
        # A scalar on the device, whose value add would wait for without alpha.
        options = {"add": {"alpha": 1}, "sub": {"alpha": -1}}.get(name, {})
        name = "add" if name == "sub" else name
    elif not all(isinstance(x, (int, float, TensorList)) for x in args) or (
        options and not (scaled and isinstance(last, TensorList) and _is_number(*options.values()))
    ):
        return None
    lists = all(isinstance(x, TensorList) for x in args[: _LISTS.get(name, 1)])
    return _noted(name, *args, **options) if lists else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


_TEMPORARY, _FIXED = -1, -2  # where a list lies that is not in a column; a fixed one is kept


class _Line(NamedTuple):
    """The computation of a list, and what follows."""

    result: TensorList
    in_place: bool
    written: list[int]  # the columns whose new value it is
    released: list[int]  # the lists that are not needed any more


class Program:
    """What was noted, as lines that can be run on lists like `inputs`.

    Args:
        inputs: the lists that it is run on.
        outputs: what is wanted of the lists that were noted; None for nothing.
        into: whether each output overwrites the input in its place; otherwise they are returned.
        elementwise: whether all lists have the same shapes, so that results may overwrite operands.

    Attributes:
        most: how many lists it needs at most at any one time, besides the inputs.
        pieces: whether it can be run on pieces of tensors.
        lean: whether foreach kernels do everything, in the dtype of the inputs.
    """

    def __init__(
        self,
        inputs: Sequence[TensorList | None],
        outputs: Sequence[TensorList | None],
        *,
        into: bool = False,
        elementwise: bool = False,
    ) -> None:
        self.inputs, self.outputs, self.elementwise = inputs, outputs, elementwise
        self.pieces = into and elementwise
        pairs = enumerate(zip(inputs, outputs, strict=False) if into else ())
        self.late = {k: (x, y) for k, (x, y) in pairs if x and y and x is not y}
        nodes = [x for x in _needed(outputs) if x.function is not None]
        self._uses = collections.Counter(x.index for node in nodes for x in node.operands())
        self._uses.update(x.index for x in outputs if x)
        self._place = {x.index: k for k, (x, _) in self.late.items()}
        self._lies = {k: x.index for k, (x, _) in self.late.items()}  # in each column
        self._toward = _toward(self.late)
        self.lean = all(node.kernel for node in nodes)
        self.most = self._live = 0
        self.lines = [self._line(node) for node in nodes]

    def _line(self, node: TensorList) -> _Line:
        operands, uses, place = [x.index for x in node.operands()], self._uses, self._place
        uses.subtract(operands)
        old = place.get(operands[0])
        free = self.elementwise and node.kernel and not uses[operands[0]] and old is not None
        in_place = free and old in (_TEMPORARY, self._toward.get(node.index))
        new = _FIXED if callable(node.function) else _TEMPORARY
        place[node.index] = place.pop(operands[0]) if in_place else new
        self._lies[place[node.index]] = node.index
        self._live += not in_place
        self.most = max(self.most, self._live)
        written = self._written(node)
        released = [i for i in {*operands, node.index} if not uses[i]]
        self._live -= sum(place.get(i, 0) < 0 for i in released)
        return _Line(node, in_place, written, released)

    def _written(self, node: TensorList) -> list[int]:
        """The columns to which this value is copied at once: nothing in them is needed any more."""
        home = self._place[node.index]
        ready = [
            k
            for k, (_, new) in self.late.items()
            if new is node and (k == home or not self._uses[self._lies[k]])
        ]
        for k in ready:
            del self.late[k]
        copied = [k for k in ready if k != home]
        self._uses[node.index] -= len(copied)
        return copied

    def run(self, columns: Sequence[Any]) -> list[list[Tensor]]:
        """The outputs; what has been written into a column is left out.

        Raises:
            ValueError: an output does not have the shape of what it overwrites.
        """
        values = {x.index: column for x, column in zip(self.inputs, columns, strict=True) if x}
        for node, in_place, written, released in self.lines:
            values[node.index] = node.compute(values, in_place=in_place)
            for k in written:
                _overwrite(columns[k], values[node.index])
            for i in released:
                values.pop(i, None)
        late = [(k, [*map(torch.clone, values[x.index])]) for k, (_, x) in self.late.items()]
        for k, new in late:
            _overwrite(columns[k], new)
        return [values.get(x.index, []) if x else [] for x in self.outputs]


def _needed(outputs: Sequence[TensorList | None]) -> list[TensorList]:
    """The lists from which the outputs are computed, in order."""
    found: dict[int, TensorList] = {}
    stack = [x for x in outputs if x]
    while stack:
        node = stack.pop()
        if node.index not in found:
            found[node.index] = node
            stack += node.operands()
    return [found[i] for i in sorted(found)]


def _toward(new: dict[int, tuple[TensorList, TensorList]]) -> dict[int, int]:
    """Lists on the way from the old value of a column to the new one, each with the column.

    They are the results that may lie in the column's memory.
    """
    toward: dict[int, int] = {}
    for k, (old, node) in new.items():
        chain: list[int] = []
        while node.kernel:
            chain.append(node.index)
            node = node.arguments[0]
        if node is old:
            toward |= dict.fromkeys(chain, k)
    return toward


def _overwrite(old: list[Tensor], new: list[Tensor]) -> None:
    for x, y in zip(old, new, strict=True):
        if x.shape != y.shape:
            raise ValueError(
                f"the rule returned shape {tuple(y.shape)} for a tensor of shape {tuple(x.shape)}"
            )
    _torch.foreach_copy_(old, new)
