"""Attention of whole models on an emulated GPU: that they compute what a CPU does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.build.test_agreement import Source
from tests.build.test_cuda_agreement import HALF, Pair
from tests.models import gpt2, llama

DIMS = {"batch": 2, "length": 20}


def texts() -> dict[str, np.ndarray]:
    """Two, one of which is padded."""
    ids = np.random.default_rng(5).integers(0, 50, tuple(DIMS.values()))
    mask = np.ones_like(ids)
    mask[1, -6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def schedules(pair: Pair) -> dict[str, str]:
    return {function.name: function.schedule for function in pair.manifest.functions}


@pytest.mark.parametrize(
    ("source", "scheme"),
    [pytest.param(lambda: gpt2(1), "t1a16g16", marks=pytest.mark.slow), (lambda: llama(1), "t1abf16")],
)
def test_attention_in_the_kind_of_the_activations(source: Source, scheme: str, models: Path, tmp_path: Path) -> None:
    """Two functions, and no softmax is left. Captured in a graph, too."""
    pair = Pair(source, scheme, models, tmp_path, dims=DIMS)
    found = schedules(pair)
    assert [found[name] for name in ("attention", "round_operands")] == ["rule:attention"] * 2
    assert not any("softmax" in name for name in found)
    feed = texts()
    half = next(bound for name, bound in HALF.items() if name in scheme)
    assert max(pair.errors([feed, feed])) <= half
    assert "'graph_launches': 0" not in pair.launches


def test_ternary_keys(models: Path, tmp_path: Path) -> None:
    """A packed block and a rest; what packs, and what attends. On the CPU queries have 8 bits, here 16."""
    options = {"dims": {"batch": 1, "length": 140}, "attention": "ternary-keys", "kv_window": 64}
    pair = Pair(lambda: llama(1), "t2a8", models, tmp_path, **options)
    assert [found.mode for found in pair.manifest.attentions] == ["ternary-keys"]
    found = schedules(pair)
    assert [found[name] for name in ("pack_keys", "rounded_attention")] == ["rule:attention"] * 2
    ids = np.random.default_rng(5).integers(0, 50, (1, 140))
    mask = np.ones_like(ids)
    mask[:, 130:] = 0
    assert max(pair.errors([{"input_ids": ids, "attention_mask": mask}])) <= HALF["abf16"]
