"""The main example: its data, its command, and a kill in the middle of a run."""

import importlib
import json
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
np = pytest.importorskip("numpy")

FOLDER = Path(__file__).parents[1] / "examples" / "meta_learning"
MODULES = ("glyphs", "omniglot", "runner", "options", "report", "maml")
SMALL = ["--rows", "maml", "--meta-steps", "40", "--eval-tasks", "6", "--steps", "2"]


@pytest.fixture(scope="module")
def example() -> SimpleNamespace:
    """The example's modules, which import each other by bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        return SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


@pytest.fixture(scope="module")
def characters(example: SimpleNamespace):
    return example.glyphs.load()


def test_the_fonts_share_the_characters_that_the_example_counts_on(example):
    glyphs = example.glyphs
    files = glyphs.font_files()
    letters = glyphs.shared_letters(files)
    counts = {
        script: sum(glyphs.of_script(letters, (script,)))
        for script in (*glyphs.TRAIN, *glyphs.VALIDATION, *glyphs.TEST)
    }
    assert (len(files), len(letters)) == (12, 653)
    assert counts == {
        "LATIN": 294, "CYRILLIC": 136, "DIGIT": 10, "GREEK": 69, "ARMENIAN": 77, "GEORGIAN": 43,
    }  # fmt: skip


def test_no_class_looks_like_another_of_its_own_or_another_set(example, characters):
    glyphs = example.glyphs
    sets = np.concatenate([characters.train, characters.validation, characters.test])
    alike = glyphs.similarity(sets, sets) > glyphs.LOOK_ALIKE
    assert (alike == np.eye(len(sets), dtype=bool)).all()


def test_no_test_class_looks_like_a_rotated_training_character(example, characters):
    glyphs = example.glyphs
    rotated = glyphs.rotations(characters.train)
    assert (glyphs.similarity(characters.test, rotated) <= glyphs.LOOK_ALIKE).all()


def test_look_alikes_and_symmetric_rotations_are_left_out(example):
    glyphs = example.glyphs
    images = glyphs.render("AАΑo", glyphs.font_files())  # Latin, Cyrillic and Greek A
    assert len(glyphs.distinct(images)) == 2
    assert len(glyphs.distinct(glyphs.rotations(images[3:]))) == 1
    assert len(glyphs.distinct(images[:1], seen=images[1:2])) == 0


def options(**changes) -> Namespace:
    return Namespace(**{"ways": 5, "shots": 1, "queries": 11, "steps": 2, "seed": 0} | changes)


def test_a_task_has_distinct_classes_and_distinct_writers(example):
    # Class c as drawn by writer w is an image of the value 12 c + w.
    numbers = np.arange(20 * 12, dtype=np.uint8).reshape(20, 12, 1, 1)
    tasks = example.maml.sample_tasks(numbers, 3, options(), 0)
    x = (np.concatenate([tasks.support_x, tasks.query_x], axis=1) * 255).round().astype(int)
    y = np.concatenate([tasks.support_y, tasks.query_y], axis=1)
    for images, labels in zip(x.reshape(3, -1), y, strict=True):
        assert len(set(images)) == 5 * 12
        assert len({(image // 12, label) for image, label in zip(images, labels, strict=True)}) == 5


def test_tasks_depend_on_the_seed_alone(example, characters):
    sample = example.maml.sample_tasks
    first, again, other = (sample(characters.train, 2, options(), 0, s) for s in (1, 1, 2))
    assert first.support_x.equal(again.support_x)
    assert not first.support_x.equal(other.support_x)


def command(out: Path, *arguments: str) -> list[str]:
    json_file = str(out.with_suffix(".json"))
    files = ["--out", str(out), "--json", json_file]
    return [sys.executable, str(FOLDER / "maml.py"), *SMALL, *files, *arguments]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of a small run."""
    out = tmp_path_factory.mktemp("maml") / "unbroken"
    done = subprocess.run(command(out), capture_output=True, text=True, check=True, timeout=300)
    assert done.stderr == ""
    return out, done.stdout


def test_a_run_ends_with_a_table_figures_and_a_picture(unbroken):
    out, printed = unbroken
    figures = json.loads(out.with_suffix(".json").read_text())["rows"]["maml"]
    assert f"{figures['accuracy']:.1%} ± {100 * figures['interval']:.1f}" in printed
    assert list(figures["curve"]) == [str(step) for step in range(0, 41, 4)]
    assert (out / "maml.png").read_bytes().startswith(b"\x89PNG")
    assert str(out / "maml.png") in printed


def test_a_killed_run_resumes_to_the_same_figures(unbroken, tmp_path):
    out = tmp_path / "killed"
    code = f"import runner, maml; maml.main()"
    ...


def test_resuming_with_other_options_is_refused(unbroken):
    out, _ = unbroken
    ...
