"""A GPU seen through torch: the library of kernels, times by CUDA graphs and events, what the card can do at best."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm_ternary.runtime.library import load_cuda_runtime, load_runtime

CACHE_BYTES = 128 << 20
"""More than a second-level cache: sets of operands are used in turns until they are as large together."""
ROUNDS = 7
_SECONDS = 0.015
_LARGE = 8192
_SMI = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem", "persistence_mode", "mig.mode.current")

Call = Callable[[], object]


@dataclass(frozen=True)
class Time:
    """Seconds of a call: the median of rounds, and how far the fastest and the slowest of them are apart, of it."""

    seconds: float
    spread: float


class Clock:
    """Times on torch's current GPU.

    Parameters
    ----------
    place : str
        ``cpu`` is for tests, which bring a subclass that knows how to time it.
    """

    def __init__(self, place: str = "cuda") -> None:
        import torch

        self.torch, self.place = torch, place

    def stream(self, context: AbstractContextManager[Any] | None = None) -> AbstractContextManager[Any]:
        """Within it, all calls go to torch's stream, or to that of a graph."""
        return context if context is not None else nullcontext()

    def seconds(self, contestants: Sequence[Sequence[Call]]) -> list[Time]:
        """Time of each contestant's call: its calls, one a set of operands, are a graph; graphs run in turns."""
        graphs = [self._graph(each) for each in contestants]
        repeats = [max(1, round(_SECONDS / max(self._replay(graph, 2), 1e-6))) for graph in graphs]
        times: list[list[float]] = [[] for _ in graphs]
        for _ in range(ROUNDS):
            for graph, count, found in zip(graphs, repeats, times, strict=True):
                found.append(self._replay(graph, count))
        return [_summary(found, len(each)) for found, each in zip(times, contestants, strict=True)]

    def _graph(self, calls: Sequence[Call]) -> Any:
        # Once before: modules are loaded and handles made outside of the graph.
        with self.stream():
            for call in calls:
                call()
        self.torch.cuda.synchronize()
        graph = self.torch.cuda.CUDAGraph()
        with self.stream(self.torch.cuda.graph(graph)):
            for call in calls:
                call()
        return graph

    def _replay(self, graph: Any, count: int) -> float:
        """Seconds of a replay."""
        start, stop = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        for _ in range(count):
            graph.replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e-3 / count

    def pipelined(self, call: Call, number: int = 10, rounds: int = 50) -> float:
        """Median seconds of a call as a program sees it: so many in a row, then a wait for the last one."""
        for _ in range(3):
            call()
        self.torch.cuda.synchronize()
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            for _ in range(number):
                call()
            self.torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / number)
        return float(statistics.median(times))

    def copy_bandwidth(self) -> float:
        """Bytes a second that a copy of 1 GiB reads and writes."""
        source = self.torch.randint(0, 256, (1 << 30,), dtype=self.torch.uint8, device=self.place)
        target = self.torch.empty_like(source)
        (found,) = self.seconds([[lambda: target.copy_(source)]])
        return float(2 * source.numel() / found.seconds)

    def peak(self) -> float:
        """Operations a second of torch's large product in bfloat16, on random numbers."""
        size = (_LARGE, _LARGE)
        a, b, c = (self.torch.randn(size, dtype=self.torch.bfloat16, device=self.place) for _ in range(3))
        (found,) = self.seconds([[lambda: self.torch.matmul(a, b, out=c)]])
        return 2 * float(_LARGE) ** 3 / found.seconds


class Device(Clock):
    """A GPU and the library of kernels in the folder that `benchmarks.gpu.build` made."""

    def __init__(self, folder: Path, place: str = "cuda") -> None:
        super().__init__(place)
        self._ffi = load_runtime(folder)
        if place == "cuda":
            load_cuda_runtime(folder)
        self.library = self._ffi.load_module(str(folder / "kernels.so"))

    def stream(self, context: AbstractContextManager[Any] | None = None) -> AbstractContextManager[Any]:
        """Within it, our kernels go where torch's do."""
        if self.place == "cpu":
            return nullcontext()
        stream: AbstractContextManager[Any] = self._ffi.use_torch_stream(context)
        return stream

    def facts(self) -> dict[str, Any]:
        """What each line of results should say of the card, the driver and torch."""
        properties = self.torch.cuda.get_device_properties(0)
        return {
            "torch": self.torch.__version__,
            "cuda_of_torch": self.torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cache": properties.L2_cache_size,
        }


def _summary(rounds: Sequence[float], calls: int) -> Time:
    middle = statistics.median(rounds)
    return Time(middle / calls, (max(rounds) - min(rounds)) / middle)


def settings() -> dict[str, str]:
    """What nvidia-smi says of the card; nothing where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")] if done.stdout.strip() else []
    return dict(zip(_SMI, values, strict=False)) if done.returncode == 0 else {}
