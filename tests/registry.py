"""One row per optimizer configuration; test_conformance.py runs every check on every row."""

import torch

import diffopt
from diffopt.testing import Case

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
RMSprop, Adagrad = torch.optim.RMSprop, torch.optim.Adagrad
Adadelta, Adamax = torch.optim.Adadelta, torch.optim.Adamax
RAdam, Rprop = torch.optim.RAdam, torch.optim.Rprop
NAdam, ASGD = torch.optim.NAdam, torch.optim.ASGD

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
_nadam = {**_adam, "momentum_decay": 0.1}
_asgd = {"lr": 0.1, "lambd": 0.1, "alpha": 0.6, "t0": 1.5, "weight_decay": 0.05}
_adadelta = {"lr": 0.5, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.05}
_rprop = {
    "lr": 0.1,
    "etaminus": 0.4,
    "etaplus": 1.3,
    "step_size_min": 0.01,
    "step_size_max": 0.15,
}
PAIRS = {
    "betas": ("beta1", "beta2"),
    "etas": ("etaminus", "etaplus"),
    "step_sizes": ("step_size_min", "step_size_max"),
}


def _torch(cls, hparams, **flags):
    """Makes torch's optimizer with the same numbers."""
    numbers = dict(hparams)
    for pair, fields in PAIRS.items():
        if fields[0] in numbers:
            numbers[pair] = tuple(numbers.pop(field) for field in fields)
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
    "adadelta": _row(diffopt.adadelta(), Adadelta, {"lr": 1.0}),
    "adadelta-numbers": _row(diffopt.adadelta(), Adadelta, _adadelta),
    "adamax": _row(diffopt.adamax(), Adamax, _adam),
    "radam": _row(diffopt.radam(), RAdam, _adam),
    "radam-late": _row(diffopt.radam(), RAdam, {**_adam, "beta2": 0.999}),
    "radam-decoupled": _row(
        diffopt.radam(decoupled_weight_decay=True), RAdam, _adam, decoupled_weight_decay=True
    ),
    "nadam": _row(diffopt.nadam(), NAdam, _nadam),
    "nadam-decoupled": _row(
        diffopt.nadam(decoupled_weight_decay=True), NAdam, _nadam, decoupled_weight_decay=True
    ),
    "asgd": _row(diffopt.asgd(), ASGD, _asgd),
    "rprop": _row(diffopt.rprop(), Rprop, _rprop),
    "rprop-maximize": _row(diffopt.rprop(maximize=True), Rprop, _rprop, maximize=True),
}
