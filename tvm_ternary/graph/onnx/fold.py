"""Fold a node whose inputs are all known, with the reference implementation of the onnx package."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.values import Constant

LARGEST_GROWTH = 1 << 24
"""Elements up to which a node that makes large tensors out of small ones (``Expand``, ``Range``...) is folded: what is
folded is stored in the artifact, what is not is computed when it is needed."""

# From this version on the reference has every operator that it has at all.
_COMPLETE = 19

_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)


def fold(node: Node, opsets: Mapping[str, int]) -> list[Constant | None] | None:
    """Compute the outputs of a node all of whose inputs are constants.

    Parameters
    ----------
    node : Node
        The node; its inputs are ``Constant`` or left out.
    opsets : Mapping[str, int]
        Versions of the operator sets, by domain.

    Returns
    -------
    list of Constant or None
        The outputs, None for one that nobody asks for. No list for a node that is better run (random numbers, a large
        result made of little) or that the reference implementation does not know.
    """
    if node.op in _RANDOM or _grows(node):
        return None
    feeds = {
        name: value.array
        for name, value in zip(node.proto.input, node.inputs, strict=True)
        if isinstance(value, Constant)
    }
    try:
        function = _function_of(node, opsets)
    except NotImplementedError:
        return None
    try:
        with np.errstate(all="ignore"):
            results = function.run(None, feeds, attributes={})
    except (ValueError, IndexError, TypeError, ZeroDivisionError, RuntimeError) as error:
        node.refuse(f"cannot be computed from its constant inputs ({error})")
    if not all(isinstance(result, np.ndarray | np.generic) for result in results):
        return None
    inherited = _names(node)
    arrays = iter(results)
    return [Constant(np.asarray(next(arrays)), (output, *inherited)) if output else None for output in node.outputs]


def _function_of(node: Node, opsets: Mapping[str, int]) -> ReferenceEvaluator:
    """The node as a function: of a node alone the reference takes the newest version, whatever its operator set is."""
    inputs, outputs = (list(dict.fromkeys(filter(None, names))) for names in (node.proto.input, node.proto.output))

    def at(versions: Mapping[str, int]) -> ReferenceEvaluator:
        imports = [onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()]
        return ReferenceEvaluator(onnx.helper.make_function("folded", "Folded", inputs, outputs, [node.proto], imports))

    try:
        return at(opsets)
    except NotImplementedError:
        raise
    except RuntimeError:
        # The reference lacks the first versions of some operators, and has later ones that do the same and more.
        return at({**opsets, "": max(opsets.get("", 1), _COMPLETE)})


def _names(node: Node) -> tuple[str, ...]:
    """The result goes by the names of the largest input: the matrix, not its scale or its shape."""
    constants = [value for value in node.inputs if isinstance(value, Constant)]
    return max(constants, key=lambda value: value.array.size).names if constants else ()


def _grows(node: Node) -> bool:
    """Whether the output would be much larger than the inputs."""
    arrays = [value.array for value in node.inputs if isinstance(value, Constant)]
    if node.op == "ConstantOfShape":
        size = np.prod(arrays[0], dtype=np.int64)
    elif node.op == "Expand":
        size = np.prod(np.broadcast_shapes(arrays[0].shape, tuple(arrays[1])), dtype=np.int64)
    elif node.op == "Tile":
        size = arrays[0].size * np.prod(arrays[1], dtype=np.int64)
    elif node.op == "Range":
        size = np.ceil((arrays[1] - arrays[0]) / arrays[2])
    else:
        return False
    return bool(size > LARGEST_GROWTH)
