"""diffopt: pure, differentiable optimizers for PyTorch."""

from diffopt import (
    adjoint as adjoint,
    inspect as inspect,
    linear as linear,
    nn as nn,
    optim as optim,
    schedules as schedules,
    transforms as transforms,
)
from diffopt._tree import detach as detach
from diffopt.implicit import (
    fixed_point_iteration as fixed_point_iteration,
    implicit_fixed_point as implicit_fixed_point,
    implicit_root as implicit_root,
)
from diffopt.innerloop import InnerLoop as InnerLoop, innerloop as innerloop
from diffopt.optimizer import Optimizer as Optimizer
from diffopt.rules.adadelta import adadelta as adadelta
from diffopt.rules.adafactor import adafactor as adafactor
from diffopt.rules.adagrad import adagrad as adagrad
from diffopt.rules.adam import adam as adam, adamw as adamw
from diffopt.rules.adamax import adamax as adamax
from diffopt.rules.asgd import asgd as asgd
from diffopt.rules.lbfgs import lbfgs as lbfgs
from diffopt.rules.muon import muon as muon
from diffopt.rules.nadam import nadam as nadam
from diffopt.rules.radam import radam as radam
from diffopt.rules.rmsprop import rmsprop as rmsprop
from diffopt.rules.rprop import rprop as rprop
from diffopt.rules.sgd import sgd as sgd
from diffopt.rules.sparse_adam import sparse_adam as sparse_adam
from diffopt.solve import Solution as Solution, minimize as minimize

__version__ = "0.1.0"
