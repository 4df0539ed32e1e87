"""What the keys and values of a whole model take: counted from the shape of its caches, and measured for one layer.

A layer is measured by a process that does nothing else: what the kernel counted for it at most (``VmHWM``), less what
it held before. Run as a module, this file is that process; it needs no compiler.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tvm_ternary.analysis.report import Table, format_bytes
from tvm_ternary.errors import HostError
from tvm_ternary.runtime.arrays import aligned_empty
from tvm_ternary.runtime.kv_cache import BLOCK, CacheShape, KVCache

KV_HEADS, SIZE, LAYERS = 8, 128, 32
"""Of the model in `memory_table`, LLaMA 3 8B."""
TOKENS, WINDOW = 32768, BLOCK
"""And so many tokens, of which so many stay float32."""
AIMS = {1: 12, 2: 6}
"""Planes to how many times smaller than float32 a token is to be at least, scales included."""

_FLOATS = {"float32": 4, "float16": 2}
_STATUS = Path("/proc/self/status")


def cache_shape(planes: int, tokens: int = TOKENS) -> CacheShape:
    """Of one layer, one sequence."""
    return CacheShape(1, KV_HEADS, SIZE, SIZE, tokens, planes, planes, WINDOW)


def layer_bytes(kind: str | int, tokens: int = TOKENS) -> int:
    """Of all memory of a layer, whose keys and values are of a type of floats or have some planes."""
    if isinstance(kind, str):
        return 2 * KV_HEADS * SIZE * tokens * _FLOATS[kind]
    return _bytes(cache_shape(kind, tokens).arrays)


def token_bytes(kind: str | int) -> float:
    """Of a token in a layer; of one that is packed, its share of the block's scales included."""
    if isinstance(kind, str):
        return layer_bytes(kind, 1)
    shape = cache_shape(kind)
    # Behind words and scales are the last tokens and two counts.
    return _bytes(shape.arrays[:-4]) / (shape.blocks * BLOCK)


def measured_bytes(kinds: Sequence[str | int], tokens: int = TOKENS) -> list[int]:
    """By how much a layer of each kind makes a process grow.

    Raises
    ------
    HostError
        If one ends early.
    """
    command = [sys.executable, "-m", __name__, str(tokens), *map(str, kinds)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise HostError("the process that holds caches", f"ended early ({reason})", "free some memory")
    return list(map(int, result.stdout.split()))


def memory_table() -> Table:
    """Each way to hold `TOKENS` tokens: a token, a layer counted and measured, and all `LAYERS` of them."""
    columns = (
        *("keys and values", "B/token", "of float32", "aim"),
        *(f"{TOKENS} tokens", "measured", f"{LAYERS} layers", "of float32", "of float16"),
    )
    kinds: list[str | int] = [*_FLOATS, 1, 2, 3]
    rows = tuple(map(_cells, kinds, measured_bytes(kinds)))
    return Table(columns, rows, frozenset(range(1, len(columns))))


def _cells(kind: str | int, measured: int) -> tuple[str, ...]:
    token, layer = token_bytes(kind), layer_bytes(kind)
    aim = None if isinstance(kind, str) else AIMS.get(kind)
    shares = [layer_bytes(name) / layer for name in _FLOATS]
    return (
        kind if isinstance(kind, str) else f"{kind} plane{'s' if kind > 1 else ''}",
        f"{token:.0f}",
        f"1/{token_bytes('float32') / token:.1f}",
        "" if aim is None else f"1/{aim}",
        format_bytes(layer),
        format_bytes(measured),
        format_bytes(LAYERS * layer),
        *(f"1/{share:.1f}" for share in shares),
    )


def _bytes(arrays: Sequence[tuple[tuple[int, ...], str]]) -> int:
    return sum(math.prod(extents) * np.dtype(dtype).itemsize for extents, dtype in arrays)


def _memory(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _main(tokens: str, *kinds: str) -> int:
    for kind in kinds:
        # A process for each, for memory given back may stay with one.
        sys.stdout.flush()
        child = os.fork()
        if not child:
            print(_growth(kind, int(tokens)))
            return 0
        if status := os.waitpid(child, 0)[1]:
            return os.waitstatus_to_exitcode(status)
    return 0


def _growth(kind: str, tokens: int) -> int:
    # What the code itself needs is there with a small one, which is kept, for its memory would be used again.
    held = [_hold(kind, 1)]
    before = _memory("VmRSS")
    held.append(_hold(kind, tokens))
    return _memory("VmHWM") - before


def _hold(kind: str, tokens: int) -> Any:
    if kind not in _FLOATS:
        # It is all there before the first token: nothing is appended, and nothing compiled.
        return KVCache(cache_shape(int(kind), tokens), _nothing, _itself)
    arrays = [aligned_empty((KV_HEADS, tokens, SIZE), np.dtype(kind)) for _ in range(2)]
    for array in arrays:
        array.fill(0)
    return arrays


def _nothing(*_arguments: object) -> None:
    pass


def _itself(array: object) -> object:
    return array


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
