"""The phases one after the other, on small imported models."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from tests.graph.passes.small_graphs import bindings, operators, quantized
from tests.models import FLOAT, GraphBuilder, mlp
from tests.ternary_matmul import NATIVE
from tvm_ternary.build.executable import build_executable
from tvm_ternary.errors import OutputError
from tvm_ternary.formats.transform import InputTransform
from tvm_ternary.graph.importer import ImportedModel, import_onnx
from tvm_ternary.graph.passes.ternarize import TernaryLayer
from tvm_ternary.graph.pipeline import LoweredModel, dump_to, is_static, lower
from tvm_ternary.ops import linear
from tvm_ternary.target import resolve

PHASES = ["ternarize", "bind", "fuse", "schedule"]


def lowered(model: ImportedModel, scheme: str = "t2a32", *, bind: bool = True) -> LoweredModel:
    layers = quantized(model.params, dict.fromkeys(model.params, scheme))
    return lower(model, layers, NATIVE, bind_weights=bind)


def with_softmax() -> ImportedModel:
    """Two linear layers with a softmax between, which no matmul takes along."""
    g = GraphBuilder("softmax")
    x = g.linear(g.input("x", FLOAT, ["m", 30]), "first", 30, 40)
    x = g.linear(g.node("Softmax", x, axis=-1), "second", 40, 20)
    g.output(x, FLOAT, ["m", 20])
    return import_onnx(g.model())


def run(model: LoweredModel, *operands: np.ndarray) -> list[np.ndarray]:
    machine = relax.VirtualMachine(build_executable(model.module, NATIVE.tvm), tvm.cpu())
    return [out.numpy() for out in machine["main"](*map(tvm.runtime.tensor, operands))]


def biases(model: ImportedModel) -> list[np.ndarray]:
    """The constants that are added, in order."""
    calls = (value for _, value in bindings(model.module) if isinstance(value, relax.Call))
    return [call.args[1].value.numpy() for call in calls if call.op.name == "relax.add"]


def expected(model: ImportedModel, x: np.ndarray, scheme: str) -> np.ndarray:
    """`tests.models.mlp` by hand, on the same ternary weights. Its biases are the graph's constants."""
    layers = quantized(model.params, dict.fromkeys(model.params, scheme))
    for i, (layer, bias) in enumerate(zip(layers.values(), biases(model), strict=True)):
        x = linear(layer.weight, bias, activation_bits=layer.activation_bits)(x)
        x = x if i == len(layers) - 1 else np.maximum(x, 0)
    return x


@pytest.mark.parametrize("scheme", ["t2a32", "t2a8", "t2a1"])
def test_weights_inside_or_as_arguments_give_the_same(scheme: str) -> None:
    model = import_onnx(mlp((30, 40, 20)), {"batch": 5})
    x = np.random.default_rng(0).standard_normal((5, 30)).astype(np.float32)
    inside, beside = lowered(model, scheme), lowered(model, scheme, bind=False)
    assert len(inside.module["main"].params) == 1
    names = [var.name for var in beside.module["main"].params]
    assert names == ["x", *beside.ternary.params]
    (y,) = run(inside, x)
    np.testing.assert_array_equal(y, run(beside, x, *beside.ternary.params.values())[0])
    np.testing.assert_array_equal(y, expected(model, x, scheme))


def test_every_function_is_scheduled_and_says_by_whom() -> None:
    result = lowered(with_softmax(), "t2a8")
    functions = {v.name_hint: f for v, f in result.module.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}
    assert sorted(functions) == list(result.schedules)
    assert all(function.attrs["tirx.is_scheduled"] == 1 for function in functions.values())
    ours = {name: who for name, who in result.schedules.items() if name in result.ternary.kernels}
    assert len(ours) == 4
    for name, who in ours.items():
        if name.startswith("rows"):
            assert who == "rule:activations"
        else:
            assert re.fullmatch(r"rule:[\w-]+/matmul_a8\.toml", who)
    others = result.schedules.keys() - ours.keys()
    assert others
    assert all(re.match("(rule|dlight):.", result.schedules[name]) for name in others)


def test_what_a_matmul_can_do_by_itself_is_no_function_of_its_own() -> None:
    result = lowered(import_onnx(mlp((30, 40, 20))), "t2a8")
    assert result.schedules.keys() == result.ternary.kernels.keys()
    assert sorted(operators(result.module)) == ["rows_a8", "rows_a81", "ternary_matmul_a8", "ternary_matmul_a8_relu"]


def test_nothing_but_calls_of_functions_is_left() -> None:
    names = operators(lowered(with_softmax()).module)
    assert names
    assert not [name for name in names if "." in name or name in ("matmul", "add", "reshape")]


TRANSFORMS = (InputTransform(np.linspace(0.5, 2, 30, dtype=np.float32), 8), InputTransform(None, 32))


def transformed(model: ImportedModel, scheme: str) -> dict[str, TernaryLayer]:
    """The matrices fitted for transformed inputs."""
    plain = quantized(
        {name: t.weight(w.T).T for t, (name, w) in zip(TRANSFORMS, model.params.items(), strict=True)},
        dict.fromkeys(model.params, scheme),
    )
    return {
        name: replace(layer, weight=replace(layer.weight, transform=transform))
        for transform, (name, layer) in zip(TRANSFORMS, plain.items(), strict=True)
    }


def test_inputs_are_transformed_for_weights_that_were_fitted_so() -> None:
    """40 inputs of the second matrix are a block of 32 and a tail."""
    model = import_onnx(mlp((30, 40, 20)))
    layers = transformed(model, "t2a32")
    result = lower(model, layers, NATIVE, bind_weights=True)
    assert result.schedules["hadamard_rows"] == result.schedules["hadamard_rows1"] == "rule:activations"
    x = want = np.random.default_rng(0).standard_normal((5, 30)).astype(np.float32)
    for transform, layer, bias, last in zip(TRANSFORMS, layers.values(), biases(model), (False, True), strict=True):
        want = linear(replace(layer.weight, transform=None), bias)(transform.apply(want))
        want = want if last else np.maximum(want, 0)
    (y,) = run(result, x)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_gpu_rotates_by_products_that_its_rules_know() -> None:
    model = import_onnx(mlp((30, 40, 20)))
    result = lower(model, transformed(model, "t2a8"), resolve("cuda-sm_90"), bind_weights=True)
    assert not [name for name, who in result.schedules.items() if "fallback" in who]
    assert sum(who == "rule:matmul" for who in result.schedules.values()) >= 2


def test_names_that_differ_only_in_punctuation_keep_their_own_weights() -> None:
    g = GraphBuilder("names")
    x = g.input("x", FLOAT, ["m", 32])
    for i, name in enumerate(("a.b", "a_b", "a/b")):
        weight = g.constant(np.random.default_rng(i).standard_normal((32, 32)).astype(np.float32), name)
        g.node("MatMul", x, weight, output=f"y{i}")
        g.output(f"y{i}", FLOAT, ["m", 32])
    model = import_onnx(g.model(), {"m": 3})
    rows = np.random.default_rng(9).standard_normal((3, 32)).astype(np.float32)
    layers = quantized(model.params, dict.fromkeys(model.params, "t1a32"))
    for y, layer in zip(run(lowered(model, "t1a32"), rows), layers.values(), strict=True):
        np.testing.assert_array_equal(y, linear(layer.weight)(rows))


def test_every_phase_can_be_looked_at(tmp_path: Path) -> None:
    seen: list[tuple[str, tvm.IRModule]] = []
    model = with_softmax()
    layers = quantized(model.params, dict.fromkeys(model.params, "t1a8"))
    lower(model, layers, NATIVE, bind_weights=True, dump=lambda phase, module: seen.append((phase, module)))
    assert [phase for phase, _ in seen] == PHASES
    assert "ternary_matmul_a8" in operators(seen[0][1])
    assert len(seen[0][1]["main"].params) == 1 + 2 * 2
    assert len(seen[1][1]["main"].params) == 1
    assert "nn.softmax" in operators(seen[1][1])
    assert "nn.softmax" not in operators(seen[2][1])


def test_dumps_are_numbered_files(tmp_path: Path) -> None:
    dump = dump_to(tmp_path / "new" / "folder")
    module = import_onnx(mlp()).module
    dump("import", module)
    dump("again", module)
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert [file.name for file in files] == ["01-import.py", "02-again.py"]
    assert "def main(x" in files[0].read_text()


def test_no_folder_means_no_dumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dump_to(None)("import", import_onnx(mlp()).module)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "below"):
        with pytest.raises(OutputError) as caught:
            dump_to(folder)
        assert str(caught.value).startswith(f"{folder}: cannot make this folder: ")


def test_a_folder_that_has_gone_is_named(tmp_path: Path) -> None:
    dump = dump_to(tmp_path / "dumps")
    (tmp_path / "dumps").rmdir()
    with pytest.raises(OutputError, match="dumps"):
        dump("import", import_onnx(mlp()).module)


@pytest.mark.parametrize(("dims", "static"), [(None, False), ({"batch": 2}, True)])
def test_a_model_is_static_when_all_its_sizes_are_numbers(dims: dict[str, int] | None, static: bool) -> None:
    assert is_static(import_onnx(mlp(), dims).module) == static
