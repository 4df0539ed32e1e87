"""What holds for every verb."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

import tvm_ternary.runtime.artifact
from tvm_ternary.cli import main

from .conftest import cli, error_line

VERBS = ("compile", "run", "inspect", "tune", "bench")


def test_help_teaches_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  tvm-ternary {verb} " in text for verb in VERBS)
    assert "TVM_TERNARY_TRACE=1" in text
    for verb in VERBS:
        with pytest.raises(SystemExit, match="0"):
            main([verb, "--help"])
        assert f"examples:\n  tvm-ternary {verb} m" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "VERB"),
        (["bake"], "'bake'"),
        (["compile"], "MODEL, -o/--output"),
        (["run"], "SO"),
        (["inspect", "a.so", "--colour"], "--colour"),
        (["inspect", "a.so", "b\n.so"], "b\\n.so"),
    ],
)
def test_wrong_usage_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], part: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.endswith("--help'\n")
    assert printed.err.count("\n") == 1
    assert part in printed.err


def test_version() -> None:
    assert cli("--version").stdout.split()[0] == "tvm-ternary"


def test_trace_shows_when_asked(tmp_path: Path) -> None:
    missing = tmp_path / "missing.so"
    assert "Traceback" not in cli("inspect", missing).stderr
    result = cli("inspect", missing, env={"TVM_TERNARY_TRACE": "1"})
    assert result.returncode == 2
    assert result.stderr.startswith("Traceback")
    assert result.stderr.splitlines()[-1] == error_line(cli("inspect", missing))


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (
            ValueError("no\nway"),
            70,
            "internal error: ValueError: no (set TVM_TERNARY_TRACE=1 for the trace)",
        ),
        (ZeroDivisionError(), 70, "internal error: ZeroDivisionError (set TVM_TERNARY_TRACE=1 for the trace)"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError("9 GiB"), 2, "error: not enough memory (9 GiB)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_ends_a_verb_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    line: str,
) -> None:
    def fail(path: str) -> NoReturn:
        raise error

    monkeypatch.setattr(tvm_ternary.runtime.artifact, "read_artifact", fail)
    assert main(["inspect", "a.so"]) == status
    assert capsys.readouterr() == ("", f"{line}\n")
