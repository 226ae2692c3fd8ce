"""Persistent evolution strategies: learn from a long loop truncation by truncation."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._arguments import check_function, check_result
from diffopt._diff.captured import refuse_closed_over
from diffopt._diff.functions import AmbientState
from diffopt._tree import Tree
from diffopt.adjoint._limited import first_order
from diffopt.adjoint._particles import (
    NO_SECOND,
    Normal,
    Pair,
    advance,
    check_sampling,
    each,
    plus,
    seeds,
    split_distinct,
    terms,
)


@dataclass(frozen=True)
class PersistentEvolution:
    """Persistent evolution strategies: learn from a long loop truncation by truncation.

    A truncation is a function `carry, loss = function(carry, theta, *args)`. This object is such a
    function too, `state, loss = pes(state, theta, *args)`, for N pairs of particles with their own
    carries: the loss is their mean, and its derivative with respect to theta is the estimate

        1/(2 N sigma) sum_i xi_i (L_i^+ - L_i^-)

    where xi_i is the sum of all perturbations eps_i of pair i since `init`, one per truncation.
    Summed over the truncations of a loop it is unbiased for the gradient of the sum of their
    smoothed losses, while the derivative of each truncation alone misses the effect of theta on the
    carry it began with. An outer optimizer can update theta after each truncation, with the bias
    that any such online method has.

    Args:
        function: `function(carry, theta, *args)` returns the next carry and a real 0-d tensor or a
            number; it need not be differentiable, and is called without a graph. Both its calls for
            a pair use the same random numbers.
        samples: the number N of antithetic pairs, >= 1.
        sigma: the standard deviation of perturbations, > 0.
        generator: the source of perturbations, torch's default generator if None.
        chunk_size: how many pairs are run at once, by torch.func.vmap, which `function` must
            support.

    Raises:
        ValueError: an argument is out of range; when called: theta is not a tree of floating-point
            or complex tensors, `state` is for another number of samples, or `function` depends on a
            tensor that needs a gradient and is not in theta.
        TypeError: `function` is not a function, or `generator` is not a torch.Generator; when
            called: `function` does not return a carry and a real 0-d tensor or number.
        NotImplementedError: for a second derivative.

    Examples:
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
        check_function(self.function, "function")
        check_sampling(self.samples, self.sigma, self.generator, self.chunk_size)

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
        value = mean_loss(self, state, theta, args, pairs.append)
        return tuple(pairs), value


def mean_loss(
    settings: PersistentEvolution,
    pairs: Sequence[Pair],
    theta: Tree,
    args: tuple[Any, ...],
    keep: Callable[[Pair], object],
) -> Tensor:
    """The mean loss of pairs of particles; `keep` receives each pair after its run."""
    if _modes.compiling():
        raise NotImplementedError("evolution strategies do not work under torch.compile")
    _check_theta(theta)
    tensors, join = split_distinct(theta)
    frozen, inputs = _tree.detach(tensors), (pairs[0], theta, args)
    normal = Normal(*seeds(1, settings.generator))
    ambient = AmbientState(inputs)  # after the seed, which restoring it must not bring back

    def run(carry: Tree, tensors: Sequence[Tensor]) -> tuple[Tree, Tensor]:
        return _check_result(settings.function(carry, join(tensors), *args))

    def of_pair(call: tuple[Pair, dict[int, Tensor]]) -> tuple[Pair, Tensor, Tensor]:
        ambient.restore()
        return advance(run, call[0], frozen, call[1], settings.sigma, inputs)

    if torch.is_grad_enabled():
        refuse_closed_over("function (with theta held fixed)", run, pairs[0].ahead, frozen)
    value, gradient = torch.zeros((), device="cpu"), dict[int, Tensor]()
    for pair in pairs:
        _check_total(pair.total, frozen)
    calls = ((pair, {i: normal(x) for i, x in enumerate(frozen)}) for pair in pairs)
    for pair, ahead, behind in each(of_pair, calls, settings.chunk_size):
        value = value + (ahead + behind) / (2 * len(pairs))
        difference = _modes.exact(ahead - behind)
        gradient = plus(gradient, terms(pair, difference, len(pairs), settings.sigma))
        keep(pair)
    for i, grad in gradient.items():
        value = value + (grad.conj() * (tensors[i] - frozen[i])).real.sum()
    return first_order(value, NO_SECOND)


def _check_theta(theta: Tree) -> None:
    leaves = _tree.named(theta, "theta")
    if not leaves:
        raise ValueError("theta has no leaves: there is nothing to perturb")
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise ValueError(f"{path} is {_tree.describe(leaf)}, not a tensor")
        if not _modes.has_derivative(leaf):
            raise ValueError(f"{path} has dtype {leaf.dtype}, which cannot be perturbed")


def _check_result(result: Any) -> tuple[Tree, Tensor]:
    carry, loss = check_result(result, "function", "carry", "loss")
    if isinstance(loss, numbers.Real):
        return carry, _modes.tensor_of(float(loss))
    if not isinstance(loss, Tensor) or loss.dim() != 0 or loss.is_complex():
        raise TypeError(
            f"the loss must be a real 0-d tensor or a number, not {_tree.describe(loss)}"
        )
    return carry, loss if loss.is_floating_point() else _modes.exact(loss)


def _check_total(total: dict[int, Tensor], theta: Sequence[Tensor]) -> None:
    mine, theirs = ([tuple(x.shape) for x in xs] for xs in (theta, total.values()))
    if theirs and mine != theirs:
        raise ValueError(f"theta has tensors of shapes {mine}, but those in state are {theirs}")
