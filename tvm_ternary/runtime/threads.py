"""Where a module computes: on a thread of its own with a pool of exactly the size asked for, or where it is called.

TVM keeps a pool for every thread that calls it, fixes the pool's size when that thread first needs it, and by default
pins its workers *and the calling thread* to the lowest-numbered CPUs. A thread of our own makes the size exact
whatever else used TVM before, leaves the caller's affinity alone, and puts runs one after another. The hand-over
there and back costs 30 microseconds, twice what a small model takes; where one thread is to compute, the caller's
does. Nothing is pinned, unless the environment variable ``TVM_BIND_THREADS`` is 1.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tvm_ternary.errors import HostError, OptionError

# Far beyond any host that TVM's pool was made for; a typing error should not start a million threads.
MAX_THREADS = 1024
_VARIABLE = "TVM_NUM_THREADS"
_PREFER_FAST_CORES = 1

_T = TypeVar("_T")
# TVM binds threads to CPUs unless this variable is "0". It belongs to the whole process, hence the lock.
_BIND = "TVM_BIND_THREADS"
_environment = threading.Lock()


class CallingThread:
    """Runs calls one after another on the thread that makes them; TVM's pool of that thread is then it alone.

    Parameters
    ----------
    tvm_ffi : module
        With TVM's runtime loaded.
    """

    count = 1

    def __init__(self, tvm_ffi: Any) -> None:
        self._pool = _Pool(tvm_ffi, 1)
        self._lock = threading.Lock()

    def call(self, function: Callable[..., _T], *args: Any) -> _T:
        """Run ``function(*args)`` and give its result; safe from any thread, and after a fork."""
        with self._lock:
            self._pool.ensure()
            return function(*args)


class ComputeThread:
    """Runs calls one after another on a thread whose TVM pool has ``count`` threads, itself included.

    Parameters
    ----------
    tvm_ffi : module
        With TVM's runtime loaded.
    count : int
        As `thread_count` returns it.
    """

    def __init__(self, tvm_ffi: Any, count: int) -> None:
        self.count = count
        self._pool = _Pool(tvm_ffi, count)
        self._lock = threading.Lock()
        self._start()

    def call(self, function: Callable[..., _T], *args: Any) -> _T:
        """Run ``function(*args)`` on the compute thread and give its result; safe from any thread, and after a fork."""
        with self._lock:
            if self._process != os.getpid():
                self._start()
            future = self._executor.submit(function, *args)
        return future.result()

    def _start(self) -> None:
        # A forked child inherits this object but not the thread behind it.
        self._process = os.getpid()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tvm-ternary")
        try:
            self._executor.submit(self._pool.ensure).result()
        except RuntimeError as error:
            raise HostError(
                "threads", f"a pool of {self.count} cannot be started ({error})", "ask for fewer"
            ) from error


class _Pool:
    """TVM's pool of whichever thread asks."""

    def __init__(self, tvm_ffi: Any, count: int) -> None:
        self._count = count
        self._configure = tvm_ffi.get_global_func("runtime.config_threadpool")
        self._size = tvm_ffi.get_global_func("runtime.NumThreads")
        # NumThreads is no proof before a pool was made: it then gives the size that one would have.
        self._made = threading.local()

    def ensure(self) -> None:
        """Make the calling thread's pool what it is to be, if somebody has not left it so."""
        if not hasattr(self._made, "once") or self._size() != self._count:
            self._make()
            self._made.once = True

    def _make(self) -> None:
        # TVM takes the size of a new pool from the length of the CPU list; the list itself only matters for binding.
        cpus = ["0"] * self._count
        with _environment:
            bound = os.environ.get(_BIND)
            os.environ[_BIND] = bound or "0"
            try:
                self._configure(_PREFER_FAST_CORES, self._count, cpus)
            finally:
                if bound is None:
                    del os.environ[_BIND]
        assert self._size() == self._count


def thread_count(threads: int | None) -> int:
    """Check a number of threads, or choose one.

    Parameters
    ----------
    threads : int, optional
        None: the environment variable ``TVM_NUM_THREADS``; without it one for every physical core that this process
        may use, and no more than its cgroup's CPU quota.

    Raises
    ------
    OptionError
        If it is no whole number from 1 to `MAX_THREADS`.
    """
    subject, got = "threads", threads
    if threads is None and (text := os.environ.get(_VARIABLE)):
        subject, got = _VARIABLE, int(text) if text.isascii() and text.isdigit() else text  # type: ignore[assignment]
    if got is None:
        return default_threads()
    if isinstance(got, bool) or not isinstance(got, int) or not 1 <= got <= MAX_THREADS:
        raise OptionError(subject, f"is {got!r}; expected a whole number from 1 to {MAX_THREADS}")
    return got


def default_threads(
    topology: Path = Path("/sys/devices/system/cpu"), quota: Path = Path("/sys/fs/cgroup/cpu.max")
) -> int:
    """Count the physical cores that this process may use; two hyper-threads of a core count once."""
    cores = {_siblings(topology, cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min(len(cores), _quota(quota) or len(cores)))


def _siblings(topology: Path, cpu: int) -> str:
    """Give what all hyper-threads of a core have in common: the list of their numbers."""
    try:
        return (topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota(path: Path) -> int | None:
    """Give the CPUs' worth of time that the cgroup may use, None if it has no limit."""
    try:
        limit, period = path.read_text().split()
        return max(1, int(limit) // int(period))
    except (OSError, ValueError):
        return None
