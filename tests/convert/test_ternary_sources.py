"""Models that are ternary already, quantized: what they have is kept bit by bit, the rest becomes what was asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.formats.strategies import assert_same
from tests.graph.models.checkpoints import feeds
from tests.graph.models.decoders import BITNET, LLAMA, decoder, ternary, write_bfloat16
from tests.graph.models.test_bitnet import OFFLINE, ONLINE, packed
from tests.graph.models.test_gguf import WIDE, write
from tests.graph.onnx.running import Compiled
from tvm_ternary.convert.job import quantize_model
from tvm_ternary.graph.source import import_model


def gguf(folder: Path) -> Path:
    config = {**LLAMA, **WIDE}
    arrays, trits, scales = ternary(decoder(config))
    return write(folder / "m.gguf", config, arrays, linear="I2_S", trits=trits, scales=scales)


def bitnet(folder: Path) -> Path:
    return write_bfloat16(folder / "bitnet", {**BITNET, "quantization_config": OFFLINE}, packed())


def online(folder: Path) -> Path:
    return write_bfloat16(folder / "online", {**BITNET, "quantization_config": ONLINE}, decoder(BITNET))


@pytest.mark.parametrize("source", [bitnet, online, gguf], ids=lambda f: f.__name__)
def test_a_checkpoint_of_it_is_the_same_model(tmp_path: Path, source: object) -> None:
    path = source(tmp_path)  # type: ignore[operator]
    folder = tmp_path / "quantized"
    quantize_model(path, folder, scheme="t3a8g32", output_layer="float", embeddings="float")
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "tvm-ternary"
    before, after = import_model(path), import_model(folder)
    assert set(after.ternary) == set(before.ternary)
    assert len(after.ternary) >= 7
    for name, tensor in before.ternary.items():
        assert_same(after.ternary[name], tensor)
    assert after.shapes == before.shapes
    np.testing.assert_array_equal(Compiled(after)(feeds())[0], Compiled(before)(feeds())[0])
