"""Load, run and time artifacts: results, ownership of memory, and every refusal."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import tvm_ternary
from tvm_ternary.errors import ArtifactError, HostError, InputError, OptionError
from tvm_ternary.runtime.arrays import aligned
from tvm_ternary.runtime.module import Module, load
from tvm_ternary.runtime.sample import random_inputs

from .conftest import ROOT, reseal

TABLE = np.arange(12, dtype=np.float32).reshape(4, 3) - 5


@pytest.fixture(params=["inside.so", "beside.so"])
def module(built: Path, request: pytest.FixtureRequest) -> Module:
    return load(built / request.param, threads=1)


def inputs(batch: int, n: int, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    generator = np.random.default_rng(seed)
    return {"ids": generator.integers(-9, 9, (batch, n)), "x": generator.standard_normal((batch, 4), np.float32)}


def check(outputs: list[npt.NDArray[Any]], given: dict[str, npt.NDArray[Any]]) -> None:
    ids, x = given["ids"], given["x"]
    # Four products, summed in another order: four roundings, each at most 2**-24 of the sum of magnitudes.
    left = x + ids.sum(axis=1, keepdims=True).astype(np.float32)
    bound = 4 * 2.0**-24 * (np.abs(left) @ np.abs(TABLE)) + 1e-30
    assert (np.abs(outputs[0] - left.astype(np.float64) @ TABLE) <= bound).all()
    np.testing.assert_array_equal(outputs[1], ids)
    np.testing.assert_array_equal(outputs[2], TABLE)


@pytest.mark.parametrize(("batch", "n"), [(1, 1), (2, 3), (7, 130)])
def test_results(module: Module, batch: int, n: int) -> None:
    given = inputs(batch, n)
    check(module.run(None, given), given)


def test_the_signature(module: Module) -> None:
    assert [str(spec) for spec in module.inputs] == ["ids: int64[batch, n]", "x: float32[batch, 4]"]
    assert [spec.name for spec in module.outputs] == ["y", "same", "table"]
    assert module.manifest.model.name == "small"
    assert "ids: int64[batch, n]" in repr(module)
    assert module.threads == 1


def test_outputs_by_name(module: Module) -> None:
    given = inputs(2, 3)
    full = module.run(None, given)
    table, y = module.run(["table", "y"], given)
    np.testing.assert_array_equal(table, full[2])
    np.testing.assert_array_equal(y, full[0])
    assert module.run([], given) == []


def test_any_layout_of_inputs_will_do(module: Module) -> None:
    given = inputs(6, 8)
    ids = np.empty((8, 6), np.int64).T
    ids[...] = given["ids"]
    ids.flags.writeable = False
    # A float32 array one float beyond an aligned address, and reversed.
    x = np.empty(25, np.float32)[1:].reshape(6, 4)[::-1]
    x[...] = given["x"]
    check(module.run(None, {"ids": ids, "x": x}), given)


def test_inputs_and_weights_are_aligned_as_compiled_code_expects(built: Path) -> None:
    module = load(built / "addresses.so")
    for offset in range(16):
        x = np.zeros(19, np.float32)[offset : offset + 3]
        assert (module.run(None, {"x": x})[0] % 64).tolist() == [0, 0]


@pytest.mark.parametrize("name", ["addresses.so", "far.so"])
def test_weights_are_read_from_the_file_that_is_mapped(built: Path, name: str) -> None:
    module = load(built / name)
    place = int(module.run(None, {"x": np.zeros(3, np.float32)})[0][1])
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [(*(int(end, 16) for end in fields[0].split("-")), fields[-1]) for fields in maps]
    (file,) = (Path(file) for start, end, file in ranges if start <= place < end)
    assert file == (built / name if name == "far.so" else built / "addresses.safetensors")


def test_aligned_inputs_are_read_where_they_lie_and_outputs_are_aligned(built: Path, module: Module) -> None:
    addresses = load(built / "addresses.so")
    x = aligned(np.zeros(3, np.float32))
    assert addresses.run(None, {"x": x})[0][0] == x.ctypes.data
    x.flags.writeable = False
    assert addresses.run(None, {"x": x})[0][0] != x.ctypes.data
    given = inputs(2, 3)
    outputs = module.run(None, given)
    assert [output.ctypes.data % 64 for output in outputs] == [0, 0, 0]
    np.testing.assert_array_equal(module.run(["same"], {**given, "ids": outputs[1]})[0], outputs[1])


def test_outputs_own_their_memory(module: Module) -> None:
    given = {name: aligned(array) for name, array in inputs(2, 3).items()}
    kept = {name: array.copy() for name, array in given.items()}
    first = module.run(None, given)
    expected = [array.copy() for array in first]
    for array in first:
        array[...] = 77
    # Neither the inputs, nor a weight that is returned as it is, nor later results may have changed.
    for name in given:
        np.testing.assert_array_equal(given[name], kept[name])
    for got, same in zip(module.run(None, given), expected, strict=True):
        np.testing.assert_array_equal(got, same)


def test_outputs_outlive_the_module(built: Path) -> None:
    module = load(built / "inside.so", threads=2)
    given = inputs(64, 300)
    outputs = module.run(None, given)
    del module
    gc.collect()
    other = load(built / "inside.so")
    for seed in range(3):
        other.run(None, inputs(64, 300, seed))
    check(outputs, given)


def test_one_artifact_loaded_twice(built: Path) -> None:
    first, second = load(built / "inside.so"), load(built / "inside.so")
    given = inputs(2, 3)
    check(second.run(None, given), given)
    del second
    gc.collect()
    check(first.run(None, given), given)


def test_a_file_put_in_place_of_a_loaded_one(built: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    old = None
    for name, outputs in (("inside.so", 3), ("picky.so", 1), ("inside.so", 3)):
        shutil.copy(built / name, tmp_path / "new")
        os.replace(tmp_path / "new", path)
        new = load(path)
        given = random_inputs(new.inputs, {"n": 3})
        assert len(new.run(None, given)) == outputs
        old, _ = new, old
    assert old is not None


def test_calls_from_several_threads(module: Module) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for batch in range(1, 8):
                given = inputs(batch, seed + 1, seed)
                check(module.run(None, given), given)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_memory_stays_bounded_over_many_shapes(built: Path) -> None:
    module = load(built / "inside.so", threads=1)
    # Each new length costs at least the copy of ids and its cast: 12 bytes an element. For ever, 80 would be 250 MB.
    shapes = [(1, 200_000 + 1600 * step) for step in range(80)]
    for shape in shapes[:16]:
        module.run(["y"], inputs(*shape))
    before = resident_bytes()
    for shape in shapes[16:]:
        module.run(["y"], inputs(*shape))
    unbounded = sum(12 * n for _, n in shapes[16:])
    assert resident_bytes() - before < unbounded / 3


def test_wrong_inputs_reach_the_caller(module: Module) -> None:
    given = inputs(2, 3)
    with pytest.raises(InputError, match="input 'x': is missing"):
        module.run(None, {"ids": given["ids"]})
    with pytest.raises(InputError, match="output 'z': no such output; expected 'y', 'same', 'table'"):
        module.run(["z"], given)
    with pytest.raises(InputError, match="input 'x': has dtype float64; expected float32"):
        module.time({**given, "x": given["x"].astype(np.float64)})
    check(module.run(None, given), given)


def test_what_only_the_model_can_refuse(built: Path) -> None:
    module = load(built / "picky.so")
    good = np.ones((2, 3), np.int64)
    for _ in range(2):
        with pytest.raises(InputError, match=r"model small: refused the inputs .*; check the shapes") as caught:
            module.run(None, {"ids": good[:, :2]})
        assert "\n" not in str(caught.value)
        np.testing.assert_array_equal(module.run(None, {"ids": good})[0], 2 * good)


def test_time(module: Module) -> None:
    timing = module.time(inputs(2, 3), repeat=7, number=3)
    assert len(timing.runs) == 7
    assert 0 < min(timing.runs) <= timing.p20 <= timing.median <= timing.p80 <= max(timing.runs)
    assert timing.median == sorted(timing.runs)[3]


@pytest.mark.parametrize("option", ["repeat", "number"])
def test_time_needs_at_least_one_run(module: Module, option: str) -> None:
    with pytest.raises(OptionError, match=f"{option}: is 0; expected at least 1"):
        module.time(inputs(1, 1), **{option: 0})


def test_random_inputs_run(module: Module) -> None:
    module.run(None, random_inputs(module.inputs))


def test_devices(built: Path) -> None:
    assert load(built / "inside.so", device="cpu").device == load(built / "inside.so").device == "cpu"
    with pytest.raises(HostError, match="which runs on cpu, not on cuda:0; leave the device out"):
        load(built / "inside.so", device="cuda")
    with pytest.raises(OptionError, match="device 'gpu:0': no such device; expected cpu, cuda or cuda:N"):
        load(built / "inside.so", device="gpu:0")


def test_a_host_without_the_features(copies: Path) -> None:
    reseal(copies / "inside.so", lambda manifest: manifest["target"]["features"].extend(["avx1024", "sse9"]))
    with pytest.raises(HostError) as caught:
        load(copies / "inside.so")
    assert "this CPU lacks avx1024, sse9; compile the model with --target native on this host" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_host_of_another_architecture(copies: Path) -> None:
    def other(elf: bytearray) -> None:
        elf[18] = {62: 183, 183: 62}[elf[18]]

    reseal(copies / "inside.so", lambda manifest: None, other)
    with pytest.raises(HostError, match=r"is built for .*; this host is "):
        load(copies / "inside.so")


def test_a_library_that_the_virtual_machine_does_not_take(copies: Path) -> None:
    def without_bytecode(elf: bytearray) -> None:
        start = elf.index(b"__tvm_ffi__library_bin")
        elf[start : start + 5] = b"xxxxx"

    reseal(copies / "inside.so", lambda manifest: None, without_bytecode)
    with pytest.raises(
        ArtifactError, match=r"cannot be loaded by TVM's runtime .*; it was compiled with apache-tvm "
    ) as caught:
        load(copies / "inside.so")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "beside.safetensors: no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "beside.safetensors: has SHA-256"),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b"table", b"tabel")),
            "beside.safetensors: has SHA-256",
        ),
    ],
)
def test_weights_beside_that_are_not_the_right_ones(copies: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(copies / "beside.safetensors")
    with pytest.raises(ArtifactError, match=message):
        load(copies / "beside.so")


def test_a_relative_path_without_folder(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built)
    given = inputs(1, 2)
    check(load("beside.so").run(None, given), given)


def test_the_public_name(built: Path) -> None:
    assert tvm_ternary.load is load
    assert "load" in dir(tvm_ternary)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = tvm_ternary.lode


def test_the_import_brings_nothing_heavy() -> None:
    heavy = ("tvm", "tvm_ffi", "onnx", "numpy", "safetensors")
    code = f"import sys, tvm_ternary; print([name for name in {heavy} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
