"""Read the tensors of a file that ``torch.save`` wrote, without torch and without running anything that the file says.

The file is a zip: ``data.pkl`` describes the objects, and each tensor's numbers are a file of their own. A pickle may
name any function and have it called; here it gets what it needs to build containers, numbers, strings and arrays.
"""

from __future__ import annotations

import collections
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import ModelError

# numpy has no bfloat16: its bits are the upper half of a float32's.
_BFLOAT16 = np.dtype("<u2")
_STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": _BFLOAT16,
    "LongStorage": np.dtype("<i8"),
}
_HINT = "write its tensors as safetensors where torch is installed"


def load(path: Path) -> Any:
    """Give what was saved, its tensors as arrays; bfloat16 ones as float32, which holds them exactly.

    Parameters
    ----------
    path : Path
        Written by ``torch.save`` of torch 1.6 or newer.

    Raises
    ------
    ModelError
        If the file is damaged, or holds anything but plain containers and dense tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _load(archive, path)
    except OSError as error:
        raise ModelError(str(path), f"cannot be read ({error.strerror or error})") from error
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError) as error:
        raise ModelError(str(path), f"is no checkpoint of plain tensors ({error})", _HINT) from error


def _load(archive: zipfile.ZipFile, path: Path) -> Any:
    described = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(described) != 1:
        raise ModelError(str(path), f"holds {len(described)} files data.pkl, expected one", _HINT)
    folder = described[0].removesuffix("data.pkl")
    order = folder + "byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise ModelError(str(path), "was written on a big-endian machine", _HINT)
    with archive.open(described[0]) as file:
        return _Unpickler(file, archive, folder).load()


class _Unpickler(pickle.Unpickler):
    """Knows an ordered dict, tensors and their storages, and nothing else."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self.archive = archive
        self.folder = folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> npt.NDArray[Any]:
        """Give a storage: ("storage", dtype, number of its file, device, elements)."""
        kind, dtype, key, _, elements = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or not str(key).isdigit():
            raise pickle.UnpicklingError(f"it refers to {pid!r}")
        content = self.archive.read(f"{self.folder}data/{key}")
        if len(content) != elements * dtype.itemsize:
            raise pickle.UnpicklingError(f"storage {key} has {len(content)} bytes, expected {elements} {dtype}")
        values = np.frombuffer(content, dtype)
        return (values.astype("<u4") << 16).view("<f4") if dtype == _BFLOAT16 else values


def _tensor(
    storage: npt.NDArray[Any], offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> npt.NDArray[Any]:
    """Give the elements of a storage that belong to a tensor; offset and strides count elements."""
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if offset < 0 or min((*shape, *strides), default=0) < 0 or (0 not in shape and last >= storage.size):
        raise pickle.UnpicklingError(f"a tensor {shape} does not lie within its storage of {storage.size}")
    steps = tuple(stride * storage.itemsize for stride in strides)
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False).copy()
