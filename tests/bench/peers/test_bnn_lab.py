"""bnn-lab's popcount kernels are exact on the activations that they are made for."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_ternary.bench.memory import aligned_copy
from tvm_ternary.bench.peers.base import Problem

from .conftest import present


@pytest.mark.parametrize("k", [64, 130])
@pytest.mark.parametrize("name", ["bnn-binary", "bnn-ternary"])
def test_signs_are_multiplied_exactly(name: str, k: int) -> None:
    problem = Problem.random(24, k, threads=1, cache=0)
    engine = present(name).make(name, problem)
    signs = np.random.default_rng(0).choice(np.float32([-1, 1]), (5, k))
    (call,) = engine.calls(aligned_copy(signs))
    np.testing.assert_allclose(call(), signs @ engine.dense.T, rtol=1e-6, atol=1e-4)


def test_weights_are_those_that_the_kernels_can_hold() -> None:
    problem = Problem.random(24, 64, threads=1, cache=0)
    binary, ternary = (present(name).make(name, problem) for name in ("bnn-binary", "bnn-ternary"))
    np.testing.assert_array_equal(ternary.dense, problem.trits)
    assert set(np.unique(np.abs(binary.dense / problem.scale[:, None]))) == {1.0}
    np.testing.assert_array_equal((binary.dense > 0), problem.trits > 0)
    assert binary.weight_bytes < ternary.weight_bytes
