"""The benchmark suite: its programs agree with its references, and whoever is wrong is named."""

import functools
import json

import pytest

pytest.importorskip("rich")
pytest.importorskip("suite", reason="there are no benchmarks here")

import bench
import render
from suite import WORKLOADS
from suite.process import Contestant, Setting
from suite.workload import Peer, mapped

OWN = [
    (workload, name)
    for workload, of in WORKLOADS.items()
    for name, peer in of.peers.items()
    if name.startswith(("by hand", "diffopt")) and not peer.compiles
]


def setting(workload):
    return Setting(workload, 1, "cpu", smoke=True)


@functools.cache
def truths(workload):
    reference = Contestant(setting(workload), None, "float64")
    return [reference.result(which) for which in range(2)]


def judged(workload, contestant):
    results = [contestant.result(which) for which in range(2)]
    tolerance = WORKLOADS[workload].tolerance
    return bench.judged({"results": results, "first": 0.0}, truths(workload), tolerance)


@pytest.mark.parametrize(("workload", "name"), OWN, ids=[": ".join(own) for own in OWN])
def test_programs_agree_with_the_reference_on_both_problems(workload, name):
    found = judged(workload, Contestant(setting(workload), name))
    assert found["agrees"], found
    assert "right" in bench.verdict(found)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_program_is_named_and_its_time_marked(monkeypatch, factor):
    peers = WORKLOADS["sine_maml"].peers

    def make(steps):
        right = peers["diffopt"].make(steps)
        return lambda *problem: mapped(lambda x: factor * x, right(*problem))

    monkeypatch.setitem(peers, "wrong", Peer(make, "torch", False))
    found = judged("sine_maml", Contestant(setting("sine_maml"), "wrong"))
    assert not found["agrees"]
    assert "DISAGREES" in bench.verdict(found)
    assert "wrong" in render.ratio(found | {"min": 1.0}, 1.0)


def test_the_page_shows_the_recorded_figures():
    blocks = json.loads(render.FIGURES.read_text(encoding="utf-8"))
    page = render.PAGE.read_text(encoding="utf-8")
    parts = render.tables(blocks)
    assert all(text in page for text in parts.values())
    assert render.filled(page, parts) == page


@pytest.mark.slow
def test_a_process_that_dies_is_named_and_the_others_are_timed(tmp_path, monkeypatch):
    file, ask = tmp_path / "figures.json", bench.Remote.ask

    def dies(remote, what, minutes):
        if remote.names == ("diffopt, vmap",):
            remote.process.kill()
            remote.process.join()
        return ask(remote, what, minutes)

    monkeypatch.setattr(bench.Remote, "ask", dies)
    options = ["--smoke", "--only", "sine_maml", "--peers", "diffopt, vmap", "--skip", "compile"]
    options += ["flatten", "--threads", "1", "--rounds", "1", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["bench.py", *options])
    bench.main()
    (block,) = json.loads(file.read_text(encoding="utf-8"))
    assert list(block["peers"]) == ["by hand", "diffopt, vmap"]
    found, dead = block["peers"].values()
    assert dead == {"failed": "the process died"}
    assert found["agrees"]
    assert 0 < found["min"] <= found["median"]
    assert found["peak"] > 0
    assert found["graphs"] == 0
