"""Running the steps of a loop compiled: each is a function with compiled derivatives."""

from __future__ import annotations

import functools
import itertools
import pickle
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree
from diffopt._compiler import brief, warn_once
from diffopt._diff import functions
from diffopt._diff.captured import graph_leaves
from diffopt._diff.kernels import Kernel, Operator, UnfitError, backend, composed, kept
from diffopt._diff.unmodified import Captured
from diffopt._tree import Tree

Used = tuple[bool, ...]
"""For each param whether the loss uses it, which a trace does not show; `()` before it is known."""


class Task(NamedTuple):
    """A function to run compiled: `make(())(*inputs)`.

    Attributes:
        make: returns the function, given which params its loss uses.
        inputs: its arguments. The first is the carry: the first results replace it.
        kind: what tells this function from others of the loop.
        integer: whether the last argument is the number of the step.
        buffers: how many of the carry's last tensors may be ones that must not need a gradient.
    """

    make: Callable[[Used], Callable[..., Tree]]
    inputs: tuple[Any, ...]
    kind: Any = None
    integer: bool = False
    buffers: int = 0


class Compiler:
    """Runs the functions of one loop compiled.

    Args:
        name: what is compiled, in messages: the loss or the step.
        key: what tells this loop's functions from others.
        options: those of torch.compile.
    """

    def __init__(self, name: str, key: Any, options: Mapping[str, Any]) -> None:
        self.name, self.key = name, key
        self.backend = backend(dict(options))
        self.ambient: functions.AmbientState | None = None
        self.captured: Captured | None = None
        self.settled = False
        self.gave_up = False

    def __call__(self, task: Task) -> Tree:
        """The results, compiled where that is possible and right."""
        function, inputs = task.make(()), task.inputs
        if self.gave_up or _modes.compiling() or _modes.intercepted():
            return function(*inputs)
        loop, tensors = self._loop(task)
        try:
            if _modes.forward_differentiated():
                raise UnfitError("only ForwardMode() compiles derivatives in forward mode")
            outputs = _Call(loop).applied(tensors)
        except Exception as error:
            result = function(*inputs)  # if the fault is the function's own, this raises it
            self.give_up(error)
            return result
        return loop.finished(outputs)

    def pushforward(
        self, task: Task, directions: Sequence[Tensor | None]
    ) -> tuple[Tree, list[Tensor | None]] | None:
        """The results without derivatives, and their tangents along each row of the directions.

        Args:
            task: what to run.
            directions: one for each tensor of the inputs, or None.

        Returns:
            The results and for each of their tensors its tangents, None for a constant; None if
            this cannot be compiled.
        """
        if self.gave_up or _modes.intercepted():
            return None
        loop, tensors = self._loop(task)
        try:
            if _torch.interpreter_stack():  # "Expected all tensors to be on the same device"
                raise UnfitError("torch.compile cannot trace forward mode in torch.func transforms")
            return loop.pushforward(tensors, _tree.split(task.inputs)[0], directions)
        except Exception as error:
            task.make(())(*task.inputs)  # if the fault is the function's own, this raises it
            self.give_up(error)
            return None

    def _loop(self, task: Task) -> tuple[_Loop, list[Tensor]]:
        if self.ambient is None:
            self.ambient = functions.AmbientState(task.inputs)
            self.captured = Captured(self.name, task.make(()))
        tensors, join, plain = _numbered(task.inputs, task.integer)
        return _Loop(self, task, tensors, join, plain), tensors

    def settle(self) -> None:
        """After a run: see `Captured.settle`; what later runs replace is the same."""
        if self.captured and not self.settled:
            self.captured.settle()
            self.settled = True

    def give_up(self, error: Exception) -> None:
        """Compile nothing more in this loop."""
        self.gave_up = True
        self.warn(error)

    def warn(self, error: Exception) -> None:
        """Say once why something runs without compiling."""
        reason = str(error) if isinstance(error, UnfitError) else brief(error)
        warn_once(f"{self.name} runs without torch.compile: {reason}")


def identity(function: Any) -> Any:
    """What functions have in common that torch.compile can tell apart itself: their code."""
    if isinstance(function, functools.partial):
        return "partial", identity(cast(Any, function.func))
    if isinstance(function, types.MethodType):
        return type(function.__self__), function.__func__.__code__
    return getattr(function, "__code__", None) or type(function)


def _numbered(
    inputs: tuple[Any, ...], integer: bool
) -> tuple[list[Tensor], Callable[..., Tree], Callable[..., Tree]]:
    """The tensors among the inputs, and their floats and the step's number, as tensors.

    Also how to join them, and how to join them with the numbers as they were.
    """
    leaves, spec = _tree.flatten(inputs)
    carry = len(_tree.leaves(inputs[0]))
    first = next((x for x in leaves if isinstance(x, Tensor) and _modes.has_derivative(x)), None)
    wide = first is not None and first.dtype in (torch.float64, torch.complex128)
    dtype = torch.float64 if wide else torch.float32
    device = None if first is None else first.device
    tensors: list[Tensor] = []
    places: list[int] = []
    numbers: dict[int, Any] = {}
    for i, leaf in enumerate(leaves):
        last = integer and i == len(leaves) - 1
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif last or (type(leaf) is float and i >= carry):
            numbers[i] = leaf
            kind = torch.int64 if last else dtype
            tensors.append(torch.full((), leaf, dtype=kind, device=device))
        else:
            continue
        places.append(i)
    rest = [None if isinstance(x, Tensor) else x for x in leaves]

    def join(tensors: Iterable[Tensor], plain: bool = False) -> Tree:
        values = list(rest)
        for place, tensor in zip(places, tensors, strict=True):
            if not (plain and place in numbers):
                values[place] = tensor
        return _tree.unflatten(values, spec)

    return tensors, join, functools.partial(join, plain=True)


class _Facts(NamedTuple):
    """What a run of a function, with its graph, has shown.

    Attributes:
        used: see `Used`.
        depends: for each result, the places of the inputs on which it depends.
    """

    used: Used
    depends: list[set[int]]


class _Loop:
    """What all calls that a task consists of share; it has no tensors, since graphs keep it."""

    def __init__(
        self,
        compiler: Compiler,
        task: Task,
        tensors: Sequence[Tensor],
        join: Callable[..., Tree],
        plain: Callable[..., Tree],
    ) -> None:
        self.compiler, self.join, self.plain = compiler, join, plain
        self.make: Callable[[Any], Callable[..., Tree]] = task.make
        self.steady, self.count = _tree.count(task.inputs[0]), len(tensors)
        self.key = (compiler.backend, compiler.key, (task.kind, task.integer), self.steady)
        self.needed = [*map(_modes.needs_gradient, tensors)]
        self.buffers = range(self.steady - task.buffers, self.steady)
        self.tests = 3 if task.integer else 1  # powers of the step's number agree at 0
        self.captured = Captured(compiler.name)
        self.used: Used = ()
        self.depends: list[set[int]] = []
        self.join_results: Callable[..., Tree] = join

    def function(self, *tensors: Tensor) -> list[Tensor]:
        """The function as it is, of tensors."""
        return _tree.split(self.make(())(*self.plain(tensors)))[0]

    def moving(self, needed: Sequence[bool]) -> set[int]:
        """The inputs that depend on those needed in some step, if the results replace the first."""
        moving = {i for i, need in enumerate(needed) if need}
        while True:
            more = {i for i in range(self.steady) if self.depends[i] & moving} - moving
            if not more:
                return moving
            moving |= more

    def finished(self, outputs: Sequence[Tensor]) -> Tree:
        """The results as a tree, without derivatives where they are constants."""
        moving = self.moving(self.needed)
        pairs = zip(outputs, self.depends, strict=True)
        return self.join_results(
            y if on & moving or not _modes.needs_gradient(y) else y.detach() for y, on in pairs
        )[0]

    def pushforward(
        self,
        tensors: Sequence[Tensor],
        given: Sequence[Tensor],
        directions: Sequence[Tensor | None],
    ) -> tuple[Tree, list[Tensor | None]]:
        """See `Compiler.pushforward`; the tensors are those given, and numbers."""
        along = {id(x): d for x, d in zip(given, directions, strict=True) if d is not None}
        size = len(next(iter(along.values())))
        # All of the carry moves, as it may in later steps, or the first needed its own kernel.
        rows = [
            along.get(id(x), x.new_zeros(size, *x.shape) if i < self.buffers.start else None)
            if _modes.has_derivative(x)
            else None
            for i, x in enumerate(tensors)
        ]
        call = _Call(self).followed("jvp", tuple(row is not None for row in rows))
        moved = [row.to(x.dtype) for x, row in zip(tensors, rows, strict=True) if row is not None]
        results = call.applied([*tensors, *moved])
        count = len(self.depends)
        moving = self.moving([id(x) in along for x in tensors])
        tangents = iter(results[count:])
        found = [next(tangents) if _modes.has_derivative(y) else None for y in results[:count]]
        pairs = zip(found, self.depends, strict=True)
        return self.join_results(results)[0], [t if on & moving else None for t, on in pairs]


@dataclass(frozen=True, eq=False)
class _Call:
    """A function of tensors that operators have made of a loop's function."""

    loop: _Loop
    operators: tuple[Operator, ...] = ()

    @property
    def derived(self) -> bool:
        """Whether it is a derivative."""
        return any(name != "vmap" for name, _ in self.operators)

    @property
    def pulled(self) -> bool:
        """Whether it is a vector-Jacobian product."""
        return any(name == "vjp" for name, _ in self.operators)

    def followed(self, name: str, *arguments: Any) -> _Call:
        return replace(self, operators=(*self.operators, (name, arguments)))

    def eager(self, *tensors: Tensor) -> list[Tensor]:
        return composed(self.loop.function, self.operators)(*tensors)

    # The compiled function

    def applied(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The results, with derivatives and batches."""
        levels = _torch.interpreter_stack() or []
        if any(level.key() != _torch.TransformType.Vmap for level in levels):
            return cast(Any, _Transformed.apply(self, *tensors))
        call, tensors, batches = self.over_batches(tensors)
        with _torch.outside_transforms():
            results: Any = _Plain.apply(call, *tensors)
            for level in batches:
                results = [_torch.add_batch_dim(y, 0, level) for y in results]
        return tuple(results)

    def over_batches(self, tensors: Sequence[Tensor]) -> tuple[_Call, list[Tensor], list[int]]:
        """A call for all samples of torch.vmap at once, its tensors, and torch.vmap's levels."""
        sizes = {
            _torch.level_of(x): _torch.unwrapped(x).shape[_torch.batch_dim(x)]
            for tensor in tensors
            for x in _modes.levels(tensor)
            if _torch.is_batched(x)
        }
        levels, call = sorted(sizes), self
        own = [_modes.batches(x) for x in tensors] if levels else []
        samples = [*map(_modes.all_samples, tensors)] if levels else [*tensors]
        for place, level in enumerate(levels):
            for i in self._always_batched(len(tensors)):
                if level not in own[i]:
                    x = samples[i].unsqueeze(place)
                    samples[i] = x.expand(*x.shape[:place], sizes[level], *x.shape[place + 1 :])
                    own[i].add(level)
        for level in reversed(levels):
            call = call.followed("vmap", tuple(0 if level in batches else None for batches in own))
        return call, samples, levels

    def _always_batched(self, count: int) -> Iterable[int]:
        """Directions, and the carry: a first one that is not would need a kernel of its own."""
        return itertools.chain(range(self.loop.steady), range(self.loop.count, count))

    def batched(
        self, size: int, dims: Sequence[int | None], tensors: Sequence[Tensor]
    ) -> tuple[_Call, list[Tensor]]:
        """A call for a batch, and its tensors with the batch in front."""
        moved = [
            x if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, dims, strict=True)
        ]
        own = [None if dim is None else 0 for dim in dims]
        for i in self._always_batched(len(tensors)):
            if own[i] is None:
                moved[i], own[i] = moved[i].expand(size, *moved[i].shape), 0
        return self.followed("vmap", tuple(own)), moved

    def run(self, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The results, from a kernel: of tensors without wrappers and without derivatives."""
        fault = next(filter(None, map(_fault, given)), None)
        if fault:
            raise UnfitError(fault)
        tensors = [*map(_compact, given)]
        results = self._results(tensors)
        seen = {id(x) for x in tensors}
        for i, y in enumerate(results):
            results[i] = y.clone() if id(y) in seen else y
            seen.add(id(y))
        return tuple(results)

    def _kernel(self, tensors: Sequence[Tensor], used: Used) -> Kernel:
        loop = self.loop
        metas = tuple((x.shape, x.dtype, x.device) for x in tensors)
        names = " of ".join(_NAMES[name] for name, _ in reversed(self.operators))
        what = f"{names} of {loop.compiler.name}" if names else loop.compiler.name
        return kept(
            (loop.key, self.operators, used, metas),
            lambda: Kernel(
                self.operators,
                [not x.dim() for x in tensors],
                what,
                loop.compiler.backend,
            ),
        )

    def _results(self, tensors: list[Tensor]) -> list[Tensor]:
        loop, pulled = self.loop, self.pulled
        known: list[Used] = kept(("used", loop.key), list)
        if not known:
            known.append(self._look(tensors).used)
        used = loop.used if pulled else known[0]
        vectors = [*map(_vector, tensors)]
        inputs, extra = loop.join(vectors[: loop.count]), vectors[loop.count :]
        while True:
            kernel, function = self._kernel(tensors, used), loop.make(used)
            results, join, variant, captured = kernel(function, inputs, extra)
            if variant.tests is None or variant.tests > 0:  # another thread may count, too
                if any(map(_torch.is_wrapped, captured)):
                    raise UnfitError(_CAPTURES.format("a tensor of an active transform"))
                variant.facts = _Facts(used, []) if pulled else self._look(tensors)
                if variant.facts.used == used:
                    self._test(kernel, results, tensors, function, inputs)
                variant.tests = (loop.tests if variant.tests is None else variant.tests) - 1
            if variant.facts.used == used:
                break
            used = known[0] = variant.facts.used
        if not pulled:
            loop.used, loop.depends = variant.facts
            loop.join_results = join
            loop.captured.versions = [(weakref.ref(x), _torch.version(x)) for x in captured]
            loop.compiler.settle()
        return results

    def _test(
        self,
        kernel: Kernel,
        results: list[Tensor],
        tensors: list[Tensor],
        function: Callable[..., Tree],
        inputs: Tree,
    ) -> None:
        """Raise unless the kernel computes what the function does."""
        count = self.loop.count
        sample = [*map(_sample, tensors[count:])]
        if sample:
            results = kernel(function, inputs, [*map(_vector, sample)])[0]
        replaced = 0 if self.pulled else self.loop.steady
        kernel.compare(results, self.eager, [*tensors[:count], *sample], replaced)

    def _look(self, tensors: Sequence[Tensor]) -> _Facts:
        """Run the function as it is, with its graph."""
        before, drawn = functions.AmbientState(list(tensors)), _Drawn()
        noted: list[bool] = []
        loop = self.loop
        dims = [(name, (d[: loop.count],)) for name, (d, *_) in self.operators if name == "vmap"]
        function = composed(lambda *xs: _tree.split(loop.make(noted)(*loop.plain(xs)))[0], dims)

        def run(constants: Iterable[int]) -> tuple[list[Tensor], list[Tensor]]:
            xs = [
                functions.alias(x, False) if i not in constants and _modes.has_derivative(x) else x
                for i, x in enumerate(tensors[: loop.count])
            ]
            return xs, function(*xs)

        with functions.noticed() as aliases, torch.enable_grad():
            try:
                xs, outputs = run(())
            except RuntimeError:
                if not loop.buffers:
                    raise
                xs, outputs = run(loop.buffers)  # torch's batch_norm has no derivative for them
        places = {id(x): i for i, x in enumerate(xs)}
        leaves = [{*map(id, graph_leaves([y]))} for y in outputs]
        if set[int]().union(*leaves) - places.keys() - aliases.keys():
            raise UnfitError(_CAPTURES.format("a tensor that requires a gradient"))
        after = functions.AmbientState(list(tensors))
        same = all(map(torch.equal, before.states, after.states))
        if not (same and _Drawn().equals(drawn)):
            before.restore()
            drawn.restore()
            raise UnfitError("it draws random numbers, which compiled code draws differently")
        on = [
            {places[key] for key in {id(y), *keys} if key in places}
            for y, keys in zip(outputs, leaves, strict=True)
        ]
        used = () if all(noted) else tuple(noted)
        return _Facts(used, on)

    # Its derivatives

    def pullback(
        self, inputs: list[Tensor], needed: Sequence[bool], given: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The vector-Jacobian product, compiled where possible."""
        compiler = self.loop.compiler
        assert compiler.ambient is not None
        assert compiler.captured is not None
        self.loop.captured.check()
        compiler.captured.check()
        with compiler.ambient.restored():
            try:
                return self._pullback(inputs, needed, given)
            except Exception as error:
                compiler.warn(error)
                return functions.vjp(self.eager, inputs, needed, given)

    def _pullback(
        self, inputs: list[Tensor], needed: Sequence[bool], given: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        if self.derived or _modes.forward_differentiated():
            raise UnfitError("a derivative of its derivative is not compiled")
        loop = self.loop
        moving = loop.moving([a or b for a, b in zip(needed, loop.needed, strict=True)])
        there = [
            bool(on & moving) and (o < loop.steady or given[o] is not None)
            for o, on in enumerate(loop.depends)
        ]
        if all(x is None for x, takes in zip(given, there, strict=True) if takes):
            return [None] * len(inputs)
        reached = set[int]().union(
            *(on for on, takes in zip(loop.depends, there, strict=True) if takes)
        )
        wanted = tuple(i in moving and i in reached for i in range(len(inputs)))
        cotangents = [
            torch.zeros_like(inputs[o]) if x is None else x
            for o, (x, takes) in enumerate(zip(given, there, strict=True))
            if takes
        ]
        call = self.followed("vjp", wanted, tuple(there))
        grads = call.applied([*inputs, *cotangents])
        places = [i for i, want in enumerate(wanted) if want]
        all_grads = functions.replaced([None] * len(inputs), places, grads)
        return [g if need else None for g, need in zip(all_grads, needed, strict=True)]


class _Drawn:
    """The states of the generators of Python, and of numpy if that has been imported."""

    def __init__(self) -> None:
        numpy = sys.modules.get("numpy.random")
        self.python, self.numpy = random.getstate(), numpy and numpy.get_state(legacy=False)

    def equals(self, other: _Drawn) -> bool:
        return pickle.dumps(vars(self)) == pickle.dumps(vars(other))

    def restore(self) -> None:
        random.setstate(self.python)
        if self.numpy:
            sys.modules["numpy.random"].set_state(self.numpy)


_CONTIGUOUS = torch.contiguous_format
_NAMES = {
    "vmap": "a batch",
    "vjp": "the vector-Jacobian product",
    "jvp": "the Jacobian-vector products",
}
_CAPTURES = "it captures {}, which compiled code does not differentiate: pass it as an argument"


def _compact(x: Tensor) -> Tensor:
    """Detached, contiguous and at the start of its memory, which torch.compile would watch."""
    x = x.detach()
    return x.contiguous() if x.storage_offset() == 0 else x.clone(memory_format=_CONTIGUOUS)


def _vector(x: Tensor) -> Tensor:
    """With at least one dimension; not as a view, since torch.compile would watch its base."""
    return x if x.dim() else x.reshape(1).detach()


def _fault(x: Tensor) -> str | None:
    """Why a tensor cannot be an input of a kernel."""
    if not _modes.ordinary(x):
        return f"it is given a {type(x).__name__}, not an ordinary tensor"
    if x.layout is not torch.strided or x.is_meta:
        return f"it is given a tensor of layout {x.layout} on {x.device}"
    return None


def _sample(x: Tensor) -> Tensor:
    """Directions in which a derivative is compared: those of a loop are often zero at first."""
    numbers = torch.arange(1, x.numel() + 1, dtype=torch.float32, device=x.device)
    return numbers.cos().to(x.dtype).reshape(x.shape)


def _keep(ctx: Any, call: _Call, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """What the derivative needs."""
    ctx.call = call
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    if not call.derived:
        moving = call.loop.moving(call.loop.needed)
        pairs = zip(results, call.loop.depends, strict=True)
        ctx.mark_non_differentiable(*(y for y, on in pairs if not on & moving))


def _pulled_back(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    # Tensors saved in a torch.func transform that has ended still have its wrapper.
    inputs = [_torch.unwrap_if_dead(x) for x in ctx.saved_tensors]
    return (None, *ctx.call.pullback(inputs, ctx.needs_input_grad[1:], cotangents))


class _Plain(torch.autograd.Function):
    """For autograd alone: in the form for transforms, torch takes longer."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        results = call.run(tensors)
        _keep(ctx, call, tensors, results)
        return results

    backward = staticmethod(_pulled_back)


class _Transformed(torch.autograd.Function):
    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        return call.run(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _keep(ctx, inputs[0], inputs[1:], output)

    backward = staticmethod(_pulled_back)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        call, tensors = inputs[0].batched(info.batch_size, in_dims[1:], inputs[1:])
        results: Any = _Transformed.apply(call, *tensors)
        return results, (0,) * len(results)


@dataclass(frozen=True, eq=False)
class CompiledStep:
    """A step `(carry, args, x) -> results`, compiled."""

    compiler: Compiler
    step: Callable[..., Tree]

    def __call__(self, carry: Tree, args: Tree, x: Any) -> Tree:
        return self.compiler(self.task(carry, args, x))

    def task(self, carry: Tree, args: Tree, x: Any) -> Task:
        """The step, for the compiler."""
        return Task(lambda used: self.step, (carry, args, x), integer=type(x) is int)
