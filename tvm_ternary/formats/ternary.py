"""A ternary matrix as data: bit planes, scales, shape and granularity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import LayoutError
from tvm_ternary.formats.granularity import Granularity, row_blocks
from tvm_ternary.formats.planes import WORD_BITS, pack_planes, plane_words, unpack_planes
from tvm_ternary.formats.scheme import MAX_PLANES
from tvm_ternary.formats.transform import InputTransform


@dataclass(frozen=True, eq=False)
class TernaryTensor:
    """An (N, K) matrix w = sum over p of scale[p] * trits[p], with trits in {-1, 0, 1}.

    Two tensors compare equal only if they are the same object; compare `planes` and `scale` for equal content. The
    arrays are not copied and must not be changed afterwards.

    Parameters
    ----------
    planes : (P, 2, N, ceil(K / 64)) uint64
        Plus, then minus, never both set; bit i of word j is k = 64 * j + i; bits past K are zero. P is 1 to 4.
    scale : (P, rows, groups) float32
        ``(rows, groups)`` is ``granularity.scale_shape(N, K)``. Finite; a refit can make one negative.
    shape : (int, int)
        N (out_features) and K (in_features).
    granularity : Granularity
        Which weights share a scale.
    transform : InputTransform, optional
        What becomes of its inputs before they are multiplied by the planes.

    Raises
    ------
    LayoutError
        If an array's dtype, shape or content is not as described.
    """

    planes: npt.NDArray[np.uint64]
    scale: npt.NDArray[np.float32]
    shape: tuple[int, int]
    granularity: Granularity
    transform: InputTransform | None = None

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def from_trits(
        cls, trits: npt.NDArray[np.int8], scale: npt.NDArray[np.float32], granularity: Granularity
    ) -> TernaryTensor:
        """Pack trits.

        Parameters
        ----------
        trits : (P, N, K) int8
            -1, 0 or 1.
        scale : (P, rows, groups) float32
        granularity : Granularity

        Raises
        ------
        LayoutError
            If trits have another dtype, rank or value, or the scale does not fit.
        """
        if trits.dtype != np.int8 or trits.ndim != 3:
            raise LayoutError("trits", f"{trits.dtype} of shape {trits.shape}, expected int8 of shape (planes, N, K)")
        if trits.size and (trits.min() < -1 or trits.max() > 1):
            raise LayoutError("trits", f"values from {trits.min()} to {trits.max()}, expected -1, 0 or 1")
        _, n, k = trits.shape
        return cls(pack_planes(trits > 0, trits < 0), scale, (n, k), granularity)

    def validate(self) -> None:
        """Check dtypes, shapes and content.

        Raises
        ------
        LayoutError
            Naming the array, what it is and what it should be.
        """
        if len(self.shape) != 2 or min(self.shape) < 0:
            raise LayoutError("TernaryTensor", f"shape {self.shape}, expected (N, K)")
        n, k = self.shape
        count = self.planes.shape[0] if self.planes.ndim else 0
        expected = (count, 2, n, plane_words(k))
        if not 1 <= count <= MAX_PLANES or self.planes.dtype != np.uint64 or self.planes.shape != expected:
            wanted = f"uint64 of shape (1 to {MAX_PLANES}, 2, {n}, {plane_words(k)})"
            raise LayoutError("planes", f"{self.planes.dtype} of shape {self.planes.shape}, expected {wanted}")
        scale_shape = (count, *self.granularity.scale_shape(n, k))
        if self.scale.dtype != np.float32 or self.scale.shape != scale_shape:
            wanted = f"float32 of shape {scale_shape} for {self.granularity}"
            raise LayoutError("scale", f"{self.scale.dtype} of shape {self.scale.shape}, expected {wanted}")
        if not np.isfinite(self.scale).all():
            raise LayoutError("scale", "holds NaN or infinity, expected finite values")
        scale_of = self.transform.scale if self.transform is not None else None
        if scale_of is not None and scale_of.shape != (k,):
            raise LayoutError("input scale", f"shape {scale_of.shape}, expected ({k},)")
        if (self.planes[:, 0] & self.planes[:, 1]).any():
            raise LayoutError("planes", "a weight is marked both plus and minus, expected one of them at most")
        if k % WORD_BITS and (self.planes[..., -1] >> np.uint64(k % WORD_BITS)).any():
            raise LayoutError("planes", f"wider than K: bits past k={k} are set, expected zeros")

    def trits(self, rows: slice = slice(None)) -> npt.NDArray[np.int8]:
        """Unpack trits: (P, N, K) int8, or only the given rows of each plane."""
        return unpack_planes(self.planes[:, :, rows], self.shape[1])

    def dequantize(self, rows: slice = slice(None)) -> npt.NDArray[np.float32]:
        """Compute the float matrix.

        Parameters
        ----------
        rows : slice, optional
            Rows of the matrix; all of them if left out.

        Returns
        -------
        (N, K) float32
            scale[0] * trits[0] + scale[1] * trits[1] + ..., each product and each sum rounded to float32 in this order;
            where inputs are transformed, with that taken back, so that it is the matrix for inputs as they are.
        """
        n, k = self.shape
        start, stop, step = rows.indices(n)
        out = np.empty((len(range(start, stop, step)), k), dtype=np.float32)
        chosen = self.planes[:, :, rows]
        scales = np.broadcast_to(self.scale, (self.num_planes, n, self.scale.shape[2]))[:, rows]
        for block in row_blocks(*out.shape):
            for p in range(self.num_planes):
                trits = unpack_planes(chosen[p, :, block], k).astype(np.float32)
                trits *= self.granularity.spread(scales[p, block], k)
                if p == 0:
                    out[block] = trits
                else:
                    out[block] += trits
            if self.transform is not None:
                out[block] = self.transform.restore(out[block])
        return out

    @property
    def num_planes(self) -> int:
        """Trit planes, 1 to 4."""
        return int(self.planes.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.planes.nbytes + self.scale.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Two bits for each trit and 32 for each scale, over N * K weights; 0 for an empty matrix.

        Padding is left out: it belongs to a layout, not to the scheme. `nbytes` counts it.
        """
        weights = self.shape[0] * self.shape[1]
        return 2 * self.num_planes + 32 * self.scale.size / weights if weights else 0.0

    @property
    def sparsity(self) -> tuple[float, ...]:
        """Share of zero trits in each plane, 0 to 1; 0 for an empty matrix."""
        weights = self.shape[0] * self.shape[1]
        if not weights:
            return (0.0,) * self.num_planes
        return tuple(1.0 - int(np.bitwise_count(plane).sum(dtype=np.int64)) / weights for plane in self.planes)
