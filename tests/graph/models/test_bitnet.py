"""BitNet b1.58 checkpoints: packed, unpacked and online, their trits bit by bit, and the float64 reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.formats.strategies import assert_same
from tests.graph.onnx.running import Compiled, relative_error
from tvm_ternary.errors import LayoutError, ModelError
from tvm_ternary.formats import PerTensor, TernaryTensor
from tvm_ternary.formats.bitnet import Scaling, pack_bitnet
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.source import import_model

from .checkpoints import Arrays, feeds
from .decoders import BITNET, LLAMA, decoder, run_all, ternary, write_bfloat16

OFFLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
ONLINE = {**OFFLINE, "quantization_mode": "online"}
OLD = {"quant_method": "bitnet"}
"""Of checkpoints that name no linear_class: products are divided by the scale."""

DENSE, TRITS, SCALES = ternary(decoder(BITNET))


def packed(dense: Arrays = DENSE, scaling: Scaling = Scaling.MULTIPLY) -> Arrays:
    """The layout of the public checkpoint; scales in DENSE are such as bfloat16 holds."""
    arrays = dict(dense)
    for name, trits in TRITS.items():
        tensor = TernaryTensor.from_trits(trits[None], np.full((1, 1, 1), SCALES[name], np.float32), PerTensor())
        arrays[name], arrays[f"{name}_scale"] = pack_bitnet(tensor, scaling)
    return arrays


def load(folder: Path, arrays: Arrays, quantization: dict[str, Any], config: dict[str, Any] = BITNET) -> ImportedModel:
    return import_model(write_bfloat16(folder, {**config, "quantization_config": quantization}, arrays))


def check_trits(model: ImportedModel) -> None:
    assert list(model.ternary) == [name for name in model.params if name in TRITS]
    assert set(model.ternary) == set(TRITS)
    for name, trits in TRITS.items():
        tensor = model.ternary[name]
        assert tensor.granularity == PerTensor()
        np.testing.assert_array_equal(tensor.trits()[0], trits)
        assert tensor.scale.item() == np.float32(SCALES[name])
        np.testing.assert_array_equal(model.params[name], DENSE[name].T)


def stored(arrays: Arrays) -> Arrays:
    """What is left of weights once bfloat16 held them."""
    return {name: (a.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) for name, a in arrays.items()}


def test_packed_is_the_reference_bit_by_bit(tmp_path: Path) -> None:
    model = load(tmp_path, packed(), OFFLINE)
    check_trits(model)
    assert not any(name.endswith("_scale") for name in model.params)
    (logits,) = Compiled(model)(feeds())
    assert relative_error(logits, run_all(stored(DENSE), BITNET, feeds())) < 3e-6


def test_trits_in_floats_beside_a_scale(tmp_path: Path) -> None:
    arrays = dict(DENSE)
    for name, trits in TRITS.items():
        arrays[name] = trits.astype(np.float32)
        arrays[f"{name}_scale"] = np.array([SCALES[name]], np.float32)
    check_trits(load(tmp_path, arrays, OFFLINE))


def test_ternary_floats_come_through_online_as_packed_ones_do(tmp_path: Path) -> None:
    online = load(tmp_path / "online", DENSE, ONLINE)
    check_trits(online)
    offline = load(tmp_path / "offline", packed(), OFFLINE)
    for name in TRITS:
        assert_same(online.ternary[name], offline.ternary[name])


def test_master_weights_become_ternary_when_they_are_read(tmp_path: Path) -> None:
    model = load(tmp_path, decoder(BITNET), ONLINE)
    assert set(model.ternary) == set(TRITS)
    arrays = stored(decoder(BITNET))
    for name in TRITS:
        mean = np.abs(arrays[name]).mean(dtype=np.float64)
        tensor = model.ternary[name]
        np.testing.assert_array_equal(tensor.trits()[0], np.clip(np.rint(arrays[name] / mean), -1, 1))
        assert abs(tensor.scale.item() / mean - 1) <= 2**-8
        arrays[name] = tensor.dequantize()
    (logits,) = Compiled(model)(feeds())
    assert relative_error(logits, run_all(arrays, BITNET, feeds())) < 3e-6


def test_old_checkpoints_divide_and_may_be_any_family(tmp_path: Path) -> None:
    config = {**LLAMA, "tie_word_embeddings": True}
    arrays = {name: array for name, array in packed(scaling=Scaling.DIVIDE).items() if "sub_norm" not in name}
    for name in TRITS:
        arrays[f"{name}_scale"] = np.array([4.0], np.float32)
    model = load(tmp_path, arrays, OLD, config)
    for name, trits in TRITS.items():
        np.testing.assert_array_equal(model.ternary[name].dequantize(), trits * np.float32(0.25))


def test_layers_that_are_not_converted_stay_float(tmp_path: Path) -> None:
    model = load(tmp_path, decoder(BITNET), {**ONLINE, "modules_to_not_convert": ["down_proj"]})
    assert set(model.ternary) == {name for name in TRITS if "down_proj" not in name}
    name = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_array_equal(model.params[name], stored(decoder(BITNET))[name].T)


def test_without_a_quantization_weights_are_floats(tmp_path: Path) -> None:
    model = import_model(write_bfloat16(tmp_path, BITNET, decoder(BITNET)))
    assert not model.ternary


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear_class": "other"}, "linear_class is 'other', expected one of autobitlinear, bitlinear"),
        ({"quantization_mode": "both"}, "quantization_mode is 'both', expected online or offline"),
        ({"use_rms_norm": True}, "use_rms_norm is true"),
        ({"quant_method": "gptq"}, "quantized by 'gptq', which is not read"),
    ],
)
def test_what_is_not_known_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(tmp_path, packed(), {**OFFLINE, **change})


def test_damaged_matrices_are_named(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    arrays = packed()
    del arrays[f"{name}_scale"]
    with pytest.raises(ModelError, match=r"q_proj\.weight: is packed, but there is no .*q_proj\.weight_scale"):
        load(tmp_path, arrays, OFFLINE)
    model = load(tmp_path, {**packed(), name: np.full((6, 24), 0xFF, np.uint8)}, OFFLINE)
    with pytest.raises(LayoutError, match=r"q_proj\.weight: holds the code 3"):
        model.ternary[name]
    model = load(tmp_path, {**packed(), name: np.full((24, 24), 0.5, np.float32)}, OFFLINE)
    with pytest.raises(LayoutError, match=r"q_proj\.weight_scale, but values other than -1, 0 and 1"):
        model.ternary[name]
    with pytest.raises(ModelError, match=r"q_proj\.weight.*has shape \[20, 24\]; config\.json says \[24, 24\]"):
        load(tmp_path, {**packed(), name: np.zeros((5, 24), np.uint8)}, OFFLINE)
