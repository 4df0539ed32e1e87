"""bnn-lab's popcount kernels: activations of +1 and -1, weights of two or of three values.

They are given activations that are packed already, and their results are not scaled back by the row: the time holds the
kernel alone, whose answer is off by what rounding Gaussian activations to their signs costs (0.64).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.bench.engines import Calls, Engine, Floats, Workers
from tvm_ternary.bench.memory import copies_beyond
from tvm_ternary.bench.peers.base import Peer, Problem, needs

# |x - sign(x)| / |x| of Gaussian x is sqrt(2 - 2 sqrt(2 / pi)) = 0.636; the rest is for few samples.
_ERROR_BOUND = 0.75
_WORKERS = Workers("bnn-lab", 0.02)
_ONLY = frozenset({1})


def _binary(name: str, problem: Problem) -> Engine:
    """Weights of one bit, zeros become -1; one scale a row."""
    kernels = _kernels(problem.threads)
    signs = np.where(problem.trits > 0, 1, -1).astype(np.int8)
    k, packed = signs.shape[1], kernels.pack_binary_pm1(signs)[0]
    size = packed.nbytes + problem.scale.nbytes
    copies = [packed.copy() for _ in range(copies_beyond(problem.cache, size))]

    def calls(x: Floats) -> Calls:
        kernels.set_num_threads(problem.threads)
        rows, multiply = kernels.pack_binary_pm1(x)[0], kernels.binary_gemm_native_scaled
        return [lambda w=w: multiply(rows, w, k, problem.scale) for w in copies]  # type: ignore[misc]

    return Engine(name, size, signs * problem.scale[:, None], _ERROR_BOUND, calls, _WORKERS)


def _ternary(name: str, problem: Problem) -> Engine:
    """Weights as two bit planes, with one scale for all of them, which is 1."""
    from bnn.kernels import ternary_gemm, ternary_pack

    kernels = _kernels(problem.threads)
    plus, minus = (kernels.pack_bits_u64(problem.trits == sign) for sign in (1, -1))
    ones: tuple[npt.NDArray[Any], npt.NDArray[Any]] = ternary_pack.precompute_bitplane_pops(plus, minus)
    size = plus.nbytes + minus.nbytes + sum(count.nbytes for count in ones)
    copies = [(plus.copy(), minus.copy()) for _ in range(copies_beyond(problem.cache, size))]

    def calls(x: Floats) -> Calls:
        kernels.set_num_threads(problem.threads)
        rows, multiply = kernels.pack_binary_pm1(x)[0], ternary_gemm.ternary_bitplane_gemm_native
        return [lambda w=w: multiply(rows, *w, 1.0, *ones) for w in copies]  # type: ignore[misc]

    return Engine(name, size, problem.trits.astype(np.float32), _ERROR_BOUND, calls, _WORKERS)


def _kernels(threads: int) -> Any:
    from bnn.kernels import packed

    packed.set_num_threads(threads)
    return packed


def _missing() -> str | None:
    absent = needs("bnn")()
    if absent is not None:
        return f"{absent} (bnn-lab)"
    from bnn.kernels import packed

    return None if packed.native_kernel_available() else "needs bnn-lab's native kernels, which this host cannot load"


PEERS: dict[str, Peer] = {
    "bnn-binary": Peer(_binary, _missing, activation_bits=_ONLY),
    "bnn-ternary": Peer(_ternary, _missing, activation_bits=_ONLY),
}
