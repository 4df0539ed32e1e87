"""Checkpoints that do not fit their configuration, or that nothing here builds."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tvm_ternary.errors import ModelError
from tvm_ternary.graph.models import ARCHITECTURES
from tvm_ternary.graph.source import import_model

from .checkpoints import BERT, Arrays, bert, write_checkpoint

QUERY = "encoder.layer.0.attention.self.query.weight"
BIAS = "encoder.layer.0.attention.self.query.bias"


def write(folder: Path, change: Callable[[Arrays], Any] = lambda arrays: None, **settings: Any) -> Path:
    """A small BERT with some tensors and settings changed; a setting of ``...`` is left out."""
    arrays = bert()
    change(arrays)
    config = {name: value for name, value in {**BERT, **settings}.items() if value is not ...}
    return write_checkpoint(folder, config, arrays)


class TestArchitecture:
    def test_that_is_not_known_is_named_beside_those_that_are(self, tmp_path: Path) -> None:
        known = ", ".join(sorted(ARCHITECTURES))
        message = f"architecture 'mamba' is not known; known are {known}; any other model compiles from an ONNX export"
        with pytest.raises(ModelError, match=re.escape(message)):
            import_model(write(tmp_path, model_type="mamba"))

    @pytest.mark.parametrize("name", [..., 3])
    def test_that_is_not_said(self, tmp_path: Path, name: Any) -> None:
        with pytest.raises(ModelError, match=r"config.json: names no model_type; expected one of .*bert"):
            import_model(write(tmp_path, model_type=name))

    def test_without_a_configuration(self, tmp_path: Path) -> None:
        (write(tmp_path) / "config.json").unlink()
        with pytest.raises(ModelError, match=r"holds no config.json"):
            import_model(tmp_path)

    @pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "is no JSON object")])
    def test_a_configuration_that_is_none(self, tmp_path: Path, text: str, message: str) -> None:
        (write(tmp_path) / "config.json").write_text(text)
        with pytest.raises(ModelError, match=rf"config.json: {message}"):
            import_model(tmp_path)

    @pytest.mark.parametrize(
        ("given", "method"),
        [({"quant_method": "gptq", "bits": 4}, "'gptq'"), ({"quant_method": []}, "[]"), (1, "None")],
    )
    def test_quantized_by_something_else(self, tmp_path: Path, given: Any, method: str) -> None:
        message = f"quantized by {method}, which is not read; take the checkpoint it was made from"
        with pytest.raises(ModelError, match=re.escape(message)):
            import_model(write(tmp_path, quantization_config=given))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"hidden_size": ...}, "lacks hidden_size"),
            ({"hidden_size": "24"}, "hidden_size is '24', expected a whole number of at least 1"),
            ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number"),
            ({"layer_norm_eps": True}, "layer_norm_eps is True, expected a positive number"),
            ({"num_attention_heads": 5}, "hidden_size: 24 features cannot be divided by 5 heads"),
            ({"hidden_act": "gelu_7"}, "names activation function 'gelu_7', expected one of gelu, gelu_new"),
            ({"position_embedding_type": "relative_key"}, "is 'relative_key', only 'absolute' is supported; export"),
            ({"is_decoder": True}, "is_decoder is True, only False is supported"),
        ],
    )
    def test_settings_that_cannot_be_built(self, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ModelError, match=rf"config.json: .*{message}"):
            import_model(write(tmp_path, **settings))


class TestTensors:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=f"{QUERY}: is missing from the checkpoint"):
            import_model(write(tmp_path, lambda arrays: arrays.pop(QUERY)))

    def test_without_a_use(self, tmp_path: Path) -> None:
        head = {f"qa_outputs.{part}": np.zeros((2, 24), np.float32) for part in ("weight", "bias")}
        with pytest.raises(ModelError, match=r"qa_outputs.*: is not used by this architecture.*and 1 more; export"):
            import_model(write(tmp_path, lambda arrays: arrays.update(head)))

    def test_buffers_are_harmless(self, tmp_path: Path) -> None:
        buffers = {f"embeddings.{name}": np.zeros((1, 16), np.int64) for name in ("position_ids", "token_type_ids")}
        import_model(write(tmp_path, lambda arrays: arrays.update(buffers)))

    def test_of_another_shape(self, tmp_path: Path) -> None:
        message = rf"model.safetensors: {QUERY}: has shape \[24, 24\]; config.json says \[12, 12\]"
        with pytest.raises(ModelError, match=message):
            import_model(
                write(tmp_path, lambda arrays: arrays.update(cut(arrays)), hidden_size=12, intermediate_size=40)
            )

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_not_finite_matrix_is_named_when_it_is_read(self, tmp_path: Path, value: float) -> None:
        imported = import_model(write(tmp_path, lambda arrays: spoil(arrays[QUERY], value)))
        with pytest.raises(ModelError, match=rf"{QUERY}: 1 of 576 elements are NaN or infinite, the first at \(2, 3\)"):
            imported.params[QUERY]

    @pytest.mark.parametrize("name", [BIAS, "embeddings.word_embeddings.weight"])
    def test_not_finite_constant_is_named_at_import(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ModelError, match=rf"{name}: 1 of .* the first at"):
            import_model(write(tmp_path, lambda arrays: spoil(arrays[name], np.nan)))

    def test_float64_beyond_float32(self, tmp_path: Path) -> None:
        wide = {BIAS: np.full(24, 1e300)}
        with pytest.raises(ModelError, match=f"{BIAS}: 24 of 24 elements are NaN or infinite"):
            import_model(write(tmp_path, lambda arrays: arrays.update(wide)))

    def test_integers_are_no_matrix(self, tmp_path: Path) -> None:
        packed = {QUERY: np.zeros((24, 24), np.int8)}
        imported = import_model(write(tmp_path, lambda arrays: arrays.update(packed)))
        with pytest.raises(ModelError, match=f"{QUERY}: has dtype int8; expected one of bfloat16, float16"):
            imported.params[QUERY]

    @pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
    def test_other_floats_are_the_numbers_they_are(self, tmp_path: Path, dtype: Any) -> None:
        arrays = {name: array.astype(dtype) for name, array in bert().items()}
        imported = import_model(write_checkpoint(tmp_path, BERT, arrays))
        for name, matrix in imported.params.items():
            assert matrix.dtype == np.float32
            np.testing.assert_array_equal(matrix, arrays[name].astype(np.float32).T)


def spoil(array: np.ndarray, value: float) -> None:
    array[(2, 3)[: array.ndim]] = value


def cut(arrays: Arrays) -> Arrays:
    """Tables and norms of half the width, so that the first thing that does not fit is a matrix."""
    return {name: array[..., :12] for name, array in arrays.items() if name.startswith("embeddings.")}
