"""The algorithms, one file per family, and the parts for writing a new one."""

from diffopt._rule import ops as ops
from diffopt._rule.functions import leafwise as leafwise
from diffopt._rule.hyper import (
    Hyperparameter as Hyperparameter,
    hparams as hparams,
    number as number,
)
from diffopt._rule.leafwise import Leafwise as Leafwise
from diffopt._rule.rule import zeros_like as zeros_like
from diffopt.rules.adadelta import adadelta as adadelta
from diffopt.rules.adafactor import adafactor as adafactor
from diffopt.rules.adagrad import adagrad as adagrad
from diffopt.rules.adam import adam as adam, adamw as adamw
from diffopt.rules.adamax import adamax as adamax
from diffopt.rules.asgd import asgd as asgd
from diffopt.rules.lbfgs import LimitedMemoryBFGS as LimitedMemoryBFGS, lbfgs as lbfgs
from diffopt.rules.muon import muon as muon
from diffopt.rules.nadam import nadam as nadam
from diffopt.rules.radam import radam as radam
from diffopt.rules.rmsprop import rmsprop as rmsprop
from diffopt.rules.rprop import rprop as rprop
from diffopt.rules.sgd import sgd as sgd
from diffopt.rules.sparse_adam import SparseAdam as SparseAdam, sparse_adam as sparse_adam
