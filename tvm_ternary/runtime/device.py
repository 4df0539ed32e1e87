"""Names of devices: ``cpu``, ``cuda``, ``cuda:1``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tvm_ternary.errors import HostError, OptionError
from tvm_ternary.runtime.manifest import TargetInfo

# As in DLPack.
_TYPES = {"cpu": 1, "cuda": 2}


@dataclass(frozen=True)
class Device:
    """Where a model runs.

    Parameters
    ----------
    kind : str
        ``cpu`` or ``cuda``.
    number : int
        Which of them; 0 for the CPU.
    """

    kind: str
    number: int = 0

    @property
    def dlpack_type(self) -> int:
        """The number of its kind in DLPack."""
        return _TYPES[self.kind]

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.number}"


def choose_device(name: str | None, target: TargetInfo, subject: str) -> Device:
    """Give the device of a name, or the one that an artifact is for.

    Parameters
    ----------
    name : str, optional
        ``cpu``, ``cuda`` (the first GPU) or ``cuda:N``. None: the CPU or the first GPU, as the artifact was compiled.
    target : TargetInfo
        What the artifact was compiled for.
    subject : str
        What an error calls the artifact.

    Raises
    ------
    OptionError
        If there is no such device.
    HostError
        If the artifact has no code for it.
    """
    if name is None:
        return Device(target.device)
    found = re.fullmatch(r"cpu|cuda(?::([0-9]{1,4}))?", name, re.ASCII)
    if found is None:
        raise OptionError(f"device {name!r}", "no such device; expected cpu, cuda or cuda:N")
    device = Device(name.partition(":")[0], int(found[1] or 0))
    if device.kind != target.device:
        other = "for a GPU, such as cuda-sm_90" if device.kind == "cuda" else "for a CPU, such as native"
        problem = f"is compiled for target {target.name}, which runs on {target.device}, not on {device}"
        raise HostError(subject, problem, f"leave the device out, or compile the model with a --target {other}")
    return device
