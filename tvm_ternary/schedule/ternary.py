"""The CPU schedule of a ternary matmul, and one function that serves any number of rows.

Order of loops: tiles of out_features, tiles of rows, planes and segments, blocks of k; then, unrolled, the rows and
blocks of the tile, whose accumulators stay in registers because every index into them is a constant. The packed weights
of one tile are read once for each tile of rows; the decoding of a block is shared by the rows of the tile, since the
compiler sees the same load and shifts in each.

With a panel, segments come before tiles of rows: a segment of a tile's weights is decoded once, into bytes that stay in
the first-level cache while all tiles of rows are multiplied by it. By tile registers (AMX), where a variant says so.
"""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from tvm_ternary.kernels.codes import BLOCK
from tvm_ternary.kernels.matmul import PLAIN, Epilogue, MatmulKernel, define_matmul
from tvm_ternary.kernels.shape import MatmulShape, Variant
from tvm_ternary.schedule.cpu.vector_math import expand_vector_math
from tvm_ternary.schedule.intrinsics import decode_intrinsic, matmul_intrinsic
from tvm_ternary.schedule.intrinsics.amx import AmxIntrinsics, AmxTile, amx_intrinsics, with_tiles
from tvm_ternary.target import TIERS

_ACCUMULATORS = {512: 15, 256: 6, 128: 3}
"""Bits of a register to the vectors of sixteen that all planes of a tile may keep together: of 16 registers two or four
each; of 32 as many as TVM puts on the stack and not into a workspace, out of which LLVM does not always take them."""

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
        _schedule_variant(sch, str(index), kernel, shape, variant, tier)
    function = expand_vector_math(sch.mod["main"])
    if any(variant.tiles for variant in variants):
        function = with_tiles(function, _amx_tile(shape))
    # 8 is TVM's "opaque" pattern: nothing is fused into a function that is already scheduled.
    return function.with_attr(SCHEDULED, 1).with_attr("op_pattern", 8)


def _amx_tile(shape: MatmulShape) -> AmxTile:
    return AmxTile(shape.segment_blocks(BLOCK))


def _schedule_variant(
    sch: Schedule, suffix: str, kernel: MatmulKernel, shape: MatmulShape, variant: Variant, tier: str
) -> None:
    """Apply the schedule above to the blocks of one variant."""
    acc, total, y = (sch.get_sblock(name + suffix) for name in ("acc", "total", "y"))
    mo, mi, nb, lane, p, sg = sch.get_loops(total)
    nbo, nbi = sch.split(nb, [None, variant.tile.blocks])
    planes = [p] if _planes_side_by_side(shape, variant, tier) else []
    outer = (nbo, p, sg, mo) if variant.panel else (nbo, mo, sg) if planes else (nbo, mo, p, sg)
    sch.reorder(*outer, *planes, mi, nbi, lane)
    if variant.threads == "n":
        sch.parallel(nbo)
    sch.vectorize(lane)
    sch.compute_at(acc, outer[-1], preserve_unit_loops=True)
    sch.reverse_compute_at(y, nbo if variant.panel else mo, preserve_unit_loops=True)
    if variant.panel:
        panel = sch.get_sblock("panel" + suffix)
        sch.compute_at(panel, sg, preserve_unit_loops=True)
        sch.tensorize(sch.get_loops(panel)[-3], decode_intrinsic(kernel, shape.planes))
    if variant.tiles:
        _multiply_in_tiles(sch, acc, amx_intrinsics(_amx_tile(shape)))
        sch.vectorize(sch.get_loops(y)[-1])
        sch.vectorize(sch.get_loops(sch.decompose_reduction(total, p))[-1])
        return
    _unroll(sch, *planes, mi, nbi)
    _in_vectors(sch, y)
    multiplied = kernel.panel.matmul(shape) if variant.panel and kernel.panel else kernel
    ahead = variant.tile.rows == 1 and not variant.panel
    _multiply_in_registers(sch, acc, matmul_intrinsic(multiplied, tier, ahead=ahead), len(kernel.steps))
    _in_vectors(sch, sch.decompose_reduction(total, sg if planes else p))


def _planes_side_by_side(shape: MatmulShape, variant: Variant, tier: str) -> bool:
    """Whether a tile has registers for the accumulators of all planes: then they share what is read of the rows."""
    accumulators = variant.tile.rows * variant.tile.blocks * shape.planes
    return shape.planes > 1 and not variant.panel and accumulators <= _ACCUMULATORS[TIERS[tier].vector_bits]


def _multiply_in_registers(sch: Schedule, acc: SBlockRV, intrinsic: str, steps: int) -> None:
    """Accumulators of planes, rows and blocks side by side, their loops unrolled inside the one over blocks of k."""
    rows, blocks, planes, _, lanes, kb, *step = sch.get_loops(acc)[-6 - steps :]
    sch.reorder(kb, planes, rows, blocks, lanes, *step)
    _unroll(sch, planes, rows, blocks)
    *_, first, second, third, _, lane = sch.get_loops(sch.decompose_reduction(acc, kb))
    _unroll(sch, first, second, third)
    sch.vectorize(lane)
    sch.tensorize(lanes, intrinsic)


def _multiply_in_tiles(sch: Schedule, acc: SBlockRV, intrinsics: AmxIntrinsics) -> None:
    rows, blocks, p, sg, lanes, kb, s, j = sch.get_loops(acc)[-8:]
    sch.reorder(p, sg, rows, blocks, lanes, kb, s, j)
    zero = sch.decompose_reduction(acc, rows)
    sch.tensorize(sch.get_loops(zero)[-3], intrinsics.zero)
    sch.tensorize(rows, intrinsics.update)


def _unroll(sch: Schedule, *loops: LoopRV) -> None:
    for loop in loops:
        sch.unroll(loop)


def _in_vectors(sch: Schedule, block: SBlockRV) -> None:
    """Schedule what is done once for each accumulator of a tile: a vector operation for each, no loop left."""
    *_, rows, blocks, lane = sch.get_loops(block)
    _unroll(sch, rows, blocks)
    sch.vectorize(lane)
