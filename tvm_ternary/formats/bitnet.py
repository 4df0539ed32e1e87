"""The ternary weights of BitNet b1.58 checkpoints: packed four in a byte, or as float weights made ternary on loading.

The layouts of the public ``bitnet-b1.58-2B-4T`` checkpoints and of their loader, ``BitLinear`` and ``AutoBitLinear`` in
``transformers.integrations.bitnet``:

packed
    ``NAME.weight``, (N / 4, K) uint8: bits 2 i and 2 i + 1 of row r hold 1 + the trit of row i * N / 4 + r.
    ``NAME.weight_scale``, one number: the scale, or what the product is divided by (see `Scaling`).
online
    ``NAME.weight``, (N, K) float: rounded to multiples of its mean magnitude whenever the model is loaded.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import LayoutError
from tvm_ternary.formats.granularity import PerTensor, row_blocks
from tvm_ternary.formats.planes import pack_planes, plane_words
from tvm_ternary.formats.ternary import TernaryTensor

PER_BYTE = 4
LEAST_MEAN = np.float32(1e-5)
"""What the loader takes for the mean magnitude of a matrix whose own is less."""


class Scaling(Enum):
    """What ``weight_scale`` means: by ``quantization_config.linear_class`` of the checkpoint's ``config.json``."""

    MULTIPLY = "autobitlinear"
    DIVIDE = "bitlinear"


def read_scale(weight_scale: npt.ArrayLike, scaling: Scaling, *, name: str = "weight") -> npt.NDArray[np.float32]:
    """Read a ``weight_scale``, one number, as the scale (1, 1, 1) of a tensor.

    Raises
    ------
    LayoutError
        If it is no positive finite number, or its reciprocal is none.
    """
    stored = np.asarray(weight_scale, dtype=np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        scale = np.float32(1) / stored if scaling is Scaling.DIVIDE else stored
    if stored.size != 1 or not np.isfinite(scale).all() or not (scale > 0).all():
        raise LayoutError(f"{name}_scale", f"{stored.tolist()}, expected one positive number")
    return scale.reshape(1, 1, 1)


def unpack_bitnet(
    packed: npt.NDArray[np.uint8], weight_scale: npt.ArrayLike, scaling: Scaling, *, name: str = "weight"
) -> TernaryTensor:
    """Read a packed matrix.

    Parameters
    ----------
    packed : (N / 4, K) uint8
    weight_scale : one number
        A bfloat16 widened, which is exact.
    scaling : Scaling
        The scale of the result is ``weight_scale``, or its reciprocal rounded to float32.
    name : str
        What errors call the matrix.

    Returns
    -------
    TernaryTensor
        (N, K), one plane, one scale.

    Raises
    ------
    LayoutError
        If an array is not as described, a code is 3, or the scale is no positive finite number.
    """
    if packed.dtype != np.uint8 or packed.ndim != 2:
        raise LayoutError(name, f"{packed.dtype} of shape {packed.shape}, expected packed uint8 of shape (N / 4, K)")
    scale = read_scale(weight_scale, scaling, name=name)
    quarter, k = packed.shape
    planes = np.empty((1, 2, PER_BYTE * quarter, plane_words(k)), dtype=np.uint64)
    for rows in row_blocks(quarter, k):
        for i in range(PER_BYTE):
            codes = packed[rows] >> np.uint8(2 * i) & np.uint8(3)
            if (codes == 3).any():
                raise LayoutError(name, "holds the code 3, expected 0, 1 or 2 for -1, 0 or 1", "the file is damaged")
            start = i * quarter
            planes[0, :, start + rows.start : start + rows.stop] = pack_planes(codes == 2, codes == 0)
    return TernaryTensor(planes, scale, (PER_BYTE * quarter, k), PerTensor())


def pack_bitnet(tensor: TernaryTensor, scaling: Scaling) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Write a packed matrix; the inverse of `unpack_bitnet`.

    Parameters
    ----------
    tensor : TernaryTensor
        One plane, one scale, N a multiple of 4.
    scaling : Scaling

    Returns
    -------
    packed : (N / 4, K) uint8
    weight_scale : (1,) float32
        Public checkpoints round it to bfloat16; here it is as it was, or the reciprocal rounded to float32.

    Raises
    ------
    LayoutError
        If this layout cannot hold the tensor.
    """
    n, k = tensor.shape
    if tensor.num_planes != 1 or tensor.granularity != PerTensor():
        got = f"{tensor.num_planes} planes, {tensor.granularity}"
        raise LayoutError("TernaryTensor", f"{got}; BitNet's layout holds one plane with PerTensor()")
    if n % PER_BYTE:
        raise LayoutError("TernaryTensor", f"out_features={n} is not divisible by {PER_BYTE}, as BitNet's layout needs")
    quarter = n // PER_BYTE
    packed = np.zeros((quarter, k), dtype=np.uint8)
    for i in range(PER_BYTE):
        trits = tensor.trits(slice(i * quarter, (i + 1) * quarter))[0]
        packed |= (trits + np.int8(1)).astype(np.uint8) << np.uint8(2 * i)
    scale = tensor.scale.reshape(1)
    return packed, np.float32(1) / scale if scaling is Scaling.DIVIDE else scale


def ternarize_online(weight: npt.NDArray[np.floating], dtype: str, *, name: str = "weight") -> TernaryTensor:
    """Make a float matrix ternary as the loader of an ``online`` checkpoint does.

    A matrix whose values are s * {-1, 0, 1} already comes back with that s: rounding it again would only change the
    scale, to s times the share of weights that are not zero.

    Parameters
    ----------
    weight : (N, K) float
        Widened to float32.
    dtype : str
        In which the loader holds weights: the scale is rounded to it, as its products are.
    name : str
        What errors call the matrix.

    Returns
    -------
    TernaryTensor
        One plane, one scale.

    Raises
    ------
    LayoutError
        If a value is not finite, or there is no such dtype.

    References
    ----------
    Ma et al., "The Era of 1-bit LLMs", arXiv:2402.17764, eq. (1) to (3).
    """
    if dtype not in ("float32", "float16", "bfloat16"):
        raise LayoutError(name, f"is held as {dtype}, expected float32, float16 or bfloat16")
    n, k = weight.shape
    total, least, largest = 0.0, np.float32(np.inf), np.float32(0)
    for rows in row_blocks(n, k):
        magnitude = np.abs(weight[rows].astype(np.float32, copy=False))
        if not np.isfinite(magnitude).all():
            raise LayoutError(name, "holds NaN or infinity, expected finite values", "mend the checkpoint")
        total += float(magnitude.sum(dtype=np.float64))
        largest = max(largest, magnitude.max(initial=0))
        least = min(least, magnitude.min(initial=np.inf, where=magnitude > 0))
    if largest == 0 or least == largest:
        scale, inverse = largest, np.float32(1) / largest if largest else np.float32(0)
    else:
        mean = max(np.float32(total / (n * k)), LEAST_MEAN)
        scale, inverse = _rounded(mean, dtype), np.float32(1) / mean
    planes = np.empty((1, 2, n, plane_words(k)), dtype=np.uint64)
    for rows in row_blocks(n, k):
        multiples = np.rint(weight[rows].astype(np.float32, copy=False) * inverse)
        planes[0, :, rows] = pack_planes(multiples > 0, multiples < 0)
    return TernaryTensor(planes, np.full((1, 1, 1), scale, dtype=np.float32), (n, k), PerTensor())


def _rounded(value: np.float32, dtype: str) -> np.float32:
    """Round to a dtype, ties to even, and widen again."""
    if dtype != "bfloat16":
        return np.float32(value.astype(dtype))
    bits = int(value.view(np.uint32))
    kept = bits + 0x7FFF + (bits >> 16 & 1) & ~0xFFFF
    return np.float32(np.uint32(kept).view(np.float32))
