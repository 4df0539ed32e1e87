"""Read an ONNX file and say in one line what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import uses_external_data

from tvm_ternary.errors import ModelError
from tvm_ternary.graph.onnx.check import check_model, tensors_of
from tvm_ternary.graph.onnx.data import is_left_out, resolve_external

_OLDEST_IR = 3


def read_model(source: str | Path | onnx.ModelProto, *, quantized: bool = False) -> onnx.ModelProto:
    """Read a model; data that lie in other files are checked and located, not read.

    Parameters
    ----------
    source : str, Path or onnx.ModelProto
        A file, or a model that is already in memory.
    quantized : bool
        Whether it is the graph of a quantized checkpoint, which lacks the data of ternary matrices.

    Raises
    ------
    ModelError
        If the file is missing, no ONNX model, truncated, malformed (`check_model`), or its external data is missing or
        too short.
    """
    if isinstance(source, onnx.ModelProto):
        name = source.graph.name or "model"
        _check_version(source, name)
        return check_model(source, name)
    path = Path(source)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(str(path), "no such file") from None
    except OSError as error:
        raise ModelError(str(path), f"cannot be read: {error.strerror}") from None
    except DecodeError:
        raise ModelError(str(path), "is no ONNX model, or it is truncated", "download or export it again") from None
    _check_version(model, str(path))
    model = check_model(model, str(path))
    for tensor in filter(uses_external_data, tensors_of(model.graph)):
        if not is_left_out(tensor):
            resolve_external(tensor, path)
        elif not quantized:
            hint = f"name its folder, {path.parent}"
            raise ModelError(str(path), "is the graph of a quantized checkpoint, without its ternary weights", hint)
    return model


def _check_version(model: onnx.ModelProto, name: str) -> None:
    if not model.ir_version or not model.graph.output:
        raise ModelError(name, "is no ONNX model: it has no version or no outputs", "download or export it again")
    if model.ir_version < _OLDEST_IR:
        raise ModelError(name, f"IR version {model.ir_version} is older than {_OLDEST_IR}", "export it again")


def check_finite(name: str, array: np.ndarray) -> None:
    """Refuse a weight with NaN or infinite elements.

    Raises
    ------
    ModelError
        If there is one; says how many and where the first is.
    """
    bad = ~np.isfinite(array)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ModelError(
            name,
            f"{int(bad.sum())} of {array.size} elements are NaN or infinite, the first at {first}",
            "repair the checkpoint, or leave the layer in float with --layers",
        )
