"""What the models are run on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import tvm_ternary as tt
from tvm_ternary.errors import OptionError
from tvm_ternary.evaluation.data import find_samples
from tvm_ternary.evaluation.models import Runner

from ..models import FLOAT, INT64, GraphBuilder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A model of any number of tokens up to the 24 that it has positions for: the first layer of a decoder."""
    g = GraphBuilder("texts")
    ids = g.input("input_ids", INT64, ["batch", "length"])
    tokens = g.node("Gather", g.weight("tokens", 50, 8), ids, axis=0)
    end = g.node("Unsqueeze", g.node("Gather", g.node("Shape", ids), g.constant(1)), g.constant([0]))
    positions = g.node("Slice", g.weight("positions", 24, 8), g.constant([0]), end, g.constant([0]), g.constant([1]))
    g.node("Add", tokens, positions, output="hidden")
    g.output("hidden", FLOAT, ["batch", "length", 8])
    folder = tmp_path_factory.mktemp("texts")
    onnx.save(g.model(), folder / "texts.onnx")
    made = tt.compile(folder / "texts.onnx", folder / "texts.so", layers=(), embeddings="float")
    return Runner("texts", tt.load(made.path, threads=1))


def _find(run: Runner, model: Path, data: Any, count: int = 5, length: int = 8, tokenizer: Path | None = None) -> Any:
    return find_samples(run, model, data, count, length, 0, tokenizer)


def _write_tokenizer(path: Path) -> Path:
    words = {word: number for number, word in enumerate(["?", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


def test_random_tokens_are_of_the_whole_vocabulary(texts: Runner, tmp_path: Path) -> None:
    found = _find(texts, tmp_path, None, count=20, length=100)
    ids = [sample["input_ids"] for sample in found.samples]
    # The model's table of positions is shorter than what was asked for.
    assert {array.shape for array in ids} == {(1, 24)}
    assert 40 < np.max(ids) < 50
    assert np.min(ids) < 10
    assert "20 random inputs" in found.description


def test_text_is_cut_into_tokens_by_what_lies_beside_the_model(texts: Runner, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a b c\nh " + "g " * 40)
    with pytest.raises(OptionError, match=r"no tokenizer.json beside the model"):
        _find(texts, tmp_path / "model.onnx", text)
    given = _write_tokenizer(tmp_path / "other.json")
    first = _find(texts, tmp_path / "model.onnx", text, tokenizer=given)
    _write_tokenizer(tmp_path / "tokenizer.json")
    for model in (tmp_path, tmp_path / "model.onnx"):
        found = _find(texts, model, text)
        assert [sample["input_ids"].tolist() for sample in found.samples] == [[[1, 2, 3]], [[8, *[7] * 7]]]
        assert found.description == f"2 samples of {text}"
        assert [s["input_ids"].tolist() for s in first.samples] == [s["input_ids"].tolist() for s in found.samples]
    # No longer than the model can take.
    assert _find(texts, tmp_path, text, length=99).samples[1]["input_ids"].shape == (1, 24)


def test_lines_of_json(run_of: Callable[[str], Runner], tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"x": [[float(row)] * 10]}) for row in range(9)))
    found = _find(run_of("mlp-float"), tmp_path, path)
    assert len(found.samples) == 5
    assert found.samples[0]["x"].dtype == np.float32
