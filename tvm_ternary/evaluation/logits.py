"""Which outputs of a model are logits, and which of them predict the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import OptionError
from tvm_ternary.evaluation.models import Arrays, Runner

IDS, MASK = "input_ids", "attention_mask"
# A compiled model may sum in another order when a value changes that it does not use.
_CHANGE = 1e-4


@dataclass(frozen=True)
class LogitsRule:
    """Which outputs are logits, and whether they predict the next token."""

    names: frozenset[str]
    causal: frozenset[str]


def find_logits(run: Runner, sample: Arrays, names: Sequence[str] = ()) -> LogitsRule:
    """Say which outputs are logits: the named ones, or those with ``logits`` in their name.

    Those of a decoder are found by trying: logits (batch, sequence, classes) for ``input_ids`` (batch, sequence) that
    do not change when a later token does predict the next token.

    Parameters
    ----------
    run : Runner
        The float model.
    sample : dict of str to array
        Its inputs.
    names : sequence of str
        Names of outputs.

    Raises
    ------
    OptionError
        If there is no output of some name, or it holds no floats.
    """
    known = {spec.name: spec for spec in run.outputs}
    for name in names:
        if name not in known:
            raise OptionError("--logits", f"no output {name!r}; expected one of {', '.join(known)}")
        if not known[name].dtype.startswith("float"):
            raise OptionError("--logits", f"output {name!r} is {known[name].dtype}; expected floats")
    floats = [name for name, spec in known.items() if spec.dtype.startswith("float") and spec.shape]
    chosen = frozenset(names or (name for name in floats if "logits" in name.lower()))
    ids = sample.get(IDS)
    if not chosen or ids is None or ids.ndim != 2 or ids.shape[1] < 2:
        return LogitsRule(chosen, frozenset())
    before, after = run(sample), run({**sample, IDS: _with_other_last(ids)})
    causal = (n for n in chosen if before[n].ndim == 3 and before[n].shape[:2] == ids.shape)
    return LogitsRule(chosen, frozenset(n for n in causal if _same_but_last(before[n], after[n])))


def _with_other_last(ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Change the last token of each row to a lower one, which every vocabulary has, or to 1."""
    changed = ids.copy()
    changed[:, -1] = np.where(ids[:, -1] > 0, ids[:, -1] - 1, 1)
    return changed


def _same_but_last(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> bool:
    earlier = np.abs(before[:, :-1].astype(np.float64) - after[:, :-1]).max()
    return bool(earlier <= _CHANGE * np.abs(before).max())
