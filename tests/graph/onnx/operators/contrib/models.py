"""Models of many uses of ``com.microsoft`` operators, so that one compilation tests all of them."""

from __future__ import annotations

import numpy as np

from tests.models import FLOAT, GraphBuilder


class Model(GraphBuilder):
    """Every output of what is added is an output of the model."""

    def add(
        self, op: str, *inputs: str, outputs: int | list[str] = 1, dtypes: list[int] | None = None, **attributes: object
    ) -> list[str]:
        """Add a node with so many outputs, or with those of which the name is not empty."""
        names = [None] * outputs if isinstance(outputs, int) else outputs
        made = self.nodes_of(op, *inputs, outputs=names, domain="com.microsoft", **attributes)
        for name, dtype in zip(made, dtypes or [FLOAT] * len(made), strict=True):
            if name:
                self.output(name, dtype)
        return made


def floats(*shape: int) -> np.ndarray:
    """The same numbers for the same shape."""
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)
