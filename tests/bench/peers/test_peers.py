"""Every peer computes what it is said to; which of them take part."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tvm_ternary.bench.engines import Engine, Floats, WrongAnswerError, check_answer
from tvm_ternary.bench.memory import aligned_copy
from tvm_ternary.bench.peers import PEERS, absent_peers, choose_peers
from tvm_ternary.bench.peers.base import Peer, Problem, needs
from tvm_ternary.errors import OptionError

from .conftest import present

# Weights that are not the problem's own: signs alone, or no scales.
OTHER_WEIGHTS = {"bnn-binary", "bnn-ternary"}


def build(name: str, problem: Problem) -> Engine:
    return present(name).make(name, problem)


def activations(m: int, k: int) -> Floats:
    return aligned_copy(np.random.default_rng(0).standard_normal((m, k), dtype=np.float32))


@pytest.mark.parametrize(
    ("name", "k"), [(name, k) for name, peer in PEERS.items() for k in (256, 130) if peer.refuses(24, k) is None]
)
def test_peers_multiply_by_their_weight(name: str, k: int) -> None:
    # onnxruntime's pool has one size a process.
    problem = Problem.random(24, k, threads=1 if name.startswith("ort-") else 2, cache=0)
    engine = build(name, problem)
    if name not in OTHER_WEIGHTS:
        np.testing.assert_array_equal(engine.dense, problem.dense)
    for m in (1, 5):
        x = activations(m, k)
        (call,) = engine.calls(x)
        assert 0 < check_answer(engine, x, call()) <= engine.error_bound
        assert 0 < check_answer(engine, x, call()) <= engine.error_bound


@pytest.mark.parametrize("name", PEERS)
def test_a_wrong_weight_is_found(name: str) -> None:
    problem = Problem.random(32, 256, threads=1, cache=0)
    engine = build(name, problem)
    x = activations(3, 256)
    y = engine.calls(x)[0]().copy()
    # Rounding the activations of bnn-lab costs more than a few wrong outputs.
    y[:, : 16 if name in OTHER_WEIGHTS else 1] *= -1
    with pytest.raises(WrongAnswerError, match=f"{name}, 3 rows, 32x256: relative error is"):
        check_answer(engine, x, y)


@pytest.mark.parametrize("name", PEERS)
def test_calls_keep_their_activations(name: str) -> None:
    engine = build(name, Problem.random(16, 256, threads=1, cache=0))
    (call,) = engine.calls(activations(2, 256))
    first = call().copy()
    # Takes the place of what nobody holds.
    others = [aligned_copy(np.full((2, 256), np.nan, np.float32)) for _ in range(64)]
    assert (call() == first).all()
    assert len(others) == 64


@pytest.mark.parametrize("name", PEERS)
def test_copies_exceed_the_cache_and_agree(name: str) -> None:
    problem = Problem.random(16, 256, threads=1, cache=20_000)
    engine = build(name, problem)
    calls = engine.calls(activations(2, 256))
    assert len(calls) > 1
    assert (len(calls) - 1) * engine.weight_bytes <= problem.cache < len(calls) * engine.weight_bytes
    first, *others = [call().copy() for call in calls]
    assert all((other == first).all() for other in others)


def test_a_problem_is_exact_in_16_bits() -> None:
    problem = Problem.random(200, 8, threads=1, cache=0)
    assert (problem.scale.astype(np.float16) == problem.scale).all()
    # bfloat16 is the upper half of a float32.
    assert not (problem.scale.view(np.uint32) & 0xFFFF).any()
    assert len(set(problem.scale)) > 50
    assert math.isclose((problem.trits == 0).mean(), 1 / 3, abs_tol=0.05)


def test_choice() -> None:
    assert choose_peers("none") == ()
    assert choose_peers("auto") == tuple(name for name in PEERS if name not in absent_peers())
    assert choose_peers("ort-int8,ort-2bit,ort-int8") == ("ort-int8", "ort-2bit")
    with pytest.raises(OptionError, match="peer 'fast': does not exist; expected auto, none or of ort-2bit, "):
        choose_peers("ort-2bit,fast")
    absent = {"absent": Peer(PEERS["ort-2bit"].make, needs("no_such_package"))}
    assert choose_peers("auto", absent) == ()
    assert absent_peers(absent) == {"absent": "needs the package no_such_package"}
    with pytest.raises(OptionError, match="peer 'absent': needs the package no_such_package; install tvm-ternary"):
        choose_peers("absent", absent)


def test_popcount_kernels_stand_beside_ternary_activations_only() -> None:
    only = {name for name, peer in PEERS.items() if peer.activation_bits == {1}}
    assert only == OTHER_WEIGHTS
    assert all(peer.activation_bits == {1, 8, 32} for name, peer in PEERS.items() if name not in only)
