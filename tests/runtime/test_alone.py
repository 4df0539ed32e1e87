"""An artifact runs where only numpy, apache-tvm-ffi, TVM's runtime library and the runtime half of this package are."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tvm_ternary.target import resolve

from .conftest import ROOT

# The runtime half: what `import tvm_ternary; tvm_ternary.load(...)` may need of this package.
OURS = ("__init__.py", "errors.py", "target", "runtime")
# -I -S: no environment variable, no site-packages, no current folder.
ISOLATED = [sys.executable, "-I", "-S", "-c"]
PRELUDE = """
import importlib.util, json, sys
from pathlib import Path
sys.path.append(sys.argv[1])
model = Path(sys.argv[2])
for absent in ("tvm", "onnx", "safetensors", "scipy", "tvm_ternary.build", "tvm_ternary.files"):
    try:
        found = importlib.util.find_spec(absent)
    except ModuleNotFoundError:
        found = None
    assert found is None, found
import tvm_ternary
"""
RUN = """
import numpy as np
module = tvm_ternary.load(model, threads=2)
given = dict(np.load(model.with_suffix(".npz")))
np.savez(model.with_suffix(".out.npz"), *module.run(None, given))
runs = len(module.time(given, 3).runs)
print(json.dumps([[str(spec) for spec in module.inputs], module.manifest.target.name, runs]))
"""
REFUSED = """
try:
    tvm_ternary.load(model)
except tvm_ternary.errors.TernaryError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages: numpy, tvm_ffi and what it requires, and the runtime half of this package."""
    folder = tmp_path_factory.mktemp("site")
    for distribution in ("numpy", "apache-tvm-ffi", "typing_extensions"):
        for top in {file.parts[0] for file in importlib.metadata.files(distribution) or () if file.parts[0] != ".."}:
            source = Path(str(importlib.metadata.distribution(distribution).locate_file(top)))
            if source.exists() and top != "__pycache__" and not top.endswith(".pth"):
                (folder / top).symlink_to(source)
    (folder / "tvm_ternary").mkdir()
    for name in OURS:
        source, copy = ROOT / "tvm_ternary" / name, folder / "tvm_ternary" / name
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    return folder


@pytest.fixture
def deployed(built: Path, tmp_path: Path) -> Path:
    """A folder with the artifacts and TVM's runtime library."""
    folder = tmp_path / "deployed"
    folder.mkdir()
    for name in ("inside.so", "beside.so", "beside.safetensors"):
        shutil.copy(built / name, folder)
    spec = importlib.util.find_spec("tvm")
    assert spec is not None
    assert spec.origin is not None
    shutil.copy(Path(spec.origin).parent / "lib" / "libtvm_runtime.so", folder)
    return folder


def python(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ISOLATED, PRELUDE + code, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", ["inside", "beside"])
def test_it_runs_with_the_runtime_alone(name: str, site: Path, deployed: Path) -> None:
    ids, x = np.arange(6).reshape(2, 3), np.ones((2, 4), np.float32)
    np.savez(deployed / f"{name}.npz", ids=ids, x=x)
    result = python(RUN, site, deployed / f"{name}.so")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [["ids: int64[batch, n]", "x: float32[batch, 4]"], resolve("native").name, 3]
    with np.load(deployed / f"{name}.out.npz") as outputs:
        y, same, table = (outputs[key] for key in outputs.files)
    # Whole numbers below 2**24: exact in float32.
    np.testing.assert_array_equal(table, np.arange(12).reshape(4, 3) - 5)
    np.testing.assert_array_equal(same, ids)
    np.testing.assert_array_equal(y, (x + ids.sum(axis=1, keepdims=True)) @ table)


def test_without_the_runtime_library(site: Path, deployed: Path) -> None:
    (deployed / "libtvm_runtime.so").unlink()
    result = python(REFUSED, site, deployed / "inside.so")
    assert result.stdout.startswith("libtvm_runtime.so: TVM's runtime library was not found; install"), result.stderr
    assert result.stdout.count("\n") == 1


def test_without_tvm_ffi(site: Path, deployed: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(site, bare, symlinks=True, ignore=shutil.ignore_patterns("tvm_ffi"))
    result = python(REFUSED, bare, deployed / "inside.so")
    assert result.stdout.startswith("apache-tvm-ffi: cannot be imported (No module named 'tvm_ffi')"), result.stderr
    assert result.stdout.count("\n") == 1
