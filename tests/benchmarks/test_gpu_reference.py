"""What the GPU benchmark compares with, against the package's own references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.gpu.kernels import activation_arrays
from benchmarks.gpu.reference import bound, random_activations, random_matrix, rounded, roundings
from tvm_ternary.formats import Scheme
from tvm_ternary.kernels.activations import reference_int8_rows, reference_ternary_rows
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.kernels.table import kernel_for

Array = npt.NDArray[Any]


@pytest.mark.parametrize("text", ["t1a8", "t2a8g24", "t1a16", "t3abf16g32", "t2a1g40"])
def test_its_references_and_shapes_are_ours(text: str) -> None:
    """The benchmark's own arithmetic, which travels without the kernels, against the package's."""
    n, k, scheme, generator = 20, 100, Scheme.parse(text), np.random.default_rng(0)
    granularity = scheme.granularity
    shape = MatmulShape(n, k, scheme.planes, granularity.groups(k), granularity.group_size(k))
    kernel = kernel_for(scheme.activation_bits, bfloat=scheme.bfloat).matmul
    assert activation_arrays(scheme, 3, k) == [(o.shape(shape, 3), o.dtype) for o in kernel.activations]
    matrix = random_matrix(n, k, text, generator)
    assert [(array.shape, array.dtype) for array in matrix.packed] == [
        (operand.shape(shape, 3), operand.dtype) for operand in (kernel.weight, *kernel.scales(shape))
    ]
    x = generator.standard_normal((3, k)).astype(np.float32)
    got = rounded(x, scheme)
    if scheme.activation_bits == 8:
        q, scale = reference_int8_rows(x, shape)
        want = q.astype(np.float64) * np.repeat(scale, shape.group_size, axis=1)[:, :k]
        np.testing.assert_array_equal(got, want)
    elif scheme.activation_bits == 1:
        trits, scale = reference_ternary_rows(x)
        np.testing.assert_allclose(got, trits * scale[:, None])
    else:
        assert (np.abs(got - x) <= np.abs(x) * 2.0 ** (-8 if scheme.bfloat else -11)).all()
    assert (bound(got, matrix) > 0).all()


@pytest.mark.parametrize(
    ("text", "activation"), [("t1a8", np.min), ("t1a1", np.min), ("t1a8g128", np.median), ("t2a8g128", np.median)]
)
def test_one_wrong_trit_exceeds_the_bound(text: str, activation: Callable[[Array], float]) -> None:
    """Of the largest K that is timed; sums of groups are added as floats, so that the smallest activation may hide."""
    k, scheme, generator = 8192, Scheme.parse(text), np.random.default_rng(0)
    matrix = random_matrix(4, k, text, generator)
    x = rounded(random_activations(2, k, scheme, generator), scheme)
    step = matrix.sizes[matrix.sizes != 0].min() * activation(np.abs(x[x != 0]))
    assert (bound(x, matrix) < step).all()


def test_floats_are_allowed_a_rounding_a_term() -> None:
    assert roundings(4096, Scheme.parse("t1a16")) == pytest.approx(4104 * 2.0**-24, rel=1e-3)


def test_no_activation_is_so_near_the_threshold_that_roundings_decide() -> None:
    x = random_activations(50, 1000, Scheme.parse("t1a1"), np.random.default_rng(1))
    size = np.abs(x).astype(np.float64)
    limit = size.mean(axis=1, keepdims=True) / 2
    assert np.abs(size / limit - 1).min() > 1e-4
