"""Decoders that keep ternary keys and values inside the library: prompts and steps against one pass over all tokens."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import tvm_ternary
from tests.cli.conftest import cli, error_line
from tests.graph.onnx.running import relative_error, run_onnxruntime
from tests.models import gpt2, llama, mlp
from tvm_ternary.build.package import package
from tvm_ternary.convert.attention import CalledAttention
from tvm_ternary.errors import InputError, OptionError
from tvm_ternary.graph.importer import import_onnx
from tvm_ternary.kernels.rounded_attention import Floats, Rounding, rounded_attention, sight
from tvm_ternary.runtime.module import Module

WINDOW, BLOCK, PLANES = 64, 64, 2
VOCABULARY = 50


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, four heads, two of keys, all weights float."""
    folder = tmp_path_factory.mktemp("decoder")
    onnx.save(llama(cache="both"), folder / "decoder.onnx")
    options: dict[str, Any] = {"layers": [], "embeddings": "float", "attention": "ternary-keys-values"}
    return tvm_ternary.compile(folder / "decoder.onnx", folder / "decoder.so", **options).path


@pytest.fixture(scope="module")
def whole() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(llama(cache="out").SerializeToString())


def random_ids(length: int, batch: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length))


def run(module: Module, ids: np.ndarray, hidden: int = 0) -> np.ndarray:
    """Logits of tokens behind those that the module has; the first ``hidden`` of the last sequence are padding."""
    mask = np.ones((len(ids), module.cache.length + ids.shape[1]), np.int64)
    mask[-1, :hidden] = 0
    return module.run(None, {"input_ids": ids, "attention_mask": mask})[0]


def feed(module: Module, ids: np.ndarray, prompt: int) -> np.ndarray:
    """A prompt, then token by token."""
    parts = [run(module, ids[:, :prompt]), *(run(module, ids[:, n : n + 1]) for n in range(prompt, ids.shape[1]))]
    return np.concatenate(parts, axis=1)


def in_one_pass(session: onnxruntime.InferenceSession, ids: np.ndarray) -> np.ndarray:
    return np.asarray(session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0])


def test_what_is_past_is_no_input_and_no_output(library: Path) -> None:
    module = tvm_ternary.load(library, threads=1)
    assert [str(spec) for spec in module.inputs] == [
        "input_ids: int64[batch, length]",
        "attention_mask: int64[batch, past + length]",
    ]
    assert [spec.name for spec in module.outputs] == ["logits"]
    assert [(c.name, c.mode, c.key_planes, c.window) for c in module.manifest.caches] == [
        ("past.0.key", "ternary-keys-values", PLANES, WINDOW),
        ("past.1.key", "ternary-keys-values", PLANES, WINDOW),
    ]


def test_until_something_is_packed_steps_are_one_pass(library: Path, whole: onnxruntime.InferenceSession) -> None:
    ids = random_ids(WINDOW + BLOCK, batch=2)
    module = tvm_ternary.load(library, threads=2, kv_tokens=200)
    assert relative_error(feed(module, ids, prompt=90), in_one_pass(whole, ids)) <= 1e-5
    assert [layer.packed_tokens for layer in module.stats().layers] == [BLOCK, BLOCK]


def test_packed_tokens_are_what_their_planes_stand_for(library: Path) -> None:
    """Against numpy. What is left is that queries and weights are bytes: half a step of 127 each, twice a layer."""
    ids = random_ids(200)
    rounding = Rounding(PLANES, PLANES, rotated=True)
    got = feed(tvm_ternary.load(library, threads=1, kv_tokens=200), ids, 10)
    assert relative_error(got, rounded(ids, [[rounding] * 4] * 2)) <= 4 * 0.5 / 127


@functools.cache
def decoder() -> CalledAttention:
    """The model of `library` with attention left open; what lies between is compiled once for all tests."""
    return CalledAttention(import_onnx(llama(cache="out")))


def rounded(ids: np.ndarray, roundings: list[list[Rounding]]) -> np.ndarray:
    """Logits where a cache is as it is after the tokens before each, for layers and heads of queries."""
    model = decoder()

    def attend(number: int, q: Floats, k: Floats, v: Floats, mask: Floats | None) -> np.ndarray:
        length = q.shape[1]
        packed = np.maximum(np.arange(length) - WINDOW, 0) // BLOCK * BLOCK
        seen = replace(sight(mask, length, length, WINDOW), packed=packed)
        scale = model.calls[number].shape.scale
        heads = [rounded_attention(q, k, v, scale, mask, one, seen) for one in roundings[number]]
        return np.stack([of_all[head] for head, of_all in enumerate(heads)])

    return np.asarray(model.run([{"input_ids": ids, "attention_mask": np.ones_like(ids)}], attend)[0]["logits"])


def test_heads_may_keep_different_things(tmp_path: Path) -> None:
    """Of the first layer one in float, of the second keys alone packed."""
    onnx.save(llama(cache="both"), tmp_path / "m.onnx")
    modes = ["0.key#0=full", "0.key=ternary-keys-values", "ternary-keys"]
    options: dict[str, Any] = {"layers": [], "embeddings": "float", "attention": modes, "kv_planes": "3,2"}
    options["dims"] = {"batch": 1, "length": 1}
    module = tvm_ternary.load(tvm_ternary.compile(tmp_path / "m.onnx", tmp_path / "m.so", **options).path, threads=1)
    found = [(c.name, c.mode, c.kv_heads, c.key_planes, c.value_planes) for c in module.manifest.caches]
    assert found == [
        ("past.0.key#0", "full", 1, 1, 1),
        ("past.0.key#1", "ternary-keys-values", 1, 3, 2),
        ("past.1.key", "ternary-keys", 2, 3, 0),
    ]
    ids = random_ids(200)
    first = [Rounding(0, 0)] * 2 + [Rounding(3, 2, rotated=True)] * 2
    wanted = rounded(ids, [first, [Rounding(3, 0, rotated=True)] * 4])
    assert relative_error(feed(module, ids, 1), wanted) <= 4 * 0.5 / 127


def test_a_prompt_sees_itself_in_float(library: Path, whole: onnxruntime.InferenceSession) -> None:
    ids = random_ids(300)
    module = tvm_ternary.load(library, threads=1, kv_tokens=300)
    assert relative_error(run(module, ids), in_one_pass(whole, ids)) <= 1e-5
    assert module.cache.length == 300


def test_later_tokens_change_nothing_before_them(library: Path) -> None:
    ids = random_ids(200, batch=2)
    other = ids.copy()
    other[:, 120:] = random_ids(80, batch=2, seed=1)
    module = tvm_ternary.load(library, threads=1, kv_tokens=300)
    found = []
    for one in (ids, other):
        module.cache.reset()
        found.append(np.concatenate([run(module, one[:, :100]), run(module, one[:, 100:])], axis=1))
    assert np.array_equal(found[0][:, :120], found[1][:, :120])
    assert not np.array_equal(found[0][:, 120:], found[1][:, 120:])


def test_padding_changes_nothing(library: Path) -> None:
    """Of a sequence in a batch; its tokens stay in float, where they share no scale with others."""
    ids, hidden = random_ids(100, batch=2), 9
    other = ids.copy()
    other[1, :hidden] = random_ids(hidden, seed=2)[0]
    module = tvm_ternary.load(library, threads=1, kv_tokens=128)
    found = []
    for one in (ids, other):
        module.cache.reset()
        found.append(np.concatenate([run(module, part, hidden) for part in np.split(one, [90, 91], axis=1)], axis=1))
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1, hidden:], found[1][1, hidden:])


def test_cut_and_go_on(library: Path) -> None:
    ids = random_ids(170)
    module = tvm_ternary.load(library, threads=1, kv_tokens=200)
    first = feed(module, ids, prompt=20)
    # Behind the packed block nothing was rounded: the same bits again.
    module.cache.truncate(130)
    assert np.array_equal(feed_from(module, ids, 130), first[:, 130:])
    module.cache.reset()
    assert np.array_equal(feed(module, ids, prompt=20), first)
    # Within it tokens come back as they were rounded.
    module.cache.truncate(40)
    assert relative_error(feed_from(module, ids, 40), first[:, 40:]) <= 0.5


def feed_from(module: Module, ids: np.ndarray, start: int) -> np.ndarray:
    return np.concatenate([run(module, ids[:, n : n + 1]) for n in range(start, ids.shape[1])], axis=1)


def test_the_window_is_chosen_at_load(library: Path, whole: onnxruntime.InferenceSession) -> None:
    ids = random_ids(260)
    wanted = in_one_pass(whole, ids)
    errors = []
    for window in (0, 64, 192, 320):
        module = tvm_ternary.load(library, threads=1, kv_tokens=300, kv_window=window)
        errors.append(relative_error(feed(module, ids, prompt=1), wanted))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= 1e-5


def test_ten_thousand_steps(library: Path, whole: onnxruntime.InferenceSession) -> None:
    """All in float: appended, cut and forgotten at random; the memory is what it was."""
    random = np.random.default_rng(0)
    module = tvm_ternary.load(library, threads=1, kv_tokens=256, kv_window=256)
    packed = tvm_ternary.load(library, threads=1, kv_tokens=256)
    ids, steps, checked = np.zeros((1, 0), np.int64), 0, 0
    sizes = memory = 0
    while steps < 10_000:
        if ids.shape[1] > 250 or random.random() < 0.005:
            ids = ids[:, : random.integers(0, ids.shape[1] + 1)]
            for one in (module, packed):
                one.cache.truncate(ids.shape[1])
        new = random.integers(0, VOCABULARY, (1, int(random.integers(1, 4))))
        logits = run(module, new)
        run(packed, new)
        ids, steps = np.concatenate([ids, new], axis=1), steps + new.shape[1]
        if random.random() < 0.003:
            wanted = in_one_pass(whole, ids)[:, -new.shape[1] :]
            assert relative_error(logits, wanted) <= 1e-5
            checked += 1
        if steps < 2_000:
            sizes, memory = packed.cache.bytes(), resident()
    assert checked > 5
    assert packed.cache.bytes() == sizes
    assert resident() - memory < 4 << 20
    packed.cache.reset()
    fresh = tvm_ternary.load(library, threads=1, kv_tokens=256)
    ids = random_ids(200)
    assert np.array_equal(feed(packed, ids, 3), feed(fresh, ids, 3))


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


@pytest.fixture
def started(library: Path) -> Iterator[Module]:
    module = tvm_ternary.load(library, threads=1, kv_tokens=100)
    run(module, random_ids(90))
    yield module
    # Whatever was refused, the tokens are still there.
    assert module.cache.length == 90
    run(module, random_ids(10))


def test_no_room(started: Module) -> None:
    with pytest.raises(InputError, match="cache: has 90 tokens and room for 100; 11 more do not fit"):
        run(started, random_ids(11))


def test_another_batch(started: Module) -> None:
    with pytest.raises(InputError, match="cache: has 1 sequences; these inputs have 2"):
        run(started, random_ids(1, batch=2))


def test_a_mask_that_does_not_count_the_past(started: Module) -> None:
    ids = random_ids(2)
    with pytest.raises(InputError, match=r"has past \+ length=2; expected 92"):
        started.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})


def test_timing_appends_nothing(started: Module) -> None:
    ids = random_ids(1)
    before = run(started, ids)
    started.cache.truncate(90)
    feeds = {"input_ids": ids, "attention_mask": np.ones((1, 91), np.int64)}
    started.time(feeds, repeat=3)
    started.profile(feeds, repeat=2)
    assert started.cache.length == 90
    assert np.array_equal(run(started, ids), before)
    started.cache.truncate(90)


def test_the_command_line(library: Path, tmp_path: Path) -> None:
    """A step behind random tokens, and what is kept; and what is refused in one line."""
    step = ("run", library, "--dim", "length=1", "--past", "200")
    result = cli(*step, "--kv-tokens", "300", "--repeat", "2", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["cache"]["tokens"], document["cache"]["capacity"]) == (201, 300)
    assert [layer["packed_tokens"] for layer in document["cache"]["layers"]] == [128, 128]
    table = cli(*step).stdout
    assert "cached   201 of 4096 tokens" in table
    assert "past.0.key" in table
    assert "past.0.key" in cli("inspect", library).stdout
    for arguments, part in (
        ((*step, "--kv-tokens", "100"), "cache: has 0 tokens and room for 100; 200 more do not fit"),
        ((*step, "--kv-memory", "1KiB"), "kv_memory: is 1024 bytes"),
        (
            ("compile", tmp_path / "m.onnx", "-o", tmp_path / "m.so", "--attention", "some"),
            "attention 'some': does not",
        ),
    ):
        refused = cli(*arguments)
        assert refused.returncode == 2
        assert part in error_line(refused)


def test_without_python(library: Path, tmp_path: Path) -> None:
    """The C++ runner gives a cache to the library and runs a prompt: the same bits."""
    folder = package(library, tmp_path / "package").folder
    ids = random_ids(150, batch=2)
    for name, array in (("ids", ids), ("mask", np.ones_like(ids))):
        np.save(tmp_path / f"{name}.npy", array)
    inputs = [tmp_path / "ids.npy", tmp_path / "mask.npy"]
    options: list[str | Path] = ["--tokens", "200", "--repeat", "2", "--output", tmp_path, "--dim", "past + length=150"]
    subprocess.run([folder / "runner", *options, folder / library.name, *inputs], check=True, timeout=60)
    wanted = run(tvm_ternary.load(library, kv_tokens=200), ids)
    assert np.array_equal(np.load(tmp_path / "output_0.npy"), wanted)


def test_models_without_a_cache(tmp_path: Path) -> None:
    onnx.save(mlp(), tmp_path / "m.onnx")
    path = tvm_ternary.compile(tmp_path / "m.onnx", tmp_path / "m.so", layers=[]).path
    with pytest.raises(OptionError, match="keeps no keys and values"):
        tvm_ternary.load(path).stats()
    with pytest.raises(OptionError, match="kv_tokens: is for a model that keeps keys and values"):
        tvm_ternary.load(path, kv_tokens=7)


@pytest.mark.slow
@pytest.mark.parametrize(("build", "layers"), [(gpt2, 6), (gpt2, 12), (llama, 6), (llama, 12)])
def test_deep_decoders_and_long_texts(build: Callable[..., onnx.ModelProto], layers: int, tmp_path: Path) -> None:
    """1,100 tokens at once, then 40 one by one; in float they are one pass."""
    sizes = {"layers": layers, "width": 128, "heads": 4, **({"longest": 1200} if build is gpt2 else {})}
    onnx.save(build(cache="both", **sizes), tmp_path / "m.onnx")
    options = {"layers": [], "embeddings": "float", "attention": "ternary-keys-values", "kv_planes": 3}
    library = tvm_ternary.compile(tmp_path / "m.onnx", tmp_path / "m.so", **options).path
    ids = random_ids(1140, batch=2)
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    whole = build(cache="out", **sizes)
    # Deep random models enlarge roundings: two ways of onnxruntime show how much.
    wanted, other = (
        np.asarray(run_onnxruntime(whole, given)[0]) if plain else in_one_pass_of(whole, given)
        for plain in (True, False)
    )
    own = relative_error(other[:, 1100:], wanted[:, 1100:])
    errors = {}
    for window in (1152, 640, 64):
        module = tvm_ternary.load(library, kv_tokens=1152, kv_window=window)
        parts = []
        for part in np.split(ids, [1100, *range(1101, 1140)], axis=1):
            mask = np.ones((2, module.cache.length + part.shape[1]), np.int64)
            feeds = {"input_ids": part, "attention_mask": mask}
            parts.append(module.run(None, {spec.name: feeds[spec.name] for spec in module.inputs})[0])
        errors[window] = relative_error(np.concatenate(parts, axis=1)[:, 1100:], wanted[:, 1100:])
    assert errors[1152] <= 5 * own
    # What planes cost is not for random weights to say; but the fewer tokens are packed, the less.
    assert errors[1152] < errors[640] < errors[64]


def in_one_pass_of(model: onnx.ModelProto, given: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return np.asarray(session.run(["logits"], {value.name: given[value.name] for value in session.get_inputs()})[0])
