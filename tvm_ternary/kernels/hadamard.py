"""Rotate rows by the Walsh-Hadamard transform in blocks: x (M, K) float32 -> y (M, K) float32.

A block is transformed where it lies in the first-level cache. The four shortest of its log2(block) butterflies stay
inside a vector, as shuffles; the longer ones are sums and differences of whole vectors, two butterflies at a time, so
that 4096 elements are loaded and stored five times and not twelve.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_ternary.formats import LANES
from tvm_ternary.kernels.activations import for_rows, ramp, scheduled_function
from tvm_ternary.kernels.matmul import Expr


def hadamard_rows(k: int, block: int) -> tirx.PrimFunc:
    """The scheduled function ``(x, y)`` for any number of rows; it computes `formats.hadamard.hadamard`.

    Parameters
    ----------
    k : int
        K. What is behind its last whole block is copied.
    block : int
        A power of two from 2 on.
    """
    lanes = min(LANES, block)
    whole = k - k % block
    with scheduled_function("hadamard_rows") as built:
        m = tirx.Var("M", "int64")
        x, y = (T.arg(name, T.buffer((m, k), "float32")) for name in ("x", "y"))

        def row(i: Expr) -> None:
            if whole:
                with T.serial(0, whole // block) as b:
                    _within_vectors(x, y, i, b * block, block, lanes)
                    _between_vectors(y, i, b * block, block, lanes)
            if whole < k:
                with T.serial(whole, k) as rest:
                    T.buffer_store(y, x[i, rest], [i, rest])

        for_rows(m, row)
    return built()


def _within_vectors(x: Expr, y: Expr, i: Expr, start: Expr, block: int, lanes: int) -> None:
    """The scale and the butterflies between lanes of a vector, from x to y."""
    with T.serial(0, block // lanes) as v:
        place = ramp(start + v * lanes, lanes)
        value = T.Bind(x[i, place] * T.broadcast(T.float32(block**-0.5), lanes))
        half = 1
        while half < lanes:
            value = T.Bind(_butterfly(value, half, lanes))
            half *= 2
        T.buffer_store(y, value, [i, place])


def _butterfly(value: Expr, half: int, lanes: int) -> Expr:
    """Lane l of the result is lane l ^ half plus lane l; minus it, where that bit of l is set."""
    places = [tirx.const(lane ^ half, "int32") for lane in range(lanes)]
    signs = [T.float32(-1 if lane & half else 1) for lane in range(lanes)]
    every = [tirx.const(lane, "int32") for lane in range(lanes)]
    return T.Shuffle([value], places) + value * T.Shuffle(signs, every)


def _between_vectors(y: Expr, i: Expr, start: Expr, block: int, lanes: int) -> None:
    """The butterflies between whole vectors, in place: of four vectors, and of two where one butterfly is left."""
    half = lanes
    while half < block:
        count = 4 if 2 * half < block else 2
        with T.serial(0, block // (count * half)) as part, T.serial(0, half // lanes) as v:
            first = start + part * (count * half) + v * lanes
            places = [ramp(first + n * half, lanes) for n in range(count)]
            for place, result in zip(places, _transform([T.Bind(y[i, place]) for place in places]), strict=True):
                T.buffer_store(y, result, [i, place])
        half *= count


def _transform(values: Sequence[Expr]) -> list[Expr]:
    """The transform of two or four values."""
    if len(values) == 2:
        a, b = values
        return [a + b, a - b]
    a, b, c, d = values
    low, high, left, right = T.Bind(a + b), T.Bind(c + d), T.Bind(a - b), T.Bind(c - d)
    return [low + high, left + right, low - high, left - right]
