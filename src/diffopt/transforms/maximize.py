"""maximize(): ascent with any optimizer."""

from __future__ import annotations

from typing import Any

from diffopt._tree import Tree
from diffopt.optimizer import Write
from diffopt.transforms._base import Wrapper, gather


class Maximize(Wrapper[Any]):
    """Ascend instead of descend: the optimizer sees -grad.

    Its weight decay still shrinks the params, as with torch's `maximize=True`.

    State and hyperparameters are those of the optimizer.

    Args:
        optimizer: any optimizer.

    Raises:
        TypeError: `optimizer` is not an optimizer.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.transforms.maximize(diffopt.sgd())
        >>> p = torch.zeros(2)
        >>> opt.update(p, torch.ones(2), opt.init(p), opt.hparams(lr=0.1))[0]
        tensor([0.1000, 0.1000])
    """

    def update(self, params: Tree, grads: Tree, state: Any, hparams: Any) -> tuple[Tree, Any]:
        return self.optimizer.update(params, _negated(params, grads), state, hparams)

    def prepare_(self, params: Tree, grads: Tree, state: Any, hparams: Any) -> Write:
        return self.optimizer.prepare_(params, _negated(params, grads), state, hparams)


maximize = Maximize


def _negated(params: Tree, grads: Tree) -> Tree:
    leaves = gather(params, grads)
    return leaves.filled(-grad for grad in leaves.gradients())
