"""Optimizers made from optimizers: `chain(clip_by_global_norm(), adam())` and the like.

A *gradient transformation*, such as `clip_by_global_norm()`, changes gradients; `chain` puts one or
more of them before an optimizer. Everything else here takes optimizers and returns one, with the
same guarantees: pure, differentiable with respect to every argument, batchable, compilable.
Subclass `Transformation` or `Wrapper` for your own.

All are values: they are printed on one line, compared and hashed by their arguments (labels and
masks by their contents), and they pickle if the optimizers, functions and labels in them do.
"""

from diffopt.transforms._base import (
    Transformation as Transformation,
    Wrapper as Wrapper,
    stateless as stateless,
)
from diffopt.transforms.accumulate import (
    AccumulateState as AccumulateState,
    accumulate as accumulate,
)
from diffopt.transforms.chain import chain as chain
from diffopt.transforms.clip import (
    clip_by_global_norm as clip_by_global_norm,
    clip_by_norm as clip_by_norm,
    clip_by_value as clip_by_value,
)
from diffopt.transforms.decay import add_decayed_weights as add_decayed_weights
from diffopt.transforms.ema import EMAState as EMAState, ema as ema
from diffopt.transforms.flatten import flatten as flatten
from diffopt.transforms.hypergradient import (
    HypergradientState as HypergradientState,
    hypergradient as hypergradient,
)
from diffopt.transforms.maximize import maximize as maximize
from diffopt.transforms.partition import (
    freeze as freeze,
    masked as masked,
    partition as partition,
)
from diffopt.transforms.precision import (
    PrecisionState as PrecisionState,
    precision as precision,
)
from diffopt.transforms.skip import skip_nonfinite as skip_nonfinite
