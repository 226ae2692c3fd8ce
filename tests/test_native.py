"""update_ by torch's fused kernels: used where they compute the rule, and equal to the rule."""

import dataclasses
import math
import os
import shutil
import warnings

import pytest
import torch
from torch.utils import _pytree as pytree

import diffopt
from diffopt._rule import recording, symbols, tiles, ways
from diffopt.rules import Leafwise, leafwise
from registry import REGISTRY

KERNELS = {
    "_fused_sgd_": (diffopt.sgd(), {"momentum": 0.9}),
    "_fused_adam_": (diffopt.adam(amsgrad=True), {}),
    "_fused_adamw_": (diffopt.adamw(), {}),
    "_fused_adagrad_": (diffopt.adagrad(), {}),
}


ELEMENTWISE = ("rmsprop", "nadam", "adadelta", "adamax", "asgd", "radam", "rprop")


@pytest.fixture
def programs(monkeypatch):
    """Programs also for a few elements."""
    monkeypatch.setattr(tiles, "_LITTLE", 0)


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


@pytest.fixture
def calls(monkeypatch):
    """How many tensors each call of a fused kernel updates."""
    torch.manual_seed(0)
    seen = []
    for name in KERNELS:
        kernel = getattr(torch, name)

        def spy(params, *args, kernel=kernel, **kwargs):
            seen.append(len(params))
            return kernel(params, *args, **kwargs)

        monkeypatch.setattr(torch, name, spy)
    return seen


def agree(opt, record, params, steps=3):
    """Run beside the rule, tensor by tensor."""
    leaf = dataclasses.replace(opt, execution="leaf")
    twin = pytree.tree_map(torch.clone, params)
    state, twin_state = opt.init(params), opt.init(twin)
    for _ in range(steps):
        grads = pytree.tree_map(torch.randn_like, params)
        opt.update_(params, grads, state, record)
        leaf.update_(twin, grads, twin_state, record)
    torch.testing.assert_close((params, state), (twin, twin_state), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_call_for_all_tensors(kernel, calls):
    opt, numbers = KERNELS[kernel]
    params = {"a": draw(3, 2), "b": draw(), "c": draw(0), "d": draw(5)}
    agree(opt, opt.hparams(lr=0.1, weight_decay=0.01, **numbers), params)
    assert calls == [4, 4, 4]


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_call_for_each_set_of_numbers_and_dtype(kernel, calls):
    opt, numbers = KERNELS[kernel]
    params = {"a": [draw(3), draw(2)], "b": draw(3), "c": torch.nn.Parameter(draw(3))}
    agree(opt, opt.hparams(lr={"a": 0.1, "b": 0.2, "c": 0.2}, **numbers), params, steps=1)
    assert calls == [2, 1, 1]
    mixed = {"a": draw(3), "b": draw(3, dtype=torch.float32)}
    opt.update_(mixed, mixed, opt.init(mixed), opt.hparams(**numbers))
    assert calls[3:] == [1, 1]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "param",
    [lambda: draw(3, 2).T, lambda: torch.randn(3, dtype=torch.complex128)],
    ids=["strided", "complex"],
)
def test_the_rule_runs_where_the_kernel_cannot(kernel, param, calls):
    opt, numbers = KERNELS[kernel]
    agree(opt, opt.hparams(lr=0.1, **numbers), {"a": param()})
    assert calls == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
def test_tensors_on_the_cpu_are_numbers_for_the_kernel(kernel, dtype, calls):
    opt, numbers = KERNELS[kernel]
    given = {k: torch.tensor(x, dtype=dtype) for k, x in {"lr": 0.1, **numbers}.items()}
    agree(opt, opt.hparams(**given), {"a": draw(3)})
    assert calls == [1, 1, 1]


@pytest.mark.parametrize(
    ("opt", "numbers", "expected"),
    [
        (diffopt.sgd(), {"momentum": 0.9, "dampening": 0.3}, 2),
        (diffopt.sgd(), {"momentum": 0.0, "weight_decay": 0.1}, 0),
        (diffopt.sgd(maximize=True), {"momentum": 0.0}, 0),
        (diffopt.adagrad(), {"initial_accumulator_value": 0.2}, 2),
    ],
    ids=["dampening", "decay in the buffer", "ascent in the buffer", "initial value"],
)
def test_the_rule_runs_where_the_kernel_computes_something_else(opt, numbers, expected, calls):
    agree(opt, opt.hparams(lr=0.1, **numbers), {"a": draw(3)})
    assert len(calls) == expected


def test_without_momentum_gradients_are_copied_to_the_buffers(calls):
    opt = diffopt.sgd()
    agree(opt, opt.hparams(lr=0.1), [draw(3), *(draw(2, 2) for _ in range(7))])
    assert calls == [8, 8, 8]


@pytest.mark.parametrize("kernel", KERNELS)
def test_many_small_tensors_take_the_kernel_where_a_compiled_one_is_asked_for(kernel, calls):
    opt, numbers = KERNELS[kernel]
    opt = dataclasses.replace(opt, execution="compiled")
    hp, params = opt.hparams(lr=0.1, **numbers), [draw(2) for _ in range(100)]
    agree(opt, hp, params, steps=2)
    assert calls == [100, 100]
    new = opt.update(params, params, opt.init(params), hp)
    leaf = dataclasses.replace(opt, execution="leaf")
    expected = leaf.update(params, params, opt.init(params), hp)
    torch.testing.assert_close(new, expected, rtol=0, atol=0)  # which is not in place


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_tiles_equal_the_rule_tensor_by_tensor(dtype, monkeypatch, programs):
    monkeypatch.setattr(tiles, "TILE", 7)
    torch.manual_seed(0)
    params = {"big": draw(5, 6), "small": [draw(2), draw(), draw(0)], "other": draw(3, 2)}
    params = pytree.tree_map(lambda p: p.to(dtype), params)
    for opt in (diffopt.rmsprop(centered=True), diffopt.nadam(), diffopt.rprop(maximize=True)):
        agree(opt, opt.hparams(lr=0.1), params)


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "side by side"])
@pytest.mark.parametrize("little", [0, 1 << 15], ids=["program", "eagerly"])
def test_small_tensors_that_lie_side_by_side_are_updated_in_their_memory(
    separate, little, monkeypatch
):
    monkeypatch.setattr(tiles, "_LITTLE", little)
    torch.manual_seed(0)
    opt, vector = diffopt.rmsprop(), draw(28)
    leaf = dataclasses.replace(opt, execution="leaf")
    params = [x.detach() for x in vector.split([3, 20, 5])]  # with versions of their own
    params = [x.clone() for x in params] if separate else params
    twin = pytree.tree_map(torch.clone, params)
    state, twin_state, record = opt.init(params), opt.init(twin), opt.hparams(lr=0.1)
    versions = [p._version for p in params]
    for _ in range(2):
        grads = pytree.tree_map(torch.randn_like, params)
        opt.update_(params, grads, state, record)
        leaf.update_(twin, grads, twin_state, record)
    torch.testing.assert_close((params, state), (twin, twin_state), rtol=1e-12, atol=1e-12)
    assert all(p._version > old for p, old in zip(params, versions, strict=True))
    assert torch.equal(vector[:3], params[0]) != separate


@pytest.mark.parametrize("name", ["asgd", "rmsprop", "rprop", "adafactor"])
@pytest.mark.parametrize("size", [7, 1 << 18], ids=["pieces", "together"])
def test_a_gradient_may_be_its_own_parameter(name, size, monkeypatch, programs):
    monkeypatch.setattr(tiles, "TILE", size)
    torch.manual_seed(0)
    opt = getattr(diffopt, name)()
    leaf = dataclasses.replace(opt, execution="leaf")
    params = [x.view(-1) for x in draw(4, 5)]
    twin = pytree.tree_map(torch.clone, params)
    state, twin_state, record = opt.init(params), opt.init(twin), opt.hparams(lr=0.1)
    for _ in range(2):
        opt.update_(params, params, state, record)
        leaf.update_(twin, twin, twin_state, record)
    torch.testing.assert_close((params, state), (twin, twin_state), rtol=1e-12, atol=1e-12)


def test_flags_arrive_in_the_kernel(calls):
    for opt in (
        diffopt.sgd(nesterov=True, maximize=True),
        diffopt.sgd(momentum=False, maximize=True),
        diffopt.adam(maximize=True),
        diffopt.adamw(amsgrad=True, maximize=True),
        diffopt.adagrad(maximize=True),
    ):
        numbers = {"momentum": 0.9} if hasattr(opt.hparams(), "momentum") else {}
        agree(opt, opt.hparams(lr=0.1, **numbers), {"a": draw(3)})
    assert len(calls) == 15


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler"
)
def test_a_compiled_kernel_equals_the_rule():
    opt = dataclasses.replace(diffopt.rmsprop(), execution="compiled")
    params = {"a": [draw(3, 2), draw()], "b": draw(4)}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile")
        agree(opt, opt.hparams(lr=0.1, momentum=0.9), params)


def test_a_compiled_kernel_that_is_wrong_is_not_used(monkeypatch):
    def wrong(function, **_):
        def compiled(numbers, vectors):
            function(numbers, vectors)
            vectors[0][0].mul_(1.1)

        return compiled

    monkeypatch.setattr(torch, "compile", wrong)
    opt = dataclasses.replace(diffopt.sgd(), execution="compiled")
    with pytest.warns(UserWarning, match="computes wrong values for this rule"):
        agree(opt, opt.hparams(lr=0.1, momentum=0.9), {"a": draw(3), "b": draw(2)})


def test_every_elementwise_rule_is_recorded_as_a_program(monkeypatch, programs):
    seen = []
    run = recording.Program.run
    monkeypatch.setattr(recording.Program, "run", lambda *args: seen.append(args) or run(*args))
    optimizers = {case.optimizer for case in REGISTRY.values()}
    rules = [opt for opt in optimizers if isinstance(opt, Leafwise) and opt.elementwise]
    for opt in rules:
        monkeypatch.setattr(type(opt), "native", None)
        agree(opt, opt.hparams(lr=0.1), {"a": draw(3), "b": draw(2, 2)}, steps=6)
    assert len(seen) == 6 * len(rules)


def test_a_program_computes_what_is_wanted_and_a_value_wanted_twice_once():
    tape = recording.Tape(3, torch.float32)
    p, g, _ = tape.inputs
    new = 2 * p + g
    _ = (g * g).sqrt()
    program = tape.program([new, None, new])
    assert len(program.lines) == 2
    assert program.copies == [(2, 0)]
    old, grad, average = draw(5), draw(5), draw(5)
    expected = 2 * old + grad
    program.run((old, grad, average), program.registers(5, old), tape.constants)
    assert torch.equal(old, expected)
    assert torch.equal(average, expected)


def test_a_program_is_kept_while_only_numbers_change():
    def recorded(*numbers):
        tape = recording.Tape(1, torch.float32)
        out = tape.inputs[0]
        for number in numbers:
            out = torch.add(out * number, 1, alpha=number)
        return tape.program([out]), tape.constants

    program, constants = recorded(2.0)
    other, others = recorded(torch.tensor(3.0))
    assert program is other
    assert program is not recorded(2.0, 3.0)[0]
    x, y = draw(5), draw(5)
    expected = x * 2 + 2, y * 3 + 3
    program.run((x,), program.registers(5, x), constants)
    program.run((y,), program.registers(5, y), others)
    torch.testing.assert_close((x, y), expected)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_kept_programs_follow_numbers_that_change(name, programs):
    torch.manual_seed(0)
    opt = getattr(diffopt, name)()
    leaf = dataclasses.replace(opt, execution="leaf")
    params = {"a": draw(3), "b": draw(2, 2)}
    twin, state = {k: p.clone() for k, p in params.items()}, opt.init(params)
    twin_state = leaf.init(twin)
    names = {field.name for field in dataclasses.fields(opt.hparams)}
    for lr, more in ((0.1, 0.0), (0.2, 0.1), (0.0, 0.0), (0.1, 0.3), (0.3, 1e-9), (0.1, 0.0)):
        record = opt.hparams(lr=lr, **dict.fromkeys(names & {"weight_decay", "beta1", "rho"}, more))
        grads = {k: draw(*p.shape) for k, p in params.items()}
        opt.update_(params, grads, state, record)
        leaf.update_(twin, grads, twin_state, record)
        torch.testing.assert_close((params, state[1:]), (twin, twin_state[1:]))


SCHEDULED = [(0.1, 0.0), (0.2, 0.1), (0.3, 0.1), (0.3, 0.0), (0.1, 0.0), (0.2, 0.2)]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_rule_is_not_run_again_for_other_numbers_and_gives_the_same_bits(
    name, programs, monkeypatch
):
    tiles._recordings.cache_clear()
    opt, recorded, record = getattr(diffopt, name)(), [], tiles._recording
    monkeypatch.setattr(tiles, "_recording", lambda *args: recorded.append(0) or record(*args))
    decays = "weight_decay" in {field.name for field in dataclasses.fields(opt.hparams)}
    start, ends = [draw(3), draw(2, 2)], []
    grads = [[draw(3), draw(2, 2)] for _ in SCHEDULED]
    for kept in (tiles._kept, lambda *_: None):
        monkeypatch.setattr(tiles, "_kept", kept)
        params = [p.clone() for p in start]
        state = opt.init(params)
        for (lr, decay), grad in zip(SCHEDULED, grads, strict=True):
            record_ = opt.hparams(lr=lr, **{"weight_decay": decay} if decays else {})
            opt.update_(params, grad, state, record_)
        ends.append((params, state))
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    # Where the decay comes and goes, and where RAdam begins to rectify.
    assert len(recorded) <= 1 + 3 * decays + (name == "radam")


def test_a_thread_may_step_by_the_same_rule_with_other_numbers_at_the_same_time(
    programs, monkeypatch
):
    tiles._recordings.cache_clear()
    opt, start, grad = diffopt.radam(), [draw(3), draw(3)], [draw(3), draw(3)]

    def step(count):
        params = [p.clone() for p in start]
        state = opt.init(params)._replace(step=torch.tensor(count, dtype=torch.float64))
        opt.update_(params, grad, state, opt.hparams(lr=0.1))
        return params

    def interrupted(sheet, numbers):
        monkeypatch.setattr(symbols.Sheet, "cells", cells)
        result = sheet.cells(numbers)
        step(10)  # which RAdam rectifies
        return result

    expected, cells = step(1), symbols.Sheet.cells
    monkeypatch.setattr(symbols.Sheet, "cells", interrupted)
    torch.testing.assert_close(step(1), expected, rtol=0, atol=0)


def test_a_rule_of_others_may_look_at_what_is_no_argument(programs):
    rates = iter([0.5, 0.25])
    sgd = diffopt.sgd(momentum=False)

    def rule(p, g, s, hp, c):
        return p - next(rates) * hp.lr * g, s

    opt = leafwise(sgd.State, sgd.hparams, sgd.begin, rule, elementwise=True)
    params = [torch.zeros(2), torch.zeros(2)]
    for _ in range(2):
        opt.update_(params, [torch.ones(2)] * 2, opt.init(params), opt.hparams(lr=1.0))
    assert params[0].tolist() == [-0.75, -0.75]


def test_symbols_compute_what_numbers_do_until_a_comparison_comes_out_differently():
    sheet = symbols.Sheet([2.0, 3.0])
    x, y = sheet.inputs
    results = [1 - x, x**y / 2, -(x.sqrt()), 3 if x < y else abs(x), x if x else y, max(x, 1)]
    cells = [sheet.cell(result) for result in results]
    sheet.seal()
    for a, b in ((2.0, 3.0), (0.7, 0.9)):
        found = sheet.cells([a, b])
        if a > 1:
            assert [found[k] for k in cells] == [1 - a, a**b / 2, -math.sqrt(a), 3, a, a]
        else:
            assert found is None
    assert sheet.cells([3.0, 2.0]) is None
    for function in (float, int, math.sqrt, round):
        with pytest.raises(TypeError):
            function(x)


def test_a_sum_stops_the_recording_until_it_is_known():
    tape = recording.Tape(1, torch.float32, whole=draw(5))
    with pytest.raises(recording.Summed):
        (2 * tape.inputs[0]).sum()
    tape = recording.Tape(1, torch.float32, whole=draw(5), sums=[3.0])
    assert tape.inputs[0].sum() == 3
    assert (tape.inputs[0].numel(), tape.inputs[0].dim()) == (5, 1)
    with pytest.raises(recording.Summed):
        tape.inputs[0].sum()
    with pytest.raises(recording.Unrecordable):
        recording.Tape(1, torch.float32).inputs[0].numel()


def test_a_step_between_two_counts_is_not_rounded():
    opt, params = diffopt.adam(), [torch.ones(2, dtype=torch.float64)]
    grads, hp = [torch.tensor([1.0, -2.0], dtype=torch.float64)], opt.hparams(lr=0.1)
    state = opt.init(params)._replace(step=torch.tensor(0.3, dtype=torch.float64))
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)  # the rule, not the kernel
    (expected,), _ = opt.update(params, grads, state, opt.hparams(lr=rate))
    (mine,), _ = opt.update(params, grads, state, hp)
    torch.testing.assert_close(mine, expected.detach(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_a_buffer_that_is_given_for_the_first_step_counts(dampening):
    opt, params, grads = diffopt.sgd(), [torch.ones(2)], [torch.tensor([1.0, -2.0])]
    hp = opt.hparams(lr=0.1, momentum=0.5, dampening=dampening)
    state = opt.init(params)._replace(momentum_buffer=[torch.tensor([4.0, 2.0])])
    (new,), made = opt.update(params, grads, state, hp)
    opt.update_(params, grads, state, hp)
    for p, b in ((new, made.momentum_buffer[0]), (params[0], state.momentum_buffer[0])):
        torch.testing.assert_close(b, torch.tensor([3.0, -1.0]))  # 0.5 * buffer + gradient
        torch.testing.assert_close(p, 1 - 0.1 * b)


@pytest.mark.parametrize(
    "name", ["rmsprop", "nadam", "adadelta", "asgd", "radam", "rprop", "adafactor", "adam"]
)
@pytest.mark.parametrize("dtypes", ["float64 float64", "bfloat16 float32", "float64 float32"])
def test_update_of_many_tensors_equals_the_rule_and_leaves_its_arguments(name, dtypes):
    torch.manual_seed(0)
    dtype, kept = (getattr(torch, x) for x in dtypes.split())
    opt = getattr(diffopt, name)()
    leaf = dataclasses.replace(opt, execution="leaf")
    record = opt.hparams(lr=0.1)
    params = {"small": [draw(2, 3).to(dtype) for _ in range(16)], "scalar": draw().to(dtype)}
    state = pytree.tree_map(lambda x: x.to(kept) if x.dim() else x, opt.init(params))
    twin, twin_state = params, state
    for _ in range(2):
        grads = pytree.tree_map(torch.randn_like, params)
        before = pytree.tree_map(torch.clone, (params, grads, state))
        new = opt.update(params, grads, state, record)
        torch.testing.assert_close((params, grads, state), before, rtol=0, atol=0)
        twin, twin_state = leaf.update(twin, grads, twin_state, record)
        params, state = new
        torch.testing.assert_close(new, (twin, twin_state))


def test_update_of_many_tensors_without_derivatives_runs_as_update_(monkeypatch):
    seen, tiled_ = [], tiles.tiled_
    monkeypatch.setitem(ways.RUN, "tiles", lambda *args: seen.append(args) or tiled_(*args))
    opt, params = diffopt.rmsprop(), [draw(3).requires_grad_() for _ in range(16)]
    state, record = opt.init(params), opt.hparams(lr=0.1)
    with torch.no_grad():
        opt.update(params, params, state, record)
    assert len(seen) == 1
    new, _ = opt.update(params, params, state, record)
    assert len(seen) == 1
    assert all(p.requires_grad for p in new)


@pytest.mark.parametrize("n", [1, 200])
def test_shared_memory_is_found_among_few_and_many(n):
    opt, memory = diffopt.sgd(), torch.zeros(7)
    params = [*(torch.zeros(2) for _ in range(n)), memory[:4], memory[3:]]
    grads = pytree.tree_map(torch.ones_like, params)
    with pytest.raises(ValueError, match=rf"params\[{n + 1}\] and params\[{n}\] share memory"):
        opt.update_(params, grads, opt.init(params), opt.hparams(lr=0.1))
    params[-1] = torch.zeros(4)
    with pytest.raises(ValueError, match=rf"grads\[0\] and params\[{n}\] share memory"):
        opt.update_(params, [memory[1:3], *grads[1:]], opt.init(params), opt.hparams(lr=0.1))
    opt.update_(params, params, opt.init(params), opt.hparams(lr=0.1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "chosen",
    [
        lambda g, lr: torch.where(g > 0, lr, g),
        lambda g, lr: torch.where(g > 0, 0.1, g * lr),
        lambda g, lr: torch.where(g > 0, lr, 0.3) * g,
    ],
)
def test_a_choice_between_numbers_has_their_digits(chosen, dtype):
    def rule(p, g, state, hp, scalars):
        return p - chosen(g, hp.lr), state

    opt = diffopt.rules.leafwise(
        diffopt.sgd().State, diffopt.sgd(momentum=False).hparams,
        lambda p, step: diffopt.sgd().State(step, ()), rule, elementwise=True,
    )  # fmt: skip
    params = [torch.linspace(-1, 1, 200_000, dtype=dtype)]
    state, hp = opt.init(params), opt.hparams(lr=0.1)
    right = params[0] - chosen(params[0], 0.1)
    opt.update_(params, [params[0].clone()], state, hp)
    assert torch.equal(params[0], right)


@pytest.mark.parametrize("place", ["params", "grads", "state"])
@pytest.mark.parametrize("make", [diffopt.sgd, diffopt.adam, diffopt.adagrad, diffopt.rmsprop])
def test_negated_views_are_updated_like_other_tensors(make, place):
    """Such as `z.conj().imag`, which native and foreach kernels do not take."""
    opt = make()
    hp = opt.hparams(lr=0.1, momentum=0.9) if make is diffopt.sgd else opt.hparams(lr=0.1)

    def negated(x):
        return torch.complex(x, -x).conj().imag

    def run(change):
        given = {"params": [torch.ones(3)], "grads": [torch.arange(3.0)]}
        given["state"] = opt.init(given["params"])
        for _ in range(2):
            given[place] = pytree.tree_map_only(
                torch.Tensor, lambda x: change(x) if x.dim() else x, given[place]
            )
            opt.update_(*given.values(), hp)
        pure = opt.update(*given.values(), hp)
        return given["params"], given["state"], pure

    torch.testing.assert_close(run(negated), run(torch.clone))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
@pytest.mark.parametrize("fused", [None, True])
def test_steps_take_negated_gradients(name, fused):
    def run(kind, negate):
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = getattr(kind, name)([param], lr=0.1, fused=fused)
        for t, grad in enumerate((torch.arange(3.0), torch.ones(3))):  # the first makes a plan
            view = torch.complex(grad, -grad).conj().imag
            param.grad = view if negate and t else grad
            optimizer.step()
        return param

    torch.testing.assert_close(run(diffopt.optim, True), run(torch.optim, False))
