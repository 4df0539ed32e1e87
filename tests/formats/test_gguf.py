"""GGUF files written by the gguf package, or byte by byte from the definitions, read back bit by bit."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.formats.i2_s import i2_s_bytes, write_gguf
from tvm_ternary.errors import HostError, LayoutError, ModelError
from tvm_ternary.formats import PerGroup, PerTensor
from tvm_ternary.formats.gguf import GgufFile
from tvm_ternary.formats.gguf_ternary import decode_i2_s, decode_tq1_0, decode_tq2_0
from tvm_ternary.formats.tensor_files import TernaryTensors

from .strategies import block_elements

Q = gguf.GGMLQuantizationType


def trits_and_weights(n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Trits, a float16 scale for each 256 of a row, and their product."""
    rng = np.random.default_rng(seed)
    trits = rng.integers(-1, 2, (n, k), dtype=np.int8)
    scale = rng.uniform(0.01, 2, (n, k // 256)).astype(np.float16).astype(np.float32)
    return trits, scale, trits * np.repeat(scale, 256, axis=1)


@pytest.mark.parametrize("kind", [Q.TQ1_0, Q.TQ2_0])
@pytest.mark.parametrize(("n", "k"), [(1, 256), (5, 768)])
@pytest.mark.parametrize("elements", [1, 1 << 20])
def test_blocks_of_trits_are_read_bit_by_bit(tmp_path: Path, kind: Any, n: int, k: int, elements: int) -> None:
    trits, scale, weights = trits_and_weights(n, k, seed=k)
    data = gguf.quants.quantize(weights, kind)
    write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_up.weight": (kind, data)})
    file = GgufFile(tmp_path / "m.gguf")
    assert file.names() == ("blk.0.ffn_up.weight",)
    assert file.shape("blk.0.ffn_up.weight") == (n, k)
    assert file.kind("blk.0.ffn_up.weight") == kind.name
    assert isinstance(file, TernaryTensors)
    with block_elements(elements):
        tensor = file.ternary["blk.0.ffn_up.weight"]
    assert tensor.granularity == PerGroup(256)
    np.testing.assert_array_equal(tensor.trits()[0], trits)
    np.testing.assert_array_equal(tensor.scale[0], scale)
    np.testing.assert_array_equal(file.load("blk.0.ffn_up.weight"), gguf.quants.dequantize(data, kind))


@pytest.mark.parametrize(("kind", "size", "decode"), [(Q.TQ1_0, 54, decode_tq1_0), (Q.TQ2_0, 66, decode_tq2_0)])
def test_every_byte_means_what_the_package_says(kind: Any, size: int, decode: Any) -> None:
    """Bytes that no quantizer writes too, but for TQ2_0's fourth code, which is no trit."""
    data = np.random.default_rng(1).integers(0, 256, (6, 2 * size), dtype=np.uint8)
    if kind == Q.TQ2_0:
        data &= ~(data << 1 & data & 0b10101010)
    scales = data.reshape(6, 2, size)[..., -2:]
    scales[...] = np.random.default_rng(2).uniform(-3, 3, (6, 2, 1)).astype(np.float16).view(np.uint8)
    np.testing.assert_array_equal(decode(data, (6, 512)).dequantize(), gguf.quants.dequantize(data, kind))


@pytest.mark.parametrize(("n", "k"), [(1, 128), (7, 384)])
def test_i2_s_is_read_beside_other_types(tmp_path: Path, n: int, k: int) -> None:
    trits = np.random.default_rng(n).integers(-1, 2, (n, k), dtype=np.int8)
    norm = np.arange(k, dtype=np.float32)
    tensors = {"a.weight": (Q.F32, norm), "b.weight": ("I2_S", i2_s_bytes(trits, 0.37)), "c.weight": (Q.F32, norm + 1)}
    write_gguf(tmp_path / "m.gguf", tensors, shapes={"b.weight": (n, k)})
    file = GgufFile(tmp_path / "m.gguf")
    assert file.names() == ("a.weight", "b.weight", "c.weight")
    assert (file.kind("b.weight"), file.dtype("b.weight"), file.shape("b.weight")) == ("I2_S", "float32", (n, k))
    assert list(file.ternary) == ["b.weight"]
    for elements in (1, 1 << 20):
        with block_elements(elements):
            tensor = file.ternary["b.weight"]
        assert tensor.granularity == PerTensor()
        np.testing.assert_array_equal(tensor.trits()[0], trits)
        assert tensor.scale.item() == np.float32(0.37)
    np.testing.assert_array_equal(file.load("b.weight"), trits * np.float32(0.37))
    np.testing.assert_array_equal(file.load("c.weight"), norm + 1)


def test_floats_and_other_quantized_types(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    kinds = [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0]
    written = {kind.name: (kind, gguf.quants.quantize(weights, kind)) for kind in kinds}
    write_gguf(tmp_path / "m.gguf", written)
    file = GgufFile(tmp_path / "m.gguf")
    for name, (kind, data) in written.items():
        assert file.shape(name) == (3, 64)
        loaded = file.load(name)
        np.testing.assert_array_equal(loaded.astype(np.float32), gguf.quants.dequantize(data, kind))
        assert loaded.dtype == (np.float16 if kind == Q.F16 else np.float32)
        assert file.dtype(name) == {Q.F16: "float16", Q.BF16: "bfloat16"}.get(kind, "float32")
    assert not file.ternary


def test_metadata(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {"a": (Q.F32, np.zeros(32, np.float32))}, architecture="llama", block_count=2)
    metadata = GgufFile(tmp_path / "m.gguf").metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 2
    assert metadata["tokenizer.ggml.tokens"] == ["a", "b"]
    assert "llama.rope.freq_base" not in metadata


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        GgufFile(tmp_path / "none.gguf")
    path = tmp_path / "m.gguf"
    write_gguf(path, {"a.weight": (Q.F32, np.zeros((4, 64), np.float32))})
    whole = path.read_bytes()
    for kept in (0, 3, 20, len(whole) // 3, len(whole) - 100):
        path.write_bytes(whole[:kept])
        with pytest.raises(ModelError, match="no whole GGUF file"):
            GgufFile(path)
    path.write_bytes(b"ABCD" + whole[4:])
    with pytest.raises(ModelError, match="GGUF magic invalid"):
        GgufFile(path)


def test_truncated_i2_s(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    trits = np.zeros((4, 128), np.int8)
    write_gguf(path, {"b.weight": ("I2_S", i2_s_bytes(trits, 1.0))}, shapes={"b.weight": (4, 128)})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ModelError, match=r"b\.weight ends behind the end of the file"):
        GgufFile(path)


def test_codes_that_are_no_trit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, {"b.weight": ("I2_S", np.full(128 // 4 + 32, 0xFF, np.uint8))}, shapes={"b.weight": (1, 128)})
    with pytest.raises(LayoutError, match=r"m\.gguf: b\.weight: I2_S: holds the code 3"):
        GgufFile(path).ternary["b.weight"]
    with pytest.raises(LayoutError, match="holds the code 3"):
        decode_tq2_0(np.full(66, 0xC0, np.uint8), (1, 256))


def test_bytes_that_do_not_fit_the_shape_are_refused() -> None:
    for decode, size in ((decode_tq1_0, 54), (decode_tq2_0, 66)):
        with pytest.raises(LayoutError, match=rf"{size} bytes for 1 x 512, expected {2 * size}"):
            decode(np.zeros(size, np.uint8), (1, 512))
    with pytest.raises(LayoutError, match="64 bytes for 1 x 100, expected 57 and K a multiple of 128"):
        decode_i2_s(np.zeros(64, np.uint8), (1, 100))


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    data = np.zeros((1, 66), np.uint8)
    data[0, -2:] = np.array([np.nan], np.float16).view(np.uint8)
    write_gguf(tmp_path / "m.gguf", {"b.weight": (Q.TQ2_0, data)})
    with pytest.raises(LayoutError, match=r"b\.weight: scale: holds NaN or infinity"):
        GgufFile(tmp_path / "m.gguf").ternary["b.weight"]


def test_layouts_of_one_machine_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, {"b.weight": (38, np.zeros(32, np.uint8))}, shapes={"b.weight": (1, 128)}, architecture="bitnet")
    with pytest.raises(ModelError, match=r"b\.weight: is of type TL1, .* convert the model to I2_S, TQ1_0 or TQ2_0"):
        GgufFile(path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {"a": (Q.F32, np.zeros(32, np.float32))})
    with pytest.raises(ModelError, match=r"m\.gguf: has no tensor output\.weight"):
        GgufFile(tmp_path / "m.gguf").load("output.weight")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_gguf(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "gguf":
            raise ModuleNotFoundError("No module named 'gguf'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    with pytest.raises(HostError, match=r"not installed; pip install \"tvm-ternary\[gguf\]\""):
        GgufFile(tmp_path / "m.gguf")
