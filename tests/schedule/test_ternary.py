"""A schedule changes how a matmul is computed, never what."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ternary_matmul import NATIVE, Matmul, build, rows_of
from tvm_ternary.formats import PerChannel, PerGroup, TernaryTensor
from tvm_ternary.kernels.matmul import Epilogue, define_matmul
from tvm_ternary.kernels.shape import MatmulShape, Tile, Variant
from tvm_ternary.kernels.table import KERNELS
from tvm_ternary.schedule.ternary import SCHEDULED, matmul_function
from tvm_ternary.target import TIERS

EXAMPLES = 20
ONE = (Variant(Tile(1, 1), None),)


def problem(
    bits: int, rows: int, n: int, k: int, planes: int, group: int | None
) -> tuple[TernaryTensor, list[npt.NDArray[Any]], npt.NDArray[np.int64]]:
    """A weight with scales 1, what its matmul takes, and the exact result: whole numbers that no kernel rounds."""
    rng = np.random.default_rng(rows * 1000 + n)
    kind = PerGroup(group) if group else PerChannel()
    trits = rng.integers(-1, 2, (planes, n, k), dtype=np.int8)
    weight = TernaryTensor.from_trits(trits, np.ones((planes, *kind.scale_shape(n, k)), np.float32), kind)
    limit = 1 if bits == 1 else 127
    x = rng.integers(-limit, limit + 1, (rows, k), dtype=np.int8)
    scales = np.ones((rows, kind.groups(k)) if bits == 8 else rows, np.float32)
    activations = rows_of(bits, x.astype(np.float32) if bits == 32 else x, scales, kind)
    exact = x.astype(np.int64) @ trits.astype(np.int64).sum(axis=0).T
    return weight, [*activations, *KERNELS[bits].pack(weight).values()], exact


tiles = st.builds(Tile, st.integers(1, 5), st.integers(1, 5))


@pytest.mark.parametrize("bits", KERNELS)
@settings(max_examples=EXAMPLES)
@given(
    small=tiles,
    limit=st.integers(1, 6),
    large=tiles,
    rows=st.integers(1, 12),
    n=st.integers(1, 100),
    k=st.integers(1, 80),
    planes=st.integers(1, 3),
    group=st.none() | st.integers(1, 40),
    panel=st.booleans(),
    threads=st.sampled_from(["n", "m", "one"]),
)
def test_any_tiles_give_equal_results(
    bits: int,
    small: Tile,
    limit: int,
    large: Tile,
    rows: int,
    n: int,
    k: int,
    planes: int,
    group: int | None,
    panel: bool,
    threads: str,
) -> None:
    weight, operands, exact = problem(bits, rows, n, k, planes, group)
    last = Variant(large, None, panel=panel and KERNELS[bits].matmul.panel is not None, threads=threads)
    variants = (Variant(small, limit), last)
    matmul = Matmul(bits, MatmulShape.of(weight), NATIVE, variants=variants)
    np.testing.assert_array_equal(matmul(rows, *operands), exact)


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("bits", KERNELS)
def test_the_unscheduled_definition_gives_the_same(bits: int, rows: int | None) -> None:
    weight, operands, exact = problem(bits, 3, 20, 50, 2, 20)
    shape, kernel = MatmulShape.of(weight), KERNELS[bits].matmul
    variants = ONE if rows else (Variant(Tile(1, 2), 2), Variant(Tile(2, 1), None))
    library = build({"matmul": define_matmul(kernel, shape, variants, rows=rows)}, NATIVE)
    result = tvm.runtime.tensor(np.full((3, 20), np.nan, np.float32))
    library["matmul"](*map(tvm.runtime.tensor, operands), result)
    np.testing.assert_array_equal(result.numpy(), exact)
    np.testing.assert_array_equal(Matmul(bits, shape, NATIVE, variants=variants, rows=rows)(3, *operands), exact)


@pytest.mark.parametrize("bits", KERNELS)
def test_known_rows_leave_only_the_variant_that_serves_them(bits: int) -> None:
    kernel, shape = KERNELS[bits].matmul, MatmulShape(32, 32, 1, 1, 32)
    variants = (Variant(Tile(1, 1), 1), Variant(Tile(2, 1), 8), Variant(Tile(4, 1), None))
    for rows, index in ((1, 0), (2, 1), (8, 1), (9, 2)):
        chosen = matmul_function(kernel, shape, variants, NATIVE.tier, rows=rows)
        expected = matmul_function(kernel, shape, (Variant(variants[index].tile, None),), NATIVE.tier, rows=rows)
        tvm.ir.assert_structural_equal(chosen, expected)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("bits", KERNELS)
def test_later_passes_are_told_to_leave_it_alone(bits: int, tier: str) -> None:
    function = matmul_function(KERNELS[bits].matmul, MatmulShape(20, 40, 1, 2, 20), ONE, tier)
    assert function.attrs[SCHEDULED] == 1
    assert function.attrs["op_pattern"] == 8  # opaque: nothing is fused into it
    assert function.attrs["tirx.noalias"]


@pytest.mark.parametrize("bits", KERNELS)
def test_the_same_sizes_give_the_same_function(bits: int) -> None:
    """The importer adds one function for all layers of a size; that it is one is found by structure."""
    first, second = (
        matmul_function(KERNELS[bits].matmul, MatmulShape(20, 40, 1, 2, 20), ONE, NATIVE.tier) for _ in range(2)
    )
    tvm.ir.assert_structural_equal(first, second, map_free_vars=True)


@pytest.mark.parametrize("threads", ["n", "m", "one"])
@pytest.mark.parametrize("panel", [False, True])
def test_rows_beyond_a_chunk_and_segments_of_a_long_group(panel: bool, threads: str) -> None:
    """More rows than a chunk holds, a K whose one group is cut into segments, ragged everywhere."""
    for planes in (1, 2):
        weight, operands, exact = problem(8, 300, 70, 1100, planes, None)
        variants = (Variant(Tile(4, 3), None, panel=panel, threads=threads),)
        got = Matmul(8, MatmulShape.of(weight), NATIVE, variants=variants)(300, *operands)
        np.testing.assert_array_equal(got, exact)


@pytest.mark.parametrize("epilogue", [Epilogue(residual=True), Epilogue(True, "relu", residual=True)], ids=str)
@pytest.mark.parametrize("bits", KERNELS)
def test_a_residual_is_added_last(bits: int, epilogue: Epilogue) -> None:
    weight, operands, exact = problem(bits, 5, 33, 50, 1, 20)
    bias, residual = np.arange(33, dtype=np.float32), np.arange(5 * 33, dtype=np.float32).reshape(5, 33)
    matmul = Matmul(bits, MatmulShape.of(weight), NATIVE, epilogue=epilogue)
    got = matmul(5, *operands, *([bias] if epilogue.bias else []), residual)
    expected = np.maximum(exact + bias, 0) if epilogue.bias else exact
    np.testing.assert_array_equal(got, expected + residual)
