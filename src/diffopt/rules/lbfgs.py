"""L-BFGS (Nocedal 1980): quasi-Newton steps with curvature estimated from past steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._diff.gradient import value_and_grad
from diffopt._modes import exact, number_of, real, reals
from diffopt._rule import checks, ops
from diffopt._rule.hyper import Hyperparameter, hparams, number
from diffopt._rule.rule import zero_for
from diffopt._tree import Tree
from diffopt._value import Flags
from diffopt.optimizer import Optimizer
from diffopt.rules._line_search import Point, strong_wolfe

LEAST_CURVATURE = 1e-10  # as in torch: pairs with a smaller y.s are not kept


class LBFGSState(NamedTuple):
    """State of `lbfgs`: vectors of all n entries of the params, and matrices with such rows.

    Names are torch's; `prev_flat_step` is its `d * t`. The newest pair is the last row, and rows
    not used yet are zero.
    """

    step: Any
    old_dirs: Tensor
    old_stps: Tensor
    ro: Tensor
    H_diag: Tensor
    prev_flat_grad: Tensor
    prev_flat_step: Tensor


torch.serialization.add_safe_globals([LBFGSState])  # checkpoints load with weights_only=True


@hparams
class LBFGSHParams:
    """Hyperparameters of `lbfgs`."""

    lr: Hyperparameter = number(1.0, ge=0, per_parameter=False)


def direction(
    q: Tensor,
    old_dirs: Iterable[Tensor],
    old_stps: Iterable[Tensor],
    ro: Iterable[Tensor],
    H_diag: Any,
    sub: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda x, y, c: torch.addcmul(
        x, y, c, value=-1
    ),
    mul: Callable[[Tensor, Any], Tensor] = torch.mul,
) -> tuple[Tensor, list[Tensor]]:
    """`H q`, and the weights of the first loop (Nocedal and Wright, algorithm 7.4).

    Pairs (y, s) of `old_dirs` and `old_stps` are ordered oldest first; `ro` is 1 / y.s, and a pair
    with 0 has no effect. `sub(x, y, c)` is x - c * y; it and `mul` may overwrite x, and so `q`.
    """
    pairs = list(zip(old_dirs, old_stps, ro, strict=True))
    al: list[Tensor] = []
    for y, s, rho in reversed(pairs):
        al.insert(0, rho * s.dot(q))
        q = sub(q, y, al[0])
    d = mul(q, H_diag)
    for (y, s, rho), alpha in zip(pairs, al, strict=True):
        d = sub(d, s, rho * y.dot(d) - alpha)
    return d, al


def curvature(ys: Tensor, yy: Tensor) -> tuple[Tensor, Tensor]:
    """What a pair contributes to H: 1 / y.s, and the scale y.s / y.y."""
    return 1 / ys, ys / yy


def first_length(grad: Tensor) -> Tensor:
    """The length of the first step, when no curvature is known: `min(1, 1 / |grad|_1)`."""
    return 1 / grad.abs().sum().clamp(min=1)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All entries as one real vector."""
    vectors = [*map(reals, tensors)]
    return torch.cat(vectors) if vectors else torch.empty(0)


class _Problem(NamedTuple):
    """The arguments of one update.

    Attributes:
        spec: the structure of the params.
        params: their leaves.
        grads: the leaves of the gradients.
        grad: the gradients as one vector, with zeros for None.
        active: which of its entries have a gradient; None where all do.
    """

    spec: _tree.Spec
    params: list[Tensor]
    grads: Sequence[Tensor | None]
    grad: Tensor
    active: Tensor | None

    @classmethod
    def of(cls, spec: _tree.Spec, params: list[Tensor], grads: Sequence[Tensor | None]) -> _Problem:
        active = None
        if any(grad is None for grad in grads):
            active = flat(
                torch.full_like(real(p), g is not None, dtype=torch.bool)
                for g, p in zip(grads, params, strict=True)
            )
        return cls(spec, params, grads, _vector(grads, params), active)

    def where_active(self, x: Tensor, y: Any) -> Tensor:
        """`x` for entries that have a gradient, `y` for the others."""
        return x if self.active is None else torch.where(self.active, x, y)


class LBFGS(Flags, Optimizer[LBFGSState, LBFGSHParams]):
    """L-BFGS: Newton's direction, with an inverse Hessian estimated from the last steps.

    With the params as one vector x, g_t = grad_t, s = x_t - x_{t-1} and y = g_t - g_{t-1},

        keep (s, y) if y.s > 1e-10, and drop all but the last history_size pairs
        H_t = BFGS updates of (y.s / y.y) I by the kept pairs, the newest last
        x  <- x - lr * H_t g_t                     (t = 1: x - lr * min(1, 1 / |g|_1) * g)

    where H_t = I as long as no pair is kept, and H_t g_t is computed without forming H_t by two
    loops over the pairs. Each step is one iteration of torch.optim.LBFGS without line search; for
    one with a line search see `search`.

    Hyperparameters: `lr` >= 0 (1), a single number or 0-d tensor for all params.

    Which pairs are kept is decided by a comparison, which has no derivative; otherwise derivatives
    are those of the formula, and finite where gradients or steps are zero. A leaf whose gradient is
    None does not move and counts as having a zero gradient; its last gradient and step are kept
    until it has a gradient again. It computes in the widest dtype among the leaves, which must all
    be on one device.

    Args:
        history_size: the number of pairs kept. The state is proportional to it from the first step
            on, and so is the work where the step is batched, compiled, or not on a CPU.

    Raises:
        TypeError: history_size is not an integer.
        ValueError: history_size is less than 1.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.lbfgs(history_size=5)
        >>> curvature = torch.tensor([1.0, 10.0])
        >>> sol = diffopt.minimize(
        ...     lambda x: 0.5 * (curvature * (x - 1) ** 2).sum(), torch.zeros(2),
        ...     optimizer=opt, hparams=opt.hparams(), steps=10, adjoint=None,
        ... )
        >>> sol.params
        tensor([1., 1.])

    Source: Nocedal, "Updating quasi-Newton matrices with limited storage", 1980; Nocedal and
    Wright, "Numerical optimization", 2006, algorithms 7.4 and 7.5, with the conventions of
    torch.optim.LBFGS.
    """

    history_size: int = 100

    hparams: ClassVar[type[LBFGSHParams]] = LBFGSHParams

    def __post_init__(self) -> None:
        if type(self.history_size) is not int:
            raise TypeError(f"history_size is {_tree.shown(self.history_size)}, not an integer")
        if self.history_size < 1:
            raise ValueError(f"history_size is {self.history_size}, but must be >= 1")

    def init(self, params: Tree) -> LBFGSState:
        tensors, _, device = _flatten(params)
        dtype = _dtype(tensors)
        buffers = {
            name: torch.zeros(shape, dtype=dtype, device=device)
            for name, shape in self._shapes(tensors).items()
        }
        buffers["H_diag"] = torch.ones_like(buffers["H_diag"])
        return LBFGSState(zero_for(tensors), **buffers)

    def update(
        self, params: Tree, grads: Tree, state: LBFGSState, hparams: LBFGSHParams
    ) -> tuple[Tree, LBFGSState]:
        problem = self._gather(params, grads, state, hparams)
        moved, state = _updated(problem, state, hparams)
        return _tree.unflatten(moved, problem.spec), state

    def repeated(self, params: Tree, state: LBFGSState, hparams: LBFGSHParams) -> _Repeated | None:
        if type(self).update is not LBFGS.update:
            return None
        problem = self._gather(params, params, state, hparams)  # gradients are like params
        plain = _modes.all_plain([*problem.params, *state])
        return _Repeated(problem, state, params) if plain else None

    def search(
        self,
        loss: Callable[[Tree], Tensor],
        params: Tree,
        grads: Tree,
        state: LBFGSState,
        hparams: LBFGSHParams,
        *,
        tolerance_change: float = 1e-9,
        max_ls: int = 25,
    ) -> tuple[Tree, LBFGSState]:
        """`update` with a step length that satisfies the strong Wolfe conditions.

        The length is found by comparing losses along the direction, so it is a discontinuous
        function of the arguments. Derivatives treat the length found, t, as a constant: they are
        those of x - t * H g with respect to params, grads and state; `lr`, which is only the first
        length tried, has none. Where t minimizes the loss along the line, this is the exact
        derivative of the loss at the new params; of the params themselves, the part through t is
        left out.

        The search depends on values: it works under autograd and the derivatives of `torch.func`,
        but not inside `torch.vmap` or `torch.compile`.

        Args:
            loss: `loss(params)` returns a real 0-d tensor. It is evaluated with its gradient once
                per length tried, and leaves no graph.
            params: a pytree of tensors.
            grads: the gradient of the loss at params.
            state: what `init` or the last step returned.
            hparams: what `self.hparams(...)` returned.
            tolerance_change: lengths count as equal if no entry would change by this much.
            max_ls: how many lengths are tried after the first; then the lowest point is taken.

        Returns:
            The new params and the new state.

        Raises:
            ValueError: what `update` raises, or the loss does not depend on params.
            TypeError: what `update` raises.

        Examples:
            >>> import torch, diffopt
            >>> def rosenbrock(p):
            ...     return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2
            >>> opt = diffopt.lbfgs(history_size=5)
            >>> params = torch.tensor([-1.0, 1.0])
            >>> state = opt.init(params)
            >>> for _ in range(40):
            ...     grads = torch.func.grad(rosenbrock)(params)
            ...     params, state = opt.search(rosenbrock, params, grads, state, opt.hparams())
            >>> params
            tensor([1., 1.])

        Source: Nocedal and Wright, "Numerical optimization", 2006, algorithms 3.5 and 3.6, with the
        conventions of torch.optim.LBFGS(line_search_fn="strong_wolfe").
        """
        problem = self._gather(params, grads, state, hparams)
        d, new_state = _direction(problem, state)
        with torch.no_grad():

            def evaluate(t: Any) -> Point:
                trial = _tree.unflatten(_moved(problem, t * d), problem.spec)
                value, _, grads = value_and_grad(
                    lambda p, _: (loss(p), ()), trial, (), second_order=False
                )
                grad = _vector(_tree.leaves(grads), problem.params)
                return Point(t, float(value), _constant(grad.dot(d)), grad)

            found = strong_wolfe(
                evaluate,
                Point(0, float(loss(params)), _constant(problem.grad.dot(d)), problem.grad),
                _constant(_length(problem, new_state, hparams)),
                scale=_constant(d.abs().max()),
                tolerance_change=tolerance_change,
                max_ls=max_ls,
            )
        moved, state = _move(problem, state, new_state, float(found.t) * d)
        return _tree.unflatten(moved, problem.spec), state

    def _gather(
        self, params: Tree, grads: Tree, state: LBFGSState, hparams: LBFGSHParams
    ) -> _Problem:
        """Check the arguments and flatten them to vectors."""
        tensors, spec, device = _flatten(params)
        gradients = _tree.leaves_like(grads, spec, params, ("grads", "params"))
        checks.grads(gradients, tensors, params)
        self._check_state(state, tensors, device)
        _check_hparams(hparams, tensors, params)
        return _Problem.of(spec, tensors, gradients)

    def _shapes(self, params: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
        """The shape of each field of the state but `step`."""
        m, n = self.history_size, sum(p.numel() * (1 + p.is_complex()) for p in params)
        return {
            "old_dirs": (m, n),
            "old_stps": (m, n),
            "ro": (m,),
            "H_diag": (),
            "prev_flat_grad": (n,),
            "prev_flat_step": (n,),
        }

    def _check_state(
        self, state: LBFGSState, params: Sequence[Tensor], device: torch.device
    ) -> None:
        checks.instance(state, LBFGSState, "state", "init()")
        for name, shape in {"step": (), **self._shapes(params)}.items():
            field = getattr(state, name)
            if not isinstance(field, Tensor):
                raise TypeError(f"state.{name} is {_tree.describe(field)}, not a tensor")
            for attribute, mine, expected in (
                ("shape", tuple(field.shape), shape),
                ("device", field.device, device),
                ("layout", field.layout, torch.strided),
            ):
                if mine != expected and params:
                    raise ValueError(
                        f"state.{name} has {attribute} {mine}, but {expected} is expected: create "
                        "the state with this optimizer's init() for these params"
                    )
            if not field.is_floating_point() and (name != "step" or field.dtype == torch.bool):
                raise ValueError(f"state.{name} has dtype {field.dtype}, not a floating-point one")


LimitedMemoryBFGS = LBFGS
lbfgs = LBFGS


class _Repeated:
    """The updates of a loop, whose params and state are checked once.

    See `diffopt._rule.repeated.Repeated`, which takes those of other rules.
    """

    apart = False

    def __init__(self, problem: _Problem, state: LBFGSState, like: Tree) -> None:
        self.params, self.spec = problem.params, problem.spec
        self._state, self._like = state, like

    def update(
        self,
        grads: Sequence[Any],
        hparams: LBFGSHParams,
        *,
        params: list[Tensor] | None = None,
    ) -> bool:
        """Take a step; False, with nothing done, where the gradients must be checked."""
        self.params = params or self.params
        if not _modes.all_ordinary(grads) or any(g.layout is not torch.strided for g in grads):
            return False
        _check_hparams(hparams, self.params, self._like)
        problem = _Problem.of(self.spec, self.params, grads)
        self.params, self._state = _updated(problem, self._state, hparams)
        return True

    def trees(self) -> tuple[Tree, LBFGSState]:
        """The params and the state."""
        return _tree.unflatten(self.params, self.spec), self._state


def _check_hparams(hparams: LBFGSHParams, tensors: list[Tensor], params: Tree) -> None:
    checks.instance(hparams, LBFGSHParams, "hparams", "optimizer.hparams(...)")
    if not _tree.is_leaf(hparams.lr):
        kind = type(hparams.lr).__name__
        raise ValueError(f"hparams.lr is a {kind}, but lbfgs takes one lr for all params")
    if isinstance(hparams.lr, Tensor):
        checks.scalar(hparams.lr, "hparams.lr", tensors, params)


def _updated(
    problem: _Problem, old: LBFGSState, hparams: LBFGSHParams
) -> tuple[list[Tensor], LBFGSState]:
    """The leaves of the params after an update, and the state."""
    d, state = _direction(problem, old)
    return _move(problem, old, state, _length(problem, state, hparams) * d)


def _direction(problem: _Problem, old: LBFGSState) -> tuple[Tensor, LBFGSState]:
    """The direction, and the new state without the step along it."""
    dtype = problem.grad.dtype
    ys, steps, ro, H_diag, prev_grad, prev_step = (field.to(dtype) for field in old[1:])
    y = problem.where_active(problem.grad - prev_grad, 0)
    s = problem.where_active(prev_step, 0)
    kept = y.dot(s) > LEAST_CURVATURE
    if not _modes.differentiated([problem.grad, *old]):  # else all of `old` belongs to the graph
        kept = number_of(kept)
    if kept is False:
        ys, steps, ro, H_diag = (field.clone() for field in (ys, steps, ro, H_diag))
    else:
        rho, scale = curvature(*(ops.where(kept, y.dot(x), 1) for x in (s, y)))
        ys, steps, ro = (
            ops.where(kept, torch.cat([rows[1:], row.unsqueeze(0)]), rows)
            for rows, row in ((ys, y), (steps, s), (ro, rho))
        )
        H_diag = ops.where(kept, scale, H_diag)
    first = _unused(ro)
    d, _ = direction(-problem.grad, ys[first:], steps[first:], ro[first:], H_diag)
    grad = problem.where_active(problem.grad, prev_grad)
    state = LBFGSState(exact(old.step) + 1, ys, steps, ro, H_diag, grad, prev_step)
    return problem.where_active(d, 0), state


def _unused(ro: Tensor) -> int:
    """How many of the oldest rows are known to hold no pair."""
    if ro.device.type != "cpu" or _modes.observed():
        return 0
    return next((i for i, rho in enumerate(ro.tolist()) if rho), len(ro))


def _length(problem: _Problem, state: LBFGSState, hparams: LBFGSHParams) -> Any:
    lr = exact(hparams.lr) if isinstance(hparams.lr, Tensor) else hparams.lr
    later = number_of(state.step > 1)
    return lr if later is True else ops.where(later, 1, first_length(problem.grad)) * lr


def _constant(scalar: Tensor) -> Tensor:
    """Its value on the CPU, detached from every derivative."""
    return _modes.tensor_of(float(scalar))


def _move(
    problem: _Problem, old: LBFGSState, new: LBFGSState, step: Tensor
) -> tuple[list[Tensor], LBFGSState]:
    """The leaves of the params after a step, and the state with that step."""
    moved = zip(problem.params, problem.grads, _moved(problem, step), strict=True)
    params = [p if g is None else q for p, g, q in moved]
    new = new._replace(prev_flat_step=problem.where_active(step, new.prev_flat_step))
    fields = [field.to(before.dtype) for field, before in zip(new, old, strict=True)]
    return params, LBFGSState(*fields)


def _moved(problem: _Problem, step: Tensor) -> list[Tensor]:
    """The leaves of the params, each with its piece of the step added."""
    moved: list[Tensor] = []
    pieces = step.split_with_sizes([real(p).numel() for p in problem.params])
    for p, piece in zip(problem.params, pieces, strict=True):
        x = real(p)
        x = (x.to(step.dtype) + piece.view(x.shape)).to(x.dtype)
        moved.append(torch.complex(*x.unbind(-1)) if p.is_complex() else x)
    return moved


def _vector(leaves: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    """Leaves like the params as one vector; zeros stand for None."""
    dtype = _dtype(params)
    filled = (
        torch.zeros_like(real(p), dtype=dtype) if leaf is None else leaf
        for leaf, p in zip(leaves, params, strict=True)
    )
    return flat(filled).to(dtype)


def _dtype(params: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the arithmetic: the widest among the params, float32 at least."""
    wide = any(p.dtype in (torch.float64, torch.complex128) for p in params)
    return torch.float64 if wide else torch.float32


def _flatten(params: Tree) -> tuple[list[Tensor], _tree.Spec, torch.device]:
    """The leaves of the params, checked, their structure and their device."""
    tensors, spec = _tree.flatten(params)
    checks.params(tensors, params)
    checks.undistributed(params, "params", "lbfgs")
    devices = [tensor.device for tensor in tensors] or [torch.get_default_device()]
    for i, device in enumerate(devices):
        if device != devices[0]:
            first, path = (_tree.paths(params, "params")[k] for k in (0, i))
            raise ValueError(
                f"{path} has device {device}, but {first} has device {devices[0]}: lbfgs needs all "
                "params on one device"
            )
    return tensors, spec, devices[0]
