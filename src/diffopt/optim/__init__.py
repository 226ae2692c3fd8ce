"""Drop-in replacements for the classes of torch.optim, based on diffopt's rules.

`import diffopt.optim as optim` has what `torch.optim` has: the classes, `lr_scheduler`, `swa_utils`
and `Optimizer`.
"""

from torch.optim import (
    Optimizer as Optimizer,
    lr_scheduler as lr_scheduler,
    swa_utils as swa_utils,
)

from diffopt.optim._classes import (
    ASGD as ASGD,
    SGD as SGD,
    Adadelta as Adadelta,
    Adafactor as Adafactor,
    Adagrad as Adagrad,
    Adam as Adam,
    Adamax as Adamax,
    AdamW as AdamW,
    Muon as Muon,
    NAdam as NAdam,
    RAdam as RAdam,
    RMSprop as RMSprop,
    Rprop as Rprop,
    SparseAdam as SparseAdam,
)
from diffopt.optim._pure import Pure as Pure, from_pure as from_pure, to_pure as to_pure
from diffopt.optim.lbfgs import LBFGS as LBFGS
