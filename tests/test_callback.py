"""minimize(callback=): called after each step, in every mode; it can end the loop."""

import pytest
import torch

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

ADJOINTS = [
    None, Unrolled(), FirstOrder(), Truncated(0), Truncated(2), Checkpointed(),
    Checkpointed(levels=2), ForwardMode(), Reversible(), Implicit(root_tolerance=9.0), OneStep(),
    Evolution(sigma=0.1),
]  # fmt: skip
OPT = diffopt.sgd()
TARGET = torch.tensor([1.0, -2.0], dtype=torch.float64)


def loss(w, target):
    return 0.5 * (w - target).square().sum()


def solve(lr, callback=None, adjoint=None, target=TARGET, **options):
    options = {"steps": 4} | options
    return diffopt.minimize(
        loss, torch.zeros(2, dtype=torch.float64), target, optimizer=OPT,
        hparams=OPT.hparams(lr=lr, momentum=0.5), adjoint=adjoint, callback=callback, **options,
    )  # fmt: skip


def history():
    """A callback that records its arguments, and the record."""
    record = []

    def callback(step, value, params, state):
        tensors = value, params, state.momentum_buffer
        assert not any(x.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(x)
                       for x in tensors)  # fmt: skip
        record.append((step, value, params, state))

    return callback, record


def rate():
    return torch.tensor(0.3, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_each_step_is_seen_once_and_nothing_else_changes(adjoint):
    callback, record = history()
    lr = rate()
    torch.manual_seed(0)
    expected = solve(lr, adjoint=adjoint)
    torch.manual_seed(0)
    found = solve(lr, callback, adjoint)
    torch.testing.assert_close(diffopt.detach(found), diffopt.detach(expected), rtol=0, atol=0)
    if found.params.requires_grad:
        gradients = [
            torch.autograd.grad(sol.params.sum(), lr, allow_unused=True)[0]
            for sol in (found, expected)
        ]
        torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert [step for step, *_ in record] == [0, 1, 2, 3]
    torch.testing.assert_close(
        torch.stack([value for _, value, *_ in record]), found.losses.detach()
    )
    for step, _, params, state in record:
        part = solve(lr.detach(), steps=step + 1)
        torch.testing.assert_close(params, part.params)
        torch.testing.assert_close(state, part.state)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_stop_iteration_ends_the_loop_after_the_step(adjoint):
    used = []

    def batches():
        for i in range(9):
            used.append(i)
            yield TARGET

    def callback(step, *_):
        if step == 2:
            raise StopIteration

    lr = rate()
    found = diffopt.minimize(
        loss, torch.zeros(2, dtype=torch.float64), optimizer=OPT,
        hparams=OPT.hparams(lr=lr, momentum=0.5), adjoint=adjoint, callback=callback,
        batches=batches(),
    )  # fmt: skip
    expected = solve(lr, adjoint=adjoint, steps=3)
    assert found.steps == len(found.losses) == 3
    assert used == [0, 1, 2]
    torch.testing.assert_close(found.params.detach(), expected.params.detach())


def test_what_a_callback_returns_is_ignored():
    assert solve(0.3, lambda *_: True).steps == 4  # as tqdm's update returns


@pytest.mark.parametrize("adjoint", [None, Unrolled(), Checkpointed(), ForwardMode()], ids=repr)
@pytest.mark.parametrize("tol", [0.0, 0.5, 1e9])
def test_a_tolerance_ends_the_calls(adjoint, tol):
    callback, record = history()
    sol = solve(rate(), callback, adjoint, tol=tol)
    assert len(record) == sol.steps == {0.0: 4, 0.5: 3, 1e9: 0}[tol]


@pytest.mark.parametrize("adjoint", [None, Unrolled(), Checkpointed(), Truncated(1)], ids=repr)
def test_under_vmap_all_examples_are_seen_together(adjoint):
    callback, record = history()
    lrs = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    sol = torch.vmap(lambda lr: solve(lr, callback, adjoint))(lrs)
    assert [step for step, *_ in record] == [0, 1, 2, 3]
    assert record[-1][1].shape == (3,) or record[0][1].shape == ()
    torch.testing.assert_close(record[-1][2], sol.params)
    torch.testing.assert_close(record[-1][3].momentum_buffer, sol.state.momentum_buffer)


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed()], ids=repr)
def test_under_grad_values_are_plain(adjoint):
    callback, record = history()
    lr = rate().detach()
    found = torch.func.grad(lambda lr: solve(lr, callback, adjoint).params.sum())(lr)
    torch.testing.assert_close(
        found, torch.func.grad(lambda lr: solve(lr, None, adjoint).params.sum())(lr)
    )
    assert len(record) == 4


def test_hyperparameters_may_depend_on_the_step_and_buffers_be_carried():
    callback, record = history()
    sol = diffopt.minimize(
        lambda w, count: (loss(w, TARGET), count + 1), torch.zeros(2, dtype=torch.float64),
        optimizer=OPT, hparams=lambda t: OPT.hparams(lr=0.1 * (t + 1), momentum=0.5), steps=3,
        buffers=torch.zeros(()), callback=callback,
    )  # fmt: skip
    assert sol.buffers == len(record) == 3


def test_errors_of_a_callback_are_raised():
    def callback(step, *_):
        raise KeyError(step)

    with pytest.raises(KeyError):
        solve(0.1, callback)


def test_what_is_not_callable_is_rejected():
    with pytest.raises(TypeError, match="callback is 3 of type int, not a function"):
        solve(0.1, 3)


def test_a_compiled_loop_rejects_a_callback():
    compiled = torch.compile(lambda lr: solve(lr, print).params, backend="eager", fullgraph=False)
    with pytest.raises(RuntimeError, match="cannot call a callback"):
        compiled(rate())


@pytest.mark.parametrize("in_place", [False, True])
def test_a_callback_cannot_change_what_steps_capture_that_are_taken_again(in_place):
    scale = torch.ones(())

    def run(adjoint):
        nonlocal scale
        scale = torch.ones(())

        def halve(*_):
            nonlocal scale
            scale = scale.mul_(0.5) if in_place else scale * 0.5

        return diffopt.minimize(
            lambda w: scale * loss(w, TARGET), torch.zeros(2, dtype=torch.float64),
            optimizer=OPT, hparams=OPT.hparams(lr=rate()), steps=3, adjoint=adjoint, callback=halve,
        )  # fmt: skip

    assert len(run(None).losses) == 3
    with pytest.raises(RuntimeError, match="since"):
        run(Checkpointed())


@pytest.mark.parametrize(
    "options", [{}, {"compile": {"backend": "eager"}}], ids=["eager", "compiled"]
)
@pytest.mark.parametrize("how", [Unrolled(), FirstOrder(), None])
def test_a_loop_with_a_tolerance_and_a_callback_runs_once(how, options):
    read, seen = [], []

    def batches():
        for t in range(20):
            read.append(t)
            yield torch.ones(())

    opt, lr = diffopt.sgd(), torch.tensor(0.5, requires_grad=True)
    sol = diffopt.minimize(
        lambda w, target: 0.5 * (w - target) ** 2, torch.zeros(()), batches=batches(), tol=0.1,
        optimizer=opt, hparams=opt.hparams(lr=lr), adjoint=how,
        callback=lambda t, loss, params, state: seen.append(params.item()), **options,
    )  # fmt: skip
    assert seen == [0.5, 0.75, 0.875, 0.9375]
    assert read == [0, 1, 2, 3, 4]  # the fifth gradient is within the tolerance
    assert sol.steps == len(sol.losses) == 4
    if how is not None:
        torch.testing.assert_close(torch.autograd.grad(sol.params, lr)[0], EXACT[type(how)])


EXACT = {Unrolled: torch.tensor(0.5), FirstOrder: torch.tensor(1.875)}
"""d(1 - (1 - lr)^4)/d lr, and the sum of the gradients, which are constants."""


@pytest.mark.parametrize("how", [Unrolled(), Implicit(), None])
def test_a_loss_is_called_once_for_each_step_of_a_loop_with_a_tolerance(how):
    calls = []

    def loss(w):
        calls.append(1)
        return 0.5 * (w - 1) ** 2

    opt = diffopt.sgd()
    with torch.no_grad():
        diffopt.minimize(
            loss, torch.zeros(()), optimizer=opt, hparams=opt.hparams(lr=0.5), steps=20, tol=0.1,
            adjoint=how,
        )  # fmt: skip
    assert len(calls) == 5


def test_tensors_without_values_have_no_step_that_is_known_to_be_the_last():
    seen = []
    sol = diffopt.minimize(
        loss, torch.ones(2, device="meta"), TARGET.to("meta"), optimizer=OPT, steps=3, tol=0.1,
        hparams=OPT.hparams(lr=0.1), callback=lambda t, *_: seen.append(t),
    )  # fmt: skip
    assert seen == [0, 1, 2]
    assert sol.params.is_meta


@pytest.mark.parametrize("place", [1, 2, 3], ids=["loss", "params", "state"])
@pytest.mark.parametrize(
    ("adjoint", "compile"),
    [(x, False) for x in (None, Unrolled(), Checkpointed())] + [(None, {"backend": "eager"})],
)
def test_a_callback_that_writes_to_what_the_loop_uses_is_refused(adjoint, place, compile):
    def halve(*seen):
        x = seen[place].momentum_buffer if place == 3 else seen[place]
        x.mul_(0.5)

    with pytest.raises(RuntimeError, match="callback has written to a tensor"):
        solve(rate(), halve, adjoint, compile=compile)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap])
def test_a_callback_that_writes_under_a_transform_is_refused(transform):
    def outer(lr):
        return solve(lr, lambda step, value, params, state: params.zero_()).params.sum()

    with pytest.raises(RuntimeError, match="callback has written to a tensor"):
        transform(outer)(rate().detach().expand(3) if transform is torch.vmap else rate())
