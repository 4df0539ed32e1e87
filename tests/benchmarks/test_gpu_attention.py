"""What is timed of attention on a GPU, with a torch that only counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from benchmarks.gpu.attention import TimedCache
from benchmarks.gpu.cases import ASKED_CACHE
from benchmarks.gpu.device import Time
from benchmarks.gpu.prompts import TimedPrompt

CALLS = list[tuple[Any, ...]]


class Library:
    """Functions that note what they are called with."""

    def __init__(self, calls: CALLS) -> None:
        self._calls = calls

    def __getitem__(self, name: str) -> Any:
        return lambda *arrays, **options: self._calls.append((name, [array.shape for array in arrays], options))


def array(*shape: Any, **_: Any) -> Any:
    extents = shape[0] if isinstance(shape[0], tuple) else shape
    return SimpleNamespace(shape=extents, view=lambda dtype: array(extents))


def counting_device(calls: CALLS) -> Any:
    def seconds(contestants: list[list[Any]]) -> list[Time]:
        for each in contestants:
            each[0]()
        return [Time(1e-5 * len(each), 0.01) for each in contestants]

    library = Library(calls)
    functional = SimpleNamespace(scaled_dot_product_attention=library["sdpa"])
    torch = SimpleNamespace(
        int32=0,
        uint32=0,
        bfloat16=0,
        nn=SimpleNamespace(functional=functional),
        rand=array,
        randn=array,
        empty=array,
        randint=lambda low, high, shape, **_: array(shape),
        full=lambda shape, value, **_: array(shape),
    )
    return SimpleNamespace(torch=torch, place="cuda", library=library, seconds=seconds)


def test_a_step_is_timed_over_more_than_a_gpu_keeps_beside_torch() -> None:
    calls: CALLS = []
    line = TimedCache(counting_device(calls), ASKED_CACHE).times()
    # 511 blocks of 8 heads, 8,960 bytes each, and 64 tokens in float.
    assert line["bytes"] == 511 * 8 * 8960 + 64 * 8 * 128 * 8
    # Sets of operands: 128 MiB of our caches, one of torch's.
    assert [round(line[key] * 1e5) for key in ("seconds", "append", "torch_bf16_rows", "torch_bf16_grouped")] == [
        4,
        1,
        1,
        1,
    ]
    (step, shapes, _), (append, _, _), rows, grouped = calls
    assert (step, append) == ("step_t2kv_32x8x128_32768", "append_t2kv_32x8x128_32768")
    assert shapes[:2] == [(1, 1, 32, 128), (1, 8, 511, 4, 16, 16)]
    assert rows == ("sdpa", [(1, 8, 4, 128), *[(1, 8, 32768, 128)] * 2], {})
    assert grouped == ("sdpa", [(1, 32, 1, 128), *[(1, 8, 32768, 128)] * 2], {"enable_gqa": True})


def test_a_prompt_is_timed_beside_torch() -> None:
    calls: CALLS = []
    line = TimedPrompt(counting_device(calls), (32, 8, 128, 512, "causal", 0)).times()
    assert (line["case"], line["operations"]) == ("32x8x128_512_causal", 2 * 32 * 128 * 512 * 512)
    ours, theirs = calls
    q, k = (1, 512, 32, 128), (1, 512, 8, 128)
    assert ours == ("prompt_32x8x128_512_causal", [q, k, k, q], {})
    heads = [(1, 32, 512, 128), *[(1, 8, 512, 128)] * 2]
    assert theirs == ("sdpa", heads, {"is_causal": True, "enable_gqa": True})


def test_prompts_over_packed_keys_and_behind_a_cache() -> None:
    calls: CALLS = []
    TimedPrompt(counting_device(calls), (32, 8, 128, 512, "causal", 3)).times()
    (name, shapes, _), _ = calls
    words = [(1, 8, 9, 4, count, 16) for count in (8, 16)]
    assert name == "prompt_t3k_32x8x128_512_causal"
    assert shapes[1:4] == [*words, (1, 8, 9, 128)]
    calls.clear()
    line = TimedCache(counting_device(calls), ASKED_CACHE).prompt_times(512)
    (ours, shapes, _), theirs = calls
    assert (line["case"], line["operations"]) == ("t2kv_32x8x128_32768_512", 4 * 32 * 128 * 512 * (32768 + 256))
    assert ours == "prompt_t2kv_32x8x128_32768_512"
    assert shapes[-5:] == [(1, 512, 8, 128), (1, 512, 8, 128), (1,), (1,), (1, 512, 32, 128)]
    assert theirs == ("sdpa", [(1, 32, 512, 128), *[(1, 8, 33280, 128)] * 2], {"enable_gqa": True})
