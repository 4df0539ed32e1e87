"""Build ``main`` from the tensors of a checkpoint: what the architectures are written in.

The graph has the forms that the ONNX importer gives, so that the same passes find the same things: a matrix is a
parameter, on the right of a ``matmul``, with its bias, activation function and residual behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax, tirx
from tvm.relax import op as R

from tvm_ternary.errors import ModelError
from tvm_ternary.formats import TernaryTensor
from tvm_ternary.formats.tensor_files import Tensors, TernaryTensors
from tvm_ternary.graph.importer import ImportedModel, tensor_spec
from tvm_ternary.graph.models.lazy import Lazy
from tvm_ternary.graph.models.weights import floats
from tvm_ternary.graph.onnx.values import describe

BATCH, SEQUENCE, PAST = "batch", "sequence", "past"


def build_model(
    tensors: Tensors,
    inputs: Sequence[str],
    body: Callable[[GraphBuilder], Mapping[str, relax.Expr]],
    *,
    bounds: Mapping[str, int] | None = None,
    harmless: Collection[str] = (),
    past: bool = False,
) -> ImportedModel:
    """Build a model.

    Parameters
    ----------
    tensors : Tensors
        The checkpoint.
    inputs : sequence of str
        Names of the inputs, each int64 [batch, sequence]; the second, where there is a past, [batch, past + sequence].
    body : callable
        Computes the outputs, by name, with the builder it is given.
    bounds : mapping of str to int, optional
        The largest value of ``batch`` or ``sequence``.
    harmless : collection of str
        Last parts of the names of tensors that a checkpoint may hold although the architecture has no use for them.
    past : bool
        Whether keys and values of tokens before these are inputs, and those with these behind them outputs.

    Raises
    ------
    ModelError
        If a tensor is missing, has another shape than the configuration says, is NaN or infinite, or is not used.
    """
    graph = GraphBuilder(tensors, inputs, past=past)
    results: dict[str, relax.Expr] = {}
    failure: Exception | None = None
    with graph.blocks.function("main", list(graph.inputs.values())):
        with graph.blocks.dataflow():
            try:
                results.update(body(graph))
                results.update(graph.present)
                graph.refuse_unused(harmless)
            except Exception as error:  # TVM prints a warning when a builder is left with open blocks
                failure = error
            returned = graph.blocks.emit_output(relax.Tuple(list(results.values())))
        graph.blocks.emit_func_output(returned)
    if failure is not None:
        raise failure
    return ImportedModel(
        module=graph.module(),
        params=graph.matrices,
        inputs=tuple(tensor_spec(name, var) for name, var in {**graph.inputs, **graph.states}.items()),
        outputs=tuple(tensor_spec(name, value) for name, value in results.items()),
        name="model",
        bounds={describe(graph.total) if past and name == SEQUENCE else name: n for name, n in (bounds or {}).items()},
        embeddings={name: tuple(map(int, table.ty.shape.values)) for name, table in graph.tables.items()},
        others={},
        tables=dict(graph.tables),
        ternary=graph.ternary,
    )


class GraphBuilder:
    """Emits the operators of one model and notes the tensors that it takes.

    Attributes
    ----------
    tensors : Tensors
    blocks : relax.BlockBuilder
    batch, sequence : tirx.Var
        The symbolic dimensions.
    past, total : tirx expression
        Tokens before these, and all.
    inputs : dict of str to relax.Var
    matrices : Lazy
        (K, N) float32, in the order of their first use.
    ternary : Lazy
        Those of them that are ternary in the checkpoint, (N, K).
    tables : dict of str to relax.Expr
        Tables that rows are gathered from.
    states, present : dict of str to relax.Var
        Keys and values of the past, which are inputs, and those of all tokens, which are outputs.
    """

    def __init__(self, tensors: Tensors, inputs: Sequence[str], *, past: bool = False) -> None:
        self.tensors = tensors
        self.blocks = relax.BlockBuilder()
        self.batch, self.sequence = tirx.Var(BATCH, "int64"), tirx.Var(SEQUENCE, "int64")
        self.past = tirx.Var(PAST, "int64") if past else tirx.const(0, "int64")
        self.total = self.past + self.sequence if past else self.sequence
        lengths = [self.sequence, self.total]
        self.inputs = {
            name: relax.Var(name, relax.TensorType([self.batch, lengths[n > 0]], "int64"))
            for n, name in enumerate(inputs)
        }
        self.states: dict[str, relax.Var] = {}
        self.present: dict[str, relax.Var] = {}
        self.matrices = Lazy[npt.NDArray[np.float32]]()
        self.ternary = Lazy[TernaryTensor]()
        self.tables: dict[str, relax.Expr] = {}
        self._names = frozenset(tensors.names())
        self._used: set[str] = set()
        self._parameters: dict[str, relax.Var] = {}

    def emit(self, expr: relax.Expr) -> relax.Var:
        """Bind an expression to a variable."""
        return self.blocks.emit(expr)

    # Tensors of the checkpoint

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor."""
        return name in self._names

    def use(self, name: str, shape: Sequence[int]) -> str:
        """Note that a tensor is used, and give its name.

        Raises
        ------
        ModelError
            If there is none of this name, or it has another shape.
        """
        if name not in self._names:
            raise ModelError(name, "is missing from the checkpoint", "the files and config.json have to be one model's")
        got = self.tensors.shape(name)
        if tuple(got) != tuple(shape):
            raise ModelError(self.tensors.where(name), f"has shape {list(got)}; config.json says {list(shape)}")
        self._used.add(name)
        return name

    def vector(self, name: str, *shape: int) -> npt.NDArray[np.float32]:
        """A small weight, read now."""
        return floats(self.tensors, self.use(name, shape))

    def matrix(
        self,
        name: str,
        n: int,
        k: int,
        *,
        transposed: bool = False,
        ternary: Callable[[], TernaryTensor] | None = None,
    ) -> relax.Var:
        """The parameter (K, N) that a matrix becomes; the same name is the same parameter.

        Parameters
        ----------
        name : str
            Of the tensor, and so of the parameter.
        n, k : int
            out_features, in_features.
        transposed : bool
            Whether the checkpoint stores (K, N) rather than (N, K).
        ternary : callable, optional
            Reads the (N, K) matrix where the architecture knows how to read its ternary weights; it has called `use`
            for the tensors that this takes.
        """
        if name not in self._parameters:
            if ternary is None and isinstance(self.tensors, TernaryTensors) and name in self.tensors.ternary:
                # However the float checkpoint stored it, a ternary matrix is (N, K).
                found = self.tensors.ternary
                self.use(name, (n, k))
                self._add_ternary(name, lambda: found[name])
            elif ternary is not None:
                self._add_ternary(name, ternary)
            else:
                self.use(name, (k, n) if transposed else (n, k))
                self.matrices.add(name, lambda: self._read(name, transposed))
            self._parameters[name] = relax.Var(name, relax.TensorType([k, n], "float32"))
        return self._parameters[name]

    def _add_ternary(self, name: str, read: Callable[[], TernaryTensor]) -> None:
        self.ternary.add(name, read)
        self.matrices.add(name, lambda: np.ascontiguousarray(read().dequantize().T))

    def _read(self, name: str, transposed: bool) -> npt.NDArray[np.float32]:
        array = floats(self.tensors, name)
        return np.ascontiguousarray(array if transposed else array.T)

    def leave_out(self, *names: str) -> None:
        """Note tensors that are known and not needed, where they are there."""
        self._used.update(names)

    def refuse_different(self, name: str, twin: str, *shape: int) -> None:
        """Refuse a tensor that the configuration says is the same as another, and is not."""
        if not np.array_equal(self.vector(name, *shape), self.vector(twin, *shape)):
            problem = f"differs from {twin}, and config.json (tie_word_embeddings) says they are the same"
            raise ModelError(self.tensors.where(name), problem, "set it to false if the model has both")

    def refuse_unused(self, harmless: Collection[str]) -> None:
        """Refuse a checkpoint with tensors that nothing used, for it is another model than its configuration says."""
        unused = [name for name in self.tensors.names() if name not in self._used]
        unused = [name for name in unused if not any(f".{name}".endswith(f".{last}") for last in harmless)]
        if unused:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            problem = f"is not used by this architecture, as config.json describes it{more}"
            raise ModelError(self.tensors.where(unused[0]), problem, "export the model to ONNX, or remove the tensors")

    def module(self) -> tvm.IRModule:
        """The finished function, its matrices behind its inputs."""
        module = self.blocks.get()
        main = module["main"]
        params = [*main.params, *self.states.values(), *self._parameters.values()]
        main = relax.Function(params, main.body, main.ret_ty, main.is_pure, main.attrs)
        module["main"] = main.with_attr("num_input", len(self.inputs) + len(self.states))
        return module

    # Layers

    def linear(
        self, x: relax.Expr, name: str, n: int, k: int, *, bias: str | None = None, transposed: bool = False
    ) -> relax.Var:
        """X (..., K) times a matrix, and a bias (N,) where one is named."""
        product = self.emit(R.matmul(x, self.matrix(name, n, k, transposed=transposed)))
        return product if bias is None else self.emit(R.add(product, relax.const(self.vector(bias, n))))

    def head(self, x: relax.Expr, name: str, table: str, rows: int, width: int, *, tied: bool) -> relax.Var:
        """X times the output layer: a matrix of its own, or the table of embeddings where they are tied.

        Parameters
        ----------
        x : (..., width)
        name, table : str
            Tensors of the output layer and of the embeddings.
        rows, width : int
            Their shape.
        tied : bool
            Whether the configuration says that they are the same.

        Raises
        ------
        ModelError
            If they are tied, and the checkpoint holds both and they differ.
        """
        if not tied:
            return self.linear(x, name, rows, width)
        if self.has(name):
            self.refuse_different(name, table, rows, width)
        return self.linear(x, table, rows, width)

    def table(self, name: str, rows: int, width: int) -> relax.Expr:
        """A table that rows are gathered from; it stays float inside the function."""
        if name not in self.tables:
            self.tables[name] = relax.const(np.ascontiguousarray(self.vector(name, rows, width)))
        return self.tables[name]

    def embedding(self, ids: relax.Expr, name: str, rows: int, width: int) -> relax.Var:
        """Rows of a table, (..., width). An index that lies outside gives NaN."""
        return self.emit(R.take(self.table(name, rows, width), ids, 0, "nan"))

    def first_rows(self, name: str, rows: int, width: int, start: int = 0) -> relax.Var:
        """As many rows of a table as the sequence is long, from ``start`` on behind the past: (sequence, width)."""
        positions = self.emit(R.arange(self.past + start, self.total + start, 1, "int64"))
        return self.emit(R.take(self.table(name, rows, width), positions, 0, "clip"))

    def remember(self, key: relax.Expr, value: relax.Expr) -> tuple[relax.Expr, relax.Expr]:
        """Keys and values (batch, sequence, heads, size) behind those of the past, (batch, total, heads, size)."""
        if not isinstance(self.past, tirx.Var):
            return key, value
        layer, joined = len(self.states) // 2, []
        for kind, new in (("key", key), ("value", value)):
            shape = [self.batch, self.past, *new.ty.shape.values[2:]]
            before = relax.Var(f"past_key_values.{layer}.{kind}", relax.TensorType(shape, "float32"))
            joined.append(self.emit(R.concat([before, new], 1)))
            self.states[f"past_key_values.{layer}.{kind}"] = before
            self.present[f"present.{layer}.{kind}"] = joined[-1]
        return joined[0], joined[1]

    def layer_norm(self, x: relax.Expr, name: str, width: int, epsilon: float) -> relax.Var:
        """``name.weight`` and ``name.bias`` over the last axis; old checkpoints call them ``gamma`` and ``beta``."""
        parts = ("gamma", "beta") if self.has(f"{name}.gamma") else ("weight", "bias")
        scale, shift = (relax.const(self.vector(f"{name}.{part}", width)) for part in parts)
        return self.emit(R.nn.layer_norm(x, scale, shift, [-1], epsilon))

    def rms_norm(self, x: relax.Expr, name: str, width: int, epsilon: float) -> relax.Var:
        """``name.weight`` times x over the root of its mean square, over the last axis."""
        return self.emit(R.nn.rms_norm(x, relax.const(self.vector(f"{name}.weight", width)), [-1], epsilon))

    def activation(self, x: relax.Expr, name: str) -> relax.Var:
        """An activation function by the name that configurations give it.

        Raises
        ------
        ModelError
            If there is none of this name; lists those that are.
        """
        if name not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ModelError("config.json", f"names activation function {name!r}, expected one of {known}")
        result = x
        for function in ACTIVATIONS[name]:
            result = self.emit(function(result))
        return result

    def reshape(self, x: relax.Expr, *shape: Any) -> relax.Var:
        """X in another shape; dimensions are numbers or expressions."""
        dims = [tirx.const(dim, "int64") if isinstance(dim, int) else dim for dim in shape]
        return self.emit(R.reshape(x, relax.ShapeExpr(dims)))


ACTIVATIONS: dict[str, tuple[Callable[[relax.Expr], relax.Expr], ...]] = {
    "gelu": (R.nn.gelu,),
    "gelu_new": (R.nn.gelu_tanh,),
    "gelu_fast": (R.nn.gelu_tanh,),
    "gelu_pytorch_tanh": (R.nn.gelu_tanh,),
    "relu": (R.nn.relu,),
    "relu2": (R.nn.relu, lambda x: R.multiply(x, x)),
    "silu": (R.nn.silu,),
    "swish": (R.nn.silu,),
    "tanh": (R.tanh,),
}
"""What computes each activation function, in order."""
