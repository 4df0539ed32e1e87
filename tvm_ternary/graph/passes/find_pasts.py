"""Which attentions of a model have a past that may be kept inside, by the names that users know them by."""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm import relax

from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.passes.dataflow import Dataflow
from tvm_ternary.graph.passes.find_attention import Match, find_attentions

NO_PAST = "has no past keys and values as inputs"


def find_caches(model: ImportedModel) -> dict[str, str | None]:
    """The attentions whose keys and values may be kept inside.

    Parameters
    ----------
    model : ImportedModel

    Returns
    -------
    dict of str to (str or None)
        For every attention its name, that of the input with its past keys (``attention.3`` where it has none), and why
        it may not; None where it may. In the order in which they are computed.
    """
    return {name: reason for name, (_, reason) in _named(model).items()}


def named_attentions(model: ImportedModel) -> dict[str, Match]:
    """All attentions by the names of `find_caches`."""
    return {name: match for name, (match, _) in _named(model).items()}


def _named(model: ImportedModel) -> dict[str, tuple[Match, str | None]]:
    main = model.module["main"]
    flow = Dataflow(main)
    inputs = {var: spec.name for var, spec in zip(main.params, model.inputs, strict=False)}
    found: dict[str, tuple[Match, str | None]] = {}
    for number, match in enumerate(find_attentions(model.module).values()):
        reason = _reason(match, flow, inputs)
        past = match.states[0].value if match.states else None
        found[inputs.get(past, f"attention.{number}")] = (match, reason)
    return found


def _reason(match: Match, flow: Dataflow, inputs: Mapping[relax.Var, str]) -> str | None:
    """Why keys and values of an attention cannot be kept inside."""
    if not match.states:
        return _no_states(match, flow, inputs)
    pasts = match.states[0], match.states[2]
    for past in pasts:
        if past.value not in inputs:
            return "has a past that is computed from an input"
        if flow.readers[past.value] != {match.key.value} and flow.readers[past.value] != {match.value.value}:
            return "has a past that something else reads"
        if not isinstance(past.extents["l"], tvm.tirx.Var):
            return "has a past of a fixed length"
    return None


def _no_states(match: Match, flow: Dataflow, inputs: Mapping[relax.Var, str]) -> str:
    """Why keys and values are not known as those of the past and new ones."""
    joined = flow.call_of(match.key.value, "concat")
    if joined is None:
        return NO_PAST
    past = joined.args[0].fields[0]
    if past in inputs:
        return "has keys and values that something else reads"
    while (part := flow.call_of(flow.fields.get(past, past), "strided_slice", "squeeze", "take", "split")) is not None:
        past = part.args[0]
    return "has a past that is one tensor for keys and values" if past in inputs else NO_PAST
