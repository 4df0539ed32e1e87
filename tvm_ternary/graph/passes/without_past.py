"""Take past keys and values from a model's inputs, and present ones from its outputs.

Before::

    k = concat(past_key, new_k); v = concat(past_value, new_v)
    return attention(q, k, v), k, v

After, for a whole text at once::

    return attention(q, new_k, new_v)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import tvm
import tvm_ffi
from tvm import relax
from tvm.tirx.analysis import undefined_vars

from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.onnx.values import describe, plain
from tvm_ternary.graph.passes.dataflow import with_main
from tvm_ternary.graph.passes.find_attention import Match, find_attentions, known_extent
from tvm_ternary.graph.passes.find_pasts import find_caches, named_attentions
from tvm_ternary.runtime.linear import Linear, read_linear

_LONGEST = tvm.tirx.IntImm("int64", 2**31)
"""No dimension is longer."""


def without_past(model: ImportedModel) -> ImportedModel:
    """The same model for a whole text at once: nothing is past, and no keys and values go in or out.

    Parameters
    ----------
    model : ImportedModel
        Attentions that `find_caches` gives a reason for stay as they are.
    """
    reasons = find_caches(model)
    values: dict[tvm.tirx.Var, Any] = {}
    for match in (match for name, match in named_attentions(model).items() if reasons[name] is None):
        past, new = match.states[0].extents["l"], match.query.extents["l"]
        values |= {past: tvm.tirx.IntImm("int64", 0)} | dict.fromkeys(totals_of(match, past), new)
    # Bound while there are inputs that it is a dimension of.
    bound = relax.transform.BindSymbolicVars(values, "main")(model.module).clone()
    bound["main"] = tvm_ffi.structural_map(bound["main"], (tvm.tirx.Max, _larger))
    matches = zip(reasons.items(), find_attentions(bound).values(), strict=True)
    found = {name: match for (name, reason), match in matches if reason is None}
    known = {describe(dim): n if isinstance(n := plain(value), int) else describe(n) for dim, value in values.items()}
    return _Whole(replace(model, module=bound), found).run(known)


def _larger(extreme: tvm.tirx.Max) -> Any:
    """What is a sum of dimensions, and so no smaller than nothing, in place of the larger of both."""
    analyzer = tvm.sym.Analyzer()
    for var in undefined_vars(extreme.a):
        analyzer.bind(var, tvm.ir.Range(0, _LONGEST))
    return extreme.a if known_extent(extreme.b) == 0 and analyzer.can_prove(extreme.a >= 0) else extreme


class WithoutStates(relax.PyExprMutator):
    """Takes inputs that are past, and outputs that are present, from a model."""

    def __init__(self, model: ImportedModel, matches: Mapping[str, Match]) -> None:
        super().__init__(model.module)
        self.model, self.main, self.matches = model, model.module["main"], matches
        self.count = int(self.main.attrs["num_input"])
        pasts = {match.states[n].value for match in matches.values() for n in (0, 2)}
        self.specs = dict(zip(self.main.params, model.inputs, strict=False))
        self.inputs = {var: spec for var, spec in self.specs.items() if var not in pasts}
        self.gone = {one.value for match in matches.values() for one in (match.key, match.value)}

    def rewritten(self, more: Callable[[], list[relax.Var]]) -> ImportedModel:
        """The model with other inputs, those of ``more`` behind the ones that stay."""
        body = self.visit_expr(self.main.body)
        given = [*self.inputs, *more()]
        function = relax.Function([*given, *self.main.params[self.count :]], body, None, self.main.is_pure)
        function = function.with_attr("global_symbol", "main").with_attr("num_input", len(given))
        blocks = self.main.body.blocks
        returned = next(b.value for block in blocks for b in block.bindings if b.var == self.main.body.body)
        outputs = zip(self.model.outputs, returned.fields, strict=True)
        return replace(
            self.model,
            module=relax.transform.DeadCodeElimination()(with_main(self.builder_, function)),
            inputs=tuple(self.inputs.values()),
            outputs=tuple(spec for spec, field in outputs if field not in self.gone),
        )

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if binding.var == self.main.body.body:
            fields = [self.visit_expr(field) for field in binding.value.fields if field not in self.gone]
            self.set_var_remap(binding.var, self.builder_.emit_output(relax.Tuple(fields)))
        else:
            super().visit_var_binding_(binding)


@relax.expr_functor.mutator
class _Whole(WithoutStates):
    """Where keys and values were joined, new ones are all there are."""

    def run(self, known: Mapping[str, int | str]) -> ImportedModel:
        """Without states, and with these values of dimensions where users read them."""
        model = self.rewritten(list)
        inputs, outputs = (
            tuple(replace(spec, shape=tuple(_known(dim, known) for dim in spec.shape)) for spec in specs)
            for specs in (model.inputs, model.outputs)
        )
        return replace(model, inputs=inputs, outputs=outputs)

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        new = {one.value: one.joined[1] for match in self.matches.values() for one in (match.key, match.value)}
        if binding.var in new:
            self.set_var_remap(binding.var, self.visit_expr(new[binding.var]))
        else:
            super().visit_var_binding_(binding)


def totals_of(match: Match, past: Any) -> list[Any]:
    """The dimension that has to be the past and the new tokens, where a model does not say that it is."""
    if match.starts is None:
        return []
    return [dim for dim in undefined_vars(match.key.extents["l"]) if not dim.same_as(past)]


def _known(dim: int | str, known: Mapping[str, int | str]) -> int | str:
    """A dimension with values of others in their places."""
    if isinstance(dim, int) or dim in known:
        return known.get(str(dim), dim)
    formula = read_linear(dim)
    if formula is None:
        return dim
    rest = formula.put({name: n if isinstance(n, int) else Linear({n: 1}) for name, n in known.items()})
    return rest if isinstance(rest, int) else rest.name or str(rest)
