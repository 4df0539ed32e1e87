"""Names of devices, and artifacts that are for another kind."""

from __future__ import annotations

import pytest

from tvm_ternary.errors import HostError, OptionError
from tvm_ternary.runtime.device import Device, choose_device
from tvm_ternary.runtime.manifest import TargetInfo

CPU = TargetInfo("x86-64-v3", {}, ("avx2",))
GPU = TargetInfo("cuda-sm_90", {}, (), "cuda", ("sm_90",), None, "13.0")


@pytest.mark.parametrize(
    ("name", "target", "device"),
    [
        (None, CPU, Device("cpu")),
        ("cpu", CPU, Device("cpu")),
        (None, GPU, Device("cuda", 0)),
        ("cuda", GPU, Device("cuda", 0)),
        ("cuda:0", GPU, Device("cuda", 0)),
        ("cuda:12", GPU, Device("cuda", 12)),
    ],
)
def test_choice(name: str | None, target: TargetInfo, device: Device) -> None:
    assert choose_device(name, target, "model.so") == device


def test_names_as_they_are_given() -> None:
    assert [str(device) for device in (Device("cpu"), Device("cuda"), Device("cuda", 3))] == ["cpu", "cuda:0", "cuda:3"]
    assert [Device(kind).dlpack_type for kind in ("cpu", "cuda")] == [1, 2]


@pytest.mark.parametrize("name", ["", "gpu:0", "cuda:", "cuda:-1", "cuda:x", "cuda:0 ", "cpu:0", "CUDA", "cuda:99999"])
def test_no_such_device(name: str) -> None:
    with pytest.raises(OptionError) as caught:
        choose_device(name, GPU, "model.so")
    assert str(caught.value) == f"device {name!r}: no such device; expected cpu, cuda or cuda:N"


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("cuda:1", CPU, "is compiled for target x86-64-v3, which runs on cpu, not on cuda:1; leave the device out, or"),
        ("cpu", GPU, "is compiled for target cuda-sm_90, which runs on cuda, not on cpu; leave the device out, or"),
    ],
)
def test_the_other_kind(name: str, target: TargetInfo, message: str) -> None:
    with pytest.raises(HostError) as caught:
        choose_device(name, target, "model.so")
    assert str(caught.value).startswith(f"model.so: {message} compile the model with a --target for a ")
