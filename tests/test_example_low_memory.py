"""The example of training in less memory does what its README says."""

import json
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
PATH = Path(__file__).parents[1] / "examples/low_memory/digits.py"


def test_training_in_less_memory_is_on_a_par_with_float32(tmp_path, monkeypatch):
    file = tmp_path / "figures.json"
    command = ["digits.py", "--seeds", "0", "--epochs", "2"]
    command += ["--out", str(tmp_path), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(PATH), run_name="__main__")
    figures = {name: runs[0] for name, runs in json.loads(file.read_text()).items()}
    exact = figures.pop("float32")["course"]
    losses = {name: run["course"][-1] / exact[-1] for name, run in figures.items()}
    assert all(0.98 < loss < 1.02 for loss in losses.values()), losses  # to nearest parts later
    assert [round(run["bytes"]) for run in figures.values()] == [8, 14, 10, 6, 8, 6]
    assert (tmp_path / "losses.png").stat().st_size > 10_000
