"""from_pure and to_pure: conversion between pure optimizers and those of torch.optim."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import _tree
from diffopt._rule import hyper, running
from diffopt._rule.leafwise import Leafwise
from diffopt._rule.rule import zero_for
from diffopt._tree import Tree
from diffopt.optim import _classes
from diffopt.optim._adapter import RuleOptimizer
from diffopt.optim._checkpoints import copied
from diffopt.optim._compositions import TreeOptimizer
from diffopt.optim._groups import Group, options, values_of, with_betas
from diffopt.optim._own import LeafwiseOptimizer
from diffopt.optim._plan import filled
from diffopt.optim.lbfgs import LBFGS
from diffopt.optimizer import Optimizer, check_optimizer
from diffopt.rules.lbfgs import lbfgs
from diffopt.rules.sparse_adam import sparse_adam

_CLASSES: dict[type, type[RuleOptimizer]] = {
    getattr(torch.optim, name): cls
    for name, cls in vars(_classes).items()
    if isinstance(cls, type) and issubclass(cls, RuleOptimizer) and name in vars(torch.optim)
}
"""The class of diffopt.optim for each class of torch.optim."""


class Pure(NamedTuple):
    """What `to_pure` returns: an optimizer and the arguments of its `update` except gradients."""

    optimizer: Optimizer[Any, Any]
    params: Tree
    state: Any
    hparams: Any


def from_pure(
    optimizer: Optimizer[Any, Any], params: Iterable[Any] | Mapping[str, Any], **hparams: Any
) -> torch.optim.Optimizer:
    """Convert any pure optimizer, even a composition or your own, to a `torch.optim.Optimizer`.

    Args:
        optimizer: a pure optimizer.
        params: as for torch.optim: tensors, pairs of name and tensor, or dicts that are parameter
            groups; or a dict, such as `dict(model.named_parameters())`, to whose keys labels and
            trees of hyperparameters can refer.
        **hparams: hyperparameters. Each becomes a value in every parameter group, such as
            `group["lr"]`, which groups and schedulers may set. beta1 and beta2 are `betas` there,
            as in torch.optim. If parts of a composition share a name, use `"part.name"`, such as
            `"body.lr"`; then `lr` is a common factor of all learning rates, 1 unless a group or a
            scheduler sets it.

    Returns:
        The optimizer. Its steps are in place and record no graph. `state[p]` holds the state of a
        parameter as tensors by field name, so `state_dict` loads with weights_only=True and works
        with torch.distributed.checkpoint. State of all parameters of a group, such as a step count,
        is one 0-d tensor shared by all of them; larger tensors, such as the history of `lbfgs` or
        the vectors of `flatten`, are in the state of the first parameter.

    Raises:
        TypeError: a hyperparameter is unknown; the message lists the known ones.
        ValueError: a number is out of range.

    Examples:
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
    check_optimizer(optimizer, "optimizer")
    if not isinstance(params, Iterable) or isinstance(params, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"params is {_tree.describe(params)}, not tensors to iterate over")
    structure = None
    if isinstance(params, Mapping):
        tensors, spec = _tree.flatten(params)
        structure = _tree.unflatten(range(len(tensors)), spec)
        params = list(zip(_tree.paths(params, ""), tensors, strict=True))
    template, numbers = options(optimizer.hparams, hparams)
    params = list(params)
    groups = [with_betas(group.copy(), numbers) for group in params if isinstance(group, dict)]
    values = [v for group in [numbers, *groups] for k, v in group.items() if k in numbers]
    scalar = all(running.is_scalar(x) for v in values for x in (v if type(v) is tuple else (v,)))
    if isinstance(optimizer, Leafwise) and optimizer.execution == "auto" and scalar:
        return LeafwiseOptimizer(optimizer, params, numbers)
    return TreeOptimizer(optimizer, params, template, numbers, structure)


def to_pure(optimizer: torch.optim.Optimizer) -> Pure:
    """Convert an optimizer of torch.optim or diffopt.optim to a pure one, at any time in a run.

    Args:
        optimizer: of a class of torch.optim or diffopt.optim, or from `from_pure`. The line search
            of LBFGS is the method `search` of the pure one.

    Returns:
        A named tuple of copies: `optimizer`, the pure one; `params` of all groups, a dict if the
        optimizer was given names, otherwise a list; `state`; and `hparams`, where a value that
        differs between groups is a tree like params. So an inner loop can start in the middle of
        training.

    Raises:
        TypeError: the class is not supported.
        ValueError: groups differ in a flag, such as `amsgrad`, or parameters differ in
            their number of steps: a pure state has only one.

    Examples:
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
        return _tree_to_pure(optimizer)
    if type(optimizer) in (torch.optim.LBFGS, LBFGS):
        return _lbfgs_to_pure(optimizer)
    shell = _as_ours(optimizer)
    rules = [shell.rule(group) for group in shell.param_groups]
    opt = rules[0]
    if others := [i for i, rule in enumerate(rules) if rule != opt]:
        raise ValueError(
            f"param_groups[0] is stepped by {opt}, but param_groups[{others[0]}] by "
            f"{rules[others[0]]}: a pure optimizer has the same flags for all params"
        )
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
    values = zip(*(filled(values_of(opt, group), p.dtype) for group, p in owners), strict=True)
    record = hyper.assemble(opt.hparams, [_shared(copied(column), spec) for column in values])
    if isinstance(shell, _classes.SparseAdam):  # whose rule is for the rows of its gradients
        return Pure(sparse_adam(maximize=opt.maximize), params, state, record)
    return Pure(opt, params, state, record)


def _tree_to_pure(optimizer: TreeOptimizer) -> Pure:
    groups = optimizer.param_groups
    if len(groups) != 1:
        raise ValueError(f"there are {len(groups)} parameter groups, but only one is supported")
    params = optimizer.params_of(0) if optimizer.structure else _tree_of(groups)
    state = optimizer.state_of(0)
    return Pure(optimizer.optimizer, *copied((params, state, optimizer.record_of(0))))


def _lbfgs_to_pure(optimizer: torch.optim.Optimizer) -> Pure:
    """Convert LBFGS, which has a single vector and all its state with the first parameter."""
    (group,) = optimizer.param_groups
    opt = lbfgs(history_size=group["history_size"])
    params = copied(_tree_of(optimizer.param_groups))
    state, row = opt.init(params), optimizer.state.get(group["params"][0], {})
    if row.get("n_iter"):
        for name in ("old_dirs", "old_stps", "ro") if row["old_dirs"] else ():
            kept = torch.stack([torch.as_tensor(x) for x in row[name]])
            getattr(state, name)[-len(kept) :] = kept
        state = state._replace(
            step=torch.full_like(state.step, row["n_iter"]),
            H_diag=torch.as_tensor(row["H_diag"]).to(state.H_diag, copy=True),
            prev_flat_grad=copied(row["prev_flat_grad"]),
            prev_flat_step=copied(row["d"] * row["t"]),
        )
    return Pure(opt, params, state, opt.hparams(lr=copied(group["lr"])))


def _as_ours(optimizer: torch.optim.Optimizer) -> RuleOptimizer:
    """The optimizer as an instance of diffopt's class, with the same groups and state."""
    if isinstance(optimizer, RuleOptimizer):
        return optimizer
    ours = _CLASSES.get(type(optimizer))
    if ours is None:
        if isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer is {optimizer!r}, which is pure already")
        known = sorted(["LBFGS", *(cls.__name__ for cls in _CLASSES)])
        raise TypeError(
            f"optimizer has class {type(optimizer).__name__}, but must have one of {known}"
        )
    shell = ours.__new__(ours)
    shell.defaults, shell.state = optimizer.defaults, optimizer.state
    shell.param_groups = optimizer.param_groups
    return shell


def _tree_of(groups: list[Group]) -> Tree:
    """The parameters of all groups: a dict if they have names, otherwise a list."""
    tensors = [p for group in groups for p in group["params"]]
    names = [name for group in groups for name in group.get("param_names", ())]
    return dict(zip(names, tensors, strict=True)) if names else tensors


def _pure_row(
    optimizer: RuleOptimizer, opt: Leafwise[Any, Any], group: Group, p: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """A parameter's step count, and its buffers in the shapes of the pure state."""
    row = dict(optimizer.state[p]) if p in optimizer.state else {}
    begun = bool(row) and all(value is not None for value in row.values())
    if not begun:
        row = optimizer.new_states([p], group)[0]
    buffers: dict[str, Tensor] = {}
    for name in opt.buffers_of(p):
        value = row.get(name, p.new_empty(0))
        if name in opt.per_hyperparameter:
            value = value.to(zero_for(p))
        buffers[name] = copied(value.to_dense() if value.is_sparse else value)
    # Where torch keeps no count, it only matters that the next step is not the first.
    return float(row.get("step", begun)), buffers


def _shared(values: Sequence[Any], spec: _tree.Spec) -> Any:
    """A single value if all are the same number, otherwise a tree of them."""
    first = values[0]
    if all(type(v) is type(first) and bool(v == first) for v in values):
        return first
    return _tree.unflatten(values, spec)
