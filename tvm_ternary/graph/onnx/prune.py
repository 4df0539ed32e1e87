"""Drop nodes that no output needs, so that an operator nobody waits for is no reason to refuse a model."""

from __future__ import annotations

import onnx


def prune_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove the nodes that the outputs do not depend on."""
    graph = model.graph
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(reads(node))
    if len(kept) == len(graph.node):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend(reversed(kept))
    return result


def reads(node: onnx.NodeProto) -> set[str]:
    """Names a node reads, those read inside its subgraphs included."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            names.update(*(reads(inner) for inner in graph.node), (output.name for output in graph.output))
    return names
