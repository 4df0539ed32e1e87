"""Tuning on RPC servers: several at once, one that dies, and what answers where a tracker should."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tvm_ternary.errors import HostError, OptionError
from tvm_ternary.schedule.records import read_log
from tvm_ternary.target import resolve
from tvm_ternary.tuning import measure, rpc
from tvm_ternary.tuning.report import TaskResult, TuningReport
from tvm_ternary.tuning.rpc import Tracker
from tvm_ternary.tuning.tuner import Options, tune
from tvm_ternary.tuning.workers import Effort

from .toy import Toy, realize

KEY = "tvm-ternary-test"
TARGET = resolve("native")
TOY = Toy(space={"rows": (1, 2, 4, 8), "columns": (2, 4, 8, 16)})


def start(module: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start one of TVM's servers in a process group of its own."""
    command = [sys.executable, "-m", f"tvm.exec.{module}", "--host", "127.0.0.1", *arguments]
    quiet = subprocess.DEVNULL
    environment = {**os.environ, "TVM_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True, env=environment)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a server and all its processes, as a machine that loses its power does."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def servers(tracker: Tracker) -> int:
    try:
        return tracker.require_servers()
    except HostError:
        return 0


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Tracker, list[subprocess.Popen[bytes]]]]:
    """A tracker with two servers."""
    port = free_port()
    tracker = Tracker("127.0.0.1", port, KEY)
    processes = [start("rpc_tracker", "--port", str(port), "--port-end", str(port + 1))]
    try:
        for _ in range(2):
            first = free_port()
            ports = ("--port", str(first), "--port-end", str(first + 50))
            processes.append(start("rpc_server", *ports, "--tracker", f"127.0.0.1:{port}", "--key", KEY))
        while servers(tracker) < 2:
            assert all(process.poll() is None for process in processes)
            time.sleep(0.2)
        yield tracker, processes[1:]
    finally:
        for process in processes:
            if process.poll() is None:
                kill(process)


def run(
    work_dir: Path, tracker: Tracker | None, trials: int, progress: Callable[[TaskResult, int], None]
) -> TuningReport:
    options = Options(trials=trials, cost_model="random", tracker=tracker)
    return tune([TOY], work_dir, TARGET, realize, options, progress=progress)


def test_servers_die_one_by_one_and_nothing_is_lost(
    tmp_path: Path, cluster: tuple[Tracker, list[subprocess.Popen[bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "TRIAL", Effort(2, 20))
    monkeypatch.setattr(measure, "FINAL", Effort(2, 5))
    tracker, processes = cluster
    with pytest.raises(HostError, match=rf"no server has the key 'nobody'; its servers have {KEY}; start one: python"):
        run(tmp_path / "none", Tracker(tracker.host, tracker.port, "nobody"), 8, lambda result, trials: None)
    with pytest.raises(HostError, match=r"server of tracker .*: RuntimeError: . threads?, expected 3; .*=3"):
        tune([TOY], tmp_path / "none", TARGET, realize, Options(trials=1, threads=3, tracker=tracker))

    def end(process: subprocess.Popen[bytes], after: int) -> Callable[[TaskResult, int], None]:
        def progress(result: TaskResult, trials: int) -> None:
            if result.trials == after and process.poll() is None:
                kill(process)

        return progress

    # The first server dies half way: the other one takes over what it was doing.
    report = run(tmp_path, tracker, 10, end(processes[0], 4))
    (task,) = report.tasks
    assert processes[0].poll() is not None
    assert (task.trials, task.failures, report.complaint) == (10, 0, None)
    assert task.before is not None
    assert servers(tracker) == 1

    # The second dies too: a line that says so, and what was measured until then is kept.
    held = read_log(tmp_path).records
    with pytest.raises(HostError, match=f"no server has the key '{KEY}'; it has no servers"):
        run(tmp_path, tracker, 16, end(processes[1], 13))
    kept = read_log(tmp_path).records
    assert kept[: len(held)] == held
    assert len(kept) >= len(held) + 3
    assert all(record.error is None for record in kept)

    # Here, the rest.
    report = run(tmp_path, None, 16, lambda result, trials: None)
    assert (report.tasks[0].trials, report.tasks[0].failures) == (16, 0)
    log = read_log(tmp_path)
    assert log.notes == ()
    tried = [tuple(record.decisions.items()) for record in log.records if not record.default_seconds]
    assert len(set(tried)) == len(tried) == 16


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(None, "timed out"), (b"", "connection reset"), (b"HTTP/1.1 400 Bad Request", "what answers is no RPC tracker")],
    ids=["silent", "closed", "another"],
)
def test_what_is_no_tracker_is_one_line_at_once(
    monkeypatch: pytest.MonkeyPatch, answer: bytes | None, reason: str
) -> None:
    monkeypatch.setattr(rpc, "_ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4)
                connection.sendall(answer or b"")

        if answer is not None:
            threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(HostError) as caught:
            Tracker("127.0.0.1", port, KEY).require_servers()
    assert str(caught.value) == (
        f"tracker 127.0.0.1:{port}: does not answer ({reason}); "
        f"start one: python -m tvm.exec.rpc_tracker --host HOST --port {port}"
    )


def test_nobody_listening_is_one_line_and_makes_no_log(tmp_path: Path) -> None:
    tracker = Tracker("127.0.0.1", free_port(), KEY)
    with pytest.raises(HostError, match=r"does not answer \(Connection refused\)"):
        run(tmp_path / "log", tracker, 4, lambda result, trials: None)
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("address", ["", "host", "host:", ":9190", "host:port", "host:0", "host:65536", "host:-1"])
def test_addresses_that_are_none_are_refused(address: str) -> None:
    with pytest.raises(OptionError, match=r"--rpc-tracker: got .*; expected HOST:PORT; for example"):
        Tracker.parse(address, KEY)


def test_addresses_are_read() -> None:
    assert Tracker.parse("host.example:9190", KEY) == Tracker("host.example", 9190, KEY)
    assert Tracker.parse("[::1]:9190", KEY) == Tracker("::1", 9190, KEY)
