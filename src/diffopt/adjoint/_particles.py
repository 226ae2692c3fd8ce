"""Pairs of particles with opposite perturbations, the basis of evolution strategies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import _torch, _tree
from diffopt._arguments import check_integer, check_number, check_type
from diffopt._diff.functions import AmbientState, Flat, replaced
from diffopt._tree import Tree

NO_SECOND = "an estimate by evolution strategies has no second derivative"


class Pair(NamedTuple):
    """Two particles with perturbations of opposite signs.

    Attributes:
        ahead: the carry of the particle perturbed by +sigma eps.
        behind: the carry of the particle perturbed by -sigma eps.
        total: the sum xi of all eps so far, by the index of each perturbed tensor.
    """

    ahead: Tree
    behind: Tree
    total: dict[int, Tensor]


START = Pair((), (), {})


def advance(
    run: Callable[[Tree, Sequence[Tensor]], tuple[Tree, Any]],
    pair: Pair,
    theta: Sequence[Tensor],
    fresh: dict[int, Tensor],
    sigma: float,
    inputs: Tree,
) -> tuple[Pair, Any, Any]:
    """A pair after a run at theta with fresh perturbations, and the outputs of both particles.

    Both use the same random numbers, from the generators among `inputs` and torch's own.
    """

    def at(sign: int) -> list[Tensor]:
        moved = [(theta[i] + sign * sigma * eps).to(theta[i].dtype) for i, eps in fresh.items()]
        return replaced(theta, fresh, moved)

    ambient = AmbientState(inputs)
    with torch.no_grad():
        ahead, up = _tree.detach(run(pair.ahead, at(1)))
        ambient.restore()
        behind, down = _tree.detach(run(pair.behind, at(-1)))
    return Pair(ahead, behind, plus(pair.total, fresh)), up, down


def each(function: Callable[[Any], Tree], items: Iterable[Any], size: int) -> Iterator[Tree]:
    """`function` of each of the items; of `size` of them at once, by vmap, if that is above 1."""
    rest = iter(items)
    while chunk := list(itertools.islice(rest, size)):
        if len(chunk) == 1:
            yield function(chunk[0])
            continue
        flat = Flat(function, _tree.split(chunk[0])[1])
        columns = zip(*(_tree.tensors(item) for item in chunk), strict=True)
        results = torch.func.vmap(flat, randomness="same")(*map(torch.stack, columns))
        yield from map(flat.join, zip(*results, strict=True))


def plus(mine: dict[int, Tensor], others: dict[int, Tensor]) -> dict[int, Tensor]:
    """The sum; missing entries count as zero."""
    return mine | {i: mine[i] + x if i in mine else x for i, x in others.items()}


def terms(pair: Pair, difference: Tensor, samples: int, sigma: float) -> dict[int, Tensor]:
    """The contribution of a pair to the estimate: xi (L^+ - L^-) / (2 N sigma)."""
    weight = difference / (2 * samples * sigma)
    return {i: (xi * weight).to(xi.dtype) for i, xi in pair.total.items()}


class Normal:
    """Standard normal noise, determined by a seed, so that it need not be stored."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, like: Tensor) -> Tensor:
        device = like.device
        dtype = torch.promote_types(like.dtype, torch.float32)  # many of them are summed
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        generator = self.generators[device]
        # Random numbers are drawn outside every vmap, even that of is_grads_batched.
        with _torch.outside_transforms(), _torch.outside_gradient_batch():
            noise = torch.randn(like.shape, generator=generator, dtype=dtype, device=device)
            return noise * math.sqrt(2) if dtype.is_complex else noise  # each part of variance 1


def seeds(count: int, generator: torch.Generator | None) -> list[int]:
    """Seeds for `Normal`, drawn from this generator or torch's default one."""
    device = "cpu" if generator is None else generator.device
    with _torch.outside_transforms(), _torch.outside_gradient_batch():
        return torch.randint(2**63 - 1, (count,), generator=generator, device=device).tolist()


def split_distinct(tree: Tree) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Tree]]:
    """Like `_tree.split`, but a tensor that occurs several times is listed once."""
    tensors, join = _tree.split(tree)
    distinct = {id(x): x for x in tensors}
    number = {key: i for i, key in enumerate(distinct)}
    places = [number[id(x)] for x in tensors]
    return list(distinct.values()), lambda values: join([values[i] for i in places])


def check_sampling(samples: int, sigma: float, generator: Any, chunk_size: int) -> None:
    """Raise if an argument shared by all evolution strategies is out of range."""
    check_integer(samples, "samples", 1)
    check_integer(chunk_size, "chunk_size", 1)
    check_number(sigma, "sigma", positive=True)
    check_type(generator, (torch.Generator, type(None)), "generator", "a torch.Generator")
