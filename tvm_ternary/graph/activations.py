"""Which activation function a few element-wise operators compute together, however an exporter spelled it.

A GELU comes as one operator, or as five to nine: ``x * 0.5 * (1 + erf(x / sqrt(2)))`` with its factors in any order, or
with a tanh of a cubic. Each operator is evaluated on formulas rather than numbers, a formula being a sum of products

    coefficient * y^i * f(a polynomial of y)^j

of one variable y and one function f. What comes out is compared with a short table, so that order, association and
the side on which a constant stands do not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import tvm
from tvm import relax

# Constants are float32, and some are products of two or three: a few roundings of 6e-8 each.
_TOLERANCE = 1e-6
# No function in the table below has a higher power. It keeps formulas short, whatever a graph computes.
_MOST_POWER = 3


@dataclass(frozen=True)
class Formula:
    """A sum of products of powers of a variable y and of one function of it.

    Attributes
    ----------
    terms : mapping of (int, int) to float
        For the powers of y and of the function, the coefficient.
    function : str, optional
        Name of the function's Relax operator; None where only powers of y occur.
    argument : mapping of int to float
        For each power of y, its coefficient in what the function is applied to.
    """

    terms: Mapping[tuple[int, int], float]
    function: str | None = None
    argument: Mapping[int, float] | None = None


VARIABLE = Formula({(1, 0): 1.0})
"""y itself."""


def formula_of(call: relax.Call, known: Mapping[relax.Var, Formula]) -> Formula | None:
    """Evaluate one operator.

    Parameters
    ----------
    call : relax.Call
    known : mapping of relax.Var to Formula
        What is known of the variables that it may read. Constants of one element need not be listed.

    Returns
    -------
    Formula or None
        None where the operator is not one of those below, reads anything else, or gives what is no such sum.
    """
    evaluate = _OPERATORS.get(call.op.name) if isinstance(call.op, tvm.ir.Op) else None
    operands = [_operand(arg, known) for arg in call.args]
    if evaluate is None or None in operands:
        return None
    result = evaluate(*operands)
    fits = result is not None and all(i <= _MOST_POWER and j <= 1 for i, j in result.terms)
    return result if fits else None


def activation_of(formula: Formula) -> str | None:
    """The name of the function that it is, None where the table has no such row."""
    for name, known in _ACTIVATIONS:
        same = formula.function == known.function and _close(formula.argument or {}, known.argument or {})
        if same and _close(formula.terms, known.terms):
            return name
    return None


def _operand(arg: Any, known: Mapping[relax.Var, Formula]) -> Formula | None:
    if isinstance(arg, relax.Var):
        return known.get(arg)
    if isinstance(arg, tvm.ir.GenericConst) and math.prod(map(int, arg.value.shape)) == 1:
        return Formula({(0, 0): float(arg.value.numpy().item())})
    return None


def _constant(formula: Formula) -> float | None:
    return formula.terms[0, 0] if set(formula.terms) == {(0, 0)} else None


def _common(a: Formula, b: Formula, terms: Mapping[tuple[int, int], float]) -> Formula | None:
    """A formula of both operands' function, which must be the same one."""
    if a.function is None or b.function is None:
        return Formula(terms, a.function or b.function, a.argument or b.argument)
    return Formula(terms, a.function, a.argument) if (a.function, a.argument) == (b.function, b.argument) else None


def _add(a: Formula, b: Formula) -> Formula | None:
    return _common(a, b, {key: a.terms.get(key, 0.0) + b.terms.get(key, 0.0) for key in {**a.terms, **b.terms}})


def _scaled(a: Formula, factor: float) -> Formula:
    return replace(a, terms={key: factor * value for key, value in a.terms.items()})


def _multiply(a: Formula, b: Formula) -> Formula | None:
    terms: dict[tuple[int, int], float] = {}
    for (i, j), left in a.terms.items():
        for (more_i, more_j), right in b.terms.items():
            key = i + more_i, j + more_j
            terms[key] = terms.get(key, 0.0) + left * right
    return _common(a, b, terms)


def _divide(a: Formula, b: Formula) -> Formula | None:
    divisor = _constant(b)
    return _scaled(a, 1 / divisor) if divisor else None


def _power(a: Formula, b: Formula) -> Formula | None:
    square = _multiply(a, a)
    exponent = _constant(b)
    if square is None or exponent not in (2.0, 3.0):
        return None
    return square if exponent == 2.0 else _multiply(square, a)


def _apply(function: str, a: Formula) -> Formula | None:
    """A function of a polynomial; a function of a function is none of those looked for."""
    if a.function is not None:
        return None
    return Formula({(0, 1): 1.0}, function, {power: value for (power, _), value in a.terms.items()})


_ITSELF = {(0, 1): 1.0}
_HALVES = {(1, 0): 0.5, (1, 1): 0.5}
_CUBIC = {1: math.sqrt(2 / math.pi), 3: 0.044715 * math.sqrt(2 / math.pi)}

_ACTIVATIONS: tuple[tuple[str, Formula], ...] = (
    ("relu", Formula(_ITSELF, "relax.nn.relu", {1: 1.0})),
    ("gelu", Formula(_ITSELF, "relax.nn.gelu", {1: 1.0})),
    ("gelu", Formula(_HALVES, "relax.erf", {1: math.sqrt(0.5)})),
    ("gelu_tanh", Formula(_ITSELF, "relax.nn.gelu_tanh", {1: 1.0})),
    ("gelu_tanh", Formula(_HALVES, "relax.tanh", _CUBIC)),
    ("silu", Formula(_ITSELF, "relax.nn.silu", {1: 1.0})),
    ("silu", Formula({(1, 1): 1.0}, "relax.sigmoid", {1: 1.0})),
)
"""Activation functions of y by their keys in `kernels.matmul.EPILOGUES`, in each form that graphs hold."""

_OPERATORS: dict[str, Callable[..., Formula | None]] = {
    "relax.add": _add,
    "relax.subtract": lambda a, b: _add(a, _scaled(b, -1.0)),
    "relax.multiply": _multiply,
    "relax.divide": _divide,
    "relax.power": _power,
    "relax.negative": lambda a: _scaled(a, -1.0),
    **{str(known.function): partial(_apply, str(known.function)) for _, known in _ACTIVATIONS},
}


def _close(a: Mapping[Any, float], b: Mapping[Any, float]) -> bool:
    return a.keys() == b.keys() and all(math.isclose(a[key], b[key], rel_tol=_TOLERANCE) for key in a)
