"""The slow references against the definition itself, written as loops over single weights."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from tvm_ternary.formats import Granularity, PerChannel, PerGroup, PerTensor, TernaryTensor
from tvm_ternary.kernels.bits import reference_a1_dot
from tvm_ternary.kernels.float32 import reference_a32
from tvm_ternary.kernels.int8 import reference_a8_accumulators

KINDS = [PerTensor(), PerChannel(), PerGroup(1), PerGroup(3), PerGroup(7), PerGroup(20)]
M, N, K, PLANES = 2, 3, 7, 3


def make(kind: Granularity) -> TernaryTensor:
    rng = np.random.default_rng(0)
    trits = rng.integers(-1, 2, (PLANES, N, K), dtype=np.int8)
    scale = rng.standard_normal((PLANES, *kind.scale_shape(N, K))).astype(np.float32)
    return TernaryTensor.from_trits(trits, scale, kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a32_sums_scale_times_trit_times_activation(kind: Granularity) -> None:
    rng = np.random.default_rng(1)
    weight, trits = make(kind), make(kind).trits()
    x, bias = rng.standard_normal((M, K)).astype(np.float32), rng.standard_normal(N).astype(np.float32)
    got, biased = reference_a32(x, weight), reference_a32(x, weight, bias)
    for m, n in itertools.product(range(M), range(N)):
        exact = Fraction(0)
        for p, k in itertools.product(range(PLANES), range(K)):
            row = 0 if isinstance(kind, PerTensor) else n
            scale = weight.scale[p, row, k // kind.group_size(K)]
            exact += Fraction(float(scale)) * int(trits[p, n, k]) * Fraction(float(x[m, k]))
        assert got[m, n] == pytest.approx(float(exact), rel=1e-12, abs=1e-12)
        assert biased[m, n] == pytest.approx(float(exact + Fraction(float(bias[n]))), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("reference", [reference_a8_accumulators, reference_a1_dot])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_integer_references_are_the_dot_products_of_groups(kind: Granularity, reference: object) -> None:
    rng = np.random.default_rng(2)
    weight, trits = make(kind), make(kind).trits()
    limit = 1 if reference is reference_a1_dot else 127
    x = rng.integers(-limit, limit + 1, (M, K), dtype=np.int8)
    assert callable(reference)
    got = reference(x, weight)
    size = kind.group_size(K)
    assert got.shape == (M, N, PLANES, kind.groups(K))
    assert got.dtype == np.int64
    for m, n, p, g in np.ndindex(got.shape):
        dot = sum(int(x[m, k]) * int(trits[p, n, k]) for k in range(g * size, min((g + 1) * size, K)))
        assert got[m, n, p, g] == dot
