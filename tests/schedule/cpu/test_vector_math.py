"""The polynomials against float64, over all magnitudes and the values at the edges."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import tvm
from scipy import special
from tvm import relax, tirx
from tvm.ir import Expr
from tvm.tirx import BufferStore, PrimFunc, Stmt

from tests.schedule.cpu.graphs import TIERS, Array, compile_graph, make_graph, tensor
from tvm_ternary.graph.fuse import lower_graph_ops
from tvm_ternary.schedule.cpu import schedule_module
from tvm_ternary.schedule.cpu.nest import index, loop, scope, vector
from tvm_ternary.schedule.cpu.vector_math import exp_to_one
from tvm_ternary.target import resolve

op = relax.op
TINY = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)


def every_magnitude() -> Array:
    """Floats of every exponent and both signs, denormals included, and a dense grid where the functions bend."""
    bits = np.arange(0, 2**31, 40009, dtype=np.uint32)
    floats = bits.view(np.float32)
    floats = floats[np.isfinite(floats)]
    return np.concatenate([floats, -floats, np.linspace(-110, 110, 200001).astype(np.float32)])


EDGES = np.array([0.0, -0.0, 1e-45, -1e-45, 88.72283, 88.7229, -87.33655, -103.9, 3.4e38, -3.4e38], np.float32)


def run(tier: str, function: Callable[..., object], x: Array) -> Array:
    compiled = compile_graph(tier, lambda emit, x: function(x), tensor(("n",)))
    assert compiled.rules == {"rule:injective"}
    result: Array = compiled(x)
    return result


def test_exp_is_within_2e_7(tier: str) -> None:
    x = np.concatenate([every_magnitude(), EDGES])
    result, exact = run(tier, op.exp, x), np.exp(np.clip(x.astype(np.float64), -200, 200))
    normal = (exact >= TINY) & (exact <= LARGEST)
    assert np.max(np.abs(result[normal] - exact[normal]) / exact[normal]) <= 2e-7
    assert np.max(result[exact < TINY * (1 - 1e-6)]) == 0.0
    assert np.all(np.isposinf(result[exact > LARGEST * (1 + 1e-6)]))


def test_exp_to_one_is_within_2e_7(tier: str) -> None:
    """No number above zero comes; a NaN stays one."""
    some = every_magnitude()
    x = np.append(np.concatenate([some[some <= 0], EDGES[EDGES <= 0], np.linspace(-87.34, -87.3, 1000)]), -np.inf)
    x = np.resize(x, -(-len(x) // 16) * 16).astype(np.float32)
    x[-1] = np.nan
    result, exact = run_nest(tier, exp_to_one, x), np.exp(x.astype(np.float64))
    normal = exact >= TINY
    assert np.max(np.abs(result[normal] - exact[normal]) / exact[normal]) <= 2e-7
    assert np.max(result[exact < TINY * (1 - 1e-6)]) == 0.0
    assert np.isnan(result[-1])
    assert np.isfinite(result[:-1]).all()


def run_nest(tier: str, function: Callable[[Expr], Expr], x: Array) -> Array:
    """A function of one element, of so many of them."""
    args = [tirx.decl_buffer([index(x.size)], "float32", name) for name in ("x", "y")]

    def strip(n: Expr) -> Stmt:
        return vector(16, lambda lane: BufferStore(args[1], function(args[0][n * 16 + lane]), [n * 16 + lane]))

    nest = PrimFunc(args, scope("root", loop(x.size // 16, strip))).with_attr("global_symbol", "main")
    target = tvm.target.Target(resolve(TIERS[tier]).tvm)
    tensors = [tvm.runtime.tensor(one) for one in (x, np.empty_like(x))]
    tvm.compile(tvm.IRModule({"main": nest.with_attr("tirx.is_scheduled", True)}), target)["main"](*tensors)
    result: Array = tensors[1].numpy()
    return result


def test_erf_is_within_5e_7(tier: str) -> None:
    x = np.concatenate([every_magnitude(), EDGES])
    assert np.max(np.abs(run(tier, op.erf, x) - special.erf(x.astype(np.float64)))) <= 5e-7


def test_erf_keeps_its_relative_accuracy_near_zero(tier: str) -> None:
    x = np.float32(10.0) ** np.linspace(-30, -1, 5001).astype(np.float32)
    exact = special.erf(x.astype(np.float64))
    assert np.max(np.abs(run(tier, op.erf, x) - exact) / exact) <= 5e-7


def test_tanh_is_within_4e_7(tier: str) -> None:
    x = np.concatenate([every_magnitude(), EDGES])
    x = x[np.abs(x) >= TINY]
    exact = np.tanh(x.astype(np.float64))
    assert np.max(np.abs(run(tier, op.tanh, x) - exact) / np.abs(exact)) <= 4e-7


def test_sigmoid_is_within_4e_7(tier: str) -> None:
    x = np.concatenate([every_magnitude(), EDGES])
    result, exact = run(tier, op.sigmoid, x), special.expit(x.astype(np.float64))
    large = exact >= 1e-37
    assert np.max(np.abs(result - exact)[large] / exact[large]) <= 4e-7
    assert np.max(result[~large]) <= 1e-37


@pytest.mark.parametrize(
    ("name", "below", "above"), [("exp", 0.0, np.inf), ("erf", -1.0, 1.0), ("tanh", -1.0, 1.0), ("sigmoid", 0.0, 1.0)]
)
def test_infinities_and_nan(tier: str, name: str, below: float, above: float) -> None:
    # Enough of them for whole vectors and a ragged end.
    x = np.tile(np.array([-np.inf, np.inf, np.nan], np.float32), 13)
    result = run(tier, getattr(op, name), x)
    np.testing.assert_allclose(result, np.tile([below, above, np.nan], 13), rtol=4e-7, atol=0)


@pytest.mark.parametrize("exponent", [2.0, 3.0, 4.0, 2.5])
def test_power(tier: str, exponent: float) -> None:
    x = np.concatenate([np.linspace(0.01, 30, 1001), -np.linspace(0.01, 30, 1001)]).astype(np.float32)
    constant = relax.const(np.float32(exponent))
    result = run(tier, lambda x: op.power(x, constant), x)
    with np.errstate(invalid="ignore"):
        exact = np.power(x.astype(np.float64), exponent)
    np.testing.assert_allclose(result, exact, rtol=3e-7)


@pytest.mark.parametrize("name", ["isnan", "isinf", "isfinite"])
def test_kinds_of_values(tier: str, name: str) -> None:
    x = np.concatenate([every_magnitude()[::101], EDGES, np.tile([-np.inf, np.inf, np.nan, -np.nan], 5)]).astype(
        np.float32
    )
    np.testing.assert_array_equal(run(tier, getattr(op, name), x), getattr(np, name)(x))


@pytest.mark.parametrize("name", ["exp", "erf", "tanh", "sigmoid", "isnan"])
def test_whole_vectors_and_no_library_call(name: str) -> None:
    """The machine code of AVX2 works on 256-bit registers and calls nothing of the scalar maths library."""
    target = tvm.target.Target(resolve("x86-64-v3").tvm)
    graph = make_graph(lambda emit, x: getattr(op, name)(x), tensor(("n",)))
    scheduled, sources = schedule_module(lower_graph_ops(graph), target)
    (function,) = sources
    code = tvm.compile(scheduled[function].with_attr("global_symbol", "main"), target=target).mod.inspect_source("asm")
    assert "%ymm" in code
    assert not re.search(rf"\b{name}f?@", code)
