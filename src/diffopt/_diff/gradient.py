"""The gradient of a loss, by autograd, or by torch.func if one of its transforms is active."""

from __future__ import annotations

import contextlib
import functools
import re
import traceback
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffopt import _modes, _torch, _tree
from diffopt._arguments import check_choice
from diffopt._diff import functions, repairs
from diffopt._diff.captured import graph_leaves, refuse_closed_over, refuse_varying
from diffopt._diff.lacking import Explained, remedy
from diffopt._tree import Tree

_NO_CONTEXT = contextlib.nullcontext(dict[int, Tensor]())
"""It does nothing, and has noticed no aliases; made once, since every step enters it."""

HVP: TypeAlias = Literal["forward-over-reverse", "reverse-over-reverse"]
"""How the derivative of a gradient (a Hessian-vector product) is computed."""

Objective: TypeAlias = Callable[[Tree, Tree], tuple[Tensor, Any]]
"""`(params, inputs) -> (value, aux)`"""


NOTHING: Any = ((), None)
"""The auxiliary output of a loss without buffers that returns its value alone."""


def check_hvp(value: Any) -> None:
    """Raise unless it is one of `HVP`."""
    check_choice(value, "hvp", *get_args(HVP))


def value_and_grad(
    function: Objective,
    params: Tree,
    inputs: Tree,
    *,
    second_order: bool = True,
    hvp: HVP = "reverse-over-reverse",
    varies: Sequence[bool] = (),
) -> tuple[Tensor, Any, Tree]:
    """Value, auxiliary output and gradient with respect to params of `function(params, inputs)`.

    All three are differentiable where autograd records, unless `second_order` is False: then they
    are constants. A leaf that the value does not depend on has the gradient None, or zeros under
    torch.compile, which does not show which those are.

    Forward-over-reverse keeps only params and inputs for those derivatives, none of the loss's
    activations; by the symmetry of second derivatives they are exact with respect to params and
    inputs. It needs `varies`, False for those of the first auxiliary tensors that are constants.
    """
    recording, forward = torch.is_grad_enabled(), _modes.forward_differentiated()
    with contextlib.nullcontext() if _modes.compiling() else Explained():
        if second_order and recording and hvp == "forward-over-reverse" and not forward:
            return _forward_over_reverse(function, params, inputs, varies)
        if _modes.transformed():
            results = _functorch(function, params, inputs)
        else:
            create_graph = second_order and (recording or forward)
            results = _autograd(function, params, inputs, create_graph)
    if not second_order:
        return _tree.detach(results)
    if forward and not recording:  # there are tangents without a graph, which `detach` would drop
        return _tree.clone(results)
    return results


def _functorch(function: Objective, params: Tree, inputs: Tree) -> tuple[Tensor, Any, Tree]:
    join: Any = None  # torch.func takes only tensors as auxiliary output
    arrived: set[int] = set()  # leaves with a gradient; for others torch.func returns zeros

    def tensors(params: Tree) -> tuple[Tensor, list[Tensor]]:
        nonlocal join
        if not _modes.compiling():
            for i, leaf in enumerate(_tree.leaves(params)):
                leaf.register_hook(lambda _, i=i: arrived.add(i))
        with repairs.mended():
            value, aux = function(params, inputs)
        values, join = _tree.split(aux)
        return value, values

    grads, (value, aux) = torch.func.grad_and_value(tensors, has_aux=True)(params)
    if not _modes.compiling():
        leaves, spec = _tree.flatten(grads)
        found = [grad if i in arrived else None for i, grad in enumerate(leaves)]
        grads = _tree.unflatten(_dependent(found), spec)
    return value, join(aux), grads


def _autograd(
    function: Objective, params: Tree, inputs: Tree, create_graph: bool
) -> tuple[Tensor, Any, Tree]:
    leaves, spec = _tree.flatten(params)
    value, aux, found = leaf_gradients(function, leaves, spec, inputs, create_graph)
    return value, aux, _tree.unflatten(found, spec)


def leaf_gradients(
    function: Objective,
    leaves: Sequence[Tensor],
    spec: _tree.Spec,
    inputs: Tree,
    create_graph: bool,
    *,
    apart: bool = False,
) -> tuple[Tensor, Any, Sequence[Tensor | None]]:
    """What `value_and_grad` returns, for the leaves of params of this structure.

    By autograd: faster in eager mode than torch.func, and with far less memory in long loops. The
    results have a graph only if something beside the loss needs their gradient. `apart` says that
    no leaf, and none of the loss's inputs, depends on a leaf that requires a gradient.
    """
    recording, forward = torch.is_grad_enabled(), _modes.forward_differentiated()
    needed = create_graph and recording
    require = [leaf.requires_grad for leaf in leaves]
    unknown = needed and not any(require)
    enabled = _NO_CONTEXT if recording else torch.enable_grad()
    with enabled, functions.noticed() if unknown else _NO_CONTEXT as own:
        # Aliases, so that the gradient is partial: not through params that depend on one another,
        # nor through arguments of the loss that depend on params.
        aliases = leaves
        if not (apart and create_graph and all(require)):
            aliases = [functions.alias(leaf, create_graph) for leaf in leaves]
        first = _torch.next_node()
        with repairs.mended() if forward else _NO_CONTEXT:
            value, aux = function(_tree.unflatten(aliases, spec), inputs)
        if not value.requires_grad:
            if torch.is_inference_mode_enabled():
                raise RuntimeError(
                    "gradients cannot be computed in torch.inference_mode: use torch.no_grad"
                )
            raise ValueError(_INDEPENDENT)
        repairs.mend_graph(value, first)
        if unknown:
            needed = any(id(leaf) not in own for leaf in graph_leaves((value, aux)))
        create_graph = needed or (create_graph and forward)
        found = plain_gradients(value, aliases, create_graph=create_graph, retain=create_graph)
    if create_graph and not needed:  # there are tangents, which `detach` would drop
        with torch.no_grad():
            value, aux, found = _tree.clone((value, aux, found))
    elif not needed:
        value, aux = value.detach(), aux if aux is NOTHING else _tree.detach(aux)
    return value, aux, _dependent(found)


def plain_gradients(
    value: Tensor, leaves: Sequence[Tensor], *, create_graph: bool, retain: bool
) -> Sequence[Tensor | None]:
    """`torch.autograd.grad` of a 0-d tensor; None for a leaf that it does not depend on."""
    if not _modes.ordinary(value):
        return torch.autograd.grad(
            value, leaves, create_graph=create_graph, retain_graph=retain, allow_unused=True
        )
    one = torch.ones_like(value)
    return _torch.gradient(value, leaves, one, create_graph=create_graph, retain=retain)


def _dependent(grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients; raises if all are None."""
    if grads[0] is None and all(grad is None for grad in grads):
        raise ValueError(_INDEPENDENT)
    return grads


_INDEPENDENT = "loss does not depend on params: it must compute with its first argument"


def _forward_over_reverse(
    function: Objective, params: Tree, inputs: Tree, varies: Sequence[bool]
) -> tuple[Tensor, Any, Tree]:
    ambient = functions.AmbientState((params, inputs))
    _, join = _tree.split((params, inputs))
    used: list[bool] = []  # which params have a gradient
    results = functions.Flat(lambda trees: value_and_grad(function, *trees), join)

    def outputs(xs: Sequence[Tensor]) -> list[Tensor]:
        value, aux = function(*join(xs))
        results = [value, *_tree.tensors(aux)]
        refuse_varying(results, (True, *varies))
        return results

    def pullback(
        xs: Sequence[Tensor], needed: Sequence[bool], cotangents: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        with ambient.restored():
            # Reverse mode through torch's forward derivatives is wrong for some operations (2.13:
            # layer_norm, batch_norm) and raises for others (log_softmax). Nor can torch compute in
            # forward mode where it batches gradients.
            if torch.is_grad_enabled() or _torch.gradient_batch():
                return functions.vjp(results, xs, needed, cotangents)
            parts = len(cotangents) - sum(used)
            given = iter(cotangents[parts:])
            pairs = zip(xs, used)  # noqa: B905 (the params are the first of the xs)
            vectors = [next(given) if use else torch.zeros_like(x) for x, use in pairs]
            return _hvp(outputs, xs, needed, vectors, cotangents[:parts])

    def forward(arguments: Tree) -> Tree:
        value, aux, grads = value_and_grad(function, *arguments)
        used[:] = [grad is not None for grad in _tree.leaves(grads)]
        return value, aux, grads

    return functions.custom(forward, (params, inputs), pullback, varies=(True, *varies))


def _hvp(
    function: Callable[[Sequence[Tensor]], list[Tensor]],
    xs: Sequence[Tensor],
    needed: Sequence[bool],
    vectors: Sequence[Tensor],
    cotangents: Sequence[Tensor],
) -> list[Tensor | None]:
    """The derivative with respect to xs of `<vectors, grad> + <cotangents, outputs>`.

    `outputs = function(xs)`, where the first output is the value whose gradient with respect to the
    first of the xs is `grad`. By symmetry it is the derivative at e = 0 of the gradient of
    `value(xs + e vectors) + e <cotangents, outputs>` with respect to all xs.
    """
    count, xs = len(vectors), [*map(_modes.with_tangents, xs)]
    chosen = [*range(count), *(i for i in range(count, len(xs)) if needed[i])]
    zero, one = cotangents[0].new_zeros(()), cotangents[0].new_ones(())

    def total(e: Tensor, *chosen_xs: Tensor) -> Tensor:
        with repairs.mended():
            outputs = function(functions.replaced(xs, chosen, chosen_xs))
        plain = not _modes.transformed()
        if plain and any(id(leaf) not in aliases for leaf in graph_leaves(outputs)):
            refuse_closed_over("the loss", function, list(xs))
        pairs = zip(outputs, cotangents, strict=True)
        terms = [(v.conj() * y).real.sum() for y, v in pairs if _modes.has_derivative(y)]
        return outputs[0] + e * torch.stack(terms).sum()

    fault = "the loss cannot be differentiated with hvp='forward-over-reverse'"
    with functions.noticed() as aliases, forward_mode(fault, "use hvp='reverse-over-reverse'"):
        results = _gradient_jvp(total, [zero, *(xs[i] for i in chosen)], [one, *vectors])
    return functions.replaced([None] * len(xs), chosen, results)


@contextlib.contextmanager
def forward_mode(fault: str, advice: str) -> Generator[None]:
    """For code in forward mode: operations without a forward derivative raise with this advice."""
    with functions.forward_level():
        try:
            yield
        except RuntimeError as error:
            complaint = _lacks_forward(error)
            if complaint is None:
                raise
            advice = remedy(error) or advice
            raise NotImplementedError(f"{fault} ({complaint}): {advice}") from error


def _lacks_forward(error: RuntimeError) -> str | None:
    """Torch's message about an operation without a forward derivative; None for any other error.

    It names the operation; for a torch.autograd.Function its name is prepended.
    """
    if isinstance(error.__cause__, RuntimeError):  # chained to one with advice, by `Explained`
        error = error.__cause__
    if not re.search("forward (AD|mode)", str(error)):
        return None
    # In the frame where the missing `jvp` is called, the node of the graph knows the class.
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    classes = [_torch.function_class(frame.get("self")) for frame in frames]
    names = [f"{kind.__name__}: " for kind in classes if kind]
    return "".join(names[-1:]) + str(error).splitlines()[0]


# The derivative of the gradient of `function(e, *xs)` with respect to its xs, along tangents of its
# first arguments. All others get zero tangents, including the cotangent that starts the backward
# pass: otherwise torch represents their tangents by a kind of tensor whose shapes are computed in
# Python, which took longer than all the rest of a small step. Gradients are recorded
# (`create_graph`), since otherwise some of torch's backward formulas compute with constants
# (logdet), or with operations that have no forward derivative (silu, group_norm).


def _gradient_jvp(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    one, zero = torch.ones_like(inputs[0]), torch.zeros_like(inputs[0])
    tangents = [zero, *tangents, *map(torch.zeros_like, inputs[len(tangents) :])]

    def gradients(one: Tensor, e: Tensor, *xs: Tensor) -> Any:
        return torch.func.vjp(functools.partial(function, e), *xs)[1](one)

    if _modes.transformed():
        with torch.enable_grad():
            return torch.func.jvp(gradients, (one, *inputs), tuple(tangents))[1]
    # Inside a torch.autograd.Function forward mode is disabled as well.
    with torch.enable_grad(), _torch.forward_enabled(True), forward_ad.dual_level():
        aliases = [functions.alias(x, attached=False) for x in inputs]
        one, e, *xs = map(forward_ad.make_dual, (one, *aliases), tangents)
        grads = torch.autograd.grad(
            function(e, *xs), xs, one, create_graph=True, materialize_grads=True
        )
        return _tree.detach([forward_ad.unpack_dual(grad).tangent for grad in grads])
