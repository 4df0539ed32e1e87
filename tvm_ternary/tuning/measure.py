"""Build and time candidates: the failures among them are results too."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tvm

from tvm_ternary.build.link import find_linker
from tvm_ternary.build.nvcc import find_nvcc
from tvm_ternary.errors import HostError, OutputError
from tvm_ternary.runtime.driver import read_devices
from tvm_ternary.target import Target, require_host
from tvm_ternary.tuning.batch.gpu import find_gpu
from tvm_ternary.tuning.kernels import build_kernel, check_gpu_server, time_kernels
from tvm_ternary.tuning.rpc import Tracker
from tvm_ternary.tuning.task import Realize
from tvm_ternary.tuning.workers import (
    BUILD_SECONDS,
    RUN_SECONDS,
    Effort,
    Failure,
    Library,
    Workers,
    build_library,
    check_server,
    time_libraries,
)

TRIAL = Effort(rounds=3, milliseconds=20)
FINAL = Effort(rounds=11, milliseconds=20)
# A server that died takes down what ran on it; a candidate that kills its server shall not kill the next ones too.
_ATTEMPTS = 2
_WATCH_SECONDS = 5.0
_BUILDS = "build"


class Measurer:
    """Builds here and times here, or on a tracker's servers; made by `open_measurer`."""

    def __init__(
        self, target: Target, realize: Realize, threads: int, tracker: Tracker | None, work_dir: Path, linker: list[str]
    ) -> None:
        self._target, self._realize, self._threads, self._tracker = target, realize, threads, tracker
        self._work_dir, self._linker = work_dir, linker
        self._arch = target.archs[0] if target.archs else None
        self._folder: Path | None = None
        self._made = 0
        servers = 1 if tracker is None else tracker.require_servers()
        self._builders = Workers(len(os.sched_getaffinity(0)), BUILD_SECONDS, 1)
        self._runners = Workers(servers, RUN_SECONDS, threads)

    def check_server(self) -> None:
        """Connect to a server once, so that what is wrong with all of them is found before anything is built.

        Raises
        ------
        HostError
            If it cannot be reached, does not run as many threads as asked for, or has no GPU as the target names it.
        """
        if self._tracker is None:
            return
        check, need = (check_gpu_server, self._arch) if self._arch else (check_server, self._threads)
        result = self._runners.outcome(self._runners.submit(check, self._tracker, need))
        if isinstance(result, Failure):
            raise HostError(f"server of {self._tracker}", result.reason)

    def build(self, modules: Sequence[tvm.IRModule]) -> list[Library | Failure]:
        """Build candidates, given by their annotated workloads.

        Raises
        ------
        OutputError
            If there is no place for them.
        """
        folder = self._folder = self._folder or _fresh_folder(self._work_dir)
        futures = []
        for module in modules:
            self._made += 1
            path = str(folder / f"{self._made}.so")
            if self._arch:
                futures.append(self._builders.submit(build_kernel, self._realize, module, self._target, path))
                continue
            arguments = (self._realize, module, self._target.tvm, self._linker, path)
            futures.append(self._builders.submit(build_library, *arguments))
        return [self._builders.outcome(future) for future in futures]

    def time(self, libraries: Sequence[Library]) -> Generator[tuple[int, list[float] | Failure], None, None]:
        """Time candidates, each by itself, and give each one's position and seconds as they come in.

        Whoever has had enough closes the generator; what waits is then given up.

        Raises
        ------
        HostError
            If the tracker or the last of its servers is gone.
        """
        pending = {self._start([library], TRIAL): (index, 1) for index, library in enumerate(libraries)}
        try:
            while pending:
                done, _ = wait(pending, timeout=_WATCH_SECONDS, return_when=FIRST_COMPLETED)
                if not done:
                    self._require_servers()
                for future in done:
                    index, attempt = pending.pop(future)
                    result = self._runners.outcome(future)
                    if isinstance(result, Failure) and self._tracker is not None:
                        self._require_servers()
                        if attempt < _ATTEMPTS:
                            pending[self._start([libraries[index]], TRIAL)] = (index, attempt + 1)
                            continue
                    yield index, result if isinstance(result, Failure) else result[0]
        finally:
            for future in pending:
                future.cancel()

    def compare(self, libraries: Sequence[Library]) -> list[list[float]] | Failure:
        """Time candidates in turns, in one process and on one server."""
        for attempt in range(1, _ATTEMPTS + 1):
            result: list[list[float]] | Failure = self._runners.outcome(self._start(libraries, FINAL))
            if not isinstance(result, Failure) or self._tracker is None or attempt == _ATTEMPTS:
                break
            self._require_servers()
        return result

    def close(self) -> None:
        """End all workers, and remove what was built."""
        self._builders.close()
        self._runners.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            # Another job may be building beside it by now.
            with suppress(OSError):
                self._folder.parent.rmdir()

    def _start(self, libraries: Sequence[Library], effort: Effort) -> Future[Any]:
        if self._arch:
            return self._runners.submit(time_kernels, self._tracker, libraries, self._arch, effort)
        return self._runners.submit(time_libraries, self._tracker, libraries, self._threads, effort)

    def _require_servers(self) -> None:
        if self._tracker is not None:
            self._tracker.require_servers()


@contextmanager
def open_measurer(
    target: Target, realize: Realize, threads: int, tracker: Tracker | None, work_dir: Path
) -> Iterator[Measurer]:
    """Start what measuring needs, and clear it away at the end.

    Parameters
    ----------
    target : Target
    realize : callable
    threads : int
        That each candidate runs on.
    tracker : Tracker, optional
        Whose servers to use instead of this host.
    work_dir : Path
        Candidates are built in a folder in it, from the first build on; until then nothing is written there.

    Raises
    ------
    HostError
        If there is no linker (for a GPU, no nvcc), this host cannot run the target's code, or no server can be used.
    """
    if tracker is None:
        _require_device(target)
    linker = find_linker(str(target.host_tvm["mtriple"]))
    if target.kind == "cuda":
        find_nvcc(target.archs)
    measurer = Measurer(target, realize, threads, tracker, work_dir, linker)
    try:
        measurer.check_server()
        yield measurer
    finally:
        measurer.close()


def _require_device(target: Target) -> None:
    """Refuse a target that cannot be measured here."""
    if target.kind == "cpu":
        require_host(target, "measure on another host with --rpc-tracker, or tune for this one")
        return
    try:
        find_gpu(read_devices(), target.archs[0])
    except HostError as error:
        hint = "measure on another host, with --rpc-tracker, or with --export-candidates and --import-results"
        raise HostError(f"target {target.name}", f"{error.subject} {error.problem}", hint) from error


def _fresh_folder(work_dir: Path) -> Path:
    """Make a folder to build in, and remove those of jobs that were killed."""
    shutil.rmtree(work_dir / _BUILDS, ignore_errors=True)
    # A name of its own: a worker of a job that was killed may still be writing.
    folder = work_dir / _BUILDS / secrets.token_hex(4)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise OutputError(str(folder), f"cannot be made ({error.strerror})", "check permissions and space") from error
    return folder
