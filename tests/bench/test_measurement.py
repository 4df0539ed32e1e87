"""Figures follow from what was measured, and come back from JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tvm_ternary.bench.measurement import Measurement

from .measured import ONE


def test_figures() -> None:
    assert ONE.operations == 20_000
    assert ONE.floor == pytest.approx(2)  # 20,000 operations at 10 G a second; the bytes take 1 us
    assert replace(ONE, bandwidth=1e8).floor == pytest.approx(10)
    assert ONE.reached == pytest.approx(0.5)
    assert ONE.ratios == {"slow": 2.25, "fast": 1.5}
    assert (ONE.best_peer, ONE.ratio) == ("fast", 1.5)
    assert (replace(ONE, peers={}).best_peer, replace(ONE, peers={}).ratio) == (None, None)


def test_json() -> None:
    one = replace(ONE, left_out={"picky": "needs an even N"})
    fields = json.loads(json.dumps(one.as_json(), allow_nan=False))
    assert fields["us"] == {"median": 4.0, "p20": 3.0, "p80": 5.0}
    assert fields["peers_us"].keys() == fields["ratios"].keys() == {"slow", "fast"}
    assert (fields["gbs"], fields["gops"]) == (0.25, 5.0)
    assert fields["floor_percent"] == pytest.approx(50)
    again = Measurement.from_json(fields)
    assert (again.bandwidth, again.peak) == (pytest.approx(one.bandwidth), pytest.approx(one.peak))
    assert replace(again, bandwidth=one.bandwidth, peak=one.peak) == one


@pytest.mark.parametrize("missing", ["n", "scheme", "us", "peers_us", "bandwidth_gbs"])
def test_a_line_that_lacks_something_is_refused(missing: str) -> None:
    fields = ONE.as_json()
    del fields[missing]
    with pytest.raises(KeyError, match=missing):
        Measurement.from_json(fields)
