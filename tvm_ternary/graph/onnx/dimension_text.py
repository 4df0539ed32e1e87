"""Dimensions that the file gives as arithmetic over others, ``past_length + length``.

A text is arithmetic only where every name in it is a dimension of its own; ``batch-size`` stays a name.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from tvm_ternary.runtime.linear import Linear

# What Python says of a text that is no expression, or one with thousands of brackets.
_UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
}


def evaluate_dimension(text: str, values: Mapping[str, Any]) -> Any | None:
    """Evaluate a dimension's text.

    Parameters
    ----------
    text : str
        A name or ``+ - * / //`` over names and integers; dimensions divide as integers.
    values : Mapping[str, Any]
        Numbers or expressions by name.

    Returns
    -------
    Any or None
        The value; None where the text is no arithmetic or a name has no value.
    """
    if text in values:
        return values[text]
    try:
        return _evaluate(ast.parse(text, mode="eval").body, values)
    except (*_UNREADABLE, LookupError, ArithmeticError):
        return None


def _evaluate(node: ast.expr, values: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_evaluate(node.left, values), _evaluate(node.right, values))
    raise ValueError("no arithmetic")


def linear_dimension(text: str) -> Linear | None:
    """Read ``32*rows + 4``; None where the text is a name alone or no sum of multiples."""
    try:
        names = {node.id for node in ast.walk(ast.parse(text.strip(), mode="eval")) if isinstance(node, ast.Name)}
        value = evaluate_dimension(text.strip(), {name: Linear({name: 1}) for name in names - {text}})
    except (*_UNREADABLE, TypeError):
        return None
    return value if isinstance(value, Linear) and value.factors else None


def substitute_dimensions(text: str, values: Mapping[str, int | str]) -> str:
    """Put numbers, other names or arithmetic in the place of names."""
    if text in values:
        return str(values[text])
    try:
        tree = ast.parse(text, mode="eval")
    except _UNREADABLE:
        return text
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if names.isdisjoint(values):
        return text
    return ast.unparse(_Substitution(values).visit(tree))


class _Substitution(ast.NodeTransformer):
    def __init__(self, values: Mapping[str, int | str]) -> None:
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.AST:
        value = self.values.get(node.id, node.id)
        if isinstance(value, int):
            return ast.Constant(value)
        # Arithmetic is one factor; it is written as it stands, as a name is that Python would not take for one.
        return ast.Name(value if linear_dimension(value) is None else f"({value})", node.ctx)
