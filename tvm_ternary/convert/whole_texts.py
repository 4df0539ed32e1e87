"""The model that samples are for: a decoder without its keys and values of the past, where they have none."""

from __future__ import annotations

from collections.abc import Collection

from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.passes.find_pasts import find_caches
from tvm_ternary.graph.passes.unstack_pasts import unstack_pasts
from tvm_ternary.graph.passes.without_past import without_past


def model_for(model: ImportedModel, given: Collection[str]) -> ImportedModel:
    """Leave the past out, where samples do.

    Parameters
    ----------
    model : ImportedModel
    given : collection of str
        The inputs that samples name; none where they are texts.

    Returns
    -------
    ImportedModel
        With the same matrices. The model itself, where it has no past, not all of its attentions have one that may be
        left out (`find_caches`), or samples name one.
    """
    apart = unstack_pasts(model)
    reasons = find_caches(apart)
    if not reasons or any(reason is not None for reason in reasons.values()):
        return model
    whole = without_past(apart)
    past = {spec.name for spec in model.inputs} - {spec.name for spec in whole.inputs}
    return model if past & set(given) else whole
