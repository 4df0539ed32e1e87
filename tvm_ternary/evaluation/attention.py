"""A float model with rounded keys and values, as a metric sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tvm_ternary.convert.attention import CalledAttention, Doubles, Floats
from tvm_ternary.evaluation.models import Arrays
from tvm_ternary.kernels.rounded_attention import Rounding, rounded_attention, sight
from tvm_ternary.runtime.manifest import TensorSpec


class RoundedModel:
    """Call it with inputs by name, get outputs by name: what `evaluate` gives a metric as ``run``.

    Parameters
    ----------
    model : CalledAttention
        May be shared by several.
    rounding : Rounding, or mapping of str to Rounding
        Of all attentions, or of each by its name; those that a mapping does not name stay float.
    """

    def __init__(self, model: CalledAttention, rounding: Rounding | Mapping[str, Rounding]) -> None:
        self._model = model
        names = [call.name for call in model.calls]
        chosen = dict.fromkeys(names, rounding) if isinstance(rounding, Rounding) else rounding
        self._roundings = [chosen.get(name, Rounding(0, 0)) for name in names]
        self._pairs = np.zeros(2, np.int64)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes of the inputs."""
        return self._model.model.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes of the outputs."""
        return self._model.model.outputs

    @property
    def packed_share(self) -> float:
        """Of all pairs of a query and a key that it saw in runs so far, how many had a packed key."""
        packed, visible = self._pairs
        return float(packed / visible) if visible else 0.0

    def __call__(self, inputs: Mapping[str, npt.ArrayLike]) -> Arrays:
        """Run one sample."""
        return self.run([{name: np.asarray(array) for name, array in inputs.items()}])[0]

    def run(self, samples: Sequence[Arrays]) -> list[Arrays]:
        """Run samples, each of one sequence; those of equal shapes together."""
        return self._model.run(samples, self._attend)

    def _attend(self, number: int, q: Floats, k: Floats, v: Floats, mask: Floats | None) -> Doubles:
        rounding = self._roundings[number]
        seen = sight(mask, q.shape[1], k.shape[1], rounding.window)
        packed, visible = seen.pairs
        self._pairs += packed if rounding.key_planes or rounding.value_planes else 0, visible
        return rounded_attention(q, k, v, self._model.calls[number].shape.scale, mask, rounding, seen)
