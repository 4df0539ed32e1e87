"""Find attention, however it is spelled: which values are its queries, keys, values and masks, and how they lie.

The scale may be a product or a quotient, of the scores; masks may be several, added or chosen
(``where(seen, scores, -inf)``); keys and values may be repeated for groups of heads, or the queries of a group be rows
of one product; and they may be joined, of those of the past and new ones behind them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm_ffi import structural_equal

from tvm_ternary.graph.onnx.values import PLACED
from tvm_ternary.graph.passes.dataflow import Dataflow, dims_of
from tvm_ternary.graph.passes.mask_values import KnownValues, only_hides
from tvm_ternary.kernels.attention import AXES, Attention

# A score that is replaced by something from here down is as good as gone, like one to which it is added.
_HIDDEN = -1e30


@dataclass(frozen=True)
class Operand:
    """A tensor, and which of its dimensions is what, a letter of `AXES` each; the two parts it is joined of, if any.

    ``starts`` says for each sequence how many of the past ones the new ones stand behind, where that is not all.
    """

    value: relax.Expr
    layout: str
    joined: tuple[relax.Expr, ...] = ()
    starts: relax.Expr | None = None

    @property
    def extents(self) -> dict[str, Any]:
        return dict(zip(self.layout, dims_of(self.value) or [], strict=True))


@dataclass(frozen=True)
class Scores:
    """softmax's argument: scale * q k^T + masks.

    A mask is added as it is, or it is a boolean and a number is added where that is false. ``hidden`` is that number
    where the sum of all of them is nothing else.
    """

    product: relax.Var
    scale: float = 1.0
    masks: tuple[tuple[relax.Expr, float | None], ...] = ()
    grouped: bool = False
    hidden: float | None = None


@dataclass(frozen=True)
class Match:
    """An attention of a graph.

    Attributes
    ----------
    query, key, value : Operand
    scores : Scores
    softmax : relax.Var
    result : relax.Var
        What the attention gives.
    layout : str
        The result's.
    joined : bool
        Whether keys and values are joined of as many past and new ones.
    starts : relax.Expr or None
        Where new ones stand behind some of the past ones, how many of each sequence.
    """

    query: Operand
    key: Operand
    value: Operand
    scores: Scores
    softmax: relax.Var
    result: relax.Var
    layout: str
    joined: bool = False
    starts: relax.Expr | None = None

    @property
    def parts(self) -> list[Operand]:
        """Keys and values; joined, the two parts of each."""
        return self.states if self.joined else [self.key, self.value]

    @property
    def states(self) -> list[Operand]:
        """Past and new keys, past and new values; none where there is no past."""
        return [Operand(part, one.layout) for one in (self.key, self.value) for part in one.joined]

    def shape(self, mask: str, hidden: float | None = None) -> Attention:
        """The family that it is of, with the axes of its mask, and what bits of that hide by."""
        q, k, v = self.query, self.key, self.value
        return Attention(
            heads=int(q.extents.get("h", 1)),
            kv_heads=int(k.extents.get("h", 1)),
            size=int(q.extents["d"]),
            value_size=int(v.extents["d"]),
            scale=self.scores.scale,
            query=q.layout,
            key=k.layout,
            value=v.layout,
            out=self.layout,
            mask=mask,
            joined=self.joined,
            hidden=hidden,
        )


def find_attentions(module: tvm.IRModule) -> dict[relax.Var, Match]:
    """The attentions of ``main``, by the variables that hold their results.

    Those whose heads or head sizes are not known, or that are no float32, are not among them.
    """
    return _Finder(module).find()


class _Finder(Dataflow):
    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__(module["main"])
        self.module, self.returned = module, module["main"].body.body
        self.values = KnownValues(self)

    def find(self) -> dict[relax.Var, Match]:
        """The attentions, by the variables that hold their results."""
        matches = {}
        for var, call in self.calls.items():
            if call.op.name == "relax.nn.softmax" and (match := self._match(var, call)) is not None:
                matches[match.result] = match
        return matches

    def _match(self, softmax: relax.Var, call: relax.Call) -> Match | None:
        dims = dims_of(softmax)
        if dims is None or len(dims) not in (3, 4) or str(softmax.ty.dtype) != "float32":
            return None
        if int(call.attrs.axis) not in (-1, len(dims) - 1):
            return None
        scores = self._scores(call.args[0], Scores(softmax))
        if scores is None or not all(_fits(mask, dims) for mask, _ in scores.masks):
            return None
        weights, mixed = softmax, self.only_reader(softmax)
        if scores.grouped and mixed is not None and self.call_of(mixed, "reshape") is not None:
            weights, mixed = mixed, self.only_reader(mixed)
        product = None if mixed is None else self.call_of(mixed, "matmul")
        if mixed is None or product is None or product.args[0] != weights or product.args[1] == weights:
            return None
        letters = AXES if len(dims) == 4 else AXES.replace("h", "")
        q, k = self.calls[scores.product].args
        query = self._query(q, letters, grouped=scores.grouped)
        key = self._with_parts(self._operand(k, letters[:-2] + "dl"))
        value = self._with_parts(self._operand(product.args[1], letters))
        result, layout = self._result(mixed, letters, grouped=scores.grouped)
        if query is None or result is None:
            return None
        if not _same_parts(key, value):
            key, value = (replace(one, joined=(), starts=None) for one in (key, value))
        joined = bool(key.joined) and key.starts is None
        scores = replace(scores, hidden=self._hidden(scores.masks))
        match = Match(query, key, value, scores, softmax, result, layout, joined, key.starts)
        return match if _is_attention(match, dims) else None

    def _scores(self, expr: relax.Expr, scores: Scores) -> Scores | None:
        """Follow the argument of softmax back to the product."""
        if not isinstance(expr, relax.Var) or self.only_reader(expr) is None:
            return None
        if self.call_of(expr, "matmul") is not None:
            return replace(scores, product=expr)
        if (call := self.call_of(expr, "reshape")) is not None:
            return None if scores.grouped else self._scores(call.args[0], replace(scores, grouped=True))
        if (call := self.call_of(expr, "multiply", "divide")) is not None:
            return self._scaled(call, scores)
        if (call := self.call_of(expr, "add")) is not None and scores.scale == 1.0 and not scores.grouped:
            left, right = call.args
            for inner, mask in ((left, right), (right, left)):
                found = self._scores(inner, replace(scores, masks=(*scores.masks, self._mask(mask))))
                if found is not None:
                    return found
        if (call := self.call_of(expr, "where")) is not None and scores.scale == 1.0 and not scores.grouped:
            seen, chosen, otherwise = call.args
            hidden = _scalar(otherwise)
            if hidden is not None and hidden <= _HIDDEN:
                return self._scores(chosen, replace(scores, masks=(*scores.masks, (seen, hidden))))
        return None

    def _mask(self, expr: relax.Expr) -> tuple[relax.Expr, float | None]:
        """What is added, where it is chosen so, as a boolean."""
        call = self.call_of(expr, "where")
        if call is not None and _scalar(call.args[1]) == 0 and (hidden := _scalar(call.args[2])) is not None:
            return call.args[0], hidden
        return expr, None

    def _hidden(self, masks: tuple[tuple[relax.Expr, float | None], ...]) -> float | None:
        """The number that the sum of all masks adds where it adds something, if there is one."""
        total: frozenset[np.float32] | None = None
        for expr, hidden in masks:
            known = self.values.of(expr) if hidden is None else frozenset((0.0, hidden))
            if known is None:
                return None
            with np.errstate(over="ignore", invalid="ignore"):
                ours = frozenset(map(np.float32, known))
                total = ours if total is None else frozenset(a + b for a in total for b in ours)
        return only_hides(None if total is None else frozenset(map(float, total)))

    def _scaled(self, call: relax.Call, scores: Scores) -> Scores | None:
        left, right = call.args
        dividing = call.op.name == "relax.divide"
        factor, inner = _scalar(right), left
        if factor is None and not dividing:
            factor, inner = _scalar(left), right
        if factor is None or factor == 0:
            return None
        return self._scores(inner, replace(scores, scale=scores.scale / factor if dividing else scores.scale * factor))

    def _query(self, expr: relax.Expr, letters: str, *, grouped: bool) -> Operand | None:
        if grouped:
            # (B, KV, G * L, D) made of (B, H, L, D).
            call = self.call_of(expr, "reshape")
            if call is None or len(dims_of(call.args[0]) or []) != len(letters):
                return None
            expr = call.args[0]
        return self._operand(expr, letters)

    def _operand(self, expr: relax.Expr, letters: str) -> Operand:
        """Where the elements come from, without transpositions and repeated heads."""
        call = self.call_of(expr, "permute_dims")
        if call is not None:
            axes = [int(axis) for axis in call.attrs.axes] if call.attrs.axes else list(range(len(letters)))[::-1]
            before = [""] * len(letters)
            for letter, axis in zip(letters, axes, strict=True):
                before[axis] = letter
            return self._operand(call.args[0], "".join(before))
        inner = self._unrepeated(expr, letters.find("h"))
        return Operand(expr, letters) if inner is None else self._operand(inner, letters)

    def _with_parts(self, operand: Operand) -> Operand:
        """With what is joined along the positions, for this attention and the caller alone."""
        if len(self.readers[operand.value] - {self.returned}) != 1:
            return operand
        call = self.call_of(operand.value, "concat", "call_tir")
        if call is None:
            return operand
        if call.op.name == "relax.call_tir":
            past, new, *starts = call.args[1].fields
            placed = (self.module[call.args[0]].attrs or {}).get(PLACED, False)
            return replace(operand, joined=(past, new), starts=starts[0]) if placed else operand
        if len(call.args[0].fields) != 2 or int(call.attrs.axis) != operand.layout.index("l"):
            return operand
        return replace(operand, joined=tuple(call.args[0].fields))

    def _unrepeated(self, expr: relax.Expr, axis: int) -> relax.Expr | None:
        """Keys or values before each of their heads was repeated for a group of queries' heads."""
        if (call := self.call_of(expr, "repeat")) is not None and int(call.attrs.axis) == axis:
            return call.args[0]
        if axis < 0 or (joined := self.call_of(expr, "reshape")) is None:
            return None
        spread = self.call_of(joined.args[0], "broadcast_to")
        lone = None if spread is None else self.call_of(spread.args[0], "reshape", "expand_dims")
        if spread is None or lone is None:
            return None
        before, one, many, after = map(dims_of, (lone.args[0], spread.args[0], joined.args[0], expr))
        if before is None or one is None or many is None or after is None or len(many) != len(before) + 1:
            return None
        rows = [*before[: axis + 1], 1, *before[axis + 1 :]]
        groups = [*before[: axis + 1], many[axis + 1], *before[axis + 1 :]]
        if not _same(one, rows) or not _same(many, groups) or len(after) != len(before):
            return None
        kept = [n for n in range(len(before)) if n != axis]
        return lone.args[0] if _same([after[n] for n in kept], [before[n] for n in kept]) else None

    def _result(self, mixed: relax.Var, letters: str, *, grouped: bool) -> tuple[relax.Var | None, str]:
        """The variable that holds the result, and its layout."""
        reader = self.only_reader(mixed)
        if grouped:
            if reader is None or self.call_of(reader, "reshape") is None:
                return None, letters
            mixed, reader = reader, self.only_reader(reader)
        call = None if reader is None else self.call_of(reader, "permute_dims")
        if call is None or not call.attrs.axes:
            return mixed, letters
        return reader, "".join(letters[int(axis)] for axis in call.attrs.axes)


def _is_attention(match: Match, dims: list[Any]) -> bool:
    """Whether the extents of all operands agree, and those that have to be known are."""
    if any(dims_of(one.value) is None for one in (match.query, match.key, match.value)):
        return False
    q, k, v = (one.extents for one in (match.query, match.key, match.value))
    out = dims_of(match.result)
    known = [one.get(axis, tvm.tirx.IntImm("int64", 1)) for one in (q, k, v) for axis in "hd"]
    if out is None or not all(isinstance(extent, tvm.tirx.IntImm) for extent in known):
        return False
    if any(str(one.value.ty.dtype) != "float32" for one in (match.query, match.key, match.value)):
        return False
    heads, kv_heads = int(q.get("h", 1)), int(k.get("h", 1))
    same = [(q["b"], k["b"]), (q["b"], v["b"]), (k["l"], v["l"]), (q["d"], k["d"]), (q["l"], dims[-2])]
    same += [(k["l"], dims[-1]), (q["b"], dims[0])]
    if not _same([a for a, _ in same], [b for _, b in same]) or kv_heads != int(v.get("h", 1)):
        return False
    expected = {"b": q["b"], "h": heads, "l": q["l"], "d": v["d"]}
    return heads % kv_heads == 0 and _same(out, [expected[axis] for axis in match.layout])


def _same_parts(key: Operand, value: Operand) -> bool:
    """Whether keys and values are joined of as many past and new ones."""
    if not key.joined or not value.joined or key.value == value.value or key.starts != value.starts:
        return False
    parts = [*zip(key.joined, value.joined, strict=True)]
    lengths = [[dims_of(part) for part in pair] for pair in parts]
    if any(dims is None for pair in lengths for dims in pair):
        return False
    k, v = ([pair[n][one.layout.index("l")] for pair in lengths] for n, one in enumerate((key, value)))  # type: ignore[index]
    return _same(k, v)


def _same(left: list[Any], right: list[Any]) -> bool:
    analyzer = tvm.sym.Analyzer()
    return len(left) == len(right) and all(
        analyzer.can_prove_equal(a, b) for a, b in zip(map(as_index, left), map(as_index, right), strict=True)
    )


def as_index(value: Any) -> Any:
    """A dimension as an expression."""
    return tvm.tirx.IntImm("int64", value) if isinstance(value, int) else value


def known_extent(extent: Any) -> int | None:
    """The number that a dimension is, None where it is open."""
    return int(extent) if isinstance(extent, int | tvm.tirx.IntImm) else None


def _scalar(expr: relax.Expr) -> float | None:
    """The value of a constant of one element."""
    if not isinstance(expr, tvm.ir.GenericConst) or expr.value.numpy().size != 1:
        return None
    return float(expr.value.numpy().reshape(()))


def _fits(mask: relax.Expr, dims: list[Any]) -> bool:
    """Whether a mask has the scores' dimensions, or 1 in their place."""
    shape = dims_of(mask)
    if shape is None or len(shape) > len(dims):
        return False
    pairs = zip(shape, dims[len(dims) - len(shape) :], strict=True)
    return all(structural_equal(as_index(a), as_index(1)) or _same([a], [b]) for a, b in pairs)
