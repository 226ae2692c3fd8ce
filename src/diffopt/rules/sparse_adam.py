"""Adam for sparse gradients: entries without a gradient are left unchanged."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple, overload

import torch
from torch import Tensor

from diffopt import _modes, _tree
from diffopt._arguments import explains_calls
from diffopt._rule import checks, hyper, ops
from diffopt._rule.hyper import Hyperparameter, hparams, number
from diffopt._rule.leafwise import Leafwise
from diffopt._rule.work import gather
from diffopt._tree import Tree
from diffopt._value import Flags
from diffopt.optimizer import Optimizer, Write


class SparseAdamState(NamedTuple):
    """State of `sparse_adam`."""

    step: Any
    exp_avg: Tree
    exp_avg_sq: Tree


@hparams
class SparseAdamHParams:
    """Hyperparameters of `sparse_adam`."""

    lr: Hyperparameter = number(1e-3, ge=0)
    beta1: Hyperparameter = number(0.9, ge=0, lt=1)
    beta2: Hyperparameter = number(0.999, ge=0, lt=1)
    eps: Hyperparameter = number(1e-8, gt=0)


@overload
def sparse_adam(*, masked: Literal[True], maximize: bool = False) -> MaskedAdam: ...


@overload
def sparse_adam(*, masked: Literal[False] = False, maximize: bool = False) -> SparseAdam: ...


@overload
def sparse_adam(
    *, masked: bool, maximize: bool = False
) -> Optimizer[SparseAdamState, SparseAdamHParams]: ...


@explains_calls
def sparse_adam(
    *, masked: bool = False, maximize: bool = False
) -> Optimizer[SparseAdamState, SparseAdamHParams]:
    """Adam for gradients that are sparse tensors, such as those of `Embedding(sparse=True)`.

    For each entry that is specified in the gradient g_t, with m_0 = v_0 = 0,

        m_t = beta1 * m_{t-1} + (1 - beta1) * g_t
        v_t = beta2 * v_{t-1} + (1 - beta2) * g_t^2
        p  <- p - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m_t / (sqrt(v_t) + eps)

    and for all others neither p nor m nor v changes. t counts all steps.

    Hyperparameters, each a number, a tensor or a prefix tree of the params: `lr` >= 0 (1e-3),
    `beta1` and `beta2` in [0, 1) (0.9, 0.999), `eps` > 0 (1e-8).

    Args:
        masked: gradients are dense, and their nonzero entries are the specified ones. This works
            inside `torch.vmap` and `torch.compile`, and has derivatives of every order. Otherwise
            gradients are sparse COO tensors, which need not be coalesced; explicit zeros are
            specified entries.
        maximize: ascend instead of descend.

    Returns:
        The optimizer. Derivatives are those of the formula for a fixed set of entries. But torch
        can differentiate the construction of a sparse tensor only once; second derivatives through
        it are silently wrong. So with `create_graph=True`, a derivative through a sparse gradient
        raises (nested transforms of `torch.func` are not detected); `masked=True` has all
        derivatives. Complex params, which torch.optim.SparseAdam refuses, are updated as pairs of
        reals.

    Raises:
        TypeError: a flag is not a bool.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.sparse_adam()
        >>> table = torch.zeros(3, 2)
        >>> grad = torch.tensor([[0.0, 0.0], [5.0, -5.0], [0.0, 0.0]]).to_sparse(1)
        >>> table, state = opt.update(table, grad, opt.init(table), opt.hparams(lr=0.1))
        >>> table
        tensor([[ 0.0000,  0.0000],
                [-0.1000,  0.1000],
                [ 0.0000,  0.0000]])

    Source: Kingma and Ba, "Adam: a method for stochastic optimization", 2015, the variant at the
    end of section 2, on some entries only, as in torch.
    """
    hyper.check_flags(masked=masked, maximize=maximize)
    if masked:
        return MaskedAdam(maximize=maximize)
    return SparseAdam(maximize=maximize)


class EntriesAdam(Leafwise[SparseAdamState, SparseAdamHParams]):
    """The arithmetic of `sparse_adam`, on entries gathered in dense tensors."""

    State = SparseAdamState
    hparams: ClassVar[type[SparseAdamHParams]] = SparseAdamHParams
    elementwise = True

    def scalars(self, t: Any, hp: SparseAdamHParams) -> Any:
        return -hp.lr * (1 - hp.beta2**t) ** 0.5 / (1 - hp.beta1**t)

    def rule(
        self, p: Any, g: Any, s: SparseAdamState, hp: SparseAdamHParams, c: Any
    ) -> tuple[Any, SparseAdamState]:
        m = ops.lerp(s.exp_avg, g, 1 - hp.beta1)
        v = ops.lerp(s.exp_avg_sq, g * g, 1 - hp.beta2)
        p = ops.addcdiv(p, m, ops.sqrt(v) + hp.eps, c)
        return p, SparseAdamState(s.step, m, v)


class MaskedAdam(EntriesAdam):
    """What `sparse_adam(masked=True)` returns: the same where a dense gradient is nonzero."""

    elementwise = True

    def rule(
        self, p: Any, g: Any, s: SparseAdamState, hp: SparseAdamHParams, c: Any
    ) -> tuple[Any, SparseAdamState]:
        new_p, new = super().rule(p, g, s, hp, c)
        pairs = (new_p, p), (new.exp_avg, s.exp_avg), (new.exp_avg_sq, s.exp_avg_sq)
        p, m, v = (torch.where(g != 0, after, before) for after, before in pairs)
        return p, SparseAdamState(s.step, m, v)


class _Entries(NamedTuple):
    """The arguments of one update, restricted to the entries specified in the gradients.

    Attributes:
        arguments: those of the update of these entries; whole leaves where a gradient has none.
        where: the indices of the entries in each leaf; None where there are none.
        columns: the leaves of params and of the fields of the state, in the order of the params.
        spec: the structure of the params.
    """

    arguments: tuple[list[Tensor], list[Tensor | None], SparseAdamState, SparseAdamHParams]
    where: list[tuple[Tensor, ...] | None]
    columns: list[list[Tensor]]
    spec: _tree.Spec


class SparseAdam(Flags, Optimizer[SparseAdamState, SparseAdamHParams]):
    """What `sparse_adam` returns."""

    maximize: bool = False

    hparams: ClassVar = SparseAdamHParams

    @property
    def entries(self) -> EntriesAdam:
        """The optimizer for the specified entries, gathered in dense tensors."""
        return EntriesAdam(maximize=self.maximize)

    def init(self, params: Tree) -> SparseAdamState:
        return self.entries.init(params)

    def update(
        self, params: Tree, grads: Tree, state: SparseAdamState, hparams: SparseAdamHParams
    ) -> tuple[Tree, SparseAdamState]:
        arguments, where, columns, spec = self._gather(params, grads, state, hparams)
        new_params, new_state = self.entries.update(*arguments)
        params, m, v = (
            _tree.unflatten(map(_put, old, where, new), spec)
            for old, new in zip(columns, (new_params, *new_state[1:]), strict=True)
        )
        return params, SparseAdamState(new_state.step, m, v)

    def prepare_(
        self, params: Tree, grads: Tree, state: SparseAdamState, hparams: SparseAdamHParams
    ) -> Write:
        arguments, where, columns, _ = self._gather(params, grads, state, hparams)
        checks.writable({"params": columns[0]}, params)
        update_ = self.entries.prepare_(*arguments)  # of copies of the entries, and of state.step
        new_params, _, new_state, _ = arguments

        def write() -> None:
            update_()
            for old, new in zip(columns, (new_params, *new_state[1:]), strict=True):
                for leaf, indices, entries in zip(old, where, new, strict=True):
                    if indices is not None:
                        leaf[indices] = entries if indices else entries[0]

        return write

    def _gather(
        self, params: Tree, grads: Tree, state: SparseAdamState, hparams: SparseAdamHParams
    ) -> _Entries:
        """Check the arguments and gather the specified entries."""
        work = gather(self.entries, params, grads, state, hparams, sparse=True)
        given = [_specified(grad, params, i) for i, grad in enumerate(work.grads)]
        values = [None if grad is None else _values(grad) for grad in given]
        where = [None if grad is None else tuple(grad.indices()) for grad in given]
        columns = [work.params, *work.buffers]
        entries, m, v = ([*map(_take, column, where)] for column in columns)
        numbers = [_pick(number, work.params, where) for number in work.numbers]
        picked = SparseAdamState(state.step, m, v), hyper.assemble(SparseAdamHParams, numbers)
        return _Entries((entries, values, *picked), where, columns, work.spec)


def _specified(grad: Tensor | None, params: Tree, i: int) -> Tensor | None:
    """The gradient of leaf `i`, coalesced; None where no entry is specified."""
    if grad is not None and grad.layout is not torch.sparse_coo:
        raise ValueError(
            f"{_tree.paths(params, 'grads')[i]} has layout {grad.layout}, but must be sparse COO: "
            "use adam() or sparse_adam(masked=True) for dense gradients"
        )
    grad = None if grad is None else grad.coalesce()
    return None if grad is None or not len(grad.values()) else grad


def _take(leaf: Tensor, where: tuple[Tensor, ...] | None) -> Tensor:
    """Entries of a leaf, one row each; without sparse dimensions the leaf is a single row."""
    if where is None:
        return leaf
    return leaf[where] if where else leaf.unsqueeze(0)


def _put(leaf: Tensor, where: tuple[Tensor, ...] | None, entries: Tensor) -> Tensor:
    """The leaf with these entries replaced."""
    if where is None:
        return leaf
    return leaf.index_put(where, entries) if where else entries.squeeze(0)


def _pick(number: hyper.Covered, params: list[Tensor], where: list[Any]) -> Any:
    """A hyperparameter, restricted to the specified entries."""
    if len(number.values) == 1 and not _per_weight(number.values[0]):
        return number.values[0]
    values = map(number.at, range(len(params)))
    return [
        _take(value.expand(param.shape), indices) if _per_weight(value) else value
        for value, param, indices in zip(values, params, where, strict=True)
    ]


def _per_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _values(grad: Tensor) -> Tensor:
    """The values of a coalesced gradient, differentiable as often as torch is right."""
    return grad.values() if grad.is_leaf else _Once.apply(grad.values())


class _Once(torch.autograd.Function):
    """The identity; raises in a backward pass that is recorded to be differentiated again.

    The backward of torch.sparse_coo_tensor is not differentiable, and does not raise: second
    derivatives through it are silently wrong.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if torch.is_grad_enabled() and grads[0].requires_grad and not _modes.transformed():
            raise RuntimeError(
                "torch differentiates the construction of a sparse tensor only once: to "
                "differentiate with respect to a sparse gradient with create_graph=True, use "
                "sparse_adam(masked=True)"
            )
        return grads[0]
