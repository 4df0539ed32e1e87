"""What the driver says: where there is none, and as the tests' own driver has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cuda_emulator import fake_gpu
from tvm_ternary.runtime import driver

ASK = """
import json, sys
from dataclasses import asdict
from tvm_ternary.runtime.driver import read_devices
print(json.dumps(asdict(read_devices(None if sys.argv[1] == "None" else int(sys.argv[1])))))
"""


def asked(number: int | None, **settings: Any) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(fake_gpu.python(ASK, fake_gpu.environment(**settings), number))
    return facts


def test_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(driver, "LIBRARY", str(tmp_path / "libcuda.so.1"))
    facts = driver.read_devices(0)
    assert facts.library is not None
    assert "libcuda.so.1" in facts.library
    assert facts.gpus == ()


def test_two_gpus() -> None:
    facts = asked(1, count=2, compute_capability=(8, 9), driver=13010, memory=1 << 30, name="Some GPU")
    assert (facts["library"], facts["initialization"], facts["version"]) == (None, None, [13, 1])
    first, second = facts["gpus"]
    assert first == {
        "number": 0, "name": "Some GPU", "capability": [8, 9], "total_bytes": 1 << 30, "free_bytes": None
    }  # fmt: skip
    assert second["number"] == 1
    assert 0 < second["free_bytes"] <= 1 << 30


def test_free_memory_is_asked_only_of_a_gpu_that_is_there() -> None:
    for number in (None, 7):
        assert [gpu["free_bytes"] for gpu in asked(number)["gpus"]] == [None]


def test_a_driver_without_a_gpu() -> None:
    facts = asked(0, count=0, driver=12080)
    assert facts == {"library": None, "version": [12, 8], "initialization": "CUDA_ERROR_NO_DEVICE", "gpus": []}
