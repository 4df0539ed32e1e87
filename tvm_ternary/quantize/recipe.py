"""How a matrix is fitted; what it becomes is its scheme."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm_ternary.errors import OptionError
from tvm_ternary.formats.hadamard import require_block
from tvm_ternary.quantize.methods import METHODS

LEVELS = "planes"
"""The method that fits all planes of a group together: `quantize.start`."""


@dataclass(frozen=True)
class Recipe:
    """How matrices are fitted.

    Parameters
    ----------
    method : str
        ``planes`` fits all planes of a group together; a key of `METHODS` fits one after the other.
    compensate : bool
        Whether, given calibration data, trits are chosen for the smallest output error (`quantize.compensate`).
    act_order : bool
        Whether columns with large inputs are rounded first.
    damping : float
        Share of the mean of the inputs' squares that is added to each, at least 0.
    sweeps : int
        Passes of coordinate descent, each behind a solution for the scales; 0 leaves what the first pass chose.
    correct_inputs : float
        0 to 1: how far a matrix makes up for what quantizing those before it did to its inputs.
    scaling : bool
        Whether inputs are scaled channel by channel for the smallest rounding error, with calibration data (AWQ); the
        scale goes into the norm before where that is possible, and is applied at run time elsewhere.
    rotation : int
        Block of a Walsh-Hadamard transform of the inputs, at run time: a power of two, 0 for none.

    Raises
    ------
    OptionError
        If the method does not exist or a number is out of range.
    """

    method: str = LEVELS
    compensate: bool = True
    act_order: bool = True
    damping: float = 0.01
    sweeps: int = 3
    correct_inputs: float = 0.5
    scaling: bool = False
    rotation: int = 0

    def __post_init__(self) -> None:
        if self.method != LEVELS and self.method not in METHODS:
            known = ", ".join((LEVELS, *METHODS))
            raise OptionError(f"method {self.method!r}", f"unknown, expected one of {known}", "the default is planes")
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise OptionError("option damping", f"{self.damping!r}, expected a number from 0", "the default is 0.01")
        if type(self.sweeps) is not int or self.sweeps < 0:
            raise OptionError("option sweeps", f"{self.sweeps!r}, expected a whole number from 0", "the default is 3")
        if not 0 <= self.correct_inputs <= 1:
            raise OptionError(
                "option correct_inputs", f"{self.correct_inputs!r}, expected 0 to 1", "the default is 0.5"
            )
        if self.rotation:
            require_block(self.rotation)
