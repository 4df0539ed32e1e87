"""The house itself: the pins hold, the wheel is complete, and what must be quick imports nothing heavy."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import requires, version
from pathlib import Path

import pytest

import tvm_ternary

from .conftest import ROOT

HEAVY = ("numpy", "onnx", "rich", "safetensors", "tvm", "tvm_ffi")


def _python(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=cwd, timeout=300
    )


def _pins() -> dict[str, str]:
    found = (re.fullmatch(r"([\w-]+)==([\w.]+)", line) for line in requires("tvm-ternary") or ())
    return {match[1]: match[2] for match in found if match}


def test_tvm_is_pinned_as_a_pair() -> None:
    pins = _pins()
    assert set(pins) == {"apache-tvm", "apache-tvm-ffi"}
    assert pins == {name: version(name) for name in pins}


def test_tuning_works_with_the_pinned_versions() -> None:
    # With apache-tvm-ffi 0.1.15 this process ends with a segmentation fault.
    result = _python(ROOT / "tests" / "tune_once.py")
    assert result.returncode == 0, result.stderr[-2000:]
    # A candidate that cannot be built or run is recorded with 1e10 seconds.
    assert 0 < float(result.stdout.splitlines()[-1]) < 1


def test_wheel_holds_schedules_and_tuning_logs(tmp_path: Path) -> None:
    result = _python("-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("schedules", "tuning_logs"):
        sources = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert sources
        assert {f"tvm_ternary/_{folder}/{path}" for path in sources} <= names
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "tvm_ternary").rglob("*.py")}
    assert package <= names
    assert not any(name.startswith(("tests/", "examples/")) for name in names)


def test_installed_wheel_finds_its_schedules(tmp_path: Path) -> None:
    _python("-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tvm_ternary.schedule import tiles\n"
        "assert tiles.__file__.startswith(sys.argv[1])\n"
        "print(tiles.load_tiles('matmul_a8', 'portable').source)"
    )
    result = _python("-c", code, tmp_path / "site", cwd=tmp_path)
    assert result.stdout == "portable/matmul_a8.toml\n", result.stderr


@pytest.mark.parametrize(
    "code", ["import tvm_ternary", "from tvm_ternary.cli import main; main(['compile', '--help'])"]
)
def test_import_and_help_load_nothing_heavy(code: str) -> None:
    report = f"import atexit, sys; atexit.register(lambda: print(sorted({set(HEAVY)} & set(sys.modules)))); {code}"
    result = _python("-c", report)
    assert result.stdout.splitlines()[-1] == "[]"


def test_public_names_are_what_they_say() -> None:
    for name in tvm_ternary.__all__:
        assert getattr(tvm_ternary, name) is not None
    assert set(tvm_ternary.__all__) <= set(dir(tvm_ternary))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tvm_ternary.nothing  # noqa: B018


@pytest.mark.parametrize("before", ["pass", "import tvm_ternary.quantize", "import tvm_ternary.quantize.exact"])
def test_quantize_is_a_function_whatever_was_imported(before: str) -> None:
    code = (
        f"{before}; import tvm_ternary as tt; print(tt.quantize([[2.0, -2.0]], 't1a32').shape)\n"
        "import tvm_ternary.quantize.exact; print(tvm_ternary.quantize.exact.__name__)"
    )
    assert _python("-c", code).stdout == "(1, 2)\ntvm_ternary.quantize.exact\n"


@pytest.mark.parametrize(
    ("tests", "status"),
    [
        ("@pytest.mark.skip(reason='no')\ndef test_a(): pass", 1),
        ("pytest.skip('no', allow_module_level=True)", 1),
        ("@pytest.mark.skip(reason='no')\ndef test_a(): pass\ndef test_b(): pass", 0),
        ("@pytest.mark.gpu\n@pytest.mark.skip(reason='no')\ndef test_a(): pass", 0),
    ],
    ids=["all", "module", "some", "gpu"],
)
def test_a_folder_of_skipped_tests_fails_the_run(tmp_path: Path, tests: str, status: int) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: as in pyproject.toml\n")
    for folder, text in (("silent", tests), ("other", "def test_c(): pass")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"test_{folder}.py").write_text(f"import pytest\n{text}\n")
    result = _python("-m", "pytest", "-q", cwd=tmp_path)
    assert result.returncode == status, result.stdout
    assert ("FAILED silent: all of its tests were skipped (1)" in result.stdout) == bool(status)
