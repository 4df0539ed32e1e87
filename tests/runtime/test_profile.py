"""A profile holds every call of a run, in order, with its tensors and its layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tvm_ternary.errors import InputError, OptionError
from tvm_ternary.runtime.module import load
from tvm_ternary.runtime.profile import BUILTIN, Argument, take_profile

from .test_module import inputs


def test_every_call_in_order(built: Path) -> None:
    module = load(built / "inside.so", threads=1)
    given = inputs(2, 3)
    before = module.run(None, given)
    profile = module.profile(given, repeat=3)
    assert profile.runs == 3
    assert profile.seconds > 0
    assert [call.start for call in profile.calls] == sorted(call.start for call in profile.calls)
    assert min(call.seconds for call in profile.calls) == 0, "the clock's own time is taken off"
    assert max(call.seconds for call in profile.calls) > 0
    assert any(call.function.startswith(BUILTIN) for call in profile.calls)
    (product,) = (call for call in profile.calls if call.function == "matmul")
    assert product.layer == "table"
    assert product.arguments[-1] == Argument("float32", (2, 3))
    # The instrument is gone, and has changed nothing.
    for one, other in zip(before, module.run(None, given), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_instrument_goes_when_a_run_fails() -> None:
    seen: list[object] = []
    machine = {"set_instrument": seen.append}
    runs = iter([None, None, RuntimeError("broken")])

    def run() -> None:
        if (result := next(runs)) is not None:
            raise result

    with pytest.raises(RuntimeError, match="broken"):
        take_profile(machine, run, np.ndarray, {}, repeat=1)
    assert seen[-1] is None


def test_refusals(built: Path) -> None:
    module = load(built / "inside.so", threads=1)
    with pytest.raises(OptionError, match="repeat: is 0; expected at least 1"):
        module.profile(inputs(1, 2), repeat=0)
    with pytest.raises(InputError):
        module.profile({})
