"""The command line."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import glyphs
import omniglot
from glyphs import Characters
from runner import write_whole

WITHOUT_EFFECT_ON_FIGURES = ("rows", "order", "root", "out", "json", "resume", "smoke")
SMOKE = {"steps": 2, "meta_steps": 40, "eval_tasks": 6}


def parse(rows: list[str]) -> tuple[argparse.Namespace, Characters]:
    """The options and the characters they ask for; ends with a message where they do not fit."""
    parser = make_parser(rows)
    if parser.parse_args().smoke:
        parser.set_defaults(**SMOKE)
    options = parser.parse_args()
    if options.json and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        parser.error(f"--json {options.json}: not a file in an existing folder")
    if options.data == "omniglot" and options.root is None:
        parser.error("--data omniglot needs --root DIR, the folder that holds omniglot-py")
    characters = glyphs.load() if options.data == "glyphs" else omniglot.load(options.root)
    check_sizes(parser, options, characters)
    return options, characters


def make_parser(rows: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Few-shot character recognition by MAML, through diffopt.minimize.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--ways", type=at_least(2), default=5, help="classes in a task")
    add("--shots", type=at_least(1), default=1, help="labelled samples of each class")
    add("--queries", type=at_least(1), default=5, help="samples of each class to recognise")
    add("--steps", type=at_least(1), default=5, help="steps of the inner loop")
    add("--order", choices=["first", "second", "both"], default="both", help="MAML of which order")
    add("--rows", nargs="+", metavar="ROW", choices=rows, default=rows, help="rows of the table")
    add("--meta-steps", type=at_least(1), default=300, help="steps of the outer loop")
    add("--eval-tasks", type=at_least(2), default=400, help="held-out tasks behind each figure")
    add("--seed", type=at_least(0), default=0, help="of initialisation and training tasks")
    add("--data", choices=["glyphs", "omniglot"], default="glyphs", help="fonts, or real Omniglot")
    add("--root", metavar="DIR", help="where torchvision put Omniglot")
    add("--smoke", action="store_true", help="few and short steps, to see that it runs")
    add("--out", type=Path, metavar="DIR", default=Path("runs/maml"), help="folder for results")
    add("--json", type=Path, metavar="FILE", help="write the final figures there, too")
    add("--device", default="cpu", help="where to compute, such as cuda")
    add("--compile", action="store_true", help="compile the steps of meta-training")
    add("--resume", action="store_true", help="go on with the run in --out where it was killed")
    return parser


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: whole numbers from `least` on."""

    def parse_number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, not {text!r}")
        return int(text)

    return parse_number


def check_sizes(
    parser: argparse.ArgumentParser, options: argparse.Namespace, characters: Characters
) -> None:
    """A task needs distinct classes, and distinct writers for all samples of a class."""
    classes = min(len(characters.train), len(characters.validation), len(characters.test))
    if options.ways > classes:
        parser.error(f"--ways {options.ways}: the smallest set has only {classes} classes")
    writers = characters.train.shape[1]
    if options.shots + options.queries > writers:
        parser.error(
            f"--shots {options.shots} and --queries {options.queries} make"
            f" {options.shots + options.queries} samples of a class, which has only {writers}"
        )


def open_run(options: argparse.Namespace, checkpoints: list[Path]) -> None:
    """Make the output folder; go on with the run in it, or clear that away."""
    record, run = options.out / "options.json", of_run(options)
    if options.resume and record.exists():
        refuse_other_options(json.loads(record.read_text()), run, options.out)
        return
    if options.resume:
        print(f"nothing to resume in {options.out}: starting from the beginning")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for old in (record, *checkpoints):
            old.unlink(missing_ok=True)
        write_whole(record, lambda path: path.write_text(json.dumps(run, indent=2) + "\n"))
    except OSError as error:
        raise SystemExit(f"cannot write to --out: {error}") from None


def of_run(options: argparse.Namespace) -> dict[str, object]:
    """The options that a row's figures depend on."""
    return {k: v for k, v in vars(options).items() if k not in WITHOUT_EFFECT_ON_FIGURES}


def refuse_other_options(old: dict, new: dict, folder: Path) -> None:
    other = [f"--{k.replace('_', '-')} {old.get(k)}" for k in new if new[k] != old.get(k)]
    if other:
        raise SystemExit(f"cannot resume: the run in {folder} has {', '.join(other)}")
