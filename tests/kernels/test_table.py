"""The kernel table and the sizes that it is built on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.formats.strategies import granularities, make_tensor
from tvm_ternary.errors import OptionError
from tvm_ternary.formats import ACTIVATION_BITS, PACKINGS, Granularity, layouts
from tvm_ternary.kernels.activations import reference_int8_rows, reference_ternary_rows
from tvm_ternary.kernels.matmul import Epilogue, define_matmul
from tvm_ternary.kernels.shape import MatmulShape, Tile, Variant, ceil_div
from tvm_ternary.kernels.table import DENSE, EVERY_KERNEL, KERNELS, kernel_for

sizes = st.integers(1, 200)


def test_every_activation_of_a_scheme_has_a_kernel() -> None:
    assert {*KERNELS, 16} == set(ACTIVATION_BITS)
    assert len({kernel_for(*key).matmul.name for key in EVERY_KERNEL}) == len(EVERY_KERNEL)


def test_every_packing_of_the_formats_has_its_kernels() -> None:
    assert {(bits, packing) for packing, kinds in PACKINGS.items() for bits in kinds} == {*EVERY_KERNEL, (16, "fast")}
    assert kernel_for(8) is KERNELS[8]
    assert kernel_for(8, "dense") is DENSE[8]


@pytest.mark.parametrize(
    ("bits", "packing", "text"),
    [
        (8, "tight", "packing 'tight': does not exist; expected one of fast, dense"),
        (32, "dense", "packing 'dense': does not exist for a32 schemes; expected a8; leave packing out"),
        (1, "dense", "packing 'dense': does not exist for a1 schemes; expected a8; leave packing out"),
    ],
)
def test_a_packing_without_a_kernel_is_refused(bits: int, packing: str, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        kernel_for(bits, packing)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(("bits", "packing"), EVERY_KERNEL)
@given(n=sizes, k=sizes, planes=st.integers(1, 4), kind=granularities)
def test_packed_weights_have_the_shape_that_the_kernel_expects(
    bits: int, packing: str, n: int, k: int, planes: int, kind: Granularity
) -> None:
    weight = make_tensor(n, k, kind, planes, seed=0)
    row, shape = kernel_for(bits, packing), MatmulShape.of(weight)
    assert shape == MatmulShape(n, k, planes, kind.groups(k), kind.group_size(k))
    expected = [row.matmul.weight, *row.matmul.scales(shape)]
    packed = row.pack(weight)
    assert list(packed) == [operand.name for operand in expected]
    for array, operand in zip(packed.values(), expected, strict=True):
        assert (array.shape, array.dtype) == (operand.shape(shape, 1), operand.dtype)


@given(k=sizes, kind=granularities, block=st.sampled_from([16, 20, 32]))
def test_padded_rows_fit_the_packed_weights(k: int, kind: Granularity, block: int) -> None:
    shape = MatmulShape(1, k, 1, kind.groups(k), kind.group_size(k))
    assert (shape.groups, shape.padded_k(block) // shape.groups) == layouts.padded_k(k, kind, block)
    assert shape.segments(block) * shape.segment_blocks(block) * block == shape.padded_k(block)
    assert layouts.pad_groups(np.zeros((1, k)), kind, block).shape == (1, shape.padded_k(block))


@given(k=sizes, kind=granularities)
def test_rows_are_read_as_they_are_only_where_nothing_is_padded(k: int, kind: Granularity) -> None:
    shape = MatmulShape(1, k, 1, kind.groups(k), kind.group_size(k))
    x = np.arange(1, k + 1, dtype=np.float32)[None]
    unchanged = np.array_equal(layouts.pad_groups(x, kind, 16), x)
    assert KERNELS[32].reads_rows_directly(shape) == unchanged
    assert not KERNELS[8].reads_rows_directly(shape)
    assert not KERNELS[1].reads_rows_directly(shape)


@given(st.integers(0, 1000), st.integers(1, 50))
def test_ceil_div_is_the_smallest_integer_not_below(a: int, b: int) -> None:
    quotient = ceil_div(a, b)
    assert (quotient - 1) * b < a <= quotient * b


def test_a_variant_serves_up_to_its_limit() -> None:
    limited, open_ended = Variant(Tile(1, 1), 4), Variant(Tile(1, 1), None)
    assert [limited.serves(rows) for rows in (0, 4, 5)] == [True, True, False]
    assert open_ended.serves(10**9)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("bits", "packing"), EVERY_KERNEL)
def test_definition_takes_what_the_kernel_names(bits: int, packing: str, bias: bool) -> None:
    kernel, shape = kernel_for(bits, packing).matmul, MatmulShape(20, 40, 2, 2, 20)
    variants = (Variant(Tile(1, 1), 1), Variant(Tile(2, 2), None))
    function = define_matmul(kernel, shape, variants, epilogue=Epilogue(bias, "relu"))
    operands = kernel.operands(shape)
    names = [*(operand.name for operand in operands), *(["bias"] if bias else []), "y"]
    assert [param.name for param in function.params] == names
    for param, operand in zip(function.params, operands, strict=False):
        assert [str(extent) for extent in param.shape] == [str(e) for e in operand.shape(shape, "M")]
        assert param.dtype == operand.dtype


def test_references_of_rows_agree_on_a_small_example() -> None:
    """By hand: groups of two, steps 2 / 127 and 4 / 127; mean |x| is 2.25, so values above 1.125 are kept."""
    x = np.array([[1.0, -2.0, 4.0, 2.0]], np.float32)
    x_q, scale = reference_int8_rows(x, MatmulShape(1, 4, 1, 2, 2))
    np.testing.assert_array_equal(x_q, [[64, -127, 127, 64]])  # 63.5 is halfway: to even
    np.testing.assert_allclose(scale, [[2 / 127, 4 / 127]], rtol=1e-7)
    trits, mean = reference_ternary_rows(x)
    np.testing.assert_array_equal(trits, [[0, -1, 1, 1]])
    assert mean == pytest.approx(8 / 3)
