"""Fold a node whose inputs are all known, with the reference implementation of the onnx package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, prod

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.values import Constant

LARGEST_GROWTH = 1 << 24
"""Elements up to which a node that makes large tensors out of small ones (``Expand``, ``Range``...) is folded: what is
folded is stored in the artifact, what is not is computed when it is needed."""

# The same, of all nodes together: a file of a few bytes shall not ask for all memory.
_ALL_GROWTH = 1 << 26

# From this version on the reference has every operator that it has at all.
_COMPLETE = 19

_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)


class Folder:
    """Computes nodes whose inputs are constants, within a budget of memory.

    Parameters
    ----------
    opsets : Mapping[str, int]
        Versions of the operator sets, by domain.
    """

    def __init__(self, opsets: Mapping[str, int]) -> None:
        self._opsets = opsets
        self._left = _ALL_GROWTH

    def fold(self, node: Node) -> list[Constant | None] | None:
        """Compute the outputs of a node all of whose inputs are constants.

        Parameters
        ----------
        node : Node
            The node; its inputs are ``Constant`` or left out.

        Returns
        -------
        list of Constant or None
            The outputs, None for one that nobody asks for. No list for a node that is better run (random numbers, a
            large result made of little) or that the reference implementation does not know.
        """
        if node.op in _RANDOM:
            return None
        growth = max(_growth(node), 0)
        if growth > min(LARGEST_GROWTH, self._left):
            return None
        self._left -= growth
        return _fold(node, self._opsets)


def _fold(node: Node, opsets: Mapping[str, int]) -> list[Constant | None] | None:
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


def _growth(node: Node) -> int:
    """Elements that the outputs have beyond those of the inputs; of operators that make much out of little."""
    arrays = [value.array for value in node.inputs if isinstance(value, Constant)]
    distinct = {id(array): array.size for array in arrays}
    size = _SIZES[node.op](node, arrays) if node.op in _SIZES else 0
    return size - sum(distinct.values())


_ELEMENTWISE = (
    *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Min", "Max", "Sum", "Mean", "Where", "PRelu", "And", "Or", "Xor"),
    *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "BitShift"),
)


def _broadcast(node: Node, arrays: Sequence[np.ndarray]) -> int:
    return prod(np.broadcast_shapes(*(array.shape for array in arrays)))


def _product(node: Node, arrays: Sequence[np.ndarray]) -> int:
    left, right = arrays[0].shape, arrays[1].shape
    return prod(np.broadcast_shapes(left[:-2], right[:-2])) * prod(left[-2:-1]) * prod(right[-1:])


def _range(node: Node, arrays: Sequence[np.ndarray]) -> int:
    start, stop, step = (array.item() for array in arrays)
    return int(max(ceil((stop - start) / step), 0))


def _pad(node: Node, arrays: Sequence[np.ndarray]) -> int:
    pads = arrays[1].tolist() if len(arrays) > 1 else node.attributes["pads"]
    half = len(pads) // 2
    # An upper bound: with axes named, the others are not padded.
    return int(prod(dim + sum(map(abs, pads)) for dim in arrays[0].shape[-half:]) * prod(arrays[0].shape[:-half]))


def _resize(node: Node, arrays: Sequence[np.ndarray]) -> int:
    if len(arrays) > 1 and arrays[-1].dtype.kind == "i":
        return int(prod(arrays[-1].tolist()))
    scales: list[float] = arrays[-1].tolist() if len(arrays) > 1 else node.attributes["scales"]
    return ceil(arrays[0].size * prod(scales))


# Elements of the result. Of operators that are not here none makes more than it takes, but for some constant times.
_SIZES: dict[str, Callable[[Node, Sequence[np.ndarray]], int]] = {
    "ConstantOfShape": lambda node, arrays: prod(arrays[0].tolist()),
    "Expand": lambda node, arrays: prod(np.broadcast_shapes(arrays[0].shape, tuple(arrays[1].tolist()))),
    "Tile": lambda node, arrays: arrays[0].size * prod(arrays[1].tolist()),
    "Range": _range,
    "Pad": _pad,
    "Resize": _resize,
    "Upsample": _resize,
    "OneHot": lambda node, arrays: arrays[0].size * int(arrays[1].reshape(-1)[0]),
    "Concat": lambda node, arrays: sum(array.size for array in arrays),
    "Gather": lambda node, arrays: (
        arrays[0].size // max(arrays[0].shape[int(node.attributes.get("axis", 0))], 1) * arrays[1].size
    ),
    "MatMul": _product,
    "Gemm": lambda node, arrays: arrays[0].size * arrays[1].size,
    **dict.fromkeys(_ELEMENTWISE, _broadcast),
}
