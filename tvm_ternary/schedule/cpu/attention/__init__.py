"""Attention on a CPU: scores, softmax and the sum of values in one pass over the keys; no score leaves the cache.

Where there are many queries a vector lane is a query, so that softmax needs no sums across lanes, and keys and values
are read one element at a time, broadcast, from wherever they lie: nothing of them is transposed or copied. Where there
are few, as in a step of decoding, a lane is an element of a head, and four queries share what is read of the keys.

In a step the keys of the past are joined with the new ones while they are read (`join`).

Keys come in blocks. With the largest score m of all keys so far, the sum l of exp(s - m) and the sum o of
exp(s - m) v, a block whose largest score is m' turns them into exp(m - m'') l + ..., m'' the larger one; in the end
o / l is the result. A block of keys that the mask hides from all queries of a tile costs reading its mask, once for all
heads that share it.

References
----------
Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, algorithm 3.
Dao et al., "FlashAttention", NeurIPS 2022, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.sym import Analyzer
from tvm.tirx import IfThenElse, PrimFunc, Stmt, Var

from tvm_ternary.kernels.attention import Attention
from tvm_ternary.schedule.cpu.attention.few import FEW, Few, tile_rows
from tvm_ternary.schedule.cpu.attention.join import join_all
from tvm_ternary.schedule.cpu.attention.many import Many, over_tiles
from tvm_ternary.schedule.cpu.attention.operands import KEYS, Operands, tiles
from tvm_ternary.schedule.cpu.nest import index, scope, sequence, space, static
from tvm_ternary.schedule.cpu.simd import Simd
from tvm_ternary.schedule.cpu.vector_math import expand_vector_math

__all__ = ["FEW", "KEYS", "Lengths", "attention"]


Lengths = tuple[int | None, ...]
"""Batch, queries and keys, of joined ones past and new keys; None where it is known at run time."""


def attention(shape: Attention, lengths: Lengths, simd: Simd) -> PrimFunc:
    """The scheduled function ``(q, k, v[, mask], out)``; joined, ``(q, past_k, k, past_v, v[, mask], out, k, v)``.

    Parameters
    ----------
    shape : Attention
    lengths : tuple of (int or None)
    simd : Simd

    Returns
    -------
    PrimFunc
        All float32, a mask of bits int64. NaN and infinities go where the definition sends them; but of a block of keys
        may not be read what is behind the last that some query of a tile sees, nor a block that none sees.
    """
    names = ("batch", "queries", *(("past", "new") if shape.joined else ("keys",)))
    extents = [Var(n, "int64") if given is None else index(given) for n, given in zip(names, lengths, strict=True)]
    batch, queries, *past, new = extents
    on = Operands(shape, simd, batch, queries, past[0] if past else index(0), new)
    body = _joined(on) if shape.joined else _by_queries(on)
    function = PrimFunc(on.params, scope("root", body))
    function = function.with_attr("tirx.noalias", True).with_attr("tirx.is_scheduled", True)
    return expand_vector_math(function)


def _joined(on: Operands) -> Stmt:
    """On the way where one tile reads a head's keys; before, where several do."""
    rows = Analyzer().simplify(on.queries * on.shape.group)
    known = static(rows)
    if known is not None and known <= FEW:
        return _few(on, join=True)
    before = sequence(join_all(on), _by_queries(on))
    return before if known is not None else IfThenElse(rows <= FEW, _few(on, join=True), before)


def _by_queries(on: Operands) -> Stmt:
    """Few queries, one vector of them, or more."""
    choices: list[tuple[int, Callable[[Operands], Stmt]]] = [(FEW, _few), (on.lanes, lambda on: _many(on, 1))]
    known = static(on.queries)
    if known is not None:
        return next((write for most, write in choices if known <= most), lambda on: _many(on, 2))(on)
    result = _many(on, 2)
    for most, write in reversed(choices):
        result = IfThenElse(on.queries <= most, write(on), result)
    return result


def _many(on: Operands, vectors: int) -> Stmt:
    width = vectors * on.lanes
    work = on.keys * (width * (on.shape.size + on.shape.value_size) // 4)
    return over_tiles(on, vectors, work, lambda tile, extremes: Many(on, tile, extremes).write())


def _few(on: Operands, *, join: bool = False) -> Stmt:
    rows = tile_rows(on)
    # Few rows wait for memory: an element comes in the time of some operations, and where it is joined is written, too.
    work = on.keys * ((on.shape.size + on.shape.value_size) * max(rows // 4, 6 if join else 2))
    extents = [on.batch, index(on.shape.kv_heads), tiles(on.queries * on.shape.group, rows)]
    return space(extents, work, lambda at: Few(on, at[0], at[1], at[2] * rows, join=join).write())
