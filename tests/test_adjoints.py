"""Every exact adjoint against Unrolled, at first and second order, under all transforms."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import diffopt
from diffopt.adjoint import Checkpointed, Unrolled

CHECKPOINTED = [
    Checkpointed(),
    Checkpointed(levels=3),
    Checkpointed(segments=2),
    Checkpointed(segments=1),
    Checkpointed(hvp="reverse-over-reverse"),
    Checkpointed(levels=2, hvp="reverse-over-reverse"),
]
STEPS = 7
BATCHES = list(torch.linspace(-1, 1, 3 * STEPS, dtype=torch.float64).reshape(STEPS, 3))
INPUTS = {
    "a": torch.tensor([0.3, -1.2, 0.8, 0.1], dtype=torch.float64),
    "c": torch.tensor([0.5, 0.2, -0.7], dtype=torch.float64),
    "shift": torch.tensor([0.1, 0.4, -0.3, 0.9], dtype=torch.float64),
    "lr": torch.tensor(0.05, dtype=torch.float64),
    "beta1": torch.tensor(0.8, dtype=torch.float64),
    "batch": torch.tensor([0.2, -0.4, 0.6], dtype=torch.float64),
    "exp_avg": torch.tensor([0.01, 0.02, -0.01, 0.03], dtype=torch.float64),
}
NAMES = tuple(INPUTS)
EVERY = tuple(range(len(INPUTS)))


def loss(w, shift, x):
    quartic = ((w["a"] - shift) ** 4).sum() + w["a"].prod()
    return 0.1 * quartic + torch.sin(w["c"] * x).sum() + w["a"][0] * w["c"][1]


def outcome(adjoint, a, c, shift, lr, beta1, batch, exp_avg):
    """A number that depends on all of a solution."""
    opt = diffopt.adam()
    params = {"a": a, "c": c}
    state = opt.init(params)
    state = state._replace(exp_avg={"a": exp_avg, "c": state.exp_avg["c"]})
    sol = diffopt.minimize(
        loss, params, shift, optimizer=opt, hparams=opt.hparams(lr=lr, beta1=beta1),
        batches=[batch, *BATCHES[1:]], state=state, adjoint=adjoint,
    )  # fmt: skip
    end = (sol.params["a"] ** 2).sum() + sol.params["c"].sin().sum()
    return end + (sol.losses**2).sum() + sol.state.exp_avg_sq["a"].sum()


def at(adjoint):
    return lambda *inputs: outcome(adjoint, *inputs)


def stacked():
    return [torch.stack([x, 1.1 * x]) for x in INPUTS.values()]


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f, EVERY)(*INPUTS.values()),
    "vmap grad": lambda f: torch.vmap(torch.func.grad(f, EVERY))(*stacked()),
    "grad vmap": lambda f: torch.func.grad(lambda *v: torch.vmap(f)(*v).sum(), EVERY)(*stacked()),
    "hessian": lambda f: torch.func.hessian(f, (2, 3))(*INPUTS.values()),
    "jacrev grad": lambda f: torch.func.jacrev(torch.func.grad(f, (0, 3)), (3, 6))(
        *INPUTS.values()
    ),
    "jacfwd": lambda f: torch.func.jacfwd(f, EVERY)(*INPUTS.values()),
    "jacrev jacfwd": lambda f: torch.func.jacrev(torch.func.jacfwd(f, 3), 4)(*INPUTS.values()),
    "vmap grad grad": lambda f: torch.vmap(
        torch.func.grad(lambda *v: torch.func.grad(f, 3)(*v), EVERY)
    )(*stacked()),
}


@pytest.mark.parametrize("adjoint", CHECKPOINTED, ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_checkpointed_equals_unrolled_under(name, adjoint):
    transform = TRANSFORMS[name]
    torch.testing.assert_close(
        transform(at(adjoint)), transform(at(Unrolled())), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("adjoint", CHECKPOINTED, ids=str)
def test_checkpointed_equals_unrolled_under_autograd_twice(adjoint):
    def derivatives(adjoint):
        leaves = [x.clone().requires_grad_() for x in INPUTS.values()]
        value = outcome(adjoint, *leaves)
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        again = torch.autograd.grad(sum(g.sin().sum() for g in grads), leaves)
        return [value, *grads, *again]

    torch.testing.assert_close(
        derivatives(adjoint), derivatives(Unrolled()), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("adjoint", [Checkpointed(), Checkpointed(levels=2)], ids=str)
def test_checkpointed_agrees_with_finite_differences_twice(adjoint):
    leaves = [x.clone().requires_grad_() for x in INPUTS.values()]
    assert gradcheck(at(adjoint), leaves)
    assert gradgradcheck(at(adjoint), leaves)
