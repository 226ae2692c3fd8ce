"""Derivatives of a loop estimated from values alone, by evolution strategies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._arguments import check_integer
from diffopt._diff import functions
from diffopt._diff.captured import detach_constants, refuse_closed_over
from diffopt._diff.functions import AmbientState
from diffopt._diff.unmodified import kept
from diffopt._rule import checks
from diffopt._tree import Tree
from diffopt.adjoint._base import Adjoint, GradientStep, Step
from diffopt.adjoint._limited import constant_in
from diffopt.adjoint._particles import (
    NO_SECOND,
    START,
    Normal,
    advance,
    check_sampling,
    each,
    plus,
    seeds,
    split_distinct,
    terms,
)
from diffopt.adjoint.unrolled import Unrolled


@dataclass(frozen=True)
class Evolution(Adjoint):
    """Evolution strategies: the derivative is estimated from loops with perturbed inputs.

    With theta all inputs of the loop that need a gradient, and f(theta) the inner product of the
    cotangents and the outputs, the vector-Jacobian product is the antithetic estimate

        1/(2 N sigma) sum_i eps_i (f(theta + sigma eps_i) - f(theta - sigma eps_i))

    with N standard normal samples eps_i. It is unbiased for the gradient of the smoothed function
    E f(theta + sigma eps), which equals that of f if f is quadratic, and it exists for steps that
    are not differentiable: with rounding, an argmax, a simulator. Its variance grows with the
    number of elements of theta; for a chaotic loop it stays as bounded as the outputs, while exact
    derivatives explode. The loop's values are those at theta. The backward pass runs the loop 2 N
    times, without a graph; memory is that of the loops of `chunk_size` pairs.

    With `persistent=K` a loop of T steps is cut into truncations of K steps. Each of the N pairs of
    particles keeps its carries from one truncation tau to the next and gets a new perturbation in
    each:

        1/(2 N sigma) sum_i sum_tau xi_{i,tau} (L_{i,tau}^+ - L_{i,tau}^-),
        xi_{i,tau} = sum_{tau' <= tau} eps_{i,tau'}

    where L_tau is the contribution to f of the outputs of truncation tau. It is unbiased too; how
    the variances compare depends on the loop. For an outer optimizer that acts after every
    truncation, see `PersistentEvolution`.

    There are estimates with respect to the initial params, state and buffers, every tensor
    hyperparameter, the loss's arguments and the batches, each perturbed with the same sigma as it
    enters the loop. Since a learning rate near 1e-3 needs another sigma than weights do,
    parametrize it (by its logarithm, say) and use `smooth`, which perturbs its own argument. A
    tensor that occurs several times has a single perturbation. Tensors that need a gradient and
    that the loss closes over raise. All loops use the same random numbers, and under vmap all
    examples have the same perturbations. With `tol` they take no more steps than the loop at theta.

    It is differentiable once, in reverse mode: a second derivative of an estimate raises, but not
    that of a vector-Jacobian product with respect to its vector. Forward mode and torch.compile
    raise.

    Args:
        samples: the number N of antithetic pairs, >= 1.
        sigma: the standard deviation of perturbations, > 0.
        persistent: the number K of steps in a truncation; None for a single truncation.
        generator: the source of perturbations, torch's default generator if None. Each loop draws
            new ones; calling backward twice on the same loop repeats the estimate.
        chunk_size: how many pairs are run at once, by torch.func.vmap: faster, at that many times
            the memory, for steps that vmap can batch.

    Raises:
        ValueError: an argument is out of range; `run`: the step closes over a tensor that needs a
            gradient.
        TypeError: `generator` is not a torch.Generator.
        NotImplementedError: in forward mode, under torch.compile, for a second derivative.

    Examples:
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
        check_sampling(self.samples, self.sigma, self.generator, self.chunk_size)
        if self.persistent is not None:
            check_integer(self.persistent, "persistent", 1)

    def run(self, step: Step, carry: Tree, args: Tree, xs: Iterable[Any]) -> tuple[Tree, list[Any]]:
        if not _modes.differentiable():
            return Unrolled().run(step, carry, args, xs)
        xs = kept(xs)
        if not xs:
            return carry, []
        if _modes.compiling() or _modes.forward_differentiated():
            raise NotImplementedError(
                "Evolution works neither in forward mode nor under torch.compile"
            )
        for name, tree in (("carry", carry), ("args", args), ("xs", xs)):
            checks.undistributed(tree, name, "Evolution")
        refuse_closed_over("the loss or step", step, carry, args, xs[0])
        start, whole = carry, step
        if isinstance(step, GradientStep):
            step = replace(step, second_order=False)
        tensors, join = split_distinct((carry, args, xs))
        size = self.persistent or len(xs)
        loops = _Loops(self, step, join, size, AmbientState((carry, args, xs)), [])
        outputs, carry = functions.custom(loops.at, tensors, loops.pullback)
        # Only now, so that the loop uses the same random numbers as under every other adjoint.
        loops.seeds.extend(seeds(self.samples, self.generator))
        if isinstance(whole, GradientStep):
            carry = *carry[:2], detach_constants(carry[2], whole, start, args, xs)
        return carry, outputs


@dataclass(frozen=True)
class _Loops:
    """The loop at theta, its tensors, and the pairs of loops at perturbed tensors.

    It does not hold the tensors; `join` builds the carry, args and xs from them.
    """

    settings: Evolution
    step: Step
    join: Callable[[Sequence[Tensor]], Tree]
    size: int  # of a truncation
    ambient: AmbientState
    seeds: list[int]  # of each pair's perturbations

    def at(self, theta: Sequence[Tensor]) -> tuple[list[Any], Tree]:
        """The outputs and the last carry at theta."""
        carry, outputs = Unrolled().run(self.step, *self.join(theta))
        return outputs, carry

    def pullback(
        self, inputs: Sequence[Tensor], needed: Sequence[bool], cotangents: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The estimate, linear in the cotangents and differentiable with respect to them only."""
        with self.ambient.restored():
            trees = _tree.detach(list(inputs)), list(cotangents)
            grads = functions.recomputed(lambda x: self.estimate(x[0], needed, x[1]), trees)
        return [g if g is None else constant_in(g, inputs, NO_SECOND) for g in grads]

    def estimate(
        self, theta: list[Tensor], needed: Sequence[bool], cotangents: list[Tensor]
    ) -> list[Tensor | None]:
        """The vector-Jacobian product, estimated from all pairs."""

        def noise(seed: int) -> Iterator[dict[int, Tensor]]:
            normal = Normal(seed)
            for entering in truncations:
                yield {i: normal(theta[i]) for i in entering if needed[i]}

        truncations = list(self.entering(theta))
        gradient = dict[int, Tensor]()
        size = self.settings.chunk_size
        drawn = (noise(seed) if size == 1 else list(noise(seed)) for seed in self.seeds)
        for part in each(lambda n: self.of_pair(n, theta, cotangents), drawn, size):
            gradient = plus(gradient, part)
        return [gradient[i].to(x.dtype) if needed[i] else None for i, x in enumerate(theta)]

    def of_pair(
        self, noise: Iterable[dict[int, Tensor]], theta: list[Tensor], cotangents: list[Tensor]
    ) -> dict[int, Tensor]:
        """One pair's contribution to the estimate, given its perturbations in each truncation."""
        self.ambient.restore()
        settings, pair, gradient = self.settings, START, dict[int, Tensor]()
        rest, inputs = iter(cotangents), self.join(theta)
        for number, fresh in enumerate(noise):
            run = functools.partial(self.run, number * self.size)
            pair, ahead, behind = advance(run, pair, theta, fresh, settings.sigma, inputs)
            vectors = [next(rest) for _ in ahead]
            difference = _product(vectors, ahead, behind)
            gradient = plus(gradient, terms(pair, difference, settings.samples, settings.sigma))
        return gradient

    def entering(self, theta: Sequence[Tensor]) -> Iterator[list[int]]:
        """Which tensors enter each truncation: its xs, args, and first of all the initial carry."""
        index = {id(x): i for i, x in enumerate(theta)}
        carry, args, xs = self.join(theta)
        for start in range(0, len(xs), self.size):
            trees = () if start else carry, args, xs[start : start + self.size]
            yield sorted({index[id(x)] for x in _tree.tensors(trees)})

    def run(self, start: int, carry: Tree, theta: Sequence[Tensor]) -> tuple[Tree, list[Tensor]]:
        """The carry after a truncation, and the loop's results that are computed there."""
        first, args, xs = self.join(theta)
        steps = xs[start : start + self.size]
        carry, outputs = Unrolled().run(self.step, carry if start else first, args, steps)
        last = start + self.size >= len(xs)
        return carry, _tree.tensors((outputs, carry if last else ()))


def _product(
    vectors: Sequence[Tensor], ahead: Sequence[Tensor], behind: Sequence[Tensor]
) -> Tensor:
    """The inner product of the vectors with the differences of outputs."""
    terms = [
        _modes.exact((v.conj() * (a - b)).real.sum())
        for v, a, b in zip(vectors, ahead, behind, strict=True)
        if _modes.has_derivative(a)
    ]
    return torch.stack(terms).sum() if terms else torch.zeros((), device="cpu")
