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
    *others, tuned = json.loads(file.read_text())
    assert [row["regression"] for row in others] == ["no penalty", "one penalty, untuned"]
    for untuned in others:
        assert tuned["validation loss"] < 0.8 * untuned["validation loss"]
        assert tuned["test loss"] < untuned["test loss"]
    assert (tmp_path / "l2_logistic.png").stat().st_size > 10_000
