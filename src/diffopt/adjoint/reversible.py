"""Reverse mode through momentum SGD, which is run backwards exactly instead of stored."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._arguments import check_integer
from diffopt._diff import functions
from diffopt._diff.captured import refuse_closed_over, watched
from diffopt._diff.functions import AmbientState
from diffopt._diff.gradient import HVP, check_hvp, value_and_grad
from diffopt._diff.kernels import UnfitError
from diffopt._diff.unmodified import Captured, kept
from diffopt._modes import exact
from diffopt._rule import checks, hyper, running
from diffopt._tree import Tree
from diffopt.adjoint._base import Adjoint, GradientStep, Step
from diffopt.adjoint._integers import DENOMINATOR, Faults, Tape, divide
from diffopt.adjoint._limited import once
from diffopt.rules.sgd import SGD, MomentumHParams, SGDState

_PATIENCE = 100  # steps between checks for errors, which synchronize a GPU
_SECOND_ORDER = "Reversible has no second derivatives: use Unrolled() or Checkpointed()"
_MOMENTUM = (
    "hparams.momentum is {}, but must be > 0 and <= 1 for Reversible: a step with momentum 0 "
    "discards the momentum buffer and cannot be undone"
)
_CHANGED = "the loss changes its buffers, which Reversible cannot undo: use Checkpointed()"


@dataclass(frozen=True)
class Reversible(Adjoint):
    """Exact in its own arithmetic: the backward pass runs momentum SGD backwards to the start.

    For `minimize` with `diffopt.sgd()`. During the loop, params p and momentum buffers b are
    integer multiples of 2^-bits, and the momentum is a fraction n / 2^30. With [x] denoting x
    rounded,

        b_t = floor(n b_{t-1} / 2^30) + [(1 - dampening) g_t],    p_t = p_{t-1} - [lr b_t]

    where g_t is the gradient, with weight decay, at p_{t-1} as floating-point numbers. Backwards,
    p_{t-1} = p_t + [lr b_t], and recomputing the gradient gives the same integers to subtract. What
    the division by 2^30 loses, the position of b_{t-1} among the integers with the same quotient,
    is kept as digits of a long integer for each weight: 2 (1 - momentum) bits per step for a
    momentum of 0.5 or more. That is one 64-bit word per 300 steps at 0.9, where `Unrolled` keeps
    several words per step. Besides this only the last carry, the outputs, and the states of random
    number generators before steps that drew from them (5 KB each on a CPU) are kept.

    Derivatives are those of the real-valued step at the recovered states, of first order, with
    respect to the initial params, optimizer state and buffers, hyperparameters (per step too), the
    loss's arguments and the batches, under autograd and torch.func's `grad`, `vjp`, `jacrev` and
    `vmap`. The backward pass ends with a check that the initial params and buffers are recovered
    bit for bit. They are rounded to multiples of 2^-bits when the loop begins; float32 numbers of
    magnitude 2^(23 - bits) or more, 8e-6 by default, already are such multiples.

    Args:
        bits: the number of fractional bits. Numbers of magnitude 2^(62 - bits) or more, 4e6 by
            default, are out of range.
        hvp: how a step is differentiated, see `Checkpointed`.

    Raises:
        ValueError: an argument is out of range; `run`: `momentum` is not in (0, 1] (at 0 a step
            discards the buffer, and cannot be undone), `tol` is given, params are complex, params
            or momentum buffers leave the range or are not finite, or the loss changes its `buffers`
            or closes over a tensor that needs a gradient.
        TypeError: `run`: the step is not one of `minimize`, or its optimizer is not `sgd()` with
            momentum and without nesterov.
        NotImplementedError: in forward mode, under torch.compile, and for a second derivative.
        RuntimeError: in the backward pass: the initial params are not recovered, because the loss
            is not deterministic.

    Examples:
        >>> import torch, diffopt
        >>> lr = torch.tensor(0.25, requires_grad=True)
        >>> opt = diffopt.sgd()
        >>> sol = diffopt.minimize(
        ...     lambda w: 0.5 * w**2, torch.tensor(1.0), optimizer=opt,
        ...     hparams=opt.hparams(lr=lr, momentum=0.5), steps=2,
        ...     adjoint=diffopt.adjoint.Reversible(),
        ... )
        >>> sol.params  # 1 - (2 + momentum) lr + lr^2
        tensor(0.4375, grad_fn=<...>)
        >>> torch.autograd.grad(sol.params, lr)
        (tensor(-2.),)

    Source: Maclaurin, Duvenaud and Adams, "Gradient-based hyperparameter optimization through
    reversible learning", 2015. There, the information buffer supplies the low digits of the product
    in Algorithm 3; here the product is rounded down, so a finer fraction costs no precision, and a
    loop without derivatives needs no such buffer.
    """

    bits: int = 40
    hvp: HVP = "reverse-over-reverse"

    def __post_init__(self) -> None:
        check_integer(self.bits, "bits", 1, 61)
        check_hvp(self.hvp)

    def run(self, step: Step, carry: Tree, args: Tree, xs: Iterable[Any]) -> tuple[Tree, list[Any]]:
        if _modes.compiling() or _modes.forward_differentiated():
            raise NotImplementedError(
                "Reversible works neither in forward mode nor under torch.compile: use Unrolled()"
            )
        if not isinstance(step, GradientStep):
            raise TypeError("Reversible requires minimize: other steps cannot be run backwards")
        _check_step(step)
        if step.compiler is not None:
            step.compiler.give_up(UnfitError("Reversible() has steps of its own"))
            step = replace(step, compiler=None)
        carry, xs = _checked_carry(carry), kept(xs)
        if not xs:
            return carry, []
        captured = Captured("the loss", step)
        refuse_closed_over(captured.name, step, carry, args, xs[0], captured=captured)
        inputs = carry, args, xs
        join = _tree.split(inputs)[1]
        step = replace(step, hvp=self.hvp)
        loop = _Loop(step, 2.0**self.bits, join, _varying(carry), captured)
        if not torch.is_grad_enabled():
            return loop.forward(inputs, record=False)[0]
        return functions.custom(
            loop.forward, inputs, loop.pullback, sparse=True, varies=loop.varies, keep=True
        )


def _check_step(step: GradientStep) -> None:
    opt = step.optimizer
    if not isinstance(opt, SGD) or type(opt).rule is not SGD.rule:
        raise TypeError("Reversible requires diffopt.sgd(): others cannot be run backwards")
    if not opt.momentum:
        raise TypeError("Reversible requires sgd(momentum=True): other steps cannot be undone")
    if opt.nesterov:
        raise TypeError(
            "Reversible requires sgd(nesterov=False): to undo a Nesterov step one would need the "
            "gradient at the params it started from"
        )
    if step.tol is not None:
        raise ValueError("Reversible does not support tol: leave it None")


def _checked_carry(carry: Tree) -> Tree:
    """Check the carry, and put its momentum buffers in the order of the params."""
    params, state, buffers = carry
    checks.instance(state, SGDState, "state", "init()")
    checks.undistributed(params, "params", "Reversible")
    for i, leaf in enumerate(_tree.leaves(params)):
        if leaf.is_complex():
            raise ValueError(
                f"{_tree.paths(params, 'params')[i]} is complex, which Reversible does not "
                "support: pass its real and imaginary parts"
            )
    names = ("state.momentum_buffer", "params")
    momentum = _tree.ordered_like(state.momentum_buffer, params, names)
    return params, state._replace(momentum_buffer=momentum), buffers


def _varying(carry: Tree) -> list[bool]:
    """Which tensors of the carry depend on what is differentiated during the loop."""
    params, (step, momentum), buffers = carry
    parts = (params, True), (step, False), (momentum, True), (buffers, False)
    return [
        _modes.has_derivative(x) and (moves or _modes.needs_gradient(x))
        for tree, moves in parts
        for x in _tree.tensors(tree)
    ]


@dataclass(eq=False)
class _Loop:
    """One run of the loop, forwards and backwards.

    It holds no tensors except states of generators. What else the way back needs is kept with the
    results of the forward run: the last params and momentum buffers as integers, and the tapes.
    """

    step: GradientStep
    scale: float
    join: Callable[..., Tree]
    varies: list[bool]
    captured: Captured
    noise: list[AmbientState] = field(default_factory=list[AmbientState])  # of each step
    moved: list[list[int]] = field(default_factory=list[list[int]])  # at each step, by index
    counts: list[int] = field(init=False)  # of tensors in the last carry, and in each output
    join_kept: Callable[..., Tree] = field(init=False)

    def forward(self, inputs: Tree, record: bool = True) -> tuple[tuple[Tree, list[Any]], Tree]:
        """The last carry and the outputs; and what the way back needs."""
        start, args, xs = _with_fractions(*_tree.detach(inputs))
        objective = watched("the loss", self.step.objective) if record else self.step.objective
        step, faults = replace(self.step, objective=objective), Faults()
        params, buffers = _integers(start, self.scale, faults)
        tapes = [Tape(torch.zeros_like(b)) for b in buffers]
        weights = _Weights(step, self.scale, start, args, params, buffers, tapes, faults)
        quiet, outputs = AmbientState((start, args)), list[Any]()
        for t, x in enumerate(xs):
            before = AmbientState((start, args, x))
            weights.meet(x)
            value, (buffers, aux), impulses = weights.impulses(t, x)
            weights.forth(impulses, record)
            faults.note(_CHANGED, _differ(start[2], buffers))
            outputs.append((value, aux, None))
            self.noise.append(before if record and _drew(before) else quiet)
            self.moved.append(list(impulses))
            if t % _PATIENCE == 0 or t == len(xs) - 1:
                faults.check()
        carry = *weights.carry(len(xs))[:2], inputs[0][2]
        self.counts = [_tree.count(tree) for tree in (carry, *outputs)]
        last = weights.params, weights.buffers, list(map(vars, tapes))
        kept, self.join_kept = _tree.split(last)
        return (carry, outputs), kept

    def pullback(
        self, tensors: Sequence[Tensor], needed: Sequence[bool], cotangents: Sequence[Any]
    ) -> list[Tensor | None]:
        count = len(needed)
        trees = list(tensors[:count]), list(tensors[count:]), list(cotangents)
        return once(_SECOND_ORDER, functools.partial(self.backward, needed), trees)

    def backward(self, needed: Sequence[bool], trees: Tree) -> list[Tensor | None]:
        """The gradients, given the inputs, what was kept, and the cotangents."""
        self.captured.check()
        inputs, kept, given = trees
        start, args, xs = _with_fractions(*self.join(inputs))
        params, buffers, tapes = self.join_kept(kept)
        tapes = [Tape(**tape) for tape in tapes]
        weights = _Weights(self.step, self.scale, start, args, params, buffers, tapes)
        cotangents, *later = _cut(given, self.counts)
        _, of_args, *of_xs = _cut(needed, [_tree.count(tree) for tree in (start, args, *xs)])
        totals: list[Tensor | None] = [None] * len(of_args)
        by_step: list[list[Tensor | None]] = [[]] * len(xs)
        for t, x in reversed(list(enumerate(xs))):
            weights.back(t, x, self.moved[t], self.noise[t])
            wanted = self.varies, of_args, of_xs[t]
            with self.noise[t].restored():
                point = weights.carry(t), args, x
                grads = self.gradients(point, [*itertools.chain(*wanted)], [*cotangents, *later[t]])
            cotangents, parts, by_step[t] = _cut(grads, list(map(len, wanted)))
            totals = [_sum(total, part) for total, part in zip(totals, parts, strict=True)]
        _check_return(_integers(start, self.scale, Faults()), (weights.params, weights.buffers))
        grads = itertools.chain(cotangents, totals, *by_step)
        return [
            (torch.zeros_like(x) if grad is None else grad) if need else None
            for x, grad, need in zip(inputs, grads, needed, strict=True)
        ]

    def gradients(
        self, inputs: Tree, needed: Sequence[bool], cotangents: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The vector-Jacobian product of the real-valued step."""
        tensors, join = _tree.split(inputs)
        if all(cotangent is None for cotangent in cotangents):
            return [None] * len(tensors)
        step = functions.Flat(lambda inputs: self.step(*inputs), join)
        return functions.vjp(step, tensors, needed, cotangents)


@dataclass
class _Weights:
    """The params and momentum buffers at some step of a loop, as integers in units of 2^-bits."""

    step: GradientStep
    scale: float
    start: Tree
    args: Tree
    params: list[Tensor]
    buffers: list[Tensor]
    tapes: list[Tape]
    faults: Faults = field(default_factory=Faults)
    rates: list[_Rates] = field(default_factory=list["_Rates"])

    def carry(self, t: int) -> Tree:
        """The carry before step t, converted back to floating-point numbers."""

        def image(integers: list[Tensor], like: Tree) -> Tree:
            leaves, spec = _tree.flatten(like)
            pairs = zip(integers, leaves, strict=True)
            return _tree.unflatten([(exact(n) / self.scale).to(x) for n, x in pairs], spec)

        params, state, kept = self.start
        step = (exact(state.step) + t).to(state.step.dtype)
        momentum = image(self.buffers, state.momentum_buffer)
        return image(self.params, params), SGDState(step, momentum), kept

    def forth(self, impulses: dict[int, Tensor], record: bool) -> None:
        """A step, given the increments of the momentum buffers."""
        for i, impulse in impulses.items():
            rate, buffer = self.rates[i], self.buffers[i]
            quotient = divide(buffer, rate.numerator)
            if record:
                self.tapes[i].push(buffer, quotient, rate.numerator, rate.most)
            self.buffers[i] = self.faults.add(quotient, impulse)
            self.params[i] = self.faults.add(self.params[i], self.move(i))

    def back(self, t: int, x: Any, moved: list[int], noise: AmbientState) -> None:
        """Undo step t."""
        self.meet(x)
        for i in moved:
            self.params[i] = self.params[i] - self.move(i).to(torch.int64)
        with noise.restored():
            impulses = self.impulses(t, x)[2]
        for i in moved:
            quotient = self.buffers[i] - impulses[i].to(torch.int64)
            self.buffers[i] = self.tapes[i].pop(quotient, self.rates[i].numerator)

    def meet(self, x: Any) -> None:
        """Use the hyperparameters of a step."""
        if not self.rates or x[0] is not None:
            self.rates = _rates(self.start[0], self.args, x, self.faults)

    def impulses(self, t: int, x: Any) -> tuple[Tensor, Any, dict[int, Tensor]]:
        """Value and auxiliary output of the loss, and the increments of the momentum buffers.

        The increments are by index of the leaf, for params that have a gradient.
        """
        params, state, buffers = self.carry(t)
        arguments = buffers, self.args[1], x[1]
        value, aux, grads = value_and_grad(self.step.objective, params, arguments)
        impulses: dict[int, Tensor] = {}
        for i, (p, g) in enumerate(zip(_tree.leaves(params), _tree.leaves(grads), strict=True)):
            if g is not None:
                p, g = exact(p), exact(g)
                impulse = self.by_rule(i, exact(state.step) + 1, p, g, torch.zeros_like(p))[1]
                impulses[i] = (impulse * self.scale).round()
        return value, aux, impulses

    def move(self, i: int) -> Tensor:
        """-[lr b], as floating-point numbers."""
        b = exact(self.buffers[i])
        zero = torch.zeros_like(b)
        return self.by_rule(i, 1, zero, zero, b)[0].round()

    def by_rule(self, i: int, t: Any, *tensors: Tensor) -> list[Tensor]:
        """`(p, g, b) -> (p, b)`, by the optimizer's own rule at step t with a momentum of 1.

        With zeros for all but one tensor it gives the contribution of that tensor, which can be
        rounded before it is added. Rounding must be the same on the way back, so the arguments are
        float64 and at least one-dimensional, which rules treat alike in every context.
        """
        optimizer: Any = self.step.optimizer
        row = [torch.atleast_1d(x) for x in tensors]
        numbers = running.numbers_at(optimizer, t, self.rates[i].values, [[x] for x in row])
        return [x.reshape(tensors[0].shape) for x in running.run(optimizer, numbers, row)]


class _Rates(NamedTuple):
    """The hyperparameters of one leaf."""

    values: list[Any]  # in the order of the record, with 1 in place of the momentum
    numerator: Any  # of the momentum
    most: int  # the largest number of integers with the same quotient


def _rates(params: Tree, args: Tree, x: Any, faults: Faults) -> list[_Rates]:
    record = args[0] if x[0] is None else x[0]
    leaves, spec = _tree.flatten(params)
    covered = hyper.broadcast(record, spec, params)
    rates: list[_Rates] = []
    for i, leaf in enumerate(leaves):
        values = {c.name: _exact_number(c.at(i), leaf) for c in covered}
        numerator, least = _integral_numerator(values["momentum"], faults)
        values["momentum"] = 1.0
        row = [torch.atleast_1d(x) if isinstance(x, Tensor) else x for x in values.values()]
        rates.append(_Rates(row, numerator, most=-(-DENOMINATOR // least)))
    return rates


def _exact_number(value: Any, leaf: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return exact(value if leaf.dim() else value.reshape(()))


def _with_fractions(carry: Tree, args: Tree, xs: list[Any]) -> tuple[Tree, Tree, list[Any]]:
    """The arguments with every momentum rounded to a multiple of 2^-30."""
    hparams, inputs = args
    batches = [(own if own is None else _fractional(own), batch) for own, batch in xs]
    return carry, (_fractional(hparams) if hparams else hparams, inputs), batches


def _fractional(hparams: MomentumHParams) -> MomentumHParams:
    def rounded(momentum: Any) -> Any:
        numerator = _numerator(momentum)
        if isinstance(momentum, Tensor):
            return (numerator / DENOMINATOR).to(momentum.dtype)
        if not _fits(numerator):
            raise ValueError(_MOMENTUM.format(momentum))
        return numerator / DENOMINATOR

    return replace(hparams, momentum=_tree.map(rounded, hparams.momentum))


def _numerator(momentum: Any) -> Any:
    """The n of momentum = n / 2^30."""
    if isinstance(momentum, Tensor):
        return (exact(momentum) * DENOMINATOR).round()
    return round(min(momentum, 2.0) * DENOMINATOR)


def _fits(numerator: Any) -> Any:
    return (numerator >= 1) & (numerator <= DENOMINATOR)


def _integral_numerator(momentum: Any, faults: Faults) -> tuple[Any, int]:
    """The n of momentum = n / 2^30, and its minimum if there is one per weight."""
    numerator = _numerator(momentum)
    if not isinstance(numerator, Tensor):
        return numerator, numerator
    fits = _fits(numerator)
    faults.note(_MOMENTUM.format("a tensor with entries out of range"), ~fits.all())
    numerator = torch.where(fits, numerator, 1).to(torch.int64)
    values = _modes.concrete(numerator)
    return numerator, 1 if values is None or not values.numel() else int(values.min())


def _differ(old: Tree, new: Tree) -> Tensor | None:
    """Whether any leaf of one tree differs from that of the other, of the same structure."""
    unequal = [
        _modes.tensor_of(isinstance(x, Tensor) != isinstance(y, Tensor) or x != y).any()
        for x, y in zip(_tree.leaves(old), _tree.leaves(new), strict=True)
        if x is not y
    ]
    return functools.reduce(torch.logical_or, unequal) if unequal else None


def _drew(before: AmbientState) -> bool:
    """Whether random numbers have been drawn since then."""
    pairs = zip(before.generators, before.states, strict=True)
    return any(not torch.equal(generator.get_state(), state) for generator, state in pairs)


def _integers(carry: Tree, scale: float, faults: Faults) -> tuple[list[Tensor], list[Tensor]]:
    """Params and momentum buffers as integers in units of 2^-bits."""

    def integers(tree: Tree) -> list[Tensor]:
        return [
            faults.add(x.new_zeros((), dtype=torch.int64), exact(x) * scale)
            for x in _tree.leaves(tree)
        ]

    return integers(carry[0]), integers(carry[1].momentum_buffer)


def _check_return(start: tuple[list[Tensor], ...], found: tuple[list[Tensor], ...]) -> None:
    for name, before, after in zip(("params", "momentum buffers"), start, found, strict=True):
        if any(_modes.holds_anywhere(x != y) for x, y in zip(before, after, strict=True)):
            raise RuntimeError(
                f"the loop run backwards did not recover the initial {name}: recomputed with the "
                "same random numbers, the gradient of the loss was different; see "
                "torch.use_deterministic_algorithms"
            )


def _cut(values: Sequence[Any], lengths: Sequence[int]) -> list[list[Any]]:
    """The values, cut into lists of these lengths."""
    rest = iter(values)
    return [list(itertools.islice(rest, length)) for length in lengths]


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """The sum of two cotangents, where None stands for zeros."""
    return x if y is None else y if x is None else x + y
