"""smooth(): make any function differentiable by smoothing it with a normal distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffopt._arguments import check_function, explains_keywords
from diffopt._tree import Tree
from diffopt.adjoint._particles import START
from diffopt.adjoint.persistent_evolution import PersistentEvolution, mean_loss


@explains_keywords
def smooth(
    function: Callable[[Tree], Any],
    *,
    samples: int = 16,
    sigma: float = 0.1,
    generator: torch.Generator | None = None,
    chunk_size: int = 1,
) -> Callable[[Tree], Tensor]:
    """Make any function differentiable, by smoothing it with a normal distribution.

    Computes the estimate 1/(2 N) sum_i f(theta + sigma eps_i) + f(theta - sigma eps_i) of the
    smoothed E f(theta + sigma eps), with N standard normal samples eps_i. Its derivative is the
    antithetic estimate

        1/(2 N sigma) sum_i eps_i (f(theta + sigma eps_i) - f(theta - sigma eps_i))

    which is unbiased for the derivative of the smoothed function, whether or not f is
    differentiable. Both are computed by the same 2 N calls without a graph, so f may be an outer
    loss without a derivative, such as the accuracy after an inner loop, or a simulator outside
    torch.

    Args:
        function: `function(theta)` returns a real 0-d tensor or a number. All its calls use the
            same random numbers.
        samples: the number N of antithetic pairs, >= 1.
        sigma: the standard deviation of perturbations, > 0.
        generator: the source of perturbations, torch's default generator if None.
        chunk_size: how many pairs are run at once, by torch.func.vmap, which `function` must
            support.

    Returns:
        A function of theta, a tree of floating-point or complex tensors. It is differentiable once,
        in reverse and forward mode, under autograd and torch.func transforms. Under vmap all
        examples have the same perturbations.

    Raises:
        ValueError: an argument is out of range; when called: theta is not a tree of floating-point
            or complex tensors, or `function` closes over a tensor that needs a gradient (not
            detected if it disables gradients itself).
        TypeError: `function` is not a function, or `generator` is not a torch.Generator; when
            called: `function` does not return a real 0-d tensor or a number.
        NotImplementedError: for a second derivative.

    Examples:
        >>> import torch, diffopt
        >>> noise = torch.Generator().manual_seed(0)
        >>> sign = diffopt.adjoint.smooth(torch.sign, samples=1000, sigma=1.0, generator=noise)
        >>> theta = torch.tensor(0.5, requires_grad=True)
        >>> (grad,) = torch.autograd.grad(sign(theta), theta)
        >>> bool((grad - 0.7041).abs() < 0.1)  # 2 / sqrt(2 pi) exp(-theta^2 / 2)
        True

    Source: Nesterov and Spokoiny, "Random gradient-free minimization of convex functions", 2017.
    """
    check_function(function, "function")

    def run(carry: Tree, theta: Tree) -> tuple[Tree, Any]:
        return carry, function(theta)

    settings = PersistentEvolution(run, samples, sigma, generator, chunk_size)
    return lambda theta: mean_loss(settings, [START] * samples, theta, (), lambda pair: None)
