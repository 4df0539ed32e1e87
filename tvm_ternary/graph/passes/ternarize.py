"""Replace multiplications by planned matrices with calls to ternary kernels.

Before: ``matmul(x, W)`` with W a parameter of ``main``, perhaps with a bias, an activation function and a residual
behind it. After: the rows of x prepared by one call, multiplied by another that takes the packed planes and scales as
parameters and does the rest before it stores its result. Everything else, and every matrix the plan leaves float,
stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax
from tvm_ffi import structural_equal

from tvm_ternary.formats import Scheme, TernaryTensor
from tvm_ternary.graph.passes.fuse_epilogues import Product, fuse_epilogues
from tvm_ternary.kernels.matmul import Epilogue
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.kernels.table import TernaryKernel
from tvm_ternary.quantize.plan import packed_bits
from tvm_ternary.schedule import dispatch
from tvm_ternary.schedule.records import TuningLog
from tvm_ternary.target import Target


@dataclass(frozen=True)
class TernaryLayer:
    """A quantized matrix, the bits of the activations that it is to be multiplied by, and how its trits are packed.

    One with a transform is for inputs that `transform_inputs` has transformed.
    """

    weight: TernaryTensor
    activation_bits: int
    packing: str = "fast"
    bfloat: bool = False

    @property
    def code(self) -> dispatch.Layer:
        """What of it decides its code."""
        return dispatch.Layer(MatmulShape.of(self.weight), self.activation_bits, self.packing, self.bfloat)

    @property
    def kernel(self) -> TernaryKernel:
        """Its row of the kernel table."""
        return self.code.kernel

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed planes and scales."""
        n, k = self.weight.shape
        return packed_bits((n, k), self.scheme, self.packing) // 8

    @property
    def scheme(self) -> Scheme:
        """What it became: a matrix that was ternary already has one plane, whatever was asked for."""
        return Scheme(self.weight.num_planes, self.activation_bits, self.weight.granularity, self.bfloat)


@dataclass(frozen=True)
class TernaryModule:
    """A module whose planned matrices are ternary.

    Attributes
    ----------
    module : tvm.IRModule
        ``main`` takes the model's inputs, then the parameters in order.
    params : dict of str to ndarray
        Values of the parameters: float matrices that stayed, and what each ternary matrix became
        (``NAME.codes``, ``NAME.dense`` or ``NAME.bits``, ``NAME.scale``, with several planes perhaps ``NAME.factor``).
    sources : dict of str to str
        For each ternary function, where its schedule comes from (see `schedule.tasks.Choice`).
    matrices : dict of str to str
        The same for each matrix; of several uses, each that differs.
    kernels : dict of str to str
        For each function added here, the kernel it is.
    epilogues : dict of str to tuple of Epilogue
        For each matrix, what its kernel does to the products before it stores them; one for each use of the matrix.
    """

    module: tvm.IRModule
    params: dict[str, npt.NDArray[Any]]
    sources: dict[str, str]
    matrices: dict[str, str]
    kernels: dict[str, str]
    epilogues: dict[str, tuple[Epilogue, ...]]


def ternarize(
    module: tvm.IRModule,
    params: Mapping[str, npt.NDArray[Any]],
    layers: Mapping[str, TernaryLayer],
    target: Target,
    logs: Sequence[TuningLog] = (),
) -> TernaryModule:
    """Apply the replacement to ``main``.

    Parameters
    ----------
    module : tvm.IRModule
        As the importer made it.
    params : mapping of name to (K, N) float32
        Values of the parameters behind the inputs, in order.
    layers : mapping of name to TernaryLayer
        The matrices to replace; a subset of ``params``.
    target : Target
    logs : sequence of TuningLog
        Where to look for tuned schedules, in order of precedence.
    """
    rewriter = _Rewriter(module, params, layers, target, logs)
    return rewriter.run()


@relax.expr_functor.mutator
class _Rewriter(relax.PyExprMutator):
    def __init__(
        self,
        module: tvm.IRModule,
        params: Mapping[str, npt.NDArray[Any]],
        layers: Mapping[str, TernaryLayer],
        target: Target,
        logs: Sequence[TuningLog],
    ) -> None:
        super().__init__(module)
        self.logs = logs
        self.module, self.params, self.layers, self.target = module, params, layers, target
        self.main = module["main"]
        self.packed: dict[str, tuple[relax.Var, ...]] = {}
        self.values: dict[str, npt.NDArray[Any]] = {}
        self.sources: dict[str, str] = {}
        self.matrices: dict[str, dict[str, None]] = {}
        self.kernels: dict[str, str] = {}
        products = fuse_epilogues(self.main, layers)
        self.products = {product.result: product for product in products}
        self.inner = frozenset[relax.Var]().union(*(product.inner for product in products))

    def run(self) -> TernaryModule:
        count = len(self.main.params) - len(self.params)
        inputs, floats = list(self.main.params[:count]), list(self.main.params[count:])
        body = self.visit_expr(self.main.body)
        kept = [var for var in floats if var.name not in self.layers]
        planes = [var for constants in self.packed.values() for var in constants]
        function = relax.Function([*inputs, *kept, *planes], body, self.main.ret_ty, self.main.is_pure)
        function = function.with_attr("global_symbol", "main").with_attr("num_input", count)
        result = self.builder_.get()
        result["main"] = function
        values = {var.name: self.params[var.name] for var in kept} | self.values
        matrices = {name: "; ".join(sources) for name, sources in self.matrices.items()}
        return TernaryModule(result, values, self.sources, matrices, self.kernels, self._epilogues())

    def _epilogues(self) -> dict[str, tuple[Epilogue, ...]]:
        products = self.products.values()
        return {name: tuple(p.epilogue for p in products if p.matrix == name) for name in self.packed}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if binding.var in self.inner:
            return
        if binding.var not in self.products:
            super().visit_var_binding_(binding)
            return
        # Whatever the epilogue reads is bound by now: some operator up to this one read it.
        self.set_var_remap(binding.var, self._multiply(self.products[binding.var]))

    def _multiply(self, product: Product) -> relax.Var:
        """x (..., K) times a ternary matrix (N, K) transposed, and what follows, in rows."""
        layer = self.layers[product.matrix]
        shape = MatmulShape.of(layer.weight)
        x = self.visit_expr(product.x)
        m = _product(list(x.ty.shape.values)[:-1])
        activations = self._activations(self._reshaped(x, (m, shape.k)), layer.code, m)
        operands = [*activations, *self._constants(product.matrix, layer)]
        if product.bias is not None:
            operands.append(product.bias)
        if product.residual is not None:
            operands.append(self._reshaped(self.visit_expr(product.residual), (m, shape.n)))
        function = self._matmul(layer, m, product.epilogue)
        self.matrices.setdefault(product.matrix, {})[self.sources[function.name_hint]] = None
        rows = self.builder_.emit(relax.call_tir(function, operands, relax.TensorType((m, shape.n), "float32")))
        return self._reshaped(rows, product.result.ty.shape.values)

    def _reshaped(self, value: relax.Expr, dims: Sequence[Any]) -> relax.Expr:
        shape = relax.ShapeExpr(dims)
        same = structural_equal(value.ty.shape, shape)
        return value if same else self.builder_.emit(relax.op.reshape(value, shape))

    def _activations(self, x: relax.Expr, code: dispatch.Layer, m: Any) -> list[relax.Expr]:
        rows = dispatch.rows_of(code, self.target)
        if rows is None:
            return [x]
        matmul = code.kernel.matmul
        name = f"rows_{matmul.name.removeprefix('matmul_')}"
        function = self._add(rows, name, name)
        outputs = [relax.TensorType(o.shape(code.shape, m), o.dtype) for o in matmul.activations]
        if len(outputs) == 1:
            return [self.builder_.emit(relax.call_tir(function, [x], outputs[0]))]
        rows = self.builder_.emit(relax.call_tir(function, [x], outputs))
        return [self.builder_.emit(relax.TupleGetItem(rows, i)) for i in range(len(outputs))]

    def _matmul(self, layer: TernaryLayer, m: Any, epilogue: Epilogue) -> relax.GlobalVar:
        rows, kernel = int(m) if isinstance(m, int) else None, layer.kernel.matmul
        function, source = dispatch.matmul_of(layer.code, self.target, self.logs, rows=rows, epilogue=epilogue)
        parts = ("ternary", kernel.name, epilogue.activation, "residual" if epilogue.residual else None)
        added = self._add(function, "_".join(part for part in parts if part), kernel.name)
        self.sources[added.name_hint] = source
        return added

    def _add(self, function: tvm.tirx.PrimFunc, name: str, kernel: str) -> relax.GlobalVar:
        # A global symbol would make the function public, under a name that another of its kind may have.
        added = self.builder_.add_func(function.without_attr("global_symbol"), name)
        self.kernels[added.name_hint] = kernel
        return added

    def _constants(self, name: str, layer: TernaryLayer) -> tuple[relax.Var, ...]:
        """The packed matrix and its scales as parameters; a matrix used twice is packed once."""
        if name not in self.packed:
            arrays = {f"{name}.{part}": array for part, array in layer.kernel.pack(layer.weight).items()}
            self.packed[name] = tuple(
                relax.Var(key, relax.TensorType(array.shape, str(array.dtype))) for key, array in arrays.items()
            )
            self.values |= arrays
        return self.packed[name]


def _product(dims: list[Any]) -> Any:
    """The number of rows; a plain int where every dimension is known."""
    if all(isinstance(dim, int) or hasattr(dim, "value") for dim in dims):
        return int(np.prod([int(dim) for dim in dims], dtype=np.int64))
    product = dims[0]
    for dim in dims[1:]:
        product = product * dim
    return product
