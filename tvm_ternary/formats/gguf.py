"""GGUF files: metadata, float tensors, and the ternary types TQ1_0, TQ2_0 and I2_S bit by bit.

The file is read with the ``gguf`` package (the extra ``gguf``), tensors through a memory map. I2_S is bitnet.cpp's and
not in that package: its tensors are told apart before it looks at them.

A matrix of GGUF has its dimensions in the opposite order; here it is (N, K) as everywhere else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import HostError, LayoutError, ModelError
from tvm_ternary.formats.gguf_ternary import I2_S_TAIL, TERNARY
from tvm_ternary.formats.ternary import TernaryTensor

if TYPE_CHECKING:
    import gguf

I2_S_TYPE = 36
"""The number of I2_S in bitnet.cpp's files. Upstream retired the type that once had it, and gave none of its own."""
_TABLES = {38: "TL1", 39: "TL2"}


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is: its type's name, its shape as numpy has it, and its bytes."""

    kind: str
    shape: tuple[int, ...]
    data: npt.NDArray[Any]


class GgufFile:
    """An open GGUF file; what is read of it is read when it is asked for.

    Parameters
    ----------
    path : path

    Attributes
    ----------
    metadata : mapping of str to Any
        Numbers, texts, and lists of them by key.
    ternary : mapping of str to TernaryTensor
        The matrices of ternary types, bit by bit as they are stored: (N, K), one plane; a scale for each 256 weights,
        or for I2_S one for all.

    Raises
    ------
    ModelError
        If the file is missing, damaged, or holds a type of tensor that is not known.
    HostError
        If the package ``gguf`` is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        with _reading(self.path):
            reader, entries = _open(self.path)
        self.metadata: Mapping[str, Any] = _Metadata(reader)
        self._entries = entries
        self.ternary: Mapping[str, TernaryTensor] = _Ternary(self.path, entries)

    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the order of the file."""
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, in elements."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """What `load` reads a tensor from: ``float32``, ``float16``, ``bfloat16``, an integer type, or for all that is
        dequantized ``float32``."""
        entry = self._entry(name)
        if entry.data.dtype == np.uint8:
            return "bfloat16" if entry.kind == "BF16" else "float32"
        return entry.data.dtype.name

    def kind(self, name: str) -> str:
        """Type of a tensor as GGUF calls it: ``F32``, ``Q8_0``, ``TQ1_0``, ``I2_S``."""
        return self._entry(name).kind

    def where(self, name: str) -> str:
        """What an error calls a tensor."""
        return f"{self.path}: {name}"

    def load(self, name: str) -> npt.NDArray[Any]:
        """Read a tensor: floats as they are stored, everything else dequantized to float32.

        Raises
        ------
        LayoutError
            If its bytes are not as its type wants them.
        ModelError
            If the ``gguf`` package cannot dequantize its type.
        """
        entry = self._entry(name)
        if entry.kind in TERNARY and len(entry.shape) == 2:
            return self.ternary[name].dequantize()
        if entry.data.dtype != np.uint8:
            return entry.data
        package = _package()
        try:
            values = package.quants.dequantize(entry.data, package.GGMLQuantizationType[entry.kind])
        except (NotImplementedError, KeyError) as error:
            problem = f"is of type {entry.kind} and shape {list(entry.shape)}, which cannot be dequantized"
            raise ModelError(self.where(name), problem, "convert the file to F16, Q8_0 or TQ2_0") from error
        return np.asarray(values, dtype=np.float32).reshape(entry.shape)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ModelError(self.path, f"has no tensor {name}")
        return self._entries[name]


class _Ternary(Mapping[str, TernaryTensor]):
    def __init__(self, path: str, entries: Mapping[str, _Entry]) -> None:
        self._path = path
        self._entries = {name: e for name, e in entries.items() if e.kind in TERNARY and len(e.shape) == 2}

    def __getitem__(self, name: str) -> TernaryTensor:
        entry = self._entries[name]
        try:
            return TERNARY[entry.kind](entry.data, (entry.shape[0], entry.shape[1]))
        except LayoutError as error:
            raise LayoutError(f"{self._path}: {name}", f"{error.subject}: {error.problem}", error.hint) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)


class _Metadata(Mapping[str, Any]):
    """The key-value part; a vocabulary of many thousand texts is decoded only if it is asked for."""

    def __init__(self, reader: gguf.GGUFReader) -> None:
        self._fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}

    def __getitem__(self, key: str) -> Any:
        return self._fields[key].contents()

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def _open(path: str) -> tuple[gguf.GGUFReader, dict[str, _Entry]]:
    """Read the head of a file; its tensors are views of the mapped file."""
    package = _package()

    class Reader(package.GGUFReader):  # type: ignore[misc, name-defined]  # made only where the package is there
        """Sets tensors of type I2_S aside, at which the package would stop."""

        def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
            for field in fields:
                _refuse_tables(self, path, field)
            self.i2_s = {f.name: _i2_s(self, start_offs, f) for f in fields if _type(f) == I2_S_TYPE}
            self.order = [field.name for field in fields]
            super()._build_tensors(start_offs, [field for field in fields if _type(field) != I2_S_TYPE])

    reader = Reader(path)
    if reader.byte_order != "I":
        raise ValueError("its numbers are of the other byte order")
    found = reader.i2_s | {t.name: _Entry(t.tensor_type.name, _shape(t.shape), t.data) for t in reader.tensors}
    return reader, {name: found[name] for name in reader.order}


def _type(field: gguf.ReaderField) -> int:
    return int(field.parts[4][0])


def _shape(dims: npt.NDArray[Any]) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(dims))


def _i2_s(reader: gguf.GGUFReader, start: int, field: gguf.ReaderField) -> _Entry:
    shape = _shape(field.parts[3])
    begin = start + int(field.parts[5][0])
    length = math.prod(shape) // 4 + I2_S_TAIL
    data = reader.data[begin : begin + length]
    if len(data) < length:
        raise ValueError(f"{field.name} ends behind the end of the file")
    return _Entry("I2_S", shape, data)


def _refuse_tables(reader: gguf.GGUFReader, path: str, field: gguf.ReaderField) -> None:
    """Upstream has another type of number 39, so that only a file of bitnet.cpp's architectures can mean TL2."""
    architecture = reader.get_field("general.architecture")
    if _type(field) in _TABLES and architecture is not None and str(architecture.contents()).startswith("bitnet"):
        problem = f"is of type {_TABLES[_type(field)]}, a layout made for the kernels of one machine"
        raise ModelError(f"{path}: {field.name}", problem, "convert the model to I2_S, TQ1_0 or TQ2_0")


def _package() -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        problem = "GGUF files are read with the package gguf, which is not installed"
        raise HostError("gguf", problem, 'pip install "tvm-ternary[gguf]"') from error
    return gguf


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn what the package raises for a missing or damaged file into one line."""
    try:
        yield
    except OSError as error:
        raise ModelError(path, f"cannot be read ({error.strerror or error})", "check the path") from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(path, f"no whole GGUF file ({detail})", "the file is damaged; fetch it again") from error
