"""Which variant of a CUDA matmul serves which M: candidates as data, chosen by what they would cost.

``schedules/cuda-<arch>/<kernel>.toml`` lists the variants that are worth considering, each for a range of M::

    [[variant]]
    min_rows = 1       # 1 if left out
    max_rows = 8       # no limit if left out
    rows = 8           # the rest as in `CudaVariant`
    columns = 32
    warps_n = 1
    warps_k = 8
    stages = 6
    shared = false

and what tuning may try instead, as lists under ``[space]``. An architecture without a file takes that of sm_80.

`estimate` is no prediction of a time: it tells apart variants that leave multiprocessors idle, read the activations too
often or add up too many warps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from tvm_ternary.errors import OptionError
from tvm_ternary.kernels.matmul import MatmulKernel
from tvm_ternary.kernels.shape import MatmulShape, ceil_div
from tvm_ternary.schedule.cuda.cut import Cut
from tvm_ternary.schedule.cuda.operands import Operands
from tvm_ternary.schedule.cuda.variant import CudaVariant
from tvm_ternary.schedule.tiles import read_schedule
from tvm_ternary.target.cuda import CUDA_ARCHS, CudaArch

DECISIONS = ("rows", "columns", "warps_n", "warps_k", "stages", "shared")
"""What tuning decides."""

REPRESENTATIVES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The M's for which a function of any M chooses; between them it takes the next larger one's choice."""

_MOST_VARIANTS = 5
WARP = 32
_SHARED_OF_MULTIPROCESSOR = 1 << 10  # what a block of threads takes of shared memory beside what it asks for
_REGISTERS, _THREADS = 65536, 2048
# Cycles, roughly: filling the pipeline and ending a kernel, adding up one warp's sums along K.
_LATENCY, _EXCHANGE, _BARRIER = 2000.0, 60.0, 40.0
# Bytes a cycle, and cycles.
_CACHE_RATE, _MEMORY_LATENCY = 40.0, 1000.0


@dataclass(frozen=True)
class Candidate:
    """A variant and the M's it is worth considering for."""

    variant: CudaVariant
    min_rows: int
    max_rows: int | None


@dataclass(frozen=True)
class CudaTiles:
    """What a file holds: candidates, and what tuning may try; ``source`` is its path below ``schedules``."""

    candidates: tuple[Candidate, ...]
    space: Mapping[str, tuple[int, ...]] = field(hash=False)
    source: str


@cache
def load_cuda_tiles(kernel: str, tier: str) -> CudaTiles:
    """Read the candidates of ``kernel`` for ``tier``, such as ``cuda-sm_90``.

    Raises
    ------
    OptionError
        If the file is missing, or holds anything but sound variants and a space.
    """
    path, table = read_schedule(kernel, tier, "cuda-sm_80")
    if set(table) != {"variant", "space"} or not isinstance(table["variant"], list):
        raise OptionError(str(path), f"got keys {sorted(table)}; expected [[variant]] tables and [space]")
    candidates = tuple(_candidate(path, row) for row in table["variant"])
    if not any(c.max_rows is None for c in candidates) or not any(c.min_rows == 1 for c in candidates):
        raise OptionError(str(path), "the variants do not serve every M; expected some from 1 on and some without end")
    return CudaTiles(candidates, _space(path, table["space"]), f"{path.parent.name}/{path.name}")


def _candidate(path: Path, row: Any) -> Candidate:
    names = {f.name for f in fields(CudaVariant)} | {"min_rows"}
    needed = {"rows", "columns", "warps_n", "warps_k", "stages"}
    if not isinstance(row, dict) or set(row) - names or needed - set(row):
        raise OptionError(str(path), f"a variant is {row}; expected {', '.join(sorted(needed))}, perhaps others")
    numbers = {key: value for key, value in row.items() if key != "shared"}
    if not all(type(value) is int and value > 0 for value in numbers.values()):
        raise OptionError(str(path), f"a variant is {row}; expected whole numbers above 0")
    most = row.get("max_rows")
    sizes = {name: row[name] for name in needed}
    return Candidate(_sound(path, CudaVariant(**sizes, shared=bool(row.get("shared")))), row.get("min_rows", 1), most)


def _sound(path: Path, v: CudaVariant) -> CudaVariant:
    if v.rows % 8 or v.columns not in (32, 64) or v.stages < 2 or v.threads > 1024:
        problem = "expected rows a multiple of 8, columns 32 or 64, 2 stages or more, at most 32 warps"
        raise OptionError(str(path), f"a variant is {v}; {problem}")
    return v


def _space(path: Path, space: Any) -> dict[str, tuple[int, ...]]:
    expected = f"expected a list of whole numbers for each of {', '.join(DECISIONS)}"
    if not isinstance(space, dict) or set(space) != set(DECISIONS):
        raise OptionError(str(path), f"[space] is {space}; {expected}")
    for values in space.values():
        if not isinstance(values, list) or not values or not all(type(v) is int and v >= 0 for v in values):
            raise OptionError(str(path), f"[space] holds {values}; {expected}")
    return {name: tuple(dict.fromkeys(space[name])) for name in DECISIONS}


def choose(kernel: MatmulKernel, shape: MatmulShape, tier: str, rows: int | None) -> tuple[CudaVariant, ...]:
    """The variants of a function: one where M is known, else some with ascending limits.

    Raises
    ------
    OptionError
        If none of the candidates fits into shared memory.
    """
    tiles, arch = load_cuda_tiles(kernel.name, tier), CUDA_ARCHS[tier.removeprefix("cuda-")]
    if rows is not None:
        return (best(tiles, kernel, shape, arch, rows),)
    chosen = [replace(best(tiles, kernel, shape, arch, m), max_rows=m) for m in REPRESENTATIVES]
    merged: list[CudaVariant] = []
    for variant in chosen:
        if merged and replace(merged[-1], max_rows=variant.max_rows) == variant:
            merged.pop()
        merged.append(variant)
    # Every variant is a kernel more in the file: the ones in the middle of the smaller M's go first.
    while len(merged) > _MOST_VARIANTS:
        merged.pop(-3)
    return (*merged[:-1], replace(merged[-1], max_rows=None))


def best(tiles: CudaTiles, kernel: MatmulKernel, shape: MatmulShape, arch: CudaArch, rows: int) -> CudaVariant:
    """The candidate of the lowest `estimate` for M = ``rows``; of equal ones the first."""
    fitting = [
        candidate.variant
        for candidate in tiles.candidates
        if candidate.min_rows <= rows <= (candidate.max_rows or rows) and fits(kernel, shape, candidate.variant, arch)
    ]
    if not fitting:
        raise OptionError(tiles.source, f"no variant fits {shape} and M = {rows} on this architecture")
    return min(fitting, key=lambda variant: estimate(kernel, shape, variant, arch, rows))


def fits(kernel: MatmulKernel, shape: MatmulShape, v: CudaVariant, arch: CudaArch) -> bool:
    """Whether an architecture has the shared memory and registers for a variant."""
    cut = Cut(kernel, shape, v)
    return cut.shared_bytes <= arch.shared_bytes and cut.registers <= min(255, _REGISTERS // v.threads)


def estimate(kernel: MatmulKernel, shape: MatmulShape, v: CudaVariant, arch: CudaArch, rows: int) -> float:
    """Cycles, roughly, of the busiest multiprocessor."""
    cut, width = Cut(kernel, shape, v), v.columns * v.warps_n
    operands = cut.operands
    blocks = ceil_div(rows, v.rows) * ceil_div(shape.n, width)
    steps = ceil_div(shape.padded_k(kernel.block), operands.blocks * kernel.block * v.warps_k)
    per_step = v.warps_k * operands.blocks * kernel.block
    # Tensor cores by mma: 2048 products of int8 a cycle, half as many of 16 bits.
    multiply = v.rows * width * per_step / (2048 if operands.word_registers == 4 else 1024)
    weights = width * per_step * shape.planes / 4
    activations = min(rows, v.rows) * per_step * operands.row_bytes / (operands.blocks * kernel.block)
    activations *= 1 if v.shared else v.warps_n
    resident = max(
        1,
        min(
            arch.shared_bytes // (cut.shared_bytes + _SHARED_OF_MULTIPROCESSOR),
            _REGISTERS // (v.threads * cut.registers),
            _THREADS // v.threads,
        ),
    )
    each = ceil_div(blocks, arch.multiprocessors)
    # What is under way, over how long memory takes, is what arrives in a cycle, and no more than a multiprocessor can
    # take from the second-level cache.
    under_way = min(resident, each) * (min(v.stages, steps + 1) - 1) * (weights + activations)
    moved = (weights + activations) / min(_CACHE_RATE, under_way / _MEMORY_LATENCY)
    step = max(multiply, moved, v.threads // WARP * _instructions(operands, v) / 4)
    step += _BARRIER / resident if v.shared else 0.0
    tail = _LATENCY + _EXCHANGE * (v.warps_k - 1) * v.columns / 32 * v.rows / 8
    return each * steps * step + ceil_div(each, resident) * tail


def _instructions(operands: Operands, v: CudaVariant) -> float:
    """What a warp issues in a step, roughly; a multiprocessor issues four a cycle."""
    repeats, row_tiles, registers = v.columns // 32, v.rows // 8, operands.word_registers
    decode = repeats * operands.words * 2 * registers
    products = repeats * 2 * row_tiles * registers / 2 * (2 if operands.sums == 2 else 1)
    loads = row_tiles * operands.row_registers / 4 + repeats * operands.words / 4
    return 40 + decode + products + loads * (1 if v.shared else 3)
