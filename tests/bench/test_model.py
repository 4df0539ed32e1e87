"""The model benchmark on a tiny model: answers, ratios and costs are there; not how fast it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.models import llama, mlp
from tvm_ternary.bench import model as benchmark
from tvm_ternary.bench.engines import WrongAnswerError
from tvm_ternary.bench.model import ModelMeasurement, Subject, measure_model, relative_error
from tvm_ternary.bench.model_costs import compile_apart
from tvm_ternary.bench.model_peers import FLOAT, INT4, INT8, PEERS, open_session, quantize_blocks
from tvm_ternary.bench.model_report import costs_table, ratio_table
from tvm_ternary.errors import OptionError, TernaryError


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "mlp.onnx"
    onnx.save(mlp(), path)
    return path


@pytest.fixture(scope="module")
def measured(file: Path) -> list[ModelMeasurement]:
    subject = Subject(file, file, ("t2a8", "float"))
    sizes = [{"batch": 1}, {"batch": 3}]
    return list(measure_model(subject, sizes, [1], peers=(FLOAT, INT8, INT4), turns=2))


def test_every_scheme_on_every_shape(measured: list[ModelMeasurement]) -> None:
    assert [(one.scheme, one.dims["batch"]) for one in measured] == [
        ("t2a8", 1),
        ("float", 1),
        ("t2a8", 3),
        ("float", 3),
    ]
    for one in measured:
        assert one.peers.keys() == one.ratios.keys() == one.peer_errors.keys() == {FLOAT, INT8, INT4}
        assert min(one.ratios.values()) > 0
        assert one.error is not None
        assert one.error < 1e-5 if one.scheme == "float" else 1e-3 < one.error < 0.6
        assert 0 < one.first_seconds < 60
        assert one.costs.model_bytes == 4 * (10 * 24 + 24 * 7 + 24 + 7)
        assert one.costs.peak_bytes > one.costs.base_bytes
        assert one.as_json()["costs"]["memory_ratio"] == one.costs.memory_ratio > 0


def test_tables(measured: list[ModelMeasurement]) -> None:
    ratios, costs = ratio_table(measured), costs_table(measured)
    assert ratios.columns[-3:] == (f"{INT4} ms", "ratio", "its error")
    assert [row[1] for row in ratios.rows] == ["batch=1", "batch=1", "batch=3", "batch=3"]
    assert [row[1] for row in costs.rows] == ["t2a8", "float"]
    assert all(len(row) == len(table.columns) for table in (ratios, costs) for row in table.rows)


@pytest.mark.parametrize("name", [INT8, INT4])
def test_peers_keep_the_function(tmp_path: Path, name: str) -> None:
    path = tmp_path / "llama.onnx"
    onnx.save(llama(), path)
    changed = PEERS[name](path, tmp_path)
    kinds = [node.op_type for node in onnx.load(changed).graph.node]
    assert kinds.count({INT8: "MatMulInteger", INT4: "MatMulNBits"}[name]) == 15
    feeds = {"input_ids": np.arange(12).reshape(2, 6), "attention_mask": np.ones((2, 6), np.int64)}
    got, want = (open_session(file, 1).run(None, feeds)[0] for file in (changed, path))
    # Four bits lose 8% of a random weight, and a layer of random weights damps nothing.
    assert 0 < relative_error(got, want) < {INT8: 0.05, INT4: 0.5}[name]


def test_four_bits_round_to_the_nearest_level() -> None:
    weight = np.random.default_rng(0).standard_normal((3, 130), dtype=np.float32)
    packed, scale = quantize_blocks(weight)
    assert packed.shape == (3, 2, 64)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(3, 2, 128).astype(np.int8) - 8
    restored = (codes * scale.reshape(3, 2, 1)).reshape(3, 256)
    np.testing.assert_array_equal(restored[:, 130:], 0)
    assert (np.abs(restored[:, :130] - weight).reshape(-1) <= np.repeat(scale, 65)[: 3 * 130].max() / 2 + 1e-6).all()


def test_a_model_without_products_has_no_four_bits(tmp_path: Path) -> None:
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    path = tmp_path / "relu.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(OptionError, match="ort-int4: the model has no product with a constant matrix"):
        PEERS[INT4](path, tmp_path)


def test_a_wrong_answer_ends_the_measurement(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = file.with_name("other.onnx")
    model = mlp()
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, other)
    with pytest.raises(WrongAnswerError, match=r"mlp\.onnx, float: relative error is .*; expected at most 5e-02"):
        list(measure_model(Subject(file, other, ("float",)), [{"batch": 1}], [1], peers=(FLOAT,), turns=1))
    ours = list(measure_model(Subject(file, None, ("float",), static=True), [{"batch": 1}], [1], turns=1))
    assert ours[0].error is None
    assert ours[0].ratios == {}


def test_refusals_of_the_compiler_come_through(tmp_path: Path) -> None:
    with pytest.raises(TernaryError, match=r"none\.onnx: no such file"):
        compile_apart(tmp_path / "none.onnx", tmp_path / "none.so", {})


@pytest.mark.parametrize(
    ("options", "match"),
    [({"peers": ("fast",)}, "peer 'fast': does not exist"), ({"turns": 0}, "turns: is 0; expected at least 1")],
)
def test_bad_options(file: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        next(measure_model(Subject(file, file, ("float",)), [{}], [1], **options))


def test_the_scheme_decides_the_options(file: Path) -> None:
    subject = Subject(file, file, ("float",), constants={"sr": np.array(16000)}, layers=("fc",), static=True)
    assert subject.options(benchmark.FLOAT_SCHEME, {"batch": 2})["layers"] == []
    ternary = subject.options("t1a8", {"batch": 2})
    assert (ternary["layers"], ternary["dims"], ternary["constants"]) == (["fc"], {"batch": 2}, {"sr": 16000})
