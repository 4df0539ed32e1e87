"""``tvm-ternary bench attention``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import cli, error_line

TINY = ("bench", "attention", "--shapes", "4/2x16", "--window", "64", "--threads", "1", "--turns", "1")


def test_prints_tables_appends_lines_and_draws(tmp_path: Path) -> None:
    lines, picture = tmp_path / "lines.jsonl", tmp_path / "a.svg"
    options = ("--cached", "130,300", "--prompts", "33", "--schemes", "full,t2a8", "--prompt-schemes", "t1a8")
    result = cli(*TINY, *options, "--peers", "ort-gqa,ort-mha", "--json", lines, "--plot", picture)
    assert result.returncode == 0, result.stderr
    facts, table, left_out, memory = result.stdout.split("\n\n")
    assert facts.startswith("cpu  ")
    assert [line.split()[:5] for line in table.splitlines()[2:6]] == [
        ["4/2x16", "step", tokens, "1", scheme] for tokens in ("130", "300") for scheme in ("full", "t2a8")
    ]
    assert [line.split("   ")[1].strip() for line in table.splitlines()[6:]] == ["prompt, causal", "prompt"]
    assert "has no cache that it does not copy" in left_out
    assert [line.split("  ")[0] for line in memory.splitlines()[2:]] == [
        "float32",
        "float16",
        *("1 plane", "2 planes", "3 planes"),
    ]
    rows = list(map(json.loads, lines.read_text().splitlines()))
    assert [(row["case"]["keys"], row["case"]["causal"], row["scheme"]) for row in rows] == [
        *((tokens, False, scheme) for tokens in (130, 300) for scheme in ("full", "t2a8")),
        (33, True, "t1a8"),
        (33, False, "t1a8"),
    ]
    for row in rows:
        assert row["benchmark"] == "attention"
        assert row["ratios"].keys() == row["peers"].keys() == row["peer_errors"].keys()
        assert {"cpu", "versions", "commit", "threads", "target", "time", "gbs", "floor_us", "turns"} <= row.keys()
    assert "<!-- 4/2x16, 1 thread -->" in picture.read_text()


def test_several_threads_without_peers() -> None:
    result = cli(
        *TINY, "--cached", "128", "--prompts", "none", "--schemes", "t1a8", "--peers", "none", "--threads", "1,2"
    )
    assert result.returncode == 0, result.stderr
    assert "ratio" not in result.stdout
    assert "left out" not in result.stdout
    assert [line.split()[3] for line in result.stdout.split("\n\n")[1].splitlines()[2:]] == ["1", "2"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--shapes", "4"), "shapes: got '4'; expected HEADS/KVxSIZE"),
        (("--shapes", "3/2x64"), "shapes: got '3/2x64'; expected numbers from 1, the second a divisor of the first"),
        (("--schemes", "full,t9a8"), "scheme 't9a8': unknown; expected full or t{1-3}a{1|8|32}"),
        (("--prompt-schemes", "t2a32"), "prompt scheme t2a32: queries of a prompt are rounded where keys are"),
        (("--cached", "x"), "--cached: N is 'x'"),
        (("--cached", "100"), "cached: is 100; of up to 127 tokens none is packed"),
        (("--prompts", "1"), "prompts: is 1; expected at least 2 tokens"),
        (("--prompts", ""), "--prompts: N is ''"),
        (("--window", "65"), "window: is 65; expected a multiple of 64"),
        (("--threads", "0"), "threads: is 0"),
        (("--threads", "1,x"), "--threads: N is 'x'"),
        (("--turns", "0"), "turns: is 0; expected at least 1"),
        (("--peers", "fast"), "peer 'fast': does not exist; expected auto, none or of ort-gqa, ort-mha"),
        (("--target", "vax"), "target vax: no such target"),
        (("--plot", "a.jpg"), "a.jpg: ends in '.jpg'; expected .png or .svg"),
        (("--plot", "a.png", "--cached", "none"), "plot: shows steps; there is none"),
        (("--cached", "none", "--prompts", "none"), "bench attention: nothing to measure"),
        (("--json", "/nowhere/at/all"), "its folder /nowhere/at does not exist"),
    ],
)
def test_bad_options_are_one_line(arguments: tuple[str, ...], part: str) -> None:
    assert part in error_line(cli(*TINY, *arguments))
