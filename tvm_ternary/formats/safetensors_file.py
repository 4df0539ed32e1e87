"""A safetensors file: its header checked to the last byte, its tensors mapped one at a time.

The file is eight bytes (the header's size, little endian), the header (JSON: for each name a dtype, a shape and the
bytes of the data that are its own), and the data. The safetensors package reads it too, but knows no bfloat16 and no
float8 without torch, and maps a file as a whole; here a tensor's pages are let go with its array, so that a model
larger than memory can be read matrix by matrix.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import ModelError
from tvm_ternary.formats.float_codes import WIDENED

_DTYPES = {
    "BOOL": "bool",
    "I8": "int8",
    "U8": "uint8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
_LARGEST_HEADER = 100_000_000
_DAMAGED = "the file is damaged; download or save it again"


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies, counted from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """The tensors of one file, as `tvm_ternary.formats.tensor_files.Tensors`.

    Parameters
    ----------
    path : path

    Raises
    ------
    ModelError
        If the file cannot be read, is truncated, or its header does not describe its data without gap and overlap.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                text = self._header_bytes(file.read(8), size, file)
        except OSError as error:
            raise ModelError(str(path), f"cannot be read ({error.strerror or error})") from None
        self._start = 8 + len(text)
        self._entries = self._parse(text)
        self._check_layout(size - self._start)

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        return self._entries[name].dtype

    def where(self, name: str) -> str:
        return f"{self.path}: {name}"

    def load(self, name: str) -> npt.NDArray[Any]:
        entry = self._entries[name]
        stored, widen = WIDENED.get(entry.dtype, (entry.dtype, None))
        kind = np.dtype(stored).newbyteorder("<")
        if 0 in entry.shape:
            return np.zeros(entry.shape, np.float32 if widen else stored)
        try:
            array = np.memmap(self.path, kind, "r", self._start + entry.begin, entry.shape or (1,))
        except (OSError, ValueError) as error:
            raise ModelError(self.where(name), f"cannot be read any more ({error})", "did the file change?") from None
        plain = array.view(np.ndarray).reshape(entry.shape)
        return plain if widen is None else widen(plain)

    def _header_bytes(self, prefix: bytes, size: int, file: Any) -> bytes:
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > _LARGEST_HEADER:
            raise self._damaged("is no safetensors file")
        if 8 + length > size:
            raise self._damaged(f"is truncated: its header has {length} bytes, the file {size}")
        text: bytes = file.read(length)
        return text

    def _parse(self, text: bytes) -> dict[str, _Entry]:
        try:
            header = json.loads(text, object_pairs_hook=_without_duplicates)
        except ValueError as error:
            raise self._damaged(f"is no safetensors file: its header is not JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._damaged("is no safetensors file: its header is no JSON object")
        header.pop("__metadata__", None)
        return {name: self._entry(name, description) for name, description in header.items()}

    def _entry(self, name: str, description: Any) -> _Entry:
        try:
            code, shape = description["dtype"], tuple(description["shape"])
            begin, end = description["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise self._damaged(f"its header says no dtype, shape and offsets of {name}") from None
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise self._damaged(f"its header gives {name} shape {list(shape)} and offsets {[begin, end]}")
        if code not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise ModelError(self.where(name), f"has dtype {code}", f"expected one of {known}; convert the checkpoint")
        entry = _Entry(_DTYPES[code], shape, begin, end)
        stored, _ = WIDENED.get(entry.dtype, (entry.dtype, None))
        needed = math.prod(shape) * np.dtype(stored).itemsize
        if end - begin != needed:
            raise self._damaged(f"{name} has {end - begin} bytes; {entry.dtype} {list(shape)} needs {needed}")
        return entry

    def _check_layout(self, size: int) -> None:
        """Every byte of the data belongs to one tensor."""
        position, last = 0, "the header"
        for name, entry in sorted(self._entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != position:
                found = "overlap" if entry.begin < position else "leave a gap"
                raise self._damaged(f"{last} and {name} {found} at byte {min(entry.begin, position)} of the data")
            position, last = entry.end, name
        if position > size:
            raise self._damaged(f"is truncated: its tensors need {position} bytes, it has {size}")
        if position < size:
            raise self._damaged(f"has {size - position} bytes behind its last tensor, {last}")

    def _damaged(self, problem: str) -> ModelError:
        return ModelError(str(self.path), problem, _DAMAGED)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} twice")
    return result
