"""Where TVM's converters give wrong results, measured with the node tests of the onnx package: refused instead.

A row names an operator of the standard set and tells which uses of it are affected, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from tvm_ternary.graph.onnx.node import Node

_Rule: TypeAlias = "Callable[[Node], str | None]"


def flaw(node: Node) -> str | None:
    """Why TVM's converter of a node must not be used, None where it may be."""
    rule = _FLAWS.get(node.op)
    return None if rule is None else rule(node)


def _if_set(attribute: str, usual: object, problem: str) -> _Rule:
    return lambda node: None if node.attributes.get(attribute, usual) == usual else problem


_FLAWS: dict[str, _Rule] = {
    "RoiAlign": _if_set("mode", "avg", "the maximum of a region"),
}
