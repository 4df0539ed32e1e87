"""``tvm-ternary run``, and what it does with bad inputs and bad libraries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from tvm_ternary.cli.run import _fill_cache
from tvm_ternary.errors import OptionError
from tvm_ternary.runtime.cache_feed import CacheFeed
from tvm_ternary.runtime.inputs import check_inputs
from tvm_ternary.runtime.manifest import CacheInfo, TensorSpec
from tvm_ternary.runtime.model_cache import ModelCache
from tvm_ternary.runtime.module import Module, load
from tvm_ternary.runtime.sample import random_inputs

from ..runtime.conftest import reseal
from .conftest import cli, error_line


def test_prints_every_output(library: Path) -> None:
    result = cli("run", library, "--dim", "batch=3")
    assert (result.returncode, result.stderr) == (0, "")
    heading, _, row = result.stdout.splitlines()
    assert heading.split() == ["output", "dtype", "shape", "min", "mean", "max", "finite"]
    module = load(library)
    (y,) = module.run(None, random_inputs(module.inputs, {"batch": 3}))
    numbers = [f"{value:.6g}" for value in (y.min(), y.mean(dtype=np.float64), y.max())]
    assert row.split() == ["y", "float32", "[3,", "7]", *numbers, "yes"]


def test_given_input_and_written_output(library: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((2, 10)).astype(np.float32)
    np.save(tmp_path / "x=1.npy", x)
    result = cli(
        "run", library, "--input", f"x={tmp_path / 'x=1.npy'}", "--output", tmp_path / "deep" / "out", "--json"
    )
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["inputs"] == [{"name": "x", "dtype": "float32", "shape": [2, 10]}]
    assert document["files"] == [str(tmp_path / "deep" / "out" / "y.npy")]
    assert document["seconds"] is None
    assert document["device"] == "cpu"
    np.testing.assert_array_equal(np.load(document["files"][0]), load(library).run(None, {"x": x})[0])


def test_repeat_prints_median_and_percentiles(library: Path) -> None:
    result = cli("run", library, "--repeat", "5", "--threads", "1")
    heading, _, row = result.stdout.splitlines()[-3:]
    assert heading.split() == ["runs", "threads", "median", "ms", "p20", "ms", "p80", "ms"]
    runs, threads, median, p20, p80 = row.split()
    assert (runs, threads) == ("5", "1")
    assert 0 < float(p20) <= float(median) <= float(p80)
    seconds = json.loads(cli("run", library, "--repeat", "2", "--json").stdout)["seconds"]
    assert len(seconds["runs"]) == 2
    assert seconds["p20"] <= seconds["median"] <= seconds["p80"]


def test_random_inputs_fit_the_given_one(paired: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "left.npy", np.ones((2, 5), np.float32))
    result = cli("run", paired, "--input", f"left={tmp_path / 'left.npy'}", "--output", tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert [item["shape"] for item in document["inputs"]] == [[2, 5], [2, 5]]
    # Names lead out of no folder, and two that differ in case only get two files.
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["A_.._b_c_.npy", "a_.._b_c.npy"]
    finite, infinite = document["outputs"]
    assert (finite["finite"], finite["size"]) == (10, 10)
    assert (infinite["finite"], infinite["minimum"], infinite["maximum"]) == (0, None, None)
    assert "no: 10 of 10 are not" in cli("run", paired, "--dim", "batch=2", "--dim", "length=5").stdout


def test_seed_chooses_the_inputs(library: Path) -> None:
    outputs = [cli("run", library, "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert outputs[0] == outputs[1] != outputs[2]


def _saved(folder: Path, array: object, **options: bool) -> str:
    np.save(folder / "x.npy", array, **options)  # type: ignore[arg-type]
    return f"x={folder / 'x.npy'}"


def _archive(folder: Path) -> str:
    np.savez(folder / "x.npz", x=np.ones(3))
    return f"x={folder / 'x.npz'}"


def _short(folder: Path) -> str:
    np.save(folder / "x.npy", np.ones((4, 10), np.float32))
    (folder / "x.npy").write_bytes((folder / "x.npy").read_bytes()[:-7])
    return f"x={folder / 'x.npy'}"


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (lambda folder: _saved(folder, np.ones((1, 10))), ["'x'", "float64", "expected float32"]),
        (lambda folder: _saved(folder, np.ones((1, 9), np.float32)), ["'x'", "[1, 9]", "[batch, 10]"]),
        (lambda folder: _saved(folder, np.ones(10, np.float32)), ["'x'", "[10]", "[batch, 10]"]),
        (lambda folder: f"z={_saved(folder, np.ones(3))[2:]}", ["'z'", "no such input", "'x'"]),
        (lambda folder: f"x={folder / 'no.npy'}", ["'x'", "no.npy", "no such file"]),
        (lambda folder: f"x={folder}", ["'x'", "cannot be read"]),
        (lambda folder: _saved(folder, [{}], allow_pickle=True), ["'x'", "not a whole .npy file of numbers"]),
        (_short, ["'x'", "not a whole .npy file"]),
        (_archive, ["'x'", "x.npz", "archive"]),
        (lambda folder: "x", ["--input", "'x'", "NAME=VALUE"]),
    ],
    ids=["dtype", "shape", "rank", "name", "missing", "folder", "pickle", "short", "archive", "no pair"],
)
def test_bad_input(library: Path, tmp_path: Path, given: Callable[[Path], str], parts: list[str]) -> None:
    line = error_line(cli("run", library, "--input", given(tmp_path)))
    assert [part for part in parts if part not in line] == []


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--dim", "depth=3"], ["'depth'", "no such dimension", "batch"]),
        (["--dim", "batch=-3"], ["batch is '-3'", "whole number"]),
        (["--dim", "batch=99999999999999999999"], ["batch is", "from 0 to 2147483647"]),
        (["--dim", "batch=2147483647"], ["not enough memory"]),
        (["--threads", "0"], ["threads", "is 0", "from 1"]),
        (["--threads", "many"], ["--threads", "'many'"]),
        (["--device", "gpu"], ["device 'gpu'", "expected cpu, cuda or cuda:N"]),
        (["--device", "cuda:1"], ["which runs on cpu, not on cuda:1", "leave the device out"]),
        (["--repeat", "0"], ["repeat", "is 0", "at least 1"]),
        (["--seed", "-1"], ["--seed", "is -1"]),
        (["--output", "/dev/null/out"], ["/dev/null/out", "folder"]),
    ],
    ids=" ".join,
)
def test_bad_option(library: Path, options: list[str], parts: list[str]) -> None:
    line = error_line(cli("run", library, *options))
    assert [part for part in parts if part not in line] == []


def test_dimension_that_contradicts_an_input(library: Path, tmp_path: Path) -> None:
    given = _saved(tmp_path, np.ones((2, 10), np.float32))
    line = error_line(cli("run", library, "--input", given, "--dim", "batch=3"))
    assert "input 'x': has batch=2; --dim says batch=3" in line


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def _alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "truncated"),
        (lambda path: path.write_bytes(b""), "0 bytes"),
        (_alter, "altered"),
        (_append, "appended"),
        (Path.unlink, "no such file"),
        (lambda path: path.write_text("Dear library, " * 10), "not an ELF library"),
        (lambda path: reseal(path, lambda m: m.update(version=99)), "version 99"),
        (lambda path: reseal(path, lambda m: m["target"].update(features=["3dnow_next"])), "this CPU lacks 3dnow_next"),
    ],
    ids=["end cut", "middle cut", "empty", "bit", "appended", "missing", "text", "version", "CPU"],
)
def test_bad_library(library: Path, tmp_path: Path, spoil: Callable[[Path], object], part: str) -> None:
    path = Path(shutil.copy(library, tmp_path / "bad.so"))
    spoil(path)
    line = error_line(cli("run", path))
    assert str(path) in line
    assert part in line


def test_profile_and_trace(library: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    result = cli("run", library, "--dim", "batch=3", "--trace", trace, "--threads", "1", "--repeat", "2")
    assert (result.returncode, result.stderr) == (0, "")
    _, _, operators, layers = result.stdout.split("\n\n")
    assert operators.split()[:4] == ["operator", "kernel", "calls", "ms"]
    assert [line.split()[0] for line in layers.splitlines()[2:]] == ["layers.0.weight", "layers.1.weight"]
    assert all(line.endswith("%") for line in layers.splitlines()[2:]), "a share of the roofline"
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert any(name.startswith("ternary_matmul") for name in names)
    document = json.loads(cli("run", library, "--profile", "--json", env={"CC": "/nowhere/cc"}).stdout)["profile"]
    assert document["runs"] == 20
    assert all(call["floor"] is None for call in document["calls"]), "no C compiler, no roofline"
    assert {call["layer"] for call in document["calls"]} == {None, "layers.0.weight", "layers.1.weight"}


@dataclass
class Remembers:
    """What a module does to its cache, for inputs of any shapes; nothing is computed."""

    length: int | str
    shapes: tuple[tuple[int | str, ...], ...]

    def __post_init__(self) -> None:
        info = CacheInfo("past", "value", 1, "past", self.length, 2, 8, 8, "full", 1, 1, None, False)
        self.inputs = [TensorSpec(f"x{n}", "int64", shape) for n, shape in enumerate(self.shapes)]
        self.manifest = SimpleNamespace(caches=[info], bounds={})
        self.cache = ModelCache([info], 100)
        self.feed = CacheFeed(self.cache, info, self.inputs)

    @property
    def known_dims(self) -> dict[str, int]:
        return {"past": self.cache.length}

    def run(self, _: object, inputs: Mapping[str, np.ndarray]) -> None:
        known = {"past": (self.cache.length, "cache")}
        arrays: list[Any] = check_inputs(self.inputs, inputs, {}, known)
        self.feed.arguments(arrays, lambda array: array, tuple)
        self.feed.advance(arrays)


@pytest.mark.parametrize(
    ("length", "shapes", "past"),
    [
        ("new", ((1, "new"), (1, "past + new")), 9),
        ("pairs * 2", ((1, "pairs"), (1, "past + pairs * 2")), 8),
        ("pairs * 2", ((1, "pairs * 2"), (1, "pairs * 4")), 8),
        ("pairs * 2 - 1", ((1, "pairs"),), 9),
        ("new + 1", ((1, "new + 1"),), 9),
        (3, ((1, 3), (1, "past + 3")), 9),
    ],
)
def test_past_is_as_many_tokens_as_it_says(length: int | str, shapes: Any, past: int) -> None:
    module = Remembers(length, shapes)
    # Of the inputs that are run behind them something else may have been given.
    given = {dim: 30 for shape in shapes for dim in shape if isinstance(dim, str)}
    _fill_cache(cast(Module, module), past, given, 0)
    assert module.cache.length == past


@pytest.mark.parametrize(
    ("length", "shapes", "problem"),
    [
        ("pairs * 2", ((1, "pairs"),), r"--past: is 9; a run appends pairs \* 2 tokens, which are never so many"),
        (2, ((1, 2),), "--past: is 9; a run appends 2 tokens; give a multiple of 2"),
        ("a + b", ((1, "a", "b"),), r"--past: does not say how many of a \+ b tokens are of which dimension"),
    ],
)
def test_past_that_runs_cannot_append(length: int | str, shapes: Any, problem: str) -> None:
    module = Remembers(length, shapes)
    with pytest.raises(OptionError, match=problem):
        _fill_cache(cast(Module, module), 9, {}, 0)
    assert module.cache.length == 0
