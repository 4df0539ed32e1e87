"""A scheduled function that runs."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import tvm_ffi

from tvm_ternary.errors import HostError
from tvm_ternary.kernels.attention import Attention, reference_attention
from tvm_ternary.runtime.arrays import aligned
from tvm_ternary.schedule.cpu.attention import attention
from tvm_ternary.schedule.cpu.kernel import build_kernel
from tvm_ternary.target import resolve

SHAPE = Attention(heads=2, kv_heads=1, size=8, value_size=8, scale=0.5)


def test_runs() -> None:
    rng = np.random.default_rng(0)
    shapes = ((1, 3, 2, 8), (1, 5, 1, 8), (1, 5, 1, 8))
    q, k, v = (aligned(rng.standard_normal(shape, np.float32)) for shape in shapes)
    out = aligned(np.zeros_like(q))
    kernel = build_kernel(partial(attention, SHAPE, (1, None, None)), resolve("native"))
    kernel(*map(tvm_ffi.from_dlpack, (q, k, v, out)))
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    want = reference_attention(q, k, v, SHAPE.scale).swapaxes(1, 2)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)


def test_needs_a_host_that_can_run_it() -> None:
    with pytest.raises(HostError):
        build_kernel(partial(attention, SHAPE, (1, None, None)), resolve("aarch64"))
