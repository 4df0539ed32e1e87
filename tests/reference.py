"""What a compiled model has to agree with: onnxruntime on the same graph, its weights replaced by the ternary ones.

Every weight multiplication of the file is found here without the importer's help: the operand of each ``MatMul``,
``Gemm`` and ``LSTM`` that initializers alone determine is evaluated, and recognised by its value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tvm_ternary.formats import Scheme, TernaryTensor
from tvm_ternary.graph.importer import import_onnx
from tvm_ternary.kernels.activations import SMALLEST_ABSMAX
from tvm_ternary.quantize import quantize
from tvm_ternary.quantize.plan import make_plan

Array = npt.NDArray[Any]
Matrices = Mapping[str, Array]
Feeds = Mapping[str, Array]
# The inputs that hold a weight, for each operator that multiplies by one.
_WEIGHTS = {"MatMul": (1, 0), "Gemm": (1,), "LSTM": (1, 2)}


class _Scope:
    """What initializers alone determine, in one graph and those around it."""

    def __init__(self, graph: onnx.GraphProto, opsets: dict[str, int], outer: _Scope | None) -> None:
        self.values: dict[str, Array | None] = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.values |= {value.name: None for value in graph.input if value.name not in self.values}
        self.opsets, self.outer = opsets, outer

    def value(self, name: str) -> Array | None:
        """The array of that name, None where it depends on an input."""
        if name not in self.values:
            self.values[name] = self._evaluate(name)
        return self.values[name]

    def _evaluate(self, name: str) -> Array | None:
        if name not in self.makers:
            return self.outer.value(name) if self.outer else None
        node = self.makers[name]
        if any(attribute.HasField("g") for attribute in node.attribute):
            return None
        feeds = {given: self.value(given) for given in node.input if given}
        if any(array is None for array in feeds.values()):
            return None
        outputs = ReferenceEvaluator(node, opsets=self.opsets).run(None, feeds)
        return np.asarray(outputs[list(node.output).index(name)])


def _graphs(graph: onnx.GraphProto, opsets: dict[str, int], outer: _Scope | None) -> Iterator[tuple[Any, _Scope]]:
    """A graph and those inside its nodes."""
    scope = _Scope(graph, opsets, outer)
    yield graph, scope
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g, opsets, scope)


def with_weights(model: onnx.ModelProto, before: Matrices, after: Matrices) -> onnx.ModelProto:
    """A copy of the model in which multiplications by some matrices are by others.

    Parameters
    ----------
    model : onnx.ModelProto
    before : mapping of name to (K, N) float32
        Matrices that the model multiplies by, as `ImportedModel.params` has them.
    after : mapping of name to (K, N) float32
        What to multiply by instead; a subset of the names.

    Raises
    ------
    AssertionError
        If one of them is multiplied by nowhere.
    """
    return _Replacer(model, before, after, lambda node, operand, name: []).run()


def with_rounded_activations(
    model: onnx.ModelProto, before: Matrices, after: Matrices, schemes: Mapping[str, Scheme]
) -> onnx.ModelProto:
    """`with_weights`, and what each of these matrices multiplies is first rounded to int8 as `int8_rows` does.

    One scale a row and group: absmax / 127; K must be a multiple of the group. Not for ``LSTM``, which feeds itself.
    """

    def rounding(node: onnx.NodeProto, operand: int, name: str) -> list[onnx.NodeProto]:
        assert node.op_type != "LSTM"
        assert not any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        k = len(before[name])
        group = schemes[name].granularity.group_size(k)
        assert k % group == 0
        x, prefix = node.input[1 - operand], f"rounding/{node.output[0]}"
        node.input[1 - operand] = f"{prefix}/x"
        shape = numpy_helper.from_array(np.array([-1, group] if k == group else [-1, k // group, group]))
        constants = {"groups": shape, "127": _scalar(127), "smallest": _scalar(SMALLEST_ABSMAX)}
        made = [helper.make_node("Constant", [], [f"{prefix}/{key}"], value=value) for key, value in constants.items()]
        steps = [
            ("Shape", [x], "shape", {}),
            ("Reshape", [x, "groups"], "grouped", {}),
            ("Abs", ["grouped"], "abs", {}),
            ("ReduceMax", ["abs"], "max", {"axes": [-1]}),
            ("Max", ["max", "smallest"], "absmax", {}),
            ("Div", ["127", "absmax"], "inverse", {}),
            ("Mul", ["grouped", "inverse"], "scaled", {}),
            ("Round", ["scaled"], "rounded", {}),
            ("Div", ["absmax", "127"], "scale", {}),
            ("Mul", ["rounded", "scale"], "near", {}),
            ("Reshape", ["near", "shape"], "x", {}),
        ]
        for op, inputs, output, attributes in steps:
            names = [given if given == x else f"{prefix}/{given}" for given in inputs]
            made.append(helper.make_node(op, names, [f"{prefix}/{output}"], **attributes))
        return made

    return _Replacer(model, before, after, rounding).run()


def _scalar(value: float) -> onnx.TensorProto:
    return numpy_helper.from_array(np.float32(value).reshape(()))


class _Replacer:
    """Redirects weight operands to new initializers; ``ahead`` gives nodes to put before a changed one."""

    def __init__(
        self,
        model: onnx.ModelProto,
        before: Matrices,
        after: Matrices,
        ahead: Callable[[onnx.NodeProto, int, str], list[onnx.NodeProto]],
    ) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.before, self.after, self.ahead = before, after, ahead
        self.found: set[str] = set()

    def run(self) -> onnx.ModelProto:
        opsets = {entry.domain: entry.version for entry in self.model.opset_import}
        # Inner graphs first: rebuilding an outer one's nodes copies them.
        for graph, scope in reversed(list(_graphs(self.model.graph, opsets, None))):
            nodes = []
            for node in graph.node:
                for operand in _WEIGHTS.get(node.op_type, ()):
                    array = scope.value(node.input[operand])
                    if array is not None and array.ndim >= 2:
                        nodes += self._replace(graph, node, operand, array)
                nodes.append(node)
            del graph.node[:]
            graph.node.extend(nodes)
        missing = self.after.keys() - self.found
        assert not missing, f"nothing is multiplied by {sorted(missing)}"
        return self.model

    def _replace(self, graph: Any, node: onnx.NodeProto, operand: int, array: Array) -> list[onnx.NodeProto]:
        turned = node.op_type == "LSTM" or (node.op_type == "MatMul" and operand == 0)
        alpha = 1.0
        for attribute in node.attribute:
            turned ^= attribute.name == "transB" and bool(attribute.i)
            alpha = attribute.f if attribute.name == "alpha" else alpha
        changed, ahead = array.copy(), []
        for matrix in changed.reshape(-1, *changed.shape[-2:]):  # the directions of an LSTM, ones elsewhere
            view = matrix.T if turned else matrix
            name = self._name(view * np.float32(alpha))
            if name in self.after:
                view[...] = self.after[name] / alpha
                ahead += self.ahead(node, operand, name)
                self.found.add(name)
        replacement = f"ternary/{len(graph.initializer)}/{node.input[operand]}"
        graph.initializer.append(numpy_helper.from_array(changed, replacement))
        node.input[operand] = replacement
        return ahead

    def _name(self, matrix: Array) -> str | None:
        return next((name for name, array in self.before.items() if np.array_equal(array, matrix)), None)


def ternary_weights(
    source: Path | onnx.ModelProto, scheme: str, layers: Any = "all", **options: Any
) -> tuple[dict[str, Array], dict[str, TernaryTensor], dict[str, Scheme]]:
    """The matrices of a model, those that a plan makes ternary as such, and their schemes."""
    params = import_onnx(source, **options).params
    plan = make_plan({name: (w.shape[1], w.shape[0]) for name, w in params.items()}, scheme, layers)
    schemes = {row.name: row.scheme for row in plan if row.scheme is not None}
    return params, {name: quantize(params[name].T, own) for name, own in schemes.items()}, schemes


class Reference:
    """A model in onnxruntime, optimised no more than keeps numbers."""

    def __init__(self, model: onnx.ModelProto) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, feeds: Feeds) -> list[Array]:
        """Outputs. Feeds that are no inputs are left out."""
        return list(self._session.run(None, {value.name: feeds[value.name] for value in self._session.get_inputs()}))


def run_onnxruntime(model: onnx.ModelProto, feeds: Feeds) -> list[Array]:
    """Outputs of a `Reference` that is needed once."""
    return Reference(model).run(feeds)


def relative_error(got: Array, want: Array) -> float:
    """||got - want|| / ||want||, summed in float64; 0 where both are zero."""
    difference = np.linalg.norm(got.astype(np.float64) - want.astype(np.float64))
    return float(difference / np.linalg.norm(want.astype(np.float64))) if difference else 0.0
