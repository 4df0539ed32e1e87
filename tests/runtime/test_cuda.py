"""Which GPUs run an artifact, and what is said where one does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tvm_ternary.errors import HostError
from tvm_ternary.runtime.cuda import RESERVE_BYTES, CudaFacts, Gpu, check_device, fits
from tvm_ternary.runtime.manifest import Manifest, TargetInfo, WeightsInfo

from .test_manifest import PLAIN

GIB = 1 << 30
H100 = Gpu(0, "H100", (9, 0), 80 * GIB, 70 * GIB)
T4 = Gpu(1, "T4", (7, 5), 16 * GIB)


def target(*archs: str, ptx: str | None = None, cuda: str = "13.0") -> TargetInfo:
    return TargetInfo("cuda", {}, (), "cuda", archs, ptx, cuda)


def manifest(made_for: TargetInfo, weights: int = 4 * GIB) -> Manifest:
    return replace(PLAIN, target=made_for, weights=WeightsInfo("ab", weights))


def host(*gpus: Gpu, version: tuple[int, int] = (13, 0)) -> CudaFacts:
    return CudaFacts(version=version, gpus=gpus)


def refused(facts: CudaFacts, made_for: TargetInfo, number: int = 0, weights: int = 4 * GIB) -> str:
    with pytest.raises(HostError) as caught:
        check_device(facts, manifest(made_for, weights), number, "model.so")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("made_for", "capabilities"),
    [
        (target("sm_80"), [(8, 0), (8, 6), (8, 9)]),
        (target("sm_86"), [(8, 6), (8, 9)]),
        (target("sm_80", "sm_90"), [(8, 0), (8, 6), (8, 9), (9, 0)]),
        (target("sm_90a"), [(9, 0)]),
        (target("sm_100"), [(10, 0), (10, 3)]),
        (target("sm_80", ptx="sm_80"), [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]),
        (target(ptx="sm_90"), [(9, 0), (10, 0), (10, 3), (12, 0)]),
        (target("sm_86", ptx="sm_90a"), [(8, 6), (8, 9), (9, 0)]),
    ],
    ids=str,
)
def test_what_fits(made_for: TargetInfo, capabilities: list[tuple[int, int]]) -> None:
    known = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
    assert [capability for capability in known if fits(made_for, capability)] == capabilities


def test_a_host_that_has_all() -> None:
    check_device(host(replace(T4, number=0), replace(H100, number=1)), manifest(target("sm_90")), 1, "model.so")
    # PTX for a GPU that is newer than the compiler, by a driver that knows it.
    newest = replace(H100, capability=(12, 1))
    check_device(host(newest, version=(13, 2)), manifest(target("sm_90", ptx="sm_90", cuda="13.1")), 0, "model.so")
    # Machine code runs on any driver of the same major version.
    check_device(host(H100), manifest(target("sm_90", cuda="13.1")), 0, "model.so")


def test_no_driver() -> None:
    assert refused(CudaFacts(library="libcuda.so.1: no such file"), target("sm_90"), 2) == (
        "device cuda:2: this host has no NVIDIA driver (libcuda.so.1: no such file); install the driver, or compile "
        "the model for a CPU"
    )


@pytest.mark.parametrize("initialization", [None, "CUDA_ERROR_NO_DEVICE"])
def test_no_gpu(initialization: str | None) -> None:
    facts = CudaFacts(version=(13, 0), initialization=initialization)
    assert refused(facts, target("sm_90")) == (
        "device cuda:0: the NVIDIA driver finds no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"
    )


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        ("CUDA_ERROR_NOT_INITIALIZED", ["does not start (CUDA_ERROR_NOT_INITIALIZED), as after a fork", "with spawn"]),
        ("CUDA_ERROR_SYSTEM_NOT_READY", ["does not start (CUDA_ERROR_SYSTEM_NOT_READY); check nvidia-smi"]),
    ],
)
def test_a_driver_that_does_not_start(error: str, parts: list[str]) -> None:
    message = refused(CudaFacts(version=(13, 0), initialization=error), target("sm_90"))
    assert [part for part in parts if part not in message] == []


def test_a_driver_that_is_too_old() -> None:
    expected = (
        "model.so: needs a driver for CUDA 13.0 or later; this host's knows CUDA 12.8; update the NVIDIA driver, or "
        "run on a host that has a later one"
    )
    assert refused(host(H100, version=(12, 8)), target("sm_90")) == expected
    # Known before the driver starts, which an old one may not do at all.
    unstarted = CudaFacts(version=(12, 8), initialization="CUDA_ERROR_UNKNOWN")
    assert refused(unstarted, target("sm_90")) == expected
    assert "needs a driver for CUDA 14.0" in refused(host(H100), target("sm_90", cuda="14.1"))
    assert "needs a driver for CUDA 13.1" in refused(host(H100), target("sm_80", ptx="sm_80", cuda="13.1"))


def test_a_number_that_is_not_there() -> None:
    assert refused(host(H100, T4), target("sm_90"), 2) == (
        "device cuda:2: no such GPU; this host has cuda:0 (H100, sm_90), cuda:1 (T4, sm_75); name one of these"
    )


def test_a_wrong_architecture() -> None:
    assert refused(host(H100), target("sm_80", "sm_86")) == (
        "model.so: has machine code for sm_80, sm_86; cuda:0 (H100, sm_90) runs none of it; compile the model with "
        "--target cuda-sm_90"
    )
    ada = replace(H100, name="Thor", capability=(8, 7))
    message = refused(host(ada), target("sm_90", ptx="sm_90"))
    assert "has machine code for sm_90 and PTX for sm_90 and later; cuda:0 (Thor, sm_87) runs none" in message
    assert message.endswith("compile the model with --target cuda-sm_86")
    later = replace(H100, capability=(13, 0))
    assert refused(host(later), target("sm_90")).endswith("compile the model with --target cuda-sm_120")
    assert refused(host(replace(T4, number=0)), target("sm_90")).endswith("; no target fits a GPU that old")
    assert "PTX for sm_90a; cuda" in refused(host(later), target(ptx="sm_90a"))


def test_two_gpus_of_different_architectures() -> None:
    a100 = Gpu(0, "A100", (8, 0), 80 * GIB, 70 * GIB)
    second, third = replace(H100, number=1, free_bytes=None), replace(H100, number=2, free_bytes=None)
    assert refused(host(a100, second, third), target("sm_90")).endswith(
        "; use --device cuda:1 or --device cuda:2, or compile the model with --target cuda-sm_80"
    )
    assert refused(host(replace(H100, number=0), T4), target("sm_90"), 1).endswith(
        "runs none of it; use --device cuda:0"
    )


def test_too_little_memory() -> None:
    needed = 4 * GIB + RESERVE_BYTES
    check_device(host(replace(H100, free_bytes=needed)), manifest(target("sm_90")), 0, "model.so")
    assert refused(host(replace(H100, free_bytes=needed - 1)), target("sm_90")) == (
        "model.so: needs 4352 MiB of GPU memory (weights 4096 MiB and 256 MiB to work in); cuda:0 (H100, sm_90) has "
        "4352 MiB free of 81920 MiB; free some, or use another GPU"
    )
