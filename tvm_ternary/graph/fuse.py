"""From relax operators to fused TensorIR: the passes between the model's graph and the CPU schedules."""

from __future__ import annotations

from tvm import tirx
from tvm.ir import IRModule
from tvm.ir.transform import Pass, PassContext, Sequential, module_pass
from tvm.relax import backend, transform
from tvm.target import Target
from tvm.tirx.analysis import undefined_vars

SCHEDULED = "tirx.is_scheduled"
OP_PATTERN = "op_pattern"
INJECTIVE, OPAQUE = 2, 8


def fuse_passes() -> list[Pass]:
    """The passes in the order they run; each can be run, and its result looked at, alone under a CPU target."""
    return [
        # Operators that exist only as compositions of others (attention, batch norm at inference) become those others.
        transform.DecomposeOpsForInference(),
        transform.CanonicalizeBindings(),
        # Two reshapes fused with each other would be a copy, which one alone is not.
        transform.RemoveRedundantReshape(),
        transform.EliminateCommonSubexpr(),
        # Sorting, scans and sampling have no legalization; left to the build they would never meet a schedule.
        backend.DispatchSampling(),
        backend.DispatchSortScan(),
        transform.LegalizeOps(),
        transform.FoldConstant(),
        transform.AnnotateTIROpPattern(),
        module_pass(_keep_apart, opt_level=0),
        transform.FuseOps(),
        transform.FuseTIR(),
        # A reshape left alone is a new view of the same memory, not a copy.
        transform.RewriteDataflowReshape(),
        transform.DeadCodeElimination(),
    ]


def lower_graph_ops(mod: IRModule) -> IRModule:
    """Turn every relax operator into a TensorIR function and fuse element-wise chains.

    Functions that carry ``tirx.is_scheduled`` are left as they are and nothing is fused into them.

    Parameters
    ----------
    mod : IRModule
        Relax functions, and PrimFuncs that some call by ``call_tir``.

    Returns
    -------
    IRModule
        The same with ``call_tir`` to PrimFuncs, and reshapes, only; those not yet scheduled are ready for
        ``schedule_module``.
    """
    # The choice of a sorting algorithm asks for a target; every CPU gets the same.
    with Target({"kind": "llvm"}):
        return Sequential(fuse_passes())(_shield_scheduled(mod))


def _keep_apart(mod: IRModule, _: PassContext) -> IRModule:
    """Let nothing be fused with a function of a number that no shape of it holds.

    ``FuseTIR`` gives such a number to the fused function twice where that has symbolic dimensions too, and fails.
    """
    apart = mod.clone()
    for var, func in mod.functions_items():
        if not isinstance(func, tirx.PrimFunc):
            continue
        tensors = [param for param in func.params if isinstance(param.ty, tirx.BufferType)]
        sizes = [name for tensor in tensors for dim in tensor.shape for name in undefined_vars(dim)]
        if any(param not in tensors and not any(param.same_as(name) for name in sizes) for param in func.params):
            apart[var] = func.with_attr(OP_PATTERN, OPAQUE)
    return apart


def _shield_scheduled(mod: IRModule) -> IRModule:
    shielded = mod.clone()
    for var, func in mod.functions_items():
        if isinstance(func, tirx.PrimFunc) and func.attrs.get(SCHEDULED, False):
            shielded[var] = func.with_attr(OP_PATTERN, OPAQUE)
    return shielded
