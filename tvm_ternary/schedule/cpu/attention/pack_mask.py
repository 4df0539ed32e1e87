"""A mask of booleans becomes words of bits, as attention reads it."""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import BufferStore, IfThenElse, PrimFunc, Stmt, Var

from tvm_ternary.kernels.attention import WORD
from tvm_ternary.schedule.cpu.attention.operands import tiles
from tvm_ternary.schedule.cpu.nest import index, loop, scope, sequence, space


def pack_mask(extents: tuple[int | None, ...]) -> PrimFunc:
    """The scheduled function ``(seen, words)``.

    Parameters
    ----------
    extents : tuple of (int or None)
        Of batch, heads, queries and keys; None where it is known at run time.

    Returns
    -------
    PrimFunc
        ``seen`` of these extents, bool; ``words`` as `kernels.attention.pack_mask` gives them.
    """
    names = ("batch", "heads", "queries", "keys")
    *outer, keys = (
        Var(name, "int64") if given is None else index(given) for name, given in zip(names, extents, strict=True)
    )
    count = tiles(keys, WORD)
    seen = tirx.decl_buffer([*outer, keys], "bool", "seen")
    words = tirx.decl_buffer([*outer, count], "int64", "words")
    whole, rest = tirx.floordiv(keys, index(WORD)), tirx.floormod(keys, index(WORD))

    def bits(at: list[Expr], first: Expr) -> Expr:
        # One comparison of vectors: a boolean is a byte.
        lanes = T.Cast(f"uint1x{WORD}", seen.vload([*at, first], f"boolx{WORD}"))
        return T.reinterpret(lanes, dtype="uint64")

    def row(at: list[Expr]) -> Stmt:
        def keep(n: Expr, word: Expr) -> Stmt:
            return BufferStore(words, T.reinterpret(word, dtype="int64"), [*at, n])

        def add(bit: Expr) -> Stmt:
            one = tirx.shift_left(seen[(*at, bit)].astype("uint64"), bit.astype("uint64"))
            return BufferStore(short, short[0] | one, [0])

        short = tirx.decl_buffer([index(1)], "uint64", "short")
        start = BufferStore(short, tirx.const(0, "uint64"), [0])
        alone = scope("short", sequence(start, loop(rest, add, name="bit"), keep(index(0), short[0])), [short])
        # The last keys are the upper bits of the last 64.
        last = keep(whole, tirx.shift_right(bits(at, keys - WORD), (index(WORD) - rest).astype("uint64")))
        return sequence(
            loop(whole, lambda n: keep(n, bits(at, n * WORD)), name="word"),
            IfThenElse(rest > 0, IfThenElse(whole > 0, last, alone), None),
        )

    function = PrimFunc([seen, words], scope("root", space(outer, keys, row)))
    return function.with_attr("tirx.noalias", True).with_attr("tirx.is_scheduled", True)
