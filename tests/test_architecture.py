"""torch's private names stand behind one window, which says what each of them is for."""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import diffopt

SRC = Path(diffopt.__file__).parent
WINDOW = SRC / "_torch.py"
OTHERS = sorted(path for path in SRC.rglob("*.py") if path != WINDOW)
DOCUMENTED = {  # of Python's own: NamedTuple's, and sys's
    "_asdict",
    "_fields",
    "_make",
    "_replace",
    "_getframe",
}
TORCHS = {
    name for owner in (torch.Tensor, torch.nn.Module, torch.optim.Optimizer) for name in dir(owner)
}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def defined(module: ast.Module) -> Iterator[str]:
    """The private names a module defines: functions, classes, variables, fields, attributes."""
    for node in ast.walk(module):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name


OWN = {name for path in OTHERS for name in defined(tree(path))}
TEXTS = [path.read_text(encoding="utf-8") for path in OTHERS]
MODULES = {part.removesuffix(".py") for path in OTHERS for part in path.relative_to(SRC).parts}


def window_names(module: ast.Module) -> Iterator[tuple[str, bool]]:
    """What the window offers, and whether a line says what for."""
    for node, after in itertools.pairwise([*module.body, ast.Pass()]):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, bool(ast.get_docstring(node))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name, isinstance(after, ast.Expr)
            case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List(elts=names)):
                lines = WINDOW.read_text(encoding="utf-8").splitlines()
                yield from ((name.value, "#" in lines[name.lineno - 1]) for name in names)
            case ast.Assign(targets=[ast.Name(id=name)]):  # a kernel, documented as torch's
                yield name, isinstance(node.value, ast.Call) or isinstance(after, ast.Expr)


def torch_privates(module: ast.Module, own: set[str]) -> Iterator[tuple[int, str]]:
    """Line and name of what only torch can have defined: imports, attributes, names in strings."""
    for node in ast.walk(module):
        match node:
            case ast.Import(names=names):
                found = [(name.name, name.name.split(".")) for name in names]
                yield from (
                    (node.lineno, name)
                    for name, parts in found
                    if parts[0] == "torch" and any(map(private, parts))
                )
            case ast.ImportFrom(module=str(source), names=names) if source.split(".")[0] == "torch":
                parts = [*source.split("."), *(name.name for name in names)]
                yield from ((node.lineno, f"{source}: {part}") for part in parts if private(part))
            case ast.Attribute(attr=name) if private(name):
                of_torch = name in TORCHS or ast.unparse(node).startswith("torch.")
                if of_torch or name not in own | MODULES:
                    yield node.lineno, name
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=arguments):
                texts = [a.value for a in arguments[1:2] if isinstance(a, ast.Constant)]
                yield from ((node.lineno, text) for text in texts if private(text))


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(SRC)))
def test_only_the_window_names_privates_of_torch(path):
    assert list(torch_privates(tree(path), OWN)) == []


@pytest.mark.parametrize(
    ("name", "documented"), [(n, d) for n, d in window_names(tree(WINDOW)) if not n.startswith("_")]
)
def test_every_name_of_the_window_is_documented_and_used(name, documented):
    assert documented
    assert any(re.search(rf"\b_torch\.{name}\b", text) for text in TEXTS)


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "from torch._C import _functions",
        "from torch.utils import _pytree",
        "from torch import Tensor, _C as core",
        "torch._foreach_add(x, y)",
        "torch._check(x)",
        "torch.autograd.forward_ad._current_level",
        "x._version",
        "x._base",
        "getattr(x, '_local_tensor')",
        "x.grad_fn._saved_self",
    ],
)
def test_a_private_of_torch_is_found(line):
    assert list(torch_privates(ast.parse(line), OWN))


@pytest.fixture
def page():
    return (SRC.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_files_on_the_page_of_the_architecture_exist(page):
    root = SRC.parents[1]
    named = re.findall(r"`((?:\w+/)*\w+(?:\.py|/))`", page)
    assert len(named) > 20
    assert [name for name in named if not ((SRC / name).exists() or (root / name).exists())] == []


def test_names_on_the_page_of_the_architecture_are_those_of_the_code(page):
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    named = [name for name in re.findall(r"`([\w.]+)`", text) if not name.endswith((".py", ".md"))]
    words = {word for text in TEXTS for word in re.findall(r"\w+", text)} | {"pyproject", "toml"}
    assert len(named) > 40
    assert [name for name in named if not words.issuperset(name.split("."))] == []
