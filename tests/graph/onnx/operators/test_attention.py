"""``Attention`` and ``RotaryEmbedding`` with open dimensions, against the reference implementation of onnx."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.graph.onnx.running import Compiled, assert_matches, run_reference
from tests.models import BOOL, FLOAT, INT64, GraphBuilder
from tvm_ternary.errors import UnsupportedOperatorError
from tvm_ternary.graph.importer import import_onnx

HEADS, KV_HEADS, SIZE = 4, 2, 6


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def decoder(opset: int, **attributes: object) -> onnx.ModelProto:
    """Rows of heads, fewer of keys, past ones before them, and a mask whose last dimension has a name of its own."""
    g = GraphBuilder(opset=opset)
    rows = [g.input("q", FLOAT, ["batch", "length", HEADS * SIZE])]
    rows += [g.input(name, FLOAT, ["batch", "length", KV_HEADS * SIZE]) for name in ("k", "v")]
    mask = g.input("mask", BOOL, ["batch", 1, "length", "total"])
    past = [g.input(name, FLOAT, ["batch", KV_HEADS, "past", SIZE]) for name in ("past_k", "past_v")]
    heads = {"q_num_heads": HEADS, "kv_num_heads": KV_HEADS}
    g.nodes_of("Attention", *rows, mask, *past, outputs=["y", "k_out", "v_out"], **heads, **attributes)
    for name in ("y", "k_out", "v_out"):
        g.output(name, FLOAT)
    return g.model()


def decoder_feeds(batch: int, length: int, past: int) -> dict[str, np.ndarray]:
    rows = {name: floats(batch, length, n * SIZE) for name, n in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))}
    mask = np.random.default_rng(1).random((batch, 1, length, past + length)) < 0.6
    mask[:, :, 0] = False  # sees nothing
    return rows | {
        "past_k": floats(batch, KV_HEADS, past, SIZE),
        "past_v": floats(batch, KV_HEADS, past, SIZE),
        "mask": mask,
    }


@pytest.mark.parametrize(
    ("opset", "attributes"),
    [(23, {"is_causal": 1}), (24, {"softcap": 2.0, "scale": 0.3}), (25, {"is_causal": 1, "left_window_size": 2})],
)
def test_a_step_with_past_keys(opset: int, attributes: dict[str, object]) -> None:
    cases = [decoder_feeds(1, 1, 5), decoder_feeds(2, 4, 3)]
    imported = assert_matches(decoder(opset, **attributes), cases, run=run_reference)
    assert imported.outputs[0].shape == ("batch", "length", HEADS * SIZE)


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    (y, *_) = Compiled(import_onnx(decoder(24)))(decoder_feeds(1, 2, 1))
    assert (y[:, 0] == 0).all()
    assert (y[:, 1] != 0).any()


def test_a_mask_ends_before_the_keys() -> None:
    """Keys that are written in place: some at the end are padding, and the mask does not speak of them."""
    g = GraphBuilder(opset=24)
    query = g.input("q", FLOAT, ["batch", 2, "length", SIZE])
    cache = [g.input(name, FLOAT, ["batch", 2, 8, SIZE]) for name in ("k", "v")]
    mask, valid = g.input("mask", FLOAT, ["length", 5]), g.input("valid", INT64, ["batch"])
    g.nodes_of("Attention", query, *cache, mask, "", "", valid, outputs=["y"], is_causal=1)
    g.output("y", FLOAT)
    feeds = {"q": floats(2, 2, 3, SIZE), "k": floats(2, 2, 8, SIZE), "v": floats(2, 2, 8, SIZE)}
    feeds |= {"mask": floats(3, 5), "valid": np.array([5, 4])}
    assert_matches(g.model(), [feeds], run=run_reference)


def test_rows_must_divide_into_heads() -> None:
    g = GraphBuilder(opset=23)
    rows = [g.input(name, FLOAT, ["batch", "length", 10]) for name in "qkv"]
    g.nodes_of("Attention", *rows, outputs=["y"], q_num_heads=4, kv_num_heads=4)
    g.output("y", FLOAT)
    with pytest.raises(UnsupportedOperatorError, match="10 features are not divisible by 4 heads"):
        import_onnx(g.model())


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_embedding(interleaved: int) -> None:
    g = GraphBuilder(opset=23)
    x, places = g.input("x", FLOAT, ["batch", "length", 3 * 8]), g.input("places", INT64, ["batch", "length"])
    tables = [g.weight(name, 16, 2) for name in ("cosine", "sine")]
    attributes = {"num_heads": 3, "rotary_embedding_dim": 4, "interleaved": interleaved}
    g.node("RotaryEmbedding", x, *tables, places, output="y", **attributes)
    g.output("y", FLOAT)
    cases = [{"x": floats(b, n, 24), "places": np.arange(b * n).reshape(b, n)} for b, n in ((1, 1), (2, 5))]
    imported = assert_matches(g.model(), cases, run=run_reference)
    assert not imported.embeddings
    assert set(imported.others) == {"cosine", "sine"}
