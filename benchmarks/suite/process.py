"""What happens in the process of one peer: it computes, and is timed when it is asked to."""

from __future__ import annotations

import collections
import ctypes
import gc
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TURN = 0.2  # seconds that the calls of a turn should take


class Setting(NamedTuple):
    """How a workload is run.

    Attributes:
        workload: its name in the suite.
        threads: their number; with one, its processor time is what counts.
        device: "cpu" or "cuda".
        smoke: whether problems are tiny.
    """

    workload: str
    threads: int
    device: str
    smoke: bool

    @property
    def clock(self) -> str:
        return "processor" if self.threads == 1 and self.device == "cpu" else "wall"


def environment(setting: Setting, folder: str) -> dict[str, str]:
    """Variables that a process needs from its beginning; compilers keep results in `folder`."""
    return {
        "OMP_NUM_THREADS": str(setting.threads),
        "JAX_PLATFORMS": setting.device,
        # With one thread in the process itself, whose time is measured.
        "TORCHINDUCTOR_COMPILE_THREADS": str(setting.threads),
        "TORCHINDUCTOR_CACHE_DIR": folder,
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def restrict(setting: Setting) -> None:
    """This process to as many cores as it may use, since jax has no other limit."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-setting.threads :])


class Contestant:
    """A program, and the problems it is given: two of the same shapes, to be told apart.

    The reference, without a name.
    """

    def __init__(self, setting: Setting, name: str | None, dtype: str = "float32") -> None:
        from . import WORKLOADS  # imports torch

        self.setting, self.workload = setting, WORKLOADS[setting.workload]
        workload = self.workload
        self.peer = workload.entrant(name)
        self.program = self.peer.make(min(workload.steps, 2) if setting.smoke else workload.steps)
        self.problems = [
            self.on_device(workload.problem(np.random.default_rng(seed), setting.smoke), dtype)
            for seed in range(2)
        ]

    def on_device(self, arrays: Any, dtype: str) -> Any:
        from .workload import mapped

        def convert(x: np.ndarray) -> Any:
            x = np.asarray(x, dtype if x.dtype.kind == "f" else np.int64)
            if self.peer.library == "torch":
                import torch

                return torch.from_numpy(x).to(self.setting.device)
            import jax

            return jax.device_put(x.astype(np.int32) if x.dtype.kind == "i" else x)

        return mapped(convert, arrays)

    def run(self, which: int = 0) -> Any:
        """The derivatives, when they have been computed."""
        result = self.program(*self.problems[which])
        if self.peer.library == "jax":
            import jax

            return jax.block_until_ready(result)
        if self.setting.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return result

    def result(self, which: int) -> list[np.ndarray]:
        from .workload import leaves

        found = leaves(self.run(which))
        if self.peer.library == "torch":
            return [x.detach().cpu().numpy() for x in found]
        return [np.asarray(x) for x in found]

    def seconds(self, function: Callable[[], object]) -> float:
        start = now(self.setting)
        function()
        return now(self.setting) - start

    def turn(self, calls: int) -> list[float]:
        """Seconds of so many calls; of several, one before them fills the caches."""
        return [self.seconds(self.run) for _ in range(calls + (calls > 1))][calls > 1 :]


def now(setting: Setting) -> float:
    """Seconds of the clock; processor time includes that of the compilers it has started."""
    if setting.clock == "wall":
        return time.perf_counter()
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def serve(connection: Connection, setting: Setting, name: str) -> None:
    """Send the results and what it took to get them; then answer what is asked."""
    restrict(setting)
    warnings.simplefilter("ignore")
    try:
        contestant = Contestant(setting, name)
        results: list[Any] = []
        first = contestant.seconds(lambda: results.append(contestant.result(0)))
        before = graphs()
        once = contestant.seconds(lambda: results.append(contestant.result(1)))
        found = before | {"later": graphs()["graphs"] - before["graphs"]}
    except ModuleNotFoundError as error:
        connection.send({"skipped": f"{error.name} is not installed"})
        return
    except Exception as error:
        connection.send({"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
        return
    connection.send({"results": results, "first": first, "once": once, **found})
    calls = max(1, min(100, round(TURN / once)))
    while True:  # until it is killed
        asked = connection.recv()
        connection.send(contestant.turn(calls) if asked == "time" else peak(contestant))


def graphs() -> dict[str, int]:
    """How many graphs torch.compile has compiled, and where it had to break them."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    counters = dynamo.counters if dynamo else collections.defaultdict(collections.Counter)
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }


def peak(contestant: Contestant) -> float:
    """The most bytes that one call holds beyond what was there before.

    On a GPU, in its allocator. Otherwise memory that is resident, when every block of 64 kB and
    more goes back to the system as soon as it is free.
    """
    if contestant.setting.device == "cuda":
        return device_peak(contestant)
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 0)  # M_TRIM_THRESHOLD
    contestant.run()
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak
    before = resident("VmRSS")
    contestant.run()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.findall(rf"{field}:\s+(\d+)", status)[0])


def device_peak(contestant: Contestant) -> float:
    """The most bytes beyond those before a call; JAX can't say that, only the process's peak."""
    if contestant.peer.library == "jax":
        import jax

        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contestant.run()
    return torch.cuda.max_memory_allocated() - before


def truth(connection: Connection, setting: Setting) -> None:
    """Send what the reference computes in float64, and what the machine and the problem bound."""
    restrict(setting)
    reference = Contestant(setting, None, "float64")
    results = [reference.result(which) for which in range(2)]
    by_hand = Contestant(setting, reference.workload.unit, "float64")
    connection.send({"results": results, **work(by_hand), **limits(setting)})


def work(contestant: Contestant) -> dict[str, float]:
    """Operations of a program, what they read and write in float32, and their flops."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    from .workload import leaves

    class Counter(TorchDispatchMode):
        operations = bytes = flops = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = func(*args, **(kwargs or {}))
            if not func.is_view:
                tensors = [x for x in leaves([args, result]) if isinstance(x, torch.Tensor)]
                self.operations += 1
                self.bytes += sum(4 * x.numel() for x in tensors)
                count = flop_registry.get(func._overloadpacket, lambda *_, **__: 0)
                self.flops += count(*args, **(kwargs or {}), out_val=result)
            return result

    with Counter() as counter:
        contestant.run()
    return {name: getattr(counter, name) for name in ("operations", "bytes", "flops")}


def limits(setting: Setting) -> dict[str, float]:
    """Flops a second of a large matrix product, bytes a second of scaling a large tensor."""
    import torch

    size = 256 if setting.smoke else 1024
    matrix = torch.randn(size, size, device=setting.device)
    vector = torch.randn(size * size * 32, device=setting.device)

    def best(function: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            start = now(setting)
            function()
            if setting.device == "cuda":
                torch.cuda.synchronize()
            times.append(now(setting) - start)
        return min(times)

    return {
        "flop_rate": 2 * size**3 / best(lambda: matrix @ matrix),
        "byte_rate": 8 * vector.numel() / best(lambda: vector.mul_(0.999)),
    }
