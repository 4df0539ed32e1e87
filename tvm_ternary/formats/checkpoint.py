"""Ternary tensors in a safetensors file.

A tensor ``name`` is stored as ``name.planes`` and ``name.scale``, and ``name.input_scale`` if it has one; a plain array
under its own name. One metadata entry, ``tvm_ternary``, holds JSON: the format's version, shape, granularity and
transform of each ternary tensor, a CRC-32 of each stored array, what the caller added, and a CRC-32 of all this. It is
one entry because safetensors writes several in no fixed order, and equal content must give equal bytes.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from tvm_ternary.errors import LayoutError, ModelError, OptionError
from tvm_ternary.files import atomic_path
from tvm_ternary.formats.scheme import granularity_from_suffix
from tvm_ternary.formats.ternary import TernaryTensor
from tvm_ternary.formats.transform import InputTransform

FORMAT_VERSION = 1

_KEY = "tvm_ternary"
_CODES = {
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    "bool": "BOOL",
}
_DTYPES = frozenset(_CODES)
_FROM_CODE = {code: name for name, code in _CODES.items()}


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, TernaryTensor | npt.NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to a safetensors file, whole or not at all.

    Parameters
    ----------
    path : path
        Replaced if it exists.
    tensors : mapping of str to TernaryTensor or ndarray
        Arrays of bool, integers, or floats of 16 to 64 bits.
    metadata : mapping of str to str, optional
        Anything to keep with the tensors; `load_metadata` returns it.

    Raises
    ------
    LayoutError
        If an array's dtype cannot be stored, or two tensors would be stored under one name.
    OutputError
        If the file cannot be written; what was at ``path`` stays.
    """
    arrays, described = _flatten(tensors)
    header = {
        "version": FORMAT_VERSION,
        "tensors": described,
        "crc32": {name: _array_checksum(array) for name, array in arrays.items()},
        "metadata": dict(metadata or {}),
    }
    header["checksum"] = _header_checksum(header)
    with atomic_path(path) as temporary:
        _write(temporary, arrays, json.dumps(header, sort_keys=True))


def load_tensors(path: str | os.PathLike[str]) -> dict[str, TernaryTensor | npt.NDArray[Any]]:
    """Read what `save_tensors` wrote.

    Returns
    -------
    dict of str to TernaryTensor or ndarray
        In the order of their names.

    Raises
    ------
    ModelError
        If the file is missing, truncated, altered, of another version, or not written by `save_tensors`.
    LayoutError
        If a tensor's arrays do not fit its description.
    """
    header, arrays = _read(path, with_arrays=True)
    for name, array in arrays.items():
        if _array_checksum(array) != header["crc32"][name]:
            raise _damaged(path, f"{name} does not match its checksum")
    out: dict[str, TernaryTensor | npt.NDArray[Any]] = {}
    for name, description in header["tensors"].items():
        parts = [arrays.pop(f"{name}.{part}", None) for part in _parts(description)]
        out[name] = _ternary(path, name, description, parts)
    out.update(arrays)
    return dict(sorted(out.items()))


def _parts(description: Any) -> tuple[str, ...]:
    """What the arrays of a ternary tensor are called behind its name."""
    scaled = isinstance(description, dict) and description.get("transform", {}).get("scaled", False)
    return ("planes", "scale", "input_scale") if scaled else ("planes", "scale")


def _ternary(path: str | os.PathLike[str], name: str, description: Any, parts: list[Any]) -> TernaryTensor:
    try:
        shape = (description["shape"][0], description["shape"][1])
        transform = None
        if "transform" in description:
            transform = InputTransform(parts[2] if len(parts) > 2 else None, description["transform"]["rotation"])
        granularity = granularity_from_suffix(description["granularity"])
        return TernaryTensor(parts[0], parts[1], shape, granularity, transform)
    except (LayoutError, OptionError) as error:
        raise LayoutError(f"{os.fspath(path)}: {name}", f"{error.subject}: {error.problem}", error.hint) from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{name} is not described as a ternary tensor is") from error


class CheckpointFile(Mapping[str, TernaryTensor | npt.NDArray[Any]]):
    """The tensors of a file that `save_tensors` wrote, each mapped, and checked, when it is asked for.

    Raises
    ------
    ModelError, LayoutError
        As `load_tensors`; a wrong checksum when the tensor is asked for.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        header, _ = _read(path, with_arrays=False)
        self.metadata: dict[str, str] = dict(header["metadata"])
        self._crc32, self._ternary = header["crc32"], header["tensors"]
        with self.path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self._entries = json.loads(file.read(size))
            self._start = 8 + size
        parts = {f"{name}.{part}" for name, described in self._ternary.items() for part in _parts(described)}
        if not parts <= self._crc32.keys():
            raise _damaged(path, "it does not hold the arrays that its description names")
        self._names = sorted({*self._ternary, *(self._crc32.keys() - parts)})

    def __getitem__(self, name: str) -> TernaryTensor | npt.NDArray[Any]:
        if name not in self._ternary:
            return self._array(name)
        described = self._ternary[name]
        return _ternary(self.path, name, described, [self._array(f"{name}.{part}") for part in _parts(described)])

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def is_ternary(self, name: str) -> bool:
        """Whether a tensor is ternary, without reading it."""
        return name in self._ternary

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, (N, K) of a ternary one, without reading it."""
        described = self._ternary[name] if name in self._ternary else self._entries[name]
        return tuple(described["shape"])

    def extent(self, name: str) -> tuple[int, int]:
        """First byte in the file and number of bytes of a stored array."""
        start, stop = self._entries[name]["data_offsets"]
        return self._start + start, stop - start

    def _array(self, name: str) -> npt.NDArray[Any]:
        entry = self._entries[name]
        dtype, shape = np.dtype(_FROM_CODE[entry["dtype"]]), tuple(entry["shape"])
        offset, size = self.extent(name)
        array = np.memmap(self.path, dtype, "r", offset, shape).view(np.ndarray) if size else np.empty(shape, dtype)
        if _array_checksum(array) != self._crc32[name]:
            raise _damaged(self.path, f"{name} does not match its checksum")
        return array


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata given to `save_tensors`, without the tensors.

    Raises
    ------
    ModelError
        As `load_tensors`.
    """
    header, _ = _read(path, with_arrays=False)
    return dict(header["metadata"])


def _flatten(
    tensors: Mapping[str, TernaryTensor | npt.NDArray[Any]],
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, dict[str, Any]]]:
    """Split tensors into the arrays to store and the descriptions of the ternary ones."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    described: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        parts: dict[str, npt.NDArray[Any]]
        if isinstance(tensor, TernaryTensor):
            described[name] = {"shape": [int(size) for size in tensor.shape], "granularity": tensor.granularity.suffix}
            parts = {f"{name}.planes": tensor.planes, f"{name}.scale": tensor.scale}
            if tensor.transform is not None:
                scaled = tensor.transform.scale is not None
                described[name]["transform"] = {"rotation": tensor.transform.rotation, "scaled": scaled}
                if tensor.transform.scale is not None:
                    parts[f"{name}.input_scale"] = tensor.transform.scale
        else:
            parts = {name: tensor}
        for part, array in parts.items():
            if part in arrays:
                raise LayoutError(part, "two tensors would be stored under this name", "rename one of them")
            if array.dtype.name not in _DTYPES:
                wanted = ", ".join(sorted(_DTYPES))
                raise LayoutError(part, f"dtype {array.dtype} cannot be stored, expected one of {wanted}")
            # safetensors reads the buffer as it lies in memory: strides must be gone (0-d arrays keep their rank).
            arrays[part] = np.ascontiguousarray(array).reshape(array.shape)
    return arrays, described


def _write(path: Path, arrays: Mapping[str, npt.NDArray[Any]], text: str) -> None:
    """Write the safetensors format, an array at a time: the library's own writer holds a copy of all of them.

    Arrays of wide elements come first, as that library orders them, so that every array is aligned.
    """
    ordered = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    entries: dict[str, Any] = {"__metadata__": {_KEY: text}}
    end = 0
    for name in ordered:
        array = arrays[name]
        start, end = end, end + array.nbytes
        entries[name] = {"dtype": _CODES[array.dtype.name], "shape": list(array.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in ordered:
            array = arrays[name]
            file.write(array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data)


def _read(path: str | os.PathLike[str], with_arrays: bool) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Read the header, checked as far as it is the same for every tensor, and all arrays if wanted."""
    try:
        with safe_open(os.fspath(path), framework="np") as file:
            text = (file.metadata() or {}).get(_KEY)
            names = set(file.keys())
            arrays = {name: file.get_tensor(name) for name in file.keys()} if with_arrays else {}  # noqa: SIM118
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelError(os.fspath(path), f"cannot be read ({reason})", "check the path and its permissions") from error
    except SafetensorError as error:
        raise _damaged(path, f"not a whole safetensors file ({error})") from error
    if text is None:
        raise ModelError(os.fspath(path), "not written by tvm-ternary", "expected a file made by save_tensors")
    try:
        header = json.loads(text)
    except ValueError as error:
        raise _damaged(path, "its description is not JSON") from error
    version = header.get("version") if isinstance(header, dict) else None
    if version != FORMAT_VERSION:
        problem = f"format version {version!r}, expected {FORMAT_VERSION}"
        raise ModelError(os.fspath(path), problem, "read it with the tvm-ternary that wrote it")
    if header.get("checksum") != _header_checksum(header):
        raise _damaged(path, "its description does not match its checksum")
    if not all(isinstance(header.get(key), dict) for key in ("tensors", "crc32", "metadata")):
        raise _damaged(path, "its description is incomplete")
    if names != set(header["crc32"]):
        raise _damaged(path, "it does not hold the arrays that its description names")
    return header, arrays


def _array_checksum(array: npt.NDArray[Any]) -> int:
    """CRC-32 of dtype, shape and the bytes as safetensors stores them, little endian."""
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return zlib.crc32(little.reshape(-1).view(np.uint8).data, zlib.crc32(f"{array.dtype.name}{array.shape}".encode()))


def _header_checksum(header: dict[str, Any]) -> int:
    content = {key: value for key, value in header.items() if key != "checksum"}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _damaged(path: str | os.PathLike[str], problem: str) -> ModelError:
    return ModelError(os.fspath(path), problem, "the file is damaged; save it again")
