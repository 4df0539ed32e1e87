"""The machine's limits: every instruction set that runs here gives one."""

from __future__ import annotations

import pytest

import tvm_ternary.bench.roofline
from tests.ternary_matmul import NATIVE, TARGETS, runnable
from tvm_ternary.bench.roofline import Roofline
from tvm_ternary.errors import HostError


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_ternary.bench.roofline, "_SECONDS", 1e-4)
    monkeypatch.setattr(tvm_ternary.bench.roofline, "_TRIALS", 2)


@pytest.mark.parametrize("name", TARGETS)
def test_every_tier_has_limits(name: str) -> None:
    roofline = Roofline(runnable(name), threads=1)
    for limit in (roofline.bandwidth(4096), roofline.bandwidth(5), roofline.int8_peak, roofline.float32_peak):
        # Between a byte or operation a microsecond and what no core does.
        assert 1e6 < limit < 1e14


def test_threads_share_a_buffer() -> None:
    assert Roofline(NATIVE, threads=2).bandwidth(1 << 16) > 1e6


def test_compiler_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(HostError, match=r"cannot compile the roofline .*set CC to a newer compiler"):
        Roofline(NATIVE, threads=1)
