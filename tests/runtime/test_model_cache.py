"""What a module keeps from run to run: memory that is counted, room that is checked, windows that fit a budget."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.errors import InputError, OptionError
from tvm_ternary.runtime.manifest import CacheInfo
from tvm_ternary.runtime.model_cache import ModelCache, read_bytes


def info(mode: str = "ternary-keys-values", window: int | None = 64, planes: int = 2, layer: int = 0) -> CacheInfo:
    name = f"past.{layer}"
    return CacheInfo(
        f"{name}.key", f"{name}.value", "batch", "past", "length", 2, 64, 64, mode, planes, planes, window, False
    )


def taken(cache: ModelCache) -> int:
    return sum(array.nbytes for arrays in cache.arrays for array in arrays)


@given(
    tokens=st.integers(1, 5000),
    batch=st.integers(1, 3),
    window=st.sampled_from([None, 0, 64, 640]),
    planes=st.integers(1, 3),
)
def test_memory_is_known_before_the_first_token(tokens: int, batch: int, window: int | None, planes: int) -> None:
    cache = ModelCache([info(window=window, planes=planes)], tokens)
    said = cache.bytes(batch)
    cache.begin(batch, 1)
    assert taken(cache) == said == cache.stats().bytes


def test_planes_take_a_fraction_of_float() -> None:
    for planes, share in ((1, 12), (2, 6)):
        stats = ModelCache([info(planes=planes, window=0)], 32768).stats()
        assert stats.bytes <= stats.float_bytes / share


@given(tokens=st.integers(1, 3000), share=st.floats(0.2, 1.5))
def test_a_budget_is_kept_and_used(tokens: int, share: float) -> None:
    """No larger window would fit."""
    layers = [info("adaptive", layer=0), info("ternary-keys-values", layer=1), info("full", None, layer=2)]
    least = ModelCache(layers, tokens).bytes()
    memory = math.ceil(share * ModelCache(layers, tokens).stats().float_bytes)
    if memory < least:
        with pytest.raises(
            OptionError, match=f"is {memory} bytes; a batch of 1 with {tokens} tokens each takes {least}"
        ):
            ModelCache(layers, tokens, memory=memory)
        return
    cache = ModelCache(layers, tokens, memory=memory)
    assert cache.bytes() <= memory
    adaptive, fixed, floats = cache.stats().layers
    assert fixed.window == min(64, -(-tokens // 64) * 64)
    assert floats.window >= tokens
    if adaptive.window < tokens:
        wider = [info("adaptive", adaptive.window + 64), *layers[1:]]
        assert ModelCache(wider, tokens).bytes() > memory
    assert adaptive.reason.endswith(f"the memory given keeps {min(adaptive.window, tokens)} tokens in float")


def test_room_is_checked_and_nothing_is_lost() -> None:
    cache = ModelCache([info()], 100)
    cache.begin(2, 90)
    cache.advance(90)
    before = [array.copy() for array in cache.arrays[0]]
    with pytest.raises(InputError, match=r"has 90 tokens and room for 100; 11 more do not fit.*kv_tokens"):
        cache.begin(2, 11)
    with pytest.raises(InputError, match=r"has 2 sequences; these inputs have 3.*cache\.reset"):
        cache.begin(3, 1)
    assert cache.length == 90
    for one, other in zip(cache.arrays[0], before, strict=True):
        assert np.array_equal(one, other)
    cache.begin(2, 10)


def test_cut_and_forget() -> None:
    cache = ModelCache([info()], 100)
    cache.begin(1, 70)
    cache.advance(70)
    for wrong in (71, -1, 1.5):
        with pytest.raises(InputError, match="expected 0 to 70"):
            cache.truncate(wrong)  # type: ignore[arg-type]
    cache.truncate(3)
    assert cache.length == 3
    cache.reset()
    cache.begin(4, 100)
    assert cache.batch == 4
    assert cache.length == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "kv_tokens 0: is too small"),
        ({"tokens": 9, "window": 3}, "kv_window 3: is no multiple of 64"),
        ({"tokens": 9, "window": -64}, "kv_window -64: is no multiple of 64"),
        ({"tokens": 9, "memory": "lots"}, "kv_memory lots: is no size; expected bytes, or such as 512MiB"),
        ({"tokens": 9, "memory": 0}, "kv_memory 0: is no size"),
        ({"tokens": 9, "memory": 10}, "kv_memory: is 10 bytes; a batch of 1 with 9 tokens each takes"),
    ],
)
def test_options_that_are_wrong(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ModelCache([info()], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"), [(12, 12), ("12", 12), ("2KiB", 2048), ("1.5 MiB", 3 << 19), ("2GB", 2 << 30), ("1g", 1 << 30)]
)
def test_sizes(text: int | str, size: int) -> None:
    assert read_bytes(text) == size
