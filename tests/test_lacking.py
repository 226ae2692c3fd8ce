"""Operations for which torch lacks derivatives or batches: errors say what helps, and it does."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import diffopt
from diffopt._diff.functions import AmbientState
from diffopt.adjoint import Checkpointed, ForwardMode, Truncated, Unrolled

ADJOINTS = [Unrolled(), Checkpointed(), Checkpointed(hvp="forward-over-reverse"), ForwardMode()]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(4, 4)

    def forward(self, x):
        h = self.project(x)
        return nn.functional.scaled_dot_product_attention(h[None], h[None], x[None])


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(4, 3, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


def problem(module, dtype=torch.float64):
    torch.manual_seed(0)
    model = diffopt.nn.functionalize(module().to(dtype))
    x = torch.randn(2, 5, 4, dtype=dtype)

    def loss(p):
        return model(p, {}, x)[0].square().mean()

    def outer(lr, adjoint, loss=loss):
        opt = diffopt.sgd()
        sol = diffopt.minimize(
            loss, model.params, optimizer=opt, hparams=opt.hparams(lr=lr), steps=2, adjoint=adjoint
        )
        return loss(sol.params)

    return loss, outer


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("where", ["nowhere", "in the loss", "around minimize"])
def test_attention_has_second_derivatives_by_the_kernel_the_error_names(adjoint, where):
    loss, outer = problem(Attention)

    def by_math(p):
        with sdpa_kernel(SDPBackend.MATH):
            return loss(p)

    around = where == "around minimize"
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def hypergradient():
        with sdpa_kernel(SDPBackend.MATH) if around else contextlib.nullcontext():
            value = outer(lr, adjoint, by_math if where == "in the loss" else loss)
        return torch.autograd.grad(value, lr)[0]

    if where == "nowhere":
        with pytest.raises(NotImplementedError, match=r"sdpa_kernel\(SDPBackend\.MATH\)"):
            hypergradient()
        return
    with torch.no_grad():
        difference = (outer(0.1 + 1e-5, None) - outer(0.1 - 1e-5, None)) / 2e-5
    torch.testing.assert_close(hypergradient(), difference, rtol=1e-6, atol=0)


def test_attention_without_second_derivatives_keeps_its_kernel():
    _, outer = problem(Attention)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    (by_last_step,) = torch.autograd.grad(outer(lr, Truncated(1)), lr)
    assert by_last_step < 0


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("adjoint", ADJOINTS[2:])
def test_lstm_has_forward_derivatives_by_the_kernels_the_error_names(adjoint):
    _, outer = problem(lambda: Recurrent(nn.LSTM), torch.float32)
    lr = torch.tensor(0.1, requires_grad=True)
    if torch.backends.mkldnn.is_available():
        with pytest.raises(NotImplementedError, match=r"mkldnn\.flags\(enabled=False\)"):
            torch.autograd.grad(outer(lr, adjoint), lr)
    with torch.backends.mkldnn.flags(enabled=False):
        found = torch.autograd.grad(outer(lr, adjoint), lr)
    torch.testing.assert_close(found, torch.autograd.grad(outer(lr, Unrolled()), lr))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("adjoint", [None, *ADJOINTS])
def test_recurrent_modules_under_vmap_raise_what_helps(kind, adjoint):
    torch.manual_seed(0)
    model, opt = diffopt.nn.functionalize(Recurrent(kind).double()), diffopt.sgd()

    def solve(x):
        return diffopt.minimize(
            lambda p, x: model(p, {}, x)[0].square().mean(), model.params, x,
            optimizer=opt, hparams=opt.hparams(lr=0.1), steps=2, adjoint=adjoint,
        ).params  # fmt: skip

    with pytest.raises(NotImplementedError, match="loop over the tasks"):
        torch.vmap(solve)(torch.randn(3, 2, 5, 4, dtype=torch.float64))


class Cudnn(torch.autograd.Function):
    """Raises what cuDNN's recurrent networks raise in eval mode."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(*_):
        pass

    @staticmethod
    def backward(*_):
        raise RuntimeError("cudnn RNN backward can only be called in training mode")


def test_recurrent_modules_in_eval_mode_raise_what_helps():
    x = torch.ones(2, requires_grad=True)
    net, opt = nn.Linear(2, 2), diffopt.sgd()
    hint = pytest.raises(NotImplementedError, match=r"cudnn\.flags\(enabled=False\)")
    with diffopt.innerloop(net, opt, hparams=opt.hparams(lr=0.1)) as (fnet, inner), hint:
        inner.step(Cudnn.apply(fnet(x)).sum())
    with hint:
        diffopt.minimize(
            lambda p: Cudnn.apply(p).sum(), x, optimizer=opt, hparams=opt.hparams(lr=0.1), steps=1
        )


def test_kernels_are_restored_and_left_as_they_were():
    with sdpa_kernel(SDPBackend.MATH):
        ambient = AmbientState(())
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    with ambient.restored():
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
    assert before == (
        torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    )  # fmt: skip


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed()], ids=["Unrolled", "Checkpointed"])
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.vmap])
def test_checkpoints_under_transforms_raise_what_helps(transform, adjoint):
    opt, start = diffopt.sgd(), torch.ones(2)

    def loss(w):
        return checkpoint(torch.sin, w, use_reentrant=False).sum()

    def outer(rate):
        hp = opt.hparams(lr=rate)
        sol = diffopt.minimize(loss, start, optimizer=opt, hparams=hp, steps=2, adjoint=adjoint)
        return sol.params.sum()

    rate = torch.tensor([0.1]) if transform is torch.vmap else torch.tensor(0.1)
    with pytest.raises(NotImplementedError, match=r"save memory with adjoint=Checkpointed\(\)"):
        transform(outer)(rate)
