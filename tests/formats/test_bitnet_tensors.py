"""A checkpoint in BitNet's layouts, in memory, as the tensors that it stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tvm_ternary.errors import LayoutError, ModelError
from tvm_ternary.formats import PerTensor, TernaryTensor
from tvm_ternary.formats.bitnet import Scaling, pack_bitnet
from tvm_ternary.formats.bitnet_tensors import BitnetTensors
from tvm_ternary.formats.tensor_files import TernaryTensors

TRITS = np.random.default_rng(0).integers(-1, 2, (1, 8, 5), dtype=np.int8)
TENSOR = TernaryTensor.from_trits(TRITS, np.full((1, 1, 1), 0.5, np.float32), PerTensor())
PACKED = pack_bitnet(TENSOR, Scaling.MULTIPLY)[0]
HALF = np.array([0.5], np.float32)


class Stored:
    """Tensors in memory."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    def names(self) -> tuple[str, ...]:
        return tuple(self.arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def dtype(self, name: str) -> str:
        return self.arrays[name].dtype.name

    def load(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def where(self, name: str) -> str:
        return f"memory: {name}"


def tensors(arrays: dict[str, np.ndarray], **settings: Any) -> BitnetTensors:
    return BitnetTensors(Stored(arrays), {"linear_class": "autobitlinear", **settings})


def test_packed_matrices_stand_for_what_they_hold() -> None:
    found = tensors({"a.weight": PACKED, "a.weight_scale": HALF, "norm.weight": np.ones(5, np.float32)})
    assert isinstance(found, TernaryTensors)
    assert found.names() == ("a.weight", "norm.weight")
    assert (found.shape("a.weight"), found.shape("norm.weight")) == ((8, 5), (5,))
    assert found.dtype("a.weight") == found.dtype("norm.weight") == "float32"
    assert found.where("a.weight") == "memory: a.weight"
    assert list(found.ternary) == ["a.weight"]
    np.testing.assert_array_equal(found.load("a.weight"), TRITS[0] * 0.5)
    np.testing.assert_array_equal(found.load("norm.weight"), np.ones(5))


@pytest.mark.parametrize("weight", [PACKED, TRITS[0].astype(np.float32)], ids=["packed", "floats"])
@pytest.mark.parametrize(("linear_class", "scale"), [("autobitlinear", 0.5), ("bitlinear", 2.0)])
def test_what_a_scale_means(weight: np.ndarray, linear_class: str, scale: float) -> None:
    tensor = tensors({"a.weight": weight, "a.weight_scale": HALF}, linear_class=linear_class).ternary["a.weight"]
    assert tensor.scale.item() == scale
    np.testing.assert_array_equal(tensor.trits(), TRITS)


def test_online_takes_linear_layers_alone() -> None:
    names = ("q_proj.weight", "up_proj.weight", "embed_tokens.weight", "lm_head.weight")
    arrays = {name: np.random.default_rng(1).standard_normal((8, 5)).astype(np.float32) for name in names}
    assert list(tensors(arrays, quantization_mode="online").ternary) == ["q_proj.weight", "up_proj.weight"]
    kept = tensors(arrays, quantization_mode="online", modules_to_not_convert=["up"])
    assert list(kept.ternary) == ["q_proj.weight"]
    np.testing.assert_array_equal(kept.load("up_proj.weight"), arrays["up_proj.weight"])
    assert not tensors(arrays).ternary


def test_nothing_is_read_before_it_is_asked_for() -> None:
    found = tensors({"a.weight": np.full((2, 5), 0xFF, np.uint8), "a.weight_scale": HALF})
    with pytest.raises(LayoutError, match=r"memory: a\.weight: holds the code 3"):
        found.ternary["a.weight"]


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
@pytest.mark.parametrize("scale", [[0.0], [-1.0], [np.inf], [np.nan], [1.0, 1.0]], ids=str)
def test_a_scale_that_is_none_is_named(linear_class: str, scale: list[float]) -> None:
    for weight in (PACKED, TRITS[0].astype(np.float32)):
        arrays = {"a.weight": weight, "a.weight_scale": np.array(scale, np.float32)}
        with pytest.raises(LayoutError, match=r"memory: a\.weight_scale: .*, expected one positive number"):
            tensors(arrays, linear_class=linear_class).ternary["a.weight"]


def test_a_missing_scale_is_named() -> None:
    with pytest.raises(ModelError, match=r"memory: a\.weight: is packed, but there is no a\.weight_scale"):
        tensors({"a.weight": PACKED})
