"""Every optimizer of the registry passes every check of the conformance kit."""

import dataclasses
import os
import shutil
from collections import defaultdict

import pytest
import torch

from diffopt.testing import CHECKS
from registry import PAIRS, REGISTRY


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("row", REGISTRY)
def test_conforms(row, check):
    CHECKS[check](REGISTRY[row])


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler"
)
@pytest.mark.parametrize("row", ["sgd-momentum", "adam-amsgrad"])
def test_compiles_for_real(row):
    CHECKS["compiled"](dataclasses.replace(REGISTRY[row], backend="inductor"))


def numbers_of(reference):
    """The names of the numeric arguments of a torch optimizer, pairs taken apart as ours are."""
    defaults = dict(reference([torch.zeros(())]).defaults)
    for pair, fields in PAIRS.items():
        if pair in defaults:
            defaults |= dict(zip(fields, defaults.pop(pair), strict=True))
    return {name for name, value in defaults.items() if type(value) in (int, float)}


def test_every_number_of_torchs_classes_is_a_hyperparameter():
    numbers, fields = defaultdict(set), defaultdict(set)
    for case in REGISTRY.values():
        torch_class = type(case.reference([torch.zeros(())]))
        numbers[torch_class] |= numbers_of(case.reference)
        fields[torch_class] |= {field.name for field in dataclasses.fields(case.record())}
    assert fields == numbers


def test_some_row_sets_every_hyperparameter():
    for optimizer_class in {type(case.record()) for case in REGISTRY.values()}:
        rows = [case for case in REGISTRY.values() if type(case.record()) is optimizer_class]
        fields = {field.name for field in dataclasses.fields(optimizer_class)}
        assert any(set(case.hparams) == fields for case in rows), optimizer_class


@pytest.mark.parametrize("row", REGISTRY)
@pytest.mark.parametrize("params", [{}, [], {"a": (), "b": [{}]}], ids=str)
def test_a_tree_without_tensors_is_updated_too(row, params):
    optimizer, record = REGISTRY[row].optimizer, REGISTRY[row].record()
    state = optimizer.init(params)
    for _ in range(2):
        new, state = optimizer.update(params, params, state, record)
        optimizer.update_(params, params, state, record)
        assert new == params
    assert state.step == 4
