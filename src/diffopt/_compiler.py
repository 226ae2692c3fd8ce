"""What all code that calls torch.compile shares: its functions, options, reports and errors."""

from __future__ import annotations

import contextlib
import logging
import sys
import textwrap
import time
import types
import warnings
from collections.abc import Generator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree

_LOG = logging.getLogger("diffopt")
_OPTIONS = ("backend", "mode", "options", "dynamic")
_WARNED: set[str] = set()


def with_own_code(function: Any, name: str) -> Any:
    """A copy for torch.compile, which keeps few results for each code object."""
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, closure=function.__closure__)


@contextlib.contextmanager
def announced(what: str) -> Generator[None]:
    """Log that something is compiled, and how long it took; with a line where a terminal is.

    Warnings are ignored: they are about torch's own code.
    """
    _LOG.info("compiling %s", what)
    start = time.perf_counter()
    _show(f"diffopt: compiling {what} ...")
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        seconds = time.perf_counter() - start
        _show(f" {seconds:.1f} s\n")
    _LOG.info("compiled in %.1f s", seconds)


def _show(text: str) -> None:
    """Write to a terminal, if there is one."""
    if sys.stderr is not None and sys.stderr.isatty():  # pyright: ignore[reportUnnecessaryComparison] (of pythonw)
        sys.stderr.write(text)
        sys.stderr.flush()


def warn_once(message: str) -> None:
    """Warn, at the line of the user's program, unless the same has been said before."""
    if message not in _WARNED:
        _WARNED.add(message)
        warnings.warn(message, stacklevel=_modes.users_frame()[1])


def brief(error: BaseException) -> str:
    """An error on one line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


def check_compile(value: Any) -> None:
    """Raise unless it is a bool or a mapping of options of torch.compile."""
    if isinstance(value, bool):
        return
    if not isinstance(value, Mapping):
        raise TypeError(
            f"compile is {_tree.describe(value)}, not a bool or a mapping of options of "
            "torch.compile, such as {'mode': 'reduce-overhead'}"
        )
    for name in cast(Mapping[Any, Any], value):
        if name not in _OPTIONS:
            raise ValueError(
                f"compile has the option {name!r}, but takes only {', '.join(_OPTIONS)}: what is "
                "compiled is always one graph (fullgraph=True)"
            )


def backend_of(options: Mapping[str, Any]) -> Any:
    """The backend that these options of torch.compile describe, `(graph, inputs) -> callable`."""
    given = dict(options.get("options") or {})
    backend = options.get("backend", "inductor")
    if backend == "inductor":
        # Otherwise inductor (torch 2.13) computes wrong gradients of a step with a convolution,
        # relu and max_pool2d whose inputs require a gradient.
        given.setdefault("layout_optimization", False)
        # These take a tenth of the time of a step on small tensors; inputs are checked before.
        given.setdefault("size_asserts", False)
        if torch.backends.cpu.get_cpu_capability() == "AVX512":
            # Torch uses these instructions. Otherwise inductor tests them in each process, and from
            # an empty cache a quarter of the time to compile a small step is for three such tests.
            given.setdefault("cpp.vec_isa_ok", True)
        scalars = _torch.graph_pass(_compute_scalars_once, "diffopt: scalars once, 2")
        given.setdefault("post_grad_custom_post_pass", scalars)
    return _torch.compiler(backend, options.get("mode"), given, options.get("dynamic"))


def _compute_scalars_once(graph: Any) -> None:
    """Have inductor keep what few elements of a large result each depend on.

    On a CPU it would compute them again for every 16 elements of the result, and powers of a number
    in a bias correction took half the time of a small step.
    """
    for source in dict.fromkeys(filter(None, map(_few, graph.nodes))):
        value = source.meta["val"]
        with graph.inserting_after(source):
            kept = graph.call_function(_AS_STRIDED, (source, [*value.shape], [*value.stride()]))
        kept.meta.update(source.meta)
        source.replace_all_uses_with(kept, lambda user, kept=kept: user is not kept)


def _few(node: Any) -> Any:
    """The node that computes what this one is a view of, if some result is much larger; or None."""
    value = node.meta.get("val")
    sizes = [_size(user.meta.get("val")) for user in node.users]
    if not _size(value) or max(sizes, default=0) < 16 * _size(value):
        return None
    while not _pointwise(node) and node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    source = node.meta.get("val")
    same = _size(source) == _size(value)
    return node if same and _pointwise(node) and source.is_contiguous() else None


def _pointwise(node: Any) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _size(x: Any) -> int:
    """The number of elements of a floating-point tensor on a CPU, if it is known; else 0."""
    if not isinstance(x, Tensor) or x.device.type != "cpu" or not x.is_floating_point():
        return 0
    size: Any = x.numel()
    return size if type(size) is int else 0


_AS_STRIDED = torch.ops.aten.as_strided.default
"""For inductor, its argument is in memory."""
