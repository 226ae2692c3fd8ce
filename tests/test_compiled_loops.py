"""Compiled loops: right or eager, with a warning; compiled once for every T, rate and data."""

import contextlib
import contextvars
import functools
import itertools
import os
import random
import shutil
import types
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest import TestCase

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import diffopt
from diffopt import _compiler
from diffopt._diff import functions, kernels
from diffopt._diff.series import Series
from diffopt.adjoint import (
    Checkpointed,
    FirstOrder,
    ForwardMode,
    Implicit,
    OneStep,
    Reversible,
    Truncated,
    Unrolled,
    unroll,
)
from diffopt.inspect import Trace

needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No kernels yet, no warnings issued."""
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "_KEPT", type(kernels._KEPT)())
    monkeypatch.setattr(_compiler, "_WARNED", set())


class Spoiled:
    """A backend that runs what it is given, and then `spoil(results)`."""

    def __init__(self, spoil):
        self.spoil, self.runs = spoil, 0

    def __call__(self, graph, inputs, **_):
        def run(*args):
            self.runs += 1
            return self.spoil(graph(*args))

        return run


@pytest.fixture
def traceless(monkeypatch):
    """Options for which kernels run as they are written, without being traced."""
    monkeypatch.setattr(torch, "compile", lambda kernel, backend, **_: backend(kernel, ()))
    monkeypatch.setattr("diffopt._diff.repairs.mend_traced", lambda graph: None)
    return {"backend": Spoiled(lambda results: results)}


class Counted:
    """A backend that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def loss(params, x, y, decay):
    hidden = torch.tanh(x @ params["a"] + params["b"])
    return ((hidden @ params["c"] - y) ** 2).mean() + decay * (params["a"] ** 2).sum()


def problem():
    """Params, a learning rate, data, targets and a decay."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    params = {"a": draw(1, 3), "b": draw(3), "c": draw(3, 1)}
    x = draw(5, 1)
    lr, decay = (torch.tensor(value, dtype=torch.float64) for value in (0.1, 0.2))
    return params, lr, x, x.sin(), decay


def meta_loss(opt, adjoint, compile, steps=3, loss=loss, **options):
    def outer(params, lr, x, y, decay):
        sol = diffopt.minimize(
            loss,
            params,
            x,
            y,
            decay,
            optimizer=opt,
            hparams=opt.hparams(lr=lr),
            steps=steps,
            adjoint=adjoint,
            compile=compile,
            **options,
        )
        rest = 0.0 if isinstance(adjoint, Implicit) else sol.losses[-1]
        return loss(sol.params, x, y, 0.0) + rest

    return outer


def by_autograd(outer, params, *rest):
    leaves = [x.clone().requires_grad_() for x in (*params.values(), *rest)]
    value = outer(dict(zip(params, leaves, strict=False)), *leaves[len(params) :])
    return value.sum(), *torch.autograd.grad(value.sum(), leaves, allow_unused=True)


def by_func(outer, *arguments):
    return torch.func.grad(outer, argnums=(0, 1, 2, 4))(*arguments)


def over_tasks(outer, params, lr, x, y, decay):
    tasks = torch.stack([x, x + 1.0])
    grad = torch.func.grad(outer, argnums=(0, 1, 2, 4))
    return torch.vmap(grad, (None, None, 0, None, None))(params, lr, tasks, y, decay)


def over_rates(outer, params, lr, x, y, decay):
    rates = torch.stack([lr, 2 * lr])
    grad = torch.func.grad(outer, argnums=(0, 1, 2, 4))
    return torch.vmap(grad, (None, 0, None, None, None))(params, rates, x, y, decay)


def around_tasks(outer, params, lr, x, y, decay):
    batched = torch.vmap(outer, (None, None, 0, None, None))
    tasks = torch.stack([x, x + 1.0])
    return by_autograd(batched, params, lr, tasks, y, decay)


def around_both(outer, params, lr, x, y, decay):
    def total(params, rates, x, decay):
        tasks = torch.vmap(outer, (None, None, 0, None, None))
        both = torch.vmap(tasks, (None, 0, None, None, None))
        return both(params, rates, x, y, decay).sum()

    rates, tasks = torch.stack([lr, 2 * lr]), torch.stack([x, x + 1.0])
    return torch.func.grad(total, argnums=(0, 1, 2, 3))(params, rates, tasks, decay)


def between_tasks(outer, params, lr, x, y, decay):
    def total(params, lr, decay):
        tasks = torch.stack([x, x + 1.0])
        return torch.vmap(outer, (None, None, 0, None, None))(params, lr, tasks, y, decay).sum()

    grad = torch.func.grad(total, argnums=(0, 1, 2))
    return torch.vmap(grad, (None, 0, None))(params, torch.stack([lr, 2 * lr]), decay)


def same(found, right):
    """Whether trees of float64 tensors are the same up to rounding, None for None."""
    pairs = zip(diffopt._tree.leaves(found), diffopt._tree.leaves(right), strict=True)
    for a, b in pairs:
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


TRANSFORMS = [
    *(torch.func.hessian, torch.func.jacrev, torch.func.jacfwd),
    lambda outer: torch.func.functionalize(torch.func.grad(outer)),
]
PLAIN = diffopt.sgd(momentum=False)  # what takes the least time to trace
WAYS = [by_autograd, by_func, over_tasks, over_rates, around_tasks, around_both]
ADJOINTS = [Unrolled(), Checkpointed(), Truncated(2), FirstOrder(), OneStep(), ForwardMode()]


# Values, with kernels that are not traced


@pytest.mark.parametrize("opt", [diffopt.sgd(), diffopt.adam()], ids=["sgd", "adam"])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda adjoint: type(adjoint).__name__)
@pytest.mark.parametrize("way", WAYS)
def test_meta_gradients_are_those_of_the_eager_loop(way, adjoint, opt, traceless):
    right = way(meta_loss(opt, adjoint, False), *problem())
    outer = meta_loss(opt, adjoint, traceless)
    if isinstance(adjoint, ForwardMode) and way is not by_autograd:
        with pytest.warns(UserWarning, match="cannot trace forward mode in torch.func transforms"):
            same(way(outer, *problem()), right)
    else:
        same(way(outer, *problem()), right)
        assert traceless["backend"].runs


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed()], ids=["unrolled", "checkpointed"])
def test_second_derivatives_are_right_and_a_warning_says_that_they_are_eager(adjoint, traceless):
    def gradient_norm(compile):
        outer = meta_loss(diffopt.adam(), adjoint, compile)
        params, *rest = problem()
        leaves = [x.clone().requires_grad_() for x in (*params.values(), *rest)]
        value = outer(dict(zip(params, leaves, strict=False)), *leaves[len(params) :])
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in grads), leaves)

    with pytest.warns(UserWarning, match="a derivative of its derivative is not compiled"):
        found = gradient_norm(traceless)
    same(found, gradient_norm(False))


@pytest.mark.parametrize("way", [around_both, between_tasks])
def test_batches_and_gradients_nest_in_any_order(way, traceless):
    right = way(meta_loss(PLAIN, Unrolled(), False), *problem())
    same(way(meta_loss(PLAIN, Unrolled(), traceless), *problem()), right)
    assert traceless["backend"].runs


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["hessian", "jacrev", "jacfwd", "functional"])
def test_other_transforms_are_right(transform, traceless):
    def derivative(compile):
        params, _, *rest = problem()
        outer = meta_loss(diffopt.adam(), Unrolled(), compile, steps=2)
        return transform(lambda lr: outer(params, lr, *rest))(torch.tensor(0.1).double())

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* runs without torch.compile")
        found = derivative(traceless)
    same(found, derivative(False))


def test_a_tensor_that_needs_a_gradient_but_is_captured_gets_it(traceless):
    def gradient(compile):
        scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        outer = meta_loss(
            diffopt.sgd(), Unrolled(), compile, loss=lambda *inputs: scale * loss(*inputs)
        )
        return torch.autograd.grad(outer(*problem()), scale)

    with pytest.warns(UserWarning, match="captures a tensor that requires a gradient.*: pass it"):
        found = gradient(traceless)
    same(found, gradient(False))


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed(), ForwardMode()], ids=repr)
def test_a_loss_with_random_numbers_draws_those_of_the_eager_loop(adjoint, traceless):
    def noisy(params, x, *rest):
        return loss(params, F.dropout(x, 0.5), *rest)

    def gradient(compile):
        torch.manual_seed(3)
        return by_autograd(
            meta_loss(diffopt.sgd(), adjoint, compile, loss=noisy), *problem()
        ), torch.rand(1)

    with pytest.warns(UserWarning, match="draws random numbers"):
        found = gradient(traceless)
    same(found, gradient(False))


def test_a_loss_with_a_generator_of_its_own_draws_the_numbers_of_the_eager_loop(traceless):
    generator = torch.Generator()

    def noisy(params, x, *rest):
        return loss(params, x * torch.rand(x.shape[-1], generator=generator), *rest)

    def gradient(compile):
        generator.manual_seed(3)
        outer = meta_loss(diffopt.sgd(), Unrolled(), compile, loss=noisy)
        return by_autograd(outer, *problem()), torch.rand(1, generator=generator)

    with pytest.warns(UserWarning, match="draws random numbers"):
        found = gradient(traceless)
    same(found, gradient(False))


def _of_the_gradient(change):
    """A change of a result's gradient, but not of its values."""

    def spoil(x):
        if x.requires_grad:
            x.register_hook(change)
        return x

    return spoil


SPOILS = [torch.zeros_like, lambda x: x * 1.01, lambda x: x / 0]


@pytest.mark.parametrize("spoil", [*SPOILS, *map(_of_the_gradient, SPOILS), torch.detach])
def test_a_kernel_that_computes_wrong_values_is_not_used(spoil, traceless):
    backend = traceless["backend"] = Spoiled(
        lambda results: diffopt._tree.map_tensors(spoil, results)
    )
    outer = meta_loss(diffopt.adam(), Unrolled(), traceless)
    with pytest.warns(UserWarning, match="computes wrong values"):
        found = by_autograd(outer, *problem())
    same(found, by_autograd(meta_loss(diffopt.adam(), Unrolled(), False), *problem()))
    runs = backend.runs
    by_autograd(outer, *problem())
    assert backend.runs == runs  # never again


MISLED = contextvars.ContextVar("misled", default=False)


def misled(graph, inputs, **_):
    """A backend that tells a loss when it runs compiled."""
    return lambda *args: contextvars.copy_context().run(lambda: MISLED.set(True) and graph(*args))


def wrongly(x):
    """The same values, with a wrong derivative where it runs compiled."""
    return 1.5 * x - 0.5 * x.detach() if MISLED.get() else x


@pytest.mark.parametrize("adjoint", [None, *ADJOINTS, Checkpointed(graph="step")], ids=repr)
@pytest.mark.parametrize("way", [by_autograd, over_tasks])
def test_a_wrong_term_that_zeros_hide_in_the_first_steps_is_noticed(way, adjoint, traceless):
    traceless["backend"] = misled

    def hiding(params, x, y, decay):
        hidden = wrongly(torch.tanh(x @ params["a"] + params["b"]))
        return (((hidden @ params["c"]) * params["gate"] - y) ** 2).mean() + decay

    def derivatives(compile, start):
        params, *rest = problem()
        params |= {"c": start * params["c"], "gate": torch.full((), start).double()}
        outer = meta_loss(diffopt.sgd(), adjoint, compile, loss=hiding)
        return way(outer, params, *rest)

    if isinstance(adjoint, ForwardMode) and way is over_tasks:
        pytest.skip("forward mode is not compiled under torch.vmap")
    with pytest.warns(UserWarning, match="computes wrong values"):
        same(derivatives(traceless, 0.0), derivatives(False, 0.0))
    same(derivatives(traceless, 0.5), derivatives(False, 0.5))


def twice_by_autograd(outer, params, lr, x, y, decay):
    leaves = [z.clone().requires_grad_() for z in (lr, decay, params["b"])]
    grads = torch.autograd.grad(
        outer({**params, "b": leaves[2]}, leaves[0], x, y, leaves[1]), leaves, create_graph=True
    )
    return torch.autograd.grad(sum((g**2).sum() for g in grads), leaves)


def twice_by_func(outer, params, lr, x, y, decay):
    return torch.func.jacrev(torch.func.jacrev(outer, (0, 1, 4)), (0, 1, 4))(
        params, lr, x, y, decay
    )


def twice_over_rates(outer, *arguments):
    def norm(*inputs):
        return (torch.func.grad(outer, 1)(*inputs) ** 2).sum()

    return over_rates(norm, *arguments)


def twice_around_rates(outer, params, lr, x, y, decay):
    grad = torch.func.grad(outer, (0, 1))
    batched = torch.vmap(lambda rate, decay: grad(params, rate, x, y, decay)[1], (0, None))
    rates = torch.stack([lr, 2 * lr])
    return torch.func.jacrev(batched, (0, 1))(rates, decay)


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed()], ids=repr)
@pytest.mark.parametrize(
    "way", [twice_by_autograd, twice_by_func, twice_over_rates, twice_around_rates]
)
def test_second_derivatives_are_not_those_of_a_graph(way, adjoint, traceless):
    runs = []

    def backend(graph, inputs, **_):
        run = misled(graph, inputs)
        return lambda *args: runs.append(1) or run(*args)

    def cubed(x):
        """The same values and first two derivatives, with a wrong third where it runs compiled."""
        return x + (x - x.detach()) ** 3 if MISLED.get() else x

    def wrong_at_last(params, x, y, decay):
        moved = {name: cubed(p) for name, p in params.items()}
        return loss(moved, x, y, decay)

    traceless["backend"] = backend
    outer = meta_loss(PLAIN, adjoint, traceless, loss=wrong_at_last)
    with pytest.warns(UserWarning, match="a derivative of its derivative is not compiled") as seen:
        found = way(outer, *problem())
    assert runs  # the loop and its first derivatives
    assert len(seen) == 1
    same(found, way(meta_loss(PLAIN, adjoint, False, loss=wrong_at_last), *problem()))


@pytest.mark.slow
def test_each_graph_is_compared_whatever_others_depend_on():
    scaled = []

    def objective(w, x):
        factor = x.sum() if scaled else 1.0
        wrong = 1.01 if scaled and torch.compiler.is_compiling() else 1.0
        return wrong * factor * (w**2).sum()

    def end(compile):
        opt, w = PLAIN, torch.tensor([1.0, 2.0]).double()
        hp, x = opt.hparams(lr=0.1), torch.ones(2).double()
        return diffopt.minimize(
            objective, w, x, optimizer=opt, hparams=hp, steps=2, compile=compile
        ).params

    same(end(EAGER), end(False))
    scaled.append(True)
    with pytest.warns(UserWarning, match="computes wrong values"):
        same(end(EAGER), end(False))


@pytest.mark.slow
@pytest.mark.parametrize("half", ["forward", "backward"])
def test_a_half_of_a_graph_that_computes_wrong_values_is_not_used(half, monkeypatch):
    def spoiled(outputs):
        halves = split(outputs)
        run = getattr(halves, half)

        def wrong(inputs):
            return [x * 1.01 if torch.is_tensor(x) else x for x in run(inputs)]

        return halves._replace(**{half: wrong})

    split = kernels._torch.halves
    monkeypatch.setattr(kernels._torch, "halves", spoiled)
    outer = meta_loss(PLAIN, Unrolled(), {"backend": "aot_eager"})
    with pytest.warns(UserWarning, match="computes wrong values"):
        found = by_autograd(outer, *problem())
    same(found, by_autograd(meta_loss(PLAIN, Unrolled(), False), *problem()))


@pytest.mark.slow
@pytest.mark.parametrize("way", [by_autograd, by_func, over_tasks, over_rates])
def test_steps_are_differentiated_without_running_again(way, monkeypatch):
    runs, halves, halved = [], kernels._torch.Halves, kernels.Halved
    run, pulled = halves.run, halved.pulled
    monkeypatch.setattr(halves, "run", lambda *args: runs.append("run") or run(*args))
    monkeypatch.setattr(halved, "pulled", lambda *args: runs.append("pulled") or pulled(*args))
    outer = meta_loss(PLAIN, Unrolled(), {"backend": "aot_eager"}, steps=6)
    for _ in range(2):  # the first time nobody knows which outputs have cotangents
        way(outer, *problem())
    runs.clear()
    same(way(outer, *problem()), way(meta_loss(PLAIN, Unrolled(), False, 6), *problem()))
    assert runs == ["run"] * 6 + ["pulled"] * 6


@pytest.mark.slow
def test_steps_keep_no_masks_for_their_derivative(monkeypatch):
    kept, run = [], kernels.Halved.run

    def noted(*args):
        results, saved = run(*args)
        kept.extend(saved)
        return results, saved

    def loss(w, x):
        return ((x @ w).relu() @ w).relu().square().sum()

    monkeypatch.setattr(kernels.Halved, "run", noted)
    w, x = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4)
    compile, opt = {"backend": "aot_eager_decomp_partition"}, diffopt.sgd()
    hp = opt.hparams(lr=0.1)
    sol = diffopt.minimize(loss, w, x, optimizer=opt, hparams=hp, steps=2, compile=compile)
    sol.params.sum().backward()
    assert kept
    assert torch.bool not in [x.dtype for x in kept]


@pytest.mark.parametrize("modified", [False, True])
def test_what_steps_have_kept_is_used_again_unless_it_has_been_written_to(modified, traceless):
    lr, opt = torch.tensor(0.1).double().requires_grad_(), diffopt.adam()
    params, _, *rest = problem()

    def gradients(compile, modified):
        sol = diffopt.minimize(
            loss, params, *rest, optimizer=opt, hparams=opt.hparams(lr=lr), steps=3, compile=compile
        )
        total = sum(p.sum() for p in sol.params.values())
        if modified:
            with torch.no_grad():
                diffopt._tree.map_tensors(lambda x: x.mul_(2), (sol.params, sol.state))
        return [torch.autograd.grad(total, lr, retain_graph=True) for _ in range(3)]

    same(gradients(traceless, modified), gradients(False, False))


def test_results_are_no_longer_compared_where_two_threads_have_compared_them(
    traceless, monkeypatch
):
    def compared_twice(kernel, *args):
        monkeypatch.setattr(kernels.Kernel, "compare", compare)
        with torch.enable_grad():  # as another thread does meanwhile
            by_autograd(outer, *problem())
        return compare(kernel, *args)

    compare, outer = kernels.Kernel.compare, meta_loss(diffopt.adam(), Unrolled(), traceless)
    monkeypatch.setattr(kernels.Kernel, "compare", compared_twice)
    by_autograd(outer, *problem())
    compared = []
    monkeypatch.setattr(kernels.Kernel, "compare", lambda *_: compared.append(0))
    by_autograd(outer, *problem())
    assert not compared


def test_buffers_and_auxiliary_outputs_are_those_of_the_eager_loop(traceless):
    def stateful(params, buffers, x, y, decay):
        value = loss(params, x, y, decay)
        new = {"mean": 0.9 * buffers["mean"] + x.mean(), "count": buffers["count"] + 1}
        return value, new, {"norm": params["a"].norm(), "note": "kept", "none": None}

    def run(compile):
        params, lr, *rest = problem()
        opt = diffopt.sgd()
        sol = diffopt.minimize(
            stateful,
            params,
            *rest,
            optimizer=opt,
            hparams=opt.hparams(lr=lr.requires_grad_(), momentum=0.5),
            buffers={"mean": torch.zeros(()).double(), "count": torch.tensor(0)},
            has_aux=True,
            steps=3,
            compile=compile,
        )
        return sol

    found, right = run(traceless), run(False)
    same(
        [leaf for leaf in diffopt._tree.leaves(found) if torch.is_tensor(leaf)],
        [leaf for leaf in diffopt._tree.leaves(right) if torch.is_tensor(leaf)],
    )
    assert [aux["note"] for aux in found.aux] == ["kept"] * 3
    # Compiled steps are alike, so what the first one returns needs a gradient as well.
    later = [(sol.params, sol.buffers, sol.aux[1:]) for sol in (found, right)]
    needs = [[x.requires_grad for x in diffopt._tree.split(tree)[0]] for tree in later]
    assert needs[0] == needs[1]


@pytest.mark.parametrize("way", [by_autograd, over_tasks])
def test_tol_ends_a_compiled_loop(way, traceless):
    found, right = (
        way(meta_loss(diffopt.sgd(), Unrolled(), compile, steps=30, tol=0.3), *problem())
        for compile in (traceless, False)
    )
    same(found, right)


@pytest.mark.parametrize("tol", [1e9, 0.8, 0.0], ids=["at-once", "later", "never"])
@pytest.mark.parametrize("adjoint", [None, *ADJOINTS], ids=repr)
def test_compiled_steps_on_batches_end_where_others_do(adjoint, tol, traceless):
    def run(compile):
        params, lr, x, y, decay = problem()
        data = torch.stack([x + 0.1 * t for t in range(9)]).requires_grad_()
        lr.requires_grad_()
        opt = diffopt.adam()
        sol = diffopt.minimize(
            lambda params, x: loss(params, x, y, decay),
            params,
            optimizer=opt,
            hparams=opt.hparams(lr=lr),
            batches=[*data],
            tol=tol,
            adjoint=adjoint,
            compile=compile,
        )
        value = (sol.losses**2).sum() + sum((p**2).sum() for p in sol.params.values())
        grads = torch.autograd.grad(value + 0 * (lr + data.sum()), (lr, data))
        return sol.params, sol.losses, sol.steps, grads

    found, right = run(traceless), run(False)
    assert int(right[2]) == {1e9: 0, 0.8: 3, 0.0: 9}[tol]
    same(found, right)


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", [None, Unrolled(), FirstOrder(), Implicit()], ids=repr)
def test_torch_compile_checks_a_loop_with_tol_once(adjoint, calls):
    def objective(w, x):
        return ((w - x) ** 2).sum()

    def run(compile):
        opt, x = PLAIN, torch.tensor([1.0, 2.0]).double().requires_grad_()
        sol = diffopt.minimize(
            objective, torch.zeros(2).double(), x, optimizer=opt, hparams=opt.hparams(lr=0.2),
            steps=200, tol=1e-6, adjoint=adjoint, compile=compile,
        )  # fmt: skip
        return sol.params, sol.steps, torch.autograd.grad((sol.params + 0 * x).sum(), x)

    for _ in range(2):
        calls.clear()
        same(run(EAGER), run(False))
    assert len(calls) <= 3  # Implicit takes the gradient there, too


@pytest.mark.parametrize("way", [by_autograd, by_func, over_tasks, around_tasks])
def test_implicit_differentiates_compiled_loops(way, traceless):
    def convex(params, x, y, decay):
        squares = sum((p**2).sum() for p in params.values())
        return ((x @ params["a"] + params["b"] - y) ** 2).mean() + decay * squares

    adjoint = Implicit(on_failure="raise")
    params, lr, *rest = problem()
    found, right = (
        way(
            meta_loss(diffopt.sgd(), adjoint, compile, steps=150, loss=convex),
            params,
            4 * lr,
            *rest,
        )
        for compile in (traceless, False)
    )
    same(found, right)


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed()], ids=["unrolled", "checkpointed"])
def test_unroll_compiles_any_step(adjoint, traceless):
    def run(compile):
        def step(y, args, t):
            rate, scale = args
            return {"y": y["y"] - rate * scale * y["y"] ** (t + 1)}, y["y"].sum()

        rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        start = {"y": torch.tensor([1.0, 2.0], dtype=torch.float64)}
        end, path = unroll(step, start, (rate, 0.3), 4, adjoint=adjoint, compile=compile)
        return end, path, torch.autograd.grad(end["y"].sum(), rate)

    same(run(traceless), run(False))


def momentum_from_none(carry, rate, t):
    w, v = carry
    v = rate * w if v is None else 0.9 * v + rate * w
    return (w - v, v), w


def a_count(carry, rate, t):
    w, n = carry
    return (w - rate * w / n, n + 1), w


def in_another_order(carry, rate, t):
    w, v = carry["w"], carry["v"]
    return {"v": 0.9 * v + rate * w, "w": w - v}, w


START = torch.tensor([1.0, 2.0], dtype=torch.float64)
STARTS = {
    momentum_from_none: (START, None),
    a_count: (START, 1),
    in_another_order: {"w": START, "v": 0.1 * START},
}


@pytest.mark.parametrize("adjoint", [Unrolled(), ForwardMode()], ids=repr)
@pytest.mark.parametrize("step", STARTS, ids=lambda step: step.__name__)
def test_a_carry_whose_structure_or_number_changes_is_followed(step, adjoint, traceless):
    def run(compile):
        rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        end, path = unroll(step, STARTS[step], rate, 4, adjoint=adjoint, compile=compile)
        return end, path, torch.autograd.grad(path.sum(), rate)

    same(run(traceless), run(False))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["autograd", "func"])
@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed()], ids=["unrolled", "checkpointed"])
def test_an_output_that_is_the_carry_has_its_derivative(adjoint, way):
    def run(compile):
        def step(y, rate, _):
            new = y - rate * y**3
            return new, (y, [y, y], new, new.view(2))

        def total(rate, start):
            end, path = unroll(step, start, rate, 4, adjoint=adjoint, compile=compile)
            return sum((x**2).sum() for x in (end, *torch.utils._pytree.tree_leaves(path)))

        rate, start = torch.tensor([0.1, 0.2]).double(), torch.tensor([1.0, 2.0]).double()
        if way == "func":
            return torch.func.grad(total, (0, 1))(rate, start)
        inputs = rate.requires_grad_(), start.requires_grad_()
        return torch.autograd.grad(total(*inputs), inputs)

    same(run({"backend": "eager"}), run(False))


@pytest.mark.slow
def test_steps_that_depend_on_the_shape_of_their_batch_are_right():
    def loss(params, x):
        some = params["a"] if len(x) == 1 else params["b"]
        return (some**3).sum() * x.sum(), (len(x), [params["a"] * y for y in x])

    def run(adjoint, compile):
        params = {k: torch.tensor([0.5, 0.7]).double().requires_grad_() for k in "abc"}
        opt, lr = PLAIN, torch.tensor(0.1).double().requires_grad_()
        sol = diffopt.minimize(
            loss,
            params,
            optimizer=opt,
            hparams=opt.hparams(lr=lr),
            batches=[torch.ones(n).double() for n in (1, 2, 1)],
            has_aux=True,
            adjoint=adjoint,
            compile=compile,
        )
        lengths, rows = zip(*sol.aux, strict=True)
        total = sum((x**2).sum() for x in (*sol.params.values(), *(y for row in rows for y in row)))
        return lengths, torch.autograd.grad(total, [lr, *params.values()])

    for adjoint in (Unrolled(), Checkpointed()):  # which share kernels
        lengths, found = run(adjoint, {"backend": "eager"})
        right_lengths, right = run(adjoint, False)
        assert lengths == right_lengths == (1, 2, 1)
        same(found, right)


@pytest.mark.parametrize("adjoint", [Reversible(), Trace(Unrolled())], ids=["reversible", "trace"])
def test_adjoints_that_do_not_run_the_step_as_it_is_say_so(adjoint, traceless):
    opt = diffopt.sgd(momentum=True)

    def run(compile):
        params, _, *rest = problem()
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        hparams = opt.hparams(lr=lr, momentum=0.5)
        sol = diffopt.minimize(
            loss,
            params,
            *rest,
            optimizer=opt,
            hparams=hparams,
            steps=3,
            adjoint=adjoint,
            compile=compile,
        )
        return torch.autograd.grad(sol.losses[-1], lr)

    with pytest.warns(UserWarning, match="runs without torch.compile: (a Trace|Reversible)"):
        found = run(traceless)
    same(found, run(False))


@pytest.mark.parametrize(
    ("compile", "error", "message"),
    [
        (1, TypeError, "compile is 1 of type int, not a bool or a mapping"),
        ("inductor", TypeError, "compile is 'inductor'"),
        ({"fullgraph": False}, ValueError, "compile has the option 'fullgraph', but takes only"),
    ],
)
def test_an_option_that_compile_does_not_take_is_named(compile, error, message):
    with pytest.raises(error, match=message):
        meta_loss(diffopt.sgd(), Unrolled(), compile)(*problem())
    with pytest.raises(error, match=message):
        unroll(lambda y, _, t: (y, y), torch.zeros(1), (), 2, compile=compile)


def test_compiling_a_step_and_its_derivative_is_logged_with_its_time(traceless):
    with TestCase().assertLogs("diffopt") as logs:
        by_autograd(meta_loss(diffopt.sgd(), Unrolled(), traceless), *problem())
    messages = [record.getMessage() for record in logs.records]
    begun = ["compiling the loss loss", "compiling the derivative of the loss loss"]
    assert messages[:4:2] == begun
    assert all(message.startswith("compiled in ") for message in messages[1::2])


def test_results_in_the_memory_of_a_cuda_graph_are_copied(traceless):
    memory = []

    def replayed(results):  # overwrites what it returned the last time
        with torch.no_grad():
            diffopt._tree.map_tensors(lambda x: x.zero_(), memory)
        memory[:] = [results]
        return results

    options = {"backend": Spoiled(replayed), "mode": "reduce-overhead"}
    right = by_autograd(meta_loss(diffopt.adam(), Unrolled(), False), *problem())
    same(by_autograd(meta_loss(diffopt.adam(), Unrolled(), options), *problem()), right)


def test_kernels_keep_no_tensor_alive(traceless):
    def once():
        data = problem()
        by_autograd(meta_loss(diffopt.adam(), Unrolled(), traceless), *data)
        return [weakref.ref(x) for x in diffopt._tree.leaves(data)]

    assert not any(reference() is not None for reference in once())


# What torch.compile makes of them


@pytest.mark.slow
def test_other_lengths_rates_and_data_compile_nothing():
    backend = Counted()
    numbers = {"lr": 0.1, "weight_decay": 0.01}

    def run(steps, rate, shift, **own):
        params, _, x, y, decay = problem()
        opt = diffopt.adam()
        params = {name: p.requires_grad_() for name, p in params.items()}
        results = []
        scale = torch.tensor(1.0 + shift, dtype=torch.float64)
        for compile in ({"backend": backend}, False):
            sol = diffopt.minimize(
                lambda *inputs: scale * loss(*inputs),  # a new one, of a new tensor
                params,
                x + shift,
                y,
                decay,
                optimizer=opt,
                hparams=opt.hparams(**numbers | {"lr": rate} | own),
                steps=steps,
                compile=compile,
            )
            results.append(torch.autograd.grad(sol.losses.sum(), params.values()))
        same(*results)

    run(3, 0.1, 0.0)
    assert backend.graphs == 2  # the step and its vector-Jacobian product
    run(7, 0.2, 1.0)
    run(2, torch.tensor(0.3), 2.0, weight_decay=0.1)
    run(1, torch.tensor(0.3, dtype=torch.float64), 2.0, beta1=0.5)
    assert backend.graphs == 2


@pytest.mark.slow
@pytest.mark.parametrize("way", [around_tasks, over_tasks, around_both])
def test_other_tasks_in_a_batch_compile_nothing(way):
    backend = Counted()
    for steps, shift in ((3, 0.0), (7, 1.0), (2, 2.0)):
        params, lr, x, y, decay = problem()
        inputs = params, lr * (1 + shift), x + shift, y, decay
        results = [
            way(meta_loss(PLAIN, Unrolled(), compile, steps), *inputs)
            for compile in ({"backend": backend}, False)
        ]
        same(*results)
        assert backend.graphs == 2  # the step and its vector-Jacobian product


@pytest.fixture
def calls(monkeypatch):
    """The kernels that are called with torch.compile's checks."""
    found, call = [], kernels.Kernel.__call__

    def noted(kernel, *args):
        found.append(kernel.what)
        return call(kernel, *args)

    monkeypatch.setattr(kernels.Kernel, "__call__", noted)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_torch_compile_checks_a_loop_once_and_not_every_step(way, calls):
    """Each of the two adjoints takes kernels that the other has compiled."""

    def meta_gradient(adjoint, compile):
        return way(meta_loss(PLAIN, adjoint, compile, steps=6), *problem())

    # Checkpointed takes the first step apart, to see what it captures.
    for adjoint, most in ((Unrolled(), 2), (Checkpointed(segments=2), 8)):
        right = meta_gradient(adjoint, False)
        for _ in range(2):
            calls.clear()
            same(meta_gradient(adjoint, {"backend": "eager"}), right)
        assert len(calls) <= most


def stepping(opt, compile, needs, **options):
    """A loop with auxiliary outputs, and what needs a gradient in it."""
    w = {"a": torch.ones(2, dtype=torch.float64), "b": torch.full((2,), 0.5, dtype=torch.float64)}
    given = {"lr": torch.tensor(0.1, dtype=torch.float64), **w}
    given[needs].requires_grad_()

    def loss(w):
        value = ((w["a"] - 1) ** 2).sum() + (w["a"] * w["b"]).sum()
        return value, (value.sin(), w["b"].sum())

    sol = diffopt.minimize(
        loss, w, optimizer=opt, hparams=opt.hparams(lr=given["lr"]),
        has_aux=True, compile=compile, **options,
    )  # fmt: skip
    return sol, given[needs]


ONE_BY_ONE = {
    "a step": {"steps": 1},
    "callback": {"steps": 3, "callback": lambda *_: None},
    "tol": {"steps": 3, "tol": 1e-9, "callback": lambda *_: None},
}


@pytest.mark.parametrize("needs", ["lr", "a"])
@pytest.mark.parametrize("how", ONE_BY_ONE)
@pytest.mark.parametrize("opt", [PLAIN, diffopt.adam()], ids=["sgd", "adam"])
def test_the_first_outputs_of_steps_taken_one_by_one_are_constants_where_they_are(
    opt, how, needs, traceless
):
    (found, x), (right, y) = (
        stepping(opt, compile, needs, **ONE_BY_ONE[how]) for compile in (traceless, False)
    )
    outputs = [diffopt._tree.leaves((s.aux, s.losses, s.params, s.state)) for s in (found, right)]
    assert [o.requires_grad for o in outputs[0]] == [o.requires_grad for o in outputs[1]]
    same(*outputs)
    for mine, theirs in zip(*outputs, strict=True):
        if mine.requires_grad:
            same(
                torch.autograd.grad(mine.sum(), x, retain_graph=True, allow_unused=True),
                torch.autograd.grad(theirs.sum(), y, retain_graph=True, allow_unused=True),
            )


def test_steps_taken_one_by_one_run_once_though_the_first_outputs_are_constants(
    traceless, monkeypatch
):
    runs, computed = [], Series.computed
    monkeypatch.setattr(Series, "computed", lambda *a: runs.append(0) or computed(*a))
    for _ in range(2):  # the first time, it is not known which derivatives will be taken
        runs.clear()
        sol, lr = stepping(PLAIN, traceless, "lr", **ONE_BY_ONE["callback"])
        torch.autograd.grad(sum(x for aux in sol.aux for x in aux), lr)
    assert len(runs) == 3


def data_and_rates(data, rates, t):
    return data[t], rates[t]


def no_rate_at_first(data, rates, t):
    return data[t].detach(), rates[t] if t else rates[t].detach()


def one_tensor(data, rates, t):
    return data[0], rates[0]


@pytest.mark.parametrize("batch", [data_and_rates, no_rate_at_first, one_tensor])
@pytest.mark.parametrize("adapted", [True, False], ids=["rate", "no-rate"])
def test_forward_mode_takes_compiled_steps_whatever_moves(batch, adapted, traceless):
    def objective(w, mean, x, rate):
        return rate * ((w - mean - x) ** 4).sum(), 0.5 * mean + rate * w

    def gradients(compile):
        w = torch.tensor([1.0, 2.0], dtype=torch.float64)
        data, rates = (k * torch.eye(5, 2, dtype=torch.float64) for k in (0.1, 0.2))
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=adapted)
        inputs = [x.requires_grad_() for x in (data, rates.sum(1))]
        opt = diffopt.adam()
        sol = diffopt.minimize(
            objective,
            w,
            buffers=torch.zeros(2, dtype=torch.float64),
            optimizer=opt,
            hparams=opt.hparams(lr=lr),
            batches=[batch(*inputs, t) for t in range(5)],
            adjoint=ForwardMode(),
            compile=compile,
        )
        value = sol.losses[1] + sol.losses[4] ** 2 + (sol.params * sol.buffers).sum()
        inputs += [lr] if adapted else []
        return value, *torch.autograd.grad(value, inputs, allow_unused=True)

    same(gradients(traceless), gradients(False))


def test_other_threads_are_kept_out_of_forward_mode_while_a_kernel_is_traced(traceless):
    """torch has one forward-mode level for all threads."""

    def free(results):
        with ThreadPoolExecutor(1) as pool:
            taken.append(not pool.submit(functions._LEVELS.acquire, blocking=False).result())
        return results

    taken = []
    traceless["backend"].spoil = free
    by_autograd(meta_loss(diffopt.sgd(), ForwardMode(), traceless, steps=2), *problem())
    assert taken
    assert all(taken)


@pytest.mark.slow
def test_forward_mode_checks_a_loop_once_for_any_number_of_steps(calls):
    backend = Counted()
    for steps in (6, 12):
        calls.clear()
        outer = meta_loss(PLAIN, ForwardMode(), {"backend": backend}, steps)
        right = by_autograd(meta_loss(PLAIN, ForwardMode(), False, steps), *problem())
        same(by_autograd(outer, *problem()), right)
        assert len(calls) <= 3  # the first time, to be compared
        assert backend.graphs == 1


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("result", [0, -1], ids=["value", "tangent"])
def test_a_kernel_of_forward_mode_that_computes_wrong_values_is_not_used(rows, result, traceless):
    def spoiled(results):
        leaves, spec = diffopt._tree.flatten(results)
        leaves[result] = leaves[result] * 1.01
        return diffopt._tree.unflatten(leaves, spec)

    def derivatives(compile):
        lr = torch.full((rows,), 0.1, dtype=torch.float64, requires_grad=True)
        end, _ = unroll(
            lambda w, lr, t: (w - lr * w**3, None),
            torch.arange(1.0, 3.0, dtype=torch.float64)[:rows],
            lr,
            4,
            adjoint=ForwardMode(),
            compile=compile,
        )
        return end, torch.autograd.grad(end.sum(), lr)

    backend = traceless["backend"] = Spoiled(spoiled)
    with pytest.warns(UserWarning, match="computes wrong values"):
        same(derivatives(traceless), derivatives(False))
    runs = backend.runs
    same(derivatives(traceless), derivatives(False))
    assert backend.runs == runs  # never again


@pytest.mark.slow
def test_steps_on_batches_with_gradients_are_run_together(calls):
    opt = diffopt.sgd()

    def gradients(compile, batches, unbind=True):
        params, lr, x, y, decay = problem()
        data = torch.stack([x + t for t in range(5)]).requires_grad_()
        rates = torch.linspace(0.5, 1.5, 5, dtype=torch.float64).requires_grad_()
        xs = [batches(t, data, rates) for t in range(5)]
        sol = diffopt.minimize(
            lambda params, x, rate: rate * loss(params, x, y, decay),
            params,
            optimizer=opt,
            hparams=opt.hparams(lr=lr.requires_grad_(), momentum=0.9),
            batches=xs,
            compile=compile,
        )
        value = sol.losses[2] + sol.losses[4] ** 2 + sum(p.sum() for p in sol.params.values())
        return torch.autograd.grad(value, (data, rates, lr))

    def tensors(t, data, rates):
        return data[t], rates[t]

    def number_in_one(t, data, rates):
        return data[t], 0.5 if t == 3 else rates[t]

    def numbers(t, data, rates):
        return data[t] * rates[t], 0.5 + t

    for batches, most in ((tensors, 2), (number_in_one, 10), (numbers, 2)):
        right = gradients(False, batches)
        for _ in range(2):
            calls.clear()
            same(gradients({"backend": "eager"}, batches), right)
        assert 1 <= len(calls) <= most


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2])
def test_finite_differences_of_compiled_loops(order):
    params, lr, x, y, decay = problem()
    outer = meta_loss(PLAIN, Unrolled(), {"backend": "eager"}, steps=4)

    def function(a, lr, x):
        return outer(params | {"a": a}, lr, x, y, decay)

    inputs = [z.clone().requires_grad_() for z in (params["a"], lr, x)]
    function(*inputs)
    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* a derivative of its derivative is not compiled")
        assert check(function, inputs)


_COUNT = 0
EAGER = {"backend": "eager"}


class _Remembering(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x


def writers():
    """Losses that write to something else, and functions that say how often they have."""
    history, log, net, count, states = [], {}, _Remembering(), 0, types.SimpleNamespace(n=0)
    total, array = torch.zeros(()), np.zeros(1)

    def local(value):
        nonlocal count
        count += 1

    def shared(value):
        global _COUNT
        _COUNT += 1

    def through_data(value):
        total.data = total.data + 1

    def in_array(value):
        array[0] += 1

    outputs, watched = [], torch.nn.Identity()
    watched.register_forward_hook(lambda *_: outputs.append(0))

    yield "list", lambda value: history.append(value.detach()), lambda: len(history)
    yield "key", lambda value: log.update({len(log): value.detach()}), lambda: len(log)
    yield "nonlocal", local, lambda: count
    yield "global", shared, lambda: _COUNT
    yield "attribute", lambda value: setattr(states, "n", states.n + 1), lambda: states.n
    yield "module", net, lambda: net.calls
    yield "hook", watched, lambda: len(outputs)
    yield "tensor", lambda value: total.data.add_(1), lambda: int(total)
    yield "data", through_data, lambda: int(total)
    yield "numpy", in_array, lambda: int(array[0])
    yield "printed", lambda value: print("step"), None


@pytest.mark.parametrize("name", [name for name, *_ in writers()])
def test_what_a_step_writes_elsewhere_is_written_once_in_each_step(name, capsys):
    opt = PLAIN
    note, count = {case: rest for case, *rest in writers()}[name]
    count = count or (lambda: capsys.readouterr().out.count("step"))

    def noting(w):
        value = (w**2).sum()
        note(value)
        return value

    counts = [count()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* runs without torch.compile")
        for steps in (1, 3, 2):
            lr = torch.tensor(0.1, requires_grad=True)
            hp = opt.hparams(lr=lr)
            options = {"optimizer": opt, "hparams": hp, "steps": steps, "compile": EAGER}
            sol = diffopt.minimize(noting, torch.ones(2), **options)
            torch.autograd.grad(sol.losses.sum() + sol.params.sum(), lr)
            counts.append(count())
    gained = counts[1:] if name == "printed" else [b - a for a, b in itertools.pairwise(counts)]
    assert gained == [1, 3, 2]


def test_a_step_that_reads_a_tensor_by_two_names_is_compiled():
    module = torch.nn.Linear(2, 1)
    model = diffopt.nn.functionalize(module)
    params = {name: p.detach() for name, p in model.params.items()}  # in the memory of the module's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffopt.minimize(
            lambda w: model(params, w).square().sum(),
            torch.ones(2),
            optimizer=PLAIN,
            hparams=PLAIN.hparams(lr=0.1),
            steps=2,
            compile=EAGER,
        )


def test_a_step_of_unroll_that_writes_to_a_tensor_is_not_compiled():
    total = torch.zeros(())

    def step(carry, args, t):
        total.add_(1)
        return carry * args, None

    with pytest.warns(UserWarning, match="writes to something that exists"):
        unroll(step, torch.ones(2), torch.tensor(0.5), 3, compile=EAGER)
    assert total == 3


def test_steps_that_are_not_alike_write_once_each_too():
    seen, calls = [], []

    def step(carry, args, t):
        seen.append(t)
        wide = carry.dtype == torch.float64
        return carry.double() * args, (t, {"wide": carry} if wide else carry)

    def loss(w, x):
        seen.append(x)
        return (w * x).square().sum(), ({"wide": w} if len(x) > 1 else w)

    hp, batches = PLAIN.hparams(lr=0.1), [torch.ones(1), torch.ones(2), torch.ones(2)]
    options = {"optimizer": PLAIN, "hparams": hp, "batches": batches, "has_aux": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* runs without torch.compile")
        unroll(step, torch.ones(2), torch.tensor(0.5), 4, compile=EAGER)
        assert len(seen) == 4
        callback = lambda t, *_: calls.append(t)  # noqa: E731
        diffopt.minimize(loss, torch.ones(2), **options, compile=EAGER, callback=callback)
    assert len(seen) == 7
    assert calls == [0, 1, 2]


def test_a_loss_that_keeps_what_it_makes_is_compiled():
    backend = Counted()

    def loss(w):
        found = {}
        found["sum"] = w.sum()
        parts = [found["sum"]]
        parts.append(w.square().sum())
        parts[0] += 1
        return parts[0] + parts[1]

    hp = PLAIN.hparams(lr=0.1)
    options = {"optimizer": PLAIN, "hparams": hp, "steps": 3}
    sol = diffopt.minimize(loss, torch.ones(2), **options, compile={"backend": backend})
    assert backend.graphs
    right = diffopt.minimize(loss, torch.ones(2), **options)
    torch.testing.assert_close(sol.params, right.params)


def requiring(compile, adjoint, names):
    """For results of a loop whether they require grad, and for which inputs they have one."""
    tensors = {name: torch.full((2,), 0.5).requires_grad_(name in names) for name in "uvwxab"}
    lr = torch.tensor(0.1, requires_grad=names == "lr")
    params = {name: tensors[name] for name in "uvw"}

    def loss(p, a, b, x):  # w is not used
        value = ((p["u"] - a * x) ** 2).sum() + ((p["v"] - 1) ** 2).sum()
        return value, (p["u"].detach(), p["v"] * 2, b + 1)

    sol = diffopt.minimize(
        loss,
        params,
        tensors["a"],
        tensors["b"],
        optimizer=PLAIN,
        hparams=PLAIN.hparams(lr=lr),
        batches=[torch.ones(2), tensors["x"], torch.ones(2)],
        adjoint=adjoint,
        has_aux=True,
        compile=compile,
    )
    inputs = [x for x in (*tensors.values(), lr) if x.requires_grad]
    found = []
    for y in (*sol.params.values(), *sol.losses.unbind(), *itertools.chain(*sol.aux)):
        grads = [None] * len(inputs)
        if y.requires_grad:
            grads = torch.autograd.grad(
                y.sum(), inputs, allow_unused=True, retain_graph=True, materialize_grads=False
            )
        found.append((y.requires_grad, [None if g is None else bool(g.any()) for g in grads]))
    return found


@pytest.mark.parametrize("names", ["u", "lr", "x", "ub"])
@pytest.mark.parametrize(
    "adjoint",
    [Unrolled(), Truncated(2), FirstOrder(), Checkpointed(segments=3), ForwardMode()],
    ids=lambda adjoint: type(adjoint).__name__,
)
def test_compiled_results_require_grad_and_have_gradients_where_others_do(
    adjoint, names, traceless
):
    assert requiring(traceless, adjoint, names) == requiring(False, adjoint, names)


def test_inductor_keeps_what_few_elements_of_a_large_result_depend_on():
    def scaled(x, t, w):
        power = 0.9**t
        return x / (1 - power).view(-1, 1) + w.sin(), power + 1

    inputs = torch.randn(2, 64), torch.tensor([1.0, 2.0]), torch.randn(2, 64)
    graph = make_fx(scaled, tracing_mode="fake")(*inputs).graph
    _compiler._compute_scalars_once(graph)
    graph.lint()
    kept = [node.args[0] for node in graph.nodes if node.target is _compiler._AS_STRIDED]
    assert [str(node.target) for node in kept] == ["aten.rsub.Scalar"]
    found = torch.fx.GraphModule({}, graph)(*inputs)
    torch.testing.assert_close(found, scaled(*inputs))


@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
def test_inductor_tests_instructions_only_where_torch_does_not_use_them(monkeypatch, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    options = _compiler.backend_of({}).config
    assert options.get("cpp.vec_isa_ok") == (True if capability == "AVX512" else None)


@pytest.mark.slow
def test_what_batches_change_between_steps_is_seen():
    class Temperature(torch.nn.Module):
        scale = 1.0

    opt, net = PLAIN, Temperature()

    def batches():
        for scale in (1.0, 2.0, 3.0, 3.0):
            net.scale = scale
            yield torch.ones(2)

    def final(compile):
        return diffopt.minimize(
            lambda w, x: net.scale * (w * x).sum() ** 2,
            torch.ones(2),
            optimizer=opt,
            hparams=opt.hparams(lr=0.1),
            batches=batches(),
            compile=compile,
        ).params

    right = final(False)
    for _ in range(2):
        torch.testing.assert_close(final({"backend": "eager"}), right)


@pytest.mark.slow
def test_batches_in_one_tensor_and_a_number_that_is_captured_share_a_kernel():
    backend = Counted()
    params, lr, x, y, _ = problem()
    opt = PLAIN

    def gradient(compile, scale):
        rate = lr.clone().requires_grad_()
        sol = diffopt.minimize(
            lambda params, x: scale * loss(params, x, y, 0.1),
            params,
            optimizer=opt,
            hparams=lambda t: opt.hparams(lr=rate * 0.9**t),
            batches=torch.stack([x, x + 1, x + 2]),
            compile=compile,
        )
        return torch.autograd.grad(sol.losses[-1] + sol.params["a"].sum(), rate)

    for scale, graphs in ((1.0, 2), (1.0, 2), (2.0, 3)):
        same(gradient({"backend": backend}, scale), gradient(False, scale))
        assert backend.graphs == graphs


@pytest.mark.slow
def test_a_loop_in_compiled_code_is_traced_as_it_stands():
    params, lr, *rest = problem()

    def derivative(compile):
        outer = meta_loss(PLAIN, Unrolled(), compile, steps=2)
        return torch.func.grad(lambda lr: outer(params, lr, *rest))

    whole = torch.compile(derivative(True), fullgraph=True, backend="eager")
    same(whole(lr), derivative(False)(lr))


@pytest.mark.slow
def test_a_functionalized_module_is_compiled_with_its_buffers():
    net = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    model = diffopt.nn.functionalize(net.double())
    opt, (_, _, x, y, _) = PLAIN, problem()

    def run(compile):
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

        def squares(params, buffers, x):
            outputs, buffers = model(params, buffers, x)
            return ((outputs - y) ** 2).mean(), buffers

        sol = diffopt.minimize(
            squares,
            model.params,
            x,
            optimizer=opt,
            hparams=opt.hparams(lr={"0": lr, "1": 0.1, "2": 2 * lr}),
            steps=3,
            buffers=model.buffers,
            compile=compile,
        )
        return sol.buffers, torch.autograd.grad(sol.losses[-1], lr)

    found, right = run({"backend": "eager"}), run(False)
    same(found, right)
    assert not any(x.requires_grad for x in found[0].values())


@pytest.mark.slow
def test_a_parameter_that_the_loss_does_not_use_is_left_alone():
    def run(compile):
        params, lr, *rest = problem()
        opt = diffopt.adamw()
        sol = diffopt.minimize(
            loss,
            params | {"unused": torch.ones(2, dtype=torch.float64)},
            *rest,
            optimizer=opt,
            hparams=opt.hparams(lr=lr, weight_decay=0.5),
            steps=2,
            compile=compile,
        )
        return sol.params

    same(run({"backend": "eager"}), run(False))


@pytest.mark.slow
def test_a_captured_tensor_modified_before_the_backward_pass_raises():
    scale = torch.tensor(2.0, dtype=torch.float64)
    params, lr, *rest = problem()
    opt = diffopt.sgd()
    sol = diffopt.minimize(
        lambda *inputs: scale * loss(*inputs),
        params,
        *rest,
        optimizer=opt,
        hparams=opt.hparams(lr=lr.requires_grad_()),
        steps=2,
        compile={"backend": "eager"},
    )
    scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place since"):
        torch.autograd.grad(sol.losses[-1], lr)


@pytest.mark.slow
@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap])
def test_a_tensor_of_a_transform_that_is_captured_is_seen(transform):
    data = problem()

    def derivative(compile, captured):
        def outer(scale):
            def scaled(*inputs):
                return (scale if captured else 1.0) * loss(*inputs)

            return scale * meta_loss(PLAIN, Unrolled(), compile, loss=scaled)(*data)

        scales = torch.tensor([1.0, 2.0], dtype=torch.float64)
        return transform(outer)(scales if transform is torch.vmap else scales[1])

    options = {"backend": "eager"}
    same(derivative(options, False), derivative(False, False))
    with pytest.warns(UserWarning, match="runs without torch.compile"):
        found = derivative(options, True)
    same(found, derivative(False, True))


def test_a_warning_names_the_users_line():
    def noisy(w):
        return (w + torch.randn(())).square()

    opt = diffopt.sgd()
    with pytest.warns(UserWarning, match="noisy runs without torch.compile") as caught:
        diffopt.minimize(
            noisy, torch.ones(()), optimizer=opt, hparams=opt.hparams(), steps=1, compile=True
        )
    assert [warning.filename for warning in caught] == [__file__]


@needs_compiler
@pytest.mark.slow
def test_a_step_with_convolution_relu_and_pooling_is_right_with_inductor():
    def convolutional(params, x, y, decay):
        h = F.max_pool2d(F.conv2d(x, params["k"], padding=1).relu(), 2)
        return F.cross_entropy(h.flatten(1) @ params["w"], y) + decay * (params["k"] ** 2).sum()

    def gradients(compile):
        generator = torch.Generator().manual_seed(0)
        k = 0.3 * torch.randn(4, 1, 3, 3, generator=generator)
        w = 0.3 * torch.randn(64, 3, generator=generator)
        x = torch.randn(6, 1, 8, 8, generator=generator)
        leaves = [k.requires_grad_(), w.requires_grad_(), torch.tensor(0.1, requires_grad=True)]
        opt = PLAIN
        sol = diffopt.minimize(
            convolutional,
            {"k": k, "w": w},
            x,
            torch.arange(6) % 3,
            0.1,
            optimizer=opt,
            hparams=opt.hparams(lr=leaves[2]),
            steps=3,
            compile=compile,
        )
        return torch.autograd.grad(sol.losses.sum(), leaves)

    with warnings.catch_warnings():
        if torch.__version__ < "2.12":  # which does not trace a derivative of its gradient
            warnings.filterwarnings("ignore", ".* runs without torch.compile")
        found = gradients(True)
    for a, b in zip(found, gradients(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class _Scaled:
    def __init__(self):
        self.scale, self.calls = torch.tensor(2.0), 0

    def loss(self, w):
        self.calls += 1
        return self.scale * (w**2).sum()


def _capturing(kind, log):
    """A loss that captures a scale, which it also logs; and a function that replaces the scale."""
    scale, batch, own = 2.0, {"scale": torch.tensor(2.0)}, _Scaled()

    def rescale():
        nonlocal scale
        scale, batch["scale"], own.scale = 3.0, torch.tensor(3.0), torch.tensor(3.0)

    def scaled(w):
        return scale * (w**2).sum()

    def logged(w):
        log["last"] = w.detach()
        return scaled(w)

    losses = {
        "number": scaled,
        "helper": logged,
        "dict": lambda w: batch["scale"] * (w**2).sum(),
        "method": own.loss,
        "partial": functools.partial(lambda f, w: f(w), scaled),
    }
    return losses[kind], rescale


@pytest.mark.parametrize("kind", ["number", "helper", "dict", "method", "partial"])
@pytest.mark.parametrize("way", ["Checkpointed", "compiled"])
def test_a_captured_value_replaced_before_the_backward_pass_raises(way, kind, traceless):
    log = {}
    loss, rescale = _capturing(kind, log)
    lr, opt = torch.tensor(0.1, requires_grad=True), diffopt.sgd()

    def meta_gradient(between):
        sol = diffopt.minimize(
            loss,
            torch.ones(2),
            optimizer=opt,
            hparams=opt.hparams(lr=lr),
            steps=2,
            adjoint=Checkpointed() if way == "Checkpointed" else Unrolled(),
            compile=traceless if way == "compiled" else False,
        )
        between()
        return torch.autograd.grad(sol.params.sum(), lr)[0]

    expected = -2 * 2 * 4 * (1 - 4 * 0.1)  # of 2 (1 - 4 lr)^2
    for _ in range(2):
        assert meta_gradient(lambda: None).item() == pytest.approx(expected)
    with pytest.raises(RuntimeError, match="has been replaced since"):
        meta_gradient(rescale)


@pytest.mark.slow
@pytest.mark.parametrize("draw", [random.random, lambda: np.random.rand()])  # noqa: NPY002
def test_random_numbers_of_python_and_numpy_are_those_of_the_eager_loop(draw):
    def final(compile):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        opt = diffopt.sgd()
        return diffopt.minimize(
            lambda w: ((w - draw()) ** 2).sum(),
            torch.ones(2),
            optimizer=opt,
            hparams=opt.hparams(lr=0.1),
            steps=3,
            compile=compile,
        ).params

    with pytest.warns(UserWarning, match="runs without torch.compile"):
        found = final({"backend": "eager"})
    assert torch.equal(found, final(False))


@pytest.mark.slow
def test_a_loss_with_checkpoint_runs_eagerly():
    def recomputing(w):
        return checkpoint(lambda w: (w**3).sum(), w, use_reentrant=False)

    def final(compile):
        opt = diffopt.sgd()
        hp = opt.hparams(lr=0.1)
        start = torch.ones(2)
        return diffopt.minimize(
            recomputing, start, optimizer=opt, hparams=hp, steps=2, compile=compile
        ).params

    refused = pytest.warns(UserWarning, match="runs without torch.compile")
    with contextlib.nullcontext() if torch.__version__ < "2.12" else refused:  # which compiles it
        found = final({"backend": "aot_eager"})
    assert torch.equal(found, final(False))


def test_a_graph_that_fails_in_a_later_step_leaves_no_transform_active():
    def loss(x, y):
        try:
            return (x * y).sum() + torch.linalg.cholesky(x[0] * torch.eye(1).double()).sum()
        except torch.linalg.LinAlgError:
            return (x * y).sum()

    def run(compile):
        y = torch.ones(2, dtype=torch.float64, requires_grad=True)
        sgd, start = diffopt.sgd(), torch.ones(2, dtype=torch.float64)
        hp = sgd.hparams(lr=0.4)
        sol = diffopt.minimize(loss, start, y, optimizer=sgd, hparams=hp, steps=4, compile=compile)
        return sol.params, torch.autograd.grad(sol.params.sum(), y)

    with pytest.warns(UserWarning, match="runs without torch.compile"):
        found = run({"backend": "eager"})
    torch.testing.assert_close(found, run(False))
    assert kernels._torch.transforms_active() == 0
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        (found[0] + torch.ones(1, requires_grad=True)).sum()  # raises where hooks are disabled
