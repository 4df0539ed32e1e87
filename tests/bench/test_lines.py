"""Lines of JSON: what is written is read back, and what is not ours is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tvm_ternary.bench.lines import append_line, read_lines
from tvm_ternary.bench.roofline import Limits
from tvm_ternary.errors import InputError, OutputError

from .measured import FACTS, ONE, spread

LIMITS = Limits({"L1": 5e11}, {"int8": 1e12})
ROOF = {"benchmark": "roofline", "target": "avx2", "threads": 1, **LIMITS.as_json()}


def write(path: Path, *lines: dict[str, object]) -> Path:
    for line in lines:
        append_line(path, {**FACTS, "benchmark": "matmul", **line})
    return path


def test_the_last_of_each_case_counts(tmp_path: Path) -> None:
    later = replace(ONE, time=spread(3.0))
    others = [replace(ONE, **change) for change in ({"m": 3}, {"threads": 2}, {"target": "amx"}, {"cache": "cold"})]
    lines = [one.as_json() for one in (ONE, *others, later)]
    results = read_lines(write(tmp_path / "lines", ROOF, *lines))
    assert results.facts == FACTS
    assert [one.time for one in results.measurements] == [later.time, *[one.time for one in others]]
    assert results.limits == {("avx2", 1): LIMITS}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "holds no measurement"),
        ("{}", "line 1: is not a benchmark's"),
        ("[1]", "line 1: is not a benchmark's"),
        ("nonsense", "line 1: is not a benchmark's"),
    ],
)
def test_other_files_are_one_line(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "lines"
    path.write_text(text)
    with pytest.raises(InputError, match=part) as caught:
        read_lines(path)
    assert "bench matmul --json" in str(caught.value)


def test_a_roofline_alone_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no measurement"):
        read_lines(write(tmp_path / "lines", ROOF))


def test_a_line_cut_short_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "lines", ONE.as_json(), ONE.as_json())
    path.write_text(path.read_text()[:-100])
    with pytest.raises(InputError, match="lines, line 2: is not a benchmark's"):
        read_lines(path)


def test_several_processors_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "lines", ONE.as_json())
    append_line(path, {**FACTS, "cpu": "Other CPU", "benchmark": "matmul", **ONE.as_json()})
    with pytest.raises(InputError, match=r"is about several processors \(Fast CPU, Other CPU\)"):
        read_lines(path)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_lines(tmp_path / "missing")
    with pytest.raises(OutputError, match="cannot be written"):
        append_line(tmp_path, {})
