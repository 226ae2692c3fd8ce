"""Elementwise rules as kernels of torch.compile: one for all shapes, and right or not used."""

import copy
import dataclasses
import os
import pickle
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from unittest import TestCase

import pytest
import torch
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

import diffopt
from diffopt import _compiler, optim
from diffopt._rule import compiled
from diffopt.rules import Hyperparameter, Leafwise, hparams, number
from registry import REGISTRY

NAMES = {  # each rule once: of rows that differ in hyperparameters the last
    case.optimizer: name
    for name, case in REGISTRY.items()
    if isinstance(case.optimizer, Leafwise) and case.optimizer.elementwise
}
RULES = {name: rule for rule, name in NAMES.items()}
ALGORITHMS = list({type(opt): name for name, opt in RULES.items()}.values())  # one rule of each
# With the algorithms above, each operation that a flag chooses (decay in two ways, amsgrad, ...)
OTHER_BRANCHES = ["sgd-no-momentum", "sgd-nesterov", "rmsprop-no-momentum"]
CLASSES = ["Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.complex64]

needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler"
)
every_rule = pytest.mark.parametrize("rule", RULES)
every_class = pytest.mark.parametrize("name", CLASSES)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No kernels yet, no warnings issued."""
    torch.manual_seed(0)
    monkeypatch.setattr(compiled, "_KERNELS", {})
    monkeypatch.setattr(_compiler, "_WARNED", set())


@pytest.fixture
def uncompiled(monkeypatch):
    """Kernels run as they are written; a list of the lengths of their vectors."""
    lengths = []

    def compile_(kernel, **_):
        def run(numbers, vectors):
            lengths.append(len(vectors[0]))
            return kernel(numbers, vectors)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    return lengths


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile traces; they run operation by operation."""
    seen, compile_ = [], torch.compile

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda kernel, **given: compile_(kernel, **given | {"backend": backend})
    )
    return seen


def broken(monkeypatch, spoil):
    """Kernels are followed by `spoil(vectors)`."""

    def compile_(kernel, **_):
        def run(numbers, vectors):
            result = kernel(numbers, vectors)
            spoil(vectors)
            return result

        return run

    monkeypatch.setattr(torch, "compile", compile_)


def draw(dtype=torch.float64, sizes=()):
    """Tensors of all layouts, or vectors of these sizes."""

    def new(*shape):
        return torch.randn(shape, dtype=dtype)

    if sizes:
        return [new(size) for size in sizes]
    channels_last = new(2, 3, 4, 5).to(memory_format=torch.channels_last)
    return [new(4, 3), new(), new(0, 2), new(3, 4).T, new(5, 6)[:, ::2], channels_last, new(70_000)]


def run(opt, params, steps=3, seed=1, **numbers):
    """The end of a run in place, from a copy of these params."""
    generator = torch.Generator().manual_seed(seed)
    params = [p.clone() for p in params]
    state = opt.init(params)
    for _ in range(steps):
        grads = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in params]
        opt.update_(params, grads, state, opt.hparams(lr=0.1, **numbers))
    return params, state


@hparams
class SquashedHParams:
    lr: Hyperparameter = number(0.1)


class SquashedState(NamedTuple):
    step: Any


class Squashed(Leafwise):
    """The sign of a gradient, smoothed by a function that has no kernel of ours."""

    State = SquashedState
    hparams = SquashedHParams
    elementwise = True
    power = 1

    def rule(self, p, g, s, hp, c):
        return p - hp.lr * torch.tanh(g) ** self.power, s


class Choosy(Squashed):
    elementwise = True

    def rule(self, p, g, s, hp, c):
        return (p - hp.lr * g if hp.lr > 0 else p), s


class Guarded(Squashed):
    """Divides by what depends on the dtype of the parameter and of a comparison."""

    elementwise = True

    def rule(self, p, g, s, hp, c):
        assert (g > 0).dtype == torch.bool
        return p - hp.lr * g / (abs(g) + 1e4 * torch.finfo(p.dtype).eps), s


def ways(opt):
    return [dataclasses.replace(opt, execution=way) for way in ("compiled", "leaf")]


def train(cls, params, steps=3, seed=1, **options):
    generator = torch.Generator().manual_seed(seed)
    params = [Parameter(p.clone()) for p in params]
    optimizer = cls(params, lr=0.1, **options)
    advance(optimizer, params, steps, generator)
    return optimizer, params


def advance(optimizer, params, steps, generator):
    for _ in range(steps):
        for p in params:
            grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
            p.grad = grad.to(memory_format=torch.preserve_format)
        optimizer.step()


def end(optimizer, params):
    return [p.detach() for p in params], [dict(optimizer.state[p]) for p in params]


def tolerance(dtype):
    eps = {torch.bfloat16: 0.05, torch.float64: 1e-7}.get(dtype, 1e-5)
    return {"rtol": eps, "atol": eps}


# Values


@every_class
def test_small_tensors_of_a_group_are_stepped_by_one_call(name, uncompiled):
    train(getattr(optim, name), draw(sizes=[10] * 50), steps=3, fused=True)
    steps = [length for length in uncompiled if length != compiled._SAMPLE]
    assert steps[-2:] == [500, 500]
    assert len(steps) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_rule
def test_a_kernel_computes_the_rule_in_every_layout_and_dtype(rule, dtype, uncompiled):
    if dtype.is_complex and RULES[rule].refuse(torch.zeros(2, dtype=dtype)):
        pytest.skip("refuses complex parameters")
    params = draw(dtype)
    found, expected = (run(opt, params) for opt in ways(RULES[rule]))
    torch.testing.assert_close(found, expected, **tolerance(dtype))
    assert len(uncompiled) == 1 + 3 * 2  # the sample; the big tensor, and the others but one


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_class
def test_a_class_fused_computes_what_it_does_otherwise(name, dtype, uncompiled):
    cls, params = getattr(optim, name), draw(dtype)
    found, expected = (
        end(*train(cls, params, **flags)) for flags in ({"fused": True}, {"foreach": False})
    )
    torch.testing.assert_close(found, expected, **tolerance(dtype))
    assert uncompiled


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("rule", "dtype"),  # what is cast, and where, is the same for all rules
    [
        *((r, torch.float32) for r in [*ALGORITHMS, *OTHER_BRANCHES]),
        *((r, torch.bfloat16) for r in ALGORITHMS[::3]),
    ],
)
def test_what_is_compiled_computes_the_rule(rule, dtype):
    params = draw(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile")
        found, expected = (run(opt, params) for opt in ways(RULES[rule]))
    torch.testing.assert_close(found, expected, **tolerance(dtype))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["NAdam", "RMSprop"])  # kernels are those of the rules above
def test_what_is_compiled_for_a_class_computes_its_step(name):
    cls, params = getattr(optim, name), draw(torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile")
        found = end(*train(cls, params, fused=True))
    expected = end(*train(cls, params, foreach=False))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_that_are_lazily_conjugated_are_read_as_they_are(uncompiled):
    start, grad = torch.randn(2, 3, dtype=torch.complex128)
    ends = []
    for opt in ways(diffopt.adamax()):
        params = [start.clone()]
        state = opt.init(params)
        opt.update_(params, [grad.conj()], state, opt.hparams())
        ends.append((params, state))
    torch.testing.assert_close(*ends)
    assert len(uncompiled) == 2


@pytest.mark.parametrize(
    "change", [torch._neg_view, lambda x: x[:1].expand(3)], ids=["negative", "expanded"]
)
def test_gradients_may_become_odd_from_step_to_step(change, uncompiled):
    ends = []
    for fused in (True, None):
        params = [Parameter(torch.ones(3)), Parameter(torch.ones(2))]
        optimizer = optim.RMSprop(params, fused=fused)
        for step in range(3):
            params[1].grad, grad = torch.ones(2), torch.arange(1.0, 4.0)
            params[0].grad = change(grad) if step == 1 else grad
            optimizer.step()
        ends.append(end(optimizer, params))
    torch.testing.assert_close(*ends)
    assert uncompiled[1] == uncompiled[-1] == 5  # by one kernel, before and after


@pytest.mark.parametrize("sizes", [(1,), (0,), (1, 1), (0, 1)], ids=str)
@pytest.mark.parametrize("rule", ["nadam", "rprop"])
def test_tensors_of_no_or_one_element(rule, sizes, uncompiled):
    params = draw(sizes=sizes)
    found, expected = (run(opt, params) for opt in ways(RULES[rule]))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["NAdam", "ASGD"])
def test_counts_go_on_where_all_parameters_are_empty(name, uncompiled):
    cls = getattr(optim, name)
    runs = [train(cls, draw(sizes=(0,)), fused=fused) for fused in (True, None)]
    torch.testing.assert_close(*(end(*run) for run in runs))


def test_no_decay_is_not_a_decay_by_zero(uncompiled):
    params = [torch.tensor([torch.inf, 1.0])]
    found, expected = (run(opt, params) for opt in ways(diffopt.adam()))
    assert found[0][0][0] == expected[0][0][0] == torch.inf


def test_a_hyperparameter_for_every_weight_needs_no_kernel(uncompiled):
    lr = torch.tensor([0.1, 0.2])
    ends = []
    for opt in ways(diffopt.rmsprop()):
        params = [torch.ones(2)]
        state = opt.init(params)
        opt.update_(params, [torch.ones(2)], state, opt.hparams(lr=lr))
        ends.append((params, state))
    torch.testing.assert_close(*ends)
    assert uncompiled == []


def test_a_backward_pass_that_needs_the_old_parameters_is_refused(uncompiled):
    p = Parameter(torch.randn(3))
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    optim.RMSprop([p], fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# How many kernels there are


@pytest.mark.parametrize("rule", ALGORITHMS)
def test_a_rule_is_compiled_once_for_all_shapes_and_numbers(rule, graphs):
    opt, _ = ways(RULES[rule])
    for sizes in [(70_000,), (3, 5), (2,) * 20, (90_000, 7, 80_000)]:
        run(opt, draw(sizes=sizes), seed=len(sizes))
    params, grads = draw(sizes=(5,)), draw(sizes=(5,))
    state = opt.init(params)
    for lr in (0.1, 0.0, torch.tensor(0.2, dtype=torch.float64), 1):
        opt.update_(params, grads, state, opt.hparams(lr=lr))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["NAdam", "RMSprop"])
def test_a_class_is_compiled_once_for_all_shapes_and_numbers(name, graphs):
    cls = getattr(optim, name)
    for sizes in [(70_000,), (3, 5), (2,) * 20]:
        optimizer, params = train(cls, draw(sizes=sizes), fused=True)
        optimizer.param_groups[0]["lr"] = 0.01
        advance(optimizer, params, 1, torch.Generator().manual_seed(2))
    assert len(graphs) == 1


@every_rule
def test_kernels_compute_nothing_that_depends_on_numbers_alone(rule, monkeypatch):
    dims = []

    class Results(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            dims.extend([result.dim()] if isinstance(result, torch.Tensor) else [])
            return result

    def compile_(kernel, **_):
        def run(numbers, vectors):
            with Results():
                kernel(numbers, vectors)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    run(ways(RULES[rule])[0], draw(torch.float32, sizes=(5,)), steps=1)
    assert {*dims} == {1}


def test_a_rule_of_ones_own_may_use_any_function_and_change_its_mind(graphs):
    opt, leaf = ways(Squashed())
    for power in (1, 2, 1):
        Squashed.power = power
        found, expected = (run(way, [torch.ones(3)]) for way in (opt, leaf))
        torch.testing.assert_close(found, expected)
    assert len(graphs) == 2


@pytest.mark.parametrize("way", ["compiled", "auto"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.half, torch.double)])
def test_a_rule_may_ask_for_the_dtype(graphs, way, dtypes):
    opt, leaf = dataclasses.replace(Guarded(), execution=way), ways(Guarded())[1]
    params = [x for dtype in dtypes for x in draw(dtype, sizes=(40_000, 3))]
    for found, expected in zip(run(opt, params)[0], run(leaf, params)[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=4 * torch.finfo(found.dtype).eps)
    assert len(graphs) == (len(dtypes) if way == "compiled" else 0)


def test_a_rule_that_asks_for_a_number_runs_without_a_kernel(uncompiled):
    opt, leaf = ways(Choosy())
    with pytest.warns(UserWarning, match="no kernel is made of this rule, Choosy.*value"):
        found = run(opt, [torch.ones(3)])
    torch.testing.assert_close(found, run(leaf, [torch.ones(3)]))
    assert uncompiled == []


def test_many_rules_do_not_use_up_what_torch_recompiles(graphs):
    rules = [diffopt.sgd(), diffopt.sgd(nesterov=True), diffopt.adamax(), diffopt.rmsprop()]
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        for rule in rules:
            run(ways(rule)[0], draw(sizes=(70_000, 3)))
    assert len(graphs) == 4


def test_what_else_torch_compile_watches_has_kernels_of_its_own(graphs):
    opt, params = ways(diffopt.sgd())[0], draw(torch.float32, sizes=(5,))
    threads, expected = torch.get_num_threads(), run(ways(diffopt.sgd())[1], params)
    with torch._dynamo.config.patch(recompile_limit=1):
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                torch.testing.assert_close(run(opt, params), expected)
        finally:
            torch.set_num_threads(threads)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(run(opt, params), expected)
        with torch.inference_mode():
            torch.testing.assert_close(run(opt, params), expected)
    assert len(graphs) == 5


def test_threads_share_a_kernel(uncompiled):
    opt, params = ways(diffopt.sgd())[0], draw(sizes=(5,))
    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(lambda _: run(opt, params), range(4))
    for other in others:
        torch.testing.assert_close(other, first)
    assert uncompiled.count(compiled._SAMPLE) == 1


class Clamped(Squashed):
    """With a constant that is the length of the sample on which a kernel is tried."""

    elementwise = True

    def rule(self, p, g, s, hp, c):
        return p - hp.lr * (g * 100_000).clamp(max=compiled._SAMPLE), s


@pytest.mark.parametrize("rule", [diffopt.rmsprop(), Clamped()], ids=["RMSprop", "Clamped"])
def test_torch_compile_checks_the_first_call_of_a_kernel_only(rule, monkeypatch):
    made = lambda *_: lambda graph, inputs: graph.forward  # noqa: E731
    monkeypatch.setattr(compiled._torch, "compiler", made)
    opt, leaf = ways(rule)
    run(opt, draw(sizes=(5,)), steps=1)
    kernels = [kernel for kernel in compiled._KERNELS.values() if kernel]
    assert kernels
    for kernel in kernels:
        monkeypatch.setattr(kernel, "checked", lambda *_: pytest.fail("it is checked again"))
    params = draw(sizes=(70_000, 3, 1, 90_000))
    torch.testing.assert_close(run(opt, params), run(leaf, params), **tolerance(torch.float64))


def test_the_settings_of_torch_compile_are_left_alone(graphs):
    modules = [torch._dynamo.config, torch._inductor.config]
    before = [module.get_config_copy() for module in modules]
    run(ways(diffopt.adamax())[0], draw())
    assert [module.get_config_copy() for module in modules] == before


def test_compiling_is_logged_with_its_time(uncompiled):
    with TestCase().assertLogs("diffopt") as logs:
        run(ways(diffopt.adamax())[0], draw())
    first, second = (record.getMessage() for record in logs.records)
    assert first.startswith("compiling a kernel of Adamax(")
    assert second.startswith("compiled in ")


# Kernels that are wrong, or impossible


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda vectors: vectors[0][0].mul_(1.1),
        lambda vectors: vectors[0].add_(1.0),
        lambda vectors: vectors[-1][-1:].fill_(torch.nan),
    ],
    ids=["one element", "all of the parameter", "a NaN in the state"],
)
def test_a_wrong_kernel_is_noticed_before_it_writes(spoil, dtype, monkeypatch):
    broken(monkeypatch, spoil)
    opt, leaf = ways(diffopt.sgd())
    params = draw(dtype, sizes=(3, 2))
    with pytest.warns(UserWarning, match="computes wrong values for this rule, SGD"):
        found = run(opt, params, momentum=0.9)
    torch.testing.assert_close(found, run(leaf, params, momentum=0.9), **tolerance(dtype))


@every_class
def test_a_wrong_kernel_of_a_class_is_noticed_before_it_writes(name, monkeypatch):
    broken(monkeypatch, lambda vectors: vectors[0].mul_(1.001))
    params = draw()
    with pytest.warns(UserWarning, match="computes wrong values for this rule"):
        found = train(getattr(optim, name), params, fused=True)
    expected = train(getattr(optim, name), params)
    torch.testing.assert_close(end(*found), end(*expected))


def test_a_kernel_that_does_nothing_is_noticed_where_steps_are_small(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda kernel, **_: lambda *arguments: [])
    opt, params = ways(diffopt.sgd(momentum=False))[0], [torch.ones(3)]
    with pytest.warns(UserWarning, match="computes wrong values"):
        opt.update_(params, [torch.ones(3)], opt.init(params), opt.hparams(lr=1e-5))


def test_a_kernel_is_tried_on_a_small_sample(uncompiled):
    run(ways(diffopt.sgd())[0], draw(torch.float32, sizes=(300_000,)), steps=1)
    assert uncompiled == [compiled._SAMPLE, 300_000]


def test_where_nothing_can_be_compiled_one_warning_says_why(monkeypatch):
    def compile_(kernel, **_):
        def run(*_):
            raise RuntimeError("no working compiler\nat all")

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    params = draw()

    def ends():
        yield end(*train(optim.NAdam, params, fused=True))
        for rule in ("sgd-momentum", "nadam"):
            yield run(ways(RULES[rule])[0], params)

    with pytest.warns(UserWarning, match="no kernel here .*no working compiler at all") as caught:
        found = list(ends())
    assert len(caught) == 1
    monkeypatch.undo()
    expected = [run(ways(RULES[rule])[1], params) for rule in ("sgd-momentum", "nadam")]
    torch.testing.assert_close(found, [end(*train(optim.NAdam, params)), *expected])


# fused=True


@every_class
def test_fused_is_an_option_like_the_others(name):
    cls, p, q = getattr(optim, name), Parameter(torch.ones(2)), Parameter(torch.ones(3))
    optimizer = cls([{"params": [p], "fused": False}], 0.1, fused=True)
    optimizer.add_param_group({"params": [q]})
    assert [group["fused"] for group in optimizer.param_groups] == [False, True]
    assert "fused" not in cls([p]).defaults  # a checkpoint for torch has what torch's have
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.defaults == optimizer.defaults
        assert [group["fused"] for group in twin.param_groups] == [False, True]
    for flag in ("foreach", "differentiable"):
        with pytest.raises(RuntimeError, match=f"`fused`.*`{flag}`"):
            cls([p], fused=True, **{flag: True})
    with pytest.raises(TypeError, match="nonsense"):
        cls([p], nonsense=1)


@pytest.mark.parametrize("name", ["Adafactor", "Muon", "SparseAdam", "LBFGS"])
def test_rules_that_are_not_elementwise_take_no_fused(name):
    with pytest.raises(TypeError, match="fused"):
        getattr(optim, name)([Parameter(torch.ones(2, 2))], fused=True)


@every_class
def test_checkpoints_move_between_fused_and_torch(name, uncompiled):
    for source, target in ((torch.optim, optim), (optim, torch.optim), (optim, optim)):
        flags = [{"fused": True} if library is optim else {} for library in (source, target)]
        start = draw(torch.float32, sizes=(3, 2))
        before, params = train(getattr(source, name), start, **flags[0])
        twins = [Parameter(p.detach().clone()) for p in params]
        after = getattr(target, name)(twins, **flags[1])
        after.load_state_dict(before.state_dict())
        for optimizer, tensors in ((before, params), (after, twins)):
            advance(optimizer, tensors, 2, torch.Generator().manual_seed(3))
        torch.testing.assert_close(end(after, twins), end(before, params))


def test_a_checkpoint_of_another_way_is_loaded_where_a_flag_was_given():
    p = Parameter(torch.ones(2))
    optimizer = optim.Adam([p], fused=True)
    optimizer.load_state_dict(torch.optim.Adam([p]).state_dict())
    assert optimizer.param_groups[0]["fused"] is None
