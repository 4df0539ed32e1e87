"""Keep the rows of embedding tables as int8 with a scale each.

Before: ``take(table, ids)``, the table a float32 constant. After: ``codes[ids] * scale[ids]``, one kernel, which reads
a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax, te, tirx
from tvm.ir import Expr, Op

from tvm_ternary.graph.passes.dataflow import with_main
from tvm_ternary.quantize.tables import quantize_rows, row_bits, rows_error

TAKE = Op.get("relax.take")

FEWEST_ROWS = 16
"""Of a table with fewer, of token types for one, the error of a row is in every token and does not average out: two
rows of 8 bits take 0.003 off the cosine of MiniLM's embeddings, where 30,522 words take 0.00002."""


@dataclass(frozen=True)
class QuantizedTables:
    """A module in which tables are int8.

    Attributes
    ----------
    module : tvm.IRModule
    tables : dict of str to relax.Expr
        The constants of ``main`` by name; a table that was quantized is now ``NAME.rows``, (V, D) int8, and
        ``NAME.row_scale``, (V, 1) float32.
    errors : dict of str to float
        For each table that was quantized, the relative error in Frobenius norm.
    kept : dict of str to str
        For each that was not, why.
    """

    module: tvm.IRModule
    tables: dict[str, relax.Expr]
    errors: dict[str, float]
    kept: dict[str, str]


def quantize_tables(module: tvm.IRModule, tables: Mapping[str, relax.Expr], names: Iterable[str]) -> QuantizedTables:
    """Quantize the tables of ``main`` that nothing but ``take`` along their rows reads.

    An index that lies outside gives NaN where it gave NaN.

    Parameters
    ----------
    module : tvm.IRModule
    tables : mapping of str to relax.Expr
        Constants of ``main`` by name.
    names : iterable of str
        Which of them to quantize, where it can be done.
    """
    found, errors, kept = dict(tables), dict[str, float](), dict[str, str]()
    readers = _Readers()
    readers.visit_expr(module["main"])
    pairs: list[tuple[relax.Expr, relax.Expr, relax.Expr]] = []
    for name in names:
        table = tables[name]
        reason = _reason(table, readers.otherwise)
        array = None if reason else table.value.numpy()
        if array is None or not np.isfinite(array).all():
            kept[name] = reason or "a float table that is not finite"
            continue
        codes, scale = quantize_rows(array)
        errors[name] = rows_error(array, codes, scale)
        constants = (relax.const(codes), relax.const(scale))
        del found[name]
        found |= zip((f"{name}.rows", f"{name}.row_scale"), constants, strict=True)
        pairs.append((table, *constants))
    return QuantizedTables(_Rewriter(module, pairs).run(), found, errors, kept)


def _reason(table: relax.Expr, otherwise: list[relax.Expr]) -> str | None:
    """Why a table has to stay as it is, as far as its kind and its readers tell."""
    dtype, shape = str(table.value.dtype), tuple(map(int, table.value.shape))
    if dtype != "float32" or len(shape) != 2:
        return f"a table of {dtype}"
    if shape[0] < FEWEST_ROWS:
        return "a float table of few rows"
    if row_bits(max(shape[1], 1)) >= 32:
        return "a float table whose rows are too short to gain from a scale"
    if any(table.same_as(other) for other in otherwise):
        return "a float table that is not read by rows alone"
    return None


def _is_rows(call: relax.Call) -> bool:
    return bool(call.op == TAKE and isinstance(call.args[0], tvm.ir.GenericConst) and call.attrs.axis == 0)


@relax.expr_functor.visitor
class _Readers(relax.PyExprVisitor):
    """Finds the constants that something other than a ``take`` of rows reads."""

    def __init__(self) -> None:
        super().__init__()
        self.otherwise: list[relax.Expr] = []

    def visit_call_(self, op: relax.Call) -> None:
        for argument in op.args[1:] if _is_rows(op) else op.args:
            self.visit_expr(argument)

    def visit_generic_const_(self, op: relax.Expr) -> None:
        self.otherwise.append(op)


@relax.expr_functor.mutator
class _Rewriter(relax.PyExprMutator):
    """Replaces what is taken of one constant by a call that reads two."""

    def __init__(self, module: tvm.IRModule, pairs: list[tuple[relax.Expr, relax.Expr, relax.Expr]]) -> None:
        super().__init__(module)
        self.module, self.pairs = module, pairs

    def run(self) -> tvm.IRModule:
        return with_main(self.builder_, self.visit_expr(self.module["main"]))

    def visit_call_(self, op: relax.Call) -> relax.Expr:
        call = super().visit_call_(op)
        pair = next((pair for pair in self.pairs if _is_rows(call) and pair[0].same_as(call.args[0])), None)
        if pair is None:
            return call
        _, codes, scale = pair
        return self.builder_.call_te(_take_rows, codes, scale, call.args[1], str(call.attrs.mode))


def _take_rows(codes: te.Tensor, scale: te.Tensor, ids: te.Tensor, mode: str) -> te.Tensor:
    """Rows of codes (V, D) times their scales (V, 1), as float32, at ids of any shape; outside as ``take`` does."""
    count, width = codes.shape

    def element(*indices: tirx.Var) -> Expr:
        place = ids(*indices[:-1])
        inside = tirx.all(place >= 0, place < count)
        if mode != "fast":
            place = tirx.min(tirx.max(place, tirx.const(0, ids.dtype)), tirx.Cast(ids.dtype, count - 1))
        value = codes(place, indices[-1]).astype("float32") * scale(place, 0)
        return tirx.if_then_else(inside, value, tirx.const(float("nan"), "float32")) if mode == "nan" else value

    return te.compute((*ids.shape, width), element, name="take_rows")
