"""What is found of masks before all tiles: nothing that is lost on the way makes a block plain or hidden."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.schedule.cpu import test_attention, test_attention_many_packed
from tvm_ternary.kernels.ternary_keys import BLOCK


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("others", [0.0, -np.inf])
def test_a_nan_among_numbers_that_do_nothing_or_hide_all(tier: str, others: float, packed: bool) -> None:
    """Its query, here the eighth, becomes NaN, and no other, wherever it is in a block and a vector."""
    queries, keys = 40, 2 * BLOCK + 2
    for key in (BLOCK, BLOCK + 5, 2 * BLOCK - 1, 2 * BLOCK + 1):
        case = (
            test_attention_many_packed.Case(test_attention_many_packed.SHAPE, 2, queries, 2, 2)
            if packed
            else test_attention.Case(replace(test_attention.BASE, mask="ms"), 1, queries, keys)
        )
        assert case.mask is not None
        case.mask[..., :BLOCK], case.mask[..., BLOCK:] = 0, others
        case.mask[0, 0, 7, key] = np.nan
        lost = np.isnan(case.run(tier))
        assert lost[:, :, 7].all()
        assert np.count_nonzero(lost) == np.count_nonzero(lost[:, :, 7])
