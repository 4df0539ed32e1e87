"""Named targets: CPUs by their instruction set (`cpu`), GPUs by their architecture (`cuda`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tvm_ternary.errors import OptionError
from tvm_ternary.target.base import Target
from tvm_ternary.target.cpu import TIERS, cpu_from_dict, cpu_names, cpu_target, host_features, native, require_host
from tvm_ternary.target.cuda import CUDA_ARCHS, cuda_from_dict, cuda_names, cuda_target, is_cuda_name

__all__ = [
    "CUDA_ARCHS",
    "TIERS",
    "Target",
    "host_features",
    "native",
    "require_host",
    "resolve",
    "target_names",
]


def target_names() -> tuple[str, ...]:
    """Names that `resolve` takes, ``native`` first; architectures of GPUs may also be joined by ``+``."""
    return ("native", *cpu_names(), *cuda_names())


def resolve(target: str | Mapping[str, Any] | Target) -> Target:
    """Give the target of a name, of a TVM target dictionary, or of such a dictionary as JSON text.

    Parameters
    ----------
    target : str or mapping or Target
        One of `target_names`. ``native`` becomes the best named CPU target that this host can run, under that target's
        own name. ``cuda-sm_80+sm_90`` holds machine code for both. A dictionary must have ``kind`` llvm or cuda. With
        llvm its ``mcpu`` must be a generic one, because the artifact has to state which CPU features it needs, and keys
        that are not about the instruction set are passed to TVM as they are; with cuda it holds ``arch``.

    Raises
    ------
    OptionError
        If there is no such target.
    HostError
        If ``native`` is asked for on a host that runs none of the named targets.
    """
    if isinstance(target, Target):
        return target
    if isinstance(target, Mapping):
        return _from_dict(target)
    if target.lstrip().startswith("{"):
        return _from_json(target)
    if is_cuda_name(target):
        return cuda_target(target)
    found = cpu_target(target)
    if found is None:
        expected = f"expected one of {', '.join(target_names())} or a TVM target dictionary"
        raise OptionError(f"target {target}", f"no such target; {expected}")
    return found


def _from_json(text: str) -> Target:
    try:
        return _from_dict(json.loads(text))
    except json.JSONDecodeError as error:
        raise OptionError(
            "target", f"starts as JSON but is none ({error})", 'example: {"kind": "llvm", "mcpu": "x86-64-v3"}'
        ) from error


def _from_dict(given: Mapping[str, Any]) -> Target:
    kinds = {"llvm": cpu_from_dict, "cuda": cuda_from_dict}
    if given.get("kind") not in kinds:
        raise OptionError("target", f"kind is {given.get('kind')!r}; expected {' or '.join(map(repr, kinds))}")
    return kinds[given["kind"]](given)
