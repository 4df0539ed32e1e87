"""Products that read through moves: which do, and that they are the same products."""

from __future__ import annotations

from typing import Any

import pytest
import tvm
from tvm import relax

from tests.graph.passes.small_graphs import operators
from tests.schedule.cpu.graphs import Build, make_graph, tensor
from tvm_ternary.graph.fuse import lower_graph_ops
from tvm_ternary.graph.passes.read_through import read_through

op = relax.op
SWAP_LAST = [0, 1, 3, 2]
TO_HEADS = [0, 2, 1, 3]


def passed(build: Build, *inputs: Any) -> list[str]:
    """What is called after the pass."""
    return operators(read_through(lower_graph_ops(make_graph(build, *inputs))))


@pytest.mark.parametrize("length", ["s", 24])
def test_attention_reads_projections_as_they_lie(length: int | str) -> None:
    def build(emit: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
        scores = emit(op.matmul(op.permute_dims(q, TO_HEADS), op.permute_dims(k, [0, 2, 3, 1])))
        weights = emit(op.nn.softmax(op.add(op.divide(scores, relax.const(4.0, "float32")), mask)))
        return op.matmul(weights, op.permute_dims(v, TO_HEADS))

    projection = tensor(("b", length, 4, 16))
    names = passed(build, projection, projection, projection, tensor(("b", 1, 1, length)))
    assert names == ["fused_matmul_divide_add_moved", "softmax", "matmul1_moved"]


def test_a_move_with_other_readers_stays_for_them() -> None:
    def build(emit: Any, x: Any, y: Any) -> Any:
        moved = emit(op.permute_dims(y, SWAP_LAST))
        return op.add(emit(op.nn.softmax(moved)), emit(op.matmul(x, moved)))

    both = tensor((2, 3, 8, 8))
    assert sorted(passed(build, both, both)) == ["fused_softmax_add", "matmul_moved", "transpose"]


def test_one_move_read_on_both_sides() -> None:
    def build(emit: Any, x: Any) -> Any:
        moved = emit(op.permute_dims(x, SWAP_LAST))
        return op.matmul(moved, moved)

    assert passed(build, tensor((2, 3, 8, 8))) == ["matmul_moved"]


@pytest.mark.parametrize(
    ("build", "names"),
    [
        # Neighbours in the batch lie side by side, so that rows and columns of a factor are both far apart.
        (lambda emit, x, y: op.matmul(x, op.permute_dims(y, [3, 1, 2, 0])), ["transpose", "matmul"]),
        # Computed, and read by each block anew.
        (lambda emit, x, y: op.matmul(x, op.exp(y)), ["tir_exp", "matmul"]),
        # Sums that are no product.
        (lambda emit, x, y: op.sum(op.permute_dims(op.add(x, y), SWAP_LAST), [-1]), ["fused_add_transpose", "sum"]),
    ],
)
def test_what_is_better_moved_first(build: Build, names: list[str]) -> None:
    assert passed(build, tensor((8, 3, 8, 8)), tensor((8, 3, 8, 8))) == names


def test_a_module_without_moves_is_as_before() -> None:
    lowered = lower_graph_ops(make_graph(lambda emit, x, y: op.matmul(x, y), tensor(("m", 8)), tensor((8, 9))))
    tvm.ir.assert_structural_equal(read_through(lowered), lowered)
