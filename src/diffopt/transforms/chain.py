"""chain(): gradient transformations before an optimizer."""

from __future__ import annotations

from typing import Any

from diffopt import _tree
from diffopt._arguments import explains_calls
from diffopt._tree import Tree
from diffopt._value import Value
from diffopt.optimizer import Optimizer, Write, check_optimizer, copy_, overwriting
from diffopt.transforms._base import Leaves, Transformation, applied, gather
from diffopt.transforms._records import InOrder, check_tuple


@explains_calls
def chain(*parts: Transformation[Any, Any] | Optimizer[Any, Any]) -> Chain:
    """Gradients pass through transformations, one after another, and then update the params.

    With g_0 = grad,

        g_i = transformation_i(g_{i-1}, p)
        p  <- optimizer(p, g_n)

    Hyperparameters: a tuple of the parts' records. Keywords are routed to their part,
    `hparams(max_norm=1.0, lr=0.1)`; if several parts have a field of that name, write the number of
    the part before it, `hparams(**{"0.weight_decay": 0.1, "1.weight_decay": 0.2})`, or pass all
    records, in order: `hparams(record, record)`.

    Args:
        *parts: gradient transformations, such as `clip_by_global_norm()`, followed by an optimizer.

    Returns:
        The optimizer. Its state is the tuple of the parts' states. Half precision is converted to
        float32 before the first part.

    Raises:
        TypeError: the last part is not an optimizer, or another one is not a gradient
            transformation.

    Examples:
        >>> import torch, diffopt
        >>> from diffopt.transforms import chain, clip_by_global_norm
        >>> opt = chain(clip_by_global_norm(), diffopt.sgd())
        >>> params = {"w": torch.zeros(2)}
        >>> hp = opt.hparams(lr=0.5, max_norm=1.0)
        >>> params, state = opt.update(
        ...     params, {"w": torch.tensor([3.0, -4.0])}, opt.init(params), hp
        ... )
        >>> params
        {'w': tensor([-0.3000,  0.4000])}
    """
    if not parts:
        raise TypeError("chain requires an optimizer")
    check_optimizer(parts[-1], "the last part of a chain")
    for i, part in enumerate(parts[:-1]):
        if not isinstance(part, Transformation):
            raise TypeError(
                f"part {i} of a chain is {_tree.shown(part)}: all but the last must be gradient "
                "transformations, such as clip_by_global_norm()"
            )
    return Chain(parts)


class Chain(Value, Optimizer[tuple[Any, ...], tuple[Any, ...]]):
    """What `chain` returns."""

    parts: tuple[Any, ...]

    @property
    def hparams(self) -> InOrder:  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride] (never assigned)
        return InOrder(dict(enumerate(part.hparams for part in self.parts)))

    def init(self, params: Tree) -> tuple[Any, ...]:
        params = _tree.plain(params)
        return tuple(part.init(params) for part in self.parts)

    def update(
        self, params: Tree, grads: Tree, state: tuple[Any, ...], hparams: tuple[Any, ...]
    ) -> tuple[Tree, tuple[Any, ...]]:
        leaves = gather(params, grads)
        wide, grads, states = self._transformed(leaves, state, hparams)
        new, last = self.parts[-1].update(wide, grads, state[-1], hparams[-1])
        return leaves.narrow(new, wide), (*states, last)

    def prepare_(
        self, params: Tree, grads: Tree, state: tuple[Any, ...], hparams: tuple[Any, ...]
    ) -> Write:
        leaves = gather(params, grads, writable=True)
        wide, grads, states = self._transformed(leaves, state, hparams)
        new = {"params": wide, "state": states}
        pairs = overwriting({"params": params, "state": state[:-1]}, new)
        update_ = self.parts[-1].prepare_(wide, grads, state[-1], hparams[-1])

        def write() -> None:
            update_()
            copy_(pairs)

        return write

    def _transformed(
        self, leaves: Leaves, state: tuple[Any, ...], hparams: tuple[Any, ...]
    ) -> tuple[Tree, Tree, tuple[Any, ...]]:
        """Params and grads for the optimizer, and the new states of the transformations."""
        check_tuple(state, len(self.parts), "state", "init(params)")
        check_tuple(hparams, len(self.parts), "hparams", "hparams(...)")
        params, grads = leaves.wide()
        states: list[Any] = []
        for part, old, record in zip(self.parts[:-1], state[:-1], hparams[:-1], strict=True):
            grads, new = applied(part, grads, params, old, record)
            states.append(new)
        return params, grads, tuple(states)
