"""Checks that wrong arguments are rejected, and of the messages."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import _tree
from diffopt._rule import hyper
from diffopt._rule.leafwise import Leafwise
from diffopt.testing._assertions import Snapshot
from diffopt.testing._case import Case, Point, generic_point


class Wrong(NamedTuple):
    """Arguments to reject: what is wrong, the arguments, the error, and words of its message."""

    what: str
    changes: dict[str, Any]
    error: type[Exception]
    says: tuple[str, ...]


def errors(case: Case) -> None:
    """Wrong arguments raise, with a message that says what is wrong where, and change nothing."""
    point = generic_point(case)
    update, update_ = case.optimizer.update, case.optimizer.update_
    for wrong in (*wrong_params(point), *wrong_grads(point)):
        refuse((update, update_), point, wrong)
    if isinstance(case.optimizer, Leafwise):
        for wrong in (*wrong_state(point), *wrong_hparams(point)):
            refuse((update, update_), point, wrong)
    for wrong in waiting(point):
        refuse((update_,), point, wrong)
    for maker, wrong in wrong_numbers(case):
        raises(functools.partial(maker, **wrong.changes), wrong)


def refuse(calls: Iterable[Callable[..., object]], point: Point, wrong: Wrong) -> None:
    """Each call raises and does not change its arguments."""
    point = _tree.clone(point)._replace(**wrong.changes)
    before = Snapshot(point)
    for call in calls:
        raises(functools.partial(call, *point), wrong)
        before.check()


def raises(call: Callable[[], object], wrong: Wrong) -> None:
    try:
        call()
    except Exception as error:
        missing = [text for text in wrong.says if text not in str(error)]
        if not isinstance(error, wrong.error) or missing:
            raise AssertionError(
                f"{wrong.what} must raise a {wrong.error.__name__} that says {list(wrong.says)}, "
                f"but raised {error!r}"
            ) from error
    else:
        raise AssertionError(f"{wrong.what} raised no {wrong.error.__name__}")


def wrong_params(point: Point) -> Iterator[Wrong]:
    rest, tied = "params['rest'][0]", torch.zeros_like(point.params["first"])
    for what, changes, error, says in (
        ("a number", {"rest": [2.0]}, TypeError, (rest, "2.0")),
        ("None", {"rest": [None]}, TypeError, (rest, "None")),
        (
            "a tied tensor",
            {"first": tied, "rest": [tied]},
            ValueError,
            ("params['first']", rest, "same tensor"),
        ),
    ):
        yield Wrong(f"params with {what}", {"params": {**point.params, **changes}}, error, says)


def wrong_grads(point: Point) -> Iterator[Wrong]:
    first, rest = point.grads["first"], point.grads["rest"]
    path, theirs = "grads['first']", "params['first']"
    longer = torch.zeros(7, *first.shape, dtype=first.dtype)
    for what, grads, says in (
        ("a list for a dict", [first, rest], ("grads", "list", "dict")),
        ("a missing key", {"rest": rest}, (path, "missing")),
        ("an extra key", {**point.grads, "more": first}, ("grads['more']",)),
        ("a list for a tensor", {**point.grads, "first": [first]}, (path, "list")),
        ("a tensor for a list", {**point.grads, "rest": first}, ("grads['rest']",)),
    ):
        yield Wrong(f"grads with {what}", {"grads": grads}, ValueError, says)
    for what, grad, error, says in (
        ("a number", 1.5, TypeError, ("1.5",)),
        ("other shapes", longer, ValueError, (theirs, *map(_shape, (longer, first)))),
        ("another dtype", first.float(), ValueError, (theirs, "float32", "float64")),
        ("another device", first.to("meta"), ValueError, (theirs, "meta", "cpu")),
    ):
        grads = {"first": grad, "rest": rest}
        yield Wrong(f"grads with {what}", {"grads": grads}, error, (path, *says))


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def wrong_state(point: Point) -> Iterator[Wrong]:
    state = point.state
    yield Wrong("a tuple as state", {"state": tuple(state)}, TypeError, ("state", "tuple"))
    for name in [name for name in state._fields[1:] if getattr(state, name) != ()]:
        tree, path = getattr(state, name), f"state.{name}['first']"
        longer = torch.zeros(7, *tree["first"].shape, dtype=torch.float64)
        for what, field, error, says in (
            ("no tensor", {**tree, "first": 1.5}, TypeError, "1.5"),
            ("a missing key", {"rest": tree["rest"]}, ValueError, "missing"),
            ("another shape", {**tree, "first": longer}, ValueError, _shape(longer)),
        ):
            changes = {"state": state._replace(**{name: field})}
            yield Wrong(f"state.{name} with {what}", changes, error, (path, says))


def wrong_hparams(point: Point) -> Iterator[Wrong]:
    yield Wrong("a dict as hparams", {"hparams": {"lr": 0.1}}, TypeError, ("hparams", "dict"))
    shape = (7, *point.params["first"].shape)
    for field in [f for f in hyper.FIELDS[type(point.hparams)] if f.per_parameter]:
        path = f"hparams.{field.name}"
        for what, value, says in (
            ("no prefix", {"nope": torch.tensor(0.1)}, (path, "prefix", "params")),
            ("a shape that is too long", torch.ones(shape), (path, str(shape), "params['first']")),
        ):
            hparams = dataclasses.replace(point.hparams, **{field.name: value})
            yield Wrong(f"{path} with {what}", {"hparams": hparams}, ValueError, says)


def waiting(point: Point) -> Iterator[Wrong]:
    """Arguments that require a gradient, which an update in place would lose."""
    for name in ("grads", "hparams"):
        tree = _tree.map(lambda x: x.requires_grad_(), _tree.clone(getattr(point, name)))
        if _tree.leaves(tree):
            what = f"update_ with {name} that require a gradient"
            says = (_tree.paths(tree, name)[0], "requires a gradient")
            yield Wrong(what, {name: tree}, ValueError, says)


def wrong_numbers(case: Case) -> Iterator[tuple[Callable[..., object], Wrong]]:
    """Makers of records (`optimizer.hparams` or that of a part), with arguments to be rejected."""
    whole = case.record()
    for record in hyper.records(whole):
        alone = record is whole
        maker = case.optimizer.hparams if alone else type(record)
        given = case.hparams if alone and isinstance(case.hparams, Mapping) else {}
        for field in hyper.FIELDS[type(record)]:
            path = f"hparams.{field.name}"
            text = {**given, field.name: "0.1"}
            yield maker, Wrong(f"{path} as text", text, TypeError, (path, "'0.1'"))
            beyond = {"ge": -1.0, "gt": 0.0, "le": 1.0, "lt": 0.0}
            for kind, bound in field.bounds.items():
                if bound is not None:
                    bad = bound + beyond[kind]
                    says = (path, str(bad), str(bound))
                    wrong = {**given, field.name: bad}
                    yield maker, Wrong(f"{path} out of range", wrong, ValueError, says)
