"""MAML on sine curves: a network of 1,761 weights, 25 tasks, 10 Adam steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import diffopt

from .by_hand import adam, loop
from .maml import Adapt, Params, batched, gradient, in_turn
from .others import by_higher, by_torch_optim, by_torchopt
from .workload import Program, Workload

LR = 1e-3


def problem(rng: np.random.Generator, smoke: bool) -> tuple[Any, ...]:
    """Params of a network 1-40-40-1, and ten points to adapt to and ten others of each curve."""
    tasks, width = (2, 5) if smoke else (25, 40)
    sizes = [1, width, width, 1]
    params = {}
    for i in range(3):
        params[f"w{i}"] = rng.normal(size=(sizes[i], sizes[i + 1])) * (2 / sizes[i]) ** 0.5
        params[f"b{i}"] = 0.1 * rng.normal(size=sizes[i + 1])
    amplitude, phase = rng.uniform(0.1, 5, (tasks, 1, 1)), rng.uniform(0, np.pi, (tasks, 1, 1))
    x, new_x = rng.uniform(-5, 5, (2, tasks, 10, 1))
    return params, x, amplitude * np.sin(x + phase), new_x, amplitude * np.sin(new_x + phase)


WORKLOAD = Workload("MAML on sine curves, 25 tasks, 10 Adam steps", problem, steps=10)


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    x = (x @ params["w0"] + params["b0"]).relu()
    x = (x @ params["w1"] + params["b1"]).relu()
    return F.mse_loss(x @ params["w2"] + params["b2"], y)


@WORKLOAD.peer("by hand")
def by_hand(steps: int) -> Program:
    def adapt(params: Params, x: Tensor, y: Tensor) -> Params:
        return loop("adam", lambda params: gradient(loss, params, x, y), params, LR, steps)

    return in_turn(loss, adapt)


def by_func(steps: int) -> Adapt:
    def adapt(params: Params, x: Tensor, y: Tensor) -> Params:
        return loop("adam", lambda params: torch.func.grad(loss)(params, x, y), params, LR, steps)

    return adapt


@WORKLOAD.peer("by hand, vmap")
def vmap(steps: int) -> Program:
    return batched(loss, by_func(steps))


@WORKLOAD.peer("by hand, vmap, compiled step", compiles=True)
def compiled_step(steps: int) -> Program:
    """Compiles a step of all tasks, and autograd differentiates it once."""

    def one(params: Params, m: Params, v: Params, t: Tensor, x: Tensor, y: Tensor) -> Any:
        grads = torch.func.grad(loss)(params, x, y)
        new = {n: adam(p, grads[n], (m[n], v[n]), t, LR) for n, p in params.items()}
        return (
            {n: p for n, (p, _) in new.items()},
            {n: m for n, (_, (m, _)) in new.items()},
            {n: v for n, (_, (_, v)) in new.items()},
        )

    step = torch.compile(torch.vmap(one, (0, 0, 0, None, 0, 0)), fullgraph=True)
    query = torch.vmap(loss)

    def meta_gradient(params: Params, x: Tensor, y: Tensor, new_x: Tensor, new_y: Tensor) -> Params:
        params = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
        # The buffers require gradients too, as in later steps: otherwise two graphs are compiled.
        each = {n: p.expand(len(x), *p.shape).clone() for n, p in params.items()}
        m, v = ({n: 0 * p for n, p in each.items()} for _ in range(2))
        for t in range(1, steps + 1):
            each, m, v = step(each, m, v, torch.tensor(float(t), device=x.device), x, y)
        query(each, new_x, new_y).sum().backward()
        return {n: p.grad for n, p in params.items()}

    return meta_gradient


@WORKLOAD.peer("by hand, vmap, compiled whole", compiles=True)
def compiled(steps: int) -> Program:
    return torch.compile(batched(loss, by_func(steps)), fullgraph=True)


def adapted(steps: int, opt: Any = diffopt.adam(), **options: Any) -> Adapt:  # noqa: B008 (a value)
    """By diffopt."""
    hp = opt.hparams(lr=LR)

    def adapt(params: Params, x: Tensor, y: Tensor) -> Params:
        return diffopt.minimize(
            loss, params, x, y, optimizer=opt, hparams=hp, steps=steps, **options
        ).params

    return adapt


FLAT = diffopt.transforms.flatten(diffopt.adam())


@WORKLOAD.peer("diffopt")
def ours(steps: int) -> Program:
    return in_turn(loss, adapted(steps))


@WORKLOAD.peer("diffopt, vmap")
def ours_vmap(steps: int) -> Program:
    return batched(loss, adapted(steps))


@WORKLOAD.peer("diffopt, vmap, flatten")
def ours_flat(steps: int) -> Program:
    return batched(loss, adapted(steps, FLAT))


@WORKLOAD.peer("diffopt, vmap, compile=True", compiles=True)
def ours_compiled(steps: int) -> Program:
    return batched(loss, adapted(steps, compile=True))


@WORKLOAD.peer("diffopt, vmap, flatten, compile=True", compiles=True)
def ours_flat_compiled(steps: int) -> Program:
    return batched(loss, adapted(steps, FLAT, compile=True))


@WORKLOAD.peer("diffopt, vmap, compiled whole", compiles=True)
def ours_whole(steps: int) -> Program:
    return torch.compile(batched(loss, adapted(steps)), fullgraph=True)


@WORKLOAD.peer("torch.optim, differentiable")
def torch_optim(steps: int) -> Program:
    make = partial(torch.optim.Adam, lr=LR, differentiable=True)
    return in_turn(loss, lambda params, *data: by_torch_optim(loss, params, data, make, steps))


@WORKLOAD.peer("TorchOpt")
def torchopt(steps: int) -> Program:
    import torchopt

    opt = torchopt.adam(lr=LR, eps_root=1e-30)
    return in_turn(loss, lambda params, *data: by_torchopt(loss, params, data, opt, steps))


@WORKLOAD.peer("higher")
def higher(steps: int) -> Program:
    make = partial(torch.optim.Adam, lr=LR)
    return in_turn(loss, lambda params, *data: by_higher(loss, params, data, make, steps))


@WORKLOAD.peer("JAX, jit, vmap")
def jax(steps: int) -> Program:
    import jax
    import optax

    def loss(params: Any, x: Any, y: Any) -> Any:
        x = jax.nn.relu(x @ params["w0"] + params["b0"])
        x = jax.nn.relu(x @ params["w1"] + params["b1"])
        return ((x @ params["w2"] + params["b2"] - y) ** 2).mean()

    optimizer = optax.adam(LR, eps_root=1e-30)

    def adapted_loss(params: Any, x: Any, y: Any, new_x: Any, new_y: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
        return loss(params, new_x, new_y)

    def outer(params: Any, *tasks: Any) -> Any:
        return jax.vmap(adapted_loss, (None, 0, 0, 0, 0))(params, *tasks).sum()

    return jax.jit(jax.grad(outer))
