"""The CUDA schedule of a ternary matmul: packed weights become a tensor core's operand in registers.

A block of threads makes a tile of rows and outputs, its warps share the outputs and K among them (`CudaVariant`). In
each step of 4 blocks of k (8 of bits) a thread takes 16 bytes of weights a plane, which become both halves of a tensor
core's left operand by shifts and masks (`device`, `operands`); activations are the right one. What a step needs is
copied asynchronously to shared memory some steps ahead, so that enough loads are under way to fill the memory's time
whatever the compiler makes of the rest. Weights, and the activations of a few rows, lie there for one thread alone,
which then waits for nobody; the activations of many rows are shared by the warps along N.

Where the weight has one scale a row, sums of a whole row stay in the tensor core's accumulators and are scaled once;
else each segment's sum is scaled and added in float32. Sums of warps along K are added in shared memory, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.matmul import EPILOGUES, PLAIN, Epilogue, MatmulKernel, emit_branches
from tvm_ternary.kernels.shape import MatmulShape, ceil_div
from tvm_ternary.schedule.cuda import device
from tvm_ternary.schedule.cuda.operands import Place, at, operands_of
from tvm_ternary.schedule.cuda.variant import CudaVariant

Expr = Any

WHOLE_K = 1 << 16
"""Up to this K, sums over a whole row are at most 127 * 127 * 2^16 < 2^31."""

SCHEDULED = "tirx.is_scheduled"


def matmul_function(
    kernel: MatmulKernel,
    shape: MatmulShape,
    variants: Sequence[CudaVariant],
    *,
    rows: int | None = None,
    epilogue: Epilogue = PLAIN,
) -> tirx.PrimFunc:
    """A scheduled ternary matmul for a GPU; with symbolic M, one that picks its kernel by M when it is launched.

    Parameters
    ----------
    kernel : MatmulKernel
        For 16, 8 or 1 bits of activations, packing ``fast``.
    shape : MatmulShape
    variants : sequence of CudaVariant
        In ascending order of the rows they serve.
    rows : int, optional
        M where it is known: then only the variant that serves it is built.
    epilogue : Epilogue

    Returns
    -------
    tirx.PrimFunc
        Of the parameters that `kernels.matmul.define_matmul` gives.
    """
    if rows is not None:
        variants = (next(v for v in variants if v.serves(rows)),)
    m = rows if rows is not None else tirx.Var("M", "int64")
    operands = [
        *((operand.name, operand.shape(shape, m), operand.dtype) for operand in kernel.operands(shape)),
        *([("bias", (shape.n,), "float32")] if epilogue.bias else []),
        *([("residual", (m, shape.n), "float32")] if epilogue.residual else []),
        ("y", (m, shape.n), "float32"),
    ]
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("ternary_matmul")
        T.func_attr({"tirx.noalias": True, SCHEDULED: 1, "op_pattern": 8})
        buffers = {name: T.arg(name, T.buffer(extents, dtype)) for name, extents, dtype in operands}
        bodies = [_Kernel(kernel, shape, variant, m, buffers, epilogue) for variant in variants]
        branches = [(v.max_rows, body.emit) for v, body in zip(variants, bodies, strict=True)]
        if rows is None:
            # A grid must not be empty.
            with T.If(m > 0), T.Then():
                emit_branches(m, branches)
        elif rows:
            emit_branches(m, branches)
    return builder.get()


@contextmanager
def unrolled(extent: int) -> Iterator[Expr]:
    """A loop that the CUDA compiler unrolls; no loop where there is one iteration."""
    if extent == 1:
        yield 0
        return
    with T.unroll(0, extent, annotations={"pragma_unroll_explicit": tirx.const(0, "int32")}) as i:
        yield i


@contextmanager
def _when(condition: Expr | bool) -> Iterator[None]:
    """Do what follows if the condition holds, which may be known to."""
    if condition is True:
        yield
        return
    with T.If(condition), T.Then():
        yield


@dataclass(frozen=True)
class _Where:
    """Where in K an iteration of a warp is: unit, plane, segment, step of the segment; and whether there is such."""

    plane: Expr
    segment: Expr
    step: Expr
    there: Expr | bool


class _Kernel:
    """Emits one kernel; index arithmetic and the registers' layout live here.

    Sums: of the warp's ``r``-th 32 outputs, pair of outputs ``e``, eight rows ``j``, four values: (output 2 e, row 2 t),
    (2 e, 2 t + 1), (2 e + 1, 2 t), (2 e + 1, 2 t + 1).
    """

    def __init__(
        self,
        kernel: MatmulKernel,
        shape: MatmulShape,
        variant: CudaVariant,
        m: Expr,
        buffers: dict[str, Expr],
        epilogue: Epilogue,
    ) -> None:
        self.kernel, self.shape, self.variant, self.m, self.b = kernel, shape, variant, m, buffers
        self.epilogue, self.operands = epilogue, operands_of(kernel, shape)
        self.repeats, self.row_tiles = variant.columns // 32, variant.rows // 8
        self.sums = self.repeats * variant.rows
        block = kernel.block
        self.blocks = shape.segment_blocks(block)
        self.segments, self.splits = shape.segments(block), shape.splits(block)
        self.steps = ceil_div(self.blocks, self.operands.blocks)
        planes = shape.planes if self.operands.planes_apart else 1
        self.whole = shape.groups == 1 and planes == 1 and shape.padded_k(block) <= WHOLE_K
        self.units = self.segments * self.steps if self.whole else planes * self.segments
        self.unit_steps = 1 if self.whole else self.steps
        self.iterations = ceil_div(self.units, variant.warps_k) * self.unit_steps

    # --- the launch -----------------------------------------------------------------------------------------------

    def emit(self) -> None:
        v = self.variant
        tiles_m, tiles_n = (self.m + (v.rows - 1)) // v.rows, ceil_div(self.shape.n, v.columns * v.warps_n)
        launch = T.launch_thread
        with launch("blockIdx.x", tiles_m) as bx, launch("blockIdx.y", tiles_n) as by:
            with launch("threadIdx.x", v.threads) as thread:
                self.thread = thread
                self.lane, warp = thread % 32, thread // 32
                self.g, self.t = self.lane // 4, self.lane % 4
                self.warp_n, self.warp_k = warp % v.warps_n, warp // v.warps_n
                self.first_row, self.last_row = T.Cast("int32", bx) * v.rows, T.Cast("int32", self.m) - 1
                self.first_block = (T.Cast("int32", by) * v.warps_n + self.warp_n) * (2 * self.repeats)
                self._body()

    def _body(self) -> None:
        o, e = self.operands, self.sums
        self.acc = T.alloc_buffer((o.sums * e,), o.accumulator, scope="local")
        self.total = self.acc if self.whole else T.alloc_buffer((e,), "float32", scope="local")
        self.weights = T.alloc_buffer((4 * self.repeats * o.word_registers,), "uint32", scope="local")
        self.factors = T.alloc_buffer((max(1, self.repeats * self.shape.planes),), "uint32", scope="local")
        self.shared = T.alloc_buffer((max(16, self.shared_bytes),), "uint8", scope="shared.dyn")
        with unrolled(o.sums * e) as i:
            T.buffer_store(self.acc, o.zero(), [i])
        if not self.whole:
            with unrolled(e) as i:
                T.buffer_store(self.total, T.float32(0), [i])
        if self._has_factors and self.shape.groups == 1:
            self._load_factors(0)
        self._all_steps()
        self._finish()

    @property
    def _has_factors(self) -> bool:
        return "factor" in self.b

    @property
    def weight_bytes(self) -> int:
        """Shared memory of the weights of one stage."""
        return self.repeats * self.operands.words * 4 * self.variant.threads

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one stage: weights, then activations."""
        v, o = self.variant, self.operands
        if v.shared:
            return self.weight_bytes + v.warps_k * v.rows * o.row_bytes
        return self.weight_bytes + self.row_tiles * o.row_registers * 4 * v.threads

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block of threads."""
        v = self.variant
        exchanged = v.warps_k * v.warps_n * 32 * self.sums * 4 if v.warps_k > 1 else 0
        return max(v.stages * self.stage_bytes, exchanged)

    # --- places ---------------------------------------------------------------------------------------------------

    def _where(self, iteration: Expr, warp_k: Expr) -> _Where:
        """The place of an iteration; the last one's where there is none."""
        unit, inner = iteration // self.unit_steps * self.variant.warps_k + warp_k, iteration % self.unit_steps
        there = True if self.units % self.variant.warps_k == 0 else unit < self.units
        unit = unit if there is True else T.min(unit, self.units - 1)
        if self.whole:
            return _Where(0, unit // self.steps, unit % self.steps, there)
        return _Where(unit // self.segments, unit % self.segments, inner, there)

    def _n_block(self, r: Expr) -> Expr:
        """The block of 16 outputs that this thread's weights are of, the last one where there are no more."""
        return T.min(self.first_block + 2 * r + self.g // 4, self.shape.blocks - 1)

    def _n(self, r: Expr) -> Expr:
        """The first of the four outputs that this thread holds, beyond N perhaps."""
        return (self.first_block + 2 * r + self.g // 4) * LANES + self.g % 4 * 4

    def _column(self, r: Expr) -> Expr:
        """The same, of the scales, whose rows are padded to whole blocks."""
        return self._n_block(r) * LANES + self.g % 4 * 4

    def _row(self, index: Expr) -> Expr:
        """A row of this tile, the last one where there are no more."""
        return T.min(self.first_row + index, self.last_row)

    def _acc(self, r: Expr, e: Expr, j: Expr) -> Expr:
        return ((r * 2 + e) * self.row_tiles + j) * 4

    # --- copies ---------------------------------------------------------------------------------------------------

    def _copy(self, iteration: Expr, stage: Expr) -> None:
        """Begin to copy what an iteration needs to a stage of shared memory."""
        self._copy_weights(iteration, stage)
        if self.variant.shared:
            self._copy_shared_rows(iteration, stage)
        else:
            self._copy_own_rows(iteration, stage)

    def _own(self, stage: Expr, index: Expr, offset: int = 0) -> Expr:
        """Where this thread's ``index``-th 16 bytes lie in a stage, ``offset`` bytes behind its start."""
        return stage * self.stage_bytes + (offset + index * (16 * self.variant.threads)) + self.thread * 16

    def _copy_weights(self, iteration: Expr, stage: Expr) -> None:
        o, where = self.operands, self._where(iteration, self.warp_k)
        inner = where.step * o.blocks + self.t * (o.blocks // 4)
        with unrolled(self.repeats) as r:
            blocks = [self._clamped(inner + i) + where.segment * self.blocks for i in range(2)]
            place = Place(self._n_block(r), self.g % 4, blocks[0], blocks[1], where.plane)
            for i, source in enumerate(o.weight_addresses(self.b, place)):
                to = self._own(stage, r * (o.words // 4) + i)
                T.evaluate(device.copy_rows(16)(self.shared.data, to, source, 16))

    def _clamped(self, block: Expr) -> Expr:
        """A block of a segment, the last one where there are no more."""
        return block if self.blocks % self.operands.blocks == 0 else T.min(block, self.blocks - 1)

    def _piece(self, iteration: Expr, warp_k: Expr, piece: Expr) -> tuple[Expr, Expr | bool]:
        """A piece of a step's rows: which piece of the whole row, and whether there is one."""
        o, where = self.operands, self._where(iteration, warp_k)
        of_block = max(1, o.pieces // o.blocks)
        inner = where.step * o.blocks + piece // of_block
        there = where.there
        if self.blocks % o.blocks:
            within = inner < self.blocks
            there = within if there is True else T.And(there, within)
        block = self._clamped(inner) + where.segment * self.blocks
        return block * of_block + piece % of_block, there

    def _copy_own_rows(self, iteration: Expr, stage: Expr) -> None:
        """Activations that this thread alone multiplies."""
        o = self.operands
        mine = o.pieces // 4
        with unrolled(self.row_tiles) as j:
            for i in range(mine):
                of_row, there = self._piece(iteration, self.warp_k, self.t * mine + i)
                index, rest = divmod(i * o.piece_bytes, 16)
                to = self._own(stage, j * (o.row_registers // 4) + index, self.weight_bytes) + rest
                self._copy_piece(to, j * 8 + self.g, of_row, there)

    def _copy_shared_rows(self, iteration: Expr, stage: Expr) -> None:
        """Activations of all warps along K, spread over the threads."""
        o, v = self.operands, self.variant
        pieces = v.warps_k * v.rows * o.pieces
        with unrolled(ceil_div(pieces, v.threads)) as i:
            index = i * v.threads + self.thread
            piece, row, warp_k = index % o.pieces, index // o.pieces % v.rows, index // (o.pieces * v.rows)
            with _when(index < pieces if pieces % v.threads else True):
                of_row, there = self._piece(iteration, warp_k, piece)
                self._copy_piece(self._shared_row(stage, warp_k, row) + o.piece_offset(row, piece), row, of_row, there)

    def _shared_row(self, stage: Expr, warp_k: Expr, row: Expr) -> Expr:
        """Where a row of the tile begins in a stage."""
        rows = self.variant.rows
        return stage * self.stage_bytes + self.weight_bytes + (warp_k * rows + row) * self.operands.row_bytes

    def _copy_piece(self, to: Expr, row: Expr, of_row: Expr, there: Expr | bool) -> None:
        o = self.operands
        size = o.piece_bytes if there is True else T.Select(there, o.piece_bytes, 0)
        source = o.row_address(self.b, self._row(row), of_row)
        T.evaluate(device.copy_rows(o.piece_bytes)(self.shared.data, to, source, size))

    def _load_factors(self, group: Expr) -> None:
        """The planes' factors of this thread's outputs, four in a word."""
        with unrolled(self.repeats) as r:
            for p in range(self.shape.planes):
                factor = device.load_word(at(self.b["factor"], p, group, self._column(r)))
                T.buffer_store(self.factors, factor, [r * self.shape.planes + p])

    # --- steps ----------------------------------------------------------------------------------------------------

    def _all_steps(self) -> None:
        o, v = self.operands, self.variant
        packed = T.alloc_buffer((self.repeats * o.words,), "uint32", scope="local")
        rows = T.alloc_buffer((o.row_registers,), "uint32", scope="local")
        for stage in range(v.stages - 1):
            if stage < self.iterations:
                self._copy(tirx.const(stage, "int32"), stage)
            T.evaluate(device.commit_copies())
        with T.serial(0, self.iterations) as i:
            T.evaluate(device.wait_copies(v.stages - 2)())
            if v.shared:
                T.evaluate(T.tvm_storage_sync("shared"))
            # The stage that the iteration before this one has read is free.
            with T.If(i + (v.stages - 1) < self.iterations), T.Then():
                self._copy(i + (v.stages - 1), (i + (v.stages - 1)) % v.stages)
            T.evaluate(device.commit_copies())
            stage = i % v.stages
            for w in range(self.repeats * o.words // 4):
                T.evaluate(device.load_shared(at(packed, 4 * w), self.shared.data, self._own(stage, w)))
            self._multiply(i, stage, packed, rows)

    def _load_rows(self, rows: Expr, stage: Expr, j: Expr) -> None:
        """This thread's activations of eight rows, from shared memory."""
        o = self.operands
        if self.variant.shared:
            row = j * 8 + self.g
            start = self._shared_row(stage, self.warp_k, row)
            offsets = [start + offset for offset in o.shared_offsets(row, self.t)]
        else:
            count = o.row_registers // 4
            offsets = [self._own(stage, j * count + part, self.weight_bytes) for part in range(count)]
        for part, offset in enumerate(offsets):
            T.evaluate(device.load_shared(at(rows, 4 * part), self.shared.data, offset))
        o.prepare_rows(rows)

    def _multiply(self, iteration: Expr, stage: Expr, packed: Expr, rows: Expr) -> None:
        """Multiply a step, and scale the sums where a segment ends."""
        o, where = self.operands, self._where(iteration, self.warp_k)
        if self._has_factors and self.shape.groups > 1:
            self._load_factors(where.segment // self.splits)
        with unrolled(self.repeats) as r, unrolled(4) as index:
            o.decode(self.weights, index + 4 * r, packed, index, r * o.words, self._factors_of(r))
        with unrolled(self.row_tiles) as j:
            self._load_rows(rows, stage, j)
            with unrolled(self.repeats) as r, unrolled(2) as e:
                o.multiply(self.acc, self._acc(r, e, j), self.sums, self.weights, 2 * r + e, rows)
        if self.whole:
            return
        last = where.step == self.steps - 1 if self.steps > 1 else True
        with _when(last), _when(where.there):
            self._add_segment(where)

    def _factors_of(self, r: Expr) -> list[Expr]:
        return [self.factors[r * self.shape.planes + p] for p in range(self.shape.planes)] if self._has_factors else []

    def _add_segment(self, where: _Where) -> None:
        """Scale what a segment summed to, add it to the results, and start anew."""
        o = self.operands
        scale = T.alloc_buffer((4 * self.repeats,), "float32", scope="local")
        self._load_scale(scale, where.plane, where.segment // self.splits)
        with unrolled(self.row_tiles) as j, unrolled(2) as c:
            row = self._row(j * 8 + self.t * 2 + c)
            with unrolled(self.repeats) as r, unrolled(2) as e, unrolled(2) as h:
                index = self._acc(r, e, j) + 2 * h + c
                scaled = scale[r * 4 + 2 * e + h]
                term = o.term(self.b, self._dot(index), row, where.plane, where.segment, scaled)
                T.buffer_store(self.total, self.total[index] + term, [index])
                for apart in range(o.sums):
                    T.buffer_store(self.acc, o.zero(), [index + apart * self.sums])

    def _dot(self, index: Expr) -> Expr:
        return self.acc[index] if self.operands.sums == 1 else self.acc[index] - self.acc[index + self.sums]

    def _load_scale(self, to: Expr, plane: Expr, group: Expr) -> None:
        """The scales of this thread's outputs."""
        with unrolled(self.repeats) as r:
            prefix = (plane,) if len(self.b["scale"].shape) == 3 else ()
            T.evaluate(device.load_floats(at(to, r * 4), at(self.b["scale"], *prefix, group, self._column(r))))

    # --- results --------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Add up the warps along K, scale, and store."""
        v = self.variant
        scale = T.alloc_buffer((4 * self.repeats,), "float32", scope="local")
        if self.whole:
            if self.operands.sums > 1:
                with unrolled(self.sums) as i:
                    T.buffer_store(self.acc, self._dot(i), [i])
            self._load_scale(scale, 0, 0)
        if v.warps_k == 1:
            with unrolled(self.row_tiles) as j:
                self._store_rows(j, scale, lambda index: self.total[index])
            return
        self._exchange()
        rounds = ceil_div(self.row_tiles, v.warps_k)
        with unrolled(rounds) as i:
            j = i * v.warps_k + self.warp_k
            with _when(j < self.row_tiles if self.row_tiles % v.warps_k else True):
                self._store_rows(j, scale, self._sum_of_warps)

    @property
    def _kind(self) -> str:
        return "int" if self.whole and self.operands.accumulator == "int32" else "float"

    def _place(self, warp_k: Expr, index: Expr) -> Expr:
        """Where a thread's sum lies in shared memory, as a number of words."""
        return ((warp_k * self.variant.warps_n + self.warp_n) * self.sums + index) * 32 + self.lane

    def _exchange(self) -> None:
        put = device.put_int if self._kind == "int" else device.put_float
        # Others may still read the operands of their last step where sums are to lie.
        T.evaluate(device.wait_copies(0)())
        T.evaluate(T.tvm_storage_sync("shared"))
        with unrolled(self.sums) as i:
            T.evaluate(put(self.shared.data, self._place(self.warp_k, i), self.total[i]))
        T.evaluate(T.tvm_storage_sync("shared"))

    def _sum_of_warps(self, index: Expr) -> Expr:
        get = device.get_int if self._kind == "int" else device.get_float
        value = get(self.shared.data, self._place(0, index))
        for k in range(1, self.variant.warps_k):
            value = value + get(self.shared.data, self._place(k, index))
        return value

    def _store_rows(self, j: Expr, scale: Expr, value: Callable[[Expr], Expr]) -> None:
        """Finish and store this thread's results of eight rows: four outputs side by side of two rows."""
        four = T.alloc_buffer((4,), "float32", scope="local")
        x_sum = T.alloc_buffer((1,), "int32", scope="local")
        with unrolled(2) as c:
            index = self.first_row + j * 8 + self.t * 2 + c
            row = T.min(index, self.last_row)
            if self.whole and "x_sum" in self.b:
                T.buffer_store(x_sum, T.int32(0), [0])
                with T.serial(0, self.segments) as s:
                    T.buffer_store(x_sum, x_sum[0] + self.b["x_sum"][row, s], [0])
            with unrolled(self.repeats) as r:
                with unrolled(2) as e, unrolled(2) as h:
                    result = value(self._acc(r, e, j) + 2 * h + c)
                    if self.whole:
                        result = self.operands.whole(self.b, result, row, x_sum[0], scale[r * 4 + 2 * e + h])
                    T.buffer_store(four, self._finished(result, row, self._n(r) + 2 * e + h), [2 * e + h])
                with T.If(index <= self.last_row), T.Then():
                    self._store(four, row, self._n(r))

    def _finished(self, value: Expr, row: Expr, n: Expr) -> Expr:
        n = n if self.shape.n % LANES == 0 else T.min(n, self.shape.n - 1)
        if self.kernel.row_scale is not None:
            value = value * self.kernel.row_scale(self.b, row)
        if self.epilogue.bias:
            value = value + self.b["bias"][n]
        if self.epilogue.activation:
            value = EPILOGUES[self.epilogue.activation](value)
        if self.epilogue.residual:
            value = value + self.b["residual"][row, n]
        return value

    def _store(self, four: Expr, row: Expr, n: Expr) -> None:
        y, size = self.b["y"], self.shape.n
        if size % 4 == 0:
            with T.If(n < size), T.Then():
                T.evaluate(device.store_floats(at(y, row, n), *(four[i] for i in range(4))))
            return
        for i in range(4):
            with T.If(n + i < size), T.Then():
                T.buffer_store(y, four[i], [row, n + i])
