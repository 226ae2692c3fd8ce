"""torch.set_default_device is for what users make: this package's own numbers are on the CPU."""

import pytest
import torch

import diffopt
from diffopt import optim
from diffopt._rule import compiled
from diffopt.adjoint import PersistentEvolution
from diffopt.transforms import accumulate

CPU = torch.device("cpu")
F64 = torch.float64


def ones(*shape):
    return torch.ones(shape, dtype=F64, device=CPU)


def trained(optimizer, p, steps=3):
    """The states in turn, with a checkpoint loaded on the way."""
    for _ in range(steps):
        p.grad = ones(3)
        optimizer.step(lambda: p.detach().sum())
        optimizer.load_state_dict(optimizer.state_dict())
    return p.detach()


def composition():
    p = torch.nn.Parameter(ones(3))
    q = torch.nn.Parameter(ones(3))
    optimizer = optim.from_pure(accumulate(diffopt.adam(), 2), [p, q], lr=0.1)
    return trained(optimizer, p)


def kernel():
    p = torch.nn.Parameter(ones(3))
    return trained(optim.RMSprop([p], lr=0.1, fused=True), p)


def lbfgs_to_pure():
    p = torch.nn.Parameter(ones(3))
    optimizer = torch.optim.LBFGS([p], lr=0.1)
    trained(optimizer, p, 2)
    return optim.to_pure(optimizer).state.old_dirs


def line_search():
    opt, p = diffopt.lbfgs(), [ones(3)]
    found = opt.search(lambda p: (p[0] ** 4).sum(), p, [4 * p[0]], opt.init(p), opt.hparams(lr=1.0))
    return found[0][0]


def bounds():
    opt, p = diffopt.rprop(), ones(3)
    hp = opt.hparams(lr=0.1, step_size_max=torch.tensor(0.3, dtype=F64, device=CPU))
    return opt.update(p, ones(3), opt.init(p), hp)[0]


def overlap():
    x = ones(12)
    params = [x.as_strided((3, 2), (4, 1)), x.as_strided((3, 2), (4, 1), 2)]
    opt = diffopt.sgd()
    opt.update_(params, params, opt.init(params), opt.hparams(lr=0.5))
    return x


def count():
    opt = diffopt.sgd()
    hp = opt.hparams(lr=0.1)
    return diffopt.minimize(torch.sum, ones(3), optimizer=opt, hparams=hp, steps=2).steps


def persistent_evolution():
    generator = torch.Generator(CPU).manual_seed(0)
    pes = PersistentEvolution(lambda c, w: (c, float(w.sum())), samples=2, generator=generator)
    w = ones(3).requires_grad_()
    _, loss = pes(pes.init(()), w)
    return torch.autograd.grad(loss, w)[0]


def numbers_of_samples():
    def residual(x, w):
        return x - w * 2.0

    def solve(_, w):
        return float(w) * 2.0

    root = diffopt.implicit_root(residual, solve, sequential=True)
    return torch.vmap(root, (None, 0))(None, ones(3))


CASES = [
    composition,
    kernel,
    lbfgs_to_pure,
    line_search,
    bounds,
    overlap,
    count,
    persistent_evolution,
    numbers_of_samples,
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", CASES, ids=[case.__name__ for case in CASES])
def test_nothing_is_made_on_the_default_device(case, monkeypatch):
    monkeypatch.setattr(compiled, "_KERNELS", {})
    monkeypatch.setattr(torch, "compile", lambda kernel, **_: kernel)
    expected = case()
    compiled._KERNELS.clear()
    with torch.device("meta"):
        found = case()
    assert found.device == expected.device
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
