"""What MAML's workloads share: the meta-gradient of a loop that adapts params to a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Params = dict[str, Tensor]
Loss = Callable[..., Tensor]
Adapt = Callable[[Params, Tensor, Tensor], Params]
"""The params after some steps on a task's support set."""


def in_turn(loss: Loss, adapt: Adapt) -> Callable[..., Params]:
    """One task after the other; their gradients accumulate."""

    def meta_gradient(params: Params, *tasks: Tensor) -> Params:
        params = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        for x, y, new_x, new_y in zip(*tasks, strict=True):
            loss(adapt(params, x, y), new_x, new_y).backward()
        return {name: p.grad for name, p in params.items()}

    return meta_gradient


def batched(loss: Loss, adapt: Adapt) -> Callable[..., Params]:
    """All tasks at once."""

    def outer(params: Params, *tasks: Tensor) -> Tensor:
        def adapted_loss(x: Tensor, y: Tensor, new_x: Tensor, new_y: Tensor) -> Tensor:
            return loss(adapt(params, x, y), new_x, new_y)

        return torch.vmap(adapted_loss)(*tasks).sum()

    return torch.func.grad(outer)


def gradient(loss: Loss, params: Params, *data: Any) -> Params:
    """By autograd, to be differentiated again."""
    grads = torch.autograd.grad(loss(params, *data), list(params.values()), create_graph=True)
    return dict(zip(params, grads, strict=True))
