"""The conformance kit: everything an optimizer, a user's own included, must satisfy, in one call.

Import it in tests only: it needs hypothesis (`pip install diffopt[testing]`).
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false
from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffopt import _hparams, _tree
from diffopt._engine import Leafwise
from diffopt._tree import Tree
from diffopt.optimizer import Optimizer

try:
    from hypothesis import HealthCheck, Phase, given, settings, strategies as st
except ImportError as error:
    raise ImportError("diffopt.testing needs hypothesis: pip install diffopt[testing]") from error

Reference: TypeAlias = Callable[[list[Tensor]], torch.optim.Optimizer]

_SHAPES = ((3,), (), (0,), (2, 3))
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
)
_PARITY = {  # relative tolerance to the reference after some steps
    torch.float64: 1e-12,
    torch.complex128: 1e-12,
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
}
_MARGIN = 0.05  # how far from the end of its range a hyperparameter is where derivatives are taken
_TREES = settings(
    max_examples=12,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer in one configuration: what every check is a function of.

    Attributes:
        optimizer: what is checked.
        hparams: keyword arguments of `optimizer.hparams`, numbers as a rule; what is missing has
            its default. Values are compared at these. Derivatives are too, except that a number
            within 0.05 of the end of its range is moved to 0.05 from it, so that finite
            differences stay inside.
        reference: makes the `torch.optim` optimizer (or one like it) for a list of tensors, with
            the numbers of `hparams`; None where there is nothing to compare with.
        shapes: shapes of the tensors it can update. The first two, not empty, are those of the
            trees on which derivatives are taken.
        dtypes: dtypes of the tensors it can update; float64 must be among them.
        backend: the backend of `torch.compile`. "aot_eager" traces everything and generates no
            code; "inductor" compiles for real and takes ten times as long.
    """

    optimizer: Optimizer[Any, Any]
    hparams: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    reference: Reference | None = None
    shapes: Sequence[tuple[int, ...]] = _SHAPES
    dtypes: Sequence[torch.dtype] = _DTYPES
    backend: str = "aot_eager"

    def record(self) -> Any:
        """The hyperparameters as given."""
        return self.optimizer.hparams(**self.hparams)

    def interior(self) -> Any:
        """The hyperparameters at which derivatives are taken: 0-d float64 tensors."""
        moved = _map_fields(lambda field, value: _inside(value, field.bounds), self.record())
        return _tree.map(lambda leaf: torch.as_tensor(leaf, dtype=torch.float64), moved)


class Point(NamedTuple):
    """The arguments of one update."""

    params: Tree
    grads: Tree
    state: Any
    hparams: Any


def check(
    optimizer: Optimizer[Any, Any],
    *,
    hparams: Mapping[str, Any] | None = None,
    reference: Reference | None = None,
    skip: Collection[str] = (),
    shapes: Sequence[tuple[int, ...]] = _SHAPES,
    dtypes: Sequence[torch.dtype] = _DTYPES,
    backend: str = "aot_eager",
) -> None:
    """Run every check of `CHECKS` on an optimizer.

    Args:
        optimizer: what is checked: any `Optimizer`, made by `diffopt.rules.leafwise` or not.
        hparams: keyword arguments of `optimizer.hparams`: generic numbers, such as `lr=0.1`.
        reference: makes the optimizer that must give the same values, from a list of tensors:
            `lambda tensors: torch.optim.SGD(tensors, lr=0.1)`. None: nothing is compared.
        skip: names of checks to leave out.
        shapes: shapes of the tensors it can update; the first two must not be empty.
        dtypes: dtypes of the tensors it can update; float64 must be among them.
        backend: the backend of `torch.compile`; "inductor" to compile for real.

    Raises:
        AssertionError: a check failed; the message begins with the check's name.
        ValueError: `skip` has what is no check.

    Example:
        >>> from typing import Any, NamedTuple
        >>> import torch
        >>> from diffopt import testing
        >>> from diffopt.rules import hparams, leafwise, number
        >>> class State(NamedTuple):
        ...     step: Any
        >>> @hparams
        ... class HParams:
        ...     lr: float = number(1e-3, ge=0)
        >>> descent = leafwise(
        ...     State,
        ...     HParams,
        ...     lambda p, step: State(step),
        ...     lambda p, g, s, hp, _: (p - hp.lr * g, s),
        ... )
        >>> testing.check(
        ...     descent,
        ...     hparams={"lr": 0.1},
        ...     reference=lambda tensors: torch.optim.SGD(tensors, lr=0.1),
        ... )
        >>> testing.check(descent, reference=lambda tensors: torch.optim.SGD(tensors, lr=0.2))
        Traceback (most recent call last):
            ...
        AssertionError: parity: params[0] differs...
    """
    if unknown := set(skip) - CHECKS.keys():
        raise ValueError(f"skip has {sorted(unknown)}, but the checks are {list(CHECKS)}")
    case = Case(optimizer, hparams or {}, reference, shapes, dtypes, backend)
    for name, run in CHECKS.items():
        if name not in skip:
            run(case)


# Values.


def _parity(case: Case) -> None:
    """`update` and `update_` follow the reference for six steps."""
    if case.reference is None:
        return
    for dtype in [dtype for dtype in case.dtypes if dtype in _PARITY]:
        start = [_random(shape, dtype, i) for i, shape in enumerate(case.shapes)]
        theirs, pure, in_place = _clone(start), _clone(start), _clone(start)
        reference, record = case.reference(theirs), case.record()
        state, state_ = case.optimizer.init(pure), case.optimizer.init(in_place)
        for step in range(6):
            grads = [_random(p.shape, dtype, 10 * step + i) for i, p in enumerate(start)]
            for tensor, grad in zip(theirs, grads, strict=True):
                tensor.grad = grad.clone()
            reference.step()
            pure, state = case.optimizer.update(pure, grads, state, record)
            case.optimizer.update_(in_place, grads, state_, record)
        _same(pure, theirs, "params", rtol=_PARITY[dtype])
        _same(in_place, theirs, "params", rtol=_PARITY[dtype])


def _numbers(case: Case) -> None:
    """A number and a 0-d tensor as hyperparameter have the same effect, to float64's accuracy."""
    point = _point(case)
    numbers = point._replace(hparams=_tree.map(_number, point.hparams))
    _same(_run(case, point), _run(case, numbers), "result", rtol=1e-12)


# Derivatives, of all params and buffers after two steps by every tensor that goes in. The step
# count stays out: rules may treat the first step as a case of its own.


def _derivatives(case: Case) -> None:
    """First and second order, forward and reverse mode, from a state after two steps."""
    _gradcheck(case, _point(case))


def _derivatives_from_init(case: Case) -> None:
    """The same from the initial state: buffers of zeros, the greatest bias corrections."""
    point = _point(case)
    point = point._replace(state=case.optimizer.init(point.params))
    _gradcheck(case, point, wrt=("params", "grads", "hparams"))


def _derivatives_per_weight(case: Case) -> None:
    """The same where every weight has hyperparameters of its own (elementwise optimizers)."""
    if not isinstance(case.optimizer, Leafwise):
        return
    point = _point(case)

    def spread(field: _hparams.Field, value: Tensor) -> Tree:
        if not field.per_parameter:
            return value
        return _tree.map(lambda p: value * _ramp(p.shape), point.params)

    _gradcheck(case, point._replace(hparams=_map_fields(spread, point.hparams)))


def _jvp(case: Case) -> None:
    """`torch.func.jvp` of two steps, and of their gradient, equals central differences."""
    steps, inputs, _ = _as_function(case, _point(case))
    directions = tuple(_random(x.shape, x.dtype, 50 + i) for i, x in enumerate(inputs))

    def gradient(*inputs: Tensor) -> Tensor:
        of_all = torch.func.grad(lambda x: steps(*x).square().sum())(inputs)
        return _ravel(of_all)

    for function in (steps, gradient):
        _, derivative = torch.func.jvp(function, inputs, directions)
        difference = _central_difference(function, inputs, directions)
        _same(derivative, difference, "the jvp", rtol=1e-5)


def _zero_gradient(case: Case) -> None:
    """Where params and gradients are zero throughout, every derivative is finite.

    Those of everything else are as if such a tensor (and, in an elementwise optimizer, such a
    weight) were not there.
    """
    by_weight = isinstance(case.optimizer, Leafwise)
    for dtype, hparams in (
        (torch.float64, case.interior()),
        (torch.float32, _tree.map(torch.as_tensor, case.record())),
    ):
        params, grads = ({"first": _random(case.shapes[0], dtype, seed)} for seed in (1, 2))
        rest = {"first": params["first"].flatten()[1:]}, {"first": grads["first"].flatten()[1:]}
        if by_weight:
            for tree in (params, grads):
                tree["first"].view(-1)[0] = 0
        else:
            rest = (dict(params), dict(grads))
        for tree in (params, grads):
            tree["zero"] = torch.zeros(_second_shape(case), dtype=dtype)
        with_zeros = _meta_gradients(case, params, grads, hparams)
        without = _meta_gradients(case, *rest, hparams)
        # TODO


CHECKS: Mapping[str, Callable[[Case], None]] = {}
