"""llama.cpp's matrix products, from the package llama-cpp-python or from a build of one's own.

The environment variable ``TVM_TERNARY_LLAMA_CPP`` names a folder with ``libggml-base.so`` and ``libggml-cpu.so`` to
take instead of the package's: so can a build without AVX-512 stand beside our AVX2 code.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tvm_ternary.bench.engines import Calls, Engine, Floats, Workers
from tvm_ternary.bench.memory import aligned, copies_beyond
from tvm_ternary.bench.peers import ggml
from tvm_ternary.bench.peers.base import Peer, Problem

FOLDER = "TVM_TERNARY_LLAMA_CPP"
_Q4_0, _TQ2_0 = 2, 35
_Q4_BLOCK, _TQ2_BLOCK = 32, 256
_WORKERS = Workers("ggml", 0.02)

Pack = Callable[[ggml.Ggml, Problem], npt.NDArray[np.uint8]]


def library_folder() -> Path | None:
    """Where ggml's libraries are: the folder that the variable names, or the package's; None without either."""
    named = os.environ.get(FOLDER)
    if named:
        return Path(named)
    package = find_spec("llama_cpp")
    places = (package.submodule_search_locations if package is not None else None) or ()
    return next((Path(place) / "lib" for place in places), None)


def pack_q4_0(trits: npt.NDArray[np.int8], scale: Floats) -> npt.NDArray[np.uint8]:
    """Rows of Q4_0, without loss: ggml's own quantizer would make 7/8 of every second value.

    Parameters
    ----------
    trits : (N, K) int8
        K a multiple of 32.
    scale : (N,) float32
        That float16 holds.

    Returns
    -------
    (N, K / 32 * 18) uint8
        A block is a float16 d, then 16 bytes: the codes t + 8 of k and, above them, of k + 16; w = d (code - 8).

    References
    ----------
    ggml-common.h, block_q4_0.
    """
    n, k = trits.shape
    codes = (trits + np.int8(8)).view(np.uint8).reshape(n, k // _Q4_BLOCK, 2, _Q4_BLOCK // 2)
    blocks = np.empty((n, k // _Q4_BLOCK, 2 + _Q4_BLOCK // 2), np.uint8)
    blocks[:, :, :2] = scale.astype("<f2").view(np.uint8).reshape(n, 1, 2)
    blocks[:, :, 2:] = codes[:, :, 0] | codes[:, :, 1] << np.uint8(4)
    return blocks.reshape(n, -1)


def _engine(name: str, problem: Problem, kind: int, pack: Pack) -> Engine:
    """Activations rounded to int8 by the block, inside the timed call, as llama.cpp does it."""
    folder = library_folder()
    assert folder is not None, "choose_peers asks first"
    library = ggml.load(folder)
    rows = pack(library, problem)
    n, k = problem.trits.shape
    products = [ggml.Product(library, kind, rows, k) for _ in range(copies_beyond(problem.cache, rows.nbytes))]

    def calls(x: Floats) -> Calls:
        library.ggml_backend_cpu_set_n_threads(library.backend, problem.threads)
        y = aligned((len(x), n), np.float32)
        return [product.bind(x, y) for product in products]

    return Engine(name, rows.nbytes, problem.dense, 2e-2, calls, _WORKERS)


def _whole_blocks(n: int, k: int, block: int, kind: str) -> str | None:
    return f"{kind} needs K divisible by {block}" if k % block else None


def _missing() -> str | None:
    return None if library_folder() is not None else f"needs the package llama_cpp (llama-cpp-python), or {FOLDER}=DIR"


PEERS: dict[str, Peer] = {
    "llama-tq2_0": Peer(
        partial(_engine, kind=_TQ2_0, pack=lambda library, problem: library.quantize(_TQ2_0, problem.dense)),
        _missing,
        partial(_whole_blocks, block=_TQ2_BLOCK, kind="TQ2_0"),
    ),
    "llama-q4_0": Peer(
        partial(_engine, kind=_Q4_0, pack=lambda library, problem: pack_q4_0(problem.trits, problem.scale)),
        _missing,
        partial(_whole_blocks, block=_Q4_BLOCK, kind="Q4_0"),
    ),
}
