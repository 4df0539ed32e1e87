"""The CPU schedule of a ternary matmul, and one function that serves any number of rows.

Order of loops: tiles of out_features (parallel), tiles of rows, planes and groups, blocks of k; then, unrolled, the
rows and blocks of the tile, whose accumulators stay in registers because every index into them is a constant. The
packed weights of one tile are read once for each tile of rows and stay in the first-level cache between them; the
decoding of a block is shared by the rows of the tile, since the compiler sees the same load and shifts in each.
"""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from tvm_ternary.kernels.matmul import PLAIN, Epilogue, MatmulKernel, define_matmul
from tvm_ternary.kernels.shape import MatmulShape, Tile, Variant
from tvm_ternary.schedule.cpu.vector_math import expand_vector_math
from tvm_ternary.schedule.intrinsics import matmul_intrinsic

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
    intrinsic = matmul_intrinsic(kernel, tier)
    for index, variant in enumerate(variants):
        _schedule_variant(sch, str(index), variant.tile, intrinsic)
    # 8 is TVM's "opaque" pattern: nothing is fused into a function that is already scheduled.
    return expand_vector_math(sch.mod["main"]).with_attr(SCHEDULED, 1).with_attr("op_pattern", 8)


def _schedule_variant(sch: Schedule, suffix: str, tile: Tile, intrinsic: str) -> None:
    """Apply the schedule above to the blocks of one variant."""
    acc, total, y = (sch.get_sblock(name + suffix) for name in ("acc", "total", "y"))
    mo, mi, nb, lane, p, g = sch.get_loops(total)
    nbo, nbi = sch.split(nb, [None, tile.blocks])
    sch.reorder(nbo, mo, p, g, mi, nbi, lane)
    sch.parallel(nbo)
    sch.vectorize(lane)
    _unroll(sch, mi, nbi)
    sch.compute_at(acc, g, preserve_unit_loops=True)
    sch.reverse_compute_at(y, mo, preserve_unit_loops=True)
    _in_vectors(sch, y)

    _, rows, blocks, _, _, lanes, kb, *step = sch.get_loops(acc)[4:]
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
