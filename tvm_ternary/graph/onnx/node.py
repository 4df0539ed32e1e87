"""A node of the ONNX graph as the converters see it: attributes decoded, inputs resolved to values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import onnx

from tvm_ternary.errors import ModelError, UnsupportedOperatorError
from tvm_ternary.graph.onnx.values import Constant, Value


@dataclass(frozen=True, eq=False)
class Node:
    """One operator application.

    Parameters
    ----------
    proto : onnx.NodeProto
        The node as it stands in the file.
    opset : int
        The version of the node's operator set.
    inputs : Sequence[Value | None]
        The values of the inputs; None for an optional one left out.
    attributes : Mapping[str, Any]
        Decoded attributes; strings as ``str``.
    """

    proto: onnx.NodeProto
    opset: int
    inputs: Sequence[Value | None]
    attributes: Mapping[str, Any]

    @classmethod
    def of(cls, proto: onnx.NodeProto, opset: int, inputs: Sequence[Value | None]) -> Node:
        """Decode a node's attributes."""
        return cls(proto, opset, inputs, {a.name: _decode(onnx.helper.get_attribute_value(a)) for a in proto.attribute})

    @property
    def op(self) -> str:
        """The operator's name."""
        return self.proto.op_type

    @property
    def outputs(self) -> Sequence[str]:
        """Names of the outputs; an empty one is not wanted."""
        return list(self.proto.output)

    @property
    def label(self) -> str:
        """What error messages call the node."""
        return self.proto.name or next((name for name in self.proto.output if name), self.op)

    def has(self, index: int) -> bool:
        """Whether an optional input is given."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def value(self, index: int) -> Value:
        """The value of an input that has to be there."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise ModelError(self.label, f"{self.op} has no input {index}", "check the file with onnx.checker")
        return value

    def optional(self, index: int) -> Value | None:
        """The value of an input, None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def constant(self, index: int) -> np.ndarray | None:
        """The elements of an input that is known at import, else None."""
        value = self.optional(index)
        return value.array if isinstance(value, Constant) else None

    def required(self, attribute: str) -> Any:
        """The value of an attribute that has no default.

        Raises
        ------
        ModelError
            If the node lacks it.
        """
        if attribute not in self.attributes:
            raise ModelError(
                self.label, f"{self.op} lacks its attribute {attribute}", "check the file with onnx.checker"
            )
        return self.attributes[attribute]

    def integers(self, attribute: str, index: int) -> list[int] | None:
        """Integers that older operator sets keep in an attribute, newer ones in an input; None where not given.

        Raises
        ------
        UnsupportedOperatorError
            If the input is computed while the module runs.
        """
        if attribute in self.attributes:
            return [int(item) for item in np.atleast_1d(self.attributes[attribute])]
        if not self.has(index):
            return None
        array = self.constant(index)
        if array is None:
            self.refuse(f"{attribute} is computed from the model's data")
        return [int(item) for item in np.atleast_1d(array)]

    def refuse(self, problem: str, hint: str | None = None) -> NoReturn:
        """Raise the error that this node cannot be imported.

        Raises
        ------
        UnsupportedOperatorError
            Always.
        """
        domain = self.proto.domain or "ai.onnx"
        raise UnsupportedOperatorError(
            self.label,
            f"operator {self.op} of {domain} opset {self.opset}: {problem}",
            hint or "fix symbolic dimensions with --dim NAME=VALUE, or cut the model before this node",
        )


def _decode(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, list) and value and isinstance(value[0], bytes):
        return [item.decode("utf-8", "replace") for item in value]
    return value


def axis_of(axis: int, rank: int, node: Node) -> int:
    """An axis counted from the front.

    Raises
    ------
    ModelError
        If it lies outside of the tensor.
    """
    if not -rank <= axis < rank:
        raise ModelError(node.label, f"axis {axis} of {node.op} is outside of a tensor of rank {rank}")
    return axis % rank
