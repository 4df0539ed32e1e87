"""Attention of prompts on a GPU, in bfloat16 with sums in float32: checked against float64, timed beside torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.gpu.cases import Prompt, prompt_name
from benchmarks.gpu.kernels import Kernels
from benchmarks.gpu.reference import rounded
from tvm_ternary.formats import Scheme
from tvm_ternary.kernels.attention import reference_attention

if TYPE_CHECKING:
    from benchmarks.gpu.device import Call, Device

EPSILON = float(np.finfo(np.float32).eps)
UNIT = 2.0**-8
"""By what share of itself a number changes at most that is rounded to bfloat16."""
_ROUNDED = Scheme.parse("t1abf16")


def wrong_results(kernels: Kernels, prompt: Prompt, generator: np.random.Generator) -> int:
    """How many results of the first and the last head are not what they should be, of random operands."""
    heads, kv_heads, size, tokens, causal = prompt
    counts = (heads, kv_heads, kv_heads)
    operands = [generator.standard_normal((1, tokens, count, size), np.float32) for count in counts]
    gpu = kernels.gpu
    out = gpu.array(np.full(operands[0].shape, np.nan, np.float32), "float32")
    function = gpu.function(kernels.path, f"prompt_{prompt_name(prompt)}")
    function(*(gpu.array(x, "float32") for x in operands), out)
    got, found = gpu.read(out)[0], 0
    mask = np.where(np.tri(tokens, dtype=bool), 0.0, -np.inf) if causal else None
    for head in {0, heads - 1}:
        kv = head // (heads // kv_heads)
        q, k, v = (rounded(x[0, :, n], _ROUNDED) for x, n in zip(operands, (head, kv, kv), strict=True))
        four = [x[None, None] for x in (q, k, v)]
        want = reference_attention(*four, size**-0.5, mask)[0, 0]
        scale = size**-0.5
        off = (size + 8) * (scale * np.abs(q) @ np.abs(k).T).max(-1, keepdims=True) * EPSILON
        moved = np.expm1(2 * off) + UNIT + 2 * (8 + tokens) * EPSILON
        bound = moved * reference_attention(*four[:2], np.abs(four[2]), scale, mask)[0, 0]
        found += int((~(np.abs(got[:, head] - want) <= bound)).sum())
    return found


class TimedPrompt:
    """Random operands on a GPU."""

    def __init__(self, device: Device, prompt: Prompt) -> None:
        self._device, self._prompt, self.name = device, prompt, prompt_name(prompt)

    def times(self) -> dict[str, Any]:
        """A line of results: seconds, and those of torch's attention in bfloat16, whose operands are rounded before."""
        found = self._device.seconds([[self._ours()], [self._torch()]])
        heads, _, size, tokens, causal = self._prompt
        return {
            "case": self.name,
            "seconds": found[0].seconds,
            "torch_bf16": found[1].seconds,
            "spread": max(one.spread for one in found),
            "operations": 4 * heads * size * tokens * tokens // (2 if causal else 1),
        }

    def _ours(self) -> Call:
        torch, place, (heads, kv_heads, size, tokens, _) = self._device.torch, self._device.place, self._prompt
        q, k, v, out = (torch.randn(1, tokens, n, size, device=place) for n in (heads, kv_heads, kv_heads, heads))
        function = self._device.library[f"prompt_{self.name}"]
        return lambda: function(q, k, v, out)

    def _torch(self) -> Call:
        torch, place, (heads, kv_heads, size, tokens, causal) = self._device.torch, self._device.place, self._prompt
        kind = {"device": place, "dtype": torch.bfloat16}
        q, k, v = (torch.randn(1, n, tokens, size, **kind) for n in (heads, kv_heads, kv_heads))
        attend = torch.nn.functional.scaled_dot_product_attention
        return lambda: attend(q, k, v, is_causal=causal, enable_gqa=heads != kv_heads)
