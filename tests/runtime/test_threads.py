"""A module computes on exactly as many threads as asked for, wherever it is called from."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tvm_ternary.errors import OptionError
from tvm_ternary.runtime.module import Module, load
from tvm_ternary.runtime.threads import MAX_THREADS, default_threads, thread_count

from .conftest import ROOT


def computing_threads(module: Module) -> set[int]:
    """Numbers of the threads that run the iterations of a parallel loop."""
    return set(module.run(None, {})[0].tolist())


def tasks() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


def started(before: set[int], count: int) -> set[int]:
    """The threads there are now, once they are so many: one that Python has joined may be seen for a moment yet."""
    deadline = time.monotonic() + 30
    while len(tasks() - before) > count and time.monotonic() < deadline:
        time.sleep(0.01)
    return tasks() - before


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_module_has_exactly_the_threads_asked_for(built: Path, count: int) -> None:
    affinity = os.sched_getaffinity(0)
    before = tasks()
    module = load(built / "probe.so", threads=count)
    used = computing_threads(module)
    assert module.threads == count
    assert len(used) == count
    # One is the caller's.
    assert used == (started(before, count if count > 1 else 0) or {threading.get_native_id()})
    assert {frozenset(os.sched_getaffinity(task)) for task in used} == {frozenset(affinity)}
    assert os.sched_getaffinity(0) == affinity
    assert "TVM_BIND_THREADS" not in os.environ


def test_modules_with_different_counts_do_not_disturb_each_other(built: Path) -> None:
    modules = {count: load(built / "probe.so", threads=count) for count in (1, 3, 2)}
    for _ in range(2):
        for count, module in modules.items():
            assert len(computing_threads(module)) == count


def test_the_calling_thread_makes_no_difference(built: Path) -> None:
    module = load(built / "probe.so", threads=2)
    seen: list[set[int]] = [computing_threads(module)]
    callers = [threading.Thread(target=lambda: seen.append(computing_threads(module))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(seen) == 5
    assert all(used == seen[0] for used in seen)


def test_one_thread_is_the_one_that_calls(built: Path) -> None:
    module = load(built / "probe.so", threads=1)
    seen: list[tuple[set[int], int]] = []
    callers = [
        threading.Thread(target=lambda: seen.append((computing_threads(module), threading.get_native_id())))
        for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(seen) == 4
    assert all(used == {caller} for used, caller in seen)


def test_one_thread_stays_one_when_somebody_widens_the_pool(built: Path) -> None:
    module = load(built / "probe.so", threads=1)
    here = {threading.get_native_id()}
    assert computing_threads(module) == here
    module._tvm_ffi.get_global_func("runtime.config_threadpool")(1, 2, ["0", "0"])
    assert computing_threads(module) == here


END = """
import os, sys, time
from tvm_ternary.runtime.module import load
def tasks():
    return {int(name) for name in os.listdir("/proc/self/task")}
load(sys.argv[1], threads=1)
before = tasks()
module = load(sys.argv[1], threads=3)
own = tasks() - before
del module
deadline = time.monotonic() + 30
while own & tasks() and time.monotonic() < deadline:
    time.sleep(0.01)
print(len(own), len(own & tasks()))
"""


def test_threads_end_with_their_module(built: Path) -> None:
    """TVM's workers look for work 300,000 times before they hear that they may end, minutes on a busy machine."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TVM_THREAD_POOL_SPIN_COUNT": "0"}
    command = [sys.executable, "-c", END, str(built / "probe.so")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout == "3 0\n", result.stderr


FORK = """
import multiprocessing, sys, warnings
warnings.simplefilter("ignore")
from tvm_ternary.runtime.module import load
module = load(sys.argv[1], threads=2)
parent = set(module.run(None, {})[0].tolist())
def child(queue):
    queue.put(set(module.run(None, {})[0].tolist()))
context = multiprocessing.get_context("fork")
queue = context.Queue()
process = context.Process(target=child, args=(queue,))
process.start()
used = queue.get(timeout=60)
process.join(60)
assert len(parent) == len(used) == 2 and not parent & used, (parent, used)
assert set(module.run(None, {})[0].tolist()) == parent
print("well")
"""


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_child_may_go_on_using_a_module(built: Path) -> None:
    command = [sys.executable, "-c", FORK, str(built / "probe.so")]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert result.stdout == "well\n", result.stderr


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True, MAX_THREADS + 1])
def test_what_is_no_number_of_threads(threads: object, built: Path) -> None:
    with pytest.raises(OptionError, match=f"threads: is {threads!r}; expected a whole number from 1 to {MAX_THREADS}"):
        load(built / "probe.so", threads=threads)  # type: ignore[arg-type]


def test_the_environment_sets_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "3")
    assert thread_count(None) == 3
    assert thread_count(1) == 1
    monkeypatch.setenv("TVM_NUM_THREADS", "many")
    with pytest.raises(OptionError, match="TVM_NUM_THREADS: is 'many'"):
        thread_count(None)
    monkeypatch.delenv("TVM_NUM_THREADS")
    assert thread_count(None) == default_threads()


def test_hyper_threads_and_quotas_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 4, 5, 6})
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    quota = tmp_path / "cpu.max"
    assert default_threads(tmp_path, quota) == 3  # 0 and 4 are one core, 1 and 5 another
    assert default_threads(tmp_path / "absent", quota) == 5
    for text, expected in (("max 100000", 3), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 3)):
        quota.write_text(text)
        assert default_threads(tmp_path, quota) == expected
