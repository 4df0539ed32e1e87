"""What passes over attentions share: a rewriter that asks for each one what is to be in its place."""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm import relax

from tvm_ternary.graph.passes.dataflow import with_main
from tvm_ternary.graph.passes.find_attention import Match


class ReplaceAttentions(relax.PyExprMutator):
    """Rewrites ``main``; what only the old attentions read goes.

    A pass is a subclass, decorated as a mutator, that has `replacement`.

    Parameters
    ----------
    module : tvm.IRModule
    found : mapping of relax.Var to Match
        Attentions by the variables that hold their results.
    """

    def __init__(self, module: tvm.IRModule, found: Mapping[relax.Var, Match]) -> None:
        super().__init__(module)
        self.main, self.found = module["main"], found

    def run(self) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(with_main(self.builder_, self.visit_expr(self.main)))

    def replacement(self, match: Match) -> Mapping[relax.Var, relax.Expr]:
        """What variables become, the result first; nothing where all stays as it is."""
        raise NotImplementedError

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        match = self.found.get(binding.var)
        replacement = {} if match is None else self.replacement(match)
        for var, expr in replacement.items():
            self.set_var_remap(var, self.builder_.emit(expr))
        if not replacement:
            super().visit_var_binding_(binding)
