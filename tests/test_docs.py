"""The API page has an entry for every public name."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "mkdocs.yml").exists():
    pytest.skip("there are no pages here", allow_module_level=True)

# Where a submodule has the same name, the entry is that of its member.
PLACES = "{0}.{1}", "{0}.{1}.{1}", "diffopt.{1}"


def public(module):
    """The names of a module that are this package's, submodules apart."""
    for name, value in vars(importlib.import_module(module)).items():
        ours = str(getattr(value, "__module__", "")).startswith("diffopt")
        if ours and not name.startswith("_"):
            yield name


def test_every_public_name_has_an_entry(tmp_path):
    build = pytest.importorskip("mkdocs.commands.build")
    config = importlib.import_module("mkdocs.config")
    build.build(config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))
    page = (tmp_path / "api.html").read_text(encoding="utf-8")
    anchors = set(re.findall(r'\bid="([\w.]+)"', page))
    modules = re.findall(r"<h2[^>]*>(diffopt[.\w]*)", page)
    assert {"diffopt", "diffopt.transforms"} < set(modules)
    absent = [
        f"{module}.{name}"
        for module in modules
        for name in public(module)
        if not anchors & {place.format(module, name) for place in PLACES}
    ]
    assert absent == []
