"""Map the weights that lie in an artifact, or in a file beside it: safetensors, with numpy alone.

Nothing is copied: where the weights are aligned, which those written by this package are, the model computes with the
pages of the file that the system holds in memory. So the files must not be written to while a module is loaded (a
new build does not, it puts another file in their place), as is true of every shared library.

The format: eight bytes, the header's length, little endian; the header, a JSON object of name to dtype, shape and byte
range; the data (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import ArtifactError
from tvm_ternary.runtime.arrays import BFLOAT16, dtype_of
from tvm_ternary.runtime.artifact import Artifact, file_digest, weights_offset
from tvm_ternary.runtime.manifest import WeightsInfo

LENGTH = struct.Struct("<Q")
# Numpy exports no array that is read-only. What would be written to one of this mode does not reach the file.
_COPY_ON_WRITE: Final = "c"
DTYPES = {
    "BOOL": "?",
    "I8": "<i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
    "U8": "<u1",
    "U16": "<u2",
    "U32": "<u4",
    "U64": "<u8",
    "F16": "<f2",
    "BF16": BFLOAT16,
    "F32": "<f4",
    "F64": "<f8",
}


def artifact_weights(artifact: Artifact) -> tuple[npt.NDArray[Any], ...]:
    """Map the parameters of ``main`` behind the inputs, wherever they lie; as `read_weights` does.

    Raises
    ------
    ArtifactError
        If they lie beside and `read_weights` refuses them, or the artifact lacks a tensor.
    """
    info = artifact.manifest.weights
    if info.file is not None:
        return read_weights(artifact.path.parent, info)
    if not info.names:
        return ()
    start = weights_offset(artifact.elf_bytes)
    data = np.memmap(artifact.path, np.uint8, _COPY_ON_WRITE, start, artifact.weights_bytes)
    return _tensors(data, info.names, str(artifact.path))


def read_weights(folder: Path, info: WeightsInfo) -> tuple[npt.NDArray[Any], ...]:
    """Map the tensors that a manifest names, after checking the file against its SHA-256.

    Parameters
    ----------
    folder : Path
        The artifact's folder.
    info : WeightsInfo
        Which file, which tensors, which checksum. ``file`` must not be None.

    Returns
    -------
    tuple of arrays
        In the order of ``info.names``; views of the mapped file, aligned only as the file has them.

    Raises
    ------
    ArtifactError
        If the file is missing, is not the one that the artifact was compiled with, or lacks a tensor.
    """
    assert info.file is not None
    path = folder / info.file
    try:
        digest = file_digest(path).hexdigest()
        if digest != info.sha256:
            problem = f"has SHA-256 {digest[:12]}…; the artifact was compiled with {info.sha256[:12]}…"
            raise ArtifactError(str(path), problem, "copy the .so and its weights together, or compile again")
        data = np.memmap(path, np.uint8, _COPY_ON_WRITE)
    except FileNotFoundError as error:
        raise ArtifactError(
            str(path), "no such file, but the artifact's weights lie there", "copy it next to the .so"
        ) from error
    except OSError as error:
        raise ArtifactError(
            str(path), f"cannot be read ({error.strerror or error})", "check its permissions"
        ) from error
    return _tensors(data, info.names, str(path))


def read_header(data: npt.NDArray[np.uint8]) -> tuple[dict[str, Any], int]:
    """Give a safetensors file's header and where its data begins.

    Parameters
    ----------
    data : (bytes,) uint8
        The whole file.

    Raises
    ------
    ValueError
        If it is no safetensors file.
    """
    if data.size < LENGTH.size:
        raise ValueError(f"{data.size} bytes")
    (length,) = LENGTH.unpack(data[: LENGTH.size].tobytes())
    start = LENGTH.size + length
    if start > data.size:
        raise ValueError(f"a header of {length} bytes in a file of {data.size}")
    header = json.loads(data[LENGTH.size : start].tobytes())
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header, start


def _tensors(data: npt.NDArray[np.uint8], names: tuple[str, ...], subject: str) -> tuple[npt.NDArray[Any], ...]:
    try:
        header, start = read_header(data)
        return tuple(_tensor(data[start:], header[name]) for name in names)
    except KeyError as error:
        raise ArtifactError(
            subject, f"lacks the tensor or field {error.args[0]!r}", "compile the model again"
        ) from error
    except (ValueError, TypeError) as error:
        raise ArtifactError(subject, f"is not a safetensors file ({error})", "compile the model again") from error


def _tensor(data: npt.NDArray[np.uint8], entry: dict[str, Any]) -> npt.NDArray[Any]:
    begin, end = entry["data_offsets"]
    dtype, shape = dtype_of(DTYPES[entry["dtype"]]), entry["shape"]
    if not 0 <= begin <= end <= data.size or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"bytes {begin} to {end} do not hold {shape} of {dtype}")
    # np.ndarray over the buffer, because .view() of a slice refuses some empty shapes.
    return np.ndarray(shape, dtype, buffer=data, offset=begin)
