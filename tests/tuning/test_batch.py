"""Candidates that are exported, measured by a script on the emulated GPU, imported, and found by a compilation."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

from tests.cuda_emulator import fake_gpu, toolchain
from tvm_ternary.build.executable import cuda_source, kernels_as_source
from tvm_ternary.errors import HostError, OptionError
from tvm_ternary.runtime.cuda import CudaFacts, Gpu
from tvm_ternary.schedule.cuda.tasks import choose_cuda_variants, realize
from tvm_ternary.schedule.records import read_log
from tvm_ternary.target import resolve
from tvm_ternary.tuning.batch.export import export_candidates
from tvm_ternary.tuning.batch.gpu import find_gpu
from tvm_ternary.tuning.batch.measure import CANDIDATES, RESULTS, _difference, digest, read_rows
from tvm_ternary.tuning.batch.results import IMPORTS, import_results
from tvm_ternary.tuning.extract import linear_tasks
from tvm_ternary.tuning.task import decided_schedule
from tvm_ternary.tuning.tuner import Options

TARGET = resolve("cuda-sm_90")
(TASK,) = linear_tasks([(64, 256)], TARGET, [2], scheme="t2a8g64")
OPTIONS = Options(trials=2, cost_model="random")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two candidates of one task. Do not write there."""
    folder = tmp_path_factory.mktemp("batch") / "candidates"
    report = export_candidates([TASK], folder, TARGET, realize, OPTIONS)
    assert report.candidates == {"t2a8g64 64x256 m2": 2}
    assert report.errors == ()
    return folder


@pytest.fixture
def batch(exported: Path, tmp_path: Path) -> Path:
    """A copy."""
    folder = tmp_path / "batch"
    shutil.copytree(exported, folder)
    return folder


def decisions(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(row["decisions"][name] for name in TASK.space)


def results_of(batch: Path, *rows: dict[str, Any], **about: Any) -> Path:
    """Write what `measure.py` would have written."""
    header, _ = read_rows(batch / CANDIDATES)
    header |= {"candidates": digest(batch / CANDIDATES), "machine": "host", "device": "H100", **about}
    (batch / RESULTS).write_text("".join(json.dumps(row) + "\n" for row in (header, *rows)))
    return batch / RESULTS


@functools.cache
def kernels(candidates: tuple[tuple[str, tuple[int, ...]], ...]) -> str:
    """The CUDA source of candidates, (id, decisions) each."""
    functions = {
        name: realize(decided_schedule(TASK.workload(), TASK.space, chosen).mod)["main"].with_attr(
            "global_symbol", name
        )
        for name, chosen in candidates
    }
    with kernels_as_source():
        source = cuda_source(tvm.compile(tvm.IRModule(functions), tvm.target.Target(TARGET.tvm)))
    assert source is not None
    return source


def measure(
    batch: Path, *options: str, edit: Callable[[str], str] = str, **gpu: Any
) -> subprocess.CompletedProcess[str]:
    """Run the script where a driver tells of an H100 whose kernels are emulated; ``edit`` changes their source."""
    _, rows = read_rows(batch / CANDIDATES)
    source = kernels(tuple((row["id"], decisions(row)) for row in rows))
    settings = {"compute_capability": (9, 0), "checked": False, "name": "Emulated H100", **gpu}
    env = fake_gpu.environment(kernels=[edit(source)], **settings)
    env["TVM_TERNARY_CUDART"] = str(toolchain.fake_driver_folder() / "libcudart.so.13")
    # Of the folder alone: neither this package nor tvm is to be imported.
    env.pop("PYTHONPATH")
    quick = ("--rounds=2", "--milliseconds=0.1", "--sets=2")
    return run(batch, *quick, *options, env=env)


def run(batch: Path, *options: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(batch / "measure.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/", **settings)


def test_the_folder_says_what_the_candidates_are(exported: Path) -> None:
    header, rows = read_rows(exported / CANDIDATES)
    assert header["target"] == "cuda-sm_90"
    assert [row["id"] for row in rows] == ["t0_c0", "t0_c1"]
    assert rows[0]["decisions"] == dict(TASK.default)
    assert rows[1]["decisions"] != rows[0]["decisions"]
    assert all(TASK.fits(row["decisions"]) for row in rows)
    names = [given["name"] for given in rows[0]["inputs"]]
    assert names == ["x_q", "x_sum", "x_scale", "codes", "factor", "scale", "y"]
    assert {row["library"] for row in rows} == {"t0_c0.so"}
    assert not (exported / "python" / "tvm").exists()
    assert "python3 measure.py" in (exported / "README.txt").read_text()
    assert b"__global__" not in (exported / "t0_c0.so").read_bytes()


def test_measured_imported_and_used_by_a_compilation(batch: Path, tmp_path: Path) -> None:
    done = measure(batch)
    assert done.returncode == 0, done.stderr
    header, rows = read_rows(batch / RESULTS)
    assert (header["device"], header["candidates"]) == ("Emulated H100", digest(batch / CANDIDATES))
    assert [(row["id"], len(row["seconds"])) for row in rows] == [("t0_c0", 2), ("t0_c1", 2)]
    before = (batch / RESULTS).read_bytes()
    # All is measured: nothing is run again.
    assert measure(batch).returncode == 0
    assert (batch / RESULTS).read_bytes() == before

    report = import_results(batch / RESULTS, tmp_path / "log")
    assert (report.measured, report.complaint) == (3, None)
    assert json.loads((tmp_path / "log" / IMPORTS).read_text())[0]["device"] == "Emulated H100"
    log = read_log(tmp_path / "log", target="cuda-sm_90", name="mine")
    choice = choose_cuda_variants(8, TASK.shape, TARGET.tier, (log,), rows=2)
    assert choice.source == f"mine#{log.records[-1].tag}"
    best = TASK.variant(log.records[-1].decisions)
    assert choice.variants == (best,)


def beginning(name: str, statement: str) -> Callable[[str], str]:
    """Put a statement before all others of a kernel."""

    def edit(source: str) -> str:
        edited, count = re.subn(rf"(\b{name}_kernel\([^)]*\) {{\n)", rf"\1  {statement}\n", source)
        assert count == 1
        return edited

    return edit


@pytest.mark.parametrize(
    ("statement", "reason"),
    [("return;", "128 of 128 results are not finite"), ("__builtin_trap();", "ended its process (status -")],
    ids=["wrong", "crash"],
)
def test_a_candidate_that_fails_leaves_the_others_their_times(
    batch: Path, tmp_path: Path, statement: str, reason: str
) -> None:
    done = measure(batch, edit=beginning("t0_c1", statement))
    assert done.returncode == 0, done.stderr
    _, rows = read_rows(batch / RESULTS)
    results = {row["id"]: row for row in rows}
    assert len(results["t0_c0"]["seconds"]) == 2
    assert reason in results["t0_c1"]["error"]
    report = import_results(batch / RESULTS, tmp_path / "log")
    (task,) = report.tasks
    assert (task.trials, task.failures, task.gain) == (2, 1, 1.0)


def test_without_its_default_a_task_has_no_times(batch: Path) -> None:
    done = measure(batch, edit=beginning("t0_c0", "return;"))
    assert done.returncode == 0, done.stderr
    _, rows = read_rows(batch / RESULTS)
    reasons = {row["id"]: row["error"] for row in rows}
    assert reasons["t0_c0"] == "128 of 128 results are not finite"
    assert reasons["t0_c1"] == "its task's default schedule failed"


def test_results_are_compared_up_to_the_rounding_of_sums() -> None:
    one = np.array([[1.0, -8.0]], np.float32)
    assert _difference(one * np.float32(1 + 1e-6), one) is None
    assert _difference(one + np.float32(0.01), one) == "results differ by 0.01 of 8"


def test_where_there_is_no_gpu_it_says_so(exported: Path) -> None:
    done = run(exported)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: device cuda:0: this host has no NVIDIA driver \(.*\)\n", done.stderr)


def test_another_gpu_is_refused(batch: Path) -> None:
    done = measure(batch, compute_capability=(8, 0))
    assert done.returncode == 2
    assert done.stderr == "error: device cuda:0: is no sm_90; this host has cuda:0 (Emulated H100, sm_80)\n"
    assert measure(batch, "--device=1").returncode == 2


def test_results_of_another_gpu_are_not_gone_on_with(batch: Path) -> None:
    results_of(batch)
    done = measure(batch)
    assert done.returncode == 2
    assert "is of another run (machine host, device H100); move it away" in done.stderr


@pytest.mark.parametrize(
    ("facts", "part"),
    [
        (CudaFacts(library="no such file"), "this host has no NVIDIA driver (no such file)"),
        (CudaFacts(version=(12, 4)), "the NVIDIA driver knows CUDA 12.4; expected 13.0 or later"),
        (CudaFacts(version=(13, 0), initialization="CUDA_ERROR_NO_DEVICE"), "finds no GPU (CUDA_ERROR_NO_DEVICE)"),
    ],
)
def test_what_a_driver_may_lack(facts: CudaFacts, part: str) -> None:
    with pytest.raises(HostError, match=re.escape(part)):
        find_gpu(facts, "sm_90")


def test_the_gpu_of_a_number() -> None:
    gpus = tuple(Gpu(number, "a GPU", (major, 0), 1 << 30) for number, major in ((0, 8), (1, 9)))
    assert find_gpu(CudaFacts(version=(13, 0), gpus=gpus), "sm_90", 1) == gpus[1]


TIMES = ({"id": "t0_c0", "seconds": [3e-6, 4e-6]}, {"id": "t0_c1", "seconds": [1e-6, 2e-6]})


def test_importing_twice_adds_nothing(batch: Path, tmp_path: Path) -> None:
    file = results_of(batch, *TIMES)
    first = import_results(file, tmp_path / "log")
    assert first.measured == 3
    assert first.tasks[0].gain == pytest.approx(3.5 / 1.5)
    content = (tmp_path / "log" / "records.jsonl").read_bytes()
    assert import_results(file, tmp_path / "log").measured == 0
    assert (tmp_path / "log" / "records.jsonl").read_bytes() == content


@pytest.mark.parametrize(
    ("about", "rows", "part"),
    [
        ({"candidates": "00"}, TIMES, f"is of another {CANDIDATES}"),
        ({"target": "cuda-sm_80"}, TIMES, "is of target cuda-sm_80; candidates.jsonl beside it is of cuda-sm_90"),
        ({"tvm": "0.1"}, TIMES, "is of tvm 0.1; candidates.jsonl beside it is of"),
        ({"format": 2}, TIMES, "has format 2; expected 1"),
        ({}, ({"id": "t9_c9", "seconds": [1.0]},), "has results of t9_c9, which are no candidates"),
        ({}, ({"id": "t0_c0", "seconds": [0.0]},), "t0_c0 has seconds [0.0]; expected numbers above 0"),
    ],
)
def test_results_that_do_not_belong_are_refused(
    batch: Path, tmp_path: Path, about: dict[str, Any], rows: tuple[dict[str, Any], ...], part: str
) -> None:
    with pytest.raises(OptionError, match=re.escape(part)):
        import_results(results_of(batch, *rows, **about), tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_candidates_of_another_tvm_are_refused(batch: Path, tmp_path: Path) -> None:
    file = batch / CANDIDATES
    file.write_text(re.sub(r'"tvm": "[^"]*"', '"tvm": "0.1"', file.read_text(), count=1))
    with pytest.raises(OptionError, match=r"is of candidates of TVM 0\.1; this is .*export them anew"):
        import_results(results_of(batch, *TIMES), tmp_path / "log")


def test_results_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read"):
        import_results(tmp_path / "no.jsonl", tmp_path / "log")
    (tmp_path / RESULTS).write_text('{"format": 1}\n')
    with pytest.raises(OptionError, match=r"has no candidates\.jsonl beside it"):
        import_results(tmp_path / RESULTS, tmp_path / "log")


def test_a_later_export_goes_on_from_the_log(batch: Path, tmp_path: Path) -> None:
    import_results(results_of(batch, *TIMES), tmp_path / "log")
    options = Options(trials=3, cost_model="random")
    report = export_candidates([TASK], tmp_path / "next", TARGET, realize, options, work_dir=tmp_path / "log")
    _, old = read_rows(batch / CANDIDATES)
    _, new = read_rows(tmp_path / "next" / CANDIDATES)
    # The default, the best, and one that was not measured yet.
    assert report.candidates == {TASK.name: 3}
    assert [decisions(row) for row in new[:2]] == [decisions(row) for row in old]
    assert decisions(new[2]) not in {decisions(row) for row in old}


def test_where_candidates_cannot_be_exported(tmp_path: Path, exported: Path) -> None:
    with pytest.raises(OptionError, match="is not empty; expected a new folder"):
        export_candidates([TASK], exported, TARGET, realize, OPTIONS)
    with pytest.raises(OptionError, match="is for a CPU; candidates are exported for GPUs"):
        export_candidates([TASK], tmp_path / "cpu", resolve("x86-64-v3"), realize, OPTIONS)
    with pytest.raises(OptionError, match="got nothing to tune"):
        export_candidates([], tmp_path / "none", TARGET, realize, OPTIONS)
    assert list(tmp_path.iterdir()) == []
