"""``tvm-ternary quantize`` as a process: the plan, the run, a kill in the middle of it, and what it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from tvm_ternary.cli import main
from tvm_ternary.quantize.methods import METHODS
from tvm_ternary.runtime.module import load

from ..models import FLOAT, GraphBuilder
from .conftest import MATRICES, cli, command, error_line

FAST = ("--method", "absmean")
SAME = ("--edges", "same", "--output-layer", "same")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(text: str) -> dict[str, str]:
    return {line.split()[0]: line for line in text.splitlines() if line}


def test_the_plan_is_shown_and_nothing_written(model: Path, tmp_path: Path) -> None:
    result = cli("quantize", model, "--dry-run", "--scheme", "t1a8", "--layers", r"layers\.1=t2a8", "--layers", "all")
    assert result.returncode == 0, result.stderr
    table = rows(result.stdout)
    assert "24 x 10" in table[MATRICES[0]]
    assert table[MATRICES[0]].endswith("the first block: edges is t4")
    assert "t4a8" in table[MATRICES[0]]
    assert table[MATRICES[1]].endswith(r"layers layers\.1")
    assert "2 ternary, 0 left in float" in table["matrices"]
    assert "\x1b" not in result.stdout
    planned = json.loads(cli("quantize", model, "--dry-run", "--json").stdout)
    assert planned["path"] is None
    assert [layer["name"] for layer in planned["layers"]] == list(MATRICES)
    assert list(tmp_path.iterdir()) == []


def test_a_run_says_what_became_of_every_matrix(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli("quantize", model, "-o", out, "--scheme", "t2a8", *SAME)
    assert result.returncode == 0, result.stderr
    progress = result.stderr.splitlines()
    assert progress[0] == "import ..."
    assert [line.split(":")[0].strip() for line in progress if ": t2a8, error 0." in line] == list(MATRICES)
    table = rows(result.stdout)
    assert "t2a8" in table[MATRICES[0]]
    assert str(out) in table["folder"]
    again = cli("quantize", model, "-o", out, "--scheme", "t2a8", *SAME, "--json")
    assert error_line(again) == f"error: {out}: exists; choose another name, or replace it with --overwrite"
    result = cli("quantize", model, "-o", out, "--scheme", "t2a8", *SAME, "--json", "--overwrite")
    document = json.loads(result.stdout)
    assert (document["path"], result.stderr) == (str(out), "")
    for layer in document["layers"]:
        assert layer["scheme"] == "t2a8"
        assert 0 < layer["error"] < 0.5
    assert cli("quantize", model, "-o", out, *SAME, "--overwrite", "--quiet").stdout == ""


def test_options_may_lie_in_a_file(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "layers.toml"
    file.write_text('scheme = "t1a8"\nedges = "same"\noutput_layer = "same"\n[recipe]\nmethod = "absmean"\n')
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli("quantize", model, "-o", first, "--config", file, "--quiet").returncode == 0
    assert cli("quantize", model, "-o", second, "--scheme", "t1a8", *SAME, *FAST, "--quiet").returncode == 0
    assert content(first) == content(second)


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes seconds."""
    g = GraphBuilder("deep")
    x = g.input("x", FLOAT, ["batch", 64])
    for layer in range(60):
        x = g.node("Relu", g.node("MatMul", x, g.weight(f"layers.{layer}.weight", 64, 64)))
    g.node("Identity", x, output="y")
    g.output("y", FLOAT, ["batch", 64])
    path = tmp_path_factory.mktemp("deep") / "deep.onnx"
    onnx.save(g.model(), path)
    return path


@pytest.mark.parametrize("data", [False, True], ids=["weights alone", "with calibration"])
def test_killed_in_the_middle_it_goes_on_and_gives_equal_bytes(deep: Path, tmp_path: Path, data: bool) -> None:
    random = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", x=random.standard_normal((16, 64)).astype(np.float32))
    options = ["--scheme", "t2a8g32", "--quiet", *(("--calibration", tmp_path / "x.npz") if data else FAST)]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert cli("quantize", deep, "-o", whole, *options).returncode == 0
    process = subprocess.Popen(command("quantize", deep, "-o", out, *options))
    while process.poll() is None and len(list(tmp_path.glob("out.partial/part-*"))) < 5:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was finished before it could be killed"
    assert not out.exists()
    refused = error_line(cli("quantize", deep, "-o", out, *options, "--edges", "float"))
    assert "out.partial: holds an unfinished job whose options is" in refused
    result = cli("quantize", deep, "-o", out, *[text for text in options if text != "--quiet"])
    assert result.returncode == 0, result.stderr
    finished = int(rows(result.stdout)["resumed"].split()[1])
    assert 5 <= finished < 60
    assert content(out) == content(whole)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--scheme", "t9a8"], ["'t9a8'", "t{1-4}a{32|bf16|16|8|1}"]),
        (["--layers", "decoder"], ["'decoder'", "matches no matrix", *MATRICES]),
        (["--layers", "("], ["'('", "no regular expression"]),
        (["--edges", "t7"], ["edges: got 't7'", "float, same, planes alone (t4) or a scheme"]),
        (["--output-layer", "int8"], ["output_layer: got 'int8'"]),
        (["--embeddings", "t2"], ["embeddings: got 't2'", "int8, float"]),
        (["--method", "magic"], ["'magic'", "planes", *METHODS]),
        (["--recipe", "swaps=1"], ["recipe has no option 'swaps'", "damping"]),
        (["--recipe", "damping"], ["--recipe", "'damping'", "NAME=VALUE"]),
        (["--recipe", "damping=much"], ["recipe damping is 'much'"]),
        (["--config", "/none.toml"], ["/none.toml", "cannot be read"]),
        (["--dim", "depth=2"], ["depth", "no such symbolic dimension", "batch"]),
        (["--constant", "z=1"], ["constant z", "no such input", "x"]),
        (["--samples", "many"], ["--samples", "'many'"]),
        (["--calibration", "/none.npz"], ["/none.npz"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_bad_option(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], parts: list[str]
) -> None:
    arguments = ["quantize", str(model), "-o", str(tmp_path / "out"), *options, "--quiet"]
    try:
        status = main(arguments)
    except SystemExit as stop:  # argparse ends the process by itself
        status = stop.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert [part for part in parts if part not in printed.err] == []
    assert list(tmp_path.iterdir()) == []


def test_bad_models_and_folders(model: Path, tmp_path: Path) -> None:
    assert "no such file" in error_line(cli("quantize", tmp_path / "none.onnx", "-o", tmp_path / "out"))
    assert "output: is missing" in error_line(cli("quantize", model))
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in error_line(cli("quantize", tmp_path / "empty", "-o", tmp_path / "out"))
    assert cli("quantize", model, "-o", tmp_path / "out", *FAST, "--quiet").returncode == 0
    line = error_line(cli("compile", tmp_path / "out" / "model.onnx", "-o", tmp_path / "m.so"))
    assert f"name its folder, {tmp_path / 'out'}" in line
    text = (tmp_path / "out" / "config.json").read_text().replace('"version": 1', '"version": 7')
    (tmp_path / "out" / "config.json").write_text(text)
    for verb in ("quantize", "compile"):
        line = error_line(cli(verb, tmp_path / "out", "-o", tmp_path / "new"))
        assert "quantization_config has version 7, expected 1" in line


def test_compile_with_data_is_quantize_and_compile(model: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    lines = [json.dumps({"x": row.tolist()}) for row in random.standard_normal((40, 10))]
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
    options = ("--scheme", "t2a8", *SAME, "--calibration", tmp_path / "x.jsonl", "--samples", "32")
    result = cli("quantize", model, "-o", tmp_path / "folder", *options, "--json")
    assert result.returncode == 0, result.stderr
    layers = json.loads(result.stdout)["layers"]
    assert all(0 < layer["output_error"] < 0.3 for layer in layers)
    compiled = []
    for source, library, extra in ((tmp_path / "folder", "a.so", ()), (model, "b.so", options)):
        result = cli("compile", source, "-o", tmp_path / library, *extra, "--json")
        assert result.returncode == 0, result.stderr
        compiled.append(json.loads(result.stdout)["manifest"])
    assert compiled[0]["layers"] == compiled[1]["layers"]
    assert [layer["error"] for layer in compiled[0]["layers"]] == [layer["error"] for layer in layers]
    x = {"x": random.standard_normal((5, 10)).astype(np.float32)}
    first, second = (load(tmp_path / library).run(None, x)[0] for library in ("a.so", "b.so"))
    np.testing.assert_array_equal(first, second)
    line = error_line(cli("compile", tmp_path / "folder", "-o", tmp_path / "c.so", "--scheme", "t1a8"))
    assert "the model was quantized before and has t2a8" in line


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    text = capsys.readouterr().out
    assert "examples:\n  tvm-ternary quantize model.onnx --dry-run" in text
    assert "layers.toml:\n" in text
