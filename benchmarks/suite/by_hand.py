"""Optimizers as one writes them by hand, and in float64 the truth: one step of one tensor each.

A rule is `(p, g, buffers, t, lr) -> (p, buffers)`, with t = 1, 2, ... and the numbers that torch
has by default. Square roots have a tiny number inside: without it, one coordinate whose gradient
is always zero makes every meta-gradient NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Buffers = tuple[Tensor, ...]
Rule = Callable[[Tensor, Tensor, Buffers, Any, Any], tuple[Tensor, Buffers]]
TINY = 1e-30


def sgd(p: Tensor, g: Tensor, _: Buffers, t: Any, lr: Any) -> tuple[Tensor, Buffers]:
    return p - lr * g, ()


def momentum(p: Tensor, g: Tensor, buffers: Buffers, t: Any, lr: Any) -> tuple[Tensor, Buffers]:
    m = 0.9 * buffers[0] + g
    return p - lr * m, (m,)


def adam(p: Tensor, g: Tensor, buffers: Buffers, t: Any, lr: Any) -> tuple[Tensor, Buffers]:
    m = 0.9 * buffers[0] + 0.1 * g
    v = 0.999 * buffers[1] + 0.001 * g * g
    root = (v / (1 - 0.999**t) + TINY).sqrt()
    return p - lr * (m / (1 - 0.9**t)) / (root + 1e-8), (m, v)


def adamw(p: Tensor, g: Tensor, buffers: Buffers, t: Any, lr: Any) -> tuple[Tensor, Buffers]:
    return adam(p * (1 - lr * 0.01), g, buffers, t, lr)


def adamax(p: Tensor, g: Tensor, buffers: Buffers, t: Any, lr: Any) -> tuple[Tensor, Buffers]:
    m = 0.9 * buffers[0] + 0.1 * g
    u = torch.maximum(0.999 * buffers[1], g.abs() + 1e-8)
    return p - lr / (1 - 0.9**t) * m / u, (m, u)


def nadam(p: Tensor, g: Tensor, buffers: Buffers, t: Any, lr: Any) -> tuple[Tensor, Buffers]:
    def mu(t: int) -> float:
        return 0.9 * (1 - 0.5 * 0.96 ** (t * 0.004))

    product = 1.0
    for i in range(1, t + 1):
        product *= mu(i)
    m = 0.9 * buffers[0] + 0.1 * g
    v = 0.999 * buffers[1] + 0.001 * g * g
    root = (v / (1 - 0.999**t) + TINY).sqrt() + 1e-8
    ahead = (1 - mu(t)) / (1 - product) * g + mu(t + 1) / (1 - product * mu(t + 1)) * m
    return p - lr * ahead / root, (m, v)


def rmsprop(p: Tensor, g: Tensor, buffers: Buffers, t: Any, lr: Any) -> tuple[Tensor, Buffers]:
    v = 0.99 * buffers[0] + 0.01 * g * g
    return p - lr * g / ((v + TINY).sqrt() + 1e-8), (v,)


def adagrad(p: Tensor, g: Tensor, buffers: Buffers, t: Any, lr: Any) -> tuple[Tensor, Buffers]:
    s = buffers[0] + g * g
    return p - lr * g / ((s + TINY).sqrt() + 1e-10), (s,)


def adadelta(p: Tensor, g: Tensor, buffers: Buffers, t: Any, lr: Any) -> tuple[Tensor, Buffers]:
    v = 0.9 * buffers[0] + 0.1 * g * g
    delta = ((buffers[1] + 1e-6) / (v + 1e-6)).sqrt() * g
    return p - lr * delta, (v, 0.9 * buffers[1] + 0.1 * delta * delta)


RULES: dict[str, tuple[Rule, int]] = {
    "sgd": (sgd, 0),
    "momentum": (momentum, 1),
    "adam": (adam, 2),
    "adamw": (adamw, 2),
    "adamax": (adamax, 2),
    "nadam": (nadam, 2),
    "rmsprop": (rmsprop, 1),
    "adagrad": (adagrad, 1),
    "adadelta": (adadelta, 2),
}
"""Rules, and the number of their buffers, which start at zero."""


def loop(
    rule: str,
    gradient: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
    params: dict[str, Tensor],
    lr: Any,
    steps: int,
) -> dict[str, Tensor]:
    """Some steps from `params`."""
    step, count = RULES[rule]
    buffers: dict[str, Buffers] = {
        name: (torch.zeros_like(p),) * count for name, p in params.items()
    }
    for t in range(1, steps + 1):
        grads = gradient(params)
        new = {name: step(p, grads[name], buffers[name], t, lr) for name, p in params.items()}
        params = {name: p for name, (p, _) in new.items()}
        buffers = {name: b for name, (_, b) in new.items()}
    return params
