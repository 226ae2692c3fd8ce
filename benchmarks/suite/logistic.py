"""The derivative of a solution: logistic regression with an L2 penalty for each of its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import diffopt
from diffopt.adjoint import Implicit
from diffopt.linear import ConjugateGradient

from .workload import Program, Workload

TOL, RATE = 1e-5, 1.0


def problem(rng: np.random.Generator, smoke: bool) -> tuple[Any, ...]:
    """Logarithms of the penalties, 64 examples of 10 features, and 64 others."""
    n, features = (16, 3) if smoke else (64, 10)
    true, x, new_x = rng.normal(size=features), *rng.normal(size=(2, n, features))
    y, new_y = (np.where(a @ true + rng.normal(size=n) > 0, 1.0, 0.0) for a in (x, new_x))
    return rng.uniform(-3, -2, features), x, y, new_x, new_y


def loss(w: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
    value = F.binary_cross_entropy_with_logits(x @ w, y)
    return value + 0.5 * (penalty.exp() * w * w).sum()


def error(w: Tensor, new_x: Tensor, new_y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(new_x @ w, new_y)


# By hand


def implicit(
    solve: Callable[..., Tensor], system: Callable[[Callable[..., Tensor], Tensor], Tensor]
) -> Program:
    """dw/dθ = -H⁻¹ ∂²loss/∂w∂θ, with `solve` for w and `system` for H⁻¹."""

    def hypergradient(
        penalty: Tensor, x: Tensor, y: Tensor, new_x: Tensor, new_y: Tensor
    ) -> Tensor:
        w = solve(penalty.detach(), x, y).detach().requires_grad_()
        penalty = penalty.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(w, penalty, x, y), w, create_graph=True)

        def hvp(v: Tensor) -> Tensor:
            return torch.autograd.grad(grad, w, v, retain_graph=True)[0]

        (cotangent,) = torch.autograd.grad(error(w, new_x, new_y), w)
        return -torch.autograd.grad(grad, penalty, system(hvp, cotangent))[0]

    return hypergradient


def descend(penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
    w = torch.zeros_like(penalty, requires_grad=True)
    while True:
        (grad,) = torch.autograd.grad(loss(w, penalty, x, y), w)
        if grad.norm() <= TOL:
            return w
        w = (w.detach() - RATE * grad).requires_grad_()


def lbfgs(penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
    w = torch.zeros_like(penalty, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w], max_iter=100, tolerance_grad=TOL / 3, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(w, penalty, x, y)
        value.backward()
        return value

    optimizer.step(closure)
    return w


def newton(penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """To the last digit."""
    w = torch.zeros_like(penalty)
    for _ in range(30):
        grad = torch.func.grad(loss)(w, penalty, x, y)
        w = w - torch.linalg.solve(torch.func.hessian(loss)(w, penalty, x, y), grad)
    return w


def conjugate_gradients(hvp: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    x, r = torch.zeros_like(b), b
    p, rr, goal = r, r.dot(r), 1e-10 * b.dot(b)
    while rr > goal:
        product = hvp(p)
        alpha = rr / p.dot(product)
        x, r = x + alpha * p, r - alpha * product
        rr, last = r.dot(r), rr
        p = r + rr / last * p
    return x


def dense(hvp: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    unit = torch.eye(len(b), dtype=b.dtype, device=b.device)
    return torch.linalg.solve(torch.stack([hvp(row) for row in unit]), b)


WORKLOAD = Workload(
    "Implicit logistic regression, solve and derivative",
    problem,
    tolerance=1e-3,  # solvers stop early
    reference=lambda _: implicit(newton, dense),
)


@WORKLOAD.peer("by hand")
def by_hand(_: int) -> Program:
    return implicit(descend, conjugate_gradients)


@WORKLOAD.peer("by hand, torch.optim.LBFGS")
def by_hand_lbfgs(_: int) -> Program:
    return implicit(lbfgs, conjugate_gradients)


@WORKLOAD.peer("by hand, compiled descent", compiles=True)
def compiled_descent(_: int) -> Program:
    @torch.compile(fullgraph=True)
    def step(w: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        grad = torch.func.grad(loss)(w, penalty, x, y)
        return w - RATE * grad, grad.norm()

    def solve(penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
        w, norm = torch.zeros_like(penalty), torch.tensor(torch.inf)
        while norm > TOL:
            w, norm = step(w, penalty, x, y)
        return w

    return implicit(solve, conjugate_gradients)


# diffopt


def ours(opt: Any, steps: int, **options: Any) -> Program:
    adjoint = Implicit(ConjugateGradient(rtol=1e-5))

    def hypergradient(
        penalty: Tensor, x: Tensor, y: Tensor, new_x: Tensor, new_y: Tensor
    ) -> Tensor:
        penalty = penalty.detach().requires_grad_()
        sol = diffopt.minimize(
            loss, torch.zeros_like(penalty), penalty, x, y, optimizer=opt,
            hparams=opt.hparams(lr=RATE), steps=steps, tol=TOL, adjoint=adjoint, **options,
        )  # fmt: skip
        return torch.autograd.grad(error(sol.params, new_x, new_y), penalty)[0]

    return hypergradient


LBFGS = diffopt.lbfgs(history_size=10)


@WORKLOAD.peer("diffopt, sgd")
def our_descent(_: int) -> Program:
    return ours(diffopt.sgd(), 10_000)


@WORKLOAD.peer("diffopt, lbfgs")
def our_lbfgs(_: int) -> Program:
    return ours(LBFGS, 100)


@WORKLOAD.peer("diffopt, sgd, compile=True", compiles=True)
def our_compiled_descent(_: int) -> Program:
    return ours(diffopt.sgd(), 10_000, compile=True)


@WORKLOAD.peer("diffopt, lbfgs, compile=True", compiles=True)
def our_compiled_lbfgs(_: int) -> Program:
    return ours(LBFGS, 100, compile=True)


# Other libraries


@WORKLOAD.peer("TorchOpt")
def torchopt(_: int) -> Program:
    import torchopt

    def optimality(w: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.func.grad(loss)(w, penalty, x, y)

    solver = torchopt.linear_solve.solve_cg(rtol=1e-5, atol=0.0)

    @torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=solver)
    def solve(w: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            return descend(penalty, x, y)

    def hypergradient(
        penalty: Tensor, x: Tensor, y: Tensor, new_x: Tensor, new_y: Tensor
    ) -> Tensor:
        penalty = penalty.detach().requires_grad_()
        w = solve(torch.zeros_like(penalty), penalty, x, y)
        return torch.autograd.grad(error(w, new_x, new_y), penalty)[0]

    return hypergradient


def jaxopt_program(solver: str) -> Program:
    import jax
    import jax.numpy as jnp
    import jaxopt
    import optax

    def entropy(logits: Any, y: Any) -> Any:
        return optax.sigmoid_binary_cross_entropy(logits, y).mean()

    def loss(w: Any, penalty: Any, x: Any, y: Any) -> Any:
        return entropy(x @ w, y) + 0.5 * (jnp.exp(penalty) * w * w).sum()

    made = getattr(jaxopt, solver)(loss, tol=TOL, maxiter=10_000)

    def outer(penalty: Any, x: Any, y: Any, new_x: Any, new_y: Any) -> Any:
        w = made.run(jnp.zeros_like(penalty), penalty, x, y).params
        return entropy(new_x @ w, new_y)

    return jax.jit(jax.grad(outer))


@WORKLOAD.peer("JAX, jaxopt LBFGS")
def jaxopt_lbfgs(_: int) -> Program:
    return jaxopt_program("LBFGS")


@WORKLOAD.peer("JAX, jaxopt GradientDescent")
def jaxopt_descent(_: int) -> Program:
    return jaxopt_program("GradientDescent")
