"""The only module that uses torch's private names; each line says what one is for.

torch changes these without notice. A name that disappears is replaced here, and nowhere else; a
test fails if another module uses private names directly. All exist in torch 2.11 to 2.15.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import _C as _core, Tensor  # pyright: ignore[reportPrivateUsage]
from torch._C._dynamo import (  # pyright: ignore[reportPrivateUsage]
    eval_frame as _eval_frame,
    guards as _guards,
)
from torch._functorch.autograd_function import enable_single_level_autograd_function as in_one_level
from torch._functorch.pyfunctorch import (
    coerce_cinterpreter,
    temporarily_clear_interpreter_stack as outside_transforms,
)
from torch.autograd import forward_ad
from torch.autograd.function import (
    _SingleLevelFunction as SingleLevelFunction,  # pyright: ignore[reportPrivateUsage]
)
from torch.nn.utils import parametrize
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,  # pyright: ignore[reportPrivateUsage]
    _global_optimizer_pre_hooks,  # pyright: ignore[reportPrivateUsage]
)
from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage]
from torch.utils._python_dispatch import (  # pyright: ignore[reportPrivateUsage]
    TorchDispatchMode as DispatchMode,
)

__all__ = [
    "DispatchMode",  # the base class of modes that see every operation
    "SingleLevelFunction",  # the base of autograd.Function, for one level of derivatives
    "in_one_level",  # a context in which that is applied while transforms are active
    "outside_transforms",  # run code as if no transform of torch.func were active
    "pytree",  # the registry of containers, and traversal of trees
]

_C: Any = _core
_torch: Any = torch
_functorch: Any = _C._functorch
_forward_ad: Any = forward_ad
_parametrize: Any = parametrize

# Trees.
node_type: Callable[[Any], Any] = getattr(pytree, "_get_node_type")  # noqa: B009
"""The key of a container in the registry."""

# Transforms of torch.func.
TransformType: Any = _functorch.TransformType
"""The kinds of transforms: vmap, grad, jvp, functionalize."""
interpreter_stack: Callable[[], list[Any] | None] = _functorch.get_interpreter_stack
"""The active transforms, outermost first; None if there are none."""
transforms_active: Callable[[], int] = _functorch.get_dynamic_layer_stack_depth
"""How many transforms are active."""
innermost_transform: Callable[[], Any] = _functorch.peek_interpreter_stack
"""The innermost active transform, or None: cheaper than the whole stack."""
is_wrapped: Callable[[Tensor], bool] = _functorch.is_functorch_wrapped_tensor
"""Whether a tensor is wrapped by a transform."""
is_batched: Callable[[Tensor], bool] = _functorch.is_batchedtensor
"""Whether the outermost wrapper of a tensor is that of vmap."""
unwrapped: Callable[[Tensor], Tensor] = _functorch.get_unwrapped
"""The tensor inside a wrapped tensor."""
batch_dim: Callable[[Tensor], int] = _functorch.maybe_get_bdim
"""The batch dimension of the tensor inside a batched tensor."""
level_of: Callable[[Tensor], int] = _functorch.maybe_get_level
"""The level of the transform that wrapped a tensor."""
add_batch_dim: Callable[[Tensor, int, int], Tensor] = _functorch._add_batch_dim
"""A batched tensor: `(tensor, dimension, level)`."""
unwrap_for_grad: Callable[[Tensor, int], Tensor] = _functorch._unwrap_for_grad
"""The tensor inside the wrapper of a level of grad."""
unwrap_if_dead: Callable[[Tensor], Tensor] = _functorch.unwrap_if_dead
"""The tensor without the wrapper of a transform that has ended."""


unwrap_batched: Callable[[Tensor, int], tuple[Tensor, int | None]] = _functorch._unwrap_batched
"""The tensor inside the wrapper of a level of vmap, and its batch dimension, if it has those."""
wrap_for_grad: Callable[[Tensor, int], Tensor] = _functorch._wrap_for_grad
"""The inverse of `unwrap_for_grad`."""


def end_transforms(active: int) -> None:
    """End the innermost transforms, until so many are active."""
    with contextlib.suppress(RuntimeError):  # of torch 2.11, once none is active
        _functorch.pop_dynamic_layer_stack_and_undo_to_depth(active)


def innermost_level() -> Any:
    """The innermost transform as `torch.autograd.Function` sees it; None if none is active."""
    return coerce_cinterpreter(innermost_transform()) if interpreter_stack() else None


def lifted(level: Any) -> Callable[[Tensor], Tensor]:
    """What wraps a tensor in a level of grad, unless it is."""
    return level._cptr.lift


def enters_vmap(function: Any) -> bool:
    """Whether a function in a graph of torch.compile begins torch.vmap: which one varies."""
    return getattr(function, "__name__", "") == "_vmap_increment_nesting"


# Forward mode.
forward_enabled: Callable[[bool], AbstractContextManager[Any]] = _forward_ad._set_fwd_grad_enabled
"""A context that enables or disables forward derivatives."""
set_forward_enabled: Callable[[bool], None] = _C._set_fwd_grad_enabled
"""A plain call that enables or disables forward derivatives from now on."""
set_grad_enabled: Callable[[bool], None] = _C._set_grad_enabled
"""What `torch.no_grad` and similar contexts call: a mode recognizes it."""


def forward_level() -> int:
    """The active level of `torch.autograd.forward_ad`, or -1."""
    return _forward_ad._current_level


# Dispatch.
dispatch_modes: Callable[[], int] = _C._len_torch_dispatch_stack
"""The number of modes, such as FakeTensorMode, that see every operation."""
_dispatch_key: Callable[[str], Any] = _C._parse_dispatch_key


def outside_gradient_batch() -> AbstractContextManager[Any]:
    """A context in which `is_grads_batched` leaves random numbers and torch.vmap alone."""
    return _C._ExcludeDispatchKeyGuard(_C.DispatchKeySet(_dispatch_key("VmapMode")))


below_autograd: Callable[[], AbstractContextManager[Any]] = _C._AutoDispatchBelowAutograd
"""A context in which operations skip autograd: a tenth of the time for many small tensors."""

# Autograd.
AccumulateGrad: Any = _C._functions.AccumulateGrad
"""The type of the nodes of autograd's graph that represent leaves."""
version: Callable[[Tensor], int] = operator.attrgetter("_version")
"""The number of writes to a tensor or to views of its memory."""
base: Callable[[Tensor], Tensor | None] = operator.attrgetter("_base")
"""The tensor that a tensor is a view of; None if it is no view."""


def function_class(node: Any) -> type | None:
    """The torch.autograd.Function of a node in autograd's graph; None if it has none."""
    return getattr(node, "_forward_cls", None)


saved_tensors_hooks_are_enabled: Callable[[], bool] = _C._autograd._saved_tensors_hooks_is_enabled
"""Whether autograd takes hooks on the tensors that it saves."""
enable_saved_tensors_hooks: Callable[[], None] = _C._autograd._saved_tensors_hooks_enable
"""Undo what a transform that has failed may leave."""
keeps_graph: Callable[[], bool] = _C._autograd._get_current_graph_task_keep_graph
"""Whether the graph remains after the backward pass that is running."""
next_node: Callable[[], int] = _C._autograd._get_sequence_nr
"""The number that the next node of autograd's graph in this thread gets."""


def gradient(
    value: Tensor, inputs: Sequence[Tensor], cotangent: Tensor, *, create_graph: bool, retain: bool
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` of a plain tensor, without the time that its checks take."""
    given, xs = (cotangent,), tuple(inputs)
    return _engine((value,), given, retain, create_graph, xs, True, accumulate_grad=False)


_engine: Callable[..., Any] = torch.autograd.graph._engine_run_backward  # pyright: ignore[reportPrivateUsage]
"""What `torch.autograd.grad` calls after its checks."""
weight_norm: Callable[..., Tensor] = _torch._weight_norm
"""What `torch.nn.utils.weight_norm` and its parametrization call."""


running_node: Callable[[], Any] = _C._current_autograd_node
"""The node whose backward pass is running in this thread, or None."""
node_number: Callable[[Any], int] = operator.methodcaller("_sequence_nr")
"""The number of a node of autograd's graph: later ones of a thread have higher ones."""


def gradient_batch() -> int:
    """The level at which `torch.autograd.grad` batches its gradients (`is_grads_batched`), or 0."""
    level = _C._vmapmode_increment_nesting() - 1
    _C._vmapmode_decrement_nesting()
    return level


def in_gradient_batch(tensor: Tensor) -> bool:
    """Whether a tensor is batched by `is_grads_batched`, in a way of its own."""
    return _C._dispatch_keys(tensor).has(_dispatch_key("Batched"))


all_gradients: Callable[[Tensor, int, int, int], Tensor] = _torch._remove_batch_dim
"""All samples of such a tensor: `(tensor, level, batch size, dimension)`."""
gradients_batched: Callable[[Tensor, int, int], Tensor] = _torch._add_batch_dim
"""The inverse: `(tensor, dimension, level)`."""


def is_node_type(kind: type, name: str) -> bool:
    """Whether all nodes of autograd's graph of this type are those of torch's own of this name."""
    return kind.__module__ == "builtins" and kind.__name__ == name


def weight_norm_inputs(node: Any) -> tuple[Tensor, Tensor, int]:
    """What the node of a weight normalization has saved: direction, norms and dimension."""
    return node._saved_v, node._saved_g, node._saved_dim


def trace_as(original: Any, function: Callable[..., Any]) -> bool:
    """From now on torch.compile traces `function` in place of an operation of torch.

    `torch.compiler.substitute_in_graph` refuses operations that a graph can have.
    """
    from torch._dynamo.variables import UserFunctionVariable
    from torch._dynamo.variables.builder import VariableBuilder

    builder: Any = VariableBuilder
    builder._id_dispatch()[id(original)] = lambda _, __: UserFunctionVariable(function)
    return True


# So torch.compile calls it when it traces its caller. The decorator would import torch._dynamo.
setattr(trace_as, "_dynamo_marked_constant", True)  # noqa: B010


# Random numbers.
def mps_generator() -> torch.Generator:
    """The default random number generator of MPS."""
    return _torch.mps._get_default_mps_generator()


# torch.compile.
def compiler(backend: Any, mode: str | None, options: Any, dynamic: bool | None) -> Any:
    """The backend that `torch.compile` calls for these arguments: `(graph, inputs) -> callable`."""
    if backend == "inductor":
        return _torch._TorchCompileInductorWrapper(mode, options, dynamic)
    return _torch._TorchCompileWrapper(backend, mode, options, dynamic)


class Halves(NamedTuple):
    """What torch.compile has made of a graph whose inputs require gradients.

    Attributes:
        forward: `[inputs] -> outputs and what backward needs`
        backward: `[that, cotangents] -> gradients of the inputs`
        outputs: the number of outputs.
        tangents: the outputs whose cotangents it takes.
    """

    forward: Callable[[list[Tensor]], list[Any]]
    backward: Callable[[list[Tensor]], list[Tensor | None]]
    outputs: int
    tangents: list[int]

    def run(self, inputs: Sequence[Tensor]) -> tuple[list[Any], list[Any]]:
        """The outputs, and what the second half needs."""
        found = self.forward([*inputs])
        return found[: self.outputs], found[self.outputs :]


def halves(outputs: Sequence[Any]) -> Halves | None:
    """The halves of the compiled graph with these outputs, if it has them and nothing else."""
    function: Any = next((function_class(y.grad_fn) for y in outputs if y.requires_grad), None)
    meta: Any = getattr(function, "metadata", None)
    if meta is None or not getattr(function, "compiled_bw", None) or _C._is_any_autocast_enabled():
        return None
    forward, backward = function.compiled_fw, function.compiled_bw
    boxed = hasattr(forward, "_boxed_call") and hasattr(backward, "_boxed_call")
    others = (
        function.num_symints_saved_for_bw,
        function.maybe_subclass_metadata,
        meta.num_mutated_inp_runtime_indices,
        meta.num_outputs_aliased,
        meta.num_intermediate_bases,
        meta.is_rng_op_functionalized,
        meta.tokens,
        meta.bw_donated_idxs,
    )
    if not boxed or any(others) or len(meta.output_info) != len(outputs):
        return None
    tangents = [i for i, info in enumerate(meta.output_info) if info.requires_grad]
    return Halves(forward, backward, len(outputs), tangents)


def partitioned() -> AbstractContextManager[None]:
    """How torch.compile divides a graph and its derivative in this context.

    It can be differentiated with `retain_graph=True`. The backward pass computes masks again, such
    as those of relu: inductor takes tens of times longer to store a mask on a CPU.
    """
    from torch._functorch import config

    changed: Any = config
    return changed.patch(donated_buffer=False, ban_recompute_used_far_apart=False)


def graph_pass(function: Callable[[Any], None], name: str) -> Any:
    """What inductor calls with each graph; kept results are for the same name only."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Pass(CustomGraphPass):
        def __call__(self, graph: Any) -> None:
            function(graph)

        def uuid(self) -> str:
            return name

    return Pass()


def traced_side_effects() -> bool:
    """Whether what `torch.compile` is tracing writes to what exists; False if it is not tracing."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        output: Any = InstructionTranslator.current_tx().output
    except AttributeError:
        return False
    effects, tracer = output.side_effects, output.root_tracer
    existing = ("ValueMutationExisting", "AttributeMutationExisting")
    changed = (
        x
        for x in effects.id_to_variable.values()
        if type(x.mutation_type).__name__ in existing and effects.is_modified(x) and _changed(x)
    )
    # Also of what is not read. A trace may begin with a write to what shares memory with another.
    inputs = (proxy.node.meta.get("example_value") for proxy in tracer.input_name_to_proxy.values())
    versions = [version(x) for x in inputs if isinstance(x, Tensor)]
    written = versions != tracer._input_versions_at_beginning
    return bool(
        effects.tensor_hooks or effects.save_for_backward or written or any(True for _ in changed)
    )


def _changed(traced: Any) -> bool:
    """Whether it is not a dict whose items have been put back, as `torch.func` does in modules."""
    old = getattr(traced, "original_items", None)
    if old is None or len(old) != len(traced.items):
        return True
    return any(traced.is_new_item(old.get(key.vt), x) for key, x in traced.items.items())


# torch.optim.
disable_dynamo: Callable[..., Any] = _torch._disable_dynamo
"""A decorator that disables torch.compile in a function, without importing it beforehand."""
frame_compiler: Callable[[], Any] = _eval_frame.get_eval_frame_callback
"""What torch.compile does with the functions that are called now, or None: nothing to disable."""
_profiled: Callable[[], bool] = _torch.autograd._profiler_enabled


def watched(optimizer: Any) -> bool:
    """Whether a profiler, a hook of this optimizer or one of all optimizers sees its steps."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or (not torch.compiler.is_compiling() and _profiled())
    )


def hooks(optimizer: Any, when: str) -> list[Callable[..., Any]]:
    """An optimizer's own hooks, such as those of `when="state_dict_pre"`."""
    return list(getattr(optimizer, f"_optimizer_{when}_hooks").values())


def refuse_capture(optimizer: Any) -> None:
    """Raise if a CUDA graph captures an optimizer without `capturable=True`."""
    optimizer._accelerator_graph_capture_health_check()


class TensorGuards:
    """Checks whether tensors still have the same types, dtypes, devices, shapes and strides.

    A single C++ call checks thousands of tensors; it keeps none of them alive.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        free = dict.fromkeys(("dynamic_dims_sizes", "dynamic_dims_strides"))
        self._check, self._size = _guards.TensorGuards(*tensors, **free).check, len(tensors)

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == self._size and self._check(*tensors)


# Modules.
MODULE_TABLES = ("_parameters", "_buffers", "_modules")
"""The attributes in which a module keeps its parameters, its buffers and its submodules."""


def parametrized_anew() -> AbstractContextManager[None]:
    """A context in which the cache of `torch.nn.utils.parametrize.cached` starts empty."""
    return _empty_cache() if _parametrize._cache_enabled else contextlib.nullcontext()


@contextlib.contextmanager
def _empty_cache() -> Generator[None]:
    kept, _parametrize._cache = _parametrize._cache, {}
    try:
        yield
    finally:
        _parametrize._cache = kept


def forget_parametrized() -> None:
    """Empty that cache, after parameters have been replaced."""
    _parametrize._cache = {}


def uncompiled(module: Any) -> Any:
    """The module itself, of one that `torch.compile` returned."""
    parts = vars(module).get("_modules")
    return parts.get("_orig_mod", module) if isinstance(parts, dict) else module


def run_uncompiled(module: Any) -> None:
    """Undo `module.compile()`."""
    vars(module).pop("_compiled_call_impl", None)


# Kernels for lists of tensors, which torch.optim itself uses.


def _kernel(name: str) -> Callable[..., Any]:
    """`torch.name`, looked up at every call, so that it can be replaced there."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return getattr(torch, name)(*args, **kwargs)

    return kernel


fused_sgd_ = _kernel("_fused_sgd_")
fused_adam_ = _kernel("_fused_adam_")
fused_adamw_ = _kernel("_fused_adamw_")
fused_adagrad_ = _kernel("_fused_adagrad_")
foreach = {
    name: (_kernel(f"_foreach_{name}"), _kernel(f"_foreach_{name}_"))
    for name in (
        *("neg", "abs", "sqrt", "rsqrt", "reciprocal", "sign", "exp"),
        *("add", "sub", "mul", "div", "pow", "maximum", "minimum", "clamp_min", "clamp_max"),
        *("lerp", "addcmul", "addcdiv"),
    )
}
"""Operations on lists of tensors: out of place, and in place on the first list."""
foreach_norm = _kernel("_foreach_norm")
foreach_copy_ = _kernel("_foreach_copy_")
