"""Running an elementwise rule as one kernel that torch.compile makes of its text.

A kernel takes vectors of any length: big tensors as they are, small ones concatenated. There is one
for each rule, dtypes and device, never for shapes or a number of tensors: numbers that change from
step to step are its inputs, as 0-d tensors.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffopt import _memory, _modes, _tree
from diffopt._compiler import announced, brief, warn_once, with_own_code
from diffopt._rule import hyper, ops, tiles
from diffopt._rule.running import (
    AnyRule,
    Numbers,
    Shared,
    apply,
    in_place_of_lists,
    leaf_,
    pick,
    written,
)

Kernel: TypeAlias = Callable[[list[Tensor], list[Tensor], list[Tensor]], list[Tensor] | None]
"""`(numbers, fields, vectors) -> new fields, if any`: updates a vector of each column in place."""

_SAMPLE = 1 << 16  # elements that a kernel is tried on: it is compiled to share out that many
_KERNELS: dict[Any, Kernel | None] = {}
_LOCK = threading.Lock()


def compiled_(
    rule: AnyRule, numbers: Numbers, columns: Sequence[Any], layout: tiles.Layout | None = None
) -> tiles.Layout | None:
    """In place, by a compiled kernel; None, with nothing changed, where there is none.

    Returns the layout of the vectors, for the next step.
    """
    lists = [column for column in columns if isinstance(column, list)]
    vectors, rest = _vectors(lists)
    if layout is None or len(layout.lengths) != len(vectors[0]):  # unscaled gradients have vectors
        layout = tiles.Layout(vectors)
    if vectors[0]:
        call = _Call(rule, numbers, columns)
        if call.kernel([column[0] for column in vectors]) is None:
            return None
        tiles.in_pieces_(vectors, sys.maxsize, call.update_, layout)
    leaf_(rule, numbers, [pick(column, rest) for column in columns])
    return layout


def _vectors(lists: list[list[Tensor]]) -> tuple[list[list[Tensor]], list[int]]:
    """Real, contiguous views in the order of memory; the indices of tensors that have none."""
    every = [*itertools.chain(*lists)]
    odd = any(map(Tensor.is_complex, every)) or any(map(Tensor.is_neg, every))
    if not odd and all(map(Tensor.is_contiguous, every)) and all(map(Tensor.numel, lists[0])):
        return lists, []
    rows = [_row(row) for row in zip(*lists, strict=True)]
    found = [row for row in rows if row]
    vectors = [[row[k] for row in found] for k in range(len(lists))]
    return vectors, [i for i, row in enumerate(rows) if not row]


def _row(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The vectors of one parameter, or none."""
    param, grad, *buffers = tensors
    tensors = [param, grad.resolve_conj().resolve_neg(), *buffers]
    order = _memory.order(param)
    views = [x.permute(order) for x in tensors]
    if not param.numel() or not all(x.is_contiguous() for x in views):
        return []
    if any(x.is_conj() or x.is_neg() for x in tensors):
        return []
    return [_modes.real(x).view(-1) for x in views]


class _Call:
    """One update: what a kernel is given beside the vectors."""

    def __init__(self, rule: AnyRule, numbers: Numbers, columns: Sequence[Any]) -> None:
        self.rule, self.numbers, self.columns = rule, numbers, columns
        self.shared = [column for column in columns if isinstance(column, Shared)]
        self.form, self.given = _inputs(rule, numbers)
        self.kernels: dict[Any, Kernel | None] = {}  # by the dtypes of the vectors

    def kernel(self, piece: Sequence[Tensor]) -> Kernel | None:
        dtypes = tuple(x.dtype for x in piece)
        if dtypes not in self.kernels:
            self.kernels[dtypes] = self._found([x.view(-1) for x in piece])
        return self.kernels[dtypes]

    def _found(self, piece: Sequence[Tensor]) -> Kernel | None:
        """The kernel for vectors like these, made if need be."""
        tensors = [*piece, *(shared.value for shared in self.shared), *self.given]
        key = (
            self.rule,
            self.form,
            tuple(map(_mark, self.columns)),
            tuple((x.dtype, x.device) for x in tensors),
            # What torch.compile watches as well: it would compile the same kernel once more.
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(piece[0].device.type),
        )
        if key in _KERNELS:
            return _KERNELS[key]
        if piece[0].is_cuda and _modes.capturing():
            return None  # it takes a step before the capture
        with _LOCK:
            if key not in _KERNELS:
                _KERNELS[key] = self._tried(piece)
        return _KERNELS[key]

    def update_(self, piece: Sequence[Tensor]) -> None:
        """Update one vector of each column in place."""
        kernel = self.kernel(piece) if piece[0].numel() > 1 else None  # 1 would be a constant
        if kernel is None:
            self._eager_(piece)
            return
        fields = kernel(self.given, [x.value for x in self.shared], [x.detach() for x in piece])
        for shared, value in zip(self.shared, fields or (), strict=True):
            shared.new = value

    def _eager_(self, piece: Sequence[Tensor]) -> None:
        leaf_(self.rule, self.numbers, in_place_of_lists([[x] for x in piece], self.columns))

    def _tried(self, piece: Sequence[Tensor]) -> Kernel | None:
        """A new kernel, if its first result, on a sample, is that of the rule.

        torch.compile has been seen to silently compute wrong values.
        """
        kernel = _compiled(self.rule, self.form, [_mark(column) for column in self.columns])
        old, found, right = ([*map(_sample, piece)] for _ in range(3))
        # Copies, since for a view torch.compile would watch its base as well.
        given, fields = [x.clone() for x in self.given], [s.value.clone() for s in self.shared]
        try:
            with announced(f"a kernel of {self.rule!r}"):
                fields = kernel(given, fields, found)
        except Exception as error:
            _warn(f"torch.compile makes no kernel here ({brief(error)})")
            return None
        self._eager_(right)
        pairs = [
            *zip(written(old), written(found), written(right), strict=True),
            *((s.value, x, s.new) for s, x in zip(self.shared, fields or (), strict=True)),
        ]
        if not all(itertools.starmap(_agree, pairs)):
            _warn(f"torch.compile computes wrong values for this rule, {self.rule!r}")
            return None
        return kernel


class _Form(NamedTuple):
    """The numbers of a step without their values.

    Attributes:
        spec: their structure.
        kinds: float or bool for what is an input of the kernel, else None.
        constants: the others.
    """

    spec: _tree.Spec
    kinds: tuple[type | None, ...]
    constants: tuple[Any, ...]

    def numbers(self, given: list[Tensor]) -> Numbers:
        """The numbers that the rule sees in a kernel."""
        rest, constants = iter(given), iter(self.constants)
        leaves: list[Any] = []
        for kind in self.kinds:
            value = next(constants) if kind is None else next(rest)
            leaves.append(value != 0 if kind is bool else value)
        return Numbers(*_tree.unflatten(leaves, self.spec))


def _inputs(rule: AnyRule, numbers: Numbers) -> tuple[_Form, list[Tensor]]:
    """What a kernel depends on, and what it is given, of the numbers of a step.

    A decay of 0 is a constant: no decay is not a decay by 0 where a parameter is infinite. Initial
    values are added at every step, as 0 after the first, or the first would need its own kernel.
    """
    initial = {name: numbers.initial.get(name, 0.0) for name in rule.initial(numbers.hparams)}
    leaves, spec = _tree.flatten(tuple(numbers._replace(initial=initial)))
    names = [None, *(field.name for field in hyper.FIELDS[type(numbers.hparams)])]
    given: list[Any] = []
    kinds: list[type | None] = []
    constants: list[Any] = []
    for name, leaf in itertools.zip_longest(names, leaves):
        decay = name == "weight_decay" and ops.is_zero(leaf)
        fits = isinstance(leaf, (Tensor, float, int)) and not decay
        kinds.append((bool if isinstance(leaf, bool) else float) if fits else None)
        (given if fits else constants).append(leaf)
    floats = torch.tensor([x for x in given if not isinstance(x, Tensor)], dtype=torch.float64)
    rest = iter(floats.unbind())
    tensors: list[Tensor] = []
    for x in given:
        x = x if isinstance(x, Tensor) else next(rest)
        # One tensor in two places would need its own kernel.
        tensors.append(x.clone() if any(x is other for other in tensors) else x)
    return _Form(spec, tuple(kinds), tuple(constants)), tensors


def _mark(column: Any) -> str:
    if isinstance(column, Shared):
        return "shared"
    return "list" if isinstance(column, list) else ""


def _compiled(rule: AnyRule, form: _Form, marks: list[str]) -> Kernel:
    def kernel(given: list[Tensor], fields: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
        rest, shared = iter(vectors), map(Shared, fields)
        row: list[Any] = [
            next(rest) if mark == "list" else next(shared) if mark else () for mark in marks
        ]
        new = apply(rule, form.numbers(given), row)
        for old, x in zip(written(row), new, strict=True):
            if isinstance(old, Tensor) and x is not old:
                old.copy_(x)
        return [x.new for x in row if isinstance(x, Shared)]

    named = with_own_code(kernel, f"{type(rule).__name__}_kernel")
    return torch.compile(named, fullgraph=True, dynamic=True)


def _sample(vector: Tensor) -> Tensor:
    """A copy of the first elements, repeated where there are too few."""
    times = -(-_SAMPLE // vector.numel())
    return vector[:_SAMPLE].repeat(times)[:_SAMPLE].clone()


def _agree(old: Tensor, found: Tensor, right: Tensor) -> bool:
    """Whether both values are those of one step, up to rounding, of which a small step is more."""
    eps = torch.finfo(old.dtype).eps
    old, found, right = (x.to(torch.float64) for x in (old, found, right))
    rounding = eps * right.abs() + min(8 * eps, 1e-6) * (old.abs() + right.abs())
    close = (found - right).abs() <= rounding + 1e-3 * (right - old).abs()
    return bool((close | (found == right) | (found.isnan() & right.isnan())).all())


def _warn(reason: str) -> None:
    warn_once(f"{reason}, so the step runs without one")
