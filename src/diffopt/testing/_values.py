"""Checks of values: against a reference, numbers against tensors, and half precision."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Generator
from typing import Any

import torch

from diffopt import _tree
from diffopt._rule import hyper
from diffopt._tree import Tree
from diffopt.testing._assertions import finite, same
from diffopt.testing._case import (
    Case,
    Point,
    as_dtype,
    generic_point,
    random_tensor,
    run_steps,
    twice,
)

DECAYS = ("weight_decay", "lambd")  # fields that move params without a gradient
MANY = 400  # steps: bfloat16 cannot count beyond 256
PARITY = {  # relative tolerance to the reference after some steps
    torch.float64: 1e-12,
    torch.complex128: 1e-12,
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
}


def parity(case: Case) -> None:
    """`update` and `update_` agree with the reference for six steps."""
    if case.reference is None:
        return
    for dtype in [dtype for dtype in case.dtypes if dtype in PARITY]:
        start = [random_tensor(shape, dtype, i) for i, shape in enumerate(case.shapes)]
        theirs, pure, in_place = _tree.clone(start), _tree.clone(start), _tree.clone(start)
        with default_dtype(dtype.to_real()):
            reference = case.reference(theirs)
        record = case.record()
        state, state_ = case.optimizer.init(pure), case.optimizer.init(in_place)
        for step in range(6):
            grads = [random_tensor(p.shape, dtype, 10 * step + i) for i, p in enumerate(start)]
            for tensor, grad in zip(theirs, grads, strict=True):
                tensor.grad = grad.clone()
            with default_dtype(dtype.to_real()):
                reference.step()
            pure, state = case.optimizer.update(pure, grads, state, record)
            case.optimizer.update_(in_place, grads, state_, record)
        same(pure, theirs, "params", rtol=PARITY[dtype])
        same(in_place, theirs, "params", rtol=PARITY[dtype])


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Generator[None]:
    """A default dtype, in which torch keeps some scalars of its states."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def numbers(case: Case) -> None:
    """A number and a 0-d tensor as hyperparameter have the same effect, up to float64 rounding."""
    point = generic_point(case)
    numbers = point._replace(
        hparams=_tree.map(lambda x: x.item() if x.dim() == 0 else x, point.hparams)
    )
    same(run_steps(case, point), run_steps(case, numbers), "result", rtol=1e-12)


def half_step(case: Case) -> None:
    """A step in half precision is a float32 step, rounded at the end."""
    for dtype, seed in itertools.product(halves(case), range(5)):
        point = generic_point(case, seed, dtype)
        params, grads = as_dtype(torch.float32, (point.params, point.grads))
        expected, _ = case.optimizer.update(params, grads, point.state, point.hparams)
        new, _ = case.optimizer.update(*point)
        same(new, as_dtype(dtype, expected), "params", rtol=1e-5)


def half_zero_gradient(case: Case) -> None:
    """Zero gradients do not change half-precision params, and keep the state finite."""
    hparams = hyper.map_fields(lambda f, v: 0.0 if f.name in DECAYS else v, case.record())
    for dtype in halves(case):
        params = generic_point(case, dtype=dtype).params
        zeros, state = _tree.map(torch.zeros_like, params), case.optimizer.init(params)
        new_params, new_state = twice(case.optimizer, Point(params, zeros, state, hparams))
        finite(new_state, "state")
        same(new_params, params, "params", rtol=0)


def half_long_run(case: Case) -> None:
    """After many steps in bfloat16 the count is right and the params are close to float32's."""
    if torch.bfloat16 not in case.dtypes:
        return
    params, state = long_run(case, torch.bfloat16)
    expected, expected_state = long_run(case, torch.float32)
    for path, step in step_counts(state, "state"):
        if step != MANY:
            raise AssertionError(f"{path} is {step} after {MANY} steps")
    same(state, expected_state, "state", rtol=0.1, atol=0.1)
    same(as_dtype(torch.float32, params), expected, "params", rtol=0.1, atol=0.1)


def step_counts(state: Any, name: str) -> list[tuple[str, Any]]:
    """The outermost `step` of a state, or of each part of a composition's state."""
    if hasattr(state, "step"):
        return [(f"{name}.step", state.step)]
    if isinstance(state, dict):
        children = [(f"{name}[{key!r}]", child) for key, child in state.items()]
    else:
        parts = state if type(state) is tuple else ()
        children = [(f"{name}[{i}]", child) for i, child in enumerate(parts)]
    return [count for path, child in children for count in step_counts(child, path)]


def long_run(case: Case, dtype: torch.dtype) -> tuple[Tree, Any]:
    params, grads, _, _ = generic_point(case, dtype=dtype)
    state, hparams = case.optimizer.init(params), case.record()
    for step in range(MANY):
        wave = _tree.map(functools.partial(torch.mul, math.sin(step)), grads)
        case.optimizer.update_(params, wave, state, hparams)
    return params, state


def halves(case: Case) -> list[torch.dtype]:
    return [dtype for dtype in case.dtypes if dtype in (torch.float16, torch.bfloat16)]
