"""BitNet's layouts against their definitions, element by element, and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.errors import LayoutError
from tvm_ternary.formats import PerChannel, PerTensor, TernaryTensor
from tvm_ternary.formats.bitnet import Scaling, pack_bitnet, ternarize_online, unpack_bitnet

from .strategies import assert_same, block_elements, blocks, make_tensor


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Float32 values cut to what bfloat16 holds."""
    return (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def packed_by_definition(trits: np.ndarray) -> np.ndarray:
    """Two bits at a time: row i * N / 4 + r stands in bits 2 i and 2 i + 1 of row r."""
    n, k = trits.shape
    out = np.zeros((n // 4, k), dtype=int)
    for (row, column), trit in np.ndenumerate(trits):
        i, r = divmod(row, n // 4)
        out[r, column] |= (int(trit) + 1) << 2 * i
    return out.astype(np.uint8)


@pytest.mark.parametrize("scaling", Scaling)
@given(quarter=st.integers(0, 9), k=st.integers(0, 140), seed=st.integers(0, 2**31), elements=blocks)
def test_packed_bytes_are_as_defined_and_come_back(
    quarter: int, k: int, seed: int, elements: int, scaling: Scaling
) -> None:
    rng = np.random.default_rng(seed)
    trits = rng.integers(-1, 2, (1, 4 * quarter, k), dtype=np.int8)
    # A power of two has an exact reciprocal.
    tensor = TernaryTensor.from_trits(trits, np.full((1, 1, 1), 0.125, np.float32), PerTensor())
    packed, scale = pack_bitnet(tensor, scaling)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(packed, packed_by_definition(trits[0]) if quarter else np.zeros((0, k)))
    assert scale.tolist() == [0.125 if scaling is Scaling.MULTIPLY else 8.0]
    with block_elements(elements):
        assert_same(unpack_bitnet(packed, scale, scaling), tensor)


def test_documented_example() -> None:
    """The two bytes in the docstring of transformers' unpack_weights."""
    packed = np.array([[0b10100001, 0b00011000], [0b10010000, 0b00001010]], dtype=np.uint8)
    tensor = unpack_bitnet(packed, 0.5, Scaling.MULTIPLY)
    expected = [[0, -1], [-1, 1], [-1, 1], [-1, 1], [1, 0], [0, -1], [1, -1], [1, -1]]
    assert tensor.trits()[0].tolist() == expected
    assert tensor.scale.item() == 0.5


@pytest.mark.parametrize(
    ("packed", "scale", "message"),
    [
        (np.zeros((2, 3), np.int8), 1.0, r"q_proj\.weight: int8 of shape \(2, 3\), expected packed uint8"),
        (np.zeros(3, np.uint8), 1.0, r"shape \(3,\), expected packed uint8"),
        (np.full((2, 3), 0b1100, np.uint8), 1.0, r"q_proj\.weight: holds the code 3"),
        (np.zeros((2, 3), np.uint8), [1.0, 2.0], r"q_proj\.weight_scale: \[1\.0, 2\.0\], expected one positive number"),
        (np.zeros((2, 3), np.uint8), np.nan, "expected one positive number"),
        (np.zeros((2, 3), np.uint8), 0.0, "expected one positive number"),
    ],
)
def test_what_is_no_packed_matrix_is_refused(packed: np.ndarray, scale: object, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        unpack_bitnet(packed, scale, Scaling.DIVIDE, name="q_proj.weight")  # type: ignore[arg-type]


def test_what_the_layout_cannot_hold_is_refused() -> None:
    with pytest.raises(LayoutError, match="out_features=6 is not divisible by 4"):
        pack_bitnet(make_tensor(6, 5, PerTensor(), 1, 0), Scaling.MULTIPLY)
    for tensor in (make_tensor(8, 5, PerChannel(), 1, 0), make_tensor(8, 5, PerTensor(), 2, 0)):
        with pytest.raises(LayoutError, match=r"holds one plane with PerTensor\(\)"):
            pack_bitnet(tensor, Scaling.MULTIPLY)


@pytest.mark.parametrize("elements", [1, 2048])
def test_online_rounds_to_multiples_of_the_mean(elements: int) -> None:
    weight = bfloat16(np.random.default_rng(3).standard_normal((24, 70)) * 0.02)
    mean = np.abs(weight.astype(np.float64)).mean()
    with block_elements(elements):
        tensor = ternarize_online(weight, "float32")
    assert tensor.granularity == PerTensor()
    assert tensor.scale.item() == np.float32(mean)
    expected = np.clip(np.round(weight / mean), -1, 1)
    np.testing.assert_array_equal(tensor.trits()[0], expected)


def test_online_scale_is_rounded_as_the_loader_holds_weights() -> None:
    weight = np.random.default_rng(4).standard_normal((40, 33)).astype(np.float32)
    mean = np.abs(weight).mean(dtype=np.float64)
    held = ternarize_online(weight, "bfloat16").scale.item()
    above, below = bfloat16(np.float32(mean) * (1 + 2.0**-7)), bfloat16(np.float32(mean))
    assert held in (above, below)
    assert abs(held - mean) <= min(abs(above - mean), abs(below - mean))
    assert ternarize_online(weight, "float16").scale.item() == np.float16(mean)


@pytest.mark.parametrize("scale", [0.0173, 3.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_ternary_matrix_comes_through_online_unchanged(scale: float, dtype: str) -> None:
    trits = np.random.default_rng(5).integers(-1, 2, (1, 16, 40), dtype=np.int8)
    tensor = TernaryTensor.from_trits(trits, bfloat16(np.full((1, 1, 1), scale)), PerTensor())
    assert_same(ternarize_online(tensor.dequantize(), dtype), tensor)
    packed, stored = pack_bitnet(tensor, Scaling.MULTIPLY)
    assert_same(unpack_bitnet(packed, stored, Scaling.MULTIPLY), ternarize_online(tensor.dequantize(), dtype))


def test_online_zeros_and_empty_matrices() -> None:
    for shape in ((4, 5), (0, 5), (4, 0)):
        tensor = ternarize_online(np.zeros(shape, np.float32), "bfloat16")
        assert tensor.scale.item() == 0
        np.testing.assert_array_equal(tensor.dequantize(), np.zeros(shape))


def test_online_refuses_nan_and_unknown_dtypes() -> None:
    weight = np.ones((4, 4), np.float32)
    with pytest.raises(LayoutError, match="is held as int8, expected float32, float16 or bfloat16"):
        ternarize_online(weight, "int8")
    weight[2, 1] = np.nan
    with pytest.raises(LayoutError, match=r"up_proj\.weight: holds NaN or infinity"):
        ternarize_online(weight, "float32", name="up_proj.weight")
