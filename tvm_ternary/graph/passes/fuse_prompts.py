"""Make attention of known lengths, however it is spelled, two calls on a GPU, and never write its scores.

Before::

    y = attention(q, k, v, mask)

After::

    keys, values = round_operands(k, v)
    y = attention_rounded(q, keys, values, pack_mask(mask))

A mask that hides keys and adds nothing else becomes bits, once for all layers that have it; another one stays. What
becomes of queries that see no key, and of ``where``, is said in `fuse_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import tvm
from tvm import relax

from tvm_ternary.graph.passes.dataflow import dims_of, with_main
from tvm_ternary.graph.passes.find_attention import Match, find_attentions, known_extent
from tvm_ternary.graph.passes.fuse_attention import add_masks
from tvm_ternary.kernels.attention import WORD, Attention
from tvm_ternary.kernels.shape import ceil_div

PackMask = Callable[[tuple[int, int, int, int]], tvm.tirx.PrimFunc]
"""Gives what makes bits of a mask of floats of such extents."""
Halves = tuple[tvm.tirx.PrimFunc, list[tuple[int, ...]], tvm.tirx.PrimFunc]
"""What rounds keys and values, the extents of what it gives, uint32, and what attends to that."""
Schedule = Callable[[Attention, tuple[int | None, ...]], Halves | None]
"""Gives them for a batch and numbers of queries and keys; None where there is no such kernel."""


def fuse_prompts(module: tvm.IRModule, schedule: Schedule, pack_mask: PackMask) -> tvm.IRModule:
    """Replace the attentions of ``main`` that there are kernels for.

    Parameters
    ----------
    module : tvm.IRModule
    schedule, pack_mask : callable
        Give the scheduled functions.

    Returns
    -------
    tvm.IRModule
        The others stay products and a softmax.
    """
    found = find_attentions(module)
    if not found:
        return module
    return relax.transform.DeadCodeElimination()(_Rewriter(module, found, schedule, pack_mask).run())


@relax.expr_functor.mutator
class _Rewriter(relax.PyExprMutator):
    def __init__(
        self, module: tvm.IRModule, found: dict[relax.Var, Match], schedule: Schedule, pack_mask: PackMask
    ) -> None:
        super().__init__(module)
        self.main, self.found, self.schedule, self.pack_mask = module["main"], found, schedule, pack_mask
        self.packers: dict[tuple[int, ...], tvm.ir.GlobalVar] = {}
        self.functions: dict[Any, tuple[tvm.ir.GlobalVar, list[relax.TensorType], tvm.ir.GlobalVar] | None] = {}

    def run(self) -> tvm.IRModule:
        return with_main(self.builder_, self.visit_expr(self.main))

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        match = self.found.get(binding.var)
        call = None if match is None else self._call(match)
        if call is None:
            super().visit_var_binding_(binding)
        else:
            self.set_var_remap(binding.var, self.builder_.emit(call))

    def _call(self, match: Match) -> relax.Expr | None:
        mask = add_masks(self.builder_, match, self.visit_expr, bits=False)
        hidden = match.scores.hidden if "s" in mask.axes else None
        # What is joined of a past and new ones is a result of its own, and is there.
        shape = replace(match.shape(mask.axes, hidden), joined=False)
        operands = match.query, match.key, match.value
        query, key, _ = (one.extents for one in operands)
        functions = self._functions(shape, tuple(map(known_extent, (query["b"], query["l"], key["l"]))))
        if functions is None:
            return None
        round_, types, attend = functions
        q, k, v = (self.visit_expr(one.value) for one in operands)
        rounded = self.builder_.emit(relax.call_tir(round_, [k, v], types))
        halves = [self.builder_.emit(relax.TupleGetItem(rounded, n)) for n in range(len(types))]
        masks = mask.operands if hidden is None else [self._bits(mask.operands[0])]
        return relax.call_tir(attend, [q, *halves, *masks], match.result.ty)

    def _bits(self, mask: relax.Expr) -> relax.Expr:
        """The mask as words; equal calls become one."""
        batch, heads, queries, keys = map(int, dims_of(mask) or [])
        extents = batch, heads, queries, keys
        if extents not in self.packers:
            self.packers[extents] = self._add(self.pack_mask(extents), "pack_mask")
        words = relax.TensorType((*extents[:-1], ceil_div(keys, WORD)), "int64")
        return self.builder_.emit(relax.call_tir(self.packers[extents], [mask], words))

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
