"""Run every kernel on arrays that end where unreadable memory begins. A program: a read past an end kills it.

The last line printed names what was running. With the argument ``overrun`` it reads past an end itself.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi

from tests.ternary_matmul import NATIVE, TARGETS, build, rows_of, unrunnable
from tvm_ternary.formats import Granularity, PerChannel, PerGroup, TernaryTensor
from tvm_ternary.kernels.matmul import Epilogue
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.kernels.table import EVERY_KERNEL, kernel_for
from tvm_ternary.schedule.tasks import choose_variants
from tvm_ternary.schedule.ternary import matmul_function
from tvm_ternary.target import Target, resolve

PROT_NONE = 0
ALIGNMENT = 64
# (N, K, granularity, bias), N and K ragged. With M = 16, 80 and 1, in this order, sizes in bytes are multiples of the
# alignment, so that arrays end exactly at the fence; with other M's they may end some bytes before it.
CASES: tuple[tuple[int, int, Granularity, bool], ...] = (
    (33, 50, PerGroup(20), False),
    (16, 257, PerChannel(), True),
    (112, 1024, PerGroup(64), True),
)
# Rows that fill whole tiles or do not.
ROWS = (1, 16, 80)
_LIBC = ctypes.CDLL(None, use_errno=True)
_FENCES: list[mmap.mmap] = []


def fenced(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy between two pages that can be neither read nor written; it ends at the second one."""
    page = mmap.PAGESIZE
    size = -(-max(array.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _FENCES.append(memory)
    for fence in (address, address + page + size):
        if _LIBC.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(page), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    start = (page + size - array.nbytes) // ALIGNMENT * ALIGNMENT
    view = np.frombuffer(memory, array.dtype, array.size, start).reshape(array.shape)
    view[...] = array
    return view


def run(target: Target, bits: int, packing: str, n: int, k: int, kind: Granularity, bias: bool) -> None:
    """Prepare rows and multiply them, every array fenced."""
    rng = np.random.default_rng(0)
    scale = np.ones((2, *kind.scale_shape(n, k)), np.float32)
    weight = TernaryTensor.from_trits(rng.integers(-1, 2, (2, n, k), dtype=np.int8), scale, kind)
    row, shape = kernel_for(bits, packing), MatmulShape.of(weight)
    variants = choose_variants(bits, shape, target.tier, packing=packing).variants
    matmul = matmul_function(row.matmul, shape, variants, target.tier, epilogue=Epilogue(bias))
    library = build({"matmul": matmul, "rows": row.rows(shape)}, target)
    constants = [fenced(array) for array in (*row.pack(weight).values(), *([np.ones(n, np.float32)] if bias else []))]
    for rows in ROWS:
        x = rng.standard_normal((rows, k)).astype(np.float32)
        outputs = [fenced(np.zeros(o.shape(shape, rows), o.dtype)) for o in row.matmul.activations]
        call(library["rows"], fenced(x), *outputs)
        result = fenced(np.full((rows, n), np.nan, np.float32))
        call(library["matmul"], *outputs, *constants, result)
        trits = np.zeros((rows, k), np.int8)
        groups = (rows, shape.groups) if bits == 8 else rows
        values = trits if bits != 32 else trits.astype(np.float32)
        zeros = rows_of(bits, values, np.ones(groups, np.float32), kind, row.matmul.block)
        call(library["matmul"], *map(fenced, zeros), *constants, result)
        assert (result == int(bias)).all(), "rows of zeros did not give the bias"


def call(function: Any, *arrays: npt.NDArray[Any]) -> None:
    function(*map(tvm_ffi.from_dlpack, arrays))


def main() -> None:
    if "overrun" in sys.argv:
        array = fenced(np.zeros(16, np.float32))
        print("reading past the end", flush=True)
        ctypes.string_at(array.ctypes.data + array.nbytes, 1)
    for i, name in enumerate(TARGETS):
        target = resolve(name)
        if unrunnable(target) is None:
            for j, (bits, packing) in enumerate(EVERY_KERNEL):
                # Two cases on this host's best target, on the others one, in turn: every kernel meets every case.
                for turn in range(1 + (name == NATIVE.name)):
                    case = CASES[(i + j + turn) % len(CASES)]
                    print(name, bits, packing, case, flush=True)
                    run(target, bits, packing, *case)
    print("done", flush=True)


if __name__ == "__main__":
    main()
