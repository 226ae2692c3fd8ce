"""docs/migration.md: a program for another library and the one that replaces it agree."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs/migration.md"
if not PAGE.exists():
    pytest.skip("there are no pages here", allow_module_level=True)

SETUP, *BLOCKS = re.findall(r"```py(?:thon)?\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
PAIRS = list(zip(BLOCKS[::2], BLOCKS[1::2], strict=True))


def packages(program):
    """The packages that it imports."""
    imports = (node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Import))
    return sorted({alias.name.partition(".")[0] for node in imports for alias in node.names})


def run(program):
    """The values that a program leaves, with the parameters of the module and their gradients."""
    space = {}
    exec(SETUP, space)
    before = set(space)
    exec(program, space)
    left = {name: space[name] for name in space.keys() - before}
    params = dict(space["net"].named_parameters())
    return left | {"net": params, "net.grad": {name: p.grad for name, p in params.items()}}


def numbers(value):
    """A value as numpy arrays; None if it is of another kind."""
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in numbers(value[key]) or []]
    if isinstance(value, list | tuple):
        return [x for entry in value for x in numbers(entry) or []]
    if isinstance(value, torch.Tensor):
        return [value.detach().numpy()]
    return [np.asarray(value)] if hasattr(value, "dtype") or isinstance(value, float) else None


@pytest.mark.filterwarnings("ignore")  # what other packages say
@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(*pair, id=f"{number}-{'-'.join(packages(pair[0])) or 'torch'}")
        for number, pair in enumerate(PAIRS)
    ],
)
def test_a_program_and_its_replacement_give_the_same_numbers(before, after):
    assert before.startswith("# before")
    assert after.startswith("# after")
    for package in packages(before):
        pytest.importorskip(package)
    old, new = run(before), run(after)
    results = {
        name: (numbers(old[name]), numbers(new[name]))
        for name in old.keys() & new.keys() - {"inner", "inputs", "state"}
    }
    compared = {name: pair for name, pair in results.items() if all(pair)}
    assert compared.keys() - {"x", "y"} > {"net"}
    for theirs, ours in compared.values():
        np.testing.assert_equal(len(theirs), len(ours))
        for a, b in zip(theirs, ours, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
