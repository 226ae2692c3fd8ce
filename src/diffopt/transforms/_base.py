"""Base classes of compositions: gradient transformations and wrappers; their leaves, checked."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Generic, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from diffopt import _memory, _modes, _tree
from diffopt._arguments import check_function
from diffopt._modes import exact
from diffopt._rule import checks, hyper
from diffopt._rule.rule import WORKING_DTYPE
from diffopt._tree import Tree
from diffopt._value import Value
from diffopt.optimizer import Optimizer, check_optimizer
from diffopt.transforms._records import InOrder

S = TypeVar("S")
H = TypeVar("H")
Tensors: TypeAlias = list[Tensor]


class Transformation(ABC, Generic[S, H]):
    """A pure function `(grads, params, state, hparams) -> (new_grads, new_state)`.

    It is used in a `chain`, before the optimizer. `stateless` makes one from a function of lists;
    subclass this for one with a state.

    Attributes:
        hparams: creates the record of hyperparameters, a pytree; `tuple` if there are none.

    Examples:
        >>> import torch, diffopt
        >>> class Sum(diffopt.transforms.Transformation):  # of all gradients so far
        ...     hparams = tuple
        ...     def init(self, params):
        ...         return {name: torch.zeros_like(p) for name, p in params.items()}
        ...     def apply(self, grads, params, state, hparams):
        ...         sums = {name: state[name] + g for name, g in grads.items()}
        ...         return sums, {name: s.clone() for name, s in sums.items()}
        >>> opt = diffopt.transforms.chain(Sum(), diffopt.sgd())
        >>> params, grads = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
        >>> state, hp = opt.init(params), opt.hparams(lr=1.0)
        >>> for _ in range(3):
        ...     params, state = opt.update(params, grads, state, hp)
        >>> params  # -(1 + 2 + 3)
        {'w': tensor([-6.])}
    """

    hparams: ClassVar[Any]

    @abstractmethod
    def init(self, params: Tree) -> S:
        """The state before the first step, for params of these shapes and dtypes."""

    @abstractmethod
    def apply(self, grads: Tree, params: Tree, state: S, hparams: H) -> tuple[Tree, S]:
        """Transform the gradients of one step. Pure, and differentiable in every argument.

        Args:
            grads: a tree like params, `None` where there is no gradient. The composition has
                already checked both, and converted half precision to float32.
            params: a pytree of tensors.
            state: what `init` or the last `apply` returned.
            hparams: what `self.hparams(...)` returned.

        Returns:
            The new gradients, `None` where they were, and the new state.
        """


def applied(
    part: Transformation[S, H], grads: Tree, params: Tree, state: S, hparams: H
) -> tuple[Tree, S]:
    """What a transformation makes of gradients; raises where a user's returns no pair."""
    pair: Any = part.apply(grads, params, state, hparams)
    if not (type(pair) is tuple and len(cast(tuple[Any, ...], pair)) == 2):
        raise TypeError(
            f"{type(part).__name__}.apply must return (grads, state), not {_tree.describe(pair)}"
        )
    return pair


def stateless(
    hparams: type[H],
    function: Callable[[Tensors, Tensors, list[H]], Iterable[Tensor]],
) -> FromFunction[H]:
    """Make a gradient transformation without a state.

    Args:
        hparams: a record class made by `diffopt.rules.hparams`; `tuple` if there are none.
        function: `(grads, params, hparams) -> new_grads`, on lists with one entry for each leaf
            that has a gradient. The fields of each record in `hparams` hold the values for its
            leaf: numbers, or tensors that broadcast to it (0-d ones are in float64).

    Returns:
        The transformation; its state is `()`. New gradients have the dtypes of the old ones. It
        pickles if the function does, as module-level functions do.

    Raises:
        TypeError: `hparams` is not a record class, or `function` is not callable.

    Examples:
        >>> import torch, diffopt
        >>> from diffopt.rules import Hyperparameter, hparams, number
        >>> @hparams
        ... class Scale:
        ...     factor: Hyperparameter = number(1.0)
        >>> scale = diffopt.transforms.stateless(
        ...     Scale, lambda grads, params, hp: [r.factor * g for g, r in zip(grads, hp)]
        ... )
        >>> opt = diffopt.transforms.chain(scale, diffopt.sgd())
        >>> w = torch.zeros(2)
        >>> opt.update(w, torch.ones(2), opt.init(w), opt.hparams(lr=0.5, factor=4.0))[0]
        tensor([-2., -2.])
    """
    if hparams is not tuple:
        hyper.check_record_class(hparams)
    check_function(function, "function")
    return FromFunction(hparams, function)


class Stateless(Value, Transformation[tuple[()], H]):
    """A gradient transformation without a state, leaf by leaf or of all leaves together."""

    def init(self, params: Tree) -> tuple[()]:
        return ()

    @abstractmethod
    def transform(self, grads: Tensors, params: Tensors, records: list[H]) -> Iterable[Tensor]:
        """New gradients, for lists with one entry for each leaf that has a gradient."""

    def apply(
        self, grads: Tree, params: Tree, state: tuple[()], hparams: H
    ) -> tuple[Tree, tuple[()]]:
        leaves = matched(grads, params)
        old, records = leaves.gradients(), leaves.records(self.hparams, hparams, params)
        given = self.transform(old, leaves.moved(leaves.params), records)
        if isinstance(given, Tensor):
            raise TypeError(f"{self!r} returned a tensor, not a list of gradients")
        new = list(given)
        if len(new) != len(old):
            raise ValueError(f"{self!r} returned {len(new)} gradients for {len(old)}")
        return leaves.filled(n.to(o.dtype) for n, o in zip(new, old, strict=True)), state


class FromFunction(Stateless[H]):
    """What `stateless` returns."""

    hparams: type[H]  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride] (frozen)
    function: Callable[[Tensors, Tensors, list[H]], Iterable[Tensor]]

    def transform(self, grads: Tensors, params: Tensors, records: list[H]) -> Iterable[Tensor]:
        return self.function(grads, params, records)


class Wrapper(Value, Optimizer[S, Any]):
    """An optimizer made from another one: subclass it for one of your own.

    A subclass writes `update`, which calls that of `self.optimizer`, and `init` if its state is not
    the inner optimizer's. Its hyperparameters are those of the inner optimizer, after its own if it
    has any; so keywords such as `lr` find their part in a `chain`, too. It is a value: it is
    compared, hashed and printed by its arguments, which are the fields that it annotates.

    Attributes:
        optimizer: the inner optimizer, the first argument.
        own_hparams: a record class made by `diffopt.rules.hparams`, or None. Then the
            hyperparameters are a tuple of two records, its own and the inner optimizer's.

    Raises:
        TypeError: `optimizer` is not an optimizer.

    Examples:
        >>> import torch, diffopt
        >>> from diffopt.rules import Hyperparameter, hparams, number
        >>> @hparams
        ... class Pull:
        ...     pull: Hyperparameter = number(default=0.5, ge=0, le=1)
        >>> class Shrink(diffopt.transforms.Wrapper):  # towards zero, after every step
        ...     own_hparams = Pull
        ...     def update(self, params, grads, state, hparams):
        ...         own, inner = hparams
        ...         params, state = self.optimizer.update(params, grads, state, inner)
        ...         return {name: (1 - own.pull) * p for name, p in params.items()}, state
        >>> chain, clip = diffopt.transforms.chain, diffopt.transforms.clip_by_global_norm
        >>> opt = chain(clip(), Shrink(diffopt.sgd()))
        >>> params, grads = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
        >>> hp = opt.hparams(lr=1.0, pull=0.25, max_norm=2.0)
        >>> opt.update(params, grads, opt.init(params), hp)[0]
        {'w': tensor([-0.7500])}
    """

    optimizer: Optimizer[Any, Any]
    own_hparams: ClassVar[Any] = None

    def __post_init__(self) -> None:
        check_optimizer(self.optimizer, "optimizer")

    @property
    def hparams(self) -> Callable[..., Any]:  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride] (never assigned)
        inner, own = self.optimizer.hparams, self.own_hparams
        return inner if own is None else InOrder({0: own, 1: inner})

    def init(self, params: Tree) -> Any:
        return self.optimizer.init(params)


class Leaves(NamedTuple):
    """Params and their gradients, checked, in the order of the leaves."""

    spec: _tree.Spec
    params: Tensors
    grads: list[Tensor | None]

    def tree(self, values: Iterable[Any]) -> Tree:
        return _tree.unflatten(values, self.spec)

    def moved(self, values: Iterable[Any]) -> list[Any]:
        """Of values for all leaves, those of the leaves that have a gradient."""
        return [x for x, grad in zip(values, self.grads, strict=True) if grad is not None]

    def gradients(self) -> Tensors:
        return self.moved(self.grads)

    def filled(self, values: Iterable[Any], others: Iterable[Any] | None = None) -> Tree:
        """The tree with these values where there is a gradient, and others (or None) elsewhere."""
        new, old = iter(values), [None] * len(self.grads) if others is None else others
        pairs = zip(self.grads, old, strict=True)
        return self.tree([x if grad is None else next(new) for grad, x in pairs])

    def wide(self) -> tuple[Tree, Tree]:
        """Params and grads, with half precision converted to float32 where there is a gradient."""
        params = self.filled(map(wide, self.moved(self.params)), self.params)
        return params, self.filled(map(wide, self.gradients()))

    def narrow(self, new: Tree, wide: Tree) -> Tree:
        """The new params, converted back to the dtypes of the old ones, which `wide` came from."""
        rows = zip(_tree.leaves(new), _tree.leaves(wide), self.params, strict=True)
        return self.tree(old if n is w else n.to(old.dtype) for n, w, old in rows)

    def records(self, kind: Any, hparams: Any, params: Tree) -> list[Any]:
        """The record of each leaf that has a gradient; one object where hyperparameters are equal.

        `kind` is the class that hparams must have.
        """
        checks.instance(hparams, kind, "hparams", "hparams(...)")
        if kind is tuple:
            return [() for _ in self.gradients()]
        numbers = hyper.broadcast(hparams, self.spec, params)
        checks.numbers(numbers, self.params, params)
        made: dict[Any, Any] = {}

        def record(i: int) -> Any:
            device = self.params[i].device
            key = device, *(number.cover[i] for number in numbers)
            if key not in made:
                made[key] = hyper.assemble(kind, [near(n.at(i), device) for n in numbers])
            return made[key]

        return [record(i) for i in self.moved(range(len(self.params)))]

    def averages(self, state: Any, kind: type[Any], name: str, params: Tree) -> Tensors:
        """The field of a state that holds averages or sums, and that state, checked."""
        checks.instance(state, kind, "state", "init()")
        checks.scalar(state.step, "state.step", self.params, params)
        names = (f"state.{name}", "params")
        buffers = _tree.leaves_like(getattr(state, name), self.spec, params, names)
        checks.buffers(buffers, self.params, params, names[0])
        for i, (buffer, param) in enumerate(zip(buffers, self.params, strict=True)):
            if _kind(buffer) < _kind(param):
                mine, theirs = (_tree.paths(params, n)[i] for n in names)
                raise ValueError(
                    f"{mine} has dtype {buffer.dtype}, but {theirs} has dtype {param.dtype}: "
                    "create the state with init()"
                )
        return buffers


def gather(params: Tree, grads: Tree, *, writable: bool = False, sparse: bool = False) -> Leaves:
    """The leaves, checked as `Optimizer.update` documents."""
    tensors, spec = _tree.flatten(params)
    checks.params(tensors, params)
    gradients = _tree.leaves_like(grads, spec, params, ("grads", "params"))
    checks.grads(gradients, tensors, params, sparse=sparse)
    if writable:
        checks.writable({"params": tensors}, params)
    return Leaves(spec, tensors, gradients)


def check_apart(written: dict[str, Tree], read: dict[str, Tree], paired: int = 0) -> None:
    """Raise if one of the trees that are written shares memory with another or with those read.

    Of the leaves that are read, each of the first `paired` may be the one written in its place.
    """
    if _modes.transformed():
        return

    def path(k: int) -> str:
        trees = (written | read).items()
        return [path for name, tree in trees for path in _tree.paths(tree, name)][k]

    own, others = (
        [*itertools.chain(*map(_tree.leaves, side.values()))] for side in (written, read)
    )
    _memory.check_apart(path, own, others, paired)


def matched(grads: Tree, params: Tree) -> Leaves:
    """The leaves; only the structures are checked."""
    tensors, spec = _tree.flatten(params)
    return Leaves(spec, tensors, _tree.leaves_like(grads, spec, params, ("grads", "params")))


def _kind(tensor: Tensor) -> int:
    """0 for integers, 1 for real numbers, 2 for complex ones; torch.can_cast cannot be traced."""
    return 2 if tensor.is_complex() else int(tensor.is_floating_point())


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the precision it is computed in: at least float32."""
    dtype = WORKING_DTYPE.get(tensor.dtype)
    return tensor if dtype is None else tensor.to(dtype)


def near(value: Any, device: torch.device) -> Any:
    """A hyperparameter on a device; 0-d tensors in float64."""
    if not isinstance(value, Tensor) or value.dim() > 0:
        return value
    return exact(value if value.device.type == "cpu" else value.to(device))


def everywhere(condition: Tensor) -> Callable[[torch.device], Tensor]:
    """The condition on any device, copied once for each: a copy waits for the device."""
    copies = {condition.device: condition}

    def on(device: torch.device) -> Tensor:
        if device not in copies:
            copies[device] = condition.to(device)
        return copies[device]

    return on


def select(condition: Tensor, new: Tree, old: Tree) -> Tree:
    """The new tree if the condition, a 0-d tensor, holds, else the old one."""
    on = everywhere(condition)

    def choose(new: Any, old: Any) -> Any:
        return old if new is old else torch.where(on(old.device), new, old)

    return _tree.map(choose, new, old)
