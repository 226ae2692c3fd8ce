"""The conformance kit: everything an optimizer must satisfy, even your own, in one call.

Import it in tests only: it requires hypothesis (`pip install 'torch-diffopt[testing]'`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from diffopt import _tree
from diffopt._tree import Tree
from diffopt.optimizer import Optimizer
from diffopt.testing import _derivatives, _errors, _transforms, _trees, _values
from diffopt.testing._case import DTYPES, SHAPES, Case as Case, Reference


def check(
    optimizer: Optimizer[Any, Any],
    *,
    hparams: Mapping[str, Any] | tuple[Any, ...] | None = None,
    reference: Reference | None = None,
    skip: Collection[str] = (),
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    backend: str = "aot_eager",
    elementwise: bool = False,
    frozen: Callable[[Tree], Tree] | None = None,
) -> None:
    """Run every check of `CHECKS` on an optimizer.

    Args:
        optimizer: the `Optimizer` to check, of any kind.
        hparams: keyword arguments of `optimizer.hparams`: generic numbers, such as `lr=0.1`, and
            trees for hyperparameters that belong to no single parameter, such as the weights of a
            learned optimizer. A tuple holds positional arguments: the records of a composition's
            parts.
        reference: creates an optimizer that must compute the same values, for a list of tensors:
            `lambda tensors: torch.optim.SGD(tensors, lr=0.1)`. None skips the comparison.
        skip: the names of checks to skip.
        shapes: shapes of tensors that it can update; the first two must not be empty.
        dtypes: dtypes of tensors that it can update; float64 must be among them.
        backend: the backend of `torch.compile`; "inductor" to compile for real.
        elementwise: whether each element depends only on its own gradient; then more is checked. A
            `Leafwise` optimizer is assumed to be elementwise if it is batchable.
        frozen: `params -> tree of bools`: which tensors it never updates.

    Raises:
        AssertionError: a check failed; the message begins with the check's name, and a note says
            what it checks.
        TypeError: an argument is not of its kind.
        ValueError: `skip` has a name that is not a check, there are fewer than two shapes, float64
            is not among the dtypes, or a hyperparameter is a tree like params, which the checks
            draw themselves.

    Examples:
        >>> from typing import Any, NamedTuple
        >>> import torch
        >>> from diffopt import testing
        >>> from diffopt.rules import Hyperparameter, hparams, leafwise, number
        >>> class State(NamedTuple):
        ...     step: Any
        >>> @hparams
        ... class HParams:
        ...     lr: Hyperparameter = number(default=1e-3, ge=0)
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
    _check_skip(skip)
    hparams = {} if hparams is None else hparams
    case = Case(optimizer, hparams, reference, shapes, dtypes, backend, elementwise, frozen)
    case.record()  # or its error, which is that of no check
    for name, run in CHECKS.items():
        if name not in skip:
            run(case)


def _check_skip(skip: Any) -> None:
    listed = isinstance(skip, Collection) and not isinstance(skip, (str, bytes, torch.Tensor))
    if not listed or not all(isinstance(name, str) for name in skip):
        raise TypeError(f"skip is {_tree.describe(skip)}, not a list of names of checks")
    if unknown := [name for name in skip if name not in CHECKS]:
        raise ValueError(f"skip has {unknown}, but the checks are {list(CHECKS)}")


def _named(name: str, function: Callable[[Case], None]) -> Callable[[Case], None]:
    """The check, with every failure turned into an AssertionError that begins with its name."""

    @functools.wraps(function)
    def run(case: Case) -> None:
        try:
            function(case)
        except Exception as error:
            failure = AssertionError(f"{name}: {error}")
            failure.add_note(f"{name} checks this: {inspect.getdoc(function)}")
            raise failure from error

    return run


CHECKS: Mapping[str, Callable[[Case], None]] = {
    function.__name__: _named(function.__name__, function)
    for function in (
        _trees.pure,  # first: what writes to its arguments fails the others for no visible reason
        _values.parity,
        _values.numbers,
        _values.half_step,
        _values.half_zero_gradient,
        _values.half_long_run,
        _derivatives.derivatives,
        _derivatives.derivatives_from_init,
        _derivatives.derivatives_per_weight,
        _derivatives.jvp,
        _derivatives.zero_gradient,
        _transforms.vmap,
        _transforms.compiled,
        _trees.kept,
        _trees.no_gradient,
        _trees.in_place,
        _trees.key_order,
        _trees.complex_pairs,
        _trees.prefix,
        _errors.errors,
    )
}
"""Every check by its name: a function of a `Case` that raises `AssertionError`."""
