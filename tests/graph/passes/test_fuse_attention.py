"""Spellings of attention that become one call, and what must not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op as R

from tests.graph.passes.small_graphs import make_module, operands, operators, random
from tvm_ternary.build.executable import build_executable
from tvm_ternary.graph.fuse import lower_graph_ops
from tvm_ternary.graph.passes.fuse_attention import fuse_attention
from tvm_ternary.kernels.attention import Attention, reference_attention
from tvm_ternary.schedule.cpu import attention, schedule_module, simd_of
from tvm_ternary.target import resolve

HEADS, KV, SIZE = 4, 2, 8
NATIVE = tvm.target.Target(resolve("native").tvm)
Emit = Callable[[relax.Expr], relax.Var]
SCALE = relax.const(0.3, "float32")
B, L = 2, 11


class Fused:
    """A graph with its attentions replaced, and what they were."""

    def __init__(self, inputs: dict[str, Sequence[int | str]], build: Any) -> None:
        self.shapes: list[Attention] = []
        self.inputs = inputs
        self.before = make_module(inputs, {}, build)
        self.module = fuse_attention(self.before, self._schedule)

    def _schedule(self, shape: Attention, lengths: tuple[int | None, ...]) -> tvm.tirx.PrimFunc:
        self.shapes.append(shape)
        return attention(shape, lengths, simd_of(NATIVE))

    def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """For these lengths alone: functions of open ones, which take long to compile, are looked at elsewhere."""
        dims = {
            name: size
            for shape, x in zip(self.inputs.values(), inputs, strict=True)
            for name, size in zip(shape, x.shape, strict=True)
            if isinstance(name, str)
        }
        found = len(self.shapes)
        bound = fuse_attention(relax.transform.BindSymbolicVars(dims, "main")(self.before), self._schedule)
        assert self.shapes[found:] == self.shapes[:found]
        del self.shapes[found:]
        module, _ = schedule_module(lower_graph_ops(bound), NATIVE)
        main = relax.VirtualMachine(build_executable(module, resolve("native").tvm), tvm.cpu())["main"]
        return [out.numpy() for out in main(*map(tvm.runtime.tensor, inputs))]


def heads(emit: Emit, x: relax.Expr, count: int, order: Sequence[int]) -> relax.Var:
    """(b, l, count * size) cut into heads."""
    b, length, _ = x.ty.shape.values
    return emit(R.permute_dims(emit(R.reshape(x, (b, length, count, SIZE))), order))


def joined(emit: Emit, x: relax.Expr, batch: Any, length: Any) -> relax.Var:
    return emit(R.reshape(emit(R.permute_dims(x, [0, 2, 1, 3])), (batch, length, HEADS * SIZE)))


FLAT = {"q": ("b", "l", HEADS * SIZE), "k": ("b", "s", HEADS * SIZE), "v": ("b", "s", HEADS * SIZE)}


def of_heads(x: np.ndarray, count: int) -> np.ndarray:
    return x.reshape(*x.shape[:2], count, SIZE).swapaxes(1, 2)


def expected(q: np.ndarray, k: np.ndarray, v: np.ndarray, kv: int, mask: np.ndarray | None = None) -> np.ndarray:
    y = reference_attention(of_heads(q, HEADS), of_heads(k, kv), of_heads(v, kv), 0.3, mask)
    return y.swapaxes(1, 2).reshape(*q.shape)


def scaled(emit: Emit, s: relax.Expr, mask: relax.Expr) -> relax.Expr:
    return emit(R.add(emit(R.multiply(s, SCALE)), mask))


def divided_and_swapped(emit: Emit, s: relax.Expr, mask: relax.Expr) -> relax.Expr:
    return emit(R.add(mask, emit(R.divide(s, relax.const(1 / 0.3, "float32")))))


def chosen(emit: Emit, s: relax.Expr, mask: relax.Expr) -> relax.Expr:
    seen = emit(R.greater(mask, relax.const(-1.0, "float32")))
    return emit(R.where(seen, emit(R.multiply(SCALE, s)), relax.const(-np.inf, "float32")))


@pytest.mark.parametrize("spelling", [scaled, divided_and_swapped, chosen])
def test_spellings(spelling: Any) -> None:
    def build(emit, q, k, v, mask):  # type: ignore[no-untyped-def]
        scores = emit(R.matmul(heads(emit, q, HEADS, [0, 2, 1, 3]), heads(emit, k, HEADS, [0, 2, 3, 1])))
        weights = emit(R.nn.softmax(spelling(emit, scores, mask), -1))
        mixed = emit(R.matmul(weights, heads(emit, v, HEADS, [0, 2, 1, 3])))
        return [joined(emit, mixed, *q.ty.shape.values[:2])]

    # Known lengths compile faster than open ones, which other tests have.
    known = {name: (B, L if name == "q" else L + 2, HEADS * SIZE) for name in FLAT}
    fused = Fused({**known, "mask": (B, 1, 1, L + 2)}, build)
    assert "matmul" not in operators(fused.module)
    assert "permute_dims" not in operators(fused.module)
    (shape,) = fused.shapes
    assert (shape.query, shape.key, shape.value, shape.out, shape.mask) == ("blhd",) * 4 + ("bs",)
    assert shape.scale == pytest.approx(0.3)
    q, k, v = random(B, L, 32), random(B, L + 2, 32, seed=1), random(B, L + 2, 32, seed=2)
    mask = np.zeros((B, 1, 1, L + 2), np.float32)
    mask[1, ..., 7:] = -np.inf
    (got,) = fused.run(q, k, v, mask)
    np.testing.assert_allclose(got, expected(q, k, v, HEADS, mask), atol=1e-5)


LOWEST = float(np.finfo(np.float32).min)


def shown(emit: Emit, mask: relax.Expr) -> relax.Expr:
    return emit(R.greater(mask, relax.const(-1.0, "float32")))


def added_where(emit: Emit, s: relax.Expr, mask: relax.Expr) -> relax.Expr:
    hidden = emit(R.where(shown(emit, mask), relax.const(0.0, "float32"), relax.const(LOWEST, "float32")))
    return emit(R.add(s, hidden))


def added_where_not(emit: Emit, s: relax.Expr, mask: relax.Expr) -> relax.Expr:
    hidden = emit(R.logical_not(shown(emit, mask)))
    hidden = emit(R.where(hidden, relax.const(-1e4, "float32"), relax.const(0.0, "float32")))
    return emit(R.add(emit(R.reshape(hidden, mask.ty.shape)), s))


def added_twice(emit: Emit, s: relax.Expr, mask: relax.Expr) -> relax.Expr:
    length, keys = s.ty.shape.values[2:]
    below = emit(R.tril(emit(R.ones((length, keys), "bool"))))
    nothing, hidden = relax.const(0.0, "float32"), relax.const(-np.inf, "float32")
    for seen in (shown(emit, mask), below):
        s = emit(R.add(s, emit(R.where(seen, nothing, hidden))))
    return s


def added_as_two_numbers(emit: Emit, s: relax.Expr, mask: relax.Expr) -> relax.Expr:
    return added_where_not(emit, added_where(emit, s, mask), mask)


def given_as_it_is(emit: Emit, s: relax.Expr, mask: relax.Expr) -> relax.Expr:
    return emit(R.add(s, mask))


@pytest.mark.parametrize(
    ("spelling", "hidden", "axes"),
    [
        (chosen, -np.inf, "bs"),
        (added_where, LOWEST, "bs"),
        (added_where_not, -1e4, "bs"),
        (added_twice, -np.inf, "bms"),
        (added_as_two_numbers, None, "bs"),
        (given_as_it_is, None, "bs"),
    ],
)
def test_masks_that_only_hide_are_bits(spelling: Any, hidden: float | None, axes: str) -> None:
    """Packed once for all attentions."""

    def build(emit, q, k, v, mask):  # type: ignore[no-untyped-def]
        for _ in range(2):
            scores = emit(R.matmul(q, emit(R.permute_dims(k, [0, 1, 3, 2]))))
            q = emit(R.matmul(emit(R.nn.softmax(spelling(emit, scores, mask), -1)), v))
        return [q]

    shape = ("b", 2, "l", SIZE)
    fused = Fused({"q": shape, "k": shape, "v": shape, "mask": ("b", 1, 1, "l")}, build)
    (found,) = fused.shapes
    assert (found.hidden, found.mask) == (hidden, axes)
    lowered = operators(lower_graph_ops(fused.module))
    assert lowered.count("attention") == 2
    assert sum(name.endswith("pack_mask") for name in lowered) == (hidden is not None)


def test_bits_of_two_masks() -> None:
    def build(emit, q, k, v, mask):  # type: ignore[no-untyped-def]
        scores = emit(R.matmul(q, emit(R.permute_dims(k, [0, 1, 3, 2]))))
        return [emit(R.matmul(emit(R.nn.softmax(added_twice(emit, scores, mask), -1)), v))]

    shape = (B, 2, 70, SIZE)
    fused = Fused({"q": shape, "k": shape, "v": shape, "mask": (B, 1, 1, 70)}, build)
    q, k, v = (random(*shape, seed=seed) for seed in range(3))
    mask = np.where(np.arange(70) < np.array([9, 0]).reshape(B, 1, 1, 1), np.float32(-np.inf), np.float32(0))
    both = mask + np.where(np.tri(70, dtype=bool), np.float32(0), np.float32(-np.inf))
    (got,) = fused.run(q, k, v, mask)
    np.testing.assert_allclose(got, reference_attention(q, k, v, 1.0, both), atol=1e-5)
    assert not got[0, :, :9].any()


def repeated_by_broadcast(emit: Emit, x: relax.Expr) -> relax.Expr:
    b, _, s, _ = x.ty.shape.values
    wide = emit(R.broadcast_to(emit(R.expand_dims(x, [2])), (b, KV, HEADS // KV, s, SIZE)))
    return emit(R.reshape(wide, (b, HEADS, s, SIZE)))


def repeated_by_name(emit: Emit, x: relax.Expr) -> relax.Expr:
    return emit(R.repeat(x, HEADS // KV, 1))


@pytest.mark.parametrize("repeat", [repeated_by_broadcast, repeated_by_name])
def test_repeated_keys_are_not_repeated(repeat: Any) -> None:
    def build(emit, q, k, v):  # type: ignore[no-untyped-def]
        keys, values = (repeat(emit, heads(emit, x, KV, [0, 2, 1, 3])) for x in (k, v))
        q4 = heads(emit, q, HEADS, [0, 2, 1, 3])
        scores = emit(R.multiply(emit(R.matmul(q4, emit(R.permute_dims(keys, [0, 1, 3, 2])))), SCALE))
        return [joined(emit, emit(R.matmul(emit(R.nn.softmax(scores, 3)), values)), *q.ty.shape.values[:2])]

    narrow = ("b", "s", KV * SIZE)
    fused = Fused({"q": FLAT["q"], "k": narrow, "v": narrow}, build)
    (shape,) = fused.shapes
    assert (shape.heads, shape.kv_heads) == (HEADS, KV)
    ((q_, k_, _),) = operands(fused.module, "attention")
    assert [int(x.ty.shape.values[2]) for x in (q_, k_)] == [HEADS, KV]
    q, k, v = random(B, L, 32), random(B, L, 16, seed=1), random(B, L, 16, seed=2)
    np.testing.assert_allclose(fused.run(q, k, v)[0], expected(q, k, v, KV), atol=1e-5)


def test_queries_of_a_group_as_rows_of_one_product() -> None:
    def build(emit, q, k, v, mask):  # type: ignore[no-untyped-def]
        b, length, _ = q.ty.shape.values
        s = k.ty.shape.values[1]
        rows = emit(R.reshape(heads(emit, q, HEADS, [0, 2, 1, 3]), (b, KV, HEADS // KV * length, SIZE)))
        scores = emit(R.reshape(emit(R.matmul(rows, heads(emit, k, KV, [0, 2, 3, 1]))), (b, HEADS, length, s)))
        weights = emit(R.nn.softmax(scaled(emit, scores, mask), -1))
        weights = emit(R.reshape(weights, (b, KV, HEADS // KV * length, s)))
        mixed = emit(R.matmul(weights, heads(emit, v, KV, [0, 2, 1, 3])))
        return [joined(emit, emit(R.reshape(mixed, (b, HEADS, length, SIZE))), b, length)]

    narrow = ("b", "s", KV * SIZE)
    fused = Fused({"q": FLAT["q"], "k": narrow, "v": narrow, "mask": ("l", "s")}, build)
    (shape,) = fused.shapes
    assert (shape.heads, shape.kv_heads, shape.mask) == (HEADS, KV, "ms")
    q, k, v = random(B, L, 32), random(B, 9, 16, seed=1), random(B, 9, 16, seed=2)
    mask = random(L, 9, seed=3)
    np.testing.assert_allclose(fused.run(q, k, v, mask)[0], expected(q, k, v, KV, mask), atol=1e-5)


def test_without_heads_and_with_two_masks() -> None:
    def build(emit, q, k, v, one, two):  # type: ignore[no-untyped-def]
        scores = emit(R.multiply(emit(R.matmul(q, emit(R.permute_dims(k, [0, 2, 1])))), SCALE))
        weights = emit(R.nn.softmax(emit(R.add(emit(R.add(scores, one)), two)), -1))
        return [emit(R.matmul(weights, v))]

    fused = Fused(
        {"q": ("b", "l", 8), "k": ("b", "s", 8), "v": ("b", "s", 5), "one": ("b", 1, "s"), "two": ("l", "s")}, build
    )
    (shape,) = fused.shapes
    assert (shape.heads, shape.mask, shape.query, shape.value_size) == (1, "bms", "bld", 5)
    q, k, v = random(B, L, 8), random(B, 6, 8, seed=1), random(B, 6, 5, seed=2)
    one, two = random(B, 1, 6, seed=3), random(L, 6, seed=4)
    want = reference_attention(q[:, None], k[:, None], v[:, None], 0.3, (one + two)[:, None])[:, 0]
    np.testing.assert_allclose(fused.run(q, k, v, one, two)[0], want, atol=1e-5)


CACHE = ("b", KV, "past", SIZE)


def step(emit: Emit, x: relax.Expr, k: relax.Expr, v: relax.Expr, old_k: relax.Expr, old_v: relax.Expr, axis: int):  # type: ignore[no-untyped-def]
    """A step of decoding: what it gives, keys and values."""
    k, v = (heads(emit, new, KV, [0, 2, 1, 3]) for new in (k, v))
    k, v = (emit(R.concat([old, new], axis)) for old, new in ((old_k, k), (old_v, v)))
    wide_k, wide_v = (repeated_by_broadcast(emit, one) for one in (k, v))
    q = heads(emit, x, HEADS, [0, 2, 1, 3])
    scores = emit(R.multiply(emit(R.matmul(q, emit(R.permute_dims(wide_k, [0, 1, 3, 2])))), SCALE))
    y = joined(emit, emit(R.matmul(emit(R.nn.softmax(scores, 3)), wide_v)), *x.ty.shape.values[:2])
    return y, k, v


@pytest.mark.parametrize("returned", [True, False])
def test_the_past_is_joined_on_the_way(returned: bool) -> None:
    def build(emit, q, k, v, old_k, old_v):  # type: ignore[no-untyped-def]
        return step(emit, q, k, v, old_k, old_v, 2)[: 3 if returned else 1]

    narrow = ("b", "new", KV * SIZE)
    fused = Fused({"q": FLAT["q"], "k": narrow, "v": narrow, "old_k": CACHE, "old_v": CACHE}, build)
    (shape,) = fused.shapes
    assert shape.joined
    assert "concat" not in operators(fused.module)
    for length, new, past in ((1, 1, 9), (5, 2, 70)):
        q, k, v = random(B, length, 32), random(B, new, 16, seed=1), random(B, new, 16, seed=2)
        old = [random(B, KV, past, SIZE, seed=seed) for seed in (3, 4)]
        y, *cache = fused.run(q, k, v, *old)
        whole = [np.concatenate([before, of_heads(x, KV)], 2) for before, x in zip(old, (k, v), strict=True)]
        want = reference_attention(of_heads(q, HEADS), whole[0], whole[1], 0.3).swapaxes(1, 2).reshape(y.shape)
        np.testing.assert_allclose(y, want, atol=1e-5)
        assert len(cache) == (2 if returned else 0)
        assert all(map(np.array_equal, cache, whole))


def test_what_others_read_is_joined_for_all() -> None:
    def build(emit, q, k, v, old_k, old_v):  # type: ignore[no-untyped-def]
        y, k, v = step(emit, q, k, v, old_k, old_v, 2)
        return [y, emit(R.negative(k)), v]

    narrow = ("b", "new", KV * SIZE)
    fused = Fused({"q": FLAT["q"], "k": narrow, "v": narrow, "old_k": CACHE, "old_v": CACHE}, build)
    (shape,) = fused.shapes
    assert not shape.joined
    assert operators(fused.module).count("concat") == 2


def scores_are_an_output(emit: Any, q: relax.Expr, k: relax.Expr, v: relax.Expr) -> list[relax.Expr]:
    scores = emit(R.matmul(q, emit(R.permute_dims(k, [0, 2, 1]))))
    return [emit(R.matmul(emit(R.nn.softmax(scores, -1)), v)), scores]


def weights_are_an_output(emit: Any, q: relax.Expr, k: relax.Expr, v: relax.Expr) -> list[relax.Expr]:
    weights = emit(R.nn.softmax(emit(R.matmul(q, emit(R.permute_dims(k, [0, 2, 1])))), -1))
    return [emit(R.matmul(weights, v)), weights]


def another_axis(emit: Any, q: relax.Expr, k: relax.Expr, v: relax.Expr) -> list[relax.Expr]:
    weights = emit(R.nn.softmax(emit(R.matmul(q, emit(R.permute_dims(k, [0, 2, 1])))), 1))
    return [emit(R.matmul(weights, v))]


def capped(emit: Any, q: relax.Expr, k: relax.Expr, v: relax.Expr) -> list[relax.Expr]:
    scores = emit(R.tanh(emit(R.matmul(q, emit(R.permute_dims(k, [0, 2, 1]))))))
    return [emit(R.matmul(emit(R.nn.softmax(scores, -1)), v))]


def scaled_after_the_mask(emit: Any, q: relax.Expr, k: relax.Expr, v: relax.Expr) -> list[relax.Expr]:
    masked = emit(R.add(emit(R.matmul(q, emit(R.permute_dims(k, [0, 2, 1])))), relax.const(1.0, "float32")))
    return [emit(R.matmul(emit(R.nn.softmax(emit(R.multiply(masked, SCALE)), -1)), v))]


@pytest.mark.parametrize(
    "build", [scores_are_an_output, weights_are_an_output, another_axis, capped, scaled_after_the_mask]
)
def test_what_is_something_else_stays(build: Any) -> None:
    fused = Fused({"q": ("b", 6, 8), "k": ("b", 6, 8), "v": ("b", 6, 8)}, build)
    assert not fused.shapes
    assert operators(fused.module) == operators(fused.before)


def test_equal_attentions_are_one_function() -> None:
    def build(emit, q, k, v):  # type: ignore[no-untyped-def]
        x = q
        for _ in range(3):
            (x,) = another(emit, x, k, v)
        return [x]

    def another(emit: Any, q: relax.Expr, k: relax.Expr, v: relax.Expr) -> list[relax.Expr]:
        return [emit(R.matmul(emit(R.nn.softmax(emit(R.matmul(q, emit(R.permute_dims(k, [0, 2, 1])))), -1)), v))]

    fused = Fused({"q": ("b", 6, 8), "k": ("b", 6, 8), "v": ("b", 6, 8)}, build)
    assert len(fused.shapes) == 1
    assert operators(fused.module).count("attention") == 3
