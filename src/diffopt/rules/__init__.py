"""The algorithms, one file per family, and what a new one is made of."""

from diffopt._engine import Leafwise as Leafwise
from diffopt._engine import leafwise as leafwise
from diffopt._engine import zeros_like as zeros_like
from diffopt._hparams import hparams as hparams
from diffopt._hparams import number as number
from diffopt.rules.adagrad import adagrad as adagrad
from diffopt.rules.adam import adam as adam
from diffopt.rules.adam import adamw as adamw
from diffopt.rules.rmsprop import rmsprop as rmsprop
from diffopt.rules.sgd import sgd as sgd
