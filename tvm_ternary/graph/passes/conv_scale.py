"""Fold what is done to each channel behind a convolution into its weight and one bias.

Before: ``(conv(x, W) - mean) / deviation * gamma + beta``, which is what a batch norm becomes, all of them constants.
After: ``conv(x, W * scale) + shift``. The factors are multiplied in float64, so that the weights are rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax import op as R

from tvm_ternary.graph.passes.dataflow import Dataflow

CONVOLUTIONS = ("nn.conv1d", "nn.conv2d")
STEPS = ("add", "subtract", "multiply", "divide")


@dataclass(frozen=True)
class _Affine:
    """A convolution whose result, times scale, plus shift, both (O,) float64, is what a later variable holds."""

    call: relax.Call
    result: relax.Var
    scale: NDArray[Any]
    shift: NDArray[Any]
    inner: tuple[relax.Var, ...]


def fold_scales(module: tvm.IRModule) -> tvm.IRModule:
    """Apply the change to ``main``.

    Parameters
    ----------
    module : tvm.IRModule
        With its batch norms taken apart and its constants folded; convolutions have their channels first.

    Returns
    -------
    tvm.IRModule
        The module itself where there is nothing to fold.
    """
    flow = Dataflow(module["main"])
    found = [affine for var in flow.calls if (affine := _find(flow, var)) is not None]
    if not found:
        return module
    folder = _Folder(module, found)
    main = folder.visit_expr(module["main"])
    result = folder.builder_.get().clone()
    result[result.get_global_var("main")] = main
    return relax.transform.DeadCodeElimination()(result)


def _find(flow: Dataflow, conv: relax.Var) -> _Affine | None:
    """Follow a convolution with a constant weight as long as all that reads it scales or shifts its channels."""
    call = flow.call_of(conv, *CONVOLUTIONS)
    if call is None or not isinstance(call.args[1], GenericConst) or not call.attrs.data_layout.startswith("NC"):
        return None
    weight = call.args[1].value.numpy()
    scale, shift = np.ones(len(weight)), np.zeros(len(weight))
    var, inner = conv, list[relax.Var]()
    while (reader := flow.only_reader(var)) is not None and (step := flow.call_of(reader, *STEPS)) is not None:
        left, right = step.args
        name = step.op.name.removeprefix("relax.")
        # A constant less the channels, or over them, is another matter.
        operand = right if left == var else left if name in ("add", "multiply") else None
        channels = None if operand is None else _channels(operand, len(weight), call.ty.ndim)
        if channels is None:
            break
        if name in ("multiply", "divide"):
            factor = channels if name == "multiply" else 1 / channels
            scale, shift = scale * factor, shift * factor
        else:
            shift = shift + (channels if name == "add" else -channels)
        inner.append(var)
        var = reader
    if np.all(scale == 1) or not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return None
    return _Affine(call, var, scale, shift, tuple(inner))


def _channels(operand: relax.Expr, count: int, rank: int) -> NDArray[Any] | None:
    """A constant with a value for each channel, or one for all, as (O,); None if it is anything else."""
    if not isinstance(operand, GenericConst):
        return None
    array = operand.value.numpy().astype(np.float64)
    shape = (1,) * (rank - array.ndim) + array.shape
    if len(shape) != rank or shape[1] not in (1, count) or any(size != 1 for d, size in enumerate(shape) if d != 1):
        return None
    return np.broadcast_to(array.reshape(-1), (count,))


@relax.expr_functor.mutator
class _Folder(relax.PyExprMutator):
    def __init__(self, module: tvm.IRModule, found: Sequence[_Affine]) -> None:
        super().__init__(module)
        self.results = {affine.result: affine for affine in found}
        self.inner = {var for affine in found for var in affine.inner}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if binding.var in self.inner:
            return
        if binding.var not in self.results:
            super().visit_var_binding_(binding)
            return
        affine = self.results[binding.var]
        call = affine.call
        weight = call.args[1].value.numpy()
        wide = (-1, *[1] * (weight.ndim - 1))
        scaled = (weight * affine.scale.reshape(wide)).astype(weight.dtype)
        folded = self.builder_.emit(
            relax.Call(call.op, [self.visit_expr(call.args[0]), relax.const(scaled)], call.attrs)
        )
        shift = affine.shift.astype(weight.dtype).reshape(1, *wide[:-1])
        result = R.add(folded, relax.const(shift))
        lazily = isinstance(binding.var, relax.DataflowVar)
        self.set_var_remap(binding.var, self.builder_.emit(result) if lazily else self.builder_.emit_output(result))
