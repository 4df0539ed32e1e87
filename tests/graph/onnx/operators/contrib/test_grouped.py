"""``GroupQueryAttention`` against onnxruntime: prompts, steps, rows of different lengths."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.graph.onnx.operators.contrib.models import Model, floats
from tests.graph.onnx.running import Compiled, assert_matches, relative_error, run_onnxruntime
from tests.models import FLOAT, INT64
from tvm_ternary.errors import UnsupportedOperatorError
from tvm_ternary.graph.importer import import_onnx

INT32 = onnx.TensorProto.INT32
HEADS, KV_HEADS, SIZE, LONGEST = 4, 2, 16, 16


def model(past: str | int) -> onnx.ModelProto:
    """Keys and values apart and packed, with and without rotary embedding, window, cap and bias.

    The total length is that of a mask, as model builders write it.
    """
    g = Model()
    q = g.input("q", FLOAT, ["batch", "length", HEADS * SIZE])
    k, v = (g.input(name, FLOAT, ["batch", "length", KV_HEADS * SIZE]) for name in "kv")
    qkv = g.input("qkv", FLOAT, ["batch", "length", (HEADS + 2 * KV_HEADS) * SIZE])
    mask = g.input("mask", INT64, ["batch", f"{past} + length" if past else "length"])
    count = g.node("ReduceSum", mask, g.constant([1]), keepdims=0)
    ends = g.node("Cast", g.node("Sub", count, g.constant([1])), to=INT32)
    total = g.node("Cast", g.node("Gather", g.node("Shape", mask), g.constant(1), axis=0), to=INT32)
    state = [g.input(n, FLOAT, ["batch", KV_HEADS, past, SIZE]) for n in ("past_k", "past_v")] if past else ["", ""]
    angles = np.outer(np.arange(LONGEST), 10.0 ** -np.arange(SIZE // 2))
    tables = [g.constant(f(angles).astype(np.float32)) for f in (np.cos, np.sin)]
    common = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "outputs": 3}
    tail = [*state, ends, total]
    g.add("GroupQueryAttention", q, k, v, *tail, **common)
    g.add("GroupQueryAttention", q, k, v, *tail, *tables, **common, do_rotary=1, local_window_size=3, softcap=2.0)
    g.add("GroupQueryAttention", qkv, "", "", *tail, *tables, **common, do_rotary=1, rotary_interleaved=1, scale=0.2)
    return g.model()


def feeds(mask: list[list[int]], past: int) -> dict[str, np.ndarray]:
    batch, length = len(mask), len(mask[0]) - past
    return {
        "q": floats(batch, length, HEADS * SIZE),
        "k": floats(batch, length, KV_HEADS * SIZE),
        "v": floats(batch, length, KV_HEADS * SIZE) + 1,
        "qkv": floats(batch, length, (HEADS + 2 * KV_HEADS) * SIZE),
        "mask": np.array(mask, np.int64),
        "past_k": floats(batch, KV_HEADS, past, SIZE),
        "past_v": floats(batch, KV_HEADS, past, SIZE) - 1,
    }


def test_prompts() -> None:
    """Of equal lengths, and padded behind their ends; then what comes out of the padding is no matter."""
    compiled, whole = Compiled(import_onnx(model(0))), feeds([[1] * 7], 0)
    for got, want in zip(compiled(whole), run_onnxruntime(model(0), whole), strict=True):
        assert relative_error(got, want) < 1e-5
    padded = feeds([[1] * 5, [1, 1, 1, 0, 0]], 0)
    got, want = compiled(padded), run_onnxruntime(model(0), padded)
    for index in (0, 3, 6):
        assert relative_error(got[index][0], want[index][0]) < 1e-5
        assert relative_error(got[index][1, :3], want[index][1, :3]) < 1e-5


def test_steps() -> None:
    """One token or several, each row behind as many keys as it has."""
    one = feeds([[1] * 5 + [1], [1] * 4 + [1, 0]], past=5)
    several = feeds([[1] * 8], past=5)
    assert_matches(model("past"), [one, several])


@pytest.mark.parametrize(
    ("inputs", "attributes", "message"),
    [
        (7, {"smooth_softmax": 1}, "attribute smooth_softmax is 1"),
        (12, {}, "input head_sink is given"),
        (7, {}, "total_sequence_length is computed from the model's data; export the model so that"),
    ],
)
def test_refusals(inputs: int, attributes: dict[str, int], message: str) -> None:
    g = Model()
    x = g.input("x", FLOAT, [1, 2, 32])
    total, sink = g.input("total", INT32, []), g.constant(np.zeros(2, np.float32))
    names = [x, x, x, "", "", g.constant(np.array([1], np.int32)), total, *[""] * 4, sink]
    g.add("GroupQueryAttention", *names[:inputs], num_heads=2, kv_num_heads=2, outputs=3, **attributes)
    with pytest.raises(UnsupportedOperatorError, match=message):
        import_onnx(g.model())
