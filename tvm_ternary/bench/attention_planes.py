"""What ternary keys and values lose in attention, by their planes, on made-up data.

Trained keys have a few elements of a head that are much larger than the others, in all tokens (KIVI, figure 2). So have
the second ones here: normal, with one element in sixteen eight times as large. Queries are normal, so that these
elements and their rounding make up most of a score, and softmax weighs few tokens; that is harder than in a model whose
queries are small where keys are large. With even keys softmax weighs all tokens about alike.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from tvm_ternary.bench.attention_case import Case, HeadShape, Operands
from tvm_ternary.bench.attention_engines import rounded
from tvm_ternary.bench.model import relative_error
from tvm_ternary.kernels.ternary_keys import BLOCK

EVERY, TIMES = 16, 8
"""Which elements of a key are large, and how large."""
TOKENS = 1024
_PLANES = (1, 2, 3)


@cache
def planes_losses(shape: HeadShape, tokens: int = TOKENS) -> dict[str, dict[int, float]]:
    """Relative errors (2-norm) of a step's attention, defined in float64, by what is quantized and by planes.

    Parameters
    ----------
    shape : HeadShape
    tokens : int
        A multiple of 64; all of them are packed.
    """
    lines: dict[str, dict[int, float]] = {}
    for name, times in (("even keys", 1), ("large elements", TIMES)):
        operands = Operands(Case(shape, 1, tokens))
        k, v = operands.by_head
        k = k * np.where(np.arange(shape.size) % EVERY, 1, times).astype(np.float32)
        exact = operands.attend(k, v)
        for planes in _PLANES:
            keys, values = (rounded(one, planes, axis, tokens // BLOCK) for one, axis in ((k, -2), (v, -1)))
            lines.setdefault(f"{name}, keys", {})[planes] = relative_error(operands.attend(keys, v), exact)
            both = relative_error(operands.attend(keys, values), exact)
            lines.setdefault(f"{name}, keys and values", {})[planes] = both
    return lines
