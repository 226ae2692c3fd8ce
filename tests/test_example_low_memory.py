"""The example of training in less memory does what its README says."""

import json
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
PATH = Path(__file__).parents[1] / "examples/low_memory.py"


def test_training_in_less_memory_is_on_a_par_with_float32(tmp_path, monkeypatch):
    file = tmp_path / "figures.json"
    command = ["low_memory.py", "--smoke", "--out", str(tmp_path), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(sys, "path", [str(PATH.parent), *sys.path])
    runpy.run_path(str(PATH), run_name="__main__")
    exact, *others = json.loads(file.read_text())
    losses = {row[""]: row["training loss"] / exact["training loss"] for row in others}
    assert all(0.98 < loss < 1.02 for loss in losses.values()), losses  # to nearest parts later
    assert [row["bytes"] for row in others] == [8, 14, 10, 6, 8, 6]
    assert (tmp_path / "low_memory.png").stat().st_size > 10_000
