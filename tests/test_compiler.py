"""The main job: what a compiled model computes, says about itself, and refuses."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import tvm_ternary
from tests.models import FLOAT, GraphBuilder, gpt2, llama, mlp
from tests.reference import relative_error, run_onnxruntime
from tests.ternary_matmul import NATIVE, TARGETS, unrunnable
from tvm_ternary.build import weights as places
from tvm_ternary.compiler import DEFAULT_SCHEME, Artifact, compile
from tvm_ternary.errors import ModelError, OptionError, OutputError, TernaryError
from tvm_ternary.quantize.tables import quantize_rows
from tvm_ternary.runtime.artifact import read_artifact
from tvm_ternary.runtime.module import load
from tvm_ternary.target import resolve

FEATURES = (64, 96, 32)
STAGES = ["import", "quantize", "lower", "build", "link"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two matrices, (96, 64) and (32, 96)."""
    path = tmp_path_factory.mktemp("model") / "mlp.onnx"
    onnx.save(mlp(FEATURES), path)
    return path


@pytest.fixture(scope="module")
def artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The same, compiled with its first matrix ternary."""
    folder = tmp_path_factory.mktemp("artifact")
    return compile(model, folder / "mlp.so", scheme="t2a8g32", layers=r"layers\.0")


def rows(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """An input of the model."""
    return {"x": np.random.default_rng(seed).standard_normal((count, FEATURES[0])).astype(np.float32)}


def save_with(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> onnx.ModelProto:
    """The model with another first matrix."""
    proto = mlp(FEATURES)
    tensor = proto.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), tensor.name))
    onnx.save(proto, path)
    return proto


class TestManifest:
    """What an artifact says."""

    def test_model_inputs_and_outputs(self, model: Path, artifact: Artifact) -> None:
        manifest = artifact.manifest
        assert manifest == read_artifact(artifact.path).manifest
        assert manifest.model.name == "mlp"
        assert manifest.model.file == "mlp.onnx"
        assert manifest.model.sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
        assert [str(spec) for spec in manifest.inputs] == ["x: float32[batch, 64]"]
        assert [str(spec) for spec in manifest.outputs] == ["y: float32[batch, 32]"]
        assert str(model.parent) not in manifest.to_json()

    def test_layers(self, artifact: Artifact) -> None:
        ternary, dense = artifact.manifest.layers
        assert artifact.manifest.scheme == "t2a8g32"
        assert (ternary.name, ternary.shape, ternary.became) == ("layers.0.weight", (96, 64), "ternary")
        assert (ternary.scheme, ternary.kernel, ternary.layout) == ("t2a8g32", "matmul_a8", "codes")
        # Two planes of two bits; a scale of 32 bits and two factors of 8 for 32 weights.
        assert ternary.bits_per_weight == 2 * 2 + (32 + 2 * 8) / 32
        assert ternary.schedule == f"rule:{resolve('native').tier}/matmul_a8.toml"
        assert ternary.error is not None
        assert 0.05 < ternary.error < 0.4
        assert ternary.reason is None
        assert (dense.name, dense.shape, dense.became) == ("layers.1.weight", (32, 96), "float32")
        assert (dense.scheme, dense.kernel, dense.layout, dense.error) == (None, None, None, None)
        assert dense.bits_per_weight == 32
        assert dense.reason == "not chosen by layers"

    def test_functions_target_and_versions(self, artifact: Artifact) -> None:
        manifest = artifact.manifest
        ours = {function.kernel for function in manifest.functions} - {None}
        assert ours == {"rows_a8", "matmul_a8"}
        assert all(":" in function.schedule for function in manifest.functions)
        native = resolve("native")
        assert manifest.target.name == native.name
        assert manifest.target.tvm == native.tvm
        assert manifest.target.features == tuple(sorted(native.features))
        assert manifest.versions == {name: version(name) for name in ("tvm-ternary", "apache-tvm", "apache-tvm-ffi")}

    def test_sizes(self, artifact: Artifact) -> None:
        biases = 4 * (96 + 32)
        before = 4 * (96 * 64 + 32 * 96) + biases
        # For each group of 32: two planes of two bits, a scale of four bytes, and a factor of one byte for each plane.
        after = 96 * 64 // 32 * (2 * 2 * 32 // 8 + 4 + 2) + 4 * 32 * 96
        assert artifact.manifest.sizes.weights_before == before
        assert artifact.manifest.sizes.weights_after == after + biases
        assert artifact.manifest.weights.bytes == after
        assert artifact.manifest.weights.file is None

    @pytest.mark.parametrize(
        ("embeddings", "became", "bits", "reason"),
        [("int8", "int8", 8 + 32 / 32, None), ("float", "float32", 32, "a float table, read by rows")],
    )
    def test_tables_that_are_read_by_rows_are_listed(
        self, tmp_path: Path, embeddings: str, became: str, bits: float, reason: str | None
    ) -> None:
        path = tmp_path / "gpt2.onnx"
        onnx.save(gpt2(layers=0), path)
        options: dict[str, Any] = {"scheme": "t1a32", "dims": {"batch": 1}}
        manifest = compile(path, tmp_path / "gpt2.so", embeddings=embeddings, **options).manifest
        layers = {layer.name: layer for layer in manifest.layers}
        table = layers["transformer.wpe.weight"]
        assert (table.shape, table.became, table.bits_per_weight, table.reason) == ((24, 32), became, bits, reason)
        assert table.error is None if reason else 0 < (table.error or 0) < 0.01
        # The output layer is tied to the other table, and is a matrix of its own.
        assert [layer.became for layer in manifest.layers if layer.name == "transformer.wte.weight"] == [
            "ternary",
            became,
        ]

    def test_bounds_are_listed(self, tmp_path: Path) -> None:
        g = GraphBuilder("bounded")
        x = g.input("x", FLOAT, ["length"])
        slope = g.node("Slice", g.weight("slope", 24), g.constant([0]), g.dim(x, 0), g.constant([0]))
        g.node("Mul", x, slope, output="y")
        g.output("y", FLOAT, ["length"])
        onnx.save(g.model(), tmp_path / "bounded.onnx")
        assert compile(tmp_path / "bounded.onnx", tmp_path / "out.so").manifest.bounds == {"length": 24}

    def test_progress_counts_every_stage_and_every_matrix(self, model: Path, tmp_path: Path) -> None:
        seen: list[tuple[str, int, int]] = []
        artifact = compile(model, tmp_path / "out.so", dims={"batch": 1}, progress=lambda *step: seen.append(step))
        steps = {stage: 2 if stage == "quantize" else 1 for stage in STAGES}
        assert seen == [(stage, done, count) for stage, count in steps.items() for done in range(count + 1)]
        assert list(artifact.seconds) == STAGES
        assert all(seconds > 0 for seconds in artifact.seconds.values())
        assert artifact.path == tmp_path / "out.so"
        assert artifact.manifest.scheme == DEFAULT_SCHEME


class TestWeights:
    """Where weights lie, and matrices that are special."""

    @pytest.mark.parametrize("scheme", ["t2a32", "t3a8g32", "t1a1"])
    def test_beside_gives_what_inside_gives(self, model: Path, tmp_path: Path, scheme: str) -> None:
        options: dict[str, Any] = {"layers": f"layers.0={scheme}", "dims": {"batch": 5}}
        inside = compile(model, tmp_path / "inside.so", weights="inside", **options)
        beside = compile(model, tmp_path / "beside.so", weights="beside", **options)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["beside.safetensors", "beside.so", "inside.so"]
        assert beside.manifest.weights.file == "beside.safetensors"
        layout = "bits" if scheme.endswith("a1") else "codes"
        parts = (layout, "factor", "scale") if scheme == "t3a8g32" else (layout, "scale")
        assert beside.manifest.weights.names == ("layers.1.weight", *(f"layers.0.weight.{part}" for part in parts))
        assert inside.manifest.weights.file is None
        results = [load(artifact.path).run(None, rows(5))[0] for artifact in (inside, beside)]
        np.testing.assert_array_equal(*results)

    @pytest.mark.parametrize("layers", ["all", []], ids=["ternary", "float"])
    def test_large_weights_go_beside_by_themselves(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: str | list[str]
    ) -> None:
        options: dict[str, Any] = {"layers": layers, "dims": {"batch": 1}}
        size = compile(model, tmp_path / "first.so", **options).manifest.weights.bytes
        for limit, file in ((size, None), (size - 1, "out.safetensors")):
            monkeypatch.setattr(places, "BESIDE_BYTES", limit)
            assert compile(model, tmp_path / "out.so", **options).manifest.weights.file == file

    def test_a_matrix_that_is_ternary_already_comes_through_unchanged(self, tmp_path: Path) -> None:
        """It has one plane whatever was asked for, and its scales come back to the bit."""

        def ternary(weight: np.ndarray) -> np.ndarray:
            rng = np.random.default_rng(0)
            scale = (rng.random((len(weight), 1)) + 0.5).astype(np.float32)
            return scale * rng.integers(-1, 2, weight.shape).astype(np.float32)

        proto = save_with(tmp_path / "model.onnx", ternary)
        artifact = compile(tmp_path / "model.onnx", tmp_path / "out.so", scheme="t3a32", layers="layers.0")
        (layer, _) = artifact.manifest.layers
        assert layer.scheme == "t1a32"
        assert layer.error == 0
        feeds = rows(7)
        (got,), (want,) = load(artifact.path).run(None, feeds), run_onnxruntime(proto, feeds)
        assert relative_error(got, want) <= 1e-6

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_a_value_that_is_no_number_is_named_with_its_matrix(self, tmp_path: Path, value: float) -> None:
        def spoil(weight: np.ndarray) -> np.ndarray:
            weight[3, 5] = value
            return weight

        save_with(tmp_path / "model.onnx", spoil)
        with pytest.raises(ModelError) as caught:
            compile(tmp_path / "model.onnx", tmp_path / "out.so")
        assert str(caught.value).startswith(f"layers.0.weight: value {value} at [3, 5], expected finite")
        assert not (tmp_path / "out.so").exists()

    def test_a_matrix_of_zeros_gives_its_bias(self, tmp_path: Path) -> None:
        proto = save_with(tmp_path / "model.onnx", np.zeros_like)
        artifact = compile(tmp_path / "model.onnx", tmp_path / "out.so", scheme="t2a8", layers="layers.0")
        (got,), (want,) = load(artifact.path).run(None, rows(3)), run_onnxruntime(proto, rows(3))
        assert relative_error(got, want) <= 1e-6


class TestOptions:
    """What can be asked for."""

    def test_every_target_that_runs_here_gives_the_same(self, model: Path, tmp_path: Path) -> None:
        results = {}
        for target in (name for name in TARGETS if unrunnable(resolve(name)) is None):
            artifact = compile(model, tmp_path / "out.so", target=target, scheme="t2a32g16", dims={"batch": 6})
            assert artifact.manifest.target.name == resolve(target).name
            (results[target],) = load(artifact.path).run(None, rows(6))
        for target, got in results.items():
            assert relative_error(got, results[NATIVE.name]) <= 1e-6, target

    def test_int8_embeddings_are_those_of_a_model_with_rounded_tables(self, tmp_path: Path) -> None:
        proto = llama(layers=1)
        onnx.save(proto, tmp_path / "model.onnx")
        (table,) = (t for t in proto.graph.initializer if "embed_tokens" in t.name)
        codes, scale = quantize_rows(numpy_helper.to_array(table))
        table.CopyFrom(numpy_helper.from_array(codes * scale, table.name))
        onnx.save(proto, tmp_path / "rounded.onnx")
        ids = np.array([[0, 49, 7], [-1, 50, 3]])
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        common: dict[str, Any] = {"scheme": "t2a32", "layers": "lm_head", "dims": {"batch": 2, "length": 3}}
        cases = (
            ("rounded", {"embeddings": "float"}),
            ("model", {"weights": "inside"}),
            ("model", {"weights": "beside"}),
        )
        want, *found = (
            load(compile(tmp_path / f"{name}.onnx", tmp_path / "out.so", **common, **options).path).run(None, feeds)
            for name, options in cases
        )
        # A word that does not exist is no number, with either table.
        assert np.isnan(want[0][1, 1:]).all()
        for got in found:
            np.testing.assert_array_equal(got, want)

    def test_fixed_dimensions_are_numbers(self, model: Path, tmp_path: Path) -> None:
        artifact = compile(model, tmp_path / "out.so", dims={"batch": 3}, scheme="t1a8")
        assert artifact.manifest.inputs[0].shape == (3, 64)
        assert load(artifact.path).run(None, rows(3))[0].shape == (3, 32)

    def test_dense_packing_is_named_counted_and_gives_the_same(self, model: Path, tmp_path: Path) -> None:
        dense, fast = (
            compile(model, tmp_path / f"{packing}.so", scheme="t1a8", packing=packing, dims={"batch": 6})
            for packing in ("dense", "fast")
        )
        for layer, other in zip(dense.manifest.layers, fast.manifest.layers, strict=True):
            assert (layer.kernel, layer.layout) == ("matmul_a8_dense", "dense")
            assert (other.kernel, other.layout) == ("matmul_a8", "codes")
            n, k = layer.shape
            # A block is 20 k's; a scale of 32 bits a row.
            assert layer.bits_per_weight == (32 * -(-k // 20) + 32) / k
            assert n % 16 == 0
        (got,), (want,) = (load(built.path).run(None, rows(6)) for built in (dense, fast))
        assert relative_error(got, want) <= 1e-6

    def test_schemes_for_some_layers_and_methods(self, model: Path, tmp_path: Path) -> None:
        options: dict[str, Any] = {"layers": {"layers.0": "t1a1", "layers.1": "t3a32g16"}, "dims": {"batch": 1}}
        layers = compile(model, tmp_path / "out.so", method="absmean", **options).manifest.layers
        assert [layer.scheme for layer in layers] == ["t1a1", "t3a32g16"]
        other = compile(model, tmp_path / "other.so", method="twn", **options).manifest.layers
        assert layers[0].error != other[0].error

    def test_no_layer_at_all_is_the_float_model(self, model: Path, tmp_path: Path) -> None:
        artifact = compile(model, tmp_path / "out.so", layers=[])
        assert {layer.became for layer in artifact.manifest.layers} == {"float32"}
        (got,) = load(artifact.path).run(None, rows(4))
        assert relative_error(got, run_onnxruntime(onnx.load(model), rows(4))[0]) <= 1e-6

    def test_every_phase_can_be_dumped(self, model: Path, tmp_path: Path) -> None:
        compile(model, tmp_path / "out.so", dims={"batch": 1}, dump_ir=tmp_path / "ir")
        names = [path.name for path in sorted((tmp_path / "ir").iterdir())]
        phases = ("import", "ternarize", "bind", "fuse", "schedule")
        assert names == [f"{number:02d}-{phase}.py" for number, phase in enumerate(phases, 1)]
        assert "R.matmul" in (tmp_path / "ir" / "01-import.py").read_text()
        assert "R.matmul" not in (tmp_path / "ir" / "02-ternarize.py").read_text()
        assert "ternary_matmul_a8" in (tmp_path / "ir" / "05-schedule.py").read_text()

    def test_it_is_the_public_function(self) -> None:
        assert tvm_ternary.compile is compile

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"target": "z80"}, "target z80: no such target"),
            ({"target": "cuda-sm_91"}, "target cuda-sm_91: no such architecture: sm_91"),
            ({"target": {"kind": "rocm"}}, "target: kind is 'rocm'; expected 'llvm' or 'cuda'"),
            ({"scheme": "t9a8"}, "scheme 't9a8': unknown"),
            ({"layers": "conv"}, "layers 'conv': matches no matrix of the model; matrices are: layers.0.weight, "),
            ({"layers": "("}, "layers '(': is no regular expression"),
            ({"layers": {"all": "int4"}}, "scheme 'int4': unknown"),
            ({"method": "gptq"}, "method 'gptq': unknown, expected one of "),
            ({"packing": "tight"}, "packing 'tight': does not exist; expected one of fast, dense"),
            ({"packing": "dense", "scheme": "t1a32"}, "packing 'dense': does not exist for a32 schemes; expected a8"),
            ({"embeddings": "int4"}, "embeddings: got 'int4'; expected one of int8, float"),
            ({"weights": "outside"}, "weights 'outside': no such place; expected one of auto, inside, beside"),
            ({"dims": {"length": 4}}, "dimension length: the model has no such symbolic dimension; it has batch"),
            ({"constants": {"sr": 16000}}, "constant sr: the model has no such input; it has x"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_what_does_not_exist_is_named(
        self, model: Path, tmp_path: Path, options: dict[str, Any], text: str
    ) -> None:
        (tmp_path / "out.so").write_text("as it was")
        with pytest.raises(OptionError) as caught:
            compile(model, tmp_path / "out.so", **options)
        assert str(caught.value).startswith(text)
        assert [path.name for path in tmp_path.iterdir()] == ["out.so"]
        assert (tmp_path / "out.so").read_text() == "as it was"

    def test_the_model_is_never_overwritten(self, model: Path) -> None:
        before = model.read_bytes()
        with pytest.raises(OutputError, match="is the model itself"):
            compile(model, model)
        assert model.read_bytes() == before

    def test_a_failure_leaves_the_old_artifact(self, tmp_path: Path) -> None:
        g = GraphBuilder("nothing to multiply")
        g.node("StringNormalizer", g.input("x", onnx.TensorProto.STRING, ["n"]), output="y")
        g.output("y", onnx.TensorProto.STRING, ["n"])
        (tmp_path / "out.so").write_text("as it was")
        onnx.save(g.model(), tmp_path / "model.onnx")
        with pytest.raises(TernaryError):
            compile(tmp_path / "model.onnx", tmp_path / "out.so")
        assert (tmp_path / "out.so").read_text() == "as it was"

    def test_a_model_without_a_matrix_compiles(self, tmp_path: Path) -> None:
        g = GraphBuilder("plain")
        g.node("Relu", g.input("x", FLOAT, ["n"]), output="y")
        g.output("y", FLOAT, ["n"])
        onnx.save(g.model(), tmp_path / "plain.onnx")
        artifact = compile(tmp_path / "plain.onnx", tmp_path / "out.so")
        assert artifact.manifest.layers == ()
        (y,) = load(artifact.path).run(None, {"x": np.array([-1, 2], np.float32)})
        np.testing.assert_array_equal(y, [0, 2])


PROGRAM = """
import sys, tvm_ternary
for number in (1, 5):
    model, output, scheme, weights = sys.argv[number : number + 4]
    tvm_ternary.compile(model, output, scheme=scheme, weights=weights)
"""


def flattened() -> onnx.ModelProto:
    """Tokens of all sequences as rows of one product: how many there are is computed from two dimensions."""
    g = GraphBuilder("flattened")
    x = g.input("x", FLOAT, ["batch", "length", 64])
    batch, length = g.dim(x, 0), g.dim(x, 1)
    rows = g.linear(g.node("Reshape", x, g.constant([-1, 64])), "fc", 64, 32)
    shape = g.node("Concat", batch, length, g.constant([32]), axis=0)
    g.node("Softmax", g.node("Reshape", rows, shape), axis=-1, output="y")
    g.output("y", FLOAT, ["batch", "length", 32])
    return g.model()


def test_two_processes_in_two_folders_give_the_same_bytes(tmp_path: Path) -> None:
    """Named by other paths, and with other hashes of strings. The first graph computes shapes when it runs."""
    written = []
    for number, folder in enumerate((tmp_path / "first", tmp_path / "second" / "below")):
        folder.mkdir(parents=True)
        onnx.save(flattened(), folder / "flattened.onnx")
        onnx.save(mlp(FEATURES), folder / "mlp.onnx")
        prefix = "" if number else f"{folder}/"
        inside = [f"{prefix}flattened.onnx", f"{prefix}inside.so", "t2a8g16", "inside"]
        beside = [f"{prefix}mlp.onnx", f"{prefix}beside.so", "t1a32", "beside"]
        environment = {**os.environ, "PYTHONHASHSEED": str(number)}
        environment["PYTHONPATH"] = str(Path(tvm_ternary.__file__).parents[1])
        command = [sys.executable, "-c", PROGRAM, *inside, *beside]
        subprocess.run(command, cwd=folder if number else tmp_path, env=environment, check=True, timeout=120)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    first, second = written
    assert first.keys() == second.keys()
    assert sorted(first) == ["beside.safetensors", "beside.so", "flattened.onnx", "inside.so", "mlp.onnx"]
    for name, content in first.items():
        assert content == second[name], f"{name} differs"


def test_large_outputs_may_be_written_to(tmp_path: Path) -> None:
    """They are not copied; still none shares memory with an input, a weight or another."""
    g = GraphBuilder()
    x = g.input("x", FLOAT, ["m", 256])
    weight = g.weight("table", 256, 256)
    y = g.node("Relu", x, output="y")
    g.node("Reshape", y, g.constant([256, -1]), output="again")
    g.node("Identity", x, output="same")
    g.node("Identity", weight, output="table_out")
    g.node("Add", g.node("Gather", weight, g.constant([0]), axis=0), x, output="sum")
    for name, shape in (("y", ["m", 256]), ("again", [256, "m"]), ("same", ["m", 256]), ("table_out", [256, 256])):
        g.output(name, FLOAT, shape)
    g.output("sum", FLOAT, ["m", 256])
    onnx.save(g.model(), tmp_path / "m.onnx")
    module = load(compile(tmp_path / "m.onnx", tmp_path / "m.so", layers=[], embeddings="float").path, threads=1)
    given = {"x": np.random.default_rng(0).standard_normal((256, 256), np.float32)}
    for _ in range(2):
        kept = given["x"].copy()
        first = module.run(None, given)
        expected = [output.copy() for output in first]
        for number, output in enumerate(first):
            output[...] = number
        for number, output in enumerate(first):
            assert (output == number).all()
        np.testing.assert_array_equal(given["x"], kept)
        for got, same in zip(module.run(None, given), expected, strict=True):
            np.testing.assert_array_equal(got, same)
        # Once more with an input that is read where it lies.
        given = {"x": module.run(["same"], given)[0]}
