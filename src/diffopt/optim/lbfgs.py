"""The class LBFGS of torch.optim, with the mathematics of `diffopt.lbfgs`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffopt import _torch, _tree
from diffopt._arguments import check_function
from diffopt._modes import number_of, real
from diffopt.optim._checkpoints import Checkpoints
from diffopt.optim._groups import is_number, name_of, plain_number
from diffopt.rules._line_search import Point, strong_wolfe
from diffopt.rules.lbfgs import LEAST_CURVATURE, curvature, direction, first_length, flat
from diffopt.transforms._sharded import mesh_of

PAIRS = ("old_dirs", "old_stps", "ro")  # one entry for each pair that is kept
_MEMORY = ("d", "t", *PAIRS, "H_diag", "prev_flat_grad", "prev_loss")


class LBFGS(Checkpoints, torch.optim.LBFGS):
    """`torch.optim.LBFGS` with the mathematics of `diffopt.lbfgs`.

    Constructor, iterations, stopping rules and state are torch's, so checkpoints can be exchanged
    in both directions in the middle of a run. An iteration synchronizes with the device only to
    make decisions. From torch 2.14 on `maximize=True` ascends instead of descending.

    Args:
        params: the parameters, on one device, in a single group.
        lr: the step length, or the first one tried (1).
        max_iter: the maximum number of iterations per step (20).
        max_eval: no new iteration begins after this many evaluations of the closure (max_iter *
            1.25).
        tolerance_grad: stop if no entry of the gradient is larger (1e-7).
        tolerance_change: stop if no entry changes by more, or the loss by less (1e-9).
        history_size: the number of pairs kept (100).
        line_search_fn: "strong_wolfe", or None for steps of length lr.

    Raises:
        ValueError: what `torch.optim.LBFGS` raises.

    Examples:
        >>> import torch
        >>> from diffopt.optim import LBFGS
        >>> p = torch.nn.Parameter(torch.tensor([-1.0, 1.0]))
        >>> optimizer = LBFGS([p], max_iter=100, line_search_fn="strong_wolfe")
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
        >>> p
        Parameter containing:
        tensor([1.0000, 1.0000], requires_grad=True)

    Source: see `diffopt.lbfgs`.
    """

    scalar_state = ()

    @_torch.disable_dynamo  # as torch does for its own
    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Iterate until a stopping rule holds.

        Args:
            closure: clears the gradients, computes the loss and its gradients, and returns the
                loss.

        Returns:
            The loss before the first iteration.

        Raises:
            RuntimeError: `line_search_fn` is neither None nor "strong_wolfe".
            ValueError: there is more than one parameter group, or some of the parameters are
                DTensors and others are not, or their device meshes differ.
        """
        check_function(closure, "closure")
        if len(self.param_groups) != 1:
            raise ValueError(
                f"LBFGS supports only one parameter group, but there are {len(self.param_groups)}"
            )
        self.check_numbers()
        group = self.param_groups[0].copy()
        for key, default in self.defaults.items():
            if is_number(default):
                group[key] = plain_number(group[key], key)
        search = group["line_search_fn"]
        if not (search is None or (isinstance(search, str) and search == "strong_wolfe")):
            found = _tree.describe(search)
            raise RuntimeError(f"line_search_fn is {found}, but only 'strong_wolfe' is supported")
        if not group["params"]:
            return torch.enable_grad()(closure)()
        _check_meshes(group)
        state = self.state[group["params"][0]]  # for all parameters, as in torch
        state.setdefault("func_evals", 0)
        state.setdefault("n_iter", 0)
        run = _Run(group, closure, state)

        first_loss, loss, grad = run.evaluate()
        if _greatest(grad) <= group["tolerance_grad"]:
            return first_loss
        try:
            run.iterate(loss, grad)
        finally:
            state.update(run.memory)
        return first_loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups if "maximize" in self.defaults else ():  # torch >= 2.14
            group.setdefault("maximize", False)

    def state_dtype(self, value: Tensor, param: Tensor, group: dict[str, Any]) -> torch.dtype:
        whole = flat(p.new_empty(0) for p in group["params"])  # all state consists of such vectors
        return value.dtype if value.is_complex() else whole.dtype

    def check_state(
        self, row: dict[str, Any], param: Tensor, group: dict[str, Any], name: str
    ) -> None:
        size = sum(map(torch.numel, map(real, group["params"])))
        for key in ("func_evals", "n_iter"):
            count = row.get(key, 0)
            if not isinstance(count, int) or count < 0:
                raise ValueError(f"{key} of {name} is {count!r}, but must be a count")
        if not row.get("n_iter"):
            return
        if missing := [key for key in _MEMORY if key not in row]:
            raise ValueError(f"the state of {name} has {sorted(row)}, but no {missing[0]}")
        lengths = {key: len(row[key]) for key in PAIRS if isinstance(row[key], list)}
        if len(lengths) < len(PAIRS) or len(set(lengths.values())) > 1:
            raise ValueError(
                f"{', '.join(PAIRS)} of {name} must be lists of the same length, but have lengths "
                f"{lengths}"
            )
        for key in ("d", "prev_flat_grad", "old_dirs", "old_stps"):
            for vector in row[key] if isinstance(row[key], list) else [row[key]]:
                _check_vector(vector, size, f"{key} of {name}")
        for number in (row["t"], row["H_diag"], row["prev_loss"], *row["ro"]):
            plain_number(number, f"t, H_diag, prev_loss or ro of {name}")


def _check_meshes(group: dict[str, Any]) -> None:
    """Raise where the parameters cannot be one vector: torch joins DTensors of one mesh only."""
    first, *rest = map(mesh_of, group["params"])
    for i, mesh in enumerate(rest, 1):
        if mesh != first:
            a, b = ("a plain tensor" if m is None else f"a DTensor on {m}" for m in (first, mesh))
            raise ValueError(
                f"{name_of(group, 0, 0)} is {a}, but {name_of(group, 0, i)} is {b}: LBFGS joins "
                "all parameters in one vector, so make all of them DTensors on one mesh (with "
                "torch.distributed.tensor.distribute_tensor), or none"
            )


def _check_vector(vector: Any, size: int, name: str) -> None:
    """Raise if a saved vector does not match the parameters."""
    if not isinstance(vector, Tensor) or not vector.is_floating_point():
        raise ValueError(f"{name} has {_tree.describe(vector)}, not a floating-point tensor")
    if vector.shape != (size,):
        raise ValueError(
            f"{name} has shape {tuple(vector.shape)}, but must have shape {(size,)}, since the "
            f"parameters have {size} real elements"
        )


class _Run:
    """One step: iterations that move the parameters, evaluating the closure as they go."""

    def __init__(
        self, group: dict[str, Any], closure: Callable[[], Any], state: dict[str, Any]
    ) -> None:
        self.group, self.state = group, state
        self.memory: dict[str, Any] = {name: state.get(name) for name in _MEMORY}
        self.params = list(map(real, group["params"]))
        self.sizes = list(map(Tensor.numel, self.params))
        self.closure = torch.enable_grad()(closure)
        self.sign = -1 if group.get("maximize") else 1

    def evaluate(self) -> tuple[Any, float, Tensor]:
        """The closure's result, the objective, and its gradient as one vector."""
        loss = self.closure()
        self.state["func_evals"] += 1
        grad = flat(map(_dense_grad, self.group["params"]))
        return loss, self.sign * float(loss), grad if self.sign > 0 else grad.neg_()

    def move(self, origin: list[Tensor], t: Any) -> None:
        """Move the parameters to length `t` along the direction."""
        self.memory["t"] = t
        pieces = self.memory["d"].split_with_sizes(self.sizes)
        for p, x, piece in zip(self.params, origin, pieces, strict=True):
            torch.add(x, piece.view_as(p), alpha=t, out=p)

    def search(self, start: Point, tolerance_change: float, max_ls: int) -> Point:
        """Move by the step length that a line search finds."""
        d, origin = self.memory["d"], [p.clone() for p in self.params]

        def evaluate(t: Any) -> Point:
            self.move(origin, t)
            _, loss, grad = self.evaluate()
            return Point(t, loss, grad.dot(d).cpu(), grad)

        found = strong_wolfe(
            evaluate,
            start,
            self.memory["t"],
            scale=_greatest(d).cpu(),
            tolerance_change=tolerance_change,
            max_ls=max_ls,
        )
        self.move(origin, found.t)
        return found

    def iterate(self, loss: float, grad: Tensor) -> None:
        """Iterate until a stopping rule holds."""
        state, memory, group = self.state, self.memory, self.group
        most = state["func_evals"] - 1 + group["max_eval"]
        tolerance_change = group["tolerance_change"]
        for n in range(1, group["max_iter"] + 1):
            state["n_iter"] += 1
            self.choose_direction(grad)
            memory |= {"prev_flat_grad": grad, "prev_loss": loss}
            slope = grad.dot(memory["d"]).cpu()
            if slope > -tolerance_change:
                return
            if group["line_search_fn"] is not None:
                start = Point(0, loss, slope, grad)
                end = self.search(start, tolerance_change, max_ls=most - state["func_evals"])
                loss, grad = end.value, end.grad
            else:
                self.move(self.params, memory["t"])
                if n < group["max_iter"]:
                    _, loss, grad = self.evaluate()
            if (
                n == group["max_iter"]
                or state["func_evals"] >= most
                or _greatest(grad) <= group["tolerance_grad"]
                or _greatest(memory["d"]) * abs(number_of(memory["t"])) <= tolerance_change
                or abs(loss - memory["prev_loss"]) < tolerance_change
            ):
                return

    def choose_direction(self, grad: Tensor) -> None:
        """Store the last step, and set the direction and first length of the next."""
        state, memory = self.state, self.memory
        lr, size = self.group["lr"], self.group["history_size"]
        if state["n_iter"] == 1:
            memory |= {"d": -grad, "old_dirs": [], "old_stps": [], "ro": [], "H_diag": 1}
            memory["t"] = min(1.0, first_length(grad)) * lr
            return
        last = memory["prev_flat_grad"]  # a search that finds no lower loss ends with this gradient
        y = torch.sub(grad, last, out=None if grad is last else last)
        s = memory["d"].mul_(memory["t"])
        ys = y.dot(s)
        if ys > LEAST_CURVATURE:
            ro, memory["H_diag"] = curvature(ys, y.dot(y))
            for name, new in zip(PAIRS, (y, s, ro), strict=True):
                rows = [*memory[name], new]
                memory[name] = rows[max(0, len(rows) - size) :]
        rows = memory["old_dirs"], memory["old_stps"], memory["ro"]
        memory["d"], al = direction(-grad, *rows, memory["H_diag"], _subtract_, Tensor.mul_)
        state.setdefault("al", [None] * size)[: len(al)] = al
        memory["t"] = lr.clone() if isinstance(lr, Tensor) else lr  # a schedule may overwrite it


def _dense_grad(p: Tensor) -> Tensor:
    grad = p.grad
    if grad is None:
        return torch.zeros_like(p)
    return grad if grad.layout is torch.strided else grad.to_dense()


def _greatest(vector: Tensor) -> Tensor:
    """The largest magnitude, computed without a vector of magnitudes."""
    least, most = vector.aminmax()
    return torch.maximum(most, -least)


def _subtract_(x: Tensor, y: Tensor, coefficient: Tensor) -> Tensor:
    if coefficient.is_cpu:
        return x.sub_(y, alpha=coefficient)  # pyright: ignore[reportArgumentType]
    return x.addcmul_(y, coefficient, value=-1)  # alpha= would synchronize with the device
