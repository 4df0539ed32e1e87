"""Tables of measurements and of what they say together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tvm_ternary.bench.means import mean_costs, mean_ratios, means_table, scaling_table
from tvm_ternary.bench.report import left_out_table, limits_table, machine_table, markdown, matmul_table
from tvm_ternary.bench.roofline import Limits
from tvm_ternary.bench.timing import Spread

from .measured import FACTS, ONE, spread

OTHER_SHAPE = replace(ONE, n=7, time=Spread(1.0, 1.0, 1.0))
GROUPS = replace(ONE, scheme="t1a8g64", time=spread(6.0))


def test_a_row_a_measurement() -> None:
    (row,) = matmul_table([ONE]).rows
    assert row == (
        *("100 x 50", "2", "warm", "t1a8", "4.0", "3.0", "5.0", "0.2", "5", "2.0", "50%"),
        *("9.0", "6.0", "1.50x"),
    )
    alone = matmul_table([replace(ONE, peers={})])
    assert len(alone.rows[0]) == len(alone.columns) == 11
    some = matmul_table([ONE, replace(ONE, peers={"new": spread(8.0)}), replace(ONE, peers={})])
    assert some.columns[-4:] == ("slow", "fast", "new", "ratio")
    assert [row[-4:] for row in some.rows] == [
        ("9.0", "6.0", "", "1.50x"),
        ("", "", "8.0", "2.00x"),
        ("", "", "", ""),
    ]


def test_facts_limits_and_what_was_left_out() -> None:
    facts = dict(machine_table(FACTS, 1, "avx2", {"torch-int8": "needs the package torch"}).rows)
    assert facts["caches"] == "L1 48 KiB"
    assert facts["load before"] == "0.2"
    assert facts["no torch-int8"] == "needs the package torch"
    assert "llama.cpp of" not in facts
    assert ("llama.cpp of", "/builds") in machine_table({**FACTS, "llama_cpp": "/builds"}, 1, "avx2", {}).rows
    limits = Limits({"L1": 500e9, "memory": 40.4e9}, {"int8": 1000e9})
    assert limits_table(limits).rows == (
        ("read L1", "500", "GB/s"),
        ("read memory", "40", "GB/s"),
        ("multiply int8", "1000", "Gop/s"),
    )
    assert left_out_table([ONE]) is None
    table = left_out_table([replace(ONE, m=m, left_out={"tq2": "needs K"}) for m in (1, 2)])
    assert table is not None
    assert table.rows == (("tq2", "100 x 50", "needs K"),)


def test_means_over_the_shapes() -> None:
    assert mean_ratios([ONE, OTHER_SHAPE]) == {("t1a8", "warm", 2): pytest.approx(3)}
    assert mean_ratios([ONE, OTHER_SHAPE], ["slow", "absent"]) == {("t1a8", "warm", 2): pytest.approx(4.5)}
    assert mean_ratios([ONE], ["absent"]) == {}
    assert means_table([ONE, OTHER_SHAPE]).columns == ("scheme", "cache", "M", "over best peer", "reached")
    assert means_table([ONE, OTHER_SHAPE]).rows == (("t1a8", "warm", "2", "3.00x", "71%"),)


def test_means_name_the_rivals_of_the_issue() -> None:
    names = ("ort-2bit", "llama-tq2_0", "ort-int8", "torch-int8")
    peers = {name: spread(8.0 + 4 * index) for index, name in enumerate(names)}
    table = means_table([replace(ONE, peers=peers)])
    assert dict(zip(table.columns, table.rows[0], strict=True)) == {
        **{"scheme": "t1a8", "cache": "warm", "M": "2", "reached": "50%"},
        **{"over best peer": "2.00x", "over 2-bit": "2.00x", "over ort-int8": "4.00x", "over torch-int8": "5.00x"},
    }


def test_schemes_are_weighed_against_the_first() -> None:
    assert mean_costs([ONE, GROUPS]) == {("t1a8g64", "warm", 2): pytest.approx(1.5)}
    assert mean_costs([GROUPS, ONE]) == {("t1a8", "warm", 2): pytest.approx(1 / 1.5)}
    assert mean_costs([ONE, OTHER_SHAPE]) == {}
    table = means_table([ONE, GROUPS])
    assert table.columns[-2:] == ("of t1a8", "reached")
    assert [row[-2] for row in table.rows] == ["", "1.50x"]


def test_scaling_is_ours_beside_the_best_peers() -> None:
    two = replace(ONE, threads=2, time=spread(2.0), peers={"slow": spread(3.0), "fast": spread(4.0)})
    lonely = replace(two, m=64)
    table = scaling_table([ONE, OTHER_SHAPE], [two, lonely])
    assert table.columns[-2:] == ("2 threads", "best peer's")
    # The best peer with two threads is the slow one, three times as fast as with one.
    assert table.rows == (("t1a8", "warm", "2", "2.00x", "3.00x"),)


def test_markdown() -> None:
    text = markdown(left_out_table([replace(ONE, left_out={"a|b": "why"})]))  # type: ignore[arg-type]
    assert text == "| left out | N x K | because it |\n| --- | --- | --- |\n| a\\|b | 100 x 50 | why |\n"
    assert markdown(limits_table(Limits({}, {"int8": 1e9}))).splitlines()[1] == "| --- | ---: | --- |"
