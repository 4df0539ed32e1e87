"""Attention of prompts on a GPU, in bfloat16 with sums in float32: checked against float64, timed beside torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from benchmarks.gpu.cases import WINDOW, Prompt, prompt_name
from benchmarks.gpu.kernels import Kernels
from benchmarks.gpu.reference import rounded
from tvm_ternary.formats import Scheme
from tvm_ternary.kernels.attention import pack_mask, reference_attention
from tvm_ternary.kernels.ternary_keys import BLOCK, digits, pack, packed_words, quantize_block

if TYPE_CHECKING:
    from benchmarks.gpu.device import Call, Device

EPSILON = float(np.finfo(np.float32).eps)
UNIT = 2.0**-8
"""By what share of itself a number changes at most that is rounded to bfloat16."""
BFLOAT16 = Scheme.parse("t1abf16")
CHECKED_QUERIES = 512
"""Of a head."""

Floats = npt.NDArray[np.float64]


def wrong_results(kernels: Kernels, prompt: Prompt, generator: np.random.Generator) -> int:
    """How many results of the first and the last head are not what they should be, of random operands."""
    heads, kv_heads, size, tokens, hides, planes = prompt
    counts = (heads, kv_heads, kv_heads)
    q, k, v = (generator.standard_normal((1, tokens, count, size), np.float32) for count in counts)
    gpu, packed = kernels.gpu, list[Any]()
    stand_for_k = _rounded(k[0].swapaxes(0, 1))
    if planes:
        blocks = max(tokens - WINDOW, 0) // BLOCK
        first = k[0, : blocks * BLOCK].reshape(blocks, BLOCK, kv_heads, size).transpose(2, 0, 1, 3)
        codes, scale = quantize_block(first, planes, -2)
        stand_for_k[:, : blocks * BLOCK] = multiplied(codes, scale, -2)
        # What is packed is not to be read as it was, nor what is behind.
        k[:, : blocks * BLOCK] = np.nan
        spare = tokens // BLOCK + 1 - blocks
        packed = [np.pad(x, [(0, 0), (0, spare), *[(0, 0)] * 3])[None] for x in pack(codes, planes)]
        packed.append(np.pad(scale, [(0, 0), (0, spare), (0, 0)], constant_values=np.nan)[None])
    out = gpu.array(np.full(q.shape, np.nan, np.float32), "float32")
    function = gpu.function(kernels.path, f"prompt_{prompt_name(prompt)}")
    masks = [pack_mask(np.tri(tokens, dtype=bool))[None, None]] if hides == "bits" else []
    function(*(gpu.array(x, x.dtype.name) for x in (q, *packed, k, v, *masks)), out)
    got, found = gpu.read(out)[0], 0
    for head in {0, heads - 1}:
        kv = head // (heads // kv_heads)
        operands = _rounded(q[0, :, head]), stand_for_k[kv], _rounded(v[0, :, kv])
        found += wrong_in_head(got[:, head], operands, generator, causal=bool(hides))
    return found


def multiplied(codes: Any, scale: Any, axis: int) -> Floats:
    """What blocks (heads, blocks, tokens, size) are multiplied as, (heads, tokens, size): two roundings."""
    product = codes * np.expand_dims(_rounded(scale), axis)
    return _rounded(product.astype(np.float32)).reshape(len(codes), -1, codes.shape[-1])


def wrong_in_head(
    got: Any, operands: tuple[Floats, Floats, Floats], generator: np.random.Generator, *, causal: bool
) -> int:
    """How many results of a head are off by more than rounding weights, and sums in float32, can make them.

    Parameters
    ----------
    got : (queries, size)
    operands : (queries, size), (tokens, size) and (tokens, size)
        What is multiplied.
    generator : numpy Generator
        Picks the queries that are looked at, `CHECKED_QUERIES` of many: these take seconds a head.
    causal : bool
        The queries are those of the last tokens.
    """
    q, k, v = operands
    rows = np.arange(len(q))
    if len(q) > CHECKED_QUERIES:
        rows = generator.choice(rows, CHECKED_QUERIES, replace=False)
    size, scale, q = q.shape[-1], q.shape[-1] ** -0.5, q[rows]
    seen = np.arange(len(k)) <= rows[:, None] + len(k) - len(got)
    mask = np.where(seen, 0.0, -np.inf) if causal else None
    q, k, v = (x[None, None] for x in (q, k, v))
    want = reference_attention(q, k, v, scale, mask)[0, 0]
    off = (size + 8) * (scale * np.abs(q[0, 0]) @ np.abs(k[0, 0]).T).max(-1, keepdims=True) * EPSILON
    moved = np.expm1(2 * off) + UNIT + 2 * (8 + k.shape[2]) * EPSILON
    bound = moved * reference_attention(q, k, np.abs(v), scale, mask)[0, 0]
    return int((~(np.abs(got[rows] - want) <= bound)).sum())


def _rounded(x: Any) -> Floats:
    return rounded(np.ascontiguousarray(x), BFLOAT16)


class TimedPrompt:
    """Random operands on a GPU."""

    def __init__(self, device: Device, prompt: Prompt) -> None:
        self._device, self._prompt, self.name = device, prompt, prompt_name(prompt)

    def times(self) -> dict[str, Any]:
        """A line of results: seconds, and those of torch's attention in bfloat16, whose operands are rounded before."""
        found = self._device.seconds([[self._ours()], [self._torch()]])
        heads, _, size, tokens, hides, _ = self._prompt
        return {
            "case": self.name,
            "seconds": found[0].seconds,
            "torch_bf16": found[1].seconds,
            "spread": max(one.spread for one in found),
            "operations": 4 * heads * size * tokens * tokens // (2 if hides else 1),
        }

    def _ours(self) -> Call:
        torch, place, (heads, kv_heads, size, tokens, hides, planes) = (
            self._device.torch,
            self._device.place,
            self._prompt,
        )
        q, k, v, out = (torch.randn(1, tokens, n, size, device=place) for n in (heads, kv_heads, kv_heads, heads))
        outer, packed = (1, kv_heads, tokens // BLOCK + 1), list[Any]()
        for field in digits(planes) if planes else ():
            words = torch.randint(
                -(2**31), 2**31, (*outer, *packed_words(BLOCK, size, field)), device=place, dtype=torch.int32
            )
            packed.append(words.view(torch.uint32))
        if planes:
            packed.append(torch.rand((*outer, size), device=place))
        function = self._device.library[f"prompt_{self.name}"]
        masks = []
        if hides == "bits":
            masks = [torch.from_numpy(pack_mask(np.tri(tokens, dtype=bool))[None, None]).to(place)]
        return lambda: function(q, *packed, k, v, *masks, out)

    def _torch(self) -> Call:
        torch, place, (heads, kv_heads, size, tokens, hides, _) = self._device.torch, self._device.place, self._prompt
        kind = {"device": place, "dtype": torch.bfloat16}
        q, k, v = (torch.randn(1, n, tokens, size, **kind) for n in (heads, kv_heads, kv_heads))
        attend = torch.nn.functional.scaled_dot_product_attention
        return lambda: attend(q, k, v, is_causal=bool(hides), enable_gqa=heads != kv_heads)
