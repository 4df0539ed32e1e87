"""The package: it is whole, runs on its own from C++ and from Python, and takes no other folder's place."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.cuda_emulator import fake_gpu
from tvm_ternary.build.package import Package, package
from tvm_ternary.build.runner import SOURCES
from tvm_ternary.errors import ArtifactError, HostError, OutputError
from tvm_ternary.runtime.module import load

from ..runtime.conftest import ROOT, built, reseal
from . import small_model

__all__ = ["built"]
LIMIT = 40_000_000


@pytest.fixture(scope="module")
def made(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """The model with its weights beside it. Do not write there."""
    return package(built / "beside.so", tmp_path_factory.mktemp("packages") / "made")


@pytest.fixture(scope="module")
def made_for_cuda(tmp_path_factory: pytest.TempPathFactory) -> tuple[Package, str]:
    """A model for GPUs, and its CUDA source."""
    folder = tmp_path_factory.mktemp("cuda")
    subprocess.run(
        [sys.executable, "-m", "tests.runtime.cuda_artifact", folder, "cuda-sm_80"], check=True, cwd=ROOT, timeout=120
    )
    return package(folder / "model.so", folder / "made"), (folder / "model.cu").read_text()


def execute(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    # No Python packages, no library path: a host where nothing is installed.
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=120, check=False,
        env={"PATH": os.environ["PATH"], **environment},
    )  # fmt: skip


def saved(folder: Path) -> dict[str, npt.NDArray[Any]]:
    inputs = {
        "ids": np.arange(6).reshape(2, 3),
        "x": np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32),
    }
    for name, array in inputs.items():
        np.save(folder / f"{name}.npy", array)
    return inputs


@pytest.mark.parametrize("name", ["inside", "beside"])
def test_the_runner_gives_what_python_gives(name: str, made: Package, built: Path, tmp_path: Path) -> None:
    inputs = saved(tmp_path)
    result = execute(
        *(made.folder / "runner", "--repeat", 3, "--output", tmp_path / "out", built / f"{name}.so"),
        *(tmp_path / "ids.npy", tmp_path / "x.npy"),
    )
    assert result.returncode == 0, result.stderr
    *told, timing = result.stdout.splitlines()
    assert told == ["y: float32 [2, 3]", "same: int64 [2, 3]", "table: float32 [4, 3]"]
    assert re.fullmatch(r"median of 3 runs: [0-9.e-]+ ms", timing)
    for index, expected in enumerate(load(built / f"{name}.so").run(None, inputs)):
        got = np.load(tmp_path / "out" / f"output_{index}.npy")
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


def test_the_runner_makes_up_inputs(made: Package, tmp_path: Path) -> None:
    outputs = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        result = execute(made.folder / "runner", "--dim", "batch=3", "--output", folder, made.folder / "beside.so")
        assert result.stdout.splitlines()[:2] == ["y: float32 [3, 3]", "same: int64 [3, 32]"], result.stderr
        outputs.append([np.load(folder / f"output_{index}.npy") for index in range(3)])
    y, ids, table = outputs[0]
    assert set(ids.ravel().tolist()) == {0, 1}
    assert (ids[:, 0] == 1).all()
    # What the floats were: y = (x + sum(ids)) @ table, solved for three of four, so only their bounds are seen.
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(table, small_model.TABLE)
    for first, second in zip(*outputs, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model is named"),
        (["--frob", "3", "MODEL"], "--frob 3: no such option"),
        (["--repeat", "0", "MODEL"], "--repeat: got '0'; expected a number of at least 1"),
        (["--repeat"], "--repeat: got ''"),
        (["--dim", "n", "MODEL"], "--dim n: no such option"),
        (["--device", "cuda", "MODEL"], "device cuda: this model runs on cpu"),
        (["absent.so"], "absent.so: cannot be read"),
        (["/etc/hostname"], "/etc/hostname: is no library made by tvm-ternary, or cut short"),
        (["MODEL", "ids.npy"], "got 1 inputs; expected 2"),
        (["MODEL", "x.npy", "x.npy"], "x.npy: is not of dtype int64"),
        (["MODEL", "MODEL", "x.npy"], "beside.so: is no .npy file"),
        (["MODEL", "ids.npy", "short.npy"], "short.npy: is cut short"),
        (["MODEL", "ids.npy", "flat.npy"], "input x: is [8]; expected [2, 4]"),
        (["MODEL", "ids.npy", "other.npy"], "input x: is [3, 4]; expected [2, 4]"),
        (["MODEL", "ids.npy", "turned.npy"], "turned.npy: is in Fortran order"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_the_runner_refuses(arguments: list[str], message: str, made: Package, tmp_path: Path) -> None:
    x = saved(tmp_path)["x"]
    for name, array in {"flat": x.ravel(), "other": np.ones((3, 4), np.float32), "turned": x.T.copy().T}.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "short.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-1])
    paths = {"MODEL": made.folder / "beside.so"} | {f.name: f for f in tmp_path.iterdir()}
    result = execute(made.folder / "runner", *(paths.get(word, word) for word in arguments))
    assert (result.returncode, result.stdout) == (2, "")
    first = result.stderr.splitlines()[0]
    assert first.startswith("error: ")
    assert message in first


def test_the_command_in_the_readme_builds_the_runner(made: Package, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made.folder, tmp_path / "copy"))
    (copy / "runner").unlink()
    (command,) = (line.strip() for line in (copy / "README.txt").read_text().splitlines() if "-std=c++17" in line)
    assert command == made.command
    result = subprocess.run(shlex.split(command), cwd=copy, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert execute(copy / "runner", copy / "beside.so").returncode == 0


def test_python_alone_runs_it(made: Package, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    for source in Path(np.__file__).parents[1].glob("numpy*"):
        (tmp_path / "site" / source.name).symlink_to(source)
    code = """
import runpy, sys
site, script = sys.argv[1:]
sys.path.append(site)
sys.argv[1:] = []
runpy.run_path(script)
files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
print([file for file in files if "site-packages" in file and "numpy" not in file])
"""
    # -S: no site-packages, and so nothing that this environment has installed. -B: no cache in the package.
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", code, tmp_path / "site", made.folder / "run.py"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    *told, timing, foreign = result.stdout.splitlines()
    assert told == ["y float32 (1, 3)", "same int64 (1, 32)", "table float32 (4, 3)"]
    assert timing.endswith(" ms on cpu")
    assert foreign == "[]"


def test_what_is_in_it(made: Package) -> None:
    names = {path.name for path in made.folder.iterdir()}
    assert names == {
        *("beside.so", "beside.safetensors", "libtvm_ffi.so", "libtvm_runtime.so", "runner", "runner.cpp", "include"),
        *("python", "run.py", "licenses", "README.txt", "package.json"),
    }
    licences = {path.name for path in (made.folder / "licenses").iterdir()}
    assert licences >= {
        *("apache-tvm-LICENSE", "apache-tvm-ffi-LICENSE", "apache-tvm-ffi-NOTICE", "tvm-ternary-LICENSE"),
        "typing_extensions-LICENSE",
    }
    readme = (made.folder / "README.txt").read_text()
    assert "x: float32[batch, 4]" in readme
    assert "@" not in readme + (made.folder / "run.py").read_text()
    assert (made.folder / "runner.cpp").read_bytes() == (SOURCES / "runner.cpp").read_bytes()
    assert not list(made.folder.rglob("__pycache__"))


def test_the_sizes_add_up_and_are_small(made: Package, built: Path) -> None:
    files = [path for path in made.folder.rglob("*") if path.is_file()]
    assert made.bytes == sum(path.stat().st_size for path in files)
    assert sum(part.files for part in made.parts) == len(files)
    weights = (made.folder / "beside.safetensors").stat().st_size
    assert [part.bytes for part in made.parts if part.name == "weights"] == [weights]
    assert made.bytes_without_weights == made.bytes - weights < LIMIT


def test_a_package_for_gpus(made_for_cuda: tuple[Package, str], tmp_path: Path) -> None:
    made, source = made_for_cuda
    assert {"libtvm_runtime_cuda.so", "libcudart.so.13"} <= {path.name for path in made.folder.iterdir()}
    assert made.bytes_without_weights < LIMIT
    assert "needs NVIDIA's driver for CUDA 13.0 or later" in (made.folder / "README.txt").read_text()
    np.save(tmp_path / "x.npy", np.arange(256, dtype=np.float32))
    environment = fake_gpu.environment(kernels=[source], compute_capability=(8, 6))
    result = execute(
        made.folder / "runner", "--repeat", 2, "--output", tmp_path, made.folder / "model.so", tmp_path / "x.npy",
        **environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[:2] == ["device cuda, compute capability 8.6", "y: float32 [256]"]
    x = np.arange(256, dtype=np.float32)
    np.testing.assert_array_equal(np.load(tmp_path / "output_0.npy"), x * (3 + np.arange(256) % 5) + np.arange(256))


def test_the_runner_without_a_gpu(made_for_cuda: tuple[Package, str]) -> None:
    folder = made_for_cuda[0].folder
    result = execute(folder / "runner", folder / "model.so", **fake_gpu.environment(count=0))
    assert result.stderr == ("error: device cuda: no such GPU, or the driver is too old for CUDA 13; see nvidia-smi\n")


def test_what_is_in_the_way(built: Path, made: Package, tmp_path: Path) -> None:
    other, file = tmp_path / "other", tmp_path / "file"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    file.write_text("mine")
    for force in (False, True):
        with pytest.raises(OutputError, match=r"other: holds files that are no package of ours; name another folder"):
            package(built / "inside.so", other, force)
        with pytest.raises(OutputError, match=r"file: is a file; expected a folder to make"):
            package(built / "inside.so", file, force)
    with pytest.raises(OutputError, match=r"made: is a package already; give --force to replace it"):
        package(built / "inside.so", made.folder)
    with pytest.raises(OutputError, match=r"absent/made: cannot be written \(No such file or directory\)"):
        package(built / "inside.so", tmp_path / "absent" / "made")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "other", "thesis.txt"]


def without_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(folder))


def test_force_replaces_a_package_and_leaves_nothing_else(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_compiler(monkeypatch, tmp_path / "bin")
    folder = tmp_path / "packages" / "one"
    folder.mkdir(parents=True)
    package(built / "beside.so", folder)
    package(built / "inside.so", folder, force=True)
    assert [path.name for path in folder.parent.iterdir()] == ["one"]
    assert {path.name for path in folder.glob("*side*")} == {"inside.so"}


def test_without_a_compiler(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiler(monkeypatch, tmp_path / "bin")
    made = package(built / "inside.so", tmp_path / "made")
    assert not made.runner
    assert not (made.folder / "runner").exists()
    assert "There was no C++ compiler to build it here" in (made.folder / "README.txt").read_text()
    assert made.command.startswith("g++ -std=c++17 ")
    assert made.bytes_without_weights == made.bytes - small_model.TABLE.nbytes


def test_a_compiler_that_fails_leaves_nothing(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cxx").write_text("#!/bin/sh\necho 'runner.cpp:1: error: too tired' >&2\nexit 1\n")
    (tmp_path / "cxx").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "cxx"))
    with pytest.raises(HostError, match=r"cxx: could not build the runner \(runner.cpp:1: error: too tired\)"):
        package(built / "inside.so", tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["cxx"]
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(HostError, match="CXX: names 'no-such-compiler', which is not on the PATH"):
        package(built / "inside.so", tmp_path / "made")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda folder: (folder / "beside.so").write_bytes(b"text" * 99), ArtifactError, "is not an ELF library"),
        (lambda folder: (folder / "beside.safetensors").unlink(), ArtifactError, "beside.safetensors: no such file"),
        (
            lambda folder: reseal(
                folder / "beside.so", len, lambda elf: elf.__setitem__(18, {62: 183, 183: 62}[elf[18]])
            ),
            HostError,
            "the runtime libraries here are for .*; package it on a host of ",
        ),
    ],
    ids=["no artifact", "no weights", "architecture"],
)
def test_artifacts_that_cannot_be_packaged(
    spoil: Callable[[Path], object], error: type[Exception], message: str, built: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "copies"))
    spoil(folder)
    with pytest.raises(error, match=message):
        package(folder / "beside.so", tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_an_index_of_another_kind_is_not_ours(built: Path, tmp_path: Path) -> None:
    for content in ("[]", "{}", "{", json.dumps({"format": "npm"})):
        (tmp_path / "package.json").write_text(content)
        with pytest.raises(OutputError, match="no package of ours"):
            package(built / "inside.so", tmp_path, force=True)


def test_an_interrupt_between_the_two_renames_loses_nothing(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_compiler(monkeypatch, tmp_path / "bin")
    folder = tmp_path / "packages" / "one"
    folder.parent.mkdir()
    package(built / "beside.so", folder)
    rename = os.rename

    def interrupted(source: Path, destination: Path) -> None:
        if destination == folder and not str(source).endswith(".old"):
            raise KeyboardInterrupt
        rename(source, destination)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        package(built / "inside.so", folder, force=True)
    assert [path.name for path in folder.parent.iterdir()] == ["one"]
    assert (folder / "beside.so").exists()
