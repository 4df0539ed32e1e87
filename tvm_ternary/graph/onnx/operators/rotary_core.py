"""Rotary position embedding of heads, as every operator that has it computes it."""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.operators.attention_core import reshape
from tvm_ternary.graph.onnx.operators.shaping import window


def rotate(
    emitter: Emitter, x: relax.Expr, cosine: relax.Expr, sine: relax.Expr, *, interleaved: bool = False
) -> relax.Var:
    """Turn pairs of features by angles; features that have no angle stay.

    The two of a pair are an axis of their own and change places along it: one expression without a branch.

    Parameters
    ----------
    x : (batch, heads, length, size)
    cosine, sine : (batch or 1, heads or 1, length, pairs)
    interleaved : bool
        Whether feature 2 i makes a pair with 2 i + 1, rather than i with pairs + i.

    References
    ----------
    Su et al., "RoFormer", arXiv:2104.09864, equation 34.
    """
    batch, heads, length, size = emitter.shape(x) or []
    pairs = int((emitter.shape(cosine) or [])[-1])
    kept = None
    if size != 2 * pairs:
        kept = emitter.emit(window(x, [3], [2 * pairs], [size]))
        x = emitter.emit(window(x, [3], [0], [2 * pairs]))
    axis = 4 if interleaved else 3
    apart = reshape(emitter, x, [batch, heads, length, *((pairs, 2) if interleaved else (2, pairs))])
    signs = np.array([-1, 1], emitter.dtype(x))
    signs = signs if interleaved else signs[:, None]
    cosine, sine = (emitter.emit(R.expand_dims(table, axis)) for table in (cosine, sine))
    sine = emitter.emit(R.multiply(sine, relax.const(signs, emitter.dtype(x))))
    turned = emitter.emit(R.multiply(emitter.emit(R.flip(apart, axis)), sine))
    turned = emitter.emit(R.add(emitter.emit(R.multiply(apart, cosine)), turned))
    result = reshape(emitter, turned, [batch, heads, length, 2 * pairs])
    return result if kept is None else emitter.emit(R.concat([result, kept], 3))
