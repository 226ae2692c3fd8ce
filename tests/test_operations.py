"""Losses made of torch's operations, differentiated in every exact way.

Formulas in torch branch on whether a derivative is recorded, lack a forward derivative, or have one
that cannot be differentiated; so each way must agree for each operation.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffopt
from diffopt.adjoint import Checkpointed, ForwardMode, Unrolled

FORWARD = Checkpointed(hvp="forward-over-reverse")
X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 2, 1, 1, 0, 2])
EYE = torch.eye(3, dtype=torch.float64)


def attention(z):
    with sdpa_kernel(SDPBackend.MATH):  # others cannot be differentiated twice
        return F.scaled_dot_product_attention(z, z, z)


LOSSES = {
    "tanh": lambda z: z.tanh().sum(),
    "softmax": lambda z: (z.softmax(-1) ** 3).sum(),
    "cross_entropy": lambda z: F.cross_entropy(z, Y),
    "logsumexp": lambda z: z.logsumexp(-1).sum(),
    "binary cross-entropy": lambda z: F.binary_cross_entropy_with_logits(z, (X[:, :3] > 0) * 1.0),
    "smooth_l1": lambda z: F.smooth_l1_loss(z**2, z),
    "gelu": lambda z: F.gelu(z).sum(),
    "silu": lambda z: F.silu(z).sum(),
    "mish": lambda z: F.mish(z).sum(),
    "layer_norm": lambda z: (F.layer_norm(z, (3,)) ** 3).sum(),
    "group_norm": lambda z: (F.group_norm(z[:, :, None], 1) ** 3).sum(),
    "batch_norm": lambda z: (F.batch_norm(z, None, None, training=True) ** 3).sum(),
    "attention": lambda z: attention(z[None]).square().mean(),
    "conv1d": lambda z: (F.conv1d(z.T[None], X[:3, :3, None]) ** 3).sum(),
    "max_pool1d": lambda z: (F.max_pool1d(z.T[None], 2) ** 3).sum(),
    "embedding": lambda z: (F.embedding(Y, z) ** 3).sum(),
    "norm": lambda z: z.norm(),
    "std": lambda z: z.std(0).sum(),
    "prod": lambda z: z.prod(0).sum(),
    "cumsum": lambda z: (z.cumsum(0) ** 3).sum(),
    "einsum": lambda z: torch.einsum("ij,kj,ik->", z, z, z @ z.T),
    "logdet": lambda z: torch.logdet(z.T @ z + EYE),
    "inv": lambda z: torch.linalg.inv(z.T @ z + EYE).sum(),
    "cholesky": lambda z: torch.linalg.cholesky(z.T @ z + EYE).sum(),
    "eigvalsh": lambda z: torch.linalg.eigvalsh(z.T @ z).pow(2).sum(),
}
WRONG_THIRD_DERIVATIVE = ("layer_norm", "batch_norm")  # in torch itself, written out they are right


def number(value):
    return torch.tensor(value, dtype=torch.float64)


RATE, DECAY = number(0.1), number(0.2)


def outcome(adjoint, name, lr, decay):
    """A number that depends on where two steps lead."""
    opt = diffopt.sgd()

    def loss(w, decay):
        return LOSSES[name](X @ w) + decay * (w**2).sum()

    sol = diffopt.minimize(
        loss, X[:4, :3], decay, optimizer=opt, hparams=opt.hparams(lr=lr), steps=2,
        adjoint=adjoint,
    )  # fmt: skip
    return (sol.params * torch.arange(12.0).view(4, 3)).sum()


def derivatives(adjoint, name, lr=RATE, decay=DECAY):
    inputs = lr.clone().requires_grad_(), decay.clone().requires_grad_()
    return torch.stack(torch.autograd.grad(outcome(adjoint, name, *inputs), inputs))


def by_forward_ad(name):
    tangents = []
    for i in range(2):
        with forward_ad.dual_level():
            inputs = [RATE.clone(), DECAY.clone()]
            inputs[i] = forward_ad.make_dual(inputs[i], number(1.0))
            tangents.append(forward_ad.unpack_dual(outcome(Unrolled(), name, *inputs)).tangent)
    return torch.stack(tangents).detach()


def by_torch_func(adjoint, name):
    def batched(rates, decays):
        return torch.vmap(lambda *inputs: outcome(adjoint, name, *inputs))(rates, decays).sum()

    rates, decays = (torch.stack([x, 1.1 * x]) for x in (RATE, DECAY))
    grads = torch.func.grad(batched, (0, 1))(rates, decays)
    return torch.stack([grad[0] for grad in grads])


WAYS = {
    "checkpointed": lambda name: derivatives(Checkpointed(), name),
    "checkpointed, forward over reverse": lambda name: derivatives(FORWARD, name),
    "forward mode": lambda name: derivatives(ForwardMode(), name),
    "forward_ad": by_forward_ad,
    "forward_ad, no_grad": torch.no_grad()(by_forward_ad),
    "torch.func, unrolled": lambda name: by_torch_func(Unrolled(), name),
    "torch.func, forward over reverse": lambda name: by_torch_func(FORWARD, name),
    "torch.func, forward mode": lambda name: by_torch_func(ForwardMode(), name),
}


def differences(function, h):
    """Of `function(lr, decay)` by both."""
    ends = [
        function(RATE + dx, DECAY + dy) for dx, dy in ((h, 0.0), (-h, 0.0), (0.0, h), (0.0, -h))
    ]
    return torch.stack([ends[0] - ends[1], ends[2] - ends[3]]) / (2 * h)


@pytest.mark.parametrize("name", LOSSES)
def test_first_derivatives_agree(name):
    expected = derivatives(Unrolled(), name)
    near = differences(lambda *inputs: outcome(None, name, *inputs), 1e-5)
    torch.testing.assert_close(expected, near, rtol=1e-5, atol=1e-7)
    for way, derivative in WAYS.items():
        torch.testing.assert_close(
            derivative(name), expected, rtol=1e-8, atol=1e-10, msg=lambda m, way=way: f"{way}: {m}"
        )


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in WRONG_THIRD_DERIVATIVE])
def test_second_derivatives_agree(name):
    def product(*inputs):
        return derivatives(Unrolled(), name, *inputs).prod()

    def second(adjoint):
        inputs = RATE.clone().requires_grad_(), DECAY.clone().requires_grad_()
        first = torch.autograd.grad(outcome(adjoint, name, *inputs), inputs, create_graph=True)
        return torch.stack(torch.autograd.grad(first[0] * first[1], inputs))

    expected = second(Unrolled())
    torch.testing.assert_close(expected, differences(product, 1e-5), rtol=1e-4, atol=1e-6)
    for adjoint in (Checkpointed(), FORWARD):
        torch.testing.assert_close(second(adjoint), expected, rtol=1e-8, atol=1e-10)


def test_without_a_graph_forward_mode_leaves_none():
    with torch.no_grad(), forward_ad.dual_level():
        lr = forward_ad.make_dual(RATE, number(1.0))
        opt = diffopt.sgd()
        sol = diffopt.minimize(
            lambda w: (w**4).sum(), X, optimizer=opt, hparams=opt.hparams(lr=lr), steps=3
        )
        for result in (sol.params, sol.losses):
            assert forward_ad.unpack_dual(result).tangent.abs().sum() > 0
            assert not result.requires_grad
            assert result._base is None


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_a_buffer_without_momentum_is_no_view_of_the_gradient(shape):
    opt, p, g = diffopt.sgd(), torch.zeros(shape), torch.ones(shape)
    _, state = opt.update(p, g, opt.init(p), opt.hparams(lr=0.1, momentum=0.0))
    assert torch.equal(state.momentum_buffer, g)
    assert state.momentum_buffer.data_ptr() != g.data_ptr()
