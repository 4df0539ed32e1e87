"""Walk the nodes of an ONNX graph in order and turn each into what is known about its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from tvm import relax
from tvm.ir import Expr

from tvm_ternary.errors import ModelError, TernaryError, UnsupportedOperatorError
from tvm_ternary.graph.onnx.control_flow import CONTROL_FLOW
from tvm_ternary.graph.onnx.data import weight_array
from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.fold import Folder
from tvm_ternary.graph.onnx.names import bias_names
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.table import find_converter
from tvm_ternary.graph.onnx.symbolic import evaluate
from tvm_ternary.graph.onnx.values import Constant, Symbols, Value, describe

# Characters of another program's message that are shown; TVM's can be a page.
_LONGEST_REASON = 160

_SHAPED_BY_DATA = frozenset({"NonZero", "Unique", "Compress", "NonMaxSuppression", "Range"})


class Walker:
    """Turns a graph into Relax bindings.

    Parameters
    ----------
    emitter : Emitter
        Receives them.
    opsets : Mapping[str, int]
        Versions of the operator sets, by domain; the standard one under "".
    """

    def __init__(self, emitter: Emitter, opsets: Mapping[str, int]) -> None:
        self.emitter = emitter
        self.opsets = opsets
        self.folder = Folder(opsets)

    def walk(self, graph: onnx.GraphProto, scope: Mapping[str, Value]) -> dict[str, Value]:
        """Walk a graph.

        Parameters
        ----------
        graph : onnx.GraphProto
            The graph.
        scope : Mapping[str, Value]
            Values of its inputs, and of the graphs around it.

        Returns
        -------
        dict[str, Value]
            The scope with every value of the graph.
        """
        values = dict(scope)
        self.emitter.biases.update(bias_names(graph))
        for sparse in graph.sparse_initializer:
            raise ModelError(sparse.values.name, "is a sparse weight, which is not supported", "export it densely")
        for initializer in graph.initializer:
            values[initializer.name] = Constant(weight_array(initializer), (initializer.name,))
        for proto in graph.node:
            outputs = self._guarded(proto, values)
            for name, value in zip(proto.output, outputs, strict=False):
                if name:
                    values[name] = value
        return values

    def run(self, graph: onnx.GraphProto, scope: Mapping[str, Value]) -> list[Value]:
        """Walk a graph and give its outputs."""
        values = self.walk(graph, scope)
        return [values[output.name] for output in graph.output]

    def _guarded(self, proto: onnx.NodeProto, values: dict[str, Value]) -> list[Any]:
        """Files hold what no exporter writes: whatever a converter trips over, the node is named in one line."""
        try:
            return self._outputs(proto, values)
        except TernaryError:
            raise
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), "")[:_LONGEST_REASON]
            raise ModelError(
                proto.name or next(filter(None, proto.output), proto.op_type),
                f"{proto.op_type} does not fit its inputs or attributes ({type(error).__name__}: {reason})",
                "check the file with onnx.checker",
            ) from error

    def _outputs(self, proto: onnx.NodeProto, values: dict[str, Value]) -> list[Any]:
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        inputs = [self._input(proto, name, values) for name in proto.input]
        node = Node.of(proto, self.opsets.get(domain, 1), inputs)
        if domain == "" and proto.op_type == "Constant":
            return [Constant(constant_value(node), (proto.output[0],))]
        if domain == "" and proto.op_type in CONTROL_FLOW:
            return CONTROL_FLOW[proto.op_type](self.emitter, node, self.run, values)
        known = [value for value in inputs if value is not None]
        if inputs and all(isinstance(value, Constant) for value in known):
            folded = self.folder.fold(node)
            if folded is not None:
                return folded
        elif known and all(isinstance(value, (Constant, Symbols)) for value in known):
            symbolic = evaluate(self.emitter.algebra, node)
            if symbolic is not None:
                return symbolic
        return self._converted(node, domain)

    @staticmethod
    def _input(proto: onnx.NodeProto, name: str, values: Mapping[str, Value]) -> Value | None:
        if not name:
            return None
        if name not in values:
            raise ModelError(proto.name or proto.op_type, f"its input {name} is computed by no node before it")
        return values[name]

    def _converted(self, node: Node, domain: str) -> list[Any]:
        converter = find_converter(domain, node.op)
        if converter is None:
            raise UnsupportedOperatorError(
                node.label,
                f"operator {node.op} of {domain or 'ai.onnx'} opset {node.opset} is not supported",
                "cut the model before this node, or export it without the operator",
            )
        result = converter(self.emitter, node)
        outputs = [self._bound(value) for value in (result if isinstance(result, list) else [result])]
        wanted = [i for i, name in enumerate(node.outputs) if name]
        if any(i >= len(outputs) or outputs[i] is None for i in wanted):
            node.refuse(f"only {len(outputs)} of its {len(node.outputs)} outputs can be computed")
        self._check_shapes(node, outputs)
        return outputs

    def _bound(self, value: Any) -> Value | None:
        if value is None or isinstance(value, (Constant, Symbols, relax.Var)):
            return value
        assert isinstance(value, Expr)
        return self.emitter.emit(value)

    def _check_shapes(self, node: Node, outputs: list[Any]) -> None:
        """A shape that gets lost means two symbolic dimensions that cannot be shown to agree."""
        if node.op in _SHAPED_BY_DATA or any(self._lost(value) for value in node.inputs):
            return
        if any(self._lost(value) for value in outputs):
            shapes = [self.emitter.shape(value) or [] for value in node.inputs if value is not None]
            names = sorted({describe(dim) for shape in shapes for dim in shape if not isinstance(dim, int)})
            node.refuse(
                f"input shapes {', '.join(describe(shape) for shape in shapes)} cannot be shown to agree",
                f"fix {' and '.join(names)} with --dim NAME=VALUE, or say which are equal with --dim NAME=OTHER, or "
                "what sizes are multiples of, with --dim NAME=32*NEW",
            )

    def _lost(self, value: Value | None) -> bool:
        return isinstance(value, Expr) and self.emitter.shape(value) is None


def constant_value(node: Node) -> np.ndarray:
    """The tensor of a ``Constant`` node."""
    for name, value in node.attributes.items():
        if name == "value":
            return weight_array(value)
        if name in ("value_int", "value_ints"):
            return np.array(value, dtype=np.int64)
        if name in ("value_float", "value_floats"):
            return np.array(value, dtype=np.float32)
    return node.refuse("sparse and string constants are not supported")
