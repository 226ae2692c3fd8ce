"""from_pure and to_pure: between pure optimizers and those of torch.optim."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import _torch, _tree
from diffopt._rule import hyper, running
from diffopt._rule.leafwise import Leafwise
from diffopt._tree import Tree
from diffopt.optim import _classes
from diffopt.optim._adapter import RuleOptimizer
from diffopt.optim._checkpoints import Checkpoints, copied
from diffopt.optim._plan import Group, values_of
from diffopt.optim.lbfgs import LBFGS
from diffopt.optimizer import Optimizer
from diffopt.rules.lbfgs import lbfgs
from diffopt.rules.sparse_adam import sparse_adam

_CLASSES: dict[type, type[RuleOptimizer]] = {
    getattr(torch.optim, cls.__name__): cls
    for cls in vars(_classes).values()
    if isinstance(cls, type) and issubclass(cls, RuleOptimizer) and cls is not RuleOptimizer
}
"""Our class for each class of torch.optim."""


class Pure(NamedTuple):
    """What `to_pure` returns: the arguments of `optimizer.update`, but for the gradients."""

    optimizer: Optimizer[Any, Any]
    params: Tree
    state: Any
    hparams: Any


def from_pure(
    optimizer: Optimizer[Any, Any], params: Iterable[Any] | Mapping[str, Any], **hparams: Any
) -> torch.optim.Optimizer:
    """Make a `torch.optim.Optimizer` of any pure one, a composition or your own included.

    Args:
        optimizer: a pure optimizer.
        params: what torch.optim takes: tensors, pairs of name and tensor, or dicts that are
            parameter groups; or a dict, such as `dict(model.named_parameters())`, that labels and
            hyperparameters which are trees can refer to.
        **hparams: hyperparameters. Each is a value of every parameter group, `group["lr"]` and the
            like, which groups and schedulers may set. Where parts of a composition share a name,
            it is `"part.name"`, such as `"body.lr"`.

    Returns:
        The optimizer. Its steps are in place and record no graph. State is that of each parameter
        where the optimizer was made by `diffopt.rules.leafwise`; else that of a whole group, which
        stands in the state of its first parameter.

    Raises:
        TypeError: a hyperparameter is unknown; the message lists those there are.
        ValueError: a number is out of its range.

    Example:
        >>> import torch, diffopt
        >>> from diffopt.transforms import chain, clip_by_global_norm
        >>> opt = chain(clip_by_global_norm(), diffopt.adamw())
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = diffopt.optim.from_pure(opt, model.parameters(), lr=0.1, max_norm=1.0)
        >>> model(torch.ones(2, 3)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.param_groups[0]["lr"]
        0.1
    """
    if not isinstance(optimizer, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, not a diffopt.Optimizer")
    spec = None
    if isinstance(params, Mapping):
        tensors, spec = _tree.flatten(params)
        params = list(zip(_tree.paths(params, ""), tensors, strict=True))
    template, numbers = _template(optimizer.hparams, hparams)
    params = list(params)
    groups = [group for group in params if isinstance(group, dict)]
    values = [v for group in [numbers, *groups] for k, v in group.items() if k in numbers]
    scalar = all(map(running.is_scalar, values))
    if isinstance(optimizer, Leafwise) and optimizer.execution == "auto" and scalar:
        return LeafwiseOptimizer(optimizer, params, numbers)
    return TreeOptimizer(optimizer, params, template, numbers, spec)


class LeafwiseOptimizer(RuleOptimizer):
    """What `from_pure` returns for an optimizer made by `leafwise`."""

    def __init__(
        self, optimizer: Leafwise[Any, Any], params: Iterable[Any], hparams: dict[str, Any]
    ) -> None:
        self.optimizer = optimizer
        super().__init__(params, hparams)

    def rule(self, group: Group) -> Leafwise[Any, Any]:
        return self.optimizer

    def check_param(self, param: Tensor, group: Group, name: str) -> None:
        super().check_param(param, group, name)
        if reason := self.optimizer.refuse(param):
            raise ValueError(f"{name} {reason}")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizer": self.optimizer}


class TreeOptimizer(Checkpoints):
    """What `from_pure` returns for all others."""

    def __init__(
        self,
        optimizer: Optimizer[Any, Any],
        params: Iterable[Any],
        template: Any,
        hparams: dict[str, Any],
        spec: _tree.Spec | None,
    ) -> None:
        self.optimizer, self.template, self.spec = optimizer, template, spec
        super().__init__(params, hparams)

    @_torch.disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step; `closure` reevaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                grads = self._tree(group, [param.grad for param in group["params"]])
                params, state = self._tree(group, group["params"]), self._state(group)
                self.optimizer.update_(params, grads, state, self._record(group))
        return loss

    def to_pure(self) -> Pure:
        """A copy of its only group's state."""
        if len(self.param_groups) != 1:
            raise ValueError(f"there are {len(self.param_groups)} groups, but must be one")
        (group,) = self.param_groups
        params = self._tree(group, group["params"])
        if self.spec is None:
            params = _tree_of(self.param_groups)
        parts = copied((params, self._state(group), self._record(group)))
        return Pure(self.optimizer, *parts)

    def _tree(self, group: Group, leaves: list[Any]) -> Tree:
        if self.spec is None or group is not self.param_groups[0]:
            return leaves
        return _tree.unflatten(leaves, self.spec)

    def _state(self, group: Group) -> Any:
        row = self.state[group["params"][0]]
        if "state" not in row:
            row["state"] = self.optimizer.init(self._tree(group, group["params"]))
        return row["state"]

    def _record(self, group: Group) -> Any:
        return _with_numbers(self.template, group)

    def __getstate__(self) -> dict[str, Any]:
        own = {"optimizer": self.optimizer, "template": self.template, "spec": self.spec}
        return {**super().__getstate__(), **own}


def to_pure(optimizer: torch.optim.Optimizer) -> Pure:
    """Take an optimizer of torch.optim or diffopt.optim apart, in the middle of a run or before it.

    Args:
        optimizer: of a class of torch.optim or diffopt.optim, or from `from_pure`. A line search
            of LBFGS is `search` of the pure one.

    Returns:
        A named tuple of copies: `optimizer`, the pure one; `params`, a dict where the optimizer was
        given names, else a list, of all groups; `state`; and `hparams`, in which a value that
        differs between groups is a tree like params. So an inner loop can start where training
        stands.

    Raises:
        TypeError: the class is not known.
        ValueError: groups differ in an option that is no hyperparameter, or parameters in their
            number of steps: a pure state has one.

    Example:
        >>> import torch, diffopt
        >>> p = torch.nn.Parameter(torch.ones(1))
        >>> trained = torch.optim.Adam([p], lr=0.1)
        >>> p.grad = torch.ones(1)
        >>> trained.step()
        >>> opt, params, state, hp = diffopt.optim.to_pure(trained)
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> hp = opt.hparams(lr=lr)
        >>> new, _ = opt.update(params, [torch.ones(1)], state, hp)
        >>> torch.autograd.grad(new[0].sum(), lr)[0].round(decimals=4)
        tensor(-1.)
    """
    if isinstance(optimizer, TreeOptimizer):
        return optimizer.to_pure()
    if type(optimizer) in (torch.optim.LBFGS, LBFGS):
        return _lbfgs_to_pure(optimizer)
    shell = _as_ours(optimizer)
    rules = [shell.rule(group) for group in shell.param_groups]
    opt = rules[0]
    if any(rule != opt for rule in rules):
        raise ValueError("parameter groups differ in an option that is no hyperparameter")
    owners = [(group, p) for group in shell.param_groups for p in group["params"]]
    _, spec = _tree.flatten(_tree_of(shell.param_groups))
    params = _tree.unflatten([copied(p) for _, p in owners], spec)
    rows = [_pure_row(shell, opt, group, p) for group, p in owners]
    steps = {step for step, _ in rows if step}
    if len(steps) > 1:
        raise ValueError(f"parameters differ in their number of steps: {sorted(steps)}")
    state = opt.init(params)
    for step in steps:
        columns = {name: [row[name] for _, row in rows] for name in opt.buffers_of(owners[0][1])}
        buffers = {name: _tree.unflatten(column, spec) for name, column in columns.items()}
        state = state._replace(step=torch.full_like(state.step, step), **buffers)
    values = zip(*(_pure_values(opt, group, p) for group, p in owners), strict=True)
    record = hyper.assemble(opt.hparams, [_shared(column, spec) for column in values])
    if isinstance(shell, _classes.SparseAdam):  # whose rule is that of the rows of its gradients
        return Pure(sparse_adam(maximize=opt.maximize), params, state, record)
    return Pure(opt, params, state, record)


def _lbfgs_to_pure(optimizer: torch.optim.Optimizer) -> Pure:
    """All is one vector there, and the state of all is that of the first parameter."""
    (group,) = optimizer.param_groups
    opt = lbfgs(history_size=group["history_size"])
    params = copied(_tree_of(optimizer.param_groups))
    state, row = opt.init(params), optimizer.state.get(group["params"][0], {})
    if row.get("n_iter"):
        k = len(row["old_dirs"])
        pairs = {name: getattr(state, name).clone() for name in ("old_dirs", "old_stps", "ro")}
        for name, rows in pairs.items() if k else ():
            rows[-k:] = torch.stack([torch.as_tensor(x) for x in row[name]])
        state = state._replace(
            step=torch.full_like(state.step, row["n_iter"]),
            H_diag=torch.as_tensor(row["H_diag"]).to(state.H_diag, copy=True),
            prev_flat_grad=copied(row["prev_flat_grad"]),
            prev_flat_step=copied(row["d"] * row["t"]),
            **pairs,
        )
    return Pure(opt, params, state, opt.hparams(lr=copied(group["lr"])))


def _as_ours(optimizer: torch.optim.Optimizer) -> RuleOptimizer:
    """The optimizer as an instance of our class, with the same groups and state."""
    if isinstance(optimizer, RuleOptimizer):
        return optimizer
    ours = _CLASSES.get(type(optimizer))
    if ours is None:
        known = sorted(["LBFGS", *(cls.__name__ for cls in _CLASSES)])
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, but must be one of {known}")
    shell = ours.__new__(ours)
    shell.defaults, shell.state = optimizer.defaults, optimizer.state
    shell.param_groups = optimizer.param_groups
    return shell


def _tree_of(groups: list[Group]) -> Tree:
    """The parameters of all groups: by name where they have names, else a list."""
    tensors = [p for group in groups for p in group["params"]]
    names = [name for group in groups for name in group.get("param_names", ())]
    return dict(zip(names, tensors, strict=True)) if names else tensors


def _pure_row(
    optimizer: RuleOptimizer, opt: Leafwise[Any, Any], group: Group, p: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """A parameter's count of steps, and its buffers in the shapes of the pure state."""
    row = dict(optimizer.state[p]) if p in optimizer.state else {}
    begun = bool(row) and all(value is not None for value in row.values())
    if not begun:
        row = optimizer.new_states([p], group)[0]
    buffers: dict[str, Tensor] = {}
    for name in opt.buffers_of(p):
        value = row.get(name, p.new_empty(0))
        if name in optimizer.scalar_state:
            number = value.item()
            value = torch.full_like(p, complex(number, number) if p.is_complex() else number)
        buffers[name] = copied(value.to_dense() if value.is_sparse else value)
    # Where torch keeps no count, it is enough that the next step is not the first.
    return float(row.get("step", begun)), buffers


def _pure_values(opt: Leafwise[Any, Any], group: Group, p: Tensor) -> list[Any]:
    """The hyperparameters of one parameter."""
    eps = torch.finfo(p.dtype).eps  # torch's None for Adafactor's eps1
    return [eps if value is None else copied(value) for value in values_of(opt, group)]


def _shared(values: Sequence[Any], spec: _tree.Spec) -> Any:
    """One value where all are the same number, else a tree of them."""
    first = values[0]
    if all(type(v) is type(first) and bool(v == first) for v in values):
        return first
    return _tree.unflatten(values, spec)


def _records(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The records in a tree of hyperparameters, and where they stand."""
    if _is_record(tree):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from _records(child, (*path, str(key)))
    elif isinstance(tree, (tuple, list)):
        for i, child in enumerate(tree):
            yield from _records(child, (*path, str(i)))


def _is_record(node: Any) -> bool:
    return type(node) in hyper.FIELDS


def _numbers(template: Any) -> dict[str, Any]:
    """The hyperparameters by name; one whose name is not unique has its part's before it."""
    fields = [
        (path, field.name, getattr(record, field.name))
        for path, record in _records(template)
        for field in hyper.FIELDS[type(record)]
    ]
    names = Counter(name for _, name, _ in fields)
    return {
        name if names[name] == 1 else ".".join((*path, name)): value for path, name, value in fields
    }


def _with_numbers(template: Any, group: Group) -> Any:
    """The records with the values of a group."""
    values = iter([group[name] for name in _numbers(template)])

    def filled(record: Any) -> Any:
        fields = hyper.FIELDS[type(record)]
        return hyper.assemble(type(record), [next(values) for _ in fields])

    return _tree.map(filled, template, is_leaf=_is_record)


def _template(maker: Callable[..., Any], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The records that a maker makes, and the values of `given` put in, checked."""
    template = maker(**{name: value for name, value in given.items() if "." not in name})
    numbers = _numbers(template)
    if unknown := given.keys() - numbers.keys():
        raise TypeError(f"there is no hyperparameter {sorted(unknown)[0]!r}, only {list(numbers)}")
    numbers |= given
    for _, record in _records(_with_numbers(template, numbers)):
        type(record)(**{f.name: getattr(record, f.name) for f in hyper.FIELDS[type(record)]})
    return template, numbers
