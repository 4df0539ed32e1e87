"""How scheduled functions for a CPU are lowered: TVM's own passes, but for one where it has nothing to do.

A schedule of blocks leaves the buffers between them as large as what they are part of, and a pass shrinks them to what
is used at a time. Nests that are written out have buffers of the right size, and thousands of accesses that the pass
looks at one by one: it took a third of the time before code generation of a model with attention.
"""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import s_tir
from tvm.ir.transform import PassContext, Sequential, module_pass
from tvm.s_tir import SBlock
from tvm.tirx import PrimFunc
from tvm.tirx.compilation_pipeline import get_tir_pipeline, register_tir_pipeline

TIR_PIPELINE = "tvm_ternary"
"""What `tvm.compile` and `tvm.relax.build` take as ``tir_pipeline``."""

_SHRINK = s_tir.transform.CompactBufferAllocation


def _pipeline() -> tuple[tvm.transform.Pass, object, object]:
    default, host, device = get_tir_pipeline("default")

    @module_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def lower(module: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        outer = PassContext.current()
        module = _shrunk(module)
        context = PassContext(
            opt_level=outer.opt_level,
            required_pass=outer.required_pass,
            disabled_pass=[*(outer.disabled_pass or ()), str(_SHRINK().info.name)],
            instruments=outer.instruments,
            config=outer.config,
        )
        with context:
            return default(module)

    return lower, host, device


def _shrunk(module: tvm.IRModule) -> tvm.IRModule:
    """Shrink the buffers of functions with blocks that iterate; the passes before that one belong to it."""
    parts = {var: func for var, func in module.functions_items() if isinstance(func, PrimFunc) and _has_blocks(func)}
    passes = (
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerCrossThreadReduction(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.LiftThreadBinding(),
        s_tir.transform.ManifestSharedMemoryLocalStage(),
        _SHRINK(),
    )
    shrunk = Sequential(passes)(tvm.IRModule(parts))
    return tvm.IRModule(dict(module.functions_items()) | dict(shrunk.functions_items()), module.attrs)


def _has_blocks(function: PrimFunc) -> bool:
    found = tvm_ffi.structural_walk(function.body, (SBlock, _stop_at_axes))
    return found is not None


def _stop_at_axes(block: SBlock) -> tvm_ffi.VisitInterrupt | None:
    return tvm_ffi.VisitInterrupt(block) if len(block.iter_vars) else None


register_tir_pipeline(TIR_PIPELINE, _pipeline)
