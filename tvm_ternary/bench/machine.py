"""What a measurement is worth nothing without: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tvm_ternary.errors import HostError

_PACKAGES = (
    *("tvm-ternary", "apache-tvm", "apache-tvm-ffi", "numpy"),
    *("onnxruntime", "torch", "llama-cpp-python", "bnn-lab"),
)
_ROOT = Path(__file__).resolve().parents[2]
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def machine_facts() -> dict[str, Any]:
    """Processor, caches in bytes by level, system, versions of what takes part, and the commit of a git checkout.

    ``load`` is how many programs ran in the last minute: above zero, others share the processor.
    """
    return {
        "cpu": cpu_name(),
        "caches": {str(level): size for level, size in sorted(cache_sizes().items())},
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
        "commit": commit(_ROOT),
    }


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor as the kernel names it; where it does not, the architecture."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def cache_sizes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[int, int]:
    """Bytes of each level's data or unified cache, as the kernel describes them; empty where it does not."""
    sizes: dict[int, int] = {}
    for index in folder.glob("index*"):
        try:
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            sizes[int(level)] = int(size.rstrip("KMG")) * _UNITS.get(size[-1], 1)
    return sizes


def last_level_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the largest cache level.

    Raises
    ------
    HostError
        If the kernel does not say.
    """
    sizes = cache_sizes(folder)
    if not sizes:
        raise HostError(str(folder), "does not say how large the caches are", "measure without --cold")
    return max(sizes.values())


def commit(root: Path) -> str | None:
    """The checkout's commit, ``-dirty`` after it where files differ from it; None outside a checkout."""
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
