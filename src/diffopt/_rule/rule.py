"""The parts of an algorithm: the mathematics of one tensor, and what may be assumed about it."""

from __future__ import annotations

import functools
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from diffopt import _modes, _tree

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
"""The precision in which half-precision params are updated."""

_CLAIMS = ("elementwise", "stackable", "batched", "overwrites", "proportional", "native")
"""What a class may say about its methods; what `Rule` says holds for all."""

_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}  # `to_real` won't trace


def working_real(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the real numbers in which a parameter of this dtype is updated."""
    dtype = WORKING_DTYPE.get(dtype, dtype)
    return _REAL.get(dtype, dtype)


class Rule(ABC, Generic[S, H]):
    """The mathematics of one tensor, written with out-of-place operations.

    `state` is a NamedTuple whose first field is `step`; its fields hold trees in the state of an
    optimizer, and tensors in what the methods here see. A field that a configuration does not need
    holds `()`. Tensors are real, at least float32 and at least one-dimensional.

    What a class says of its methods (`elementwise`, `stackable`, `batched`, `overwrites`,
    `proportional`, `native`) is not inherited by a subclass that overrides one of them: it need not
    hold for what that does instead, so the subclass says it again.

    Attributes:
        State: the class of the state.
        hparams: the class of the record of hyperparameters, made by `diffopt.rules.hparams`.
        per_hyperparameter: the fields of the state that have the shape of hyperparameters instead
            of the parameter's: one number, or a tensor if a hyperparameter is one. The rule
            computes them from nothing but themselves, hyperparameters and the step.
        elementwise, batchable, stackable, native: see `leafwise`.
        batched: whether `rule` also takes a batch of tensors of one shape, with one dimension more
            in front, as one tensor.
        overwrites: whether `rule` takes `into=True`, with which functions of `ops` overwrite the
            parameter and its state; then nothing is differentiated or observed.
        proportional: whether the step is proportional to the hyperparameter `lr`: the new parameter
            is `p + lr * d`, where the state and d do not depend on `lr`.
        maximize: ascend instead of descend.
        execution: see `Leafwise`.
    """

    State: ClassVar[type[Any]]
    hparams: ClassVar[Any]
    per_hyperparameter: ClassVar[tuple[str, ...]] = ()
    elementwise = False
    batchable = True
    stackable = False
    batched = False
    overwrites = False
    proportional = False
    maximize: bool = False
    execution: Execution = "auto"
    native: Callable[..., bool] | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in _CLAIMS:
            if _outdated(cls, name):
                setattr(cls, name, vars(Rule)[name])

    @property
    def buffer_names(self) -> tuple[str, ...]:
        """The fields of the state after `step`."""
        return self.State._fields[1:]

    def begin(self, p: Tensor, step: Tensor) -> S:
        """The state of one tensor before its first step: unless overridden, zeros."""
        numbers = self.per_hyperparameter
        return self.State(
            step,
            *(zero_for([p]) if name in numbers else zeros_like(p) for name in self.buffer_names),
        )

    def buffers_of(self, p: Tensor) -> Mapping[str, torch.dtype]:
        """The fields of the state after `step` that this configuration uses, and their dtypes.

        `p` is any tensor that the rule can update; the dtypes are those of its buffers.
        """
        if _modes.compiling():
            return _used(self, begun(self, p, p.new_zeros(())))
        return _buffers_of(self, p.shape, p.dtype)

    def scalars(self, t: Any, hp: H) -> Any:
        """What is computed once per step instead of once per tensor, such as bias corrections."""
        return None

    @abstractmethod
    def rule(self, p: Any, g: Any, s: S, hp: H, c: Any) -> tuple[Any, S]:
        """The new parameter and the new state.

        Args:
            p: the parameter.
            g: its gradient, negated where the optimizer ascends.
            s: its state. `s.step`, a number or a 0-d tensor, has already been incremented: it is 1
                at the first step.
            hp: the hyperparameters: each field holds a number or a tensor that broadcasts.
            c: what `scalars` returned.

        It must not raise for some tensors only: `update_` checks all arguments first, and then
        writes one result after the other.
        """

    def initial(self, hp: H) -> dict[str, Any]:
        """Initial values that depend on hyperparameters, which `begin` does not know.

        The first step adds these values to the fields of these names, for tensors without a
        gradient too: theirs may come later. Those of later steps are not used.
        """
        return {}

    def shapes(self, shape: Shape) -> tuple[Shape, ...] | None:
        """The shapes of the buffers of a parameter, one for each field of the state after `step`.

        None if all have the shape of their parameter; otherwise the rule must refuse complex
        parameters.
        """
        return None

    def refuse(self, p: Tensor) -> str | None:
        """Why the rule cannot update this parameter, such as "is complex"; None where it can."""
        return None


def _outdated(cls: type, claim: str) -> bool:
    """Whether methods have been overridden since a class of its bases, or itself, claimed this."""
    for i, base in enumerate(cls.__mro__):
        if claim in vars(base):
            return False
        if any(_methods(later) & vars(base).keys() for later in cls.__mro__[i + 1 :]):
            return True
    return False


def _methods(kind: type) -> set[str]:
    """The names of a class's own methods, which a subclass may override by anything callable."""
    kinds = types.FunctionType, staticmethod, classmethod
    own = {name for name, value in vars(kind).items() if isinstance(value, kinds)}
    return {name for name in own - {*_CLAIMS} if not name.startswith("__")}


def begun(rule: Rule[Any, Any], p: Tensor, step: Tensor) -> Any:
    """The state of one tensor before its first step; raises where a user's rule returns none."""
    state = rule.begin(p, step)
    maker = "init" if "begin" in vars(rule) else f"{type(rule).__name__}.begin"
    if not isinstance(state, rule.State):
        raise TypeError(f"{maker} must return a {rule.State.__name__}, not {_tree.describe(state)}")
    shapes = rule.shapes(p.shape) or [p.shape] * len(rule.buffer_names)
    for name, buffer, shape in zip(rule.buffer_names, state[1:], shapes, strict=True):
        if unused(buffer) or name in rule.per_hyperparameter:
            continue
        if isinstance(buffer, Tensor) and buffer.shape != shape:
            raise ValueError(
                f"{maker} returned {name} of shape {tuple(buffer.shape)} for a parameter of "
                f"shape {tuple(p.shape)}, not of {tuple(shape)}: define shapes() if buffers differ "
                "in shape from the parameter"
            )
    return state


@functools.lru_cache(maxsize=256)
def _buffers_of(
    rule: Rule[Any, Any], shape: torch.Size, dtype: torch.dtype
) -> Mapping[str, torch.dtype]:
    """What `buffers_of` returns for parameters of this shape and dtype."""
    try:
        example = torch.empty(shape, dtype=dtype, device="meta")
        state = begun(rule, example, torch.empty((), device="meta"))
    except Exception:  # a user's `begin` may depend on values
        state = begun(
            rule, torch.zeros(shape, dtype=dtype, device="cpu"), torch.zeros((), device="cpu")
        )
    return _used(rule, state)


def _used(rule: Rule[Any, Any], state: tuple[Any, ...]) -> Mapping[str, torch.dtype]:
    pairs = zip(rule.buffer_names, state[1:], strict=True)
    return {name: field.dtype for name, field in pairs if not unused(field)}


def is_ours(rule: Rule[Any, Any]) -> bool:
    """Whether it is one of this package's, whose methods look at nothing but their arguments.

    Others may be meant to look at more, so that nothing they return can be used again.
    """
    return type(rule).__module__.startswith("diffopt.rules.")


def zeros_like(param: Tensor) -> Tensor:
    """A buffer for `param`: zeros of its shape, in float32 where it has half precision."""
    if not isinstance(param, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance] (of users)
        raise TypeError(f"param is {_tree.describe(param)}, not a tensor")
    dtype = WORKING_DTYPE.get(param.dtype)
    return torch.zeros_like(param, dtype=dtype, requires_grad=False)


def zero_for(params: Sequence[Tensor]) -> Tensor:
    """The number 0 in the state of params, on the device of the first, in the step's precision."""
    device = params[0].device if params else torch.get_default_device()
    return torch.zeros((), dtype=_modes.exact_dtype(device), device=device)


def unused(field: Any) -> bool:
    """Whether a field of a state is (): this configuration does not need it."""
    return isinstance(field, tuple) and not field
