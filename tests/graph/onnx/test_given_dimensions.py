"""What can be said of dimensions, and what each nonsense is called."""

from __future__ import annotations

import pytest

from tvm_ternary.errors import OptionError
from tvm_ternary.graph.onnx.given_dimensions import resolve_dimensions
from tvm_ternary.runtime.linear import Linear

KNOWN = ("batch", "height", "width", "past", "batch-size")
ROWS = Linear({"rows": 1})


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        ({"batch": 2}, {"batch": 2}),
        ({"batch": "past"}, {"batch": Linear({"past": 1})}),
        ({"batch": "batch-size"}, {"batch": Linear({"batch-size": 1})}),
        ({"batch": "past", "past": 3}, {"batch": 3, "past": 3}),
        ({"height": "32*rows", "width": " 32 * rows + 4"}, {"height": 32 * ROWS, "width": 32 * ROWS + 4}),
        ({"height": "32*rows", "width": "rows"}, {"height": 32 * ROWS, "width": ROWS}),
        ({"height": "2*width", "width": "16*rows"}, {"height": 32 * ROWS, "width": 16 * ROWS}),
        ({"height": "2*width - 3", "width": 16}, {"height": 29, "width": 16}),
        ({"height": "past + width"}, {"height": Linear({"past": 1, "width": 1})}),
        ({"height": "width", "width": "height"}, {"width": Linear({"height": 1})}),
        ({"batch": "batch"}, {}),
    ],
)
def test_resolving(dims: dict[str, int | str], expected: dict[str, int | Linear]) -> None:
    assert resolve_dimensions(dims, KNOWN) == expected


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"depth": "32*rows"}, "dimension depth: the model has no such symbolic dimension; it has batch"),
        ({"height": "rows"}, "dimension rows: the model has no such symbolic dimension; it has batch, height, width"),
        ({"height": "32*rows", "rows": 2}, "dimension rows: the model has no such symbolic dimension"),
        ({"height": 0}, "dimension height: got 0, expected a size of at least 1"),
        ({"height": -32}, "dimension height: got -32, expected a size of at least 1"),
        ({"height": 10**30}, "dimension height: got 1000000000000000000000000000000, expected at most 2147483647"),
        ({"height": "width - 40", "width": 40}, "dimension height: got 0, expected a size of at least 1"),
        ({"height": "2000000000*width", "width": 2}, "dimension height: got 4000000000, expected at most 2147483647"),
        ({"height": "99999999999*rows"}, "dimension height: got '99999999999*rows', expected numbers up to 2147483647"),
        ({"height": "32*height"}, "dimension height: is given as arithmetic over itself; use a new name"),
        ({"height": "2*width", "width": "2*height"}, "dimension height: is given as arithmetic over itself"),
        ({"height": "rows + 4"}, "dimension height: is rows + 4, from which rows cannot be told; name dimensions of"),
        ({"height": "32*rows + columns"}, "dimension height: is 32 * rows + columns, from which rows and columns"),
        ({"height": "4 - 32*rows"}, "dimension height: is -32 * rows + 4, from which rows cannot be told"),
        *(
            ({"height": text}, f"dimension height: got {text!r}; expected a size, the name of another dimension, or")
            for text in ("", "rows/2", "rows//2", "rows*rows", "rows**2", "0*rows", "2.5*rows", "32*", "f(rows)")
        ),
        ({"height": "-32*rows"}, "dimension height: got '-32*rows'; expected a size"),
        ({"height": "3"}, "dimension height: got '3'; expected a size"),
        ({"height": "+".join(["rows"] * 5000)}, "dimension height: got 'rows+rows+rows+rows+...' of 24999 characters"),
        ({"height": "(" * 150 + "rows" + ")" * 150}, "dimension height: got '(((((((((((((((((((("),
    ],
)
def test_refusals(dims: dict[str, int | str], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        resolve_dimensions(dims, KNOWN)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 250
