"""NVIDIA GPUs: which architectures machine code can be made for, and what each of them has.

A target is named by its architectures, ``cuda-sm_90``, or several of them in one file: ``cuda-sm_80+sm_90``. The code
is written for the lowest of them and compiled for each. The CPU beside the GPU only launches kernels, so that its part
is made for any x86-64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm_ternary.errors import OptionError
from tvm_ternary.target.base import Target

_HOST = {"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu", "mcpu": "x86-64"}
_PREFIX = "cuda-"


@dataclass(frozen=True)
class CudaArch:
    """What a kernel may count on.

    Parameters
    ----------
    shared_bytes : int
        Shared memory that one thread block can ask for (CUDA programming guide, table of compute capabilities).
    multiprocessors : int
        Of the named GPU.
    bandwidth : float
        Its memory's, bytes a second.
    int8_peak : float
        Its tensor cores' multiplications and additions of int8 a second, dense; of 16-bit floats half as many.
    example : str
        A GPU that people know; the figures are its maker's.
    """

    shared_bytes: int
    multiprocessors: int
    bandwidth: float
    int8_peak: float
    example: str


CUDA_ARCHS: dict[str, CudaArch] = {
    "sm_80": CudaArch(163 << 10, 108, 2.04e12, 624e12, "A100"),
    "sm_86": CudaArch(99 << 10, 82, 0.94e12, 284e12, "RTX 3090"),
    "sm_89": CudaArch(99 << 10, 128, 1.01e12, 661e12, "RTX 4090"),
    "sm_90": CudaArch(227 << 10, 132, 3.35e12, 1979e12, "H100"),
    "sm_100": CudaArch(227 << 10, 148, 8.0e12, 4500e12, "B200"),
    "sm_120": CudaArch(99 << 10, 170, 1.79e12, 838e12, "RTX 5090"),
}
"""Architectures with the tensor core instructions that the kernels use, oldest first."""


def cuda_names() -> tuple[str, ...]:
    """The named CUDA targets of one architecture."""
    return tuple(_PREFIX + arch for arch in CUDA_ARCHS)


def is_cuda_name(name: str) -> bool:
    """Whether a name is meant to be that of a CUDA target, right or wrong."""
    return name == "cuda" or name.startswith((_PREFIX, "nvidia", "sm_"))


def cuda_target(name: str) -> Target:
    """The target of a name such as ``cuda-sm_90`` or ``cuda-sm_80+sm_90``.

    Raises
    ------
    OptionError
        If an architecture does not exist, or none is named.
    """
    archs = name.removeprefix(_PREFIX).split("+") if name.startswith(_PREFIX) else []
    archs = [arch.removeprefix(_PREFIX) for arch in archs]
    unknown = [arch for arch in archs if arch not in CUDA_ARCHS]
    if unknown or not archs:
        problem = f"no such architecture: {', '.join(unknown)}" if unknown else "names no architecture"
        expected = ", ".join(f"{arch} ({facts.example})" for arch, facts in CUDA_ARCHS.items())
        raise OptionError(f"target {name}", f"{problem}; expected one of {expected}", "for example cuda-sm_90")
    return _target(sorted(set(archs), key=list(CUDA_ARCHS).index))


def cuda_from_dict(given: Mapping[str, Any]) -> Target:
    """The target of a TVM target dictionary of kind ``cuda``: its ``arch`` counts, and nothing else may be in it.

    Raises
    ------
    OptionError
        If there is no ``arch`` that exists, or another key.
    """
    extra = sorted(given.keys() - {"kind", "arch"})
    if extra:
        raise OptionError("target", f"holds {', '.join(extra)}; expected kind and arch alone for CUDA")
    return cuda_target(f"{_PREFIX}{given.get('arch', '')}")


def _target(archs: list[str]) -> Target:
    tvm = {
        "kind": "cuda",
        "arch": archs[0],
        "max_threads_per_block": 1024,
        "thread_warp_size": 32,
        "max_shared_memory_per_block": min(CUDA_ARCHS[arch].shared_bytes for arch in archs),
        "host": dict(_HOST),
    }
    return Target(_PREFIX + "+".join(archs), tvm, frozenset(), _PREFIX + archs[0], tuple(archs))
