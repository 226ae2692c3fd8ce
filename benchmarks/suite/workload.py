"""What a workload is: a derivative of an inner loop, and programs that compute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Program = Callable[..., Any]
"""From the arrays of a problem, as tensors or as jax's arrays, to the derivatives."""


class Peer(NamedTuple):
    """One of the programs that compare themselves.

    Attributes:
        make: imports what it needs, and returns the program for a number of steps.
        library: whose arrays it takes, "torch" or "jax".
        compiles: whether it compiles; a second process then shows what a warm cache saves.
    """

    make: Callable[[int], Program]
    library: str
    compiles: bool


@dataclass(frozen=True)
class Workload:
    """A derivative that several libraries compute.

    Attributes:
        title: for tables and plots.
        problem: makes the arrays of a problem, of full size or (`smoke`) tiny.
        steps: of the inner loop.
        tolerance: the relative error, from rounding in float32, of a right result.
        reference: makes the program whose result in float64 is the truth; the first peer if None.
        peers: the programs by name; what comes before the first comma is the library. The first
            one's time is the unit.
    """

    title: str
    problem: Callable[[np.random.Generator, bool], tuple[Any, ...]]
    steps: int = 0
    tolerance: float = 1e-4
    reference: Callable[[int], Program] | None = None
    peers: dict[str, Peer] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """The name of the first peer."""
        return next(iter(self.peers))

    def entrant(self, name: str | None) -> Peer:
        """A peer, or the reference."""
        if name or self.reference is None:
            return self.peers[name or self.unit]
        return Peer(self.reference, "torch", False)

    def peer(
        self, name: str, *, compiles: bool = False
    ) -> Callable[[Callable[[int], Program]], Callable[[int], Program]]:
        """Add the program that the decorated function makes."""

        def add(make: Callable[[int], Program]) -> Callable[[int], Program]:
            library = "jax" if name.startswith("JAX") else "torch"
            self.peers[name] = Peer(make, library, compiles or library == "jax")
            return make

        return add


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with the function applied to its leaves."""
    if isinstance(tree, Mapping):
        return {name: mapped(function, value) for name, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(mapped(function, value) for value in tree)
    return function(tree)


def leaves(tree: Any) -> list[Any]:
    """The leaves of a tree, entries of a mapping in the order of their names."""
    if isinstance(tree, Mapping):
        return [leaf for name in sorted(tree) for leaf in leaves(tree[name])]
    if isinstance(tree, (tuple, list)):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree]


def distance(found: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> float:
    """The relative error of a result, in the 2-norm of all its entries."""
    pairs = zip(found, truth, strict=True)
    squares = sum(float(((a.astype(np.float64) - b) ** 2).sum()) for a, b in pairs)
    return (squares / sum(float((b**2).sum()) for b in truth)) ** 0.5
