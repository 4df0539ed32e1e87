"""Transforms of inputs: where they go, what they share, and that the products stay what they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tests.ternary_matmul import NATIVE, UNIT
from tvm_ternary.build.executable import build_executable
from tvm_ternary.errors import LayoutError
from tvm_ternary.formats.hadamard import hadamard
from tvm_ternary.formats.transform import InputTransform
from tvm_ternary.graph.fuse import lower_graph_ops
from tvm_ternary.graph.passes.transform_inputs import transform_inputs
from tvm_ternary.schedule.cpu import schedule_module
from tvm_ternary.target import resolve

from .small_graphs import Array, bindings, make_module, operators, random

K, N = 40, 12
X = random(2, 3, K)
W = {name: random(K, N, seed=seed) for seed, name in enumerate(("q", "k", "v"))}
GAMMA, BETA = random(K, seed=7) + 3, random(K, seed=8)
GPU = resolve("cuda-sm_90")
INPUT = {"x": ("batch", "length", K)}


def a_scale(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.25, 4, K).astype(np.float32)


def run(module: tvm.IRModule, *arrays: Array) -> list[Array]:
    scheduled, _ = schedule_module(lower_graph_ops(module), tvm.target.Target(NATIVE.tvm))
    main = relax.VirtualMachine(build_executable(scheduled, NATIVE.tvm), tvm.cpu())["main"]
    return [out.numpy() for out in main(*map(tvm.runtime.tensor, arrays))]


def constants(module: tvm.IRModule, operator: str) -> list[Array]:
    """The constants that operators of a name read."""
    return [
        part.value.numpy()
        for _, value in bindings(module)
        if isinstance(value, relax.Call) and value.op.name == f"relax.{operator}"
        for part in value.args
        if isinstance(part, tvm.ir.GenericConst)
    ]


def one(emit: Any, x: Any, q: Any) -> list[Any]:
    return [emit(op.matmul(x, q))]


TRANSFORMS = {
    "scale": InputTransform(a_scale()),
    "rotation": InputTransform(None, 8),
    "rotation with a tail": InputTransform(None, 16),
    "one whole block": InputTransform(None, 32),
    "both": InputTransform(a_scale(), 4),
    "a block longer than K": InputTransform(a_scale(), 64),
}


def roundings(transform: InputTransform, target: Any) -> float:
    """Of what a transform makes, norm against norm: one for the scale and for each butterfly; a product by a matrix
    H of c rows has c of them in sums of sizes that are sqrt(c) times as large, in all at most twice the block.
    """
    if transform.rotation is None:
        return 1
    return 3 + (2 * transform.rotation if target is GPU else np.log2(transform.rotation))


@pytest.mark.parametrize("target", [NATIVE, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_product_is_what_it_was(name: str, target: Any) -> None:
    """Up to the roundings of the inputs, one of the weights, and K in the product; by Cauchy's inequality a sum of
    sizes is at most the product of lengths. What the GPU's operators compute is looked at on the CPU.
    """
    transform, w = TRANSFORMS[name], W["q"].astype(np.float64)
    module = transform_inputs(make_module(INPUT, {"q": W["q"]}, one), {"q": transform}, target)
    weight = np.ascontiguousarray(transform.weight(w.T).T)
    (got,) = run(module, X, weight.astype(np.float32))
    scale = np.ones(K) if transform.scale is None else transform.scale.astype(np.float64)
    sizes = np.linalg.norm(X * scale, axis=-1)[..., None] * np.linalg.norm(w.T / scale, axis=-1)
    assert (np.abs(got - X.astype(np.float64) @ w) <= (roundings(transform, target) + 1 + K) * UNIT * sizes).all()


def test_the_kernel_and_the_products_are_the_reference() -> None:
    def rotated(target: Any) -> Array:
        module = transform_inputs(make_module(INPUT, {"q": np.eye(K, dtype=np.float32)}, one), {"q": transform}, target)
        return run(module, X, np.eye(K, dtype=np.float32))[0]

    for block in (2, 8, 32):
        transform = InputTransform(a_scale(), block)
        want = hadamard(X.astype(np.float64) * a_scale(), block)
        for target in (NATIVE, GPU):
            np.testing.assert_allclose(rotated(target), want, rtol=0, atol=1e-5)


def three(emit: Any, x: Any, **matrices: Any) -> list[Any]:
    return [emit(op.matmul(x, matrix)) for matrix in matrices.values()]


def test_equal_transforms_of_one_input_are_one() -> None:
    transforms = {
        "q": InputTransform(a_scale(), 8),
        "k": InputTransform(a_scale(), 8),
        "v": InputTransform(a_scale(1), 8),
    }
    module = transform_inputs(make_module(INPUT, W, three), transforms, NATIVE)
    assert operators(module).count("multiply") == operators(module).count("hadamard_rows") == 2
    assert operators(module).count("matmul") == 3


def layer_norm(emit: Any, x: Any) -> Any:
    return emit(op.nn.layer_norm(x, relax.const(GAMMA), relax.const(BETA), [-1], 1e-5))


def rms_norm(emit: Any, x: Any) -> Any:
    root = emit(op.sqrt(emit(op.mean(emit(op.multiply(x, x)), [-1], keepdims=True))))
    return emit(op.multiply(relax.const(GAMMA), emit(op.divide(x, root))))


def spelled_norm(emit: Any, x: Any) -> Any:
    centred = emit(op.subtract(x, emit(op.mean(x, [-1], keepdims=True))))
    root = emit(op.sqrt(emit(op.mean(emit(op.multiply(centred, centred)), [-1], keepdims=True))))
    return emit(op.add(emit(op.multiply(emit(op.divide(centred, root)), relax.const(GAMMA))), relax.const(BETA)))


def in_rows(norm: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda emit, x: emit(op.reshape(norm(emit, x), (-1, K)))


NORMS: Mapping[str, tuple[Callable[[Any, Any], Any], list[str]]] = {
    "layer norm": (layer_norm, ["nn.layer_norm"]),
    "rms norm": (lambda emit, x: emit(op.nn.rms_norm(x, relax.const(GAMMA), [-1], 1e-5)), ["nn.rms_norm"]),
    "spelled rms norm": (rms_norm, ["multiply"]),
    "spelled layer norm": (spelled_norm, ["multiply", "add"]),
    "layer norm in rows": (in_rows(layer_norm), ["nn.layer_norm"]),
}


def normed(norm: Callable[[Any, Any], Any], more: Callable[..., Sequence[Any]] = lambda emit, x: []) -> Any:
    def build(emit: Any, x: Any, **matrices: Any) -> list[Any]:
        y = norm(emit, x)
        return [*(emit(op.matmul(y, matrix)) for matrix in matrices.values()), *more(emit, y)]

    return build


@pytest.mark.parametrize("name", NORMS)
def test_a_scale_goes_into_the_norm_that_only_such_matrices_read(name: str) -> None:
    norm, scaled = NORMS[name]
    before = make_module(INPUT, W, normed(norm))
    transform = InputTransform(a_scale())
    module = transform_inputs(before, dict.fromkeys(W, transform), NATIVE)
    assert operators(module) == operators(before)
    assert all(
        any(np.array_equal(c, v * a_scale()) for v in (GAMMA, BETA)) for o in scaled for c in constants(module, o)
    )
    weights = [np.ascontiguousarray(transform.weight(w.T).T) for w in W.values()]
    for got, want in zip(run(module, X, *weights), run(before, X, *W.values()), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    ("build", "transforms"),
    [
        # Another scale, none, or a reader that is no matrix: a residual, the model's caller.
        (
            normed(layer_norm),
            {"q": InputTransform(a_scale()), "k": InputTransform(a_scale()), "v": InputTransform(a_scale(1))},
        ),
        (normed(layer_norm), {"q": InputTransform(a_scale()), "k": InputTransform(a_scale())}),
        (normed(layer_norm, lambda emit, y: [emit(op.exp(y))]), dict.fromkeys(W, InputTransform(a_scale()))),
        (normed(layer_norm, lambda emit, y: [y]), dict.fromkeys(W, InputTransform(a_scale()))),
        (
            normed(in_rows(layer_norm), lambda emit, y: [emit(op.reshape(y, (-1,)))]),
            dict.fromkeys(W, InputTransform(a_scale())),
        ),
        (normed(lambda emit, x: emit(op.exp(x))), dict.fromkeys(W, InputTransform(a_scale()))),
    ],
)
def test_what_others_read_is_scaled_behind_the_norm(build: Any, transforms: dict[str, InputTransform]) -> None:
    before = make_module(INPUT, W, build)
    module = transform_inputs(before, transforms, NATIVE)
    distinct = len({transform.key for transform in transforms.values()})
    assert operators(module).count("multiply") == operators(before).count("multiply") + distinct
    weights = [
        np.ascontiguousarray(transforms[name].weight(w.T).T) if name in transforms else w for name, w in W.items()
    ]
    for got, want in zip(run(module, X, *weights), run(before, X, *W.values()), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_model_without_transforms_stays_as_it_is() -> None:
    module = make_module(INPUT, W, three)
    assert transform_inputs(module, {}, NATIVE).same_as(module)
    assert transform_inputs(module, {"q": InputTransform()}, NATIVE).same_as(module)


def test_a_scale_of_another_length_is_refused() -> None:
    with pytest.raises(LayoutError, match="q: input scale has 3 elements, in_features is 40"):
        transform_inputs(make_module(INPUT, W, three), {"q": InputTransform(np.ones(3, np.float32))}, NATIVE)
