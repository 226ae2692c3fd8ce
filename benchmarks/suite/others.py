"""Inner loops by other libraries: `(loss, params, data, ...)` to the params after some steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .maml import Loss, Params, gradient

Make = Callable[[Any], torch.optim.Optimizer]
"""From parameters to an optimizer of them."""


def by_torch_optim(loss: Loss, params: Params, data: Any, make: Make, steps: int) -> Params:
    """`make` passes `differentiable=True`."""
    params = {name: p.clone() for name, p in params.items()}
    optimizer = make(params.values())
    for _ in range(steps):
        # Clones, since the step overwrites what the loss has saved.
        grads = gradient(lambda p: loss({n: q.clone() for n, q in p.items()}, *data), params)
        for name, p in params.items():
            p.grad = grads[name]
        optimizer.step()
    return params


def by_torchopt(loss: Loss, params: Params, data: Any, optimizer: Any, steps: int) -> Params:
    import torchopt

    state = optimizer.init(params)
    for _ in range(steps):
        grads = gradient(loss, params, *data)
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return params


def by_higher(
    loss: Loss, params: Params, data: Any, make: Make, steps: int, override: Any = None
) -> Params:
    import higher

    plain = [torch.nn.Parameter(p.detach()) for p in params.values()]
    optimizer = higher.get_diff_optim(make(plain), plain, override=override)
    values = list(params.values())
    for _ in range(steps):
        values = optimizer.step(loss(dict(zip(params, values, strict=True)), *data), values)
    return dict(zip(params, values, strict=True))
