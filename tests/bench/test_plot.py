"""The picture: its points, ceilings and panels."""

from __future__ import annotations

import builtins
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tvm_ternary.analysis.pictures import require_format
from tvm_ternary.bench.lines import Results
from tvm_ternary.bench.plot import plot_roofline
from tvm_ternary.bench.roofline import Limits
from tvm_ternary.errors import HostError, OptionError

from .measured import FACTS, ONE

LIMITS = Limits({"L1": 500e9, "memory": 41e9}, {"int8": 1234e9, "float32": 300e9, "trits": 4000e9})
RESULTS = Results(
    FACTS, (ONE, replace(ONE, m=64), replace(ONE, threads=2), replace(ONE, cache="cold")), {("avx2", 1): LIMITS}
)


def test_svg_holds_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    plot_roofline(RESULTS, path)
    text = path.read_text()
    for title in ("avx2, 1 thread, warm", "avx2, 1 thread, cold", "avx2, 2 threads, warm"):
        assert f"<!-- {title} -->" in text
    for label in ("t1a8", "slow", "fast", "M = 2", "M = 64", "memory 41 GB/s", "L1 500 GB/s", "int8 1234 Gop/s"):
        assert f"<!-- {label} -->" in text
    # Peaks of arithmetic that nothing here uses.
    assert "trits" not in text
    assert "float32 300" not in text


def test_pictures_are_reproducible(tmp_path: Path) -> None:
    for suffix in ("svg", "png"):
        first, second = (tmp_path / f"{name}.{suffix}" for name in "ab")
        plot_roofline(RESULTS, first)
        plot_roofline(RESULTS, second)
        assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(b"\x89PNG")


def test_limits_may_be_unknown(tmp_path: Path) -> None:
    alone, unknown = (replace(ONE, peers={}),), {("avx2", 1): Limits({}, LIMITS.peaks)}
    plot_roofline(Results(FACTS, alone, {}), tmp_path / "a.svg")
    plot_roofline(Results(FACTS, alone, unknown), tmp_path / "b.svg")
    without, with_peaks = ((tmp_path / name).read_text() for name in ("a.svg", "b.svg"))
    assert "GB/s" not in without + with_peaks
    assert "int8 1234" not in without
    assert "int8 1234" in with_peaks


@pytest.mark.parametrize("name", ["a.jpg", "a"])
def test_other_formats_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match=r"expected \.png or \.svg"):
        require_format(Path(name))


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any) -> Any:
        if name == "matplotlib":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(HostError, match=r"needs the package matplotlib; install tvm-ternary\[plot\]"):
        require_format(Path("a.png"))
