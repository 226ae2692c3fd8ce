"""A GPU on the CPU: tensors that say cuda:0, and a log of what a real one would be asked to do.

It counts launches of kernels, waits for the device and bytes, as torch's sources say. It runs no
backward pass and knows nothing of time.
"""

import contextlib
import weakref
from collections import Counter
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from diffopt import _modes

_NO_WORK = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "permute", "transpose", "t"),
    *(
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "unbind",
        "unsqueeze",
        "squeeze",
        "as_strided",
        "detach",
        "alias",
    ),
    *("view_as_real", "view_as_complex", "_conj", "resolve_conj", "lift_fresh", "is_pinned"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}
_TENSORS_A_LAUNCH = (770, 448, 336, 252, 210)  # for one to five lists
_BLOCKS_A_LAUNCH, _CHUNK = 2240, 65536


class Device:
    """What has been asked of it since `reset`."""

    def __init__(self):
        self.live, self.capturing, self._known = 0, False, set()
        self.reset()

    def reset(self):
        self.log, self.peak, self.start = Counter(), self.live, self.live

    def count(self, kind):
        return sum(n for (what, _), n in self.log.items() if what == kind)

    @property
    def bytes(self):
        """The most memory that was taken beyond what was there at first."""
        return self.peak - self.start

    def note(self, kind, name, n=1):
        self.log[kind, name] += n
        if kind == "wait" and self.capturing:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")

    def hold(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            tensor.kept = storage  # the object whose end is that of the memory
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key, size):
        self._known.discard(key)
        self.live -= size


DEVICE = Device()


class Cuda(Tensor):
    """A tensor of the device; `inner` has its values."""

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        return Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cuda:0",
            requires_grad=requires_grad,
        )

    def __init__(self, inner, requires_grad=False):
        self.inner = inner

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        own = {
            Tensor.data_ptr: lambda x: x.inner.data_ptr(),
            Tensor.__float__: lambda x: float(x.item()),
            Tensor.cpu: lambda x: x.to("cpu"),
            Tensor.copy_: torch.ops.aten.copy_.default,  # which asks for no machine
            Tensor.__repr__: lambda x, **_: f"Cuda({x.inner})",
        }
        if function in own:
            return own[function](*args, **(kwargs or {}))
        if any(t.__name__ == "TensorList" for t in types):
            return NotImplemented
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def cuda(tensor):
    """A tensor of the device."""
    DEVICE.hold(tensor)
    return Cuda(tensor)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function, args, kwargs):
    """Log an operation, and compute it on the CPU."""
    name, given = function.overloadpacket.__name__, pytree.tree_leaves((args, kwargs))
    tensors = [x for x in given if isinstance(x, Tensor)]
    there = [isinstance(x, Cuda) for x in tensors]
    asked = kwargs.get("device")
    here = not any(there) if asked is None else torch.device(asked).type != "cuda"
    if name == "copy_":
        here = not there[0]
    if here and not any(there):
        return function(*args, **kwargs)
    _log(name, function, args, kwargs, tensors, there, here)
    kwargs = {key: x for key, x in kwargs.items() if key != "pin_memory"}  # which needs a machine
    kwargs = kwargs | ({} if asked is None else {"device": "cpu"})
    plain = [pytree.tree_map(_inner, x) for x in (args, kwargs)]
    result = function(*plain[0], **plain[1])
    if name == "_local_scalar_dense" or here:
        return result
    for x in pytree.tree_leaves(result):
        if isinstance(x, Tensor):
            DEVICE.hold(x)
    if function._schema.is_mutable and isinstance(result, Tensor):
        return args[0]
    return pytree.tree_map(lambda x: Cuda(x) if isinstance(x, Tensor) else x, result)


def _inner(x):
    return x.inner if isinstance(x, Cuda) else x


def _log(name, function, args, kwargs, tensors, there, here):
    if name.startswith(("_foreach", "_fused")):
        lists = [x for x in args if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor)]
        fast, loops = _fast(name, lists, [x for x in args if isinstance(x, Tensor)]), len(lists[0])
        overload = f"{name}.{function._overloadname}"
        DEVICE.note("launch", overload, _launches(name, lists) if fast else loops)
    elif name in _WAITS:
        DEVICE.note("wait", name)
    elif (name == "_to_copy" and there[0] == here) or (name == "copy_" and there[0] != there[1]):
        asynchronous = kwargs.get("non_blocking") or args[2:] == (True,)
        DEVICE.note("copy" if asynchronous else "wait", f"{name} between devices")
    elif name not in _NO_WORK:
        if any(x.dim() for x, is_there in zip(tensors, there, strict=True) if not is_there):
            raise RuntimeError(f"{name}: tensors on cpu and cuda:0")
        DEVICE.note("launch", name)


def _fast(name, lists, scalars):
    """Whether foreach takes its fast route: one kernel for many tensors."""
    if name.startswith("_fused"):
        return True
    one_dtype = "copy" in name or len({x.dtype for column in lists for x in column}) == 1
    alike = all(
        x.shape == y.shape and x.stride() == y.stride()
        for column in lists
        for x, y in zip(lists[0], column, strict=True)
    )
    return one_dtype and alike and all(x.dtype == lists[0][0].dtype for x in scalars)


def _launches(name, lists):
    depth = min(5, len(lists) + (not name.endswith("_")))
    blocks = sum(-(-x.numel() // _CHUNK) for x in lists[0])
    tensors = sum(x.numel() > 0 for x in lists[0])
    return max(-(-tensors // _TENSORS_A_LAUNCH[depth - 1]), -(-blocks // _BLOCKS_A_LAUNCH))


@contextlib.contextmanager
def emulated(monkeypatch):
    """The device, within a test."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: DEVICE.capturing)
    stream = SimpleNamespace(is_capturing=lambda: DEVICE.capturing)  # what torch 2.15 asks
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda _=None: stream)
    depth = torch._C._len_torch_dispatch_stack()
    monkeypatch.setattr(
        _modes, "intercepted", lambda: torch._C._len_torch_dispatch_stack() > depth + 1
    )
    kinds = (Tensor, torch.nn.Parameter, Cuda)
    monkeypatch.setattr(_modes, "_ORDINARY", type(_modes._ORDINARY)(kinds))
    import torch.optim.optimizer as theirs
    import torch.utils._foreach_utils as theirs_too

    for module in (theirs, theirs_too):
        if hasattr(module, "_foreach_supported_types"):
            monkeypatch.setattr(module, "_foreach_supported_types", [*kinds])
    with _Mode():
        DEVICE.reset()
        yield DEVICE
