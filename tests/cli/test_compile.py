"""``tvm-ternary compile``, and what it does with bad models and options."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tvm_ternary.cli import main
from tvm_ternary.compiler import DEFAULT_SCHEME
from tvm_ternary.graph.onnx.read import read_model
from tvm_ternary.quantize import METHODS
from tvm_ternary.runtime.module import load
from tvm_ternary.target import target_names
from tvm_ternary.target.cpu import cpu_names
from tvm_ternary.target.cuda import cuda_names

from ..models import FLOAT, INT64, GraphBuilder
from .conftest import MATRICES, cli, command, error_line


def test_prints_every_matrix_and_what_it_came_to(model: Path, tmp_path: Path) -> None:
    result = cli("compile", model, "-o", tmp_path / "out.so", "--layers", "layers.1=t2a32")
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines() == ["import ...", "quantize ...", "lower ...", "build ...", "link ..."]
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert rows[MATRICES[0]].endswith("not chosen by layers")
    assert "float32" in rows[MATRICES[0]]
    assert "7 x 24" in rows[MATRICES[1]]
    assert "t2a32" in rows[MATRICES[1]]
    assert "matmul_a32" in rows[MATRICES[1]]
    assert "1 ternary, 1 left in float" in rows["matrices"]
    assert {"all", "ternary", "file", "time"} <= rows.keys()
    # What is pasted elsewhere holds no colours and no spaces at the ends.
    assert "\x1b" not in result.stdout
    assert all(line == line.rstrip() for line in result.stdout.splitlines())


def test_json_is_what_inspect_reads(model: Path, tmp_path: Path) -> None:
    result = cli("compile", model, "-o", tmp_path / "out.so", "--json")
    assert result.stderr == ""
    document = json.loads(result.stdout)
    assert document["path"] == str(tmp_path / "out.so")
    assert document["bytes"] == (tmp_path / "out.so").stat().st_size
    assert list(document["seconds"]) == sorted(["import", "quantize", "lower", "build", "link"])
    seen = json.loads(cli("inspect", tmp_path / "out.so", "--json").stdout)
    assert seen["manifest"] == document["manifest"]
    assert [layer["name"] for layer in seen["manifest"]["layers"]] == list(MATRICES)


def test_same_input_gives_the_same_bytes(model: Path, library: Path, tmp_path: Path) -> None:
    assert cli("compile", model, "-o", tmp_path / "other.so", "--quiet", env={"PYTHONHASHSEED": "7"}).stdout == ""
    assert (tmp_path / "other.so").read_bytes() == library.read_bytes()


def test_dimension_weights_beside_and_dump(model: Path, tmp_path: Path) -> None:
    options = ("--dim", "batch=3", "--weights", "beside", "--dump-ir", tmp_path / "ir", "--quiet")
    assert cli("compile", model, "-o", tmp_path / "out.so", *options).returncode == 0
    module = load(tmp_path / "out.so")
    assert module.inputs[0].shape == (3, 10)
    assert module.manifest.weights.file == "out.safetensors"
    assert (tmp_path / "out.safetensors").is_file()
    phases = sorted(path.name for path in (tmp_path / "ir").iterdir())
    assert phases[0] == "01-import.py"
    assert phases[-1].endswith("-schedule.py")


def test_tables_become_int8_or_stay(tmp_path: Path) -> None:
    g = GraphBuilder("rows")
    rows = g.node("Gather", g.weight("words", 20, 8), g.input("ids", INT64, ["n"]), axis=0)
    g.node("Relu", rows, output="y")
    g.output("y", FLOAT, ["n", 8])
    onnx.save(g.model(), tmp_path / "rows.onnx")
    for options, became, counts in (
        ((), "int8", "0 ternary, 1 int8, 0 left in float"),
        (("--embeddings", "float"), "float32", "0 ternary, 1 left in float"),
    ):
        result = cli("compile", tmp_path / "rows.onnx", "-o", tmp_path / "rows.so", *options)
        assert counts in result.stdout, result.stderr
        (layer,) = load(tmp_path / "rows.so").manifest.layers
        assert (layer.name, layer.became) == ("words", became)


def test_constant_becomes_part_of_the_model(tmp_path: Path) -> None:
    g = GraphBuilder("scaled")
    x, scale = g.input("x", FLOAT, ["batch", 4]), g.input("scale", FLOAT, [2])
    g.node("Mul", g.node("MatMul", x, g.weight("w", 4, 2)), scale, output="y")
    g.output("y", FLOAT, ["batch", 2])
    onnx.save(g.model(), tmp_path / "scaled.onnx")
    for name, value in (("zero", "[0,0]"), ("one", "[1,1.0]")):
        options = ("--constant", f"scale={value}", "--scheme", "t1a32", "--quiet")
        result = cli("compile", tmp_path / "scaled.onnx", "-o", tmp_path / f"{name}.so", *options)
        assert result.returncode == 0, result.stderr
    x_value = {"x": np.ones((1, 4), np.float32)}
    zero, one = (load(tmp_path / f"{name}.so") for name in ("zero", "one"))
    assert [spec.name for spec in zero.inputs] == ["x"]
    assert not zero.run(None, x_value)[0].any()
    assert one.run(None, x_value)[0].any()


def test_help_names_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compile", "--help"])
    text = capsys.readouterr().out
    assert "native (this CPU)" in text
    assert all(", ".join(names) in text for names in (cpu_names(), cuda_names()))
    assert f"methods   {', '.join(sorted(METHODS))}:" in text
    assert f"what matrices become (default: {DEFAULT_SCHEME};" in text
    assert "examples:\n  tvm-ternary compile model.onnx -o model.so\n" in text


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--scheme", "t9a8"], ["'t9a8'", "t{1-4}a{32|bf16|16|8|1}"]),
        (["--target", "sparc"], ["target sparc", *target_names()]),
        (["--target", "cuda-sm_75"], ["target cuda-sm_75", "no such architecture: sm_75"]),
        (["--layers", "decoder"], ["'decoder'", "matches no matrix", *MATRICES]),
        (["--layers", "("], ["'('", "no regular expression", "all, attention, ffn"]),
        (["--layers", "all=t7"], ["'t7'", "t{1-4}a{32|bf16|16|8|1}"]),
        (["--method", "magic"], ["'magic'", *METHODS]),
        (["--dim", "depth=2"], ["depth", "no such symbolic dimension", "batch"]),
        (["--dim", "batch=0"], ["batch", "got 0", "at least 1"]),
        (["--dim", "batch=two"], ["dimension two", "no such symbolic dimension", "batch"]),
        (["--dim", "batch=rows/2"], ["dimension batch", "got 'rows/2'", "32*rows"]),
        (["--dim", "batch=99999999999*rows"], ["dimension batch", "expected numbers up to 2147483647"]),
        (["--dim", "batch=-2"], ["--dim", "batch is '-2'", "whole number"]),
        (["--dim", "batch"], ["--dim", "'batch'", "NAME=VALUE"]),
        (["--dim", "batch=1", "--dim", "batch=2"], ["--dim", "'batch' is given twice"]),
        (["--constant", "z=1"], ["constant z", "no such input", "x"]),
        (["--constant", "x=1"], ["x: got a constant of shape", "batch"]),
        (["--constant", "x=one"], ["--constant", "x is 'one'", "expected a number"]),
        (["--constant", "x=[[1,2],[3]]"], ["--constant", "expected a number"]),
        (["--packing", "tight"], ["packing 'tight'", "fast, dense"]),
        (["--packing", "dense", "--scheme", "t1a32"], ["packing 'dense'", "a32", "expected a8"]),
        (["--weights", "nowhere"], ["--weights", "'nowhere'", "inside", "beside"]),
        (["--dump-ir", "/dev/null"], ["/dev/null", "folder"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_bad_option(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], parts: list[str]
) -> None:
    arguments = ["compile", str(model), "-o", str(tmp_path / "out.so"), *options, "--quiet"]
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


def _changed(model: Path, tmp_path: Path, value: float) -> Path:
    proto = read_model(model)
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == MATRICES[1])
    array = numpy_helper.to_array(weight).copy()
    array[3, 5] = value
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    path = tmp_path / "changed.onnx"
    onnx.save(proto, path)
    return path


def _truncated(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "short.onnx"
    path.write_bytes(model.read_bytes()[:900])
    return path


def _no_onnx(tmp_path: Path) -> Path:
    path = tmp_path / "text.onnx"
    path.write_text("Dear model,\n")
    return path


def _external(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "external.onnx"
    onnx.save(read_model(model), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    return path


def _unsupported(tmp_path: Path) -> Path:
    g = GraphBuilder("odd")
    g.node("Det", g.input("x", FLOAT, [2, 4, 4]), output="y")
    g.output("y", FLOAT, [2])
    onnx.save(g.model(), tmp_path / "odd.onnx")
    return tmp_path / "odd.onnx"


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda model, folder: folder / "missing.onnx", ["missing.onnx", "no such file"]),
        (lambda model, folder: folder, ["holds no config.json", "checkpoint folder"]),
        (lambda model, folder: _no_onnx(folder), ["text.onnx", "no ONNX model"]),
        (_truncated, ["short.onnx", "no ONNX model, or it is truncated"]),
        (_external, ["external.onnx", "weights.bin", "does not exist"]),
        (lambda model, folder: _changed(model, folder, np.nan), [MATRICES[1], "nan", "leave"]),
        (lambda model, folder: _changed(model, folder, -np.inf), [MATRICES[1], "inf", "leave"]),
        (lambda model, folder: _unsupported(folder), ["Det_0", "operator Det", "17"]),
    ],
    ids=["missing", "folder", "text", "truncated", "external", "nan", "inf", "unsupported"],
)
def test_bad_model(model: Path, tmp_path: Path, spoil: object, parts: list[str]) -> None:
    assert callable(spoil)
    line = error_line(cli("compile", spoil(model, tmp_path), "-o", tmp_path / "out.so"))
    assert [part for part in parts if part.lower() not in line.lower()] == []
    assert not (tmp_path / "out.so").exists()


def test_the_model_itself_as_output(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_bytes(model.read_bytes())
    (tmp_path / "link.so").symlink_to(target)
    for output in (target, tmp_path / "link.so"):
        assert "is the model itself" in error_line(cli("compile", target, "-o", output))
    assert target.read_bytes() == model.read_bytes()


def test_folder_that_does_not_exist(model: Path, tmp_path: Path) -> None:
    line = error_line(cli("compile", model, "-o", tmp_path / "no" / "out.so"))
    assert str(tmp_path / "no" / "out.so") in line
    assert "does not exist" in line


def _linker(folder: Path, commands: str) -> dict[str, str]:
    """An environment in which the linker is a shell script."""
    path = folder / "linker"
    path.write_text(f"#!/bin/sh\n{commands}\n")
    path.chmod(0o755)
    return {"CC": str(path)}


def test_full_disk_leaves_the_old_file(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.so"
    output.write_text("old")
    # At most 8 or 16 KiB a file, depending on the shell's unit: as near to a full disk as a test gets.
    environment = _linker(tmp_path, 'ulimit -f 16\nexec cc "$@"')
    line = error_line(cli("compile", model, "-o", output, env=environment))
    assert "out.so" in line
    assert "cannot be written" in line
    assert output.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"out.so", "linker"}


@pytest.mark.parametrize(
    ("number", "word", "status"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)]
)
def test_interrupt_leaves_the_old_file(model: Path, tmp_path: Path, number: int, word: str, status: int) -> None:
    output, started = tmp_path / "out.so", tmp_path / "started"
    output.write_text("old")
    process = subprocess.Popen(
        command("compile", model, "-o", output, "--quiet"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **_linker(tmp_path, f"sleep 0.3\ntouch {started}\nexec sleep 60")},
        # A shell without job control starts what runs in the background with this signal ignored, and so tests.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not started.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (status, "", f"{word}\n")
    assert output.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"out.so", "started", "linker"}
