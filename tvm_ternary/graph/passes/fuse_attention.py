"""Find attention, however it is spelled, and make one call of it that never writes its scores.

Before::

    q4 = permute_dims(reshape(q)); k4 = permute_dims(reshape(k)); v4 = permute_dims(reshape(v))
    scores = add(multiply(matmul(q4, k4), scale), mask)
    y = reshape(permute_dims(matmul(softmax(scores), v4)))

After::

    y = reshape(attention(reshape(q), reshape(k), reshape(v), mask))

The transpositions are gone: the kernel is told where the elements of its operands lie. What else counts as attention,
`find_attention` says. Where keys and values are those of the past with new ones behind them, the kernel joins them
itself and gives the joined ones as results, too. A mask that only hides keys becomes bits (`mask_values`).

Two things change. A query that sees no key, each masked by -inf, gives zeros instead of NaN. And ``where`` becomes
an addition, so that a hidden score that is not finite shows, where the choice would have dropped it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import tvm
from tvm import relax
from tvm.relax import op as R
from tvm_ffi import structural_equal

from tvm_ternary.graph.fuse import INJECTIVE, OP_PATTERN
from tvm_ternary.graph.passes.dataflow import dims_of
from tvm_ternary.graph.passes.find_attention import Match, as_index, find_attentions, known_extent
from tvm_ternary.graph.passes.replace_attentions import ReplaceAttentions
from tvm_ternary.kernels.attention import Attention
from tvm_ternary.kernels.mask_words import NAME, mask_words

Schedule = Callable[[Attention, tuple[int | None, ...]], tvm.tirx.PrimFunc]
"""Gives the function of an attention for a batch and lengths: of queries and keys, or queries, past and new keys."""


def fuse_attention(module: tvm.IRModule, schedule: Schedule) -> tvm.IRModule:
    """Replace every attention of ``main``.

    Parameters
    ----------
    module : tvm.IRModule
    schedule : callable
        Gives the scheduled function.

    Returns
    -------
    tvm.IRModule
        Attentions whose heads or head sizes are not known, or that are no float32, stay as they are.
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
        self.functions: dict[Any, tvm.ir.GlobalVar] = {}

    def replacement(self, match: Match) -> Mapping[relax.Var, relax.Expr]:
        call = self._call(match)
        if not match.joined:
            return {match.result: call}
        results = self.builder_.emit(call)
        names = match.result, match.key.value, match.value.value
        return {var: relax.TupleGetItem(results, number) for number, var in enumerate(names)}

    def _call(self, match: Match) -> relax.Expr:
        mask = add_masks(self.builder_, match, self.visit_expr)
        shape = match.shape(mask.axes, mask.hidden)
        keys = match.parts[: len(match.parts) // 2]
        extents = [match.query.extents["b"], match.query.extents["l"], *(part.extents["l"] for part in keys)]
        lengths = tuple(map(known_extent, extents))
        if (shape, lengths) not in self.functions:
            self.functions[shape, lengths] = self.builder_.add_func(self.schedule(shape, lengths), "attention")
        operands = [self.visit_expr(one.value) for one in (match.query, *match.parts)]
        joined = [match.key.value.ty, match.value.value.ty]
        results = [match.result.ty, *joined] if match.joined else match.result.ty
        return relax.call_tir(self.functions[shape, lengths], [*operands, *mask.operands], results)


class Mask(NamedTuple):
    """The mask of an attention.

    Attributes
    ----------
    operands : tuple of relax.Expr
        One tensor of four dimensions; none where there is no mask.
    axes : str
        Which of ``bhms`` are not 1.
    hidden : float or None
        As of `kernels.attention.Attention`: None where the tensor is float32, else it is words of bits.
    """

    operands: tuple[relax.Expr, ...] = ()
    axes: str = ""
    hidden: float | None = None


def add_masks(
    builder: relax.BlockBuilder, match: Match, visit: Callable[[relax.Expr], relax.Expr], *, bits: bool = True
) -> Mask:
    """Emit the sum of all masks of an attention.

    Parameters
    ----------
    builder : relax.BlockBuilder
    match : Match
    visit : callable
        Gives what an expression has become.
    bits : bool
        Whether a mask that hides keys and adds nothing else may be bits; without an axis of keys it is none.
    """
    total: relax.Expr | None = None
    for expr, hidden in match.scores.masks:
        mask = visit(expr)
        if hidden is not None:
            mask = builder.emit(R.where(mask, relax.const(0.0, "float32"), relax.const(hidden, "float32")))
        total = mask if total is None else builder.emit(R.add(total, mask))
    if total is None:
        return Mask()
    dims = dims_of(total)
    assert dims is not None
    rank = len(dims_of(match.softmax) or [])
    dims = [*[as_index(1)] * (rank - len(dims)), *dims]
    dims = dims if rank == 4 else [dims[0], as_index(1), *dims[1:]]
    axes = "".join(axis for axis, dim in zip("bhms", dims, strict=True) if not structural_equal(dim, as_index(1)))
    if bits and match.scores.hidden is not None and "s" in axes:
        return Mask((_words(builder, _seen(builder, match, total, visit), dims),), axes, match.scores.hidden)
    return Mask((builder.emit(R.reshape(total, relax.ShapeExpr(dims))),), axes)


def _seen(
    builder: relax.BlockBuilder, match: Match, total: relax.Expr, visit: Callable[[relax.Expr], relax.Expr]
) -> relax.Expr:
    """Where the sum of all masks adds nothing: one boolean as it is, else what becomes of it in the end."""
    (expr, hidden), *others = match.scores.masks
    if hidden is not None and not others:
        return visit(expr)
    return builder.emit(R.equal(total, relax.const(0.0, "float32")))


def _words(builder: relax.BlockBuilder, seen: relax.Expr, dims: list[Any]) -> relax.Expr:
    """The bits of a boolean mask."""
    seen = builder.emit(R.reshape(seen, relax.ShapeExpr(dims)))
    # It reduces, but fusion is to join it with what comes before, as it would a map.
    return builder.emit_te(mask_words, seen, primfunc_name_hint=NAME, primfunc_attrs={OP_PATTERN: INJECTIVE})
