"""The machine's limits: every instruction set that runs here gives one."""

from __future__ import annotations

import json
import platform
import time
from types import SimpleNamespace
from typing import Any

import pytest

import tvm_ternary.bench.roofline
import tvm_ternary.target
from tests.ternary_matmul import NATIVE, TARGETS, runnable
from tvm_ternary.bench.roofline import Limits, Roofline, _Reader, build
from tvm_ternary.errors import HostError
from tvm_ternary.target import host_features, resolve


class FakeTiles:
    """A library whose tile unit is fast beyond belief."""

    def __init__(self, library: Any, opened: int) -> None:
        self.multiply_bytes, self.open_tiles = library.multiply_bytes, lambda: opened

    def multiply_tiles(self, steps: int) -> int:
        time.sleep(1e-6 * steps)
        return steps << 40


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_ternary.bench.roofline, "_SECONDS", 1e-4)
    monkeypatch.setattr(tvm_ternary.bench.roofline, "_TRIALS", 2)


@pytest.mark.parametrize("name", TARGETS)
def test_every_tier_has_limits(name: str) -> None:
    roofline = Roofline(runnable(name), threads=1)
    for limit in (roofline.bandwidth(4096), roofline.bandwidth(5), *(roofline.peak(bits) for bits in (1, 8, 32))):
        # Between a byte or operation a microsecond and what no core does.
        assert 1e6 < limit < 1e14


def test_limits_are_by_cache_level_and_survive_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_ternary.bench.roofline, "cache_sizes", lambda: {2: 1 << 16, 1: 1 << 14})
    roofline = Roofline(NATIVE, threads=2)
    limits = roofline.limits()
    assert list(limits.bandwidths) == ["L1", "L2", "memory"]
    assert limits.bandwidths["L1"] == roofline.bandwidth(1 << 14)  # half for each of two threads
    assert limits.bandwidths["L2"] == roofline.bandwidth(1 << 15)  # half for both
    assert limits.bandwidths["memory"] == roofline.memory == roofline.bandwidth(1 << 18)
    assert limits.peaks["int8"] == roofline.int8_peak
    assert set(limits.peaks) - {"int8 tiles"} == {"int8", "float32", "trits"}
    again = Limits.from_json(json.loads(json.dumps(limits.as_json())))
    assert again.bandwidths == pytest.approx(limits.bandwidths)
    assert again.peaks == pytest.approx(limits.peaks)


def test_a_long_buffer_is_read_in_pieces_round_and_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_ternary.bench.roofline, "_PIECE", 1024)
    seen: list[tuple[int, int, int]] = []
    library = SimpleNamespace(read_buffer=lambda start, length, times: seen.append((start, length, times)))
    reader = _Reader(library, 2560)
    assert [reader.read(1), reader.read(3)] == [1024, 1024 + 512 + 1024]
    first = seen[0][0]
    assert first % 64 == 0
    assert seen == [(first + start, length, 1) for start, length in ((0, 1024), (1024, 1024), (2048, 512), (0, 1024))]


def test_memory_needs_the_size_of_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_ternary.bench.roofline, "cache_sizes", dict)
    roofline = Roofline(NATIVE, threads=1)
    with pytest.raises(HostError, match="does not say how large the caches are; measure without --cold"):
        _ = roofline.memory
    assert roofline.limits().bandwidths == {}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the tile unit is of x86-64")
@pytest.mark.parametrize("name", TARGETS)
def test_tile_code_compiles_beside_any_instruction_set(name: str) -> None:
    library = build(resolve(name), tiles=True)
    assert library.multiply_tiles.restype is library.multiply_bytes.restype


def test_tiles_are_measured_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    roofline = Roofline(NATIVE, threads=1)
    present = "amx_int8" in host_features()
    assert (roofline.tile_peak is not None) == present
    # A CPU that has them below a kernel that bars them, and one that lets them be used.
    monkeypatch.setattr(roofline, "_has_tiles", True)
    for opened in (0, 1):
        monkeypatch.setattr(roofline, "_library", FakeTiles(roofline._library, opened))
        del roofline.tile_peak
        assert (roofline.tile_peak is not None) == opened
    # Only code for a target with tiles is held against them.
    monkeypatch.setattr(roofline, "_uses_tiles", False)
    assert roofline.peak(8) == roofline.int8_peak
    monkeypatch.setattr(roofline, "_uses_tiles", True)
    assert roofline.peak(8) == roofline.tile_peak > roofline.int8_peak


def test_a_target_that_this_host_cannot_run_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_ternary.target.cpu, "host_features", frozenset)
    with pytest.raises(HostError, match=f"target {NATIVE.name}: this CPU lacks "):
        Roofline(NATIVE, threads=1)


def test_threads_share_a_buffer() -> None:
    assert Roofline(NATIVE, threads=2).bandwidth(1 << 16) > 1e6


def test_compiler_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(HostError, match=r"cannot compile the roofline .*set CC to a newer compiler"):
        Roofline(NATIVE, threads=1)
