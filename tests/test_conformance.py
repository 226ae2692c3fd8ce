"""Every optimizer of the registry passes every check of the conformance kit."""

import dataclasses
import itertools
import os
import shutil
from collections import defaultdict

import pytest
import torch

from diffopt.testing import CHECKS
from registry import COMPOSITIONS, PAIRS, REGISTRY, SKIPPED, VARIANTS

ROWS = REGISTRY | COMPOSITIONS
STRUCTURE = {"ns_steps"}  # numbers in torch's classes that are flags here


QUICK = {"parity", "derivatives", "vmap", "no_gradient", "in_place", "prefix", "errors"}


def cases():
    """Each row with each check; those of `QUICK` with one row of each optimizer are quick."""
    for row, check in itertools.product(ROWS, CHECKS):
        if check not in SKIPPED.get(row, ()):
            quick = check in QUICK and row in REGISTRY.keys() - VARIANTS
            yield pytest.param(row, check, marks=() if quick else pytest.mark.thorough)


@pytest.mark.usefixtures("frugal")
@pytest.mark.parametrize(("row", "check"), list(cases()))
def test_conforms(row, check):
    CHECKS[check](ROWS[row])


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler"
)
@pytest.mark.parametrize("row", ["sgd-momentum", "adam-amsgrad"])
def test_compiles_for_real(row, monkeypatch):
    monkeypatch.delenv("TENSORIFY_PYTHON_SCALARS", raising=False)  # as for users, see the Makefile
    CHECKS["compiled"](dataclasses.replace(REGISTRY[row], backend="inductor"))


def numbers_of(optimizer):
    """The names of the numeric arguments of a torch optimizer, pairs taken apart as ours are."""
    defaults = dict(optimizer.defaults)
    for pair, fields in {**PAIRS, "eps": ("eps1", "eps2")}.items():
        if isinstance(defaults.get(pair), tuple):
            defaults |= dict(zip(fields, defaults.pop(pair), strict=True))
    return {name for name, value in defaults.items() if type(value) in (int, float)} - STRUCTURE


def test_every_number_of_torchs_classes_is_a_hyperparameter():
    numbers, fields = defaultdict(set), defaultdict(set)
    for case in filter(lambda case: case.reference, REGISTRY.values()):
        optimizer = case.reference([torch.zeros(case.shapes[0])])
        numbers[type(optimizer)] |= numbers_of(optimizer)
        fields[type(optimizer)] |= {field.name for field in dataclasses.fields(case.record())}
    assert fields == numbers


def test_some_row_sets_every_hyperparameter():
    for optimizer_class in {type(case.record()) for case in REGISTRY.values()}:
        rows = [case for case in REGISTRY.values() if type(case.record()) is optimizer_class]
        fields = {field.name for field in dataclasses.fields(optimizer_class)}
        assert any(set(case.hparams) == fields for case in rows), optimizer_class


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("params", [{}, [], {"a": (), "b": [{}]}], ids=str)
def test_a_tree_without_tensors_is_updated_too(row, params):
    optimizer, record = ROWS[row].optimizer, ROWS[row].record()
    state = optimizer.init(params)
    for _ in range(2):
        new, state = optimizer.update(params, params, state, record)
        optimizer.update_(params, params, state, record)
        assert new == params
    assert row in COMPOSITIONS or state.step == 4
