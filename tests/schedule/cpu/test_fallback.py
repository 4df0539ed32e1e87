"""What no rule knows is right all the same, and says that it was not scheduled by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import special
from tvm import relax

from tests.schedule.cpu.graphs import compile_graph, normal, tensor

op = relax.op


def test_argmax(tier: str) -> None:
    compiled = compile_graph(tier, lambda emit, x: op.argmax(x, -1), tensor(("b", "n")))
    assert compiled.rules == {"fallback:loops"}
    for n in (1, 5, 40):
        x = normal(n, 3, n)
        np.testing.assert_array_equal(compiled(x), x.argmax(-1))


def test_softmax_over_an_inner_axis(tier: str) -> None:
    compiled = compile_graph(tier, lambda emit, x: op.nn.softmax(x, 1), tensor(("b", "m", "n")))
    assert compiled.rules == {"fallback:loops"}
    x = normal(0, 2, 7, 20)
    np.testing.assert_allclose(compiled(x), special.softmax(x.astype(np.float64), 1), rtol=2e-6)


def test_loops_run_on_all_threads(tier: str) -> None:
    """Large enough that its rows are shared out."""
    compiled = compile_graph(tier, lambda emit, x: op.argmax(x, -1), tensor(("b", "n")))
    x = normal(0, 700, 900)
    np.testing.assert_array_equal(compiled(x), x.argmax(-1))


def test_group_norm(tier: str) -> None:
    gamma, beta = normal(1, 12), normal(2, 12)

    def build(emit: Any, x: Any) -> Any:
        return op.nn.group_norm(x, relax.const(gamma), relax.const(beta), 3, 1, [2])

    compiled = compile_graph(tier, build, tensor(("b", 12, "n")))
    assert compiled.rules == {"fallback:loops"}
    x = normal(3, 2, 12, 9)
    groups = x.astype(np.float64).reshape(2, 3, 36)
    groups = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 1e-5)
    exact = groups.reshape(x.shape) * gamma[:, None] + beta[:, None]
    np.testing.assert_allclose(compiled(x), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["cumsum", "sort"])
def test_what_has_no_plain_loops(tier: str, name: str) -> None:
    compiled = compile_graph(tier, lambda emit, x: getattr(op, name)(x, -1), tensor(("b", "n")))
    assert compiled.rules == {"fallback:as-written"}
    x = normal(0, 3, 40)
    np.testing.assert_allclose(compiled(x), getattr(np, name)(x.astype(np.float64), -1), rtol=0, atol=1e-5)


def test_scatter_writes_where_its_data_say(tier: str) -> None:
    compiled = compile_graph(
        tier,
        lambda emit, x, i, u: op.scatter_elements(x, i, u, 0),
        tensor(("b", "n")),
        tensor(("b", "n"), "int64"),
        tensor(("b", "n")),
    )
    assert compiled.rules == {"fallback:as-written"}
    x, u = normal(0, 6, 9), normal(1, 6, 9)
    i = np.tile(np.random.default_rng(2).permutation(6)[:, None], (1, 9))
    exact = x.copy()
    np.put_along_axis(exact, i, u, 0)
    np.testing.assert_array_equal(compiled(x, i, u), exact)
