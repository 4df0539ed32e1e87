"""What the kernels compute, in float64 and by other means: weights spelled out, activations rounded, one product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.formats import (
    CODES_BLOCK,
    PerGroup,
    Scheme,
    TernaryTensor,
    group_segments,
    pack_bits,
    pack_codes,
    pack_planes,
    pack_scale,
    pack_shared,
    with_shared_scales,
)

UNIT = 2.0**-24
TINY = 1e-30
SMALLEST = np.float32(2.0**-100)
_SCALINGS = 8
_CLEARANCE = 1e-3


@dataclass(frozen=True)
class Matrix:
    """A ternary weight as kernels read it, and spelled out.

    Attributes
    ----------
    scheme : Scheme
    packed : tuple of ndarray
        In the order of the kernel's parameters.
    dense : (N, K) float64
    sizes : (N, K) float64
        Of each weight's planes, added: what rounding errors are bounded by.
    """

    scheme: Scheme
    packed: tuple[npt.NDArray[Any], ...]
    dense: npt.NDArray[np.float64]
    sizes: npt.NDArray[np.float64]


def random_matrix(n: int, k: int, text: str, generator: np.random.Generator) -> Matrix:
    """A random weight of a scheme."""
    scheme = Scheme.parse(text)
    trits = generator.integers(-1, 2, (scheme.planes, n, k))
    planes = np.stack([pack_planes(t > 0, t < 0) for t in trits])
    rows, groups = scheme.granularity.scale_shape(n, k)
    halves = 0.5 ** np.arange(scheme.planes)[:, None, None]
    scale = (generator.uniform(0.5, 1.5, (scheme.planes, rows, groups)) * halves).astype(np.float32)
    weight = TernaryTensor(planes, scale, (n, k), scheme.granularity)
    if scheme.activation_bits == 1:
        packed: tuple[npt.NDArray[Any], ...] = (pack_bits(weight), pack_scale(weight))
    else:
        weight = with_shared_scales(weight)
        factor, shared = pack_shared(weight)
        packed = (pack_codes(weight), *((factor,) if scheme.planes > 1 else ()), shared)
    width = scheme.granularity.group_size(k)
    spread = np.repeat(weight.scale.astype(np.float64), width, axis=2)[:, :, :k]
    return Matrix(scheme, packed, (trits * spread).sum(axis=0), (np.abs(trits) * spread).sum(axis=0))


def rounded(x: npt.NDArray[np.float32], scheme: Scheme) -> npt.NDArray[np.float64]:
    """The numbers that activations (M, K) stand for once they are what the scheme says."""
    if scheme.activation_bits == 16 and not scheme.bfloat:
        return x.astype(np.float16).astype(np.float64)
    if scheme.activation_bits == 16:
        bits = x.view(np.uint32).astype(np.uint64)
        nearest = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) & np.uint64(0xFFFF0000)
        return nearest.astype(np.uint32).view(np.float32).astype(np.float64)
    if scheme.activation_bits == 1:
        size = np.abs(x.astype(np.float64))
        kept = size > size.mean(axis=1, keepdims=True) / 2
        scale = np.where(kept, size, 0).sum(axis=1) / np.maximum(kept.sum(axis=1), 1)
        result: npt.NDArray[np.float64] = np.sign(x) * kept * scale[:, None]
        return result
    k = x.shape[1]
    width = scheme.granularity.group_size(k) if isinstance(scheme.granularity, PerGroup) else k
    result = np.empty(x.shape, np.float64)
    for first in range(0, k, width):
        part = x[:, first : first + width]
        peak = np.maximum(np.abs(part).max(axis=1), SMALLEST)[:, None]
        result[:, first : first + width] = np.rint(part * (np.float32(127) / peak)).astype(np.float64) * (
            peak / np.float32(127)
        ).astype(np.float64)
    return result


def random_activations(m: int, k: int, scheme: Scheme, generator: np.random.Generator) -> npt.NDArray[np.float32]:
    """Normal numbers (M, K), none of which a last place of float32 could round to another trit."""
    x = generator.standard_normal((m, k)).astype(np.float32)
    if scheme.activation_bits == 1:
        size = np.abs(x)
        limit = size.mean(axis=1, keepdims=True, dtype=np.float64) / 2
        x[np.abs(size - limit) < _CLEARANCE * limit] = 0
    return x


def roundings(k: int, scheme: Scheme) -> float:
    """By what share of a sum's terms float32 may change it: a rounding for each term that is added as a float and for
    each scaling (Higham 2002, lemma 3.1). Whole numbers are added exactly, so that of 8 bits and 1 bit a term is all
    that shares a scale.
    """
    bits, groups = scheme.activation_bits, scheme.granularity.groups(k)
    if bits == 16:
        count = k * scheme.planes
    elif bits == 8:
        count = groups * group_segments(scheme.granularity.group_size(k), CODES_BLOCK)[0]
    else:
        count = groups * scheme.planes
    unit = (count + _SCALINGS) * UNIT
    return unit / (1 - unit)


def scale_roundings(k: int, scheme: Scheme) -> float:
    """By what share of itself a result may differ because its activations' scale is a mean of K floats (1 bit)."""
    return (k + _SCALINGS) * UNIT if scheme.activation_bits == 1 else 0.0


def bound(x: npt.NDArray[np.float64], matrix: Matrix) -> npt.NDArray[np.float64]:
    """What float32 may change of a product."""
    k = x.shape[1]
    limit = roundings(k, matrix.scheme) * (np.abs(x) @ matrix.sizes.T) + TINY
    return limit + scale_roundings(k, matrix.scheme) * np.abs(x @ matrix.dense.T)
