"""What each optimizer can do, and torch.optim's beside it: two tables, by experiment.

    python tests/feature_table.py           prints them
    python tests/feature_table.py --write   puts them into docs/optimizers.md

No cell is typed by hand. Ours are checks of the conformance kit and, of the classes, a run that
changes library halfway. torch.optim's are the same questions put to its classes, whose derivatives
are compared with central differences of themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from diffopt import optim
from diffopt.testing import CHECKS
from registry import PAIRS, REGISTRY

PAGE = Path(__file__).parents[1] / "docs" / "optimizers.md"
ROWS = {
    "SGD": "sgd-momentum",
    "Adam": "adam-amsgrad",
    "AdamW": "adamw-amsgrad",
    "Adamax": "adamax",
    "NAdam": "nadam",
    "RAdam": "radam",
    "RMSprop": "rmsprop-centered-momentum",
    "Adagrad": "adagrad-numbers",
    "Adadelta": "adadelta-numbers",
    "ASGD": "asgd",
    "Rprop": "rprop",
    "Adafactor": "adafactor-eps1",
    "Muon": "muon-precise",
    "SparseAdam": "sparse-adam-masked",
    "LBFGS": "lbfgs",
}
"""A row of the registry that sets every hyperparameter."""
FLAGS: dict[str, dict[str, Any]] = {"LBFGS": {"max_iter": 1}}
PAIRS = {**PAIRS, "eps": ("eps1", "eps2")}
KERNELS = ["_fused_sgd_", "_fused_adam_", "_fused_adamw_", "_fused_adagrad_"]
STEPS = 6
START = torch.tensor([[1.0, -0.5], [0.25, 0.75]], dtype=torch.float64)
TARGET = torch.tensor([[0.3, -0.2], [0.7, -0.6]], dtype=torch.float64)
WEIGHTS = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)
YES, NO, NONE = "yes", "no", "–"


def passes(check: Callable[[], Any]) -> bool:
    try:
        check()
    except Exception:  # of any kind: the property does not hold
        return False
    return True


def says(check: Callable[[], Any]) -> str:
    return YES if passes(check) else NO


def assert_close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


# Ours


@functools.cache
def checked(name: str, row: str) -> str:
    """The answer of a check of the conformance kit."""
    return says(lambda: CHECKS[name](REGISTRY[ROWS[row]]))


def our_derivatives(row: str) -> str:
    """Of both orders, by the numbers, the start, gradients and state: one check has it all."""
    return f"all {len(arguments(row))}" if checked("derivatives", row) == YES else NO


def our_foreach(row: str) -> str:
    case = REGISTRY[ROWS[row]]
    if not getattr(case.optimizer, "batchable", False):
        return NONE

    def end(execution: str) -> Any:
        optimizer: Any = dataclasses.replace(case.optimizer, execution=execution)
        params, state = [START, TARGET], optimizer.init([START, TARGET])
        for _ in range(STEPS):
            params, state = optimizer.update(params, [2 * p for p in params], state, case.record())
        return params, state

    return says(lambda: assert_close(end("foreach"), end("leaf")))


def our_kernel(row: str) -> str:
    """Whether a step in place calls a fused kernel of torch."""
    optimizer, record = REGISTRY[ROWS[row]].optimizer, REGISTRY[ROWS[row]].record()
    params = [START.clone()]
    state = optimizer.init(params)
    with contextlib.ExitStack() as stack:
        spies = [mock.patch.object(torch, k, side_effect=getattr(torch, k)) for k in KERNELS]
        entered = [stack.enter_context(spy) for spy in spies]
        for _ in range(2):  # the first step of some is not the kernel's
            optimizer.update_(params, [START], state, record)
    return YES if any(spy.called for spy in entered) else NONE


def our_compiled_kernel(row: str) -> str:
    """Whether one compiled kernel does a step in place, with the same result."""
    case = REGISTRY[ROWS[row]]
    if not getattr(case.optimizer, "elementwise", False):
        return NONE

    def end(execution: str) -> Any:
        optimizer: Any = dataclasses.replace(case.optimizer, execution=execution)
        params = [START.clone(), TARGET.clone()]
        state = optimizer.init(params)
        for _ in range(3):
            optimizer.update_(params, [2 * p for p in params], state, case.record())
        return params, state

    def same() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="torch.compile")
            assert_close(end("compiled"), end("leaf"))

    return says(same)


def our_interchange(row: str) -> str:
    """A run that changes library halfway, either way, ends where an unbroken one does."""

    def halfway(first: Any, second: Any) -> torch.Tensor:
        p = START.clone().requires_grad_()
        before, after = (make(library, row, p, plain(row)) for library in (first, second))
        for optimizer in (before, after):
            for _ in range(2):
                advance(optimizer, row, p)
            after.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return p.detach()

    def both() -> None:
        unbroken = halfway(torch.optim, torch.optim)
        assert_close(halfway(optim, torch.optim), unbroken)
        assert_close(halfway(torch.optim, optim), unbroken)

    return says(both)


# torch.optim's


def plain(row: str) -> dict[str, Any]:
    return dict(REGISTRY[ROWS[row]].hparams)


def make(library: Any, row: str, p: torch.Tensor, numbers: dict[str, Any], **flags: Any) -> Any:
    """A class of a library, for numbers named as ours are."""
    numbers = {**FLAGS.get(row, {}), **numbers}
    for pair, fields in PAIRS.items():
        if fields[0] in numbers:
            numbers[pair] = tuple(numbers.pop(field) for field in fields)
    return getattr(library, row)([p], **numbers, **flags)


def advance(optimizer: Any, row: str, p: torch.Tensor, *, dead: bool = False) -> None:
    """One step; with `dead`, one coordinate's gradient is always zero."""
    influence = torch.ones_like(START)
    influence[1, 1] = 0.0 if dead else 1.0
    unrolled = p.grad_fn is not None
    at = p.clone() if unrolled else p  # a step overwrites what the loss has saved
    loss = (((at - TARGET).square() + 0.1 * at**4) * influence).sum()
    (p.grad,) = torch.autograd.grad(loss, p, create_graph=unrolled)
    if row == "SparseAdam":
        p.grad = p.grad.to_sparse()
    optimizer.step(*[lambda: loss.detach()] * (row == "LBFGS"))


def arguments(row: str) -> dict[str, float]:
    """What derivatives are taken by: the start, along a line, and every number."""
    return {"start": 0.0, **plain(row)}


def end(row: str, argument: str, x: Any, *, dead: bool = False) -> torch.Tensor:
    """Where some steps of torch's differentiable class end, as a function of one argument.

    Without weight decay, unless it is by that that one differentiates: it makes more of them fail.
    """
    numbers = {k: v for k, v in plain(row).items() if k != "weight_decay" or k == argument}
    if argument != "start":
        numbers[argument] = x
    if isinstance(x, torch.Tensor):  # pairs must be both numbers or both tensors
        for fields in PAIRS.values():
            if argument in fields:
                numbers |= {k: torch.as_tensor(numbers[k], dtype=START.dtype) for k in fields}
    p = START.clone().requires_grad_().clone()
    if argument == "start":
        p = p + x * WEIGHTS
    optimizer = make(torch.optim, row, p, numbers, differentiable=True)
    for _ in range(STEPS):
        advance(optimizer, row, p, dead=dead)
    return (p * WEIGHTS).sum()


def first(row: str, argument: str, x: float, **settings: Any) -> torch.Tensor | None:
    at = torch.tensor(x, dtype=START.dtype, requires_grad=True)
    value = end(row, argument, at, **settings)
    return torch.autograd.grad(value, at, allow_unused=True, create_graph=True)[0]


def second(row: str, argument: str, x: float) -> torch.Tensor | None:
    at = torch.tensor(x, dtype=START.dtype, requires_grad=True)
    value = end(row, argument, at)
    (slope,) = torch.autograd.grad(value, at, allow_unused=True, create_graph=True)
    if slope is None or not slope.requires_grad:
        return None
    return torch.autograd.grad(slope, at, allow_unused=True)[0]


def verdict(
    derive: Callable[[], torch.Tensor | None], function: Callable[[float], Any], x: float
) -> str:
    """How a derivative compares with the central difference of a function."""
    try:
        found = derive()
    except TypeError as error:
        return "no flag" if "differentiable" in str(error) else "raises"
    except Exception:  # of any kind
        return "raises"
    width = 1e-4 * abs(x) or 1e-5
    true = float((function(x + width) - function(x - width)) / (2 * width))
    if found is None:
        return "right" if abs(true) < 1e-9 else "none"
    if not found.isfinite():
        return "NaN"
    return "right" if abs(float(found) - true) < 1e-5 * max(1.0, abs(true)) else "wrong"


def summary(verdicts: dict[str, str]) -> str:
    """Such as "3 of 5; raises: eps; none: lr"."""
    right = [argument for argument, said in verdicts.items() if said == "right"]
    if len(right) == len(verdicts):
        return f"all {len(right)}"
    kinds = sorted({said for said in verdicts.values() if said != "right"})
    if not right and len(kinds) == 1:
        return kinds[0]
    failed = [f"{kind}: {', '.join(a for a, v in verdicts.items() if v == kind)}" for kind in kinds]
    return "; ".join([f"{len(right)} of {len(verdicts)}", *failed])


@functools.cache
def first_verdicts(row: str) -> dict[str, str]:
    return {
        argument: verdict(
            functools.partial(first, row, argument, x), functools.partial(end, row, argument), x
        )
        for argument, x in arguments(row).items()
    }


def torch_derivatives(row: str) -> str:
    return summary(first_verdicts(row))


def right_ones(row: str) -> dict[str, float]:
    return {a: x for a, x in arguments(row).items() if first_verdicts(row)[a] == "right"}


def torch_second(row: str) -> str:
    """By those whose first derivative is right."""
    said = {
        argument: verdict(
            functools.partial(second, row, argument, x),
            lambda y, argument=argument: first(row, argument, y) or 0.0,
            x,
        )
        for argument, x in right_ones(row).items()
    }
    return summary(said) if said else NONE


def torch_zero(row: str) -> str:
    """By those whose derivative is right elsewhere."""
    found = [first(row, argument, x, dead=True) for argument, x in right_ones(row).items()]
    if not found:
        return NONE
    return YES if all(x is None or x.isfinite() for x in found) else "NaN"


def torch_vmap(row: str) -> str:
    """Steps from several starts at once."""
    starts = torch.tensor([0.0, 0.1], dtype=START.dtype)
    function = functools.partial(end, row, "start")
    if not passes(lambda: function(starts[0])):
        return NONE
    return says(
        lambda: assert_close(torch.vmap(function)(starts), torch.stack(list(map(function, starts))))
    )


def torch_compile(row: str) -> str:
    """A step, with graph breaks too, and a meta-gradient."""

    def compiled(function: Any, *, whole: bool) -> Any:
        torch.compiler.reset()
        return torch.compile(function, backend="aot_eager", fullgraph=whole)

    def meta_gradient() -> None:
        derive = torch.func.grad(functools.partial(end, row, "start"))
        x = torch.zeros((), dtype=START.dtype)
        assert_close(compiled(derive, whole=True)(x), derive(x))

    def step() -> None:
        ends = []
        for run in (functools.partial(compiled, whole=False), lambda function: function):
            p = START.clone().requires_grad_()
            optimizer = make(torch.optim, row, p, plain(row))
            p.grad = TARGET.to_sparse() if row == "SparseAdam" else TARGET.clone()
            act = run(lambda optimizer=optimizer: optimizer.step(*[lambda: 0.0] * (row == "LBFGS")))
            for _ in range(STEPS):
                act()
            ends.append(p.detach())
        assert_close(*ends)

    try:
        if passes(meta_gradient):
            return YES
        step()
        return "step only"
    except AssertionError:
        return "step only, wrong"
    except Exception:  # of any kind
        return NO
    finally:
        torch.compiler.reset()


def torch_flag(flag: str, row: str) -> str:
    """Whether the class has the flag, and the same values with it."""
    ends = []
    for flags in ({}, {flag: True}):
        p = START.clone().requires_grad_()
        try:
            optimizer = make(torch.optim, row, p, plain(row), **flags)
        except TypeError:
            return NONE
        for _ in range(STEPS):
            advance(optimizer, row, p)
        ends.append(p.detach())
    return says(lambda: assert_close(*ends))


def torch_pure(row: str) -> str:
    """Whether a step leaves its arguments alone."""
    p = START.clone().requires_grad_()
    advance(make(torch.optim, row, p, plain(row)), row, p)
    return YES if torch.equal(p, START) else NO


# The page

Columns = dict[str, Callable[[str], str]]
OURS: Columns = {
    "pure": functools.partial(checked, "pure"),
    "derivatives": our_derivatives,
    "second derivatives": our_derivatives,
    "zero gradients": functools.partial(checked, "zero_gradient"),
    "vmap": functools.partial(checked, "vmap"),
    "compile": functools.partial(checked, "compiled"),
}
OUR_KERNELS: Columns = {
    "foreach": our_foreach,
    "fused kernel": our_kernel,
    "compiled kernel": our_compiled_kernel,
    "checkpoints": our_interchange,
}
THEIRS: Columns = {
    "pure": torch_pure,
    "derivatives": torch_derivatives,
    "second derivatives": torch_second,
    "zero gradients": torch_zero,
    "vmap": torch_vmap,
}
THEIR_KERNELS: Columns = {
    "compile": torch_compile,
    "foreach": functools.partial(torch_flag, "foreach"),
    "fused kernel": functools.partial(torch_flag, "fused"),
}
TABLES = {
    "diffopt": OURS,
    "diffopt, kernels": OUR_KERNELS,
    "torch.optim": THEIRS,
    "torch.optim, kernels": THEIR_KERNELS,
}
CHECKED = ["derivatives", "second derivatives", "zero gradients", "compile"]
SLOW = ["compiled kernel"]
"""Of ours, what test_conformance.py asserts of every row, and what takes long."""


def cell(table: str, row: str, column: str) -> str:
    """The answer of one experiment."""
    torch.set_default_dtype(torch.float64)  # that of the scalars in torch's states
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return TABLES[table][column](row)
    finally:
        torch.set_default_dtype(torch.float32)


def written(page: str, table: str) -> dict[tuple[str, str], str]:
    """The cells of a table of the page, by row and column."""
    _, rest = page.split(f"<!-- {table}: begin -->\n")
    header, _, *lines = rest.split(f"<!-- {table}: end -->")[0].strip().splitlines()
    names = split(header)
    rows = map(split, lines)
    return {(row[0], names[k]): row[k] for row in rows for k in range(1, len(names))}


def split(line: str) -> list[str]:
    return [entry.strip() for entry in line.strip("|").split("|")]


def generated(table: str) -> str:
    columns = list(TABLES[table])
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(cell(table, row, column) for column in columns)] for row in ROWS]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put them into docs/optimizers.md")
    write = parser.parse_args().write
    page = PAGE.read_text(encoding="utf-8")
    for table in TABLES:
        begin, end_ = (f"<!-- {table}: {word} -->\n" for word in ("begin", "end"))
        before, rest = page.split(begin)
        page = before + begin + generated(table) + end_ + rest.split(end_)[1]
        print(page.split(begin)[1].split(end_)[0])
    before, rest = page.split("<!-- version: begin -->")
    version = ".".join(torch.__version__.split(".")[:2])
    page = (
        before + f"<!-- version: begin -->{version}" + rest[rest.index("<!-- version: end -->") :]
    )
    if write:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
