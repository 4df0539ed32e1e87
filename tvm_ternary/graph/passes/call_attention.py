"""Make every attention a call of a function outside of the model, which sees its operands and gives its result.

Before, however it is spelled (`find_attention`)::

    y = permute_dims(matmul(softmax(add(matmul(q, k), mask)), v))

After::

    y = call_dps_packed(name, (number, q, k, v, mask))

So what rounded keys and values do to a model is measured without a kernel that rounds, and without compiling anything
again for the next kind of rounding. The function is called with tensors in the layouts that the attention's
`AttentionCall` says, and writes to its last argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import tvm
from tvm import relax

from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.passes.find_attention import Match, find_attentions
from tvm_ternary.graph.passes.fuse_attention import add_masks
from tvm_ternary.graph.passes.replace_attentions import ReplaceAttentions
from tvm_ternary.kernels.attention import Attention


@dataclass(frozen=True)
class AttentionCall:
    """What is called for an attention.

    Attributes
    ----------
    name : str
        That of the input with its past keys; ``attention.N``, counted from 0 in the order of computing, where there is
        none.
    shape : Attention
        Without a joined past: the call gets keys and values of the past and new ones as one.
    """

    name: str
    shape: Attention


def call_attention(model: ImportedModel, function: str) -> tuple[ImportedModel, tuple[AttentionCall, ...]]:
    """Replace the attentions of a model.

    Parameters
    ----------
    model : ImportedModel
    function : str
        The global function to call: ``f(number, q, k, v[, mask], out)``, ``number`` a tensor of one float32.

    Returns
    -------
    model : ImportedModel
    calls : tuple of AttentionCall
        By number. Empty where nothing was found.
    """
    main = model.module["main"]
    inputs = {var: spec.name for var, spec in zip(main.params, model.inputs, strict=False)}
    found = find_attentions(model.module)
    if not found:
        return model, ()
    names = [_name(match, number, inputs) for number, match in enumerate(found.values())]
    alone = {var: replace(match, joined=False) for var, match in found.items()}
    rewriter = _Rewriter(model.module, alone, function)
    module = rewriter.run()
    calls = tuple(AttentionCall(name, rewriter.shapes[var]) for name, var in zip(names, found, strict=True))
    return replace(model, module=module), calls


def _name(match: Match, number: int, inputs: dict[relax.Var, str]) -> str:
    past = match.parts[0].value if match.joined else None
    return inputs.get(past, f"attention.{number}")


@relax.expr_functor.mutator
class _Rewriter(ReplaceAttentions):
    def __init__(self, module: tvm.IRModule, found: Mapping[relax.Var, Match], function: str) -> None:
        super().__init__(module, found)
        self.function = function
        self.numbers = {var: number for number, var in enumerate(found)}
        self.shapes: dict[relax.Var, Attention] = {}

    def replacement(self, match: Match) -> Mapping[relax.Var, relax.Expr]:
        mask = add_masks(self.builder_, match, self.visit_expr, bits=False)
        self.shapes[match.result] = match.shape(mask.axes)
        # A vector, since those of float32 are no part of a segment's code (`cut`): equal layers stay equal.
        number = relax.const(np.array([self.numbers[match.result]], np.float32))
        operands = [self.visit_expr(one.value) for one in (match.query, match.key, match.value)]
        call = relax.call_dps_packed(self.function, [number, *operands, *mask.operands], match.result.ty)
        return {match.result: call}
