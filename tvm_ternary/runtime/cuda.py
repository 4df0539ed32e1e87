"""Whether a GPU can run an artifact: pure functions of what the driver said (`tvm_ternary.runtime.driver` asks it)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tvm_ternary.errors import HostError
from tvm_ternary.runtime.manifest import Manifest, TargetInfo
from tvm_ternary.target import CUDA_ARCHS

# The CUDA runtime library that TVM's is linked to. A driver that knows this version runs all of the same major.
RUNTIME_CUDA = (13, 0)
RESERVE_BYTES = 256 << 20
"""Memory that must be free beside the weights: for inputs, outputs and what lies between them."""

_NO_DEVICE = "CUDA_ERROR_NO_DEVICE"
_NOT_INITIALIZED = "CUDA_ERROR_NOT_INITIALIZED"


@dataclass(frozen=True)
class Gpu:
    """One GPU of this host.

    Parameters
    ----------
    number : int
        As in ``cuda:0``.
    name : str
    capability : (int, int)
        Its compute capability: (9, 0) for sm_90.
    total_bytes : int
        Its memory.
    free_bytes : int or None
        What of it is free, with a context of this process counted as used. None: not asked.
    """

    number: int
    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int | None = None

    @property
    def arch(self) -> str:
        """``sm_90``."""
        return "sm_{}{}".format(*self.capability)

    def __str__(self) -> str:
        return f"cuda:{self.number} ({self.name}, {self.arch})"


@dataclass(frozen=True)
class CudaFacts:
    """What the NVIDIA driver says about this host.

    Parameters
    ----------
    library : str or None
        Why the driver's library could not be loaded. None: it was.
    version : (int, int)
        The newest CUDA that the driver knows.
    initialization : str or None
        The error with which the driver refused to start, such as ``CUDA_ERROR_NO_DEVICE``. None: it started.
    gpus : tuple of Gpu
        In the order of their numbers.
    """

    library: str | None = None
    version: tuple[int, int] = (0, 0)
    initialization: str | None = None
    gpus: tuple[Gpu, ...] = ()


def check_device(facts: CudaFacts, manifest: Manifest, number: int, subject: str) -> None:
    """Check that a GPU can run an artifact, before anything of it runs.

    Parameters
    ----------
    facts : CudaFacts
    manifest : Manifest
        Of an artifact for CUDA.
    number : int
        Which GPU.
    subject : str
        What an error calls the artifact.

    Raises
    ------
    HostError
        If there is no driver, it is too old or does not start, there is no such GPU, there is no code for it, or too
        little of its memory is free.
    """
    target = manifest.target
    if facts.library is not None:
        problem = f"this host has no NVIDIA driver ({facts.library})"
        raise HostError(f"device cuda:{number}", problem, "install the driver, or compile the model for a CPU")
    _check_version(facts.version, max(RUNTIME_CUDA, (_version(target)[0], 0)), subject)
    _check_started(facts, number)
    found = [gpu for gpu in facts.gpus if gpu.number == number]
    if not found:
        there = ", ".join(map(str, facts.gpus))
        raise HostError(f"device cuda:{number}", f"no such GPU; this host has {there}", "name one of these")
    gpu = found[0]
    if not fits(target, gpu.capability):
        raise HostError(subject, _wrong_arch(target, gpu), _where_it_fits(target, gpu, facts.gpus))
    if not _fits_machine_code(target, gpu.capability):
        # The driver compiles PTX, and knows only what came out before it, minor versions counted.
        _check_version(facts.version, _version(target), subject)
    _check_memory(gpu, manifest.weights.bytes, subject)


def fits(target: TargetInfo, capability: tuple[int, int]) -> bool:
    """Whether there is code that a GPU of this compute capability runs.

    Machine code runs on the same major and an equal or higher minor number, PTX on the same and all later capabilities;
    an ``a`` after the number ties either to exactly this capability.
    """
    if _fits_machine_code(target, capability):
        return True
    if target.ptx is None:
        return False
    return _capability(target.ptx) == capability if target.ptx.endswith("a") else _capability(target.ptx) <= capability


def _fits_machine_code(target: TargetInfo, capability: tuple[int, int]) -> bool:
    major, minor = capability
    return any(
        (major, minor) == _capability(arch)
        or (not arch.endswith("a") and _capability(arch)[0] == major and _capability(arch)[1] <= minor)
        for arch in target.archs
    )


def _check_version(driver: tuple[int, int], needed: tuple[int, int], subject: str) -> None:
    if driver < needed:
        problem = "needs a driver for CUDA {}.{} or later".format(*needed)
        hint = "update the NVIDIA driver, or run on a host that has a later one"
        raise HostError(subject, problem + "; this host's knows CUDA {}.{}".format(*driver), hint)


def _check_started(facts: CudaFacts, number: int) -> None:
    subject, error = f"device cuda:{number}", facts.initialization
    if error == _NO_DEVICE or (error is None and not facts.gpus):
        raise HostError(subject, "the NVIDIA driver finds no GPU", "check nvidia-smi and CUDA_VISIBLE_DEVICES")
    if error == _NOT_INITIALIZED:
        problem = f"the NVIDIA driver does not start ({error}), as after a fork of a process that used it"
        raise HostError(subject, problem, "start the process with spawn instead of fork")
    if error is not None:
        raise HostError(subject, f"the NVIDIA driver does not start ({error})", "check nvidia-smi")


def _check_memory(gpu: Gpu, weights: int, subject: str) -> None:
    needed = weights + RESERVE_BYTES
    if gpu.free_bytes is None or gpu.free_bytes >= needed:
        return
    parts = f"weights {_mib(weights)} and {_mib(RESERVE_BYTES)} to work in"
    free = f"{gpu} has {_mib(gpu.free_bytes)} free of {_mib(gpu.total_bytes)}"
    raise HostError(subject, f"needs {_mib(needed)} of GPU memory ({parts}); {free}", "free some, or use another GPU")


def _wrong_arch(target: TargetInfo, gpu: Gpu) -> str:
    parts = [f"machine code for {', '.join(target.archs)}"] if target.archs else []
    if target.ptx is not None:
        parts.append(f"PTX for {target.ptx}{'' if target.ptx.endswith('a') else ' and later'}")
    return f"has {' and '.join(parts)}; {gpu} runs none of it"


def _where_it_fits(target: TargetInfo, gpu: Gpu, gpus: Sequence[Gpu]) -> str:
    others = [f"--device cuda:{other.number}" for other in gpus if fits(target, other.capability)]
    known = [arch for arch in CUDA_ARCHS if _capability(arch)[0] == gpu.capability[0]]
    usable = [arch for arch in known if _capability(arch) <= gpu.capability]
    compiled = f"compile the model with --target cuda-{usable[-1]}" if usable else None
    if compiled is None and gpu.capability > max(map(_capability, CUDA_ARCHS)):
        compiled = f"compile the model with --target cuda-{max(CUDA_ARCHS, key=_capability)}"
    use = f"use {' or '.join(others)}" if others else None
    return ", or ".join(part for part in (use, compiled) if part) or "no target fits a GPU that old"


def _capability(arch: str) -> tuple[int, int]:
    digits = re.sub("[^0-9]", "", arch)
    return int(digits[:-1]), int(digits[-1])


def _version(target: TargetInfo) -> tuple[int, int]:
    major, _, minor = (target.cuda or "0.0").partition(".")
    return int(major), int(minor)


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"
