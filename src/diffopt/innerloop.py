"""innerloop(): steps on an existing module and optimizer, through which one can differentiate."""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffopt import _modes, _replica, _torch, _tree
from diffopt._arguments import check_bool, check_function, explains_keywords
from diffopt._diff import functions, repairs
from diffopt._diff.gradient import plain_gradients
from diffopt._diff.lacking import Explained
from diffopt.nn import Functional, functionalize
from diffopt.optim._groups import overridden
from diffopt.optim._pure import names_in, restore_, to_pure
from diffopt.optimizer import Optimizer, check_optimizer, copy_, overwriting
from diffopt.solve import check_hparams, check_state, of_one_step

M = TypeVar("M", bound=nn.Module)

_PARAMETERS = _torch.MODULE_TABLES[0]

Gradients: TypeAlias = dict[str, Tensor | None]
"""By the name of the parameter; None where the loss does not depend on it."""


@explains_keywords
@contextlib.contextmanager
def innerloop(
    model: M,
    optimizer: Optimizer[Any, Any] | torch.optim.Optimizer,
    *,
    hparams: Any | Callable[[int], Any] = None,
    state: Any = None,
    override: Mapping[str, Any] | None = None,
    first_order: bool = False,
    grad_callback: Callable[[Gradients], Gradients] | None = None,
    track_graph: bool = True,
) -> Generator[tuple[M, InnerLoop]]:
    """Step a copy of a module, in a way that can be differentiated.

    In `with innerloop(model, optimizer) as (fmodel, inner)`, `fmodel` is a copy of the module, of
    the same class, and `inner.step(loss)` moves its parameters as the optimizer would move the
    module's. A loss of `fmodel` is then a function of the module's own parameters: its `backward()`
    goes through the steps and accumulates gradients there, in tensor hyperparameters, and in
    whatever else the losses have used. Neither the module nor the optimizer is changed.

    A copy has the hooks, the mode (`train`, `eval`) and the plain attributes of the module, and the
    same frozen parameters; buffers are its own. A tensor with several names (tied weights) stays
    one tensor. A parameter that a loss does not use has gradient None: that step leaves it alone.
    A module that DistributedDataParallel wraps is taken out of it, and `torch.compile` is undone,
    since torch does not differentiate its results twice. Entered under `torch.no_grad`, it enables
    gradients, and behaves as with `track_graph=False`.

    Args:
        model: any module that `diffopt.nn.functionalize` takes, also an `fmodel`.
        optimizer: a pure optimizer; or one of torch.optim or diffopt.optim for parameters of the
            module, whose groups, hyperparameters and state are the initial ones. It moves only the
            parameters it was given.
        hparams: hyperparameters from `optimizer.hparams(...)` of the pure optimizer, or a function
            of the step 0, 1, ... that returns them; by default those of the groups, or of a pure
            optimizer `optimizer.hparams()`: the defaults of torch.optim, such as lr=1e-3 for SGD.
        state: the state of a pure optimizer; `optimizer.init(params)` if None.
        override: hyperparameters to replace, by name, such as `{"lr": lr, "betas": (b1, b2)}`. A
            value is a number, a tensor, a dict by name of a parameter or a part of the module, or a
            list with one of these for each parameter group.
        first_order: whether gradients are constants, which drops the second derivatives of the
            losses, as in first-order MAML.
        grad_callback: called with the gradients by name; returns those to step with, such as
            clipped ones, or averages over processes.
        track_graph: False for evaluation: steps are not differentiable, parameters are leaves of
            autograd's graph, and memory does not grow with the number of steps.

    Yields:
        The copy of the module, and an `InnerLoop`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the module has no parameters to train, or is one that `functionalize` rejects;
            the optimizer is one that `to_pure` rejects, or has a parameter that is not the
            module's.
        RuntimeError: a transform of torch.func or torch.compile is active, for which there is
            `minimize`; or torch.inference_mode is.

    Examples:
        >>> import torch, diffopt
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(net.weight, 2.0)
        >>> x, lr = torch.ones(1, 1), torch.tensor(0.1, requires_grad=True)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=1.0)
        >>> with diffopt.innerloop(net, sgd, override={"lr": lr}) as (fnet, inner):
        ...     for _ in range(2):
        ...         inner.step(0.5 * fnet(x).square().sum())
        ...     fnet(x).sum().backward()
        >>> net.weight.grad, lr.grad  # of 2 (1 - lr)^2
        (tensor([[0.8100]]), tensor(-3.6000))
    """
    _check_modes()
    check_bool(first_order, "first_order")
    check_bool(track_graph, "track_graph")
    check_function(grad_callback, "grad_callback", optional=True)
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model is {_tree.describe(model)}, not a torch.nn.Module")
    module = _unwrapped(model)
    functional = functionalize(module)
    if not functional.params:
        raise ValueError(f"model is {type(module).__name__}, which has no parameters to train")
    track = track_graph and torch.is_grad_enabled()
    with torch.enable_grad():
        fmodel, params = _copied(module, functional, track)
        with torch.set_grad_enabled(track):
            source = _source(optimizer, module, params, hparams, state)
        inner = InnerLoop(fmodel, params, module, source, override, track)
        inner.first_order, inner.grad_callback = first_order, grad_callback
        try:
            yield cast(M, fmodel), inner
        finally:
            inner.ended = True


class _Source(NamedTuple):
    """What an inner loop starts from.

    Attributes:
        given: the optimizer of torch.optim, or None.
        owners: the names of the parameters in each group.
    """

    given: torch.optim.Optimizer | None
    owners: list[list[str]]
    optimizer: Optimizer[Any, Any]
    state: Any
    hparams: Any


class InnerLoop:
    """What takes the steps of an `innerloop`.

    Attributes:
        steps: the number of steps taken.
        losses: the loss of each step, detached.
        optimizer: the pure optimizer.
        hparams: the hyperparameters, or the function of the step that returns them.
        first_order: as given to `innerloop`; may be set between steps.
        grad_callback: as given to `innerloop`; may be set between steps.
        track_graph: whether steps are differentiable.
        ended: whether the context has been left, after which there are no more steps.
    """

    def __init__(
        self,
        fmodel: nn.Module,
        params: dict[str, Tensor],
        module: nn.Module,
        source: _Source,
        override: Mapping[str, Any] | None,
        track_graph: bool,
    ) -> None:
        self.optimizer, self.state, self.hparams = source.optimizer, source.state, source.hparams
        self._repeats = True  # until an update must be checked
        self._gatherer = source.optimizer  # which has gathered what it repeats
        self.first_order, self.track_graph, self.ended = False, track_graph, False
        self.grad_callback: Callable[[Gradients], Gradients] | None = None
        self.steps, self.losses = 0, list[Tensor]()
        self._fmodel, self._module, self._source = fmodel, module, source
        self._override: dict[str, Any] = {}
        self._params, self._firsts = [params], list[int]()
        self._used = set[str]()  # the parameters that have had a gradient
        self._record(None, override)  # raises for what is wrong with them
        self._override = _named_values(override)
        if track_graph:
            _keep_past(fmodel, _Past(self._firsts, self._params))
        self._firsts.append(_torch.next_node())

    @torch.enable_grad()  # as when it was entered, whatever surrounds this call
    def step(
        self,
        loss: Tensor,
        *,
        hparams: Any | Callable[[int], Any] = None,
        override: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """Move the parameters of the copy by one step of the optimizer.

        Args:
            loss: a real 0-d tensor, computed with the copy since the last step; of any number of
                its forward passes.
            hparams: hyperparameters of this step alone.
            override: hyperparameters to replace in this step, besides those given to `innerloop`.
            **others: refused, with what to do instead.

        Raises:
            TypeError: `loss` is not a tensor, or `grad_callback` does not return a dict.
            ValueError: `loss` is not a real 0-d tensor, or does not depend on the parameters of the
                copy as they are now; the copy has got other parameters; also what
                `optimizer.update` raises. Nothing has changed.
            RuntimeError: the context has been left; or a transform of torch.func or
                torch.inference_mode is active.
        """
        _refuse_keywords(others)
        if _modes.transformed() or torch.is_inference_mode_enabled():
            _check_modes()
        if self.ended:
            raise RuntimeError(
                "the innerloop has ended: take steps inside its `with` block, or begin another one"
            )
        _check_loss(loss)
        record = self._record(hparams, override)
        params, moved = self._owned()
        grads = dict.fromkeys(params) | self._called_back(self._gradients(loss, moved))
        with torch.set_grad_enabled(self.track_graph):
            new = self._updated(params, grads, record)
        self._put(self._params[-1] | {name: new[name] for name in moved})
        self._used |= {name for name, grad in grads.items() if grad is not None}
        self.losses.append(loss.detach())
        self.steps += 1

    @property
    def state(self) -> Any:
        """The optimizer's state after the last step; may be set between steps."""
        if self._updates is not None:
            with torch.set_grad_enabled(self.track_graph):
                self.state = self._updates.trees()[1]
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        # Whoever has it may write to it: the next step gathers it again.
        self._state, self._updates = state, None

    def params(self, t: int = -1) -> dict[str, Tensor]:
        """The trainable parameters of the copy by name, after `t` steps; after the last by default.

        `params(0)` are those at the start. Without a graph only the last are kept.

        Raises:
            IndexError: there are no parameters of that step.
        """
        count = self.steps + 1
        index = t + count if t < 0 else t
        if not 0 <= index < count:
            raise IndexError(f"t is {t}, but {self.steps} steps have been taken")
        if not self.track_graph and index < self.steps:
            raise IndexError(
                f"t is {t}, but without a graph only the parameters after the last step, "
                f"{self.steps}, are kept"
            )
        return dict(self._params[index if self.track_graph else 0])

    def copy_back(self, *, state: bool = True) -> None:
        """Write parameters and buffers to the user's module, and state to the user's optimizer.

        The values are detached. Do it after `backward()` if a loss uses the module itself.

        Args:
            state: whether to write the optimizer's state too. A pure optimizer has none of its own:
                its state is `inner.state`.

        Raises:
            ValueError: the module is itself the copy of an innerloop, or the optimizer cannot take
                the state.
        """
        own = {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}
        new = {**dict(self._fmodel.named_buffers()), **self._params[-1]}
        if any(tensor.grad_fn is not None for tensor in own.values()):
            raise ValueError(
                "copy_back would write to tensors that autograd has computed: the module is the "
                "copy of another innerloop"
            )
        pairs = overwriting({"model": own}, {"model": own | new})
        with torch.no_grad():
            if state and self._source.given is not None:
                names = itertools.chain(*self._source.owners)
                used = [name in self._used for name in names]
                restore_(self._source.given, self._source.state, self.state, used)
            copy_(pairs)

    def _owned(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The parameters that the optimizer has, in the order of its state; those not frozen."""
        names, every = [*itertools.chain(*self._source.owners)], self._params[-1]
        if not every.keys() >= {*names}:  # some are frozen
            every = dict(self._module.named_parameters()) | every
        owned = {name: every[name] for name in names}
        moved = {k: p for k, p in owned.items() if k in self._params[-1] and p.requires_grad}
        return owned, moved

    def _record(self, hparams: Any, override: Mapping[str, Any] | None) -> Any:
        """The hyperparameters of the next step."""
        record = self.hparams if hparams is None else hparams
        check_hparams(record, self.optimizer.hparams)
        if callable(record):
            record = of_one_step(record(self.steps), self.steps, self.optimizer.hparams)
        values = self._override | _named_values(override)
        return overridden(record, values, self._source.owners) if values else record

    def _gradients(self, loss: Tensor, params: dict[str, Tensor]) -> Gradients:
        self._check_same()
        second = self.track_graph and not self.first_order
        with Explained():
            repairs.mend_graph(loss, self._firsts[-1])
            found = plain_gradients(
                loss, [*params.values()], create_graph=second, retain=self.track_graph
            )
        if all(grad is None for grad in found):
            raise ValueError(
                "loss does not depend on the parameters that the optimizer moves, as they are now: "
                "compute it with the module that innerloop returned, after the last step"
            )
        return dict(zip(params, found, strict=True))

    def _updated(
        self, params: dict[str, Tensor], grads: Gradients, record: Any
    ) -> dict[str, Tensor]:
        """The params after an update, which also changes the state."""
        if self._gatherer is not self.optimizer:
            self._gatherer, self.state = self.optimizer, self.state
        own = self.grad_callback is None and not _modes.observed()
        if own and self._repeats:  # then what is the same for all steps is done once
            updates = self._updates or self.optimizer.repeated(params, self.state, record)
            aliases = [*params.values()]
            if updates and updates.update([*grads.values()], record, params=aliases):
                self._updates = updates
                return dict(zip(params, updates.params, strict=True))
            self._repeats = False
        params, self.state = self.optimizer.update(params, grads, self.state, record)
        return params

    def _check_same(self) -> None:
        """Raise if the copy has parameters that no step would move."""
        known = {*map(id, self._params[-1].values())}
        parts = self._fmodel.modules()
        found = [id(p) for part in parts for p in vars(part)[_PARAMETERS].values() if p is not None]
        if known.issuperset(found):
            return
        for name, tensor in self._fmodel.named_parameters():
            if tensor.requires_grad and id(tensor) not in known:
                raise ValueError(
                    f"{name!r} has been added, replaced or unfrozen in the copy of the module, and "
                    "would not be trained: change the module before innerloop"
                )

    def _called_back(self, grads: Gradients) -> Gradients:
        if self.grad_callback is None:
            return grads
        new: Any = self.grad_callback(dict(grads))
        if not isinstance(new, Mapping):
            raise TypeError(
                f"grad_callback returned {_tree.describe(new)}, not a dict of the gradients by name"
            )
        names = "what grad_callback returned", "the gradients"
        return _tree.ordered_like(dict(cast(Gradients, new)), grads, names)

    def _put(self, params: dict[str, Tensor]) -> None:
        """Make these the parameters of the copy, and its buffers new ones of the same values."""
        old, track = self._params[-1], self.track_graph
        # Where no parameter depends on another, the next gradient is partial without aliases.
        apart = track and self._updates is not None and self._updates.apart
        new = {
            name: p
            if not old[name].requires_grad or (apart and p is not old[name])
            else functions.alias(p, track)
            for name, p in params.items()
        }
        tensors = {id(old[name]): tensor for name, tensor in new.items()}
        tensors |= {id(b): _fresh(b, track) for b in self._fmodel.buffers()}
        _replica.replace_(self._fmodel.modules(), tensors)
        _torch.forget_parametrized()
        if not track:
            self._params.clear()
        self._params.append(new)
        self._firsts.append(_torch.next_node())


class _Past(NamedTuple):
    """What the parameters of a copy have been.

    Attributes:
        firsts: the numbers that autograd's nodes had reached before each step, and after the last.
        params: the parameters by name at these times.
    """

    firsts: list[int]
    params: list[dict[str, Tensor]]

    def seen(self) -> dict[str, Tensor]:
        """Those of the pass that a running backward pass is about; the last outside of it."""
        node = _torch.running_node()
        begun = 0 if node is None else bisect.bisect(self.firsts, _torch.node_number(node))
        return self.params[begun - 1]


class _Parameters(dict[str, Tensor]):
    """Those of a part of a copy: what runs again in a backward pass sees them as they were.

    `torch.utils.checkpoint` is an example. `names` holds their names in the whole copy.
    """

    def __init__(self, table: Any, names: dict[str, str], past: _Past) -> None:
        super().__init__(table)
        self._names, self._past = names, past

    def __getitem__(self, key: str) -> Tensor:
        seen = self._past.seen()
        if key not in self._names or seen is self._past.params[-1]:
            return super().__getitem__(key)  # which may have been replaced
        return seen[self._names[key]]

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _keep_past(fmodel: nn.Module, past: _Past) -> None:
    """Let the parts of a copy see their parameters as they were in what runs again."""
    names = {id(tensor): name for name, tensor in past.params[0].items()}
    for part in fmodel.modules():
        table = vars(part)[_PARAMETERS]
        own = {key: names[id(p)] for key, p in table.items() if id(p) in names}
        if own:
            vars(part)[_PARAMETERS] = _Parameters(table, own, past)


def _check_modes() -> None:
    if _modes.transformed() or _modes.forward_differentiated():
        raise RuntimeError(
            "innerloop steps by torch.autograd.grad, which transforms of torch.func, torch.compile "
            "and forward mode do not differentiate: use diffopt.minimize with "
            "diffopt.nn.functionalize(model)"
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "gradients cannot be computed in torch.inference_mode: use torch.no_grad"
        )


def _unwrapped(model: nn.Module) -> nn.Module:
    """What a wrapper runs that could not run a copy of it."""
    wraps = isinstance(model, DistributedDataParallel)
    inner = model.module if wraps else _torch.uncompiled(model)
    return model if inner is model else _unwrapped(inner)


def _copied(
    module: nn.Module, functional: Functional, track: bool
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A replica of the module, and its parameters by name."""
    frozen = {id(tensor) for tensor in module.parameters()}
    buffers = [b for b in functional.buffers.values() if id(b) not in frozen]
    copies = ((name, _fresh(p, track)) for name, p in functional.params.items())
    params = {name: p if track else p.requires_grad_() for name, p in copies}
    tensors = {id(p): params[name] for name, p in functional.params.items()}
    tensors |= {id(b): _fresh(b, track) for b in buffers}
    result = _replica.replica([*module.modules()], tensors)
    _torch.forget_parametrized()
    parts = list(result.modules())
    owners = Counter(id(b) for part in parts for b in part.buffers(recurse=False))
    for part in parts:
        _torch.run_uncompiled(part)
        if (inner := _unwrapped(part)) is not part:
            vars(part)["forward"] = inner.__call__
        names = [name for name, b in part.named_buffers(recurse=False) if owners[id(b)] == 1]
        if names:
            hook = functools.partial(_write_apart, names)
            part.register_forward_pre_hook(hook, prepend=True)
    return result, params


def _fresh(tensor: Tensor, track: bool) -> Tensor:
    """A copy, so that nothing that is done to it in place changes the module."""
    return (tensor if track else tensor.detach()).clone()


def _write_apart(names: list[str], part: nn.Module, _: Any) -> None:
    """Let a module write to new buffers: an earlier pass may need the old ones for its gradient.

    torch's batch norm does not tell autograd that it writes to them.
    """
    if part.training:
        buffers = [b for name, b in part.named_buffers(recurse=False) if name in names]
        _replica.replace_([part], {id(b): b.clone() for b in buffers})


def _source(
    given: Any, module: nn.Module, params: dict[str, Tensor], hparams: Any, state: Any
) -> _Source:
    """What to start from; its trees are dicts by name."""
    if isinstance(given, torch.optim.Optimizer):
        if state is not None:
            raise TypeError(
                "state is the torch.optim optimizer's own: pass a pure optimizer to start from "
                "another one"
            )
        pure, owners = to_pure(given, module=module), names_in(given, module)
        hparams = pure.hparams if hparams is None else hparams
        return _Source(given, owners, pure.optimizer, pure.state, hparams)
    _check_called(given)
    check_optimizer(given, "optimizer")
    if state is not None:
        check_state(state, given, params)
    hparams = given.hparams() if hparams is None else hparams
    state = given.init(params) if state is None else state
    return _Source(None, [[*params]], given, state, hparams)


def _check_called(given: object) -> None:
    if isinstance(given, type) and issubclass(given, torch.optim.Optimizer):
        name = given.__name__
        raise TypeError(f"optimizer is the class {name}: pass {name}(module.parameters(), ...)")


def _named_values(override: Any) -> dict[str, Any]:
    """The hyperparameters to replace, by name."""
    override = {} if override is None else _tree.as_dict(override)
    if not isinstance(override, Mapping):
        raise TypeError(f"override is {_tree.describe(override)}, not a dict of hyperparameters")
    return dict(cast(Mapping[str, Any], override))


def _refuse_keywords(others: dict[str, Any]) -> None:
    if "adjoint" in others:
        raise TypeError(
            "step() has no adjoint: the program between steps is differentiated by autograd, as "
            "it runs, and no step can be run again. For an adjoint use diffopt.minimize with "
            "diffopt.nn.functionalize(model)"
        )
    if others:
        name = min(others)
        settable = name in ("first_order", "grad_callback")
        instead = f": set inner.{name}" if settable else ", only loss, hparams and override"
        raise TypeError(f"step() has no argument {name!r}{instead}")


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss is {_tree.describe(loss)}, not a tensor")
    if loss.dim() != 0 or not loss.is_floating_point():
        raise ValueError(
            f"loss must be a real 0-d tensor, but has shape {tuple(loss.shape)} and dtype "
            f"{loss.dtype}"
        )
    if not loss.requires_grad:
        raise ValueError(
            "loss has no graph: compute it with the module that innerloop returned, and not under "
            "torch.no_grad"
        )
