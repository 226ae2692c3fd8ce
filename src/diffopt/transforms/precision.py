"""precision(): the state of an optimizer in bfloat16, and float32 master weights."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._rule import checks, parts, running, tiles, ways
from diffopt._rule.hyper import check_flags
from diffopt._rule.leafwise import Leafwise, write_
from diffopt._rule.rule import Rule, unused
from diffopt._rule.work import Work, gather as gather_work
from diffopt._tree import Tree
from diffopt.optimizer import Write
from diffopt.transforms._base import Leaves, Wrapper, gather, wide
from diffopt.transforms._rounding import Rounding, through

Masters: TypeAlias = list[Tensor | None]


class PrecisionState(NamedTuple):
    """State of `precision`: the master weights, `[]` where there is none; the optimizer's state."""

    master: Tree
    inner: Any


torch.serialization.add_safe_globals([PrecisionState])


class Precision(Wrapper[PrecisionState]):
    """Keep the state of an optimizer in bfloat16, and master weights for half-precision params.

    Every step converts the state to float32, computes as before, and rounds the new state. To
    nearest, an average in bfloat16 would stop: 0.999 * v is v again. So it is rounded up or down at
    random, with probabilities such that

        E[round(x)] = x

    Nonnegative numbers stay nonnegative, and what bfloat16 can hold stays as it is.

    Params narrower than `master_dtype` are rounded to nearest from a master copy, which is what is
    updated: `state.master`. Where a param is no longer the rounding of its master, it has been set
    since, as by `load_state_dict` of a model, and its value becomes that of the master.

    Random numbers come from torch's default generator: loops that recompute their steps, such as
    those of `Checkpointed`, draw them again, and `torch.vmap` needs `randomness="different"` or
    "same" (and a torch newer than 2.11). `update` and `update_` draw the same numbers.

    Derivatives are those of the expectation: a rounded number has the derivative of the number
    itself, and a master that of its param. Autograd rounds the gradients of bfloat16 tensors to
    nearest, which adds up in the derivative through hundreds of steps: there, keep the state in
    float32.

    Hyperparameters are those of the optimizer. With a rule such as `adamw()`, `update_` holds
    copies in float32 of at most one tensor at a time, or, if it is elementwise, of pieces of a few
    MB. With a composition it holds a copy of the whole state.

    Args:
        optimizer: any optimizer. Put `precision` around a whole composition: inside `chain` or
            `accumulate`, which pass on float32 copies of half-precision params, it raises. With
            `flatten`, whose vectors are float32 and like no param, there are either masters
            (outside) or vectors in bfloat16 (inside).
        state_dtype: the dtype of buffers with the shape of their param: torch.bfloat16, or None to
            leave them. Step counts, other single numbers and complex buffers stay as they are.
        master_dtype: torch.float32, torch.float64, or None for no masters: then half-precision
            params are rounded as the state is.
        stochastic: round at random; False for to nearest. float16 is always rounded to nearest.

    Raises:
        TypeError: `optimizer` is not an optimizer, or `stochastic` is not a bool.
        ValueError: a dtype is not supported; (from `update`) `state.master` does not fit.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.transforms.precision(diffopt.adamw())
        >>> params = {"w": torch.ones(3, dtype=torch.bfloat16)}
        >>> state, hp = opt.init(params), opt.hparams(lr=1e-4)
        >>> for _ in range(10):
        ...     params, state = opt.update(params, {"w": torch.ones_like(params["w"])}, state, hp)
        >>> params["w"]  # half a unit in the last place is 0.002
        tensor([1., 1., 1.], dtype=torch.bfloat16)
        >>> state.master["w"].round(decimals=4)
        tensor([0.9990, 0.9990, 0.9990])
        >>> state.inner.exp_avg_sq["w"].dtype
        torch.bfloat16

    Source: Micikevicius et al., "Mixed precision training", 2018, for master weights; Zamirai et
    al., "Revisiting bfloat16 training", 2020, for stochastic rounding.
    """

    _: KW_ONLY
    state_dtype: torch.dtype | None = torch.bfloat16
    master_dtype: torch.dtype | None = torch.float32
    stochastic: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(stochastic=self.stochastic)
        _check_dtype(self.state_dtype, "state_dtype", torch.bfloat16, None)
        _check_dtype(self.master_dtype, "master_dtype", torch.float32, torch.float64, None)

    def init(self, params: Tree) -> PrecisionState:
        tensors, spec = _tree.flatten(params)
        rule = self.optimizer if isinstance(self.optimizer, Leafwise) else None
        checks.params(tensors, params, rule and rule.refuse)
        checks.undistributed(params, "params", "precision")
        masters = [p.detach().to(self.master_dtype) if self._mastered(p) else None for p in tensors]
        pairs = zip(tensors, masters, strict=True)
        used = (wide(p) if m is None else m for p, m in pairs)
        if rule is None or not tensors:
            tree = _tree.unflatten(used, spec)
            inner = self._narrowed(self.optimizer.init(tree), tree)
        else:  # one by one: only the buffers of one tensor are there in float32
            inner = _joined([self._narrowed(rule.init([p]), [p]) for p in used], spec)
        return PrecisionState(_pruned(masters, spec), inner)

    def update(
        self, params: Tree, grads: Tree, state: PrecisionState, hparams: Any
    ) -> tuple[Tree, PrecisionState]:
        leaves, masters = self._gather(params, grads, state)
        some = leaves.moved(map(_used, leaves.params, masters))
        used = leaves.filled(some, leaves.params)
        pairs = zip(leaves.gradients(), some, strict=True)
        wide_grads = leaves.filled(grad.to(p.dtype) for grad, p in pairs)
        wide_inner = _tree.map_tensors(wide, state.inner)
        new, new_inner = self.optimizer.update(used, wide_grads, wide_inner, hparams)

        rows = zip(masters, _tree.leaves(used), _tree.leaves(new), strict=True)
        new_masters = _pruned((m if m is None or n is u else n for m, u, n in rows), leaves.spec)
        old, spec = _tree.flatten((state.inner, params))
        trees = (wide_inner, used), (new_inner, new)
        rounding = self._rounding(_tree.leaves(state.inner), leaves.params, masters)
        rows = enumerate(zip(old, *map(_tree.leaves, trees), strict=True))
        narrow = [o if n is u else rounding.rounded(k, n, o) for k, (o, u, n) in rows]
        inner, new_params = _tree.unflatten(narrow, spec)
        return new_params, PrecisionState(new_masters, inner)

    def prepare_(self, params: Tree, grads: Tree, state: PrecisionState, hparams: Any) -> Write:
        leaves, masters = self._gather(params, grads, state)
        rule = self.optimizer
        foreign = _modes.observed() or not _modes.all_ordinary(leaves.params)
        if foreign or not isinstance(rule, Leafwise) or not rule.steps_by_rule:
            return super().prepare_(params, grads, state, hparams)
        work = gather_work(rule, params, grads, state.inner, hparams)
        if work.may_grow():
            return super().prepare_(params, grads, state, hparams)
        fields = zip(rule.buffer_names, work.buffers, strict=True)
        pairs = zip(masters, work.params, strict=True)
        columns = {
            "params": work.params,
            **{f"state.inner.{name}": column for name, column in fields if _holds(column)},
            "state.master": [p.new_empty(0) if m is None else m for m, p in pairs],
        }
        count = state.inner.step
        checks.writable(columns, params, count, work.grads, work.numbers, coarse=True)

        def write() -> None:
            buffers = itertools.chain(*filter(_holds, work.buffers))
            rounding = self._rounding(buffers, work.params, masters)
            write_(work, count, functools.partial(_step_, work, masters, rounding))

        return write

    def _gather(self, params: Tree, grads: Tree, state: Any) -> tuple[Leaves, Masters]:
        checks.instance(state, PrecisionState, "state", "init()")
        leaves = gather(params, grads)
        checks.undistributed(params, "params", "precision")
        narrow = [p if self._mastered(p) else None for p in leaves.params]
        expected, owners = _pruned(narrow, leaves.spec), [p for p in narrow if p is not None]
        names = ("state.master", "the params that have a master")
        try:
            found = _tree.leaves_like(state.master, _tree.flatten(expected)[1], expected, names)
        except ValueError as error:
            raise ValueError(
                f"{error}. Those are narrower than {self.master_dtype}: create the state with "
                "init() for params of these dtypes, and put precision around a composition, whose "
                "parts may see them in float32"
            ) from None
        checks.buffers(found, owners, expected, names[0], self.master_dtype)
        rest = iter(found)
        return leaves, [p if p is None else next(rest) for p in narrow]

    def _mastered(self, p: Tensor) -> bool:
        """Whether a param has a master."""
        dtype = self.master_dtype
        return dtype is not None and p.is_floating_point() and p.element_size() < dtype.itemsize

    def _narrowed(self, inner: Any, params: Tree) -> Any:
        """The optimizer's first state, with buffers like params in `state_dtype`."""
        if self.state_dtype is None:
            return inner
        tensors, spec = _tree.flatten(params)

        def narrowed(x: Any, p: Tensor) -> Any:
            buffer = isinstance(x, Tensor) and x.dim() > 0 and x.shape == p.shape
            return x.to(self.state_dtype) if buffer and x.dtype in running.AS_IS else x

        def column(node: Any) -> Any:
            leaves = _tree.column(node, spec)
            return node if leaves is None else _tree.unflatten(map(narrowed, leaves, tensors), spec)

        return _tree.map(column, inner, is_leaf=lambda x: _tree.column(x, spec) is not None)

    def _rounding(self, inner: Iterable[Any], params: list[Tensor], masters: Masters) -> Rounding:
        pairs = zip(params, masters, strict=True)
        unmastered = [p if m is None else None for p, m in pairs]
        return Rounding([*inner, *unmastered], stochastic=self.stochastic)


precision = Precision


def _step_(
    work: Work,
    masters: Masters,
    rounding: Rounding,
    indices: list[int],
    t: Any,
    values: list[Any],
    columns: list[Any],
) -> None:
    """Step leaves that share device, dtype and hyperparameters, in place: see `write_`."""
    own, n = [masters[i] for i in indices], len(masters)
    mastered = own[0] is not None
    lists = [column for column in columns if isinstance(column, list)] + [own] * mastered
    held = [k for k, column in enumerate(work.buffers, 2) if _holds(column)]
    places = [n * j for j, k in enumerate(held) if isinstance(columns[k], list)] + [n * len(held)]
    part = _Part(work.rule, rounding, places, (t, values), columns, mastered)
    size = 0 if columns[1][0] is None else _piece_size(work.rule, values, columns)
    for run in _runs(indices, lists, size) if size else [[j] for j in range(len(indices))]:
        leaf, rows = indices[run[0]], [[column[j] for j in run] for column in lists]
        if len(run) > 1:
            tiles.together_(functools.partial(part.step_, leaf, 0), rows)
            continue
        whole = [x for (x,) in rows]
        pieces = zip(*(x.view(-1).split(size) for x in whole), strict=True) if size else [whole]
        for i, piece in enumerate(pieces):
            part.step_(leaf, i * size, piece)


class _Part(NamedTuple):
    """Leaves that are stepped alike.

    Attributes:
        places: for each list of buffers, and last for the params, its beginning in `rounding`.
        numbers: the step and the hyperparameters.
        mastered: whether the last list is that of masters.
    """

    rule: Rule[Any, Any]
    rounding: Rounding
    places: list[int]
    numbers: tuple[Any, list[Any]]
    columns: list[Any]
    mastered: bool

    def step_(self, leaf: int, offset: int, piece: Sequence[Any]) -> None:
        """Step a piece that begins at an offset in a leaf, or begin its state."""
        p, g, *buffers = piece
        master = buffers.pop() if self.mastered else None
        wide_p = p
        if g is not None:
            if master is not None:
                _resume_(master, p)
            wide_p = wide(p) if master is None else master
            g = g.to(wide_p.dtype)
        new: list[Any] = [wide_p, g, *map(wide, buffers)]
        columns = running.in_place_of_lists([[x] for x in new], self.columns)
        parts.step_(self.rule, *self.numbers, columns)
        for place, x, old in zip(self.places, [*new[2:], wide_p], [*buffers, p], strict=True):
            if x is not old:
                self.rounding.write_(place + leaf, x, old, offset)


def _runs(indices: list[int], lists: list[list[Any]], size: int) -> Iterator[list[int]]:
    """The places of consecutive leaves of the same dtypes and of at most `size` elements in all.

    Larger ones are alone.
    """
    run, dtypes, total = list[int](), None, 0
    for j, i in enumerate(indices):
        length, kinds = lists[0][j].numel(), [column[j].dtype for column in lists]
        follows = run and i == indices[run[-1]] + 1 and kinds == dtypes
        if run and not (follows and total + length <= size):
            yield run
            run, total = [], 0
        run, dtypes, total = [*run, j], kinds, total + length
    if run:
        yield run


def _check_dtype(value: Any, name: str, *known: torch.dtype | None) -> None:
    if not any(value is dtype for dtype in known):
        choices = " or ".join(map(str, known))
        raise ValueError(f"{name} is {_tree.shown(value)}, but must be {choices}")


def _piece_size(rule: Rule[Any, Any], values: list[Any], columns: list[Any]) -> int:
    """The elements of a piece; 0 where leaves must stay whole."""
    device, _, _, layout = ways.survey(columns)
    lists = [column for column in columns if isinstance(column, list)]
    alike = len({sum(map(Tensor.numel, column)) for column in lists}) == 1
    cut = rule.elementwise and alike and layout == "regular" and all(map(running.is_scalar, values))
    parallel = {"cpu": torch.get_num_threads(), "cuda": 4}
    return tiles.TILE * parallel.get(device, 0) if cut else 0


def _used(p: Tensor, master: Tensor | None) -> Tensor:
    """What the optimizer sees of a param: its value where that is not the rounding of the master.

    The derivative is that of the param.
    """
    if master is None:
        return wide(p)
    value = p.to(master.dtype)
    return through(value, torch.where(master.to(p.dtype) == p, master, value))


def _resume_(master: Tensor, p: Tensor) -> None:
    """Overwrite a master of which the param is no longer the rounding."""
    if p.device.type != "cpu" or not torch.equal(master.to(p.dtype), p):
        master.copy_(_used(p, master))


def _pruned(masters: Iterable[Any], spec: _tree.Spec) -> Tree:
    """A tree like params with `[]`, which has no leaves, where there is no master."""
    return _tree.unflatten(([] if m is None else m for m in masters), spec)


def _joined(states: list[Any], spec: _tree.Spec) -> Any:
    """The state of all tensors, from the states of lists of one."""
    step, *fields = zip(*states, strict=True)
    trees = [() if unused(f[0]) else _tree.unflatten([x for (x,) in f], spec) for f in fields]
    return type(states[0])(step[0], *trees)


def _holds(column: list[Any]) -> bool:
    """Whether a column has buffers."""
    return bool(column) and not unused(column[0])
