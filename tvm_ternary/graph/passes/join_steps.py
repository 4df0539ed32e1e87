"""Multiply all steps of a sequence by a matrix at once, where an unrolled loop does it step by step.

Before: ``matmul(squeeze(strided_slice(x, [0], [t], [t + 1])), W)`` for every t. After: ``y = matmul(x, W)``, and the
steps are slices of y: the matrix is read once, not once a step. A step that depends on the one before, as the recurrent
product of an LSTM does, is no slice of anything and stays as it is.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.passes.dataflow import Dataflow, dims_of


@dataclass(frozen=True)
class _Step:
    """One product: the slice of the sequence that it multiplies, and whether the sliced axis goes."""

    sequence: relax.Var
    matrix: relax.Var
    slice: relax.Call
    squeezed: relax.Call | None


def join_steps(module: tvm.IRModule) -> tvm.IRModule:
    """Apply the change to ``main``.

    Parameters
    ----------
    module : tvm.IRModule
        As the importer made it: ``main`` carries ``num_input``, and matrices are used as ``matmul(x, W)`` only.

    Returns
    -------
    tvm.IRModule
        The module itself where no matrix multiplies most steps of a sequence one by one.
    """
    main = module["main"]
    flow, matrices = Dataflow(main), set(main.params[int(main.attrs["num_input"]) :])
    steps = {var: step for var in flow.calls if (step := _read_step(flow, matrices, var)) is not None}
    counts: defaultdict[tuple[relax.Var, relax.Var], int] = defaultdict(int)
    for step in steps.values():
        counts[step.sequence, step.matrix] += 1
    # The steps that nobody asked for are multiplied, too: they must not be most.
    most = {key for key, count in counts.items() if count > 1 and 2 * count >= _length(key[0])}
    steps = {var: step for var, step in steps.items() if (step.sequence, step.matrix) in most}
    if not steps:
        return module
    joiner = _Joiner(module, steps)
    changed = joiner.visit_expr(main)
    result = joiner.builder_.get().clone()
    result[result.get_global_var("main")] = changed
    return relax.transform.DeadCodeElimination()(result)


def _read_step(flow: Dataflow, matrices: set[relax.Var], var: relax.Var) -> _Step | None:
    product = flow.call_of(var, "matmul")
    if product is None or product.args[1] not in matrices:
        return None
    x = product.args[0]
    squeezed = flow.call_of(x, "squeeze")
    if squeezed is not None:
        if squeezed.attrs.axis is None or [int(axis) for axis in squeezed.attrs.axis] != [0]:
            return None
        x = squeezed.args[0]
    part = flow.call_of(x, "strided_slice")
    if part is None or not isinstance(part.args[0], relax.Var) or [int(a.value) for a in part.args[1].fields] != [0]:
        return None
    sequence = part.args[0]
    dims = dims_of(sequence)
    # The rows of a step, and K, are not what is sliced.
    if dims is None or len(dims) < 2 + (squeezed is not None) or not isinstance(dims[0], tvm.tirx.IntImm):
        return None
    return _Step(sequence, product.args[1], part, squeezed)


def _length(sequence: relax.Var) -> int:
    return int(sequence.ty.shape.values[0])


@relax.expr_functor.mutator
class _Joiner(relax.PyExprMutator):
    def __init__(self, module: tvm.IRModule, steps: dict[relax.Var, _Step]) -> None:
        super().__init__(module)
        self.steps = steps
        self.joined: dict[tuple[relax.Var, relax.Var], relax.Var] = {}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        step = self.steps.get(binding.var)
        if step is None or not isinstance(binding.var, relax.DataflowVar):
            super().visit_var_binding_(binding)
            return
        key = (step.sequence, step.matrix)
        if key not in self.joined:
            self.joined[key] = self.builder_.emit(R.matmul(self.visit_expr(step.sequence), step.matrix))
        part = relax.Call(step.slice.op, [self.joined[key], *step.slice.args[1:]], step.slice.attrs)
        result = self.builder_.emit(part)
        if step.squeezed is not None:
            result = self.builder_.emit(R.squeeze(result, [0]))
        self.set_var_remap(binding.var, result)
