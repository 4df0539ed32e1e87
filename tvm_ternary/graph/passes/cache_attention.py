"""Keep keys and values of the past inside the compiled module, packed, instead of taking and giving them with each run.

Before::

    k = concat(past_key, new_k); v = concat(past_value, new_v)
    y = attention(q, k, v, mask)
    return logits, k, v

After::

    y = cached_attention(q, new_k, new_v, mask, kept, *arrays)
    return logits

``arrays`` are a cache's (`runtime.kv_cache.CacheShape.arrays`): parameters of ``main`` that the kernel writes to. TVM
takes its call for one without effects, which is safe, since no other call reads the same arrays. How many tokens there
are already was a dimension of the past; now it is one of a parameter that is a shape, and ``kept`` says it to the
kernel for every sequence. Where the heads of an attention keep different things, there is a call for each run of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import tvm
from tvm import relax
from tvm.relax import op as R

from tvm_ternary.errors import OptionError
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.onnx.values import describe, plain
from tvm_ternary.graph.passes.dataflow import dims_of
from tvm_ternary.graph.passes.find_attention import Match, as_index, known_extent
from tvm_ternary.graph.passes.find_pasts import named_attentions
from tvm_ternary.graph.passes.fold_rotations import KEY, QUERY, RESULT, VALUE, Parts, fold_rotations
from tvm_ternary.graph.passes.fuse_attention import add_masks
from tvm_ternary.graph.passes.rotate import Rotations, can_rotate
from tvm_ternary.graph.passes.without_past import WithoutStates, totals_of
from tvm_ternary.kernels.attention import Attention
from tvm_ternary.runtime.inputs import size_of
from tvm_ternary.runtime.kv_cache import BLOCK, CacheShape
from tvm_ternary.runtime.manifest import CacheInfo
from tvm_ternary.schedule.cpu.nest import substitute

Schedule = Callable[[Attention, int, int, tuple[int | None, int | None]], tvm.tirx.PrimFunc]
"""Gives the function of an attention for planes of keys and of values, batch and queries."""


@dataclass(frozen=True)
class CacheChoice:
    """What some heads of an attention keep: `runtime.manifest.CacheInfo` explains the other fields.

    Parameters
    ----------
    heads : int
        How many heads of keys and values, behind those of the choices before.
    """

    heads: int
    mode: str
    key_planes: int
    value_planes: int
    window: int | None
    rotated: bool = False
    reason: str | None = None


Choices = Mapping[str, tuple[CacheChoice, ...]]
"""By the names of `find_caches`, choices for all heads of an attention."""


PAST, KEPT = "past_length", "kept_tokens"


def cache_attention(model: ImportedModel, chosen: Choices, schedule: Schedule) -> ImportedModel:
    """Apply the change to the attentions that are named.

    Parameters
    ----------
    model : ImportedModel
    chosen : mapping of str to tuple of CacheChoice
        For names that `find_caches` gives without a reason.
    schedule : callable
        Gives the scheduled function.

    Returns
    -------
    ImportedModel
        Without the inputs and outputs that were past and present; ``caches`` says what the runtime has to give instead.

    Raises
    ------
    OptionError
        If the attentions do not share one past, or inputs do not say how many tokens a run appends to how many
        sequences.
    """
    matches = _chosen(model, chosen)
    if not matches:
        return model
    pasts = {str(match.states[0].extents["l"]): match.states[0].extents["l"] for match in matches.values()}
    if len(pasts) > 1:
        raise OptionError("attention", f"has pasts of different lengths ({', '.join(pasts)}); expected one for all")
    wanted = {name: _to_turn(match, chosen[name]) for name, match in matches.items()}
    model, folded = fold_rotations(model, matches, wanted)
    matches = _chosen(model, chosen)
    past = next(iter(matches.values())).states[0].extents["l"]
    return _Cached(model, matches, chosen, schedule, folded).run(past)


def _chosen(model: ImportedModel, chosen: Choices) -> dict[str, Match]:
    return {name: match for name, match in named_attentions(model).items() if name in chosen}


def _to_turn(match: Match, choices: Sequence[CacheChoice]) -> Parts:
    """What is turned, of all heads alike."""
    layouts = match.query.layout, match.key.layout, match.value.layout, match.layout
    if not can_rotate(*layouts) or not all(choice.rotated for choice in choices):
        return frozenset()
    return frozenset({QUERY, KEY, *((VALUE, RESULT) if all(choice.value_planes for choice in choices) else ())})


@relax.expr_functor.mutator
class _Cached(WithoutStates):
    """Where keys and values were joined, a cache is appended to and attended to."""

    def __init__(
        self,
        model: ImportedModel,
        matches: Mapping[str, Match],
        chosen: Choices,
        schedule: Schedule,
        folded: Mapping[str, Parts],
    ) -> None:
        super().__init__(model, matches)
        self.chosen, self.schedule, self.folded = chosen, schedule, folded
        self.names = {match.result: name for name, match in matches.items()}
        self.functions: dict[Any, tvm.ir.GlobalVar] = {}
        self.rotations = Rotations(self.builder_)
        self.infos: dict[str, CacheInfo] = {}
        self.arrays: dict[str, list[relax.Var]] = {}
        first = next(iter(matches.values()))
        self.kept = relax.Var(KEPT, relax.TensorType([first.query.extents["b"]], "int32"))

    def run(self, past: Any) -> ImportedModel:
        def more() -> list[relax.Var]:
            length = relax.Var(PAST, relax.ShapeType([past]))
            return [length, self.kept, *(var for one in self.arrays.values() for var in one)]

        model = self.rewritten(more)
        _require_start(model.module, past)
        _require_sizes(model, self.infos.values())
        totals = {total for match in self.matches.values() for total in map(describe, totals_of(match, past))}
        sums: dict[int | str, str] = {
            total: f"{info.past} + {info.length}" for info in self.infos.values() for total in totals
        }
        inputs = (replace(spec, shape=tuple(sums.get(dim, dim) for dim in spec.shape)) for spec in model.inputs)
        return replace(model, inputs=tuple(inputs), caches=tuple(self.infos.values()))

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if binding.var in self.names:
            self.set_var_remap(binding.var, self.builder_.emit(self._call(self.names[binding.var])))
        else:
            super().visit_var_binding_(binding)

    def _call(self, name: str) -> relax.Expr:
        """One call, or one for each run of heads with the same choice."""
        match, choices = self.matches[name], self.chosen[name]
        masks, axes, hidden = add_masks(self.builder_, match, self.visit_expr)
        operands = [self.visit_expr(one.value) for one in (match.query, match.states[1], match.states[3])]
        kept: relax.Expr = self.kept
        if match.starts is not None:
            kept = self.builder_.emit(R.astype(self.visit_expr(match.starts), "int32"))
        shape = replace(match.shape(axes, hidden), joined=False)
        if len(choices) == 1:
            return self._part(name, name, choices[0], shape, [*operands, *masks, kept])
        ends = list(itertools.accumulate(choice.heads for choice in choices))
        assert ends[-1] == shape.kv_heads
        layouts = [shape.query, shape.key, shape.value, *["bhms" if "h" in axes else ""] * len(masks)]
        parts = []
        for choice, end in zip(choices, ends, strict=True):
            first, group = end - choice.heads, shape.group
            # Queries and masks have a head for each of the queries'.
            factors = [group, 1, 1, group]
            own = [
                self._heads(x, layout, factor * first, factor * end)
                for x, layout, factor in zip([*operands, *masks], layouts, factors, strict=False)
            ]
            sub = replace(shape, heads=group * choice.heads, kv_heads=choice.heads)
            last = f"-{end - 1}" if end - 1 > first else ""
            parts.append(self.builder_.emit(self._part(name, f"{name}#{first}{last}", choice, sub, [*own, kept])))
        return R.concat(parts, match.layout.index("h"))

    def _heads(self, x: relax.Expr, layout: str, first: int, end: int) -> relax.Expr:
        if not layout:
            return x
        axis = [layout.index("h")]
        return self.builder_.emit(R.strided_slice(x, axis, [first], [end], [1], assume_inbound=True))

    def _part(
        self, name: str, label: str, choice: CacheChoice, shape: Attention, arguments: list[relax.Expr]
    ) -> relax.Expr:
        """The call for heads that keep the same."""
        match = self.matches[name]
        batch, length = match.query.extents["b"], match.query.extents["l"]
        key = shape, choice.key_planes, choice.value_planes, (known_extent(batch), known_extent(length))
        if key not in self.functions:
            self.functions[key] = self.builder_.add_func(self.schedule(*key), "cached_attention")
        info = self.infos[label] = self._info(label, match, choice, shape)
        turned = self._turned(name, info, shape)
        turn = self.rotations.rotate_heads
        for n, part in enumerate((QUERY, KEY, VALUE)):
            arguments[n] = turn(arguments[n], turned[part]) if part in turned else arguments[n]
        cache = CacheShape(
            1, shape.kv_heads, shape.size, shape.value_size, BLOCK, choice.key_planes, choice.value_planes
        )
        self.arrays[label] = _parameters(len(self.arrays), cache, batch)
        given = {"b": batch, "h": shape.heads, "l": length, "d": shape.value_size}
        result = relax.TensorType([as_index(given[axis]) for axis in match.layout], "float32")
        call = relax.call_tir(self.functions[key], [*arguments, *self.arrays[label]], result)
        # The matrix is its own inverse.
        return turn(self.builder_.emit(call), match.layout) if RESULT in turned else call

    def _info(self, label: str, match: Match, choice: CacheChoice, shape: Attention) -> CacheInfo:
        """What the runtime and its users are told of these heads."""
        past_key, _, past_value, _ = (part.value for part in match.states)
        length = match.query.extents["l"]
        own = {field: value for field, value in asdict(choice).items() if field != "heads"}
        rotated = choice.rotated and can_rotate(shape.query, shape.key, shape.value, match.layout)
        return CacheInfo(
            name=label,
            value=self.specs[past_value].name,
            batch=self.specs[past_key].shape[match.key.layout.index("b")],
            past=str(self.specs[past_key].shape[match.key.layout.index("l")]),
            length=plain(length) if isinstance(plain(length), int) else describe(length),
            kv_heads=shape.kv_heads,
            size=shape.size,
            value_size=shape.value_size,
            **own | {"rotated": rotated},
        )

    def _turned(self, name: str, info: CacheInfo, shape: Attention) -> dict[str, str]:
        """The parts that kernels turn, and their layouts."""
        if not info.rotated:
            return {}
        layouts = {QUERY: shape.query, KEY: shape.key}
        if info.value_planes:
            layouts |= {VALUE: shape.value, RESULT: self.matches[name].layout}
        return {part: layout for part, layout in layouts.items() if part not in self.folded[name]}


def _parameters(number: int, shape: CacheShape, batch: Any) -> list[relax.Var]:
    """A cache's arrays, for any batch, capacity and window."""
    blocks, room = (tvm.tirx.Var(f"cache{number}_{name}", "int64") for name in ("blocks", "room"))
    open_, parameters = [blocks] * (len(shape.arrays) - 4) + [room] * 2, []
    for n, (extents, dtype) in enumerate(shape.arrays):
        dims = [batch, *extents[1:2], *open_[n : n + 1], *extents[3:]]
        parameters.append(relax.Var(f"cache{number}_{n}", relax.TensorType(dims, dtype)))
    return parameters


def _require_sizes(model: ImportedModel, infos: Iterable[CacheInfo]) -> None:
    """Refuse what the runtime could not give a cache to."""
    ones = [[1] * len(spec.shape) for spec in model.inputs]
    for info in infos:
        for what, dim in (("sequences", info.batch), ("tokens", info.length)):
            if size_of(dim, model.inputs, ones) is None:
                problem = f"cannot be kept inside: no input says how many {what} are new ({dim})"
                raise OptionError(f"attention {info.name}", problem, "compile with --attention full")


def _require_start(module: tvm.IRModule, past: Any) -> None:
    """Refuse a module that has tensors without elements while there are no tokens yet."""
    nothing = {past: tvm.tirx.IntImm("int64", 0)}
    # An error in a visitor would come out as one of TVM's.
    empty: list[str] = []

    def visit(expr: relax.Expr) -> None:
        for dim in (dims_of(expr) if isinstance(expr, relax.Var) else None) or []:
            if known_extent(tvm.sym.Analyzer().simplify(substitute(dim, nothing))) == 0:
                empty.append(expr.name)

    relax.analysis.post_order_visit(module["main"], visit)
    if empty:
        problem = f"cannot start without tokens: {empty[0]} would have no elements"
        raise OptionError("attention with a cache inside", problem, "compile with --attention full")
