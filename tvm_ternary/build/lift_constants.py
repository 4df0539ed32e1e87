"""Take the large constants out of a module that is ready to be built.

TVM would write them into the bytecode, in whose way to the library they are in memory four times, and copy them out of
the library at every load. As parameters they lie in the artifact as they are, and are read there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvm_ternary.runtime.arrays import BFLOAT16
from tvm_ternary.runtime.weights import DTYPES

LARGE = 1 << 16
"""Bytes from which on a constant is taken out. Each parameter costs a run some tenths of a microsecond."""

# What numpy can see without a copy.
_DTYPES = frozenset(np.dtype(code).name for code in DTYPES.values() if code != BFLOAT16)


def lift_constants(module: tvm.IRModule, least: int = LARGE) -> tuple[tvm.IRModule, dict[str, npt.NDArray[Any]]]:
    """Replace large constants of ``main`` by parameters behind those it has.

    Parameters
    ----------
    module : tvm.IRModule
        Scheduled, so that nothing computes with constants any more.
    least : int
        Bytes; smaller constants stay.

    Returns
    -------
    module : tvm.IRModule
    constants : dict of str to array
        Values of the new parameters, in their order: views of the constants' own memory.
    """
    return _Lifter(module, least).run()


@relax.expr_functor.mutator
class _Lifter(relax.PyExprMutator):
    def __init__(self, module: tvm.IRModule, least: int) -> None:
        super().__init__(module)
        self.module, self.least = module, least
        # By address: two constants may share one tensor.
        self.lifted: dict[int, relax.Var] = {}
        self.values: dict[str, npt.NDArray[Any]] = {}

    def run(self) -> tuple[tvm.IRModule, dict[str, npt.NDArray[Any]]]:
        main = self.module["main"]
        body = self.visit_expr(main.body)
        function = relax.Function([*main.params, *self.lifted.values()], body, main.ret_ty, main.is_pure, main.attrs)
        result = self.module.clone()
        result["main"] = function
        return result, self.values

    def visit_generic_const_(self, op: relax.Expr) -> relax.Expr:
        if str(op.ty.dtype) not in _DTYPES:
            return op
        value = np.from_dlpack(op.value)
        if value.nbytes < self.least:
            return op
        address = value.ctypes.data
        if address not in self.lifted:
            name = f"constant_{len(self.lifted)}"
            self.lifted[address] = relax.Var(name, op.ty)
            self.values[name] = value
        return self.lifted[address]
