"""Noticing which tensors a function captures, and whether they were modified afterwards."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree
from diffopt._tree import Tree


class Captured:
    """The constants that a function captures, which it reads again when it is recomputed.

    A run of the function finds them by the operations that read them: but for those that it writes
    to itself, and those that only a kernel compiled by torch.compile reads. Its arguments are not
    among them; autograd checks those.

    Args:
        name: the function's name in errors.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.versions: list[tuple[weakref.ref[Tensor], int]] = []  # keeps no tensor alive

    @contextlib.contextmanager
    def noticed(self, arguments: Tree) -> Generator[None]:
        """Within, the function is run once, with these arguments."""
        if _modes.compiling() or _modes.intercepted():
            yield
            return
        with _Reads(arguments) as reads:
            yield
        self.versions = [
            (reference, version)
            for reference, version in reads.versions
            if (x := reference()) is not None and _torch.version(x) == version
        ]

    def check(self) -> None:
        """Raise if one of them has been modified since.

        Raises:
            RuntimeError: as torch does for tensors that autograd has saved.
        """
        for reference, version in self.versions:
            x = reference()
            if x is not None and _torch.version(x) != version:
                raise RuntimeError(
                    f"{self.name} captures a tensor of shape {tuple(x.shape)} and {x.dtype} that "
                    f"has been modified in place since (its version is {_torch.version(x)}, but "
                    f"was {version}), so the derivative cannot be recomputed: modify it after the "
                    "backward pass, or let the function capture a clone"
                )


class _Reads(_torch.DispatchMode):
    """Records, with their versions, the tensors that are read, but were not made, within it."""

    def __init__(self, arguments: Tree) -> None:
        super().__init__()
        inner = (list(_modes.levels(x))[-1] for x in _tree.split(arguments)[0])
        self.known = {None, *map(_memory, inner)}
        self.versions: list[tuple[weakref.ref[Tensor], int]] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else torch.compile would never compile a function that runs here first

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in _tree.split((args, kwargs))[0]:
            memory = _memory(x)
            if memory not in self.known:
                self.known.add(memory)
                self.versions.append((weakref.ref(x), _torch.version(x)))
        results = func(*args, **(kwargs or {}))
        self.known.update(map(_memory, _tree.split(results)[0]))
        return results


def _memory(x: Tensor) -> int | None:
    """What tensors that share memory have in common; None where there is nothing to modify."""
    if x.is_inference():
        return None
    if not _modes.ordinary(x) or x.layout is not torch.strided:
        return id(x)
    try:
        return x.untyped_storage().data_ptr() or None
    except RuntimeError:  # the zeros of forward mode
        return None
