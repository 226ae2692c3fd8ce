"""leafwise: an optimizer made from functions on one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffopt import _modes
from diffopt._arguments import check_function
from diffopt._rule import hyper
from diffopt._rule.leafwise import Leafwise, check_classes
from diffopt._rule.rule import Execution, H, S, Shape
from diffopt._value import brief


class FunctionRule(Leafwise[S, H]):
    """What `leafwise` returns: a rule whose methods and attributes are the arguments.

    Attributes:
        members: each by its name in `Rule`.
    """

    members: tuple[tuple[str, Any], ...]

    def __post_init__(self) -> None:
        for name, member in self.members:
            object.__setattr__(self, name, member)
        super().__post_init__()

    def __repr__(self) -> str:
        """The functions and classes by name, on one line."""
        named = [brief(member).rpartition(".")[2] for _, member in self.members[:4]]
        flags = [f"{k}={v!r}" for k, v in self._inherited().items()]
        return f"leafwise({', '.join([*named, *flags])})"

    def rule(self, p: Any, g: Any, s: S, hp: H, c: Any) -> tuple[Any, S]:
        raise NotImplementedError  # a member takes its place


def leafwise(
    state: type[S],
    hparams: type[H],
    init: Callable[[Tensor, Tensor], S],
    rule: Callable[..., tuple[Any, S]],
    *,
    scalars: Callable[[Any, H], Any] | None = None,
    initial: Callable[[H], dict[str, Any]] | None = None,
    maximize: bool = False,
    native: Callable[..., bool] | None = None,
    elementwise: bool = False,
    batchable: bool = True,
    shapes: Callable[[Shape], tuple[Shape, ...]] | None = None,
    refuse: Callable[[Tensor], str | None] | None = None,
    stackable: bool = False,
    per_hyperparameter: tuple[str, ...] = (),
    execution: Execution = "auto",
) -> FunctionRule[S, H]:
    """Make an optimizer from functions on one tensor: quicker to write than a class.

    A subclass of `Leafwise` does the same, with flags that can be read and compared; it pickles.

    Args:
        state: a NamedTuple class whose first field is `step`. Its fields hold trees in the state of
            the optimizer, and tensors in what `init` and `rule` see. A field that a configuration
            does not need holds `()`.
        hparams: a record class made by `diffopt.rules.hparams`.
        init: `(param, step) -> state` for one tensor; create buffers with `zeros_like`.
        rule: `(param, grad, state, hparams, scalars) -> (new_param, new_state)` for one tensor,
            written with operators and the out-of-place operations of `diffopt.rules.ops`: see
            `Leafwise.rule`.
        scalars: `(step, hparams) -> anything`: see `Leafwise.scalars`.
        initial: `hparams -> {field: value}`: see `Leafwise.initial`.
        maximize: ascend instead of descend.
        native: `(params, grads, state, hparams, first, amp) -> bool`, the rule as one of torch's
            fused kernels, in place, on lists of contiguous tensors of one dtype on one CPU or CUDA
            device. Fields of the state are lists or `()`, `state.step` a list of 0-d tensors, and
            hyperparameters numbers, or, of the first, a 0-d tensor in float32 on the CUDA device;
            `first` says whether this is step 1 (None: unknown), and `amp`
            holds keyword arguments for the kernel. It must handle `maximize` itself; where the
            kernel does not compute the rule it must return False and change nothing.
        elementwise: whether each element of the new tensors depends only on the same element of the
            old ones. Then big tensors may be updated in pieces, and small ones together.
        batchable: False where the rule mixes the elements of a tensor, as a mean or a matrix
            product does: then it is called with one tensor at a time, never with a list of several.
        shapes: `(shape of the param) -> shapes of its buffers`: see `Leafwise.shapes`.
        refuse: `(param) -> reason or None`: see `Leafwise.refuse`.
        stackable: for rules that are not elementwise: whether tensors of one shape may be updated
            as one batch, by `torch.vmap` of the rule, and big ones in pieces if the rule uses
            nothing but elementwise operations, `ops.total` and `ops.norm`. Both change the order in
            which sums are rounded.
        per_hyperparameter: the fields of the state that have the shape of hyperparameters: see
            `Leafwise.per_hyperparameter`; `init` makes them as 0-d tensors.
        execution: how it runs, see `Leafwise`.

    Returns:
        The optimizer. Parameters in half precision are updated in float32 arithmetic, complex ones
        as pairs of reals.

    Examples:
        >>> from typing import Any, NamedTuple
        >>> import torch
        >>> from diffopt.rules import Hyperparameter, hparams, leafwise, number
        >>> class SignState(NamedTuple):
        ...     step: Any
        >>> @hparams
        ... class SignHParams:
        ...     lr: Hyperparameter = number(default=1e-3, ge=0)
        >>> def sign_descent(p, g, s, hp, _):
        ...     return p - hp.lr * g.sign(), s
        >>> opt = leafwise(SignState, SignHParams, lambda p, step: SignState(step), sign_descent)
        >>> p, g = torch.zeros(2), torch.tensor([3.0, -2.0])
        >>> opt.update(p, g, opt.init(p), opt.hparams(lr=0.5))[0]
        tensor([-0.5000,  0.5000])
    """
    check_classes(state, hparams, "state")
    check_function(init, "init")
    check_function(rule, "rule")
    optional = {
        "scalars": scalars,
        "initial": initial,
        "native": native,
        "shapes": shapes,
        "refuse": refuse,
    }
    for name, function in optional.items():
        check_function(function, name, optional=True)
    flags = {"elementwise": elementwise, "batchable": batchable, "stackable": stackable}
    hyper.check_flags(maximize=maximize, **flags)
    if not _modes.compiling():  # it cannot be traced
        torch.serialization.add_safe_globals([state])  # checkpoints load with weights_only=True
    members = {"State": state, "hparams": hparams, "begin": init, "rule": rule}
    members |= {name: function for name, function in optional.items() if function is not None}
    members |= {**flags, "per_hyperparameter": per_hyperparameter}
    return FunctionRule(members=(*members.items(),), maximize=maximize, execution=execution)
