"""Make two inputs of a past that is one tensor for keys and values, and two outputs of such a present.

Before::

    k = concat(squeeze(past[0:1]), new_k); v = concat(squeeze(past[1:2]), new_v)
    return attention(q, k, v), stack(k, v)

After::

    k = concat(past_key, new_k); v = concat(past_value, new_v)
    return attention(q, k, v), k, v

as `cache_attention` wants them, which takes them away. com.microsoft Attention has such a past, and so have older
exports of GPT-2.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tvm import relax

from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.passes.dataflow import dims_of, with_main
from tvm_ternary.graph.passes.moves import Moves
from tvm_ternary.runtime.manifest import TensorSpec


def unstack_pasts(model: ImportedModel, names: Container[str] | None = None) -> ImportedModel:
    """Apply the change.

    Parameters
    ----------
    model : ImportedModel
    names : container of str, optional
        Of inputs that are such pasts; by default all. One that is not joined, or not given back alike, stays.
    """
    found = {past: one for past, one in _Finder(model).find().items() if names is None or past.name in names}
    return _Rewriter(model, found).run() if found else model


_IN_ORDER = ("reshape", "squeeze", "expand_dims", "strided_slice", "split")
"""What takes a half out of a past and moves none of its elements."""


@dataclass(frozen=True)
class _Stacked:
    """Where the two halves of a past are, and what their joined ones are stacked to."""

    halves: tuple[relax.Var, relax.Var]
    joined: tuple[relax.Var, relax.Var]
    present: relax.Var


class _Finder(Moves):
    def __init__(self, model: ImportedModel) -> None:
        self.main = model.module["main"]
        super().__init__(self.main)
        self.inputs = self.main.params[: len(model.inputs)]

    def find(self) -> dict[relax.Var, _Stacked]:
        """The pasts, by the inputs that they are."""
        found = {var: self._stacked(var) for var in self.inputs}
        return {var: stacked for var, stacked in found.items() if stacked is not None}

    def _stacked(self, past: relax.Var) -> _Stacked | None:
        dims = self.extents(past)
        if dims is None or len(dims) < 2 or dims[0] != 2:
            return None
        halves: dict[int, relax.Var] = {}
        number = np.arange(2).reshape(2, *[1] * (len(dims) - 1))
        if not self._follow(past, np.broadcast_to(number, dims), halves) or len(halves) < 2:
            return None
        if any(self.extents(half) != dims[1:] for half in halves.values()):
            return None
        joined = {n: self._joined(half) for n, half in halves.items()}
        presents = {self._present(one) for one in joined.values()}
        if None in joined.values() or len(presents) > 1:
            return None
        (present,) = presents
        if present is None or self._stacked_of(present) != [joined[0], joined[1]]:
            return None
        return _Stacked((halves[0], halves[1]), (joined[0], joined[1]), present)

    def _follow(self, var: relax.Var, numbers: np.ndarray, halves: dict[int, relax.Var]) -> bool:
        """Whether all that reads a past are its halves, each one tensor, whole and as it is."""
        if numbers.ndim > 1 and not any(numbers.strides) and var not in self.inputs:
            n = int(numbers.flat[0])
            alone = n not in halves
            halves[n] = var
            return alone
        for reader in self.readers[var]:
            if self.call_of(reader, *_IN_ORDER) is None:
                return False
            moved = dict(self.moved(var, reader, numbers))
            if not moved or not all(self._follow(to, places, halves) for to, places in moved.items()):
                return False
        return True

    def _joined(self, half: relax.Var) -> relax.Var | None:
        """The past and new keys, or values, of one."""
        reader = self.only_reader(half)
        call = None if reader is None else self.call_of(reader, "concat")
        return reader if call is not None and call.args[0].fields[0] == half else None

    def _present(self, joined: relax.Var | None) -> relax.Var | None:
        """The output that is stacked of joined ones."""
        for reader in self.readers[joined] if joined is not None else ():
            call = self.call_of(reader, "expand_dims", "reshape")
            for stack in self.readers[reader] if call is not None else (reader,):
                if self.readers[stack] == {self.main.body.body} and joined in self._stacked_of(stack):
                    return stack
        return None

    def _stacked_of(self, var: relax.Var) -> list[relax.Expr]:
        """What a tensor is stacked of along its first axis; nothing where it is made otherwise."""
        call = self.call_of(var, "stack", "concat")
        if call is None or int(call.attrs.axis) != 0:
            return []
        parts = list(call.args[0].fields)
        if call.op.name == "relax.stack":
            return parts
        lone = [self.call_of(part, "expand_dims", "reshape") for part in parts]
        if any(one is None for one in lone):
            return []
        inner = [one.args[0] for one in lone if one is not None]
        extents = [(self.extents(one), self.extents(part)) for one, part in zip(inner, parts, strict=True)]
        return inner if all(a is not None and b == [1, *a] for a, b in extents) else []


@relax.expr_functor.mutator
class _Rewriter(relax.PyExprMutator):
    def __init__(self, model: ImportedModel, found: Mapping[relax.Var, _Stacked]) -> None:
        super().__init__(model.module)
        self.model, self.main, self.found = model, model.module["main"], found
        self.halves: dict[relax.Var, relax.Var] = {}
        self.given = {past: self._inputs_of(past, stacked) for past, stacked in found.items()}
        self.presents = {stacked.present: stacked for stacked in found.values()}

    def _inputs_of(self, past: relax.Var, stacked: _Stacked) -> list[relax.Var]:
        kind = relax.TensorType((dims_of(past) or [])[1:], past.ty.dtype)
        given = [relax.Var(f"{past.name}.{name}", kind) for name in ("key", "value")]
        self.halves.update(zip(stacked.halves, given, strict=True))
        return given

    def run(self) -> ImportedModel:
        body, count = self.visit_expr(self.main.body), len(self.model.inputs)
        inputs = [var for past in self.main.params[:count] for var in self.given.get(past, [past])]
        params = [*inputs, *self.main.params[count:]]
        function = relax.Function(params, body, None, self.main.is_pure)
        function = function.with_attr("global_symbol", "main").with_attr("num_input", len(inputs))
        returned = next(
            b.value for block in self.main.body.blocks for b in block.bindings if b.var == self.main.body.body
        )
        return replace(
            self.model,
            module=relax.transform.DeadCodeElimination()(with_main(self.builder_, function)),
            inputs=_apart(self.model.inputs, self.main.params, self.found),
            outputs=_apart(self.model.outputs, returned.fields, self.presents),
        )

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if binding.var in self.halves:
            self.set_var_remap(binding.var, self.halves[binding.var])
        elif binding.var == self.main.body.body:
            fields = [
                self.visit_expr(one)
                for field in binding.value.fields
                for one in (self.presents[field].joined if field in self.presents else (field,))
            ]
            self.set_var_remap(binding.var, self.builder_.emit_output(relax.Tuple(fields)))
        else:
            super().visit_var_binding_(binding)


def _apart(
    specs: Sequence[TensorSpec], values: Sequence[relax.Expr], stacked: Container[relax.Expr]
) -> tuple[TensorSpec, ...]:
    """Two of each that is stacked; they keep its name, which is what users know."""
    return tuple(
        one
        for spec, value in zip(specs, values, strict=False)
        for one in ([replace(spec, shape=spec.shape[1:])] * 2 if value in stacked else [spec])
    )
