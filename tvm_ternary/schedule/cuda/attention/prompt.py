"""Attention of many queries on a GPU: tensor cores on 16 bits, scores that never leave a warp's registers.

A first kernel rounds keys and values once, values with tokens for neighbours. Then a thread block has 64 queries of a
head, or 128, sixteen a warp, and goes through the keys, 64 at a time. Those are copied asynchronously to shared memory,
the next keys while values are multiplied, and the reverse; blocks behind the last key that any of its queries sees are
not touched. Blocks that are ternary planes are decoded there (`prompt_tiles`).

Which terms of a sum stand where in a tensor core's registers does not matter if both operands agree. So thread ``lane =
4 g + t`` has eight neighbouring elements of a query and of a key, which is one load of 16 bytes for two products, and
keys are dealt out to the columns so that its weights of four products are those of eight neighbouring tokens: they
become the left operand of the product with values as they are.

What limits it: a product of 16 x 8 x 16 takes 256 bytes of shared memory, two cycles of a multiprocessor, and three to
four of its tensor cores by the instruction that all architectures have (sm_90's own, wgmma, would need half as many).

References
----------
Dao, "FlashAttention-2", 2023: queries shared out among warps, keys in the inner loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tvm_ternary.kernels.attention import WORD, Attention
from tvm_ternary.kernels.shape import ceil_div
from tvm_ternary.kernels.ternary_keys import BLOCK
from tvm_ternary.schedule.cuda.attention.plan import (
    GRID,
    SHARED_BYTES,
    array,
    at_once,
    check_grid,
    check_sizes,
    scratch,
)
from tvm_ternary.schedule.cuda.attention.prompt_keys import Cached, Keys, Whole
from tvm_ternary.schedule.cuda.attention.prompt_plan import KEYS, KINDS, LARGEST, ROWS, Prompt
from tvm_ternary.schedule.cuda.attention.prompt_round import pack_blocks, round_keys_and_values
from tvm_ternary.schedule.cuda.attention.prompt_rows import Rows
from tvm_ternary.schedule.cuda.matmul import SCHEDULED, root_block

Expr = Any
Kernel = Callable[[Prompt, Keys], None]
"""Emits it."""

MOST_MASKED = 1 << 18
"""Keys under a mask of bits, of which a thread block keeps eight bytes for 64."""
WORTH_IT = ROWS
"""Queries: a warp's tensor cores multiply sixteen or none."""
_PROMPT = ("q", "packed", "floats", "mask", "out")


def attention_prompt(
    shape: Attention,
    lengths: tuple[int, int, int],
    *,
    causal: bool = False,
    kind: str = "bfloat16",
    planes: int = 0,
    window: int = 0,
) -> tirx.PrimFunc:
    """The scheduled function ``(q[, key words ..., key_scale], k, v[, mask], out)``, floats in float32.

    Parameters
    ----------
    shape : Attention
        Layouts end in ``d``; not `Attention.joined`.
    lengths : tuple of int
        Batch, queries and keys.
    causal : bool
        The queries are those of the last keys, and see none behind their own.
    kind : str
        ``bfloat16`` or ``float16``: what queries, keys, values and weights are rounded to. Sums are float32. What is
        above 65,504 becomes infinite in the latter.
    planes : int
        Of keys in packed blocks, as `schedule.cpu.attention.rounded.pack_keys` gives them. Each number is multiplied by
        its scale, scale and product rounded to ``kind``. 0: there are no such parameters.
    window : int
        Last keys that are read from ``k``, with those before them that fill no block of 64.

    Raises
    ------
    ValueError
        If there is no such kind, sizes are no multiples of four or above 128, elements of a head are not neighbours, or
        there are more heads or sequences than a grid has thread blocks.
    """
    prompt, source = _whole(shape, lengths, causal, kind, planes, window)
    return _function("attention_prompt", prompt, source, _PROMPT, [_round, _attend])


def round_operands(
    shape: Attention, lengths: tuple[int, int, int], *, kind: str = "bfloat16"
) -> tuple[tirx.PrimFunc, list[tuple[int, ...]]]:
    """The first half of `attention_prompt`, ``(k, v, keys, values)``, and the extents of its results, uint32."""
    prompt, source = _whole(shape, lengths, False, kind, 0, 0)
    function = _function("round_operands", prompt, source, ("floats", "rounded"), [_round])
    return function, list(_rounded_extents(prompt).values())


def attention_rounded(
    shape: Attention, lengths: tuple[int, int, int], *, causal: bool = False, kind: str = "bfloat16"
) -> tirx.PrimFunc:
    """The second half, ``(q, keys, values[, mask], out)``."""
    prompt, source = _whole(shape, lengths, causal, kind, 0, 0)
    return _function("attention_rounded", prompt, source, ("q", "rounded", "mask", "out"), [_attend])


def pack_operands(
    shape: Attention, planes: int, window: int, lengths: tuple[int, int, int], *, kind: str = "bfloat16"
) -> tuple[tirx.PrimFunc, list[tuple[tuple[int, ...], str]]]:
    """What packs keys and rounds the rest, ``(k, v, key words ..., key_scale[, keys], values)``; extents and dtypes.

    Of words and scales those behind the last packed block are not written.

    Parameters
    ----------
    shape, lengths, kind, planes, window
        As of `attention_prompt`.
    """
    prompt, source = _whole(shape, lengths, False, kind, planes, window)
    function = _function("pack_operands", prompt, source, ("floats", "packed", "rounded"), [_pack, _round])
    made = [source.b[name] for name in source.b if name not in ("k", "v")]
    return function, [(tuple(map(int, one.shape)), str(one.dtype)) for one in made]


def attention_packed(
    shape: Attention,
    planes: int,
    window: int,
    lengths: tuple[int, int, int],
    *,
    causal: bool = False,
    kind: str = "bfloat16",
) -> tirx.PrimFunc:
    """Attention to that, ``(q, key words ..., key_scale[, keys], values, k, v[, mask], out)``; k and v are not read."""
    prompt, source = _whole(shape, lengths, causal, kind, planes, window)
    names = "q", "packed", "rounded", "floats", "mask", "out"
    return _function("attention_packed", prompt, source, names, [_attend])


def why_not(shape: Attention, lengths: tuple[int | None, ...]) -> str | None:
    """Why there is no such attention; None if there is. Lengths are batch, queries and keys, None where not known."""
    sizes, layouts = (shape.size, shape.value_size), (shape.query, shape.key, shape.value, shape.out)
    if any(length is None for length in lengths):
        return "has lengths that are not known"
    if max(sizes) > LARGEST or any(size % 4 for size in sizes):
        return f"has heads of {max(sizes)} elements; expected a multiple of 4, {LARGEST} at most"
    if not all(layout[-1] == "d" for layout in layouts):
        return "has heads whose elements are no neighbours"
    batch, queries, keys = (int(length or 0) for length in lengths)
    if max(batch, shape.heads) > GRID:
        return f"has more than {GRID} sequences or heads"
    rows = batch * max(shape.heads * queries, shape.kv_heads * (keys + KEYS)) * (max(sizes) + 32)
    masked = math.prod({"b": batch, "h": shape.heads, "m": queries, "s": keys}[axis] for axis in shape.mask)
    if max(rows, masked) >= 2**31 or (shape.hidden is not None and keys > MOST_MASKED):
        return "has more elements than a kernel counts"
    return None


def _whole(
    shape: Attention, lengths: tuple[int, int, int], causal: bool, kind: str, planes: int, window: int
) -> tuple[Prompt, Whole]:
    batch, queries, keys = lengths
    source = Whole(shape, batch, keys, (planes, 0), max(keys - window, 0) // BLOCK if planes else 0)
    return _prompt(source, queries, causal, kind), source


def attention_prompt_cached(
    shape: Attention,
    planes: tuple[int, int],
    lengths: tuple[int, int, int, int],
    *,
    causal: bool = True,
    kind: str = "bfloat16",
    new: tuple[str, str] = ("blhd", "blhd"),
) -> tirx.PrimFunc:
    """The scheduled function of a prompt behind a cache, before it is appended.

    Its parameters: ``(q, key words ..., key_scale, value words ..., value_scale, tail k, tail v, new k, new v, full,
    recent[, mask], out)``.

    Parameters
    ----------
    shape : Attention
        ``key`` and ``value`` are the layouts of the tail. A mask's axis of keys is the number of a token in its
        sequence, and is as long as all that there may be.
    planes : tuple of int
        Of keys and of values. Both are numbers times scales, scales and products rounded to ``kind``.
    lengths : tuple of int
        Batch, queries, which are as many as new tokens, most blocks, and the tail's room.
    causal : bool
        A query sees the cache, and the new tokens up to its own; otherwise all.
    kind : str
    new : tuple of str
        Layouts of the new keys and values, which end in ``d``.

    Raises
    ------
    ValueError
        As of `attention_prompt`.
    """
    batch, queries, blocks, room = lengths
    source = Cached(shape, batch, queries, blocks, room, planes, new)
    prompt = _prompt(source, queries, causal, kind)
    return _function("attention_prompt_cached", prompt, source, _PROMPT, [_round, _attend])


def _prompt(source: Keys, queries: int, causal: bool, kind: str) -> Prompt:
    shape = source.shape
    check_sizes(shape)
    check_grid(shape.heads, source.batch)
    if max(shape.size, shape.value_size) > LARGEST:
        largest = max(shape.size, shape.value_size)
        raise ValueError(f"a head of {largest} elements; for many queries on a GPU expected {LARGEST} at most")
    if kind not in KINDS:
        raise ValueError(f"attention in {kind}; on a GPU expected one of {', '.join(KINDS)}")
    if shape.joined:
        raise ValueError("keys in two parts; on a GPU they are one array")
    prompt = Prompt(shape, source.batch, queries, causal, KINDS[kind], source.planes, source.floats, source.most)
    if prompt.shared_bytes > SHARED_BYTES:
        raise ValueError(f"{source.most} keys under a mask of bits; on a GPU expected fewer")
    return prompt


def _function(
    name: str, prompt: Prompt, source: Keys, parameters: Sequence[str], kernels: Sequence[Kernel]
) -> tirx.PrimFunc:
    """Some kernels on such parameters; what is rounded is memory of the function's own unless it is among them."""
    shape, b = prompt.shape, source.b

    def laid(name: str, layout: str, size: int) -> None:
        extents = {"b": prompt.batch, "h": shape.heads, "l": prompt.queries, "d": size}
        b[name] = array(name, [extents[axis] for axis in layout])

    def rounded() -> None:
        b.update({name: array(name, extents, "uint32") for name, extents in _rounded_extents(prompt).items()})

    def mask() -> None:
        if shape.mask:
            keys = source.most if shape.hidden is None else ceil_div(source.most, WORD)
            extents = {"b": prompt.batch, "h": shape.heads, "m": prompt.queries, "s": keys}
            dtype = "float32" if shape.hidden is None else "int64"
            b["mask"] = array("mask", [extents[axis] if axis in shape.mask else 1 for axis in "bhms"], dtype)

    declare: dict[str, Callable[[], None]] = {
        "q": lambda: laid("q", shape.query, shape.size),
        "packed": source.declare_packed,
        "floats": source.declare_floats,
        "rounded": rounded,
        "mask": mask,
        "out": lambda: laid("out", shape.out, shape.value_size),
    }
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, SCHEDULED: 1})
        for parameter in parameters:
            declare[parameter]()
        with root_block():
            if "rounded" not in parameters:
                held = _rounded_extents(prompt).items()
                b.update({name: scratch(name, extents, "uint32") for name, extents in held})
            for kernel in kernels:
                kernel(prompt, source)
    return builder.get()


def _round(prompt: Prompt, source: Keys) -> None:
    round_keys_and_values(prompt, source)


def _pack(prompt: Prompt, source: Keys) -> None:
    assert isinstance(source, Whole)
    pack_blocks(prompt, source)


def _rounded_extents(prompt: Prompt) -> dict[str, tuple[int, ...]]:
    """Of keys and values in 16 bits, two numbers a word; of those that there are."""
    found: dict[str, tuple[int, ...]] = {}
    for matrix in (prompt.key, prompt.value):
        tokens = KEYS * prompt.float_blocks(matrix)
        extents = (tokens, matrix.terms // 2) if matrix.is_key else (matrix.rows, tokens // 2)
        if tokens:
            found[f"{matrix.name}s"] = (prompt.batch, prompt.shape.kv_heads, *extents)
    return found


def _attend(prompt: Prompt, source: Keys) -> None:
    launch = T.launch_thread
    with (
        launch("blockIdx.x", ceil_div(prompt.queries, prompt.rows)) as x,
        launch("blockIdx.y", prompt.shape.heads) as y,
        launch("blockIdx.z", prompt.batch) as z,
        launch("threadIdx.x", 32 * prompt.warps) as thread,
        at_once(1),
    ):
        Rows(prompt, source, (x, y, z), thread).write()
