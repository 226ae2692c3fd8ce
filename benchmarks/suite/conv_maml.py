"""MAML of a convolutional network: four blocks, 4 tasks, 5 SGD steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import diffopt

from .by_hand import loop
from .maml import Adapt, Params, batched, gradient, in_turn
from .others import by_higher, by_torch_optim, by_torchopt
from .workload import Program, Workload

LR = 0.01


def problem(rng: np.random.Generator, smoke: bool) -> tuple[Any, ...]:
    """Params, and the support and query sets of all tasks: images of 28 x 28 in 5 classes."""
    tasks, width = (1, 2) if smoke else (4, 32)
    sizes = [1, width, width, width, width]
    params = {
        f"w{i}": rng.normal(size=(sizes[i + 1], sizes[i], 3, 3)) * (2 / (9 * sizes[i])) ** 0.5
        for i in range(4)
    }
    params["head"] = rng.normal(size=(width, 5)) / width**0.5
    images = [rng.normal(size=(tasks, n, 1, 28, 28)) for n in (5, 25)]
    labels = [np.tile(np.arange(5), (tasks, n // 5)) for n in (5, 25)]
    return params, images[0], labels[0], images[1], labels[1]


# In float32, a value near a kink of relu or max_pool2d may fall on its other side.
WORKLOAD = Workload("MAML of a 4-block CNN, 4 tasks, 5 SGD steps", problem, steps=5, tolerance=5e-3)


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    for i in range(4):
        x = F.conv2d(x, params[f"w{i}"], padding=1)
        x = F.max_pool2d(F.instance_norm(x).relu(), 2)
    return F.cross_entropy(x.flatten(1) @ params["head"], y)


@WORKLOAD.peer("by hand")
def by_hand(steps: int) -> Program:
    def adapt(params: Params, x: Tensor, y: Tensor) -> Params:
        return loop("sgd", lambda params: gradient(loss, params, x, y), params, LR, steps)

    return in_turn(loss, adapt)


def by_func(steps: int) -> Adapt:
    def adapt(params: Params, x: Tensor, y: Tensor) -> Params:
        return loop("sgd", lambda params: torch.func.grad(loss)(params, x, y), params, LR, steps)

    return adapt


@WORKLOAD.peer("by hand, torch.func")
def torch_func(steps: int) -> Program:
    return in_turn(loss, by_func(steps))


@WORKLOAD.peer("by hand, vmap")
def vmap(steps: int) -> Program:
    return batched(loss, by_func(steps))


@WORKLOAD.peer("by hand, vmap, compiled whole", compiles=True)
def compiled(steps: int) -> Program:
    return torch.compile(batched(loss, by_func(steps)), fullgraph=True)


def adapted(steps: int, **options: Any) -> Adapt:
    """By diffopt."""
    opt = diffopt.sgd()
    hp = opt.hparams(lr=LR)

    def adapt(params: Params, x: Tensor, y: Tensor) -> Params:
        return diffopt.minimize(
            loss, params, x, y, optimizer=opt, hparams=hp, steps=steps, **options
        ).params

    return adapt


@WORKLOAD.peer("diffopt")
def ours(steps: int) -> Program:
    return in_turn(loss, adapted(steps))


@WORKLOAD.peer("diffopt, vmap")
def ours_vmap(steps: int) -> Program:
    return batched(loss, adapted(steps))


@WORKLOAD.peer("diffopt, compile=True", compiles=True)
def ours_compiled(steps: int) -> Program:
    return in_turn(loss, adapted(steps, compile=True))


@WORKLOAD.peer("diffopt, vmap, compile=True", compiles=True)
def ours_vmap_compiled(steps: int) -> Program:
    return batched(loss, adapted(steps, compile=True))


@WORKLOAD.peer("torch.optim, differentiable")
def torch_optim(steps: int) -> Program:
    make = partial(torch.optim.SGD, lr=LR, differentiable=True)
    return in_turn(loss, lambda params, *data: by_torch_optim(loss, params, data, make, steps))


@WORKLOAD.peer("TorchOpt")
def torchopt(steps: int) -> Program:
    import torchopt

    opt = torchopt.sgd(lr=LR)
    return in_turn(loss, lambda params, *data: by_torchopt(loss, params, data, opt, steps))


@WORKLOAD.peer("higher")
def higher(steps: int) -> Program:
    make = partial(torch.optim.SGD, lr=LR)
    return in_turn(loss, lambda params, *data: by_higher(loss, params, data, make, steps))


def jax_program(steps: int, over_tasks: str) -> Program:
    import jax
    import jax.numpy as jnp
    import optax

    def loss(params: Any, x: Any, y: Any) -> Any:
        for i in range(4):
            x = jax.lax.conv_general_dilated(x, params[f"w{i}"], (1, 1), "SAME")
            mean, var = x.mean((2, 3), keepdims=True), x.var((2, 3), keepdims=True)
            x = jax.nn.relu((x - mean) / jnp.sqrt(var + 1e-5))
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        logits = x.reshape(len(x), -1) @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    optimizer = optax.sgd(LR)

    def adapted_loss(params: Any, x: Any, y: Any, new_x: Any, new_y: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
        return loss(params, new_x, new_y)

    def in_turn(params: Any, *tasks: Any) -> Any:
        def add(total: Any, task: Any) -> Any:
            grads = jax.grad(adapted_loss)(params, *task)
            return jax.tree.map(jnp.add, total, grads), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), tasks)[0]

    def batched(params: Any, *tasks: Any) -> Any:
        over = jax.vmap(adapted_loss, (None, 0, 0, 0, 0))
        return jax.grad(lambda params: over(params, *tasks).sum())(params)

    return jax.jit({"scan": in_turn, "vmap": batched}[over_tasks])


@WORKLOAD.peer("JAX, jit")
def jax_in_turn(steps: int) -> Program:
    return jax_program(steps, "scan")


@WORKLOAD.peer("JAX, jit, vmap")
def jax_batched(steps: int) -> Program:
    return jax_program(steps, "vmap")
