"""What a caller may give a module, and what each mistake is called."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.errors import InputError, OptionError
from tvm_ternary.runtime.inputs import check_inputs, check_outputs, size_of
from tvm_ternary.runtime.manifest import DTYPES, TensorSpec
from tvm_ternary.runtime.sample import random_inputs

SPECS = (TensorSpec("ids", "int64", ("batch", "n")), TensorSpec("x", "float32", ("batch", 4)))
IDS = np.ones((2, 3), np.int64)
X = np.ones((2, 4), np.float32)


def test_arrays_come_back_in_the_declared_order() -> None:
    ids, x = check_inputs(SPECS, {"x": X, "ids": IDS})
    assert ids is IDS
    assert x is X


def test_lists_of_the_right_kind_are_arrays() -> None:
    assert check_inputs(SPECS[:1], {"ids": [[1, 2], [3, 4]]})[0].shape == (2, 2)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"ids": IDS, "x": X, "mask": X}, "input 'mask': no such input; expected 'ids', 'x'"),
        ({"ids": IDS}, "input 'x': is missing; given: 'ids'; expected 'ids', 'x'"),
        ({}, "input 'ids': is missing; given: none; expected 'ids', 'x'"),
        ([IDS, X], "inputs: are a list; expected a mapping of name to array; names: 'ids', 'x'"),
        (
            {"ids": IDS.astype(np.int32), "x": X},
            "input 'ids': has dtype int32; expected int64; cast it with .astype(numpy.int64)",
        ),
        (
            {"ids": IDS, "x": X.astype(">f4")},
            "input 'x': has dtype >f4; expected float32; cast it with .astype(numpy.float32)",
        ),
        ({"ids": IDS, "x": X[0]}, "input 'x': has 1 dimensions [4]; expected 2: [batch, 4]"),
        ({"ids": IDS, "x": X[:, :3]}, "input 'x': has shape [2, 3]; expected [batch, 4]: axis 1 is 3, not 4"),
        (
            {"ids": IDS, "x": X[:1]},
            "input 'x': has shape [1, 4]; expected [batch, 4] with batch=2, as input 'ids' has",
        ),
        ({"ids": [[1], [1, 2]], "x": X}, "input 'ids': is no array"),
    ],
)
def test_each_mistake_is_named(inputs: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_inputs(SPECS, inputs)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_dimension_named_twice_in_one_input() -> None:
    square = TensorSpec("m", "float32", ("n", "n"))
    check_inputs([square], {"m": np.zeros((3, 3), np.float32)})
    with pytest.raises(InputError, match="with n=2, as input 'm' has"):
        check_inputs([square], {"m": np.zeros((2, 3), np.float32)})


def test_sizes_that_inputs_say() -> None:
    specs = [TensorSpec("x", "float32", ("batch", "pairs", 8)), TensorSpec("mask", "int64", ("batch", "past + new"))]
    sizes = {dim: size_of(dim, specs, [(2, 5, 8), (2, 7)]) for dim in ("batch", "2 * pairs + 1", "past + new")}
    assert sizes == {"batch": 2, "2 * pairs + 1": 11, "past + new": 7}
    assert size_of(3, [], []) == 3
    assert [size_of(dim, specs, [(2, 5, 8), (2, 7)]) for dim in ("new", "pairs // 2", "pairs * new")] == [None] * 3


def test_outputs_by_name() -> None:
    assert check_outputs(SPECS, None) == [0, 1]
    assert check_outputs(SPECS, ["x", "ids", "x"]) == [1, 0, 1]
    assert check_outputs(SPECS, []) == []
    with pytest.raises(InputError, match="output 'y': no such output; expected 'ids', 'x'"):
        check_outputs(SPECS, ["y"])
    with pytest.raises(InputError, match=r"are the string 'ids'; expected a list of names; write \['ids'\]"):
        check_outputs(SPECS, "ids")


DIMS = st.integers(0, 4) | st.sampled_from(["batch", "n", "m"])
RANDOM_SPECS = st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(DIMS, max_size=3).map(tuple)), max_size=4).map(
    lambda items: [TensorSpec(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(items)]
)


@given(RANDOM_SPECS, st.integers(0, 9))
def test_random_inputs_are_accepted_and_repeatable(specs: list[TensorSpec], seed: int) -> None:
    made = random_inputs(specs, seed=seed)
    check_inputs(specs, made)
    again = random_inputs(specs, seed=seed)
    for spec in specs:
        np.testing.assert_array_equal(made[spec.name], again[spec.name])
        if np.dtype(spec.dtype).kind in "biu":
            assert set(np.unique(made[spec.name]).tolist()) <= {0, 1}
            if made[spec.name].size and spec.shape:
                assert (made[spec.name][..., 0] == 1).all()


def test_random_inputs_take_dimensions_and_have_defaults() -> None:
    assert random_inputs(SPECS)["ids"].shape == (1, 32)
    assert random_inputs(SPECS, {"n": 7, "batch": 0})["ids"].shape == (0, 7)
    assert not np.array_equal(random_inputs(SPECS, seed=1)["x"], random_inputs(SPECS, seed=2)["x"])


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"length": 3}, "dimension 'length': no such dimension; expected one of batch, n"),
        ({"n": -1}, "dimension 'n': is -1; expected a whole number >= 0"),
        ({"n": True}, "dimension 'n': is True"),
    ],
)
def test_wrong_dimensions_for_random_inputs(dims: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        random_inputs(SPECS, dims)
    assert str(caught.value).startswith(message)


def test_a_named_dimension_is_at_least_one_and_within_its_bound() -> None:
    spec = TensorSpec("x", "float32", ("batch", "length"))
    for shape in ((1, 1), (3, 8)):
        check_inputs([spec], {"x": np.zeros(shape, np.float32)}, {"length": 8})
    for shape, message in (
        ((0, 3), "input 'x': has batch=0; expected at least 1"),
        ((2, 9), "input 'x': has length=9; expected 1 to 8"),
        ((2, 0), "input 'x': has length=0; expected 1 to 8"),
    ):
        with pytest.raises(InputError, match=message):
            check_inputs([spec], {"x": np.zeros(shape, np.float32)}, {"length": 8})
    assert random_inputs([spec], bounds={"length": 8})["x"].shape == (1, 8)


IMAGE = TensorSpec("image", "float32", ("batch", 3, "rows * 32", "columns * 16 + 8"))


def test_a_dimension_that_is_a_multiple() -> None:
    assert random_inputs([IMAGE])["image"].shape == (1, 3, 32, 40)
    assert random_inputs([IMAGE], {"rows": 3, "columns": 1})["image"].shape == (1, 3, 96, 24)
    assert random_inputs([IMAGE], bounds={"columns": 1})["image"].shape == (1, 3, 32, 24)
    check_inputs([IMAGE], random_inputs([IMAGE], {"rows": 7}), {"rows": 7, "columns": 2})


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (95, 40, "a dimension of 95; expected rows * 32 with a whole number rows from 1 to 3; resize or pad it, to 64"),
        (16, 40, "a dimension of 16; expected rows * 32 with a whole number rows from 1 to 3; resize or pad it, to 32"),
        (
            128,
            40,
            "a dimension of 128; expected rows * 32 with a whole number rows from 1 to 3; resize or pad it, to 96",
        ),
        (32, 8, "a dimension of 8; expected columns * 16 + 8 with a whole number columns at least 1; resize or pad it"),
        (0, 40, "rows * 32=0; expected at least 1"),
    ],
)
def test_what_is_no_multiple(height: int, width: int, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_inputs([IMAGE], {"image": np.zeros((1, 3, height, width), np.float32)}, {"rows": 3})
    assert str(caught.value).startswith(f"input 'image': has {message}")


def test_multiples_of_one_dimension_agree() -> None:
    specs = [TensorSpec("a", "int64", ("rows * 2",)), TensorSpec("b", "int64", ("rows * 3 + past", "past"))]
    check_inputs(specs, {"a": np.ones(4, np.int64), "b": np.ones((7, 1), np.int64)})
    with pytest.raises(InputError, match=r"input 'b': has rows \* 3 \+ past=8; expected 7"):
        check_inputs(specs, {"a": np.ones(4, np.int64), "b": np.ones((8, 1), np.int64)})


def test_a_dimension_that_is_a_sum_of_others() -> None:
    ids, mask = TensorSpec("ids", "int64", ("batch", "length")), TensorSpec("mask", "int64", ("batch", "past + length"))
    state = TensorSpec("state", "float32", ("batch", "past", 4))
    specs, bounds = [ids, mask, state], {"length + past": 24}
    shapes = {name: array.shape for name, array in random_inputs(specs, bounds=bounds).items()}
    assert shapes == {"ids": (1, 12), "mask": (1, 24), "state": (1, 12, 4)}
    made = random_inputs(specs, {"past": 5, "length": 3})
    assert made["mask"].shape == (1, 8)
    check_inputs(specs, made, bounds)
    for name, message in (("ids", r"input 'mask': has past \+ length=8; expected 7"), ("state", "expected 24")):
        wrong = {**made, name: made[name][:, 1:] if name == "ids" else np.zeros((1, 21, 4), np.float32)}
        with pytest.raises(InputError, match=message):
            check_inputs(specs, wrong, bounds)
    long = random_inputs(specs, {"past": 24, "length": 1})
    with pytest.raises(InputError, match=r"inputs: have length \+ past=25; expected at most 24"):
        check_inputs(specs, long, bounds)
