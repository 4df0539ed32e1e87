"""The fast transform against its closed form, and what can be taken back in a weight."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_ternary.errors import LayoutError, OptionError
from tvm_ternary.formats.hadamard import MOST_BLOCK, hadamard, hadamard_matrix
from tvm_ternary.formats.transform import InputTransform


def kronecker(size: int) -> np.ndarray:
    """Sylvester's construction, 1867: H of 2n is [[H, H], [H, -H]]."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return matrix / np.sqrt(size)


@pytest.mark.parametrize("block", [2, 4, 8, 32, 256])
def test_the_fast_transform_is_the_closed_form(block: int) -> None:
    np.testing.assert_allclose(hadamard_matrix(block), kronecker(block), rtol=1e-15)
    x = np.random.default_rng(block).standard_normal((3, 2, 2 * block + block // 2))
    got = hadamard(x, block)
    for start in (0, block):
        part = slice(start, start + block)
        np.testing.assert_allclose(got[..., part], x[..., part] @ kronecker(block), rtol=0, atol=1e-13)
    # The tail is no whole block.
    np.testing.assert_array_equal(got[..., 2 * block :], x[..., 2 * block :])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_is_orthonormal_and_its_own_inverse(dtype: type[np.floating]) -> None:
    x = np.random.default_rng(0).standard_normal((5, 4096)).astype(dtype)
    y = hadamard(x, 4096)
    assert y.dtype == dtype
    # Each of 12 additions and one product rounds once.
    bound = 26 * np.finfo(dtype).eps * np.linalg.norm(x)
    assert np.abs(hadamard(y, 4096) - x).max() <= bound
    assert abs(np.linalg.norm(y) - np.linalg.norm(x)) <= bound


def test_an_outlier_is_spread_over_its_block() -> None:
    x = np.zeros((1, 96))
    x[0, 70] = 8
    np.testing.assert_allclose(np.abs(hadamard(x, 32)), [[0] * 64 + [8 / np.sqrt(32)] * 32], rtol=1e-15)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 3)])
def test_empty_and_short_rows(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(1).standard_normal(shape)
    assert hadamard(x, 4).shape == shape
    if shape[-1] < 4:
        np.testing.assert_array_equal(hadamard(x, 4), x)


@pytest.mark.parametrize("block", [0, 1, 3, -4, 2 * MOST_BLOCK, 8.0, True])
def test_a_block_that_is_no_power_of_two_is_refused(block: int) -> None:
    with pytest.raises(OptionError, match="expected a power of two from 2 to 4096"):
        hadamard(np.zeros((1, 8)), block)


@pytest.mark.parametrize("rotation", [None, 2, 16])
@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_done_to_inputs_is_taken_back_in_the_weight(rotation: int | None, scaled: bool) -> None:
    random = np.random.default_rng(3)
    x, w = random.standard_normal((7, 37)), random.standard_normal((5, 37))
    scale = random.uniform(0.1, 10, 37).astype(np.float32) if scaled else None
    transform = InputTransform(scale, rotation)
    assert transform.is_identity == (not scaled and rotation is None)
    np.testing.assert_allclose(transform.apply(x) @ transform.weight(w).T, x @ w.T, rtol=0, atol=1e-12)


def test_transforms_that_do_the_same_have_the_same_key() -> None:
    ones = np.ones(3, np.float32)
    assert InputTransform(ones, 4).key == InputTransform(ones.copy(), 4).key
    others = [InputTransform(ones, 8), InputTransform(2 * ones, 4), InputTransform(None, 4), InputTransform(ones)]
    assert len({t.key for t in (InputTransform(ones, 4), *others)}) == 5


@pytest.mark.parametrize(
    ("scale", "problem"),
    [
        (np.ones(3), "float64 of shape"),
        (np.ones((3, 1), np.float32), r"shape \(3, 1\)"),
        (np.array([1, 0, 1], np.float32), "element 1 is not positive"),
        (np.array([1, 1, np.nan], np.float32), "element 2 is not positive"),
        (np.array([np.inf, 1], np.float32), "element 0 is not positive"),
    ],
)
def test_a_scale_that_cannot_be_taken_back_is_refused(scale: np.ndarray, problem: str) -> None:
    with pytest.raises(LayoutError, match=problem):
        InputTransform(scale)
