"""Turn inputs into constants, so that everything that hangs on them is decided at import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from tvm_ternary.errors import InputError, OptionError
from tvm_ternary.graph.onnx.dimensions import fix_dimensions, real_inputs


def bind_constants(model: onnx.ModelProto, constants: Mapping[str, Any]) -> onnx.ModelProto:
    """Replace inputs by initializers; symbolic dimensions of such an input take the sizes of its value.

    Parameters
    ----------
    model : onnx.ModelProto
        The model.
    constants : Mapping[str, Any]
        Values by input name; anything ``np.asarray`` takes, converted to the input's dtype.

    Raises
    ------
    OptionError
        If the model has no such input.
    InputError
        If a value does not have the input's shape.
    """
    if not constants:
        return model
    inputs = {value.name: value for value in real_inputs(model.graph)}
    for name in constants:
        if name not in inputs:
            raise OptionError(f"constant {name}", "the model has no such input", f"it has {', '.join(inputs)}")
    arrays = {name: _array(inputs[name], value) for name, value in constants.items()}
    left = {dim.dim_param for name in inputs.keys() - arrays.keys() for dim in _dims(inputs[name])}
    sizes = {name: size for name, size in _sizes(inputs, arrays).items() if name in left}
    result = onnx.ModelProto()
    result.CopyFrom(fix_dimensions(model, sizes))
    result.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    kept = [value for value in result.graph.input if value.name not in constants]
    del result.graph.input[:]
    result.graph.input.extend(kept)
    return result


def _dims(info: onnx.ValueInfoProto) -> list[onnx.TensorShapeProto.Dimension]:
    return list(info.type.tensor_type.shape.dim)


def _sizes(inputs: Mapping[str, onnx.ValueInfoProto], arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Sizes that the constants give to symbolic dimensions."""
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        for dim, size in zip(_dims(inputs[name]), array.shape, strict=False):
            if dim.dim_param and sizes.setdefault(dim.dim_param, size) != size:
                other = sizes[dim.dim_param]
                raise InputError(name, f"its constant has {size} for dimension {dim.dim_param}, another has {other}")
    return sizes


def _array(info: onnx.ValueInfoProto, value: Any) -> np.ndarray:
    """The value as an array of the input's dtype and shape; a single number fits any shape of one element."""
    tensor = info.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    try:
        with np.errstate(invalid="ignore"):  # what does not fit is told below
            array = np.asarray(value, dtype=dtype)
        kept = dtype.kind not in "iub" or np.array_equal(array, np.asarray(value))
    except (ValueError, TypeError, OverflowError):
        kept = False
    if not kept:
        shown = value.tolist() if isinstance(value, np.ndarray) else value
        raise InputError(info.name, f"got a constant {shown!r}, expected {dtype}")
    if not tensor.HasField("shape"):
        return array
    expected = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    if array.ndim == 0:
        array = array.reshape((1,) * len(expected))
    pairs = zip(expected, array.shape, strict=False)
    if len(expected) != array.ndim or any(isinstance(dim, int) and dim != size for dim, size in pairs):
        raise InputError(info.name, f"got a constant of shape {list(array.shape)}, expected {expected}")
    return array
