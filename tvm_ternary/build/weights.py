"""Describe weights, decide where they go, and write those that go beside the library."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import OptionError, OutputError
from tvm_ternary.runtime.arrays import ALIGNMENT, dtype_of
from tvm_ternary.runtime.manifest import FORMAT, WeightsInfo
from tvm_ternary.runtime.weights import DTYPES, LENGTH, read_header

# From this size on, weights lie beside: those inside are all in memory at once while a model is compiled, those beside
# are read one by one.
BESIDE_BYTES = 1 << 30
PLACES = ("auto", "inside", "beside")

_METADATA = "__metadata__"
_NAMES = {dtype_of(code): name for name, code in DTYPES.items()}


def describe_weights(weights: Mapping[str, npt.NDArray[Any]]) -> WeightsInfo:
    """Describe weights that lie inside the artifact.

    The checksum is SHA-256 over, for each in order, its name, dtype and shape as text and its bytes in C order.
    """
    digest, size = hashlib.sha256(), 0
    for name, array in weights.items():
        digest.update(f"{name}\0{array.dtype.name}\0{','.join(map(str, array.shape))}\0".encode())
        digest.update(_bytes(array))
        size += array.nbytes
    return WeightsInfo(sha256=digest.hexdigest(), bytes=size)


def weights_lie_beside(size: int, place: str = "auto") -> bool:
    """Tell whether weights of ``size`` bytes go to a file of their own.

    Parameters
    ----------
    size : int
        Bytes.
    place : str
        ``auto`` (beside when they are larger than `BESIDE_BYTES`), ``inside`` or ``beside``.

    Raises
    ------
    OptionError
        If there is no such place, or the weights are too large to lie inside.
    """
    if place not in PLACES:
        raise OptionError(f"weights {place!r}", f"no such place; expected one of {', '.join(PLACES)}")
    if place == "inside" and size > BESIDE_BYTES:
        raise OptionError(
            "weights 'inside'", f"they have {size} bytes; expected at most {BESIDE_BYTES}", "use 'beside'"
        )
    return place == "beside" or size > BESIDE_BYTES


def weights_path(output: Path) -> Path:
    """Give the path of the weights that lie beside ``output``: the same stem, suffix ``.safetensors``.

    Raises
    ------
    OutputError
        If a file is there that an earlier build did not write: it may well be the model's source.
    """
    path = output.with_suffix(".safetensors")
    if path == output:
        raise OutputError(str(output), "is the name that the weights need", "give the library the suffix .so")
    if os.path.lexists(path) and not _is_ours(path):
        problem = "is in the way: the weights would go there, and tvm-ternary did not write it"
        raise OutputError(str(path), problem, "move it away or choose another output name")
    return path


def write_weights(file: Path, weights: Mapping[str, npt.NDArray[Any]]) -> WeightsInfo:
    """Write a safetensors file as `write_tensors` does and describe it; ``WeightsInfo.file`` is left None.

    The safetensors package is not used: it leaves a file that only its owner can read, and holds all weights twice.

    Parameters
    ----------
    file : Path
        Where to write.
    weights : mapping of str to array
        In the order of ``main``'s parameters; little endian, any strides.

    Raises
    ------
    OSError
        If the file cannot be written. `tvm_ternary.files.atomic_path` around it makes an OutputError of that.
    """
    with file.open("wb") as stream:
        digest = write_tensors(stream, weights)
    return WeightsInfo(sha256=digest, bytes=sum(array.nbytes for array in weights.values()), names=tuple(weights))


def write_tensors(stream: IO[bytes], weights: Mapping[str, npt.NDArray[Any]]) -> str:
    """Write tensors in the safetensors format.

    Where the data begin is a multiple of `ALIGNMENT` behind where the stream stood, and so is where a tensor begins,
    but for those behind one of odd size, which come last. So what is mapped can be computed with where it lies.

    Parameters
    ----------
    stream : binary stream
    weights : mapping of str to array
        Little endian, any strides.

    Returns
    -------
    str
        The SHA-256 of what was written, in hexadecimal digits.
    """
    ordered = sorted(weights.items(), key=lambda item: item[1].nbytes % ALIGNMENT != 0)
    header: dict[str, Any] = {_METADATA: {"format": FORMAT}}
    end = 0
    for name, array in ordered:
        assert name != _METADATA
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # The format allows spaces behind the header.
    text += b" " * (-(LENGTH.size + len(text)) % ALIGNMENT)
    digest = hashlib.sha256()
    parts: Iterable[bytes | memoryview] = chain((LENGTH.pack(len(text)), text), (_bytes(array) for _, array in ordered))
    for content in parts:
        digest.update(content)
        stream.write(content)
    return digest.hexdigest()


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _is_ours(path: Path) -> bool:
    try:
        header, _ = read_header(np.memmap(path, dtype=np.uint8, mode="r"))
        return bool(header.get(_METADATA, {}).get("format") == FORMAT)
    except (OSError, ValueError, AttributeError):
        return False
