"""The rotation kernel against its numpy reference."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from tests.ternary_matmul import TARGETS, UNIT, build, runnable
from tvm_ternary.formats.hadamard import hadamard
from tvm_ternary.kernels.activations import PARALLEL_ROWS
from tvm_ternary.kernels.hadamard import hadamard_rows

# Blocks below, at and above a vector, with an odd and an even number of longer butterflies; tails and rows too short.
SIZES = [
    (2, 2),
    (7, 2),
    (24, 8),
    (30, 4),
    (16, 16),
    (100, 32),
    (130, 64),
    (384, 128),
    (1000, 256),
    (4103, 4096),
    (5, 8),
]
ROWS = (0, 1, PARALLEL_ROWS - 1, 3 * PARALLEL_ROWS + 1)


@pytest.mark.parametrize("target", TARGETS)
def test_rows_are_those_of_the_reference(target: str) -> None:
    library = build({f"f{k}_{block}": hadamard_rows(k, block) for k, block in SIZES}, runnable(target))
    for k, block in SIZES:
        for rows in ROWS:
            x = np.random.default_rng(rows).standard_normal((rows, k)).astype(np.float32)
            y = tvm.runtime.tensor(np.full((rows, k), 99, np.float32))
            library[f"f{k}_{block}"](tvm.runtime.tensor(x), y)
            got, want = y.numpy(), hadamard(x.astype(np.float64), block)
            whole = k - k % block
            np.testing.assert_array_equal(got[:, whole:], x[:, whole:])
            # A rounding for each butterfly and one for the scale, of sums that are at most the block's.
            sums = np.abs(x[:, :whole].astype(np.float64)).reshape(rows, whole // block, block).sum(axis=-1)
            bound = np.repeat(sums, block, axis=1) * block**-0.5 * (np.log2(block) + 2) * UNIT
            assert (np.abs(got - want)[:, :whole] <= bound).all()


def test_what_is_no_number_stays_in_its_block() -> None:
    library = build({"rotate": hadamard_rows(64, 32)}, runnable(TARGETS[0]))
    x = np.ones((1, 64), np.float32)
    x[0, 40] = np.nan
    y = tvm.runtime.tensor(np.zeros((1, 64), np.float32))
    library["rotate"](tvm.runtime.tensor(x), y)
    assert np.isfinite(y.numpy()[0, :32]).all()
    assert np.isnan(y.numpy()[0, 32:]).all()
