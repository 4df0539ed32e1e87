"""Which spellings are which activation function, and that a formula computes what its operators do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from tests.graph.passes.small_graphs import bindings, make_module
from tvm_ternary.graph.activations import VARIABLE, Formula, activation_of, formula_of

Spelling = Callable[[relax.Expr], relax.Expr]
NUMPY: dict[str, Callable[[Any], Any]] = {"relax.erf": np.vectorize(math.erf), "relax.tanh": np.tanh}
CUBIC = math.sqrt(2 / math.pi)


def c(value: float, *shape: int) -> relax.Expr:
    """A float32 constant of one element."""
    return relax.const(np.full(shape, value, np.float32))


def cdf(y: relax.Expr) -> relax.Expr:
    """1 + erf(y / sqrt(2))."""
    return op.add(op.erf(op.divide(y, c(2**0.5))), c(1))


def cube(y: relax.Expr) -> relax.Expr:
    """0.044715 y^3."""
    return op.multiply(c(0.044715), op.power(y, c(3)))


SPELLINGS: dict[str, tuple[str, Spelling]] = {
    "relu": ("relu", op.nn.relu),
    "gelu": ("gelu", op.nn.gelu),
    "(y * cdf) * 0.5": ("gelu", lambda y: op.multiply(op.multiply(y, cdf(y)), c(0.5))),
    "0.5 * (cdf * y)": ("gelu", lambda y: op.multiply(c(0.5), op.multiply(cdf(y), y))),
    "(0.5 * y) * cdf": ("gelu", lambda y: op.multiply(op.multiply(c(0.5), y), cdf(y))),
    "cdf * (y * 0.5)": ("gelu", lambda y: op.multiply(cdf(y), op.multiply(y, c(0.5)))),
    "y * (cdf * 0.5)": ("gelu", lambda y: op.multiply(y, op.multiply(cdf(y), c(0.5)))),
    "(0.5 * cdf) * y": ("gelu", lambda y: op.multiply(op.multiply(c(0.5), cdf(y)), y)),
    "y * cdf / 2": ("gelu", lambda y: op.divide(op.multiply(y, cdf(y)), c(2))),
    "constants of one element": ("gelu", lambda y: op.multiply(op.multiply(y, cdf(y)), c(0.5, 1, 1))),
    "1 + erf(y * sqrt(0.5))": (
        "gelu",
        lambda y: op.multiply(op.multiply(c(0.5), y), op.add(c(1), op.erf(op.multiply(c(0.5**0.5), y)))),
    ),
    "0.5 + 0.5 * erf": (
        "gelu",
        lambda y: op.multiply(op.add(c(0.5), op.multiply(c(0.5), op.erf(op.divide(y, c(2**0.5))))), y),
    ),
    "gelu_tanh": ("gelu_tanh", op.nn.gelu_tanh),
    "tanh(c (y + 0.044715 y^3))": (
        "gelu_tanh",
        lambda y: op.multiply(op.multiply(c(0.5), y), op.add(c(1), op.tanh(op.multiply(c(CUBIC), op.add(y, cube(y)))))),
    ),
    "tanh(c y + d y^3), the cube multiplied out": (
        "gelu_tanh",
        lambda y: op.multiply(
            op.multiply(c(0.5), y),
            op.add(
                op.tanh(
                    op.add(
                        op.multiply(c(CUBIC), y),
                        op.multiply(c(CUBIC * 0.044715), op.multiply(op.multiply(y, y), y)),
                    )
                ),
                c(1),
            ),
        ),
    ),
    "tanh(c y (1 + 0.044715 y^2))": (
        "gelu_tanh",
        lambda y: op.multiply(
            op.multiply(
                y,
                op.add(
                    op.tanh(
                        op.multiply(op.multiply(c(CUBIC), y), op.add(c(1), op.multiply(c(0.044715), op.power(y, c(2)))))
                    ),
                    c(1),
                ),
            ),
            c(0.5),
        ),
    ),
    "silu": ("silu", op.nn.silu),
    "y * sigmoid(y)": ("silu", lambda y: op.multiply(y, op.sigmoid(y))),
    "sigmoid(y) * y": ("silu", lambda y: op.multiply(op.sigmoid(y), y)),
}

OTHERS: dict[str, Spelling] = {
    "y": lambda y: op.multiply(y, c(1)),
    "sigmoid": op.sigmoid,
    "erf": op.erf,
    "relu(-y)": lambda y: op.nn.relu(op.negative(y)),
    "2 relu(y)": lambda y: op.multiply(c(2), op.nn.relu(y)),
    "y relu(y)": lambda y: op.multiply(y, op.nn.relu(y)),
    "y cdf": lambda y: op.multiply(y, cdf(y)),
    "0.5 cdf": lambda y: op.multiply(c(0.5), cdf(y)),
    "gelu with 1.41": lambda y: op.multiply(op.multiply(c(0.5), y), op.add(op.erf(op.divide(y, c(1.41))), c(1))),
    "y (1 - cdf)": lambda y: op.multiply(op.multiply(c(0.5), y), op.subtract(c(1), op.erf(op.divide(y, c(2**0.5))))),
    "gelu with a shift inside": lambda y: op.multiply(
        op.multiply(c(0.5), y), op.add(c(1), op.erf(op.add(op.divide(y, c(2**0.5)), c(1))))
    ),
    "gelu of a tanh without the cube": lambda y: op.multiply(
        op.multiply(c(0.5), y), op.add(c(1), op.tanh(op.multiply(c(CUBIC), y)))
    ),
    "quick gelu": lambda y: op.multiply(y, op.sigmoid(op.multiply(c(1.702), y))),
    "y sigmoid(-y)": lambda y: op.multiply(y, op.sigmoid(op.negative(y))),
    "silu + 1": lambda y: op.add(op.nn.silu(y), c(1)),
}

NO_FORMULAS: dict[str, Spelling] = {
    "another operator": op.exp,
    "a vector": lambda y: op.add(y, relax.const(np.zeros(4, np.float32))),
    "a function of a function": lambda y: op.tanh(op.erf(y)),
    "two functions": lambda y: op.multiply(op.tanh(y), op.erf(y)),
    "a function of two arguments": lambda y: op.add(op.tanh(y), op.tanh(op.negative(y))),
    "the square of a function": lambda y: op.power(op.tanh(y), c(2)),
    "the fourth power": lambda y: op.multiply(op.power(y, c(2)), op.power(y, c(2))),
    "a root": lambda y: op.power(y, c(0.5)),
    "a power of a constant": lambda y: op.power(c(2), y),
    "a reciprocal": lambda y: op.divide(c(1), y),
    "divided by zero": lambda y: op.divide(y, c(0)),
}


def last_formula(spelling: Spelling) -> Formula | None:
    """The formula of the last of its operators, None as soon as one has none."""
    module = make_module({"y": ("m", 4)}, {}, lambda emit, y: [emit(spelling(y))])
    known = {module["main"].params[0]: VARIABLE}
    formula: Formula | None = VARIABLE
    for var, value in bindings(module):
        if isinstance(value, relax.Call):
            formula = formula_of(value, known)
            if formula is None:
                return None
            known[var] = formula
    return formula


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_recognised(spelling: str) -> None:
    name, build = SPELLINGS[spelling]
    formula = last_formula(build)
    assert formula is not None
    assert activation_of(formula) == name


@pytest.mark.parametrize("spelling", OTHERS)
def test_what_is_similar_is_not_taken_for_it(spelling: str) -> None:
    formula = last_formula(OTHERS[spelling])
    assert formula is not None
    assert activation_of(formula) is None


@pytest.mark.parametrize("spelling", NO_FORMULAS)
def test_what_is_no_sum_of_products_has_no_formula(spelling: str) -> None:
    assert last_formula(NO_FORMULAS[spelling]) is None


def test_what_is_not_known_has_no_formula() -> None:
    x, y = (relax.Var(name, relax.TensorType((4,), "float32")) for name in "xy")
    assert formula_of(op.add(x, y), {x: VARIABLE}) is None
    assert formula_of(op.add(x, y), {x: VARIABLE, y: VARIABLE}) == Formula({(1, 0): 2.0})


def test_a_call_of_a_function_of_the_module_has_no_formula() -> None:
    x = relax.Var("x", relax.TensorType((4,), "float32"))
    assert formula_of(relax.Call(relax.GlobalVar("f"), [x]), {x: VARIABLE}) is None


def expressions() -> st.SearchStrategy[tuple[Spelling, Callable[[Any], Any]]]:
    """Random expressions of y, as Relax operators and in numpy."""
    numbers = st.floats(-2, 2, width=32).filter(lambda value: abs(value) > 0.1)
    leaves = st.one_of(
        st.just((lambda y: y, lambda y: y)),
        numbers.map(lambda value: (lambda y: op.multiply(y, c(value)), lambda y: y * value)),
    )

    def grow(inner: Any) -> Any:
        pairs = st.tuples(inner, inner)
        return st.one_of(
            pairs.map(lambda p: (lambda y: op.add(p[0][0](y), p[1][0](y)), lambda y: p[0][1](y) + p[1][1](y))),
            pairs.map(lambda p: (lambda y: op.subtract(p[0][0](y), p[1][0](y)), lambda y: p[0][1](y) - p[1][1](y))),
            pairs.map(lambda p: (lambda y: op.multiply(p[0][0](y), p[1][0](y)), lambda y: p[0][1](y) * p[1][1](y))),
            inner.map(lambda e: (lambda y: op.negative(e[0](y)), lambda y: -e[1](y))),
            inner.map(lambda e: (lambda y: op.power(e[0](y), c(2)), lambda y: e[1](y) ** 2)),
            inner.map(lambda e: (lambda y: op.tanh(e[0](y)), lambda y: np.tanh(e[1](y)))),
            st.tuples(inner, numbers).map(
                lambda p: (lambda y: op.divide(p[0][0](y), c(p[1])), lambda y: p[0][1](y) / p[1])
            ),
        )

    return st.recursive(leaves, grow, max_leaves=5)


@given(expressions())
def test_a_formula_computes_what_its_operators_do(pair: tuple[Spelling, Callable[[Any], Any]]) -> None:
    build, numpy = pair
    formula = last_formula(build)
    assume(formula is not None)
    assert formula is not None
    y = np.linspace(-2, 2, 9)
    inside = sum(factor * y**power for power, factor in (formula.argument or {}).items())
    value = NUMPY[formula.function](inside) if formula.function else np.ones_like(y)
    got = sum(factor * y**i * value**j for (i, j), factor in formula.terms.items())
    np.testing.assert_allclose(got, numpy(y), rtol=1e-9, atol=1e-9)
