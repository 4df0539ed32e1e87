"""Replace multiplications by planned matrices with calls to ternary kernels.

Before: ``matmul(x, W)`` with W a parameter of ``main``, perhaps ``add(matmul(x, W), bias)``. After: the rows of x
prepared by one call, multiplied by another that takes the packed planes and scales as parameters and adds the bias.
Everything else, and every matrix the plan leaves float, stays as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvm_ternary.formats import Scheme, TernaryTensor, pack_scale
from tvm_ternary.kernels.matmul import Epilogue
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.kernels.table import KERNELS, TernaryKernel
from tvm_ternary.quantize.plan import packed_bits
from tvm_ternary.schedule.ternary import matmul_function
from tvm_ternary.schedule.tiles import load_tiles


@dataclass(frozen=True)
class TernaryLayer:
    """A quantized matrix and the bits of the activations that it is to be multiplied by."""

    weight: TernaryTensor
    activation_bits: int

    @property
    def kernel(self) -> TernaryKernel:
        """Its row of the kernel table."""
        return KERNELS[self.activation_bits]

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed planes and scales."""
        n, k = self.weight.shape
        return packed_bits((n, k), self.scheme) // 8

    @property
    def scheme(self) -> Scheme:
        """What it became: a matrix that was ternary already has one plane, whatever was asked for."""
        return Scheme(self.weight.num_planes, self.activation_bits, self.weight.granularity)


@dataclass(frozen=True)
class TernaryModule:
    """A module whose planned matrices are ternary.

    Attributes
    ----------
    module : tvm.IRModule
        ``main`` takes the model's inputs, then the parameters in order.
    params : dict of str to ndarray
        Values of the parameters: float matrices that stayed, packed planes (``NAME.codes`` or ``NAME.bits``) and
        ``NAME.scale``.
    sources : dict of str to str
        For each ternary function, the schedule file that its tiles come from.
    kernels : dict of str to str
        For each function added here, the kernel it is.
    """

    module: tvm.IRModule
    params: dict[str, npt.NDArray[Any]]
    sources: dict[str, str]
    kernels: dict[str, str]


def ternarize(
    module: tvm.IRModule, params: Mapping[str, npt.NDArray[Any]], layers: Mapping[str, TernaryLayer], tier: str
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
    tier : str
        ISA tier of the target.
    """
    rewriter = _Rewriter(module, params, layers, tier)
    return rewriter.run()


@relax.expr_functor.mutator
class _Rewriter(relax.PyExprMutator):
    def __init__(
        self,
        module: tvm.IRModule,
        params: Mapping[str, npt.NDArray[Any]],
        layers: Mapping[str, TernaryLayer],
        tier: str,
    ) -> None:
        super().__init__(module)
        self.module, self.params, self.layers, self.tier = module, params, layers, tier
        self.main = module["main"]
        self.packed: dict[str, tuple[relax.Var, relax.Var]] = {}
        self.values: dict[str, npt.NDArray[Any]] = {}
        self.sources: dict[str, str] = {}
        self.kernels: dict[str, str] = {}
        self.biased = _biased_matmuls(self.main, set(layers))
        self.skipped = {matmul for matmul, _ in self.biased.values()}

    def run(self) -> TernaryModule:
        count = len(self.main.params) - len(self.params)
        inputs, floats = list(self.main.params[:count]), list(self.main.params[count:])
        body = self.visit_expr(self.main.body)
        kept = [var for var in floats if var.name not in self.layers]
        planes = [var for pair in self.packed.values() for var in pair]
        function = relax.Function([*inputs, *kept, *planes], body, self.main.ret_ty, self.main.is_pure)
        function = function.with_attr("global_symbol", "main").with_attr("num_input", count)
        result = self.builder_.get()
        result["main"] = function
        values = {var.name: self.params[var.name] for var in kept} | self.values
        return TernaryModule(result, values, self.sources, self.kernels)

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if binding.var in self.skipped:
            return
        value, bias = binding.value, None
        if binding.var in self.biased:
            _, (value, bias) = self.biased[binding.var]
        name = _matrix_name(value)
        if name is None or name not in self.layers:
            super().visit_var_binding_(binding)
            return
        x = self.visit_expr(value.args[0])
        self.set_var_remap(binding.var, self.builder_.emit(self._multiply(x, name, bias)))

    def _multiply(self, x: relax.Expr, name: str, bias: relax.Expr | None) -> relax.Expr:
        """x (..., K) times a ternary matrix (N, K) transposed, in rows."""
        layer = self.layers[name]
        shape = MatmulShape.of(layer.weight)
        leading = list(x.ty.shape.values)[:-1]
        m = _product(leading)
        flat = x if len(leading) == 1 else self.builder_.emit(relax.op.reshape(x, (m, shape.k)))
        activations = self._activations(flat, layer.kernel, shape, m)
        function = self._matmul(layer.kernel, shape, m, bias is not None)
        operands = [*activations, *self._planes(name, layer), *([bias] if bias is not None else [])]
        result = relax.call_tir(function, operands, relax.TensorType((m, shape.n), "float32"))
        if len(leading) == 1:
            return result
        return relax.op.reshape(self.builder_.emit(result), (*leading, shape.n))

    def _activations(self, x: relax.Expr, kernel: TernaryKernel, shape: MatmulShape, m: Any) -> list[relax.Expr]:
        if kernel.reads_rows_directly(shape):
            return [x]
        name = f"rows_{kernel.matmul.name.removeprefix('matmul_')}"
        function = self._add(kernel.rows(shape), name, name)
        outputs = [relax.TensorType(o.shape(shape, m), o.dtype) for o in kernel.matmul.activations]
        if len(outputs) == 1:
            return [self.builder_.emit(relax.call_tir(function, [x], outputs[0]))]
        rows = self.builder_.emit(relax.call_tir(function, [x], outputs))
        return [self.builder_.emit(relax.TupleGetItem(rows, i)) for i in range(len(outputs))]

    def _matmul(self, kernel: TernaryKernel, shape: MatmulShape, m: Any, bias: bool) -> relax.GlobalVar:
        tiles = load_tiles(kernel.matmul.name, self.tier)
        rows = int(m) if isinstance(m, int) else None
        function = matmul_function(kernel.matmul, shape, tiles.variants, self.tier, rows=rows, epilogue=Epilogue(bias))
        added = self._add(function, f"ternary_{kernel.matmul.name}", kernel.matmul.name)
        self.sources[added.name_hint] = tiles.source
        return added

    def _add(self, function: tvm.tirx.PrimFunc, name: str, kernel: str) -> relax.GlobalVar:
        # A global symbol would make the function public, under a name that another of its kind may have.
        added = self.builder_.add_func(function.without_attr("global_symbol"), name)
        self.kernels[added.name_hint] = kernel
        return added

    def _planes(self, name: str, layer: TernaryLayer) -> tuple[relax.Var, relax.Var]:
        """The packed matrix as parameters; a matrix used twice is packed once."""
        if name not in self.packed:
            arrays = {
                f"{name}.{layer.kernel.matmul.layout}": layer.kernel.pack(layer.weight),
                f"{name}.scale": pack_scale(layer.weight),
            }
            planes, scale = (relax.Var(key, relax.TensorType(a.shape, str(a.dtype))) for key, a in arrays.items())
            self.packed[name] = (planes, scale)
            self.values |= arrays
        return self.packed[name]


def _matrix_name(value: relax.Expr) -> str | None:
    """The parameter that ``matmul(x, W)`` multiplies by, None for anything else."""
    if isinstance(value, relax.Call) and value.op == tvm.ir.Op.get("relax.matmul"):
        weight = value.args[1]
        return weight.name if isinstance(weight, relax.Var) else None
    return None


def _biased_matmuls(
    main: relax.Function, names: set[str]
) -> dict[relax.Var, tuple[relax.Var, tuple[relax.Call, relax.Expr]]]:
    """For each ``add`` of a constant vector (N,) to a planned matmul used nowhere else: the matmul's variable, call and
    the bias."""
    bindings = [binding for block in main.body.blocks for binding in block.bindings]
    calls = {b.var: b.value for b in bindings if isinstance(b, relax.VarBinding) and _matrix_name(b.value) in names}
    uses = _uses(main)
    found = {}
    for binding in bindings:
        value = binding.value
        if not isinstance(value, relax.Call) or value.op != tvm.ir.Op.get("relax.add"):
            continue
        for matmul, bias in ((value.args[0], value.args[1]), (value.args[1], value.args[0])):
            if matmul in calls and uses[matmul] == 1 and isinstance(bias, tvm.ir.GenericConst):
                n = calls[matmul].args[1].ty.shape.values[1]
                if list(bias.ty.shape.values) == [n] and bias.ty.dtype == "float32":
                    found[binding.var] = (matmul, (calls[matmul], bias))
    return found


def _uses(main: relax.Function) -> Counter[relax.Var]:
    uses: Counter[relax.Var] = Counter()

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Var):
            uses[expr] += 1

    for block in main.body.blocks:
        for binding in block.bindings:
            relax.analysis.post_order_visit(binding.value, visit)
    relax.analysis.post_order_visit(main.body.body, visit)
    return uses


def _product(dims: list[Any]) -> Any:
    """The number of rows; a plain int where every dimension is known."""
    if all(isinstance(dim, int) or hasattr(dim, "value") for dim in dims):
        return int(np.prod([int(dim) for dim in dims], dtype=np.int64))
    product = dims[0]
    for dim in dims[1:]:
        product = product * dim
    return product
