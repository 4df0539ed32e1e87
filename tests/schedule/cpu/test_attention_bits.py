"""Masks of bits: the same results as of what they stand for added to scores, to the bit; and nothing hidden shows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.schedule.cpu.test_attention import BASE, Case, check_joined

LOWEST = float(np.finfo(np.float32).min)
KINDS = st.sampled_from(["causal", "window", "padded", "random", "nothing", "everything"])


def seen_by(kind: str, dims: list[int], seed: int) -> np.ndarray:
    """Which keys are seen; an axis of a mask that it does not have is 1."""
    random = np.random.default_rng(seed)
    *outer, queries, keys = dims
    later = np.arange(keys) - np.arange(queries)[:, None]
    offset = random.integers(0, keys)
    seen = {
        "causal": lambda: later <= offset,
        "window": lambda: (later <= offset) & (later > offset - 20),
        "padded": lambda: np.arange(keys) >= random.integers(0, keys, (*outer, 1, 1)),
        "random": lambda: random.random(dims) < random.random(),
        "nothing": lambda: np.zeros((), bool),
        "everything": lambda: np.ones((), bool),
    }
    return np.broadcast_to(seen[kind](), dims)


def added(seen: np.ndarray, hidden: float) -> np.ndarray:
    return np.where(seen, np.float32(0), np.float32(hidden))


@pytest.mark.parametrize(
    ("mask", "queries", "keys", "hidden"),
    [
        ("ms", 40, 133, -np.inf),
        ("bms", 40, 133, LOWEST),
        ("s", 17, 64, LOWEST),
        ("bhms", 5, 70, -1e4),
        ("bhms", 3, 133, LOWEST),
        ("bs", 1, 70, -np.inf),
    ],
)
@settings(max_examples=12, deadline=None)
@given(kind=KINDS, seed=st.integers(0, 99))
@example(kind="random", seed=0)
@example(kind="nothing", seed=0)
def test_bits_are_what_they_stand_for(mask: str, queries: int, keys: int, hidden: float, kind: str, seed: int) -> None:
    shape, lengths = replace(BASE, mask=mask), (2, queries, keys)
    floats, bits = (Case(one, 2, queries, keys) for one in (shape, replace(shape, hidden=hidden)))
    assert floats.mask is not None
    seen = seen_by(kind, list(floats.mask.shape), seed)
    floats.mask = bits.mask = added(seen, hidden)
    before = bits.run("native", lengths)
    np.testing.assert_array_equal(before, floats.run("native", lengths))
    sees = np.broadcast_to(seen, (2, BASE.heads, queries, keys))
    if hidden == -np.inf:
        assert not before[~sees.any(-1)].any()
    if hidden < -1e30:
        # Of a query that sees nothing all is hidden by the same number, and all counts; infinity hides it even so.
        key = seed % keys
        blind = ~sees[..., key] & (sees.any(-1) | (hidden == -np.inf))
        bits.k[:, :, key], bits.v[:, :, key] = 1e30, -1e30
        np.testing.assert_array_equal(bits.run("native", lengths)[blind], before[blind])


@pytest.mark.parametrize(("queries", "past", "new"), [(1, 67, 1), (21, 5, 21)])
def test_joined(queries: int, past: int, new: int) -> None:
    case = Case(replace(BASE, joined=True, hidden=LOWEST), 2, queries, past + new)
    case.mask = added(seen_by("padded", [1, 1, queries, past + new], 3), LOWEST)
    check_joined(case, "native", past, (2, queries, past, new))


@pytest.mark.parametrize("hidden", [-np.inf, LOWEST])
def test_keys_behind_all_that_a_tile_sees_are_not_read(hidden: float) -> None:
    case = Case(replace(BASE, mask="ms", hidden=hidden), 2, 16, 64)
    case.mask = added(np.tri(16, 64, dtype=bool)[None, None], hidden)
    before = case.run("native", (2, 16, 64))
    case.k[:, :, 16:] = case.v[:, :, 16:] = np.nan
    np.testing.assert_array_equal(case.run("native", (2, 16, 64)), before)
