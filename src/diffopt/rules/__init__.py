"""The algorithms, one file per family, and what a new one is made of."""

from diffopt._engine import Leafwise as Leafwise, leafwise as leafwise, zeros_like as zeros_like
from diffopt._hparams import hparams as hparams, number as number
from diffopt.rules.adagrad import adagrad as adagrad
from diffopt.rules.adam import adam as adam, adamw as adamw
from diffopt.rules.rmsprop import rmsprop as rmsprop
from diffopt.rules.sgd import sgd as sgd
