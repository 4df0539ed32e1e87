"""The tables say what the manifest says, whatever is missing in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tvm_ternary.analysis import report
from tvm_ternary.runtime.manifest import (
    FunctionInfo,
    LayerInfo,
    Manifest,
    ModelInfo,
    SizesInfo,
    TargetInfo,
    TensorSpec,
    WeightsInfo,
)
from tvm_ternary.runtime.module import Timing

TERNARY = LayerInfo(
    "a", (16, 64), "ternary", "t2a8g64", 5.0, "matmul_a8", "codes", "rule:avx2", 0.21094, None, "bias + gelu"
)
FLOAT = LayerInfo("b", (8, 3, 2), "float32", None, 32.0, None, None, "rule", None, "a convolution")
MANIFEST = Manifest(
    model=ModelInfo("net", "net.onnx", "5e" * 32),
    inputs=(TensorSpec("x", "float32", ("batch", 64)),),
    outputs=(TensorSpec("y", "int64", ()),),
    bounds={},
    scheme="t2a8g64",
    layers=(TERNARY, FLOAT),
    functions=(FunctionInfo("f", "matmul_a8", "rule:avx2"), FunctionInfo("g", None, "rule:rows")),
    target=TargetInfo("x86-64-v3", {}, ("avx2", "fma")),
    versions={"tvm-ternary": "0.1", "apache-tvm": "0.27"},
    weights=WeightsInfo("7f" * 32, 832),
    sizes=SizesInfo(4096 + 192, 640 + 192),
)


def facts(table: report.Table) -> dict[str, str]:
    assert not any(table.columns)
    return dict(table.rows)  # type: ignore[arg-type]


def test_layers() -> None:
    table = report.layers_table(MANIFEST.layers)
    assert table.columns[0] == "matrix"
    ternary, dense = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert ternary == {
        "matrix": "a",
        "N x K": "16 x 64",
        "became": "t2a8g64",
        "bits/weight": "5.00",
        "kernel": "matmul_a8",
        "layout": "codes",
        "epilogue": "bias + gelu",
        "schedule": "rule:avx2",
        "error": "0.2109",
        "why float": "",
    }
    assert (dense["N x K"], dense["became"], dense["why float"]) == ("8 x 3 x 2", "float32", "a convolution")
    assert {table.columns[i] for i in table.numeric} == {"bits/weight", "error"}


@pytest.mark.parametrize(
    ("layers", "absent"),
    [((TERNARY,), {"why float"}), ((FLOAT,), {"kernel", "layout", "epilogue", "error"}), ((), set())],
)
def test_columns_without_a_word_are_left_out(layers: tuple[LayerInfo, ...], absent: set[str]) -> None:
    whole, table = report.layers_table(MANIFEST.layers), report.layers_table(layers)
    assert set(whole.columns) - set(table.columns) == absent
    assert {table.columns[i] for i in table.numeric} == {"bits/weight", "error"} - absent
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_summary() -> None:
    table = facts(report.summary_table(MANIFEST, 5 << 20, {"import": 0.25, "build": 1.5}))
    assert table == {
        "matrices": "1 ternary, 1 left in float",
        "all weights": "4.2 KiB before, 832 B after, 5.2 times smaller",
        "ternary ones": "4.0 KiB before, 640 B after, 6.4 times smaller",
        "file": "5.0 MiB",
        "time": "1.8 s (import 0.2, build 1.5)",
    }


def test_summary_of_a_model_without_weights() -> None:
    empty = replace(MANIFEST, layers=(), sizes=SizesInfo(0, 0))
    table = facts(report.summary_table(empty, 0, {}))
    assert table["all weights"] == table["ternary ones"] == "0 B before, 0 B after"
    assert report.layers_table(()).rows == ()


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ([], "has all of them"),
        (["avx2", "fma"], "lacks avx2 fma"),
        (None, "its CPU features are not known"),
    ],
)
def test_facts(missing: list[str] | None, told: str) -> None:
    table = facts(report.facts_table(MANIFEST, 10, missing))
    assert table["this host"] == told
    assert table["needs"] == "avx2 fma"
    assert table["their SHA-256"] == "7f" * 32
    assert table["weights lie"] == "inside the file"
    assert table["made by"] == "apache-tvm 0.27, tvm-ternary 0.1"
    beside = replace(MANIFEST, weights=WeightsInfo("7f" * 32, 832, "net.safetensors", ("a",)))
    assert facts(report.facts_table(beside, 10, [])).get("weights lie") == "beside it, in net.safetensors"
    bounded = replace(MANIFEST, bounds={"length": 512})
    assert facts(report.facts_table(bounded, 10, []))["largest length"] == "512"
    bare = replace(MANIFEST, target=TargetInfo("plain", {}, ()))
    assert facts(report.facts_table(bare, 10, []))["needs"] == "no particular CPU feature"


def test_specs_and_functions() -> None:
    assert report.specs_table(MANIFEST.inputs, MANIFEST.outputs).rows == (
        ("input", "x", "float32", "[batch, 64]"),
        ("output", "y", "int64", "[]"),
    )
    assert report.functions_table(MANIFEST).rows == (("f", "matmul_a8", "rule:avx2"), ("g", "", "rule:rows"))


@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64, np.int8, np.uint64, np.bool_]),
        hnp.array_shapes(min_dims=0, min_side=0, max_side=4),
    )
)
def test_stats_are_over_what_is_finite(array: np.ndarray[Any, Any]) -> None:
    stats = report.array_stats("y", array)
    finite = [float(value) for value in array.ravel().tolist() if np.isfinite(value)]
    assert (stats.finite, stats.size, stats.shape) == (len(finite), array.size, array.shape)
    if finite:
        assert stats.minimum == min(finite)
        assert stats.maximum == max(finite)
    else:
        assert stats.minimum is stats.mean is stats.maximum is None
    (row,) = report.outputs_table([stats]).rows
    assert row[-1] == (
        "yes" if len(finite) == array.size else f"no: {array.size - len(finite)} of {array.size} are not"
    )


def test_stats_do_not_overflow() -> None:
    stats = report.array_stats("y", np.full(3, 60000, np.float16))
    assert (stats.minimum, stats.mean, stats.maximum) == (60000, 60000, 60000)


def test_timing() -> None:
    table = report.timing_table(Timing(median=0.0021, p20=0.002, p80=0.0034567, runs=(0.0021, 0.002)), 3)
    assert table.rows == (("2", "3", "2.100", "2.000", "3.457"),)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (69_060_623, "65.9 MiB"),
        (3 << 30, "3.0 GiB"),
        (5 << 42, "20480.0 GiB"),
    ],
)
def test_sizes_for_a_reader(count: int, text: str) -> None:
    assert report.format_bytes(count) == text
