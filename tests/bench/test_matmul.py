"""The matmul benchmark on tiny shapes: answers and figures, not speed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import tvm_ternary.bench.matmul
import tvm_ternary.bench.roofline
from tests.ternary_matmul import NATIVE
from tvm_ternary.bench.engines import Engine, Floats, Workers, WrongAnswerError, check_answer, exact_rows, ours
from tvm_ternary.bench.matmul import measure_matmuls, rests
from tvm_ternary.bench.memory import aligned, aligned_copy, copies_beyond
from tvm_ternary.bench.peers import PEERS
from tvm_ternary.errors import OptionError
from tvm_ternary.formats.scheme import Scheme

EMPTY = Engine("", 0, np.empty((0, 0), np.float32), 0.0, lambda x: [], Workers("", 0.0))


@pytest.mark.parametrize("scheme", ["t1a32", "t1a8", "t2a8g64", "t1a1"])
def test_ours_computes_the_product_from_every_copy(scheme: str) -> None:
    engine = ours(24, 70, Scheme.parse(scheme), NATIVE, cache=5000)
    x = aligned_copy(np.random.default_rng(0).standard_normal((5, 70), dtype=np.float32))
    calls = engine.calls(x)
    assert len(calls) == copies_beyond(5000, engine.weight_bytes) > 1
    results = [call().copy() for call in calls]
    assert check_answer(engine, x, results[0]) <= engine.error_bound
    assert all((result == results[0]).all() for result in results)


@pytest.mark.parametrize("row", [0, 2, 4])
def test_a_wrong_answer_ends_the_measurement(row: int) -> None:
    engine = ours(24, 70, Scheme.parse("t1a8"), NATIVE, cache=0)
    x = aligned_copy(np.random.default_rng(0).standard_normal((5, 70), dtype=np.float32))
    y: Floats = engine.calls(x)[0]()
    y[row] = np.nan
    with pytest.raises(WrongAnswerError, match="t1a8, 5 rows, 24x70: relative error is nan; expected at most 1e-02"):
        check_answer(engine, x, y)


def test_a_result_of_another_shape_is_a_wrong_answer() -> None:
    engine = ours(24, 70, Scheme.parse("t1a8"), NATIVE, cache=0)
    x = aligned_copy(np.ones((5, 70), np.float32))
    with pytest.raises(WrongAnswerError, match=r"the result is \(5, 1\); expected \(5, 24\)"):
        check_answer(engine, x, engine.calls(x)[0]()[:, :1])


def test_exact_rows_are_those_of_the_whole_product() -> None:
    rng = np.random.default_rng(0)
    dense, x = (rng.standard_normal(shape, dtype=np.float32) for shape in ((2500, 16), (9, 16)))
    whole = x.astype(np.float64) @ dense.T.astype(np.float64)
    np.testing.assert_allclose(exact_rows(dense, x), whole[[0, 4, 8]], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(exact_rows(dense, x[:1]), whole[:1], rtol=1e-12, atol=1e-12)


def test_measures_every_combination(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_ternary.bench.matmul, "last_level_cache", lambda: 1000)
    monkeypatch.setattr(tvm_ternary.bench.roofline, "cache_sizes", lambda: {1: 1000})
    shapes, schemes = [(16, 128), (40, 20)], ["t1a8", "t1a8/dense", "t1a1"]
    found = list(measure_matmuls(shapes, [3, 9], schemes, peers=["ort-int8"], cold=True, turns=2))
    keys = [(one.n, one.k, one.m, one.cache, one.scheme) for one in found]
    assert keys == [
        (n, k, m, cache, scheme)
        for n, k in shapes
        for m, cache in ((3, "warm"), (3, "cold"), (9, "warm"))
        for scheme in schemes
    ]
    for one in found:
        assert one.peers.keys() == one.peer_bytes.keys() == {"ort-int8"}
        assert (one.threads, one.target, one.left_out) == (1, NATIVE.name, {})
        assert one.floor > 0
        assert one.time.median > 0
    assert {one.peak for one in found if one.scheme == "t1a8"} != {one.peak for one in found if one.scheme == "t1a1"}


def test_peers_stand_beside_the_schemes_that_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = {
        "any": replace(PEERS["ort-int8"], refuses=lambda n, k: "needs an even N" if n % 2 else None),
        "signs": replace(PEERS["ort-2bit"], activation_bits=frozenset({1})),
    }
    monkeypatch.setattr(tvm_ternary.bench.matmul, "PEERS", peers)
    found = list(measure_matmuls([(16, 128), (17, 128)], [1], ["t1a8", "t1a1"], peers=list(peers), turns=1))
    assert [(one.n, one.scheme, set(one.peers), one.left_out) for one in found] == [
        (16, "t1a8", {"any"}, {}),
        (16, "t1a1", {"any", "signs"}, {}),
        (17, "t1a8", set(), {"any": "needs an even N"}),
        (17, "t1a1", {"signs"}, {"any": "needs an even N"}),
    ]
    (alone,) = measure_matmuls([(16, 128)], [1], ["t1a8"], peers=["signs"], turns=1)
    assert alone.peers == {}


def test_workers_are_waited_for_where_the_next_are_others() -> None:
    one, two = Workers("one", 0.5), Workers("two", 0.2)
    engines = [replace(EMPTY, name=name, workers=workers) for name, workers in zip("abc", (one, one, two), strict=True)]
    assert rests(engines) == {"b": 0.5, "c": 0.2}
    assert rests(engines[:2]) == {}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"rows": [0]}, r"rows: is \[0\]; expected whole numbers from 1"),
        ({"shapes": [(16, 0)]}, r"shapes: is \[16, 0\]"),
        ({"turns": 0}, r"turns: is \[0\]"),
        ({"cold": True, "rows": [9, 16]}, r"cold: is for M up to 8; rows are \[9, 16\]"),
        ({"threads": 0}, "threads: is 0"),
        ({"schemes": ["t9"]}, "scheme 't9': unknown"),
        ({"target": "vax"}, "target vax: no such target"),
    ],
)
def test_options_without_meaning_are_one_line(change: dict[str, Any], part: str) -> None:
    options: dict[str, Any] = {"shapes": [(16, 16)], "rows": [1], "schemes": ["t1a8"], **change}
    with pytest.raises(OptionError, match=part):
        next(measure_matmuls(**options))


def test_memory_is_aligned_and_copies_exceed_the_cache() -> None:
    for shape in ((3, 5), (1,), (2, 3, 4)):
        array = aligned(shape, np.float32, fill=2)
        assert array.shape == shape
        assert array.ctypes.data % 64 == 0
        assert (array == 2).all()
    assert copies_beyond(0, 7) == 1
    assert copies_beyond(14, 7) == 3
    with pytest.raises(OptionError, match="cold: a weight of 7 bytes needs 5001 copies; at most 4096 are made"):
        copies_beyond(35_000, 7)
