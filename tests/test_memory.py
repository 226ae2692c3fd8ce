"""Loops hold no more memory than they must, and give it back without the garbage collector."""

import contextlib
import gc
import weakref
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_leaves

import diffopt
from diffopt.adjoint import Checkpointed, FirstOrder, ForwardMode, Truncated, Unrolled
from diffopt.adjoint._offloaded import Offloaded

START = torch.linspace(-1, 1, 4, dtype=torch.float64)


class Census:
    """A loss that counts how many of the tensors it was ever given or made are still alive."""

    def __init__(self):
        self.born, self.died, self.counts = [], [], [0]  # Checkpointed reads plain entries fast

    def __call__(self, w, scale=1.0):
        value = (scale * w**4).sum()
        for tensor in (w, value):
            self.born.append(0)
            weakref.finalize(tensor, self.died.append, 0)
        self.counts.append(self.alive())
        return value

    @property
    def most(self):
        return max(self.counts)

    def alive(self):
        return len(self.born) - len(self.died)


@contextlib.contextmanager
def no_garbage_collector():
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def solve(loss, w=START, steps=4, adjoint=Unrolled(), lr=0.01, opt=None):  # noqa: B008
    opt = diffopt.adam() if opt is None else opt
    return diffopt.minimize(
        loss, w, optimizer=opt, hparams=opt.hparams(lr=lr), steps=steps, adjoint=adjoint
    )


@pytest.mark.parametrize("opt", [diffopt.sgd(), diffopt.adam(amsgrad=True), diffopt.rmsprop()])
@pytest.mark.parametrize("adjoint", [Unrolled(), FirstOrder(), Truncated(2), Checkpointed(), None])
def test_no_reference_cycles(adjoint, opt):
    loss, lr = Census(), torch.tensor(0.01, requires_grad=True)
    solve(Census(), adjoint=adjoint, lr=lr, opt=opt)  # torch's first mode leaves a cycle behind
    with no_garbage_collector():
        sol = solve(loss, START.clone().requires_grad_(), adjoint=adjoint, lr=lr, opt=opt)
        inner = [weakref.ref(x) for x in tree_leaves(sol)]
        if adjoint is not None:
            torch.autograd.grad(sol.params.sum(), lr, create_graph=True)
        del sol
        assert loss.born
        assert loss.alive() == 0
        assert [ref() for ref in inner] == [None] * len(inner)


def test_no_reference_cycles_under_func_transforms():
    loss, lr = Census(), torch.tensor(0.01)
    # torch's first transform in a process leaves a cycle behind, whatever is transformed.
    torch.func.grad(lambda lr: lr**2)(lr)
    with no_garbage_collector():
        torch.func.grad(lambda lr: solve(loss, lr=lr).params.sum())(lr)
        assert loss.born
        assert loss.alive() == 0


def test_an_unrolled_loop_keeps_every_step():
    loss, lr = Census(), torch.tensor(0.01, requires_grad=True)
    sol = solve(loss, lr=lr, steps=20)
    assert loss.most >= 20  # what the next tests count is there to be counted
    del sol


@pytest.mark.parametrize("adjoint", [None, Truncated(2)])
def test_evaluation_runs_1000_steps_in_flat_memory(adjoint):
    loss, lr = Census(), torch.tensor(0.01, requires_grad=True)
    with no_garbage_collector():
        sol = solve(loss, START.clone().requires_grad_(), steps=1000, adjoint=adjoint, lr=lr)
    assert len(loss.born) == 2000
    assert loss.most <= 6
    assert sol.losses.shape == (1000,)


def test_no_grad_is_flat_too():
    loss = Census()
    with no_garbage_collector(), torch.no_grad():
        solve(loss, START.clone().requires_grad_(), steps=1000)
    assert loss.most <= 6


def graph_size(tensor):
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions]
    return len(seen)


def test_graph_and_memory_stay_flat_over_100_rounds_of_meta_learning():
    """2 inner steps, a meta-update of the learning rate, detach; the inner run goes on."""
    loss, opt = Census(), diffopt.adam()
    log_lr = torch.tensor(-4.0, dtype=torch.float64, requires_grad=True)
    meta = torch.optim.SGD([log_lr], lr=1e-3)
    params, state = START.clone(), opt.init(START)
    sizes, alive, rates = [], [], []
    with no_garbage_collector():
        for _ in range(100):
            hparams = opt.hparams(lr=log_lr.exp())
            sol = diffopt.minimize(
                loss, params, optimizer=opt, hparams=hparams, steps=2, state=state
            )
            outer = loss(sol.params)
            sizes.append(graph_size(outer))
            meta.zero_grad()
            outer.backward()
            meta.step()
            params, state, hparams = diffopt.detach((sol.params, sol.state, hparams))
            del sol, outer
            alive.append(loss.alive())
            rates.append(log_lr.item())
    assert not any(leaf.requires_grad for leaf in tree_leaves((params, state, hparams.lr)))
    assert len(set(sizes[1:])) == 1
    assert len(set(alive[1:])) == 1
    assert len(set(rates)) == 100  # every meta-update moved it


def test_without_detach_the_graph_grows():
    opt, log_lr = diffopt.adam(), torch.tensor(-4.0, dtype=torch.float64, requires_grad=True)
    params, state, sizes = START, opt.init(START), []
    for _ in range(5):
        sol = diffopt.minimize(
            lambda w: (w**4).sum(),
            params,
            optimizer=opt,
            hparams=opt.hparams(lr=log_lr.exp()),
            steps=2,
            state=state,
        )
        params, state = sol.params, sol.state
        sizes.append(graph_size(params.sum()))
    assert sizes == sorted(set(sizes))


def test_detach_passes_over_what_is_no_tensor():
    tree = {"x": torch.ones(1, requires_grad=True) * 2, "name": "a", "n": 3, "none": None}
    cut = diffopt.detach(tree)
    assert not cut["x"].requires_grad
    assert tree["x"].requires_grad
    assert cut["x"].data_ptr() == tree["x"].data_ptr()
    assert (cut["name"], cut["n"], cut["none"]) == ("a", 3, None)


@pytest.mark.parametrize("adjoint", [Checkpointed(levels=5), Checkpointed(levels=8), ForwardMode()])
def test_what_lives_at_once_hardly_grows_with_the_number_of_steps(adjoint):
    def most(steps):
        loss, lr = Census(), torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
        with no_garbage_collector():
            sol = solve(loss, steps=steps, adjoint=adjoint, lr=lr)
            torch.autograd.grad(sol.params.sum(), lr)
        return loss.most

    assert most(160) <= 3 * most(10)


@pytest.mark.parametrize("levels", [1, 2])
def test_offloaded_checkpoints_give_the_same_derivatives(levels, monkeypatch):
    """On a CPU that passes for a GPU, without its streams."""
    loss, lr = Census(), torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    packed = []
    pack, empty_like = Offloaded.pack, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: None)
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: empty_like(x))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: mock.Mock())
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock())
    monkeypatch.setattr(Offloaded, "pack", lambda hooks, x: packed.append(x) or pack(hooks, x))
    results = []
    for offload in ("cpu", None):
        adjoint = Checkpointed(offload=offload, levels=levels)
        total = solve(loss, steps=9, adjoint=adjoint, lr=lr).params.sum()
        (first,) = torch.autograd.grad(total, lr, create_graph=True)
        results.append((first, *torch.autograd.grad(first, lr)))
    assert all(x.shape in ((), START.shape) for x in packed)  # the carries, not their losses
    assert 0 < len(packed) < 9 * 3
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_checkpoints_are_offloaded_from_a_gpu_only():
    loss, lr = Census(), torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    grads = [
        torch.autograd.grad(solve(loss, steps=9, adjoint=adjoint, lr=lr).params.sum(), lr)
        for adjoint in (Checkpointed(offload="cpu"), Checkpointed())
    ]
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    with pytest.raises(ValueError, match="offload='cpu' does not work under"):
        torch.func.grad(
            lambda lr: solve(loss, adjoint=Checkpointed(offload="cpu"), lr=lr).params.sum()
        )(lr.detach())


class Calls:
    """A loss that counts its calls, and its activations that are still alive."""

    def __init__(self, width=1):
        self.width, self.activations, self.alive = width, [], []

    def __call__(self, w):
        activation = torch.sin(w.expand(self.width, 4))
        self.activations.append(weakref.ref(activation))
        self.alive.append(sum(ref() is not None for ref in self.activations))
        return (activation**2).sum()


def hypergradients(adjoint, steps, loss):
    """The first and second derivative with respect to the learning rate."""
    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    total = solve(loss, steps=steps, adjoint=adjoint, lr=lr).params.square().sum()
    (first,) = torch.autograd.grad(total, lr, create_graph=True)
    return first, *torch.autograd.grad(first, lr)


@pytest.mark.parametrize(
    ("adjoint", "runs"),
    [
        (Checkpointed(), 2),
        (Checkpointed(segments=2), 2),
        (Checkpointed(levels=2), 3),
        (Checkpointed(graph="step"), 3),
        (Checkpointed(graph="step", levels=2), 4),
    ],
    ids=str,
)
def test_how_often_checkpointed_runs_a_step(adjoint, runs):
    def calls(steps):
        loss, lr = Calls(), torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
        torch.autograd.grad(solve(loss, steps=steps, adjoint=adjoint, lr=lr).params.sum(), lr)
        return len(loss.alive)

    assert calls(64) - calls(27) == runs * (64 - 27)


@pytest.mark.parametrize("adjoint", [Checkpointed(), Checkpointed(graph="step")], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 7, 16])
def test_both_graphs_of_checkpointed_give_the_same_derivatives(adjoint, steps):
    expected = hypergradients(Unrolled(), steps, Calls())
    found = hypergradients(adjoint, steps, Calls())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_checkpointed_cuts_a_loop_of_large_graphs_into_more_segments():
    def most(adjoint):
        loss, lr = Calls(1000), torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
        with no_garbage_collector():
            sol = solve(loss, steps=25, adjoint=adjoint, lr=lr)
            torch.autograd.grad(sol.params.sum(), lr)
        return max(loss.alive)

    assert most(Checkpointed()) == most(Checkpointed(graph="step"))
    assert most(Checkpointed(segments=5)) >= most(Checkpointed()) + 4
