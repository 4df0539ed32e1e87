"""nanoguard: its checkpoint and tokenizer are read without running them, its graph is its package's mathematics."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nanoguard
import nanoguard_graph
import nanoguard_tokenizer
import numpy as np
import onnx
import onnxruntime
import pytest
import torch_checkpoint
from fetch_models import NANOGUARD, NANOGUARD_TOKENIZER

from tvm_ternary.errors import ModelError

SMALL = {"vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 16, "sequence_len": 24}


@pytest.fixture(scope="module")
def checkpoint(models: Path) -> Any:
    return torch_checkpoint.load(models / NANOGUARD)


@pytest.fixture(scope="module")
def model(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nanoguard.write_model(tmp_path_factory.mktemp("nanoguard"), models)


def reference(weights: dict[str, Any], config: dict[str, int], ids: Any, mask: Any) -> Any:
    """``Classifier.forward`` of the package's model.py in float64, line by line; only rotary tables are rounded."""

    def norm(x: Any) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.finfo(np.float32).eps)

    w = {name: array.astype(np.float64) for name, array in weights.items()}
    batch, tokens = ids.shape
    heads, width = config["n_head"], config["n_embd"]
    head_dim = width // heads
    inv_freq = 1.0 / (10000 ** (np.arange(0, head_dim, 2) / head_dim))
    freqs = np.outer(np.arange(tokens), inv_freq).astype(np.float32)[None, :, None]
    cos, sin = (nanoguard_graph.to_bfloat16(f(freqs)).astype(np.float64) for f in (np.cos, np.sin))

    def rotary(x: Any) -> Any:
        x1, x2 = x[..., : head_dim // 2], x[..., head_dim // 2 :]
        return np.concatenate((x1 * cos + x2 * sin, x1 * -sin + x2 * cos), 3)

    x0 = x = norm(w["transformer.wte.weight"][ids])
    for i in range(config["n_layer"]):
        x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        block, y = f"transformer.h.{i}.", norm(x)
        q, k, v = ((y @ w[f"{block}attn.c_{n}.weight"].T).reshape(batch, tokens, heads, head_dim) for n in "qkv")
        q, k = norm(rotary(q)), norm(rotary(k))
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(head_dim)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        mixed = np.einsum("bhqk,bkhd->bqhd", share, v).reshape(batch, tokens, width)
        x = x + mixed @ w[block + "attn.c_proj.weight"].T
        x = x + np.maximum(norm(x) @ w[block + "mlp.c_fc.weight"].T, 0) ** 2 @ w[block + "mlp.c_proj.weight"].T
    m = mask[..., None].astype(np.float64)
    pooled = (norm(x) * m).sum(1) / np.maximum(m.sum(1), 1)
    centred = pooled - pooled.mean(-1, keepdims=True)
    pooled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w["cls_norm.weight"] + w["cls_norm.bias"]
    return pooled @ w["cls_head.weight"].T + w["cls_head.bias"]


def small_weights(config: Mapping[str, int] = SMALL, seed: int = 0) -> dict[str, Any]:
    """Random weights of a network with all that the real one has."""
    rng = np.random.default_rng(seed)
    width = config["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (config["vocab_size"], width)}
    for i in range(config["n_layer"]):
        shapes |= {f"transformer.h.{i}.attn.c_{name}.weight": (width, width) for name in ("q", "k", "v", "proj")}
        shapes[f"transformer.h.{i}.mlp.c_fc.weight"] = (4 * width, width)
        shapes[f"transformer.h.{i}.mlp.c_proj.weight"] = (width, 4 * width)
    shapes |= {"cls_norm.weight": (width,), "cls_norm.bias": (width,), "cls_head.weight": (2, width)}
    shapes |= {"cls_head.bias": (2,), "resid_lambdas": (config["n_layer"],), "x0_lambdas": (config["n_layer"],)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def run_onnx(model: onnx.ModelProto | Path, ids: Any, mask: Any) -> Any:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 24)])
def test_graph_is_the_package_s_network(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    weights = small_weights()
    ids = rng.integers(0, SMALL["vocab_size"], shape)
    mask = (np.arange(shape[1]) < rng.integers(0, shape[1] + 1, shape[0])[:, None]).astype(np.int64)
    expected = reference(weights, SMALL, ids, mask)
    got = run_onnx(nanoguard_graph.build(weights, SMALL), ids, mask)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_real_weights(checkpoint: Any, model: Path) -> None:
    rng = np.random.default_rng(2)
    ids, mask = rng.integers(0, 8188, (2, 40)), np.array([[1] * 40, [1] * 25 + [0] * 15])
    expected = reference(checkpoint["model_state_dict"], checkpoint["config"], ids, mask)
    np.testing.assert_allclose(run_onnx(model, ids, mask), expected, rtol=0, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("real", [pytest.param(True, marks=pytest.mark.slow), False], ids=["real", "random"])
def test_ternary_gives_the_same_labels(
    request: pytest.FixtureRequest,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    real: bool,
) -> None:
    # One block, and prompts shorter than the package pads to, for the time it takes.
    tokenizer = nanoguard_tokenizer.load(models / NANOGUARD_TOKENIZER, 48)
    if real:
        checkpoint = request.getfixturevalue("checkpoint")
        onnx_model = nanoguard_graph.build(checkpoint["model_state_dict"], checkpoint["config"] | {"n_layer": 1})
    else:
        config = SMALL | {"vocab_size": tokenizer.get_vocab_size(), "n_layer": 1, "n_embd": 64, "sequence_len": 48}
        # This seed's weights give the four prompts both labels.
        onnx_model = nanoguard_graph.build(small_weights(config, seed=8), config)
        for value in onnx_model.graph.input:
            for dim, size in zip(value.type.tensor_type.shape.dim, (1, 48), strict=True):
                dim.dim_value = size
    onnx.save(onnx_model, tmp_path / "model.onnx")
    chosen = nanoguard.prompts()[5::60]
    assert [label for _, label in chosen] == [0, 0, 1, 1]
    monkeypatch.setattr(nanoguard, "prompts", lambda: chosen)
    monkeypatch.setattr(nanoguard, "OUTPUT", tmp_path)
    np.savez(tmp_path / "prompts.npz", **nanoguard.tokenize(tokenizer, [text for text, _ in chosen]))
    assert nanoguard.compare(tmp_path / "model.onnx", "t2a8g64", samples=4, threads=1) == 1
    printed = capsys.readouterr().out
    assert re.search(r"t2a8g64 +6 of \d+ ", printed)
    assert "right labels" in printed


def test_right_labels_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nanoguard, "prompts", lambda: [("a", 0), ("b", 1), ("c", 1)])
    monkeypatch.setattr(nanoguard, "OUTPUT", tmp_path)
    ids = np.array([[1, 5], [2, 5], [3, 5]])
    np.savez(tmp_path / "prompts.npz", input_ids=ids)
    # In another order, and one of them wrong.
    inputs = [{"input_ids": ids[i : i + 1]} for i in (2, 0, 1)]
    outputs = [{"logits": np.array([logits])} for logits in ([0.0, 1.0], [3.0, 2.0], [1.0, -1.0])]
    assert nanoguard.right(inputs, outputs) == {"right labels": pytest.approx(2 / 3)}


def test_prompts_are_all_different() -> None:
    prompts = nanoguard.prompts()
    assert len({text for text, _ in prompts}) == 200
    assert sum(label for _, label in prompts) == 100


def test_tokens(models: Path) -> None:
    tokenizer = nanoguard_tokenizer.load(models / NANOGUARD_TOKENIZER, 512)
    # What tiktoken 0.12 gives for it, the special token's text taken as ordinary.
    found = tokenizer.encode("Hello <|reserved_0|> wörld 12345")
    assert len(found.ids) == 512
    expected = [8188, 72, 748, 301, 2222, 124, 266, 567, 345, 100, 95, 48, 124, 62, 522, 195, 182, 114, 108, 100]
    assert found.ids[:20] == expected
    assert set(found.ids[sum(found.attention_mask) :]) == {8189}
    assert len(tokenizer.encode("word " * 600).ids) == 512


def test_bytes_merge_by_rank() -> None:
    ranks = {bytes([byte]): byte for byte in b"abc"} | {b"bc": 256, b"ab": 257, b"abc": 258}
    assert nanoguard_tokenizer.merge(b"abcab", ranks) == [b"abc", b"ab"]
    assert nanoguard_tokenizer.merge(b"abc", ranks, below=258) == [b"a", b"bc"]


class _Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


def archive(path: Path, content: Any, extra: dict[str, bytes] | None = None) -> Path:
    """A zip as torch.save writes it, with a pickle of ours."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", content if isinstance(content, bytes) else pickle.dumps(content, 2))
        for name, data in (extra or {}).items():
            file.writestr(name, data)
    return path


def tensor(kind: str, size: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> bytes:
    """A pickle of one tensor, written as torch does, without torch."""

    def value(of: Any) -> bytes:
        return pickle.dumps(of, 0).removesuffix(pickle.STOP)

    storage = b"(" + value("storage") + f"ctorch\n{kind}\n".encode() + value("0") + value("cpu") + value(size) + b"tQ"
    rest = value(offset) + value(shape) + value(strides) + value(False) + b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR" + pickle.STOP


@pytest.mark.parametrize(
    ("kind", "dtype", "values"),
    [
        ("FloatStorage", "<f4", [0, 1.5, -2, 3, 4, 5]),
        ("HalfStorage", "<f2", [0, 1.5, -2, 3, 4, 5]),
        ("LongStorage", "<i8", [0, 1, -2, 3, 4, 5]),
    ],
)
def test_tensor(tmp_path: Path, kind: str, dtype: str, values: list[float]) -> None:
    data = {"a/data/0": np.array(values, dtype).tobytes()}
    got = torch_checkpoint.load(archive(tmp_path / "x.pt", tensor(kind, 6, (2, 2), (1, 3), 1), data))
    assert got.tolist() == [[values[1], values[4]], [values[2], values[5]]]


def test_bfloat16_is_widened(tmp_path: Path) -> None:
    values = np.array([1.0, -0.15625, 3e38], np.float32)
    halves = {"a/data/0": nanoguard_graph.to_bfloat16(values).view("<u4").__rshift__(16).astype("<u2").tobytes()}
    got = torch_checkpoint.load(archive(tmp_path / "x.pt", tensor("BFloat16Storage", 3, (3,), (1,)), halves))
    assert got.tolist() == nanoguard_graph.to_bfloat16(values).tolist()
    assert got[:2].tolist() == [1.0, -0.15625]


@pytest.mark.parametrize(
    ("content", "size", "problem"),
    [
        (_Harmful(), 4, "it names posix.mkdir"),
        (tensor("ByteStorage", 1, (1,), (1,)), 4, "it names torch.ByteStorage"),
        (tensor("FloatStorage", 2, (2,), (1,)), 4, "storage 0 has 4 bytes, expected 2 float32"),
        (tensor("FloatStorage", 1, (2,), (1,)), 4, r"a tensor \(2,\) does not lie within its storage of 1"),
        (tensor("FloatStorage", 1, (1,), (1,), -1), 4, "does not lie within"),
        (b"\x80\x02", 4, "no checkpoint of plain tensors"),
    ],
    ids=["calls", "dtype", "short", "shape", "offset", "cut off"],
)
def test_what_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, size: int, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path / "x.pt", content, {"a/data/0": bytes(size)})
    with pytest.raises(ModelError, match=problem):
        torch_checkpoint.load(path)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(_Harmful()))
    with pytest.raises(ModelError, match=r"it names posix\.mkdir"):
        nanoguard_tokenizer.load(path, 512)
    path.write_bytes(pickle.dumps([]))
    with pytest.raises(ModelError, match="holds a list"):
        nanoguard_tokenizer.load(path, 512)
