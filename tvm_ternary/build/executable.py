"""Compile a Relax module to an executable, the same one every time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.ir import TensorLoad


def build_executable(module: tvm.IRModule, target: Mapping[str, Any]) -> relax.VMExecutable:
    """Compile a module whose functions are scheduled, by TVM's own build pipeline.

    Parameters
    ----------
    module : tvm.IRModule
        Relax ``main`` and the TensorIR functions it calls.
    target : mapping
        What `tvm.target.Target` takes: `tvm_ternary.target.Target.tvm`.

    Returns
    -------
    tvm.relax.VMExecutable
    """
    default = relax.get_pipeline("default")
    tvm_target = tvm.target.Target(dict(target))
    return relax.build(module, tvm_target, relax_pipeline=lambda lowered: order_shape_stores(default(lowered)))


def order_shape_stores(module: tvm.IRModule) -> tvm.IRModule:
    """Put the stores of every function that computes shapes in the order of their indices.

    TVM's VMShapeLower writes them in the order of a hash of addresses, another one in every process, and with it the
    library's bytes would vary. The stores are independent, so their order is free.
    """
    updated = tvm.IRModule(module.functions, attrs=module.attrs)
    for name, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc) and "tirx.is_host_func" in (function.attrs or {}):
            updated.update_func(name, function.with_body(_ordered(function.body)))
    return updated


def _ordered(body: tirx.Stmt) -> tirx.Stmt:
    """Give the same stores by index, or the body itself where it is anything but independent stores to known places."""
    if not isinstance(body, tirx.SeqStmt) or not all(isinstance(part, tirx.BufferStore) for part in body.seq):
        return body
    loads: list[TensorLoad] = []
    tvm_ffi.structural_walk(body, (TensorLoad, loads.append))
    if not all(_is_constant(access) for access in (*body.seq, *loads)):
        return body
    by_index = {int(store.indices[0]): store for store in body.seq}
    if len(by_index) < len(body.seq) or by_index.keys() & {int(load.indices[0]) for load in loads}:
        return body
    return tirx.SeqStmt([by_index[index] for index in sorted(by_index)])


def _is_constant(access: tirx.BufferStore | TensorLoad) -> bool:
    return len(access.indices) == 1 and isinstance(access.indices[0], tirx.IntImm)
