"""The attention benchmark in small: answers, figures and pictures are there; not how fast it is."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvm_ternary.bench import attention_engines, attention_memory
from tvm_ternary.bench.attention import AttentionMeasurement, cases_of, measure_attention
from tvm_ternary.bench.attention_case import Case, HeadShape, Operands, checked
from tvm_ternary.bench.attention_engines import CacheScheme, Engines, blocks_of
from tvm_ternary.bench.attention_memory import TOKENS, layer_bytes, measured_bytes, memory_table, token_bytes
from tvm_ternary.bench.attention_planes import planes_losses
from tvm_ternary.bench.attention_plot import plot_attention
from tvm_ternary.bench.attention_report import attention_table, refusals_table
from tvm_ternary.bench.engines import WrongAnswerError
from tvm_ternary.errors import HostError, OptionError
from tvm_ternary.kernels.attention import reference_attention
from tvm_ternary.kernels.ternary_keys import BLOCK
from tvm_ternary.schedule.cpu.kernel import build_kernel
from tvm_ternary.target import resolve

SHAPE = HeadShape(4, 2, 16)
SCHEMES = [CacheScheme(), *(CacheScheme(*one) for one in ((1, 32), (2, 1), (2, 8), (2, 32), (3, 32)))]
PEERS = ("ort-gqa", "ort-mha")


@pytest.fixture(scope="module")
def measured() -> list[AttentionMeasurement]:
    cases = list(cases_of([SHAPE], [200], [140], window=64))
    of_prompts = [CacheScheme(), CacheScheme(1, 1)]
    return list(measure_attention(cases, SCHEMES, prompt_schemes=of_prompts, peers=PEERS, window=64, turns=2))


def test_every_scheme_of_a_step_and_both_prompts(measured: list[AttentionMeasurement]) -> None:
    assert [(one.case.kind, str(one.scheme)) for one in measured] == [
        *(("step", name) for name in ("full", "t1a32", "t2a1", "t2a8", "t2a32", "t3a32")),
        ("prompt, causal", "full"),
        ("prompt, causal", "t1a1"),
        ("prompt", "full"),
        ("prompt", "t1a1"),
    ]
    for one in measured:
        assert one.error < (3e-2 if one.scheme.rounded else 1e-5)
        assert one.time.median > 0
        assert one.reached > 0
        assert one.peers.keys() == one.ratios.keys() == one.peer_errors.keys()
        assert sorted([*one.peers, *one.left_out]) == sorted(PEERS)
    found = [sorted(one.peers) for one in measured[-5:]]
    assert found == [["ort-gqa"], *[["ort-gqa", "ort-mha"]] * 2, *[["ort-mha"]] * 2]
    assert all((one.causal_share is not None) is one.case.causal for one in measured)
    rounded = measured[-1]
    assert 1e-5 < rounded.error < rounded.loss


def test_planes_lose_less_and_take_more(measured: list[AttentionMeasurement]) -> None:
    full, *ternary = (one for one in measured if one.case.step and one.scheme.bits == 32)
    assert full.loss == 0
    assert [one.loss for one in ternary] == sorted((one.loss for one in ternary), reverse=True)
    assert [one.bytes for one in ternary] == sorted(one.bytes for one in ternary)
    assert ternary[-1].bytes < full.bytes
    for one in measured:
        if one.case.step:
            queries = 2 * 4 * SHAPE.heads * SHAPE.size
            # What a block takes beyond its share of `bytes_a_token` are the two counts of a sequence.
            assert one.bytes == one.cache_bytes + queries + (8 if one.scheme.planes else 0)


def test_lines_are_read_back(measured: list[AttentionMeasurement]) -> None:
    for one in measured:
        line = json.loads(json.dumps(one.as_json(), allow_nan=False))
        again = AttentionMeasurement.from_json({**line, "cpu": "of the line"})
        assert replace(again, bandwidth=one.bandwidth, peak=one.peak) == one
        np.testing.assert_allclose([again.bandwidth, again.peak], [one.bandwidth, one.peak])
        assert line["floor_percent"] == pytest.approx(100 * again.reached)


def test_tables(measured: list[AttentionMeasurement]) -> None:
    table = attention_table(measured)
    assert table.columns[-4:] == ("ort-gqa ms", "ratio", "ort-mha ms", "ratio")
    assert [row[:5] for row in table.rows[-3:]] == [
        ("4/2x16", "prompt, causal", "140", "1", "t1a1"),
        ("4/2x16", "prompt", "140", "1", "full"),
        ("4/2x16", "prompt", "140", "1", "t1a1"),
    ]
    assert all(len(row) == len(table.columns) for row in table.rows)
    refused = refusals_table(measured)
    assert refused is not None
    assert [row[::2] for row in refused.rows] == [("ort-mha", "step"), ("ort-gqa", "prompt")]
    assert refusals_table([replace(one, left_out={}) for one in measured]) is None


def test_memory_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaMA 3 8B with 32,768 tokens: 32 layers x 8 heads x 2 x 128 x 4 bytes a token in float32."""
    monkeypatch.setattr(attention_memory, "measured_bytes", lambda kinds: list(map(layer_bytes, kinds)))
    rows = {name: cells for name, *cells in memory_table().rows}
    assert rows["float32"] == ["8192", "1/1.0", "", "256.0 MiB", "256.0 MiB", "8.0 GiB", "1/1.0", "1/0.5"]
    assert rows["float16"][:1] == ["4096"]
    # A block of a head: 2 x 64 x 128 numbers of two bits, 128 scales of keys and 64 of values.
    block = 2 * 64 * 128 // 4 + 4 * 128 + 4 * 64
    assert token_bytes(1) == 8 * block / 64
    assert rows["1 plane"][:3] == ["608", "1/13.5", "1/12"]
    assert rows["2 planes"][:3] == ["1120", "1/7.3", "1/6"]
    # All but a window of 64 tokens are packed; it and as many more have memory in float32, and there are two counts.
    assert layer_bytes(1) == (TOKENS // 64 - 1) * 8 * block + 128 * 8 * 2 * 128 * 4 + 8
    assert list(rows) == ["float32", "float16", "1 plane", "2 planes", "3 planes"]


def test_a_process_grows_by_what_was_counted() -> None:
    tokens, kinds = 16384, list[str | int](["float16", 1, "float16"])
    for kind, got in zip(kinds, measured_bytes(kinds, tokens), strict=True):
        # Pages that are only begun, and the objects around.
        assert 0 <= got + 4096 - layer_bytes(kind, tokens) < 2**20


def test_a_process_that_ends_early_is_named() -> None:
    with pytest.raises(HostError, match=r"the process that holds caches: ended early \(.*cache key_planes 4"):
        measured_bytes([1, 4])


def test_losses_shrink_with_planes_and_grow_with_what_is_packed() -> None:
    lines = planes_losses(SHAPE, 256)
    assert len(lines) == 4
    for line in lines.values():
        assert list(line) == [1, 2, 3]
        assert line[1] > line[2] > line[3] > 0
    for name in ("even keys", "large elements"):
        assert lines[f"{name}, keys"][3] < lines[f"{name}, keys and values"][3]


def test_what_a_prompt_may_be() -> None:
    operands = Operands(Case(SHAPE, 40, 40))
    with pytest.raises(OptionError, match="prompt scheme t2a32: queries of a prompt are rounded where keys are"):
        Engines(resolve("native"), 64).make(operands, [CacheScheme(2, 32)])
    assert CacheScheme(2, 8).token_bytes(SHAPE, values=False) == 2 * (16 * 2 / 4 + 4 * 16 / 64 + 4 * 16)


def test_which_tokens_are_packed() -> None:
    assert [blocks_of(n, 128) for n in (1, 191, 192, 255, 256)] == [0, 0, 1, 1, 2]
    scheme, shape = CacheScheme(2, 8), HeadShape(2, 2, 64)
    assert scheme.cache_bytes(shape, 191, 128) == CacheScheme().cache_bytes(shape, 191, 128) == 191 * 2 * 2 * 64 * 4
    assert scheme.cache_bytes(shape, 192, 128) == 128 * 2 * 2 * 64 * 4 + 64 * scheme.token_bytes(shape)


@pytest.mark.parametrize("causal", [False, True])
def test_the_definition_is_folded_by_groups(causal: bool) -> None:
    case = Case(HeadShape(6, 2, 8), 7, 7, causal)
    operands = Operands(case)
    mask = np.where(np.tri(7, dtype=bool), 0.0, -np.inf) if causal else None
    q = operands.q.swapaxes(1, 2)
    want = reference_attention(q, *operands.by_head, case.shape.scale, mask)[:, :, checked(7)].swapaxes(1, 2)
    np.testing.assert_allclose(operands.exact, want, rtol=1e-12)
    seen = 28 if causal else 49
    assert case.operations == 2 * 2 * 6 * 8 * seen


def test_a_picture_of_the_steps(measured: list[AttentionMeasurement], tmp_path: Path) -> None:
    longer = [replace(one, case=replace(one.case, keys=400)) for one in measured if one.case.step]
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    for path in (first, second):
        plot_attention([*measured, *longer], "a cpu", path)
    assert first.read_bytes() == second.read_bytes()
    text = first.read_text()
    for label in (
        "4/2x16, 1 thread",
        "t2a8",
        "ort-gqa",
        "bfloat16",
        "3 planes",
        "400 tokens",
        "ms a step",
        "large elements, keys",
    ):
        assert f"<!-- {label} -->" in text
    assert "ort-mha" not in text
    with pytest.raises(OptionError, match="would show steps, and none was measured"):
        plot_attention(measured[-2:], "a cpu", tmp_path / "c.svg")


def test_a_wrong_answer_ends_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(SHAPE, 1, 128)
    monkeypatch.setattr(Operands, "exact", 2 * Operands(case).exact)
    with pytest.raises(
        WrongAnswerError, match=r"full, 4/2x16, step of 128: relative error is 5.*e-01; expected at most"
    ):
        next(measure_attention([case], [CacheScheme()], turns=1))
    engine = replace(
        Engines(resolve("native"), 64).make(Operands(case), [CacheScheme()])[CacheScheme()],
        result=lambda got: got[:, :, :1],
    )
    with pytest.raises(WrongAnswerError, match=r"the result is \(1, 1, 1, 16\); expected \(1, 1, 4, 16\)"):
        engine.check(case)


def test_kernels_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = itertools.count()

    def counted(*arguments: Any) -> Any:
        next(built)
        return build_kernel(*arguments)

    monkeypatch.setattr(attention_engines, "build_kernel", counted)
    engines = Engines(resolve("native"), BLOCK)
    for keys in (2 * BLOCK, 200):
        made = engines.make(Operands(Case(SHAPE, 1, keys)), [CacheScheme(), CacheScheme(1, 8)])
        assert all(one.check(Case(SHAPE, 1, keys)) < 3e-2 for one in made.values())
    assert next(built) == 2


@pytest.mark.parametrize("keys", [1 << 12, 1 << 16])
def test_sums_err_as_the_bound_of_float32_says(keys: int) -> None:
    """Values added one by one, divided by weights added one by one: no kernel does worse."""
    rng, eps = np.random.default_rng(0), np.finfo(np.float32).eps
    weights = np.exp(rng.standard_normal((keys, 1), dtype=np.float32))
    values = rng.standard_normal((keys, 48), dtype=np.float32)
    products = weights * values
    got = np.cumsum(products, 0)[-1] / np.cumsum(weights, 0)[-1]
    want = products.astype(np.float64).sum(0) / weights.astype(np.float64).sum(0)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    # 0.27 is derived; the bound is 1.
    assert 0.1 < error / (eps * keys**0.5) < 0.4


@pytest.mark.parametrize(
    ("text", "shape"),
    [("32/8x128", HeadShape(32, 8, 128)), ("12x64", HeadShape(12, 12, 64)), ("2/2x3", HeadShape(2, 2, 3))],
)
def test_shapes(text: str, shape: HeadShape) -> None:
    assert HeadShape.parse(text) == shape
    assert HeadShape.parse(str(shape)) == shape


@pytest.mark.parametrize(
    "text", ["", "32", "32x", "x64", "3/2x64", "0x64", "4/0x64", "4x0", "2/4x64", "-1x4", "4x64x1"]
)
def test_bad_shapes(text: str) -> None:
    with pytest.raises(OptionError, match=r"^shapes: got "):
        HeadShape.parse(text)


@pytest.mark.parametrize("text", ["full", "t1a1", "t3a32"])
def test_schemes(text: str) -> None:
    assert str(CacheScheme.parse(text)) == text


@pytest.mark.parametrize("text", ["", "t0a8", "t4a8", "t1a16", "t1", "Full", "t1a8g64"])
def test_bad_schemes(text: str) -> None:
    with pytest.raises(OptionError, match=r"unknown; expected full or t\{1-3\}a\{1\|8\|32\}"):
        CacheScheme.parse(text)


@pytest.mark.parametrize(
    ("cached", "prompts", "window", "match"),
    [
        ([191], [], 128, "cached: is 191; of up to 191 tokens none is packed"),
        ([], [1], 128, "prompts: is 1; expected at least 2"),
        ([4096], [], 100, "window: is 100; expected a multiple of 64"),
        ([4096], [], 0, "window: is 0; expected a multiple of 64, from 64 on"),
    ],
)
def test_bad_lengths(cached: list[int], prompts: list[int], window: int, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        list(cases_of([SHAPE], cached, prompts, window=window))


def test_bad_turns() -> None:
    with pytest.raises(OptionError, match="turns: is 0; expected at least 1"):
        next(measure_attention([Case(SHAPE, 1, 256)], SCHEMES, turns=0))


def test_what_no_token_is_packed_of() -> None:
    with pytest.raises(OptionError, match="cached: 100 tokens are all among the last 64, which stay float32"):
        Engines(resolve("native"), 64).make(Operands(Case(SHAPE, 1, 100)), [CacheScheme(1)])
