"""The result of a loop requires grad exactly if something that went in does."""

import pytest
import torch
from torch.autograd import forward_ad

from diffopt import adjoint as a, minimize, sgd

OPT = sgd()
ADJOINTS = {
    "Unrolled": a.Unrolled(),
    "Checkpointed": a.Checkpointed(),
    "steps": a.Checkpointed(graph="step"),
    "forward-over-reverse": a.Checkpointed(hvp="forward-over-reverse"),
    "Truncated": a.Truncated(2),
    "FirstOrder": a.FirstOrder(),
    "ForwardMode": a.ForwardMode(),
    "Reversible": a.Reversible(),
    "Implicit": a.Implicit(),
    "OneStep": a.OneStep(),
    "Evolution": a.Evolution(samples=1),
}
LOST = {  # what the gradients of an adjoint do not reach, as it documents
    "Truncated": {"params"},
    "OneStep": {"params"},
    "FirstOrder": {"args", "captured"},
}


def solution(given, adjoint, **options):
    params, target, lr, captured = (
        torch.full((), value, dtype=torch.float64, requires_grad=name == given)
        for name, value in (("params", 1.0), ("args", 2.0), ("hparams", 0.5), ("captured", 1.0))
    )

    def loss(p, target):
        return 0.5 * (captured * p - target) ** 2

    hparams = OPT.hparams(lr=lr if given == "hparams" else 0.5, momentum=0.1)
    return minimize(
        loss, params, target, optimizer=OPT, hparams=hparams, steps=20, adjoint=adjoint, **options
    )


CASES = [
    (name, given)
    for name in ADJOINTS
    for given in (None, "params", "args", "hparams", "captured")
    if given != "captured" or name in {"Unrolled", "Truncated", "FirstOrder", "OneStep"}
]  # others raise for captured tensors


@pytest.mark.parametrize(("name", "given"), CASES)
def test_result_requires_grad_exactly_if_something_given_does(name, given):
    sol = solution(given, ADJOINTS[name])
    needed = given is not None and given not in LOST.get(name, ())
    assert sol.params.requires_grad == needed
    assert needed or not (sol.losses.requires_grad or sol.state.momentum_buffer.requires_grad)


@pytest.mark.parametrize("given", [None, "hparams"])
@pytest.mark.parametrize("name", ["Unrolled", "Truncated"])
def test_result_of_a_compiled_loop_requires_grad_exactly_if_something_given_does(name, given):
    sol = solution(given, ADJOINTS[name], compile={"backend": "eager"})
    assert sol.params.requires_grad == (given is not None)


@pytest.mark.parametrize("name", ["Unrolled", "Truncated", "OneStep"])
def test_forgetting_what_to_differentiate_raises_the_error_of_torch(name):
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(
            solution(None, ADJOINTS[name]).params, torch.ones((), requires_grad=True)
        )


@pytest.mark.parametrize("given", [None, "hparams"])
def test_result_under_vmap_requires_grad_exactly_if_something_given_does(given):
    lr = torch.tensor(0.1, requires_grad=given == "hparams")

    def run(target):
        hparams = OPT.hparams(lr=lr if given else 0.1)
        return minimize(
            lambda p, t: (p - t) ** 2,
            torch.zeros(()),
            target,
            optimizer=OPT,
            hparams=hparams,
            steps=2,
        ).params

    assert torch.vmap(run)(torch.ones(2)).requires_grad == (given is not None)


def test_result_of_a_loop_in_a_loop_requires_grad_only_if_something_given_does():
    def outer(p, scale):
        inner = minimize(
            lambda q, p: (q - scale * p) ** 2, torch.zeros(()), p,
            optimizer=OPT, hparams=OPT.hparams(lr=0.1), steps=2,
        )  # fmt: skip
        return (inner.params - 1) ** 2

    for needed in (False, True):
        scale = torch.ones((), requires_grad=needed)
        sol = minimize(
            outer, torch.ones(()), scale, optimizer=OPT, hparams=OPT.hparams(lr=0.1), steps=2
        )
        assert sol.params.requires_grad == needed


def test_tangents_survive_where_nothing_requires_grad():
    with forward_ad.dual_level():
        target = forward_ad.make_dual(torch.ones(()), torch.ones(()))
        sol = minimize(
            lambda p, t: (p - t) ** 2, torch.zeros(()), target,
            optimizer=OPT, hparams=OPT.hparams(lr=0.25), steps=2,
        )  # fmt: skip
        assert not sol.params.requires_grad
        tangent = forward_ad.unpack_dual(sol.params).tangent
        torch.testing.assert_close(tangent, torch.tensor(0.75))


def test_a_gradient_that_arrives_only_through_an_auxiliary_output_arrives():
    scale = torch.ones((), requires_grad=True)
    sol = minimize(
        lambda p: (p**2, scale * p), torch.ones(()),
        optimizer=OPT, hparams=OPT.hparams(lr=0.25), steps=2, has_aux=True,
    )  # fmt: skip
    torch.testing.assert_close(torch.autograd.grad(sum(sol.aux), scale)[0], torch.tensor(1.5))


def test_steps_of_unroll_require_grad_only_if_something_given_does():
    carry, _ = a.unroll(lambda c, args, t: (2 * c, None), torch.ones(()), length=2)
    assert not carry.requires_grad
