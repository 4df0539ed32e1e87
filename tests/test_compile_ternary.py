"""Models that are ternary already, compiled: their trits and scales come through whatever scheme is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from safetensors.numpy import load_file

from tests.graph.models.checkpoints import feeds
from tests.graph.models.decoders import BITNET, LLAMA, decoder, run_decoder, ternary, write_bfloat16
from tests.graph.models.test_bitnet import DENSE, OFFLINE, packed, stored
from tests.graph.models.test_gguf import WIDE, write
from tests.graph.onnx.running import relative_error
from tvm_ternary.compiler import Artifact, compile
from tvm_ternary.formats import Scheme
from tvm_ternary.graph.passes.ternarize import TernaryLayer
from tvm_ternary.graph.source import import_model
from tvm_ternary.runtime.module import load


def checkpoint(folder: Path) -> Path:
    return write_bfloat16(folder / "bitnet", {**BITNET, "quantization_config": OFFLINE}, packed())


def compiled(source: Path, scheme: str) -> tuple[Artifact, np.ndarray]:
    """The artifact, whose output layer stays float, and its logits."""
    library = source.parent / "m.so"
    given = feeds()
    dims = dict(zip(("batch", "sequence"), given["input_ids"].shape, strict=True))
    options = {"layers": "_proj", "embeddings": "float", "weights": "beside", "dims": dims}
    artifact = compile(source, library, scheme=scheme, **options)
    (logits,) = load(artifact.path).run(None, given)
    return artifact, logits


def check_matrices(source: Path, artifact: Artifact, scheme: str, own: str) -> None:
    """Every ternary matrix lies beside the library with the bits that the model has."""
    layers = {layer.name: layer for layer in artifact.manifest.layers}
    arrays = load_file(artifact.path.with_suffix(".safetensors"))
    found = import_model(source).ternary
    assert len(found) >= 7
    for name, tensor in found.items():
        assert (layers[name].scheme, layers[name].error) == (own, 0)
        for part, array in TernaryLayer(tensor, Scheme.parse(scheme).activation_bits).kernel.pack(tensor).items():
            np.testing.assert_array_equal(arrays[f"{name}.{part}"], array)


def int8_rows(x: np.ndarray) -> np.ndarray:
    """What BitLinear does to activations: each token to whole multiples of its largest magnitude over 127."""
    step = np.abs(x).max(-1, keepdims=True) / 127
    return np.rint(x / step) * step


def expected(arrays: dict[str, np.ndarray], config: dict[str, Any], **options: Any) -> np.ndarray:
    rows = zip(*feeds().values(), strict=True)
    return np.stack([run_decoder(arrays, config, *row, **options) for row in rows])


def test_float_activations(tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    artifact, logits = compiled(source, "t2a32g32")
    check_matrices(source, artifact, "t2a32g32", "t1a32pt")
    assert relative_error(logits, expected(stored(DENSE), BITNET)) < 3e-6


def test_int8_activations_are_those_of_bitnet(tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    artifact, logits = compiled(source, "t3a8g64")
    check_matrices(source, artifact, "t3a8g64", "t1a8pt")
    assert relative_error(logits, expected(stored(DENSE), BITNET, quantized=int8_rows)) < 3e-6
    assert relative_error(logits, expected(stored(DENSE), BITNET)) > 1e-3


@pytest.mark.parametrize(("kind", "own"), [("I2_S", "t1a32pt"), (GGMLQuantizationType.TQ1_0, "t1a32g256")])
def test_gguf(tmp_path: Path, kind: Any, own: str) -> None:
    config = {**LLAMA, **WIDE}
    arrays, trits, scales = ternary(decoder(config))
    source = write(tmp_path / "m.gguf", config, arrays, linear=kind, trits=trits, scales=scales)
    artifact, logits = compiled(source, "t2a32g64")
    check_matrices(source, artifact, "t2a32g64", own)
    assert artifact.manifest.model.name == "m"
    assert relative_error(logits, expected(arrays, config)) < 3e-6
