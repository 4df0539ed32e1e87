"""Attention of a layer that remembers, one function: over what is in its cache and what is new, which then goes there.

New keys and values are read in float from where they lie, so that all queries of a call see each other's tokens in
float, whatever the mask says and however many there are; only then they go to the tail, and full blocks are packed. A
token that comes by itself sees what an earlier call has packed; one of a long prompt sees all of the prompt in float.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import IfThenElse, PrimFunc, Stmt, Var

from tvm_ternary.kernels.attention import WORD, Attention
from tvm_ternary.kernels.ternary_keys import BLOCK
from tvm_ternary.schedule.cpu.attention.append import appending
from tvm_ternary.schedule.cpu.attention.few import FEW, tile_rows
from tvm_ternary.schedule.cpu.attention.many import over_tiles
from tvm_ternary.schedule.cpu.attention.many_cached import ManyCached
from tvm_ternary.schedule.cpu.attention.operands import Operands, Run, tiles
from tvm_ternary.schedule.cpu.attention.packed import Cache, FewPacked, Packed
from tvm_ternary.schedule.cpu.nest import index, scope, sequence, space, static
from tvm_ternary.schedule.cpu.simd import Simd
from tvm_ternary.schedule.cpu.vector_math import expand_vector_math

TAIL = "bhld"
"""Layout of the last tokens."""


@dataclass(frozen=True)
class _Operands(Operands):
    """Keys and values that are new, and a mask of as many tokens as the longest sequence has with them."""

    seen: Expr

    @property
    def keys(self) -> Expr:
        return self.seen

    @cached_property
    def k(self) -> Var:
        return self._operand("k", self.shape.key, self.shape.kv_heads, self.new, self.shape.size)

    @cached_property
    def v(self) -> Var:
        return self._operand("v", self.shape.value, self.shape.kv_heads, self.new, self.shape.value_size)


def cached_attention(shape: Attention, packed: Packed, lengths: tuple[int | None, int | None], simd: Simd) -> PrimFunc:
    """The scheduled function of a layer and its cache, which is changed in place.

    ``(q, k, v[, mask], past, key words ..., key_scale, value words ..., value_scale, tail k, tail v, full, recent,
    out)``

    Parameters
    ----------
    shape : Attention
        ``key`` and ``value`` are where the elements of new tokens lie; those of the tail lie ``bhld``. There is no
        built-in order of tokens: a query sees what the mask lets it see, all there is without one.
    packed : Packed
    lengths : tuple of (int or None)
        Batch and queries, which are as many as new tokens; None where it is known at run time.
    simd : Simd

    Returns
    -------
    PrimFunc
        ``past`` (batch,) int32 and the cache as `append_tokens` takes them; whatever its blocks and room are, the
        window is a block less than the room. The mask's key axis, where it has one, counts the tokens of a sequence
        from its first, and has at least as many as any has in the end. A query that sees none gives zeros.

        NaN and infinities in keys and values go where the definition sends them, through a mask too; but blocks that
        it hides from all queries of a tile may not be read.
    """
    names = ("batch", "queries")
    batch, queries = (
        Var(n, "int64") if given is None else index(given) for n, given in zip(names, lengths, strict=True)
    )
    blocks, room = Var("blocks", "int64"), Var("room", "int64")
    keys = Var("words", "int64") * WORD if shape.hidden is not None else Var("keys", "int64")
    on = _Operands(shape, simd, batch, queries, index(0), queries, keys if "s" in shape.mask else index(1))
    tail_on = Operands(replace(shape, key=TAIL, value=TAIL), simd, batch, queries, index(0), room)
    cache = Cache(shape, packed, batch, blocks)
    past = tirx.decl_buffer([batch], "int32", "past")
    new = Run(on.k, on.v, shape.key, shape.value, index(0), queries)
    tail = Run(tail_on.k, tail_on.v, TAIL, TAIL, index(0), room)
    append = appending(cache, past, new, tail, on.lanes)

    def runs(at: Expr) -> tuple[Run, Run]:
        full, recent = cache.counts(at)
        return replace(tail, start=full * BLOCK, count=recent), replace(new, start=full * BLOCK + recent)

    body = sequence(append.cut(), _attend(on, cache, runs), append.append())
    masks = [on.mask] if shape.mask else []
    state = [*cache.packed_params, tail.k, tail.v, cache.full, cache.recent]
    function = PrimFunc([on.q, on.k, on.v, *masks, past, *state, on.out], scope("root", body))
    function = function.with_attr("tirx.noalias", True).with_attr("tirx.is_scheduled", True)
    return expand_vector_math(function)


def _attend(on: Operands, cache: Cache, runs: Callable[[Expr], tuple[Run, Run]]) -> Stmt:
    """Few queries or many."""
    known = static(on.queries)
    if known is not None:
        return _few(on, cache, runs) if known <= FEW else _many(on, cache, runs, 1 if known <= on.lanes else 2)
    return IfThenElse(on.queries <= FEW, _few(on, cache, runs), _many(on, cache, runs, 2))


def _few(on: Operands, cache: Cache, runs: Callable[[Expr], tuple[Run, Run]]) -> Stmt:
    rows = tile_rows(on)
    extents = [on.batch, index(on.shape.kv_heads), tiles(on.queries * on.shape.group, rows)]
    work = _typical_keys(on, cache) * (rows * (on.shape.size + on.shape.value_size) // 4)

    def tile(at: list[Expr]) -> Stmt:
        return FewPacked(on, cache, at[0], at[1], at[2] * rows, runs(at[0]), causal=False).write()

    return space(extents, work, tile)


def _many(on: Operands, cache: Cache, runs: Callable[[Expr], tuple[Run, Run]], vectors: int) -> Stmt:
    width = vectors * on.lanes
    work = _typical_keys(on, cache) * (width * (on.shape.size + on.shape.value_size) // 4)
    return over_tiles(
        on, vectors, work, lambda tile, extremes: ManyCached(on, cache, tile, extremes, runs(tile.batch)).write()
    )


def _typical_keys(on: Operands, cache: Cache) -> Expr:
    """Those of the first sequence, to tell whether threads pay."""
    full, recent = cache.counts(index(0))
    return full * BLOCK + recent + on.queries
