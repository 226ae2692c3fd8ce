"""The derivative of a loss after 50 Adam steps with respect to Adam's learning rate.

The inner loops `(loss, params, lr, args, steps) -> params` also serve `memory.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import diffopt
from diffopt.adjoint import Checkpointed, ForwardMode

from .by_hand import adam, loop
from .maml import Loss, Params, gradient
from .others import by_higher, by_torch_optim, by_torchopt
from .workload import Program, Workload

Train = Callable[..., Params]
"""`(loss, params, lr, args, steps) -> params`"""


def problem(rng: np.random.Generator, smoke: bool) -> tuple[Any, ...]:
    """Params of a network 784-256-256-10, a learning rate, 64 examples and 64 others."""
    sizes = [12, 8, 8, 10] if smoke else [784, 256, 256, 10]
    params = {}
    for i in range(3):
        params[f"w{i}"] = rng.normal(size=(sizes[i], sizes[i + 1])) * (2 / sizes[i]) ** 0.5
        params[f"b{i}"] = np.zeros(sizes[i + 1])
    x, new_x = rng.normal(size=(2, 64, sizes[0]))
    y, new_y = rng.integers(10, size=(2, 64))
    return params, np.asarray(rng.uniform(0.5e-3, 2e-3)), x, y, new_x, new_y


# In float32, 1 - 0.999**t has an error of up to 6e-5 where it is computed from a tensor t.
WORKLOAD = Workload(
    "MLP of 270,000 weights, 50 Adam steps, d/d lr", problem, steps=50, tolerance=1e-3
)


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    x = (x @ params["w0"] + params["b0"]).relu()
    x = (x @ params["w1"] + params["b1"]).relu()
    return F.cross_entropy(x @ params["w2"] + params["b2"], y)


def reverse(train: Train, steps: int) -> Program:
    def hypergradient(params: Params, lr: Tensor, x: Tensor, y: Tensor, *valid: Tensor) -> Tensor:
        lr = lr.detach().requires_grad_()
        return torch.autograd.grad(loss(train(loss, params, lr, (x, y), steps), *valid), lr)[0]

    return hypergradient


# By hand


def leaves(params: Params) -> Params:
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def by_hand(loss: Loss, params: Params, lr: Any, args: Any, steps: int) -> Params:
    return loop("adam", lambda params: gradient(loss, params, *args), leaves(params), lr, steps)


def by_hand_func(loss: Loss, params: Params, lr: Any, args: Any, steps: int) -> Params:
    return loop("adam", lambda params: torch.func.grad(loss)(params, *args), params, lr, steps)


@WORKLOAD.peer("by hand")
def plain(steps: int) -> Program:
    return reverse(by_hand, steps)


@WORKLOAD.peer("by hand, torch.func")
def func(steps: int) -> Program:
    return reverse(by_hand_func, steps)


Carry = list[Tensor]
"""The params, and the two buffers of each."""


def adam_step(names: list[str]) -> Callable[..., Carry]:
    """A step of a flat carry; `t` is a tensor, a change of which compiles nothing."""

    def step(carry: Carry, lr: Tensor, t: Tensor, x: Tensor, y: Tensor) -> Carry:
        params, m, v = (carry[i::3] for i in range(3))
        grads = torch.func.grad(loss)(dict(zip(names, params, strict=True)), x, y)
        new = []
        for name, p, buffers in zip(names, params, zip(m, v, strict=True), strict=True):
            p, buffers = adam(p, grads[name], buffers, t, lr)
            new += [p, *buffers]
        return new

    return step


def begin(params: Params) -> Carry:
    return [x for p in params.values() for x in (p, torch.zeros_like(p), torch.zeros_like(p))]


def loss_of(carry: Carry, names: list[str], *data: Tensor) -> Tensor:
    return loss(dict(zip(names, carry[::3], strict=True)), *data)


def times(steps: int, like: Tensor) -> list[Tensor]:
    return list(torch.arange(1, steps + 1, dtype=like.dtype, device=like.device))


@WORKLOAD.peer("by hand, compiled step", compiles=True)
def compiled_step(steps: int) -> Program:
    """Compiles a step, and autograd differentiates it once."""
    step = torch.compile(adam_step(["w0", "b0", "w1", "b1", "w2", "b2"]), fullgraph=True)

    def hypergradient(params: Params, lr: Tensor, x: Tensor, y: Tensor, *valid: Tensor) -> Tensor:
        lr = lr.detach().requires_grad_()
        # They require gradients, as in later steps: otherwise two graphs are compiled.
        carry = [value + 0 * lr for value in begin(params)]
        for t in times(steps, lr):
            carry = step(carry, lr, t, x, y)
        return torch.autograd.grad(loss_of(carry, list(params), *valid), lr)[0]

    return hypergradient


@WORKLOAD.peer("by hand, checkpointed in segments")
def segments(steps: int) -> Program:
    """Keeps √T carries, and differentiates the graph of one segment at a time."""
    length = math.isqrt(steps)

    def hypergradient(params: Params, lr: Tensor, x: Tensor, y: Tensor, *valid: Tensor) -> Tensor:
        names, lr = list(params), lr.detach().requires_grad_()
        ts = times(steps, lr)
        chunks = [ts[i : i + length] for i in range(0, steps, length)]

        def run(carry: Carry, chunk: list[Tensor]) -> Carry:
            for t in chunk:
                carry = adam_step(names)(carry, lr, t, x, y)
            return carry

        kept, carry = [], begin(params)
        for chunk in chunks:
            kept.append(carry)
            with torch.no_grad():
                carry = run(carry, chunk)
        carry = [value.requires_grad_() for value in carry]
        cotangents = torch.autograd.grad(loss_of(carry, names, *valid), carry[::3])
        cotangents = [c for p in cotangents for c in (p, *[torch.zeros_like(p)] * 2)]
        total = torch.zeros_like(lr)
        for start, chunk in zip(reversed(kept), reversed(chunks), strict=True):
            start = [value.detach().requires_grad_() for value in start]
            end = run(start, chunk)
            *cotangents, share = torch.autograd.grad(end, [*start, lr], cotangents)
            total += share
        return total

    return hypergradient


@WORKLOAD.peer("by hand, jvp")
def jvp(steps: int) -> Program:
    def hypergradient(params: Params, lr: Tensor, x: Tensor, y: Tensor, *valid: Tensor) -> Tensor:
        def outer(lr: Tensor) -> Tensor:
            return loss(by_hand_func(loss, params, lr, (x, y), steps), *valid)

        return torch.func.jvp(outer, (lr,), (torch.ones_like(lr),))[1]

    return hypergradient


@WORKLOAD.peer("by hand, jvp of a compiled step", compiles=True)
def compiled_jvp(steps: int) -> Program:
    step = adam_step(["w0", "b0", "w1", "b1", "w2", "b2"])

    def pushforward(carry: Carry, moved: Carry, lr: Tensor, t: Tensor, *data: Tensor) -> Any:
        one = torch.ones_like(lr)
        return torch.func.jvp(lambda c, lr: step(c, lr, t, *data), (carry, lr), (moved, one))

    pushforward = torch.compile(pushforward, fullgraph=True)

    def hypergradient(params: Params, lr: Tensor, x: Tensor, y: Tensor, *valid: Tensor) -> Tensor:
        carry, names = begin(params), list(params)
        moved = [torch.zeros_like(value) for value in carry]
        for t in times(steps, lr):
            carry, moved = pushforward(carry, moved, lr, t, x, y)
        return torch.func.jvp(lambda c: loss_of(c, names, *valid), (carry,), (moved,))[1]

    return hypergradient


# diffopt


def ours(steps: int, **options: Any) -> Program:
    opt = diffopt.adam()

    def train(loss: Loss, params: Params, lr: Any, args: Any, steps: int) -> Params:
        hp = opt.hparams(lr=lr)
        return diffopt.minimize(
            loss, params, *args, optimizer=opt, hparams=hp, steps=steps, **options
        ).params

    return reverse(train, steps)


ADJOINTS: dict[str, dict[str, Any]] = {
    "diffopt": {},
    "diffopt, Checkpointed": {"adjoint": Checkpointed()},
    "diffopt, ForwardMode": {"adjoint": ForwardMode()},
}
for name, options in ADJOINTS.items():
    WORKLOAD.peer(name)(lambda steps, options=options: ours(steps, **options))
    WORKLOAD.peer(f"{name}, compile=True", compiles=True)(
        lambda steps, options=options: ours(steps, **options, compile=True)
    )


# Other libraries


def torch_optim_loop(loss: Loss, params: Params, lr: Any, args: Any, steps: int) -> Params:
    make = partial(torch.optim.Adam, lr=lr, differentiable=True)
    return by_torch_optim(loss, leaves(params), args, make, steps)


def torchopt_loop(loss: Loss, params: Params, lr: Any, args: Any, steps: int) -> Params:
    import torchopt

    return by_torchopt(loss, leaves(params), args, torchopt.adam(lr=lr, eps_root=1e-30), steps)


def higher_loop(loss: Loss, params: Params, lr: Any, args: Any, steps: int) -> Params:
    return by_higher(loss, leaves(params), args, torch.optim.Adam, steps, {"lr": [lr]})


LOOPS: dict[str, Train] = {
    "torch.optim, differentiable": torch_optim_loop,
    "TorchOpt": torchopt_loop,
    "higher": higher_loop,
}
for name, train in LOOPS.items():
    WORKLOAD.peer(name)(lambda steps, train=train: reverse(train, steps))


def jax_program(steps: int, *, remat: bool = False, forward: bool = False) -> Program:
    import jax
    import optax

    def loss(params: Any, x: Any, y: Any) -> Any:
        x = jax.nn.relu(x @ params["w0"] + params["b0"])
        x = jax.nn.relu(x @ params["w1"] + params["b1"])
        logits = x @ params["w2"] + params["b2"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def outer(lr: Any, params: Any, x: Any, y: Any, *valid: Any) -> Any:
        optimizer = optax.adam(lr, eps_root=1e-30)

        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
            return (optax.apply_updates(params, updates), state), None

        step = jax.checkpoint(step) if remat else step
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
        return loss(params, *valid)

    derivative = jax.jacfwd(outer) if forward else jax.grad(outer)
    return jax.jit(lambda params, lr, *data: derivative(lr, params, *data))


@WORKLOAD.peer("JAX, jit")
def jax(steps: int) -> Program:
    return jax_program(steps)


@WORKLOAD.peer("JAX, jit, remat")
def jax_remat(steps: int) -> Program:
    return jax_program(steps, remat=True)


@WORKLOAD.peer("JAX, jit, jvp")
def jax_forward(steps: int) -> Program:
    return jax_program(steps, forward=True)
