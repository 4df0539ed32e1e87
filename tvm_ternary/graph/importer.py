"""Import an ONNX model to Relax with its matrices as named parameters and its symbolic dimensions kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
from tvm import relax

from tvm_ternary.errors import ModelError
from tvm_ternary.formats import TernaryTensor
from tvm_ternary.graph.onnx.bind import bind_constants
from tvm_ternary.graph.onnx.data import is_mapped, release
from tvm_ternary.graph.onnx.dimension_text import evaluate_dimension, linear_dimension
from tvm_ternary.graph.onnx.dimensions import fix_dimensions, name_dimensions, real_inputs, symbolic_dimensions
from tvm_ternary.graph.onnx.emitter import Emitter, MatrixUse
from tvm_ternary.graph.onnx.functions import expand_operators, inline_functions
from tvm_ternary.graph.onnx.operators.table import is_known
from tvm_ternary.graph.onnx.prune import prune_nodes
from tvm_ternary.graph.onnx.read import read_model
from tvm_ternary.graph.onnx.values import Algebra, Value, describe, plain
from tvm_ternary.graph.onnx.walk import Walker
from tvm_ternary.runtime.manifest import DTYPES, AttentionInfo, CacheInfo, TensorSpec

_ELEMENT_TYPES = frozenset(onnx.TensorProto.DataType.values()) - {onnx.TensorProto.UNDEFINED}


@dataclass(frozen=True, eq=False)
class OnnxGraph:
    """An ONNX model as it was walked, and what the walk named in it.

    Parameters
    ----------
    model : onnx.ModelProto
        With its dimensions and constants fixed and its functions inlined.
    uses : mapping of str to sequence of MatrixUse
        The matrices that each node multiplies by, by the node's output.
    """

    model: onnx.ModelProto
    uses: Mapping[str, Sequence[MatrixUse]]


@dataclass(frozen=True)
class ImportedModel:
    """A model as Relax, before any weight became ternary.

    Attributes
    ----------
    module : tvm.IRModule
        One function ``main``: first the model's inputs, then its matrices as parameters; gives a tuple of the outputs.
        Every multiplication of activations by a matrix is ``R.matmul(x, W)`` with W a parameter.
    params : mapping of str to np.ndarray
        The matrices by name, (K, N) float32, in the order of the parameters. One of a checkpoint is read, and widened
        or dequantized, when it is asked for, and not kept.
    inputs, outputs : tuple[TensorSpec, ...]
        Names, dtypes and shapes; a dimension is a number, a symbolic dimension's name, or arithmetic over such names.
        The module is right for symbolic dimensions of at least 1, and at most what ``bounds`` says.
    name : str
        The file's stem, or the graph's name.
    bounds : dict[str, int]
        The largest value of a symbolic dimension where the model sets one (a table of position embeddings).
    embeddings : dict[str, tuple[int, ...]]
        Float tables that rows are gathered from; they stay float inside the function.
    others : dict[str, tuple[tuple[int, ...], str]]
        Other float weights of two or more dimensions, which stay float, and why.
    tables : dict[str, relax.Expr]
        The constants of ``main`` that embeddings and others are, by name.
    ternary : mapping of str to TernaryTensor
        Those of ``params`` that are ternary in the file already, (N, K); read when they are asked for.
    onnx : OnnxGraph or None
        The graph it was imported from, where that was ONNX.
    caches : tuple of CacheInfo
        Keys and values that `passes.cache_attention` keeps inside.
    attentions : tuple of AttentionInfo
        What else `passes.round_keys` decided.
    """

    module: tvm.IRModule
    params: Mapping[str, np.ndarray]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    name: str
    bounds: dict[str, int]
    embeddings: dict[str, tuple[int, ...]]
    others: dict[str, tuple[tuple[int, ...], str]]
    tables: dict[str, relax.Expr]
    ternary: Mapping[str, TernaryTensor] = field(default_factory=dict)
    onnx: OnnxGraph | None = None
    caches: tuple[CacheInfo, ...] = ()
    attentions: tuple[AttentionInfo, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """N and K of each matrix, in the order of ``params``, without reading any."""
        main = self.module["main"]
        weights = main.params[int(main.attrs["num_input"]) :]
        return {var.name: (int(var.ty.shape.values[1]), int(var.ty.shape.values[0])) for var in weights}


def import_onnx(
    source: str | Path | onnx.ModelProto,
    dims: Mapping[str, int | str] | None = None,
    constants: Mapping[str, Any] | None = None,
    *,
    uses: Mapping[str, Sequence[MatrixUse]] | None = None,
    ternary: Mapping[str, TernaryTensor] | None = None,
    convolutions: Callable[[str], bool] = lambda name: False,
) -> ImportedModel:
    """Import an ONNX model.

    Parameters
    ----------
    source : str, Path or onnx.ModelProto
        The model.
    dims : Mapping[str, int | str], optional
        Values for symbolic dimensions, or what one is equal to: another, or arithmetic (``32*rows``); the others stay
        symbolic.
    constants : Mapping[str, Any], optional
        Values for inputs that are to become constants.
    uses, ternary : mappings, optional
        For the graph of a quantized checkpoint: what its first import called its matrices (`OnnxGraph.uses`), and those
        that are ternary, whose data the graph lacks.
    convolutions : callable, optional
        Which weights of convolutions become matrices, by name; by default none. A convolution with such a weight is a
        product of the pixels under its taps.

    Returns
    -------
    ImportedModel

    Raises
    ------
    ModelError
        If the file is missing or damaged.
    UnsupportedOperatorError
        If a node cannot be imported; names it.
    OptionError
        If a dimension or an input does not exist.
    """
    passes: list[Callable[[onnx.ModelProto], onnx.ModelProto]] = [
        name_dimensions,
        lambda model: fix_dimensions(model, dims or {}),
        lambda model: bind_constants(model, constants or {}),
        inline_functions,
        lambda model: expand_operators(model, is_known),
        prune_nodes,
    ]
    model = read_model(source, quantized=ternary is not None)
    for step in passes:
        model = step(model)
    name = (model.graph.name or "model") if isinstance(source, onnx.ModelProto) else Path(source).stem
    imported = _translate(model, name, uses, ternary or {}, convolutions)
    found = imported.ternary if ternary is None else ternary
    return replace(imported, params=_Matrices(imported.params, found), ternary=found)


class _Matrices(Mapping[str, np.ndarray]):
    """Matrices; those that are ternary or mapped from a file are read when they are asked for, and not kept."""

    def __init__(self, arrays: Mapping[str, np.ndarray], ternary: Mapping[str, TernaryTensor]) -> None:
        self._arrays, self._ternary = arrays, ternary

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._ternary:
            return self._ternary[name].dequantize().T
        array = self._arrays[name]
        if not is_mapped(array):
            return array
        copy = array.copy()
        release(array)
        return copy

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _translate(
    model: onnx.ModelProto,
    name: str,
    uses: Mapping[str, Sequence[MatrixUse]] | None,
    ternary: Mapping[str, TernaryTensor],
    convolutions: Callable[[str], bool],
) -> ImportedModel:
    algebra = Algebra()
    emitter = Emitter(relax.BlockBuilder(), algebra, uses, ternary, convolutions)
    opsets = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in model.opset_import}
    inputs = _inputs(model, algebra)
    emitter.taken.update(inputs)
    results, failure = [], None
    with emitter.builder.function("main", list(inputs.values())):
        with emitter.builder.dataflow():
            try:
                values = Walker(emitter, opsets).walk(model.graph, inputs)
                results = [emitter.tensor(_output(values, output.name)) for output in model.graph.output]
            except Exception as error:  # TVM prints a warning when a builder is left with open blocks
                failure = error
            returned = emitter.builder.emit_output(relax.Tuple(results))
        emitter.builder.emit_func_output(returned)
    if failure is not None:
        raise failure
    module, params = _with_parameters(emitter)
    names = [output.name for output in model.graph.output]
    return ImportedModel(
        module=module,
        params=params,
        inputs=tuple(tensor_spec(key, var) for key, var in inputs.items()),
        outputs=tuple(tensor_spec(key, value) for key, value in zip(names, results, strict=True)),
        name=name,
        bounds=emitter.bounds,
        embeddings=emitter.embeddings,
        others=emitter.others,
        tables=emitter.tables,
        ternary={name: weight for name, weight in emitter.ternary.items() if name in params},
        onnx=OnnxGraph(model, emitter.uses),
    )


def _inputs(model: onnx.ModelProto, algebra: Algebra) -> dict[str, relax.Var]:
    """The inputs as variables that share one variable for every symbolic dimension.

    A multiple, ``32*rows``, may be of a dimension that no input has; passes find its value (`define_dimensions`).
    """
    names = symbolic_dimensions(model)
    symbols: dict[str, Any] = {}
    for name in names:
        if evaluate_dimension(name, dict.fromkeys((other for other in names if other != name), 1)) is None:
            formula = linear_dimension(name)
            symbol = formula.multiple[0] if formula is not None and formula.multiple is not None else name
            if symbol not in symbols:
                symbols[symbol] = algebra.dimension(symbol)
    for name in names:
        symbols[name] = algebra.simplify(evaluate_dimension(name, symbols))
    return {value.name: _input(value, symbols) for value in real_inputs(model.graph)}


def _input(info: onnx.ValueInfoProto, symbols: Mapping[str, Any]) -> relax.Var:
    tensor = info.type.tensor_type
    if not info.type.HasField("tensor_type") or not tensor.HasField("shape"):
        raise ModelError(info.name, "is an input of unknown rank or no tensor", "export the model with shapes")
    dims = [symbols[dim.dim_param] if dim.dim_param else dim.dim_value for dim in tensor.shape.dim]
    if tensor.elem_type not in _ELEMENT_TYPES:
        raise ModelError(info.name, f"is an input of element type {tensor.elem_type}, which ONNX does not have")
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    if dtype not in DTYPES:
        kind = "strings" if dtype == "object" else dtype
        raise ModelError(info.name, f"is an input of {kind}, which is not supported")
    return relax.Var(info.name, relax.TensorType(dims, dtype))


def _output(values: Mapping[str, Value], name: str) -> Value:
    if name not in values:
        raise ModelError(name, "is an output that no node computes", "check the file with onnx.checker")
    return values[name]


def _with_parameters(emitter: Emitter) -> tuple[tvm.IRModule, dict[str, np.ndarray]]:
    """Add the matrices that are still used to the function's parameters."""
    module = emitter.builder.get()
    main = module["main"]
    inputs = list(main.params)
    weights = [var for var, _ in emitter.parameters.values()]
    module["main"] = relax.Function([*inputs, *weights], main.body, main.ret_ty, main.is_pure, main.attrs)
    module = relax.transform.DeadCodeElimination()(module)
    main = module["main"]
    used = {var.name for var in relax.analysis.free_vars(main.body)}
    kept = [var for var in main.params[len(inputs) :] if var.name in used]
    params = [*main.params[: len(inputs)], *kept]
    main = relax.Function(params, main.body, main.ret_ty, main.is_pure, main.attrs)
    module["main"] = main.with_attr("num_input", len(inputs))
    return module, {var.name: emitter.parameters[var.name][1] for var in kept}


def tensor_spec(name: str, value: relax.Expr) -> TensorSpec:
    """How an input or output is told to a user: its symbolic dimensions by name."""
    shape = value.ty.shape
    if shape is None:
        return TensorSpec(name, str(value.ty.dtype), tuple(f"{name}_dim_{i}" for i in range(value.ty.ndim)))
    dims = tuple(dim if isinstance(dim, int) else describe(dim) for dim in map(plain, shape.values))
    return TensorSpec(name, str(value.ty.dtype), dims)
