"""diffopt: pure, differentiable optimizers for PyTorch."""

from diffopt import adjoint as adjoint, nn as nn
from diffopt._tree import detach as detach
from diffopt.optimizer import Optimizer as Optimizer
from diffopt.rules.adagrad import adagrad as adagrad
from diffopt.rules.adam import adam as adam, adamw as adamw
from diffopt.rules.rmsprop import rmsprop as rmsprop
from diffopt.rules.sgd import sgd as sgd
from diffopt.solve import Solution as Solution, minimize as minimize

__version__ = "0.1.0"
