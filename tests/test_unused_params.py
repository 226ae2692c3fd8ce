"""A parameter that the loss does not use has the gradient None: every loop leaves it alone."""

import pytest
import torch
from torch.utils import _pytree as pytree

import diffopt
from diffopt.adjoint import (
    Checkpointed,
    Evolution,
    FirstOrder,
    ForwardMode,
    Implicit,
    OneStep,
    Reversible,
    Truncated,
    Unrolled,
)
from diffopt.transforms import chain, clip_by_global_norm

EXACT = [
    Unrolled(),
    Checkpointed(),
    Checkpointed(segments=5),
    Checkpointed(levels=2),
    Checkpointed(hvp="forward-over-reverse"),
    ForwardMode(),
]
OTHERS = [
    FirstOrder(),
    Truncated(2),
    OneStep(),
    Evolution(samples=1),
    Evolution(samples=2, chunk_size=2),
    None,
]
ORDERS = [(0, 0, 0), (0, 1, 0, 1, 0), (1, 0, 0)]
REVERSIBLE = [Reversible(), Reversible(hvp="forward-over-reverse")]


def problem():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, y = normal(5, 3), normal(5, 1)
    params = {"body": normal(3, 4), "heads": [normal(4, 1), normal(4, 1)], "never": normal(2)}

    def loss(params, head):
        return (torch.tanh(x @ params["body"]) @ params["heads"][head] - y).square().mean()

    return loss, params


def optimizer(name):
    if name == "chain":
        opt = chain(clip_by_global_norm(), diffopt.adamw())
        return opt, {"max_norm": 0.1, "weight_decay": 0.1}
    if name == "sgd":
        return diffopt.sgd(momentum=True), {"momentum": 0.9, "weight_decay": 0.1}
    return getattr(diffopt, name)(), {"weight_decay": 0.1}


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


def by_hand(loss, params, opt, hparams, order):
    state = opt.init(params)
    for head in order:
        leaves, spec = pytree.tree_flatten(params)
        value = loss(params, head)
        grads = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
        params, state = opt.update(params, pytree.tree_unflatten(list(grads), spec), state, hparams)
    return params


def leaves_of(params):
    return pytree.tree_map(lambda p: p.clone().requires_grad_(), params)


def meta_gradients(params, inputs):
    grads = torch.autograd.grad(params, inputs, params.detach(), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]


def expected(name, order):
    loss, params = problem()
    opt, options = optimizer(name)
    params, lr = leaves_of(params), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    end = flat(by_hand(loss, params, opt, opt.hparams(lr=lr, **options), order))
    return end.detach(), meta_gradients(end, [lr, *pytree.tree_leaves(params)])


CASES = [
    *((name, adjoint) for name in ("sgd", "adam", "adamw", "chain") for adjoint in EXACT),
    *(("sgd", adjoint) for adjoint in REVERSIBLE),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tol", [None, 1e-12])
@pytest.mark.parametrize(("name", "adjoint"), CASES)
def test_loops_are_those_by_hand_with_none(name, adjoint, tol, order):
    if tol and isinstance(adjoint, Reversible):
        pytest.skip("Reversible takes no tol")
    end, grads = expected(name, order)
    loss, params = problem()
    opt, options = optimizer(name)
    params, lr = leaves_of(params), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    sol = diffopt.minimize(
        loss, params, optimizer=opt, hparams=opt.hparams(lr=lr, **options),
        batches=[(head,) for head in order], adjoint=adjoint, tol=tol,
    )  # fmt: skip
    found = flat(sol.params)
    torch.testing.assert_close(found.detach(), end, rtol=1e-7, atol=1e-8)  # Reversible rounds
    mine = meta_gradients(found, [lr, *pytree.tree_leaves(params)])
    torch.testing.assert_close(mine, grads, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(sol.params["never"], params["never"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS[:2])
@pytest.mark.parametrize("adjoint", [*EXACT, *OTHERS, *REVERSIBLE])
@pytest.mark.parametrize("transform", ["none", "grad", "vmap", "jvp"])
def test_transforms_see_the_same(transform, adjoint, order):
    if transform == "jvp" and isinstance(adjoint, (Evolution, Reversible)):
        pytest.skip("works in reverse mode only")
    end, _ = expected("sgd", order)
    loss, params = problem()
    opt, options = optimizer("sgd")

    def run(lr):
        sol = diffopt.minimize(
            loss, params, optimizer=opt, hparams=opt.hparams(lr=lr, **options),
            batches=[(head,) for head in order], adjoint=adjoint,
        )  # fmt: skip
        return flat(sol.params)

    lr = torch.tensor(0.1, dtype=torch.float64)
    if transform == "none":
        found = run(lr)
    elif transform == "grad":
        _, found = torch.func.grad(lambda lr: (run(lr).sum(), run(lr)), has_aux=True)(lr)
    elif transform == "jvp":
        found, _ = torch.func.jvp(run, (lr,), (torch.ones_like(lr),))
    else:
        found = torch.vmap(run, randomness="same")(lr.expand(2))[1]
    torch.testing.assert_close(found.detach(), end, rtol=1e-7, atol=1e-8)  # Reversible rounds


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed()])
def test_second_derivatives_of_heads_used_in_turn(adjoint):
    loss, params = problem()
    opt = diffopt.adamw()

    def outer(lr, body):
        sol = diffopt.minimize(
            loss, {**params, "body": body}, optimizer=opt, hparams=opt.hparams(lr=lr),
            batches=[(0,), (1,), (0,)], adjoint=adjoint,
        )  # fmt: skip
        return flat(sol.params).square().sum()

    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(outer, (lr, params["body"].clone().requires_grad_()))


@pytest.mark.parametrize("batched", [False, True])
def test_loss_that_uses_no_parameter_raises(batched):
    opt = diffopt.sgd()

    def run(x):
        return diffopt.minimize(
            lambda p: 2 * x, torch.ones(2), optimizer=opt, hparams=opt.hparams(), steps=1
        ).params

    with pytest.raises(ValueError, match="loss does not depend on params"):
        torch.vmap(run)(torch.ones(2)) if batched else run(torch.ones(()))


def test_lbfgs_leaves_unused_parameters_alone():
    loss, params = problem()
    opt = diffopt.lbfgs()
    sol = diffopt.minimize(
        loss, params, 0, optimizer=opt, hparams=opt.hparams(lr=0.1), steps=4, adjoint=None
    )
    assert torch.equal(sol.params["never"], params["never"])
    assert torch.equal(sol.params["heads"][1], params["heads"][1])
    assert not torch.equal(sol.params["heads"][0], params["heads"][0])


def test_implicit_has_no_equation_for_unused_parameters():
    opt = diffopt.sgd()
    target = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    unused = torch.tensor([1.0, 5.0], dtype=torch.float64, requires_grad=True)
    sol = diffopt.minimize(
        lambda p, target: (p["w"] - target**2).square(),
        {"unused": unused, "w": torch.zeros_like(target)}, target,
        optimizer=opt, hparams=opt.hparams(lr=0.4), steps=60, adjoint=Implicit(on_failure="raise"),
    )  # fmt: skip
    outer = sol.params["w"] + (3 * sol.params["unused"]).sum()
    (dw, du) = torch.autograd.grad(outer, (target, unused))
    torch.testing.assert_close(dw, 2 * target.detach())
    torch.testing.assert_close(du, torch.full_like(unused, 3.0).detach())
