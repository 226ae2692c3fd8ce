"""The main example: its data, its command, and a kill in the middle of a run."""

import importlib
import io
import json
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.ft2font import FT2Font

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

FOLDER = Path(__file__).parents[1] / "examples" / "meta_learning"
MODULES = ("glyphs", "omniglot", "runner", "options", "report", "maml")
SMALL = ["--smoke", "--rows", "maml"]


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
    shared = set.intersection(*(set(FT2Font(str(file)).get_charmap()) for file in files))
    assert (len(files), len(shared), len(letters)) == (12, 2383, 653)
    assert counts == {
        "LATIN": 294, "CYRILLIC": 136, "DIGIT": 10, "GREEK": 69, "ARMENIAN": 77, "GEORGIAN": 43,
    }  # fmt: skip


def test_no_class_looks_like_another_of_its_own_or_another_set(example, characters):
    glyphs = example.glyphs
    sets = np.concatenate([characters.train, characters.validation, characters.test])
    alike = glyphs.similarity(sets, sets) > glyphs.LOOK_ALIKE
    assert (alike == np.eye(len(sets), dtype=bool)).all()


def test_no_held_out_class_looks_like_a_turned_training_character(example, characters):
    glyphs = example.glyphs
    held_out = np.concatenate([characters.validation, characters.test])
    turned = glyphs.rotations(characters.train)
    assert (glyphs.similarity(held_out, turned) <= glyphs.LOOK_ALIKE).all()


@pytest.mark.parametrize("alike", ["AАΑ", "Ss", "nп", "OОΟՕ"])
def test_look_alikes_are_one_class(example, alike):
    images = example.glyphs.render(alike, example.glyphs.font_files())
    assert len(example.glyphs.distinct(images)) == 1
    assert len(example.glyphs.distinct(images[1:], seen=images[:1])) == 0


@pytest.mark.parametrize("pair", ["69", "nu", "bq", "dp", "oo", "XX"])
def test_half_turns_are_one_class(example, pair):
    images = example.glyphs.render(pair, example.glyphs.font_files())
    images[1] = np.rot90(images[1], 2, axes=(1, 2))
    assert len(example.glyphs.distinct(images)) == 1


@pytest.mark.parametrize("letter", "oOX0")
def test_a_symmetric_character_is_not_turned_by_a_quarter(example, characters, letter):
    glyphs = example.glyphs
    images = np.rot90(glyphs.render(letter, glyphs.font_files()), axes=(2, 3))
    assert not (characters.train == images).all(axis=(1, 2, 3)).any()


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


def test_tasks_are_on_the_default_device(example, characters):
    with torch.device("meta"):
        tasks = example.maml.sample_tasks(characters.train, 2, options(), 0)
    assert {part.device.type for part in tasks} == {"meta"}


def command(out: Path, *arguments: str) -> list[str]:
    files = ["--out", str(out), "--json", str(out.with_suffix(".json"))]
    return [sys.executable, str(FOLDER / "maml.py"), *SMALL, *files, *arguments]


@pytest.fixture(scope="module")
def complete(example, characters):
    """Runs the example, whose rows have processes of their own; returns what it prints."""

    def complete(out: Path, *arguments: str) -> str:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
            patch.syspath_prepend(FOLDER)  # these processes import it, too
            patch.setattr(example.glyphs, "load", lambda: characters)
            patch.setattr(sys, "argv", command(out, *arguments)[1:])
            example.maml.main()
        return printed.getvalue()

    return complete


@pytest.fixture(scope="module")
def unbroken(complete, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a small run."""
    out = tmp_path_factory.mktemp("maml") / "unbroken"
    return out, complete(out)


def test_a_run_ends_with_a_table_figures_and_a_picture(unbroken):
    out, printed = unbroken
    row = json.loads(out.with_suffix(".json").read_text())["rows"]["maml"]
    assert f"{row['accuracy']:.1%} ± {100 * row['interval']:.1f}" in printed
    assert list(row["curve"]) == [str(step) for step in range(0, 41, 4)]
    assert (out / "maml.png").read_bytes().startswith(b"\x89PNG")
    assert str(out / "maml.png") in printed.replace("\n", "")


def test_a_killed_run_resumes_to_the_same_figures(complete, unbroken, tmp_path, capfd):
    out = tmp_path / "killed"
    kill_in_the_middle(out)
    saved = torch.load(out / "maml.pt", weights_only=True)
    assert saved["step"] < 40
    complete(out, "--resume")
    assert capfd.readouterr().err == ""
    expected = unbroken[0].with_suffix(".json").read_bytes()
    assert out.with_suffix(".json").read_bytes() == expected


def kill_in_the_middle(out: Path) -> None:
    """Kill a run by SIGKILL as soon as it has written a checkpoint."""
    run = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (out / "maml.pt").exists():
            assert run.poll() is None
            time.sleep(0.02)
    finally:
        run.kill()
        run.wait()


def parse(example: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Namespace:
    monkeypatch.setattr(sys, "argv", ["maml.py", *arguments])
    return example.options.parse(list(example.maml.ROWS))[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ways", "200"], "--ways 200: the smallest set has only "),
        (["--ways", "1"], "argument --ways: must be a whole number >= 2, not '1'"),
        (["--shots", "8"], "make 13 samples of a class, which has only 12"),
        (["--steps", "0"], "argument --steps: must be a whole number >= 1, not '0'"),
        (["--seed", "-1"], "argument --seed: must be a whole number >= 0, not '-1'"),
        (["--json", "no/such/folder/file"], "not a file in an existing folder"),
        (["--data", "omniglot"], "--data omniglot needs --root DIR"),
    ],
)
def test_a_bad_option_is_named(example, characters, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(example.glyphs, "load", lambda: characters)
    with pytest.raises(SystemExit, match="2"):
        parse(example, monkeypatch, *arguments)
    assert message in capsys.readouterr().err


def test_an_order_without_rows_is_refused(example, characters, monkeypatch):
    monkeypatch.setattr(example.glyphs, "load", lambda: characters)
    given = parse(example, monkeypatch, "--order", "first", "--rows", "maml")
    with pytest.raises(SystemExit, match="--order first leaves none of --rows maml"):
        example.maml.chosen_rows(given)


def test_the_order_chooses_rows(example, characters, monkeypatch):
    monkeypatch.setattr(example.glyphs, "load", lambda: characters)
    first = example.maml.chosen_rows(parse(example, monkeypatch, "--order", "first"))
    second = example.maml.chosen_rows(parse(example, monkeypatch, "--order", "second"))
    assert first == ["untrained", "scratch", "first-order"]
    assert second == ["untrained", "scratch", "maml", "maml-rates"]


def test_resuming_with_other_options_is_refused(example, characters, monkeypatch, tmp_path):
    monkeypatch.setattr(example.glyphs, "load", lambda: characters)
    where = ["--out", str(tmp_path)]
    example.options.open_run(parse(example, monkeypatch, *where), [])
    other = parse(example, monkeypatch, *where, "--resume", "--shots", "2", "--seed", "7")
    with pytest.raises(SystemExit, match=r"cannot resume: .* has --shots 1, --seed 0"):
        example.options.open_run(other, [])


def test_a_fresh_run_clears_its_own_checkpoints_only(example, characters, monkeypatch, tmp_path):
    monkeypatch.setattr(example.glyphs, "load", lambda: characters)
    own, foreign = tmp_path / "maml.pt", tmp_path / "mine.pt"
    own.touch()
    foreign.touch()
    example.options.open_run(parse(example, monkeypatch, "--out", str(tmp_path)), [own])
    assert not own.exists()
    assert foreign.exists()


def use_torchvision(monkeypatch: pytest.MonkeyPatch, omniglot: Any) -> None:
    datasets = SimpleNamespace(Omniglot=omniglot)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=datasets))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)


def test_omniglot_without_torchvision_says_so(example, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(SystemExit, match="needs torchvision: pip install torchvision"):
        example.omniglot.load("somewhere")


def test_omniglot_without_its_files_says_so(example, monkeypatch):
    def missing(root: str, background: bool, transform: Any) -> None:
        raise RuntimeError("Dataset not found or corrupted.")

    use_torchvision(monkeypatch, missing)
    with pytest.raises(SystemExit, match=r"no Omniglot under somewhere: .*download=True"):
        example.omniglot.load("somewhere")


def test_omniglot_becomes_arrays_like_the_glyphs(example, monkeypatch):
    """A stand-in for torchvision.datasets.Omniglot: black ink on white, sorted by class."""

    def stand_in(root: str, background: bool, transform: Any) -> list[tuple[Any, int]]:
        paper = Image.new("1", (105, 105), 1)
        paper.paste(0, (0, 0, 50, 50))
        classes = 102 if background else 3
        return [(transform(paper), label) for label in range(classes) for _ in range(20)]

    use_torchvision(monkeypatch, stand_in)
    train, validation, test, _ = example.omniglot.load("somewhere")
    assert [len(train), len(validation), len(test)] == [8, 100, 3]
    assert train.shape[1:] == (20, 28, 28)
    assert train.dtype == np.uint8
    assert (train[0, 0, 0, 0], train[0, 0, -1, -1]) == (255, 0)


@pytest.mark.parametrize("pixels", [14, 28])
def test_the_network_fits_glyphs_and_omniglot(example, pixels):
    learner = example.maml.Learner(example.maml.ROWS["maml"], options(), pixels)
    answers = learner.answers(
        torch.rand(5, 1, pixels, pixels), torch.arange(5), torch.rand(7, 1, pixels, pixels)
    )
    assert answers.shape == (7,)


def test_compiled_steps_give_the_same_meta_gradient(example, characters):
    maml, small = example.maml, options(queries=1)
    learner = maml.Learner(maml.ROWS["maml"], small, characters.train.shape[-1])
    tasks = maml.sample_tasks(characters.train, 2, small, 0)
    found = []
    for learner.compiled in (False, {"backend": "eager"}):
        loss = maml.meta_loss(learner, tasks, maml.Unrolled())
        found.append(torch.autograd.grad(loss, [*learner.network.parameters()]))
    torch.testing.assert_close(*found)
