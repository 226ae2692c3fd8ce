"""diffopt: pure, differentiable optimizers for PyTorch."""

from diffopt._tree import detach as detach
from diffopt.optimizer import Optimizer as Optimizer
from diffopt.rules.adagrad import adagrad as adagrad
from diffopt.rules.adam import adam as adam
from diffopt.rules.adam import adamw as adamw
from diffopt.rules.rmsprop import rmsprop as rmsprop
from diffopt.rules.sgd import sgd as sgd

__version__ = "0.1.0"
