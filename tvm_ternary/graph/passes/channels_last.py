"""Keep images with their channels last from one convolution to the next.

Before: ``conv2d`` over (N, C, H, W), and so is everything between. After: convolutions, poolings and resizings work on
(N, H, W, C), where the channels of a pixel lie side by side: any number of them fills the lanes of a vector, however
small the image is, and a convolution of one pixel is a matrix product as it stands.

No order of axes is planned. A value stays in the order in which it was made; operators that do not care go along, and
one that does gets a transposed copy (`permute_dims`), or a view where only axes of length one change places. What no
convolution has made is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax import op as R
from tvm_ffi import structural_equal

from tvm_ternary.graph.passes.conv_scale import fold_scales
from tvm_ternary.graph.passes.conv_transpose import as_convolution, can_be_convolution

UNARY = (
    *("abs", "ceil", "clip", "cos", "erf", "exp", "floor", "log", "negative", "round", "rsqrt", "sigmoid", "sin"),
    *("sqrt", "square", "tanh", "nn.relu", "nn.gelu", "nn.gelu_tanh", "nn.silu", "nn.leakyrelu", "astype"),
)
BINARY = ("add", "subtract", "multiply", "divide", "maximum", "minimum", "power")
REDUCTIONS = {"mean": R.mean, "sum": R.sum, "max": R.max, "min": R.min}
CONVOLUTIONS = {"nn.conv1d": (R.nn.conv1d, "NWC", "WIO"), "nn.conv2d": (R.nn.conv2d, "NHWC", "HWIO")}
POOLS = {
    "nn.max_pool1d": (R.nn.max_pool1d, "NWC"),
    "nn.avg_pool1d": (R.nn.avg_pool1d, "NWC"),
    "nn.max_pool2d": (R.nn.max_pool2d, "NHWC"),
    "nn.avg_pool2d": (R.nn.avg_pool2d, "NHWC"),
}
CHANNELS_FIRST = ("NCW", "NCHW")

# The narrowest vector of any CPU.
LANES = 4


@dataclass(frozen=True)
class Stored:
    """A value in another order of axes: dimension d of ``data`` is dimension ``order[d]`` of the value."""

    data: relax.Expr
    order: tuple[int, ...]

    @property
    def inverse(self) -> tuple[int, ...]:
        """Where each dimension of the value is in ``data``."""
        return tuple(int(i) for i in np.argsort(self.order))


def channels_last(module: tvm.IRModule) -> tvm.IRModule:
    """Apply the change to ``main``.

    Parameters
    ----------
    module : tvm.IRModule
        With weights bound as constants, or not.

    Returns
    -------
    tvm.IRModule
        Computes the same from the same inputs; the module itself where it has no convolution.
    """
    found = False

    def visit(expr: relax.Expr) -> None:
        nonlocal found
        found = found or (isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op) and _makes_image(expr))

    relax.analysis.post_order_visit(module["main"], visit)
    if not found:
        return module
    # Batch norm becomes arithmetic, and the biases, reshaped constants, become constants.
    passes = [
        relax.transform.DecomposeOpsForInference(),
        relax.transform.CanonicalizeBindings(),
        relax.transform.FoldConstant(),
    ]
    with tvm.target.Target({"kind": "llvm"}):
        module = fold_scales(tvm.ir.transform.Sequential(passes)(module))
    mover = _Mover(module)
    main = mover.visit_expr(module["main"])
    result = mover.builder_.get().clone()
    result[result.get_global_var("main")] = main
    return relax.transform.DeadCodeElimination()(result)


@relax.expr_functor.mutator
class _Mover(relax.PyExprMutator):
    """Walks ``main`` in order and remembers which values are stored in another order of axes."""

    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__(module)
        self.stored: dict[relax.Var, Stored] = {}
        self.copies: dict[tuple[relax.Var, tuple[int, ...]], relax.Expr] = {}
        self.rules: dict[str, Callable[[relax.Call], Stored | None]] = {
            **dict.fromkeys(CONVOLUTIONS, self._convolution),
            "nn.conv2d_transpose": self._transposed_convolution,
            **dict.fromkeys(POOLS, self._pool),
            "image.resize2d": self._resize,
            **dict.fromkeys(UNARY, self._unary),
            **dict.fromkeys(BINARY, self._binary),
            **dict.fromkeys(REDUCTIONS, self._reduction),
            "concat": self._concat,
            "strided_slice": self._slice,
            "permute_dims": self._permutation,
            "squeeze": self._squeeze,
            "expand_dims": self._expand,
        }

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        call = binding.value
        rule = None
        if isinstance(call, relax.Call) and isinstance(call.op, tvm.ir.Op):
            rule = self.rules.get(call.op.name.removeprefix("relax."))
        result = rule(call) if rule is not None else None
        if result is None:
            super().visit_var_binding_(binding)
            return
        stored = Stored(self.builder_.emit(result.data), result.order)
        if isinstance(binding.var, relax.DataflowVar):
            self.stored[binding.var] = stored
        else:
            value = _permuted(stored.data, stored.inverse)
            self.set_var_remap(binding.var, self.builder_.emit_output(value))

    def visit_dataflow_var_(self, var: relax.DataflowVar) -> relax.Expr:
        if var in self.stored:
            return self._ordered(var, tuple(range(len(self.stored[var].order))))
        return super().visit_dataflow_var_(var)

    def _ordered(self, expr: relax.Expr, order: tuple[int, ...]) -> relax.Expr:
        """A value with its axes in some order, copied if it is in no such order yet."""
        if isinstance(expr, GenericConst):
            return _permuted(expr, order)
        now = self.stored.get(expr) or Stored(self.visit_expr(expr), tuple(range(len(order))))
        if now.order == order:
            return now.data
        key = (expr, order)
        if key not in self.copies:
            self.copies[key] = self.builder_.emit(_permuted(now.data, [now.order.index(axis) for axis in order]))
        return self.copies[key]

    def _of(self, expr: relax.Expr) -> Stored | None:
        return self.stored.get(expr) if isinstance(expr, relax.Var) else None

    def _last(self, expr: relax.Expr) -> tuple[relax.Expr, tuple[int, ...]]:
        """A value with its second axis last."""
        rank = expr.ty.ndim
        order = (0, *range(2, rank), 1)
        return self._ordered(expr, order), order

    def _convolution(self, call: relax.Call) -> Stored | None:
        if call.attrs.data_layout not in CHANNELS_FIRST or call.ty.dtype != "float32":
            return None
        make, layout, kernel_layout = CONVOLUTIONS[call.op.name.removeprefix("relax.")]
        data, order = self._last(call.args[0])
        # (O, I, ...) to (..., I, O)
        weight = self._ordered(call.args[1], (*range(2, len(order)), 1, 0))
        attrs, taps = call.attrs, list(weight.ty.shape.values)[:-2]
        # A single channel has no lanes: others of zeros give it some. One tap is a product of vectors, which has.
        lonely = int(weight.ty.shape.values[-1]) == 1 and any(int(size) > 1 for size in taps)
        if lonely:
            weight = self.builder_.emit(R.nn.pad(weight, [0, 0] * (len(taps) + 1) + [0, LANES - 1]))
        result = make(
            data,
            weight,
            attrs.strides,
            attrs.padding,
            attrs.dilation,
            attrs.groups,
            data_layout=layout,
            kernel_layout=kernel_layout,
        )
        if lonely:
            result = R.strided_slice(self.builder_.emit(result), [len(order) - 1], [0], [1])
        return Stored(result, order)

    def _transposed_convolution(self, call: relax.Call) -> Stored | None:
        if not can_be_convolution(call):
            return None
        data, order = self._last(call.args[0])
        return Stored(as_convolution(self.builder_.emit, call, data), order)

    def _pool(self, call: relax.Call) -> Stored | None:
        if call.attrs.layout not in CHANNELS_FIRST or self._of(call.args[0]) is None:
            return None
        make, layout = POOLS[call.op.name.removeprefix("relax.")]
        data, order = self._last(call.args[0])
        a = call.attrs
        result = make(
            data, a.pool_size, a.strides, a.padding, a.dilation, a.ceil_mode, a.count_include_pad, layout=layout
        )
        return Stored(result, order)

    def _resize(self, call: relax.Call) -> Stored | None:
        if call.attrs.layout != "NCHW" or self._of(call.args[0]) is None:
            return None
        data, order = self._last(call.args[0])
        a = call.attrs
        result = R.image.resize2d(
            data,
            self.visit_expr(call.args[1]),
            list(a.roi),
            "NHWC",
            a.method,
            a.coordinate_transformation_mode,
            a.rounding_method,
            a.cubic_alpha,
            a.cubic_exclude,
            a.extrapolation_value,
        )
        return Stored(result, order)

    def _unary(self, call: relax.Call) -> Stored | None:
        stored = self._of(call.args[0])
        if stored is None:
            return None
        return Stored(relax.Call(call.op, [stored.data, *call.args[1:]], call.attrs), stored.order)

    def _binary(self, call: relax.Call) -> Stored | None:
        rank = call.ty.ndim
        found = (self._of(arg) for arg in call.args)
        leader = next((stored for stored in found if stored is not None and len(stored.order) == rank), None)
        if leader is None or any(arg.ty.shape is None for arg in call.args):
            return None
        return Stored(relax.Call(call.op, [self._aligned(arg, leader.order) for arg in call.args]), leader.order)

    def _aligned(self, arg: relax.Expr, order: tuple[int, ...]) -> relax.Expr:
        """An operand, broadcast to as many axes as the other has, in its order."""
        missing = len(order) - arg.ty.ndim
        if missing == 0:
            return self._ordered(arg, order)
        if arg.ty.ndim == 0:
            return self.visit_expr(arg)
        if isinstance(arg, GenericConst):
            array = arg.value.numpy()
            return _permuted(_constant(array.reshape([1] * missing + list(array.shape))), order)
        wide = self.builder_.emit(R.reshape(self.visit_expr(arg), [1] * missing + list(arg.ty.shape.values)))
        return self.builder_.emit(_permuted(wide, order))

    def _reduction(self, call: relax.Call) -> Stored | None:
        stored = self._of(call.args[0])
        if stored is None:
            return None
        rank = len(stored.order)
        axes = [int(a) % rank for a in (call.attrs.axis if call.attrs.axis is not None else range(rank))]
        make = REDUCTIONS[call.op.name.removeprefix("relax.")]
        result = make(stored.data, [stored.order.index(axis) for axis in axes], call.attrs.keepdims)
        order = stored.order if call.attrs.keepdims else _without(stored.order, axes)
        return Stored(result, order)

    def _concat(self, call: relax.Call) -> Stored | None:
        fields = call.args[0].fields if isinstance(call.args[0], relax.Tuple) else ()
        leader = next((stored for stored in map(self._of, fields) if stored is not None), None)
        if leader is None or call.attrs.axis is None:
            return None
        axis = leader.order.index(int(call.attrs.axis) % len(leader.order))
        return Stored(R.concat([self._ordered(field, leader.order) for field in fields], axis), leader.order)

    def _slice(self, call: relax.Call) -> Stored | None:
        stored = self._of(call.args[0])
        if stored is None:
            return None
        axes = [stored.order.index(int(axis.value) % len(stored.order)) for axis in call.args[1].fields]
        return Stored(relax.Call(call.op, [stored.data, _integers(axes), *call.args[2:]], call.attrs), stored.order)

    def _permutation(self, call: relax.Call) -> Stored | None:
        stored = self._of(call.args[0])
        if stored is None and _makes_image(call):
            stored = Stored(self.visit_expr(call.args[0]), (0, 1, 2, 3))
        if stored is None or call.attrs.axes is None:
            return None
        axes = [int(axis) % len(stored.order) for axis in call.attrs.axes]
        return Stored(stored.data, tuple(axes.index(axis) for axis in stored.order))

    def _squeeze(self, call: relax.Call) -> Stored | None:
        stored = self._of(call.args[0])
        if stored is None or call.attrs.axis is None:
            return None
        axes = [int(axis) % len(stored.order) for axis in call.attrs.axis]
        data = R.squeeze(stored.data, [stored.order.index(axis) for axis in axes])
        return Stored(data, _without(stored.order, axes))

    def _expand(self, call: relax.Call) -> Stored | None:
        stored = self._of(call.args[0])
        if stored is None:
            return None
        rank = len(stored.order) + len(call.attrs.axis)
        added = sorted(int(axis) % rank for axis in call.attrs.axis)
        old = [axis for axis in range(rank) if axis not in added]
        # The new axes come first; being of length one, their place makes no difference.
        data = R.expand_dims(stored.data, list(range(len(added))))
        return Stored(data, (*added, *(old[axis] for axis in stored.order)))


def _makes_image(call: relax.Call) -> bool:
    """Whether it is a convolution, or makes an image of the rows of one that became a matrix product."""
    name = call.op.name.removeprefix("relax.")
    if name == "permute_dims":
        return call.attrs.axes is not None and [int(axis) for axis in call.attrs.axes] == [0, 3, 1, 2]
    return name in (*CONVOLUTIONS, "nn.conv2d_transpose")


def _without(order: tuple[int, ...], axes: Sequence[int]) -> tuple[int, ...]:
    """The order of what is left when some axes go."""
    kept = [axis for axis in range(len(order)) if axis not in axes]
    return tuple(kept.index(axis) for axis in order if axis not in axes)


def _permuted(expr: relax.Expr, order: Sequence[int]) -> relax.Expr:
    """Put dimension ``order[d]`` at d; a view where what moves is of length one."""
    if list(order) == list(range(len(order))):
        return expr
    if isinstance(expr, GenericConst):
        return _constant(np.transpose(expr.value.numpy(), order))
    dims = list(expr.ty.shape.values)
    moving = [axis for axis in order if not structural_equal(dims[axis], tvm.tirx.IntImm("int64", 1))]
    if moving == sorted(moving):
        return R.reshape(expr, [dims[axis] for axis in order])
    return R.permute_dims(expr, list(order))


def _constant(array: np.ndarray[Any, Any]) -> relax.Expr:
    return relax.const(np.ascontiguousarray(array), str(array.dtype))


def _integers(values: Sequence[int]) -> relax.Expr:
    return relax.Tuple([tvm.tirx.IntImm("int64", value) for value in values])
