"""Set-up for every test: pages as tests, and hypothesis without randomness."""

import contextlib
import functools
import gc
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

collect_ignore = ["tests/typing"]  # for type checkers: its mistakes are meant


class Printing(PythonEvaluator):
    """Runs a block, and keeps what it prints."""

    def __call__(self, example: Example) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            super().__call__(example)
        example.namespace["__printed__"] = printed.getvalue()


def _compare(example: Example) -> str | None:
    """What is wrong with a `text` block: it must show what the block of Python before it prints."""
    shown, printed = example.parsed.strip(), example.namespace["__printed__"].strip()
    return None if shown == printed else f"the page shows\n{shown}\nbut its code prints\n{printed}"


_blocks = Sybil(parsers=[CodeBlockParser("python", Printing()), CodeBlockParser("text", _compare)])


class Page(pytest.File):
    """A Markdown page: one test, since its blocks share a namespace and need their order."""

    def collect(self) -> Iterator[pytest.Item]:
        if any(_blocks.parse(self.path)):
            yield Blocks.from_parent(self, name="python")


class Blocks(pytest.Item):
    """The `python` blocks of a page, and the `text` blocks that show what they print."""

    def runtest(self) -> None:
        for block in _blocks.parse(self.path):
            block.evaluate()

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        excinfo.traceback = excinfo.traceback.cut(path=self.path)
        return super().repr_failure(excinfo, style)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> Page | None:
    return Page.from_parent(parent, path=file_path) if file_path.suffix == ".md" else None


gc.set_threshold(10_000)  # modules, tests and traces of torch.compile keep many objects


def pytest_collection_finish() -> None:
    """Leave modules and tests out of collections of garbage."""
    gc.freeze()


@functools.cache
def _instructions() -> Any:
    """torch's function, with a cache of any size."""
    from torch._dynamo import bytecode_transformation

    return functools.cache(bytecode_transformation._cached_cleaned_instructions.__wrapped__)


@pytest.fixture
def frugal(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the kit: leave out what torch does beside what is asserted, half of the time."""
    # For 0-d float64 arguments torch.compile traces everything twice, in case their `item()` is
    # in the graph, which no rule calls. test_compiles_for_real keeps both traces.
    tensorify = "torch.fx.passes._tensorify_python_scalars._is_tensorify_enabled"
    monkeypatch.setattr(tensorify, lambda: False, raising=False)
    # torch keeps the instructions of the last 128 functions, fewer than it traces for some rows.
    instructions = "torch._dynamo.bytecode_transformation._cached_cleaned_instructions"
    monkeypatch.setattr(instructions, _instructions())
    # Anomaly mode formats the Python stack of every operation, for a warning beside its error.
    monkeypatch.setattr("torch.fx.traceback.format_stack", list)
