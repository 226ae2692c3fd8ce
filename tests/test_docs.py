"""The site: an entry for every public name, no broken link, and pages that a browser shows."""

import ast
import functools
import http.server
import importlib
import json
import re
import shutil
import subprocess
import threading
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest
import torch

import diffopt

ROOT = Path(__file__).parents[1]
if not (ROOT / "mkdocs.yml").exists():
    pytest.skip("there are no pages here", allow_module_level=True)

BROWSERS = "chromium", "chromium-browser", "chromium-headless-shell", "google-chrome"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    build = pytest.importorskip("mkdocs.commands.build")
    config = importlib.import_module("mkdocs.config")
    folder = tmp_path_factory.mktemp("site")
    build.build(config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


def public(module):
    """The names of a module that are this package's, submodules apart, and their entries.

    An entry under another name, such as `cosine` for `Cosine`, will do.
    """
    members = vars(importlib.import_module(module))
    for name, value in members.items():
        home = str(getattr(value, "__module__", ""))
        if home.startswith("diffopt") and not name.startswith("_"):
            same = [other for other in members if members[other] is value]
            yield name, {f"{place}.{n}" for place in (module, home, "diffopt") for n in same}


class Page(HTMLParser):
    """The anchors of a page, and what it refers to."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.references = {""}, set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        name = {"a": "href", "link": "href", "img": "src", "script": "src"}.get(tag)
        if name in given:
            self.references.add(given[name])


def test_every_public_name_has_an_entry(site):
    pages = {path.name: Page(path) for path in (site / "api").glob("*.html")}
    anchors = set().union(*(page.anchors for page in pages.values()))
    titles = [(site / "api" / name).read_text(encoding="utf-8") for name in pages]
    modules = [name for text in titles for name in re.findall(r"<h1[^>]*>(diffopt[.\w]*)", text)]
    assert {"diffopt", "diffopt.transforms"} < set(modules)
    absent = [
        f"{module}.{name}"
        for module in modules
        for name, entries in public(module)
        if not anchors & entries
    ]
    assert absent == []


def test_no_heading_is_a_path_that_cannot_be_imported(site):
    headings = [
        (path.name, name)
        for path in (site / "api").glob("*.html")
        for name in re.findall(r"doc-object-name[^>]*>(diffopt[.\w]*)<", path.read_text("utf-8"))
    ]
    assert headings
    assert [place for place in headings if not _leads_somewhere(place[1])] == []


def _leads_somewhere(path):
    try:
        return functools.reduce(getattr, path.split(".")[1:], diffopt) is not None
    except AttributeError:
        return False


def test_no_link_anchor_or_image_is_broken(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    broken = [
        f"{path.relative_to(site)}: {reference}"
        for path, page in pages.items()
        for reference in page.references
        if not re.match(r"https?:|mailto:|data:|javascript:", reference) and path.name != "404.html"
        if not _arrives(path, reference, pages)
    ]
    assert broken == []


def _arrives(path, reference, pages):
    url, anchor = urldefrag(urljoin(path.as_uri(), reference))
    target = Path(unquote(url.removeprefix("file://").partition("?")[0]))
    known = pages.get(target)
    return target.exists() and (known is None or unquote(anchor) in known.anchors)


def test_no_text_of_a_docstring_is_taken_for_a_tag_or_a_quotation(site):
    tags = {True: set(), False: {"b", "h4", "small"}}
    for path in site.rglob("*.html"):
        tags[path.parent.name == "api"] |= {*re.findall(r"<(\w+)", path.read_text("utf-8"))}
    assert tags[True] - tags[False] == set()


def test_what_is_returned_has_a_type_and_not_the_beginning_of_a_sentence(site):
    returned = re.compile(r'(?:Returns|Yields):</span>.*?field-body">(.*?)–', re.DOTALL)
    text = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    types = [re.sub(r"<[^>]*>|\s+", " ", found).strip() for found in returned.findall(text)]
    assert len(types) > 20
    assert [kind for kind in types if re.search("[a-z] [a-z]", kind)] == []


def test_formulas_are_rendered(site):
    texts = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert texts[site / "formulas.html"].count('display="block"') > 12
    unrendered = re.compile(r"```math|\$`|<mi>&<|<mi>\\\\")
    assert [path.name for path, text in texts.items() if unrendered.search(text)] == []


def test_lines_break_in_long_names_but_not_in_blocks(site):
    text = (site / "debugging.html").read_text(encoding="utf-8")
    blocks = re.findall(r"<pre.*?</pre>", text, re.DOTALL)
    assert any("set_detect" in line and "<wbr>" in line for line in text.splitlines())
    assert not any("<wbr>" in block for block in blocks)


@pytest.mark.parametrize("word", ["BatchNorm", "exploding", "TorchOpt", "DDP"])
def test_the_search_finds_what_users_look_for(site, word):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert any(word in entry["title"] + entry["text"] for entry in index["docs"])


def test_every_message_that_troubleshooting_explains_is_one_of_ours():
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    table = page[: page.index("## No error, but")]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if " | " in line]
    messages = [row for row in rows if row != "message" and not row.startswith("|-")]
    assert len(messages) > 20
    said = "\n".join(_texts(path) for path in (ROOT / "src").rglob("*.py"))
    assert [message for message in messages if message not in said] == []


def _texts(path):
    """All strings of a module, of f-strings the parts that are constant."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    texts = [ast.unparse(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)]
    return "\n".join(texts)


def _minimized(loss, **changes):
    opt = diffopt.sgd()
    given = {"optimizer": opt, "hparams": opt.hparams(lr=0.1), "steps": 1} | changes
    return diffopt.minimize(loss, torch.ones(2, requires_grad=True), **given).params.sum()


def _called(layer, x):
    model = diffopt.nn.functionalize(layer)
    return model(model.params, *([model.buffers] if model.buffers else []), x)


def _mapped(layer):
    return torch.vmap(functools.partial(_called, layer))(torch.ones(3, 4, 2))


def _twice():
    value = _minimized(lambda w: w.pow(2).sum())
    value.backward()
    value.backward()


OF_OTHERS = {
    "missing 1 required positional argument": lambda: _minimized(lambda w, buffers: w.sum()),
    "positional arguments but": lambda: _minimized(
        lambda w, batch: w.sum(), steps=None, batches=[(1.0, 2.0)]
    ),
    "'tuple' object has no attribute": lambda: torch.nn.functional.mse_loss(
        _called(torch.nn.BatchNorm1d(2), torch.ones(3, 2)), torch.ones(3, 2)
    ),
    "Batch norm got a batched tensor": lambda: _mapped(torch.nn.BatchNorm1d(2)),
    "while in randomness error mode": lambda: _mapped(
        torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    ),
    "element 0 of tensors does not require grad": lambda: _minimized(
        lambda w: w.pow(2).sum(), adjoint=None
    ).backward(),
    "backward through the graph a second time": _twice,
}


@pytest.mark.parametrize("message", OF_OTHERS)
def test_messages_of_python_and_torch_are_as_troubleshooting_says(message):
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    assert f"| {message} |" in page[page.index("## Messages of Python and torch") :]
    with pytest.raises((AttributeError, TypeError, RuntimeError, ValueError), match=message):
        OF_OTHERS[message]()


# Loads one page of the site after the other into a frame as large as the window, lets it run for
# half a second, and writes down its color scheme and by how much it is wider than the frame.
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><script>
async function show(page) {
    const frame = document.createElement("iframe")
    frame.style = "border: 0; width: 100vw; height: 100vh"
    frame.src = page
    await new Promise(loaded => { frame.onload = loaded; document.body.append(frame) })
    await new Promise(passed => setTimeout(passed, 500))
    const { documentElement: root, body } = frame.contentDocument
    const tooWide = root.scrollWidth - root.clientWidth
    document.body.append(`\\n${page}: ${body.dataset.mdColorScheme}, ${tooWide} too wide`)
    frame.remove()
}
onload = async () => { for (const page of PAGES) await show(page) }
</script><body>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def address(site):
    pages = [str(path.relative_to(site)) for path in site.rglob("*.html")]
    (site / "frame.html").write_text(FRAME.replace("PAGES", json.dumps(pages)), encoding="utf-8")
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield pages, f"http://127.0.0.1:{server.server_port}/frame.html"
        server.shutdown()
    (site / "frame.html").unlink()


@pytest.mark.slow
@pytest.mark.parametrize(("size", "scheme"), [("1280,900", "default"), ("390,800", "slate")])
def test_a_browser_shows_pages_without_complaint_or_overflow(address, size, scheme):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium here: 'apt-get install chromium-headless-shell' brings one")
    pages, url = address
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--window-size={size}", "--virtual-time-budget=100000", "--dump-dom"]
    command += ["--blink-settings=preferredColorScheme=0"] * (scheme == "slate")
    done = subprocess.run([*command, url], capture_output=True, text=True, timeout=300, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    for page in pages:
        assert f"\n{page}: {scheme}, 0 too wide" in done.stdout


def test_the_version_is_the_same_everywhere():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    (cited,) = re.findall(r"^version: (.+)$", citation, re.MULTILINE)
    assert diffopt.__version__ == pyproject["project"]["version"] == cited
