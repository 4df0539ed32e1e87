"""Copy what a function returns of its weights, so that every large output is memory of its own, or an input's.

A runtime may then hand it out without copying: it knows its inputs, but not where the constants of a library lie. Small
outputs it copies; their copies here would be taken for views by what TVM does to a module before it is built.
"""

from __future__ import annotations

import math

import tvm
from tvm import relax, topi

from tvm_ternary.graph.passes.dataflow import Dataflow, dims_of, with_main
from tvm_ternary.runtime.manifest import SMALL_OUTPUT

# What gives its argument back, or a view of it.
_VIEWS = ("reshape", "expand_dims", "squeeze", "flatten")


def own_outputs(module: tvm.IRModule) -> tvm.IRModule:
    """Copy outputs of ``main`` that are weights, constants, or views of either.

    Parameters
    ----------
    module : tvm.IRModule
        Whose ``main`` carries ``num_input``; parameters behind those are weights.

    Returns
    -------
    tvm.IRModule
    """
    main = module["main"]
    inputs = set(main.params[: int(main.attrs["num_input"])])
    flow = Dataflow(main)
    (returned,) = (b.value for block in main.body.blocks for b in block.bindings if b.var == main.body.body)
    kept = [number for number, field in enumerate(returned.fields) if _is_kept(field, flow, inputs)]
    return _Copier(module, main.body.body, kept).run() if kept else module


def _is_kept(value: relax.Expr, flow: Dataflow, inputs: set[relax.Var]) -> bool:
    """Whether it is memory that outlives a run."""
    dims = dims_of(value)
    if dims is not None and all(isinstance(dim, tvm.tirx.IntImm) for dim in dims):
        elements = math.prod(map(int, dims))
        if elements * tvm.DataType(str(value.ty.dtype)).itemsize < SMALL_OUTPUT:
            return False
    while (call := flow.call_of(value, *_VIEWS)) is not None:
        value = call.args[0]
    # One of several results of a call.
    value = flow.fields.get(value, value) if isinstance(value, relax.Var) else value
    return not isinstance(value, relax.Var) or (value not in flow.calls and value not in inputs)


@relax.expr_functor.mutator
class _Copier(relax.PyExprMutator):
    def __init__(self, module: tvm.IRModule, result: relax.Var, kept: list[int]) -> None:
        super().__init__(module)
        self.main, self.result, self.kept = module["main"], result, kept

    def run(self) -> tvm.IRModule:
        return with_main(self.builder_, self.visit_expr(self.main))

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if binding.var != self.result:
            super().visit_var_binding_(binding)
            return
        fields = [self.visit_expr(field) for field in binding.value.fields]
        for number in self.kept:
            fields[number] = self.builder_.emit_te(topi.identity, fields[number])
        self.set_var_remap(binding.var, self.builder_.emit_output(relax.Tuple(fields)))
