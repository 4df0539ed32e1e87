"""Prefill with ternary keys: many queries over packed blocks of keys, then the last keys in float. Values are float.

A lane is a query. The scores of a block are products of whole numbers (`block_scores`). Keys that fill no block are no
part of it: they are given in float, as a cache keeps its last tokens, and their scores are those of `Many`.

Vector operations for a block of 64 keys, a tile of 32 queries and heads of 128, sixteen lanes:

=====================  ======  =======================================================================
byte dot products       4,096  64 keys x 32 words of four elements x 2; floats: 16,384 multiply-adds
rounding the queries    1,900  256 x (3 multiplications and additions, 2 for the maximum, 2.5 to merge)
unpacking                 400  128 x (shift, and, store)
softmax                 2,600  128 x (17 for exp and its sum, 3 for a score and the maximum)
values                 16,384  64 keys x 128 x 2 multiply-adds
=====================  ======  =======================================================================

With two multiply-adds or dot products a cycle and four operations in all, that is 8,192 cycles for values, 2,048 for
dot products and at least 1,200 for the rest: 0.68 of the 17,000 that floats take at least, and with keys that cost
nothing it would be 0.52.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt, Var

from tvm_ternary.kernels.ternary_keys import BLOCK
from tvm_ternary.schedule.cpu.attention.block_scores import BlockScores, ByteScores
from tvm_ternary.schedule.cpu.attention.many import Extremes, Many, Tile
from tvm_ternary.schedule.cpu.attention.operands import KEYS, Operands, place, tiles
from tvm_ternary.schedule.cpu.attention.packed import Cache
from tvm_ternary.schedule.cpu.attention.trit_scores import BitScores, TritScores
from tvm_ternary.schedule.cpu.nest import index, loop, scope, sequence, static
from tvm_ternary.schedule.intrinsics import ByteDot


@dataclass(frozen=True)
class PackedOperands(Operands):
    """Keys apart: ``packed`` blocks of them, and behind those ``latest`` in float."""

    packed: Expr
    latest: Expr

    @cached_property
    def k(self) -> Var:
        return self._operand("k", self.shape.key, self.shape.kv_heads, self.latest, self.shape.size)

    def key_at(self, batch: Expr, kv: Expr, key: Expr, d: Expr) -> Expr:
        return self.k[tuple(place(self.shape.key, batch, kv, key - self.packed * BLOCK, d))]


class ManyPacked(Many):
    """A tile of queries over packed blocks, then over the last keys."""

    reads_keys = False

    def __init__(self, on: PackedOperands, cache: Cache, dot: ByteDot, tile: Tile, extremes: Extremes | None) -> None:
        super().__init__(on, tile, extremes)
        self.packed_on, self.cache = on, cache
        self.block_scores = _scores(self, cache, dot)

    def write(self) -> Stmt:
        """All keys for this tile."""
        return scope("packed", super().write(), self.block_scores.buffers)

    def _over_keys(self) -> Stmt:
        blocks, latest = self.packed_on.packed, self.packed_on.latest

        def last(n: Expr) -> Stmt:
            return self._float_block(self.on, blocks * BLOCK + n * KEYS, tirx.min(index(KEYS), latest - n * KEYS))

        return sequence(
            loop(blocks, self._packed_block, name="packed"),
            [] if static(latest) == 0 else loop(tiles(latest, KEYS), last, name="block"),
        )

    def _packed_block(self, block: Expr) -> Stmt:
        scores = sequence(self._start_peak(), self.block_scores.write(block))
        return self._block(self.on, block * BLOCK, index(BLOCK), scores)


def _scores(many: Many, cache: Cache, dot: ByteDot) -> BlockScores:
    """What computes the scores of packed blocks as ``cache.packed`` says."""
    packed = cache.packed
    if not packed.trits:
        return ByteScores(many, cache, dot)
    return BitScores(many, cache) if packed.counts and packed.key_planes == 1 else TritScores(many, cache, dot)
