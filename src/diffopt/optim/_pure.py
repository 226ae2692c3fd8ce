"""from_pure and to_pure: conversion between pure optimizers and those of torch.optim."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffopt import _modes, _tree
from diffopt._arguments import check_type
from diffopt._rule import hyper, running
from diffopt._rule.leafwise import Leafwise
from diffopt._rule.rule import zero_for
from diffopt._tree import Tree
from diffopt.optim import _classes
from diffopt.optim._adapter import RuleOptimizer
from diffopt.optim._checkpoints import copied
from diffopt.optim._compositions import TreeOptimizer
from diffopt.optim._groups import Group, name_of, options, values_of, with_betas
from diffopt.optim._own import LeafwiseOptimizer
from diffopt.optim._plan import filled
from diffopt.optim.lbfgs import LBFGS, PAIRS
from diffopt.optimizer import Optimizer, check_optimizer, copy_
from diffopt.rules.lbfgs import LBFGSState, flat, lbfgs
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
    optimizer: Optimizer[Any, Any],
    params: Iterable[Any] | Mapping[str, Any] | nn.Module,
    **hparams: Any,
) -> torch.optim.Optimizer:
    """Convert any pure optimizer, even a composition or your own, to a `torch.optim.Optimizer`.

    Args:
        optimizer: a pure optimizer.
        params: as for torch.optim: tensors, pairs of name and tensor, or dicts that are parameter
            groups; or a dict, such as `dict(model.named_parameters())`, to whose keys labels and
            trees of hyperparameters can refer; or a module, which stands for that dict.
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
        ValueError: a number is out of range; also raised by `step`, which then changes nothing.

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
    params = _tree.trained(params)
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
    rule = optimizer if isinstance(optimizer, Leafwise) and optimizer.steps_by_rule else None
    if rule and rule.execution == "auto" and scalar:
        return LeafwiseOptimizer(rule, params, numbers)
    return TreeOptimizer(optimizer, params, template, numbers, structure)


def to_pure(optimizer: torch.optim.Optimizer, *, module: nn.Module | None = None) -> Pure:
    """Convert an optimizer of torch.optim or diffopt.optim to a pure one, at any time in a run.

    Args:
        optimizer: of a class of torch.optim or diffopt.optim, or from `from_pure`. The line search
            of LBFGS is the method `search` of the pure one.
        module: the module whose parameters it trains. Then `params`, `state` and trees among
            `hparams` are dicts by name, as those of `diffopt.nn.functionalize(module)`.

    Returns:
        A named tuple of copies. `optimizer` is the pure one; `params` are those of all groups, a
        dict if the optimizer was given names, otherwise a list; in `hparams` a value that differs
        between groups is a tree like params. So an inner loop can start in the middle of training.
        Hyperparameters that are tensors keep their history.

    Raises:
        TypeError: the class is not supported, or overrides `step`; or `module` is not a module.
        ValueError: groups differ in a flag, such as `amsgrad` (but one may have momentum and
            another not), or there are several of a composition; parameters differ in their number
            of steps, of which a pure state has only one; a parameter is not one of the module's;
            or LBFGS maximizes.

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
    names = None if module is None else names_in(optimizer, module)
    _refuse_own_step(optimizer)
    if isinstance(optimizer, TreeOptimizer):
        return _tree_to_pure(optimizer, names)
    if type(optimizer) in (torch.optim.LBFGS, LBFGS):
        return _lbfgs_to_pure(optimizer, names)
    shell = _as_ours(optimizer)
    opt = _common_rule([shell.rule(group) for group in shell.param_groups])
    owners = [(group, p) for group in shell.param_groups for p in group["params"]]
    _, spec = _tree.flatten(_tree_of(shell.param_groups, names))
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
    values = zip(*(_values(shell, opt, group, p) for group, p in owners), strict=True)
    record = hyper.assemble(opt.hparams, [_shared(_tree.clone(column), spec) for column in values])
    if isinstance(shell, _classes.SparseAdam):  # whose rule is for the rows of its gradients
        return Pure(sparse_adam(maximize=opt.maximize), params, state, record)
    return Pure(opt, params, state, record)


def _refuse_own_step(optimizer: torch.optim.Optimizer) -> None:
    """Raise if a subclass of ours does something else than its rule."""
    kinds = RuleOptimizer, TreeOptimizer
    if isinstance(optimizer, kinds) and inspect.unwrap(type(optimizer).step) not in [
        inspect.unwrap(kind.step) for kind in kinds
    ]:
        raise TypeError(
            f"{type(optimizer).__name__} overrides `step`, which nothing pure calls: pass a pure "
            "optimizer that does the same, such as a subclass of diffopt.transforms.Wrapper"
        )


def _common_rule(rules: list[Leafwise[Any, Any]]) -> Leafwise[Any, Any]:
    """A rule that steps all groups: some may have momentum, where the others' is 0."""
    opt: Any = next((rule for rule in rules if getattr(rule, "momentum", False)), rules[0])
    for i, rule in enumerate(rules):
        same: Any = rule
        if getattr(opt, "momentum", False):
            same = dataclasses.replace(same, momentum=True)
        if same != opt:
            raise ValueError(
                f"param_groups[{rules.index(opt)}] is stepped by {opt}, but param_groups[{i}] by "
                f"{rule}: a pure optimizer has the same flags for all params, so create one for "
                "each group, and combine them with diffopt.transforms.partition"
            )
    return opt


def _values(
    optimizer: RuleOptimizer, opt: Leafwise[Any, Any], group: Group, p: Tensor
) -> list[Any]:
    """The hyperparameters of a parameter; where torch has no momentum, nothing is dampened."""
    values = filled(values_of(opt, group), p.dtype)
    if optimizer.rule(group) == opt:
        return values
    pairs = zip(hyper.FIELDS[opt.hparams], values, strict=True)
    return [0.0 if field.name == "dampening" else value for field, value in pairs]


def names_in(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[list[str]]:
    """The names in a module of the parameters of each group; raises for one that is not there."""
    check_type(module, nn.Module, "module", "a torch.nn.Module")
    known = {id(p): name for name, p in module.named_parameters()}
    for i, group in enumerate(optimizer.param_groups):
        for j, param in enumerate(group["params"]):
            if id(param) not in known:
                raise ValueError(
                    f"{name_of(group, i, j)} is not a parameter of the module "
                    f"{type(module).__name__}: create the optimizer with the module's parameters"
                )
    return [[known[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _tree_to_pure(optimizer: TreeOptimizer, names: list[list[str]] | None) -> Pure:
    groups = optimizer.param_groups
    if len(groups) != 1:
        raise ValueError(
            f"the optimizer has {len(groups)} parameter groups, but to_pure supports only one: "
            "pass from_pure a tree for each option that differs, such as "
            "lr={'encoder': 0.1, 'head': 0.01}"
        )
    params = optimizer.params_of(0) if optimizer.structure else _tree_of(groups)
    state, record = copied(optimizer.state_of(0)), _tree.clone(optimizer.record_of(0))
    opt, params = optimizer.optimizer, copied(params)
    if names is None or (isinstance(params, dict) and [*params] == names[0]):
        return Pure(opt, params, state, record)
    tensors, spec = _tree.flatten(params)
    named = dict(zip(names[0], tensors, strict=True))
    try:
        structure = _tree.flatten(opt.init(named))[1]
        state = _tree.unflatten(_tree.flatten(state)[0], structure)
        record = hyper.map_records(lambda x: _by_name(x, spec, params, names[0]), record)
    except ValueError as error:
        raise ValueError(
            f"the state of {opt!r} has no names ({error}): create the optimizer with "
            "from_pure(optimizer, dict(module.named_parameters()))"
        ) from error
    return Pure(opt, named, state, record)


def _by_name(record: Any, spec: _tree.Spec, params: Tree, names: list[str]) -> Any:
    """A record whose trees like params are dicts with these names."""
    values = [
        field.tree
        if _tree.is_leaf(field.tree) or not field.per_parameter
        else {name: field.at(i) for i, name in enumerate(names)}
        for field in hyper.broadcast(record, spec, params)
    ]
    return hyper.assemble(type(record), values)


def _lbfgs_to_pure(optimizer: torch.optim.Optimizer, names: list[list[str]] | None) -> Pure:
    """Convert LBFGS, which has a single vector and all its state with the first parameter."""
    (group,) = optimizer.param_groups
    if group.get("maximize"):  # torch >= 2.14
        raise ValueError("LBFGS(maximize=True) has no pure form: minimize the negated loss")
    opt = lbfgs(history_size=group["history_size"])
    params = copied(_tree_of(optimizer.param_groups, names))
    state, row = opt.init(params), optimizer.state.get(group["params"][0], {})
    if row.get("n_iter"):
        for name in PAIRS if row["old_dirs"] else ():
            rows = row[name][-opt.history_size :]  # which may have been lowered
            kept = torch.stack([*map(_modes.tensor_of, rows)])
            getattr(state, name)[-len(kept) :] = kept
        state = state._replace(
            step=torch.full_like(state.step, row["n_iter"]),
            H_diag=_modes.tensor_of(row["H_diag"]).to(state.H_diag, copy=True),
            prev_flat_grad=copied(row["prev_flat_grad"]),
            prev_flat_step=copied(row["d"] * row["t"]),
        )
    return Pure(opt, params, state, opt.hparams(lr=_tree.clone(group["lr"])))


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


def _tree_of(groups: list[Group], names: list[list[str]] | None = None) -> Tree:
    """The parameters of all groups: a dict if they have names, otherwise a list."""
    tensors = [p for group in groups for p in group["params"]]
    given = [group.get("param_names", ()) for group in groups] if names is None else names
    flat = [name for group in given for name in group]
    return dict(zip(flat, tensors, strict=True)) if flat else tensors


def _pure_row(
    optimizer: RuleOptimizer, opt: Leafwise[Any, Any], group: Group, p: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """A parameter's step count, and its buffers in the shapes of the pure state."""
    row = dict(optimizer.state[p]) if p in optimizer.state else {}
    begun = bool(row) and all(value is not None for value in row.values())
    if not begun:
        row = optimizer.new_states([p], group)[0]
    buffers: dict[str, Tensor] = {}
    own = optimizer.rule(group).buffers_of(p)
    for name in opt.buffers_of(p):
        value = row.get(name, p.new_empty(0) if name in own else torch.zeros_like(p))
        if name in opt.per_hyperparameter:
            value = value.to(zero_for([p]))
        buffers[name] = copied(value.to_dense() if value.is_sparse else value)
    # Where torch keeps no count, it only matters that the next step is not the first.
    return float(row.get("step", begun)), buffers


def restore_(optimizer: torch.optim.Optimizer, old: Any, new: Any, moved: Sequence[bool]) -> None:
    """Overwrite an optimizer's state with a pure one that began as `to_pure`'s, `old`.

    `moved` says which parameters have had a gradient since; the state of others is left alone.

    Raises:
        ValueError: the optimizer has no place for that state.
    """
    new = _tree.ordered_like(new, old, ("the new state", "state"))
    if isinstance(optimizer, TreeOptimizer):
        copy_(zip(_tree.leaves(optimizer.state_of(0)), _tree.leaves(new), strict=True))
        return
    if type(optimizer) in (torch.optim.LBFGS, LBFGS):
        _restore_lbfgs_(optimizer, old, new)
        return
    shell = _as_ours(optimizer)
    params = [(group, p) for group in shell.param_groups for p in group["params"]]
    rows = [
        _torch_row(shell, new, i, group, p)
        for i, ((group, p), move) in enumerate(zip(params, moved, strict=True))
        if move and shell.rule(group).buffers_of(p)
    ]
    optimizer.state.update(rows)


def _restore_lbfgs_(optimizer: torch.optim.Optimizer, old: LBFGSState, new: LBFGSState) -> None:
    """The inverse of `_lbfgs_to_pure`: a step taken is a direction with length 1."""
    if new.step == old.step:
        return
    params = optimizer.param_groups[0]["params"]
    row, dtype = optimizer.state[params[0]], flat(p.new_empty(0) for p in params).dtype
    kept = {name: getattr(new, name)[new.ro != 0] for name in PAIRS}
    vectors = {"d": new.prev_flat_step, "prev_flat_grad": new.prev_flat_grad, "H_diag": new.H_diag}
    tensors = _tree.map_tensors(lambda x: x.detach().to(dtype, copy=True), vectors | kept)
    row.update(tensors | {name: [*tensors[name]] for name in kept})
    steps = int(new.step) - row.get("n_iter", 0)
    row.update(t=1.0, n_iter=int(new.step), func_evals=row.get("func_evals", 0) + steps)
    row.setdefault("prev_loss", 0.0)  # the next iteration sets it before it reads it


def _torch_row(
    optimizer: RuleOptimizer, state: Any, i: int, group: Group, p: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """A parameter and its state as torch keeps it: the inverse of `_pure_row`."""
    (row,) = optimizer.new_states([p], group)
    for name in optimizer.rule(group).buffers_of(p).keys() & row.keys():
        value = _tree.leaves(getattr(state, name))[i].detach()
        if name in optimizer.scalar_state:
            numbers = _modes.real(value).unique()
            if len(numbers) != 1:
                raise ValueError(f"{name} differs between the elements of a parameter")
            row[name] = optimizer.new_scalar(numbers[0], p, group)
        else:
            row[name].copy_(value)
    if "step" in row:
        row["step"] = optimizer.new_scalar(state.step, p, group)
    return p, row


def _shared(values: Sequence[Any], spec: _tree.Spec) -> Any:
    """A single value if all are the same number, otherwise a tree of them."""
    first = values[0]
    if all(type(v) is type(first) and bool(v == first) for v in values):
        return first
    return _tree.unflatten(values, spec)
