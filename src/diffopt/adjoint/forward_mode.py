"""Forward mode: the derivatives of a loop are computed along with it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffopt import _modes, _torch, _tree
from diffopt._arguments import check_integer
from diffopt._diff import functions
from diffopt._diff.captured import graph_leaves, refuse_closed_over
from diffopt._diff.gradient import forward_mode
from diffopt._rule import checks
from diffopt._tree import Tree
from diffopt.adjoint._base import Adjoint, Step, is_compiled, pushforward
from diffopt.adjoint._limited import once
from diffopt.adjoint.unrolled import Unrolled

_SECOND_ORDER = (
    "ForwardMode has no second derivatives in reverse mode: use Unrolled() or Checkpointed(), or "
    "use Checkpointed(hvp='forward-over-reverse') for a loop around it"
)
_ADVICE = "use Checkpointed() or Unrolled()"


@dataclass(frozen=True)
class ForwardMode(Adjoint):
    """Exact, for a few inputs; memory does not grow with the number of steps.

    With z_t the carry after t steps and u all N elements of the inputs that need a gradient,
    tangents are computed along with z_t:

        dz_{t+1}/du = (d step/dz) dz_t/du + d step/du

    The loop takes N + 1 times the time and memory of a carry, whatever its length, and of each step
    only the tangents of its output are kept. The backward pass multiplies cotangents by tangents.

    Inputs are tensors in the initial carry (params, state, buffers), the arguments
    (hyperparameters, arguments of the loss) and the xs (batches, hyperparameters by step). Each
    counts once, however often it is used; tensors computed separately for every step count
    separately, so the learning rates of a schedule are many inputs, while its parameters, used
    within the step (`unroll`), are few. Tensors that need a gradient and that the step closes over
    raise. Results that do not depend on an input, such as the running statistics of batch
    normalization, are constants.

    Derivatives are of first order: differentiating the backward pass raises. Derivatives in forward
    mode (`torch.func.jvp`, `torch.autograd.forward_ad`) are of any order; there and under
    torch.compile the loop is simply unrolled, as by `Unrolled`. Under other torch.func transforms,
    such as `grad`, `jacrev` and `vmap`, N counts the inputs of one example, and `torch.func.grad`
    inside another reverse-mode transform raises if it would need a second derivative. All tangents
    are computed at once, but inside `torch.vmap` one after another, each by a run of the step.
    Random numbers are the same for values and all tangents.

    Args:
        max_inputs: the largest N allowed.

    Raises:
        ValueError: `max_inputs` is not an integer >= 1; `run`, `iterate`: more elements need a
            gradient, or the step closes over a tensor that does.
        NotImplementedError: the step has an operation without a forward derivative; in the backward
            pass: a second derivative is needed.

    Examples:
        >>> import torch, diffopt
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> opt = diffopt.sgd()
        >>> sol = diffopt.minimize(
        ...     lambda w: 0.5 * w**2, torch.tensor(1.0), optimizer=opt,
        ...     hparams=opt.hparams(lr=lr), steps=9, adjoint=diffopt.adjoint.ForwardMode(),
        ... )
        >>> torch.autograd.grad(sol.params, lr)  # -9 (1 - lr)^8
        (tensor(-3.8742),)

    Sources: Williams and Zipser, "A learning algorithm for continually running fully recurrent
    neural networks", 1989; Franceschi et al., "Forward and reverse gradient-based hyperparameter
    optimization", 2017.
    """

    max_inputs: int = 1000

    def __post_init__(self) -> None:
        check_integer(self.max_inputs, "max_inputs", 1)

    def run(self, step: Step, carry: Tree, args: Tree, xs: Iterable[Any]) -> tuple[Tree, list[Any]]:
        if _as_it_stands():
            return Unrolled().run(step, carry, args, xs)
        inputs = _Inputs(self.max_inputs, carry, args)
        if is_compiled(step) and isinstance(xs, list) and xs:
            results = _together(step, carry, args, xs, inputs)
            if results is not None:
                return results
        outputs, tangents, point = list[Any](), list[Tensor | None](), None
        for point in _points(step, carry, args, xs, inputs, 1.0):
            outputs.append(point.output)
            tangents.extend(point.tangents[point.size :])
        if point is None:
            return carry, []
        return _attach(inputs, (point.carry, outputs), [*point.tangents[: point.size], *tangents])

    def iterate(
        self, step: Step, carry: Tree, args: Tree, xs: Iterable[Any], *, discount: float = 1.0
    ) -> Iterator[tuple[Tree, Any]]:
        """Run a loop that can be differentiated after every step, while it continues.

        Yields carry_{t+1}, output_t = step(carry_t, args, x_t), both differentiable with respect to
        the current inputs: `torch.autograd.grad(validation(carry), args)` is the hypergradient of
        all steps so far. Before requesting the next step, the caller may change `args` in place, as
        `torch.optim` does: the next step uses the new values. The tangents are kept, that is, the
        derivative is with respect to a common shift of the values at all steps so far.

        Args:
            step: a pure function, `step(carry, args, x)` returns the next carry and an output.
            carry: a pytree of tensors.
            args: a pytree, read again at every step.
            xs: one tree per step; read one at a time, so it may be infinite.
            discount: tangents are multiplied by it before every step but the first. 1 is exact; 0
                forgets all steps but the last: with the learning rate as `args` that is
                hypergradient descent (Baydin et al.). Donini et al. use values in between.

        Returns:
            An iterator over pairs of a carry and an output.

        Raises:
            ValueError: `discount` is not between 0 and 1.

        Examples:
            >>> import torch, diffopt
            >>> def step(w, lr, t):
            ...     return w - lr * w, 0.5 * w**2  # the loss w^2 / 2
            >>> lr = torch.tensor(0.1, requires_grad=True)
            >>> meta = torch.optim.SGD([lr], lr=0.05)
            >>> online = diffopt.adjoint.ForwardMode()
            >>> for w, loss in online.iterate(step, torch.tensor(1.0), lr, range(3)):
            ...     lr.grad, = torch.autograd.grad(0.5 * w**2, lr)
            ...     meta.step()
            >>> lr
            tensor(0.2777, requires_grad=True)

        Sources: Baydin et al., "Online learning rate adaptation with hypergradient descent", 2018;
        Donini et al., "MARTHE: scheduling the learning rate via online hypergradients", 2020.
        """
        if not 0 <= discount <= 1:
            given = _tree.shown(discount)
            raise ValueError(f"discount is {given}, but must be a number from 0 to 1")
        return self._iterate(step, carry, args, xs, discount)

    def _iterate(
        self, step: Step, carry: Tree, args: Tree, xs: Iterable[Any], discount: float
    ) -> Iterator[tuple[Tree, Any]]:
        if _as_it_stands():
            for x in xs:
                carry, output = step(carry, args, x)
                yield carry, output
            return
        inputs = _Inputs(self.max_inputs, carry, args)
        for point in _points(step, carry, args, xs, inputs, discount):
            yield _attach(inputs, (point.carry, point.output), point.tangents)


def _as_it_stands() -> bool:
    """Whether to run the loop unrolled, without computing tangents here."""
    with contextlib.nullcontext() if _modes.compiling() else functions.forward_level():
        return _modes.compiling() or _modes.forward_differentiated() or not torch.is_grad_enabled()


class _Inputs:
    """The tensors that need a gradient, and which rows of a tangent belong to each.

    A tensor with n elements has n rows, a complex one 2 n.
    """

    def __init__(self, limit: int, carry: Tree, args: Tree) -> None:
        for name, tree in (("carry", carry), ("args", args)):
            checks.undistributed(tree, name, "ForwardMode (Checkpointed supports it)")
        self.limit, self.count = limit, 0
        self.tensors: list[Tensor] = []
        self.rows: dict[int, slice] = {}
        self.meet((carry, args))

    def meet(self, tree: Tree) -> None:
        """Add the tensors that need a gradient, by autograd or at a level of torch.func."""
        for tensor in _tree.tensors(tree):
            if id(tensor) in self.rows or not _modes.needs_gradient(tensor):
                continue
            size = tensor.numel() * (2 if tensor.is_complex() else 1)
            self.tensors.append(tensor)
            self.rows[id(tensor)] = slice(self.count, self.count + size)
            self.count += size
        if self.count > self.limit:
            raise ValueError(
                f"{self.count} numbers need a gradient, and for each of them ForwardMode computes "
                "a tangent of the size of the carry: use Checkpointed() or another reverse-mode "
                f"adjoint, or pass max_inputs={self.count} or more (it is {self.limit})"
            )

    def basis(self, tensor: Tensor) -> Tensor | None:
        """The tangents of an input; None for other tensors."""
        rows = self.rows.get(id(tensor))
        if rows is None:
            return None
        real = _modes.real(tensor.detach())
        eye = torch.eye(real.numel(), dtype=real.dtype, device=real.device)
        above = (0, 0, rows.start, self.count - rows.stop)
        basis = torch.nn.functional.pad(eye, above).reshape(self.count, *real.shape)
        return torch.view_as_complex(basis) if tensor.is_complex() else basis


class _Point(NamedTuple):
    """The results of the loop after a step, without derivatives, and their tangents.

    A tangent is None if a tensor depends on no input; the first `size` are the carry's.
    """

    carry: Tree
    output: Any
    tangents: list[Tensor | None]
    size: int


def _together(
    step: Step, carry: Tree, args: Tree, xs: list[Any], inputs: _Inputs
) -> tuple[Tree, list[Any]] | None:
    """The results of compiled steps between which nothing else runs, with derivatives."""
    inputs.meet(xs)
    start = map(inputs.basis, _tree.tensors(carry))
    found = pushforward(step, (carry, args, xs), inputs.count, start, inputs.basis)
    return found and _attach(inputs, *found)


def _points(
    step: Step, carry: Tree, args: Tree, xs: Iterable[Any], inputs: _Inputs, discount: float
) -> Iterator[_Point]:
    tangents = [_start(inputs, tensor) for tensor in _tree.tensors(carry)]
    carry = _tree.detach(carry)
    for t, x in enumerate(xs):
        if t > 0 and discount != 1:
            tangents = [None if tangent is None else discount * tangent for tangent in tangents]
        inputs.meet(x)
        point = _advance(step, carry, args, x, tangents, inputs, first=t == 0)
        yield point
        carry, tangents = point.carry, point.tangents[: point.size]


def _start(inputs: _Inputs, tensor: Tensor) -> Tensor | None:
    tangent = inputs.basis(tensor)
    if tangent is None and tensor.dim() == 0 and _modes.has_derivative(tensor):
        # Without a tangent torch computes products of constants and tangents in Python: a step
        # count, which scales every weight, gets zeros, or a step of Adam takes 1.4 times as long.
        return tensor.new_zeros((inputs.count,))
    return tangent


def _advance(
    step: Step,
    carry: Tree,
    args: Tree,
    x: Any,
    carry_tangents: Sequence[Tensor | None],
    inputs: _Inputs,
    *,
    first: bool,
) -> _Point:
    """One step of values and tangents."""
    others = _tree.tensors((args, x))
    directions = [None if t is None else _extended(t, inputs.count) for t in carry_tangents]
    compiled = pushforward(step, (carry, args, [x]), inputs.count, directions, inputs.basis)
    if compiled is not None:
        (carry, (output,)), tangents = compiled
        return _Point(carry, output, tangents, _tree.count(carry))
    directions += map(inputs.basis, others)
    arguments = _tree.detach((carry, args, x))
    if first:
        refuse_closed_over("the loss or step", step, *arguments)
    values, join = _tree.split(arguments)
    flat = functions.Flat(lambda arguments: step(*arguments), join)
    chosen = [i for i, direction in enumerate(directions) if direction is not None]

    def outputs(*xs: Tensor) -> list[Tensor]:
        return flat(*functions.replaced(values, chosen, xs))

    primals = [_modes.with_tangents(values[i]) for i in chosen]
    with functions.noticed() as aliases:
        if chosen and inputs.count:
            along = [directions[i] for i in chosen]
            results, tangents = _pushforward(outputs, primals, along, arguments)
        else:
            empty = inputs.tensors and not inputs.count
            results = outputs(*primals)
            tangents: list[Tensor | None] = [  # an empty input has no rows, but is an input
                y.new_zeros((0, *y.shape)) if empty and _modes.has_derivative(y) else None
                for y in results
            ]
    if any(id(leaf) not in aliases for leaf in graph_leaves(results)):
        refuse_closed_over("the loss or step", step, *arguments)
    carry, output = _tree.detach(flat.join(results))
    return _Point(carry, output, tangents, _tree.count(carry))


def _extended(tangent: Tensor, count: int) -> Tensor:
    """The tangent with rows of zeros for inputs added since."""
    missing = count - len(tangent)
    if not missing:
        return tangent
    return torch.cat([tangent, tangent.new_zeros((missing, *tangent.shape[1:]))])


def _pushforward(
    function: Callable[..., list[Tensor]],
    primals: list[Tensor],
    directions: list[Any],
    inputs: Tree,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The values of a function, and its derivatives along each row of the directions."""
    with forward_mode("the loss or step has no forward derivative", _ADVICE):
        if len(directions[0]) == 1 and not _modes.transformed():
            return _dual(function, primals, directions)
        return _along(function, primals, directions, inputs)


def _vmapped() -> bool:
    """Whether torch.vmap is active."""
    stack = _torch.interpreter_stack() or ()
    return any(level.key() == _torch.TransformType.Vmap for level in stack)


def _dual(
    function: Callable[..., list[Tensor]], primals: list[Tensor], directions: list[Tensor]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """For a single direction: faster than torch.func in eager mode."""
    values, tangents = list[Tensor](), list[Tensor | None]()
    # Inside a torch.autograd.Function, and without a graph, forward mode is disabled.
    with torch.enable_grad(), _torch.forward_enabled(True), forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, d[0]) for x, d in zip(primals, directions, strict=True)]
        for result in function(*duals):
            value, tangent = forward_ad.unpack_dual(result)
            values.append(value)
            tangents.append(None if tangent is None else tangent.detach().to(value.dtype)[None])
    return values, tangents


def _along(
    function: Callable[..., list[Tensor]],
    primals: list[Tensor],
    directions: list[Tensor],
    inputs: Tree,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """For all directions at once; inside torch.vmap, for one after another.

    There a nested one over the directions may be wrong: in torch 2.13 it is for
    `torch.linalg.lu_solve` with batched factors and several right-hand sides.
    """
    varies: list[bool] = []

    def parts(*xs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        results = function(*xs)
        varies[:] = [forward_ad.unpack_dual(y).tangent is not None for y in results]
        pairs = list(zip(results, varies, strict=True))
        return [y for y, v in pairs if v], [y for y, v in pairs if not v]

    def along(*direction: Tensor) -> Any:
        return torch.func.jvp(parts, tuple(primals), direction, has_aux=True)

    if _vmapped():
        # Clones, as torch does not support tangents of tensors expanded along the batch.
        primals = [x.clone() for x in primals]
        before, runs = functions.AmbientState(inputs), list[Any]()
        for direction in zip(*directions, strict=True):
            before.restore()
            runs.append(along(*direction))
        values, _, rest = runs[0]
        tangents = map(torch.stack, zip(*(found for _, found, _ in runs), strict=True))
    else:
        batches, tangents, constants = torch.vmap(along, randomness="same")(*directions)
        # Results that do not depend on the direction are expanded along it, as views.
        values, rest = ([x[0] for x in found] for found in (batches, constants))
    value, tangent, constant = map(iter, (values, tangents, rest))
    results = [next(value if v else constant) for v in varies]
    # torch makes the tangent of a number times a 0-d tensor float64.
    pairs = zip(results, varies, strict=True)
    return results, [next(tangent).to(y.dtype) if v else None for y, v in pairs]


def _attach(inputs: _Inputs, tree: Tree, tangents: Sequence[Tensor | None]) -> Tree:
    """The tree with derivatives with respect to the inputs."""
    tensors, join = _tree.split(tree)
    given = [i for i, tangent in enumerate(tangents) if tangent is not None]
    if not given:
        return tree
    rows = [inputs.rows[id(x)] for x in inputs.tensors]

    def pullback(
        saved: Sequence[Tensor], needed: Sequence[bool], cotangents: Sequence[Tensor]
    ) -> list[Tensor | None]:
        count = len(cotangents)
        trees = list(saved[: -2 * count]), list(saved[-count:]), list(cotangents)
        grads = once(_SECOND_ORDER, functools.partial(_contract, rows), trees)
        return [*grads, *[None] * (2 * count)]

    values, rates = ([xs[i] for i in given] for xs in (tensors, tangents))
    results = functions.custom(lambda trees: trees[1], (inputs.tensors, values, rates), pullback)
    return join(functions.replaced(tensors, given, results))


def _contract(rows: list[slice], trees: Tree) -> list[Tensor]:
    """`(inputs, tangents, cotangents) -> gradients`: sums over outputs of <cotangent, tangent>."""
    inputs, tangents, cotangents = trees
    pairs = list(zip(tangents, cotangents, strict=True))
    return [_gradient(x, r, pairs) for x, r in zip(inputs, rows, strict=True)]


def _gradient(x: Tensor, rows: slice, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    total = torch.zeros_like(x)
    for tangent, cotangent in pairs:
        if len(tangent) < rows.stop:  # computed before the input was added
            continue
        part = tangent[rows].reshape(rows.stop - rows.start, cotangent.numel())
        product = (part.conj() @ cotangent.reshape(-1)).real
        if x.is_complex():
            product = torch.view_as_complex(product.reshape(*x.shape, 2).contiguous())
        total = total + product.reshape(x.shape).to(x)
    return total
