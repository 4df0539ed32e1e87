"""Each call of a compiled model is told whose weights it reads, bound or not."""

from __future__ import annotations

import pytest

from tests.models import llama, mlp
from tvm_ternary.formats import Scheme
from tvm_ternary.graph.importer import import_onnx
from tvm_ternary.graph.passes.ternarize import TernaryLayer
from tvm_ternary.graph.pipeline import lower
from tvm_ternary.quantize import quantize
from tvm_ternary.target import resolve


@pytest.mark.parametrize("bound", [True, False])
def test_ternary_and_float_matrices(bound: bool) -> None:
    imported = import_onnx(mlp((10, 24, 7)))
    first, second = imported.params
    weight = quantize(imported.params[first].T, Scheme.parse("t1a8"), "twn")
    lowered = lower(imported, {first: TernaryLayer(weight, 8)}, resolve("native"), bind_weights=bound)
    found = {layer for layers in lowered.layers.values() for layer in layers}
    assert found == {"", first, second}
    (product,) = (name for name, layers in lowered.layers.items() if first in layers)
    assert lowered.ternary.kernels[product] == "matmul_a8"


def test_equal_layers_share_a_function_and_keep_their_order() -> None:
    imported = import_onnx(llama())
    lowered = lower(imported, {}, resolve("native"), bind_weights=True)
    shared = [layers for layers in lowered.layers.values() if any("down_proj" in layer for layer in layers)]
    down = [layer for layers in shared for layer in layers if "down_proj" in layer]
    assert down == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    named = {layer for layers in lowered.layers.values() for layer in layers if layer}
    assert named >= {*imported.params, *imported.embeddings}
