"""What runs in worker processes: building a candidate, and timing candidates here or on an RPC server.

A candidate may take the process that builds or runs it with it, so neither happens in this one.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm.s_tir.meta_schedule.arg_info import ArgInfo
from tvm.support.popen_pool import PopenPoolExecutor

from tvm_ternary.tuning.rpc import Tracker
from tvm_ternary.tuning.task import Realize

Argument = tuple[tuple[int, ...], str]
"""Shape and dtype of an array."""

# A build took thirty seconds on a loaded machine, and a whole batch failed of TVM's limit of as much.
BUILD_SECONDS = 300.0
RUN_SECONDS = 120.0
# Workers leak a little with every build.
_USES = 64
_REASON_LENGTH = 300
_END_SECONDS = 0.1
_ENTRY = "main"
_THREADS, _BIND = "TVM_NUM_THREADS", "TVM_BIND_THREADS"
_PREFER_FAST_CORES = 1


@dataclass(frozen=True)
class Effort:
    """How a set of candidates is timed: ``rounds`` times in turns, each for at least ``milliseconds``."""

    rounds: int
    milliseconds: int


@dataclass(frozen=True)
class Library:
    """A candidate that was built: its file and what its function takes."""

    path: str
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Failure:
    """Why a call in a worker failed, in a line."""

    reason: str


class Workers:
    """A pool of processes, which are started when needed and end with this one.

    Parameters
    ----------
    count : int
    seconds : float
        A call that takes longer is ended, and its process with it.
    threads : int
        Of TVM's own pool in each.
    """

    def __init__(self, count: int, seconds: float, threads: int) -> None:
        silent = subprocess.DEVNULL
        self._pool = PopenPoolExecutor(
            count, seconds, _set_threads, (threads,), maximum_process_uses=_USES, stdout=silent, stderr=silent
        )
        self._seconds = seconds
        self._futures: list[Future[Any]] = []

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Call a function in a worker, which finds it by its module and name; `outcome` reads the future."""
        future: Future[Any] = self._pool.submit(_guarded, function, arguments)
        self._futures = [pending for pending in self._futures if not pending.done()] + [future]
        return future

    def outcome(self, future: Future[Any]) -> Any:
        """Wait for a call and give its result, or a `Failure`."""
        try:
            return future.result()
        except TimeoutError:
            return Failure(f"took more than {self._seconds:g} s")
        except ChildProcessError:
            return Failure("ended its process: a crash, or not enough memory")

    def close(self) -> None:
        """End all processes, whatever they do."""
        for future in self._futures:
            future.cancel()
        # The pool's own way to end a worker first waits for what it is doing: for a server that is gone, for one.
        while wait(self._futures, _END_SECONDS).not_done:
            for worker in list(self._pool._worker_map.values()):
                if worker._proc is not None:
                    worker._proc.kill()
        self._pool.shutdown()


def _guarded(function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Call; no exception leaves the worker, since TVM's pool makes a new one of its class from the text alone."""
    try:
        return function(*arguments)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Failure(f"{type(error).__name__}: {lines[0] if lines else ''}"[:_REASON_LENGTH])


def _set_threads(count: int) -> None:
    os.environ[_THREADS] = str(count)
    # As `tvm_ternary.runtime` runs: not bound to CPUs.
    os.environ[_BIND] = "0"


def build_library(
    realize: Realize, module: tvm.IRModule, target: dict[str, Any], linker: Sequence[str], path: str
) -> Library:
    """Schedule a workload by its annotations, compile and link it."""
    scheduled = realize(module)
    executable = tvm.compile(scheduled, tvm.target.Target(target))
    executable.export_library(path, fcompile=lambda output, objects: _link(linker, output, objects))
    arrays = ArgInfo.from_prim_func(scheduled[_ENTRY])
    return Library(path, tuple((tuple(int(extent) for extent in array.shape), str(array.dtype)) for array in arrays))


def _link(linker: Sequence[str], output: str, objects: Sequence[str]) -> None:
    command = [*linker, "-shared", "-o", output, *objects, "-lm"]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{linker[0]} failed: {' '.join(result.stderr.split())}")


def time_libraries(
    tracker: Tracker | None, libraries: Sequence[Library], threads: int, effort: Effort
) -> list[list[float]]:
    """Time candidates in turns, all on the same server where there are several.

    Parameters
    ----------
    tracker : Tracker, optional
        Whose server to use; None times them in this process.
    libraries : sequence of Library
    threads : int
    effort : Effort

    Returns
    -------
    list of list of float
        Seconds, a value a round, for each.
    """
    session = None if tracker is None else tracker.session(RUN_SECONDS)
    device = tvm.cpu() if session is None else session.cpu()
    loaded = [load_library(session, library.path) for library in libraries]
    require_threads(session, threads)
    timers = [
        module.time_evaluator(_ENTRY, device, number=1, repeat=1, min_repeat_ms=effort.milliseconds)
        for module in loaded
    ]
    arguments = [[random_array(*argument, device) for argument in library.arguments] for library in libraries]
    times: list[list[float]] = [[] for _ in libraries]
    for _ in range(effort.rounds):
        for timer, given, seconds in zip(timers, arguments, times, strict=True):
            seconds.append(float(timer(*given).results[0]))
    return times


def check_server(tracker: Tracker, threads: int) -> None:
    """Connect to a server and see that it runs so many threads."""
    require_threads(tracker.session(RUN_SECONDS), threads)


def require_threads(session: Any, count: int) -> None:
    """Set the size of TVM's pool where the candidates run.

    Raises
    ------
    RuntimeError
        If it has another size: that of a server is fixed by its environment.
    """
    find = tvm_ffi.get_global_func if session is None else session.get_function
    # Makes a pool smaller, never larger than the environment variable allows.
    find("runtime.config_threadpool")(_PREFER_FAST_CORES, count)
    found = int(find("runtime.NumThreads")())
    if found != count:
        raise RuntimeError(f"{found} threads, expected {count}; start the server with {_THREADS}={count}")


def load_library(session: Any, path: str) -> Any:
    """Load a library here, or bring it to a server first."""
    if session is None:
        return tvm.runtime.load_module(path)
    session.upload(path)
    return session.load_module(Path(path).name)


def random_array(shape: tuple[int, ...], dtype: str, device: Any) -> tvm.runtime.Tensor:
    """Values do not matter for speed here; floats are of ordinary size, so that none is denormal."""
    generator, kind = np.random.default_rng(0), np.dtype(dtype)
    if kind.kind == "f":
        return tvm.runtime.tensor(generator.uniform(0.5, 1.5, shape).astype(kind), device=device)
    limits = np.iinfo(kind)
    return tvm.runtime.tensor(generator.integers(limits.min, limits.max, shape, kind, endpoint=True), device=device)
