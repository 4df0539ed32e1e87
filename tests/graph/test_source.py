"""Every kind of model by one door, and its digest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.models import gpt2 as onnx_gpt2
from tvm_ternary.errors import ModelError
from tvm_ternary.graph.source import import_model, model_digest

from .models.checkpoints import BERT, bert, write_checkpoint


def test_a_file_is_a_graph_and_a_folder_a_checkpoint(tmp_path: Path) -> None:
    onnx.save(onnx_gpt2(layers=1), tmp_path / "model.onnx")
    graph = import_model(tmp_path / "model.onnx", dims={"batch": 1})
    assert graph.onnx is not None
    assert graph.inputs[0].shape[0] == 1
    checkpoint = import_model(str(write_checkpoint(tmp_path / "small", BERT, bert())), dims={"batch": 1})
    assert checkpoint.onnx is None
    assert checkpoint.name == "small"
    assert checkpoint.inputs[0].shape == (1, "sequence")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none.onnx: no such file"):
        import_model(tmp_path / "none.onnx")
    with pytest.raises(
        ModelError, match=r"holds no config.json, which names the architecture; name a checkpoint folder"
    ):
        import_model(tmp_path)


class TestDigest:
    def test_of_a_file_is_its_own(self, tmp_path: Path) -> None:
        (tmp_path / "x.onnx").write_bytes(b"abc")
        assert model_digest(tmp_path / "x.onnx").startswith("ba7816bf8f01cfea")

    def test_of_a_folder_changes_with_its_weights_and_configuration(self, tmp_path: Path) -> None:
        arrays = bert()
        one = model_digest(write_checkpoint(tmp_path / "a", BERT, arrays))
        assert one == model_digest(write_checkpoint(tmp_path / "b", BERT, arrays))
        (tmp_path / "b" / "README.md").write_text("not read")
        assert one == model_digest(tmp_path / "b")
        assert one != model_digest(write_checkpoint(tmp_path / "b", {**BERT, "hidden_act": "relu"}, arrays))
        arrays["embeddings.LayerNorm.bias"] += np.float32(1)
        assert one != model_digest(write_checkpoint(tmp_path / "b", BERT, arrays))
