"""Packed weights made on the device that reads them, and spelled out there by the layouts' definition, with torch.

Matrices of hundreds of megabytes are not packed by numpy within a visit. Nothing here is shared with the kernels or
with `tvm_ternary.formats`' packers, so that it is a second reading of the layouts (`formats/layouts.py`).
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.kernels import activation_arrays
from tvm_ternary.formats import BITS_BLOCK, CODES_BLOCK, LANES, Scheme, padded_k

_LARGEST_FACTOR = 15  # four planes' still sum to less than 63
_LOW_BITS, _HIGH_BITS = 0x55555555, -0x55555556  # of each pair, as int32


def random_packed(torch: Any, scheme: Scheme, n: int, k: int, place: str) -> list[Any]:
    """A kernel's constants for random trits, in the order of its parameters.

    Parameters
    ----------
    torch : module
    scheme : Scheme
    n, k : int
        Without padding: N of whole blocks of 16, K of whole groups, groups of whole words.
    place : str
        ``cuda`` or ``cpu``.
    """
    one_bit = scheme.activation_bits == 1
    block = BITS_BLOCK if one_bit else CODES_BLOCK
    groups, width = padded_k(k, scheme.granularity, block)
    assert n % LANES == 0, n
    assert groups * width == k, (k, groups, width)
    words = (scheme.planes, n // LANES, k // block, LANES)
    one, two = (torch.randint(-(2**31), 2**31, words, device=place, dtype=torch.int32) for _ in range(2))
    scale = torch.rand((*((scheme.planes,) if one_bit else ()), groups, n), device=place) + 0.5
    if one_bit:
        return [torch.stack([one, one & two], 3).view(torch.uint32), scale]
    high = one & _HIGH_BITS
    codes = (high | (two & _LOW_BITS & ~(high >> 1))).view(torch.uint32)
    if scheme.planes == 1:
        return [codes, scale]
    size = (scheme.planes, groups, n)
    return [codes, torch.randint(-_LARGEST_FACTOR, _LARGEST_FACTOR + 1, size, device=place, dtype=torch.int8), scale]


def spelled_out(torch: Any, packed: list[Any], scheme: Scheme, n: int, k: int) -> tuple[Any, Any]:
    """The (N, K) weights that packed constants stand for, float64, and the sizes of each one's planes, added.

    K of whole groups of whole words, as for `random_packed`; N may be any.
    """
    trits = (_trits_of_bits if scheme.activation_bits == 1 else _trits_of_codes)(torch, packed[0])
    dense = torch.zeros(trits.shape[1:], dtype=torch.float64, device=trits.device)
    sizes = torch.zeros_like(dense)
    for plane, one in enumerate(trits):
        scale = packed[-1][plane] if packed[-1].ndim == 3 else packed[-1]
        scale = scale.double() * packed[1][plane].double() if len(packed) == 3 else scale.double()
        spread = scale.t().repeat_interleave(k // scale.shape[0], dim=1)
        dense.addcmul_(one.double(), spread)
        sizes.addcmul_(one.abs().double(), spread.abs())
    return dense[:n], sizes[:n]


def _trits_of_codes(torch: Any, codes: Any) -> Any:
    """(P, B, W, 16) words of 16 codes -> (P, 16 B, 16 W) trits: k = 4 s + j stands at bit 8 j + 2 s, as trit + 1."""
    shift = torch.tensor([8 * (i % 4) + 2 * (i // 4) for i in range(16)], dtype=torch.int32, device=codes.device)
    planes = []
    for words in codes.view(torch.int32):
        trits = (((words.unsqueeze(-1) >> shift) & 3) - 1).to(torch.int8)
        planes.append(_by_rows(trits))
    return torch.stack(planes)


def _trits_of_bits(torch: Any, bits: Any) -> Any:
    """(P, B, W, 2, 16) words of 32 bits, nonzero and minus -> (P, 16 B, 32 W) trits: k = i stands at bit i."""
    shift = torch.arange(32, dtype=torch.int32, device=bits.device)
    planes = []
    for words in bits.view(torch.int32):
        nonzero, minus = (((words[:, :, half].unsqueeze(-1) >> shift) & 1).to(torch.int8) for half in range(2))
        planes.append(_by_rows(nonzero - 2 * minus))
    return torch.stack(planes)


def _by_rows(trits: Any) -> Any:
    """(B, W, 16, width) -> (16 B, W width)."""
    blocks, words, lanes, width = trits.shape
    return trits.permute(0, 2, 1, 3).reshape(blocks * lanes, words * width)


def empty_activations(torch: Any, scheme: Scheme, m: int, k: int, place: str) -> list[Any]:
    """Arrays for what a kernel reads of M rows, full of what would be found: NaN, or a pattern of bits."""
    made = []
    for shape, dtype in activation_arrays(scheme, m, k):
        if dtype == "uint32":
            made.append(torch.full(shape, 0x55555555, dtype=torch.int32, device=place).view(torch.uint32))
            continue
        kind = getattr(torch, dtype)
        made.append(torch.full(shape, float("nan") if kind.is_floating_point else 0x55, dtype=kind, device=place))
    return made
