"""Appending to a cache of ternary keys and values, in place: new tokens go to the tail, and a full block is packed.

A tail holds the last tokens in float. Once there are a window and a block of them, the oldest block is packed and the
others move to its place; so many tokens at once leave, bit for bit, what the same tokens leave that come one by one.

A sequence may be cut to its first tokens before. Packed blocks and the tail stay as they are where the cut is in the
tail or between two blocks. Within a block, its tokens up to there come back to the tail as what was packed of them.

For rotated keys (Ashkboos et al., "QuaRot", 2024) `kernels.hadamard.hadamard_rows` turns the heads of new keys before
they come here, and those of queries before a step: a head is a row, and scores stay what they are but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import BufferStore, PrimFunc, Select, Stmt, Var

from tvm_ternary.kernels.attention import Attention
from tvm_ternary.kernels.ternary_keys import BLOCK
from tvm_ternary.schedule.cpu.attention.operands import Operands, Run
from tvm_ternary.schedule.cpu.attention.packed import Cache, Packed
from tvm_ternary.schedule.cpu.attention.parts import FloatPart, KeyPart, Part, ValuePart
from tvm_ternary.schedule.cpu.nest import index, loop, scope, sequence, space
from tvm_ternary.schedule.cpu.simd import Simd
from tvm_ternary.schedule.cpu.vector_math import expand_vector_math

_OPERATIONS = 16
"""On the way of an element into a block."""


@dataclass(frozen=True)
class Appending:
    """What is done to the sequences of a cache.

    Parameters
    ----------
    cache : Cache
    past : Var
        How many of its tokens each sequence keeps.
    parts : sequence of Part
    tokens : Expr
        New ones.
    window : Expr
        A block is packed as soon as so many newer tokens are there.
    """

    cache: Cache
    past: Var
    parts: Sequence[Part]
    tokens: Expr
    window: Expr

    def cut(self) -> Stmt:
        """Take all sequences back to what they keep."""
        return loop(self.cache.batch, self._cut, name="b")

    def append(self) -> Stmt:
        """Take in the new tokens of sequences that are cut."""
        shape = self.cache.shape
        work = self.tokens * (_OPERATIONS * (shape.size + shape.value_size))
        return sequence(
            space([self.cache.batch, index(shape.kv_heads)], work, lambda at: self._head(*at)),
            loop(self.cache.batch, self._count, name="b"),
        )

    def _cut(self, batch: Expr) -> Stmt:
        state = tirx.decl_buffer([index(3)], "int64", "state")
        first, kept, back = (state[n] for n in range(3))
        full, recent = self.cache.counts(batch)
        tokens = tirx.max(tirx.min(self.past[batch].astype("int64"), full * BLOCK + recent), index(0))
        blocks = tirx.min(full, tirx.floordiv(tokens, index(BLOCK)))

        def bring_back(kv: Expr, token: Expr) -> Stmt:
            return self._each(lambda part: part.bring_back([batch, kv, first], token))

        body = sequence(
            BufferStore(state, blocks, [0]),
            BufferStore(state, tokens - first * BLOCK, [1]),
            BufferStore(state, Select(first < full, kept, index(0)), [2]),
            loop(self.cache.shape.kv_heads, lambda kv: loop(back, lambda j: bring_back(kv, j), name="back"), name="kv"),
            self._set_counts(batch, first, kept),
        )
        return scope("cut", body, [state])

    def _new_blocks(self, recent: Expr) -> Expr:
        """How many are packed."""
        return tirx.floordiv(tirx.max(recent + self.tokens - self.window, index(0)), index(BLOCK))

    def _head(self, batch: Expr, kv: Expr) -> Stmt:
        """All of it for one head."""
        state = tirx.decl_buffer([index(2)], "int64", "state")
        full, before = self.cache.counts(batch)
        recent, count = state[0], state[1]
        at = [batch, kv]

        def fill(n: Expr, stop: Expr) -> Stmt:
            """New tokens up to ``stop``, after n of the blocks are packed: the first one is behind the window then."""
            start = Select(n > 0, self.window + n * BLOCK - recent, index(0))

            def take(token: Expr) -> Stmt:
                return self._each(lambda part: part.take(at, recent - n * BLOCK + token, token))

            return loop(stop - start, lambda j: take(start + j), name="new")

        def block(n: Expr) -> Stmt:
            return sequence(
                fill(n, self.window + (n + 1) * BLOCK - recent),
                self._each(lambda part: part.pack([*at, full + n])),
                loop(self.window, lambda token: self._each(lambda part: part.move(at, token)), name="moved"),
            )

        body = sequence(
            BufferStore(state, before, [0]),
            BufferStore(state, self._new_blocks(recent), [1]),
            loop(count, block, name="block"),
            fill(count, self.tokens),
        )
        return scope("head", body, [state])

    def _count(self, batch: Expr) -> Stmt:
        """What the sequence has in the end."""
        state = tirx.decl_buffer([index(1)], "int64", "state")
        full, recent = self.cache.counts(batch)
        body = sequence(
            BufferStore(state, self._new_blocks(recent), [0]),
            self._set_counts(batch, full + state[0], recent + self.tokens - state[0] * BLOCK),
        )
        return scope("counts", body, [state])

    def _set_counts(self, batch: Expr, full: Expr, recent: Expr) -> Stmt:
        counts = zip((self.cache.full, self.cache.recent), (full, recent), strict=True)
        return sequence([BufferStore(to, count.astype("int32"), [batch]) for to, count in counts])

    def _each(self, write: Callable[[Part], Stmt]) -> Stmt:
        return sequence([write(part) for part in self.parts])


def appending(cache: Cache, past: Var, new: Run, tail: Run, lanes: int) -> Appending:
    """Tokens that lie in one place are put to those that lie in the other, whose window is its room but a block.

    Parameters
    ----------
    cache : Cache
    past : Var
    new, tail : Run
    lanes : int
        Of a vector of float32.
    """
    shape, packed = cache.shape, cache.packed
    of_keys = KeyPart(
        new.k, tail.k, new.key, tail.key, shape.size, lanes, cache.keys, cache.key_scale, packed.key_planes
    )
    values = new.v, tail.v, new.value, tail.value, shape.value_size, lanes
    of_values = (
        ValuePart(*values, cache.values, cache.value_scale, packed.value_planes)
        if packed.value_planes
        else FloatPart(*values, cache.float_values)
    )
    return Appending(cache, past, [of_keys, of_values], new.count, tail.count - BLOCK)


def append_tokens(
    shape: Attention,
    packed: Packed,
    window: int,
    lengths: tuple[int | None, ...],
    simd: Simd,
    new: tuple[str, str] = ("blhd", "blhd"),
) -> PrimFunc:
    """The scheduled function ``(k, v, past, key words ..., key_scale, ..., tail k, tail v, full, recent)``.

    The cache is what `attention_step` takes, from the key words on, and is changed in place. What lies in it behind
    ``full`` blocks and ``recent`` tokens is not read, so that it needs no more to be empty than zeros in these two.

    A step after it may have one query, or as many as the window is long: of packed tokens it hides none.

    Parameters
    ----------
    shape : Attention
        ``key`` and ``value`` are the layouts of the tail.
    packed : Packed
    window : int
        A multiple of `BLOCK`: a block is packed as soon as so many newer tokens are there. The tail has room for a
        block more than that.
    lengths : tuple of (int or None)
        Batch, new tokens, most blocks and the tail's room; None where it is known at run time.
    simd : Simd
    new : tuple of (str, str)
        Layouts of the new keys and values.

    Returns
    -------
    PrimFunc
        ``past`` (batch,) int32: how many tokens of those that are there each sequence keeps, all of them if it is more.
        The caller sees to it that there is room for the blocks. Numbers are those of `quantize_block`, but where an
        element is within (n + 8) 2^-23 of its size from the middle of two, n elements sharing the scale; scales are
        within (n + 8) 2^-23 of those of the same numbers.

    Raises
    ------
    ValueError
        If the window is no multiple of a block, or the tail has no room for it.
    """
    if window < 0 or window % BLOCK:
        raise ValueError(f"a window of {window} tokens; expected a multiple of {BLOCK}")
    if lengths[3] is not None and lengths[3] < window + BLOCK:
        raise ValueError(f"a tail with room for {lengths[3]} tokens; a window of {window} needs {window + BLOCK}")
    names = ("batch", "tokens", "blocks", "room")
    batch, tokens, blocks, room = (
        Var(name, "int64") if given is None else index(given) for name, given in zip(names, lengths, strict=True)
    )
    on = Operands(shape, simd, batch, tokens, index(0), room)
    cache = Cache(shape, packed, batch, blocks)

    def given(name: str, layout: str, size: int) -> Var:
        extents = {"b": batch, "h": index(shape.kv_heads), "l": tokens, "d": index(size)}
        return tirx.decl_buffer([extents[axis] for axis in layout], "float32", name)

    given_run = Run(
        given("new_k", new[0], shape.size), given("new_v", new[1], shape.value_size), *new, index(0), tokens
    )
    tail = Run(on.k, on.v, shape.key, shape.value, index(0), index(window + BLOCK))
    past = tirx.decl_buffer([batch], "int32", "past")
    append = appending(cache, past, given_run, tail, simd.lanes("float32"))
    state = [*cache.packed_params, on.k, on.v, cache.full, cache.recent]
    body = sequence(append.cut(), append.append())
    function = PrimFunc([given_run.k, given_run.v, past, *state], scope("root", body))
    function = function.with_attr("tirx.noalias", True).with_attr("tirx.is_scheduled", True)
    return expand_vector_math(function)
