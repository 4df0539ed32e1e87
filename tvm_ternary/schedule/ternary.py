"""The CPU schedule of a ternary matmul, and one function that serves any number of rows.

Order of loops: tiles of out_features, tiles of rows, planes and segments, blocks of k; then, unrolled, the rows and
blocks of the tile, whose accumulators stay in registers because every index into them is a constant. The packed weights
of one tile are read once for each tile of rows; the decoding of a block is shared by the rows of the tile, since the
compiler sees the same load and shifts in each.

With a panel, segments come before tiles of rows: a segment of a tile's weights is decoded once, into bytes that stay in
the first-level cache while all tiles of rows are multiplied by it.
"""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from tvm_ternary.kernels.matmul import PLAIN, Epilogue, MatmulKernel, define_matmul
from tvm_ternary.kernels.shape import MatmulShape, Variant
from tvm_ternary.schedule.cpu.vector_math import expand_vector_math
from tvm_ternary.schedule.intrinsics import decode_intrinsic, matmul_intrinsic

SCHEDULED = "tirx.is_scheduled"
"""Attribute that tells TVM's later passes (dlight, databases) to leave a function alone."""


def matmul_function(
    kernel: MatmulKernel,
    shape: MatmulShape,
    variants: tuple[Variant, ...],
    tier: str,
    *,
    rows: int | None = None,
    epilogue: Epilogue = PLAIN,
) -> tirx.PrimFunc:
    """A scheduled ternary matmul; with symbolic M, one that picks its variant by M when it runs.

    Parameters
    ----------
    kernel : MatmulKernel
    shape : MatmulShape
    variants : tuple of Variant
        Tiles in ascending order of the rows they serve.
    tier : str
        ISA tier of the target.
    rows : int, optional
        M where it is known: then only the variant that serves it is built.
    epilogue : Epilogue
    """
    if rows is not None:
        variants = (next(v for v in variants if v.serves(rows)),)
    sch = Schedule(define_matmul(kernel, shape, variants, rows=rows, epilogue=epilogue))
    for index, variant in enumerate(variants):
        _schedule_variant(sch, str(index), variant, _intrinsics(kernel, shape, variant, tier))
    # 8 is TVM's "opaque" pattern: nothing is fused into a function that is already scheduled.
    return expand_vector_math(sch.mod["main"]).with_attr(SCHEDULED, 1).with_attr("op_pattern", 8)


def _intrinsics(kernel: MatmulKernel, shape: MatmulShape, variant: Variant, tier: str) -> tuple[str, str | None]:
    """What multiplies a block, and what decodes one where there is a panel."""
    if variant.panel and kernel.panel is not None:
        return matmul_intrinsic(kernel.panel.matmul(shape), tier), decode_intrinsic(kernel, shape.planes)
    return matmul_intrinsic(kernel, tier, ahead=variant.tile.rows == 1), None


def _schedule_variant(sch: Schedule, suffix: str, variant: Variant, intrinsics: tuple[str, str | None]) -> None:
    """Apply the schedule above to the blocks of one variant."""
    intrinsic, decode = intrinsics
    acc, total, y = (sch.get_sblock(name + suffix) for name in ("acc", "total", "y"))
    mo, mi, nb, lane, p, sg = sch.get_loops(total)
    nbo, nbi = sch.split(nb, [None, variant.tile.blocks])
    outer = (nbo, p, sg, mo) if variant.panel else (nbo, mo, p, sg)
    sch.reorder(*outer, mi, nbi, lane)
    if variant.threads == "n":
        sch.parallel(nbo)
    sch.vectorize(lane)
    _unroll(sch, mi, nbi)
    sch.compute_at(acc, outer[-1], preserve_unit_loops=True)
    sch.reverse_compute_at(y, nbo if variant.panel else mo, preserve_unit_loops=True)
    if decode is not None:
        panel = sch.get_sblock("panel" + suffix)
        sch.compute_at(panel, sg, preserve_unit_loops=True)
        sch.tensorize(sch.get_loops(panel)[-3], decode)
    _in_vectors(sch, y)

    rows, blocks, _, _, lanes, kb, *step = sch.get_loops(acc)[-6 - len(sch.get(acc).iter_vars) + 7 :]
    sch.reorder(kb, rows, blocks, lanes, *step)
    _unroll(sch, rows, blocks)
    _in_vectors(sch, sch.decompose_reduction(acc, kb))
    sch.tensorize(lanes, intrinsic)
    _in_vectors(sch, sch.decompose_reduction(total, p))


def _unroll(sch: Schedule, *loops: LoopRV) -> None:
    for loop in loops:
        sch.unroll(loop)


def _in_vectors(sch: Schedule, block: SBlockRV) -> None:
    """Schedule what is done once for each accumulator of a tile: a vector operation for each, no loop left."""
    *_, rows, blocks, lane = sch.get_loops(block)
    _unroll(sch, rows, blocks)
    sch.vectorize(lane)
