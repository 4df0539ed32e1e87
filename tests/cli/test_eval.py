"""``tvm-ternary eval``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from .conftest import cli, error_line

METRIC = """
def mean(run):
    import numpy
    return {"mean": run({"x": numpy.ones((1, 10), "float32")})["y"].mean()}
def broken(run):
    return 1 / 0
"""


@pytest.fixture
def metric(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.py"
    path.write_text(METRIC)
    return path


@pytest.fixture(scope="session")
def float_library(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, compiled by an evaluation's way: nothing ternary. Do not write there."""
    import tvm_ternary as tt

    return tt.compile(model, tmp_path_factory.mktemp("float") / "float.so", layers=()).path


def test_prints_tables_that_can_be_pasted(model: Path, library: Path, metric: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, x=np.random.default_rng(0).standard_normal((5, 10)).astype(np.float32))
    result = cli(
        "eval", model, library, "--scheme", "t1a8", "--data", data, "--samples", "3", "--metric", f"{metric}:mean"
    )
    assert result.returncode == 0, result.stderr
    assert all(line.endswith(" ...") for line in result.stderr.splitlines())
    facts, sizes, outputs, metrics, *layers = result.stdout.split("\n\n")
    assert f"data          3 samples of {data}" in facts
    assert [line.split()[0] for line in sizes.splitlines()[2:]] == [str(library), "t1a8"]
    assert [line.split()[1:3] for line in outputs.splitlines()[2:]] == [["y:", "float32"]] * 2
    assert metrics.splitlines()[2].startswith("mean ")
    assert len(layers) == 2
    assert layers[1].startswith("matrix of t1a8 ")


def test_json(float_library: Path, library: Path) -> None:
    result = cli("eval", float_library, library, "--json", "--samples", "2", "--threads", "1", "--logits", "y")
    assert (result.returncode, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert (document["samples"], document["threads"]) == (2, 1)
    (candidate,) = document["candidates"]
    assert candidate["outputs"][0]["logits"]["kl_divergence"] > 0
    assert candidate["layers"][0]["weight_error"] > 0


def test_report_and_pictures(float_library: Path, library: Path, tmp_path: Path) -> None:
    report, folder = tmp_path / "r.html", tmp_path / "pictures"
    result = cli("eval", float_library, library, "--samples", "2", "--html", report, "--plots", folder, "--quiet")
    assert (result.returncode, result.stderr) == (0, "")
    assert report.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in folder.iterdir()) == ["matrices.svg", "outputs-1.png"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "got nothing to compare the float model with"),
        (("LIBRARY", "--data", "nowhere.npz"), "nowhere.npz"),
        (("LIBRARY", "--metric", "METRIC"), "expected FILE.py:FUNCTION"),
        (("LIBRARY", "--metric", "METRIC:median"), "has no 'median'; expected one of mean, broken"),
        (
            ("LIBRARY", "--metric", "METRIC:broken"),
            "failed on float: ZeroDivisionError: division by zero (metrics.py, line 6)",
        ),
        (("LIBRARY", "--layers", "ffn"), "--layers: is for --scheme"),
        (("LIBRARY", "--samples", "0"), "--samples: is 0"),
        (("LIBRARY", "--seed", "-1"), "--seed: is -1"),
        (("--scheme", "t2a8"), "is compiled already"),
        (("nowhere.so",), "nowhere.so"),
        (("LIBRARY", "--html", "/nowhere/at/all.html"), "its folder /nowhere/at does not exist"),
    ],
)
def test_errors_are_one_line(
    float_library: Path, library: Path, metric: Path, arguments: tuple[str, ...], part: str
) -> None:
    given = [item.replace("LIBRARY", str(library)).replace("METRIC", str(metric)) for item in arguments]
    assert part in error_line(cli("eval", float_library, *given))


def test_data_that_do_not_fit(float_library: Path, library: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "wrong.npz", x=np.zeros((5, 9), np.float32))
    result = cli("eval", float_library, library, "--data", tmp_path / "wrong.npz")
    assert "input 'x'" in error_line(result)


def test_help_teaches() -> None:
    text = cli("eval", "--help").stdout
    assert "def accuracy(run):" in text
    assert text.count("  tvm-ternary eval ") >= 4
