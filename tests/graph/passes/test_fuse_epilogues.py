"""What joins a product, what stays by itself, and that the compiled whole gives what the parts did."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tests.graph.passes.small_graphs import bindings, compiled, make_module, make_ternary, operators, random
from tvm_ternary.graph.passes.fuse_epilogues import Product, fuse_epilogues
from tvm_ternary.kernels.matmul import EPILOGUES, Epilogue
from tvm_ternary.ops import linear
from tvm_ternary.quantize import quantize

K, N = 48, 20
W = random(K, N)
BIAS = random(N)
Dims = Sequence[int | str]
Emit = Callable[[relax.Expr], relax.Var]
HALF, ONE, ROOT = (relax.const(value, "float32") for value in (0.5, 1.0, 2**0.5))
CUBIC = math.sqrt(2 / math.pi)


def erf_gelu(y: relax.Expr) -> relax.Expr:
    """As torch exports it."""
    return op.multiply(op.multiply(y, op.add(op.erf(op.divide(y, ROOT)), ONE)), HALF)


def tanh_gelu(y: relax.Expr) -> relax.Expr:
    """As torch exports the approximation."""
    cube = op.multiply(op.multiply(op.multiply(y, y), y), relax.const(0.044715, "float32"))
    inner = op.multiply(op.add(y, cube), relax.const(CUBIC, "float32"))
    return op.multiply(op.multiply(y, HALF), op.add(op.tanh(inner), ONE))


def sigmoid_silu(y: relax.Expr) -> relax.Expr:
    """As torch exports it."""
    return op.multiply(y, op.sigmoid(y))


def tanh_gelu_of(y: np.ndarray) -> np.ndarray:
    return 0.5 * y * (1 + np.tanh(CUBIC * (y + 0.044715 * y**3)))


ACTIVATIONS: dict[str, tuple[Callable[[relax.Expr], relax.Expr], Callable[[np.ndarray], np.ndarray]]] = {
    "relu": (op.nn.relu, lambda y: np.maximum(y, 0)),
    "gelu": (erf_gelu, lambda y: 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))),
    "gelu_tanh": (tanh_gelu, tanh_gelu_of),
    "silu": (sigmoid_silu, lambda y: y / (1 + np.exp(-y))),
}


def graph(build: Callable[..., Sequence[relax.Expr]], x: Dims = ("b", "l", K), **inputs: Dims) -> tvm.IRModule:
    """A module of what ``build(emit, y, **inputs)`` makes of ``y = x @ w``."""

    def whole(emit: Emit, x: relax.Expr, w: relax.Expr, **rest: relax.Expr) -> Sequence[relax.Expr]:
        return build(emit, emit(op.matmul(x, w)), **rest)

    return make_module({"x": x, **inputs}, {"w": W}, whole)


def only_product(module: tvm.IRModule) -> Product:
    (product,) = fuse_epilogues(module["main"], {"w"})
    return product


def left_over(module: tvm.IRModule) -> list[str]:
    """Operators that are neither part of a product nor its result."""
    products = fuse_epilogues(module["main"], {"w", "v"})
    gone = {var for product in products for var in (product.result, *product.inner)}
    calls = [(var, value) for var, value in bindings(module) if isinstance(value, relax.Call)]
    return [value.op.name.removeprefix("relax.") for var, value in calls if var not in gone]


def whole_chain(activation: str, *, bias: bool = True, residual: bool = True, swapped: bool = False) -> tvm.IRModule:
    """x @ w, a bias, an activation function, a residual."""

    def build(emit: Emit, y: relax.Var, r: relax.Var) -> list[relax.Expr]:
        def add(*operands: relax.Expr) -> relax.Var:
            return emit(op.add(*(reversed(operands) if swapped else operands)))

        y = add(y, relax.const(BIAS)) if bias else y
        y = emit(ACTIVATIONS[activation][0](y)) if activation else y
        return [add(y, r) if residual else y]

    return graph(build, r=("b", "l", N))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["", *ACTIVATIONS])
def test_everything_that_follows_joins(activation: str, bias: bool, residual: bool, swapped: bool) -> None:
    module = whole_chain(activation, bias=bias, residual=residual, swapped=swapped)
    product = only_product(module)
    assert product.epilogue == Epilogue(bias, activation or None, residual)
    assert left_over(module) == []
    assert product.x.name == "x"
    assert (product.residual.name if product.residual is not None else None) == ("r" if residual else None)


def test_every_activation_function_is_one_that_kernels_have() -> None:
    assert ACTIVATIONS.keys() == EPILOGUES.keys()


@pytest.mark.parametrize(
    ("activation", "scheme"), [*((name, "t2a8g16") for name in ACTIVATIONS), ("gelu", "t2a32g16"), ("gelu", "t2a1")]
)
def test_the_kernel_computes_the_chain(activation: str, scheme: str) -> None:
    ternary = make_ternary(whole_chain(activation), {"w": W}, {"w": scheme})
    relax.analysis.well_formed(ternary.module)
    kernel = "matmul_" + scheme[2:].partition("g")[0]
    functions = [name for name in operators(ternary.module) if name not in ("reshape", f"rows_{kernel[7:]}")]
    assert functions == [f"ternary_{kernel}_{activation}_residual"]
    assert ternary.epilogues == {"w": (Epilogue(True, activation, True),)}
    x, r = random(2, 5, K, seed=1), random(2, 5, N, seed=2)
    (got,) = compiled(ternary)(x, r)
    bits = int(scheme[3:].partition("g")[0])
    y = linear(quantize(W.T, scheme), BIAS, activation_bits=bits)(x).astype(np.float64)
    # y has the same bits. After it come fewer than ten roundings of 6e-8, and an erf that is good to 5e-7, halved.
    assert (np.abs(got - ACTIVATIONS[activation][1](y) - r) <= 1e-6 * (np.abs(y) + np.abs(r))).all()


@pytest.mark.parametrize("x", [(3, K), ("m", K), (2, 5, K), (2, "l", K), (K,)], ids=str)
def test_a_residual_of_any_rank(x: Dims) -> None:
    dims = (*x[:-1], N)
    module = graph(lambda emit, y, r: [emit(op.add(r, emit(op.nn.relu(y))))], x, r=dims)
    ternary = make_ternary(module, {"w": W}, {"w": "t2a32"})
    sizes = [{"m": 4, "l": 3}.get(dim, dim) for dim in dims[:-1]]
    x, r = random(*sizes, K, seed=1), random(*sizes, N, seed=2)
    (got,) = compiled(ternary)(x, r)
    assert got.shape == r.shape
    np.testing.assert_array_equal(got, np.maximum(linear(quantize(W.T, "t2a32"))(x), 0) + r)


def test_reshapes_between_are_looked_through() -> None:
    """GPT-2 as torch exports it: rows flattened, Gemm, rows restored, then the rest."""

    def build(emit: Emit, x: relax.Var, r: relax.Var, w: relax.Var) -> list[relax.Expr]:
        batch, length, _ = x.ty.shape.values
        y = emit(op.matmul(emit(op.reshape(x, (batch * length, K))), w))
        y = emit(op.reshape(emit(op.add(y, relax.const(BIAS))), (batch, length, N)))
        y = emit(op.reshape(emit(sigmoid_silu(y)), (batch * length, N)))
        return [emit(op.add(emit(op.reshape(y, (batch, length, N))), r))]

    ternary = make_ternary(
        make_module({"x": ("b", "l", K), "r": ("b", "l", N)}, {"w": W}, build), {"w": W}, {"w": "t2a32"}
    )
    assert operators(ternary.module) == ["reshape", "reshape", "ternary_matmul_a32_silu_residual", "reshape"]
    x, r = random(2, 5, K, seed=1), random(2, 5, N, seed=2)
    y = linear(quantize(W.T, "t2a32"), BIAS, "silu")(x)
    np.testing.assert_array_equal(compiled(ternary)(x, r)[0], y + r)


def test_a_reshape_that_nothing_follows_stays() -> None:
    module = graph(lambda emit, y: [emit(op.reshape(emit(op.nn.relu(y)), (6, 4, 5)))], (6, K))
    assert only_product(module).activation == "relu"
    assert left_over(module) == ["reshape"]


def test_a_vector_added_to_a_part_of_the_columns_is_no_bias() -> None:
    for dims, length in (((6, 4, 5), 5), ((6 * N, 1), N)):
        vector = relax.const(random(length))
        module = graph(lambda emit, y, d=dims, v=vector: [emit(op.add(emit(op.reshape(y, d)), v))], (6, K))
        assert only_product(module).epilogue == Epilogue()
        assert left_over(module) == ["reshape", "add"]


def test_a_residual_made_after_the_product_is_there_in_time() -> None:
    def build(emit: Emit, y: relax.Var, r: relax.Var) -> list[relax.Expr]:
        return [emit(op.add(y, emit(op.nn.relu(r))))]

    ternary = make_ternary(graph(build, r=("b", "l", N)), {"w": W}, {"w": "t2a32"})
    assert operators(ternary.module)[0] == "nn.relu"
    x, r = random(2, 5, K, seed=1), random(2, 5, N, seed=2)
    (got,) = compiled(ternary)(x, r)
    np.testing.assert_array_equal(got, linear(quantize(W.T, "t2a32"))(x) + np.maximum(r, 0))


def test_one_of_two_products_takes_their_sum() -> None:
    v = random(K, N, seed=9)

    def build(emit: Emit, x: relax.Var, w: relax.Var, v: relax.Var) -> list[relax.Expr]:
        left, right = emit(op.matmul(x, w)), emit(op.nn.relu(emit(op.matmul(x, v))))
        return [emit(op.add(left, right))]

    params = {"w": W, "v": v}
    module = make_module({"x": ("m", K)}, params, build)
    first, second = fuse_epilogues(module["main"], params)
    assert (first.matrix, first.residual) == ("w", second.result)
    assert (second.matrix, second.activation, second.residual) == ("v", "relu", None)
    assert left_over(module) == []
    ternary = make_ternary(module, params, dict.fromkeys(params, "t2a32"))
    x = random(3, K, seed=1)
    ours = [linear(quantize(m.T, "t2a32"))(x) for m in (W, v)]
    np.testing.assert_array_equal(compiled(ternary)(x)[0], ours[0] + np.maximum(ours[1], 0))


def test_a_matrix_used_twice_has_an_epilogue_for_each_use() -> None:
    def build(emit: Emit, x: relax.Var, w: relax.Var) -> list[relax.Expr]:
        return [emit(op.nn.relu(emit(op.matmul(x, w)))), emit(op.add(emit(op.matmul(x, w)), relax.const(BIAS)))]

    ternary = make_ternary(make_module({"x": ("m", K)}, {"w": W}, build), {"w": W}, {"w": "t2a32"})
    assert ternary.epilogues == {"w": (Epilogue(activation="relu"), Epilogue(bias=True))}


@pytest.mark.parametrize("r", [(1, N), ("m", 1), (N,), (1, 1), (), ("other", N), (1, "m", N)], ids=str)
def test_what_is_broadcast_is_no_residual(r: Dims) -> None:
    module = graph(lambda emit, y, r: [emit(op.add(y, r))], ("m", K), r=r)
    assert only_product(module).epilogue == Epilogue()
    assert left_over(module) == ["add"]


@pytest.mark.parametrize("dims", [(1, N), (3, 1), (1,), (1, 1), (1, 1, N)], ids=str)
def test_a_constant_that_is_broadcast_is_neither_bias_nor_residual(dims: tuple[int, ...]) -> None:
    module = graph(lambda emit, y: [emit(op.add(y, relax.const(random(*dims))))], (3, K))
    assert only_product(module).epilogue == Epilogue()


def test_a_constant_of_the_same_shape_is_a_residual() -> None:
    module = graph(lambda emit, y: [emit(op.add(y, relax.const(random(3, N))))], (3, K))
    assert only_product(module).epilogue == Epilogue(residual=True)


def test_a_product_that_is_broadcast_takes_no_residual() -> None:
    module = graph(lambda emit, y, r: [emit(op.add(y, r))], (1, K), r=("m", N))
    assert only_product(module).epilogue == Epilogue()


def bare_module(r: relax.Var, build: Callable[[relax.BlockBuilder, relax.Var], relax.Expr]) -> tvm.IRModule:
    """A module that returns what ``build(builder, x @ w)`` does, without a tuple around it."""
    x, w = (relax.Var(name, relax.TensorType(dims, "float32")) for name, dims in (("x", (3, K)), ("w", (K, N))))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, r, w]):
        with builder.dataflow():
            result = build(builder, builder.emit_output(op.matmul(x, w)))
        builder.emit_func_output(result)
    return builder.get()


def test_a_residual_of_unknown_shape_stays_apart() -> None:
    r = relax.Var("r", relax.TensorType(ndim=2, dtype="float32"))
    module = bare_module(r, lambda builder, y: builder.emit_output(op.add(y, r)))
    assert only_product(module).epilogue == Epilogue()


def test_a_reshape_to_a_shape_that_is_computed_is_not_looked_through() -> None:
    dims = relax.Var("r", relax.ShapeType(ndim=2))
    module = bare_module(dims, lambda builder, y: builder.emit_output(op.nn.relu(builder.emit(op.reshape(y, dims)))))
    assert only_product(module).epilogue == Epilogue()


def test_an_activation_whose_shape_is_checked_stays_apart() -> None:
    r = relax.Var("r", relax.TensorType((3, N), "float32"))

    def build(builder: relax.BlockBuilder, y: relax.Var) -> relax.Expr:
        return builder.emit_output(op.exp(builder.match_cast(op.nn.relu(y), relax.TensorType((3, N), "float32"))))

    assert only_product(bare_module(r, build)).epilogue == Epilogue()


def test_what_the_caller_gets_is_not_taken_away() -> None:
    r = relax.Var("r", relax.TensorType((3, N), "float32"))
    module = bare_module(r, lambda builder, y: relax.Tuple([builder.emit_output(op.add(y, r)), y]))
    assert only_product(module).epilogue == Epilogue()
    module = bare_module(r, lambda builder, y: builder.emit_output(op.add(y, r)))
    assert only_product(module).epilogue == Epilogue(residual=True)


@pytest.mark.parametrize(
    "build",
    [
        lambda emit, y: [y, emit(op.nn.relu(y))],
        lambda emit, y: [emit(op.add(y, y))],
        lambda emit, y: [emit(op.add(y, emit(op.nn.relu(y))))],
        lambda emit, y: [emit(op.nn.relu(y)), emit(op.exp(y))],
        lambda emit, y: [emit(op.add(y, relax.const(BIAS))), emit(op.add(y, relax.const(BIAS)))],
        lambda emit, y: [emit(op.multiply(y, s := emit(op.sigmoid(y)))), s],
        lambda emit, y: [emit(op.multiply(emit(op.sigmoid(y)), emit(op.exp(y))))],
        lambda emit, y: [emit(op.multiply(y, emit(op.sigmoid(emit(op.reshape(y, (3, N)))))))],
    ],
    ids=[
        "is an output",
        "is added to itself",
        "is added to its own activation",
        "is read by another operator",
        "has two biases",
        "has a part that is an output",
        "becomes something else",
        "is reshaped half way",
    ],
)
def test_a_product_that_others_need_stays_as_it_is(build: Callable[..., Sequence[relax.Expr]]) -> None:
    assert only_product(graph(build, (3, K))).epilogue == Epilogue()


def test_a_biased_product_that_others_need_keeps_its_bias() -> None:
    def build(emit: Emit, y: relax.Var) -> list[relax.Expr]:
        y = emit(op.add(y, relax.const(BIAS)))
        return [emit(op.nn.relu(y)), emit(op.exp(y))]

    module = graph(build)
    assert only_product(module).epilogue == Epilogue(bias=True)
    assert left_over(module) == ["nn.relu", "exp"]


def test_only_the_first_of_two_activations_and_of_two_residuals_joins() -> None:
    def build(emit: Emit, y: relax.Var, r: relax.Var) -> list[relax.Expr]:
        y = emit(op.nn.relu(emit(sigmoid_silu(y))))
        return [emit(op.add(emit(op.add(y, r)), r))]

    module = graph(build, r=("b", "l", N))
    assert only_product(module).epilogue == Epilogue(activation="silu")
    assert left_over(module) == ["nn.relu", "add", "add"]


def test_what_comes_in_another_order_stays_apart() -> None:
    def build(emit: Emit, y: relax.Var, r: relax.Var) -> list[relax.Expr]:
        return [emit(op.add(emit(op.nn.relu(emit(op.add(y, r)))), relax.const(BIAS)))]

    module = graph(build, r=("b", "l", N))
    assert only_product(module).epilogue == Epilogue(residual=True)
    assert left_over(module) == ["nn.relu", "add"]


def test_an_activation_with_a_constant_of_higher_rank_stays_apart() -> None:
    def build(emit: Emit, y: relax.Var) -> list[relax.Expr]:
        return [
            emit(op.multiply(emit(op.multiply(y, emit(op.sigmoid(y)))), relax.const(np.ones((1, 1, 1), np.float32))))
        ]

    assert only_product(graph(build, (3, K))).activation == "silu"

    def raised(emit: Emit, y: relax.Var) -> list[relax.Expr]:
        half = relax.const(np.full((1, 1, 1), 0.5, np.float32))
        return [emit(op.multiply(op.multiply(y, op.add(op.erf(op.divide(y, ROOT)), ONE)), half))]

    assert only_product(graph(raised, (3, K))).activation is None


def test_matrices_that_are_not_asked_for_are_left_alone() -> None:
    module = whole_chain("relu")
    assert fuse_epilogues(module["main"], {"v"}) == []
    assert make_ternary(module, {"w": W}, {}).epilogues == {}
