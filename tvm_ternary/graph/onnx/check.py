"""What a graph must be before anything looks at it: named, sorted, without cycles, its weights as long as they say.

Every check is linear in the size of the file, whatever the file claims about sizes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

import onnx
from onnx import TensorProto
from onnx.external_data_helper import uses_external_data

from tvm_ternary.errors import ModelError

_CHECKER = "check the file with onnx.checker, or export it again"
_EXPORT = "download or export it again"
_STANDARD = ("", "ai.onnx")
# Element types that share bytes, and those whose elements take two places of a typed field.
_PACKED_BITS: dict[int, int] = {
    TensorProto.UINT4: 4,
    TensorProto.INT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    TensorProto.UINT2: 2,
    TensorProto.INT2: 2,
}
_PAIRS = frozenset({TensorProto.COMPLEX64, TensorProto.COMPLEX128})
# numpy's rank.
_MOST_DIMS = 64
_MOST_ELEMENTS = 2**62


def check_model(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Check a model's structure.

    Parameters
    ----------
    model : onnx.ModelProto
        Not changed.
    name : str
        What errors call it.

    Returns
    -------
    onnx.ModelProto
        The model, or a copy in which every node comes after those whose results it reads.

    Raises
    ------
    ModelError
        If an operator set is missing or newer than those known, a name is missing or given twice, a node reads what
        nothing computes, nodes or functions depend on themselves, or a weight does not have the size it declares.
    """
    _check_opsets(model, name)
    _check_functions(model, name)
    for tensor in tensors_of(model.graph):
        check_size(tensor, name)
    orders = _Orders(name)
    orders.visit(model.graph, frozenset(), "the graph")
    if not orders.changed:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    # Inner graphs first: the nodes that hold them are copied.
    for graph, order in reversed(list(zip(_graphs(result.graph), orders.found, strict=True))):
        if order != sorted(order):
            nodes = [onnx.NodeProto.FromString(graph.node[i].SerializeToString()) for i in order]
            del graph.node[:]
            graph.node.extend(nodes)
    return result


def check_size(tensor: onnx.TensorProto, name: str) -> None:
    """Check that a tensor has as many bytes, or elements, as its shape asks for; external data are checked elsewhere.

    Raises
    ------
    ModelError
        If it has not, its element type is unknown, or a dimension is negative.
    """
    label = f"weight {tensor.name}" if tensor.name else "a constant"
    if tensor.data_type not in TensorProto.DataType.values() or tensor.data_type == TensorProto.UNDEFINED:
        raise ModelError(name, f"{label} has element type {tensor.data_type}, which ONNX does not have", _EXPORT)
    if len(tensor.dims) > _MOST_DIMS:
        raise ModelError(name, f"{label} has {len(tensor.dims)} dimensions; expected at most {_MOST_DIMS}", _EXPORT)
    if any(dim < 0 for dim in tensor.dims) or prod(tensor.dims) > _MOST_ELEMENTS:
        raise ModelError(name, f"{label} has shape {list(tensor.dims)}, which no tensor can have", _EXPORT)
    if uses_external_data(tensor):
        return
    count, kind = prod(tensor.dims), TensorProto.DataType.Name(tensor.data_type).lower()
    bits = _PACKED_BITS.get(int(tensor.data_type))
    if tensor.HasField("raw_data") and tensor.data_type != TensorProto.STRING:
        width = bits or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        expected, got, unit = -(-count * width // 8), len(tensor.raw_data), "bytes"
    else:
        places = 2 * count if tensor.data_type in _PAIRS else -(-count * (bits or 8) // 8)
        expected, unit = places, "elements"
        got = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type)))
    if got != expected:
        problem = f"{label} is {kind} {list(tensor.dims)}, {expected} {unit}; the file holds {got}"
        raise ModelError(name, problem, f"the file is damaged: {_EXPORT}")


def _check_opsets(model: onnx.ModelProto, name: str) -> None:
    versions: dict[str, int] = {}
    newest = onnx.defs.onnx_opset_version()
    for item in model.opset_import:
        domain = "" if item.domain in _STANDARD else item.domain
        if versions.setdefault(domain, item.version) != item.version:
            problem = f"imports operator set {domain or 'ai.onnx'} as {versions[domain]} and as {item.version}"
            raise ModelError(name, problem, _EXPORT)
    used = {"" if node.domain in _STANDARD else node.domain for node in _nodes(model.graph)}
    if "" in used and "" not in versions:
        raise ModelError(name, "does not say which version of the standard operators it uses", _EXPORT)
    version = versions.get("", 1)
    if not 1 <= version <= newest:
        problem = f"uses version {version} of the standard operators; known are 1 to {newest}"
        raise ModelError(name, problem, "install a newer onnx package, or export it with an older operator set")


def _check_functions(model: onnx.ModelProto, name: str) -> None:
    """No function may be defined twice or call itself, by others either."""
    bodies: dict[tuple[str, str], onnx.FunctionProto] = {}
    for function in model.functions:
        if bodies.setdefault((function.domain, function.name), function) is not function:
            raise ModelError(name, f"function {function.name} is defined twice", _EXPORT)
    calls = {
        key: {(node.domain, node.op_type) for top in body.node for node in _with_inner(top)} & bodies.keys()
        for key, body in bodies.items()
    }
    # Functions that only call what is done already are done; those that never are, call themselves.
    while done := {key for key, called in calls.items() if not called}:
        calls = {key: called - done for key, called in calls.items() if key not in done}
    if calls:
        raise ModelError(name, f"function {sorted(calls)[0][1]} calls itself", _EXPORT)
    for function in model.functions:
        for tensor in (one for node in function.node for one in _node_tensors(node)):
            check_size(tensor, name)


class _Orders:
    """Finds an order of the nodes for a graph and the graphs inside, in the order in which `_graphs` gives them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.found: list[list[int]] = []
        self.changed = False

    def visit(self, graph: onnx.GraphProto, outer: frozenset[str], where: str) -> None:
        """Check a graph that may read the values ``outer``."""
        given = self._given(graph, where)
        producers = self._producers(graph, given)
        reads = [{name for name in _read(node) if name in producers} for node in graph.node]
        known = outer | given
        for node in graph.node:
            missing = next((name for name in _read(node) if name not in producers and name not in known), None)
            if missing is not None:
                raise ModelError(_label(node), f"its input {missing} is computed by no node", _CHECKER)
        order = self._order(graph, producers, reads)
        self.found.append(order)
        self.changed |= order != sorted(order)
        values = known | producers.keys()
        for output in graph.output:
            if not output.name:
                raise ModelError(self._name, f"an output of {where} has no name", _EXPORT)
            if output.name not in values:
                raise ModelError(output.name, f"is an output of {where} that no node computes", _CHECKER)
        for node in graph.node:
            for inner in _inner_graphs(node):
                self.visit(inner, values, f"a graph inside of {_label(node)}")

    def _given(self, graph: onnx.GraphProto, where: str) -> frozenset[str]:
        """Names of inputs and weights; a weight may be the default of an input."""
        for kind, names in (
            ("input", [value.name for value in graph.input]),
            ("weight", [tensor.name for tensor in graph.initializer]),
        ):
            if "" in names:
                raise ModelError(self._name, f"an {kind} of {where} has no name".replace("an w", "a w"), _EXPORT)
            if (twice := _twice(names)) is not None:
                raise ModelError(self._name, f"{kind} {twice} is given twice", _EXPORT)
        sparse = [tensor.values.name for tensor in graph.sparse_initializer]
        return frozenset([*(value.name for value in graph.input), *(t.name for t in graph.initializer), *sparse])

    def _producers(self, graph: onnx.GraphProto, given: frozenset[str]) -> dict[str, int]:
        producers: dict[str, int] = {}
        for index, node in enumerate(graph.node):
            for output in filter(None, node.output):
                if output in producers or output in given:
                    raise ModelError(_label(node), f"its output {output} is computed or given elsewhere too", _CHECKER)
                producers[output] = index
        return producers

    @staticmethod
    def _order(graph: onnx.GraphProto, producers: Mapping[str, int], reads: Sequence[set[str]]) -> list[int]:
        """Kahn's algorithm; of nodes that are ready the one that comes first in the file."""
        waits = [{producers[name] for name in names} for names in reads]
        readers: dict[int, list[int]] = {}
        for index, needed in enumerate(waits):
            for one in needed:
                readers.setdefault(one, []).append(index)
        left = [len(needed) for needed in waits]
        ready = [index for index, count in enumerate(left) if count == 0]
        order: list[int] = []
        while ready:
            index = heapq.heappop(ready)
            order.append(index)
            for reader in readers.get(index, ()):
                left[reader] -= 1
                if left[reader] == 0:
                    heapq.heappush(ready, reader)
        if len(order) < len(waits):
            stuck = next(index for index, count in enumerate(left) if count)
            cycle = _cycle(stuck, waits, left)
            names = " -> ".join(_label(graph.node[index]) for index in cycle)
            raise ModelError(_label(graph.node[cycle[0]]), f"depends on itself: {names}", _CHECKER)
        return order


def _cycle(start: int, waits: Sequence[set[int]], left: Sequence[int]) -> list[int]:
    """Nodes of a cycle, in the order of the data, the first one again at the end; at most five of them."""
    path: list[int] = [start]
    while path[-1] not in path[:-1]:
        path.append(min(index for index in waits[path[-1]] if left[index]))
    cycle = path[path.index(path[-1]) :][::-1]
    return cycle if len(cycle) <= 5 else [*cycle[:4], cycle[-1]]


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads: its inputs, and what the graphs inside read from around them."""
    yield from filter(None, node.input)
    for graph in _inner_graphs(node):
        yield from sorted(_free(graph))


def _free(graph: onnx.GraphProto) -> set[str]:
    """Names that a graph reads and does not define."""
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own.update(tensor.values.name for tensor in graph.sparse_initializer)
    own.update(output for node in graph.node for output in node.output)
    names = {name for node in graph.node for name in _read(node)} | {output.name for output in graph.output}
    return names - own - {""}


def _inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside, in the order in which `_Orders.visit` meets them."""
    yield graph
    for node in graph.node:
        for inner in _inner_graphs(node):
            yield from _graphs(inner)


def _with_inner(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    yield node
    for graph in _inner_graphs(node):
        yield from _nodes(graph)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield from _with_inner(node)


def tensors_of(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every dense tensor of a graph: initializers and attributes, those of graphs inside too."""
    yield from graph.initializer
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
    for graph in _inner_graphs(node):
        yield from tensors_of(graph)


def _label(node: onnx.NodeProto) -> str:
    return str(node.name or next(filter(None, node.output), node.op_type))


def _twice(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
