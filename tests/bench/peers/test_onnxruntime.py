"""The packing of onnxruntime's weights."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_ternary.bench.peers.onnxruntime import pack_blocks


@pytest.mark.parametrize("bits", [2, 4])
def test_packed_codes_read_back(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 200), dtype=np.uint8)
    packed = pack_blocks(codes, bits)
    assert packed.shape == (3, 2, 16 * bits)
    for k in range(256):
        byte = packed[:, k // 128, k % 128 * bits // 8]
        got = byte >> (k * bits % 8) & (2**bits - 1)
        assert (got == (codes[:, k] if k < 200 else 2 ** (bits - 1))).all()
