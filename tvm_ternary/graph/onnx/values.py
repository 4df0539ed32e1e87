"""What the importer knows about a value of the ONNX graph while it walks it.

A value is one of three things, from the most to the least known:

- ``Constant``: every element is a number, known now;
- ``Symbols``: an integer or boolean array whose elements are numbers or expressions over the symbolic dimensions
  (what ``Shape`` gives, and everything computed from it);
- a Relax expression: known only when the module runs.

Nodes whose inputs are all of the first two kinds are computed at import and leave nothing behind in the module.
"""

from __future__ import annotations

import functools
import itertools
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from tvm import relax, tirx
from tvm.ir import Range, is_prim_expr
from tvm.sym import Analyzer, detect_linear_equation
from tvm.tirx.analysis import undefined_vars

Dim: TypeAlias = Any
"""A dimension: an ``int`` or an int64 TVM expression over symbolic dimensions."""

SYMBOLIC_DTYPES = frozenset({"int64", "int32", "bool"})
FLOAT_SYMBOLIC_DTYPES = frozenset({"float32", "float64"})
"""Element types of dimensions that an exporter casts to float and back, or counts in."""

_LARGEST_DIMENSION = 10**9
"""Exporters write this number where they mean "to the end"; no dimension is larger."""


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor whose elements are known at import.

    Parameters
    ----------
    array : np.ndarray
        The elements.
    names : tuple[str, ...]
        Names the value goes by in the file, the nearest first: its own, then that of the initializer behind it.
    """

    array: np.ndarray
    names: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Symbols:
    """An array of numbers and expressions over the symbolic dimensions.

    Parameters
    ----------
    values : np.ndarray of object
        ``int``, ``bool`` or integer and boolean TVM expressions.
    dtype : str
        ``int64``, ``int32`` or ``bool``; ``float32`` or ``float64`` where the integers were cast to it.
    """

    values: np.ndarray
    dtype: str


Value: TypeAlias = "Constant | Symbols | relax.Expr"


PLACED = "tvm_ternary.placed"
"""Attribute of a function ``(past, new, starts)`` that puts new keys or values behind so many of the past ones."""


def object_array(items: Sequence[Any] | Any, shape: Sequence[int] | None = None) -> np.ndarray:
    """Put numbers and expressions into an object array without numpy looking inside them.

    ``shape`` of None means one dimension for a sequence.
    """
    flat = list(items)
    array = np.empty(len(flat), dtype=object)
    for index, item in enumerate(flat):
        array[index] = item
    return array if shape is None else array.reshape(tuple(shape))


def plain(item: Any) -> Any:
    """An immediate as a Python number; anything else as it is."""
    if isinstance(item, tirx.IntImm):
        return bool(item.value) if str(item.ty) == "bool" else int(item.value)
    if isinstance(item, np.generic):
        return item.item()
    return item


def describe(item: Any) -> str:
    """A dimension or an expression as a person writes it."""
    return re.sub(r"T\.int64\((-?\d+)\)", r"\1", str(item)).replace("T.", "")


class Algebra:
    """Decides and simplifies expressions over dimensions, each of which is at least one.

    A symbolic dimension of zero is thereby ruled out: the runtime refuses empty inputs.
    """

    def __init__(self) -> None:
        self._analyzer = Analyzer()
        self._assumptions: list[Any] = []

    def dimension(self, name: str) -> tirx.Var:
        """Make the variable of a symbolic dimension."""
        var = tirx.Var(name, "int64")
        one = tirx.const(1, "int64")
        self._analyzer.bind(var, Range.from_min_extent(one, tirx.const(_LARGEST_DIMENSION, "int64")))
        return var

    def limit(self, expr: Any, most: int) -> dict[str, int] | None:
        """Assume that an expression is at most ``most``.

        Returns
        -------
        dict of str to int, or None
            Dimensions and the largest value that each may then take; of a sum of dimensions, ``past + length``, its own
            too. None when the expression is neither that nor grows with one dimension, and nothing is assumed.
        """
        names = undefined_vars(expr)
        if len(names) > 1:
            return self._limit_sum(expr, names, most)
        if not names:
            return None
        factor, offset = (self.simplify(part) for part in detect_linear_equation(expr, names) or (0, 0))
        if not isinstance(factor, int) or not isinstance(offset, int) or factor < 1 or most < factor + offset:
            return None
        return {names[0].name: self._bound(names[0], (most - offset) // factor)}

    def _limit_sum(self, expr: Any, names: Sequence[Any], most: int) -> dict[str, int] | None:
        *factors, offset = (self.simplify(part) for part in detect_linear_equation(expr, names) or (0,))
        most -= offset if isinstance(offset, int) else most
        if any(factor != 1 for factor in factors) or len(factors) != len(names) or most < len(names):
            return None
        limits = {name.name: self._bound(name, most - len(names) + 1) for name in names}
        text = " + ".join(sorted(limits))
        for order in itertools.permutations(names):  # the analyzer finds a sum only as it was written
            assumption = self._analyzer.constraint_scope(functools.reduce(operator.add, order) <= most)
            assumption.__enter__()
            self._assumptions.append(assumption)  # it holds as long as it is kept
        return limits | {text: most}

    def _bound(self, name: tirx.Var, most: int) -> int:
        """Bind a dimension to at most a value, or to less where it was before."""
        largest = min(most, self._analyzer.const_int_bound(name).max_value)
        extent = Range.from_min_extent(tirx.const(1, "int64"), tirx.const(largest, "int64"))
        self._analyzer.bind(name, extent, allow_override=True)
        return int(largest)

    def simplify(self, item: Any) -> Any:
        """The simplest form: a Python number where the value does not depend on a symbolic dimension."""
        return plain(self._analyzer.simplify(item)) if is_prim_expr(item) else plain(item)

    def proves(self, condition: Any) -> bool:
        """Whether a condition holds for all values of the dimensions."""
        condition = self.simplify(condition)
        return condition if isinstance(condition, bool) else bool(self._analyzer.can_prove(condition))

    def equal(self, left: Dim, right: Dim) -> bool:
        """Whether two dimensions are the same for all values of the symbolic ones."""
        if isinstance(left, int) and isinstance(right, int):
            return left == right
        return bool(self._analyzer.can_prove_equal(as_expr(left), as_expr(right)))

    def compare(self, operator: str, left: Any, right: Any) -> Any:
        """Compare two elements: ``bool`` where decided, else a boolean expression.

        ``operator`` is one of ``==``, ``<``, ``<=``.
        """
        left, right = as_expr(left), as_expr(right)
        build = {"==": tirx.EQ, "<": tirx.LT, "<=": tirx.LE}[operator]
        opposite = {"==": tirx.NE, "<": tirx.GE, "<=": tirx.GT}[operator]
        if self.proves(build(left, right)):
            return True
        if self.proves(opposite(left, right)):
            return False
        return build(left, right)

    def minimum(self, left: Dim, right: Dim) -> Dim:
        """The smaller of two, decided where it can be."""
        a, b = as_expr(left), as_expr(right)
        return self._decided(tirx.min(a, b), (a <= b, left), (b <= a, right))

    def maximum(self, left: Dim, right: Dim) -> Dim:
        """The larger of two, decided where it can be."""
        a, b = as_expr(left), as_expr(right)
        return self._decided(tirx.max(a, b), (a >= b, left), (b >= a, right))

    def _decided(self, extreme: Any, *cases: tuple[Any, Dim]) -> Dim:
        """An extreme, or the value of a case whose condition holds where TVM's rules for extremes do not see it."""
        simple = self.simplify(extreme)
        if not isinstance(simple, tirx.Min | tirx.Max):
            return simple
        return next((self.simplify(value) for condition, value in cases if self.proves(condition)), simple)

    def divide(self, left: Dim, right: Dim) -> Dim:
        """Integer division towards zero, as ONNX and C do it.

        Raises
        ------
        ZeroDivisionError
            If the divisor is zero.
        """
        left, right = self.simplify(left), self.simplify(right)
        if isinstance(right, int) and right == 0:
            raise ZeroDivisionError("division by zero")
        if isinstance(left, int) and isinstance(right, int):
            quotient = abs(left) // abs(right)
            return quotient if (left < 0) == (right < 0) else -quotient
        left, right = as_expr(left), as_expr(right)
        if self.proves(left >= 0) and self.proves(right > 0):
            return self.simplify(tirx.floordiv(left, right))
        return self.simplify(tirx.truncdiv(left, right))

    def modulo(self, left: Dim, right: Dim) -> Dim:
        """The remainder that has the divisor's sign.

        Raises
        ------
        ZeroDivisionError
            If the divisor is zero.
        """
        right = self.simplify(right)
        if isinstance(right, int) and right == 0:
            raise ZeroDivisionError("modulo by zero")
        return self.simplify(tirx.floormod(as_expr(left), as_expr(right)))

    def product(self, dims: Iterable[Dim]) -> Dim:
        """The product of dimensions, 1 for none."""
        total: Any = 1
        for dim in dims:
            total = total * dim
        return self.simplify(total)

    def quotient(self, dims: Iterable[Dim], divisors: Iterable[Dim]) -> Dim | None:
        """The dimension that makes ``divisors`` times it equal to ``dims``, or None where it cannot be told.

        Equal factors cancel first, so ``(batch, length + 1, 384) / (batch, length + 1, 12)`` is 32.
        """
        left, right = list(dims), []
        divisors = list(divisors)
        if any(isinstance(divisor, int) and divisor == 0 for divisor in divisors):
            return None
        for divisor in divisors:
            match = next((i for i, dim in enumerate(left) if self.equal(dim, divisor)), None)
            if match is None:
                right.append(divisor)
            else:
                del left[match]
        numerator, denominator = self.product(left), self.product(right)
        result = self.divide(numerator, denominator)
        return result if self.equal(self.product([result, denominator]), numerator) else None


def as_expr(item: Any) -> Any:
    """A number as an int64 (or bool) immediate; an expression as it is, widened to int64."""
    if isinstance(item, bool):
        return tirx.const(item, "bool")
    if isinstance(item, (int, np.integer)):
        return tirx.const(int(item), "int64")
    return item


def settle(algebra: Algebra, values: np.ndarray, dtype: str) -> Constant | Symbols:
    """Simplify every element; a ``Constant`` when all of them turn out to be numbers."""
    items = [algebra.simplify(item) for item in values.reshape(-1)]
    if any(is_prim_expr(item) for item in items):
        return Symbols(object_array(items, values.shape), dtype)
    return Constant(np.array(items, dtype=np.dtype(dtype)).reshape(values.shape))
