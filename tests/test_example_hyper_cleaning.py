"""The example that finds wrong labels: its data, its command and what it reaches."""

import functools
import importlib
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

for package in ("matplotlib", "mlxtend", "rich", "sklearn"):
    pytest.importorskip(package)

FOLDER = Path(__file__).parents[1] / "examples" / "hyperparameters"


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    """The example's modules, which import each other by bare names."""
    names = ("noisy_digits", "hyper_cleaning")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER.parent)
        patch.syspath_prepend(FOLDER)
        modules = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
        digits = modules.noisy_digits
        patch.setattr(digits, "mnist_data", functools.cache(digits.mnist_data))  # it parses text
        yield modules


@pytest.fixture(scope="module")
def data(example):
    return example.noisy_digits.load(3000, 500, wrong_labels=1200, seed=0)


@pytest.fixture(scope="module")
def small_run(example, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("hyper_cleaning")
    files = ["--out", str(out), "--json", str(out / "figures.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hyper_cleaning.py", "--smoke", *files])
        runpy.run_path(str(FOLDER / "hyper_cleaning.py"), run_name="__main__")
    rows = json.loads((out / "figures.json").read_text())
    return SimpleNamespace(out=out, rows={row["trained on"]: row for row in rows})


def test_learned_weights_beat_equal_weights_on_the_test_set(small_run):
    test = {title: row["test"] for title, row in small_run.rows.items()}
    assert test["all labels, learned weights"] > test["all labels"] + 0.005


def test_learned_weights_tell_wrong_labels_from_correct_ones(small_run):
    found = small_run.rows["all labels, learned weights"]
    assert found["area under ROC"] > 0.9
    assert found["precision"] > 0.9
    assert found["recall"] > 0.8


def test_a_run_ends_with_a_picture(small_run):
    assert (small_run.out / "hyper_cleaning.png").stat().st_size > 10_000


def test_the_weights_gradient_is_that_of_the_unrolled_loop(example, data):
    logits = torch.zeros(len(data.train.y), requires_grad=True)
    method = example.hyper_cleaning

    def gradient(adjoint):
        params = method.train(data.train, logits.sigmoid(), 5, adjoint)
        answers = method.predict(params, data.validation.x)
        loss = torch.nn.functional.cross_entropy(answers, data.validation.y)
        return torch.autograd.grad(loss, logits)[0]

    expected = gradient(method.diffopt.adjoint.Unrolled())
    torch.testing.assert_close(gradient(method.Checkpointed()), expected, rtol=1e-4, atol=1e-9)


def test_only_labels_of_the_training_set_are_wrong_and_as_many_as_asked(example, data):
    clean = example.noisy_digits.load(3000, 500, wrong_labels=0, seed=0)
    assert int(data.wrong.sum()) == 1200
    assert (data.train.y != clean.train.y).equal(data.wrong)
    assert data.train.x.equal(clean.train.x)
    assert data.validation.y.equal(clean.validation.y)
    assert data.test.y.equal(clean.test.y)
    assert [len(part.y) for part in (data.train, data.validation, data.test)] == [3000, 500, 1500]


def test_a_gradient_points_to_its_own_orientation(example):
    ramp = torch.arange(28.0).expand(1, 28, 28)  # brighter to the right
    strength = example.noisy_digits.oriented_gradients(ramp).reshape(8, -1).sum(1)
    assert strength.argmax() == 0
    assert strength[3:6].max() < 1e-6 * strength[0]
