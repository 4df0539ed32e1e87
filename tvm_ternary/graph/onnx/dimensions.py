"""Symbolic dimensions of the inputs: list them, name the nameless, fix some."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from tvm_ternary.errors import OptionError
from tvm_ternary.graph.onnx.dimension_text import evaluate_dimension, substitute_dimensions
from tvm_ternary.graph.onnx.given_dimensions import resolve_dimensions


def real_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The inputs that a user gives: those that no initializer gives a value."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


# What exporters write where they know no name: two such dimensions need not be equal.
_NO_NAMES = frozenset({"", "?", "None", "-1"})


def name_dimensions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Name every input dimension that is neither fixed nor named after its input and axis."""
    dims = (dim for value in real_inputs(model.graph) for dim in value.type.tensor_type.shape.dim)
    if not any(_is_nameless(dim) for dim in dims):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for value in real_inputs(result.graph):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if _is_nameless(dim):
                dim.dim_param = f"{value.name}_dim_{axis}"
    return result


def _is_nameless(dim: onnx.TensorShapeProto.Dimension) -> bool:
    return dim.dim_value <= 0 and dim.dim_param.strip() in _NO_NAMES


def symbolic_dimensions(model: onnx.ModelProto) -> list[str]:
    """Names of the symbolic input dimensions, in order of appearance."""
    dims = (dim for value in real_inputs(model.graph) for dim in value.type.tensor_type.shape.dim)
    return list(dict.fromkeys(dim.dim_param for dim in dims if dim.dim_param))


def fix_dimensions(model: onnx.ModelProto, dims: Mapping[str, int | str]) -> onnx.ModelProto:
    """Give symbolic dimensions a value, or say that they are equal to others or arithmetic over them.

    Parameters
    ----------
    model : onnx.ModelProto
        A model whose dimensions are all named.
    dims : Mapping[str, int | str]
        By name, as `resolve_dimensions` takes it.

    Raises
    ------
    OptionError
        If a name is no symbolic dimension of the model, or what is said of one makes no size of at least 1.
    """
    if not dims:
        return model
    resolved = resolve_dimensions(dims, symbolic_dimensions(model))
    values = {name: given if isinstance(given, int) else str(given) for name, given in resolved.items()}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for value in result.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.dim_param:
                continue
            text = substitute_dimensions(dim.dim_param, values)
            size = evaluate_dimension(text, {})
            if size is None:
                dim.dim_param = text
            elif size < 1:
                raise OptionError(f"dimension {dim.dim_param}", f"is {size} then, expected a size of at least 1")
            else:
                dim.dim_value = size
    return result
