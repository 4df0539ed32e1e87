"""llama.cpp's products: packing, folders, refused shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tvm_ternary.bench.memory import aligned_copy
from tvm_ternary.bench.peers import ggml
from tvm_ternary.bench.peers.base import Problem
from tvm_ternary.bench.peers.llama_cpp import FOLDER, PEERS, library_folder, pack_q4_0
from tvm_ternary.errors import HostError

from .conftest import present


def test_q4_0_reads_back() -> None:
    problem = Problem.random(5, 96, threads=1, cache=0)
    blocks = pack_q4_0(problem.trits, problem.scale).reshape(5, 3, 18)
    scale = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16).astype(np.float32)
    for k in range(96):
        byte = blocks[:, k // 32, 2 + k % 16]
        code = (byte >> 4 if k % 32 >= 16 else byte & 15).astype(np.int8)
        np.testing.assert_array_equal(scale[:, k // 32, 0] * (code - 8), problem.dense[:, k])


@pytest.mark.parametrize("name", PEERS)
def test_columns_of_the_weight_come_out(name: str) -> None:
    problem = Problem.random(40, 512, threads=2, cache=0)
    engine = present(name).make(name, problem)
    x = aligned_copy(np.eye(512, dtype=np.float32)[[0, 15, 16, 31, 32, 255, 256, 511]])
    (call,) = engine.calls(x)
    np.testing.assert_allclose(call(), problem.dense[:, [0, 15, 16, 31, 32, 255, 256, 511]].T, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "k", "reason"),
    [
        ("llama-tq2_0", 4096, None),
        ("llama-tq2_0", 4099, "TQ2_0 needs K divisible by 256"),
        ("llama-q4_0", 96, None),
        ("llama-q4_0", 16, "Q4_0 needs K divisible by 32"),
    ],
)
def test_refused_shapes(name: str, k: int, reason: str | None) -> None:
    assert PEERS[name].refuses(1000, k) == reason


def test_the_variable_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    assert library_folder() == tmp_path
    assert all(peer.missing() is None for peer in PEERS.values())
    with pytest.raises(HostError, match=r"holds no usable libggml-base\.so and libggml-cpu\.so .*name the folder"):
        ggml.load(tmp_path)


def test_without_package_and_variable_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setattr("tvm_ternary.bench.peers.llama_cpp.find_spec", lambda name: None)
    assert library_folder() is None
    assert {peer.missing() for peer in PEERS.values()} == {
        f"needs the package llama_cpp (llama-cpp-python), or {FOLDER}=DIR"
    }
