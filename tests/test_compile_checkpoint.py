"""A checkpoint folder through the command line to a library that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.cli.conftest import cli, error_line
from tests.graph.models import checkpoints
from tests.graph.models.checkpoints import bert, feeds, gpt2, run_bert, run_gpt2, write_checkpoint
from tests.graph.onnx.running import relative_error
from tvm_ternary.compiler import compile
from tvm_ternary.graph.source import model_digest
from tvm_ternary.runtime.module import load

BERT, GPT2 = {**checkpoints.BERT, "num_hidden_layers": 1}, {**checkpoints.GPT2, "n_layer": 1}


def ternary(arrays: dict[str, np.ndarray], without: str) -> dict[str, np.ndarray]:
    """The same with matrices that are ternary, so that nothing is lost when they are quantized."""
    return {
        name: array if array.ndim < 2 or without in name else np.sign(array.round(1)) * np.float32(0.25)
        for name, array in arrays.items()
    }


def test_command_line_compiles_a_folder(tmp_path: Path) -> None:
    arrays = ternary(bert(BERT), "embeddings")
    folder, library = write_checkpoint(tmp_path / "tiny", BERT, arrays), tmp_path / "tiny.so"
    options = ["--scheme", "t1a32", "--embeddings", "float", "--constant", "token_type_ids=0", "--dim", "batch=2"]
    result = cli("compile", folder, "-o", library, *options)
    assert result.returncode == 0, result.stderr
    module = load(library)
    assert (module.manifest.model.name, module.manifest.model.sha256) == ("tiny", model_digest(folder))
    assert module.manifest.bounds == {"sequence": 16}
    given = feeds()
    states_got, pooled_got = module.run(["last_hidden_state", "pooler_output"], given)
    rows = zip(given["input_ids"], given["attention_mask"], strict=True)
    states, pooled = zip(*(run_bert(arrays, BERT, *row, np.zeros(7, np.int64)) for row in rows), strict=True)
    assert relative_error(states_got, np.stack(states)) < 1e-5
    assert relative_error(pooled_got, np.stack(pooled)) < 1e-5


def test_gpt2_has_its_output_layer_and_its_table(tmp_path: Path) -> None:
    arrays = ternary(gpt2(GPT2, prefix=""), "wpe")
    options: dict[str, Any] = {"scheme": "t1a32", "embeddings": "float", "dims": {"batch": 2, "sequence": 7}}
    artifact = compile(write_checkpoint(tmp_path / "tiny", GPT2, arrays), tmp_path / "tiny.so", **options)
    layers = {layer.name: layer for layer in artifact.manifest.layers}
    assert layers["h.0.mlp.c_fc.weight"].epilogue == "bias + gelu_tanh"
    assert layers["h.0.mlp.c_proj.weight"].epilogue == "bias + residual"
    given = feeds()
    (logits,) = load(tmp_path / "tiny.so").run(None, given)
    rows = zip(given["input_ids"], given["attention_mask"], strict=True)
    assert relative_error(logits, np.stack([run_gpt2(arrays, GPT2, *row) for row in rows])) < 1e-5


def test_command_line_names_an_unknown_architecture_in_one_line(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", {"model_type": "mamba"}, bert())
    result = cli("compile", folder, "-o", tmp_path / "x.so")
    assert "architecture 'mamba' is not known; known are bert" in error_line(result)
