"""``tvm-ternary inspect``."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import subprocess
from pathlib import Path

from tvm_ternary.runtime.artifact import read_artifact

from ..runtime.conftest import reseal
from .conftest import MATRICES, cli, command, error_line


def test_tables_hold_what_the_manifest_says(library: Path) -> None:
    result = cli("inspect", library, "--functions")
    assert (result.returncode, result.stderr) == (0, "")
    manifest = read_artifact(library).manifest
    told = [
        *MATRICES,
        manifest.model.sha256,
        manifest.weights.sha256,
        manifest.target.name,
        " ".join(manifest.target.features),
        "has all of them",
        "inside the file",
        *manifest.versions.values(),
        *(function.name for function in manifest.functions),
        *(layer.kernel or "" for layer in manifest.layers),
    ]
    assert [text for text in told if text not in result.stdout] == []
    assert ["input", "x", "float32", "[batch,", "10]"] in [line.split() for line in result.stdout.splitlines()]
    assert ["output", "y", "float32", "[batch,", "7]"] in [line.split() for line in result.stdout.splitlines()]


def test_json(library: Path) -> None:
    document = json.loads(cli("inspect", library, "--json").stdout)
    assert document["path"] == str(library)
    assert document["bytes"] == library.stat().st_size
    assert document["missing_features"] == []
    assert document["manifest"] == read_artifact(library).manifest.to_dict()


def test_library_for_another_cpu_can_be_looked_at(library: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(library, tmp_path / "other.so"))
    reseal(path, lambda manifest: manifest["target"].update(features=["3dnow_next", "fma"]))
    assert "lacks 3dnow_next" in cli("inspect", path).stdout
    assert json.loads(cli("inspect", path, "--json").stdout)["missing_features"] == ["3dnow_next"]


def test_library_for_gpus(library: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(library, tmp_path / "gpu.so"))
    kernel = {
        "kernel": "f_kernel",
        "arch": "sm_90",
        "registers": 77,
        "shared_bytes": 0,
        "local_bytes": 0,
        "spill_bytes": 0,
    }
    target = {"device": "cuda", "archs": ["sm_80", "sm_90"], "ptx": "sm_90", "cuda": "13.0"}
    reseal(path, lambda manifest: (manifest["target"].update(target), manifest.update(kernels=[kernel], graph=True)))
    told = cli("inspect", path).stdout
    assert "an NVIDIA GPU" in told
    assert "sm_80 sm_90" in told
    assert "recorded as a CUDA graph" in told
    assert "f_kernel" not in told
    assert ["f_kernel", "sm_90", "77", "0", "0", "0"] in [
        line.split() for line in cli("inspect", path, "--functions").stdout.splitlines()
    ]


def test_name_that_would_move_the_cursor_is_escaped(library: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(library, tmp_path / "rude.so"))
    reseal(path, lambda manifest: manifest["model"].update(name="a\x1b[2J\n[bold]b"))
    result = cli("inspect", path)
    assert "a\\x1b[2J\\n[bold]b" in result.stdout
    assert "\x1b" not in result.stdout


def test_bad_library(library: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.so"
    path.write_bytes(library.read_bytes()[:-100])
    assert "truncated" in error_line(cli("inspect", path))
    assert "no such file" in error_line(cli("inspect", tmp_path / os.fsdecode(b"\xff.so")))


def test_reader_that_has_had_enough(library: Path) -> None:
    process = subprocess.Popen(command("inspect", library), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(60) == 141


def test_full_disk_behind_standard_output(library: Path) -> None:
    for option in ("--json", "--functions"):
        with open("/dev/full", "w") as full:
            result = subprocess.run(
                command("inspect", library, option), stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert result.stderr == "error: standard output: cannot be written (No space left on device)\n"
        assert result.returncode == 2


def test_narrow_terminal_cuts_nothing(library: Path) -> None:
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "40"}
    process = subprocess.Popen(command("inspect", library), stdout=follower, env=environment)
    os.close(follower)
    content = b""
    with os.fdopen(leader, "rb", buffering=0) as stream, contextlib.suppress(OSError):
        # Linux says with an error that the other end is closed.
        while part := stream.read(4096):
            content += part
    assert process.wait(60) == 0
    assert content.decode().replace("\r\n", "\n") == cli("inspect", library).stdout


def test_terminal_without_utf_8(library: Path) -> None:
    result = cli("inspect", library, env={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii()
    assert MATRICES[0] in result.stdout
