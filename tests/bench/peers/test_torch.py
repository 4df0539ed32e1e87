"""torch's linear layers: number of threads, engine, and quiet use of what is deprecated."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from tvm_ternary.bench.memory import aligned_copy
from tvm_ternary.bench.peers.base import Problem

from .conftest import present

INT8 = ("torch-int8", "torch-fbgemm")


@pytest.mark.parametrize("name", [*INT8, "torch-bf16"])
def test_threads_are_honoured(name: str) -> None:
    peer = present(name)
    import torch

    x = aligned_copy(np.ones((2, 64), np.float32))
    for threads in (2, 1):
        peer.make(name, Problem.random(8, 64, threads=threads, cache=0)).calls(x)
        assert torch.get_num_threads() == threads


@pytest.mark.parametrize("name", INT8)
def test_int8_weights_are_exact_and_make_no_noise(name: str) -> None:
    peer = present(name)
    problem = Problem.random(8, 64, threads=1, cache=0)
    # 0 to 255 is what eight bits hold without rounding.
    x = aligned_copy(np.random.default_rng(0).integers(0, 256, (3, 64)).astype(np.float32))
    x[0, :2] = 0, 255
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = peer.make(name, problem)
        (call,) = engine.calls(x)
        y = call()
    np.testing.assert_allclose(y, x @ problem.dense.T, rtol=1e-5, atol=1e-3)
    assert engine.weight_bytes == 8 * 64
