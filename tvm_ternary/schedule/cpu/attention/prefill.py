"""Prefill with ternary keys: a tile of queries after the other over packed blocks, then the last keys in float."""

from __future__ import annotations

from tvm.sym import Analyzer
from tvm.tirx import PrimFunc, Stmt, Var

from tvm_ternary.kernels.attention import Attention
from tvm_ternary.kernels.ternary_keys import BLOCK
from tvm_ternary.schedule.cpu.attention.many import Extremes, Tile, over_tiles
from tvm_ternary.schedule.cpu.attention.many_packed import ManyPacked, PackedOperands
from tvm_ternary.schedule.cpu.attention.many_paired import ManyPaired
from tvm_ternary.schedule.cpu.attention.packed import Cache, Packed
from tvm_ternary.schedule.cpu.attention.values import PairedValues
from tvm_ternary.schedule.cpu.nest import index, scope, static
from tvm_ternary.schedule.cpu.simd import Simd
from tvm_ternary.schedule.cpu.vector_math import expand_vector_math


def attention_prefill(shape: Attention, packed: Packed, lengths: tuple[int | None, ...], simd: Simd) -> PrimFunc:
    """The scheduled function ``(q, key words ..., key_scale[, value words, value_scale], k, v[, mask], out)``.

    Parameters
    ----------
    shape : Attention
        ``key`` is where the elements of the last keys lie.
    packed : Packed
        With a dot product of bytes. Values are float; with one of pairs, those of blocks are given rounded, too.
    lengths : tuple of (int or None)
        Batch, queries, blocks of keys and last keys; None where it is known at run time.
    simd : Simd

    Returns
    -------
    PrimFunc
        Words (batch, kv heads, blocks, groups, words, 16) uint32, one array for each of `digits`; ``key_scale`` (batch,
        kv heads, blocks, size) float32. Rounded values are as `PairedValues` says. ``k`` has the last keys alone, ``v``
        and the mask all ``64 blocks + last`` of them. Rounding a query moves its scores by at most half a step, 1/254
        of its largest element times scale in the block, times the sum of the key's numbers without their signs;
        `many_paired` says what rounding weights and values does. An infinity among rounded values makes that element of
        a result NaN, as a NaN does.

    Raises
    ------
    ValueError
        There is no dot product.
    """
    if packed.dot is None:
        raise ValueError("prefill over packed keys multiplies bytes; expected the dot product of a tier, got None")
    names = ("batch", "queries", "blocks", "latest")
    batch, queries, blocks, latest = (
        Var(name, "int64") if given is None else index(given) for name, given in zip(names, lengths, strict=True)
    )
    keys = Analyzer().simplify(blocks * BLOCK + latest)
    on = PackedOperands(shape, simd, batch, queries, index(0), keys, blocks, latest)
    return over_packed(on, Cache(shape, packed, batch, blocks), PairedValues(shape, batch, blocks))


def over_packed(on: PackedOperands, cache: Cache, values: PairedValues) -> PrimFunc:
    """The function of `attention_prefill` for these operands."""
    shape, known, dot, pairs = on.shape, static(on.queries), cache.packed.dot, cache.packed.pairs
    assert dot is not None
    # A tile is made of whole vectors of all kinds.
    vectors = max(1 if known is not None and known <= on.lanes else 2, dot.lanes // on.lanes)
    if pairs is not None:
        vectors = max(vectors, pairs.lanes // on.lanes)
    width = vectors * on.lanes
    work = on.keys * (width * (shape.size + 4 * shape.value_size) // 16)

    def tile(at: Tile, extremes: Extremes | None) -> Stmt:
        if pairs is None:
            return ManyPacked(on, cache, dot, at, extremes).write()
        return ManyPaired(on, cache, dot, at, extremes, values, pairs).write()

    body = over_tiles(on, vectors, work, tile)
    rounded = values.params if pairs is not None else []
    masks = [on.mask] if shape.mask else []
    params = [on.q, *cache.keys, cache.key_scale, *rounded, on.k, on.v, *masks, on.out]
    function = PrimFunc(params, scope("root", body))
    function = function.with_attr("tirx.noalias", True).with_attr("tirx.is_scheduled", True)
    return expand_vector_math(function)
