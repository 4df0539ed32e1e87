"""Make parameters of the weights that are constants: embedding tables, convolution kernels.

So all weights, matrices or not, are parameters of ``main``: they are bound to constants together, or lie beside the
library together, and one checksum covers them.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import tvm
from tvm import relax


def lift_tables(
    module: tvm.IRModule, params: Mapping[str, npt.NDArray[Any]], tables: Mapping[str, relax.Expr]
) -> tuple[tvm.IRModule, Mapping[str, npt.NDArray[Any]]]:
    """Replace constants of ``main`` by parameters behind those it has.

    Parameters
    ----------
    module : tvm.IRModule
        Whose ``main`` carries ``num_input``.
    params : mapping of str to array
        Values of the parameters behind the inputs, in order.
    tables : mapping of str to relax.Expr
        The constants by name. One that ``main`` does not use is left out; one whose name a parameter has already, as an
        embedding tied to the output layer does, gets ``.table`` behind it.

    Returns
    -------
    module : tvm.IRModule
    params : mapping of str to array
        With the tables behind the others, none of which is read here.
    """
    named = {f"{name}.table" if name in params else name: table for name, table in tables.items()}
    return _Lifter(module, named).run(params)


@relax.expr_functor.mutator
class _Lifter(relax.PyExprMutator):
    def __init__(self, module: tvm.IRModule, tables: Mapping[str, relax.Expr]) -> None:
        super().__init__(module)
        self.module, self.tables = module, tables
        self.lifted: dict[str, relax.Var] = {}

    def run(self, params: Mapping[str, npt.NDArray[Any]]) -> tuple[tvm.IRModule, Mapping[str, npt.NDArray[Any]]]:
        main = self.module["main"]
        body = self.visit_expr(main.body)
        function = relax.Function([*main.params, *self.lifted.values()], body, main.ret_ty, main.is_pure, main.attrs)
        result = self.module.clone()
        result["main"] = function
        tables = {name: self.tables[name].value.numpy() for name in self.lifted}
        # A chain lists its last mapping first, and reads from the first that has a name.
        return result, ChainMap(tables, params)  # type: ignore[arg-type]

    def visit_generic_const_(self, op: relax.Expr) -> relax.Expr:
        name = next((name for name, table in self.tables.items() if table.same_as(op)), None)
        if name is None:
            return op
        if name not in self.lifted:
            self.lifted[name] = relax.Var(name, op.ty)
        return self.lifted[name]
