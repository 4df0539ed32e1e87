"""DistilBERT, and what heads of the BERT family make of the hidden states, against float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.graph.onnx.running import Compiled, relative_error
from tvm_ternary.errors import ModelError
from tvm_ternary.graph.source import import_model

from .checkpoints import BERT, Arrays, Weights, bert, feeds, gelu, layer_norm, run_bert, write_checkpoint

ONE = {**BERT, "num_hidden_layers": 1}
ROBERTA = {**ONE, "model_type": "roberta", "pad_token_id": 1}
DISTILBERT = {
    "model_type": "distilbert",
    "dim": 24,
    "hidden_dim": 40,
    "n_layers": 1,
    "n_heads": 3,
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "activation": "gelu",
}
RENAMED = {
    "encoder.layer": "transformer.layer",
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}


def given() -> dict[str, np.ndarray]:
    """Without padding, so that RoBERTa counts positions as the others do."""
    ids = np.maximum(feeds()["input_ids"], 2)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def states(arrays: Arrays, shift: int = 0) -> np.ndarray:
    """Hidden states of both sequences."""
    rows = zip(*given().values(), strict=True)
    return np.stack([run_bert(arrays, ONE, *row, lambda ids: np.arange(len(ids)) + shift)[0] for row in rows])


def distil(arrays: Arrays) -> Arrays:
    """The names that DistilBERT has for BERT's tensors; it lacks token types and pooler."""
    result = {}
    for name, array in arrays.items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        result[f"distilbert.{name}"] = array
    return {name: array for name, array in result.items() if "token_type" not in name and "pooler" not in name}


def plain() -> Arrays:
    """A BERT whose token types add nothing."""
    arrays = bert(ONE)
    arrays["embeddings.token_type_embeddings.weight"][:] = 0
    return arrays


def head(*layers: tuple[str, int], norm: str | None = None, bias: str | None = None) -> Arrays:
    """Weights of a head: layers of names and sizes, a norm, a bias over the vocabulary."""
    weights = Weights(7)
    for name, size in layers:
        weights.linear(name, size, 24)
    if norm:
        weights.norm(norm, 24)
    if bias:
        weights.vector(bias, 50)
    return weights.arrays


def dense(x: np.ndarray, arrays: Arrays, name: str) -> np.ndarray:
    return x @ arrays[f"{name}.weight"].astype(np.float64).T + arrays[f"{name}.bias"]


def run(folder: Path, config: dict[str, Any], arrays: Arrays) -> dict[str, np.ndarray]:
    imported = import_model(write_checkpoint(folder, config, arrays))
    outputs = Compiled(imported)(given())
    return {spec.name: output for spec, output in zip(imported.outputs, outputs, strict=True)}


def test_distilbert_is_the_reference(tmp_path: Path) -> None:
    outputs = run(tmp_path, DISTILBERT, distil(plain()))
    assert outputs.keys() == {"last_hidden_state"}
    assert relative_error(outputs["last_hidden_state"], states(plain())) < 2e-6


Reference = Callable[[Arrays, Arrays], np.ndarray]
CLASSIFIERS: list[tuple[dict[str, Any], Arrays, Reference]] = [
    (
        ONE,
        head(("classifier", 3)),
        lambda w, h: dense(np.tanh(dense(states(w)[:, 0], w, "pooler.dense")), h, "classifier"),
    ),
    (
        {**ONE, "architectures": ["BertForTokenClassification"]},
        head(("classifier", 3)),
        lambda w, h: dense(states(w), h, "classifier"),
    ),
    (
        ROBERTA,
        head(("classifier.dense", 24), ("classifier.out_proj", 3)),
        lambda w, h: dense(np.tanh(dense(states(w, 2)[:, 0], h, "classifier.dense")), h, "classifier.out_proj"),
    ),
    (ROBERTA, head(("classifier", 3)), lambda w, h: dense(states(w, 2), h, "classifier")),
    (
        DISTILBERT,
        head(("pre_classifier", 24), ("classifier", 3)),
        lambda w, h: dense(np.maximum(dense(states(w)[:, 0], h, "pre_classifier"), 0), h, "classifier"),
    ),
]


@pytest.mark.parametrize(
    ("config", "weights", "reference"), CLASSIFIERS, ids=["bert", "tokens", "roberta", "roberta-tokens", "distilbert"]
)
def test_classifiers(tmp_path: Path, config: dict[str, Any], weights: Arrays, reference: Reference) -> None:
    arrays = distil(plain()) if config is DISTILBERT else plain()
    outputs = run(tmp_path, config, {**arrays, **weights})
    assert relative_error(outputs["logits"], reference(plain(), weights)) < 2e-6


MASKED = [
    ({**ONE}, "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    (ROBERTA, "lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    (DISTILBERT, "vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
]


@pytest.mark.parametrize(("config", "transform", "norm", "bias"), MASKED, ids=["bert", "roberta", "distilbert"])
def test_masked_tokens(tmp_path: Path, config: dict[str, Any], transform: str, norm: str, bias: str) -> None:
    weights, arrays = head((transform, 24), norm=norm, bias=bias), plain()
    given_arrays = distil(arrays) if config is DISTILBERT else arrays
    outputs = run(tmp_path, config, {**given_arrays, **weights})
    hidden = states(arrays, 2 if config is ROBERTA else 0)
    hidden = layer_norm(gelu(dense(hidden, weights, transform)), weights, norm, 1e-12)
    expected = hidden @ arrays["embeddings.word_embeddings.weight"].T + weights[bias]
    assert relative_error(outputs["logits"], expected) < 2e-6


class TestAsItWasFirstPublished:
    """BERT as its first checkpoints have it: norms called gamma and beta, two heads, tied tensors given twice."""

    def arrays(self) -> Arrays:
        name = "cls.predictions"
        weights = head((f"{name}.transform.dense", 24), norm=f"{name}.transform.LayerNorm", bias=f"{name}.bias")
        arrays = {f"bert.{key}": array for key, array in plain().items()} | weights
        arrays[f"{name}.decoder.weight"] = arrays["bert.embeddings.word_embeddings.weight"].copy()
        arrays[f"{name}.decoder.bias"] = arrays[f"{name}.bias"].copy()
        arrays |= head(("cls.seq_relationship", 2))
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        return {
            next((key.replace(a, b) for a, b in old.items() if key.endswith(a)), key): array
            for key, array in arrays.items()
        }

    def test_is_read(self, tmp_path: Path) -> None:
        outputs = run(tmp_path, ONE, self.arrays())
        assert list(outputs) == ["last_hidden_state", "pooler_output", "logits"]
        assert relative_error(outputs["last_hidden_state"], states(plain())) < 2e-6

    @pytest.mark.parametrize("part", ["weight", "bias"])
    def test_what_is_tied_and_differs_is_refused(self, tmp_path: Path, part: str) -> None:
        arrays = self.arrays()
        arrays[f"cls.predictions.decoder.{part}"] += np.float32(1)
        with pytest.raises(ModelError, match=f"cls.predictions.decoder.{part}: differs from .*, and config.json"):
            import_model(write_checkpoint(tmp_path, ONE, arrays))


def test_a_classifier_of_sequences_needs_the_pooler(tmp_path: Path) -> None:
    arrays = {**bert(ONE, pooler=False), **head(("classifier", 3))}
    with pytest.raises(ModelError, match=r"pooler.dense.weight: is missing from the checkpoint"):
        import_model(write_checkpoint(tmp_path, ONE, arrays))
