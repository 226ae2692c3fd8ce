"""What an algorithm is made of: the mathematics of one tensor, and what may be assumed about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

S = TypeVar("S", bound=tuple[Any, ...])
H = TypeVar("H")

Shape: TypeAlias = Sequence[int]

Execution: TypeAlias = Literal["auto", "leaf", "foreach", "compiled"]

EXECUTIONS = ("auto", "leaf", "foreach", "compiled")

WORKING_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.complex64,
}
"""The precision in which a parameter of half precision is updated."""


class Rule(ABC, Generic[S, H]):
    """The mathematics of one tensor, written in out-of-place operations.

    `state` is a NamedTuple whose first field is `step`; the same class holds trees in the state of
    an optimizer, and tensors in what the methods here see. A field that a configuration does not
    need holds `()`. Tensors are real, at least float32 and at least one-dimensional.

    Attributes:
        State: the class of the state.
        hparams: the class of the record of hyperparameters, made by `diffopt.rules.hparams`.
        elementwise: whether each element of the new tensors depends on the same element of the old
            ones only. Then big tensors may be updated in pieces, and small ones together.
        batchable: False where the rule computes with a tensor as a whole, as by a mean or a product
            of matrices: then it sees one tensor at a time, never several as one.
        stackable: whether small tensors of one shape may be updated as one batch, by `torch.vmap`
            of the rule, and big ones in pieces, where all that the rule does beside elementwise
            operations is `ops.total`. Either rounds sums in another order. It is for rules that are
            not elementwise.
        native: the rule as one of torch's fused kernels, or None: see `native` of `leafwise`.
        maximize: ascend instead of descend.
    """

    State: ClassVar[type[Any]]
    hparams: ClassVar[Any]
    elementwise = False
    batchable = True
    stackable = False
    maximize = False
    native: Callable[..., bool] | None = None

    @abstractmethod
    def begin(self, p: Tensor, step: Tensor) -> S:
        """The state of one tensor before its first step; `zeros_like` makes its buffers."""

    def scalars(self, t: Any, hp: H) -> Any:
        """What is computed once per step and not once per tensor, such as bias corrections."""
        return None

    @abstractmethod
    def rule(self, p: Any, g: Any, s: S, hp: H, c: Any) -> tuple[Any, S]:
        """The new parameter and the new state.

        Args:
            p: the parameter.
            g: its gradient, negated where the optimizer ascends.
            s: its state. `s.step`, a number or a 0-d tensor, has been incremented: it is 1 at the
                first step.
            hp: a number or a tensor that broadcasts in each field.
            c: what `scalars` returned.

        It must not raise for some tensors only: `update_` checks all arguments first, and then
        writes one result after the other.
        """

    def initial(self, hp: H) -> dict[str, Any]:
        """What `begin`, which knows no hyperparameters, could not put into the state.

        The first step adds these values to the fields of their names.
        """
        return {}

    def shapes(self, shape: Shape) -> tuple[Shape, ...] | None:
        """The shapes of the buffers of a parameter, one for each field of the state after `step`.

        None where each has the shape of its parameter. A rule with others must refuse complex
        parameters.
        """
        return None

    def refuse(self, p: Tensor) -> str | None:
        """Why the rule cannot update this parameter, such as "is complex"; None where it can."""
        return None


def zeros_like(param: Tensor) -> Tensor:
    """A buffer for `param`: zeros of its shape, in float32 where it has half precision."""
    dtype = WORKING_DTYPE.get(param.dtype)
    return torch.zeros_like(param, dtype=dtype, requires_grad=False)


def unused(field: Any) -> bool:
    """Whether a field of a state is the () of a configuration that does not need it."""
    return isinstance(field, tuple) and not field
