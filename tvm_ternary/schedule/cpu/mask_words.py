"""Masks of booleans packed into words of bits, and computed on the way: no boolean is written.

The keys of a word are compared a vector at a time, to bytes in the first-level cache; a comparison of all 64 of them
then is the word.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Call, Expr
from tvm.script import tirx as T
from tvm.tirx import LT, BitwiseOr, BufferStore, Cast, IfThenElse, LShift, PrimFunc, Stmt, Var

from tvm_ternary.kernels.attention import WORD
from tvm_ternary.kernels.mask_words import NAME
from tvm_ternary.schedule.cpu.injective import map_stage
from tvm_ternary.schedule.cpu.nest import index, loop, scope, sequence, space, static, substitute, vector
from tvm_ternary.schedule.cpu.program import CHOICE, Program, Stage, cost, loads, uses
from tvm_ternary.schedule.cpu.simd import Simd

_RAGGED = 16
"""Lanes of the last word, where fewer than a vector go one by one."""


def schedule_mask_words(program: Program, simd: Simd) -> PrimFunc | None:
    """One row of words after another, and what could not be fused with them before and behind.

    Parameters
    ----------
    program : Program
    simd : Simd

    Returns
    -------
    PrimFunc or None
        None unless it has the stage of `kernels.mask_words.mask_words`, and all others are maps.
    """
    if not any(stage.name.startswith(NAME) for stage in program.stages):
        return None
    parts = []
    for stage in program.stages:
        words = None if stage.is_map else _Words.read(stage)
        if words is None and not stage.is_map:
            return None
        parts.append(map_stage(stage, simd, program.temporaries) if words is None else words.write(simd))
    return program.with_nest(sequence(parts), program.temporaries)


class _Words:
    """The stage that packs.

    Parameters
    ----------
    stage : Stage
    seen : Expr
        Whether the key of a word and bit is seen.
    keys : Expr
        How many there are.
    """

    def __init__(self, stage: Stage, seen: Expr, keys: Expr) -> None:
        self.stage, self.seen, self.keys = stage, seen, keys
        self.to, self.place = stage.body.buffer, list(stage.body.indices)
        self.word = self.place[-1] if isinstance(self.place[-1], Var) else None
        self.rows = [axis for axis in stage.spatial if self.word is None or not axis.var.same_as(self.word)]
        (self.bit,) = (axis.var for axis in stage.reduced)

    @staticmethod
    def read(stage: Stage) -> _Words | None:
        """The stage as its definition has it; None if it is something else."""
        if not stage.name.startswith(NAME) or len(stage.reduced) != 1 or not isinstance(stage.body, BufferStore):
            return None
        shifted = stage.body.value.b if isinstance(stage.body.value, BitwiseOr) else None
        chosen = shifted.a if isinstance(shifted, LShift) else None
        if not isinstance(chosen, Call) or chosen.op.name != CHOICE or not isinstance(chosen.args[0], LT):
            return None
        condition, seen, _ = chosen.args
        return _Words(stage, seen.value, condition.b) if isinstance(seen, Cast) else None

    def write(self, simd: Simd) -> Stmt:
        """All words."""
        lanes = self._lanes(simd)
        whole, rest = tirx.floordiv(self.keys, index(WORD)), tirx.floormod(self.keys, index(WORD))

        def row(at: list[Expr]) -> Stmt:
            known = {axis.var: i for axis, i in zip(self.rows, at, strict=True)}
            bytes_ = tirx.decl_buffer([index(WORD)], "bool", "bytes")

            def full(word: Expr) -> Stmt:
                return sequence(self._compare(bytes_, known, word, index(WORD), lanes), self._keep(bytes_, known, word))

            def ragged() -> Stmt:
                clear = vector(WORD, lambda lane: BufferStore(bytes_, tirx.const(0, "bool"), [lane]))
                compare = self._compare(bytes_, known, whole, rest, min(lanes, _RAGGED))
                return sequence(clear, compare, self._keep(bytes_, known, whole))

            words = loop(whole, full, name="word") if static(whole) != 0 else []
            last = [] if static(rest) == 0 else IfThenElse(rest > 0, ragged(), None)
            return scope("row", sequence(words, last), [bytes_])

        return space([axis.extent for axis in self.rows], self.keys * cost(self.seen), row)

    def _compare(self, bytes_: Var, known: dict[Var, Expr], word: Expr, count: Expr, lanes: int) -> Stmt:
        """Bytes for so many keys of a word."""

        def one(bit: Expr) -> Stmt:
            at = {**known, self.bit: bit, **({} if self.word is None else {self.word: word})}
            return BufferStore(bytes_, substitute(self.seen, at), [bit])

        whole = tirx.floordiv(count, index(lanes))
        parts = loop(whole, lambda n: vector(lanes, lambda lane: one(n * lanes + lane)), name="part")
        if static(count) == WORD:
            return parts
        return sequence(parts, loop(count - whole * lanes, lambda n: one(whole * lanes + n), name="rest"))

    def _keep(self, bytes_: Var, known: dict[Var, Expr], word: Expr) -> Stmt:
        bits = T.Cast(f"uint1x{WORD}", bytes_.vload([0], f"boolx{WORD}"))
        at = {**known, **({} if self.word is None else {self.word: word})}
        return BufferStore(self.to, T.reinterpret(bits, dtype="int64"), [substitute(i, at) for i in self.place])

    def _lanes(self, simd: Simd) -> int:
        """Keys that are compared at once: those of a vector of the widest elements of which each has its own."""
        moving = [str(load.source.dtype) for load in loads(self.seen) if uses(load, self.bit)]
        return min(simd.lanes(dtype) for dtype in (*moving, "bool" if moving else "int64"))
