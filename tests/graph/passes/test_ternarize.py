"""Which multiplications become ternary, what they take along, and what is left as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tests.graph.passes.small_graphs import compiled, make_module, make_ternary, operands, operators, random
from tvm_ternary.graph.fuse import lower_graph_ops
from tvm_ternary.graph.passes.ternarize import TernaryLayer
from tvm_ternary.kernels.table import KERNELS
from tvm_ternary.ops import linear
from tvm_ternary.quantize import quantize

K, N = 48, 20
W = random(K, N)
BIAS = random(N)
SCHEMES = ("t2a32g16", "t2a8g16", "t2a1")


def expected(x: np.ndarray, matrix: np.ndarray, scheme: str, bias: np.ndarray | None = None) -> np.ndarray:
    """The operator that is tested by itself, on the same weight."""
    bits = int(scheme.partition("a")[2].partition("g")[0])
    return linear(quantize(matrix.T, scheme), bias, activation_bits=bits)(x)


def one_matmul(x: Sequence[int | str], bias: Any = None, swapped: bool = False) -> tvm.IRModule:
    """``x @ w``, and a constant added to it."""

    def build(emit: Any, x: relax.Expr, w: relax.Expr) -> list[relax.Expr]:
        y = emit(op.matmul(x, w))
        if bias is None:
            return [y]
        parts = [y, relax.const(bias)]
        return [emit(op.add(*(reversed(parts) if swapped else parts)))]

    return make_module({"x": x}, {"w": W}, build)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("shape", "concrete"),
    [
        (("m", K), (3, K)),
        ((3, K), (3, K)),
        (("batch", "length", K), (2, 5, K)),
        ((2, "length", K), (2, 5, K)),
        ((2, 5, K), (2, 5, K)),
        (("a", 2, "b", K), (2, 2, 3, K)),
        ((K,), (K,)),
    ],
    ids=str,
)
def test_a_matmul_of_any_rank_becomes_ternary(
    shape: tuple[int | str, ...], concrete: tuple[int, ...], scheme: str
) -> None:
    ternary = make_ternary(one_matmul(shape, BIAS), {"w": W}, {"w": scheme})
    relax.analysis.well_formed(ternary.module)
    assert "matmul" not in operators(ternary.module)
    x = random(*concrete, seed=1)
    (y,) = compiled(ternary)(x)
    assert y.shape == (*concrete[:-1], N)
    np.testing.assert_array_equal(y, expected(x, W, scheme, BIAS))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_compiled_module_takes_any_number_of_rows(scheme: str) -> None:
    main = compiled(make_ternary(one_matmul(("batch", "length", K)), {"w": W}, {"w": scheme}))
    for shape in ((1, 1, K), (1, 9, K), (4, 3, K), (2, 0, K)):
        x = random(*shape, seed=2)
        (y,) = main(x)
        np.testing.assert_array_equal(y, expected(x, W, scheme))


@pytest.mark.parametrize(("shape", "rows"), [((3, K), "3"), ((2, 5, K), "10"), (("m", K), "M"), ((2, "m", K), "M")])
def test_the_kernel_knows_the_number_of_rows_where_the_graph_does(shape: tuple[int | str, ...], rows: str) -> None:
    module = make_ternary(one_matmul(shape), {"w": W}, {"w": "t1a32g16"}).module
    assert str(module["ternary_matmul_a32"].params[0].shape[0]) == rows


def test_float_rows_are_read_as_they_are_where_nothing_is_padded() -> None:
    assert operators(make_ternary(one_matmul(("m", K)), {"w": W}, {"w": "t1a32g16"}).module) == ["ternary_matmul_a32"]
    assert operators(make_ternary(one_matmul(("m", K)), {"w": W}, {"w": "t1a32g20"}).module) == [
        "rows_a32",
        "ternary_matmul_a32",
    ]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_bias_is_added_by_the_kernel(swapped: bool) -> None:
    ternary = make_ternary(one_matmul(("m", K), BIAS, swapped), {"w": W}, {"w": "t1a8"})
    assert operators(ternary.module) == ["rows_a8", "ternary_matmul_a8"]
    ((*_, bias),) = operands(ternary.module, "ternary_matmul_a8")
    np.testing.assert_array_equal(bias.value.numpy(), BIAS)


@pytest.mark.parametrize(
    "bias",
    [random(1, N), random(1), random(4, 1), np.float32(1), np.zeros((1, 1, N), np.float32)],
    ids=lambda bias: str(np.shape(bias)),
)
def test_a_constant_of_another_shape_is_added_by_itself(bias: np.ndarray) -> None:
    ternary = make_ternary(one_matmul((4, K), bias), {"w": W}, {"w": "t1a32"})
    assert operators(ternary.module) == ["ternary_matmul_a32", "add"]
    x = random(4, K, seed=3)
    np.testing.assert_allclose(compiled(ternary)(x)[0], expected(x, W, "t1a32") + bias, rtol=1e-6)


def test_what_is_no_constant_is_added_by_itself() -> None:
    def build(emit: Any, x: relax.Expr, b: relax.Expr, w: relax.Expr) -> list[relax.Expr]:
        return [emit(op.add(emit(op.matmul(x, w)), b))]

    ternary = make_ternary(make_module({"x": ("m", K), "b": (N,)}, {"w": W}, build), {"w": W}, {"w": "t1a32"})
    assert operators(ternary.module) == ["ternary_matmul_a32", "add"]


def test_a_product_used_twice_keeps_its_bias_apart() -> None:
    def build(emit: Any, x: relax.Expr, w: relax.Expr) -> list[relax.Expr]:
        y = emit(op.matmul(x, w))
        return [emit(op.add(y, relax.const(BIAS))), emit(op.nn.relu(y))]

    ternary = make_ternary(make_module({"x": ("m", K)}, {"w": W}, build), {"w": W}, {"w": "t1a32"})
    assert operators(ternary.module) == ["ternary_matmul_a32", "add", "nn.relu"]
    x = random(3, K, seed=4)
    y = expected(x, W, "t1a32")
    got = compiled(ternary)(x)
    np.testing.assert_array_equal(got[0], y + BIAS)
    np.testing.assert_array_equal(got[1], np.maximum(y, 0))


def test_a_product_that_is_also_an_output_keeps_its_bias_apart() -> None:
    def build(emit: Any, x: relax.Expr, w: relax.Expr) -> list[relax.Expr]:
        y = emit(op.matmul(x, w))
        return [y, emit(op.add(y, relax.const(BIAS)))]

    ternary = make_ternary(make_module({"x": ("m", K)}, {"w": W}, build), {"w": W}, {"w": "t1a32"})
    x = random(3, K, seed=4)
    y = expected(x, W, "t1a32")
    got = compiled(ternary)(x)
    np.testing.assert_array_equal(got[0], y)
    np.testing.assert_array_equal(got[1], y + BIAS)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_used_twice_is_packed_once(scheme: str) -> None:
    def build(emit: Any, x: relax.Expr, z: relax.Expr, w: relax.Expr) -> list[relax.Expr]:
        return [emit(op.matmul(x, w)), emit(op.add(emit(op.matmul(z, w)), relax.const(BIAS)))]

    ternary = make_ternary(make_module({"x": ("m", K), "z": (2, K)}, {"w": W}, build), {"w": W}, {"w": scheme})
    layer = TernaryLayer(quantize(W.T, scheme), int(scheme[3:].partition("g")[0]))
    packed = layer.kernel.pack(layer.weight)
    assert list(ternary.params) == [f"w.{part}" for part in packed]
    for part, array in packed.items():
        np.testing.assert_array_equal(ternary.params[f"w.{part}"], array)
    assert [var.name for var in ternary.module["main"].params] == ["x", "z", *ternary.params]
    x, z = random(3, K, seed=5), random(2, K, seed=6)
    got = compiled(ternary)(x, z)
    np.testing.assert_array_equal(got[0], expected(x, W, scheme))
    np.testing.assert_array_equal(got[1], expected(z, W, scheme, BIAS))


def attention_like(schemes: dict[str, str]) -> tvm.IRModule:
    """One input multiplied by three matrices, one of them wider, and the module after the operators were lowered."""
    params = {"q": random(K, N, seed=1), "k": random(K, N, seed=2), "v": random(K, 3 * N, seed=3)}

    def build(emit: Any, x: relax.Expr, **weights: relax.Expr) -> list[relax.Expr]:
        h = emit(op.nn.relu(x))
        return [emit(op.matmul(h, weight)) for weight in weights.values()]

    ternary = make_ternary(make_module({"x": ("b", "l", K)}, params, build), params, schemes)
    return lower_graph_ops(ternary.module)


@pytest.mark.parametrize("scheme", ["t1a32g20", "t1a8", "t1a8g16", "t1a1"])
def test_activations_that_several_matrices_read_are_prepared_once(scheme: str) -> None:
    names = operators(attention_like(dict.fromkeys("qkv", scheme)))
    assert sum(name.startswith("rows_") for name in names) == 1
    assert sum(name.startswith("ternary_") for name in names) == 3


def test_activations_are_prepared_once_for_each_way_they_are_read() -> None:
    names = operators(attention_like({"q": "t1a8g16", "k": "t2a8g16", "v": "t1a8g24"}))
    assert sum(name.startswith("rows_") for name in names) == 2
    names = operators(attention_like({"q": "t1a8", "k": "t1a1", "v": "t1a32"}))
    assert sorted(name.partition("_a")[2] for name in names if name.startswith("rows_")) == ["1", "8"]


def attention(heads: int, scheme: str) -> tvm.IRModule:
    """An attention layer as torch exports it, lowered: three projections with biases, heads, an output projection."""
    params = {name: random(K, K, seed=i) for i, name in enumerate("qkvo")}

    def build(emit: Any, x: relax.Var, q: relax.Var, k: relax.Var, v: relax.Var, o: relax.Var) -> list[relax.Expr]:
        batch, length, _ = x.ty.shape.values
        h = emit(op.nn.relu(x))

        def project(weight: relax.Var, axes: list[int]) -> relax.Var:
            y = emit(op.add(emit(op.matmul(h, weight)), relax.const(random(K))))
            return emit(op.permute_dims(emit(op.reshape(y, (batch, length, heads, K // heads))), axes))

        scores = emit(op.nn.softmax(emit(op.matmul(project(q, [0, 2, 1, 3]), project(k, [0, 2, 3, 1])))))
        y = emit(op.permute_dims(emit(op.matmul(scores, project(v, [0, 2, 1, 3]))), [0, 2, 1, 3]))
        y = emit(op.matmul(emit(op.reshape(y, (batch, length, K))), o))
        return [emit(op.add(emit(op.add(y, relax.const(random(K)))), h))]

    ternary = make_ternary(make_module({"x": ("b", "l", K)}, params, build), params, dict.fromkeys(params, scheme))
    return lower_graph_ops(ternary.module)


@pytest.mark.parametrize("scheme", ["t2a8g16", "t1a1"])
def test_queries_keys_and_values_share_one_quantization_of_their_activations(scheme: str) -> None:
    names = operators(attention(4, scheme))
    kind = scheme[2:].partition("g")[0]
    assert sorted(name for name in names if name.startswith(("rows", "ternary"))) == [
        *[f"rows_{kind}"] * 2,
        *[f"ternary_matmul_{kind}"] * 3,
        f"ternary_matmul_{kind}_residual",
    ]
    # The rows of the three are prepared before the first of them is multiplied, and not again.
    assert names.index(f"rows_{kind}") < names.index(f"ternary_matmul_{kind}")


def test_matrices_of_one_size_share_a_function() -> None:
    module = attention_like(dict.fromkeys("qkv", "t1a8"))
    functions = {var.name_hint for var in module.get_global_vars() if var.name_hint.startswith("ternary_")}
    assert len(functions) == 2


def test_matrices_that_the_plan_leaves_stay_float() -> None:
    params = {"a": random(K, K, seed=1), "b": random(K, N, seed=2), "c": random(N, N, seed=3)}

    def build(emit: Any, x: relax.Expr, a: relax.Expr, b: relax.Expr, c: relax.Expr) -> list[relax.Expr]:
        h = emit(op.nn.relu(emit(op.add(emit(op.matmul(x, a)), relax.const(random(K))))))
        y = emit(op.add(emit(op.matmul(h, b)), relax.const(BIAS)))
        return [emit(op.matmul(y, c)), emit(op.matmul(y, emit(op.permute_dims(y))))]

    ternary = make_ternary(make_module({"x": ("m", K)}, params, build), params, {"b": "t2a32"})
    assert operators(ternary.module) == [
        "matmul",
        "add",
        "nn.relu",
        "ternary_matmul_a32",
        "matmul",
        "permute_dims",
        "matmul",
    ]
    assert list(ternary.params) == ["a", "c", "b.codes", "b.scale"]
    assert [var.name for var in ternary.module["main"].params] == ["x", *ternary.params]
    for name in ("a", "c"):
        np.testing.assert_array_equal(ternary.params[name], params[name])
    x = random(3, K, seed=7)
    h = np.maximum(x @ params["a"] + random(K), 0)
    y = expected(h, params["b"], "t2a32", BIAS)
    got = compiled(ternary)(x)
    for ours, exact in zip(got, (y @ params["c"], y @ y.T), strict=True):
        assert np.linalg.norm(ours - exact) <= 1e-6 * np.linalg.norm(exact)


def test_nothing_to_replace_changes_nothing() -> None:
    module = one_matmul(("m", K), BIAS)
    ternary = make_ternary(module, {"w": W}, {})
    tvm.ir.assert_structural_equal(ternary.module, module)
    assert ternary.kernels == {}
    assert ternary.sources == {}


def test_the_module_it_was_given_is_not_changed() -> None:
    module = one_matmul(("m", K), BIAS)
    text = module.script()
    make_ternary(module, {"w": W}, {"w": "t1a8"})
    assert module.script() == text


@pytest.mark.parametrize("bits", KERNELS)
def test_it_says_which_function_is_which_kernel(bits: int) -> None:
    ternary = make_ternary(one_matmul(("m", K)), {"w": W}, {"w": f"t1a{bits}g24"})
    name = KERNELS[bits].matmul.name
    assert ternary.kernels == {f"rows_a{bits}": f"rows_a{bits}", f"ternary_{name}": name}
    assert list(ternary.sources) == [f"ternary_{name}"]
    assert ternary.sources[f"ternary_{name}"].endswith(f"/{name}.toml")
    functions = {var.name_hint for var, f in ternary.module.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}
    assert functions == set(ternary.kernels)


def test_a_layer_knows_its_packed_size() -> None:
    layer = TernaryLayer(quantize(W.T, "t3a8g20"), 8)
    assert layer.packed_bytes == sum(array.nbytes for array in layer.kernel.pack(layer.weight).values())
    assert str(layer.scheme) == "t3a8g20"
