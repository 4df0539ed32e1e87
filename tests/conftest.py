"""What all tests share: reproducible property tests, the real models, and a guard against tests that never run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
MODELS = "TVM_TERNARY_MODELS"
EMULATOR_FOLDER = "TT_EMULATOR_FOLDER"
"""Names the folder where the emulator of GPUs is built, for all processes of a run: `tests.cuda_emulator.toolchain`."""

# Where two processes test on two cores, numpy's own threads wait for each other. Read when numpy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The same examples on every run, and no limit on the time of one: machines differ, and the first one may compile.
settings.register_profile("tvm-ternary", derandomize=True, deadline=None)
settings.load_profile("tvm-ternary")


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of the real models; each lies under the path that it has inside its wheel."""
    folder = Path(os.environ.get(MODELS) or ROOT / ".cache" / "models")
    if not any(folder.glob("**/*.onnx")):
        pytest.fail(f"no models in {folder}: run 'make setup', or name their folder in {MODELS}", pytrace=False)
    return folder


class _SkipGuard:
    """Fails a run in which a folder's tests were all skipped: green would then say nothing about that folder.

    Tests marked ``gpu`` do not count, because most machines have none.
    """

    def __init__(self) -> None:
        self.skipped: dict[Path, int] = defaultdict(int)
        self.ran: set[Path] = set()
        self.silent: list[Path] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.skipped[Path(report.nodeid).parent] += 1

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        folder = Path(report.nodeid.partition("::")[0]).parent
        if "gpu" in report.keywords:
            return
        if report.skipped:
            self.skipped[folder] += 1
        elif report.when == "call":
            self.ran.add(folder)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.silent = sorted(self.skipped.keys() - self.ran)
        if self.silent and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for folder in self.silent:
            count = self.skipped[folder]
            terminalreporter.write_line(
                f"FAILED {folder}: all of its tests were skipped ({count})", red=True, bold=True
            )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_SkipGuard())
    # Workers of xdist have it from the process that starts them.
    if EMULATOR_FOLDER not in os.environ:
        os.environ[EMULATOR_FOLDER] = folder = tempfile.mkdtemp(prefix="cuda-emulator-")

        def remove() -> None:
            del os.environ[EMULATOR_FOLDER]
            shutil.rmtree(folder, ignore_errors=True)

        config.add_cleanup(remove)
