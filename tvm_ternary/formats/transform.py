"""What is done to a matrix's input before it is multiplied: a scale for each channel, then a rotation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import LayoutError
from tvm_ternary.formats.hadamard import hadamard, require_block


@dataclass(frozen=True, eq=False)
class InputTransform:
    """A transform of inputs x (..., K) that can be taken back in the weight, so that products stay what they are.

    Parameters
    ----------
    scale : (K,) float32, optional
        Positive; x is multiplied by it.
    rotation : int, optional
        Block of the Walsh-Hadamard transform that follows (`formats.hadamard`).

    Raises
    ------
    LayoutError
        If the scale is no vector of positive, finite float32.
    OptionError
        If the block is no power of two.
    """

    scale: npt.NDArray[np.float32] | None = None
    rotation: int | None = None

    def __post_init__(self) -> None:
        if self.scale is not None:
            problem = None
            if self.scale.dtype != np.float32 or self.scale.ndim != 1:
                problem = f"{self.scale.dtype} of shape {self.scale.shape}"
            elif not (np.isfinite(self.scale) & (self.scale > 0)).all():
                problem = (
                    f"element {int(np.argmin(np.isfinite(self.scale) & (self.scale > 0)))} is not positive and finite"
                )
            if problem:
                raise LayoutError("input scale", f"{problem}; expected positive float32 (K,)")
        if self.rotation is not None:
            require_block(self.rotation)

    @property
    def key(self) -> tuple[bytes | None, int | None]:
        """Equal for transforms that do the same."""
        return None if self.scale is None else self.scale.tobytes(), self.rotation

    @property
    def is_identity(self) -> bool:
        """Whether nothing is done."""
        return self.scale is None and self.rotation is None

    def apply(self, x: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """What becomes of inputs (..., K), in their dtype."""
        scaled = x if self.scale is None else x * self.scale.astype(x.dtype)
        return scaled if self.rotation is None else hadamard(scaled, self.rotation)

    def weight(self, w: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """The weight (N, K) for transformed inputs: ``apply(x) @ weight(w).T`` is x w^T, up to rounding."""
        scaled = w if self.scale is None else w / self.scale.astype(w.dtype)
        return scaled if self.rotation is None else hadamard(scaled, self.rotation)

    def restore(self, w: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """The weight (N, K) for inputs as they are; takes back what `weight` does."""
        turned = w if self.rotation is None else hadamard(w, self.rotation)
        return turned if self.scale is None else turned * self.scale.astype(w.dtype)
