"""Rotations of heads that go into matrices: which do, what of the matrices is turned, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op as R

from tests.attention_model import RUNNER, WEIGHTS, attention_model, attention_of, outputs_of, sample
from tests.models import gpt2, llama
from tests.ternary_matmul import NATIVE
from tvm_ternary.convert.attention import CalledAttention
from tvm_ternary.convert.attention_modes import apply_choices, choose_caches, read_modes
from tvm_ternary.formats.hadamard import hadamard
from tvm_ternary.graph.importer import ImportedModel, import_onnx
from tvm_ternary.graph.passes.find_pasts import named_attentions
from tvm_ternary.graph.passes.fold_rotations import KEY, QUERY, RESULT, VALUE, Parts, fold_rotations
from tvm_ternary.quantize import quantize

from .small_graphs import Array, bindings, make_module, operators, random

ALL = frozenset({QUERY, KEY, VALUE, RESULT})
BASE = import_onnx(gpt2())


def folded(model: ImportedModel, wanted: Parts = ALL) -> tuple[ImportedModel, list[Parts]]:
    matches = named_attentions(model)
    model, parts = fold_rotations(model, matches, dict.fromkeys(matches, wanted))
    return model, list(parts.values())


def near(got: Array, wanted: Array) -> None:
    """Weights are turned in float64 and rounded once; four halvings of a float32 sum are less than four steps."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=4 * 2.0**-23 * float(np.abs(wanted).max()))


# What whole models keep of kernels


@pytest.mark.parametrize(
    ("build", "mode", "left"),
    [
        (gpt2, "ternary-keys-values", 0),
        (gpt2, "ternary-keys", 0),
        # Rotary embeddings: queries and keys of two layers.
        (llama, "ternary-keys-values", 4),
        # Heads that keep different things: values and results of those that pack values, and everything.
        (gpt2, "#0=ternary-keys ternary-keys-values", 2 * 2),
        (gpt2, "#0=full ternary-keys-values", 2 * 4),
    ],
)
def test_kernels_that_are_left(build: Callable[..., Any], mode: str, left: int) -> None:
    model = import_onnx(build(cache="both"))
    choices = choose_caches(model, read_modes(mode.split()), (2, 1), 64)
    cached = apply_choices(model, choices, NATIVE)
    assert operators(cached.module).count("hadamard_rows") == left
    assert all(cache.rotated == (cache.mode != "full") for cache in cached.caches)


def test_queries_and_keys_of_a_model_of_whole_texts() -> None:
    choices = choose_caches(BASE, read_modes("ternary-keys"), (2, 2), 64)
    assert not any(name.startswith("hadamard") for name in operators(apply_choices(BASE, choices, NATIVE).module))


def test_keys_and_values_that_are_outputs() -> None:
    """Where they are not kept inside, those who read them get them as they were."""
    assert folded(import_onnx(gpt2(cache="out")))[1] == [{QUERY, RESULT}] * 2


def test_without_rotation_nothing_is_turned() -> None:
    model = import_onnx(gpt2(cache="both"))
    choices = choose_caches(model, read_modes("ternary-keys-values"), (2, 2), 64, rotation=False)
    assert apply_choices(model, choices, NATIVE).params is model.params


def test_turned_models_compute_the_same() -> None:
    """Turned queries have the scores that they had with turned keys, and turned values come back as they were.

    What the first layer gives is read by three matrices; the second gives an output, which has to be a kernel's.
    """
    model = attention_model()
    matches = named_attentions(model)
    turned, parts = fold_rotations(model, matches, dict(zip(matches, (ALL, frozenset({QUERY, KEY})), strict=True)))
    assert list(parts.values()) == [ALL, {QUERY, KEY}]
    assert folded(model)[1][1] == {QUERY, KEY, VALUE}
    assert all(not np.array_equal(turned.params[name], matrix) for name, matrix in WEIGHTS.items())
    inputs = sample(9)
    (found,) = CalledAttention(turned, RUNNER).run([inputs], attention_of)
    want = outputs_of(inputs)[-1]
    # Sums of 16 in float32, twice, as without turning; and once more for what is turned.
    np.testing.assert_allclose(found["y"][0], want, atol=96 * 2.0**-24 * np.abs(want).max())


def test_joined_projections_with_biases() -> None:
    """GPT-2: queries, keys and values are slices of one product; 4 heads of 8."""
    turned, parts = folded(BASE)
    assert parts == [ALL, ALL]
    for layer in range(2):
        name = f"transformer.h.{layer}.attn"
        joined, out = f"{name}.c_attn.weight", f"{name}.c_proj.weight"
        near(turned.params[joined], hadamard(BASE.params[joined], 8))
        near(turned.params[out], hadamard(BASE.params[out].T, 8).T)
    values, (_, some) = folded(BASE, frozenset({VALUE}))
    assert some == {VALUE}
    near(values.params[joined][:, 64:], hadamard(BASE.params[joined], 8)[:, 64:])
    assert np.array_equal(values.params[joined][:, :64], BASE.params[joined][:, :64])
    before, after = (vectors(one, 96) for one in (BASE, values))
    near(np.concatenate([before[:, :64], hadamard(before[:, 64:], 8)], 1), after)
    assert [*turned.params] == [*BASE.params]
    assert len(turned.params) == len(BASE.params)
    assert joined in turned.params


def vectors(model: ImportedModel, length: int) -> Array:
    """All constants of so many elements that are added."""
    found = [
        part.value.numpy()
        for _, value in bindings(model.module)
        if isinstance(value, relax.Call) and value.op.name == "relax.add"
        for part in value.args
        if isinstance(part, tvm.ir.GenericConst) and part.value.numpy().size == length
    ]
    return np.concatenate([one.reshape(1, -1) for one in found])


# Forms of the way between a matrix and an attention

Emit = Callable[[relax.Expr], relax.Var]
FORMS = ("alone", "split", "slices", "inside heads")
BIASES = ("none", "product", "heads", "shared")


def small(
    values: Callable[..., relax.Expr],
    matrices: Mapping[str, Array],
    heads: int,
    size: int,
    *,
    batch: int | str = "batch",
    length: int | str = "n",
    end: Callable[..., list[relax.Expr]] | None = None,
) -> ImportedModel:
    """Attention with queries and keys as inputs, and values (batch, heads, length, size) that are made of x."""
    shapes = {"x": (batch, length, 5), "q": (batch, heads, length, 4), "k": (batch, heads, length, 4)}

    def build(emit: Emit, x: relax.Var, q: relax.Var, k: relax.Var, **w: relax.Var) -> list[relax.Expr]:
        scores = emit(R.matmul(q, emit(R.permute_dims(k, [0, 1, 3, 2]))))
        mixed = emit(R.matmul(emit(R.nn.softmax(scores)), values(emit, x, w)))
        if end is not None:
            return end(emit, mixed, w)
        rows = emit(R.permute_dims(mixed, [0, 2, 1, 3]))
        return [emit(R.matmul(emit(R.reshape(rows, (*x.ty.shape.values[:2], heads * size))), w["o"]))]

    everything = {**matrices, "o": random(heads * size, 3)}
    return replace(BASE, module=make_module(shapes, everything, build), params=everything)


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    bias=st.sampled_from(BIASES),
    place=st.integers(0, 2),
    heads=st.integers(1, 3),
    size=st.sampled_from([2, 3, 4, 6, 12, 16]),
    flat=st.booleans(),
    batch=st.sampled_from([1, 2, "batch"]),
)
def test_every_form_is_turned_as_its_heads_are(
    form: str, bias: str, place: int, heads: int, size: int, flat: bool, batch: int | str
) -> None:
    """What values become with turned weights are the turned values."""
    block, parts = size & -size, 1 if form == "alone" else 3
    place %= parts
    n = parts * heads * size
    weight, added = random(5, n), random(n, seed=1)
    spread = {"product": added, "heads": added[: heads * size], "shared": added[:size]}.get(bias)

    def values(emit: Emit, x: relax.Var, w: Mapping[str, relax.Var]) -> relax.Expr:
        rows = [*x.ty.shape.values[:2]]
        product = emit(R.matmul(emit(R.reshape(x, (-1, 5))) if flat else x, w["v"]))
        if spread is not None and bias == "product":
            product = emit(R.add(relax.const(spread), product))
        apart = emit(R.reshape(product, (*rows, heads, 3, size) if form == "inside heads" else (*rows, n)))
        if form == "split":
            apart = emit(relax.TupleGetItem(emit(R.split(apart, 3, -1)), place))
        elif form == "slices":
            width = heads * size
            apart = emit(R.strided_slice(apart, [2], [place * width], [(place + 1) * width]))
        elif form == "inside heads":
            apart = emit(R.squeeze(emit(R.strided_slice(apart, [3], [place], [place + 1])), [3]))
        apart = emit(R.reshape(apart, (*rows, heads, size)))
        if spread is not None and bias != "product":
            apart = emit(R.add(apart, relax.const(spread.reshape(-1, size))))
        return emit(R.permute_dims(apart, [0, 2, 1, 3]))

    model = small(values, {"v": weight}, heads, size, batch=batch)
    turned, (found,) = folded(model, frozenset({VALUE, RESULT}))
    if block == 1:
        assert not found
        return
    assert found == {VALUE, RESULT}
    near(turned.params["o"], hadamard(model.params["o"].T, block).T)

    def of(matrix: Array, vector: Array) -> Array:
        """Heads of values of two tokens."""
        x = random(2, 5).astype(np.float64) @ matrix + (vector if bias == "product" else 0)
        x = x.reshape(2, heads, 3, size)[:, :, place] if form == "inside heads" else np.split(x, parts, 1)[place]
        return x.reshape(2, heads, size) + (0 if bias in ("none", "product") else vector.reshape(-1, size))

    shifts = [np.zeros(1, np.float32) if spread is None else spread, np.zeros(1, np.float32)]
    if spread is not None:
        shifts[1] = vectors(turned, heads * size if bias != "product" else n)[0]
    near(of(turned.params["v"], shifts[1]), hadamard(of(weight, shifts[0]), block))


# What is in the way


def heads_of(emit: Emit, product: relax.Expr) -> relax.Var:
    apart = emit(R.reshape(product, (*product.ty.shape.values[:2], 2, 4)))
    return emit(R.permute_dims(apart, [0, 2, 1, 3]))


def plain(emit: Emit, x: relax.Var, w: Mapping[str, relax.Var]) -> relax.Expr:
    return heads_of(emit, emit(R.matmul(x, w["v"])))


def normed(emit: Emit, x: relax.Var, w: Mapping[str, relax.Var]) -> relax.Expr:
    return emit(R.nn.rms_norm(plain(emit, x, w), relax.const(np.ones(4, np.float32)), [-1]))


def scaled_one_by_one(emit: Emit, x: relax.Var, w: Mapping[str, relax.Var]) -> relax.Expr:
    return heads_of(emit, emit(R.multiply(emit(R.matmul(x, w["v"])), relax.const(random(8)))))


def shared_matrix(emit: Emit, x: relax.Var, w: Mapping[str, relax.Var]) -> relax.Expr:
    twice = emit(R.add(emit(R.matmul(x, w["v"])), emit(R.matmul(emit(R.nn.relu(x)), w["v"]))))
    return heads_of(emit, twice)


def read_twice(emit: Emit, x: relax.Var, w: Mapping[str, relax.Var]) -> relax.Expr:
    product = emit(R.matmul(x, w["v"]))
    return heads_of(emit, emit(R.add(product, emit(R.nn.relu(product)))))


def overlapping(emit: Emit, x: relax.Var, w: Mapping[str, relax.Var]) -> relax.Expr:
    product = emit(R.matmul(x, w["v"]))
    part = emit(R.nn.relu(emit(R.strided_slice(product, [2], [6], [7]))))
    return heads_of(emit, emit(R.add(product, part)))


def tokens_among_heads(emit: Emit, x: relax.Var, w: Mapping[str, relax.Var]) -> relax.Expr:
    product = emit(R.matmul(x, w["v"]))
    batch, length, _ = x.ty.shape.values
    mixed = emit(R.reshape(emit(R.permute_dims(product, [0, 2, 1])), (batch, length, 2, 4)))
    return emit(R.permute_dims(mixed, [0, 2, 1, 3]))


@pytest.mark.parametrize(
    "values",
    [normed, scaled_one_by_one, shared_matrix, read_twice, overlapping, tokens_among_heads],
    ids=lambda function: function.__name__,
)
def test_values_that_need_a_kernel(values: Callable[..., relax.Expr]) -> None:
    model = small(values, {"v": random(5, 8)}, 2, 4)
    turned, (parts,) = folded(model, frozenset({VALUE, RESULT}))
    assert parts == {RESULT}
    assert np.array_equal(turned.params["v"], model.params["v"])


def test_columns_that_nothing_else_reads() -> None:
    """Of a product of which other columns are read elsewhere."""

    def values(emit: Emit, x: relax.Var, w: Mapping[str, relax.Var]) -> relax.Expr:
        product = emit(R.matmul(x, w["v"]))
        emit(R.sigmoid(emit(R.strided_slice(product, [2], [8], [9]))))
        return heads_of(emit, emit(R.strided_slice(product, [2], [0], [8])))

    weight = random(5, 9)
    turned, (parts,) = folded(small(values, {"v": weight}, 2, 4), frozenset({VALUE}))
    assert parts == {VALUE}
    near(turned.params["v"], np.concatenate([hadamard(weight[:, :8], 4), weight[:, 8:]], 1))


def rows_of(emit: Emit, mixed: relax.Var) -> relax.Var:
    rows = emit(R.permute_dims(mixed, [0, 2, 1, 3]))
    batch, length, *_ = rows.ty.shape.values
    return emit(R.reshape(rows, (batch, length, 8)))


def returned(emit: Emit, mixed: relax.Var, w: Mapping[str, relax.Var]) -> list[relax.Expr]:
    rows = rows_of(emit, mixed)
    return [emit(R.matmul(rows, w["o"])), rows]


def normed_result(emit: Emit, mixed: relax.Var, w: Mapping[str, relax.Var]) -> list[relax.Expr]:
    normed = emit(R.nn.rms_norm(rows_of(emit, mixed), relax.const(np.ones(8, np.float32)), [-1]))
    return [emit(R.matmul(normed, w["o"]))]


def summed_over_tokens(emit: Emit, mixed: relax.Var, w: Mapping[str, relax.Var]) -> list[relax.Expr]:
    """There are as many of them as elements."""
    return [emit(R.matmul(emit(R.permute_dims(rows_of(emit, mixed), [0, 2, 1])), w["o"]))]


@pytest.mark.parametrize("end", [returned, normed_result, summed_over_tokens])
def test_results_that_need_a_kernel(end: Callable[..., list[relax.Expr]]) -> None:
    model = small(plain, {"v": random(5, 8)}, 2, 4, length=8, end=end)
    assert folded(model, frozenset({VALUE, RESULT}))[1] == [{VALUE}]


@pytest.mark.parametrize("other", ["q", "v"])
def test_keys_that_are_queries_or_values_too(other: str) -> None:
    """Turned for one of them, they would be turned for the other."""

    def build(emit: Emit, x: relax.Var, given: relax.Var, **w: relax.Var) -> list[relax.Expr]:
        made = plain(emit, x, w)
        operands = {"q": given, "v": given} | {other: made}
        scores = emit(R.matmul(operands["q"], emit(R.permute_dims(made, [0, 1, 3, 2]))))
        return [emit(R.matmul(emit(R.nn.softmax(scores)), operands["v"]))]

    matrices = {"v": random(5, 8)}
    module = make_module({"x": ("batch", "n", 5), "given": ("batch", 2, "n", 4)}, matrices, build)
    assert folded(replace(BASE, module=module, params=matrices))[1] == [frozenset()]


def test_what_is_ternary_already_stays() -> None:
    """As it does in a checkpoint that was quantized before."""
    model = small(plain, {"v": random(5, 8)}, 2, 4)
    ternary = {"v": quantize(model.params["v"].T, "t1a8")}
    turned, (parts,) = folded(replace(model, ternary=ternary), frozenset({VALUE, RESULT}))
    assert parts == {RESULT}
    assert np.array_equal(turned.params["v"], model.params["v"])
