"""Reverse mode through momentum SGD, which is run backwards exactly instead of stored."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree
from diffopt._arguments import check_integer
from diffopt._diff import functions
from diffopt._diff.captured import refuse_closed_over, watched
from diffopt._diff.functions import AmbientState
from diffopt._diff.gradient import HVP, Objective, check_hvp, value_and_grad
from diffopt._diff.unmodified import Captured
from diffopt._modes import exact
from diffopt._rule import checks, hyper, running
from diffopt._tree import Tree
from diffopt.adjoint._base import Adjoint, GradientStep, Step
from diffopt.adjoint._integers import DENOMINATOR, Faults, Tape, divide, dividends
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

    Example:
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
        carry, xs = _checked_carry(carry), list(xs)
        if not xs:
            return carry, []
        captured = Captured("the loss")
        refuse_closed_over(captured.name, step, carry, args, xs[0], captured=captured)
        inputs, join = _tree.split((carry, args, xs))
        step = replace(step, hvp=self.hvp)
        loop = _Loop(step, 2.0**self.bits, join, _varying(carry), captured)
        if torch.is_grad_enabled():
            return loop.public(_Reversed.apply(loop, *inputs))
        return loop.public(loop.forward(inputs, record=False))


def _check_step(step: GradientStep) -> None:
    opt = step.optimizer
    if not isinstance(opt, SGD):
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
    leaves, spec = _tree.flatten(params)
    for i, leaf in enumerate(leaves):
        if leaf.is_complex():
            raise ValueError(
                f"{_tree.paths(params, 'params')[i]} is complex, which Reversible does not "
                "support: pass its real and imaginary parts"
            )
    names = ("state.momentum_buffer", "params")
    momentum = _tree.leaves_like(state.momentum_buffer, spec, params, names)
    return params, state._replace(momentum_buffer=_tree.unflatten(momentum, spec)), buffers


def _varying(carry: Tree) -> list[bool]:
    """Which tensors of the carry depend on what is differentiated during the loop."""
    params, (step, momentum), buffers = carry
    parts = (params, True), (step, False), (momentum, True), (buffers, False)
    return [
        functions.has_derivative(x) and (moves or _modes.needs_gradient(x))
        for tree, moves in parts
        for x in _tree.split(tree)[0]
    ]


class _Reversed(torch.autograd.Function):
    """`(loop, *inputs) -> the loop's results, followed by what the way back needs`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loop: _Loop, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(functions.batched_like(loop.forward(inputs), inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.loop, *tensors = inputs
        ctx.save_for_backward(*tensors, *output[sum(ctx.loop.counts) :])
        pairs = functions.carriers(output, ctx.loop.varies)
        ctx.mark_non_differentiable(*(x for x, v in pairs if not v))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = [_torch.unwrap_if_dead(x) for x in ctx.saved_tensors]
        needed = ctx.needs_input_grad[1:]
        public = cotangents[: sum(ctx.loop.counts)]
        given = [c is not None and functions.has_derivative(c) for c in public]
        vectors = [c for c in public if c is not None and functions.has_derivative(c)]
        back = functools.partial(ctx.loop.backward, needed, given)
        grads = iter(once(_SECOND_ORDER, back, [*saved, *vectors]))
        return (None, *(next(grads) if need else None for need in needed))


class _Loop:
    """One run of the loop, forwards and backwards.

    It holds no tensors except states of generators. What else the way back needs is among the
    results of the forward run: the last params and momentum buffers as integers, and the tapes.
    """

    def __init__(
        self,
        step: GradientStep,
        scale: float,
        join: Callable[..., Tree],
        varies: list[bool],
        captured: Captured,
    ) -> None:
        self.step, self.scale, self.join, self.varies = step, scale, join, varies
        self.captured = captured
        self.noise: list[AmbientState] = []  # of each step
        self.moved: list[list[int]] = []  # which params have a gradient, at each step
        self.counts: list[int] = []  # of tensors in the last carry, and in the output of each step
        self.sizes: list[list[int]] = []  # of the words on each tape
        self.join_public: Callable[..., Tree] = join

    def public(self, results: Sequence[Tensor]) -> Any:
        """The last carry and the outputs."""
        return self.join_public(results[: sum(self.counts)])

    def forward(self, inputs: Sequence[Tensor], record: bool = True) -> tuple[Tensor, ...]:
        inputs = _tree.detach(list(inputs))
        start, args, xs = _with_fractions(*self.join(inputs))
        objective = watched("the loss", self.step.objective) if record else self.step.objective
        faults, outputs, rates = Faults(), list[Any](), list[_Rates]()
        params, buffers = self.integers(start, faults)
        tapes = [Tape(torch.zeros_like(b), [], []) for b in buffers]
        quiet = AmbientState((start, args))
        for t, x in enumerate(xs):
            if not rates or x[0] is not None:
                rates = _rates(start[0], args, x, faults)
            before = AmbientState((start, args, x))
            carry = self.carry(params, buffers, start, t)
            value, (kept, aux), impulses = self.impulses(objective, carry, args, x, rates)
            outputs.append((value, aux, None))
            self.noise.append(before if record and _drew(before) else quiet)
            faults.note(_CHANGED, _differ(start[2], kept))
            self.moved.append(list(impulses))
            for i, impulse in impulses.items():
                rate = rates[i]
                quotient = divide(buffers[i], rate.numerator)
                if record:
                    first, count = dividends(quotient, rate.numerator)
                    tapes[i].push(buffers[i] - first, count, rate.most)
                buffers[i] = faults.add(quotient, impulse)
                params[i] = faults.add(params[i], self.move(buffers[i], rate))
            if t % _PATIENCE == 0 or t == len(xs) - 1:
                faults.check()
        carry = self.carry(params, buffers, start, len(xs))
        results, self.join_public = _tree.split((carry, outputs))
        self.counts = [_tree.count(tree) for tree in (carry, *outputs)]
        self.sizes = [tape.sizes for tape in tapes]
        words = [word for tape in tapes for word in tape.words]
        results += [*params, *buffers, *(tape.top for tape in tapes), *words]
        return tuple(functions.distinct(results, inputs))

    def backward(
        self, needed: Sequence[bool], given: Sequence[bool], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """`(inputs, integers, tapes, the cotangents given) -> the gradients needed`."""
        self.captured.check()
        rest = iter(tensors)
        inputs = [next(rest) for _ in needed]
        start, args, xs = _with_fractions(*self.join(inputs))
        params, buffers, tops = ([next(rest) for _ in self.sizes] for _ in range(3))
        tapes = [
            Tape(top, [next(rest) for _ in sizes], list(sizes), sum(i in m for m in self.moved))
            for i, (top, sizes) in enumerate(zip(tops, self.sizes, strict=True))
        ]
        cotangents, *later = _cut(
            [next(rest) if is_given else None for is_given in given], self.counts
        )
        lengths = [_tree.count(tree) for tree in (start, args, *xs)]
        _, of_args, *of_xs = _cut(needed, lengths)
        totals: list[Tensor | None] = [None] * len(of_args)
        by_step, rates = list[list[Tensor | None]](), list[_Rates]()
        for t in reversed(range(len(xs))):
            x = xs[t]
            if not rates or x[0] is not None:
                rates = _rates(start[0], args, x, Faults())
            for i in self.moved[t]:
                params[i] = params[i] - self.move(buffers[i], rates[i]).to(torch.int64)
            carry = self.carry(params, buffers, start, t)
            with self.noise[t].restored():
                _, _, impulses = self.impulses(self.step.objective, carry, args, x, rates)
            for i in self.moved[t]:
                quotient = buffers[i] - impulses[i].to(torch.int64)
                first, count = dividends(quotient, rates[i].numerator)
                buffers[i] = first + tapes[i].pop(count)
            carry = self.carry(params, buffers, start, t)
            with self.noise[t].restored():
                wanted = [*self.varies, *of_args, *of_xs[t]]
                grads = self.gradients((carry, args, x), wanted, [*cotangents, *later[t]])
            lengths = [len(self.varies), len(of_args), len(of_xs[t])]
            cotangents, parts, own = _cut(grads, lengths)
            totals = [_sum(total, part) for total, part in zip(totals, parts, strict=True)]
            by_step.append(own)
        _check_return(self.integers(start, Faults()), (params, buffers))
        grads = [*cotangents, *totals, *(grad for own in reversed(by_step) for grad in own)]
        return tuple(
            torch.zeros_like(x) if grad is None else grad
            for x, grad, need in zip(inputs, grads, needed, strict=True)
            if need
        )

    def integers(self, carry: Tree, faults: Faults) -> tuple[list[Tensor], list[Tensor]]:
        """Params and momentum buffers as integers in units of 2^-bits."""
        params, state, _ = carry
        trees = map(_tree.leaves, (params, state.momentum_buffer))
        zero = torch.zeros((), dtype=torch.int64)
        params, buffers = (
            [faults.add(zero.to(x.device), exact(x) * self.scale) for x in leaves]
            for leaves in trees
        )
        return params, buffers

    def carry(self, params: list[Tensor], buffers: list[Tensor], start: Tree, t: int) -> Tree:
        """The carry before step t, converted back to floating-point numbers."""

        def image(integers: list[Tensor], like: Tree) -> Tree:
            leaves, spec = _tree.flatten(like)
            pairs = zip(integers, leaves, strict=True)
            return _tree.unflatten([(exact(n) / self.scale).to(x) for n, x in pairs], spec)

        old, state, kept = start
        step = (exact(state.step) + t).to(state.step.dtype)
        return image(params, old), SGDState(step, image(buffers, state.momentum_buffer)), kept

    def impulses(
        self, objective: Objective, carry: Tree, args: Tree, x: Any, rates: list[_Rates]
    ) -> tuple[Tensor, Any, dict[int, Tensor]]:
        """Value and auxiliary output of the loss, and the increments of the momentum buffers.

        The increments are by index of the leaf, for params that have a gradient.
        """
        (params, state, buffers), (_, inputs), (_, batch) = carry, args, x
        arguments = (buffers, inputs, batch)
        value, aux, grads = value_and_grad(objective, params, arguments)
        impulses: dict[int, Tensor] = {}
        for i, (p, g) in enumerate(zip(_tree.leaves(params), _tree.leaves(grads), strict=True)):
            if g is not None:
                p, g, t = exact(p), exact(g), exact(state.step) + 1
                _, impulse = self.by_rule(rates[i], t, p, g, torch.zeros_like(p))
                impulses[i] = (impulse * self.scale).round()
        return value, aux, impulses

    def move(self, buffer: Tensor, rate: _Rates) -> Tensor:
        """-[lr b], as floating-point numbers."""
        b = exact(buffer)
        zero = torch.zeros_like(b)
        return self.by_rule(rate, 1, zero, zero, b)[0].round()

    def by_rule(self, rate: _Rates, t: Any, *tensors: Tensor) -> list[Tensor]:
        """`(p, g, b) -> (p, b)`, by the optimizer's own rule at step t with a momentum of 1.

        With zeros for all but one tensor it gives the contribution of that tensor, which can be
        rounded before it is added. Rounding must be the same on the way back, so the arguments are
        float64 and at least one-dimensional, which rules treat alike in every context.
        """
        optimizer: Any = self.step.optimizer
        row = [torch.atleast_1d(x) for x in tensors]
        numbers = running.numbers_at(optimizer, t, rate.values, row[0])
        return [x.reshape(tensors[0].shape) for x in running.run(optimizer, numbers, row)]

    def gradients(
        self, inputs: Tree, needed: Sequence[bool], cotangents: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The vector-Jacobian product of the real-valued step."""
        tensors, join = _tree.split(inputs)
        given = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        if not given:
            return [None] * len(tensors)

        def outputs(*xs: Tensor) -> list[Tensor]:
            results = _tree.split(self.step(*join(xs)))[0]
            return [results[i] for i in given]

        vectors = [c for c in cotangents if c is not None]
        return functions.vjp(outputs, tensors, needed, vectors)


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
    """Whether any tensor of one tree differs from that of the other."""
    (before, spec), (after, new_spec) = _tree.flatten(old), _tree.flatten(new)
    if spec != new_spec:
        return torch.tensor(True)
    unequal = [
        (x != y).any()
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape
        else torch.tensor(isinstance(x, Tensor) or isinstance(y, Tensor) or x != y)
        for x, y in zip(before, after, strict=True)
        if x is not y
    ]
    return functools.reduce(torch.logical_or, unequal) if unequal else None


def _drew(before: AmbientState) -> bool:
    """Whether random numbers have been drawn since then."""
    pairs = zip(before.generators, before.states, strict=True)
    return any(not torch.equal(generator.get_state(), state) for generator, state in pairs)


def _check_return(start: tuple[list[Tensor], ...], found: tuple[list[Tensor], ...]) -> None:
    for name, before, after in zip(("params", "momentum buffers"), start, found, strict=True):
        for x, y in zip(before, after, strict=True):
            if _modes.holds_anywhere(x != y):
                raise RuntimeError(
                    f"the loop run backwards did not recover the initial {name}: recomputed with "
                    "the same random numbers, the gradient of the loss was different; see "
                    "torch.use_deterministic_algorithms"
                )


def _cut(values: Sequence[Any], lengths: Sequence[int]) -> list[list[Any]]:
    """The values, cut into lists of these lengths."""
    rest = iter(values)
    return [list(itertools.islice(rest, length)) for length in lengths]


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """The sum of two cotangents, where None stands for zeros."""
    return x if y is None else y if x is None else x + y
