"""Attention over a whole text with ternary keys: they are packed in the run, and multiplied packed.

Before, however it is spelled (`find_attention`)::

    y = attention(q, k, v, mask)

After::

    packed = pack_keys(k, v)
    y = rounded_attention(q, *packed, k, v, mask)

The last keys stay in float. Values have no planes, for nothing is kept and they would save no memory; where the target
multiplies pairs of 16-bit numbers faster than floats, they are rounded to those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import tvm
from tvm import relax

from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.passes.cache_attention import CacheChoice, Choices
from tvm_ternary.graph.passes.find_attention import Match, as_index, known_extent
from tvm_ternary.graph.passes.find_pasts import named_attentions
from tvm_ternary.graph.passes.fold_rotations import KEY, QUERY, Parts, fold_rotations
from tvm_ternary.graph.passes.fuse_attention import add_masks
from tvm_ternary.graph.passes.replace_attentions import ReplaceAttentions
from tvm_ternary.graph.passes.rotate import Rotations, can_rotate
from tvm_ternary.kernels.attention import Attention
from tvm_ternary.runtime.manifest import AttentionInfo

Outputs = Callable[[tvm.ir.Expr, tvm.ir.Expr], list[tuple[list[tvm.ir.Expr], str]]]
"""Batch and keys -> shapes and dtypes of what packing gives."""
Schedule = Callable[[Attention, int, int, tuple[int | None, ...]], tuple[tvm.tirx.PrimFunc, tvm.tirx.PrimFunc, Outputs]]
"""Gives what packs, what attends and what is between them, for planes and a window, and batch, queries and keys."""


def round_keys(model: ImportedModel, choices: Choices, schedule: Schedule) -> ImportedModel:
    """Apply the change to the attentions that are named.

    Parameters
    ----------
    model : ImportedModel
    choices : mapping of str to tuple of CacheChoice
        By the names of `named_attentions`, one for all heads each.
    schedule : callable
        Gives the scheduled functions.

    Returns
    -------
    ImportedModel
        ``attentions`` says what became of them.
    """
    chosen = {name: choice for name, (choice,) in choices.items()}
    matches = {name: match for name, match in named_attentions(model).items() if name in chosen}
    infos = tuple(
        AttentionInfo(
            name,
            chosen[name].mode,
            chosen[name].key_planes,
            chosen[name].window,
            chosen[name].rotated and can_rotate(match.query.layout, match.key.layout),
            chosen[name].reason,
        )
        for name, match in matches.items()
    )
    rounded = {name: match for name, match in matches.items() if chosen[name].window is not None}
    if not rounded:
        return replace(model, attentions=infos)
    wanted = {info.name: (QUERY, KEY) if info.rotated else () for info in infos if info.name in rounded}
    model, folded = fold_rotations(model, rounded, wanted)
    rounded = {name: match for name, match in named_attentions(model).items() if name in rounded}
    rewriter = _Rewriter(model.module, rounded, chosen, schedule, folded)
    return replace(model, module=rewriter.run(), attentions=infos)


@relax.expr_functor.mutator
class _Rewriter(ReplaceAttentions):
    def __init__(
        self,
        module: tvm.IRModule,
        matches: Mapping[str, Match],
        chosen: Mapping[str, CacheChoice],
        schedule: Schedule,
        folded: Mapping[str, Parts],
    ) -> None:
        super().__init__(module, {match.result: match for match in matches.values()})
        self.chosen, self.schedule, self.folded = chosen, schedule, folded
        self.names = {match.result: name for name, match in matches.items()}
        self.rotations = Rotations(self.builder_)
        self.functions: dict[Any, tuple[tvm.ir.GlobalVar, tvm.ir.GlobalVar, Outputs]] = {}

    def replacement(self, match: Match) -> Mapping[relax.Var, relax.Expr]:
        name = self.names[match.result]
        return {match.result: self._call(match, self.chosen[name], self.folded[name])}

    def _call(self, match: Match, choice: CacheChoice, folded: Parts) -> relax.Expr:
        mask = add_masks(self.builder_, match, self.visit_expr)
        shape = replace(match.shape(mask.axes, mask.hidden), joined=False)
        batch, queries, keys = match.query.extents["b"], match.query.extents["l"], match.key.extents["l"]
        assert choice.window is not None
        key = shape, choice.key_planes, choice.window, tuple(map(known_extent, (batch, queries, keys)))
        if key not in self.functions:
            to_pack, to_attend, outputs_of = self.schedule(*key)
            add = self.builder_.add_func
            self.functions[key] = add(to_pack, "pack_keys"), add(to_attend, "rounded_attention"), outputs_of
        pack, attend, outputs_of = self.functions[key]
        q, k, v = (self.visit_expr(one.value) for one in (match.query, match.key, match.value))
        if choice.rotated and can_rotate(shape.query, shape.key):
            q = q if QUERY in folded else self.rotations.rotate_heads(q, shape.query)
            k = k if KEY in folded else self.rotations.rotate_heads(k, shape.key)
        outputs = outputs_of(as_index(batch), as_index(keys))
        packed = self.builder_.emit(
            relax.call_tir(pack, [k, v], [relax.TensorType(extents, dtype) for extents, dtype in outputs])
        )
        words = [self.builder_.emit(relax.TupleGetItem(packed, n)) for n in range(len(outputs))]
        return relax.call_tir(attend, [q, *words, k, v, *mask.operands], match.result.ty)
