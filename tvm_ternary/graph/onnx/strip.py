"""Take the weights out of an ONNX graph, so that a quantized checkpoint holds each once, as it is used.

Data that nothing but ternary matrices are made of are left out: the matrices themselves are kept, and the graph needs
no more than the shape. Other large data go to a file beside the graph, where ONNX allows them to lie.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence

import numpy as np
import onnx

from tvm_ternary.graph.onnx.data import LEFT_OUT, is_left_out, point_to, weight_array
from tvm_ternary.graph.onnx.emitter import MatrixUse
from tvm_ternary.graph.onnx.functions import copy_without_weights
from tvm_ternary.graph.onnx.prune import reads

INLINE_BYTES = 1024
"""Up to this size data stay inside the graph: shapes, axes, scalars."""


def only_ternary(
    graph: onnx.GraphProto, uses: Mapping[str, Sequence[MatrixUse]], ternary: Container[str]
) -> frozenset[str]:
    """Find the initializers that nothing but ternary matrices is made of.

    Parameters
    ----------
    graph : onnx.GraphProto
        As it was walked.
    uses : mapping of str to sequence of MatrixUse
        What the walk recorded (`Emitter.uses`).
    ternary : container of str
        The ternary matrices.

    Returns
    -------
    frozenset of str
        A value that several nodes read is in it only if each of them multiplies by it, and by a ternary matrix.
    """
    behind = {tensor.name: frozenset([tensor.name]) for tensor in graph.initializer}
    found: set[str] = set()
    kept: set[str] = set()
    for node in graph.node:
        inputs = [name for name in node.input if name]
        read = reads(node)
        # Nodes that are folded at import pass on what they are made of.
        if read <= behind.keys() and len(read) == len(set(inputs)):
            made = frozenset().union(*(behind[name] for name in inputs))
            behind |= dict.fromkeys((name for name in node.output if name), made)
            continue
        multiplied = uses.get(next((name for name in node.output if name), ""), ())
        plain = {use.value for use in multiplied if use.matrix not in ternary}
        matrices = {use.value for use in multiplied if inputs.count(use.value) == 1} - plain
        for name in read & behind.keys():
            (found if name in matrices else kept).update(behind[name])
    kept.update(*(behind.get(output.name, ()) for output in graph.output))
    return frozenset(found - kept)


def strip_weights(model: onnx.ModelProto, left_out: Container[str]) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Take the data out of a model.

    Parameters
    ----------
    model : onnx.ModelProto
    left_out : container of str
        Initializers whose data are wanted nowhere.

    Returns
    -------
    model : onnx.ModelProto
        A copy; it still has to be told where the data lie (`locate_weights`).
    arrays : dict of str to np.ndarray
        The large ones that are wanted, by name; as bytes where numpy has no such dtype. Those mapped from a file stay
        mapped.
    """
    model = with_initializers(model)
    result = copy_without_weights(model)
    arrays: dict[str, np.ndarray] = {}
    for tensor in model.graph.initializer:
        copy = result.graph.initializer.add()
        if tensor.name in left_out or is_left_out(tensor):
            copy.name, copy.data_type = tensor.name, tensor.data_type
            copy.dims.extend(tensor.dims)
            point_to(copy, LEFT_OUT)
            continue
        array = weight_array(tensor)
        if array.dtype.kind == "O" or array.nbytes <= INLINE_BYTES:
            copy.CopyFrom(tensor if array.dtype.kind == "O" else onnx.numpy_helper.from_array(array, tensor.name))
            copy.data_type = tensor.data_type
            continue
        copy.name, copy.data_type = tensor.name, tensor.data_type
        copy.dims.extend(tensor.dims)
        arrays[tensor.name] = array if array.dtype.isbuiltin and array.dtype.kind in "fiub" else _bytes(array)
    return result, arrays


def locate_weights(
    model: onnx.ModelProto, extent: Callable[[str], tuple[str, int, int]], names: Container[str]
) -> None:
    """Write into a stripped model where the data of the named initializers lie: file, first byte, number of bytes."""
    for tensor in model.graph.initializer:
        if tensor.name in names:
            point_to(tensor, *extent(tensor.name))


def with_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make initializers of large ``Constant`` nodes; they go by the same names and mean the same."""
    large = [node for node in model.graph.node if _is_large(node)]
    if not large:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    kept = [node for node in result.graph.node if not _is_large(node)]
    for node in large:
        tensor = result.graph.initializer.add()
        tensor.CopyFrom(node.attribute[0].t)
        tensor.name = node.output[0]
    del result.graph.node[:]
    result.graph.node.extend(kept)
    return result


def _is_large(node: onnx.NodeProto) -> bool:
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx") or node.attribute[0].name != "value":
        return False
    return bool(node.attribute[0].t.ByteSize() > INLINE_BYTES)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(onnx.numpy_helper.from_array(array).raw_data, dtype=np.uint8)
