"""The optimizer under test, and typical arguments of its update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from diffopt import _tree
from diffopt._arguments import check_bool, check_function, check_type
from diffopt._rule import hyper
from diffopt._rule.leafwise import Leafwise
from diffopt._tree import Tree
from diffopt.optimizer import Optimizer, check_optimizer

Reference: TypeAlias = Callable[[list[Tensor]], torch.optim.Optimizer]

SHAPES = ((3,), (), (0,), (2, 3))
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
)
MARGIN = 0.05  # least distance of hyperparameters from the ends of their range for derivatives


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer in one configuration: the argument of every check.

    The attributes are arguments of `check`.

    Attributes:
        hparams: values are compared at these. So are derivatives, except that a number
            within 0.05 of the end of its range is moved to a distance of 0.05, so that finite
            differences stay inside.
        reference: None if there is nothing to compare with.
        shapes: the first two are those of the trees on which derivatives are checked.
        backend: "aot_eager" traces everything and generates no code; "inductor" takes ten times as
            long.
        frozen: frozen tensors are returned as the very same tensors.
    """

    optimizer: Optimizer[Any, Any]
    hparams: Mapping[str, Any] | tuple[Any, ...] = dataclasses.field(default_factory=dict[str, Any])
    reference: Reference | None = None
    shapes: Sequence[tuple[int, ...]] = SHAPES
    dtypes: Sequence[torch.dtype] = DTYPES
    backend: str = "aot_eager"
    elementwise: bool = False
    frozen: Callable[[Tree], Tree] | None = None

    def __post_init__(self) -> None:
        self._check()
        leafwise = isinstance(self.optimizer, Leafwise) and self.optimizer.batchable
        object.__setattr__(self, "elementwise", self.elementwise or leafwise)

    def _check(self) -> None:
        """Raise where an argument is not of its kind."""
        check_optimizer(self.optimizer, "optimizer")
        what = "a dict of keywords or a tuple of records"
        check_type(self.hparams, (Mapping, tuple), "hparams", what)
        check_function(self.reference, "reference", optional=True)
        check_function(self.frozen, "frozen", optional=True)
        check_bool(self.elementwise, "elementwise")
        if not (isinstance(self.backend, str) or callable(self.backend)):  # pyright: ignore[reportUnnecessaryIsInstance] (of users)
            raise TypeError(f"backend is {_tree.describe(self.backend)}, not that of torch.compile")
        _check_each(self.shapes, "shapes", _is_shape, "shapes")
        _check_each(self.dtypes, "dtypes", lambda x: isinstance(x, torch.dtype), "dtypes")
        if len(self.shapes) < 2:
            raise ValueError(f"shapes is {self.shapes!r}, but must have at least two shapes")
        if torch.float64 not in list(self.dtypes):
            raise ValueError(f"dtypes is {self.dtypes!r}, but float64 must be among them")

    def record(self) -> Any:
        """The hyperparameters as given."""
        make, given = self.optimizer.hparams, cast(Any, self.hparams)
        return hyper.map_fields(whole, make(*given) if isinstance(given, tuple) else make(**given))

    def interior(self) -> Any:
        """The hyperparameters at which derivatives are checked: 0-d float64 tensors."""
        return as_dtype(torch.float64, hyper.map_fields(inside, self.record()))


def _check_each(values: Any, name: str, is_one: Callable[[Any], bool], kind: str) -> None:
    if not isinstance(values, Sequence) or not all(map(is_one, values)):
        raise TypeError(f"{name} is {_tree.describe(values)}, not a list of {kind}")


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, Sequence) and all(type(size) is int and size >= 0 for size in shape)


class Point(NamedTuple):
    """The arguments of one update."""

    params: Tree
    grads: Tree
    state: Any
    hparams: Any


def generic_point(case: Case, seed: int = 0, dtype: torch.dtype = torch.float64) -> Point:
    """The arguments of a third step."""

    def tree(seed: int) -> Tree:
        first, second = (
            random_tensor(shape, dtype, seed + i) for i, shape in enumerate(case.shapes[:2])
        )
        return {"first": first, "rest": [second]}

    hparams = case.interior()
    start = Point(tree(seed), tree(seed + 10), case.optimizer.init(tree(seed)), hparams)
    params, state = twice(case.optimizer, start)
    return Point(params, tree(seed + 20), state, hparams)


def random_tensor(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Entries of either sign with magnitudes from 0.5 to 1.5, away from any kink."""
    generator = torch.Generator().manual_seed(seed)
    parts = (*shape, 2) if dtype.is_complex else tuple(shape)
    numbers = 2 * torch.rand(parts, generator=generator, dtype=torch.float64) - 1
    numbers = numbers + 0.5 * numbers.sign()
    return (torch.view_as_complex(numbers) if dtype.is_complex else numbers).to(dtype)


def run_steps(case: Case, point: Point, steps: int = 2) -> tuple[Tree, Any]:
    """A few steps with gradients that depend on the params."""
    params, state = point.params, point.state
    for step in range(steps):
        grads = _tree.map(lambda g, p, c=0.3 * step: g + c * p, point.grads, params)
        params, state = case.optimizer.update(params, grads, state, point.hparams)
    return params, state


def twice(optimizer: Optimizer[Any, Any], point: Point) -> tuple[Tree, Any]:
    """Two steps with the same gradients."""
    params, state = optimizer.update(*point)
    return optimizer.update(params, point.grads, state, point.hparams)


def objective(params: Tree) -> Tensor:
    """A function of the params whose derivative is nonzero near them and at zero."""
    return total(_tree.map(lambda p: (1 + p).square(), params))


def total(tree: Tree) -> Any:
    return sum(leaf.sum() for leaf in _tree.leaves(tree))


def as_dtype(dtype: torch.dtype, tree: Any) -> Any:
    """All leaves as tensors of this dtype."""
    return _tree.map(lambda leaf: torch.as_tensor(leaf, dtype=dtype), tree)


def scalars_as(dtype: torch.dtype | None, hparams: Any) -> Any:
    """Numbers and 0-d tensors as tensors of this dtype; unchanged if None.

    Other tensors, such as the weights of a learned optimizer, keep their dtype.
    """

    def convert(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.dim() > 0
        return value if whole else torch.as_tensor(value, dtype=dtype)

    return hparams if dtype is None else _tree.map(convert, hparams)


def whole(field: hyper.Field, value: Any) -> Any:
    """The value; raises if it is a tree like params, which the checks draw themselves."""
    if field.per_parameter and not _tree.is_leaf(value):
        raise ValueError(
            f"hparams.{field.name} is a tree like params, but the checks use their own params: "
            "pass a single value"
        )
    return value


def inside(field: hyper.Field, value: Any) -> Any:
    """The number, moved away from the ends of its field's range."""
    low, high = field.ends()
    number = isinstance(value, (int, float))
    return min(max(value, low + MARGIN), high - MARGIN) if number else value
