"""One scheduled function, compiled for this host in memory: for what is measured or called without a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm

from tvm_ternary.schedule.cpu.simd import Simd, simd_of
from tvm_ternary.schedule.lowering import TIR_PIPELINE
from tvm_ternary.target import Target, require_host


def build_kernel(schedule: Callable[[Simd], tvm.tirx.PrimFunc], target: Target) -> Callable[..., Any]:
    """Compile a function.

    Parameters
    ----------
    schedule : callable
        The target's vector unit -> the scheduled function.
    target : Target
        A CPU; one that this host can run.

    Returns
    -------
    callable
        Takes the function's arguments as tensors that begin at a multiple of 64 bytes, results last.

    Raises
    ------
    HostError
        If this host cannot run the target's code.
    """
    require_host(target, "leave target out to compile for this host")
    resolved = tvm.target.Target(target.tvm)
    function = schedule(simd_of(resolved)).with_attr("global_symbol", "main")
    module = tvm.IRModule({"main": function})
    compiled: Callable[..., Any] = tvm.compile(module, resolved, tir_pipeline=TIR_PIPELINE)["main"]
    return compiled
