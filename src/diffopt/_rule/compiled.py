"""Running an elementwise rule as one kernel that torch.compile makes of its operations.

A kernel takes vectors of any length: big tensors as they are, small ones concatenated. There is one
for each rule, dtypes and device, never for shapes or a number of tensors. What a rule computes from
numbers alone is computed once per step: its results are inputs of the kernel, as 0-d tensors.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffopt import _memory, _modes, _torch, _tree
from diffopt._compiler import announced, brief, warn_once, with_own_code
from diffopt._rule import hyper, ops, recording, tiles
from diffopt._rule.rule import is_ours
from diffopt._rule.running import (
    AnyRule,
    Numbers,
    Shared,
    enter,
    in_place_of_lists,
    leaf_,
    pick,
    widest,
    written,
)
from diffopt._rule.symbols import Sheet, Symbol, Unknown

Kernel: TypeAlias = Callable[[list[Tensor], Sequence[Tensor]], None]
"""`(numbers, vectors)`: updates a vector of each column in place."""

_MOST = 1 << 30  # elements at once: torch.compile may count them in 32 bits
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
    vectors, rest = _vectors(lists, layout)
    if layout is None or len(layout.lengths) != len(vectors[0]):  # unscaled gradients have vectors
        layout = tiles.Layout(vectors, plain=vectors is lists)
    if vectors[0]:
        call = _Call(rule, numbers, columns)
        if call.kernel([column[0] for column in vectors])[0] is None:
            return None
        tiles.in_pieces_(vectors, _MOST, call.update_, layout)
    leaf_(rule, numbers, [pick(column, rest) for column in columns])
    return layout


def _vectors(
    lists: list[list[Tensor]], layout: tiles.Layout | None
) -> tuple[list[list[Tensor]], list[int]]:
    """Real, contiguous views in the order of memory; the indices of tensors that have none.

    With the layout of the step before, only gradients are looked at, if those have been plain.
    """
    plain = layout is not None and layout.plain
    every = lists[1] if plain else [*itertools.chain(*lists)]
    if not plain:
        plain = not any(map(Tensor.is_complex, every)) and all(map(Tensor.numel, lists[0]))
    if plain and all(map(Tensor.is_contiguous, every)) and not any(map(Tensor.is_neg, every)):
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
        self.kernels: dict[Any, tuple[Kernel | None, list[Tensor]]] = {}  # by dtypes of the vectors

    def kernel(self, piece: Sequence[Tensor]) -> tuple[Kernel | None, list[Tensor]]:
        """The kernel for vectors like these, if there is one, and its numbers."""
        dtypes = tuple(x.dtype for x in piece)
        if dtypes not in self.kernels:
            self.kernels[dtypes] = self._made([x.view(-1) for x in piece], widest(piece))
        return self.kernels[dtypes]

    def _made(
        self, piece: Sequence[Tensor], dtype: torch.dtype
    ) -> tuple[Kernel | None, list[Tensor]]:
        """What `kernel` returns; also sets what the tensors share."""
        shared = [column for column in self.columns if isinstance(column, Shared)]
        form, given = _inputs(self.rule, self.numbers)
        record = _recording if is_ours(self.rule) else _recording.__wrapped__
        recorded = record(self.rule, form, tuple(map(_mark, self.columns)), dtype)
        if recorded is None:
            return None, []
        cells = recorded.sheet.cells([*given, *(x.value for x in shared)])
        assert cells is not None  # nothing is known about unknown numbers
        for column, k in zip(shared, recorded.shared, strict=True):
            column.new = cells[k]
        tensors = _tensors([cells[k] for k in recorded.given], dtype)
        return self._found(recorded.program, piece, tensors), tensors

    def _found(
        self, program: _Program, piece: Sequence[Tensor], given: list[Tensor]
    ) -> Kernel | None:
        """The kernel of a program, made if need be."""
        if any(x.dim() for x in given):
            return None
        key = (
            self.rule,
            program,
            tuple((x.dtype, x.device) for x in (*piece, *given)),
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
                _KERNELS[key] = self._tried(program, piece, given)
        return _KERNELS[key]

    def update_(self, piece: Sequence[Tensor]) -> None:
        """Update one vector of each column in place."""
        kernel, given = self.kernel(piece)
        if kernel is None or piece[0].numel() == 1:  # 1 would be a constant
            self._eager_(piece)
        else:
            kernel(given, [x.detach() for x in piece])

    def _eager_(self, piece: Sequence[Tensor]) -> None:
        leaf_(self.rule, self.numbers, in_place_of_lists([[x] for x in piece], self.columns))

    def _tried(
        self, program: _Program, piece: Sequence[Tensor], given: list[Tensor]
    ) -> Kernel | None:
        """A new kernel, if its first result, on a sample, is that of the rule.

        torch.compile has been seen to silently compute wrong values.
        """
        kernel = _compiled(program, widest(piece), f"{type(self.rule).__name__}_kernel")
        old, found, right = ([*map(_sample, piece)] for _ in range(3))
        try:
            with announced(f"a kernel of {self.rule!r}"):
                # Copies, since for a view torch.compile would watch its base as well.
                kernel([x.clone() for x in given], found)
        except Exception as error:
            _warn(f"torch.compile makes no kernel here ({brief(error)})")
            return None
        self._eager_(right)
        if not all(map(_agree, *map(written, (old, found, right)))):
            _warn(f"torch.compile computes wrong values for this rule, {self.rule!r}")
            return None
        return kernel


class _Place(NamedTuple):
    """Stands for a number that is given at every step."""

    at: int


class _Form(NamedTuple):
    """The numbers of a step without their values.

    Attributes:
        spec: their structure.
        leaves: a place for each number that is given, and the others.
    """

    spec: _tree.Spec
    leaves: tuple[Any, ...]

    def numbers(self, given: Sequence[Any]) -> Numbers:
        """The numbers that the rule sees where these are given."""
        return Numbers(*_tree.unflatten([_filled(x, given) for x in self.leaves], self.spec))


def _filled(value: Any, given: Sequence[Any]) -> Any:
    return given[value.at] if isinstance(value, _Place) else value


def _inputs(rule: AnyRule, numbers: Numbers) -> tuple[_Form, list[Any]]:
    """What a kernel depends on, and what it is given, of the numbers of a step.

    A decay of 0 is a constant: no decay is not a decay by 0 where a parameter is infinite. Initial
    values are added at every step, as 0 after the first, or the first would need its own kernel.
    """
    initial = {name: numbers.initial.get(name, 0.0) for name in rule.initial(numbers.hparams)}
    leaves, spec = _tree.flatten(tuple(numbers._replace(initial=initial)))
    names = [None, *(field.name for field in hyper.FIELDS[type(numbers.hparams)])]
    given: list[Any] = []
    for k, (name, leaf) in enumerate(itertools.zip_longest(names, leaves[:])):
        decay = name == "weight_decay" and ops.is_zero(leaf)
        if isinstance(leaf, (Tensor, float, int)) and not decay:
            leaves[k] = _Place(len(given))
            given.append(leaf)
    return _Form(spec, (*leaves,)), given


class _Program(NamedTuple):
    """What a kernel computes.

    Attributes:
        operations: in order.
        outputs: for each vector which value is its new one, or None.
        constants: of the operations, a place for each that is given.
    """

    operations: tuple[recording.Operation, ...]
    outputs: tuple[int | None, ...]
    constants: tuple[Any, ...]


class _Recording(NamedTuple):
    """A program, and which cells of a sheet it is given, and which are new values of fields."""

    program: _Program
    sheet: Sheet
    given: list[int]
    shared: list[int]


@functools.lru_cache(maxsize=256)
def _recording(
    rule: AnyRule, form: _Form, marks: tuple[str, ...], dtype: torch.dtype
) -> _Recording | None:
    """The rule recorded for numbers of this form, whatever their values; None if impossible."""
    inputs = sum(isinstance(x, _Place) for x in form.leaves)
    sheet = Sheet([None] * (inputs + marks.count("shared")), Unknown)
    fields: Iterator[Any] = iter(sheet.inputs[inputs:])
    row = [Shared(next(fields)) if mark == "shared" else () for mark in marks]
    lists = [k for k, mark in enumerate(marks) if mark == "list"]
    tape = recording.Tape(len(lists), dtype, known=lambda name: getattr(torch, name, None))
    try:
        outputs = tiles.recorded(rule, form.numbers(sheet.inputs), row, lists, tape)
        new = recording.indices([outputs[k] for k in lists])
    except recording.Unrecordable as error:
        _warn(f"no kernel is made of this rule, {rule!r} ({brief(error)})")
        return None
    shared = [sheet.cell(x) for x, mark in zip(outputs, marks, strict=True) if mark == "shared"]
    cells: dict[int, _Place] = {}
    constants = (
        cells.setdefault(sheet.cell(x), _Place(len(cells)))
        if isinstance(x, (Symbol, Tensor))
        else x
        for x in tape.constants
    )
    program = _Program((*tape.operations,), new, (*constants,))
    return _Recording(program, sheet, [*cells], shared)


def _tensors(values: list[Any], dtype: torch.dtype) -> list[Tensor]:
    """The values as 0-d tensors of this dtype, but for those that are true or false."""
    numbers = [x for x in values if type(x) in (float, int)]
    floats = iter(torch.tensor(numbers, dtype=dtype, device="cpu").unbind())
    tensors: list[Tensor] = []
    for x in values:
        x = next(floats) if type(x) in (float, int) else _modes.tensor_of(x)
        x = x if x.dtype == torch.bool else x.to(dtype)
        # One tensor in two places would need its own kernel.
        tensors.append(x.clone() if any(x is other for other in tensors) else x)
    return tensors


def _mark(column: Any) -> str:
    if isinstance(column, Shared):
        return "shared"
    return "list" if isinstance(column, list) else ""


def _compiled(program: _Program, dtype: torch.dtype, name: str) -> Kernel:
    operations, outputs, constants = program

    def kernel(given: list[Tensor], vectors: Sequence[Tensor]) -> None:
        filled = [_filled(x, given) for x in reversed(constants)]  # the n-th is at ~n
        values = [enter(x, dtype) for x in vectors]
        for function, arguments, options, _, _ in operations:
            own = [values[k] if k >= 0 else filled[k] for k in arguments]
            values.append(function(*own, **{name: filled[k] for name, k in options}))
        for old, k in zip(vectors, outputs, strict=True):
            if k is not None and values[k] is not old:
                old.copy_(values[k])

    return _Compiled(with_own_code(kernel, name))


class _Compiled:
    """A function, compiled at its first call; later ones run what was made of its graph.

    It is called only for what the key of `_found` says, so that torch.compile need not check it.

    Attributes:
        sizes: which inputs of the graph are the length of the vectors.
        takes: for each input of the graph, its place in what a call is given, or a constant. Empty
            before the first call, and where one of them is something else.
    """

    def __init__(self, function: Kernel) -> None:
        options: Any = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        self.checked: Kernel = torch.compile(
            function, backend=self._backend, fullgraph=True, dynamic=True, options=options
        )
        self.sizes, self.takes = list[bool](), list[Any]()
        self.running = threading.local()  # its `pool`: what a call of this thread is given

    def __call__(self, given: list[Tensor], vectors: Sequence[Tensor]) -> None:
        pool = [vectors[0].numel(), *given, *vectors]
        if self.takes:
            self.run(*[_filled(x, pool) for x in self.takes])
            return
        self.running.pool = pool
        self.checked(given, vectors)
        del self.running.pool

    def _backend(self, graph: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        places = [node for node in graph.graph.nodes if node.op == "placeholder"]
        shown = [node.meta["example_value"] for node in places]
        lengths = {str(x.shape[0]) for x in shown if isinstance(x, Tensor) and x.dim()}
        self.sizes = [not isinstance(x, Tensor) and str(x) in lengths for x in shown]
        self.run = _torch.compiler("inductor", None, None, True)(graph, inputs)
        return self._first

    def _first(self, *inputs: Any) -> Any:
        """Note what the inputs of the graph are: the length, tensors of the pool, and constants."""
        places = {id(x): _Place(k) for k, x in enumerate(self.running.pool)}
        pairs = zip(inputs, self.sizes, strict=True)
        takes = [
            _Place(0) if size else x if type(x) is int else places.get(id(x)) for x, size in pairs
        ]
        self.takes = takes if any(self.sizes) and None not in takes else []
        return self.run(*inputs)


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
