"""Make attention of known lengths, however it is spelled, two calls on a GPU, and never write its scores.

Before::

    y = attention(q, k, v, mask)

After::

    keys, values = round_operands(k, v)
    y = attention_rounded(q, keys, values, mask)

What becomes of masks, of queries that see no key, and of ``where``, is said in `fuse_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import tvm
from tvm import relax

from tvm_ternary.graph.passes.find_attention import Match, find_attentions, known_extent
from tvm_ternary.graph.passes.fuse_attention import add_masks
from tvm_ternary.graph.passes.replace_attentions import ReplaceAttentions
from tvm_ternary.kernels.attention import Attention

Halves = tuple[tvm.tirx.PrimFunc, list[tuple[int, ...]], tvm.tirx.PrimFunc]
"""What rounds keys and values, the extents of what it gives, uint32, and what attends to that."""
Schedule = Callable[[Attention, tuple[int | None, ...]], Halves | None]
"""Gives them for a batch and numbers of queries and keys; None where there is no such kernel."""


def fuse_prompts(module: tvm.IRModule, schedule: Schedule) -> tvm.IRModule:
    """Replace the attentions of ``main`` that there are kernels for.

    Parameters
    ----------
    module : tvm.IRModule
    schedule : callable
        Gives the scheduled functions.

    Returns
    -------
    tvm.IRModule
        The others stay products and a softmax.
    """
    found = find_attentions(module)
    if not found:
        return module
    return _Rewriter(module, found, schedule).run()


@relax.expr_functor.mutator
class _Rewriter(ReplaceAttentions):
    def __init__(self, module: tvm.IRModule, found: Mapping[relax.Var, Match], schedule: Schedule) -> None:
        super().__init__(module, found)
        self.schedule = schedule
        self.functions: dict[Any, tuple[tvm.ir.GlobalVar, list[relax.TensorType], tvm.ir.GlobalVar] | None] = {}

    def replacement(self, match: Match) -> Mapping[relax.Var, relax.Expr]:
        mask = add_masks(self.builder_, match, self.visit_expr)
        # What is joined of a past and new ones is a result of its own, and is there.
        shape = replace(match.shape(mask.axes, mask.hidden), joined=False)
        operands = match.query, match.key, match.value
        query, key, _ = (one.extents for one in operands)
        functions = self._functions(shape, tuple(map(known_extent, (query["b"], query["l"], key["l"]))))
        if functions is None:
            return {}
        round_, types, attend = functions
        q, k, v = (self.visit_expr(one.value) for one in operands)
        rounded = self.builder_.emit(relax.call_tir(round_, [k, v], types))
        halves = [self.builder_.emit(relax.TupleGetItem(rounded, n)) for n in range(len(types))]
        return {match.result: relax.call_tir(attend, [q, *halves, *mask.operands], match.result.ty)}

    def _functions(
        self, shape: Attention, lengths: tuple[int | None, ...]
    ) -> tuple[tvm.ir.GlobalVar, list[relax.TensorType], tvm.ir.GlobalVar] | None:
        if (shape, lengths) not in self.functions:
            made = self.schedule(shape, lengths)
            self.functions[shape, lengths] = made and (
                self._add(made[0], "round_operands"),
                [relax.TensorType(extents, "uint32") for extents in made[1]],
                self._add(made[2], "attention"),
            )
        return self.functions[shape, lengths]

    def _add(self, function: tvm.tirx.PrimFunc, name: str) -> tvm.ir.GlobalVar:
        """Under a name that no other one has."""
        return self.builder_.add_func(function.without_attr("global_symbol"), name)
