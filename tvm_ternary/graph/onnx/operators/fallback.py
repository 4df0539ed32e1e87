"""Operators left to TVM's own ONNX frontend: those that are no shape arithmetic and no weight product."""

from __future__ import annotations

from collections.abc import Callable

import onnx
from tvm import relax
from tvm.relax.frontend.onnx import onnx_frontend as tvm_onnx

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.flaws import flaw
from tvm_ternary.graph.onnx.values import Value

_REFUSALS = (ValueError, TypeError, RuntimeError, AttributeError, AssertionError, LookupError)

_NOT_STANDARD = frozenset(
    {"FastGelu", "BiasGelu", "SkipLayerNormalization", "Attention", "EmbedLayerNormalization"}
    | {"MatMulInteger16", "AllClassNMS"}
)
"""Names under which TVM keeps converters of ``com.microsoft`` operators; it does not look at the domain itself."""


_NOT_TENSORS = frozenset(
    {"Optional", "OptionalHasElement", "OptionalGetElement", "SequenceConstruct", "SequenceEmpty", "SequenceErase"}
    | {"SequenceInsert", "SequenceLength", "SequenceAt", "ConcatFromSequence", "SplitToSequence"}
)
"""Operators on sequences and optionals: the importer carries tensors only."""


def tvm_converter(domain: str, op: str) -> Callable[[Emitter, Node], Value | list[Value]] | None:
    """TVM's converter of an operator of the standard set; None where it has none."""
    unfit = domain != "" or op in _NOT_STANDARD or op in _NOT_TENSORS
    return None if unfit or op not in tvm_onnx._get_convert_map() else convert_with_tvm


def tvm_operators() -> set[str]:
    """The standard operators that TVM has a converter of."""
    return {op for op in tvm_onnx._get_convert_map() if onnx.defs.has(op) and tvm_converter("", op) is not None}


def convert_with_tvm(emitter: Emitter, node: Node) -> Value | list[Value]:
    """Convert a node with TVM's frontend.

    Raises
    ------
    UnsupportedOperatorError
        If TVM refuses the node, or is known to get it wrong.
    """
    problem = flaw(node)
    if problem is not None:
        node.refuse(problem)
    converter = tvm_onnx._get_convert_map()[node.op]
    inputs = tvm_onnx.onnx_input(None if value is None else emitter.tensor(value, node) for value in node.inputs)
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.proto.attribute}
    attributes["tvm_custom"] = {"name": node.label, "num_outputs": len(node.outputs)}
    try:
        result = emitter.builder.normalize(
            converter.get_converter(node.opset)(emitter.builder, inputs, attributes, [{}, {}])
        )
    except _REFUSALS as error:
        node.refuse(f"TVM cannot convert it ({_first_line(error)})")
    if isinstance(result, relax.Tuple):
        return list(result.fields)
    if isinstance(result.ty, relax.TupleType):
        bound = emitter.emit(result)
        return [relax.TupleGetItem(bound, index) for index in range(len(result.ty.fields))]
    return result


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
