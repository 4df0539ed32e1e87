"""Peers compute what they are said to: the packing, and the choice of them."""

from __future__ import annotations

import numpy as np
import pytest

import tvm_ternary.bench.peers
from tvm_ternary.bench.engines import check_answer
from tvm_ternary.bench.memory import aligned_copy
from tvm_ternary.bench.peers import PEERS, Peer, Problem, choose_peers, pack_blocks
from tvm_ternary.errors import OptionError


@pytest.mark.parametrize("k", [256, 130])
@pytest.mark.parametrize("name", PEERS)
def test_peers_multiply_by_their_dequantized_weight(name: str, k: int) -> None:
    rng = np.random.default_rng(0)
    trits = rng.integers(-1, 2, (24, k), dtype=np.int8)
    problem = Problem(trits, rng.uniform(0.5, 1.5, 24).astype(np.float32), threads=1, cache=0)
    engine = PEERS[name].make(name, problem)
    np.testing.assert_array_equal(engine.dense, trits * problem.scale[:, None])
    x = aligned_copy(rng.standard_normal((3, k), dtype=np.float32))
    (call,) = engine.calls(x)
    assert 0 < check_answer(engine, x, call()) <= engine.error_bound


def test_a_peer_has_copies_beyond_the_cache() -> None:
    problem = Problem(np.ones((8, 128), np.int8), np.ones(8, np.float32), threads=1, cache=10_000)
    engine = PEERS["ort-float32"].make("ort-float32", problem)
    calls = engine.calls(np.ones((1, 128), np.float32))
    assert engine.weight_bytes == 8 * 128 * 4
    assert len(calls) * engine.weight_bytes > problem.cache
    assert all((call() == 128).all() for call in calls)


@pytest.mark.parametrize("bits", [2, 4])
def test_packed_codes_read_back(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 200), dtype=np.uint8)
    packed = pack_blocks(codes, bits)
    assert packed.shape == (3, 2, 16 * bits)
    for k in range(256):
        byte = packed[:, k // 128, k % 128 * bits // 8]
        got = byte >> (k * bits % 8) & (2**bits - 1)
        assert (got == (codes[:, k] if k < 200 else 2 ** (bits - 1))).all()


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_peers("none") == ()
    assert choose_peers("auto") == tuple(PEERS)
    assert choose_peers("ort-int8,ort-2bit,ort-int8") == ("ort-int8", "ort-2bit")
    with pytest.raises(OptionError, match="peer 'fast': does not exist; expected auto, none or of ort-2bit, "):
        choose_peers("ort-2bit,fast")
    absent = Peer("no_such_package", PEERS["ort-2bit"].make)
    monkeypatch.setattr(tvm_ternary.bench.peers, "PEERS", {"absent": absent})
    assert choose_peers("auto") == ()
    with pytest.raises(OptionError, match="needs the package no_such_package"):
        choose_peers("absent")
