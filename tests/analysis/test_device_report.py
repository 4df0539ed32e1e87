"""Tables of what an artifact asks of a GPU."""

from __future__ import annotations

from dataclasses import replace

from tvm_ternary.analysis.device_report import device_table, kernels_table
from tvm_ternary.runtime.manifest import KernelInfo, TargetInfo

from .test_report import MANIFEST, facts

GPU = replace(
    MANIFEST,
    target=TargetInfo("cuda-sm_80+sm_90", {}, (), "cuda", ("sm_80", "sm_90"), "sm_90", "13.0"),
    kernels=(KernelInfo("matmul_kernel", "sm_90", 128, 49152, 16, 8),),
    graph=True,
)


def test_a_cpu() -> None:
    assert facts(device_table(MANIFEST)) == {"runs on": "the CPU"}


def test_a_gpu() -> None:
    assert facts(device_table(GPU)) == {
        "runs on": "an NVIDIA GPU",
        "machine code for": "sm_80 sm_90",
        "PTX, for later GPUs": "of sm_90",
        "compiled by CUDA": "13.0",
        "a run is": "recorded as a CUDA graph at first",
    }
    without = replace(GPU, target=replace(GPU.target, ptx=None), graph=False)
    assert facts(device_table(without))["PTX, for later GPUs"] == "none"
    assert facts(device_table(without))["a run is"] == "a launch for each kernel"


def test_kernels() -> None:
    table = kernels_table(GPU)
    assert table.columns == ("GPU kernel", "arch", "registers", "shared bytes", "local bytes", "spilled bytes")
    assert table.rows == (("matmul_kernel", "sm_90", "128", "49152", "16", "8"),)
