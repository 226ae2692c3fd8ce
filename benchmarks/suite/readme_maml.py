"""MAML as in the project's README: a network of 121 weights, one task, 5 steps of each rule."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

import diffopt

from .by_hand import RULES, loop
from .maml import Loss, Params, gradient
from .others import by_torch_optim, by_torchopt
from .workload import Program, Workload

LR = 0.01
CLASSES = {
    "sgd": "SGD", "momentum": "SGD", "adam": "Adam", "adamw": "AdamW", "adamax": "Adamax",
    "nadam": "NAdam", "rmsprop": "RMSprop", "adagrad": "Adagrad", "adadelta": "Adadelta",
}  # fmt: skip
TORCHOPT = {rule: {} for rule in CLASSES if rule not in ("momentum", "nadam")}
TORCHOPT |= {"adam": {"eps_root": 1e-30}, "adamw": {"eps_root": 1e-30}, "adamax": {"eps": 1e-8}}
OPTAX: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adam": {"eps_root": 1e-30},
    "adamw": {"eps_root": 1e-30, "weight_decay": 0.01},
    "adamax": {},
}
"""Those whose formula is torch's, and their arguments."""


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, 1))


def problem(rng: np.random.Generator, smoke: bool) -> tuple[Any, ...]:
    width = 5 if smoke else 40
    shapes = {"0.weight": (width, 1), "0.bias": (width,), "2.weight": (1, width), "2.bias": (1,)}
    scales = {"0.weight": 1, "0.bias": 1, "2.weight": width**-0.5, "2.bias": width**-0.5}
    params = {name: scales[name] * rng.uniform(-1, 1, size) for name, size in shapes.items()}
    return params, *rng.normal(size=(4, 10, 1))


def with_width(params: Params) -> nn.Module:
    """A module with these parameters."""
    net = network(len(params["0.bias"])).to(params["0.bias"])
    net.load_state_dict(params)
    return net


def loss_of(net: nn.Module) -> Loss:
    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return mse_loss(functional_call(net, params, (x,)), y)

    return loss


def by_hand(rule: str, steps: int) -> Program:
    def meta_gradient(params: Params, x: Tensor, y: Tensor, new_x: Tensor, new_y: Tensor) -> Params:
        net = with_width(params)
        loss = loss_of(net)
        start = dict(net.named_parameters())
        end = loop(rule, lambda params: gradient(loss, params, x, y), start, LR, steps)
        return gradient_of(loss(end, new_x, new_y), net)

    return meta_gradient


def gradient_of(outer: Tensor, net: nn.Module) -> Params:
    outer.backward()
    return {name: p.grad for name, p in net.named_parameters()}


def ours(rule: str, steps: int) -> Program:
    opt = getattr(diffopt, "sgd" if rule == "momentum" else rule)()
    hp = opt.hparams(lr=LR, **({"momentum": 0.9} if rule == "momentum" else {}))

    def meta_gradient(params: Params, x: Tensor, y: Tensor, new_x: Tensor, new_y: Tensor) -> Params:
        net = with_width(params)
        model = diffopt.nn.functionalize(net)

        def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
            return mse_loss(model(params, x), y)

        sol = diffopt.minimize(loss, model.params, x, y, optimizer=opt, hparams=hp, steps=steps)
        return gradient_of(loss(sol.params, new_x, new_y), net)

    return meta_gradient


def torch_optimizer(rule: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    options |= {"momentum": 0.9} if rule == "momentum" else {}
    return getattr(torch.optim, CLASSES[rule])(params, lr=LR, **options)


def our_innerloop(rule: str, steps: int) -> Program:
    def meta_gradient(params: Params, x: Tensor, y: Tensor, new_x: Tensor, new_y: Tensor) -> Params:
        net = with_width(params)
        with diffopt.innerloop(net, torch_optimizer(rule, net.parameters())) as (fnet, inner):
            for _ in range(steps):
                inner.step(mse_loss(fnet(x), y))
            return gradient_of(mse_loss(fnet(new_x), new_y), net)

    return meta_gradient


def higher_(rule: str, steps: int) -> Program:
    import higher

    def meta_gradient(params: Params, x: Tensor, y: Tensor, new_x: Tensor, new_y: Tensor) -> Params:
        net = with_width(params)
        optimizer = torch_optimizer(rule, net.parameters())
        with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fnet, inner):
            for _ in range(steps):
                inner.step(mse_loss(fnet(x), y))
            return gradient_of(mse_loss(fnet(new_x), new_y), net)

    return meta_gradient


def torch_optim(rule: str, steps: int) -> Program:
    def meta_gradient(params: Params, x: Tensor, y: Tensor, new_x: Tensor, new_y: Tensor) -> Params:
        net = with_width(params)
        loss = loss_of(net)
        make = partial(torch_optimizer, rule, differentiable=True)
        end = by_torch_optim(loss, dict(net.named_parameters()), (x, y), make, steps)
        return gradient_of(loss(end, new_x, new_y), net)

    return meta_gradient


def torchopt_(rule: str, steps: int) -> Program:
    import torchopt

    def meta_gradient(params: Params, x: Tensor, y: Tensor, new_x: Tensor, new_y: Tensor) -> Params:
        net = with_width(params)
        loss = loss_of(net)
        if rule == "momentum":
            optimizer = torchopt.sgd(lr=LR, momentum=0.9, moment_requires_grad=True)
        else:
            optimizer = getattr(torchopt, rule)(lr=LR, **TORCHOPT[rule])
        end = by_torchopt(loss, dict(net.named_parameters()), (x, y), optimizer, steps)
        return gradient_of(loss(end, new_x, new_y), net)

    return meta_gradient


def jax_(rule: str, steps: int) -> Program:
    import jax
    import optax

    def loss(params: Any, x: Any, y: Any) -> Any:
        hidden = jax.nn.relu(x @ params["0.weight"].T + params["0.bias"])
        return ((hidden @ params["2.weight"].T + params["2.bias"] - y) ** 2).mean()

    if rule == "momentum":
        optimizer = optax.sgd(LR, momentum=0.9)
    else:
        optimizer = getattr(optax, rule)(LR, **OPTAX[rule])

    def outer(params: Any, x: Any, y: Any, new_x: Any, new_y: Any) -> Any:
        state = optimizer.init(params)
        for _ in range(steps):
            updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
            params = optax.apply_updates(params, updates)
        return loss(params, new_x, new_y)

    return jax.jit(jax.grad(outer))


PROGRAMS = {
    "by hand": (by_hand, RULES),
    "diffopt": (ours, CLASSES),
    "diffopt, innerloop": (our_innerloop, CLASSES),
    "torch.optim, differentiable": (torch_optim, CLASSES),
    "TorchOpt": (torchopt_, ["momentum", *TORCHOPT]),
    "higher": (higher_, [rule for rule in CLASSES if rule not in ("nadam", "adamw")]),
    "JAX, jit": (jax_, ["momentum", *OPTAX]),
}


def workload(rule: str) -> Workload:
    # Where a gradient is nearly zero, Adam's derivatives are ill-conditioned.
    made = Workload(f"MAML of the README, 5 {rule} steps", problem, steps=5, tolerance=1e-2)
    for name, (program, rules) in PROGRAMS.items():
        if rule in rules:
            made.peer(name)(lambda steps, program=program: program(rule, steps))
    return made


WORKLOADS = {rule: workload(rule) for rule in CLASSES}
