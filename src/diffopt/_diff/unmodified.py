"""Noticing what a function captures, and whether it was modified or replaced afterwards."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import dis
import functools
import inspect
import itertools
import types
import weakref
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from diffopt import _modes, _torch, _tree
from diffopt._tree import Tree

Stamp: TypeAlias = tuple[int, int | None]
"""What changes with a tensor: see `stamp`."""


class Captured:
    """The constants that a function captures, which it reads again when it is recomputed.

    A run of the function finds them by the operations that read them: but for those that it writes
    to itself, and those that only a kernel compiled by torch.compile reads. Its arguments are not
    among them; autograd checks those.

    Args:
        name: the function's name in errors.
        *functions: the function, and others that belong to it.

    Attributes:
        kept: the bytes that the run has left in memory, in results and their graph; 0 if unknown.
        settled: whether it has been run, so that it is known what it replaces itself.
        writes: whether it may write to something that exists, by the names in its code.
    """

    def __init__(self, name: str, *functions: Any) -> None:
        self.name, self.functions, self.kept = name, functions, 0
        self.versions: list[tuple[weakref.ref[Tensor], Stamp]] = []  # keeps no tensor alive
        self.settled = self.writes = False
        self.names: set[str] = set()
        self.values: dict[_Path, Callable[[], Any]] = {}
        if functions and not _modes.compiling():
            self.names = _names_read(functions)
            self.writes = any(map(_writing, self.names))
            self.values = {k: _held(x) for k, x in _bound(functions, self.names).items()}

    @contextlib.contextmanager
    def noticed(self, arguments: Tree) -> Generator[None]:
        """Within, the function is run once, with these arguments."""
        watch = not (_modes.compiling() or _modes.intercepted())
        with _Reads(arguments) if watch else contextlib.nullcontext() as reads:
            yield
        self.settle()
        if reads is not None:
            self.kept = reads.kept()
            self.versions = [
                (reference, then)
                for reference, then in reads.versions
                if (x := reference()) is not None and stamp(x) == then
            ]

    def settle(self) -> None:
        """After a run of the function: what that has replaced itself is not among the constants."""
        replaced, self.settled = self._replaced(), True
        self.values = {key: held for key, held in self.values.items() if key not in replaced}

    def _replaced(self) -> list[_Path]:
        """Where something else is now."""
        if not self.values:
            return []
        now, missing = _bound(self.functions, self.names), object()
        return [k for k, held in self.values.items() if not _same(held(), now.get(k, missing))]

    def check(self) -> None:
        """Raise if one of them has been modified or replaced since.

        Raises:
            RuntimeError: as torch does for tensors that autograd has saved.
        """
        for reference, then in self.versions:
            x = reference()
            if x is None or stamp(x) == then:
                continue
            now, before = stamp(x)[0], then[0]
            how = f"that has been modified in place since (its version is {now}, but was {before})"
            if now == before:
                how = "that has been modified through .data since"
            raise self._error(
                f"a tensor of shape {tuple(x.shape)} and {x.dtype} {how}",
                "modify it after the backward pass, or let the function capture a clone",
            )
        for path in self._replaced()[:1] if self.settled else ():
            name = ".".join(map(str, path[1:]))
            if path[-1] == "training":
                raise self._error(
                    f"{name}, which train() or eval() has switched since",
                    "switch it back before the backward pass",
                )
            raise self._error(
                f"{name}, which has been replaced since",
                "pass it as an argument, or create a new function for each value, such as by "
                "functools.partial",
            )

    def _error(self, what: str, advice: str) -> RuntimeError:
        return RuntimeError(
            f"{self.name} captures {what}, so the derivative cannot be recomputed: {advice}"
        )


class _Reads(_torch.DispatchMode):
    """Records, with their versions, the tensors that are read, but were not made, within it."""

    def __init__(self, arguments: Tree) -> None:
        super().__init__()
        inner = (list(_modes.levels(x))[-1] for x in _tree.tensors(arguments))
        self.known = {None, *map(_memory, inner)}
        self.versions: list[tuple[weakref.ref[Tensor], Stamp]] = []
        self.given = {*self.known}
        self.made = set[weakref.ref[torch.UntypedStorage]]()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else torch.compile would never compile a function that runs here first

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for x in _tensors(*args, *kwargs.values()):
            memory = _memory(x)
            if memory not in self.known:
                self.known.add(memory)
                self.given.add(memory)
                self.versions.append((weakref.ref(x), stamp(x)))
        results = func(*args, **kwargs)
        for x in _tensors(results):
            memory = _memory(x)
            self.known.add(memory)
            if memory not in self.given and _modes.ordinary(x) and x.layout is torch.strided:
                self.made.add(weakref.ref(x.untyped_storage()))
        return results

    def kept(self) -> int:
        """The bytes that are still in memory, of tensors that were made within it."""
        return sum(x.nbytes() for x in (reference() for reference in self.made) if x is not None)


def _tensors(*values: Any) -> list[Tensor]:
    """The tensors among the arguments or results of an operation, or in lists among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(*cast(Any, value))
    return found


def stamp(x: Tensor) -> Stamp:
    """The number of writes to a tensor, and its memory, which `x.data = y` replaces."""
    return _torch.version(x), _memory(x)


def kept(xs: Iterable[Any]) -> list[Any]:
    """All of them; raises if an iterator has written to what it yielded before."""
    return list(xs) if isinstance(xs, list) else unwritten(noted(xs))


def noted(xs: Iterable[Any]) -> Iterator[tuple[Any, list[int]]]:
    """Each x with the versions of its tensors, for `unwritten`."""
    return ((x, _versions(x)) for x in xs)


def unwritten(pairs: Iterable[tuple[Any, list[int]]]) -> list[Any]:
    """The xs; raises if one has been written to, as by a loader that fills one buffer again."""
    pairs = list(pairs)
    if any(_versions(x) != then for x, then in pairs):
        raise RuntimeError(
            "a tensor of a batch, or of what hparams returned for a step, has been written to "
            "since, so its step cannot be taken with it or run again: let batches yield clones"
        )
    return [x for x, _ in pairs]


def _versions(x: Any) -> list[int]:
    return [] if _modes.compiling() else _modes.versions(_tree.tensors(x))


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


# What a function will find under the names in it

_Path = tuple[Any, ...]
_MANY = 64  # entries of a container that are looked at one by one
_MUCH = 1 << 24  # bytes of memory that are all compared; of more, as many
_STORED = "[]="  # among the names in code that stores an item
_WRITTEN = "="  # in code that writes to an attribute, to a variable of another scope, or in place
_ADDING = {"append", "appendleft", "extend", "insert", "add"}
_ADDING_KEYS = {"update", "setdefault", _STORED}
_WRITING = {
    *(*_ADDING, *_ADDING_KEYS, _WRITTEN, "setattr", "delattr", "next", "print", "open", "clear"),
    *("pop", "popleft", "popitem", "remove", "discard", "sort", "reverse", "rotate"),
}
_CONTAINERS = (tuple, list, dict, set, frozenset, collections.deque)
_CONSTANTS = (bool, int, float, complex, str, bytes, types.CodeType)


def _held(x: Any) -> Callable[[], Any]:
    """A reference that keeps no tensor alive."""
    try:
        return weakref.ref(x)
    except TypeError:  # of a number, or the like
        return lambda: x


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, _Entries):
        return x.equals(y)
    return x is y or (type(x) is type(y) and isinstance(x, _CONSTANTS) and x == y)


class _Entries:
    """Entries of a container that have no parts, of which there may be very many."""

    __slots__ = ("held",)

    def __init__(self, entries: Iterable[Any]) -> None:
        # There is one weak reference to each tensor.
        self.held = [weakref.ref(x) if isinstance(x, Tensor) else x for x in entries]

    def equals(self, other: object) -> bool:
        """Whether the others begin with these: more may have been added."""
        theirs = other.held if isinstance(other, _Entries) else []
        return len(theirs) >= len(self.held) and all(map(_same, self.held, theirs))


_PLAIN = {*_CONSTANTS, type(None), Tensor, torch.nn.Parameter, _Entries}  # these have no parts


def _bound(whole: Any, names: set[str]) -> dict[_Path, Any]:
    """What a value consists of, by path: constants, tensors, and what else has an identity.

    Of the attributes of a user's objects only those with these names are among it.
    """
    leaves = ((path, value) for path, value, parts in _walked(whole, names) if parts is None)
    return {path: value if type(value) in _PLAIN else _contents(value) for path, value in leaves}


def _contents(value: Any) -> Any:
    """The value; a checksum of memory that can be written to, such as that of a numpy array."""
    try:
        memory = memoryview(value)
        part = max(1, -(-memory.nbytes // _MUCH))
        whole: Any = memory.cast("B") if part > 1 and memory.c_contiguous else memory.tobytes()
        checksum = zlib.crc32(bytes(whole[::part]))
    except (TypeError, ValueError, BufferError, NotImplementedError):
        return value  # it has no such memory, or does not show it
    return f"{memory.format} {memory.shape} {checksum}"


def _names_read(whole: Any) -> set[str]:
    """The names of attributes (and more) that the user's functions in a value read."""
    functions, classes, names = list[types.FunctionType](), set[Any](), {"__call__", "forward"}
    for _, value, _ in _walked(whole, None):
        if isinstance(value, types.MethodType):
            classes.add(type(value.__self__))
        elif isinstance(value, types.FunctionType):
            functions += [] if _library(value) else [value]
        elif isinstance(value, torch.nn.Module):
            parts = [*value.modules()]
            classes |= {type(x) for x in parts}
            names |= {_WRITTEN for x in parts if x.training and [*x.buffers(recurse=False)]}
            functions += itertools.chain(*map(_hooks, parts))
        elif isinstance(value, types.BuiltinMethodType):
            names.add(value.__name__)
        else:
            classes.add(value if isinstance(value, types.ModuleType) else type(value))
    return _reached(functions, classes, names)


def _reached(
    functions: Iterable[types.FunctionType],
    classes: Iterable[Any],
    names: Iterable[str],
    library: bool = False,
) -> set[str]:
    """The names, and those in functions and in the methods and properties of these names."""
    known, left = set[str](), {*names}.union(*(_names_of(f.__code__) for f in functions))
    kinds = [kind for kind in classes if library or not _library(kind)]
    while left:
        known |= left
        found = [getattr(kind, name, None) for kind in kinds for name in left]
        found = [x.fget if isinstance(x, property) else x for x in found]
        found = [x for x in found if isinstance(x, types.FunctionType)]
        found = [y for x in found if library or not _library(x) for y in (x, inspect.unwrap(x))]
        codes = [x.__code__ for x in found if isinstance(x, types.FunctionType)]
        left = set[str]().union(*map(_names_of, codes)) - known
    return known


def _hooks(part: torch.nn.Module) -> list[types.FunctionType]:
    """The user's functions that run when a part of a module does."""
    registries = [x for name in _REGISTRIES if isinstance(x := vars(part).get(name), dict)]
    hooks = itertools.chain(*(cast(dict[Any, Any], x).values() for x in registries))
    return [x for x in hooks if isinstance(x, types.FunctionType) and not _library(x)]


def _walked(
    whole: Any, names: set[str] | None
) -> Iterator[tuple[_Path, Any, Iterator[tuple[Any, Any]] | None]]:
    """A value and all its parts, with their paths and their own parts, or None without any."""
    seen = set[int]()
    left: list[tuple[_Path, Any]] = [((), whole)]
    while left:
        path, value = left.pop()
        parts = None if type(value) in _PLAIN else _parts(value, names)
        if parts is None or isinstance(value, torch.nn.Module):
            yield path, value, None
        if parts is not None and id(value) not in seen:
            seen.add(id(value))
            yield path, value, parts
            left += [((*path, name), part) for name, part in parts]


def _parts(value: Any, names: set[str] | None) -> Iterator[tuple[Any, Any]] | None:
    """The named parts of a function, a container, or an object that is called; else None."""
    if isinstance(value, types.FunctionType):
        return _names_in(value)
    if isinstance(value, types.MethodType):
        owner = ("self", value.__self__), *_attributes(value.__self__, names)
        return iter([("function", value.__func__), *owner])
    if isinstance(value, functools.partial):
        return iter(enumerate((cast(Any, value.func), *value.args, value.keywords)))
    if isinstance(value, _CONTAINERS):
        return _entries(cast(Any, value), names)
    if isinstance(value, torch.nn.Module):
        return None if names is None else _settings(value, names)
    attributes = _attributes(value, names)
    return iter(attributes) if attributes else None


def _entries(container: Any, names: set[str] | None) -> Iterator[tuple[Any, Any]]:
    """The entries of a container, and how many there are, if the user's functions add none."""
    keyed = isinstance(container, dict)
    pairs = [*cast(Any, container).items()] if keyed else [*enumerate(container)]
    if not names or names.isdisjoint(_ADDING_KEYS if keyed else _ADDING):
        yield "len()", len(pairs)
    rest = [entry for _, entry in pairs[_MANY:]]
    if rest and {*map(type, rest)} <= _PLAIN:
        yield f"[{_MANY}:]", _Entries(rest)
        pairs = pairs[:_MANY]
    yield from pairs


def _attributes(value: Any, names: set[str] | None) -> list[tuple[str, Any]]:
    """Those of an object that are read; of a class or a module, the constants among them."""
    if isinstance(value, (type, types.ModuleType)):
        if names is None or _library(value):
            return []
        known = vars(value)
        return [(name, known[name]) for name in names & known.keys() if _constant(known[name])]
    kind = type(value)
    if names is None or _library(kind):
        whole = dataclasses.is_dataclass(value) or (callable(value) and not _library(kind))
        return [*getattr(value, "__dict__", {}).items()] if whole else []
    slots = (name for k in kind.__mro__ for name in getattr(k, "__slots__", ()) if name in names)
    own = {name: getattr(value, name, None) for name in slots} | getattr(value, "__dict__", {})
    read = [(name, x) for name, x in own.items() if name in names]
    read += [("__dict__", _listed(value, read))] if hasattr(value, "__dict__") else []
    classes = kind.__mro__[:-1]  # the last is object
    return [*read, *((x, y) for k in classes for x, y in _attributes(k, names))]


def _listed(value: Any, attributes: Iterable[tuple[str, Any]]) -> str:
    """The kind of an object and the names of its attributes: there may be others later."""
    return f"{type(value).__qualname__}: {', '.join(sorted(name for name, _ in attributes))}"


def _constant(value: Any) -> bool:
    return isinstance(value, (*_CONSTANTS, Tensor))


def _settings(module: torch.nn.Module, names: set[str]) -> Iterator[tuple[str, Any]]:
    """What a module has of its own: attributes that are read, its tensors and submodules.

    Of the attributes those that are constants, containers, or other memory.
    """
    read = _read_by(type(module)) | names
    own = ((name, x) for name, x in vars(module).items() if name in read - _REGISTRIES)
    kinds = *_CONSTANTS, *_CONTAINERS
    parts = [(name, x) for name, x in own if isinstance(x, kinds) or _contents(x) is not x]
    parts += module.named_parameters(recurse=False)
    parts += module.named_buffers(recurse=False)
    parts += module.named_children()
    yield "__dict__", _listed(module, parts)
    yield from parts


_REGISTRIES = vars(torch.nn.Module()).keys() - {"training"}


@functools.lru_cache(maxsize=1024)
def _read_by(kind: type) -> frozenset[str]:
    """The names of attributes that the `forward` of a kind of module reads, or what it calls."""
    return frozenset(_reached((), [kind], {"forward"}, library=True))


def _library(x: Any) -> bool:
    name = str(getattr(x, "__module__", None) or x.__name__).partition(".")[0]
    return name in ("torch", "diffopt", "numpy", "math")


def _names_in(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables of other scopes that a function reads, and its defaults."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # it has no value yet
            yield name, cell.cell_contents
    if not _library(function):
        known = function.__globals__
        yield from ((name, known[name]) for name in _globals_in(function.__code__) if name in known)
        yield "__dict__", function.__dict__
    yield "code", function.__code__
    if function.__defaults__ or function.__kwdefaults__:
        yield "defaults", (function.__defaults__, function.__kwdefaults__)


@functools.lru_cache(maxsize=1024)
def _names_of(code: types.CodeType) -> frozenset[str]:
    """The names of attributes and global variables in code, also in functions that it defines.

    Strings may be such names, too: those of `getattr`.
    """
    inner = (x for x in code.co_consts if isinstance(x, types.CodeType))
    strings = (x for x in code.co_consts if isinstance(x, str) and x.isidentifier())
    stores = {written for i in dis.get_instructions(code) if (written := _written(i, code))}
    return frozenset(stores).union(code.co_names, strings, *map(_names_of, inner))


def _written(instruction: dis.Instruction, code: types.CodeType) -> str | None:
    """What stands among the names for an instruction that writes to more than a local variable."""
    operation, _, kind = instruction.opname.partition("_")
    if operation not in ("STORE", "DELETE"):
        in_place = operation == "INPLACE" or instruction.argrepr in _IN_PLACE
        return _WRITTEN if in_place else None
    if kind in ("SUBSCR", "SLICE"):
        return _STORED
    elsewhere = kind in ("ATTR", "GLOBAL") or instruction.argval in code.co_freevars
    return _WRITTEN if elsewhere else None


def _writing(name: str) -> bool:
    """Whether something of this name may write to what exists, as methods of tensors do."""
    return name in _WRITING or (name.endswith("_") and not name.endswith("__"))


_IN_PLACE = {f"{x}=" for x in ("+", "-", "*", "/", "//", "%", "@", "**", "&", "|", "^", "<<", ">>")}


@functools.lru_cache(maxsize=1024)
def _globals_in(code: types.CodeType) -> tuple[str, ...]:
    """The names of global variables that code reads, also in functions that it defines."""
    inner = [x for x in code.co_consts if isinstance(x, types.CodeType)]
    own = [i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    return tuple(dict.fromkeys([*own, *itertools.chain(*map(_globals_in, inner))]))
