"""The demo and the quick start run as written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnx

from tvm_ternary.runtime.artifact import read_artifact

from ..conftest import ROOT
from ..models import mlp


def _run(script: Path, *arguments: Path, cwd: Path) -> str:
    result = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, check=False, cwd=cwd, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_demo_comes_near_the_float_model(models: Path, tmp_path: Path) -> None:
    # In a tree of its own, with the models at hand: nothing is downloaded, and a user's demo-out stays as it is.
    examples = shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / ".cache").mkdir()
    os.symlink(models.resolve(), tmp_path / ".cache" / "models")
    text = _run(examples / "demo.py", cwd=tmp_path)
    manifest = read_artifact(tmp_path / "demo-out" / "model.so").manifest
    assert sum(layer.became == "ternary" for layer in manifest.layers) == 18
    assert all(layer.name in text for layer in manifest.layers)
    cosines = [float(value) for value in re.findall(r"^\d +\w.*[.!] +(0\.\d{4}|1\.0000)$", text, re.MULTILINE)]
    assert len(cosines) == 6
    assert min(cosines) > 0.9
    assert re.search(r"^tvm-ternary +\d+\.\d +\d+\.\d MiB$", text, re.MULTILINE)
    gpu = read_artifact(tmp_path / "demo-out" / "gpu.so").manifest
    assert (gpu.target.archs, gpu.graph) == (("sm_80", "sm_90"), True)
    assert re.search(r"^machine code for +sm_80 and sm_90$", text, re.MULTILINE)
    assert re.search(r"^onnxruntime, float32 +\d+\.\d +65\.8 MiB$", text, re.MULTILINE)


def test_quickstart(tmp_path: Path) -> None:
    onnx.save(mlp(), tmp_path / "mine.onnx")
    lines = _run(ROOT / "examples" / "quickstart.py", tmp_path / "mine.onnx", cwd=tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == ["layers.0.weight", "layers.1.weight", "y"]
    assert lines[-1] == "y float32 (1, 7)"
