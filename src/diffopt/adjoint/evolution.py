"""Derivatives from values alone: evolution strategies, antithetic and persistent."""

from __future__ import annotations

import contextlib
import functools
import math
import numbers
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree
from diffopt._diff import functions
from diffopt._diff.captured import detach_constants, refuse_closed_over
from diffopt._diff.functions import Surroundings
from diffopt._rule import checks
from diffopt._tree import Tree
from diffopt.adjoint._base import Adjoint, GradientStep, Step
from diffopt.adjoint._limited import constant_in, first_order
from diffopt.adjoint.unrolled import Unrolled


@dataclass(frozen=True)
class Evolution(Adjoint):
    """Evolution strategies: the derivative is estimated from loops at perturbed inputs.

    For theta all inputs of the loop that need a gradient and f(theta) = <cotangents, outputs of
    the loop>, the vector-Jacobian product is the antithetic estimate

        1/(2 N sigma) sum_i eps_i (f(theta + sigma eps_i) - f(theta - sigma eps_i))

    with N samples eps_i of a standard normal distribution. It is unbiased for the gradient of the
    smoothed E f(theta + sigma eps), which is that of f itself where f is quadratic, and it exists
    for steps that have no derivative: with rounding, an argmax, a simulator. Its variance grows
    with the number of elements of theta; where the loop is chaotic it stays bounded as the outputs
    do, and exact derivatives explode. The loop's values are those at theta. The backward pass runs
    the loop 2 N times, without a graph; memory is that of the loops of `chunk_size` pairs.

    With `persistent=K` a loop of T steps is cut into truncations of K steps. Each of the N pairs of
    particles keeps its carries from one truncation tau to the next and is perturbed afresh in each:

        1/(2 N sigma) sum_i sum_tau xi_{i,tau} (L_{i,tau}^+ - L_{i,tau}^-),
        xi_{i,tau} = sum_{tau' <= tau} eps_{i,tau'}

    for losses L_tau that the outputs of truncation tau add to f. It is unbiased too; how the
    variances compare depends on the loop. For an outer optimizer that acts after every truncation,
    see `PersistentEvolution`.

    Estimates reach the initial parameters, state and buffers, every tensor hyperparameter, the
    loss's arguments and the batches, each perturbed with the same sigma as it enters the loop; a
    learning rate near 1e-3 wants another sigma than weights do: `smooth` perturbs what you give it,
    before it becomes a learning rate. One tensor at several places has one perturbation. Tensors
    that the loss closes over cannot be reached: that raises. All loops see the same random numbers,
    and under vmap all examples the same perturbations. With `tol` they take no more steps than the
    loop at theta does.

    It works in reverse mode, and once: a second derivative of an estimate raises, but not that of a
    vector-Jacobian product by its vector. Forward mode and torch.compile raise.

    Args:
        samples: the number N of antithetic pairs, >= 1.
        sigma: the standard deviation of perturbations, > 0.
        persistent: the number K of steps in a truncation; None takes the whole loop as one.
        generator: where perturbations come from, torch's default generator if None. Each loop
            draws anew; calling backward twice on the same loop repeats the estimate.
        chunk_size: how many pairs are run at once, by torch.func.vmap: faster, in that many times
            the memory, for steps that vmap can batch.

    Raises:
        ValueError: an argument is out of its range; `run`: the step closes over a tensor that needs
            a gradient.
        TypeError: `generator` is no torch.Generator.
        NotImplementedError: in forward mode, under torch.compile, for a second derivative.

    Example:
        >>> import torch, diffopt
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> opt = diffopt.sgd()
        >>> noise = torch.Generator().manual_seed(0)
        >>> sol = diffopt.minimize(
        ...     lambda w: 0.5 * w**2, torch.tensor(1.0), optimizer=opt,
        ...     hparams=opt.hparams(lr=lr), steps=2,
        ...     adjoint=diffopt.adjoint.Evolution(samples=200, sigma=0.01, generator=noise),
        ... )
        >>> (grad,) = torch.autograd.grad(sol.params, lr)
        >>> bool((grad + 1.8).abs() < 0.5)  # exact: -2 (1 - lr)
        True

    Sources: Salimans et al., "Evolution strategies as a scalable alternative to reinforcement
    learning", 2017; Vicol, Metz and Sohl-Dickstein, "Unbiased gradient estimation in unrolled
    computation graphs with persistent evolution strategies", 2021.
    """

    samples: int = 16
    sigma: float = 0.01
    persistent: int | None = None
    generator: torch.Generator | None = None
    chunk_size: int = 1

    def __post_init__(self) -> None:
        _check(self.samples, self.sigma, self.generator, self.chunk_size)
        if self.persistent is not None:
            _check_count("persistent", self.persistent)

    def run(self, step: Step, carry: Tree, args: Tree, xs: Iterable[Any]) -> tuple[Tree, list[Any]]:
        xs = list(xs)
        if not _modes.differentiable() or not xs:
            return Unrolled().run(step, carry, args, xs)
        if _modes.compiling() or _modes.forward_differentiated():
            raise NotImplementedError("Evolution works neither in forward mode nor when compiled")
        for name, tree in (("carry", carry), ("args", args), ("xs", xs)):
            checks.undistributed(tree, name, "Evolution")
        refuse_closed_over("the loss or step", step, carry, args, xs[0])
        start, whole = carry, step
        if isinstance(step, GradientStep):
            step = replace(step, second_order=False)
        tensors, join = _distinct((carry, args, xs))
        truncations = _truncations(tensors, carry, args, xs, self.persistent or len(xs))
        surroundings = Surroundings((carry, args, xs))

        def loop(tensors: Tree) -> tuple[list[Any], Tree]:
            carry, outputs = Unrolled().run(step, *join(tensors))
            return outputs, carry

        def advance(
            start: int, stop: int, carry: Tree, tensors: Sequence[Tensor]
        ) -> tuple[Tree, list[Tensor]]:
            first, args, xs = join(tensors)
            carry = carry if start else first
            carry, outputs = Unrolled().run(step, carry, args, xs[start:stop])
            return carry, _tree.split((outputs, carry if stop == len(xs) else ()))[0]

        def of_pair(
            noise: Iterable[dict[int, Tensor]], inputs: list[Tensor], cotangents: list[Tensor]
        ) -> dict[int, Tensor]:
            surroundings.restore()
            pair, rest, gradient = _START, iter(cotangents), dict[int, Tensor]()
            for (start, stop, _), fresh in zip(truncations, noise, strict=True):
                run = functools.partial(advance, start, stop)
                pair, ahead, behind = _advance(run, pair, inputs, fresh, self.sigma, join(inputs))
                vectors = [next(rest) for _ in ahead]
                difference = _product(vectors, ahead, behind)
                gradient = _plus(gradient, _terms(pair, difference, self.samples, self.sigma))
            return gradient

        def estimate(
            inputs: list[Tensor], needed: Sequence[bool], cotangents: list[Tensor]
        ) -> list[Tensor | None]:
            def noise(seed: int) -> Iterator[dict[int, Tensor]]:
                normal = _Normal(seed)
                for _, _, entering in truncations:
                    yield {i: normal(inputs[i]) for i in entering if needed[i]}

            gradient = dict[int, Tensor]()
            for chunk in _chunks(seeds, self.chunk_size):
                drawn = [noise(seed) if len(chunk) == 1 else list(noise(seed)) for seed in chunk]
                for terms in _each(lambda n: of_pair(n, inputs, cotangents), drawn):
                    gradient = _plus(gradient, terms)
            return [gradient[i].to(x.dtype) if needed[i] else None for i, x in enumerate(inputs)]

        def pullback(
            inputs: Sequence[Tensor], needed: Sequence[bool], cotangents: Sequence[Tensor]
        ) -> list[Tensor | None]:
            def of_cotangents(trees: Tree) -> list[Tensor | None]:
                return estimate(trees[0], needed, trees[1])

            with surroundings.restored():  # linear in the cotangents, by which it has a derivative
                frozen = _tree.detach(list(inputs))
                grads = functions.recomputed(of_cotangents, (frozen, list(cotangents)))
            return [g if g is None else constant_in(g, inputs, _NO_SECOND) for g in grads]

        outputs, carry = functions.custom(loop, tensors, pullback)
        # Only now, so that the loop sees the random numbers that it sees under every adjoint.
        seeds = _seeds(self.samples, self.generator)
        if isinstance(whole, GradientStep):
            carry = *carry[:2], detach_constants(carry[2], whole, start, args, xs)
        return carry, outputs


def smooth(
    function: Callable[[Tree], Any],
    *,
    samples: int = 16,
    sigma: float = 0.1,
    generator: torch.Generator | None = None,
    chunk_size: int = 1,
) -> Callable[[Tree], Tensor]:
    """Make any function differentiable, by smoothing it with a normal distribution.

    Computes the estimate 1/(2 N) sum_i f(theta + sigma eps_i) + f(theta - sigma eps_i) of the
    smoothed E f(theta + sigma eps), with N samples eps_i of a standard normal distribution. Its
    derivative is the antithetic estimate

        1/(2 N sigma) sum_i eps_i (f(theta + sigma eps_i) - f(theta - sigma eps_i))

    which is unbiased for the derivative of the smoothed function, whether f has one or not. Both
    are made in one pass of 2 N calls without a graph, so that f may be an outer loss that has no
    derivative, such as the accuracy after an inner loop, or a simulator that leaves torch.

    Args:
        function: `function(theta)` returns a real 0-d tensor or a number. All its calls see the
            same random numbers.
        samples: the number N of antithetic pairs, >= 1.
        sigma: the standard deviation of perturbations, > 0.
        generator: where perturbations come from, torch's default generator if None.
        chunk_size: how many pairs are run at once, by torch.func.vmap, which `function` must allow.

    Returns:
        A function of theta, a tree of floating-point or complex tensors. It can be differentiated
        once, in reverse and forward mode, under autograd and under torch.func transforms. Under
        vmap all examples have the same perturbations.

    Raises:
        ValueError: an argument is out of its range; when called: theta is no tree of
            floating-point or complex tensors, or `function` closes over a tensor that needs a
            gradient (which is not found where it disables gradients itself).
        TypeError: `function` is none, or `generator` is no torch.Generator; when called: `function`
            does not return a real 0-d tensor or a number.
        NotImplementedError: for a second derivative.

    Example:
        >>> import torch, diffopt
        >>> noise = torch.Generator().manual_seed(0)
        >>> sign = diffopt.adjoint.smooth(torch.sign, samples=1000, sigma=1.0, generator=noise)
        >>> theta = torch.tensor(0.5, requires_grad=True)
        >>> (grad,) = torch.autograd.grad(sign(theta), theta)
        >>> bool((grad - 0.7041).abs() < 0.1)  # 2 / sqrt(2 pi) exp(-theta^2 / 2)
        True

    Source: Nesterov and Spokoiny, "Random gradient-free minimization of convex functions", 2017.
    """

    def run(carry: Tree, theta: Tree) -> tuple[Tree, Any]:
        return carry, function(theta)

    _check_function(function)
    particles = PersistentEvolution(run, samples, sigma, generator, chunk_size)

    def smoothed(theta: Tree) -> Tensor:
        return particles._mean([_START] * samples, theta, (), lambda pair: None)

    return smoothed


class Pair(NamedTuple):
    """Two particles whose perturbations have opposite signs.

    Attributes:
        ahead: the carry of the one that is perturbed by +sigma eps.
        behind: the carry of the one that is perturbed by -sigma eps.
        total: the sum xi of all eps so far, by the number of the leaf of theta.
    """

    ahead: Tree
    behind: Tree
    total: dict[int, Tensor]


@dataclass(frozen=True)
class PersistentEvolution:
    """Persistent evolution strategies: learn from a long loop truncation by truncation.

    A truncation is a function `carry, loss = function(carry, theta, *args)`. This object is one as
    well, `state, loss = pes(state, theta, *args)`, for N pairs of particles with carries of their
    own: the loss is their mean, and its derivative by theta is the estimate

        1/(2 N sigma) sum_i xi_i (L_i^+ - L_i^-)

    where xi_i is the sum of all the perturbations eps_i that pair i has seen since `init`, one for
    each truncation. Summed over the truncations of a loop it is unbiased for the gradient of the
    sum of their losses, smoothed, where the derivative of each truncation alone misses what
    theta did through the carry it began with. An outer optimizer can act on theta after each
    truncation, with the bias that any such online method has.

    Args:
        function: `function(carry, theta, *args)` returns the next carry and a real 0-d tensor or a
            number; it needs no derivative, and is called without a graph. All its calls for
            one pair see the same random numbers.
        samples: the number N of antithetic pairs, >= 1.
        sigma: the standard deviation of perturbations, > 0.
        generator: where perturbations come from, torch's default generator if None.
        chunk_size: how many pairs are run at once, by torch.func.vmap, which `function` must allow.

    Raises:
        ValueError: an argument is out of its range; when called: theta is no tree of
            floating-point or complex tensors, `state` is not that of as many samples, or `function`
            depends on a tensor that needs a gradient and is not in theta.
        TypeError: `function` is none, or `generator` is no torch.Generator; when called: `function`
            does not return a carry and a real 0-d tensor or number.
        NotImplementedError: for a second derivative.

    Example:
        >>> import torch, diffopt
        >>> inner, outer = diffopt.sgd(), diffopt.adam()
        >>> def truncation(w, log_lr):
        ...     sol = diffopt.minimize(
        ...         lambda w: 0.5 * w**2, w, optimizer=inner,
        ...         hparams=inner.hparams(lr=log_lr.exp()), steps=5, adjoint=None,
        ...     )
        ...     return sol.params, sol.losses.sum()
        >>> noise = torch.Generator().manual_seed(0)
        >>> pes = diffopt.adjoint.PersistentEvolution(truncation, generator=noise)
        >>> log_lr = torch.tensor(-4.0, requires_grad=True)
        >>> state, meta_state = pes.init(torch.tensor(1.0)), outer.init(log_lr)
        >>> for _ in range(10):
        ...     state, loss = pes(state, log_lr)
        ...     (grad,) = torch.autograd.grad(loss, log_lr)
        ...     log_lr, meta_state = outer.update(log_lr, grad, meta_state, outer.hparams(lr=0.1))
        ...     log_lr, meta_state = diffopt.detach((log_lr, meta_state))
        ...     log_lr.requires_grad_() and None
        >>> bool(log_lr > -3.5)
        True

    Source: Vicol, Metz and Sohl-Dickstein, "Unbiased gradient estimation in unrolled computation
    graphs with persistent evolution strategies", 2021, algorithm 2.
    """

    function: Callable[..., Any]
    samples: int = 16
    sigma: float = 0.1
    generator: torch.Generator | None = None
    chunk_size: int = 1

    def __post_init__(self) -> None:
        _check_function(self.function)
        _check(self.samples, self.sigma, self.generator, self.chunk_size)

    def init(self, carry: Tree) -> tuple[Pair, ...]:
        """All particles at the start of a loop, with this carry."""
        carry = _tree.detach(carry)
        return tuple(Pair(carry, carry, {}) for _ in range(self.samples))

    def __call__(
        self, state: tuple[Pair, ...], theta: Tree, *args: Any
    ) -> tuple[tuple[Pair, ...], Tensor]:
        """Run one truncation of every particle: the next state, and the differentiable loss."""
        if len(state) != self.samples:
            raise ValueError(f"state has {len(state)} pairs, but samples is {self.samples}")
        pairs: list[Pair] = []
        value = self._mean(state, theta, args, pairs.append)
        return tuple(pairs), value

    def _mean(
        self, pairs: Sequence[Pair], theta: Tree, args: tuple[Any, ...], keep: Callable[[Pair], Any]
    ) -> Tensor:
        """The mean loss of pairs of particles; `keep` takes each of them after its run."""
        if _modes.compiling():
            raise NotImplementedError("evolution strategies cannot be compiled")
        _check_theta(theta)
        tensors, join = _distinct(theta)
        frozen, around = _tree.detach(tensors), (pairs[0], theta, args)
        surroundings, normal = Surroundings(around), _Normal(*_seeds(1, self.generator))

        def run(carry: Tree, tensors: Sequence[Tensor]) -> tuple[Tree, Tensor]:
            return _check_result(self.function(carry, join(tensors), *args))

        def of_pair(call: tuple[Pair, dict[int, Tensor]]) -> tuple[Pair, Tensor, Tensor]:
            surroundings.restore()
            return _advance(run, call[0], frozen, call[1], self.sigma, around)

        if torch.is_grad_enabled():
            refuse_closed_over("function, at a theta held fixed,", run, pairs[0].ahead, frozen)
        value, gradient = torch.zeros(()), dict[int, Tensor]()
        for chunk in _chunks(pairs, self.chunk_size):
            calls = [(pair, {i: normal(x) for i, x in enumerate(frozen)}) for pair in chunk]
            for pair, fresh in calls:
                _check_total(pair.total, fresh)
            for pair, ahead, behind in _each(of_pair, calls):
                value = value + (ahead + behind) / (2 * self.samples)
                difference = _modes.exact(ahead - behind)
                gradient = _plus(gradient, _terms(pair, difference, self.samples, self.sigma))
                keep(pair)
        for i, grad in gradient.items():
            value = value + (grad.conj() * (tensors[i] - frozen[i])).real.sum()
        return first_order(value, _NO_SECOND)


_START = Pair((), (), {})

_NO_SECOND = "an estimate by evolution strategies has no second derivative"

_Run: TypeAlias = Callable[[Tree, Sequence[Tensor]], tuple[Tree, Any]]
"""`(carry, tensors of theta) -> (carry, outputs)`"""


def _advance(
    run: _Run,
    pair: Pair,
    theta: Sequence[Tensor],
    fresh: dict[int, Tensor],
    sigma: float,
    around: Tree,
) -> tuple[Pair, Any, Any]:
    """A pair after a run at theta with fresh perturbations, and the outputs of both particles.

    Both see the same random numbers; `around` holds the generators of those.
    """

    def at(sign: int) -> list[Tensor]:
        moved = {i: (theta[i] + sign * sigma * eps).to(theta[i].dtype) for i, eps in fresh.items()}
        return [moved.get(i, x) for i, x in enumerate(theta)]

    surroundings = Surroundings(around)
    with torch.no_grad():
        ahead, up = _tree.detach(run(pair.ahead, at(1)))
        surroundings.restore()
        behind, down = _tree.detach(run(pair.behind, at(-1)))
    return Pair(ahead, behind, _plus(pair.total, fresh)), up, down


def _each(function: Callable[[Any], Tree], arguments: Sequence[Any]) -> list[Tree]:
    """`function` of each of the arguments; of several at once, by vmap."""
    if len(arguments) == 1:
        return [function(arguments[0])]
    _, join = _tree.split(arguments[0])
    columns = zip(*(_tree.split(argument)[0] for argument in arguments), strict=True)
    joins: list[Callable[..., Tree]] = []

    def tensors(*xs: Tensor) -> list[Tensor]:
        results, join_results = _tree.split(function(join(xs)))
        joins.append(join_results)
        return results

    batched = torch.func.vmap(tensors, randomness="same")
    results = batched(*(torch.stack(column) for column in columns))
    return [joins[0](row) for row in zip(*results, strict=True)]


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _plus(mine: dict[int, Tensor], others: dict[int, Tensor]) -> dict[int, Tensor]:
    """The sum, where an entry that is missing is zero."""
    return mine | {i: mine[i] + x if i in mine else x for i, x in others.items()}


def _terms(pair: Pair, difference: Tensor, samples: int, sigma: float) -> dict[int, Tensor]:
    """What a pair adds to the estimate: xi (L^+ - L^-) / (2 N sigma)."""
    weight = difference / (2 * samples * sigma)
    return {i: (xi * weight).to(xi.dtype) for i, xi in pair.total.items()}


class _Normal:
    """Standard normal noise: always the same from one seed, so that it need not be kept."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, like: Tensor) -> Tensor:
        device, shape = like.device, like.shape
        dtype = torch.promote_types(like.dtype, torch.float32)  # sums of many are made of them
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        with _outside_of_vmap():
            noise = torch.randn(
                shape, generator=self.generators[device], dtype=dtype, device=device
            )
            return noise * math.sqrt(2) if dtype.is_complex else noise  # each part of variance 1


@contextlib.contextmanager
def _outside_of_vmap() -> Generator[None]:
    """Where random numbers can be drawn, that of torch.autograd.grad(is_grads_batched) included."""
    key: Any = _torch.dispatch_key("VmapMode")
    keys = _torch.DispatchKeySet(key)
    with _torch.outside_transforms(), _torch.without_dispatch_keys(keys):
        yield


def _seeds(count: int, generator: torch.Generator | None) -> list[int]:
    device = "cpu" if generator is None else generator.device
    with _outside_of_vmap():
        return torch.randint(2**63 - 1, (count,), generator=generator, device=device).tolist()


def _product(
    vectors: Sequence[Tensor], ahead: Sequence[Tensor], behind: Sequence[Tensor]
) -> Tensor:
    """The scalar product of vectors and differences."""
    terms = [
        _modes.exact((v.conj() * (a - b)).real.sum())
        for v, a, b in zip(vectors, ahead, behind, strict=True)
        if functions.has_derivative(a)
    ]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def _distinct(tree: Tree) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Tree]]:
    """As `_tree.split`, but with a tensor that stands at several places once."""
    tensors, join = _tree.split(tree)
    distinct = {id(x): x for x in tensors}
    number = {key: i for i, key in enumerate(distinct)}
    places = [number[id(x)] for x in tensors]
    return list(distinct.values()), lambda values: join([values[i] for i in places])


def _truncations(
    tensors: Sequence[Tensor], carry: Tree, args: Tree, xs: list[Any], size: int
) -> list[tuple[int, int, list[int]]]:
    """Of each truncation its first step and its end, and the numbers of tensors that enter there.

    Those are arguments, what its steps bring, and the initial carry in the first.
    """
    number = {id(x): i for i, x in enumerate(tensors)}
    result: list[tuple[int, int, list[int]]] = []
    for start in range(0, len(xs), size):
        stop = min(start + size, len(xs))
        entering = _tree.split((() if start else carry, args, xs[start:stop]))[0]
        result.append((start, stop, sorted({number[id(x)] for x in entering})))
    return result


def _check(samples: int, sigma: float, generator: torch.Generator | None, chunk_size: int) -> None:
    _check_count("samples", samples)
    _check_count("chunk_size", chunk_size)
    if not isinstance(sigma, (int, float)) or not 0 < sigma < math.inf:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"sigma is {sigma!r}, but must be a number > 0")
    if generator is not None and not isinstance(generator, torch.Generator):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"generator is {_tree.describe(generator)}, not a torch.Generator")


def _check_function(function: Any) -> None:
    if not callable(function):
        raise TypeError(f"function is {_tree.describe(function)}, not a function")


def _check_count(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}, but must be an integer >= 1")


def _check_theta(theta: Tree) -> None:
    leaves = _tree.leaves(theta)
    if not leaves:
        raise ValueError("theta has no leaves: there is nothing to perturb")
    for leaf, path in zip(leaves, _tree.paths(theta, "theta"), strict=True):
        if not isinstance(leaf, Tensor):
            raise ValueError(f"{path} is {_tree.describe(leaf)}, not a tensor")
        if not functions.has_derivative(leaf):
            raise ValueError(f"{path} has dtype {leaf.dtype}, which cannot be perturbed")


def _check_result(result: Any) -> tuple[Tree, Tensor]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"function must return (carry, loss), not {_tree.describe(result)}")
    carry, loss = result
    if isinstance(loss, numbers.Real):
        return carry, torch.tensor(float(loss), dtype=torch.float64)
    if not isinstance(loss, Tensor) or loss.dim() != 0 or loss.is_complex():
        raise TypeError(
            f"the loss must be a real 0-d tensor or a number, not {_tree.describe(loss)}"
        )
    return carry, loss if loss.is_floating_point() else _modes.exact(loss)


def _check_total(total: dict[int, Tensor], fresh: dict[int, Tensor]) -> None:
    mine, theirs = ([tuple(x.shape) for x in xs.values()] for xs in (fresh, total))
    if theirs and mine != theirs:
        raise ValueError(f"theta has tensors of shapes {mine}, but those in state are {theirs}")
