"""What is measured: one way of computing y = x w^T, float32 in and out, with one or several copies of its weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi

from tvm_ternary.bench.memory import aligned, aligned_copy, copies_beyond
from tvm_ternary.errors import TernaryError
from tvm_ternary.formats import TernaryTensor, with_shared_scales
from tvm_ternary.formats.scheme import Scheme
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.kernels.table import kernel_for
from tvm_ternary.ops import linear
from tvm_ternary.target import Target

Floats = npt.NDArray[np.float32]
Calls = Sequence[Callable[[], Floats]]

# Of Gaussian activations, whose rounding is the error: to float32, to int8 by the row, to three values by the row.
_BOUNDS = {32: 1e-5, 8: 1e-2, 1: 0.6}
_BLOCK = 1024
FAULT = "a fault of that engine on this CPU: leave it out, and report it"


@dataclass(frozen=True)
class Workers:
    """The threads that an engine shares its work out to; engines of one library share them.

    Attributes
    ----------
    library : str
    spin : float
        Seconds for which they go on spinning after a call, on cores that another library's need.
    """

    library: str
    spin: float


@dataclass(frozen=True)
class Engine:
    """One implementation, holding its weight.

    Attributes
    ----------
    name : str
    weight_bytes : int
        What one copy of the weight and its scales takes.
    dense : (N, K) float32
        What the weight stands for.
    error_bound : float
        Largest relative error (2-norm) its way of rounding activations explains.
    calls : callable
        x (M, K) float32, aligned -> a function for each copy of the weight, that computes x w^T and returns it.
    workers : Workers
    """

    name: str
    weight_bytes: int
    dense: Floats
    error_bound: float
    calls: Callable[[Floats], Calls]
    workers: Workers


class WrongAnswerError(TernaryError):
    """What was to be timed does not compute what it should."""


_WORKERS = Workers("tvm", 0.1)


def exact_rows(dense: Floats, x: Floats) -> npt.NDArray[np.float64]:
    """The first, middle and last row of x w^T in float64, made block by block: a whole w of float64 is large."""
    rows = x[_checked(len(x))].astype(np.float64)
    blocks = [dense[start : start + _BLOCK].astype(np.float64) for start in range(0, len(dense), _BLOCK)]
    return np.concatenate([rows @ block.T for block in blocks], axis=1)


def check_answer(engine: Engine, x: Floats, y: Floats, exact: npt.NDArray[np.float64] | None = None) -> float:
    """The relative error of y on the first, middle and last row of x.

    Parameters
    ----------
    engine : Engine
    x : (M, K) float32
    y : (M, N) float32
        What it computed.
    exact : float64, optional
        `exact_rows` of its weight and x, where they are there already.

    Raises
    ------
    WrongAnswerError
        If it is beyond the engine's bound.
    """
    n, k = engine.dense.shape
    if y.shape != (len(x), n):
        raise WrongAnswerError(
            f"{engine.name}, {len(x)} rows, {n}x{k}", f"the result is {y.shape}; expected {(len(x), n)}", FAULT
        )
    expected = exact_rows(engine.dense, x) if exact is None else exact
    error = float(np.linalg.norm(y[_checked(len(x))] - expected) / np.linalg.norm(expected))
    if not error <= engine.error_bound:
        raise WrongAnswerError(
            f"{engine.name}, {len(x)} rows, {n}x{k}",
            f"relative error is {error:.1e}; expected at most {engine.error_bound:.0e}",
            FAULT,
        )
    return error


def _checked(m: int) -> list[int]:
    return sorted({0, m // 2, m - 1})


def random_weight(n: int, k: int, scheme: Scheme, seed: int = 0) -> TernaryTensor:
    """Random trits, a third of them zero, with scales that differ."""
    rng = np.random.default_rng(seed)
    trits = rng.integers(-1, 2, (scheme.planes, n, k), dtype=np.int8)
    scale = rng.uniform(0.5, 1.5, (scheme.planes, *scheme.granularity.scale_shape(n, k))).astype(np.float32)
    # Each plane refines the one before.
    scale /= 3.0 ** np.arange(scheme.planes, dtype=np.float32).reshape(-1, 1, 1)
    return TernaryTensor.from_trits(trits, scale, scheme.granularity)


def ours(n: int, k: int, scheme: Scheme, target: Target, cache: int, packing: str = "fast") -> Engine:
    """This package's kernels: the two functions that `tvm_ternary.ops.Linear` calls, on memory made beforehand.

    Parameters
    ----------
    n, k : int
        out_features, in_features.
    scheme : Scheme
    target : Target
        One that this host can run.
    cache : int
        Bytes that the copies of the weight exceed together; 0 for one copy.
    packing : str
        How its trits lie in memory.
    """
    weight, row = with_shared_scales(random_weight(n, k, scheme)), kernel_for(scheme.activation_bits, packing)
    sizes, packed = MatmulShape.of(weight), tuple(row.pack(weight).values())
    size = sum(array.nbytes for array in packed)
    functions = linear(weight, target=target.tvm, activation_bits=scheme.activation_bits, packing=packing).functions
    copies = [[aligned_copy(array) for array in packed] for _ in range(copies_beyond(cache, size))]

    def calls(x: Floats) -> Calls:
        m = len(x)
        y = aligned((m, n), np.float32)
        operands: list[npt.NDArray[Any]] = [x]
        if "rows" in functions:
            operands = [aligned(tuple(map(int, o.shape(sizes, m))), o.dtype) for o in row.matmul.activations]
        activations = [tvm_ffi.from_dlpack(array) for array in operands]
        rows, matmul = functions.get("rows"), functions["matmul"]
        source, result = tvm_ffi.from_dlpack(x), tvm_ffi.from_dlpack(y)

        def bind(constants: list[Any]) -> Callable[[], Floats]:
            def call() -> Floats:
                if rows is not None:
                    rows(source, *activations)
                matmul(*activations, *constants, result)
                return y

            return call

        return [bind([tvm_ffi.from_dlpack(array) for array in copy]) for copy in copies]

    name = str(scheme) if packing == "fast" else f"{scheme}/{packing}"
    return Engine(name, size, weight.dequantize(), _BOUNDS[scheme.activation_bits], calls, _WORKERS)
