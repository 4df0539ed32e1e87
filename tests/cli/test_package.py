"""``tvm-ternary package``."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from .conftest import cli, error_line


def test_a_model_in_a_folder(library: Path, tmp_path: Path) -> None:
    result = cli("package", library, "-o", tmp_path / "made")
    assert (result.returncode, result.stderr) == (0, "")
    heading, _, *rows = result.stdout.splitlines()
    assert heading.split() == ["part", "files", "size"]
    assert [row.split("  ")[0] for row in rows[:9]] == [
        *("model", "runtime libraries", "C++ runner", "C++ headers", "Python", "licences, README", "all"),
        *("without weights", ""),
    ]
    assert ["folder", str(tmp_path / "made")] in [row.split() for row in rows]
    run = subprocess.run(
        [tmp_path / "made" / "runner", tmp_path / "made" / library.name], capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (0, "y: float32 [1, 7]\n")


def test_json_and_force(library: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    without = {"PATH": str(tmp_path)}
    document = json.loads(cli("package", library, "-o", folder, "--json", env=without).stdout)
    assert sorted(document) == ["bytes", "bytes_without_weights", "command", "folder", "parts", "runner"]
    assert document["folder"] == str(folder)
    assert document["runner"] is False
    assert document["bytes"] == sum(part["bytes"] for part in document["parts"])
    line = error_line(cli("package", library, "-o", folder, env=without))
    assert line == f"error: {folder}: is a package already; give --force to replace it, or name another folder"
    again = cli("package", library, "-o", folder, "--force", env=without)
    assert again.returncode == 0
    assert "not built, for want of a C++ compiler" in again.stdout


def test_bad_input(library: Path, tmp_path: Path) -> None:
    assert "no such file" in error_line(cli("package", tmp_path / "absent.so", "-o", tmp_path / "made"))
    assert "required: -o/--output" in cli("package", library).stderr
    assert list(tmp_path.iterdir()) == []
