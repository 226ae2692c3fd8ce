"""The examples run, and write their table, their picture and their figures."""

import json
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("sklearn")
FOLDER = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs(name, tmp_path, monkeypatch):
    file = tmp_path / "figures.json"
    options = ["--smoke", "--out", str(tmp_path), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    monkeypatch.syspath_prepend(str(FOLDER))
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    rows = json.loads(file.read_text())
    assert len(rows) > 1
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert (tmp_path / f"{name}.png").stat().st_size > 5_000
