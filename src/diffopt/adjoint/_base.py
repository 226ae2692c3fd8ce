"""What every way of differentiating a loop has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from diffopt._tree import Tree

Step: TypeAlias = Callable[[Tree, Any], tuple[Tree, Any]]
"""`(carry, x) -> (carry, output)`"""


class Adjoint(ABC):
    """How a loop of steps is run, so that it is differentiated in a certain way.

    Attributes:
        second_order: whether a step's gradients carry their own derivatives. False drops the
            second derivatives of the loss.
    """

    second_order: bool = True

    @abstractmethod
    def run(self, step: Step, carry: Tree, xs: Iterable[Any]) -> tuple[Tree, list[Any]]:
        """Run `carry, output = step(carry, x)` for every `x` of `xs`.

        Args:
            step: a pure function.
            carry: a pytree of tensors.
            xs: one value per step; read once, in order.

        Returns:
            The last carry, and the outputs of all steps.
        """
