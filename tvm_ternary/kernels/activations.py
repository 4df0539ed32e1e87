"""What activations become before a ternary matmul: int8 rows, ternary rows as bit planes, or padded float rows.

One function a row format, for any M, vectorised by explicit 16-lane loops that any LLVM target compiles. A row is
written group by group, each padded with zeros to whole blocks of the packed weight, so that ragged groups and a ragged
K need no other code anywhere. A matrix row is quantized once: matmuls that read the same activations share the result,
because the calls are equal and the graph's common subexpressions are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.matmul import Expr
from tvm_ternary.kernels.shape import MatmulShape

SMALLEST_ABSMAX = 2.0**-100
"""Groups whose largest value is below this are scaled as if it were this: 127 / absmax stays finite."""

PARALLEL_ROWS = 8
"""From this many rows on, rows are spread over threads; below it, waking a thread costs more than a row."""

_BITS = 32


def int8_rows(shape: MatmulShape, block: int = LANES) -> tirx.PrimFunc:
    """Absmax quantization: x (M, K) float32 -> x_q (M, Kp) int8, x_sum (M, S) int32, x_scale (M, G) float32.

    A row has one scale for each group of the weight it is to meet, so one where the weight is scaled by channel. For a
    group: x_scale = absmax / 127, x_q = round-half-to-even(x * (127 / absmax)); x_sum holds the sum of each segment's
    x_q. The error of a value is at most x_scale / 2. NaN or infinity makes x_scale not finite, and so all of its
    group's results. Groups are padded to whole blocks of ``block`` k's.
    """
    with scheduled_function("quantize_rows_int8") as built:
        m, x = _rows_in(shape.k)
        x_q = T.arg("x_q", T.buffer((m, shape.padded_k(block)), "int8"))
        x_sum = T.arg("x_sum", T.buffer((m, shape.segments(block)), "int32"))
        x_scale = T.arg("x_scale", T.buffer((m, shape.groups), "float32"))

        def row(i: Expr) -> None:
            peaks = T.sblock_alloc_buffer((LANES,), "int32")
            inverse = T.sblock_alloc_buffer((1,), "float32")
            sums = T.sblock_alloc_buffer((LANES,), "int32")

            def group(g: Expr, size: int) -> None:
                start = g * shape.group_size
                # The bits of floats without a sign order like integers, and NaN is above infinity: a maximum of floats
                # would lose it.
                smallest = T.reinterpret("int32", T.float32(SMALLEST_ABSMAX))
                _fold(size, peaks, smallest, lambda k: T.reinterpret("int32", T.abs(x[i, start + k])), T.max)
                _across(peaks, T.max)
                absmax = T.reinterpret("float32", peaks[0])
                T.buffer_store(x_scale, absmax / T.float32(127), [i, g])
                T.buffer_store(inverse, T.float32(127) / absmax, [0])

                def segment(sg: Expr, first: Expr, count: int) -> None:
                    """Round ``count`` values from k = ``first`` of the group on."""
                    _fill(sums, T.int32(0))

                    def value(k: Expr, at: Expr, lane: Expr, width: int) -> None:
                        scaled = x[i, start + first + k] * _splat(inverse[0], width)
                        q = T.Cast(_lanes("int32", width), _round(scaled, width))
                        T.buffer_store(x_q, T.Cast(_lanes("int8", width), q), [i, at])
                        T.buffer_store(sums, sums[lane] + q, [lane])

                    width = shape.segment_blocks(block) * block
                    _blocks(sg * width, width, count, value, lambda at: T.buffer_store(x_q, T.int8(0), [i, at]))
                    _across(sums, lambda a, b: a + b)
                    T.buffer_store(x_sum, sums[0], [i, sg])

                _for_segments(shape, block, g, size, segment)

            _for_groups(shape, group)

        for_rows(m, row)
    return built()


def ternary_rows(shape: MatmulShape) -> tirx.PrimFunc:
    """Per-row ternarization: x (M, K) float32 -> x_bits (M, Kw, 2) uint32, nonzero and minus, x_scale (M,) float32.

    A value is zero where |x| <= mean|x| / 2, the threshold of BitNet b1.58's absmean rounding (Ma et al. 2024, eq.
    1-3); x_scale is the mean |x| of the others, which minimises the squared error for these trits (Li et al. 2016, eq.
    5). Where the sum of |x| is not finite, x_scale is NaN.
    """
    words = shape.padded_k(_BITS) // _BITS
    with scheduled_function("quantize_rows_ternary") as built:
        m, x = _rows_in(shape.k)
        x_bits = T.arg("x_bits", T.buffer((m, words, 2), "uint32"))
        x_scale = T.arg("x_scale", T.buffer((m,), "float32"))

        def row(i: Expr) -> None:
            sums = T.sblock_alloc_buffer((LANES,), "float32")
            counts = T.sblock_alloc_buffer((LANES,), "float32")
            limit = T.sblock_alloc_buffer((1,), "float32")
            zero = T.float32(0)
            _fold(shape.k, sums, zero, lambda k: T.abs(x[i, k]), lambda a, b: a + b)
            _across(sums, lambda a, b: a + b)
            T.buffer_store(limit, sums[0] / T.float32(2 * max(shape.k, 1)), [0])

            def kept(k: Expr, otherwise: Expr, value: Expr) -> Expr:
                return T.Select(T.abs(x[i, k]) > limit[0], value, otherwise)

            _fold(shape.k, sums, zero, lambda k: kept(k, zero, T.abs(x[i, k])), lambda a, b: a + b)
            _across(sums, lambda a, b: a + b)
            _fold(shape.k, counts, zero, lambda k: kept(k, zero, T.float32(1)), lambda a, b: a + b)
            _across(counts, lambda a, b: a + b)
            scale = sums[0] / T.max(counts[0], T.float32(1))
            # Against a limit that is NaN or infinite nothing was kept, and zeros would hide it.
            T.buffer_store(x_scale, T.Select(limit[0] <= T.max_value("float32"), scale, T.float32(float("nan"))), [i])
            _for_groups(shape, lambda g, size: _pack_words(shape, g, size, x, x_bits, i, limit[0]))

        for_rows(m, row)
    return built()


def padded_rows(shape: MatmulShape) -> tirx.PrimFunc:
    """x (M, K) float32 -> x (M, Kp) float32, each group padded with zeros to whole blocks of 16."""
    with scheduled_function("pad_rows") as built:
        m, x = _rows_in(shape.k)
        out = T.arg("x_padded", T.buffer((m, shape.padded_k(16)), "float32"))

        def group(i: Expr, g: Expr, size: int) -> None:
            width = shape.padded_k(LANES) // shape.groups
            _blocks(
                g * width,
                width,
                size,
                lambda k, at, lane, width: T.buffer_store(out, x[i, g * shape.group_size + k], [i, at]),
                lambda at: T.buffer_store(out, T.float32(0), [i, at]),
            )

        for_rows(m, lambda i: _for_groups(shape, lambda g, size: group(i, g, size)))
    return built()


@contextmanager
def scheduled_function(name: str) -> Iterator[Callable[[], tirx.PrimFunc]]:
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": 1, "op_pattern": 8})
        yield builder.get


def _rows_in(k: int) -> tuple[Expr, Expr]:
    m = tirx.Var("M", "int64")
    return m, T.arg("x", T.buffer((m, k), "float32"))


def for_rows(m: Expr, emit: Callable[[Expr], None]) -> None:
    """Run ``emit`` for each row, in parallel where there are enough of them."""

    def loop(make: Callable[..., Expr], name: str) -> None:
        with make(0, m) as i, T.sblock(name):
            row = T.axis.spatial(m, i)
            T.reads()
            T.writes()
            emit(row)

    with T.If(m < PARALLEL_ROWS):
        with T.Then():
            loop(T.serial, "row")
        with T.Else():
            loop(T.parallel, "row_parallel")


def _for_groups(shape: MatmulShape, emit: Callable[[Expr, int], None]) -> None:
    """Run ``emit(g, size)`` for each group; the last one, which K may cut short, by itself."""
    last = shape.k - (shape.groups - 1) * shape.group_size
    if shape.groups > 1:
        with T.serial(0, shape.groups - 1) as g:
            emit(g, shape.group_size)
    emit(tirx.const(shape.groups - 1, "int32"), last)


def _for_segments(shape: MatmulShape, block: int, g: Expr, size: int, emit: Callable[[Expr, Expr, int], None]) -> None:
    """Run ``emit(segment, its first k in the group, count)`` for each segment of a group of ``size`` values.

    Whole ones first, then the one that is cut short, then those that hold nothing.
    """
    splits, width = shape.splits(block), shape.segment_blocks(block) * block
    whole, rest = divmod(size, width)
    if splits == 1:
        emit(g, 0, size)
        return
    with T.serial(0, whole) as s:
        emit(g * splits + s, s * width, width)
    if rest:
        emit(g * splits + whole, whole * width, rest)
    with T.serial(whole + (1 if rest else 0), splits) as s:
        emit(g * splits + s, s * width, 0)


def _blocks(
    start: Expr,
    width: int,
    size: int,
    value: Callable[[Expr, Expr, Expr, int], None],
    zero: Callable[[Expr], None],
) -> None:
    """Visit ``width`` places from ``start`` on: ``value(k, place, lane, width)`` for ``size`` values, ``zero(place)``
    behind them.

    Sixteen at a time, then four, then one: ``value`` is told how many, and its indices are ramps of that width.
    """
    done = 0
    for step in (LANES, 4, 1):
        count = (size - done) // step
        if count:
            with T.serial(0, count) as b:
                k = done + b * step
                value(ramp(k, step), ramp(start + k, step), ramp(0, step), step)
        done += count * step
    if width > size:
        with T.serial(size, width) as k:
            zero(start + k)


def _fold(
    k: int, lanes: Expr, start: Expr, value: Callable[[Expr], Expr], combine: Callable[[Expr, Expr], Expr]
) -> None:
    """Fold ``value(k)`` over a row into sixteen lanes."""
    _fill(lanes, start)
    whole = k // LANES
    if whole:
        with T.serial(0, whole) as b, T.vectorized(0, LANES) as lane:
            T.buffer_store(lanes, combine(lanes[lane], value(b * LANES + lane)), [lane])
    if k % LANES:
        with T.serial(0, k % LANES) as lane:
            T.buffer_store(lanes, combine(lanes[lane], value(whole * LANES + lane)), [lane])


def _lanes(dtype: str, width: int) -> str:
    return dtype if width == 1 else f"{dtype}x{width}"


def ramp(start: Expr, width: int) -> Expr:
    return start if width == 1 else tirx.Ramp(start, 1, width)


def _splat(value: Expr, width: int) -> Expr:
    return value if width == 1 else T.broadcast(value, width)


def _round(value: Expr, width: int) -> Expr:
    """Round half to even; TVM's vectorizer would take its own ``nearbyint`` apart into sixteen calls."""
    if width == 1:
        return T.nearbyint(value)
    rint = T.llvm_lookup_intrinsic_id("llvm.rint")
    return T.call_llvm_pure_intrin(rint, value, dtype=f"float32x{width}")


def _fill(lanes: Expr, value: Expr) -> None:
    with T.vectorized(0, LANES) as lane:
        T.buffer_store(lanes, value, [lane])


def _across(lanes: Expr, combine: Callable[[Expr, Expr], Expr]) -> None:
    """Fold the lanes into lane 0, halves onto halves."""
    half = LANES // 2
    while half:
        for lane in range(half):
            T.buffer_store(lanes, combine(lanes[lane], lanes[lane + half]), [lane])
        half //= 2


def _pack_words(shape: MatmulShape, g: Expr, size: int, x: Expr, x_bits: Expr, i: Expr, limit: Expr) -> None:
    """The two planes of one group: 32 comparisons at a time become a word by an or across the lanes."""
    words, whole = shape.segment_blocks(_BITS), size // _BITS

    if whole:
        bits = T.shift_left(T.broadcast(T.uint32(1), _BITS), T.Cast(f"uint32x{_BITS}", tirx.Ramp(0, 1, _BITS)))
        none = T.broadcast(T.uint32(0), _BITS)
        reduce_or = T.llvm_lookup_intrinsic_id("llvm.vector.reduce.or.v32i32")
        with T.serial(0, whole) as w:
            values = x[i, tirx.Ramp(g * shape.group_size + w * _BITS, 1, _BITS)]
            for plane, magnitude in enumerate((T.abs(values), T.broadcast(T.float32(0), _BITS) - values)):
                chosen = T.Select(magnitude > T.broadcast(limit, _BITS), bits, none)
                word = T.call_llvm_pure_intrin(reduce_or, chosen, dtype="uint32")
                T.buffer_store(x_bits, word, [i, g * words + w, plane])
    with T.serial(whole, words) as w:
        for plane in range(2):
            T.buffer_store(x_bits, T.uint32(0), [i, g * words + w, plane])
    if size % _BITS:
        with T.serial(0, size % _BITS) as bit:
            one = T.shift_left(T.uint32(1), T.Cast("uint32", bit))
            value = x[i, g * shape.group_size + whole * _BITS + bit]
            for plane, magnitude in enumerate((T.abs(value), T.float32(0) - value)):
                at = [i, g * words + whole, plane]
                chosen = T.Select(magnitude > limit, one, T.uint32(0))
                T.buffer_store(x_bits, T.bitwise_or(x_bits[tuple(at)], chosen), at)


def reference_int8_rows(
    x: npt.NDArray[np.float32], shape: MatmulShape
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """What `int8_rows` computes, without the padding: x_q (M, K) and x_scale (M, G), equal to the bit."""
    x_q, scales = np.empty(x.shape, np.int8), np.empty((len(x), shape.groups), np.float32)
    for g in range(shape.groups):
        part = slice(g * shape.group_size, (g + 1) * shape.group_size)
        absmax = np.abs(x[:, part]).max(axis=1, initial=np.float32(SMALLEST_ABSMAX)).astype(np.float32)
        x_q[:, part] = np.rint(x[:, part] * (np.float32(127) / absmax)[:, None])
        scales[:, g] = absmax / np.float32(127)
    return x_q, scales


def reference_ternary_rows(x: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float64]]:
    """What `ternary_rows` computes, in float64 and without the packing: trits (M, K) and x_scale (M,)."""
    size = np.abs(x.astype(np.float64))
    kept = size > size.mean(axis=1, keepdims=True) / 2
    scale = np.where(kept, size, 0).sum(axis=1) / np.maximum(kept.sum(axis=1), 1)
    return (np.sign(x) * kept).astype(np.int8), scale
