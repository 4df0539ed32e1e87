"""Artifacts for GPUs, loaded and run on the tests' own driver and GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cuda_emulator import fake_gpu

from .conftest import ROOT

PRELUDE = """
import os, sys
import numpy as np
import tvm_ternary
from tests.cuda_emulator import fake_gpu
path = sys.argv[1]
x = np.random.default_rng(0).integers(-99, 99, 256).astype(np.float32)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where cuda_artifact.py has built model.so for sm_80 and sm_90, its weights, and model.cu."""
    made = tmp_path_factory.mktemp("cuda")
    command = [sys.executable, "-m", "tests.runtime.cuda_artifact", made, "cuda-sm_80+sm_90"]
    subprocess.run(command, check=True, cwd=ROOT, timeout=120)
    return made


def run(folder: Path, code: str, **settings: Any) -> str:
    settings = {"compute_capability": (9, 0), "kernels": [(folder / "model.cu").read_text()], **settings}
    return fake_gpu.python(PRELUDE + code, fake_gpu.environment(**settings), folder / "model.so").strip()


def refused(folder: Path, device: str = "cuda", **settings: Any) -> str:
    code = f"""
try:
    tvm_ternary.load(path, device={device!r})
except tvm_ternary.TernaryError as error:
    print(error)
"""
    return run(folder, code, **settings)


@pytest.mark.parametrize(("device", "chosen"), [(None, "cuda:0"), ("cuda:1", "cuda:1")])
def test_it_runs(folder: Path, device: str | None, chosen: str) -> None:
    code = f"""
module = tvm_ternary.load(path, device={device!r})
for given in (x, x[::-1]):
    y, same, factor = module.run(None, {{"x": given}})
    np.testing.assert_array_equal(y, given * factor + np.arange(256))
    np.testing.assert_array_equal(same, given)
    np.testing.assert_array_equal(factor, 3 + np.arange(256) % 5)
    assert y.flags.writeable and factor.flags.writeable
timing = module.time({{"x": x}}, 3)
print(module.device, module.threads, len(timing.runs), min(timing.runs) > 0, "tvm" in sys.modules)
"""
    assert run(folder, code, count=2) == f"{chosen} 1 3 True False"


def test_weights_are_uploaded_once(folder: Path) -> None:
    code = """
module = tvm_ternary.load(path)
first = fake_gpu.counters(["copies_to_device", "allocations"])
fake_gpu.reset_counters()
for _ in range(3):
    module.run(["y"], {"x": x})
print(first["copies_to_device"], fake_gpu.counters(["launches", "copies_to_device", "copies_from_device"]))
"""
    # The constant and the weight; then each time an input and the one output that is asked for.
    assert run(folder, code) == "2 {'launches': 3, 'copies_to_device': 3, 'copies_from_device': 3}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "device cuda:0: the NVIDIA driver finds no GPU; check nvidia-smi"),
        ({"driver": 12080}, "model.so: needs a driver for CUDA 13.0 or later; this host's knows CUDA 12.8"),
        ({"device": "cuda:3"}, "device cuda:3: no such GPU; this host has cuda:0 (Emulated GPU, sm_90); name one"),
        (
            {"compute_capability": (7, 5)},
            "model.so: has machine code for sm_80, sm_90 and PTX for sm_90 and later; cuda:0",
        ),
        ({"memory": 200 << 20}, "model.so: needs 256 MiB of GPU memory (weights 0 MiB and 256 MiB to work in); cuda:0"),
        ({"device": "cpu"}, "model.so: is compiled for target cuda-sm_80+sm_90, which runs on cuda, not on cpu"),
    ],
)
def test_a_host_that_cannot(folder: Path, settings: dict[str, Any], message: str) -> None:
    said = refused(folder, **settings)
    assert message in said
    assert "\n" not in said


def test_a_later_gpu_takes_the_ptx(folder: Path) -> None:
    code = 'print(tvm_ternary.load(path).run(["same"], {"x": x})[0].tolist() == x.tolist())'
    assert run(folder, code, compute_capability=(12, 0)) == "True"


def test_without_cuda_s_runtime_library(folder: Path) -> None:
    code = """
os.environ["TVM_TERNARY_CUDART"] = path + ".missing"
try:
    tvm_ternary.load(path)
except tvm_ternary.TernaryError as error:
    print(error)
"""
    assert run(folder, code).endswith("model.so.missing', which is no file; name a libcudart.so.13")


def test_after_a_fork(folder: Path) -> None:
    code = """
module = tvm_ternary.load(path)
if os.fork() == 0:
    try:
        module.run(None, {"x": x})
    except tvm_ternary.TernaryError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""
    assert run(folder, code) == (
        "device cuda:0: was used before this process was forked; CUDA does not work in the child; load the module in "
        "the child, started by spawn"
    )


def test_memory_that_runs_out_later(folder: Path) -> None:
    code = """
import tvm_ternary.runtime.cuda as checks
checks.RESERVE_BYTES = 0
try:
    tvm_ternary.load(path).run(None, {"x": x})
except tvm_ternary.TernaryError as error:
    print(error)
"""
    said = run(folder, code, memory=4096)
    assert said.startswith("device cuda:0: ran out of memory (")
    assert said.endswith("; use smaller inputs, or free some of its memory")


def test_without_a_driver(folder: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    code = """
import sys, tvm_ternary, tvm_ternary.runtime.driver as driver
driver.LIBRARY = "libno-such-driver.so.1"
try:
    tvm_ternary.load(sys.argv[1])
except tvm_ternary.TernaryError as error:
    print(error)
"""
    said = fake_gpu.python(code, {**environment, "PYTHONPATH": str(ROOT)}, folder / "model.so")
    assert said.startswith("device cuda:0: this host has no NVIDIA driver (libno-such-driver.so.1: cannot open")
    assert said.count("\n") == 1
