"""Kernels that torch.compile makes of functions of trees: kept, and compared with the functions."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree
from diffopt._compiler import announced, backend_of, brief, with_own_code
from diffopt._diff import functions, repairs
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

        if len(directions[0]) == 1:  # torch.vmap would make slower products of batches
            values, tangents, rest = along(*(d[0] for d in directions))
            tangents = [tangent[None] for tangent in tangents]
        else:
            batches, tangents, constants = torch.vmap(along)(*directions)
            values, rest = ([batch[0] for batch in found] for found in (batches, constants))
        value, other = iter(values), iter(rest)
        outputs = [next(value if is_float else other) for is_float in floats]
        # torch makes the tangent of a number times a 0-d tensor float64.
        pairs = zip(tangents, values, strict=True)
        return [*outputs, *(tangent.to(y.dtype) for tangent, y in pairs)]

    return pushforward


_OPERATORS: dict[str, Callable[..., Map]] = {
    "vmap": _batched,
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
        halves: what it is divided in, without autograd in between, if that has been compared.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run
        self.tests: int | None = None
        self.facts: Any = None
        self.halves: _torch.Halves | None = None

    @property
    def compared(self) -> bool:
        """Whether no more results are compared."""
        return self.tests is not None and self.tests <= 0

    def __call__(self, tensors: Sequence[Any]) -> tuple[Any, list[Tensor] | None]:
        """The outputs, and what the second half needs, if the first has run."""
        if self.halves is None or not self.compared:
            return self.run(*tensors), None
        with torch.no_grad():
            return self.halves.run(tensors)


class Asked(NamedTuple):
    """A vector-Jacobian product of a step, the same for all steps of a loop.

    Attributes:
        wanted: the inputs whose gradients it returns.
        there: the results whose cotangents it takes.
    """

    wanted: tuple[bool, ...]
    there: tuple[bool, ...]

    def pulled(self, function: Map, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The gradients, of a function as it is, from its inputs and the cotangents."""
        inputs, cotangents = tensors[: len(self.wanted)], iter(tensors[len(self.wanted) :])
        given = [next(cotangents) if there else None for there in self.there]
        grads = functions.vjp(function, inputs, self.wanted, given)
        triples = zip(inputs, grads, self.wanted, strict=True)
        return [torch.zeros_like(x) if g is None else g for x, g, want in triples if want]


class Pull(Protocol):
    """The gradients; `retain` if it is called again."""

    def __call__(self, cotangents: Sequence[Tensor], retain: bool, /) -> list[Tensor]: ...


Again: TypeAlias = Callable[[Sequence[Tensor]], tuple[list[Tensor], "Pull | None"]]
"""Runs a graph on more tensors like those before, without torch.compile's checks."""


class Wires(NamedTuple):
    """How the inputs and outputs of a graph are connected.

    Attributes:
        takes: the places of its inputs among those of the kernel, followed by what it captures.
        gives: the places of the results among its outputs, followed by what `takes` is about.
        captured: the tensors that it captures.
    """

    takes: list[int]
    gives: list[int]
    captured: list[Tensor]

    @staticmethod
    def of(
        given: Sequence[Tensor],
        captured: list[Tensor],
        read: Sequence[Any],
        outputs: Sequence[Any],
        results: Sequence[Tensor],
    ) -> Wires | None:
        """From tensors of a run; None if some are not known."""
        pool = [*given, *captured]
        sources = {id(x): i for i, x in enumerate(pool)}
        sinks = {id(y): i for i, y in enumerate([*outputs, *pool])}
        takes = [sources.get(id(x), -1) for x in read]
        gives = [sinks.get(id(y), -1) for y in results]
        if len(sources) < len(pool) or -1 in (*takes, *gives):
            return None
        return Wires(takes, gives, captured)

    def run(self, graph: Callable[..., Any], given: Sequence[Tensor]) -> list[Tensor]:
        """The results."""
        pool = [*given, *self.captured]
        found = [*graph(*[pool[i] for i in self.takes]), *pool]
        return [found[i] for i in self.gives]


class Run(NamedTuple):
    """What a kernel returns.

    Attributes:
        results: the tensors that were computed.
        join: makes a pair of them: the results of the function, and their derivatives.
        variant: the graph that ran.
        captured: the tensors that it captures.
        pull: its vector-Jacobian product, if that was asked for.
        outputs: the outputs of the graph.
        wires: how they are connected; None if that is not known.
    """

    results: list[Tensor]
    join: Callable[..., Tree]
    variant: Variant
    captured: list[Tensor]
    pull: Pull | None
    outputs: Sequence[Any]
    wires: Wires | None


class Halved(NamedTuple):
    """A graph whose derivative has been compiled with it, without autograd in between.

    Attributes:
        halves: see `_torch.Halves`.
        cotangents: which of the cotangents its second half takes.
        grads: the places of the gradients asked for among those that it computes.
    """

    wires: Wires
    halves: _torch.Halves
    cotangents: list[int]
    grads: list[int]

    @staticmethod
    def of(wires: Wires, halves: _torch.Halves, asked: Asked) -> Halved | None:
        """None if results are inputs or come twice."""
        sinks = [sink for sink, there in zip(wires.gives, asked.there, strict=True) if there]
        wanted = [i for i, want in enumerate(asked.wanted) if want]
        if len({*sinks}) < len(sinks) or not {*halves.tangents} <= {*sinks}:
            return None
        if not {*wanted} <= {*wires.takes} or max(sinks, default=0) >= halves.outputs:
            return None
        places = [wires.takes.index(i) for i in wanted]
        return Halved(wires, halves, [*map(sinks.index, halves.tangents)], places)

    def run(self, given: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The results, and what the second half needs."""
        saved: list[Tensor] = []

        def forward(*inputs: Tensor) -> list[Tensor]:
            outputs, saved[:] = self.halves.run(inputs)
            return outputs

        return self.wires.run(forward, given), saved

    def pulled(self, saved: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients."""
        given = [cotangents[i].contiguous() for i in self.cotangents]
        found = self.halves.backward([*saved, *given])
        return [found[i] for i in self.grads]


def _unwound(run: Callable[..., Any]) -> Callable[..., Any]:
    """What runs a graph, also one that begins and ends transforms itself, and may fail between."""

    def ran(*tensors: Any) -> Any:
        active, hooked = _torch.transforms_active(), _torch.saved_tensors_hooks_are_enabled()
        try:
            return run(*tensors)
        except BaseException:
            _torch.end_transforms(active)
            if hooked:  # which the transforms disable on torch 2.11
                _torch.enable_saved_tensors_hooks()
            raise

    return ran


class _Running(threading.local):
    variant: Variant | None = None
    tensors: Sequence[Any] = ()
    outputs: Sequence[Any] = ()
    saved: list[Tensor] | None = None


_RUNNING = _Running()


class TracedError(Exception):
    """A function has been traced, and not run."""


def refuse_effects() -> None:
    """Raise if what is traced does more than compute a graph, as comparisons run it again."""
    if _torch.traced_side_effects():
        raise UnfitError(
            "it writes to something that exists, such as a list, an attribute or a variable of "
            "another scope, which must happen once in each step"
        )


class Tracing:
    """A backend of torch.compile that compiles nothing."""

    dynamic, replays = None, False

    def __call__(self, graph: Any, inputs: Any) -> Any:
        refuse_effects()
        raise TracedError


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
        refuse_effects()
        repairs.mend_traced(graph)
        with _torch.partitioned():  # a derivative may be asked for more than once
            variant = Variant(_unwound(self.compile(graph, inputs)))

        def noticed(*tensors: Any) -> Any:
            outputs, _RUNNING.saved = variant(tensors)
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
        asked: the vector-Jacobian product that is computed, too.

    Attributes:
        failure: why it must not be used.
    """

    def __init__(
        self,
        operators: Sequence[Operator],
        scalars: Sequence[bool],
        what: str,
        backend: _Backend | Tracing,
        asked: Asked | None,
    ) -> None:
        def kernel(function: Callable[..., Tree], inputs: Tree, extra: list[Tensor]) -> Tree:
            tensors, join = _tree.split(inputs)
            flat = functions.Flat(lambda inputs: function(*inputs), join)
            pairs = zip([*tensors, *extra], scalars, strict=True)
            results = composed(flat, operators)(*(x.reshape(()) if s else x for x, s in pairs))
            if asked is not None:
                results = [y if i in followed else y.detach() for i, y in enumerate(results)]
            count = flat.count
            return flat.join(results[:count]), results[count:]

        followed = [i for i, there in enumerate(asked.there) if there] if asked else []

        # Another name for each: torch.compile takes sizes for variable that differ between calls of
        # code with the same one.
        function = with_own_code(kernel, f"step_kernel_{next(_NUMBERS)}")
        self.compiled = torch.compile(
            function, backend=backend, fullgraph=True, dynamic=backend.dynamic
        )
        self.scalars, self.asked, self.replays = scalars, asked, backend.replays
        self.what, self.failure = what, ""
        self.announced = set[str]()

    def vectors(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Its inputs: not views, whose bases torch.compile would watch."""
        vectors = [x if x.dim() else x.reshape(1).detach() for x in tensors]
        if self.asked is None:
            return vectors
        wanted = itertools.chain(self.asked.wanted, itertools.repeat(False))
        pairs = zip(vectors, wanted)  # noqa: B905
        return [x.detach().requires_grad_() if want else x for x, want in pairs]

    def __call__(self, function: Callable[..., Tree], inputs: Tree, extra: list[Tensor]) -> Run:
        if self.failure:
            raise UnfitError(self.failure)
        _RUNNING.variant, hooked = None, _torch.saved_tensors_hooks_are_enabled()
        try:
            with self._announced(self.what):
                tree = self.compiled(function, inputs, extra)
            variant = _RUNNING.variant
        except Exception as error:
            if hooked:  # torch leaves them disabled where it fails in a transform
                _torch.enable_saved_tensors_hooks()
            cause = getattr(error, "inner_exception", error)  # of an error in a backend
            if isinstance(cause, TracedError):
                raise cause from None
            if isinstance(cause, UnfitError):
                raise self.unfit(str(cause)) from None
            raise self.unfit(f"torch.compile makes no kernel of it ({brief(error)})") from error
        finally:
            read, outputs, saved = _RUNNING.tensors, _RUNNING.outputs, _RUNNING.saved
            _RUNNING.tensors, _RUNNING.outputs, _RUNNING.saved = (), (), None
        if variant is None:
            raise self.unfit("torch.compile has found nothing to compile, or is disabled")
        given = [*_tree.split(inputs)[0], *extra]
        known = {*map(id, given)}
        captured = [x for x in read if isinstance(x, Tensor) and id(x) not in known]
        results, join = _tree.split(tree)
        wires = None
        if isinstance(outputs, (tuple, list)):
            wires = Wires.of(given, captured, read, cast(Sequence[Any], outputs), results)
        results = [*map(Tensor.clone, results)] if self.replays else results
        run = Run(results, join, variant, captured, self._pull(given, results), outputs, wires)
        if saved is None:
            return run
        halved = self._halved(run)
        if halved is not None:
            return run._replace(pull=self._pull_halved(halved, saved, given))
        variant.halves = None
        return self(function, inputs, extra)

    def _announced(self, what: str) -> contextlib.AbstractContextManager[None]:
        """A context to run it in: the first run, in which torch.compile compiles, is announced."""
        if what in self.announced:
            return contextlib.nullcontext()
        self.announced.add(what)
        return announced(what)

    def _halved(self, run: Run) -> Halved | None:
        """The graph in halves, if it has them and they are compared with the rest."""
        if run.wires is None or self.asked is None or self.replays:
            return None
        if not run.variant.compared:
            run.variant.halves = _torch.halves(run.outputs)
        return run.variant.halves and Halved.of(run.wires, run.variant.halves, self.asked)

    def _pull(self, given: Sequence[Tensor], results: Sequence[Tensor]) -> Pull | None:
        """The vector-Jacobian product of a run with autograd's graph, if it has one."""
        asked = self.asked
        if asked is None:
            return None

        def pull(cotangents: Sequence[Tensor], retain: bool) -> list[Tensor]:
            ys = [y for y, there in zip(results, asked.there, strict=True) if there]
            pairs = [(y, c) for y, c in zip(ys, cotangents, strict=True) if y.requires_grad]
            xs = [x for x in given if x.requires_grad]
            if not pairs:
                return self._grads([None] * len(xs), given)
            ys, vectors = zip(*pairs, strict=True)
            with self._announced(f"the derivative of {self.what}"):
                grads = torch.autograd.grad(ys, xs, vectors, retain_graph=retain, allow_unused=True)
            return self._grads(grads, given)

        return pull

    def _grads(self, grads: Sequence[Tensor | None], given: Sequence[Tensor]) -> list[Tensor]:
        """Gradients as they are asked for: of scalars, and zeros instead of None."""
        assert self.asked is not None
        triples = zip(given, self.scalars, self.asked.wanted, strict=False)
        wanted = [(x, scalar) for x, scalar, want in triples if want]
        pairs = zip(grads, wanted, strict=True)
        full = [(x.new_zeros(x.shape) if g is None else g, s) for g, (x, s) in pairs]
        return [g.reshape(()) if scalar else g for g, scalar in full]

    def again(self, run: Run) -> Again | None:
        """How to run the graph again without torch.compile's checks; None if that can't be done."""
        if run.wires is None:
            return None
        halved = self._halved(run)
        if halved is not None:
            return functools.partial(self._in_halves, halved)
        return functools.partial(self._again, run.wires, run.variant.run)

    def _again(
        self, wires: Wires, graph: Callable[..., Any], tensors: Sequence[Tensor]
    ) -> tuple[list[Tensor], Pull | None]:
        given = self.vectors(tensors)
        with torch.set_grad_enabled(self.asked is not None):
            results = wires.run(graph, given)
            results = [*map(Tensor.clone, results)] if self.replays else results
        return results, self._pull(given, results)

    def _in_halves(
        self, halved: Halved, tensors: Sequence[Tensor]
    ) -> tuple[list[Tensor], Pull | None]:
        given = [x if x.dim() else x.reshape(1) for x in tensors]
        results, saved = halved.run(given)
        return results, self._pull_halved(halved, saved, given)

    def _pull_halved(self, halved: Halved, saved: list[Tensor], given: Sequence[Tensor]) -> Pull:
        """The vector-Jacobian product of a run in halves."""
        return lambda cotangents, _: self._grads(halved.pulled(saved, cotangents), given)

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
