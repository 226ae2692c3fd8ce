"""hypergradient(): an optimizer whose hyperparameters another optimizer learns as it runs."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree
from diffopt._arguments import check_number, did_you_mean
from diffopt._diff import functions
from diffopt._modes import real
from diffopt._rule import checks, hyper, ops, prints, ways
from diffopt._rule.hyper import Hyperparameter, hparams, number
from diffopt._rule.leafwise import Leafwise, repeat_, repeatable
from diffopt._rule.rule import zero_for, zeros_like
from diffopt._rule.running import is_scalar
from diffopt._tree import Tree
from diffopt.optimizer import Optimizer, Write, check_optimizer
from diffopt.rules.adagrad import adagrad
from diffopt.transforms._base import Leaves, Tensors, Wrapper, check_apart, gather, select
from diffopt.transforms._records import InOrder, check_record, check_tuple
from diffopt.transforms.chain import Chain
from diffopt.transforms.maximize import Maximize
from diffopt.transforms.partition import Partition
from diffopt.transforms.skip import finite_only


class HypergradientState(NamedTuple):
    """State of `hypergradient`.

    Attributes:
        offsets: of each hyperparameter by name, the logarithm of what it is multiplied by.
        derivatives: by name, trees like params: the derivative of the last step's params with
            respect to the offset, z in the formulas.
        outer: the state of the outer optimizer.
        inner: the state of the inner optimizer.
        squares: the sum of the squares of all d for `lr`.
    """

    offsets: dict[str, Tensor]
    derivatives: dict[str, Tree]
    outer: Any
    inner: Any
    squares: Tensor


torch.serialization.add_safe_globals([HypergradientState])


class _Given(NamedTuple):
    """The arguments of an update."""

    params: Tree
    grads: Tree
    state: HypergradientState
    hparams: tuple[Any, Any]


class _Known(NamedTuple):
    """What holds for the arguments of an update in place where tensors like them passed all checks.

    Attributes:
        optimizer: whose arguments they are, kept so that no other one gets its id.
        kinds: the structures of the arguments. All hyperparameters are numbers.
        outer: what `repeat_` needs to know to step the outer optimizer; None if it cannot.
        inner: the same for the inner optimizer.
    """

    optimizer: Hypergradient
    kinds: list[_tree.Spec]
    outer: ways.Alike | None
    inner: ways.Alike | None


@hparams
class HypergradientHParams:
    """Hyperparameters of `hypergradient`."""

    outer: Hyperparameter = number(0.0, per_parameter=False)
    discount: Hyperparameter = number(0.9, ge=0, lt=1, per_parameter=False)


class Hypergradient(Wrapper[HypergradientState]):
    """Learn hyperparameters, such as the learning rate, while they are used: hypergradient descent.

    The last step was `p_t, s_t = optimizer(p_{t-1}, g_{t-1}, s_{t-1}, h_{t-1})`. So the derivative
    of the loss at `p_t` with respect to `h_{t-1}` is a product with the gradient, which is there
    anyway, and another optimizer can take a step with it before the next step of the first:

        z_t  = discount z_{t-1} + dp_t / dx_{t-1}
        d_t  = min(<g_t, z_t>, c_t),   c_t = 2 sqrt(d_1^2 + ... + d_{t-1}^2)
        x_t  = outer(x_{t-1}, d_t)
        h_t  = h exp(x_t),   or, in [0, 1],   h_t / (1 - h_t) = h / (1 - h) exp(x_t)
        p_{t+1}, s_{t+1} = optimizer(p_t, g_t, s_t, h_t)

    `x_0` is `log(start)` for `lr`, and 0 for others. The hyperparameters `h` that are passed may
    still follow a schedule. No step of `outer` makes a rate negative, or `momentum` and `alpha`
    greater than 1. The first step has `d` = 0. If `d` is not finite, `outer` takes no step: an
    optimizer may skip such gradients, or clip them. A tensor without a gradient keeps its `z`, and
    counts again when it has one.

    `outer` may be a `hypergradient` itself, which learns its own rate, and so on. For a rate for
    each part of the model use a `partition` with one `hypergradient` for each. `current` returns
    the hyperparameters as they are now.

    Where `<g_t, z_t>` is greater than `c_t`, and `c_t` > 0, the last step went too far. Then params
    go back to `p_t - z_t`, `z` becomes 0, and the inner optimizer takes no step. If steps are
    proportional to the rate, `p_t - z_t` is `p_{t-1}` without a discount, and with one an average
    of earlier params, whose weights decay by `discount`. All this is for `lr`: the `d` of other
    hyperparameters has no bound, so they are learned less safely. For optimizers that ascend the
    signs are reversed. Buffers of a model, such as running averages, do not go back, nor does the
    state of the inner optimizer: `lbfgs`, which compares successive gradients, may diverge
    afterwards. `update_` waits for the device, to decide.

    With `discount=0`, `d` is the exact derivative of the loss, but short-sighted: it reduces the
    loss of the very next step, which on noisy or ill-conditioned losses asks for smaller rates than
    the end of the run does. Steps that undo each other cancel in `z`, so a discount of 0.9 looks
    some ten steps ahead. It leaves out how earlier steps change later ones.

    By default a learning rate begins at a hundredth of the one that is passed, and grows by a
    factor of up to exp(0.5) a step: a first step that is too long can ruin a network before any
    derivative warns of it. Larger rates of `outer` are faster, and risk more.

    On digits (400 steps of 64, torch 2.13.0, seeds 0 to 2), from rates 0.01 and 100 times a tuned
    one, none of 108 runs of gradient descent, momentum and Adam ended more than 1.2 points below
    the accuracy of the tuned rate. The networks had two hidden layers of ReLU, of tanh, of SiLU, of
    GELU, or of ReLU and BatchNorm, or were convolutional. With four hidden layers of SiLU, which
    stay on a plateau for hundreds of steps, gradient descent ended up to 10 points below.

    In the class that `diffopt.optim.from_pure` makes of AdamW, learning the rate costs 11 to 15% of
    a training step of a small convolutional network on 64 digits (one CPU core). Other
    hyperparameters, half precision, and rules whose steps are not proportional to the rate cost
    more.

    Hyperparameters: `hparams(lr=0.1, discount=0.5, outer=diffopt.adagrad().hparams(lr=1.0))` is a
    tuple of two records: one of `outer`, the record of the outer optimizer, and `discount`, in
    [0, 1) (0.9); and the optimizer's own.

    Args:
        optimizer: any optimizer.
        learn: the names of the hyperparameters to learn. Each is >= 0, or in [0, 1].
        outer: the optimizer of the offsets `x`, a dict of 0-d tensors by name. None is
            `diffopt.adagrad()` with `lr=0.5`.
        start: the part of `lr` that the first step takes, > 0. None is 0.01 with the default
            `outer`, whose steps do not depend on the scale of `d`, and 1 with others.

    Raises:
        TypeError: an optimizer is not one, or `learn` is not a sequence of names.
        ValueError: a name in `learn` is not a hyperparameter of `optimizer`, or its range is
            neither >= 0 nor [0, 1]; `start` is not a number > 0; one of the two optimizers ascends
            and the other descends, or the parts of a partition do; (from `update`) a param is a
            DTensor, `discount` is not one number, or a momentum that is learned is > 1.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.transforms.hypergradient(diffopt.sgd())
        >>> p = torch.ones(2)
        >>> state, hp = opt.init(p), opt.hparams(lr=0.001)  # much too small
        >>> for _ in range(30):
        ...     p, state = opt.update(p, p, state, hp)  # the gradient of p^2 / 2
        >>> opt.current(state, hp).lr > 0.2
        tensor(True)

    Source: Baydin et al., "Online learning rate adaptation with hypergradient descent", 2018;
    Chandra et al., "Gradient descent: the ultimate optimizer", 2022; for the discount Donini et
    al., "MARTHE: scheduling the learning rate via online hypergradients", 2020, without Hessians;
    for steps judged by the derivative along them Kafka and Wilke, "Resolving learning rates
    adaptively by locating stochastic non-negative associated gradient projection points using line
    searches", 2021. The bound and the way back are our own.
    """

    _: KW_ONLY
    learn: Sequence[str] = ("lr",)
    outer: Optimizer[Any, Any] | None = None
    start: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start is not None:
            check_number(self.start, "start", positive=True)
        if self.outer is not None:
            check_optimizer(self.outer, "outer")
        if len(_directions(self.optimizer)) > 1:
            raise ValueError(
                f"some parts of optimizer, {self.optimizer!r}, ascend and others descend: use one "
                "hypergradient for each"
            )
        # Cached from here on: torch.compile does not trace how they are.
        if _directions(self._outer) != {self._ascends}:
            raise ValueError(
                f"one of optimizer, {self.optimizer!r}, and outer, {self.outer!r}, ascends and the "
                "other descends: pass maximize=True to both or to none"
            )
        learn: Any = self.learn
        listed = isinstance(learn, Sequence) and not isinstance(learn, str)
        if not listed or not all(isinstance(name, str) for name in learn):
            raise TypeError(
                f"learn is {_tree.shown(learn)}, not a sequence of names such as ('lr',)"
            )
        object.__setattr__(self, "learn", tuple(learn))
        records = hyper.records(self.optimizer.hparams())
        fields = [field for record in records for field in hyper.FIELDS[type(record)]]
        for name in self.learn:
            _check_field(name, fields)

    @property
    def hparams(self) -> InOrder:  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride] (never assigned)
        return InOrder({0: self._own, 1: self.optimizer.hparams})

    def _own(self, outer: Any = None, discount: Any = 0.9) -> HypergradientHParams:
        if outer is None:
            outer = self._outer.hparams(**({"lr": 0.5} if self.outer is None else {}))
        return HypergradientHParams(outer=outer, discount=discount)

    @cached_property
    def _ascends(self) -> bool:
        return True in _directions(self.optimizer)

    @cached_property
    def _outer(self) -> Optimizer[Any, Any]:
        return self.outer or adagrad(maximize=self._ascends)

    def current(self, state: HypergradientState, hparams: tuple[Any, Any]) -> Any:
        """The hyperparameters of the inner optimizer as this state has changed them."""
        checks.instance(state, HypergradientState, "state", "init()")
        check_tuple(hparams, 2, "hparams", "hparams(...)")
        return _moved(hparams[1], state.offsets)

    def init(self, params: Tree) -> HypergradientState:
        inner = super().init(params)
        zero = zero_for(_tree.leaves(params))
        start = (1.0 if self.outer else 0.01) if self.start is None else self.start
        offsets = {name: zero + math.log(start) * (name == "lr") for name in self.learn}
        zeros = {name: _tree.map(zeros_like, params) for name in self.learn}
        return HypergradientState(offsets, zeros, self._outer.init(offsets), inner, zero)

    def update(
        self, params: Tree, grads: Tree, state: HypergradientState, hparams: tuple[Any, Any]
    ) -> tuple[Tree, HypergradientState]:
        leaves, old = self._gather(params, grads, state, hparams)
        offsets, outer, squares, overshot = self._learned(leaves, old, state, hparams)
        wide_params, wide_grads = leaves.wide()
        before = leaves.moved(_tree.leaves(wide_params))

        def step(offsets: dict[str, Tensor]) -> tuple[Tree, Any, Tensors]:
            record = _moved(hparams[1], offsets)
            new, inner = self.optimizer.update(wide_params, wide_grads, state.inner, record)
            return new, inner, leaves.moved(_tree.leaves(new))

        new, inner, after = step(offsets)
        used = before, wide_grads, state.inner, hparams[1], offsets
        attached = _modes.differentiated(_tree.tensors(used))

        def derivative(name: str) -> Tensors:
            if self._is_rate(name):
                return [y - x for x, y in zip(before, after, strict=True)]
            found = _derivatives(lambda offsets: step(offsets)[2], offsets, name, after)
            # Their graph also reaches what is differentiated with respect to only there.
            return found if attached else _tree.detach(found)

        def carried(name: str) -> Tree:
            new, discount = derivative(name), hparams[0].discount
            if not ops.is_zero(discount):
                pairs = zip(new, leaves.moved(old[name]), strict=True)
                new = [(d + discount * z).to(z.dtype) for d, z in pairs]
            return leaves.filled(new, old[name])

        stepped = new, {name: carried(name) for name in offsets}, inner
        if _modes.number_of(overshot) is not False:
            back = [p - z for p, z in zip(before, leaves.moved(old["lr"]), strict=True)]
            returned = leaves.filled(back, _tree.leaves(wide_params))
            zeros = {
                name: leaves.filled(map(torch.zeros_like, leaves.moved(column)), column)
                for name, column in old.items()
            }
            stepped = select(overshot, (returned, zeros, state.inner), stepped)
        new, derivatives, inner = stepped
        narrow = leaves.narrow(new, wide_params)
        return narrow, HypergradientState(offsets, derivatives, outer, inner, squares)

    def prepare_(
        self, params: Tree, grads: Tree, state: HypergradientState, hparams: tuple[Any, Any]
    ) -> Write:
        given = _Given(params, grads, state, hparams)
        # Where graphs are captured nothing can be read.
        if _modes.capturing() or not self._is_rate(*self.learn):
            return super().prepare_(*given)
        known = self._as_before(given)
        if known:
            return self._writing(*known, given)
        leaves, old = self._gather(*given)
        lists = leaves.moved(leaves.params), leaves.gradients(), leaves.moved(old["lr"])
        if not (
            lists[0]
            and _modes.all_plain(leaves.params)
            and all(z.dtype == p.dtype for p, z in zip(leaves.params, old["lr"], strict=True))
        ):
            return super().prepare_(*given)
        self._check_writable(leaves, old, given)
        record = _moved(hparams[1], state.offsets, ops.coefficient)
        self.optimizer.prepare_(params, grads, state.inner, record)
        write = self._writing(lists, None, given)  # which checks the outer optimizer's state
        if _tree.flatten(state.derivatives["lr"])[1] is leaves.spec:
            others, facts = _tree.flatten(state)[0], partial(self._found, given)
            prints.keep((id(self),), leaves.params, others, leaves.grads, facts)
        return write

    def _as_before(self, given: _Given) -> tuple[tuple[Tensors, Tensors, Tensors], _Known] | None:
        """Params, gradients, derivatives and what is known, if tensors like these passed."""
        (params, grads, state, numbers), kinds = zip(*map(_tree.flatten, given), strict=True)
        found = prints.found((id(self),), params)
        if found is None:
            return None
        passed, known = found
        if not (
            all(map(operator.is_, kinds, known.kinds))
            and {*map(type, numbers)} <= {float, int}
            and passed.by(params, state, grads)
        ):
            return None
        first = len(given.state.offsets)  # then come the derivatives
        return (params, grads, state[first : first + len(params)]), known

    def _found(self, given: _Given) -> _Known:
        params, grads, state, hparams = given
        offsets = state.offsets
        return _Known(
            self,
            [_tree.flatten(tree)[1] for tree in given],
            repeatable(self._outer, offsets, offsets, state.outer, hparams[0].outer),
            repeatable(self.optimizer, params, grads, state.inner, hparams[1]),
        )

    def _writing(
        self, lists: tuple[Tensors, Tensors, Tensors], known: _Known | None, given: _Given
    ) -> Write:
        """What takes the step where only the rate is learned; it waits for the device."""
        params, grads, state, (own, hparams) = given
        moved, gradients, derivatives = lists
        offset, discount = state.offsets["lr"], float(own.discount)  # which may be in params
        dots = _dots(gradients, derivatives)
        on_cpu = all(dot.is_cpu for dot in dots)  # where each can be read at once
        product = sum([x.item() for x in dots]) if on_cpu else _total(dots, offset).item()
        finite = math.isfinite(product)
        overshot, product = self._bounded(product, state.squares.item())
        slope = {"lr": torch.full_like(offset, product)}
        learning = known and known.outer, state.offsets, slope, state.outer, own.outer
        learn_ = _stepping(self._outer, *learning)

        def write() -> None:
            if finite:
                learn_()
                state.squares.add_(product * product)
            if finite and overshot:
                _torch.foreach["sub"][1](moved, derivatives)
                _torch.foreach["mul"][1](derivatives, 0.0)
                return
            steps = _torch.foreach["neg"][0](moved)
            inner = known and known.inner
            if inner:
                factor = math.exp(min(offset.item(), 709))  # larger ones overflow
                numbers = {**vars(hparams), "lr": hparams.lr * factor}
                record = hyper.assemble(type(hparams), numbers.values())
            else:  # the step cannot fail where it has not with another record
                record = _moved(hparams, state.offsets, ops.coefficient)
            _stepping(self.optimizer, inner, params, grads, state.inner, record)()
            _torch.foreach["add"][1](steps, moved)
            _torch.foreach["add"][1](steps, derivatives, alpha=discount)
            _torch.foreach_copy_(derivatives, steps)

        return write

    def _check_writable(self, leaves: Leaves, old: dict[str, Tensors], given: _Given) -> None:
        """Raise unless all that is written can be."""
        params, grads, state, hparams = given
        written = {f"state.derivatives[{name!r}]": column for name, column in old.items()}
        written["state.squares"] = [state.squares]
        checks.writable({"params": leaves.params, **written}, params)
        # All but the inner state is written before the rest is read.
        own = {f"state.{k}": v for k, v in state._asdict().items() if k != "inner"}
        check_apart(own, {"state.inner": state.inner, "grads": grads, "hparams": hparams})

    def _is_rate(self, *names: str) -> bool:
        """Whether the only derivative is the step itself, that with respect to log(lr)."""
        rule = self.optimizer
        return names == ("lr",) and isinstance(rule, Leafwise) and rule.proportional

    def _gather(
        self, params: Tree, grads: Tree, state: Any, hparams: Any
    ) -> tuple[Leaves, dict[str, Tensors]]:
        leaves = gather(params, grads)
        checks.undistributed(params, "params", "hypergradient")
        checks.instance(state, HypergradientState, "state", "init()")
        self._check_hparams(hparams)
        old: dict[str, Tensors] = {}
        for name in self.learn:
            path = f"state.derivatives[{name!r}]"
            tree = state.derivatives[name]
            old[name] = _tree.leaves_like(tree, leaves.spec, params, (path, "params"))
            checks.buffers(old[name], leaves.params, params, path)
            offset = state.offsets[name]
            checks.scalar(offset, f"state.offsets[{name!r}]", leaves.params, params)
        checks.scalar(state.squares, "state.squares", leaves.params, params)
        return leaves, old

    def _check_hparams(self, hparams: Any) -> None:
        check_tuple(hparams, 2, "hparams", "hparams(...)")
        check_record(hparams[0], HypergradientHParams, "hparams[0]")
        check_record(hparams[1], self.optimizer.hparams, "hparams[1]")
        check_record(hparams[0].outer, self._outer.hparams, "hparams[0].outer")
        _check_fractions(hparams[1], self.learn)
        if not is_scalar(hparams[0].discount):
            given = _tree.describe(hparams[0].discount)
            raise ValueError(f"hparams[0].discount is {given}, but must be one number")

    def _learned(
        self, leaves: Leaves, old: dict[str, Tensors], state: HypergradientState, hparams: Any
    ) -> tuple[dict[str, Tensor], Any, Tensor, Any]:
        """The offsets, outer state and squares after a step, and whether the last overshot."""
        before = state.offsets, state.outer, state.squares
        grads = leaves.gradients()
        products: dict[str, Any] = {
            name: _total(_dots(grads, leaves.moved(old[name])), offset) if grads else None
            for name, offset in state.offsets.items()
        }
        finite = _finite([*products.values()]) if grads and products else True
        if finite is False:
            return *before, False
        if finite is not True:
            products = dict(zip(products, finite_only(finite, [*products.values()]), strict=True))
        squares, overshot, product = state.squares, False, products.get("lr")
        if product is not None:
            overshot, products["lr"] = self._bounded(product, squares)
            squares = squares + products["lr"].square()
        outer = self._outer.update(state.offsets, products, state.outer, hparams[0].outer)
        after: Any = *outer, squares
        return *(after if finite is True else select(finite, after, before)), overshot

    def _bounded(self, product: Any, squares: Any) -> tuple[Any, Any]:
        """Whether the last step overshot, and the derivative as it counts."""
        sign = -1 if self._ascends else 1
        bound = 2 * ops.sqrt(squares)
        overshot = (bound > 0) & (sign * product > bound)
        return overshot, ops.where(overshot, sign * bound, product)


hypergradient = Hypergradient


def _directions(optimizer: Optimizer[Any, Any]) -> set[bool]:
    """Whether it ascends; of a partition, whether its parts do."""
    if isinstance(optimizer, Partition):
        return {ascends for part in optimizer.optimizers.values() for ascends in _directions(part)}
    if isinstance(optimizer, Chain):
        return _directions(optimizer.parts[-1])
    if isinstance(optimizer, Wrapper):
        flipped = isinstance(optimizer, Maximize)
        return {ascends != flipped for ascends in _directions(optimizer.optimizer)}
    return {isinstance(optimizer, Leafwise) and optimizer.maximize}


def _check_field(name: str, fields: list[hyper.Field]) -> None:
    """Raise unless all fields of this name have a range whose values exp(x) can scale."""
    found = [field.ends() for field in fields if field.name == name]
    if not found:
        names = [field.name for field in fields]
        raise ValueError(
            f"learn has {name!r}, which is not a hyperparameter of the optimizer"
            f"{did_you_mean(names, name) or '.'} They are {', '.join(names)}"
        )
    if any(ends not in ((0, math.inf), (0, 1)) for ends in found):
        raise ValueError(f"learn has {name!r}, whose range is neither >= 0 nor [0, 1]")


_DECAYS = ("momentum", "alpha")
"""Fields that are fractions, although torch.optim takes larger numbers."""


def _is_fraction(field: hyper.Field) -> bool:
    return field.ends()[1] == 1 or field.name in _DECAYS


def _check_fractions(hparams: Any, learn: Sequence[str]) -> None:
    """Raise for a number that cannot be learned because it is greater than 1."""
    for record in hyper.records(hparams):
        for field in hyper.FIELDS[type(record)]:
            if field.name in learn and _is_fraction(field):
                for value in _tree.leaves(getattr(record, field.name)):
                    if not isinstance(value, Tensor) and value > 1:
                        raise ValueError(
                            f"hparams.{field.name} is {value}, but must be <= 1 to be learned"
                        )


def _moved(
    hparams: Any, offsets: dict[str, Tensor], form: Callable[[Any], Any] = lambda x: x
) -> Any:
    """The hyperparameters, in a tree of records, with their offsets applied, those in this form."""

    def value(field: hyper.Field, old: Any) -> Any:
        if field.name not in offsets:
            return old
        offset = offsets[field.name]
        if not _is_fraction(field):
            factor = offset.exp()
            return _tree.map(lambda h: form(h * factor), old)
        factor = offset.clamp(-80, 80).exp()  # inf / inf is not 1
        return _tree.map(lambda h: form(h * factor / (1 + h * (factor - 1))), old)

    return hyper.map_fields(value, hparams)


def _stepping(
    rule: Optimizer[Any, Any], known: ways.Alike | None, params: Tree, grads: Tree, *others: Any
) -> Write:
    """What takes a step in place, without checks where it is known how."""
    if known:
        return partial(repeat_, rule, known, params, grads, *others)
    return rule.prepare_(params, grads, *others)


def _derivatives(
    stepped: Callable[[dict[str, Tensor]], Tensors],
    offsets: dict[str, Tensor],
    name: str,
    like: Tensors,
) -> Tensors:
    """The derivative of a step's results with respect to one offset.

    It is the product of a Jacobian and a vector. Two products in reverse mode give it wherever an
    optimizer may be used; torch nests forward mode in some of these places only.
    """
    zeros, one = [torch.zeros_like(x) for x in like], torch.ones_like(offsets[name])

    def product(*vectors: Tensor) -> Tensors:
        def results(offset: Tensor) -> Tensors:
            return stepped({**offsets, name: offset})

        (found,) = functions.vjp(results, [offsets[name]], [True], vectors)
        return [torch.zeros_like(one) if found is None else found]

    found = functions.vjp(product, zeros, [True] * len(zeros), [one])
    return [z if d is None else d for d, z in zip(found, zeros, strict=True)]


def _finite(products: Tensors) -> Any:
    """Whether all are finite; a tensor where that cannot be read at once."""
    return _modes.number_of(torch.stack(products).isfinite().all())


def _dots(grads: Tensors, derivatives: Tensors) -> Tensors:
    """The scalar products of pairs of tensors."""
    dtypes = {x.dtype for x in (*grads, *derivatives)}
    if len(dtypes) > 1 or any(dtype.is_complex for dtype in dtypes):
        grads = [real(g.to(d.dtype)) for g, d in zip(grads, derivatives, strict=True)]
        derivatives = [*map(real, derivatives)]
    return [g.flatten().dot(d.flatten()) for g, d in zip(grads, derivatives, strict=True)]


def _total(dots: Tensors, like: Tensor) -> Tensor:
    """The sum of 0-d tensors, in the form of another one."""
    if len({(dot.dtype, dot.device) for dot in dots}) > 1:
        dots = [dot.to(like) for dot in dots]
    return torch.stack(dots).to(like).sum()
