"""Functions with custom derivatives, such as recomputed ones, and their ambient state."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree
from diffopt._tree import Tree

Pullback: TypeAlias = Callable[
    [Sequence[Tensor], Sequence[bool], Sequence[Any]], Sequence[Tensor | None]
]
"""`(inputs, which of them need a gradient, cotangents) -> gradients`, all as flat lists."""


def custom(
    function: Callable[[Tree], Tree],
    inputs: Tree,
    pullback: Pullback,
    *,
    sparse: bool = False,
    varies: Sequence[bool] = (),
    keep: bool = False,
) -> Tree:
    """`function(inputs)`, for which autograd keeps only the tensors among the inputs.

    Its vector-Jacobian product is `pullback`, which may itself be differentiated, and so must
    compute with its arguments only; if `sparse`, it is passed None for zero cotangents. `function`
    must not hold tensors either, or they are kept alive too long. `varies`, for the first outputs,
    is False for those that are constants. With `keep`, `function` returns a pair of which only the
    first part is returned here; the second is passed to the pullback, after the inputs.
    """
    tensors, join = _tree.split(inputs)
    flat = Flat(function, join)
    outputs: Any = _Custom.apply(_Call(flat, pullback, sparse, varies, keep), *tensors)
    # Under vmap torch ignores that an output is marked as a constant.
    results = flat.join(x if v else x.detach() for x, v in carriers(outputs, varies))
    return results[0] if keep else results


def recomputed(
    function: Callable[[Tree], Tree], inputs: Tree, *, varies: Sequence[bool] = ()
) -> Tree:
    """`function(inputs)`, recomputed from the inputs when its derivative is needed.

    See `custom` for the restrictions on `function`, and for `varies`.
    """
    # torch.func enables gradients in its transforms, but not inside an autograd.Function.
    if not torch.is_grad_enabled():
        return function(inputs)
    ambient = AmbientState(inputs)
    flat = Flat(function, _tree.split(inputs)[1])

    def pullback(
        inputs: Sequence[Tensor], needed: Sequence[bool], cotangents: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        used: list[bool] = []  # which are not None in the first run, and so are in every other

        def product(arguments: Tree) -> list[Tensor | None]:
            with ambient.restored():
                grads = vjp(flat, arguments[0], needed, arguments[1])
            used[:] = used or [grad is not None for grad in grads]
            return [
                (torch.zeros_like(x) if grad is None else grad) if use else None
                for x, grad, use in zip(arguments[0], grads, used, strict=True)
            ]

        # If the product is itself differentiated, it keeps only its inputs too.
        return recomputed(product, (list(inputs), list(cotangents)))

    return custom(function, inputs, pullback, sparse=True, varies=varies)


def independent(tree: Tree, others: Tree) -> Tree:
    """The tree, connected by zero derivatives to `others`, on which it does not depend."""
    if _modes.forward_differentiated() or _modes.compiling():
        return tree
    if not any(map(_modes.needs_gradient, _tree.tensors(others))):
        return tree
    count = _tree.count(tree)

    def pullback(
        inputs: Sequence[Tensor], needed: Sequence[bool], cotangents: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        pairs = zip(inputs[count:], needed[count:], strict=True)
        return [*cotangents, *(torch.zeros_like(x) if need else None for x, need in pairs)]

    return custom(lambda inputs: inputs[0], (tree, others), pullback)


class Flat:
    """A function of trees as one of tensors: `join` builds the tree of its last results again.

    Those had `count` tensors.
    """

    def __init__(self, function: Callable[[Tree], Tree], join: Callable[..., Tree]) -> None:
        self.function, self.join_inputs, self.join, self.count = function, join, join, 0

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        results, self.join = _tree.split(self.function(self.join_inputs(tensors)))
        self.count = len(results)
        return results

    def apart(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The results as an autograd.Function requires them: distinct tensors, none an input."""
        seen = {id(x) for x in tensors}
        results: list[Tensor] = []
        for result in self(*tensors):
            results.append(result.clone() if id(result) in seen else result)
            seen.add(id(result))
        return tuple(batched_like(results, tensors))


def replaced(values: Iterable[Any], places: Iterable[int], others: Iterable[Any]) -> list[Any]:
    """The values, with the others in these places."""
    result = list(values)
    for place, other in zip(places, others, strict=True):
        result[place] = other
    return result


def vjp(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The vector-Jacobian product of `function(*inputs)`; None stands for zeros."""
    create_graph = torch.is_grad_enabled()
    chosen = [i for i, need in enumerate(needed) if need]

    def partial(*xs: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        pairs = zip(function(*replaced(inputs, chosen, xs)), cotangents, strict=True)
        pairs = [(y, v) for y, v in pairs if v is not None and _modes.has_derivative(y)]
        return tuple(y for y, _ in pairs), tuple(v for _, v in pairs)

    if _modes.transformed():
        chosen_inputs = (inputs[i] for i in chosen)
        _, pull, vectors = cast(Any, torch.func.vjp(partial, *chosen_inputs, has_aux=True))
        results = pull(vectors)
    else:
        with torch.enable_grad():
            xs = [alias(inputs[i], create_graph) for i in chosen]
            outputs, vectors = partial(*xs)
        pairs = [(y, v) for y, v in zip(outputs, vectors, strict=True) if y.requires_grad]
        results = [None] * len(chosen)
        if pairs:
            outputs, vectors = zip(*pairs, strict=True)
            results = torch.autograd.grad(
                outputs, xs, vectors, create_graph=create_graph, allow_unused=True
            )
    return replaced([None] * len(inputs), chosen, results)


def pullback(
    function: Callable[..., Tensor], *inputs: Tensor
) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
    """`torch.func.vjp` of a function with one result; by autograd alone where all are constants."""
    if not constant():
        return cast(Any, torch.func.vjp(function, *inputs))
    places = range(len(inputs))
    evaluated = Evaluated(function, inputs, places)
    return evaluated.output.detach(), lambda v: evaluated.pull(v, places)


def constant() -> bool:
    """Whether results are constants: nothing is transformed, or differentiated in any mode."""
    return not (_modes.transformed() or _modes.differentiable())


class Evaluated:
    """A function with one result at a point, with the graph for its pullback, by autograd alone.

    Args:
        function: the function.
        inputs: its arguments, constants.
        needed: the places of those that `pull` may be asked for.
    """

    def __init__(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor], needed: Iterable[int]
    ) -> None:
        with torch.enable_grad():
            self.inputs = {i: alias(inputs[i], attached=False) for i in needed}
            self.output = function(*replaced(inputs, self.inputs, self.inputs.values()))

    def pull(self, cotangent: Tensor, which: Iterable[int]) -> Sequence[Tensor]:
        """The vector-Jacobian product with respect to these inputs, any number of times."""
        inputs, create_graph = [self.inputs[i] for i in which], torch.is_grad_enabled()
        if not self.output.requires_grad:
            return [*map(torch.zeros_like, inputs)]
        if not _modes.ordinary(self.output):
            return torch.autograd.grad(
                self.output, inputs, cotangent, retain_graph=True, create_graph=create_graph,
                materialize_grads=True,
            )  # fmt: skip
        grads = _torch.gradient(
            self.output, inputs, cotangent, create_graph=create_graph, retain=True
        )
        return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]


def over_batch(pull: Callable[[Tensor], Sequence[Tensor]], cotangent: Tensor) -> Sequence[Tensor]:
    """`pull(cotangent)`, by torch.vmap for the cotangents of `torch.autograd.grad` in a batch.

    Tensors in such a batch (`is_grads_batched`) can be neither detached nor read.
    """
    level = _torch.gradient_batch()
    if not level or not _torch.in_gradient_batch(cotangent):
        return pull(cotangent)
    cotangents = _torch.all_gradients(cotangent, level, 1, 0)
    with _torch.outside_gradient_batch():
        results = torch.vmap(pull, randomness="same")(cotangents)
    return [_torch.gradients_batched(x, 0, level) for x in results]


def batched_like(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a function, batched if an input is.

    An unbatched output has a single cotangent, which the rule that torch.vmap derives for an
    autograd.Function would count once per example.
    """
    if not _modes.transformed():
        return list(outputs)
    representatives = {frozenset(_modes.batches(x)): x for x in inputs}
    result = list(outputs)
    for levels, x in representatives.items():
        for i, output in enumerate(result):
            if not levels <= _modes.batches(output):
                result[i] = output + x.new_zeros((), dtype=output.dtype, device=output.device)
    return result


def alias(tensor: Tensor, attached: bool) -> Tensor:
    """The same values as a separate input, so that derivatives with respect to it are partial."""
    result = tensor.view_as(tensor) if attached else tensor.detach()
    if not result.requires_grad:
        result.requires_grad_()
        for aliases in list(_NOTICED.values()):  # a copy, since another thread may add to it
            aliases[id(result)] = result
    return result


_NOTICED: dict[int, dict[int, Tensor]] = {}


@contextlib.contextmanager
def noticed() -> Generator[dict[int, Tensor]]:
    """Collects the leaves of autograd's graph that `alias` creates meanwhile, by id."""
    aliases: dict[int, Tensor] = {}
    _NOTICED[id(aliases)] = aliases
    try:
        yield aliases
    finally:
        del _NOTICED[id(aliases)]


_LEVELS = threading.RLock()


@contextlib.contextmanager
def forward_level() -> Generator[None]:
    """Held by one thread at a time: torch's forward-mode levels are global to the process.

    An autograd thread may wait here while the holder waits for that thread, hence the timeout.
    """
    if not _LEVELS.acquire(timeout=60):
        raise RuntimeError(
            "another thread has been computing in forward mode for a minute, and torch has only "
            "one forward-mode level for all threads: run these loops one after the other"
        )
    try:
        yield
    finally:
        _LEVELS.release()


def carriers(outputs: Sequence[Tensor], varies: Sequence[bool]) -> Iterator[tuple[Tensor, bool]]:
    """Each output, and whether it carries a derivative, which the first ones may not."""
    for x, v in zip(outputs, itertools.chain(varies, itertools.repeat(True))):  # noqa: B905
        yield x, v and _modes.has_derivative(x)


def _enable_cudnn(enabled: bool) -> None:
    torch.backends.cudnn.enabled = enabled


_KERNELS: list[tuple[Callable[[], bool], Callable[[bool], None]]] = [
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    (lambda: torch.backends.cudnn.enabled, _enable_cudnn),
]
"""Flags for the kernels torch may choose: for attention, encoders in eval mode, and cuDNN."""


class AmbientState:
    """The ambient state that a function depends on: random numbers, autocast and kernel flags.

    Args:
        inputs: the function's arguments. The generators among them are included.
    """

    def __init__(self, inputs: Tree) -> None:
        leaves = _tree.leaves(inputs)
        devices = {x.device for x in leaves if isinstance(x, Tensor)}
        devices = {device for device in devices if device.type not in ("cpu", "meta")}
        self.generators = [x for x in leaves if isinstance(x, torch.Generator)]
        self.generators.append(torch.default_generator)
        self.generators.extend(g for device in devices for g in _default_generators(device))
        self.states = [generator.get_state() for generator in self.generators]
        self.autocasts = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in {"cpu", *(device.type for device in devices)}
        ]
        self.kernels = [enabled() for enabled, _ in _KERNELS]

    def restore(self) -> None:
        """Reset the random number generators to their states then."""
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)

    @contextlib.contextmanager
    def restored(self) -> Generator[None]:
        """Run code in this ambient state; afterwards the present one is back."""
        now = [generator.get_state() for generator in self.generators]
        with contextlib.ExitStack() as stack:
            for kind, dtype, enabled in self.autocasts:
                stack.enter_context(torch.autocast(kind, dtype, enabled))
            for (enabled, enable), then in zip(_KERNELS, self.kernels, strict=True):
                if enabled() != then:  # a flag of the process: set it only if necessary
                    stack.callback(enable, not then)
                    enable(then)
            self.restore()
            try:
                yield
            finally:
                for generator, state in zip(self.generators, now, strict=True):
                    generator.set_state(state)


def _default_generators(device: torch.device) -> list[torch.Generator]:
    if device.type == "mps":
        return [_torch.mps_generator()]
    generators = getattr(torch.get_device_module(device.type), "default_generators", ())
    return [generators[device.index]] if generators else []


@dataclass(frozen=True)  # a leaf, which no transform takes apart
class _Call:
    """One application of a function; for the attributes see `custom`."""

    function: Flat
    pullback: Pullback
    sparse: bool
    varies: Sequence[bool]
    keep: bool


class _Custom(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        return call.function.apart(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        kept = _tree.tensors(ctx.call.function.join(output)[1]) if ctx.call.keep else ()
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(not ctx.call.sparse)
        ctx.mark_non_differentiable(*(x for x, v in carriers(output, ctx.call.varies) if not v))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        # Tensors saved in a torch.func transform that has ended still have its wrapper.
        inputs = [_torch.unwrap_if_dead(x) for x in ctx.saved_tensors]
        grads = ctx.call.pullback(inputs, ctx.needs_input_grad[1:], cotangents)
        return (None, *grads)
