"""Workers: the threads a candidate runs on, what its arrays hold, and calls that do not come back."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import tvm

from tvm_ternary.build.link import find_linker
from tvm_ternary.target import resolve
from tvm_ternary.tuning.task import decided_schedule
from tvm_ternary.tuning.workers import (
    Effort,
    Failure,
    Library,
    Workers,
    build_library,
    random_array,
    require_threads,
    time_libraries,
)

from .toy import Toy, realize

TARGET = resolve("native").tvm
CRASHED = Failure("ended its process: a crash, or not enough memory")


def pool_size(count: int) -> int:
    """Threads that TVM's pool has in this process, once it was asked to have ``count``."""
    require_threads(None, count)
    return int(tvm.get_global_func("runtime.NumThreads")())


def refuse() -> None:
    raise KeyError("first\nsecond")


@pytest.mark.parametrize("threads", [1, 2])
def test_candidates_run_on_as_many_threads_as_asked_for(threads: int) -> None:
    workers = Workers(1, 60, threads)
    try:
        assert workers.outcome(workers.submit(pool_size, threads)) == threads
        if threads == 2:
            wrong = workers.outcome(workers.submit(pool_size, 3))
            assert wrong == Failure("RuntimeError: 2 threads, expected 3; start the server with TVM_NUM_THREADS=3")
    finally:
        workers.close()


def test_calls_that_fail_are_told_apart_and_the_pool_goes_on() -> None:
    workers = Workers(1, 1.0, 1)
    try:
        futures = [workers.submit(*call) for call in ((time.sleep, 60), (os._exit, 3), (refuse,), (os.getppid,))]
        results = [workers.outcome(future) for future in futures]
    finally:
        workers.close()
    assert results == [
        Failure("took more than 1 s"),
        CRASHED,
        Failure("KeyError: 'first\\nsecond'"),
        os.getpid(),
    ]


@pytest.mark.parametrize("begun", [False, True], ids=["just-asked", "begun"])
def test_closing_ends_what_runs_and_what_waits(begun: bool) -> None:
    workers = Workers(1, 3600, 1)
    if begun:
        assert isinstance(workers.outcome(workers.submit(os.getpid)), int)
    running, waiting = (workers.submit(time.sleep, 3600) for _ in range(2))
    workers.close()
    assert running.cancelled() or workers.outcome(running) == Failure(
        "ended its process: a crash, or not enough memory"
    )
    assert waiting.cancelled()


def test_building_and_timing(tmp_path: Path) -> None:
    toy = Toy()
    linker = find_linker(str(TARGET["mtriple"]))
    libraries = []
    for point in ((1, 8), (2, 16)):
        module = decided_schedule(toy.workload(), toy.space, point).mod
        libraries.append(build_library(realize, module, TARGET, linker, str(tmp_path / f"{point}.so")))
    float32 = "float32"
    assert libraries[0].arguments == (((32, 16), float32), ((16, 32), float32), ((32, 32), float32))
    workers = Workers(1, 60, 1)
    try:
        times = workers.outcome(workers.submit(time_libraries, None, libraries, 1, Effort(3, 1)))
        missing = Library(str(tmp_path / "no.so"), ())
        lost = workers.outcome(workers.submit(time_libraries, None, [missing], 1, Effort(1, 1)))
    finally:
        workers.close()
    assert [len(seconds) for seconds in times] == [3, 3]
    assert all(0 < value < 1 for seconds in times for value in seconds)
    assert isinstance(lost, Failure)
    assert "no.so" in lost.reason


def test_a_linker_that_fails_is_quoted(tmp_path: Path) -> None:
    toy = Toy()
    module = decided_schedule(toy.workload(), toy.space, (1, 8)).mod
    with pytest.raises(RuntimeError, match=r"false failed"):
        build_library(realize, module, TARGET, ["false"], str(tmp_path / "a.so"))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "float32"])
def test_arrays_have_ordinary_values(dtype: str) -> None:
    values = random_array((64, 64), dtype, tvm.cpu()).numpy()
    assert (values.shape, str(values.dtype)) == ((64, 64), dtype)
    if dtype == "float32":
        assert values.min() >= 0.5
        assert values.max() <= 1.5
    else:
        limits = np.iinfo(dtype)
        assert values.min() < limits.min + (int(limits.max) - int(limits.min)) // 8
        assert values.max() > limits.max - (int(limits.max) - int(limits.min)) // 8
