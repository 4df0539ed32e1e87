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
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tvm_ternary.kernels.matmul import EPILOGUES, PLAIN, Epilogue, MatmulKernel, declare_parameters, emit_branches
from tvm_ternary.kernels.shape import MatmulShape, ceil_div
from tvm_ternary.schedule.cuda import device
from tvm_ternary.schedule.cuda.copies import Copies
from tvm_ternary.schedule.cuda.cut import Cut
from tvm_ternary.schedule.cuda.operands import at
from tvm_ternary.schedule.cuda.places import Places, Where, unrolled, when
from tvm_ternary.schedule.cuda.variant import CudaVariant

Expr = Any

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
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("ternary_matmul")
        T.func_attr({"tirx.noalias": True, SCHEDULED: 1, "op_pattern": 8})
        buffers = declare_parameters(kernel, shape, m, epilogue)
        bodies = [_Kernel(kernel, shape, variant, m, buffers, epilogue) for variant in variants]
        branches = [(v.max_rows, body.emit) for v, body in zip(variants, bodies, strict=True)]
        with root_block(), any_rows(m):
            emit_branches(m, branches)
    return builder.get()


@contextmanager
def root_block() -> Iterator[None]:
    """What a function's body is in; TVM's passes over graphs look for it."""
    with T.sblock("root"):
        T.reads()
        T.writes()
        yield


@contextmanager
def any_rows(m: Expr) -> Iterator[None]:
    """What is done where there are rows at all: a grid must not be empty."""
    if isinstance(m, int):
        yield
        return
    with T.If(m > 0), T.Then():
        yield


class _Kernel:
    """Emits one kernel; index arithmetic and the registers' layout live here.

    Sums: of the warp's ``r``-th 32 outputs, pair of outputs ``e``, eight rows ``j``, four values: (output 2 e,
    row 2 t), (2 e, 2 t + 1), (2 e + 1, 2 t), (2 e + 1, 2 t + 1).
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
        self.epilogue, self.cut = epilogue, Cut(kernel, shape, variant)
        self.operands = self.cut.operands

    # --- the launch -----------------------------------------------------------------------------------------------

    def emit(self) -> None:
        v = self.variant
        tiles_m, tiles_n = (self.m + (v.rows - 1)) // v.rows, ceil_div(self.shape.n, v.columns * v.warps_n)
        grid = T.launch_thread("blockIdx.x", tiles_m), T.launch_thread("blockIdx.y", tiles_n)
        with grid[0] as bx, grid[1] as by, T.launch_thread("threadIdx.x", v.threads) as thread:
            self.at = Places(self.cut, self.m, bx, by, thread)
            self._body()

    def _body(self) -> None:
        o, e = self.operands, self.cut.sums
        self.acc = T.alloc_buffer((o.sums * e,), o.accumulator, scope="local")
        self.total = self.acc if self.cut.whole else T.alloc_buffer((e,), "float32", scope="local")
        self.weights = T.alloc_buffer((4 * self.cut.repeats * o.word_registers,), "uint32", scope="local")
        self.factors = T.alloc_buffer((max(1, self.cut.repeats * self.shape.planes),), "uint32", scope="local")
        self.shared = T.alloc_buffer((max(16, self.cut.shared_bytes),), "uint8", scope="shared.dyn")
        self.copies = Copies(self.at, self.b, self.shared)
        with unrolled(o.sums * e) as i:
            T.buffer_store(self.acc, o.zero(), [i])
        if not self.cut.whole:
            with unrolled(e) as i:
                T.buffer_store(self.total, T.float32(0), [i])
        if self.cut.has_factors and self.shape.groups == 1:
            self._load_factors(0)
        self._all_steps()
        self._finish()

    def _acc(self, r: Expr, e: Expr, j: Expr) -> Expr:
        return ((r * 2 + e) * self.cut.row_tiles + j) * 4

    def _load_factors(self, group: Expr) -> None:
        """The planes' factors of this thread's outputs, four in a word."""
        with unrolled(self.cut.repeats) as r:
            for p in range(self.shape.planes):
                factor = device.load_word(at(self.b["factor"], p, group, self.at.column(r)))
                T.buffer_store(self.factors, factor, [r * self.shape.planes + p])

    # --- steps ----------------------------------------------------------------------------------------------------

    def _all_steps(self) -> None:
        o, v = self.operands, self.variant
        packed = T.alloc_buffer((self.cut.repeats * o.words,), "uint32", scope="local")
        rows = T.alloc_buffer((o.row_registers,), "uint32", scope="local")
        for stage in range(v.stages - 1):
            if stage < self.cut.iterations:
                self.copies.step(tirx.const(stage, "int32"), stage)
            T.evaluate(device.commit_copies())
        with T.serial(0, self.cut.iterations) as i:
            T.evaluate(device.wait_copies(v.stages - 2)())
            if v.shared:
                T.evaluate(T.tvm_storage_sync("shared"))
            # The stage that the iteration before this one has read is free.
            with T.If(i + (v.stages - 1) < self.cut.iterations), T.Then():
                self.copies.step(i + (v.stages - 1), (i + (v.stages - 1)) % v.stages)
            T.evaluate(device.commit_copies())
            stage = i % v.stages
            for w in range(self.cut.repeats * o.words // 4):
                T.evaluate(device.load_shared(at(packed, 4 * w), self.shared.data, self.at.own(stage, w)))
            self._multiply(i, stage, packed, rows)

    def _load_rows(self, rows: Expr, stage: Expr, j: Expr) -> None:
        """This thread's activations of eight rows, from shared memory."""
        o = self.operands
        if self.variant.shared:
            row = j * 8 + self.at.g
            start = self.at.shared_row(stage, self.at.warp_k, row)
            offsets = [start + offset for offset in o.shared_offsets(row, self.at.t)]
        else:
            count = o.row_registers // 4
            start = self.cut.rows_start
            offsets = [self.at.own(stage, j * count + part, start) for part in range(count)]
        for part, offset in enumerate(offsets):
            T.evaluate(device.load_shared(at(rows, 4 * part), self.shared.data, offset))
        o.prepare_rows(rows)

    def _multiply(self, iteration: Expr, stage: Expr, packed: Expr, rows: Expr) -> None:
        """Multiply a step, and scale the sums where a segment ends."""
        o, where = self.operands, self.at.where(iteration, self.at.warp_k)
        if self.cut.changing_factors:
            with unrolled(self.cut.repeats * self.shape.planes) as i:
                T.buffer_store(self.factors, device.get_word(self.shared.data, self.at.own_factor(stage, i)), [i])
        with unrolled(self.cut.repeats) as r, unrolled(4) as index:
            o.decode(self.weights, index + 4 * r, packed, index, r * o.words, self._factors_of(r))
        with unrolled(self.cut.row_tiles) as j:
            self._load_rows(rows, stage, j)
            with unrolled(self.cut.repeats) as r, unrolled(2) as e:
                o.multiply(self.acc, self._acc(r, e, j), self.cut.sums, self.weights, 2 * r + e, rows)
        if self.cut.whole:
            return
        with when(self.at.ends(where)), when(where.there):
            self._add_segment(where, stage)

    def _factors_of(self, r: Expr) -> list[Expr]:
        return (
            [self.factors[r * self.shape.planes + p] for p in range(self.shape.planes)] if self.cut.has_factors else []
        )

    def _add_segment(self, where: Where, stage: Expr) -> None:
        """Scale what a segment summed to, add it to the results, and start anew."""
        o = self.operands
        scale = T.alloc_buffer((4 * self.cut.repeats,), "float32", scope="local")
        terms = T.alloc_buffer((4,), "uint32", scope="local")
        with unrolled(self.cut.repeats) as r:
            source = self.at.own(stage, r, self.cut.scales_start)
            T.evaluate(device.load_shared_floats(at(scale, r * 4), self.shared.data, source))
        with unrolled(self.cut.row_tiles) as j:
            if self.cut.shared_terms:
                source = self.at.terms(stage) + (self.at.warp_k * self.variant.rows + j * 8 + self.at.t * 2) * 8
                T.evaluate(device.load_shared(at(terms, 0), self.shared.data, source))
            with unrolled(2) as c:
                x_sum, x_scale = self._terms_of(terms, j, c, where)
                with unrolled(self.cut.repeats) as r, unrolled(2) as e, unrolled(2) as h:
                    index = self._acc(r, e, j) + 2 * h + c
                    term = o.term(self._dot(index), scale[r * 4 + 2 * e + h], x_sum, x_scale)
                    T.buffer_store(self.total, self.total[index] + term, [index])
                    for apart in range(o.sums):
                        T.buffer_store(self.acc, o.zero(), [index + apart * self.cut.sums])

    def _terms_of(self, terms: Expr, j: Expr, c: Expr, where: Where) -> tuple[Expr, Expr]:
        """Sum and scale of the activations of row 2 t + c of the ``j``-th eight, in a segment."""
        if "x_sum" not in self.b:
            return None, None
        if self.cut.shared_terms:
            return T.Cast("int32", terms[2 * c]), device.float_of(T.Cast("int32", terms[2 * c + 1]))
        row = self.at.row(j * 8 + self.at.t * 2 + c)
        return self.b["x_sum"][row, where.segment], self.b["x_scale"][row, where.segment // self.cut.splits]

    def _dot(self, index: Expr) -> Expr:
        return self.acc[index] if self.operands.sums == 1 else self.acc[index] - self.acc[index + self.cut.sums]

    # --- results --------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Add up the warps along K, scale, and store."""
        v = self.variant
        scale = T.alloc_buffer((4 * self.cut.repeats,), "float32", scope="local")
        if self.cut.whole:
            if self.operands.sums > 1:
                with unrolled(self.cut.sums) as i:
                    T.buffer_store(self.acc, self._dot(i), [i])
            with unrolled(self.cut.repeats) as r:
                source = at(self.b["scale"], *((0,) if self.cut.planes_scaled_apart else ()), 0, self.at.column(r))
                T.evaluate(device.load_floats(at(scale, r * 4), source))
        if v.warps_k == 1:
            with unrolled(self.cut.row_tiles) as j:
                self._store_rows(j, scale, lambda index: self.total[index])
            return
        self._exchange()
        rounds = ceil_div(self.cut.row_tiles, v.warps_k)
        with unrolled(rounds) as i:
            j = i * v.warps_k + self.at.warp_k
            with when(j < self.cut.row_tiles if self.cut.row_tiles % v.warps_k else True):
                self._store_rows(j, scale, self._sum_of_warps)

    @property
    def _kind(self) -> str:
        return "int" if self.cut.whole and self.operands.accumulator == "int32" else "float"

    def _place(self, warp_k: Expr, index: Expr) -> Expr:
        """Where a thread's sum lies in shared memory, as a number of words."""
        return ((warp_k * self.variant.warps_n + self.at.warp_n) * self.cut.sums + index) * 32 + self.at.lane

    def _exchange(self) -> None:
        put = device.put_int if self._kind == "int" else device.put_float
        # Others may still read the operands of their last step where sums are to lie.
        T.evaluate(device.wait_copies(0)())
        T.evaluate(T.tvm_storage_sync("shared"))
        with unrolled(self.cut.sums) as i:
            T.evaluate(put(self.shared.data, self._place(self.at.warp_k, i), self.total[i]))
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
            index = self.at.first_row + j * 8 + self.at.t * 2 + c
            row = T.Cast("int64", T.min(index, self.at.last_row))
            if self.cut.whole and "x_sum" in self.b:
                T.buffer_store(x_sum, T.int32(0), [0])
                with T.serial(0, self.cut.segments) as s:
                    T.buffer_store(x_sum, x_sum[0] + self.b["x_sum"][row, s], [0])
            with unrolled(self.cut.repeats) as r:
                with unrolled(2) as e, unrolled(2) as h:
                    result = value(self._acc(r, e, j) + 2 * h + c)
                    if self.cut.whole:
                        x_scale = self.b["x_scale"][row, 0] if "x_sum" in self.b else None
                        result = self.operands.term(result, scale[r * 4 + 2 * e + h], x_sum[0], x_scale)
                    T.buffer_store(four, self._finished(result, row, self.at.n(r) + 2 * e + h), [2 * e + h])
                with T.If(index <= self.at.last_row), T.Then():
                    self._store(four, row, self.at.n(r))

    def _finished(self, value: Expr, row: Expr, n: Expr) -> Expr:
        # The last block may reach beyond the outputs; what it finds there is not stored, but must not be read either.
        whole = self.shape.n % (self.variant.columns * self.variant.warps_n) == 0
        n = n if whole else T.min(n, self.shape.n - 1)
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
