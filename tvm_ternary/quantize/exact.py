"""Recognise a float matrix that is ternary already, so that it comes through bit-exact."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from tvm_ternary.formats.granularity import Granularity, PerChannel, PerTensor, row_blocks
from tvm_ternary.formats.planes import pack_planes, plane_words
from tvm_ternary.formats.ternary import TernaryTensor


def recognise(w: npt.NDArray[np.floating], granularities: Iterable[Granularity]) -> TernaryTensor | None:
    """Read a matrix whose values are s * {-1, 0, 1} in every unit of a granularity, each unit with its own s.

    Parameters
    ----------
    w : (N, K) float or integer
        Values that are not exact in float32, NaN and infinity belong to no ternary matrix.
    granularities : iterable of Granularity
        Tried from the coarsest (tensor, channel, then groups from wide to narrow).

    Returns
    -------
    TernaryTensor or None
        One plane with the coarsest granularity that fits, ``dequantize()`` equal to ``w`` in every element (``==``:
        -0.0 comes back as 0.0); None if none fits. A unit of zeros has scale 0.
    """
    for granularity in sorted(granularities, key=lambda g: _fineness(g, *w.shape)):
        found = _recognise_at(w, granularity)
        if found is not None:
            return found
    return None


def _fineness(granularity: Granularity, n: int, k: int) -> tuple[int, int]:
    kind = 0 if isinstance(granularity, PerTensor) else 1 if isinstance(granularity, PerChannel) else 2
    return kind, granularity.groups(k)


def _recognise_at(w: npt.NDArray[np.floating], granularity: Granularity) -> TernaryTensor | None:
    n, k = w.shape
    planes = np.empty((1, 2, n, plane_words(k)), dtype=np.uint64)
    scale = np.zeros((1, *granularity.scale_shape(n, k)), dtype=np.float32)
    for rows in row_blocks(n, k) if k else ():
        with np.errstate(over="ignore"):
            block = w[rows].astype(np.float32)
        if not np.array_equal(block, w[rows]):
            return None
        magnitude = np.abs(block)
        largest = np.maximum.reduceat(magnitude, range(0, k, granularity.group_size(k)), axis=1)
        if isinstance(granularity, PerTensor):
            # The scale that earlier blocks brought counts in; a block that raises it after that shows two magnitudes.
            largest = np.maximum(largest.max(axis=0, keepdims=True), scale[0])
            if scale[0] not in (0, largest):
                return None
            scale[0] = largest
        else:
            scale[0, rows] = largest
        ternary = (magnitude == 0) | (magnitude == granularity.spread(largest, k))
        if not ternary.all() or not np.isfinite(largest).all():
            return None
        planes[0, :, rows] = pack_planes(block > 0, block < 0)
    return TernaryTensor(planes, scale, (n, k), granularity)
