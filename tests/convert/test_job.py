"""A model to a quantized checkpoint: it comes back, a stopped job goes on, and what cannot be is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm

from tests.models import FLOAT, GraphBuilder, gpt2, mlp
from tvm_ternary.convert.folder import resave
from tvm_ternary.convert.job import quantize_model
from tvm_ternary.convert.parts import open_parts
from tvm_ternary.convert.work import QuantizedLayer
from tvm_ternary.errors import ModelError, OptionError, OutputError, TernaryError
from tvm_ternary.formats.quantization import QUANTIZATION_VERSION
from tvm_ternary.graph.quantized import CONFIG, read_config
from tvm_ternary.graph.source import import_model
from tvm_ternary.quantize.fit import fit_matrix
from tvm_ternary.quantize.recipe import Recipe

FAST: dict[str, Any] = {"recipe": {"method": "absmean"}}
SAME: dict[str, Any] = {"edges": "same", "output_layer": "same", **FAST}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt2") / "gpt2.onnx"
    onnx.save(gpt2(), path)
    (path.parent / "tokenizer.json").write_text("{}")
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_is_what_was_fitted(source: Path, tmp_path: Path) -> None:
    done = quantize_model(source, tmp_path / "out", scheme="t2a8g32", **SAME)
    assert done.path == tmp_path / "out"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"], "nothing is left beside it"
    assert set(content(tmp_path / "out")) == {CONFIG, "model.onnx", "model.safetensors", "tokenizer.json"}
    before, after = import_model(source), import_model(tmp_path / "out")
    tvm.ir.assert_structural_equal(before.module, after.module)
    assert list(after.ternary) == [layer.name for layer in done.layers] == list(before.shapes)
    for layer in done.layers:
        fit = fit_matrix(before.params[layer.name].T, read_config(done.path)[1].schemes[layer.name], Recipe("absmean"))
        np.testing.assert_array_equal(after.ternary[layer.name].planes, fit.weight.planes)
        np.testing.assert_array_equal(after.ternary[layer.name].scale, fit.weight.scale)
        np.testing.assert_array_equal(after.params[layer.name], fit.weight.dequantize().T)
        assert (layer.scheme, layer.error) == ("t2a8g32", fit.error)


def test_edges_and_heads_follow_the_policy(source: Path, tmp_path: Path) -> None:
    done = quantize_model(source, tmp_path / "out", scheme="t1a8g32", **FAST)
    plan = quantize_model(source, None, scheme="t1a8g32", dry_run=True, **FAST)
    assert [(layer.name, layer.scheme, layer.why) for layer in plan.layers] == [
        (layer.name, layer.scheme, layer.why) for layer in done.layers
    ]
    assert plan.path is None
    *blocks, head = done.layers
    assert {layer.scheme for layer in blocks} == {"t4a8g32"}, "two blocks, both at an edge"
    assert (head.scheme, head.why) == (None, "the output layer: output-layer is float")
    assert 8 < done.bits_per_weight < 32
    document = json.loads((tmp_path / "out" / CONFIG).read_text())["quantization_config"]
    assert document["quant_method"] == "tvm-ternary"
    assert document["config_groups"]["group_0"]["targets"] == [layer.name for layer in blocks]
    weights = document["config_groups"]["group_0"]["weights"]
    assert (weights["num_planes"], weights["strategy"], weights["group_size"]) == (4, "group", 32)
    assert document["ignore"] == [head.name]
    imported = import_model(tmp_path / "out")
    np.testing.assert_array_equal(imported.params[head.name], import_model(source).params[head.name])


def test_saved_again_it_is_the_same_bytes(source: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    quantize_model(source, first, scheme="t1a8g32", **FAST)
    second.mkdir()
    resave(import_model(first), first, second)
    assert content(second) == content(first)
    again = quantize_model(first, third, scheme="t1a8g32", **FAST)
    assert content(third) == content(first)
    assert {layer.why for layer in again.layers if layer.scheme} == {"ternary in the model"}


def test_a_later_run_goes_on_with_what_stayed_float(source: Path, tmp_path: Path) -> None:
    names = list(import_model(source).shapes)
    quantize_model(source, tmp_path / "half", scheme="t2a8g32", layers=r"mlp", **SAME)
    half = import_model(tmp_path / "half")
    assert 0 < len(half.ternary) < len(names)
    done = quantize_model(tmp_path / "half", tmp_path / "all", scheme="t1a8g32", **SAME)
    schemes = {layer.name: layer.scheme for layer in done.layers}
    assert {name: scheme for name, scheme in schemes.items() if name in half.ternary} == dict.fromkeys(
        half.ternary, "t2a8g32"
    )
    assert {scheme for name, scheme in schemes.items() if name not in half.ternary} == {"t1a8g32"}
    for name in half.ternary:
        np.testing.assert_array_equal(import_model(tmp_path / "all").ternary[name].planes, half.ternary[name].planes)


class Stopped(Exception):
    pass


def stop_after(count: int) -> Callable[[QuantizedLayer], None]:
    seen: list[str] = []

    def on_layer(layer: QuantizedLayer) -> None:
        seen.append(layer.name)
        if len(seen) == count:
            raise Stopped

    return on_layer


def test_a_stopped_job_goes_on_and_gives_equal_bytes(source: Path, tmp_path: Path) -> None:
    quantize_model(source, tmp_path / "whole", scheme="t1a8g32", **FAST)
    with pytest.raises(Stopped):
        quantize_model(source, tmp_path / "out", scheme="t1a8g32", on_layer=stop_after(3), **FAST)
    assert not (tmp_path / "out").exists()
    done = quantize_model(source, tmp_path / "out", scheme="t1a8g32", **FAST)
    assert done.resumed == 3
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("changed", "key"),
    [({"scheme": "t2a8g32"}, "options"), ({"scheme": "t1a8g32", "recipe": {"method": "twn"}}, "options")],
)
def test_another_job_does_not_mix_with_a_stopped_one(
    source: Path, tmp_path: Path, changed: dict[str, Any], key: str
) -> None:
    with pytest.raises(Stopped):
        quantize_model(source, tmp_path / "out", scheme="t1a8g32", on_layer=stop_after(1), **FAST)
    other = {**FAST, **changed}
    with pytest.raises(OutputError, match=rf"out\.partial: holds an unfinished job whose {key} .*--no-resume"):
        quantize_model(source, tmp_path / "out", **other)
    done = quantize_model(source, tmp_path / "out", resume=False, **other)
    assert done.resumed == 0


def test_a_changed_model_is_another_job(source: Path, tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(source.read_bytes())
    with pytest.raises(Stopped):
        quantize_model(model, tmp_path / "out", scheme="t1a8g32", on_layer=stop_after(1), **FAST)
    model.write_bytes(source.read_bytes())
    with pytest.raises(OutputError, match="holds an unfinished job whose model is"):
        quantize_model(model, tmp_path / "out", scheme="t1a8g32", **FAST)


def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    busy = pytest.raises(OutputError, match=r"out\.partial: is being worked on by another process; wait for it")
    with open_parts(tmp_path / "out", {}, resume=True), busy:
        open_parts(tmp_path / "out", {}, resume=True).__enter__()
    with open_parts(tmp_path / "out", {}, resume=True) as parts:
        assert list(parts.finished()) == []


def test_parts_without_a_job_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    folder.mkdir()
    (folder / "part-00000.safetensors").write_bytes(b"?")
    with pytest.raises(OutputError, match=r"holds parts, but no job\.json"):
        open_parts(tmp_path / "out", {}, resume=True).__enter__()
    (folder / "job.json").write_text("{")
    with pytest.raises(OutputError, match=r"job\.json: cannot be read"):
        open_parts(tmp_path / "out", {}, resume=True).__enter__()


def test_an_existing_folder_is_replaced_only_when_asked_to(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_model(source, out, scheme="t1a8g32", **FAST)
    before = content(out)
    with pytest.raises(OutputError, match=r"out: exists; choose another name, or replace it with --overwrite"):
        quantize_model(source, out, scheme="t2a8g32", **SAME)
    assert content(out) == before
    quantize_model(source, out, scheme="t2a8g32", overwrite=True, **SAME)
    assert content(out) != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="exists and is no quantized checkpoint"):
        quantize_model(source, tmp_path / "mine", overwrite=True, **FAST)
    with pytest.raises(OutputError, match="is the model itself"):
        quantize_model(out, out, overwrite=True, **FAST)
    with pytest.raises(OutputError, match="is a file"):
        quantize_model(out, source, **FAST)
    with pytest.raises(OutputError, match=r"cannot be made \(No such file or directory\)"):
        quantize_model(source, tmp_path / "none" / "out", **FAST)
    with pytest.raises(OptionError, match="output: is missing"):
        quantize_model(source, None, **FAST)


def damage(folder: Path, change: Callable[[dict[str, Any]], object]) -> str:
    path = folder / CONFIG
    document = json.loads(path.read_text())
    change(document["quantization_config"])
    path.write_text(json.dumps(document))
    with pytest.raises(ModelError) as caught:
        import_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_versions_and_damaged_folders_are_told_in_one_line(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_model(source, out, scheme="t1a8g32", **SAME)
    for version in (0, QUANTIZATION_VERSION + 1, "2"):
        message = damage(out, lambda config, version=version: config.update(version=version))
        assert f"has version {version!r}, expected {QUANTIZATION_VERSION}; read it with" in message
    message = damage(out, lambda config: (config.update(version=QUANTIZATION_VERSION), config.pop("config_groups")))
    assert "quantization_config is damaged (KeyError: 'config_groups'); quantize again" in message


def test_files_that_do_not_belong_together(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_model(source, out, scheme="t1a8g32", **SAME)
    name = next(iter(import_model(out).ternary))

    def forget(config: dict[str, Any]) -> None:
        config["config_groups"]["group_0"]["targets"].remove(name)

    assert f"does not know matrix {name}" in damage(out, forget)

    def invent(config: dict[str, Any]) -> None:
        config["config_groups"]["group_0"]["targets"] += [name, "ghost"]

    assert "holds no ternary ghost, which config.json names" in damage(out, invent)
    (out / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read"):
        import_model(out)


def test_bytes_that_changed_are_told_when_a_matrix_is_read(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_model(source, out, scheme="t1a8g32", **SAME)
    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-8:] = bytes(byte ^ 0xFF for byte in data[-8:])
    weights.write_bytes(data)
    imported = import_model(out)
    last = sorted(imported.ternary)[-1]
    with pytest.raises(ModelError, match=r"model\.safetensors: .* does not match its checksum"):
        imported.ternary[last]
    with pytest.raises(ModelError, match="does not match its checksum"):
        imported.params[last]


def broken(kind: str) -> onnx.ModelProto:
    g = GraphBuilder("broken")
    x = g.input("x", FLOAT, ["batch", 64])
    values = np.zeros((64, 64), np.float32) if kind == "zero" else np.full((64, 64), 0.5, np.float32)
    if kind == "nan":
        values[3, 4] = np.nan
    g.node("MatMul", g.node("MatMul", x, g.constant(values, "w")), g.weight("v", 64, 64), output="y")
    g.output("y", FLOAT, ["batch", 64])
    return g.model()


@pytest.mark.parametrize("kind", ["zero", "constant"])
def test_constant_matrices_are_exact(tmp_path: Path, kind: str) -> None:
    onnx.save(broken(kind), tmp_path / "m.onnx")
    done = quantize_model(tmp_path / "m.onnx", tmp_path / "out", scheme="t2a8g32", **SAME)
    assert done.layers[0].error == 0
    imported = import_model(tmp_path / "out")
    np.testing.assert_array_equal(imported.params["w"], 0 if kind == "zero" else 0.5)


def test_nan_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    onnx.save(broken("nan"), tmp_path / "m.onnx")
    with pytest.raises(TernaryError, match=r"w: .*(NaN|nan)"):
        quantize_model(tmp_path / "m.onnx", tmp_path / "out", scheme="t2a8g32", **SAME)
    assert not (tmp_path / "out").exists()


def test_a_model_without_matrices(tmp_path: Path) -> None:
    g = GraphBuilder("plain")
    g.node("Relu", g.input("x", FLOAT, ["batch", 4]), output="y")
    g.output("y", FLOAT, ["batch", 4])
    onnx.save(g.model(), tmp_path / "m.onnx")
    done = quantize_model(tmp_path / "m.onnx", tmp_path / "out", **FAST)
    assert (done.layers, done.bits_per_weight) == ((), 0.0)
    assert not import_model(tmp_path / "out").shapes


def test_external_data_come_along(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    onnx.save_model(mlp(), folder / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    onnx.save(mlp(), tmp_path / "inline.onnx")
    for model, name in ((folder / "m.onnx", "a"), (tmp_path / "inline.onnx", "b")):
        quantize_model(model, tmp_path / name, scheme="t1a8", **SAME)
    assert content(tmp_path / "a") == content(tmp_path / "b")
