"""What a target is, whatever the machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Target:
    """Where the code shall run.

    Parameters
    ----------
    name : str
        The name that gives this target again, ``llvm:...`` for one made from a dictionary.
    tvm : dict
        What `tvm.target.Target` takes.
    features : frozenset of str
        CPU features that the host must have, as in ``/proc/cpuinfo``.
    tier : str
        Which kernels and schedules fit: a key of `TIERS`, or ``cuda-`` and the lowest arch.
    archs : tuple of str
        GPU architectures that machine code is made for, ascending; empty for a CPU.
    """

    name: str
    tvm: dict[str, Any] = field(hash=False)
    features: frozenset[str]
    tier: str
    archs: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``: the device that a module runs on."""
        return "cuda" if self.archs else "cpu"

    @property
    def host_tvm(self) -> dict[str, Any]:
        """What `tvm.target.Target` takes for the code that runs on the CPU; for a CPU target all of it."""
        host: dict[str, Any] = self.tvm["host"] if self.archs else self.tvm
        return host

    @property
    def architecture(self) -> str:
        """``x86_64`` or ``aarch64``: of the CPU, or of the GPU's host."""
        return str(self.host_tvm["mtriple"]).partition("-")[0]
