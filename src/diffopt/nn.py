"""An nn.Module as a pure function of its parameters and buffers."""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, cast, overload

import torch
from torch import Tensor, jit, nn
from torch.func import functional_call  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.parameter import is_lazy

from diffopt import _arguments, _memory, _modes, _replica, _torch, _tree

Tensors: TypeAlias = Mapping[str, Tensor]
"""Tensors of a module by name."""

_MISSING = cast(Any, None)  # explained by the same error as an argument of another kind


class Functional(NamedTuple):
    """What `functionalize` returns; calling it calls `apply`.

    Attributes:
        apply: `(params, buffers, *inputs, **kwargs) -> (outputs, new_buffers)`; for a module
            without buffers also `(params, *inputs, **kwargs) -> outputs`.
        params: the module's own trainable parameters by name, each once.
        buffers: every other tensor of the module by name: its buffers and its frozen parameters.
    """

    apply: Callable[..., Any]
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]

    @overload
    def __call__(
        self, params: Tensors | nn.Module, buffers: Tensors, *inputs: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]: ...

    @overload
    def __call__(
        self, params: Tensors | nn.Module = _MISSING, *inputs: Any, **kwargs: Any
    ) -> Any: ...

    def __call__(self, params: Tensors | nn.Module = _MISSING, *inputs: Any, **kwargs: Any) -> Any:
        """The module's outputs at these tensors, and the buffers after the call.

        A module without buffers may be called without them: then it returns the outputs alone.
        """
        return self.apply(params, *inputs, **kwargs)

    def __repr__(self) -> str:
        return f"Functional({self.apply}, params={[*self.params]}, buffers={[*self.buffers]})"


@_arguments.explains_keywords
def functionalize(module: nn.Module) -> Functional:
    """Turn a module into a pure function.

    A call computes `module(*inputs, **kwargs)` with `params` and `buffers` in place of the module's
    own tensors. What the module writes to its buffers goes to the new buffers that are returned;
    the module and the arguments are not changed. A module that has no buffers may be called as
    `model(params, *inputs, **kwargs)`, which returns the outputs alone. `params` may also be a
    module with such parameters. The module's mode (`train`, `eval`) and its other attributes are
    those at the time of the call. Under `torch.vmap`, buffers that are written to must be batched.

    A call runs a replica of the module, so calls may run in several threads at once, and
    `torch.utils.checkpoint` inside the module recomputes with the tensors of the call. What the
    module assigns to its own plain attributes is lost: return it, or register a buffer. Attributes
    that refer to submodules, also in containers, functions and objects, refer to the replica's; no
    deeper inside objects, though, and those that cannot be copied, such as iterators, are rejected.

    Running averages that `batch_norm` writes to buffers have no derivative: torch's kernel does not
    provide one.

    Args:
        module: any module. A parameter with `requires_grad=False` counts as a buffer, so that no
            optimizer moves it. A tensor with several names (tied weights) is listed under the first
            one, and its gradient is the sum over all its uses.

    Returns:
        A `Functional`, which unpacks as `apply, params, buffers`. Its `params` are the module's own
        tensors: `backward()` through a loop that starts from them accumulates gradients in the
        module's parameters. It is pickled and copied together with the module.

    Raises:
        TypeError: `module` is not a module, or a part of it is a `torch.jit.ScriptModule`; (from
            the call) `params` or `buffers` are not dictionaries of tensors.
        ValueError: the module has parameters that are not initialized yet, is sharded by FSDP,
            whose hooks replace the given parameters with its own, has an embedding that writes to
            its weight (`max_norm`), or a parameter that shares memory with another tensor, being
            another object; (from the call) `params` or
            `buffers` has missing or unexpected names, the shape of a parameter differs from the
            module's, an attribute refers to a tensor or submodule and cannot be copied, or the
            module has changed: a parameter has been replaced
            (`load_state_dict(assign=True)`), frozen, unfrozen, added or removed.
        RuntimeError: (from the call) the module has written to one of `params`.

    Examples:
        >>> import torch, diffopt
        >>> model = diffopt.nn.functionalize(torch.nn.BatchNorm1d(2))
        >>> sorted(model.params), sorted(model.buffers)
        (['bias', 'weight'], ['num_batches_tracked', 'running_mean', 'running_var'])
        >>> x = torch.tensor([[0.0, 2.0], [4.0, 2.0]])
        >>> y, buffers = model(model.params, model.buffers, x)
        >>> buffers["running_mean"], model.buffers["running_mean"]
        (tensor([0.2000, 0.2000]), tensor([0., 0.]))
    """
    _arguments.check_type(module, nn.Module, "module", "a torch.nn.Module")
    parts = _parts(module)
    _refuse_kinds(parts)
    parameters, others = _places(parts)
    places = parameters | others
    canonical = {id(tensor): name for name, tensor in reversed(places.items())}
    own = {name: tensor for name, tensor in places.items() if canonical[id(tensor)] == name}
    params = {k: t for k, t in own.items() if k in parameters and t.requires_grad}
    buffers = {k: t for k, t in own.items() if k not in params}
    _refuse_aliases(params, buffers)
    names = {place: canonical[id(tensor)] for place, tensor in places.items()}
    frozen = frozenset(buffers.keys() & parameters.keys())
    held = [*parts.values()], _contents(parts.values())
    apply = _Apply(module, params, buffers, frozen, places, names, *held)
    return Functional(apply, dict(params), dict(buffers))


@dataclass(frozen=True, eq=False)
class _Apply:
    """Calls a module, which must be as it was when it was functionalized.

    Attributes:
        params: its trainable parameters by name.
        buffers: its other tensors by name.
        frozen: the names of the buffers that are frozen parameters.
        places: its tensors by place; a tensor may have several.
        names: for every place, the name of its tensor above.
        parts: the module and its submodules.
        contents: what the tables of these hold.
    """

    module: nn.Module
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    frozen: frozenset[str]
    places: dict[str, Tensor]
    names: dict[str, str]
    parts: list[nn.Module]
    contents: list[Any]

    def __repr__(self) -> str:
        return type(self.module).__name__

    def __call__(self, params: Any = _MISSING, *inputs: Any, **kwargs: Any) -> Any:
        params = _tree.trained(params)
        if "buffers" in kwargs and not inputs:
            return self._called(params, kwargs.pop("buffers"), **kwargs)
        if self.buffers or (inputs and _stands_for_buffers(*inputs)):
            return self._called(params, *(inputs or (None,)), **kwargs)
        return self._called(params, {}, *inputs, **kwargs)[0]

    def _called(
        self, params: Any, buffers: Any, /, *inputs: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        self._check("params", params, self.params)
        self._check("buffers", buffers, self.buffers)
        # The module may write into its buffers. Frozen parameters are only read.
        tensors = {k: b if k in self.frozen else b.clone() for k, b in buffers.items()}
        tensors |= params
        if _modes.compiling():  # which supports this, and traces one call at a time
            tensors = {place: tensors[name] for place, name in self.names.items()}
            outputs = functional_call(self.module, tensors, inputs, kwargs, tie_weights=False)
            return outputs, {name: tensors[name] for name in self.buffers}
        parts, places = self.parts, self.places
        if not self._unchanged():
            named = _parts(self.module)
            parts, places = [*named.values()], self._same_places(named, buffers)
        given = {id(tensor): tensors[self.names[place]] for place, tensor in places.items()}
        replica = _replica.replica(parts, given)
        before = _modes.versions(params.values())
        # torch caches parametrized tensors under the id of the original module.
        attention = _traceable_attention() if _modes.transformed() else contextlib.nullcontext()
        with attention, _torch.parametrized_anew():
            outputs = replica(*inputs, **kwargs)
        _refuse_writes(params, before)
        if len(self.buffers) > len(self.frozen):
            tensors |= _places(_parts(replica))[1]
        return outputs, {name: tensors[name] for name in self.buffers}

    def _check(self, argument: str, given: Any, own: Tensors) -> None:
        if type(given) is not dict and not isinstance(given, Mapping):  # of an ABC: slow
            call = "params, buffers" if self.buffers else "params"
            raise TypeError(
                f"{argument} is {_tree.describe(given)}, not a dictionary of the module's "
                f"{'parameters' if argument == 'params' else 'buffers'}"
                f"{'' if own else ', of which it has none'}: call model({call}, *inputs)"
            )
        if given.keys() != own.keys():
            missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
            fault = f"lacks {missing}" if missing else f"has unknown {unknown}"
            raise ValueError(f"{argument} {fault}")
        for name, tensor in cast(Mapping[str, Any], given).items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{argument}[{name!r}] is {_tree.describe(tensor)}, not a tensor")
            if argument == "params" and (fault := _misfit(tensor, own[name])):
                raise ValueError(f"{argument}[{name!r}] has {fault}")

    def _unchanged(self) -> bool:
        """Whether the module certainly holds what it held; a quick look."""
        now = _contents(self.parts)
        same = len(now) == len(self.contents) and all(map(operator.is_, now, self.contents))
        return same and all(param.requires_grad for param in self.params.values())

    def _same_places(self, parts: Mapping[str, nn.Module], given: Tensors) -> dict[str, Tensor]:
        """Every place of the module that holds a tensor; raises if one has changed."""
        parameters, buffers = _places(parts)
        places = parameters | buffers
        for place in self.places.keys() ^ places.keys():
            raise _changed(place, "removed" if place in self.places else "added")
        for place, tensor in parameters.items():
            if tensor is not self.places[place]:
                raise _changed(place, "replaced")
            trained = tensor.requires_grad or self.names[place] in self.frozen
            if not trained and isinstance(tensor, nn.Parameter):
                raise _changed(place, "frozen")
        for place, tensor in buffers.items():
            former = self.places[place]
            if tensor is not former:
                *_, value = _modes.levels(given[self.names[place]])
                if value.is_set_to(former):
                    raise _changed(place, "replaced")
        return places


def _stands_for_buffers(first: Any, *others: Any) -> bool:
    """Whether the first input of a module without buffers stands where buffers would be."""
    mapping = type(first) is not Tensor and isinstance(first, Mapping)  # of an ABC: slow
    return first is None or (mapping and (not first or bool(others)))


def _misfit(tensor: Tensor, own: Tensor) -> str | None:
    """What a tensor has that no parameter like the module's own can have."""
    if tensor.shape != own.shape:
        return f"shape {tuple(tensor.shape)}, but the module's has {tuple(own.shape)}"
    numeric = tensor.dtype == own.dtype or tensor.is_complex()
    if not numeric and tensor.is_floating_point() != own.is_floating_point():
        return f"dtype {tensor.dtype}, but the module's parameter has {own.dtype}"
    if tensor.layout is not own.layout:
        return f"layout {tensor.layout}, but the module's parameter has {own.layout}"
    if tensor.is_meta and not own.is_meta:
        return f"device meta, but the module's parameter has {own.device}"
    return None


def _changed(place: str, change: str) -> ValueError:
    return ValueError(
        f"{place!r} has been {change} in the module since it was functionalized: call "
        "diffopt.nn.functionalize again, and continue with its params and buffers"
    )


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    """The module and its submodules, each under its first name."""
    return dict(cast(Iterable[tuple[str, nn.Module]], module.named_modules()))


def _places(parts: Mapping[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters and the buffers, by every place that holds one."""
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for prefix, part in parts.items():
        start = f"{prefix}." if prefix else ""
        for found, table in zip((parameters, buffers), _torch.MODULE_TABLES, strict=False):
            for name, tensor in vars(part)[table].items():
                if tensor is not None:
                    found[start + name] = tensor
    return parameters, buffers


def _contents(parts: Iterable[nn.Module]) -> list[Any]:
    """The parameters, buffers and submodules of each part."""
    return [x for part in parts for t in _torch.MODULE_TABLES for x in vars(part)[t].values()]


def _refuse_kinds(parts: Mapping[str, nn.Module]) -> None:
    # A package that is not imported has not sharded anything, and is slow to import.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    sharded = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp else ()
    for name, part in parts.items():
        path = f"module.{name}" if name else "module"
        if isinstance(part, sharded):
            raise ValueError(
                f"{path} is sharded by FSDP (fully_shard), whose hooks replace the given "
                "parameters with its own: functionalize a copy of the module that is not sharded, "
                "which accepts DTensors as params"
            )
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None:
            raise ValueError(
                f"{path} has max_norm, so that it writes to its weight when it is called, which "
                "has no derivative: set max_norm to None and normalize the rows in forward"
            )
        if isinstance(part, jit.ScriptModule):
            raise TypeError(f"{path} is a torch.jit.ScriptModule, whose tensors cannot be replaced")
        for own, tensor in vars(part)[_torch.MODULE_TABLES[0]].items():
            if is_lazy(tensor):
                raise ValueError(f"{path}.{own} is not initialized yet: run the module once first")


def _refuse_aliases(params: Tensors, buffers: Tensors) -> None:
    """Raise if a parameter shares memory with another tensor, which a step would not change."""
    tensors = [*params.values()], [*buffers.values()]
    pair = None if _modes.observed() else _memory.overlap(*tensors)
    if pair and pair[0] != pair[1]:
        first, second = ([*params, *buffers][i] for i in pair)
        raise ValueError(
            f"{second!r} and {first!r} of the module share memory, which steps on separate tensors "
            "would not: give both places the same Parameter, or clone one"
        )


def _refuse_writes(params: Tensors, before: list[int]) -> None:
    """Raise if a parameter has another version than before."""
    after = _modes.versions(params.values())
    for name, then, now in zip(params, before, after, strict=True):
        if then != now:
            raise RuntimeError(
                f"the module has written to params[{name!r}], but a function must not change its "
                "arguments: compute a new tensor in forward, or register a buffer"
            )


@contextlib.contextmanager
def _traceable_attention() -> Generator[None]:
    """Attention in operations that torch.func knows: an encoder's fast path in eval mode is not."""
    mha = torch.backends.mha
    changed = mha.get_fastpath_enabled()
    if changed:
        mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        if changed:
            mha.set_fastpath_enabled(True)


def decay_mask(module: nn.Module) -> dict[str, bool]:
    """Which parameters to decay: all except biases and the parameters of normalization layers.

    A bias is a parameter named like one (`bias`, `in_proj_bias`, `bias_ih_l0`); a normalization
    layer is a module whose class, or a base class, has "norm" in its name (`BatchNorm2d`,
    `LayerNorm`, `MyRMSNorm`).

    Args:
        module: any module.

    Returns:
        A bool for each of `functionalize(module).params`, under the same names (a tied tensor under
        its first one): a mask for `diffopt.transforms.masked`, labels for
        `diffopt.transforms.partition`, or the basis of a hyperparameter tree.

    Raises:
        TypeError: `module` is not a module.

    Examples:
        >>> import torch, diffopt
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
        >>> mask = diffopt.nn.decay_mask(model)
        >>> mask
        {'0.weight': True, '0.bias': False, '1.weight': False, '1.bias': False}
        >>> opt = diffopt.adamw()
        >>> decay = {name: 0.01 if decays else 0.0 for name, decays in mask.items()}
        >>> hp = opt.hparams(lr=0.1, weight_decay=decay)
        >>> params = dict(model.named_parameters())
        >>> params, state = opt.update(params, params, opt.init(params), hp)
    """
    _arguments.check_type(module, nn.Module, "module", "a torch.nn.Module")
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return {name: _decays(module, name) for name in trained}


def _decays(module: nn.Module, name: str) -> bool:
    prefix, _, own = name.rpartition(".")
    bases = type(module.get_submodule(prefix)).__mro__
    return "bias" not in own and not any("norm" in base.__name__.lower() for base in bases)
