"""The labelled texts and the float models reproduce the numbers that are known of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import sentence_similarity as similarity
from fetch_models import PARAPHRASE

from tvm_ternary.runtime.manifest import TensorSpec


@pytest.fixture(autouse=True)
def folder(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "FOLDER", models)


@dataclass
class Float:
    """The ONNX model in onnxruntime, with what a metric sees of a model."""

    session: Any
    inputs: tuple[TensorSpec, ...] = field(init=False)

    def __post_init__(self) -> None:
        names = [item.name for item in self.session.get_inputs()]
        self.inputs = tuple(TensorSpec(name, "int64", ("batch", "length")) for name in names)

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        names = [item.name for item in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, inputs), strict=True))


@pytest.fixture(scope="module")
def paraphrase(models: Path) -> Float:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return Float(onnxruntime.InferenceSession(models / PARAPHRASE, options, providers=["CPUExecutionProvider"]))


def test_float_agrees_with_people_as_is_known(paraphrase: Float) -> None:
    (value,) = similarity.lee(paraphrase).values()
    assert value == pytest.approx(0.638, abs=0.0005)


def test_reviews_lose_their_labels(paraphrase: Float) -> None:
    tokens = similarity.polarity_tokens()
    assert len(tokens) == 200
    assert tokens[0] == similarity.tokenize(["simplistic , silly and tedious . "])[0]
    assert similarity.embedder(paraphrase)(tokens[:2]).shape == (2, 384)


def test_embeddings_of_what_people_say_correlate_perfectly() -> None:
    judged = np.loadtxt(similarity.FOLDER / similarity.TEXTS / "similarities0-1.txt")
    judged = np.triu(judged, 1)
    judged += judged.T + np.diag(np.full(50, 1 - np.linalg.eigvalsh(judged + judged.T).min()))
    values, vectors = np.linalg.eigh(judged)

    def embed(texts: Sequence[Sequence[int]]) -> Any:
        assert max(map(len, texts)) == 154
        return vectors * np.sqrt(values)

    assert similarity.lee_pearson(embed) == pytest.approx(1)
