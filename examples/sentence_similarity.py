"""How well a sentence encoder's embeddings agree with people, and with those of the float model.

Metrics for ``tvm-ternary eval``; the texts and models are fetched by ``python examples/fetch_models.py eval``::

    tvm-ternary eval MODEL --scheme t2a8g64 --metric examples/sentence_similarity.py:lee
    tvm-ternary eval MODEL --scheme t2a8g64 --metric examples/sentence_similarity.py:polarity

A text's embedding is the mean of the last hidden states over its tokens. Each text is run alone, so that nothing is
padded.

References
----------
Lee, Pincombe and Welsh, "An empirical evaluation of models of text document similarity", 2005, for the 50 documents and
how alike people find them; Pang and Lee, "Seeing stars", 2005, for the film reviews. Both lie in gensim's tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from fetch_models import FOLDER, TEXTS, TOKENIZER
from tokenizers import Tokenizer

from tvm_ternary.analysis.accuracy import pearson

# The longest text that MiniLM-L6 was trained for; the documents have at most 154 tokens.
LENGTH = 256

Floats = npt.NDArray[np.floating[Any]]
Embed = Callable[[Sequence[Sequence[int]]], Floats]
"""From each text's token numbers to its embedding, (texts, width)."""


def lee(run: Any) -> dict[str, float]:
    """Pearson's correlation of the model's similarities with people's, over all 1,225 pairs of 50 documents.

    Parameters
    ----------
    run : callable
        From inputs to outputs, both by name; has ``inputs``, the model's.
    """
    return {"lee pearson": lee_pearson(embedder(run))}


def polarity(run: Any) -> dict[str, Floats]:
    """Embeddings (200, width) of film reviews; `eval` compares the ternary model's with the float model's."""
    return {"pang_lee embeddings": embedder(run)(polarity_tokens())}


def lee_pearson(embed: Embed) -> float:
    """Correlate the cosines of embeddings with people's judgements.

    Parameters
    ----------
    embed : callable
        From the token numbers of 50 documents to their embeddings (50, width).
    """
    texts = (FOLDER / TEXTS / "lee.cor").read_text("latin-1").rstrip("\n").split("\n")
    judged = np.loadtxt(FOLDER / TEXTS / "similarities0-1.txt")
    embeddings = np.asarray(embed(tokenize(texts)), np.float64)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    pairs = np.triu_indices(len(texts), 1)
    return pearson((embeddings @ embeddings.T)[pairs], judged[pairs])


def polarity_tokens() -> list[list[int]]:
    """Token numbers of the 200 reviews, without their labels."""
    lines = (FOLDER / TEXTS / "pang_lee_polarity.cor").read_text("latin-1").splitlines()
    return tokenize([line.partition(" ")[2] for line in lines])


def tokenize(texts: Sequence[str]) -> list[list[int]]:
    """Token numbers of each text, cut off at `LENGTH`."""
    return [list(item.ids) for item in _tokenizer().encode_batch(list(texts))]


def embedder(run: Any) -> Embed:
    """Turn a model's run into a function from token numbers to embeddings."""

    def embed(texts: Sequence[Sequence[int]]) -> Floats:
        return np.stack([mean_hidden_state(run(model_inputs(run.inputs, tokens))) for tokens in texts])

    return embed


def model_inputs(specs: Sequence[Any], tokens: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
    """Name what BERT's family takes for one text, whichever of them the model has."""
    ids = np.asarray([tokens])
    known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {spec.name: known[spec.name].astype(spec.dtype) for spec in specs}


def mean_hidden_state(outputs: Mapping[str, npt.NDArray[Any]]) -> Floats:
    """Average the one output of three dimensions, (1, tokens, width), over the tokens."""
    (hidden,) = (array for array in outputs.values() if array.ndim == 3)
    mean: Floats = hidden[0].mean(axis=0, dtype=np.float64)
    return mean


@cache
def _tokenizer() -> Any:
    tokenizer = Tokenizer.from_file(str(FOLDER / TOKENIZER))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)
    return tokenizer
