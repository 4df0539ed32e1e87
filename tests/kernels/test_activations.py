"""What activations become before a matmul, and what rounding them costs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import tvm

from tests.ternary_matmul import NATIVE, TARGETS, UNIT, Matmul, build, gamma, pack_trits, runnable, segment_sums
from tvm_ternary.formats import Granularity, PerChannel, PerGroup, TernaryTensor, pad_groups, with_shared_scales
from tvm_ternary.kernels.activations import (
    PARALLEL_ROWS,
    SMALLEST_ABSMAX,
    int8_rows,
    padded_rows,
    reference_int8_rows,
    reference_ternary_rows,
    ternary_rows,
)
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.kernels.table import KERNELS
from tvm_ternary.ops import linear
from tvm_ternary.target import Target

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
LARGEST = float(np.finfo(np.float32).max)

# K and group: below, at and above a block; ragged, whole and single last groups; groups that are no multiple of one.
SIZES = [
    (1, PerChannel()),
    (16, PerChannel()),
    (40, PerGroup(8)),
    (50, PerGroup(20)),
    (95, PerGroup(32)),
    (257, PerGroup(64)),
    (4099, PerChannel()),
    (515, PerGroup(129)),
]
IDS = [f"{k}{kind.suffix or 'pc'}" for k, kind in SIZES]
ROWS = (0, 1, PARALLEL_ROWS - 1, PARALLEL_ROWS, 3 * PARALLEL_ROWS + 1)


def sizes(k: int, kind: Granularity) -> MatmulShape:
    """The shape of a weight (1, K)."""
    return MatmulShape(1, k, 1, kind.groups(k), kind.group_size(k))


def samples(rows: int, k: int, huge: float = LARGEST) -> Floats:
    """Rows in turn: normal, zero, up to ``huge``, denormal, below the smallest absmax, with outliers, ties, equal."""
    x = np.random.default_rng(rows + k).standard_normal((rows, k)).astype(np.float32)
    ties = (np.arange(k) % 254 - 127 + 0.5).astype(np.float32)
    ties[0] = 127
    for i, row in enumerate(x):
        kind = i % 8
        if kind == 1:
            row[:] = -0.0
        elif kind == 2:
            row[:] = row / np.abs(row).max().astype(np.float64) * huge
        elif kind == 3:
            row *= np.float32(1e-40)
        elif kind == 4:
            row *= np.float32(SMALLEST_ABSMAX / 8)
        elif kind == 5:
            row[:: max(1, k // 3)] *= 1000
        elif kind == 6:
            row[:] = ties
        elif kind == 7:
            row[:] = -3.25
    return x


class Rows:
    """A compiled row function called with numpy arrays; what it does not write stays as it was filled."""

    def __init__(self, function: tvm.tirx.PrimFunc, target: Target) -> None:
        self.library = build({"rows": function}, target)

    def __call__(self, x: Floats, *outputs: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
        results = [tvm.runtime.tensor(output) for output in outputs]
        self.library["rows"](tvm.runtime.tensor(x), *results)
        return [result.numpy() for result in results]


@pytest.mark.parametrize(("k", "kind"), SIZES, ids=IDS)
@pytest.mark.parametrize("block", [16, 20])
@pytest.mark.parametrize("target", TARGETS)
def test_int8_rows_equal_their_reference(target: str, block: int, k: int, kind: Granularity) -> None:
    shape = sizes(k, kind)
    quantize = Rows(int8_rows(shape, block), runnable(target))
    for rows in ROWS:
        x = samples(rows, k)
        filled, scales = np.full((rows, shape.padded_k(block)), 99, np.int8), np.full((rows, shape.groups), 99, "f4")
        sums = np.full((rows, shape.segments(block)), 99, np.int32)
        x_q, x_sum, x_scale = quantize(x, filled, sums, scales)
        expected, scale = reference_int8_rows(x, shape)
        padded = pad_groups(expected, kind, block)
        np.testing.assert_array_equal(x_q, padded)
        np.testing.assert_array_equal(x_scale, scale)
        np.testing.assert_array_equal(x_sum, segment_sums(padded, kind, k, block))


@pytest.mark.parametrize(("k", "kind"), SIZES, ids=IDS)
def test_int8_reference_rounds_to_the_nearest_step_of_the_largest_value(k: int, kind: Granularity) -> None:
    """x_q x_scale is within half a step of x; 127 times three roundings (of 127 / absmax, of its product with x, of the
    scale) may shift a value across a tie and count as 3 u 127 steps more."""
    shape, x = sizes(k, kind), samples(64, k)
    x_q, x_scale = reference_int8_rows(x, shape)
    step = np.repeat(x_scale.astype(np.float64), shape.group_size, axis=1)[:, :k]
    assert (np.abs(x - x_q * step) <= step * (0.5 + 3 * 127 * UNIT)).all()
    assert np.abs(x_q.astype(int)).max() == 127
    for g in range(shape.groups):
        part = slice(g * shape.group_size, (g + 1) * shape.group_size)
        largest = np.abs(x[:, part]).max(axis=1)
        normal = largest >= SMALLEST_ABSMAX
        np.testing.assert_allclose(127 * x_scale[normal, g].astype(np.float64), largest[normal], rtol=2 * UNIT)
        assert (np.abs(x_q[normal, part].astype(int)).max(axis=1) == 127).all()
        assert (x_scale[~normal, g] == np.float32(SMALLEST_ABSMAX) / np.float32(127)).all()


@pytest.mark.parametrize(("k", "kind"), SIZES, ids=IDS)
@pytest.mark.parametrize("target", TARGETS)
def test_ternary_rows_equal_their_reference(target: str, k: int, kind: Granularity) -> None:
    """The mean is a float32 sum in sixteen lanes: a value nearer to half of it than its error may fall either way."""
    shape = sizes(k, kind)
    ternarize = Rows(ternary_rows(shape), runnable(target))
    words = shape.padded_k(32) // 32
    error = gamma(k // 16 + 16 + 2)
    for rows in ROWS:
        x = samples(rows, k, huge=LARGEST / k)  # a row's sum must be finite
        filled = np.full((rows, words, 2), 0xFFFFFFFF, np.uint32)
        bits, x_scale = ternarize(x, filled, np.full(rows, 99, np.float32))
        trits, scale = reference_ternary_rows(x)
        size = np.abs(x.astype(np.float64))
        threshold = size.mean(axis=1, keepdims=True) / 2
        unsure = np.abs(size - threshold) <= error * threshold + np.finfo(np.float32).smallest_subnormal
        wrong = unpack_trits(bits, k, kind) != trits
        assert not (wrong & ~unsure).any()
        same = ~wrong.any(axis=1)
        np.testing.assert_allclose(x_scale[same], scale[same], rtol=error, atol=1e-44)
        assert same.sum() >= rows / 2
        if not wrong.any():
            np.testing.assert_array_equal(bits, pack_trits(trits, kind))


def unpack_trits(bits: npt.NDArray[np.uint32], k: int, kind: Granularity) -> npt.NDArray[np.int8]:
    """Trits (M, K) of the planes (M, words, 2); asserts that padding is zero and that minus lies within nonzero."""
    nonzero, minus = (
        np.unpackbits(np.ascontiguousarray(bits[..., p]).view(np.uint8), axis=1, bitorder="little").astype(np.int8)
        for p in range(2)
    )
    assert not (minus > nonzero).any()
    present = pad_groups(np.ones((1, k), np.int8), kind, 32)[0].astype(bool)
    assert not nonzero[:, ~present].any()
    return (nonzero - 2 * minus)[:, present]


@pytest.mark.parametrize("target", TARGETS)
def test_a_value_at_the_threshold_becomes_zero(target: str) -> None:
    """The comparison is strict: mean 2, so 1 is zero and the next float is not. Whole numbers make the sums exact."""
    above = np.nextafter(np.float32(1), np.float32(2))
    x = np.array([[1, -1, 3, -3, 2, 2, 1, 3] * 4, [1, -above, 3, -3, 2, 2, 1, 3] + [2] * 24], np.float32)
    shape = sizes(32, PerChannel())
    got, x_scale = Rows(ternary_rows(shape), runnable(target))(
        x, np.zeros((2, 1, 2), np.uint32), np.zeros(2, np.float32)
    )
    trits = unpack_trits(got, 32, PerChannel())
    np.testing.assert_array_equal(trits[0, :8], [0, 0, 1, -1, 1, 1, 0, 1])
    np.testing.assert_array_equal(trits[1, :8], [0, -1, 1, -1, 1, 1, 0, 1])
    assert x_scale[0] == np.float32(13 / 5)


@pytest.mark.parametrize(("k", "kind"), SIZES, ids=IDS)
@pytest.mark.parametrize("target", TARGETS)
def test_padded_rows_are_the_rows_and_zeros(target: str, k: int, kind: Granularity) -> None:
    shape = sizes(k, kind)
    pad = Rows(padded_rows(shape), runnable(target))
    for rows in ROWS:
        x = samples(rows, k)
        (padded,) = pad(x, np.full((rows, shape.padded_k(16)), np.nan, np.float32))
        np.testing.assert_array_equal(padded, pad_groups(x, kind, 16))


def random_weight(n: int, k: int, planes: int, kind: Granularity, rng: np.random.Generator) -> TernaryTensor:
    trits = rng.integers(-1, 2, (planes, n, k), dtype=np.int8)
    scale = (rng.random((planes, *kind.scale_shape(n, k))) + 0.1).astype(np.float32)
    return with_shared_scales(TernaryTensor.from_trits(trits, scale, kind))


def plane_weights(weight: TernaryTensor) -> Doubles:
    """Each plane's share of the weights: (P, N, K)."""
    n, k = weight.shape
    spread = np.repeat(weight.scale.astype(np.float64), weight.granularity.group_size(k), axis=2)[:, :, :k]
    return weight.trits() * np.broadcast_to(spread, (weight.num_planes, n, k))


@pytest.mark.parametrize("outliers", [False, True], ids=["gaussian", "outliers"])
@pytest.mark.parametrize("kind", [PerChannel(), PerGroup(64), PerGroup(20)], ids=["row", "g64", "g20"])
@pytest.mark.parametrize("planes", [1, 3])
def test_int8_activations_err_by_half_a_step_of_each_group(planes: int, kind: Granularity, outliers: bool) -> None:
    """|y_q - y| <= sum over groups g of x_scale[m, g] / 2 * sum over k in g of |w[n, k]|, and float rounding.

    Derivation: y_q - y = sum over k of (x_q x_scale - x) w, and rounding to the nearest of the steps x_scale moves no
    value by more than half a step. To this come the roundings of the quantizer (3 * 127 u of a step, see above) and of
    the matmul, gamma of PS + 4 times the sum of the magnitudes of its terms (test_equivalence.py).
    """
    rng = np.random.default_rng(planes)
    weight = random_weight(48, 333, planes, kind, rng)
    shape = MatmulShape.of(weight)
    x = rng.standard_normal((24, 333)).astype(np.float32)
    if outliers:
        x[:, ::50] *= 200
    y_q = linear(weight, activation_bits=8)(x).astype(np.float64)
    dense = plane_weights(weight)
    _, x_scale = reference_int8_rows(x, shape)
    step = np.repeat(x_scale.astype(np.float64), shape.group_size, axis=1)[:, :333]
    # |x_q x_scale| of a value is at most that of x and half a step.
    magnitude = (np.abs(x) + step / 2) @ np.abs(dense).sum(axis=0).T
    rounding = gamma(shape.planes * shape.segments(16) + 4) * magnitude
    bound = step * (0.5 + 3 * 127 * UNIT) @ np.abs(dense.sum(axis=0)).T + rounding
    error = np.abs(y_q - x.astype(np.float64) @ dense.sum(axis=0).T)
    assert (error <= bound).all()
    # Not a bound that anything meets: the errors of single values cancel, but not away.
    assert error.max() > bound.max() / 100


@pytest.mark.parametrize(
    ("k", "kind"), [(64, PerChannel()), (384, PerGroup(64)), (1536, PerChannel()), (4099, PerGroup(128))]
)
def test_int8_activations_err_by_less_than_a_hundredth_on_gaussian_rows(k: int, kind: Granularity) -> None:
    """||y_q - y|| <= 1e-2 ||y|| for Gaussian activations.

    Derivation: rounding to steps of d = absmax / 127 is an error that is uniform within half a step and independent of
    the weights, of standard deviation d / sqrt(12), so that ||y_q - y|| / ||y|| = d / (sqrt(12) sigma) for any weights.
    The largest of K Gaussian values is about sigma sqrt(2 ln K) and hardly ever above it: 2.9 sigma at K = 64, 4.1
    sigma at 4099. So the error is about sqrt(2 ln K) / (127 sqrt(12)), 6.6e-3 and 9.3e-3.
    """
    rng = np.random.default_rng(k)
    weight = random_weight(256, k, 2, kind, rng)
    x = rng.standard_normal((64, k)).astype(np.float32)
    y = x.astype(np.float64) @ plane_weights(weight).sum(axis=0).T
    error = np.linalg.norm(linear(weight, activation_bits=8)(x) - y) / np.linalg.norm(y)
    groups = np.sqrt(2 * np.log(kind.group_size(k)))
    expected = groups / (127 * np.sqrt(12))
    assert 0.7 * expected < error < 1e-2


def test_matmul_reads_what_the_rows_function_wrote() -> None:
    """The two halves fit: int8 rows as they come out of the one go into the other."""
    rng = np.random.default_rng(0)
    weight = random_weight(33, 95, 2, PerGroup(20), rng)
    shape, x = MatmulShape.of(weight), samples(9, 95, huge=1e30)
    sums, scales = np.zeros((9, shape.segments(16)), np.int32), np.zeros((9, shape.groups), np.float32)
    empty = np.zeros((9, shape.padded_k(16)), np.int8), sums, scales
    operands = Rows(int8_rows(shape), NATIVE)(x, *empty)
    got = Matmul(8, shape, NATIVE)(9, *operands, *KERNELS[8].pack(weight).values())
    np.testing.assert_array_equal(got, linear(weight, activation_bits=8)(x))
