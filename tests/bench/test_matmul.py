"""The matmul benchmark on tiny shapes: answers and figures, not speed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import tvm_ternary.bench.matmul
from tests.ternary_matmul import NATIVE
from tvm_ternary.bench.engines import Floats, WrongAnswerError, check_answer, ours
from tvm_ternary.bench.matmul import Measurement, mean_ratios, measure_matmuls
from tvm_ternary.bench.memory import aligned, aligned_copy, copies_beyond
from tvm_ternary.bench.report import machine_table, matmul_table, means_table
from tvm_ternary.bench.timing import Spread
from tvm_ternary.errors import OptionError
from tvm_ternary.formats.scheme import Scheme

ONE = Measurement(
    n=100,
    k=50,
    m=2,
    scheme="t1a8",
    cache="warm",
    time=Spread(4.0, 3.0, 5.0),
    error=0.001,
    bytes=1000,
    bandwidth=1e9,
    peak=10e9,
    peers={"slow": Spread(9.0, 9.0, 9.0), "fast": Spread(6.0, 6.0, 6.0)},
)


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


def test_measures_every_combination(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_ternary.bench.matmul, "last_level_cache", lambda: 1000)
    found = list(
        measure_matmuls([(16, 128), (40, 20)], [1, 3], ["t1a8", "t1a1"], peers=["ort-int8"], cold=True, repeat=2)
    )
    keys = [(one.n, one.k, one.m, one.cache, one.scheme) for one in found]
    assert keys == [
        (n, k, m, cache, scheme)
        for n, k in ((16, 128), (40, 20))
        for m in (1, 3)
        for cache in ("warm", "cold")
        for scheme in ("t1a8", "t1a1")
    ]
    for one in found:
        assert one.peers.keys() == {"ort-int8"}
        assert (one.peak is None) == (one.scheme == "t1a1")
        assert one.floor > 0
        assert one.time.median > 0


def test_figures_follow_from_what_was_measured() -> None:
    assert ONE.operations == 20_000
    assert ONE.floor == pytest.approx(2)  # 20,000 operations at 10 G a second; the bytes take 1 us
    assert replace(ONE, peak=None).floor == pytest.approx(1)
    assert (ONE.best_peer, ONE.ratio) == ("fast", 1.5)
    fields = json.loads(json.dumps(ONE.as_json(), allow_nan=False))
    assert fields["us"] == {"median": 4.0, "p20": 3.0, "p80": 5.0}
    assert fields["peers_us"].keys() == {"slow", "fast"}
    assert (fields["gbs"], fields["gops"]) == (0.25, 5.0)
    assert fields["floor_percent"] == pytest.approx(50)


def test_tables() -> None:
    (row,) = matmul_table([ONE]).rows
    assert row == (
        *("100 x 50", "2", "warm", "t1a8", "4.0", "3.0", "5.0", "0.2", "5", "2.0", "50%"),
        *("9.0", "6.0", "1.50x"),
    )
    alone = matmul_table([replace(ONE, peers={})])
    assert len(alone.rows[0]) == len(alone.columns) == 11
    other = replace(ONE, n=7, time=Spread(1.0, 1.0, 1.0))
    assert mean_ratios([ONE, other]) == {("t1a8", "warm", 2): pytest.approx(3)}
    assert means_table([ONE, other]).rows == (("t1a8", "warm", "2", "3.00x"),)
    facts: dict[str, Any] = {"cpu": "c", "caches": {"1": 49152}, "versions": {"numpy": "2"}, "commit": None}
    assert dict(machine_table(facts, 1, "avx2").rows)["caches"] == "L1 48 KiB"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"rows": [0]}, r"rows: is \[0\]; expected whole numbers from 1"),
        ({"shapes": [(16, 0)]}, r"shapes: is \[16, 0\]"),
        ({"repeat": 0}, r"repeat: is \[0\]"),
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
