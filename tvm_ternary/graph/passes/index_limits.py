"""Find how large the whole numbers in an input may be: as many as a table has rows that they choose from."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

# What stands between token numbers and the table: casts, shapes, and ONNX's rule for negative numbers.
_KEEP_NUMBERS = ("astype", "reshape", "expand_dims", "squeeze", "broadcast_to", "where", "less", "add")


def index_limits(module: tvm.IRModule) -> dict[str, int]:
    """Rows of the smallest constant table that each input chooses rows of.

    Parameters
    ----------
    module : tvm.IRModule
        As the importers make it.

    Returns
    -------
    dict of str to int
        By input: its elements have to be below. Inputs that choose nothing, or together with others, are not in it.
    """
    main = module["main"]
    inputs = set(main.params[: int(main.attrs["num_input"])])
    values = {binding.var: binding.value for block in main.body.blocks for binding in block.bindings}
    limits: dict[str, int] = {}
    for value in values.values():
        if not isinstance(value, relax.Call) or value.op != _op("take"):
            continue
        table, index = value.args
        sources = _sources(index, inputs, values)
        if isinstance(table, tvm.ir.GenericConst) and sources is not None and len(sources) == 1:
            axis = 0 if value.attrs.axis is None else int(value.attrs.axis)
            rows = int(table.ty.shape.values[axis])
            (name,) = (var.name for var in sources)
            limits[name] = min(rows, limits.get(name, rows))
    return limits


def _sources(expr: relax.Expr, inputs: set[relax.Var], values: dict[relax.Var, Any]) -> set[relax.Var] | None:
    """The inputs whose numbers an expression gives; None where it computes others."""
    if expr in inputs:
        return {expr}
    if isinstance(expr, relax.Var) and expr in values:
        return _sources(values[expr], inputs, values)
    if isinstance(expr, tvm.ir.GenericConst | relax.ShapeExpr):
        return set()
    if not isinstance(expr, relax.Call) or expr.op not in map(_op, _KEEP_NUMBERS):
        return None
    found: set[relax.Var] = set()
    for arg in expr.args:
        sources = _sources(arg, inputs, values)
        if sources is None:
            return None
        found |= sources
    return found


def _op(name: str) -> Any:
    return tvm.ir.Op.get(f"relax.{name}")
