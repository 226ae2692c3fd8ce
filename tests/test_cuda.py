"""On a GPU every optimizer does what it does on the CPU. Run where one is by `pytest -m cuda`."""

import dataclasses

import pytest
import torch
from torch.utils import _pytree as pytree

import diffopt
from registry import REGISTRY

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def cuda(tree):
    return pytree.tree_map(lambda x: x.cuda() if isinstance(x, torch.Tensor) else x, tree)


def trees(dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    params = {"w": draw(3, 2), "b": [draw(5), draw()], "none": draw(2)}
    gradients = [{"w": draw(3, 2), "b": [draw(5), draw()], "none": None} for _ in range(4)]
    return params, gradients


def run(opt, params, gradients, record, *, in_place=False):
    state = opt.init(params)
    for grads in gradients:
        if in_place:
            opt.update_(params, grads, state, record)
        else:
            params, state = opt.update(params, grads, state, record)
    return params, state


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("way", ["leaf", "foreach", "in place"])
@pytest.mark.parametrize("row", REGISTRY)
def test_values(row, way, dtype):
    case, in_place = REGISTRY[row], way == "in place"
    params, gradients = trees(dtype)
    opt = dataclasses.replace(case.optimizer, execution="auto" if in_place else way)
    on_gpu = run(opt, cuda(params), cuda(gradients), case.record(), in_place=in_place)
    on_cpu = run(case.optimizer, params, gradients, case.record())
    assert all(x.is_cuda for x in pytree.tree_leaves(on_gpu))
    torch.testing.assert_close(on_gpu, cuda(on_cpu))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("row", REGISTRY)
def test_derivatives_with_hyperparameters_on_either_device(row, device):
    case = REGISTRY[row]
    params, gradients = trees(torch.float64)

    def meta_gradients(params, gradients, device):
        record = pytree.tree_map(lambda x: x.to(device).requires_grad_(), case.interior())
        params = pytree.tree_map(lambda x: x.requires_grad_(), params)
        new, _ = run(case.optimizer, params, gradients, record)
        outer = sum(leaf.square().sum() for leaf in pytree.tree_leaves(new))
        inputs = pytree.tree_leaves((params, record))
        return torch.autograd.grad(outer, inputs, materialize_grads=True)

    on_gpu = meta_gradients(cuda(params), cuda(gradients), device)
    on_cpu = meta_gradients(params, gradients, "cpu")
    torch.testing.assert_close([g.cpu() for g in on_gpu], list(on_cpu))


@pytest.mark.parametrize("row", REGISTRY)
def test_params_on_two_devices(row):
    case = REGISTRY[row]
    params, gradients = trees(torch.float64)
    mixed = [{**tree, "w": tree["w"].cuda()} for tree in (params, *gradients)]
    new, _ = run(case.optimizer, mixed[0], mixed[1:], case.record())
    expected, _ = run(case.optimizer, params, gradients, case.record())
    assert new["w"].is_cuda
    assert not new["b"][0].is_cuda
    torch.testing.assert_close(new["w"].cpu(), expected["w"])
    torch.testing.assert_close(new["b"], expected["b"])


def test_an_update_waits_for_nothing():
    params, gradients = trees(torch.float32)
    params, gradients = cuda(params), cuda(gradients)
    opt = diffopt.adam(amsgrad=True)
    state, record = opt.init(params), opt.hparams()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for grads in gradients:
            params, state = opt.update(params, grads, state, record)
            opt.update_(params, grads, state, record)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.step == 8


def test_a_captured_graph_counts_its_replays():
    params = {"w": torch.ones(4, device="cuda")}
    grads = {"w": torch.full((4,), 0.5, device="cuda")}
    opt = diffopt.adam()
    state, record = opt.init(params), opt.hparams(lr=0.1)
    twin = pytree.tree_map(torch.clone, (params, state))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # warms up, as capturing needs
        opt.update_(params, grads, state, record)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.update_(params, grads, state, record)
    for _ in range(5):
        graph.replay()
    for _ in range(6):
        opt.update_(twin[0], grads, twin[1], record)
    assert state.step == 6
    torch.testing.assert_close((params, state), twin)


def test_an_inner_loop():
    opt = diffopt.adam()

    def outer(w, lr):
        sol = diffopt.minimize(
            lambda w: (w**4).sum(), w, optimizer=opt, hparams=opt.hparams(lr=lr), steps=4
        )
        return sol.params.square().sum()

    arguments = torch.linspace(-1, 1, 5, dtype=torch.float64), torch.tensor(0.1)
    expected = torch.func.grad(outer, argnums=(0, 1))(*arguments)
    for lr in (arguments[1], arguments[1].cuda()):
        found = torch.func.grad(outer, argnums=(0, 1))(arguments[0].cuda(), lr)
        torch.testing.assert_close([g.cpu() for g in found], list(expected))


def test_devices_must_match():
    params, opt = {"w": torch.ones(2, device="cuda")}, diffopt.sgd()
    state = opt.init(params)
    with pytest.raises(ValueError, match=r"grads\['w'\] has device cpu, but params\['w'\] .* cuda"):
        opt.update(params, {"w": torch.ones(2)}, state, opt.hparams())
    with pytest.raises(ValueError, match=r"hparams.lr has device cpu, but params\['w'\] .* cuda"):
        opt.update(params, params, state, opt.hparams(lr=torch.ones(2)))
