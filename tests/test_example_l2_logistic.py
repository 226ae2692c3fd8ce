"""The example of tuned penalties does what its README says."""

import json
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("sklearn")
PATH = Path(__file__).parents[1] / "examples/hyperparameters/l2_logistic.py"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tuned_penalties_beat_untuned_ones(seed, tmp_path, monkeypatch):
    file = tmp_path / "figures.json"
    command = ["l2_logistic.py", "--seed", str(seed), "--out", str(tmp_path), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(PATH), run_name="__main__")
    figures = json.loads(file.read_text())
    tuned = figures.pop("30 tuned penalties")
    assert set(figures) == {"no penalty", "one penalty, untuned"}
    for untuned in figures.values():
        assert tuned["validation_loss"] < 0.8 * untuned["validation_loss"]
        assert tuned["test_loss"] < untuned["test_loss"]
    assert (tmp_path / "penalties.png").stat().st_size > 10_000
