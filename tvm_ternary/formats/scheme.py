"""A quantization scheme and its short name: ``t1a8g128`` says all there is to say."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tvm_ternary.errors import OptionError
from tvm_ternary.formats.granularity import Granularity, PerChannel, PerGroup, PerTensor

MAX_PLANES = 4
ACTIVATION_BITS = (32, 16, 8, 1)
SHARED_SCALES = (16, 8)
"""Bits of the activations whose kernels want one scale for all planes (see `formats.factors`)."""
PACKINGS: dict[str, tuple[int, ...]] = {"fast": ACTIVATION_BITS, "dense": (8,)}
"""How trits may lie in memory, and the bits of the activations that there is a kernel for.

``fast`` takes 2 bits a weight and the fewest operations; ``dense`` 1.6 bits and about twice as many.
"""

_SUFFIX = r"pt|g[1-9][0-9]{0,17}|"
_NAME = re.compile(rf"t([1-4])a(32|bf16|16|8|1)({_SUFFIX})")
_GRAMMAR = "t{1-4}a{32|bf16|16|8|1}, then nothing (a scale a row), g{size} (a scale a group) or pt (one scale)"
_EXAMPLE = "for example t1a8g128, t2a32 or t1a1pt"


@dataclass(frozen=True)
class Scheme:
    """What a float matrix becomes and what it is multiplied with.

    Parameters
    ----------
    planes : int
        Trit planes, 1 to 4: the weight is the sum of scale times trits over them.
    activation_bits : int
        32 (float32 activations), 16 (float16), 8 (int8, quantized per row at run time) or 1 (ternary activations).
    granularity : Granularity
        Which weights share a scale.
    bfloat : bool
        Whether 16 bits are bfloat16: the range of float32, eight bits of precision instead of eleven.

    Raises
    ------
    OptionError
        If a value is none of these.
    """

    planes: int
    activation_bits: int
    granularity: Granularity
    bfloat: bool = False

    def __post_init__(self) -> None:
        if type(self.planes) is not int or not 1 <= self.planes <= MAX_PLANES:
            raise OptionError("Scheme", f"planes={self.planes!r}, expected 1 to {MAX_PLANES}", _EXAMPLE)
        if type(self.activation_bits) is not int or self.activation_bits not in ACTIVATION_BITS:
            raise OptionError("Scheme", f"activation_bits={self.activation_bits!r}, expected 32, 16, 8 or 1", _EXAMPLE)
        if self.bfloat and self.activation_bits != 16:
            raise OptionError("Scheme", f"bfloat with {self.activation_bits} bits, expected 16", "for example t1abf16")
        if not isinstance(self.granularity, Granularity):
            kinds = "PerTensor(), PerChannel() or PerGroup(size)"
            raise OptionError("Scheme", f"granularity={self.granularity!r}, expected {kinds}", _EXAMPLE)

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read a short name such as ``t1a8g128``.

        Raises
        ------
        OptionError
            If the text is no scheme's name; the message lists what a name is made of.
        """
        match = _NAME.fullmatch(text)
        if match is None:
            raise OptionError(f"scheme {text!r}", f"unknown, expected {_GRAMMAR}", _EXAMPLE)
        planes, bits, suffix = match.groups()
        return cls(int(planes), int(bits.removeprefix("bf")), granularity_from_suffix(suffix), bits == "bf16")

    def __str__(self) -> str:
        return f"t{self.planes}{self.activation}{self.granularity.suffix}"

    @property
    def activation(self) -> str:
        """How the name writes the activations: ``a32``, ``a16``, ``abf16``, ``a8`` or ``a1``."""
        return f"a{'bf' if self.bfloat else ''}{self.activation_bits}"


def require_packing(packing: str, activation_bits: int) -> None:
    """Refuse a packing that does not exist, at all or for these activations.

    Raises
    ------
    OptionError
        The message lists what exists.
    """
    if packing not in PACKINGS:
        raise OptionError(f"packing {packing!r}", f"does not exist; expected one of {', '.join(PACKINGS)}")
    if activation_bits not in PACKINGS[packing]:
        kinds = " and ".join(f"a{bits}" for bits in PACKINGS[packing])
        problem = f"does not exist for a{activation_bits} schemes; expected {kinds}"
        raise OptionError(f"packing {packing!r}", problem, "leave packing out, or choose another scheme")


def parse_packed(text: str) -> tuple[Scheme, str]:
    """Read a scheme's short name, perhaps with a packing: ``t1a8`` or ``t1a8/dense``.

    Raises
    ------
    OptionError
        If there is no such scheme or packing, or not both together.
    """
    name, slash, packing = text.partition("/")
    scheme, chosen = Scheme.parse(name), packing if slash else "fast"
    require_packing(chosen, scheme.activation_bits)
    return scheme, chosen


def granularity_from_suffix(suffix: str) -> Granularity:
    """Read what `Granularity.suffix` writes: ``""``, ``"pt"`` or ``"g128"``.

    Raises
    ------
    OptionError
        If the text is none of these.
    """
    if re.fullmatch(_SUFFIX, suffix) is None:
        problem = "unknown, expected nothing (a scale a row), g{size} or pt"
        raise OptionError(f"granularity {suffix!r}", problem, "for example g128")
    if suffix == "":
        return PerChannel()
    return PerTensor() if suffix == "pt" else PerGroup(int(suffix[1:]))
