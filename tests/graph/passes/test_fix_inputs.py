"""Dimensions and inputs of a finished module, fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.graph.models.checkpoints import BERT, bert, feeds, write_checkpoint
from tests.graph.onnx.running import Compiled
from tvm_ternary.errors import InputError, OptionError
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.models.checkpoint import import_checkpoint
from tvm_ternary.graph.passes.define_dimensions import define_dimensions
from tvm_ternary.graph.passes.fix_inputs import fix_inputs

MASK = feeds(3)["attention_mask"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ImportedModel:
    config = {**BERT, "num_hidden_layers": 1}
    return import_checkpoint(write_checkpoint(tmp_path_factory.mktemp("bert"), config, bert(config)))


@pytest.fixture(scope="module")
def given() -> dict[str, np.ndarray]:
    return {**feeds(3), "token_type_ids": np.zeros((2, 3), np.int64)}


@pytest.fixture(scope="module")
def expected(model: ImportedModel, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    return Compiled(model)(given)


def shapes(model: ImportedModel) -> dict[str, tuple[int | str, ...]]:
    return {spec.name: spec.shape for spec in (*model.inputs, *model.outputs)}


@pytest.mark.parametrize(
    ("dims", "constants", "wanted", "bounds"),
    [
        ({"batch": 2}, {}, (2, "sequence"), {"sequence": 16}),
        ({"batch": 2, "sequence": 3}, {}, (2, 3), {}),
        ({}, {"token_type_ids": 0}, ("batch", "sequence"), {"sequence": 16}),
        ({"sequence": 3}, {"token_type_ids": np.float64(0)}, ("batch", 3), {}),
        ({}, {"attention_mask": MASK.tolist()}, (2, 3), {}),
        ({"batch": 2}, {"attention_mask": MASK, "token_type_ids": 0}, (2, 3), {}),
    ],
)
def test_gives_what_the_open_model_gives(
    model: ImportedModel,
    given: dict[str, np.ndarray],
    expected: list[np.ndarray],
    dims: Mapping[str, int | str],
    constants: Mapping[str, Any],
    wanted: tuple[int | str, ...],
    bounds: dict[str, int],
) -> None:
    fixed = fix_inputs(model, dims, constants)
    left = [spec.name for spec in model.inputs if spec.name not in constants]
    assert shapes(fixed) == {
        **dict.fromkeys(left, wanted),
        "last_hidden_state": (*wanted, 24),
        "pooler_output": (wanted[0], 24),
    }
    assert fixed.bounds == bounds
    assert fixed.shapes == model.shapes
    for ours, reference in zip(Compiled(fixed)(given), expected, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dims", [{"batch": "sequence"}, {"sequence": "batch"}])
def test_equal_dimensions(model: ImportedModel, dims: Mapping[str, int | str]) -> None:
    fixed = fix_inputs(model, dims)
    left = next(iter(dims.values()))
    assert shapes(fixed)["last_hidden_state"] == (left, left, 24)
    assert fixed.bounds == {left: 16}


@pytest.mark.parametrize("dims", [{"batch": "sequence", "sequence": 3}, {"sequence": "batch", "batch": 3}])
def test_equal_to_one_that_is_fixed(model: ImportedModel, dims: Mapping[str, int | str]) -> None:
    assert shapes(fix_inputs(model, dims))["input_ids"] == (3, 3)


def test_a_multiple(model: ImportedModel, expected: list[np.ndarray], given: dict[str, np.ndarray]) -> None:
    fixed = fix_inputs(model, {"sequence": "3*parts"}, {"token_type_ids": 0})
    assert shapes(fixed)["input_ids"] == ("batch", "parts * 3")
    assert shapes(fixed)["last_hidden_state"] == ("batch", "parts * 3", 24)
    assert fixed.bounds == {"parts": 5}, "16 positions"
    run = Compiled(replace(fixed, module=define_dimensions(fixed.module)))
    for ours, reference in zip(run(given), expected, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-6)
    assert shapes(fix_inputs(model, {"sequence": "3*parts"}, {"attention_mask": MASK}))["input_ids"] == (2, 3)


def test_a_constant_fixes_what_is_equal_to_its_dimensions(model: ImportedModel) -> None:
    fixed = fix_inputs(model, {"batch": "sequence"}, {"attention_mask": np.ones((3, 3), np.int64)})
    assert shapes(fixed)["input_ids"] == (3, 3)


def test_dimensions_equal_to_each_other_are_one(model: ImportedModel) -> None:
    assert shapes(fix_inputs(model, {"batch": "sequence", "sequence": "batch"}))["input_ids"] == ("batch", "batch")


def test_nothing_to_do_is_the_same_model(model: ImportedModel) -> None:
    assert fix_inputs(model) is model
    assert fix_inputs(model, {"batch": "batch"}) is model


@pytest.mark.parametrize(
    ("dims", "constants", "kind", "message"),
    [
        (
            {"length": 3},
            {},
            OptionError,
            "dimension length: the model has no such symbolic dimension; it has batch, seq",
        ),
        ({"batch": "size"}, {}, OptionError, "dimension size: the model has no such"),
        (
            {"sequence": "32*parts"},
            {},
            OptionError,
            "dimension sequence: is given as 32 \\* parts, expected at most 16",
        ),
        (
            {"sequence": "2*parts"},
            {"attention_mask": MASK},
            InputError,
            "its constant has 3 elements along sequence, expected 2 \\* parts",
        ),
        ({"sequence": 17}, {}, OptionError, "dimension sequence: got 17, expected 1 to 16"),
        ({"batch": 0}, {}, OptionError, "dimension batch: got 0, expected a size of at least 1"),
        ({}, {"mask": 0}, OptionError, "constant mask: the model has no such input; it has input_ids, attention_mask"),
        ({}, {"attention_mask": 0.5}, InputError, "attention_mask: got a constant 0.5, expected int64"),
        ({}, {"attention_mask": "x"}, InputError, "attention_mask: got a constant 'x', expected int64"),
        (
            {},
            {"attention_mask": [1, 1]},
            InputError,
            r"attention_mask: got a constant of shape \[2\], expected a number",
        ),
        ({"sequence": 4}, {"attention_mask": MASK}, InputError, "has 3 elements along sequence, expected 4"),
        ({}, {"attention_mask": np.ones((1, 17))}, OptionError, "dimension sequence: got 17, expected 1 to 16"),
        (
            {},
            {"attention_mask": MASK, "token_type_ids": np.zeros((2, 4))},
            InputError,
            "token_type_ids: its constant has 4 elements along sequence, expected 3",
        ),
        ({"batch": "sequence"}, {"attention_mask": MASK}, InputError, "has 3 elements along sequence, expected 2"),
    ],
)
def test_what_does_not_fit(
    model: ImportedModel,
    dims: Mapping[str, int | str],
    constants: Mapping[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        fix_inputs(model, dims, constants)
