"""Kernels that torch.compile makes of functions of trees: kept, and compared with the functions."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree
from diffopt._compiler import announced, backend_of, brief, with_own_code
from diffopt._diff import functions
from diffopt._tree import Tree

Map: TypeAlias = Callable[..., list[Tensor]]
"""`(*tensors) -> tensors`"""

Operator: TypeAlias = tuple[str, tuple[Any, ...]]
"""The name of an entry of `_OPERATORS`, and its arguments: what makes a map of another one."""

T = TypeVar("T")


class UnfitError(Exception):
    """Why a function is not compiled."""


# What kernels compute. torch.compile traces it, and it also runs as it is, for comparison.


def _batched(function: Map, dims: Sequence[int | None]) -> Map:
    """The map for a batch, whose results all have the batch as their first dimension."""

    def named(*xs: Tensor) -> list[Tensor]:  # torch 2.11 cannot trace what vmap asks of an object
        return function(*xs)

    return lambda *xs: list(torch.vmap(named, tuple(dims))(*xs))


def _pulled_back(function: Map, needed: Sequence[bool], given: Sequence[bool]) -> Map:
    """`(inputs, cotangents) -> gradients` of the inputs needed, from cotangents of some outputs."""

    def pullback(*xs: Tensor) -> list[Tensor]:
        inputs, rest = xs[: len(needed)], iter(xs[len(needed) :])
        cotangents = [next(rest) if there else None for there in given]
        grads = functions.vjp(function, inputs, needed, cotangents)
        pairs = zip(inputs, grads, needed, strict=True)
        return [torch.zeros_like(x) if g is None else g for x, g, need in pairs if need]

    return pullback


def _pushed_forward(function: Map, moved: Sequence[bool]) -> Map:
    """`(inputs, directions) -> outputs and tangents`, those of the floating-point outputs.

    The directions of an input that is moved, and tangents, have a leading dimension.
    """
    places = [i for i, moves in enumerate(moved) if moves]

    def pushforward(*xs: Tensor) -> list[Tensor]:
        inputs, directions = xs[: len(moved)], xs[len(moved) :]
        floats: list[bool] = []

        def partial(*chosen: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            outputs = function(*functions.replaced(inputs, places, chosen))
            floats[:] = [_modes.has_derivative(y) for y in outputs]
            pairs = [*zip(outputs, floats, strict=True)]
            return [y for y, is_float in pairs if is_float], [y for y, f in pairs if not f]

        def along(*tangents: Tensor) -> Any:
            return torch.func.jvp(partial, tuple(inputs[i] for i in places), tangents, has_aux=True)

        values, tangents, rest = torch.vmap(along)(*directions)
        value, other = iter(values), iter(rest)
        outputs = [next(value if is_float else other)[0] for is_float in floats]
        # torch makes the tangent of a number times a 0-d tensor float64.
        pairs = zip(tangents, values, strict=True)
        return [*outputs, *(tangent.to(y.dtype) for tangent, y in pairs)]

    return pushforward


_OPERATORS: dict[str, Callable[..., Map]] = {
    "vmap": _batched,
    "vjp": _pulled_back,
    "jvp": _pushed_forward,
}


def composed(function: Map, operators: Sequence[Operator]) -> Map:
    """What the operators, one after another, make of a map."""
    for name, arguments in operators:
        function = _OPERATORS[name](function, *arguments)
    return function


class Variant:
    """One graph that torch.compile has made for a kernel.

    Args:
        run: what runs the graph.

    Attributes:
        tests: how many more of its results are compared.
        facts: what a run of the function as it is has shown.
        pure: whether all that torch.compile makes of the function is this graph.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run
        self.tests: int | None = None
        self.facts: Any = None
        self.pure = not _torch.traced_side_effects()


class Wires(NamedTuple):
    """A variant, to run on more tensors like those before, without torch.compile's checks.

    Attributes:
        run: what runs its graph.
        takes: the places of its inputs among the tensors, followed by those that it captures.
        gives: the places of the results among its outputs, followed by what `takes` is about.
        captured: the tensors that it captures.
        replays: whether the results must be copied.
    """

    run: Callable[..., Any]
    takes: list[int]
    gives: list[int]
    captured: list[Tensor]
    replays: bool

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        pool = [*(x if x.dim() else x.reshape(1) for x in tensors), *self.captured]
        found = [*self.run(*[pool[i] for i in self.takes]), *pool]
        return [found[i].clone() if self.replays else found[i] for i in self.gives]


class Run(NamedTuple):
    """What a kernel returns.

    Attributes:
        results: the tensors that were computed.
        join: makes a pair of them: the results of the function, and their derivatives.
        variant: the graph that ran.
        captured: the tensors that it captures.
        wires: how to run it again; None if that is not possible without torch.compile's checks.
    """

    results: list[Tensor]
    join: Callable[..., Tree]
    variant: Variant
    captured: list[Tensor]
    wires: Wires | None


class _Running(threading.local):
    variant: Variant | None = None
    tensors: Sequence[Any] = ()
    outputs: Sequence[Any] = ()


_RUNNING = _Running()


class _Backend:
    """A backend of torch.compile; it notices which graph runs, and on which tensors.

    With `replays`, results are in the memory of a CUDA graph, and the next run overwrites them.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.compile = backend_of(options)
        self.dynamic = options.get("dynamic")
        asked = (options.get("options") or {}).get("triton.cudagraphs")
        self.replays = bool(asked) or options.get("mode") in ("reduce-overhead", "max-autotune")

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        variant = Variant(self.compile(graph, inputs))

        def noticed(*tensors: Any) -> Any:
            outputs = variant.run(*tensors)
            _RUNNING.variant, _RUNNING.tensors, _RUNNING.outputs = variant, tensors, outputs
            return outputs

        return noticed


_NUMBERS = itertools.count()


class Kernel:
    """What torch.compile makes of a map: any number of variants, as it sees fit.

    Its inputs have at least one dimension: torch.compile would trace twice what has scalars.

    Args:
        operators: what is made of a function that it is given.
        scalars: which of the tensors are scalars.
        what: what it computes, in messages.
        backend: what compiles it.

    Attributes:
        failure: why it must not be used.
    """

    def __init__(
        self,
        operators: Sequence[Operator],
        scalars: Sequence[bool],
        what: str,
        backend: _Backend,
    ) -> None:
        def kernel(function: Callable[..., Tree], inputs: Tree, extra: list[Tensor]) -> Tree:
            tensors, join = _tree.split(inputs)
            flat = functions.Flat(lambda inputs: function(*inputs), join)
            pairs = zip([*tensors, *extra], scalars, strict=True)
            results = composed(flat, operators)(*(x.reshape(()) if s else x for x, s in pairs))
            if pulled:
                return (), results
            count = flat.count
            return flat.join(results[:count]), results[count:]

        pulled = any(name == "vjp" for name, _ in operators)

        # Another name for each: torch.compile takes sizes for variable that differ between calls of
        # code with the same one.
        function = with_own_code(kernel, f"step_kernel_{next(_NUMBERS)}")
        self.compiled = torch.compile(
            function, backend=backend, fullgraph=True, dynamic=backend.dynamic
        )
        self.replays = backend.replays
        self.what, self.failure, self.ran = what, "", False

    def __call__(self, function: Callable[..., Tree], inputs: Tree, extra: list[Tensor]) -> Run:
        if self.failure:
            raise UnfitError(self.failure)
        _RUNNING.variant, hooked = None, _torch.saved_tensors_hooks_are_enabled()
        try:
            with contextlib.nullcontext() if self.ran else announced(self.what):
                tree = self.compiled(function, inputs, extra)
            variant, self.ran = _RUNNING.variant, True
        except Exception as error:
            if hooked:  # torch leaves them disabled where it fails in a transform
                _torch.enable_saved_tensors_hooks()
            raise self.unfit(f"torch.compile makes no kernel of it ({brief(error)})") from error
        finally:
            read, outputs = _RUNNING.tensors, _RUNNING.outputs
            _RUNNING.tensors = _RUNNING.outputs = ()
        if variant is None:
            raise self.unfit("torch.compile has found nothing to compile, or is disabled")
        given = [*_tree.split(inputs)[0], *extra]
        known = {*map(id, given)}
        captured = [x for x in read if isinstance(x, Tensor) and id(x) not in known]
        results, join = _tree.split(tree)
        wires = self._wires(variant, [*given, *captured], len(captured), read, results, outputs)
        if self.replays:
            results = [*map(Tensor.clone, results)]
        return Run(results, join, variant, captured, wires)

    def _wires(
        self,
        variant: Variant,
        given: Sequence[Tensor],
        captured: int,
        read: Sequence[Any],
        results: Sequence[Tensor],
        outputs: Any,
    ) -> Wires | None:
        """How the graph's inputs and outputs are connected, if they are tensors and it is all."""
        if not (variant.pure and isinstance(outputs, (tuple, list))):
            return None
        sources = {id(x): i for i, x in enumerate(given)}
        sinks = {id(y): i for i, y in enumerate([*cast(Sequence[Any], outputs), *given])}
        takes = [sources.get(id(x), -1) for x in read]
        gives = [sinks.get(id(y), -1) for y in results]
        if len(sources) < len(given) or -1 in (*takes, *gives):
            return None
        return Wires(variant.run, takes, gives, [*given[len(given) - captured :]], self.replays)

    def unfit(self, reason: str) -> UnfitError:
        """The kernel is not used again; the error to raise."""
        self.failure = reason
        return UnfitError(reason)

    def compare(
        self, found: Sequence[Tensor], function: Map, inputs: Sequence[Tensor], replaced: int = 0
    ) -> None:
        """Raise unless the results are those of the function of these inputs, up to rounding.

        The first results replace as many inputs as `replaced` says.
        """
        right = function(*inputs)
        kinds = [[(tuple(x.shape), x.dtype) for x in results] for results in (found, right)]
        if kinds[0] != kinds[1]:
            mine, theirs = next((a, b) for a, b in itertools.zip_longest(*kinds) if a != b)
            raise self.unfit(f"compiled, it returns {mine} instead of {theirs}")
        old = inputs[: min(replaced, len(right))]
        rounding = max(
            (torch.finfo(x.dtype).eps for x in (*right, *inputs) if _modes.has_derivative(x)),
            default=0,
        )
        if _agree(found, right, old, rounding, []):
            return
        # Rounding matters more where the function is ill-conditioned, as the first step of Adam is
        # where a gradient is nearly zero.
        others = [function(*_moved(inputs, 16 * rounding, k)) for k in range(4)]
        if not _agree(found, right, old, rounding, others):
            raise self.unfit("torch.compile computes wrong values")


def _moved(inputs: Sequence[Tensor], by: float, seed: int) -> list[Tensor]:
    """The inputs, moved a little."""

    def moved(x: Tensor) -> Tensor:
        number = torch.arange(1, x.numel() + 1, dtype=torch.float64, device=x.device)
        return x + (x * (by * (number * (seed + 1)).cos().reshape(x.shape))).to(x.dtype)

    return [moved(x) if _modes.has_derivative(x) else x for x in inputs]


def _agree(
    found: Sequence[Tensor],
    right: Sequence[Tensor],
    old: Sequence[Tensor],
    rounding: float,
    others: Sequence[Sequence[Tensor]],
) -> bool:
    """Whether both are the same up to rounding, of which a small change of the old value is more.

    All intermediate results may be rounded differently, hence half the digits. An element may
    differ by as much as those of `others`, and one in a hundred by any amount, if there are others.
    """
    floor = 64 * rounding * max(map(_size, right), default=0.0)
    for i, (mine, theirs) in enumerate(zip(found, right, strict=True)):
        if not _modes.has_derivative(theirs):
            if not torch.equal(mine, theirs):
                return False
            continue
        a, b = _wide(mine), _wide(theirs)
        base = _wide(old[i]) if i < len(old) and old[i].shape == b.shape else torch.zeros_like(b)
        tolerance = torch.full_like(b.abs(), rounding**0.5 * _size(b - base) + floor)
        for other in others:
            tolerance = torch.maximum(tolerance, 4 * (_wide(other[i]) - b).abs().nan_to_num())
        close = ((a - b).abs() <= tolerance) | (a == b) | (a.isnan() & b.isnan())
        if int((~close).sum()) > (b.numel() // 100 if others else 0):
            return False
    return True


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64)


def _size(x: Tensor) -> float:
    """The largest finite magnitude of an element."""
    x = _wide(x).abs() if _modes.has_derivative(x) else x.new_zeros(0)
    finite = x[torch.isfinite(x)]
    return finite.max().item() if finite.numel() else 0.0


# Kernels and backends are kept for all loops of the process.

_LOCK = threading.RLock()
_KEPT: OrderedDict[Any, Any] = OrderedDict()
_MOST = 256


def kept(key: Any, make: Callable[[], T]) -> T:
    """What was made for this key; the least recently used of many are dropped."""
    with _LOCK:
        if key not in _KEPT:
            _KEPT[key] = make()
            if len(_KEPT) > _MOST:
                _KEPT.popitem(last=False)
        _KEPT.move_to_end(key)
        return _KEPT[key]


def backend(options: dict[str, Any]) -> _Backend:
    """The backend for options of torch.compile."""
    key = repr(sorted(options.items(), key=lambda item: item[0]))
    return kept(("backend", key, options.get("backend")), lambda: _Backend(options))
