"""Weight decay as a gradient transformation."""

from __future__ import annotations

from typing import ClassVar

from diffopt._rule import ops
from diffopt._rule.hyper import Hyperparameter, hparams, number
from diffopt.transforms._base import Stateless, Tensors


@hparams
class WeightDecay:
    """Hyperparameters of `add_decayed_weights`."""

    weight_decay: Hyperparameter = number(1e-2, ge=0)


class AddDecayedWeights(Stateless[WeightDecay]):
    """Add a multiple of each parameter to its gradient.

        g <- g + weight_decay * p

    Hyperparameters: `weight_decay` >= 0 (1e-2), a number, a tensor or a prefix tree of the params.

    With `sgd` this is the same as its own `weight_decay`: in a `chain` with one that has a field of
    that name, write `hparams(**{"0.weight_decay": 0.1})`. `masked` by
    `diffopt.nn.decay_mask(module)` it does not affect biases and norms.

    Examples:
        >>> import torch, diffopt
        >>> from diffopt.transforms import add_decayed_weights, chain, masked
        >>> decay = masked(add_decayed_weights(), {"weight": True, "bias": False})
        >>> opt = chain(decay, diffopt.sgd())
        >>> hp = opt.hparams(decay.hparams(weight_decay=0.5), diffopt.sgd().hparams(lr=0.1))
        >>> params = {"weight": torch.ones(1), "bias": torch.ones(1)}
        >>> grads = {"weight": torch.zeros(1), "bias": torch.zeros(1)}
        >>> opt.update(params, grads, opt.init(params), hp)[0]
        {'weight': tensor([0.9500]), 'bias': tensor([1.])}
    """

    hparams: ClassVar[type[WeightDecay]] = WeightDecay

    def transform(self, grads: Tensors, params: Tensors, records: list[WeightDecay]) -> Tensors:
        triples = zip(grads, params, records, strict=True)
        return [ops.add_decay(g, p, record.weight_decay) for g, p, record in triples]


add_decayed_weights = AddDecayedWeights
