"""Every fused attention of others computes what it is said to."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_ternary.bench.attention_case import Case, HeadShape, Operands
from tvm_ternary.bench.attention_peers import ATTENTION_PEERS, peers_for
from tvm_ternary.bench.engines import WrongAnswerError

SHAPES = [HeadShape(4, 2, 16), HeadShape(3, 3, 8)]
CASES = [
    case
    for shape in SHAPES
    for case in (Case(shape, 1, 70), Case(shape, 1, 1), Case(shape, 33, 33, True), Case(shape, 33, 33))
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name, peer in ATTENTION_PEERS.items() for case in CASES if peer.refuses(case) is None],
    ids=str,
)
def test_peers_attend(name: str, case: Case, threads: int) -> None:
    peer = ATTENTION_PEERS[name]
    if (missing := peer.missing()) is not None:
        pytest.skip(f"{name} {missing}")
    operands = Operands(case)
    k, v = operands.k.copy(), operands.v.copy()
    engine = peer.make(name, operands, threads)
    for _ in range(2):
        engine.check(case)
    # A step's own token was there already.
    np.testing.assert_array_equal(operands.k, k)
    np.testing.assert_array_equal(operands.v, v)
    # It reads the queries that it was given; keys and values were copied for some.
    operands.q *= -1
    if not name.startswith("torch-bf16") and case.keys > 1:
        with pytest.raises(WrongAnswerError):
            engine.check(case)


def test_a_step_reads_the_shared_cache_and_writes_its_token() -> None:
    case = Case(SHAPES[0], 1, 70)
    peer = ATTENTION_PEERS["ort-gqa"]
    if (missing := peer.missing()) is not None:
        pytest.skip(f"ort-gqa {missing}")
    operands = Operands(case)
    engine = peer.make("ort-gqa", operands, 1)
    own = operands.k[:, :, -1].copy()
    operands.k[:, :, -1] = 0
    engine.check(case)
    np.testing.assert_array_equal(operands.k[:, :, -1], own)
    operands.k[:, :, 0] = 9
    with pytest.raises(WrongAnswerError):
        engine.check(case)


def test_who_can_compute_what() -> None:
    names = list(ATTENTION_PEERS)
    step, causal, free = Case(SHAPES[0], 1, 70), Case(SHAPES[0], 33, 33, True), Case(SHAPES[0], 33, 33)
    torch = ["torch-float32", "torch-bf16"]
    assert [peers_for(case, names)[0] for case in (step, causal, free)] == [
        ["ort-gqa", *torch],
        ["ort-gqa", "ort-mha", *torch],
        ["ort-mha", *torch],
    ]
    odd = Case(HeadShape(2, 2, 12), 1, 70)
    assert peers_for(odd, ["ort-gqa"]) == ([], {"ort-gqa": "needs a head size divisible by 8"})
