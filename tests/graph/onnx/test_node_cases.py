"""The onnx package's own test cases of every operator that the importer converts itself.

Inputs that a converter needs at import (shapes, axes, bounds, recurrent weights) are bound to the case's values; the
others stay inputs.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase

from tests.graph.onnx.running import Compiled
from tvm_ternary.graph.importer import import_onnx
from tvm_ternary.graph.onnx.operators.table import own_operators
from tvm_ternary.runtime.manifest import DTYPES

LEFT_OUT = {
    "sequence|_opt": "sequences and optionals are no tensors",
    "_string": "strings",
    "training": "training mode",
    "dropout_random_old": "random numbers",
    "with_peepholes": "refused, see test_lstm",
    "empty_set": "an input dimension of 0 is read as one that the file leaves open",
}
"""Patterns of case names, and why."""

BOUND = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Gather": (),
    "If": (0,),
    "LSTM": (1, 2, 3, 4),
    "ReduceMax": (1,),
    "ReduceMin": (1,),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
}
"""Inputs that are bound, by operator."""


@cache
def cases() -> dict[str, list[TestCase]]:
    """The cases of one node in the standard set, by operator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases divide by zero and overflow on purpose
        found = collect_testcases(None)
    grouped = defaultdict(list)
    for case in found:
        nodes = case.model.graph.node
        standard = all(item.domain in ("", "ai.onnx") for item in case.model.opset_import)
        if len(nodes) == 1 and standard and not any(re.search(pattern, case.name) for pattern in LEFT_OUT):
            grouped[nodes[0].op_type].append(case)
    return grouped


def arrays(values: Iterable[Any]) -> list[np.ndarray]:
    """Values of a case, some of which are protobufs."""
    return [onnx.numpy_helper.to_array(v) if isinstance(v, onnx.TensorProto) else np.asarray(v) for v in values]


def carried(case: TestCase) -> bool:
    """Whether all tensors have element types that the runtime carries."""
    return all(str(array.dtype) in DTYPES for values in case.data_sets for side in values for array in arrays(side))


def check(case: TestCase, op: str) -> None:
    for inputs, outputs in case.data_sets:
        feeds = {value.name: array for value, array in zip(case.model.graph.input, arrays(inputs), strict=True)}
        names = list(feeds)
        bound = {names[i]: feeds[names[i]] for i in BOUND.get(op, ()) if i < len(names)}
        got = Compiled(import_onnx(case.model, constants=bound))(feeds)
        for ours, theirs in zip(got, arrays(outputs), strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), case.name
            if theirs.dtype.kind == "f":
                rtol = max(case.rtol, 4 * float(np.finfo(theirs.dtype).eps))
                np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=case.atol, err_msg=case.name)
            else:
                np.testing.assert_array_equal(ours, theirs, err_msg=case.name)


@pytest.mark.parametrize("op", own_operators())
def test_cases_of_operator(op: str) -> None:
    chosen = [case for case in cases()[op] if carried(case)]
    assert chosen, f"the onnx package has no case of {op}"
    for case in chosen:
        check(case, op)
