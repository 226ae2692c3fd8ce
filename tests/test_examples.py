"""The examples run, and write their table, their picture and their figures."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("sklearn")
FOLDER = Path(__file__).parents[1] / "examples"
APART = "common", "low_memory"  # the latter has tests of its own, as does hyper_cleaning
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in APART)
NAMES += ["hyperparameters/l2_logistic", "hyperparameters/reweighting"]


@pytest.fixture
def options(tmp_path):
    return ["--smoke", "--out", str(tmp_path), "--json", str(tmp_path / "figures.json")]


def check(name: str, out: Path) -> None:
    rows = json.loads((out / "figures.json").read_text())
    assert len(rows) > 1
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert (out / f"{name}.png").stat().st_size > 5_000


def test_every_example_says_what_it_reached_by_which_torch():
    texts = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.rglob("*.py")}
    programs = {name: text for name, text in texts.items() if "__main__" in text}
    assert len(programs) > 15
    silent = [name for name in programs if "Seed 0, torch 2." not in programs[name]]
    assert silent == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NAMES)
def test_an_example_runs(path, options, tmp_path, monkeypatch):
    file = FOLDER / f"{path}.py"
    monkeypatch.setattr(sys, "argv", [file.name, *options])
    monkeypatch.setattr(sys, "path", [str(file.parent), str(FOLDER), *sys.path])
    runpy.run_path(str(file), run_name="__main__")
    check(file.stem, tmp_path)


@pytest.fixture
def family(monkeypatch):
    pytest.importorskip("PIL")
    monkeypatch.setattr(sys, "path", [str(FOLDER / "meta_learning"), str(FOLDER), *sys.path])
    return importlib.import_module("family")


@pytest.mark.slow
def test_the_maml_family_runs(family, options, tmp_path, monkeypatch, capfd):
    """From the module, not as __main__, since it starts a process that imports it."""
    monkeypatch.setattr(sys, "argv", ["family.py", *options])
    monkeypatch.setattr(family, "WORKERS", 1)
    family.main(family.study, family.__doc__, **family.SIZES)
    assert capfd.readouterr().err == ""
    check("family", tmp_path)


@pytest.fixture
def task(family):
    """Learned parameters, and images and labels of a task."""
    torch.manual_seed(0)
    start = {name: p.detach().double() for name, p in family.model.params.items()}
    start["10.weight"] = 0.1 * torch.randn(5, 128, dtype=torch.float64)
    start = {name: p.requires_grad_() for name, p in start.items()}
    x, query_x = torch.rand(2, 10, 1, 14, 14, dtype=torch.float64)
    return start, (x, torch.arange(10) % 5, query_x, torch.arange(10) % 5)


def same_gradients(value, expected, inputs):
    grads, others = (torch.autograd.grad(v, inputs) for v in (value, expected))
    torch.testing.assert_close(grads, others, rtol=1e-8, atol=1e-10)


def test_anil_is_maml_with_rates_of_zero_below_the_head(family, task):
    start, data = task
    rates = {name: 0.1 if name.startswith("10.") else 0.0 for name in start}
    anil = family.after_adaptation(family.anil, start, None, 0.0, *data)
    expected = family.after_adaptation(family.meta_sgd, start, rates, 0.0, *data)
    same_gradients(anil, expected, [*start.values()])


def test_the_gradient_of_reptile_is_the_way_from_the_adapted_parameters(family, task):
    start, (x, y, query_x, query_y) = task
    adapted = family.descend(start, torch.cat([x, query_x]), torch.cat([y, query_y]))
    value = family.to_the_adapted(family.maml, start, None, 0.0, x, y, query_x, query_y)
    grads = torch.autograd.grad(value, [*start.values()])
    expected = [(p - adapted[name]).detach() for name, p in start.items()]
    torch.testing.assert_close(list(grads), expected)


@pytest.mark.parametrize("done", [0.0, 0.3, 0.8])
def test_the_losses_of_maml_pp_are_those_of_steps_by_hand(family, task, done):
    start, (x, y, *query) = task
    rates = {name: torch.full((5,), 0.1, requires_grad=True) for name in start}
    params, losses = start, []
    for step in range(5):
        grads = torch.autograd.grad(
            family.loss(params, x, y), [*params.values()], create_graph=True
        )
        moves = zip(params.items(), grads, strict=True)
        params = {name: p - rates[name][step] * g for (name, p), g in moves}
        losses.append(family.loss(params, *query))
    early = max(0.0, 1 - 2 * done) / 5
    expected = early * sum(losses[:-1]) + (1 - 4 * early) * losses[-1]
    value = family.after_each_step(None, start, rates, done, x, y, *query)
    same_gradients(value, expected, [*start.values(), *rates.values()])


def test_the_weights_of_reweighting_are_products_of_gradients(monkeypatch):
    pytest.importorskip("mlxtend")
    monkeypatch.setattr(sys, "path", [str(FOLDER / "hyperparameters"), str(FOLDER), *sys.path])
    example = importlib.import_module("reweighting")
    torch.manual_seed(0)
    params = {"weight": torch.randn(6, 10), "bias": torch.randn(10)}
    batch, clean = (example.Digits(torch.randn(n, 6), torch.randint(10, (n,))) for n in (8, 12))

    def gradient(digits):
        grads = torch.func.grad(example.weighted_loss)(params, digits, torch.ones(len(digits.y)))
        return torch.cat([g.flatten() for g in grads.values()])

    each = [gradient(example.Digits(x[None], y[None])) for x, y in zip(*batch, strict=True)]
    products = (torch.stack(each) @ gradient(clean)).clamp(min=0)
    weights = example.reweighted(params, batch, clean)
    torch.testing.assert_close(weights, products / products.mean())
