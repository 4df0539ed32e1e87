"""The algebra over dimensions, checked by putting numbers in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm import tirx
from tvm.ir import is_prim_expr
from tvm.sym import Analyzer

from tvm_ternary.graph.onnx.values import Algebra, Constant, Symbols, describe, object_array, plain, settle

SIZES = [(1, 1), (1, 7), (2, 3), (5, 4), (16, 9)]


class Names:
    """Two symbolic dimensions, and what an expression over them is for given sizes."""

    def __init__(self) -> None:
        self.algebra = Algebra()
        self.m, self.n = self.algebra.dimension("m"), self.algebra.dimension("n")

    def at(self, item: Any, m: int, n: int) -> Any:
        if not is_prim_expr(item):
            return item
        analyzer = Analyzer()
        analyzer.bind(self.m, tirx.const(m, "int64"))
        analyzer.bind(self.n, tirx.const(n, "int64"))
        number = plain(analyzer.simplify(item))
        assert not is_prim_expr(number)
        return number


linear = st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.integers(-8, 8))


@given(linear, linear)
def test_operators(left: tuple[int, int, int], right: tuple[int, int, int]) -> None:
    names = Names()
    a, b = (x * names.m + y * names.n + z for x, y, z in (left, right))
    results = {
        "min": names.algebra.minimum(a, b),
        "max": names.algebra.maximum(a, b),
        "<": names.algebra.compare("<", a, b),
        "<=": names.algebra.compare("<=", a, b),
        "==": names.algebra.compare("==", a, b),
    }
    if right != (0, 0, 0):
        results |= {"/": names.algebra.divide(a, b), "%": names.algebra.modulo(a, b)}
    for m, n in SIZES:
        va, vb = (x * m + y * n + z for x, y, z in (left, right))
        want: dict[str, Any] = {"min": min(va, vb), "max": max(va, vb), "<": va < vb, "<=": va <= vb, "==": va == vb}
        if vb:
            want |= {"/": int(np.trunc(np.float64(va) / vb)), "%": va % vb}
        for name, value in want.items():
            assert names.at(results[name], m, n) == value, name
        assert names.algebra.equal(a, b) == (left == right)


def test_dimensions_are_at_least_one() -> None:
    names = Names()
    assert names.algebra.compare("==", names.m, -1) is False
    assert names.algebra.compare("<", 0, names.m) is True
    assert names.algebra.equal(names.algebra.maximum(names.m - 1, 0), names.m - 1)
    assert is_prim_expr(names.algebra.compare("==", names.m, 1)), "neither proved nor refuted"
    assert names.algebra.equal(names.algebra.minimum(names.m, 2**63 - 1), names.m)


def test_quotients() -> None:
    names = Names()
    m, n = names.m, names.n
    quotient = names.algebra.quotient
    assert quotient([m, n + 1, 384], [m, n + 1, 12]) == 32
    assert names.algebra.equal(quotient([m, n, 384], [384]), m * n)
    assert names.algebra.equal(quotient([m * n, 6], [m, 2]), n * 3)
    assert quotient([m, 5], [m, 2]) is None
    assert quotient([m], [n]) is None
    assert quotient([0], [0]) is None
    assert quotient([4, 6], [8]) == 3


def test_description() -> None:
    names = Names()
    assert describe(names.m * 2 - 1) == "m * 2 - 1"
    assert describe(names.algebra.minimum(names.n, 7)) == "min(n, 7)"
    assert describe([3, names.n]) == "[3, n]"


def test_division_by_zero() -> None:
    names = Names()
    for divisor in (0, names.m - names.m):
        for operator in (names.algebra.divide, names.algebra.modulo):
            with pytest.raises(ZeroDivisionError):
                operator(names.n, divisor)


def test_bounds() -> None:
    names = Names()
    assert names.algebra.limit(names.n, 512) == {"n": 512}
    assert names.algebra.equal(names.algebra.minimum(names.n, 512), names.n)
    assert names.algebra.limit(2 * names.n + 1, 100) == {"n": 49}
    assert names.algebra.limit(names.n, 512) == {"n": 49}, "the tighter bound stays"
    assert names.algebra.limit(names.m * names.n, 512) is None
    assert names.algebra.limit(2 * names.m + names.n, 512) is None
    assert names.algebra.limit(4 - names.m, 2) is None
    assert names.algebra.limit(names.m + 7, 7) is None, "no size is left"


def test_bounds_of_sums() -> None:
    names = Names()
    assert names.algebra.limit(names.m + names.n + 2, 514) == {"m": 511, "n": 511, "m + n": 512}
    assert names.algebra.equal(names.algebra.minimum(names.m + names.n, 512), names.m + names.n)
    assert names.algebra.proves(names.m + names.n <= 512)
    assert not names.algebra.proves(names.m + names.n <= 511)


@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (0,)])
def test_settle(shape: tuple[int, ...]) -> None:
    names = Names()
    count = int(np.prod(shape))
    known = settle(names.algebra, object_array([names.m - names.m + 2] * count, shape), "int32")
    assert isinstance(known, Constant)
    assert (known.array.shape, known.array.dtype) == (shape, np.int32)
    if count:
        symbolic = settle(names.algebra, object_array([names.m] * count, shape), "int64")
        assert isinstance(symbolic, Symbols)
        assert symbolic.values.shape == shape
