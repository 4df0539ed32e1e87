"""GGUF files with tensors that the gguf package does not know how to write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np

I2_S = 36


def i2_s_bytes(trits: np.ndarray, scale: float) -> np.ndarray:
    """What bitnet.cpp's quantize_i2_s writes on x86, a weight at a time."""
    codes = trits.reshape(-1).astype(int) + 1
    out = np.zeros(codes.size // 4 + 32, dtype=np.uint8)
    for i, code in enumerate(codes):
        block, j = divmod(i, 128)
        group, position = divmod(j, 32)
        out[32 * block + position] |= code << (6 - 2 * group)
    out[codes.size // 4 :][:4] = np.array([scale], dtype="<f4").view(np.uint8)
    return out


def write_gguf(
    path: Path,
    tensors: Mapping[str, tuple[Any, np.ndarray]],
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    architecture: str = "llama",
    block_count: int = 1,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a file; a type is one of the package's, ``"I2_S"`` or a bare number.

    The package's writer puts the number of a type and the shape that it is given, and the bytes as they are.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(block_count)
    writer.add_token_list(["a", "b"])
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"{architecture}.{key}", value)
    for name, (kind, data) in tensors.items():
        foreign = not isinstance(kind, gguf.GGMLQuantizationType)
        number = I2_S if kind == "I2_S" else kind
        # A uint8 tensor's shape is taken for bytes, and turned into elements by the type's block.
        with (
            patch("gguf.gguf_writer.quant_shape_from_byte_shape", lambda shape, _: shape) if foreign else patch.dict({})
        ):
            shape = (shapes or {}).get(name) if foreign else None
            writer.add_tensor(name, np.ascontiguousarray(data), raw_shape=shape, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
