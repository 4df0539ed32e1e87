"""Which outputs are logits, and which predict the next token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tvm_ternary.errors import OptionError
from tvm_ternary.evaluation.logits import find_logits
from tvm_ternary.evaluation.models import Arrays, Runner
from tvm_ternary.runtime.manifest import TensorSpec


class Counted:
    """Logits that count tokens up to each one, or in the whole text."""

    def __init__(self, causal: bool) -> None:
        self.causal = causal
        self.outputs = (TensorSpec("logits", "float32", ("b", "s", 5)), TensorSpec("n", "int64", ("b",)))

    def __call__(self, inputs: Arrays) -> Arrays:
        tokens = np.eye(5, dtype=np.float32)[inputs["input_ids"]]
        logits = (
            np.cumsum(tokens, axis=1) if self.causal else np.broadcast_to(tokens.sum(1, keepdims=True), tokens.shape)
        )
        return {"logits": logits, "n": np.ones(1, np.int64)}


@pytest.mark.parametrize("causal", [True, False])
def test_a_later_token_tells(causal: bool) -> None:
    rule = find_logits(Counted(causal), {"input_ids": np.array([[3, 0, 1], [1, 1, 0]])})  # type: ignore[arg-type]
    assert rule.names == {"logits"}
    assert rule.causal == ({"logits"} if causal else set())


@pytest.mark.usefixtures("decoders")
def test_a_decoder_and_a_classifier(run_of: Callable[[str], Runner]) -> None:
    rule = find_logits(run_of("gpt2-float"), {"input_ids": np.arange(18).reshape(2, 9)})
    assert rule.causal == rule.names == {"logits"}
    x = {"x": np.zeros((1, 10), np.float32)}
    assert find_logits(run_of("mlp-float"), x).names == set()
    rule = find_logits(run_of("mlp-float"), x, ["y"])
    assert (rule.names, rule.causal) == ({"y"}, set())


def test_integers_are_no_logits() -> None:
    with pytest.raises(OptionError, match="output 'n' is int64; expected floats"):
        find_logits(Counted(True), {}, ["n"])  # type: ignore[arg-type]
