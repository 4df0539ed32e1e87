"""The elements of a weight: inside the file, mapped from a file beside it, or left out of a quantized checkpoint."""

from __future__ import annotations

import mmap
from math import prod
from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from tvm_ternary.errors import ModelError

LEFT_OUT = "tvm-ternary:ternary"
"""Where the data of a weight lies that only ternary matrices are made of: nowhere, for they are kept themselves."""


def weight_array(tensor: onnx.TensorProto) -> np.ndarray:
    """The elements of an initializer.

    Data that lie in another file are mapped, not read, where numpy has their dtype. One that was left out is an array
    of zeros that takes no memory: its shape and dtype still decide what nodes make of it.
    """
    if not uses_external_data(tensor):
        return onnx.numpy_helper.to_array(tensor)
    if is_left_out(tensor):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return np.broadcast_to(np.zeros((), dtype), tuple(tensor.dims))
    info = ExternalDataInfo(tensor)
    file, offset = Path(info.location), info.offset or 0
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count = int(np.prod(tensor.dims, dtype=np.int64))
    if dtype.kind in "fiub" and dtype.itemsize * count == (info.length or dtype.itemsize * count) and count:
        return np.memmap(file, dtype, "r", offset, tuple(tensor.dims)).view(np.ndarray)
    loaded = onnx.TensorProto(data_type=tensor.data_type, dims=tensor.dims, name=tensor.name)
    with file.open("rb") as stream:
        stream.seek(offset)
        loaded.raw_data = stream.read(info.length if info.length is not None else -1)
    return onnx.numpy_helper.to_array(loaded)


def is_mapped(array: np.ndarray) -> bool:
    """Whether the elements lie in a file that is mapped."""
    return _mapping(array) is not None


def release(array: np.ndarray) -> None:
    """Give back the memory that reading a mapped array took."""
    mapping = _mapping(array)
    if mapping is not None:
        mapping.madvise(mmap.MADV_DONTNEED)


def _mapping(array: np.ndarray) -> mmap.mmap | None:
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None


def is_left_out(tensor: onnx.TensorProto) -> bool:
    """Whether an initializer's data were left out, since it only feeds ternary matrices."""
    places = (entry.value for entry in tensor.external_data if entry.key == "location")
    return bool(uses_external_data(tensor)) and LEFT_OUT in places


def data_files(model: onnx.ModelProto) -> list[Path]:
    """The files beside a model that its weights lie in."""
    found = {
        ExternalDataInfo(tensor).location
        for tensor in model.graph.initializer
        if uses_external_data(tensor) and not is_left_out(tensor)
    }
    return [Path(file) for file in sorted(found)]


def point_to(tensor: onnx.TensorProto, location: str, offset: int | None = None, length: int | None = None) -> None:
    """Say where the data of an initializer lie, and take them out of it."""
    for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "external_data"):
        tensor.ClearField(field)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))


def resolve_external(tensor: onnx.TensorProto, path: Path) -> None:
    """Check where the data of an initializer of the model at ``path`` lie, and make that an absolute path.

    Raises
    ------
    ModelError
        If they lie outside of the model's folder, the file is missing or too short, or where in it they lie is no
        place.
    """
    try:
        info = ExternalDataInfo(tensor)
        start, length = info.offset or 0, info.length or 0
        file = path.parent / info.location
        inside = file.resolve().is_relative_to(path.parent.resolve())
        exists = file.is_file()
    except (ValueError, TypeError, OSError) as error:
        raise ModelError(str(path), f"weight {tensor.name} lies nowhere ({error})", "export it again") from error
    if not inside:
        raise ModelError(str(path), f"weight {tensor.name} lies outside of the model's folder, in {info.location}")
    if not exists:
        raise ModelError(str(path), f"weight {tensor.name} lies in {file}, which does not exist", "put it there")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    needed = prod(tensor.dims) * dtype.itemsize if dtype.kind in "fiub" else 0
    if start < 0 or length < 0 or (needed and length not in (0, needed)):
        problem = f"weight {tensor.name} is {dtype} {list(tensor.dims)}, {needed} bytes, not {length} at {start}"
        raise ModelError(str(path), problem, "export it again")
    end = start + (length or needed)
    if file.stat().st_size < end:
        raise ModelError(
            str(path),
            f"weight {tensor.name} ends at byte {end} of {file}, which has {file.stat().st_size}",
            "the file is truncated: download or export it again",
        )
    point_to(tensor, str(file), info.offset, info.length)
