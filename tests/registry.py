"""One row per optimizer configuration; test_conformance.py runs every check on every row."""

import torch

import diffopt
from diffopt.testing import Case

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
RMSprop, Adagrad = torch.optim.RMSprop, torch.optim.Adagrad

_momentum = {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05}
_nesterov = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.05}
_adam = {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.05}
_rmsprop = {"lr": 0.1, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.05}
_adagrad = {
    "lr": 0.1,
    "lr_decay": 0.1,
    "weight_decay": 0.05,
    "initial_accumulator_value": 0.2,
    "eps": 1e-3,
}


def _torch(cls, hparams, **flags):
    """Makes torch's optimizer with the same numbers."""
    numbers = dict(hparams)
    if "beta1" in numbers:
        numbers["betas"] = (numbers.pop("beta1"), numbers.pop("beta2"))
    return lambda tensors: cls(tensors, **numbers, **flags)


def _row(optimizer, cls, hparams, **flags):
    return Case(optimizer, hparams, _torch(cls, hparams, **flags))


REGISTRY: dict[str, Case] = {
    "sgd": _row(diffopt.sgd(), SGD, {"lr": 0.1}),
    "sgd-no-momentum": _row(diffopt.sgd(momentum=False), SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "sgd-momentum": _row(diffopt.sgd(), SGD, _momentum),
    "sgd-nesterov": _row(diffopt.sgd(nesterov=True), SGD, _nesterov, nesterov=True),
    "sgd-maximize": _row(diffopt.sgd(maximize=True), SGD, _momentum, maximize=True),
    "adam": _row(diffopt.adam(), Adam, {"lr": 0.01}),
    "adam-numbers": _row(diffopt.adam(), Adam, _adam),
    "adam-amsgrad": _row(diffopt.adam(amsgrad=True), Adam, _adam, amsgrad=True),
    "adam-maximize": _row(diffopt.adam(maximize=True), Adam, _adam, maximize=True),
    "adamw": _row(diffopt.adamw(), AdamW, {"lr": 0.01}),
    "adamw-amsgrad": _row(diffopt.adamw(amsgrad=True), AdamW, _adam, amsgrad=True),
    "rmsprop-no-momentum": _row(diffopt.rmsprop(momentum=False), RMSprop, {"lr": 0.01}),
    "rmsprop-momentum": _row(diffopt.rmsprop(), RMSprop, {**_rmsprop, "momentum": 0.8}),
    "rmsprop-centered": _row(
        diffopt.rmsprop(centered=True, momentum=False), RMSprop, _rmsprop, centered=True
    ),
    "rmsprop-centered-momentum": _row(
        diffopt.rmsprop(centered=True), RMSprop, {**_rmsprop, "momentum": 0.8}, centered=True
    ),
    "adagrad": _row(diffopt.adagrad(), Adagrad, {"lr": 0.1}),
    "adagrad-numbers": _row(diffopt.adagrad(), Adagrad, _adagrad),
}
