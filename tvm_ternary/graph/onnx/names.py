"""Give every matrix a name that says where it stands, whatever the exporter called it.

Exporters that fold a transpose into a weight lose its name (``onnx::MatMul_492``, ``val_49``). The bias added after the
product often kept its own, and else the node has a path.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

import onnx

_MADE_UP = frozenset({"", "const", "constant", "const_fold_opt", "val", "tensor", "initializer", "init"})
_COUNTERS = re.compile(r"(_output)?_+\d+(_\w{1,5})?$")


def is_made_up(name: str) -> bool:
    """Whether an exporter made the name from a counter or an operator, so that it says nothing about the model."""
    last = re.sub(r":\d+$", "", name).split("/")[-1]
    if last.startswith("onnx::"):
        return True
    while (shorter := _COUNTERS.sub("", last)) != last:
        last = shorter
    return last.isdigit() or last.lower() in _MADE_UP or _is_operator(last)


def _is_operator(word: str) -> bool:
    return onnx.defs.has(word)


def bias_names(graph: onnx.GraphProto) -> dict[str, str]:
    """Map the output of a product to the name of the bias added to it, where it has a telling one."""
    made = {name for node in graph.node for name in node.output}
    pairs: list[tuple[str, str]] = []
    for node in graph.node:
        if node.op_type == "Gemm" and len(node.input) > 2 and node.output:
            pairs.append((node.output[0], node.input[2]))
        elif node.op_type == "Add" and len(node.input) == 2:
            left, right = node.input
            pairs += [(left, right), (right, left)]
    return {
        product: bias
        for product, bias in pairs
        if product in made and bias not in made and "bias" in bias.lower() and not is_made_up(bias)
    }


def matrix_name(names: Iterable[str], node: onnx.NodeProto, bias: str | None) -> str:
    """Name a matrix.

    Parameters
    ----------
    names : Iterable[str]
        What the matrix is called in the file, the nearest name first.
    node : onnx.NodeProto
        The node that multiplies by it.
    bias : str or None
        The name of the bias added to the product.
    """
    for name in names:
        if not is_made_up(name):
            return dotted(name)
    if bias:
        head, _, tail = dotted(bias).rpartition("bias")
        return f"{head}weight{tail}"
    path = dotted(node.name or node.output[0]).split(".")
    while len(path) > 1 and is_made_up(path[-1]):
        path.pop()
    return ".".join([*path, "weight"])


def dotted(name: str) -> str:
    """A path with dots, without the exporter's leading slash and trailing output number."""
    return re.sub(r":\d+$", "", name).strip("/").replace("/", ".")


def unique(name: str, taken: Container[str]) -> str:
    """The name, or with a number behind it when it is taken."""
    if name not in taken:
        return name
    number = 1
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"
