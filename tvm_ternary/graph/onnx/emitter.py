"""What the converters write to: the Relax function under construction and the weights it takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx
from tvm import relax, tirx
from tvm.relax import op as R

from tvm_ternary.formats import TernaryTensor, row_blocks
from tvm_ternary.graph.onnx.data import release
from tvm_ternary.graph.onnx.names import dotted, is_made_up, matrix_name, unique
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.values import Algebra, Constant, Dim, Symbols, Value, as_expr, plain

_WEIGHT_DTYPES = frozenset(
    {"float16", "float32", "float64", "bfloat16", "int8", "uint8", "int4", "uint4", "int2", "uint2"}
    | {"float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float4_e2m1fn"}
)


class MatrixUse(NamedTuple):
    """One multiplication by a matrix: the value of the graph that it was made of, and the parameter that it became."""

    value: str
    matrix: str


class Emitter:
    """Collects the body of ``main``, its matrices and the float weights that stay inside it.

    Attributes
    ----------
    builder : relax.BlockBuilder
        Receives the bindings.
    algebra : Algebra
        Knows the symbolic dimensions.
    bounds : dict[str, int]
        The largest value that a symbolic dimension, or a sum of several, may take, where the model sets one.
    parameters : dict[str, tuple[relax.Var, np.ndarray]]
        Matrices that multiply activations, (K, N) float32, in the order of their first use.
    embeddings : dict[str, tuple[int, ...]]
        Float tables that rows are gathered from.
    others : dict[str, tuple[tuple[int, ...], str]]
        Other weights of two or more dimensions, and why they are no matrices.
    tables : dict[str, relax.Expr]
        The constants that embeddings and others are in the function, by name.
    biases : dict[str, str]
        Names of the biases added to products, by the product's output.
    taken : set[str]
        Names that no further parameter may have.
    uses : dict[str, list[MatrixUse]]
        The matrices that each node multiplies by, in order, by the node's output.
    ternary : dict[str, TernaryTensor]
        Matrices that are ternary in the file, (N, K).

    Parameters
    ----------
    builder, algebra
        As above.
    known : mapping, optional
        ``uses`` of an earlier walk over the same graph. Matrices then get the names they had, whatever they hold, for
        in a quantized checkpoint the data of ternary ones are left out.
    absent : container of str, optional
        The matrices whose data are left out; zeros that take no memory stand in for them.
    convolutions : callable, optional
        Whether the weight of a convolution, by the name it would have, is to be a matrix. By default none is.
    """

    def __init__(
        self,
        builder: relax.BlockBuilder,
        algebra: Algebra,
        known: Mapping[str, Sequence[MatrixUse]] | None = None,
        absent: Container[str] = (),
        convolutions: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.builder = builder
        self.algebra = algebra
        self.bounds: dict[str, int] = {}
        self.parameters: dict[str, tuple[relax.Var, np.ndarray]] = {}
        self.embeddings: dict[str, tuple[int, ...]] = {}
        self.others: dict[str, tuple[tuple[int, ...], str]] = {}
        self.tables: dict[str, relax.Expr] = {}
        self.biases: dict[str, str] = {}
        self.uses: dict[str, list[MatrixUse]] = {}
        self.ternary: dict[str, TernaryTensor] = {}
        self._known, self._absent = known or {}, absent
        self._convolutions = convolutions
        self.taken: set[str] = {use.matrix for uses in self._known.values() for use in uses}
        self._by_content: dict[tuple[object, ...], relax.Expr] = {}
        self._constants: dict[int, tuple[Constant, relax.Expr]] = {}

    def emit(self, expr: relax.Expr) -> relax.Expr:
        """Bind an expression to a variable."""
        return self.builder.emit(expr)

    # What is known about a value

    def shape(self, value: Value) -> list[Dim] | None:
        """The dimensions, None where they depend on the model's data."""
        if isinstance(value, Constant):
            return list(value.array.shape)
        if isinstance(value, Symbols):
            return list(value.values.shape)
        shape = value.ty.shape
        return None if shape is None else [plain(dim) for dim in shape.values]

    def rank(self, value: Value) -> int:
        """The number of dimensions, -1 where it is unknown."""
        shape = self.shape(value)
        return len(shape) if shape is not None else int(value.ty.ndim)  # type: ignore[union-attr]

    def dtype(self, value: Value) -> str:
        """The element type's numpy name."""
        if isinstance(value, Constant):
            return str(value.array.dtype)
        return value.dtype if isinstance(value, Symbols) else str(value.ty.dtype)

    def known_shape(self, value: Value, node: Node) -> list[Dim]:
        """The dimensions, or an error that names the node."""
        shape = self.shape(value)
        if shape is None:
            node.refuse("the shape of its input depends on the model's data")
        return shape

    def dims(self, value: Value, node: Node) -> list[Dim]:
        """The elements of a shape-like input.

        Raises
        ------
        UnsupportedOperatorError
            If they are computed from the model's data.
        """
        if isinstance(value, Constant):
            return [int(item) for item in value.array.reshape(-1)]
        if isinstance(value, Symbols):
            return list(value.values.reshape(-1))
        return node.refuse("a shape or bound is computed from the model's data")

    def limit(self, expr: Dim, most: int) -> bool:
        """Assume that an expression over symbolic dimensions is at most ``most`` and note the bounds that sets.

        Returns
        -------
        bool
            False when it is no dimension and no sum of some; nothing is assumed then.
        """
        limits = self.algebra.limit(expr, most)
        for name, largest in (limits or {}).items():
            self.bounds[name] = min(largest, self.bounds.get(name, largest))
        return limits is not None

    # Values as Relax expressions

    def tensor(self, value: Value, node: Node | None = None, reason: str | None = None) -> relax.Expr:
        """A value as a Relax tensor; a float weight that becomes part of the function is listed in ``others``.

        Parameters
        ----------
        value : Value
            The value.
        node : Node, optional
            The node that uses it.
        reason : str, optional
            Why a float weight is no matrix; by default the operator that uses it.
        """
        if isinstance(value, Constant):
            if node is not None and self._is_weight(value.array):
                name = self.weight_name(value, node)
                self.others.setdefault(name, (value.array.shape, reason or f"used by {node.op}"))
                self.tables.setdefault(name, self._constant(value))
            return self._constant(value)
        return self._materialize(value) if isinstance(value, Symbols) else value

    def embedding(self, value: Constant, node: Node) -> relax.Expr:
        """A float table that rows are gathered from."""
        if self._is_weight(value.array):
            name = self.weight_name(value, node)
            self.embeddings.setdefault(name, value.array.shape)
            self.tables.setdefault(name, self._constant(value))
        return self._constant(value)

    def _constant(self, value: Constant) -> relax.Expr:
        if id(value) not in self._constants:
            array = np.ascontiguousarray(value.array).reshape(value.array.shape)
            self._constants[id(value)] = (value, relax.const(array, str(array.dtype)))
        return self._constants[id(value)][1]

    def _materialize(self, value: Symbols) -> relax.Expr:
        """Compute the elements at run time, on the host, from the dimensions of the inputs."""
        numbers = [
            tirx.Select(item, as_expr(1), as_expr(0)) if str(item.ty) == "bool" else item
            for item in (self._number(item) for item in value.values.reshape(-1))
        ]
        flat = self.emit(R.shape_to_tensor(relax.ShapeExpr(numbers)))
        tensor = flat if value.values.ndim == 1 else self.emit(R.reshape(flat, value.values.shape))
        return tensor if value.dtype == "int64" else self.emit(R.astype(tensor, value.dtype))

    @staticmethod
    def _number(item: object) -> tirx.Expr:
        return as_expr(int(item)) if isinstance(item, bool) else as_expr(item)

    @staticmethod
    def _is_weight(array: np.ndarray) -> bool:
        return str(array.dtype) in _WEIGHT_DTYPES and sum(size > 1 for size in array.shape) >= 2

    # Matrices

    def is_chosen(self, names: Sequence[str], node: onnx.NodeProto) -> bool:
        """Whether a convolution's weight is to be a matrix: it was one in an earlier walk, or is chosen by name."""
        if self._known:
            return next(name for name in node.output if name) in self._known
        return self._convolutions(matrix_name(names, node, self._bias(node)))

    def is_step_matrix(self, names: Container[str], node: onnx.NodeProto) -> bool:
        """Whether the states of a recurrence are to be multiplied by a matrix like any other, step by step.

        They are, unless an earlier walk over the same graph did without: it multiplied by no value of these names.
        """
        known = self._known.get(next(name for name in node.output if name), ())
        return not self._known or any(use.value in names for use in known)

    def inner_matrix(
        self, form: np.ndarray, shape: tuple[int, ...], names: Sequence[str], node: onnx.NodeProto, reason: str
    ) -> relax.Expr:
        """A matrix that a function reads in a form of its own; it stays float, and is listed in ``others``.

        Parameters
        ----------
        form : np.ndarray
            Its elements as they are read.
        shape : tuple of int
            What it is listed with, (K, N).
        names, node
            As for `matrix`.
        reason : str
            Why it is no matrix like the others.
        """
        key = (form.shape, _digest(form.reshape(-1, form.shape[-1])))
        if key not in self._by_content:
            name = unique(matrix_name(names, node, self._bias(node)), {*self.taken, *self.others})
            self.others[name] = (shape[::-1], reason)
            self.tables[name] = self._by_content[key] = relax.const(form, str(form.dtype))
        return self._by_content[key]

    def matrix(self, array: np.ndarray, names: Sequence[str], node: onnx.NodeProto) -> relax.Var:
        """The parameter that holds a (K, N) float32 matrix; the same content is the same parameter."""
        array = array.astype(np.float32, copy=False)
        output = next(name for name in node.output if name)
        uses, known = self.uses.setdefault(output, []), self._known.get(output, ())
        if len(uses) < len(known):
            var = self._parameter(known[len(uses)].matrix, array)
        else:
            key = (array.shape, _digest(array))
            if key not in self._by_content:
                name = matrix_name(names, node, self._bias(node))
                self._by_content[key] = self._parameter(unique(name, self.taken), array)
            var = self._by_content[key]
        uses.append(MatrixUse(names[0] if names else "", var.name))
        return var

    def note_ternary(self, node: onnx.NodeProto, weight: TernaryTensor) -> None:
        """Say that the matrix which a node was given last is this one; its float elements are not kept."""
        output = next(name for name in node.output if name)
        name = self.uses[output][-1].matrix
        if name not in self._absent:
            self.ternary[name] = weight
            var, array = self.parameters[name]
            self.parameters[name] = (var, np.broadcast_to(np.float32(0), array.shape))

    def _bias(self, node: onnx.NodeProto) -> str | None:
        return next((self.biases[name] for name in node.output if name in self.biases), None)

    def _parameter(self, name: str, array: np.ndarray) -> relax.Var:
        """The parameter of this name, made when it is new."""
        if name not in self.parameters:
            self.taken.add(name)
            if name in self._absent:
                array = np.broadcast_to(np.float32(0), array.shape)
            self.parameters[name] = (relax.Var(name, relax.TensorType(array.shape, "float32")), array)
        return self.parameters[name][0]

    def weight_name(self, value: Constant, node: Node) -> str:
        """The name under which a float weight that is no matrix is listed."""
        return next((dotted(name) for name in value.names if not is_made_up(name)), dotted(node.label))


def _digest(array: np.ndarray) -> bytes:
    """A hash of the elements in row order, a block of rows at a time: the array may be mapped from a file."""
    digest = hashlib.blake2b()
    for rows in row_blocks(*array.shape):
        digest.update(np.ascontiguousarray(array[rows]).data)
    release(array)
    return digest.digest()
