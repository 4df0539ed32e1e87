"""Which values the elements of a tensor can have, where a model's graph shows that they are few.

So a mask is known to be boolean however it is spelled: ``where(seen, 0, -inf)``, ``(1 - seen) * lowest``, a sum of two
of them, a constant.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvm_ternary.graph.passes.dataflow import Dataflow

_MOST = 8
"""More values than these are none."""

_SAME = ("reshape", "expand_dims", "squeeze", "broadcast_to", "permute_dims", "strided_slice", "repeat", "tile")
"""Operators whose results have only elements of their first operand."""

_KINDS = "biuf"
"""Of numbers that numpy has, too: booleans, integers and floats."""

_EXACT = 2**53
"""Up to here a float64 is any integer."""

_PAIRS = ("add", "subtract", "multiply", "maximum", "minimum")

Values = frozenset[float]


class KnownValues:
    """What is known about the tensors of a function.

    Parameters
    ----------
    flow : Dataflow
    """

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self.found: dict[relax.Var, Values | None] = {}

    def of(self, expr: relax.Expr) -> Values | None:
        """A superset of the values of a tensor; None where it is not known, or has too many. A NaN is one, too."""
        if isinstance(expr, tvm.ir.GenericConst):
            return _few(expr.value.numpy())
        if str(expr.ty.dtype) == "bool":
            return frozenset((0.0, 1.0))
        if not isinstance(expr, relax.Var):
            return None
        if expr not in self.found:
            # Asked for once, however many read it.
            self.found[expr] = self._computed(expr)
        return self.found[expr]

    def _computed(self, var: relax.Var) -> Values | None:
        call, dtype = self.flow.calls.get(var), str(var.ty.dtype)
        if call is None:
            return None
        name = call.op.name.removeprefix("relax.")
        if name in _SAME:
            return self.of(call.args[0])
        if name == "astype":
            return self._mapped(lambda x: x.astype(dtype), dtype, call.args[0])
        if name == "where":
            return self._joined(call.args[1:])
        if name == "concat":
            return self._joined(call.args[0].fields) if isinstance(call.args[0], relax.Tuple) else None
        if name in ("triu", "tril"):
            kept = self.of(call.args[0])
            return None if kept is None else kept | {0.0}
        if name in ("full", "full_like"):
            return self.of(call.args[1])
        if name in _PAIRS:
            return self._mapped(lambda a, b: getattr(np, name)(a, b).astype(dtype), dtype, *call.args)
        return None

    def _joined(self, operands: list[relax.Expr]) -> Values | None:
        result: Values = frozenset()
        for values in map(self.of, operands):
            if values is None:
                return None
            result |= values
        return result if len(result) <= _MOST else None

    def _mapped(self, function: object, dtype: str, *operands: relax.Expr) -> Values | None:
        """What a function gives of any values of its operands, in their own precision, as ``dtype``."""
        assert callable(function)
        values = [self.of(operand) for operand in operands]
        dtypes = [str(operand.ty.dtype) for operand in operands]
        if any(known is None for known in values) or not all(map(_is_known, (*dtypes, dtype))):
            return None
        if dtype[0] in "iu" and any(name.startswith("float") for name in dtypes):
            # What becomes of an infinity is anyone's guess.
            return None
        with np.errstate(all="ignore"):
            results = [
                function(*(np.array(value, dtype) for value, dtype in zip(some, dtypes, strict=True)))
                for some in itertools.product(*values)  # type: ignore[arg-type]
            ]
        return _few(np.array(results))


def _is_known(dtype: str) -> bool:
    try:
        return np.dtype(dtype).kind in _KINDS
    except TypeError:
        return False


def _few(array: npt.NDArray[np.generic]) -> Values | None:
    values = np.unique(array)
    if len(values) > _MOST or values.dtype.kind not in _KINDS:
        return None
    if values.dtype.kind in "iu" and any(abs(int(value)) > _EXACT for value in values):
        return None
    return frozenset(map(float, values))


def only_hides(values: Values | None) -> float | None:
    """The negative number that a mask adds where it hides, if it adds nothing elsewhere; else None."""
    others = set() if values is None else values - {0.0}
    hidden = next(iter(others)) if len(others) == 1 else 0.0
    return hidden if hidden < 0 else None
