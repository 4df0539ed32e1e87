"""Who computes a variable of a function, and who reads it; and the module around a function that was rewritten."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import tvm
from tvm import relax


class Dataflow:
    """The bindings of a function, looked at from both ends.

    Parameters
    ----------
    main : relax.Function

    Attributes
    ----------
    calls : dict of relax.Var to relax.Call
        What computes a variable, where that is an operator; in order.
    fields : dict of relax.Var to relax.Expr
        The tuple that a variable is a field of.
    readers : mapping of relax.Var to set of relax.Var
        The variables that are computed from one. Whoever calls the function reads its result: a reader that nothing
        computes.
    """

    def __init__(self, main: relax.Function) -> None:
        bindings = [binding for block in main.body.blocks for binding in block.bindings]
        self.calls = {b.var: b.value for b in bindings if isinstance(b, relax.VarBinding) and _is_call(b.value)}
        self.fields = {
            b.var: b.value.tuple_value
            for b in bindings
            if isinstance(b, relax.VarBinding) and isinstance(b.value, relax.TupleGetItem)
        }
        self.readers: defaultdict[relax.Var, set[relax.Var]] = defaultdict(set)
        for binding in bindings:
            self._read(binding.value, binding.var)
        self._read(main.body.body, relax.Var("caller"))

    def _read(self, expr: relax.Expr, reader: relax.Var) -> None:
        def visit(part: relax.Expr) -> None:
            if isinstance(part, relax.Var):
                self.readers[part].add(reader)

        relax.analysis.post_order_visit(expr, visit)

    def call_of(self, expr: relax.Expr, *ops: str) -> relax.Call | None:
        """The operator that computes a value, if it is one of these; names without ``relax.``."""
        call = self.calls.get(expr) if isinstance(expr, relax.Var) else None
        return call if call is not None and call.op.name.removeprefix("relax.") in ops else None

    def only_reader(self, var: relax.Var) -> relax.Var | None:
        """The variable that all that reads one is part of; None where there are several, or none that is computed."""
        readers = self.readers[var]
        return next(iter(readers)) if len(readers) == 1 and readers <= self.calls.keys() else None


def _is_call(value: relax.Expr) -> bool:
    return isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op)


def dims_of(expr: relax.Expr) -> list[Any] | None:
    """The dimensions of a tensor, or those that a shape holds; None where they are not known."""
    if isinstance(expr.ty, relax.ShapeType):
        return None if expr.ty.values is None else list(expr.ty.values)
    shape = getattr(expr.ty, "shape", None)
    return list(shape.values) if isinstance(shape, relax.ShapeExpr) else None


def with_main(builder: relax.BlockBuilder, main: relax.Function) -> tvm.IRModule:
    """The module of a builder, with what was added to it, and another ``main``: it still holds the one it was given."""
    module = builder.get().clone()
    module[module.get_global_var("main")] = main
    return module
