"""The same module compiles to the same code every time: the pass that orders what TVM writes in the order of a hash."""

from __future__ import annotations

import os
from typing import Any

import pytest
import tvm
from tvm.script import tirx as T

from tvm_ternary.build.executable import build_executable, cuda_source, order_shape_stores
from tvm_ternary.errors import OptionError
from tvm_ternary.target import resolve

from . import cuda_model, small_model

CUDA = resolve("cuda-sm_80+sm_86")
FALLBACK = "TVM_COMPILE_FORCE_FALLBACK"


@T.prim_func(s_tir=True)
def shuffled(h: T.Buffer((6,), "int64")) -> None:
    T.func_attr({"tirx.is_host_func": True})
    h[4] = h[0] * 16
    h[2] = h[0] * h[1]
    h[5] = h[1] + 1
    h[3] = T.int64(7)


@T.prim_func(s_tir=True)
def in_order(h: T.Buffer((6,), "int64")) -> None:
    T.func_attr({"tirx.is_host_func": True})
    h[2] = h[0] * h[1]
    h[3] = T.int64(7)
    h[4] = h[0] * 16
    h[5] = h[1] + 1


@T.prim_func(s_tir=True)
def chained(h: T.Buffer((6,), "int64")) -> None:
    T.func_attr({"tirx.is_host_func": True})
    h[4] = h[0] * 16
    h[2] = h[4] + 1


@T.prim_func(s_tir=True)
def written_twice(h: T.Buffer((6,), "int64")) -> None:
    T.func_attr({"tirx.is_host_func": True})
    h[4] = h[0] * 16
    h[4] = T.int64(7)


@T.prim_func(s_tir=True)
def unknown_place(h: T.Buffer((6,), "int64"), i: T.int64) -> None:
    T.func_attr({"tirx.is_host_func": True})
    h[4] = h[0] * 16
    h[i] = T.int64(7)


@T.prim_func(s_tir=True)
def looped(h: T.Buffer((6,), "int64")) -> None:
    T.func_attr({"tirx.is_host_func": True})
    h[5] = T.int64(1)
    for i in range(4):
        h[i] = T.int64(7)


@T.prim_func(s_tir=True)
def kernel(h: T.Buffer((6,), "int64")) -> None:
    h[4] = T.int64(1)
    h[2] = T.int64(7)


def ordered(function: Any) -> Any:
    return order_shape_stores(tvm.IRModule({"f": function.with_attr("global_symbol", "f")}))["f"]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (shuffled, in_order),
        *((same, same) for same in (in_order, chained, written_twice, unknown_place, looped, kernel)),
    ],
    ids=lambda function: function.attrs["global_symbol"],
)
def test_independent_stores_are_put_in_order_and_nothing_else_is_touched(function: Any, expected: Any) -> None:
    tvm.ir.assert_structural_equal(ordered(function), expected.with_attr("global_symbol", "f"))


def test_the_build_pipeline_still_makes_what_the_pass_looks_for() -> None:
    """Should TVM write shape functions in another way, the pass would do nothing and builds would differ again."""
    target = tvm.target.Target(resolve("native").tvm)
    with target:
        lowered = tvm.relax.get_pipeline("default")(small_model.dynamic())
    stored = [int(store.indices[0]) for store in lowered["shape_func"].body.seq]
    after = [int(store.indices[0]) for store in order_shape_stores(lowered)["shape_func"].body.seq]
    assert len(after) > 2
    assert after == sorted(stored)


@pytest.mark.parametrize("before", [None, "0"])
def test_kernels_come_as_source_and_the_environment_stays(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if before is None:
        monkeypatch.delenv(FALLBACK, raising=False)
    else:
        monkeypatch.setenv(FALLBACK, before)
    source = cuda_source(build_executable(cuda_model.static(), CUDA.tvm))
    assert os.environ.get(FALLBACK) == before
    assert source is not None
    # In the order in which they were added, so that the text is the same in every process.
    places = [source.rindex(f"{name}_kernel(") for name in cuda_model.KERNELS]
    assert places == sorted(places)


def test_an_executable_without_kernels_has_no_source() -> None:
    assert cuda_source(build_executable(cuda_model.static(()), CUDA.tvm)) is None
    assert cuda_source(small_model.compiled(small_model.dynamic(), resolve("x86-64-v3"))) is None


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_a_module_of_static_shape_is_launched_as_a_graph_when_asked(cuda_graph: bool) -> None:
    executable = build_executable(cuda_model.static(), CUDA.tvm, cuda_graph=cuda_graph)
    assert ("vm.builtin.cuda_graph.run_or_capture" in executable.as_text()) == cuda_graph


def test_nothing_is_sent_to_a_library_of_kernels() -> None:
    """Every function that `main` calls is one of the module, or belongs to TVM's virtual machine."""
    text = build_executable(cuda_model.static(), CUDA.tvm).as_text()
    called = {line.split()[1] for line in text.splitlines() if line.strip().startswith("call ")}
    assert {name for name in called if not name.startswith("vm.builtin.")} == set(cuda_model.KERNELS)


def test_the_surrounding_options_of_tvm_hold() -> None:
    seen: list[str] = []

    @tvm.instrument.pass_instrument
    class Note:
        def run_after_pass(self, module: tvm.IRModule, info: Any) -> None:
            seen.append(info.name)

    with tvm.transform.PassContext(config={"tirx.disable_vectorize": True}, instruments=[Note()]) as outer:
        build_executable(cuda_model.static(("reverse",)), CUDA.tvm)
        assert tvm.transform.PassContext.current().config == outer.config
    assert "tirx.SplitHostDevice" in seen


def test_shared_memory_beyond_the_least_of_the_architectures_is_one_line() -> None:
    """sm_86 has 99 KiB: 98 KiB asked for at launch and 1 KiB of static memory fit, and another KiB does not."""
    assert cuda_source(build_executable(cuda_model.staged(98 * 256), CUDA.tvm)) is not None
    with pytest.raises(OptionError) as caught:
        build_executable(cuda_model.staged(99 * 256), CUDA.tvm)
    assert str(caught.value) == (
        "kernel turn_kernel: needs 102400 bytes of shared memory a block; there are 101376 at most; "
        "choose smaller tiles or fewer stages"
    )
    assert cuda_source(build_executable(cuda_model.staged(162 * 256), resolve("cuda-sm_80").tvm)) is not None
