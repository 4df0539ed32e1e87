"""The onnx package's own node tests, run through our importer and compiled.

Inputs that a converter needs at import (shapes, axes, bounds, recurrent weights) are bound to the case's values, and so
are those of element types that exist as weights only; the others stay inputs.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase

from tests.graph.onnx.running import Compiled
from tvm_ternary.graph.importer import import_onnx
from tvm_ternary.runtime.manifest import DTYPES

BOUND = {
    "AffineGrid": (1,),
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "ConstantOfShape": (0,),
    "CumProd": (1,),
    "CumSum": (1,),
    "DFT": (1, 2),
    "Dropout": (1, 2),
    "Expand": (1,),
    "GRU": (1, 2, 3, 4),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "LSTM": (1, 2, 3, 4, 7),
    "Loop": (0, 1),
    "MaxUnpool": (2,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "RNN": (1, 2, 3, 4),
    "ReduceL1": (1,),
    "ReduceL2": (1,),
    "ReduceLogSum": (1,),
    "ReduceLogSumExp": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceProd": (1,),
    "ReduceSum": (1,),
    "ReduceSumSquare": (1,),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "STFT": (1, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
"""Positions of the inputs that are bound, by operator."""


@dataclass(frozen=True, eq=False)
class NodeCase:
    """One node test: a model of one node, or of the nodes that the standard composes it of.

    Attributes
    ----------
    test : TestCase
        The model, its inputs and its outputs.
    node : onnx.NodeProto
        The node, also where the model holds what it is composed of.
    """

    test: TestCase
    node: onnx.NodeProto

    @property
    def name(self) -> str:
        """What the onnx package calls it."""
        return str(self.test.name)

    @property
    def op(self) -> str:
        """The operator, with its domain where that is not the standard one."""
        domain = "" if self.node.domain in ("", "ai.onnx") else f"{self.node.domain}."
        return f"{domain}{self.node.op_type}"

    @property
    def is_numeric(self) -> bool:
        """Whether everything that goes in and comes out is a tensor of numbers."""
        graph = self.test.model.graph
        kinds = [value.type for value in (*graph.input, *graph.output)]
        return all(k.HasField("tensor_type") and k.tensor_type.elem_type != onnx.TensorProto.STRING for k in kinds)

    @property
    def is_carried(self) -> bool:
        """Whether the runtime carries the element types of everything that goes in and comes out."""
        arrays = (a for values in self.test.data_sets for side in values for a in _arrays(side))
        return all(str(array.dtype) in DTYPES for array in arrays)

    @property
    def has_empty_input(self) -> bool:
        """Whether an input that stays one has no elements."""
        names = [value.name for value in self.test.model.graph.input]
        every = [dict(zip(names, _arrays(inputs), strict=True)) for inputs, _ in self.test.data_sets]
        return any(
            array.size == 0 for feeds in every for name, array in feeds.items() if name not in self._bound(feeds)
        )

    def check(self) -> None:
        """Import, compile, run and compare.

        Raises
        ------
        Exception
            Whatever refuses the model; an ``AssertionError`` where dtype, shape or elements are wrong.
        """
        for inputs, outputs in self.test.data_sets:
            names = [value.name for value in self.test.model.graph.input]
            feeds = dict(zip(names, _arrays(inputs), strict=True))
            wanted = dict(zip([value.name for value in self.test.model.graph.output], _arrays(outputs), strict=True))
            bound = self._bound(feeds)
            self._check_carried({name: feeds[name] for name in feeds if name not in bound} | wanted)
            got = Compiled(import_onnx(self.test.model, constants=bound), level=0)(feeds)
            for ours, (name, theirs) in zip(got, wanted.items(), strict=True):
                _compare(ours, theirs, name, self.test)

    def _bound(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs to bind; none of a strange element type where nothing else would be left."""
        slots = [self.node.input[slot] for slot in BOUND.get(self.op, ()) if slot < len(self.node.input)]
        weights = [name for name, array in feeds.items() if str(array.dtype) not in DTYPES]
        chosen = {*slots, *(weights if len(weights) < len(feeds) else ())}
        return {name: array for name, array in feeds.items() if name in chosen}

    @staticmethod
    def _check_carried(values: dict[str, np.ndarray]) -> None:
        for array in values.values():
            assert str(array.dtype) in DTYPES, f"{array.dtype} is carried as weights only"


@cache
def node_cases() -> tuple[NodeCase, ...]:
    """All node tests of the onnx package, those on strings, sequences and optionals too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases divide by zero and overflow on purpose
        tests = {test.name: test for test in collect_testcases(None)}
    return tuple(
        NodeCase(test, tests[re.sub("_expanded.*", "", name)].model.graph.node[0]) for name, test in tests.items()
    )


def _arrays(values: Iterable[Any]) -> list[np.ndarray]:
    """Values of a case, some of which are protobufs."""
    return [onnx.numpy_helper.to_array(v) if isinstance(v, onnx.TensorProto) else np.asarray(v) for v in values]


def _compare(ours: np.ndarray, theirs: np.ndarray, name: str, test: TestCase) -> None:
    """The comparison of the onnx package's runner; in half precision to four units in the last place."""
    assert ours.dtype == theirs.dtype, f"output {name} is {ours.dtype}, should be {theirs.dtype}"
    assert ours.shape == theirs.shape, f"output {name} has shape {ours.shape}, should have {theirs.shape}"
    rtol, atol = 0.0, 0.0
    if theirs.dtype.kind == "f" or theirs.dtype.name == "bfloat16":
        rtol, atol = max(test.rtol, 4 * float(ml_dtypes.finfo(theirs.dtype).eps)), test.atol
    with np.errstate(all="ignore"):
        wrong = ~np.isclose(
            *(x.astype(float) if x.dtype.kind == "V" else x for x in (ours, theirs)), rtol, atol, equal_nan=True
        )
    if wrong.any():
        got, want = ours[wrong][0], theirs[wrong][0]
        raise AssertionError(f"output {name}: {wrong.sum()} of {wrong.size} elements differ, as {got} from {want}")
