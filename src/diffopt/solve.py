"""minimize(): an inner loop on a loss, differentiated as its `adjoint` says."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree
from diffopt._arguments import (
    check_bool,
    check_function,
    check_integer,
    check_result,
    explains_keywords,
    too_large,
)
from diffopt._diff.functions import AmbientState
from diffopt._diff.gradient import NOTHING
from diffopt._diff.unmodified import Captured, noted, unwritten
from diffopt._rule import checks, hyper
from diffopt._tree import Tree
from diffopt.adjoint import Adjoint, FirstOrder, GradientStep, Implicit, Truncated, Unrolled
from diffopt.adjoint._base import all_done, check_adjoint, compiler_of, is_compiled
from diffopt.adjoint._steps import taken
from diffopt.optimizer import Optimizer, check_optimizer

Callback: TypeAlias = Callable[[int, Tensor, Tree, Any], object]
"""`(step, loss, params, state)`"""


class Solution(NamedTuple):
    """What `minimize` returns.

    Attributes:
        params: the parameters after the last step.
        state: the optimizer's state after the last step; pass it to the next call to continue.
        losses: the loss before each step, shape [steps].
        aux: the auxiliary outputs of the loss, one entry per step; empty without `has_aux`.
        buffers: the buffers that the loss returned in the last step; `()` without `buffers`.
        steps: the number of steps taken, a 0-d integer tensor.
    """

    params: Tree
    state: Any
    losses: Tensor
    aux: list[Any]
    buffers: Tree
    steps: Tensor


@explains_keywords
def minimize(
    loss: Callable[..., Any],
    params: Tree,
    *args: Any,
    optimizer: Optimizer[Any, Any],
    hparams: Any | Callable[[int], Any],
    steps: int | None = None,
    batches: Iterable[Any] | None = None,
    state: Any = None,
    buffers: Tree = None,
    has_aux: bool = False,
    tol: float | None = None,
    adjoint: Adjoint | None = Unrolled(),  # noqa: B008 (frozen)
    callback: Callback | None = None,
    compile: bool | Mapping[str, Any] = False,
) -> Solution:
    """Take optimizer steps on a loss; the result is differentiable.

    Computes params_{t+1}, state_{t+1} = optimizer.update(params_t, grad loss(params_t), state_t,
    hparams) for t = 0, ..., steps - 1. Works under autograd, under torch.func transforms in any
    nesting, and under torch.compile. Under torch.no_grad() no graph is built.

    A parameter that the loss does not use in a step has the gradient None there: neither weight
    decay nor momentum nor Adam changes it. torch.compile cannot distinguish such a parameter from
    one with a zero gradient: there the gradient is zero.

    Args:
        loss: `loss(params, *args, *batch)` returns a 0-d tensor, or `(value, aux)` with `has_aux`.
            With `buffers` it is called as `loss(params, buffers, *args, *batch)`, and the new
            buffers follow the value: `(value, buffers)`, or `(value, buffers, aux)`.
        params: a pytree of floating-point or complex tensors.
        *args: further arguments of the loss, the same at every step.
        optimizer: a pure optimizer.
        hparams: its hyperparameters, from `optimizer.hparams(...)`; or a function of the step 0, 1,
            ... that returns them, for schedules and learning rates learned per step.
        steps: the number of steps. With `batches`, the number of batches used.
        batches: an iterable with one entry per step. A tuple or list holds several arguments of the
            loss; anything else is a single argument. Adjoints keep them for the derivative: yield
            clones of a buffer that is filled again, since what numpy or `.data` writes is not seen.
        state: the optimizer's initial state; `optimizer.init(params)` if None.
        buffers: state of the model that the loss passes on from step to step, such as the running
            statistics of batch normalization (for which torch's kernel has no derivative).
        has_aux: whether the loss also returns an auxiliary output.
        tol: stop as soon as the 2-norm of the gradient of all params is at most this. Under vmap
            each example stops by itself; under torch.compile, which cannot stop early, the
            remaining steps change nothing. `Unrolled`, `FirstOrder`, `Implicit` and None run the
            loop once; other adjoints look for its end first, by a run without a graph.
        adjoint: how the result is differentiated, see `diffopt.adjoint`. None builds no graph, for
            evaluation: memory does not grow with the number of steps.
        callback: `callback(step, loss, params, state)` is called after each step 0, 1, ... with the
            loss before the step and the params and state after it, detached; under torch.vmap with
            those of all examples, batch dimensions first. They are the loop's own tensors: it may
            keep them, but must never write to them (in a later call nothing notices that), so clone
            what is to be changed. What it returns is ignored; if it raises
            StopIteration, that step is the last. `Unrolled`, `FirstOrder` and None call it as the
            loop runs; other adjoints, which may run steps again, call it in a run without a graph
            before their own.
        compile: whether torch.compile compiles the step and its derivative, each once: for any
            number of steps, and any learning rate and data of these shapes. A mapping holds its
            arguments `backend`, `mode`, `options` or `dynamic`. The first results are compared with
            those of the eager step; a step that cannot be compiled, or is compiled wrongly, runs
            eagerly, with a warning that says why. So do second derivatives of the result, steps
            that draw random numbers, and steps whose loss closes over a tensor that requires a
            gradient or is batched: pass it as an argument.

    Returns:
        A `Solution`.

    Raises:
        ValueError: neither `steps` nor `batches` is given, params has no leaves, there are fewer
            batches than steps, or none at all without `steps`, the loss is not scalar or does not
            depend on params, new buffers have another structure or shape, or `compile` has an
            option that it does not take; also what `optimizer.update` raises.
        TypeError: an argument has the wrong type: the loss is not callable, `batches` is not
            iterable, a leaf of params is not a tensor, `hparams` or `state` belongs to another
            optimizer, and so on; or the loss does not return what `has_aux` and `buffers` require.
        RuntimeError: there is a `callback` under torch.compile, which cannot call it, or it writes
            to a tensor that it is given; `batches` writes to one that it has yielded.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.sgd()
        >>> lr = torch.tensor(0.25, requires_grad=True)
        >>> def loss(w, target):
        ...     return 0.5 * ((w - target) ** 2).sum()
        >>> sol = diffopt.minimize(
        ...     loss, torch.zeros(2), torch.ones(2),
        ...     optimizer=opt, hparams=opt.hparams(lr=lr), steps=2,
        ... )
        >>> sol.params  # 1 - (1 - lr)^2
        tensor([0.4375, 0.4375], grad_fn=<AddBackward0>)
        >>> sol.losses
        tensor([1.0000, 0.5625], grad_fn=<StackBackward0>)
        >>> torch.autograd.grad(sol.params.sum(), lr)  # 2 * 2 (1 - lr)
        (tensor(3.),)
    """
    _check_loop(steps, batches, tol)
    check_optimizer(optimizer, "optimizer")
    adjoint = Truncated(0) if adjoint is None else adjoint
    check_adjoint(adjoint)
    check_function(callback, "callback", optional=True)
    if callback is not None and _modes.compiling():
        raise RuntimeError("torch.compile cannot call a callback after each step: pass None")
    _check_loss(loss, has_aux, buffers)
    params, args, buffers = _tree.plain((params, args, buffers))
    _check_params(params)
    check_hparams(hparams, optimizer.hparams)
    if state is not None:
        check_state(state, optimizer, params)
    stateful = buffers is not None

    def objective(params: Tree, inputs: Any) -> tuple[Tensor, Any]:
        buffers, args, batch = inputs
        inputs = (buffers, *args, *batch) if stateful else (*args, *batch)
        value, others = _outputs(loss(params, *inputs), stateful, has_aux)
        return value, (_like_buffers(others[0], buffers), others[1]) if stateful else others

    def of_step(number: int) -> Any:
        return of_one_step(hparams(number), number, optimizer.hparams)

    compiler = compiler_of(compile, "the loss", loss, optimizer)
    step = GradientStep(objective, optimizer, tol, compiler=compiler)
    state = optimizer.init(params) if state is None else state
    carry = (params, state, buffers if stateful else ())
    constant, own = ((), of_step) if callable(hparams) else (hparams, None)
    arguments = (constant, args)
    same = batches is None and own is None
    xs = itertools.repeat((None, ()), steps or 0) if same else _xs(steps, batches, own)
    if compiler and own is None and isinstance(batches, (Tensor, list, tuple, type(None))):
        xs = list(xs)  # no code of the user's runs between the steps, which may run at once
    count = None
    watch = None if callback is None else _Watch(callback)
    # Whether it takes each step once and in order, and needs no more than one x at a time.
    once = type(adjoint) in (Unrolled, FirstOrder) or adjoint == Truncated(0)
    ends = once or (type(adjoint) is Implicit and watch is None)
    if (tol is not None and not _modes.compiling() and not ends) or (watch and not once):
        xs, count = _until_done(step, carry, arguments, xs, watch)
    if watch and once:
        step = _WatchedStep(**vars(step), watch=watch)
        xs = watch.until_stopped(xs)
    carry, outputs = adjoint.run(step, carry, arguments, xs)
    if outputs and count is None and all_done(outputs[-1]):
        count = len(outputs) - 1
    outputs = outputs[:count]
    losses = torch.stack([value for value, _, _ in outputs]) if outputs else torch.empty(0)
    aux = [aux for _, aux, _ in outputs] if has_aux else []
    return Solution(carry[0], carry[1], losses, aux, carry[2], _steps(outputs))


def _until_done(
    step: GradientStep, carry: Tree, args: Tree, xs: Iterable[Any], watch: _Watch | None
) -> tuple[list[Any], int]:
    """The xs before the first one where every gradient is within the tolerance; their number.

    If that is the very first x, it is returned alone: its step changes nothing, but shows the loss
    to adjoints that do not follow the steps (`Implicit`). The steps are watched; since they are
    taken again, what watches them must not change what they capture.
    """
    captured = Captured("the loss or step", step)
    ambient = AmbientState((carry, args))
    used: list[Any] = []
    idle: list[Any] = []
    for x, versions in noted(xs if watch is None else watch.until_stopped(xs)):
        noticed = nullcontext() if used else captured.noticed((carry, args, x))
        with torch.no_grad(), noticed:
            carry, output = _tree.detach(step(carry, args, x))
        if all_done(output):
            idle = [x]
            break
        used.append((x, versions))
        if watch is not None:
            watch(carry, output)
        elif is_compiled(step) and isinstance(xs, list):
            with torch.no_grad():
                outputs = taken(step, carry, args, xs[1:])[1]
            ended = bool(outputs) and all_done(outputs[-1])
            used += noted(xs[1 : 1 + len(outputs) - ended])
            break
    captured.check()
    ambient.restore()
    return unwritten(used) or idle, len(used)


class _Watch:
    """Calls back after each step, and ends a loop when the callback raises StopIteration."""

    def __init__(self, callback: Callback) -> None:
        self.callback, self.steps, self.stopped = callback, 0, False

    def __call__(self, carry: Tree, output: Any) -> None:
        with _torch.outside_transforms():
            seen = _tree.map_tensors(
                lambda x: _modes.all_samples(x).detach(), (output[0], carry[0], carry[1])
            )
            before = _modes.versions(_tree.tensors(seen))
            try:
                self.callback(self.steps, *seen)
            except StopIteration:
                self.stopped = True
            if _modes.versions(_tree.tensors(seen)) != before:
                raise RuntimeError(
                    "callback has written to a tensor that it was given, which is one of the "
                    "loop's: clone it first; params are changed by the optimizer alone"
                )
        self.steps += 1

    def until_stopped(self, xs: Iterable[Any]) -> Iterator[Any]:
        for x in xs:
            yield x
            if self.stopped:
                return


@dataclass(frozen=True, eq=False, kw_only=True)
class _WatchedStep(GradientStep):
    """A step that is seen by a callback."""

    watch: _Watch

    def __call__(self, carry: Tree, args: Tree, x: Any) -> tuple[Tree, Any]:
        carry, output = super().__call__(carry, args, x)
        if not all_done(output):
            self.watch(carry, output)
        return carry, output


def _steps(outputs: list[Any]) -> Tensor:
    done = [done for _, _, done in outputs if done is not None]
    if done:
        return (~torch.stack(done)).sum()
    return torch.scalar_tensor(len(outputs), dtype=torch.long, device="cpu")


def _check_loop(steps: Any, batches: Any, tol: Any) -> None:
    if steps is None and batches is None:
        raise ValueError("minimize requires steps= or batches=")
    if steps is not None:
        check_integer(steps, "steps", 0)
    if isinstance(batches, dict):
        raise TypeError(
            "batches is a dict, whose keys would be the batches: pass an iterable with one entry "
            "for each step"
        )
    scalar = isinstance(batches, Tensor) and batches.dim() == 0
    unordered = isinstance(batches, (str, bytes, set, frozenset))
    if batches is not None and (scalar or unordered or not isinstance(batches, Iterable)):
        described = _tree.describe(batches)
        raise TypeError(f"batches is {described}: pass an iterable with one entry for each step")
    if tol is not None:
        _check_tol(tol)


def _check_tol(tol: Any) -> None:
    if isinstance(tol, Tensor):
        scalar = tol.dim() == 0 and not (tol.is_complex() or tol.dtype == torch.bool)
        scalar = scalar and tol.layout is torch.strided and not tol.is_meta
    else:
        scalar = isinstance(tol, numbers.Real)
    if not scalar or isinstance(tol, bool):
        raise TypeError(f"tol is {_tree.describe(tol)}, not a number")
    if not tol >= 0 or too_large(tol):
        raise ValueError(f"tol is {tol!r}, but must be a number >= 0")


def _check_loss(loss: Any, has_aux: Any, buffers: Any) -> None:
    if not callable(loss) or isinstance(loss, type):
        raise TypeError(f"loss is {_tree.describe(loss)}, not a function of params")
    check_bool(has_aux, "has_aux")
    for i, leaf in enumerate(() if buffers is None else _tree.leaves(buffers)):
        if isinstance(leaf, bool) or not isinstance(leaf, (Tensor, numbers.Number, type(None))):
            path = _tree.paths(buffers, "buffers")[i]
            raise TypeError(
                f"{path} is {_tree.describe(leaf)}, not a tensor: pass a tree of tensors, such as "
                "buffers=model.buffers"
            )


def _check_params(params: Tree) -> None:
    leaves = _tree.flatten(params)[0]
    if not leaves:
        raise ValueError(f"params is {params!r}, which holds no tensor")
    checks.params(leaves, params, _fault)


def _fault(param: Tensor) -> str | None:
    if param.layout is not torch.strided:
        return f"has layout {param.layout}, but must be dense"
    if not _modes.has_derivative(param):
        return f"has dtype {param.dtype}, not a floating-point or complex one"
    return None


def check_hparams(hparams: Any, maker: Any) -> None:
    """Raise unless it is a record of the optimizer, as far as can be told, or a function."""
    if isinstance(hparams, type) or (type(hparams) is type(maker) and hparams == maker):
        raise TypeError(f"hparams is {hparams!r}, which must be called: optimizer.hparams(...)")
    if not callable(hparams) and not hyper.made_by(hparams, maker):
        raise TypeError(
            f"hparams is {_tree.describe(hparams)}, not a record of this optimizer: create it with "
            "optimizer.hparams(...)"
        )


def check_state(state: Any, optimizer: Optimizer[Any, Any], params: Tree) -> None:
    """Raise unless it is a state of the optimizer, as far as can be told."""
    with torch.no_grad():
        expected = type(optimizer.init(params)).__name__
    if type(state).__name__ != expected:
        raise TypeError(
            f"state has type {type(state).__name__}, but must have type {expected}: pass what "
            "optimizer.init(params) or an earlier minimize returned, or None"
        )


def _xs(
    steps: int | None, batches: Iterable[Any] | None, hparams: Callable[[int], Any] | None
) -> Iterable[Any]:
    """For each step, its own hyperparameters (or None) and its batch as arguments of the loss."""
    count = 0
    for batch in itertools.islice(itertools.repeat(()) if batches is None else batches, steps):
        batch = tuple(cast(list[Any], batch)) if isinstance(batch, (tuple, list)) else (batch,)
        yield None if hparams is None else hparams(count), batch
        count += 1
    if steps is None and count == 0:
        raise ValueError("batches has no entries: if it is an iterator, it has been used up")
    if steps is not None and count < steps:
        raise ValueError(f"batches has {count} entries, but steps is {steps}")


def of_one_step(record: Any, number: int, maker: Any) -> Any:
    """What `hparams` returned for this step, checked to be a record of the optimizer."""
    if not hyper.made_by(record, maker):
        raise TypeError(
            f"hparams({number}) returned {_tree.describe(record)}, but must return "
            "optimizer.hparams(...)"
        )
    return record


def _like_buffers(new: Tree, old: Tree) -> Tree:
    """The new buffers; raises unless their structure and shapes are those of the old ones."""
    names = "the new buffers", "buffers"
    new = _tree.ordered_like(new, old, names)
    for i, (mine, theirs) in enumerate(zip(_tree.leaves(new), _tree.leaves(old), strict=True)):
        if isinstance(theirs, Tensor) and getattr(mine, "shape", None) != theirs.shape:
            paths = [_tree.paths(old, name)[i] for name in names]
            raise ValueError(
                f"{paths[0]} is {_tree.describe(mine)}, but {paths[1]} is {_tree.describe(theirs)}"
            )
    return new


def _outputs(result: Any, stateful: bool, has_aux: bool) -> tuple[Tensor, Any]:
    """What the loss returned as `(value, (buffers, aux))`."""
    if isinstance(result, Tensor) and not (stateful or has_aux):
        return _real(result), NOTHING
    parts = ["value", *(["buffers"] * stateful), *(["aux"] * has_aux)]
    values: Any = (result,) if len(parts) == 1 else result
    named = dict(zip(parts, check_result(values, "loss", *parts), strict=True))
    value = named["value"]
    if not isinstance(value, Tensor):
        hint = ": has_aux=True takes (value, aux)" if isinstance(value, tuple) else ""
        raise TypeError(f"loss returned {_tree.describe(value)} as its value, not a tensor{hint}")
    return _real(value), (named.get("buffers", ()), named.get("aux"))


def _real(value: Tensor) -> Tensor:
    """The value; raises unless it is a real number."""
    if value.dim() != 0 or not value.is_floating_point():
        raise ValueError(
            "loss must return a real 0-d tensor, but its value has shape "
            f"{tuple(value.shape)} and dtype {value.dtype}"
        )
    return value
